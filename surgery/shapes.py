"""Models that no plain class holds (layers of different widths, factored matrices): a model type of
their own and the small modelling file that travels beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from curvature.targets import DOWN, GATE, UP, layer_of
from surgery.shrink import WIDTHS

SOURCE = '''"""Written by Lethe: not all matrices here are shaped as {architecture} has them.

`shapes` in config.json names every linear layer that differs: [outputs, inputs], or
[outputs, rank, inputs] for a product of two. Load with trust_remote_code=True.
"""

from torch import nn
from transformers import {config}, {model}, {causal}


def reshape(module, prefix, shapes):
    for name, shape in shapes.items():
        if not name.startswith(prefix):
            continue
        parent, _, leaf = name.removeprefix(prefix).rpartition(".")
        parent = module.get_submodule(parent)
        bias = getattr(parent, leaf).bias is not None
        if len(shape) == 2:
            new = nn.Linear(shape[1], shape[0], bias=bias)
        else:
            new = nn.Sequential(
                nn.Linear(shape[2], shape[1], bias=False), nn.Linear(shape[1], shape[0], bias=bias)
            )
        setattr(parent, leaf, new)


class LetheConfig({config}):
    model_type = "{model_type}"

    def __init__(self, shapes=None, **settings):
        super().__init__(**settings)
        self.shapes = shapes or {{}}


class LetheModel({model}):
    config_class = LetheConfig

    def __init__(self, config):
        super().__init__(config)
        if config.shapes:
            reshape(self, "{base}.", config.shapes)
            self.post_init()


class LetheForCausalLM({causal}):
    config_class = LetheConfig

    def __init__(self, config):
        super().__init__(config)
        if config.shapes:
            reshape(self, "", config.shapes)
            self.post_init()
'''


@dataclass(frozen=True)
class OwnType:
    """What a checkpoint of an own model type needs: changes to config.json and the modelling file's
    text.
    """

    changes: dict[str, Any]
    source: str
    file: str = "modeling_lethe.py"


def own_type(model: PreTrainedModel) -> OwnType | None:
    """The own model type that `model` needs, or None where the plain class holds it.

    Compared are all linear layers inside decoder layers with what the configuration's width says.
    Raises ValueError for a factored matrix that is not two linear layers.
    """
    shapes: dict[str, list[int]] = {}
    widths: dict[str, set[tuple[int, ...]]] = {}
    for name, module in model.named_modules():
        if layer_of(name) < 0:
            continue
        if isinstance(module, nn.Sequential) and len(module) == 2:
            right, left = module
            if not (isinstance(right, nn.Linear) and isinstance(left, nn.Linear)):
                raise ValueError(f"{name} is a product that Lethe did not make: it cannot be saved")
            shapes[name] = [left.out_features, right.out_features, right.in_features]
    factored = tuple(f"{name}." for name in shapes)
    text = model.config.get_text_config()
    attribute = next((w for w in WIDTHS if isinstance(getattr(text, w, None), int)), None)
    for name, module in model.named_modules():
        if layer_of(name) < 0 or name.startswith(factored) or not isinstance(module, nn.Linear):
            continue
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        shape = (module.out_features, module.in_features)
        widths.setdefault(kind, set()).add(shape)
        mlp_side = _mlp_side(name, module)
        if attribute is not None and mlp_side is not None and mlp_side != getattr(text, attribute):
            shapes[name] = list(shape)
    odd = [kind for kind, found in widths.items() if len(found) > 1]
    if not shapes and odd:
        raise ValueError(
            f"layers differ in the shape of {odd[0]}, and the configuration cannot say so"
        )
    if not shapes:
        return None
    causal, config, body = (_plain(x) for x in (model, model.config, model.base_model))
    model_type = f"lethe_{str(model.config.model_type).removeprefix('lethe_')}"
    source = SOURCE.format(
        architecture=causal,
        config=config,
        model=body,
        causal=causal,
        model_type=model_type,
        base=model.base_model_prefix,
    )
    changes = {
        "model_type": model_type,
        "architectures": ["LetheForCausalLM"],
        "shapes": shapes,
        "auto_map": {
            "AutoConfig": "modeling_lethe.LetheConfig",
            "AutoModel": "modeling_lethe.LetheModel",
            "AutoModelForCausalLM": "modeling_lethe.LetheForCausalLM",
        },
    }
    return OwnType(changes, source)


def _plain(thing: object) -> str:
    """The class of transformers that an object has or, loaded from a shipped file, inherits."""
    for kind in type(thing).__mro__:
        if kind.__module__.startswith("transformers.models."):
            return kind.__name__
    raise ValueError(
        f"{type(thing).__name__} is not a class of transformers: no modelling file can be written "
        "for it"
    )


def _mlp_side(name: str, module: nn.Linear) -> int | None:
    """The MLP width that a linear layer has, from its last name; None where it is not part of an
    MLP.
    """
    last = name.rpartition(".")[2]
    if last in (*GATE, *UP):
        return module.out_features
    return module.in_features if last in DOWN else None
