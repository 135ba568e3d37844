"""What is sharp on the memorized population and flat on the reasoning population, per weight and
per neuron.

Both curvatures are divided by their mean over the model first, so that margins and losses, and
populations of any temper, can be compared; `damping` (a share of that mean) keeps directions that
neither population uses from winning by a ratio of noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from curvature.targets import Target


@dataclass(frozen=True)
class Contrast:
    """log((memorized + damping) / (reasoning + damping)) of scaled curvatures, by target or layer.
    High: serves memory alone."""

    scores: dict[str, torch.Tensor]

    def share_above(self, threshold: float = 0.0) -> float:
        """Share of components whose score is above the threshold."""
        total = sum(s.numel() for s in self.scores.values())
        return sum(int((s > threshold).sum()) for s in self.scores.values()) / total


def contrast(
    memorized: Mapping[str, torch.Tensor],
    reasoning: Mapping[str, torch.Tensor],
    *,
    damping: float = 0.1,
) -> Contrast:
    """Contrast of two sets of non-negative curvatures with equal keys and shapes.

    Raises ValueError where they differ in keys or shapes, hold a negative value (clamp a Hessian's
    diagonal, or take the Gauss-Newton's), or are zero everywhere.
    """
    if set(memorized) != set(reasoning) or not memorized:
        raise ValueError("the two populations' curvatures are not of the same targets")
    if damping <= 0:
        raise ValueError(f"damping {damping} must be positive")
    scaled = []
    for label, curvatures in (("memorized", memorized), ("reasoning", reasoning)):
        count = sum(c.numel() for c in curvatures.values())
        mean = sum(float(c.sum(dtype=torch.float64)) for c in curvatures.values()) / count
        lowest = min(float(c.min()) for c in curvatures.values())
        if lowest < 0 or not mean > 0:
            raise ValueError(
                f"the {label} curvature must be non-negative and not all zero (lowest "
                f"{lowest:.3g}, mean {mean:.3g})"
            )
        scaled.append({name: c / mean for name, c in curvatures.items()})
    scores = {}
    for name, m in scaled[0].items():
        r = scaled[1][name]
        if m.shape != r.shape:
            raise ValueError(f"{name}: shapes {tuple(m.shape)} and {tuple(r.shape)} differ")
        scores[name] = ((m + damping) / (r + damping)).log()
    return Contrast(scores)


def weight_saliency(
    curvatures: Mapping[str, torch.Tensor], targets: list[Target]
) -> dict[str, torch.Tensor]:
    """Predicted loss of setting each weight to zero, 1/2 h w^2 in nats per token (LeCun et al.
    1989), [d_out, d_in] by target."""
    return {
        t.name: 0.5 * curvatures[t.name] * t.weight.detach().float().square().to(curvatures[t.name])
        for t in targets
    }
