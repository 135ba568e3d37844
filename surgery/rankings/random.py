"""`random`: the control that removes neurons (or weights) by lot. `grain`: `neurons` or
`weights`.
"""

from __future__ import annotations

import torch

from curvature.targets import MlpBlock, Target
from surgery.rankings.base import Cut, Operation, Ranking, edit_targets, rank_neurons, zero_lowest


def score(operation: Operation, block: MlpBlock) -> torch.Tensor:
    return torch.rand(block.down.d_in, generator=operation.generator(block.down.name))


def edit(
    operation: Operation, target: Target, weight: torch.Tensor
) -> tuple[torch.Tensor | None, int, int]:
    scores = torch.rand(weight.shape, generator=operation.generator(target.name))
    return zero_lowest(scores.to(weight.device), weight, operation.strength)


def cut(operation: Operation) -> Cut:
    if operation.settings["grain"] == "weights":
        return edit_targets(operation, edit)
    return rank_neurons(operation, score)


RANKING = Ranking(
    "random",
    cut,
    "share of the neurons (or weights) that stays",
    0.6,
    (0.9, 0.3),
    needs_factors=False,
    settings={"grain": "neurons", "multiple": 1},
)
