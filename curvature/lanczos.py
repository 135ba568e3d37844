"""Spectrum of any curvature product by Lanczos iteration (Golub & Meurant 2010; Ghorbani et al.
2019), where PyHessian cannot go: the Gauss-Newton, finite differences, batches weighted by tokens,
models spread over devices and processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from curvature.hutchinson import rademacher
from curvature.hvp import CurvatureProduct
from curvature.progress import bar
from curvature.spectra import Spectrum


def _dot(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def lanczos_run(
    product: CurvatureProduct, start: list[torch.Tensor], steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ritz values [k], their weights (squared first components, summing to 1) and residual bounds
    |H y - theta y|, for k <= steps.

    Fully reorthogonalized; ends early where the Krylov space is exhausted.
    """
    scale = math.sqrt(_dot(start, start))
    basis = [[x / scale for x in start]]
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(steps):
        w = product(basis[-1])
        alphas.append(_dot(w, basis[-1]))
        for _ in range(2):
            for q in basis:
                along = _dot(w, q)
                w = [a - along * b for a, b in zip(w, q, strict=True)]
        beta = math.sqrt(_dot(w, w))
        betas.append(beta)
        largest = max(map(abs, [*alphas, *betas]))
        if len(basis) == product.size or beta <= 1e-6 * largest:
            break
        basis.append([x / beta for x in w])
    k = len(alphas)
    T = np.diag(alphas) + np.diag(betas[: k - 1], 1) + np.diag(betas[: k - 1], -1)
    values, vectors = np.linalg.eigh(T)
    return values, vectors[0] ** 2, np.abs(betas[k - 1] * vectors[-1])


CONVERGED, ROUNDING = 1e-2, 1e-4
"""Residual bound of a Ritz value that counts as an eigenvalue, relative to itself; what no bound is
sure of, relative to the largest: products are made in fp32, or by differences."""


def converged(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Eigenvalues, largest in absolute value first, from each run's (Ritz values, residual bounds).

    A Ritz value counts whose bound is below 1 % of it. Within its bound lies an eigenvalue, so two
    runs' values whose bounds overlap are copies of one, and the one with the smaller bound stays. A
    run has no eigenvalue twice: each of its values is a copy of another one, or new.
    """
    largest = max(float(np.abs(ritz).max()) for ritz, _ in runs)
    candidates = sorted(
        (max(float(e), ROUNDING * largest), float(r), run)
        for run, (ritz, residual) in enumerate(runs)
        for r, e in zip(ritz, residual, strict=True)
        if e <= CONVERGED * abs(r)
    )
    kept: list[tuple[float, float, set[int]]] = []
    for bound, value, run in candidates:
        same = [k for k in kept if run not in k[2] and abs(value - k[1]) <= bound + k[0]]
        if same:
            min(same, key=lambda k: abs(value - k[1]))[2].add(run)
        else:
            kept.append((bound, value, {run}))
    return sorted((value for _, value, _ in kept), key=lambda value: -abs(value))


def lanczos_spectrum(
    product: CurvatureProduct,
    *,
    name: str = "product",
    top: int = 1,
    steps: int = 30,
    runs: int = 4,
    seed: int = 0,
    progress: str | None = None,
) -> Spectrum:
    """Top eigenvalues, trace and density of a product from `runs` Lanczos runs with Rademacher
    starts.

    The trace is size * the mean first Ritz moment (each run's start is a Hutchinson probe) with the
    standard error over runs. The eigenvalues are the largest in absolute value that any run has
    found (`converged`). Raises ValueError for no step and for no run.
    """
    if steps < 1 or runs < 1:
        raise ValueError(f"{steps} steps and {runs} runs: expected at least one of each")
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    weights: list[float] = []
    traces: list[float] = []
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in bar(progress, range(runs), unit="runs"):
        ritz, mass, residual = lanczos_run(product, rademacher(product.weights, generator), steps)
        values += ritz.tolist()
        weights += (mass / runs).tolist()
        traces.append(product.size * float(ritz @ mass))
        found.append((ritz, residual))
    error = float(np.std(traces, ddof=1) / math.sqrt(runs)) if runs > 1 else math.nan
    return Spectrum(
        name,
        product.size,
        product.tokens,
        tuple(converged(found)[:top]),
        float(np.mean(traces)),
        error,
        runs,
        tuple(values),
        tuple(weights),
    )
