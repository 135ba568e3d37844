"""What a model does on questions with a truth: shares of outcomes, alone, behind the monitor, and
with the best of n samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evals.comparison import Interval, rate_interval
from rl.measures import bootstrap
from rl.sampling import Answer

MOST = 8
"""Largest n for the best of n: beyond it, picking by a probe finds its mistakes."""
TRIES = tuple(n for n in (2, 4, 8) if n <= MOST)


@dataclass(frozen=True)
class Figures:
    """What a model does on the test split, with the harness or without it.

    hallucination: share of answers to unknown things that are neither right nor abstentions. known:
    share of right answers to known things. silent_*: shares of abstentions. kinds: by kind of
    question, the same shares. questions: known and unknown ones asked. intervals: 95 %, of the
    first two, over draws of whole entities.
    """

    hallucination: float
    known: float
    silent_known: float
    silent_unknown: float
    malformed: float
    kinds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    questions: Mapping[str, int] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Figures:
        found = {name: Interval(**v) for name, v in record.get("intervals", {}).items()}
        return cls(**{**record, "intervals": found})


@dataclass(frozen=True)
class Picked:
    """The best of n samples by the reward: alone, and with an abstention for what is then still
    below the threshold."""

    n: int
    alone: Figures
    harness: Figures

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Picked:
        both = (Figures.from_json(record[name]) for name in ("alone", "harness"))
        return cls(record["n"], *both)


def mean(values: np.ndarray) -> float:
    """nan for nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def outcome_shares(answers: Sequence[Answer], known: np.ndarray) -> dict[str, float]:
    """Shares of outcomes on known and on unknown things. known: [n] bool, one per answer."""
    said = np.array([a.outcome for a in answers])
    unknown = ~known
    return {
        "hallucination": mean(((said == "wrong") | (said == "malformed"))[unknown]),
        "known": mean((said == "right")[known]),
        "silent_known": mean((said == "abstained")[known]),
        "silent_unknown": mean((said == "abstained")[unknown]),
        "malformed": mean(said == "malformed"),
    }


def share_interval(hit: np.ndarray, entities: np.ndarray) -> Interval:
    """A share with its 95 % interval over draws of whole entities; Wilson's over the entities where
    all answers are alike, for there no draw differs. hit: [n] bool."""
    if hit.all() or not hit.any():
        n = len(set(entities))
        return rate_interval(n if hit.all() else 0, n)
    low, high = bootstrap(lambda k: mean(hit[k]), entities)
    return Interval(mean(hit), low, high)


def figures_of(answers: Sequence[Answer], known: Sequence[bool]) -> Figures:
    """Shares over answers; `known` per question, each asked equally often in a row."""
    tries = len(answers) // len(known)
    each = np.repeat(np.asarray(known, bool), tries)
    kinds = np.array([a.question.kind for a in answers])
    said = np.array([a.outcome for a in answers])
    entities = np.array([a.question.entity for a in answers])
    shares = outcome_shares(answers, each)
    intervals = {}
    for name, happened, where in (
        ("hallucination", (said == "wrong") | (said == "malformed"), ~each),
        ("known", said == "right", each),
    ):
        if where.any():
            hit = happened[where]
            intervals[name] = share_interval(hit, entities[where])
    return Figures(
        **shares,
        kinds={
            str(kind): outcome_shares(
                [a for a in answers if a.question.kind == kind], each[kinds == kind]
            )
            for kind in sorted(set(kinds))
        },
        questions={"known": int(np.sum(known)), "unknown": int(len(known) - np.sum(known))},
        intervals=intervals,
    )


def behind_monitor(
    answers: Sequence[Answer], scores: np.ndarray, threshold: float, abstention: Sequence[int]
) -> list[Answer]:
    """The answers as `rl.monitor.Monitor` gives them at this threshold: every claim below it, and
    every malformed answer, replaced by an abstention. scores: [claims] probabilities, in order."""
    worth = iter(scores)
    out = []
    for answer in answers:
        low = answer.is_claim and next(worth) < threshold
        if low or answer.outcome == "malformed":
            answer = Answer(answer.question, tuple(abstention), "abstained")
        out.append(answer)
    return out


def best_of(values: np.ndarray, tries: int, n: int) -> np.ndarray:
    """Indices of the answers picked: of every n in a row, the first of the highest value. values:
    [questions * tries] rewards, `tries` per question in a row, of which floor(tries / n) groups are
    used."""
    groups = tries // n
    kept = values.reshape(-1, tries)[:, : groups * n].reshape(-1, groups, n)
    start = np.arange(len(kept))[:, None] * tries + np.arange(groups) * n
    return (start + kept.argmax(-1)).reshape(-1)


def by_question(answers: Sequence[Answer], known: Sequence[bool]) -> list[dict[str, Any]]:
    """One record per question: what was asked, and how often each outcome came."""
    tries = len(answers) // len(known)
    return [
        {
            "prompt": answers[k * tries].question.prompt,
            "entity": answers[k * tries].question.entity,
            "kind": answers[k * tries].question.kind,
            "known": bool(knows),
            "outcomes": dict(Counter(a.outcome for a in answers[k * tries : (k + 1) * tries])),
        }
        for k, knows in enumerate(known)
    ]
