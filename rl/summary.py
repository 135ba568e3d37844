"""What a teaching did, as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rl.outcomes import Figures
from rl.teach import Teaching


def show_teaching(teaching: Teaching) -> None:
    """One row per model, alone and behind the monitor; the probe beside its baselines; findings."""
    console = Console(soft_wrap=True)
    table = Table("model", "made up", "known", "silent on known", "reasoning", "audit", box=None)

    def row(name: str, figures: Figures, audit: str = "") -> None:
        reasoning = teaching.reasoning.get(name)
        table.add_row(
            name,
            f"{figures.hallucination:.1%}",
            f"{figures.known:.1%}",
            f"{figures.silent_known:.1%}",
            "" if reasoning is None else f"{reasoning:.1%}",
            audit,
        )

    row("before", teaching.before)
    row("after the warm-up", teaching.warmed)
    row("monitor, no training", teaching.guard)
    for arm in teaching.arms:
        row(arm.name, arm.figures, arm.verdict)
        row(f"{arm.name} behind the monitor", arm.harness)
    console.print(table)
    for score in teaching.probe:
        if score.split == "test":
            a = score.auroc
            console.print(f"AUROC of the {score.name}: {a.value:.3f} [{a.low:.3f}, {a.high:.3f}]")
    for arm in teaching.arms:
        for finding in arm.findings.values():
            console.print(f"{arm.name}: {finding}")
    console.print(f"taught model  {teaching.folder / 'arms' / teaching.chosen.name / 'policy'}")
