"""Kronecker factors of every target in one pass over a population.

For a target y = W a and g = dL/dy at each counted token: A = E[a a^T], G = E[g g^T] (Martens & Grosse 2015), and the coupled
factors A' = E[|g|^2 a a^T], G' = E[|a|^2 g g^T], whose diagonals in any basis are the marginals of the eigenvalue-corrected
curvature E[(u^T g)^2 (v^T a)^2] (George et al. 2018). The pass costs little more than a forward and a backward because all weights
are frozen, the graph starts at the lowest target's output, targets that read one input share one A, and symmetric products are
made by block triangle.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from curvature.artifacts import read_tensors, write_tensors
from curvature.forward import (
    CausalForward,
    Labels,
    backward_from_loss,
    check_labels,
    evaluation_mode,
    label_noise,
)
from curvature.populations import Batch, Population, batches
from curvature.targets import Target


@dataclass(frozen=True)
class Factors:
    """Factors of one target on one population, fp32, means over `tokens` counted tokens.

    A, A_coupled: [d_in, d_in]. G, G_coupled: [d_out, d_out]. Gradients are of the sum over tokens of the loss in nats (of the
    margin in logits). The coupled ones are None where they were not asked for. Targets that read one input hold the same A.
    """

    A: torch.Tensor
    G: torch.Tensor
    A_coupled: torch.Tensor | None
    G_coupled: torch.Tensor | None
    tokens: int


LEAF = 512
"""Side up to which a symmetric product is one matrix product."""


def add_gram_(total: torch.Tensor, x: torch.Tensor) -> None:
    """total += x^T x for x [n, d], on the upper block triangle only (`fill_lower_` completes it). Accumulates in fp32."""
    d = x.shape[1]
    if d <= LEAF:
        _add_product_(total, x, x)
        return
    half = -(-d // 128) * 64
    add_gram_(total[:half, :half], x[:, :half])
    add_gram_(total[half:, half:], x[:, half:])
    _add_product_(total[:half, half:], x[:, :half], x[:, half:])


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif left.is_cuda:
        total += torch.mm(left.T, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def fill_lower_(total: torch.Tensor) -> torch.Tensor:
    """Complete a matrix whose upper triangle is right."""
    upper = total.triu()
    return total.copy_(upper + upper.triu(1).T)


@dataclass
class _Sums:
    """Running sums of one target, [d, d] fp32 upper block triangles, and the number of tokens in each."""

    target: Target
    coupled: bool
    A: torch.Tensor | None = None
    G: torch.Tensor | None = None
    A_coupled: torch.Tensor | None = None
    G_coupled: torch.Tensor | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    shares: str | None = None
    bad_batch: torch.Tensor | None = None
    inputs: list[torch.Tensor] = field(default_factory=list)

    def note(self, x: torch.Tensor, batch: int) -> None:
        """Remember, without waiting for the device, the first batch that held something not finite."""
        bad = ~torch.isfinite(x.sum())
        if self.bad_batch is None:
            self.bad_batch = torch.full((), -1, device=x.device)
        self.bad_batch = torch.where(bad & (self.bad_batch < 0), batch, self.bad_batch)


class FactorCollector:
    """Hooks that turn forward and backward passes into sums. Use as a context manager: hooks go on, hooks come off.

    Before each batch call `start`, after its backward pass `finish`; run the backward pass inside `during_backward`, so that the
    forward passes which gradient checkpointing repeats are not counted twice.
    """

    def __init__(self, targets: Sequence[Target], *, coupled: bool = True):
        if not targets:
            raise ValueError("no targets: choose at least one matrix to collect factors of")
        self.sums = {target.name: _Sums(target, coupled) for target in targets}
        self.coupled = coupled
        self.backward_running = False
        self._leads: dict[str, tuple[str, torch.Tensor, torch.Tensor]] = {}
        self._index: torch.Tensor | None = None
        self._tokens = 0
        self._number = -1
        self._handles: list[Any] = []

    def __enter__(self) -> FactorCollector:
        for sums in self.sums.values():
            hook = self._forward_hook(sums)
            self._handles.append(sums.target.module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._leads.clear()
        for sums in self.sums.values():
            sums.inputs.clear()

    def start(self, batch: Batch, number: int) -> None:
        counted = batch.counted.flatten()
        self._tokens = int(counted.sum())
        self._index = None if bool(counted.all()) else counted.nonzero()[:, 0]
        self._number = number
        self._leads.clear()
        for sums in self.sums.values():
            sums.inputs.clear()

    def finish(self) -> None:
        """After the backward pass of a batch: raise where a target was never reached."""
        self._leads.clear()
        for sums in self.sums.values():
            if not sums.tokens_in or not sums.tokens_out:
                what = "was never run" if not sums.tokens_in else "got no gradient"
                raise ValueError(f"{sums.target.name} {what} in the forward and backward pass: leave it out of the targets")

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Around the backward pass: forward hooks that fire in it belong to recomputation and count nothing."""
        self.backward_running = True
        try:
            yield
        finally:
            self.backward_running = False

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().reshape(-1, x.shape[-1])
        return flat if self._index is None else flat.index_select(0, self._index.to(x.device))

    def _forward_hook(self, sums: _Sums) -> Callable:
        target = sums.target

        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if not torch.is_grad_enabled() and not self.backward_running:
                raise ValueError(f"{target.name} ran without gradients: reentrant checkpointing is not supported")
            if not output.requires_grad:
                output.requires_grad_()
            if self.backward_running:
                return
            inputs = args[0]
            lead = self._leads.get(target.input_group)
            if lead is not None and lead[1] is inputs:
                sums.shares, rows = lead[0], lead[2]
            else:
                rows = self._rows(inputs)
                if sums.A is None:
                    sums.A = rows.new_zeros(target.d_in, target.d_in, dtype=torch.float32)
                add_gram_(sums.A, rows)
                sums.note(rows, self._number)
                self._leads.setdefault(target.input_group, (target.name, inputs, rows))
            sums.tokens_in += self._tokens
            if self.coupled:
                sums.inputs.append(rows)
            output.register_hook(lambda grad: self._backward(sums, grad))

        return hook

    def _backward(self, sums: _Sums, grad: torch.Tensor) -> None:
        target = sums.target
        g = self._rows(grad)
        if sums.G is None:
            sums.G = g.new_zeros(target.d_out, target.d_out, dtype=torch.float32)
        add_gram_(sums.G, g)
        sums.note(g, self._number)
        sums.tokens_out += self._tokens
        if not self.coupled:
            return
        a = sums.inputs.pop()
        if sums.A_coupled is None or sums.G_coupled is None:
            sums.A_coupled = a.new_zeros(target.d_in, target.d_in, dtype=torch.float32)
            sums.G_coupled = g.new_zeros(target.d_out, target.d_out, dtype=torch.float32)
        add_gram_(sums.A_coupled, a * torch.linalg.vector_norm(g, dim=1, keepdim=True).to(a.dtype))
        add_gram_(sums.G_coupled, g * torch.linalg.vector_norm(a, dim=1, keepdim=True).to(g.dtype))

    def result(self) -> dict[str, Factors]:
        """Means over all tokens (of all processes). Raises ValueError where a sum is not finite."""
        done: dict[str, Factors] = {}
        for name, sums in self.sums.items():
            tokens = torch.tensor([sums.tokens_in, sums.tokens_out], dtype=torch.float64)
            matrices = {key: getattr(sums, key) for key in ("A", "G", "A_coupled", "G_coupled")}
            if _distributed():
                matrices = self._reduced(sums, matrices, tokens)
            if sums.bad_batch is not None and int(sums.bad_batch) >= 0:
                raise ValueError(
                    f"{name}: not finite inputs or gradients in batch {int(sums.bad_batch)}: "
                    "the model overflows there (try float32) or its weights are broken"
                )
            n = int(tokens[0])
            if n == 0 or tokens[0] != tokens[1]:
                raise ValueError(f"{name}: {n} tokens seen forward and {int(tokens[1])} backward, expected equal and more than 0")
            means: dict[str, torch.Tensor | None] = {}
            for key, matrix in matrices.items():
                if key == "A" and sums.shares is not None:
                    if matrix is not None:
                        raise ValueError(f"{name} reads the input of {sums.shares} in some batches only")
                    means[key] = done[sums.shares].A
                elif matrix is None:
                    means[key] = None
                else:
                    means[key] = fill_lower_(matrix).div_(n)
                    if not torch.isfinite(means[key]).all():
                        raise ValueError(f"{name}: the factor {key} is not finite: the sums overflow")
            assert means["A"] is not None and means["G"] is not None
            done[name] = Factors(means["A"], means["G"], means["A_coupled"], means["G_coupled"], n)
        return done

    def _reduced(
        self, sums: _Sums, matrices: dict[str, torch.Tensor | None], tokens: torch.Tensor
    ) -> dict[str, torch.Tensor | None]:
        """Sums over all processes; one that had no batch takes part with zeros."""
        target = sums.target
        device = target.parameter.device
        names: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(names, sums.shares)
        sums.shares = next((n for n in names if n is not None), None)
        counts = tokens.to(device if device.type == "cuda" else "cpu")
        dist.all_reduce(counts)
        tokens.copy_(counts)
        out: dict[str, torch.Tensor | None] = {}
        for key, matrix in matrices.items():
            if ("coupled" in key and not self.coupled) or (key == "A" and sums.shares is not None):
                out[key] = matrix
                continue
            side = target.d_in if key.startswith("A") else target.d_out
            total = matrix if matrix is not None else torch.zeros(side, side, device=device)
            dist.all_reduce(total)
            out[key] = total
        return out


