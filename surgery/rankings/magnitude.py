"""`magnitude`: the control that removes what is small.

`grain` neurons: |gate_n| |up_n| |down_n| (row, row and column norms; |up_n| |down_n| without a
gate), the scale of the neuron's contribution, unchanged when scale moves between its matrices.
`grain` weights: |W_ij| per output row.
"""

from __future__ import annotations

import torch

from curvature.targets import MlpBlock, Target
from surgery.rankings.base import (
    Cut,
    Operation,
    Ranking,
    edit_targets,
    rank_neurons,
    weight_of,
    zero_lowest,
)


def score(operation: Operation, block: MlpBlock) -> torch.Tensor:
    norms = weight_of(block.up).norm(dim=1) * weight_of(block.down).norm(dim=0)
    return norms if block.gate is None else norms * weight_of(block.gate).norm(dim=1)


def edit(
    operation: Operation, target: Target, weight: torch.Tensor
) -> tuple[torch.Tensor | None, int, int]:
    return zero_lowest(weight.abs(), weight, operation.strength)


def cut(operation: Operation) -> Cut:
    if operation.settings["grain"] == "weights":
        return edit_targets(operation, edit)
    return rank_neurons(operation, score)


RANKING = Ranking(
    "magnitude",
    cut,
    "share of the neurons (or weights) that stays",
    0.6,
    (0.9, 0.3),
    needs_factors=False,
    settings={"grain": "neurons", "multiple": 1},
)
