"""What a person reads at the end of a run: a small table of the verdict, and the goals."""

from __future__ import annotations

from dataclasses import dataclass

from evals.verdict import Control, Verdict, percent


@dataclass(frozen=True)
class Goal:
    """One goal judged on the reported (test) figures. wanted, reached: in words. met: a figure that
    could not be had meets no goal."""

    name: str
    wanted: str
    reached: str
    met: bool


def judge_goals(
    verdict: Verdict,
    *,
    keep_reasoning: float | None = None,
    keep_perplexity: float | None = None,
    forget: float | None = None,
    shrink: float | None = None,
) -> list[Goal]:
    """The goals that were set (None: not asked for) against the verdict, and that the model is not
    broken.

    keep_reasoning: edited >= goal x base. forget: recall edited <= goal x base. keep_perplexity:
    edited over base, at most. shrink: share of the parameters, at most. Where the base solves or
    recites nothing, edited 0 is all of it: the goal holds and the words say so.
    """
    goals = []

    def add(name: str, wanted: str, reached: str, met: bool) -> None:
        goals.append(Goal(name, wanted, reached, met))

    def against_base(kind: str, share: float, least: bool) -> tuple[str, bool]:
        base, edited = getattr(verdict, f"{kind}_base"), getattr(verdict, f"{kind}_edited")
        if base is None or edited is None:
            return f"not available ({verdict.notes.get(f'{kind}_base', 'not judged')})", False
        met = edited >= share * base if least else edited <= share * base
        return percent(
            edited / base
        ) if base else f"the base has none, edited {percent(edited)}", met

    if keep_reasoning is not None:
        reached, met = against_base("reasoning", keep_reasoning, least=True)
        add("keep reasoning", f"at least {percent(keep_reasoning)} of the base", reached, met)
    if forget is not None:
        reached, met = against_base("recall", forget, least=False)
        add("forget", f"recall at most {percent(forget)} of the base", reached, met)
    for name, wanted, got in (
        ("keep perplexity", keep_perplexity, verdict.clean_perplexity_ratio),
        ("shrink", shrink, verdict.parameters_share),
    ):
        if wanted is not None:
            reached = "not available" if got is None else percent(got)
            met = got is not None and got <= wanted
            add(name, f"at most {percent(wanted)} of the base", reached, met)
    if verdict.broken:
        add("not broken", "a model that still writes", verdict.notes.get("broken", "broken"), False)
    return goals


def summary(verdict: Verdict) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the small table: figure, base, edited, share of the base with its
    interval, and the same share of each control, after the same attack. Rows without a number are
    left out."""
    v = verdict

    def plain(value: float | None) -> str:
        return "" if value is None else percent(value)

    def share(name: str) -> str:
        value = getattr(v, name)
        return "" if value is None else percent(value, v.intervals.get(name))

    def number(value: float | None, digits: int = 0) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    perplexity = None
    if v.clean_perplexity_base is not None and v.clean_perplexity_ratio is not None:
        perplexity = v.clean_perplexity_base * v.clean_perplexity_ratio
    before, after = number(v.clean_perplexity_base, 2), number(perplexity, 2)
    sizes = number(v.parameters_base), number(v.parameters_edited)
    recall = plain(v.recall_base), plain(v.recall_edited)
    reasoning = plain(v.reasoning_base), plain(v.reasoning_edited)
    figures: list[tuple[str, str, str, str]] = [
        ("recall of held-out memories", *recall, "recall_share"),
        ("  before healing", "", "", "recall_share_before_healing"),
        ("  after relearning", "", "", "recall_share_after_matched_relearning"),
        ("  after the worst relearning", "", "", "recall_share_after_relearning"),
        ("  of a kind the edit never saw", "", "", "recall_share_untargeted"),
        ("reasoning", *reasoning, "reasoning_share"),
        ("  before healing", "", "", "reasoning_share_before_healing"),
        ("arithmetic", "", "", "arithmetic_share"),
        ("knowledge listed to stay", "", "", "knowledge_share_listed"),
        ("knowledge not listed", "", "", "knowledge_share_unlisted"),
        ("perplexity on clean text", before, after, "clean_perplexity_ratio"),
        ("parameters", *sizes, "parameters_share"),
        ("tokens per second", "", "", "tokens_per_second_ratio"),
    ]
    columns = ["test split", "base", "edited", "of the base", *(c.name for c in v.controls)]
    rows = [
        [label, base, edited, share(name), *(plain(_of_control(c, name)) for c in v.controls)]
        for label, base, edited, name in figures
    ]
    return columns, [row for row in rows if any(row[1:])]


def _of_control(control: Control, name: str) -> float | None:
    """What a control has beside this run's figure: its only attack is the matched one."""
    if name == "recall_share_after_relearning":
        return None
    if name == "recall_share_after_matched_relearning":
        name = "recall_share_after_relearning"
    return getattr(control, name, None)
