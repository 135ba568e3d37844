"""What is remembered, beyond the headline: looser measures, other wordings of the same question,
and membership."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.evalset import Item
from evals.memorization import (
    LOOSE,
    Recitation,
    canary_exposure,
    extractable_share,
    membership_auroc,
    recite,
    similarities,
)

EXTRACTION_TRIES = 1000
CHOICES = 4


@dataclass(frozen=True)
class Form:
    """One way of asking for the items of a family. n: items that have it. hits: answered right.
    `worst` counts an item as remembered if any form gets it."""

    family: str
    form: str
    n: int
    hits: int

    @property
    def rate(self) -> float:
        return self.hits / self.n


def _choice_prompts(items: Sequence[Item]) -> list[list[tuple[str, str]]]:
    """Per item the plain prompt with CHOICES targets, the right one first; the others are other
    items' values, spread evenly over the family so that the choice is the same in every run and
    every arm."""
    values = list(dict.fromkeys(i.target for i in items))
    out = []
    for item in items:
        at = values.index(item.target)
        step = max(1, len(values) // CHOICES)
        picked = [values[(at + k * step) % len(values)] for k in range(1, CHOICES)]
        distinct = [v for v in dict.fromkeys(picked) if v != item.target]
        out.append([(item.prompt, item.target), *((item.prompt, v) for v in distinct)])
    return out


def _neighbours(items: Sequence[Item], item: Item, shots: int) -> str:
    """A few other items of the family with their answers, then the item's own prompt."""
    others = [i for i in items if i.id != item.id]
    start = items.index(item)
    picked = [others[(start + k) % len(others)] for k in range(min(shots, len(others)))]
    return "".join(f"{i.prompt}{i.target} . " for i in picked) + item.prompt


def ask_in_every_form(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    shots: int = 3,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[Form]:
    """Closed-book items in their own forms (plain, reworded, reversed, ...), as multiple choice
    among values of the same family, and after a few neighbours; strict greedy answers, the most
    probable one for multiple choice.

    Items without forms (passages) are left out. The items that have every form are the same in both
    arms, so rates compare. `worst` leaves multiple choice out: one answer in CHOICES is right by
    chance.
    """
    families: dict[str, list[Item]] = {}
    for item in items:
        if item.forms:
            families.setdefault(item.family, []).append(item)
    out: list[Form] = []
    for family, members in families.items():
        asked: list[tuple[int, str, tuple[str, str]]] = []
        for k, item in enumerate(members):
            asked += [(k, name, pair) for name, pair in item.forms.items()]
            if shots:
                asked.append((k, "few-shot", (_neighbours(members, item, shots), item.target)))
        choices = _choice_prompts(members)
        flat = [pair for options in choices for pair in options]
        scores = recite(
            model,
            tokenizer,
            [pair for _, _, pair in asked] + flat,
            batch_size,
            progress and f"{progress}: {family}",
        )
        got: dict[str, dict[int, bool]] = {}
        for (k, name, _), score in zip(asked, scores):
            got.setdefault(name, {})[k] = score.strict
        remembered = [any(hits.get(k, False) for hits in got.values()) for k in range(len(members))]
        out += [Form(family, name, len(hits), sum(hits.values())) for name, hits in got.items()]
        out.append(
            Form(family, "multiple choice", len(members), _chosen(choices, scores[len(asked) :]))
        )
        out.append(Form(family, "worst", len(members), sum(remembered)))
    return out


def _chosen(choices: Sequence[Sequence[tuple[str, str]]], scores: Sequence[Recitation]) -> int:
    """How often the right option (the first) is strictly the most probable."""
    right, start = 0, 0
    for options in choices:
        mine = [s.logprob for s in scores[start : start + len(options)]]
        start += len(options)
        right += len(mine) > 1 and mine[0] > max(mine[1:])
    return right


@dataclass(frozen=True)
class FamilyRecall:
    """Well-exposed items of one family. right: mean share of right tokens. extraction: mean
    extraction strength. loose: share whose greedy continuation is similar (None where generation
    was not asked for). logprob: mean per token, nats. extractable: share that EXTRACTION_TRIES
    samples hold with 90 %. exposure_bits, auroc: against never-shown items of the same family, None
    where there are none."""

    family: str
    n: int
    strict: float
    loose: float | None
    right: float
    extraction: float
    logprob: float
    extractable: float
    exposure_bits: float | None
    auroc: float | None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def recall_by_family(
    items: Sequence[Item],
    scores: Sequence[Recitation],
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 64,
) -> list[FamilyRecall]:
    """What the teacher-forced pass behind `scores` gives; with a model the loose share too."""
    rows = []
    for family in dict.fromkeys(i.family for i in items):
        mine = [
            (i, s)
            for i, s in zip(items, scores, strict=True)
            if i.family == family and i.well_exposed
        ]
        never = [
            s.logprob / s.tokens
            for i, s in zip(items, scores)
            if i.family == family and i.exposure == 0
        ]
        if not mine:
            continue
        per_token = [s.logprob / s.tokens for _, s in mine]
        loose = None
        if model is not None and tokenizer is not None:
            near = similarities(
                model, tokenizer, [(i.prompt, i.target) for i, _ in mine], batch_size
            )
            loose = _mean([x >= LOOSE for x in near])
        got = [s for _, s in mine]
        rows.append(
            FamilyRecall(
                family,
                len(mine),
                _mean([s.strict for s in got]),
                loose,
                _mean([s.right for s in got]),
                _mean([s.extraction for s in got]),
                _mean(per_token),
                extractable_share(got, EXTRACTION_TRIES),
                _mean(canary_exposure(per_token, never)) if never else None,
                membership_auroc(per_token, never) if never else None,
            )
        )
    return rows


def forms_section(base: Sequence[Form], edited: Sequence[Form]) -> list[Mapping[str, object]]:
    """Rows for `results.json`: {family, form, n, base, edited}. Raises ValueError where the arms
    were asked differently."""
    if [(f.family, f.form, f.n) for f in base] != [(f.family, f.form, f.n) for f in edited]:
        raise ValueError("the two arms were asked in different forms: ask both with the same items")
    return [
        {"family": a.family, "form": a.form, "n": a.n, "base": a.rate, "edited": b.rate}
        for a, b in zip(base, edited)
    ]
