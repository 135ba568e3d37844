"""The probe at run time: a monitor beside a model's answers, abstention below a threshold, and the
best of n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from curvature.artifacts import read_json
from evals.generation import generate
from rl.probe import Probe, load_probe

MOST = 8
"""Largest n for the best of n: beyond it, picking by a probe finds its mistakes."""


@dataclass(frozen=True)
class Monitored:
    """One answer. probability: that it is right, by the probe. abstained: it was below the
    threshold, and `text` is the abstention."""

    text: str
    probability: float
    abstained: bool


@dataclass
class Monitor:
    """Answers of a model, read by a probe.

    reader: the model whose states the probe reads, the very one that it was fitted on; the
    answering model itself where None. Raises ValueError where probe and reader do not belong
    together.

        monitor = Monitor.load("teach/arms/frozen/policy", "teach")
        monitor.answer(["question : where does Bamidu live ? answer :"], threshold=0.5)
    """

    model: PreTrainedModel
    tokenizer: object
    probe: Probe
    reader: PreTrainedModel | None = None
    abstention: str = " I don't know."
    new_tokens: int = 32

    def __post_init__(self) -> None:
        self.probe.check(self.reader or self.model, self.tokenizer)  # type: ignore[arg-type]

    @classmethod
    def load(
        cls, model: str | Path, teaching: str | Path, *, abstention: str | None = None
    ) -> Monitor:
        """A monitor for an exported checkpoint from the folder of its teaching (`probe.safetensors`
        and `reference/`)."""
        teaching = Path(teaching)
        probe = load_probe(teaching)
        about = read_json(teaching / "questions.json")
        return cls(
            AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval(),
            AutoTokenizer.from_pretrained(model),
            probe,
            AutoModelForCausalLM.from_pretrained(teaching / "reference", dtype="auto").eval(),
            abstention or about["abstention"],
            about["new_tokens"],
        )

    def answer(
        self,
        prompts: Sequence[str],
        *,
        threshold: float | str | None = None,
        n: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[Monitored]:
        """One answer per prompt: the one of `n` samples that the probe rates highest.

        threshold: probability below which the answer becomes the abstention; "0.01" or "0.05" for
        the one at which so many right claims are lost on the calibration split; None for never.
        Raises ValueError for n outside 1 to 8.
        """
        if not 1 <= n <= MOST:
            raise ValueError(f"n is {n}: the best of 1 to {MOST} samples can be taken")
        if isinstance(threshold, str):
            if threshold not in self.probe.thresholds:
                raise ValueError(
                    f"threshold {threshold!r} is unknown: expected a probability or one of "
                    f"{', '.join(self.probe.thresholds)}"
                )
            threshold = self.probe.thresholds[threshold]
        produced = generate(
            self.model,
            self.tokenizer,  # type: ignore[arg-type]
            prompts,
            new_tokens=self.new_tokens,
            tries=n,
            temperature=temperature,
            seed=seed,
        )
        rows = [
            (p, tokens or [self.tokenizer.eos_token_id])  # type: ignore[attr-defined]
            for p, tries in zip(prompts, produced, strict=True)
            for tokens in tries
        ]
        scores = self.probe.score(self.reader or self.model, self.tokenizer, rows)  # type: ignore[arg-type]
        out = []
        each = len(rows) // len(prompts)
        for k in range(len(prompts)):
            best = max(range(k * each, (k + 1) * each), key=lambda j: float(scores[j]))
            low = threshold is not None and float(scores[best]) < threshold
            text = self.tokenizer.decode(rows[best][1])  # type: ignore[attr-defined]
            out.append(Monitored(self.abstention if low else text, float(scores[best]), low))
        return out
