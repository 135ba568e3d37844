"""The verdict: plain numbers with intervals, the four answers in words, and `results.json` (schema
1, see docs/results.md)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evals.attacks import Curve
from evals.comparison import (
    Comparison,
    Interval,
    class_shares,
    compare,
    paired_scores,
    rate_interval,
    share_interval,
)
from evals.evalset import EvalSet
from evals.judge import Judgement, recall_by_exposure
from evals.recall import recall_by_family
from evals.speed import Speed

SCHEMA = 1
BROKEN_PERPLEXITY = 2.0
"""A model whose clean perplexity grew by more than this factor is called broken, whatever it
forgot."""
BROKEN_GIBBERISH = 0.25
"""So is one whose share of collapsed samples grew by more than this."""


@dataclass(frozen=True)
class Control:
    """An edit of the same size that knows nothing about memory. Shares are over the base; None
    where not measured."""

    name: str
    recall_share: float | None
    reasoning_share: float | None
    parameters_share: float | None
    recall_share_after_relearning: float | None = None
    reasoning_share_before_healing: float | None = None
    clean_perplexity_ratio: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Plain numbers of one run, on test splits; shares are edited over base. A number that could
    not be had is None and `notes` says why. intervals: 95 % intervals of the numbers that have one,
    by name. broken: True where the cut forgot because it broke the model (BROKEN_PERPLEXITY,
    BROKEN_GIBBERISH); the reason is in `notes`. The last five belong to teaching."""

    recall_base: float | None = None
    recall_edited: float | None = None
    recall_share: float | None = None
    recall_share_before_healing: float | None = None
    recall_share_untargeted: float | None = None
    recall_share_after_relearning: float | None = None
    reasoning_base: float | None = None
    reasoning_edited: float | None = None
    reasoning_share: float | None = None
    reasoning_share_before_healing: float | None = None
    arithmetic_share: float | None = None
    knowledge_share_listed: float | None = None
    knowledge_share_unlisted: float | None = None
    clean_perplexity_base: float | None = None
    clean_perplexity_ratio: float | None = None
    gibberish_base: float | None = None
    gibberish_edited: float | None = None
    parameters_base: int | None = None
    parameters_edited: int | None = None
    parameters_share: float | None = None
    bytes_share: float | None = None
    tokens_per_second_ratio: float | None = None
    seconds_total: float | None = None
    peak_memory_bytes: int | None = None
    broken: bool | None = None
    controls: tuple[Control, ...] = ()
    intervals: dict[str, Interval] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    hallucination_before: float | None = None
    hallucination_after: float | None = None
    known_accuracy_before: float | None = None
    known_accuracy_after: float | None = None
    probe_auroc: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in `results.json`: numbers that JSON cannot hold (infinity, NaN) become null
        with a note."""
        record = asdict(self)
        for name, value in list(record.items()):
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
                record["notes"].setdefault(name, f"not finite ({value})")
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Verdict:
        values = {k: v for k, v in record.items() if k in cls.__dataclass_fields__}
        values["controls"] = tuple(Control(**c) for c in record.get("controls", ()))
        values["intervals"] = {k: Interval(**v) for k, v in record.get("intervals", {}).items()}
        return cls(**values)


def _share(edited: float | None, base: float | None) -> float | None:
    return None if edited is None or not base else edited / base


def _hits(evalset: EvalSet, judgement: Judgement, targeted: bool) -> list[float]:
    pairs = zip(evalset.memories, judgement.memories, strict=True)
    return [float(r.strict) for i, r in pairs if i.well_exposed and i.targeted == targeted]


def _task_groups(
    evalset: EvalSet, base: Judgement, other: Judgement, aside: bool
) -> tuple[list[list[float]], list[list[float]]] | None:
    """Paired scores per task of one class; None where a task of it has no value."""
    after = {t.task: t for t in other.tasks}
    chosen = [t for t in base.tasks if (t.task in evalset.aside) == aside]
    if not chosen or any(
        t.value is None or t.task not in after or after[t.task].value is None for t in chosen
    ):
        return None
    pairs = [paired_scores(t, after[t.task]) for t in chosen]
    return [a for a, _ in pairs], [b for _, b in pairs]


def reasoning_share(
    evalset: EvalSet, base: Judgement, other: Judgement, *, aside: bool = False
) -> Interval | None:
    """Mean accuracy over tasks, other over base; of the tasks set aside (arithmetic) with
    `aside`."""
    groups = _task_groups(evalset, base, other, aside)
    return share_interval(*groups) if groups else None


def recall_share(
    evalset: EvalSet, base: Judgement, other: Judgement, *, targeted: bool = True
) -> Interval | None:
    """Strict recall of well-exposed memories, other over base."""
    hits = _hits(evalset, base, targeted), _hits(evalset, other, targeted)
    return share_interval([hits[0]], [hits[1]]) if hits[0] else None


def relearned_share(
    evalset: EvalSet, base: Judgement, curves: Sequence[Curve], group: str
) -> Interval | None:
    """Recall of the held-out memories after the worst relearning attack of one arm, over the base's
    recall before any.

    Among `curves` of that group the one with the highest last recall counts. None where no curve is
    complete."""
    done = [c for c in curves if c.group == group and not c.note]
    if not done:
        return None
    worst = max(done, key=lambda c: c.recall[-1])
    before = _hits(evalset, base, True)
    if len(before) != len(worst.hits):
        raise ValueError(
            f"the attack scored {len(worst.hits)} items of group {group!r}, the judge {len(before)}"
        )
    return share_interval([before], [[float(h) for h in worst.hits]])


def reach_verdict(
    evalset: EvalSet,
    base: Judgement,
    edited: Judgement,
    *,
    before_healing: Judgement | None = None,
    curves: Sequence[Curve] = (),
    attacked_group: str = "held out",
    speed: Speed | None = None,
    bytes_base: int | None = None,
    bytes_edited: int | None = None,
    controls: Sequence[Control] = (),
    seconds_total: float | None = None,
    peak_memory_bytes: int | None = None,
    teaching: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Verdict:
    """All numbers of the verdict from what was measured.

    curves: the relearning curves of the edited model. before_healing: the shrunk model before its
    fine-tune. teaching: the five numbers of the teaching stage by name. notes: reasons already
    known, by name of the number.
    """
    values: dict[str, Any] = {}
    intervals: dict[str, Interval] = {}
    reasons: dict[str, str] = dict(notes or {})

    def put(name: str, interval: Interval | None, why: str) -> None:
        if interval is None:
            reasons.setdefault(name, why)
        else:
            values[name] = interval.value
            intervals[name] = interval

    for arm, judgement in (("base", base), ("edited", edited)):
        hits = _hits(evalset, judgement, True)
        put(
            f"recall_{arm}",
            rate_interval(int(sum(hits)), len(hits)) if hits else None,
            "no well-exposed memories",
        )
        value = judgement.reasoning(evalset)
        if value is None:
            reasons.setdefault(f"reasoning_{arm}", _missing_tasks(judgement))
        values[f"reasoning_{arm}"] = value
        values[f"gibberish_{arm}"] = judgement.gibberish
        if judgement.gibberish is None:
            reasons.setdefault(f"gibberish_{arm}", "samples were not taken")
    nothing = "the base recites none of the memories"
    put("recall_share", recall_share(evalset, base, edited), nothing)
    put(
        "recall_share_before_healing",
        recall_share(evalset, base, before_healing) if before_healing is not None else None,
        nothing if before_healing is not None else "the model before healing was not judged",
    )
    put(
        "recall_share_untargeted",
        recall_share(evalset, base, edited, targeted=False),
        "every family of memories was targeted, or the base recites none of the others",
    )
    put(
        "recall_share_after_relearning",
        relearned_share(evalset, base, curves, attacked_group),
        "no relearning attack was run to its end"
        if not any(c.group == attacked_group and not c.note for c in curves)
        else nothing,
    )
    why = "; ".join(dict.fromkeys((_missing_tasks(base), _missing_tasks(edited))))
    put("reasoning_share", reasoning_share(evalset, base, edited), why)
    put(
        "arithmetic_share",
        reasoning_share(evalset, base, edited, aside=True),
        "no task was set aside as arithmetic",
    )
    put(
        "reasoning_share_before_healing",
        reasoning_share(evalset, base, before_healing) if before_healing is not None else None,
        why if before_healing is not None else "the model before healing was not judged",
    )
    for part in ("listed", "unlisted"):
        hits_base = [float(r.strict) for r in getattr(base, part)]
        hits_edited = [float(r.strict) for r in getattr(edited, part)]
        put(
            f"knowledge_share_{part}",
            share_interval([hits_base], [hits_edited]) if hits_base else None,
            f"no {part} general knowledge was given, or the base knows none of it",
        )
    values["clean_perplexity_base"] = base.perplexity
    values["clean_perplexity_ratio"] = edited.perplexity / base.perplexity
    if speed is not None:
        values |= {
            "parameters_base": speed.parameters_base,
            "parameters_edited": speed.parameters_edited,
            "parameters_share": speed.parameters_edited / speed.parameters_base,
            "tokens_per_second_ratio": speed.decode_ratio,
        }
    else:
        for name in (
            "parameters_base",
            "parameters_edited",
            "parameters_share",
            "tokens_per_second_ratio",
        ):
            reasons.setdefault(name, "speed was not measured")
    values["bytes_share"] = _share(bytes_edited, bytes_base)
    if values["bytes_share"] is None:
        reasons.setdefault("bytes_share", "the checkpoint files were not measured")
    values |= {
        "seconds_total": seconds_total,
        "peak_memory_bytes": peak_memory_bytes,
        **(teaching or {}),
    }
    for name in ("seconds_total", "peak_memory_bytes"):
        if values[name] is None:
            reasons.setdefault(name, "not measured")
    values["broken"] = False
    if not values["clean_perplexity_ratio"] <= BROKEN_PERPLEXITY:
        values["broken"] = True
        reasons["broken"] = f"clean perplexity grew {values['clean_perplexity_ratio']:.2f} times"
    elif None not in (base.gibberish, edited.gibberish):
        grown = float(edited.gibberish or 0) - float(base.gibberish or 0)
        if grown > BROKEN_GIBBERISH:
            values["broken"] = True
            reasons["broken"] = f"the share of collapsed samples grew by {grown:.0%}"
    return Verdict(**values, controls=tuple(controls), intervals=intervals, notes=reasons)


def _missing_tasks(judgement: Judgement) -> str:
    missing = [f"{t.task}: {t.note or 'no value'}" for t in judgement.tasks if t.value is None]
    return "; ".join(missing) if missing else "the base scores nothing on these tasks"


# In words -----------------------------------------------------------------------------------------


def percent(value: float | None, interval: Interval | None = None) -> str:
    """`12 %` or `12 % [8, 17]`; `not available` for None."""
    if value is None:
        return "not available"
    digits = 1 if abs(value) < 0.0995 and value != 0 else 0
    if interval is None:
        return f"{100 * value:.{digits}f} %"
    return (
        f"{100 * value:.{digits}f} % [{100 * interval.low:.{digits}f}, "
        f"{100 * interval.high:.{digits}f}]"
    )


def answers(verdict: Verdict) -> list[tuple[str, str]]:
    """The four questions and their answers, one short paragraph each: the first screen and the last
    lines of a run."""
    v = verdict

    def share(name: str) -> str:
        text = percent(getattr(v, name), v.intervals.get(name))
        why = v.notes.get(name)
        return f"not available ({why})" if getattr(v, name) is None and why else text

    forgotten = (
        f"Recall of held-out memories is {share('recall_share')} of the base "
        f"({percent(v.recall_base)} before, {percent(v.recall_edited)} after; before healing "
        f"{share('recall_share_before_healing')} of the base). "
        f"After an attacker relearns on other memories: {share('recall_share_after_relearning')}. "
        f"Memories of a kind the edit was not shown: {share('recall_share_untargeted')}."
    )
    if v.broken:
        forgotten = f"BROKEN: {v.notes.get('broken', 'the model collapsed')}. " + forgotten
    kept = (
        f"Reasoning is {share('reasoning_share')} of the base, before healing "
        f"{share('reasoning_share_before_healing')}; arithmetic {share('arithmetic_share')}. "
        f"General knowledge: {share('knowledge_share_listed')} of what was listed, "
        f"{share('knowledge_share_unlisted')} of what was not. "
        f"Clean perplexity is {_ratio(v.clean_perplexity_ratio)} the base's; collapsed samples "
        f"{percent(v.gibberish_edited)} (base {percent(v.gibberish_base)})."
    )
    smaller = (
        f"{percent(v.parameters_share)} of the parameters ({_count(v.parameters_base)} to "
        f"{_count(v.parameters_edited)}), {percent(v.bytes_share)} of the bytes on disk, "
        f"{_ratio(v.tokens_per_second_ratio)} the tokens per second."
    )
    rows = [
        f"{c.name}: recall {percent(c.recall_share)}, after relearning "
        f"{percent(c.recall_share_after_relearning)}, reasoning {percent(c.reasoning_share)}, "
        f"parameters {percent(c.parameters_share)}"
        for c in v.controls
    ]
    against = "; ".join(rows) + "." if rows else "No control was run."
    out = [
        ("What was forgotten?", forgotten),
        ("What was kept?", kept),
        ("How much smaller and faster?", smaller),
        ("Against what?", against),
    ]
    if v.hallucination_after is not None:
        taught = (
            f"Made-up answers {percent(v.hallucination_before)} to "
            f"{percent(v.hallucination_after)}, right answers on "
            f"what it knows {percent(v.known_accuracy_before)} to "
            f"{percent(v.known_accuracy_after)}."
        )
        out.append(("What was taught?", taught))
    return out


def _ratio(value: float | None) -> str:
    return "not available" if value is None else f"{value:.2f} times"


def _count(value: int | None) -> str:
    return "not available" if value is None else f"{value:,}"


# results.json -------------------------------------------------------------------------------------


CLASSES = {
    "open book": ("open_book",),
    "logic": ("boolean", "compare", "chain", "brackets"),
    "strings": ("sort", "reverse", "copy"),
}
"""Classes of the organism's tasks; a user's own tasks are one class, those set aside another."""


def spectrum_of(evalset: EvalSet, base: Judgement, edited: Judgement) -> dict[str, Interval | None]:
    """Share of the base kept per class, from what behaves like memory to what does not: memories by
    family, knowledge, tasks set aside (arithmetic), classes of reasoning tasks."""
    out: dict[str, Interval | None] = {}
    scored = list(zip(evalset.memories, base.memories, edited.memories, strict=True))
    for family in dict.fromkeys(i.family for i in evalset.memories):
        mine = [(a.strict, b.strict) for i, a, b in scored if i.family == family and i.well_exposed]
        if mine:
            out[f"recitation: {family}"] = share_interval(
                [[float(a) for a, _ in mine]], [[float(b) for _, b in mine]]
            )
    for part in ("unlisted", "listed"):
        hits = [[float(r.strict) for r in getattr(judgement, part)] for judgement in (base, edited)]
        if hits[0]:
            out[f"knowledge, {part}"] = share_interval([hits[0]], [hits[1]])
    names = [t.task for t in base.tasks]
    known = {task for tasks in CLASSES.values() for task in tasks}
    groups = {", ".join(evalset.aside): [n for n in names if n in evalset.aside]}
    groups |= {name: [n for n in names if n in tasks] for name, tasks in CLASSES.items()}
    groups["tasks"] = [n for n in names if n not in known and n not in evalset.aside]
    out |= class_shares(
        base.tasks, edited.tasks, {k: tasks for k, tasks in groups.items() if tasks}
    )
    return out


def judgement_section(evalset: EvalSet, base: Judgement, edited: Judgement) -> dict[str, Any]:
    """What the report shows of the two judgements: recall by exposure, late against early, per task
    with tests."""
    late: dict[str, dict[str, list[int]]] = {}
    for arm, judgement in (("base", base), ("edited", edited)):
        table = {"early": [0, 0], "late": [0, 0]}
        for item, score in zip(evalset.memories, judgement.memories, strict=True):
            if item.well_exposed and item.targeted:
                row = table["late" if item.late else "early"]
                row[0] += score.strict
                row[1] += 1
        late[arm] = table
    comparisons: list[Comparison] = compare(base.tasks, edited.tasks)
    return {
        "recall_by_exposure": {
            arm: {
                family: {str(rung): list(counts) for rung, counts in rungs.items()}
                for family, rungs in recall_by_exposure(
                    evalset.memories, judgement.memories
                ).items()
            }
            for arm, judgement in (("base", base), ("edited", edited))
        },
        "recall_late": late,
        "families": {
            arm: [asdict(row) for row in recall_by_family(evalset.memories, judgement.memories)]
            for arm, judgement in (("base", base), ("edited", edited))
        },
        "classes": {
            name: None if share is None else asdict(share)
            for name, share in spectrum_of(evalset, base, edited).items()
        },
        "tasks": [asdict(c) for c in comparisons],
        "unavailable": {
            f"{t.task} ({arm})": t.note
            for arm, judgement in (("base", base), ("edited", edited))
            for t in judgement.tasks
            if t.value is None
        },
        "documents": {t.task: t.documents_sha256 for t in base.tasks},
        "duplicates_dropped": {t.task: t.duplicates for t in base.tasks if t.duplicates},
    }


def write_results(
    path: str | Path,
    verdict: Verdict,
    *,
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
    **stages: Any,
) -> dict[str, Any]:
    """Write `results.json` whole or not at all, and return the record: schema, recipe, provenance,
    verdict and one object per stage. Infinity and NaN inside stages become null: JSON has no word
    for them."""
    record = {
        "schema": SCHEMA,
        "recipe": dict(recipe),
        "provenance": dict(provenance),
        "verdict": verdict.to_json(),
        **stages,
    }
    record = _finite(record)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(
        json.dumps(record, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8"
    )
    os.replace(temporary, path)
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def read_results(path: str | Path) -> dict[str, Any]:
    """A `results.json` (or the run folder that holds it). Raises ValueError for another schema or a
    broken file."""
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{file} does not exist: expected the results of a finished run")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}): run again, or restore the file") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ValueError(f"{file} has schema {found}, this version reads schema {SCHEMA}")
    return record
