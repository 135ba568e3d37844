"""Spectra of the Hessian of the loss by PyHessian (Yao et al. 2020): top eigenvalues, trace and
density.

PyHessian was made for image classifiers. The adapter here gives it a module that returns the loss,
attention that can be differentiated twice, batches weighted by tokens, a trace that uses every
probe, and an eigensolver that torch still has.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from curvature.forward import device_of, evaluation_mode, twice_differentiable
from curvature.populations import Batch
from curvature.progress import bar
from curvature.targets import Target


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of the Hessian (of the mean loss in nats per token) over `parameters` weights.

    eigenvalues: the largest in absolute value, in that order. trace, trace_error: Hutchinson
    estimate over `probes` and its standard error. density_values, density_weights: Ritz values and
    weights (summing to 1) of stochastic Lanczos quadrature, all runs joined.
    """

    name: str
    parameters: int
    tokens: int
    eigenvalues: tuple[float, ...]
    trace: float
    trace_error: float
    probes: int
    density_values: tuple[float, ...]
    density_weights: tuple[float, ...]


class _LossModule(nn.Module):
    """Takes [rows, 2, width] (ids; labels with -100 where nothing is scored) and returns the
    batch's share of the loss.

    PyHessian averages batches by their rows; `scale / rows` undoes that, so that every token weighs
    the same.
    """

    def __init__(self, model: nn.Module, scale: float):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        ids, labels = packed[:, 0], packed[:, 1]
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total = F.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        return total * (self.scale / len(ids))


class _TorchWithEig:
    """torch, with the `eig` that it dropped and that PyHessian's density calls on a symmetric
    matrix."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def eig(matrix: torch.Tensor, eigenvectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(matrix.double())
        return torch.stack((values, torch.zeros_like(values)), 1), vectors


@contextmanager
def _eig_shim() -> Iterator[None]:
    module = sys.modules["pyhessian.hessian"]
    before = module.torch  # type: ignore[attr-defined]
    module.torch = _TorchWithEig()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.torch = before  # type: ignore[attr-defined]


def pyhessian_spectrum(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target] | None,
    *,
    name: str | None = None,
    top: int = 1,
    iterations: int = 50,
    tolerance: float = 1e-3,
    trace_probes: int = 16,
    density_steps: int = 0,
    density_runs: int = 1,
    seed: int = 0,
) -> Spectrum:
    """Spectrum of the Hessian over the weights of `targets` taken together (None: the whole model)
    on a few batches.

    top: number of eigenvalues by power iteration (0: none). trace_probes: Rademacher probes (0: no
    trace, NaN). density_steps: Lanczos steps per density run (0: none). One batch keeps its graph
    and is cheapest. The model is left as it was, gradients and attention included.

    Raises ValueError for weights that are not float32/float64, a loss that is not finite, and where
    nothing is scored.
    """
    from pyhessian import hessian

    device = device_of(model)
    chosen = list(model.parameters()) if targets is None else [t.parameter for t in targets]
    label = name or ("model" if targets is None else ", ".join(t.name for t in targets))
    if any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters()):
        raise ValueError(
            f"{label}: second derivatives need float32 weights: load the model with dtype float32"
        )
    packed = []
    for batch in batches:
        labels = torch.where(batch.scored, batch.ids, torch.full_like(batch.ids, -100))
        packed.append(
            (torch.stack((batch.ids, labels), 1).to(device), torch.zeros(1, device=device))
        )
    tokens = sum(int(batch.scored[:, 1:].sum()) for batch in batches)
    if tokens == 0:
        raise ValueError(f"{label}: the batches have no scored token")
    rows = sum(len(batch.ids) for batch in batches)

    with (
        evaluation_mode(model, frozen=True),
        twice_differentiable(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = None
        for parameter in chosen:
            parameter.requires_grad_(True)
        single = len(packed) == 1
        module = _LossModule(model, rows / tokens)
        with torch.no_grad():
            if not all(bool(torch.isfinite(module(p))) for p, _ in packed):
                raise ValueError(f"{label}: the loss is not finite")
        h = hessian(
            module,
            lambda loss, _: loss,
            data=packed[0] if single else None,
            dataloader=None if single else packed,
            cuda=device.type == "cuda",
        )
        eigenvalues = h.eigenvalues(maxIter=iterations, tol=tolerance, top_n=top)[0] if top else []
        samples = h.trace(maxIter=trace_probes, tol=-math.inf) if trace_probes else []
        values: list[float] = []
        weights: list[float] = []
        if density_steps:
            steps = min(density_steps, sum(p.numel() for p in chosen))
            with _eig_shim():
                all_values, all_weights = h.density(iter=steps, n_v=density_runs)
            values = [float(v) for run in all_values for v in run]
            weights = [float(w) / density_runs for run in all_weights for w in run]
        del h
    error = (
        float(np.std(samples, ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else math.nan
    )
    return Spectrum(
        label,
        sum(p.numel() for p in chosen),
        tokens,
        tuple(sorted((float(e) for e in eigenvalues), key=lambda e: -abs(e))),
        float(np.mean(samples)) if samples else math.nan,
        error,
        len(samples),
        tuple(values),
        tuple(weights),
    )


def pyhessian_spectra(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    whole_model: bool = False,
    progress: str | None = None,
    **settings: Any,
) -> dict[str, Spectrum]:
    """`pyhessian_spectrum` of each target by name and, with `whole_model`, of all weights under the
    name `model`."""
    jobs: list[tuple[str, list[Target] | None]] = [(t.name, [t]) for t in targets]
    if whole_model:
        jobs.append(("model", None))
    return {
        name: pyhessian_spectrum(model, batches, chosen, name=name, **settings)
        for name, chosen in bar(progress, jobs, unit="spectra")
    }


def plot_spectra(spectra: Mapping[str, Spectrum], path: str | Path) -> None:
    """Write a PNG of the densities (log scale) of spectra that have one, with their top eigenvalues
    as ticks.

    Raises ValueError where none has a density.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: s for name, s in spectra.items() if s.density_values}
    if not shown:
        raise ValueError("no spectrum has a density: ask for density_steps > 0")
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name, spectrum in shown.items():
        grid, density = density_curve(spectrum.density_values, spectrum.density_weights)
        (line,) = axes.plot(grid, density + 1e-9, label=name, linewidth=1)
        axes.plot(
            spectrum.eigenvalues, [2e-6] * len(spectrum.eigenvalues), "|", color=line.get_color()
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-6)
    axes.set_xlabel("eigenvalue of the Hessian (nats per token)")
    axes.set_ylabel("density")
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def density_curve(
    values: Sequence[float], weights: Sequence[float], points: int = 400, width: float = 0.02
) -> tuple[np.ndarray, np.ndarray]:
    """(grid, density) of a quadrature smoothed by Gaussians whose standard deviation is `width` of
    the range; integrates to 1."""
    v, w = np.asarray(values, float), np.asarray(weights, float)
    if not len(v):
        raise ValueError("the spectrum has no density: ask for density_steps > 0")
    spread = max(float(v.max() - v.min()), 1e-12)
    sigma = width * spread
    grid = np.linspace(v.min() - 4 * sigma, v.max() + 4 * sigma, points)
    bumps = np.exp(-((grid[:, None] - v[None]) ** 2) / (2 * sigma**2)) / (
        sigma * math.sqrt(2 * math.pi)
    )
    return grid, bumps @ w
