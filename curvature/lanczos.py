"""Spectrum of any curvature product by Lanczos iteration (Golub & Meurant 2010; Ghorbani et al.
2019), where PyHessian cannot go: the Gauss-Newton, finite differences, batches weighted by tokens,
models spread over devices and processes.
"""

from __future__ import annotations

import math

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
    standard error over runs. The eigenvalues are the largest Ritz values in absolute value over all
    runs whose residual bound is below 1 % of them; copies from other runs are merged.
    """
    if steps < 1 or runs < 1:
        raise ValueError(f"{steps} steps and {runs} runs: expected at least one of each")
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    weights: list[float] = []
    traces: list[float] = []
    best: list[float] = []
    for _ in bar(progress, range(runs), unit="runs"):
        ritz, mass, residual = lanczos_run(product, rademacher(product.weights, generator), steps)
        values += ritz.tolist()
        weights += (mass / runs).tolist()
        traces.append(product.size * float(ritz @ mass))
        found = [float(r) for r, e in zip(ritz, residual, strict=True) if e <= 0.01 * abs(r)]
        best = found if len(found) > len(best) else best
    best.sort(key=lambda e: -abs(e))
    error = float(np.std(traces, ddof=1) / math.sqrt(runs)) if runs > 1 else math.nan
    return Spectrum(
        name,
        product.size,
        product.tokens,
        tuple(best[:top]),
        float(np.mean(traces)),
        error,
        runs,
        tuple(values),
        tuple(weights),
    )
