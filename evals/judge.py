"""One model, one split, every question: what it recites, knows, solves, and how it reads clean
text."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from curvature.populations import Document
from evals.evalset import EvalSet, Item
from evals.language import clean_perplexity, gibberish_rate
from evals.memorization import Recitation, recite
from evals.reasoning import Sample, TaskResult, evaluate_reasoning


@dataclass(frozen=True)
class Judgement:
    """All scores of one model on one split.

    memories, listed, unlisted: one Recitation per item of the EvalSet, in its order. tasks: one
    result per task. perplexity: exp(mean nats per token) on the clean text. gibberish: share of
    greedy continuations of clean text that collapse into repetition, None where it was not asked
    for.
    """

    memories: tuple[Recitation, ...]
    listed: tuple[Recitation, ...]
    unlisted: tuple[Recitation, ...]
    tasks: tuple[TaskResult, ...]
    perplexity: float
    gibberish: float | None = None

    def recall(self, evalset: EvalSet, *, targeted: bool = True) -> float | None:
        """Strict accuracy on the well-exposed memories of the targeted (or untargeted) families;
        None where none exist."""
        hits = [
            r.strict
            for item, r in zip(evalset.memories, self.memories, strict=True)
            if item.well_exposed and item.targeted == targeted
        ]
        return sum(hits) / len(hits) if hits else None

    def reasoning(self, evalset: EvalSet) -> float | None:
        """Mean over the tasks that are not set aside."""
        values = [t.value for t in self.tasks if t.task not in evalset.aside]
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    def aside(self, evalset: EvalSet) -> float | None:
        """Mean over the tasks that are set aside (arithmetic)."""
        values = [t.value for t in self.tasks if t.task in evalset.aside and t.value is not None]
        return sum(values) / len(values) if values else None

    def knowledge(self, listed: bool) -> float | None:
        """Strict accuracy on general knowledge inside (listed) or outside the keep population."""
        hits = [r.strict for r in (self.listed if listed else self.unlisted)]
        return sum(hits) / len(hits) if hits else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Judgement:
        tasks = (
            TaskResult(**{**t, "samples": tuple(Sample(**s) for s in t["samples"])})
            for t in record["tasks"]
        )
        lists = {
            k: tuple(Recitation(**r) for r in record[k]) for k in ("memories", "listed", "unlisted")
        }
        return cls(
            **lists,
            tasks=tuple(tasks),
            perplexity=record["perplexity"],
            gibberish=record["gibberish"],
        )


def recall_by_exposure(
    items: Sequence[Item], scores: Sequence[Recitation]
) -> dict[str, dict[int, tuple[int, int]]]:
    """(recited, asked) per family and exposure count; items of unknown exposure are left out."""
    table: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    for item, score in zip(items, scores, strict=True):
        if item.exposure is not None:
            hit, n = table[item.family].get(item.exposure, (0, 0))
            table[item.family][item.exposure] = (hit + score.strict, n + 1)
    return {family: dict(sorted(rungs.items())) for family, rungs in table.items()}


def _read_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    documents: Sequence[Document],
    batch_size: int,
) -> TaskResult:
    """Documents by one teacher-forced pass: exact answers, or the share of right tokens for text
    without prompts."""
    plain = not documents[0].prompt
    pairs = []
    for document in documents:
        if not plain:
            pairs.append((document.prompt, document.answer))
            continue
        words = document.text.split(" ")
        half = max(1, len(words) // 2)
        pairs.append((" ".join(words[:half]), " " + " ".join(words[half:])))
    results = recite(model, tokenizer, pairs, batch_size)
    samples = tuple(
        Sample(
            k,
            hashlib.sha256(d.text.encode()).hexdigest(),
            r.right if plain else float(r.strict),
            r.logprob,
        )
        for k, (d, r) in enumerate(zip(documents, results, strict=True))
    )
    value = sum(s.score for s in samples) / len(samples)
    return TaskResult(name, "1.0", "right tokens" if plain else "acc", "none", value, samples)


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evalset: EvalSet,
    *,
    batch_size: int = 64,
    harness: bool = True,
    width: int = 256,
    progress: str | None = None,
) -> Judgement:
    """Ask `model` everything in `evalset`.

    harness: score prompted tasks with lm-eval (the reported figures); without it the same
    exact-answer accuracy comes from `recite`, which searches use because it starts faster, and
    gibberish is not measured. width: row length for perplexity.
    """
    model.eval()
    parts = (evalset.memories, evalset.listed, evalset.unlisted)
    everything = [(item.prompt, item.target) for part in parts for item in part]
    scores = recite(model, tokenizer, everything, batch_size, progress and f"{progress}: recall")
    cut = [len(evalset.memories), len(evalset.memories) + len(evalset.listed)]
    tasks: list[TaskResult] = []
    prompted = {n: d for n, d in evalset.tasks.items() if harness and d[0].prompt}
    if prompted:
        tasks += evaluate_reasoning(
            model,
            tokenizer,
            prompted,
            batch_size=batch_size,
            progress=progress and f"{progress}: tasks",
        )
    for name, documents in evalset.tasks.items():
        if name not in prompted:
            tasks.append(_read_task(model, tokenizer, name, documents, batch_size))
    tasks.sort(key=lambda t: list(evalset.tasks).index(t.task))
    perplexity = clean_perplexity(
        model, tokenizer, evalset.clean, width=width, batch_size=batch_size
    )
    return Judgement(
        tuple(scores[: cut[0]]),
        tuple(scores[cut[0] : cut[1]]),
        tuple(scores[cut[1] :]),
        tuple(tasks),
        perplexity if math.isfinite(perplexity) else math.inf,
        gibberish_rate(model, tokenizer, evalset.clean) if harness else None,
    )
