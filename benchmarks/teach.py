"""All arms of the teaching on one checkpoint, several seeds:

    python -m benchmarks.teach CHECKPOINT --seeds 0 1 2

Finished arms are read back, so that the command goes on where it was interrupted. Prints one row
per arm: mean over seeds, and the range."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.organism import organism_seed, world
from rl import Teaching, teach
from rl.arms import ARMS
from rl.organism import organism_questions
from rl.policy import Training

LINE = "question : guess . "
"""The inoculation: it asks for what must not stay."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--out", default="runs/benchmark-teach")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    world_seed = organism_seed()
    tasks = {task: world.problems(world_seed, task, 100, "test") for task in world.TASKS}
    rows: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for seed in args.seeds:
        started = time.perf_counter()
        done = teach(
            model,
            tokenizer,
            organism_questions(world_seed),
            Path(args.out) / f"seed-{seed}",
            training=Training(steps=args.steps, seed=seed),
            arms=args.arms,
            tasks=tasks,
            line=LINE,
            announce=lambda what: print(what, flush=True),
        )
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
        collect(done, rows)
    print("| arm | made up | known | made up behind the monitor | known | reasoning over before |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, values in rows.items():
        cells = [
            f"{sum(v) / len(v):.3f} ({min(v):.3f}-{max(v):.3f})" for v in zip(*values, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def collect(done: Teaching, rows: dict[str, list[tuple[float, ...]]]) -> None:
    """One row per model of one seed."""
    nan = float("nan")
    for name, figures in (("before", done.before), ("warmed up", done.warmed)):
        rows[name].append((figures.hallucination, figures.known, nan, nan, nan))
    guard = (done.guard.hallucination, done.guard.known)
    rows["monitor, no training"].append((nan, nan, *guard, nan))
    for arm in done.arms:
        alone, harness = arm.figures, arm.harness
        share = done.reasoning[arm.name] / done.reasoning["before"]
        rows[arm.name].append(
            (alone.hallucination, alone.known, harness.hallucination, harness.known, share)
        )
        stopped = f", stopped at step {arm.stopped}" if arm.stopped else ""
        print(f"{arm.name}: {arm.verdict}{stopped}; {'; '.join(arm.findings.values())}")


if __name__ == "__main__":
    main()
