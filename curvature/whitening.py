"""The whitening profile: where a population's energy lies in the eigenbasis of a reference
population.

In the reference's own basis U, whitened by its eigenvalues lambda, any population with second
moment M has energy e_j = u_j^T M u_j and ratio e_j / lambda_j. Reference text has ratio 1
throughout; text that lives in directions which the reference leaves flat rises towards the flat
end.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from curvature.eigenbases import Eigenbasis, TargetEigenbases
from curvature.factors import Factors

FLAT_SHARE = 0.6
"""Share of directions, flattest first, that count as flat."""


@dataclass(frozen=True)
class WhiteningProfile:
    """Energy per bin of directions from the flattest to the sharpest; each list sums to 1.

    flat_reference, flat_other: shares of energy in the flattest `FLAT_SHARE` of directions. excess:
    their ratio, the number that says how much more of the other population lives where the
    reference is flat. log_ratio: mean over directions of log(e_j / lambda_j) after both are scaled
    to unit trace, in nats.
    """

    name: str
    reference: tuple[float, ...]
    other: tuple[float, ...]
    flat_reference: float
    flat_other: float
    excess: float
    log_ratio: float


def energies(matrix: torch.Tensor, basis: Eigenbasis) -> torch.Tensor:
    """u_j^T M u_j for every eigenvector, [n]."""
    if matrix.shape != basis.vectors.shape:
        raise ValueError(
            f"a factor {tuple(matrix.shape)} does not fit a basis {tuple(basis.vectors.shape)}"
        )
    return ((matrix @ basis.vectors) * basis.vectors).sum(0).clamp(min=0)


def whitening_profile(
    name: str, basis: Eigenbasis, other: torch.Tensor, *, bins: int = 20
) -> WhiteningProfile:
    """Profile of `other` [n, n] in a reference's eigenbasis. Raises ValueError on a mismatch and
    where either has no energy."""
    values, e = basis.values.double(), energies(other, basis).double()
    if float(values.sum()) <= 0 or float(e.sum()) <= 0:
        raise ValueError(f"{name}: a population without energy has no profile")
    values, e = values / values.sum(), e / e.sum()
    n = len(values)
    bins = min(bins, n)
    edges = [round(k * n / bins) for k in range(bins + 1)]
    flat = max(1, round(FLAT_SHARE * n))
    flat_reference, flat_other = float(values[:flat].sum()), float(e[:flat].sum())
    floor = 1e-6 / n
    return WhiteningProfile(
        name,
        tuple(float(values[a:b].sum()) for a, b in itertools.pairwise(edges)),
        tuple(float(e[a:b].sum()) for a, b in itertools.pairwise(edges)),
        flat_reference,
        flat_other,
        flat_other / max(flat_reference, 1e-12),
        float(((e + floor) / (values + floor)).log().mean()),
    )


def whitening_profiles(
    bases: Mapping[str, TargetEigenbases],
    other: Mapping[str, Factors],
    *,
    side: str = "A",
    bins: int = 20,
) -> dict[str, WhiteningProfile]:
    """Profiles of every target's inputs (side `A`) or output gradients (side `G`)."""
    if side not in ("A", "G"):
        raise ValueError(f"side {side!r}: expected A or G")
    missing = sorted(set(bases) - set(other))
    if missing:
        raise ValueError(f"no factors of the other population for {missing[0]}")
    return {
        name: whitening_profile(name, getattr(basis, side), getattr(other[name], side), bins=bins)
        for name, basis in bases.items()
    }


def whitening_summary(
    bases: Mapping[str, TargetEigenbases],
    others: Mapping[str, Mapping[str, Factors]],
    *,
    side: str = "A",
    bins: int = 20,
) -> dict[str, Any]:
    """Profiles of several populations in one reference's bases as plain data, by population.

    `bins`: energy over the reference's energy per bin of directions, flattest first, geometric mean
    over targets. `flat_reference`, `flat`: shares of energy in the flattest `FLAT_SHARE` of
    directions, means over targets. `excess`: geometric mean of their ratio. `targets`: that ratio
    by target.
    """
    out = {}
    for population, factors in others.items():
        profiles = whitening_profiles(bases, factors, side=side, bins=bins)
        count = min(len(p.other) for p in profiles.values())
        ratios = np.array([energy_ratios(p)[:count] for p in profiles.values()])
        excess = {name: p.excess for name, p in profiles.items()}
        out[population] = {
            "bins": np.exp(np.log(ratios).mean(0)).tolist(),
            "flat_reference": float(np.mean([p.flat_reference for p in profiles.values()])),
            "flat": float(np.mean([p.flat_other for p in profiles.values()])),
            "excess": float(np.exp(np.log(list(excess.values())).mean())),
            "targets": excess,
        }
    return out


def energy_ratios(profile: WhiteningProfile) -> np.ndarray:
    """Energy over the reference's energy, per bin."""
    return (np.array(profile.other) + 1e-9) / (np.array(profile.reference) + 1e-9)
