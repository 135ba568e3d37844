"""Closed-form repair of a shrunk model: let the neurons that stay stand in for those that went."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from curvature.factors import Factors
from curvature.populations import Batch
from curvature.targets import mlp_blocks
from surgery.operate import kept_neurons
from surgery.plan import Plan


def refitted(weight: torch.Tensor, A: torch.Tensor, keep: torch.Tensor, eps: float) -> torch.Tensor:
    """W_S = W A_{:,S} (A_SS + eps I)^-1: [d_out, |S|] fp64, the least-squares fit of W a by the
    kept inputs alone.

    Minimizes E|W a - W_S a_S|^2 + eps |W_S - W_{:,S}|^2 with A = E[a a^T] (the ridge pulls towards
    the weights as they were, so that a full S gives W back exactly). weight: [d_out, d_ff]; A:
    [d_ff, d_ff]; keep: [|S|] int64; eps: relative to the mean of A's diagonal.
    """
    weight, A = weight.double(), A.double()
    gone = torch.ones(A.shape[0], dtype=torch.bool, device=A.device)
    gone[keep] = False
    ridge = eps * A.diagonal().mean()
    kept_square = A[keep][:, keep]
    kept_square = kept_square + ridge * torch.eye(len(keep), dtype=A.dtype, device=A.device)
    # W A_{:,S} + ridge W_S = W_S (A_SS + ridge) + W_gone A_{gone,S}: only what went has to be
    # re-expressed.
    right = weight[:, gone] @ A[gone][:, keep]
    return weight[:, keep] + torch.linalg.solve(kept_square, right.T).T


@torch.no_grad()
def refit(
    small: nn.Module,
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, Factors],
    *,
    eps: float = 1e-4,
) -> dict[str, float]:
    """Refit every `down_proj` of `small` = shrink(model, plan) in place, from factors of `model` on
    the kept populations.

    Returns the relative output error left by layer's down name, E|W a - W_S a_S|^2 / E|W a|^2,
    before healing anything else. Raises ValueError where factors for a down projection are missing.
    """
    old = {block.layer: block for block in mlp_blocks(model)}
    kept = kept_neurons(plan, list(old.values()))
    left: dict[str, float] = {}
    for block in mlp_blocks(small):
        name = block.down.name
        if name not in factors:
            raise ValueError(
                f"the repair needs input factors of {name}: collect them on the keep populations"
            )
        target = block.down.weight
        weight = old[block.layer].down.weight.detach()
        A, keep = factors[name].A.to(weight.device), kept[block.layer].to(weight.device)
        new = refitted(weight, A, keep, eps)
        target.copy_(new)
        error = weight.double().clone()
        error[:, keep] -= new
        scale = ((weight.double() @ A.double()) * weight.double()).sum().clamp_min(1e-300)
        left[name] = float(((error @ A.double()) * error).sum() / scale)
    return left


class _Stop(Exception):
    """Raised by a hook to end a forward pass once its layer was reached."""


@torch.no_grad()
def with_mlp_bias(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` whose MLP matrices have biases (zero ones), where the architecture knows
    them (`mlp_bias`, as Llama has).

    `refit_in_order` then puts the mean output of removed neurons into down's bias. Raises
    ValueError for an architecture without MLP biases.
    """
    if not hasattr(model.config, "mlp_bias"):
        raise ValueError(f"{type(model).__name__} has no MLP biases to hold a mean output")
    richer = copy.deepcopy(model)
    for block in mlp_blocks(richer):
        for target in block.targets:
            if target.bias is None:
                zeros = torch.zeros(
                    target.d_out, device=target.weight.device, dtype=target.weight.dtype
                )
                target.module.bias = nn.Parameter(zeros)
    richer.config.mlp_bias = True
    return richer


@torch.no_grad()
def refit_in_order(
    small: nn.Module,
    model: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    *,
    eps: float = 1e-4,
    stream: bool | None = None,
) -> None:
    """Refit every `down_proj` of `small` in place, layer by layer, against `model` as the teacher.

    For each layer in order: with a the inputs of `small`'s down projection (after all repairs below
    it) and y what the teacher's MLP adds, W <- argmin E|y - W a|^2 + eps |W - W_0|^2, closed form
    from E[y a^T] and E[a a^T]. The error that earlier layers left is so seen, and partly undone, by
    the later ones. stream: y also holds the difference of the two residual streams before the MLP's
    output is added (only where the down projection's output goes to the stream as it is, without a
    norm behind it).

    batches: a callable that yields the same batches at every call. Costs two forward passes of
    `batches` per layer. Raises ValueError where no token came.
    """
    if stream is None:
        stream = not any("post_feedforward" in name for name, _ in small.named_modules())
    device = next(small.parameters()).device
    teachers = {block.layer: block for block in mlp_blocks(model)}
    for block in mlp_blocks(small):
        teacher = teachers[block.layer]
        seen: dict[str, torch.Tensor] = {}

        def catch(key: str, seen: dict[str, torch.Tensor] = seen) -> Callable[..., None]:
            def hook(
                module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
            ) -> None:
                seen[key], seen[f"{key} out"] = inputs[0], output
                if not stream:
                    raise _Stop

            return hook

        def catch_layer(key: str, seen: dict[str, torch.Tensor] = seen) -> Callable[..., None]:
            def hook(
                module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
            ) -> None:
                seen[f"{key} stream"] = output[0] if isinstance(output, tuple) else output
                raise _Stop

            return hook

        weight = block.down.weight
        bias = block.down.bias
        d_out, d_in = weight.shape
        old = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
        d_in = old.shape[1]
        square = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        cross = torch.zeros(d_out, d_in, dtype=torch.float64, device=device)
        tokens = 0
        with ExitStack() as hooks:
            for key, part, whole in (("small", block, small), ("teacher", teacher, model)):
                handle = part.down.module.register_forward_hook(catch(key))
                hooks.callback(handle.remove)
                if stream:
                    layer_name = part.down.name.rsplit(".", 2)[0]
                    handle = whole.get_submodule(layer_name).register_forward_hook(catch_layer(key))
                    hooks.callback(handle.remove)
            for batch in batches():
                ids, mask = batch.ids.to(device), batch.mask.to(device)
                for whole in (small, model):
                    try:
                        whole(input_ids=ids, attention_mask=mask)
                    except _Stop:
                        continue
                valid = mask.bool()
                a = seen["small"][valid].double()
                y = seen["teacher out"][valid].double()
                if stream:
                    y = (
                        y
                        + (
                            seen["teacher stream"]
                            - seen["teacher out"]
                            - seen["small stream"]
                            + seen["small out"]
                        )[valid].double()
                    )
                if block.down.bias is not None:
                    # A constant input: the mean output of what was removed goes into the bias.
                    a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
                square += a.T @ a
                cross += y.T @ a
                tokens += len(a)
        if tokens == 0:
            raise ValueError("the repair got no tokens: give a keep population with text")
        square, cross = square / tokens, cross / tokens
        # The constant input is no measure of the scale of the others.
        ridge = eps * square.diagonal()[: weight.shape[1]].mean()
        eye = torch.eye(d_in, dtype=square.dtype, device=device)
        new = torch.linalg.solve(square + ridge * eye, (cross + ridge * old.double()).T).T
        weight.copy_(new[:, : weight.shape[1]])
        if bias is not None:
            bias.copy_(new[:, -1])
