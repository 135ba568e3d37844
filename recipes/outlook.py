"""What a run is about to do, and how long it may take: the header that a person reads first."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from curvature.memory import RowsAtOnce

BACKWARD = 3.0
"""A forward and backward pass over a forward pass."""
MEASURE = 4.0
"""The same with the products that factors need."""
AGAIN = 0.3
"""Share of the token budget that is measured again after a round."""
START = 8.0
"""Seconds that imports, loading and the report take, and that every judgement adds a quarter of."""


@torch.no_grad()
def tokens_per_second(model: nn.Module, *, width: int, batch_size: int) -> float:
    """Forward pass of one batch of token 0, measured after one that is not."""
    device = next(model.parameters()).device

    def measured(rows: int) -> float:
        ids = torch.zeros(rows, width, dtype=torch.long, device=device)
        for _ in range(2):
            started = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return ids.numel() / (time.perf_counter() - started)

    return RowsAtOnce("a first look at the speed", None, min(batch_size, 8)).run(measured)


def asked_characters(evalset: Any) -> int:
    """Characters that the judge reads for one model on one split."""
    items = (*evalset.memories, *evalset.listed, *evalset.unlisted)
    asked = sum(len(i.prompt) + len(i.target) for i in items)
    documents = (*(d for docs in evalset.tasks.values() for d in docs), *evalset.clean.documents)
    return asked + sum(len(d.text) for d in documents)


def expected_seconds(recipe: Any, material: Any, speed: float, *, characters: float = 3.0) -> float:
    """About how long all stages take, from the tokens that they pass through the model.

    speed: forward tokens per second. characters: per token. Of the right order, no more: it does
    not know of caches, of other work on the machine, or of stages that are found.
    """
    r = recipe
    shrinks = r.keep_neurons is None or r.keep_neurons < 1
    populations = len(material.keep) + len(material.memorized)
    tries = r.candidates * (r.rounds if r.method == "contrast" and r.rounds > 1 else 1)
    again = AGAIN * populations * tries if r.method == "contrast" and r.rounds > 1 else 0.0
    measured = r.factor_tokens * (populations + shrinks * len(material.keep) + again) * MEASURE
    test = asked_characters(material.test) / characters
    tune = asked_characters(material.tune) / characters
    arms = 4 + 2 * len(r.controls)
    attacked = 1 + len(r.controls)
    judged = arms * test + (tries + 5) * tune
    healed = (r.heal_tokens * attacked) * BACKWARD
    attack = r.attack_steps * 2048 * BACKWARD * attacked
    tokens = measured + judged + healed + attack
    return tokens / speed + START * (1 + arms / 4)


def duration(seconds: float) -> str:
    """`40 s`, `5 min`, `3 h`: no more digits than the estimate has."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def outlook(recipe: Any, model: Any, material: Any, seconds: float | None) -> list[tuple[str, str]]:
    """(label, line) of the header. seconds: the estimate, None where only a part will run."""
    r, config = recipe, model.config
    text = config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        (
            "model",
            f"{r.model}: {config.model_type}, {text.num_hidden_layers} layers, {parameters:,} "
            f"parameters, on {model.device.type}",
        ),
        ("must go", "; ".join(p.source or p.name for p in material.memorized)),
        ("must stay", "; ".join(p.source or p.name for p in material.keep)),
    ]
    steps = [f"measure curvature ({r.factor_tokens:,} tokens of each text)"]
    if r.plan_only:
        steps.append("predict what cuts would cost, and write no weights")
    elif not r.measure_only:
        steps.append(f"cut by {r.method}, up to {r.candidates} settings tried")
        if r.shrink is not None:
            steps.append(f"take neurons out until {r.shrink:.0%} of the parameters are left")
        elif r.keep_neurons is None or r.keep_neurons < 1:
            steps.append(f"take all but {r.keep_neurons or 0.6:.0%} of the neurons out")
        if r.heal_tokens:
            steps.append(f"heal on {r.heal_tokens:,} tokens")
        if r.attack_steps:
            steps.append(f"attack for {r.attack_steps} steps")
        if r.controls:
            steps.append(f"do the same to {len(r.controls)} controls ({', '.join(r.controls)})")
    lines.append(("will", "; ".join(steps)))
    if seconds is not None:
        lines.append(("takes", f"about {duration(seconds)} if nothing is found from before"))
    return [*lines, *(("note", note) for note in material.notes)]