@contextmanager
def memory_advice(batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the setting to change."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        advice = f"lower batch_size from {batch_size} to {batch_size // 2}" if batch_size > 1 else "lower the width"
        raise ValueError(f"out of memory with batch_size {batch_size}: {advice}") from error


def share_of_batches(stream: Iterator[Batch]) -> Iterator[tuple[int, int, Batch]]:
    """(number, first row, batch) of this process's share of a stream: every world-size-th batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    first_row = 0
    for number, batch in enumerate(stream):
        if number % world == rank:
            yield number, first_row, batch
        first_row += len(batch.ids)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def collect_factors(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    population: Population,
    targets: Sequence[Target],
    *,
    labels: Labels = "sampled",
    tokens: int | None,
    width: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    coupled: bool = True,
    progress: str | None = None,
) -> dict[str, Factors]:
    """Factors of every target by name, in one pass over at most `tokens` scored tokens (None: the whole population).

    labels: `sampled` from the model, one draw per position (Fisher); `gold` (empirical Fisher); `margin` (gradients of
    z_y - max_{j != y} z_j instead of the loss, for text that the model is sure of). A token counts if it is real and at or before
    the last position of its row that predicts a scored token; prompt tokens therefore count. The model is left as it was. Under
    `torch.distributed` each process takes its share of the batches and all return the same result.

    Raises ValueError on non-finite logits or factors (target and batch named), on a target that the passes do not reach, and out
    of memory (with the setting to turn). Warns where a factor is rank deficient for want of tokens.
    """
    check_labels(labels)
    stream = batches(population, tokenizer, width=width, batch_size=batch_size, tokens=tokens, seed=seed)
    bar = tqdm(desc=progress, total=tokens, unit="tok", disable=progress is None, leave=False)
    with bar, evaluation_mode(model, frozen=True), memory_advice(batch_size):
        forward = CausalForward(model)
        with FactorCollector(targets, coupled=coupled) as collector:
            for number, first_row, batch in share_of_batches(stream):
                noise = label_noise(seed, first_row, *batch.ids.shape) if labels == "sampled" else None
                collector.start(batch, number)
                where = f"batch {number} of population {population.name!r}"
                backward_from_loss(forward, batch, labels, noise, where=where, running=collector.during_backward)
                collector.finish()
                bar.update(int(batch.scored.sum()))
    factors = collector.result()
    widest = max(targets, key=lambda t: max(t.d_in, t.d_out))
    side, seen = max(widest.d_in, widest.d_out), factors[widest.name].tokens
    if seen < side:
        warnings.warn(
            f"population {population.name!r} gives {seen} tokens for factors of side {side} ({widest.name}): they are rank deficient",
            stacklevel=2,
        )
    return factors


def save_factors(path: str | Path, factors: dict[str, Factors], metadata: dict[str, Any]) -> None:
    """Write factors to one safetensors file; an A that targets share is stored once."""
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[int, str] = {}
    index: dict[str, dict[str, Any]] = {}
    for name, f in factors.items():
        index[name] = {"tokens": f.tokens}
        for key in ("A", "G", "A_coupled", "G_coupled"):
            matrix = getattr(f, key)
            if matrix is None:
                continue
            index[name][key] = stored.setdefault(id(matrix), f"{name}.{key}")
            tensors[index[name][key]] = matrix
    write_tensors(path, tensors, {"kind": "factors", "index": index, **metadata})


def load_factors(path: str | Path) -> tuple[dict[str, Factors], dict[str, Any]]:
    """Factors by target and the metadata they were saved with. Raises ValueError for a file that holds none."""
    tensors, metadata = read_tensors(path)
    if metadata.pop("kind", None) != "factors":
        raise ValueError(f"{path} does not hold factors")
    factors = {}
    for name, entry in metadata.pop("index").items():
        A, G, A_coupled, G_coupled = (
            tensors[entry[key]] if key in entry else None for key in ("A", "G", "A_coupled", "G_coupled")
        )
        assert A is not None and G is not None
        factors[name] = Factors(A, G, A_coupled, G_coupled, entry["tokens"])
    return factors, metadata
