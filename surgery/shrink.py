"""Make a plan real: fewer parameters in memory and in the file."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from curvature.targets import Target, mlp_blocks
from surgery.operate import kept_neurons
from surgery.plan import Plan, check_plan

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
"""Names that configurations have for the MLP's width."""


def _slice(target: Target, index: torch.Tensor, dim: int) -> None:
    """Keep the chosen outputs (dim 0) or inputs (dim 1) of a matrix, in place."""
    module, old = target.module, target.parameter
    index = index.to(old.device)
    stored = 1 - dim if target.kind == "conv1d" else dim
    weight = old.detach().index_select(stored, index)
    module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    bias = target.bias
    if bias is not None and dim == 0:
        module.bias = nn.Parameter(
            bias.detach().index_select(0, index), requires_grad=bias.requires_grad
        )
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif dim == 0:
        module.nf = len(index)  # type: ignore[assignment]
    else:
        module.nx = len(index)  # type: ignore[assignment]


@torch.no_grad()
def shrink(model: PreTrainedModel, plan: Plan, *, check: bool = True) -> PreTrainedModel:
    """A new model of the same class without the removed neurons: a smaller, uniform
    `intermediate_size`.

    Gate and up lose rows, down loses columns; everything else is copied as it is, so logits equal
    those of the model with these neurons zeroed (up to the order of summation). Raises ValueError
    on a plan that is not of kind `neurons`, does not cover every layer, or leaves layers of
    different widths (an ordinary checkpoint has one width).
    """
    if check:
        check_plan(plan, model)
    if plan.kind != "neurons":
        raise ValueError(
            "only a plan of kind neurons shrinks a model this way, and this one is of kind "
            f"{plan.kind}"
        )
    blocks = mlp_blocks(model)
    kept = kept_neurons(plan, blocks)
    missing = [block.layer for block in blocks if block.layer not in kept]
    if missing:
        raise ValueError(
            f"the plan leaves layers {missing} at full width: plan all layers, one width serves "
            "them all"
        )
    widths = {len(keep) for keep in kept.values()}
    if len(widths) > 1:
        raise ValueError(
            f"the plan leaves layers of different widths {sorted(widths)}: an ordinary checkpoint "
            "has one"
        )
    width = widths.pop()
    config = model.config.get_text_config()
    attribute = next((name for name in WIDTHS if hasattr(config, name)), None)
    if attribute is None:
        raise ValueError(
            f"{type(config).__name__} has no known name for the MLP's width: the result could not "
            "be saved"
        )
    small = copy.deepcopy(model)
    for block in mlp_blocks(small):
        keep = kept[block.layer]
        for target in block.targets:
            _slice(target, keep, 1 if target is block.down else 0)
            parent = small.get_submodule(target.name.rpartition(".")[0])
            if hasattr(parent, attribute):
                setattr(parent, attribute, width)
    setattr(small.config.get_text_config(), attribute, width)
    return small


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
