"""Would the forgetting survive? Relearning, rounding, sampling and prompting, the same for every
arm.

Fast recovery after fine-tuning on *other* forgotten items is suppression, not removal: compare with
the base (which never forgot), with a control of the same size, and with items that no training ever
showed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from curvature.descent import fine_tune
from curvature.populations import Population
from curvature.processes import same_weights
from evals.generation import generate
from evals.memorization import encode_pair, recite

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Curve:
    """Recall of one group of items while one arm relearns. steps: when it was scored (0 = before).
    recall: strict, [0, 1]. n: items. hits: per-item strict results at the last step. note: why it
    ends early, if it does."""

    arm: str
    shown: str
    group: str
    lr: float
    steps: tuple[int, ...]
    recall: tuple[float, ...]
    n: int
    hits: tuple[bool, ...]
    note: str = ""

    @property
    def area(self) -> float:
        """Mean recall over the budget: trapezoid area under the curve over its length in steps."""
        if len(self.steps) < 2:
            return self.recall[0]
        return float(np.trapezoid(self.recall, self.steps) / (self.steps[-1] - self.steps[0]))


def relearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shown: Population,
    groups: Mapping[str, Pairs],
    *,
    arm: str = "edited",
    lrs: Sequence[float] = (3e-4,),
    steps: int = 120,
    every: int = 30,
    batch_size: int = 16,
    width: int = 128,
    judge_batch_size: int = 64,
    seed: int = 0,
    progress: str | None = None,
) -> list[Curve]:
    """Fine-tune a copy of `model` on `shown` with a fixed budget per learning rate (AdamW, warm-up,
    then constant) and score `groups` of (prompt, target) every so many steps. The model itself is
    left alone.

    shown must not hold the scored items: documents that contain one raise ValueError. A learning
    rate at which training diverges gives shorter curves with a note. One Curve per group and
    learning rate.
    """
    if steps < 1 or every < 1:
        raise ValueError(f"relearning needs at least one step: got steps={steps}, every={every}")
    texts = {d.text.strip(" .") for d in shown.documents}
    for name, pairs in groups.items():
        if not pairs:
            raise ValueError(f"relearning: group {name!r} has no items to score")
        if any((p + t).strip(" .") in texts for p, t in pairs):
            raise ValueError(
                f"relearning: group {name!r} holds items that the attack trains on: split first"
            )
    everything = [pair for pairs in groups.values() for pair in pairs]
    curves = []
    for lr in lrs:
        attacked = copy.deepcopy(model)
        marks: list[int] = []
        hits: list[np.ndarray] = []

        def score(step: int, attacked: nn.Module = attacked, marks=marks, hits=hits) -> None:
            mode = attacked.training
            attacked.eval()
            same_weights(attacked)
            scores = recite(attacked, tokenizer, everything, judge_batch_size)
            attacked.train(mode)
            marks.append(step)
            hits.append(np.array([r.strict for r in scores]))

        taken = 0

        def before_step() -> None:
            nonlocal taken
            if taken % every == 0:
                score(taken)
            taken += 1

        note = ""
        try:
            fine_tune(
                attacked,
                tokenizer,
                shown,
                steps=steps,
                lr=lr,
                batch_size=batch_size,
                width=width,
                seed=seed,
                schedule="constant",
                project=before_step,
                progress=progress,
            )
            score(steps)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            note = f"not available after step {marks[-1] if marks else 0}: {error}"
            if not marks:
                raise
        start = 0
        for name, pairs in groups.items():
            part = [h[start : start + len(pairs)] for h in hits]
            start += len(pairs)
            curves.append(
                Curve(
                    arm,
                    shown.name,
                    name,
                    lr,
                    tuple(marks),
                    tuple(float(h.mean()) for h in part),
                    len(pairs),
                    tuple(bool(x) for x in part[-1]),
                    note,
                )
            )
    return curves


@torch.no_grad()
def round_to_nearest(model: PreTrainedModel, bits: int, block: int = 64) -> PreTrainedModel:
    """A copy whose linear weights (the output head aside) are rounded to `bits`: symmetric, one
    scale per row and `block` inputs, scale = max|w| / (2^(bits-1) - 1). The weights stay in their
    dtype: what is tested is the lost precision."""
    if not 2 <= bits <= 8:
        raise ValueError(f"round-to-nearest knows 2 to 8 bits, not {bits}")
    rounded = copy.deepcopy(model)
    head = rounded.get_output_embeddings()
    top = 2 ** (bits - 1) - 1
    for module in rounded.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weight = module.weight
            for start in range(0, weight.shape[1], block):
                part = weight[:, start : start + block].float()
                scale = (part.abs().amax(1, keepdim=True) / top).clamp_min(
                    torch.finfo(torch.float32).tiny
                )
                weight[:, start : start + block] = ((part / scale).round() * scale).to(weight.dtype)
    return rounded


def sampled_hits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    *,
    tries: int = 8,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> list[bool]:
    """Per item: did one of `tries` samples begin with the whole target?"""
    encoded = [encode_pair(tokenizer, p, t) for p, t in pairs]
    written = generate(
        model,
        tokenizer,
        [ids[:start] for ids, start in encoded],
        new_tokens=[len(ids) - start for ids, start in encoded],
        tries=tries,
        temperature=temperature,
        batch_size=max(1, batch_size // tries),
        stop=False,
        seed=seed,
    )
    return [
        any(w == ids[start:] for w in tries_)
        for (ids, start), tries_ in zip(encoded, written, strict=True)
    ]


def few_shot_pairs(
    pairs: Pairs,
    neighbours: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    shots: int = 4,
    context: int | None = None,
    delimiter: str = " ",
    seed: int = 0,
) -> list[tuple[str, str]]:
    """The same items after `shots` whole texts of the same family (never the item itself); fewer
    where the context is short."""
    rng = np.random.default_rng(seed)
    out = []
    for prompt, target in pairs:
        own = (prompt + target).strip(" .")
        others = [n for n in neighbours if n.strip(" .") != own]
        picked = [others[k] for k in rng.permutation(len(others))[:shots]]
        while True:
            text = "".join(p + delimiter for p in picked) + prompt
            ids, _ = encode_pair(tokenizer, text, target)
            if not picked or context is None or len(ids) <= context:
                break
            picked.pop()
        out.append((text, target))
    return out


@dataclass(frozen=True)
class Robustness:
    """Recall of one group of items of one arm before and after an attack without training, in
    [0, 1]. note: why `after` is None, where it is."""

    attack: str
    arm: str
    group: str
    n: int
    before: float
    after: float | None
    note: str = ""


def robustness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Mapping[str, Pairs],
    *,
    arm: str,
    neighbours: Sequence[str] = (),
    bits: Sequence[int] = (8, 4),
    tries: int = 8,
    temperature: float = 1.0,
    shots: int = 4,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Robustness]:
    """Rounding to few bits, sampling several times, and prompting with neighbours, per group.

    neighbours: whole texts of the same kind for few-shot prompts; without them that attack is left
    out. A rounded model whose logits are not finite gives None with a note.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    everything = [pair for pairs in groups.values() for pair in pairs]
    plain = [r.strict for r in recite(model, tokenizer, everything, batch_size)]
    attacks: list[tuple[str, list[bool] | None, str]] = []
    for width in bits:
        name = f"rounded to {width} bits"
        try:
            rounded = round_to_nearest(model, width)
            hits = [r.strict for r in recite(rounded, tokenizer, everything, batch_size)]
            attacks.append((name, hits, ""))
        except ValueError as error:
            if "non-finite" not in str(error):
                raise
            attacks.append((name, None, f"not available: {error}"))
    if tries:
        sampled = sampled_hits(
            model,
            tokenizer,
            everything,
            tries=tries,
            temperature=temperature,
            batch_size=batch_size,
            seed=seed,
        )
        attacks.append((f"{tries} samples at temperature {temperature:g}", sampled, ""))
    if neighbours:
        prompted = few_shot_pairs(
            everything, neighbours, tokenizer, shots=shots, context=context, seed=seed
        )
        hits = [r.strict for r in recite(model, tokenizer, prompted, batch_size)]
        attacks.append((f"after {shots} neighbours", hits, ""))
    rows = []
    for name, got, note in attacks:
        start = 0
        for group, pairs in groups.items():
            part = slice(start, start + len(pairs))
            start += len(pairs)
            before = float(np.mean(plain[part]))
            after = None if got is None else float(np.mean(got[part]))
            rows.append(Robustness(name, arm, group, len(pairs), before, after, note))
    return rows
