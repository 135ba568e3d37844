"""The reward of an answer: -1 for what the guard refuses, a fixed payment for an abstention, and
for a claim the probability that it is right, as a number without a graph.

The frozen reward is a fixed function of the tokens: whatever the policy does to its own states
cannot move it. An abstention is paid what an uninformed claim is worth, or less
(`rl.teach.payment`), which keeps abstention off the trivial corner: a probe that knows nothing
pushes nowhere, and a right claim that the model keeps making earns more than silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.probe import Probe
from rl.questions import Questions
from rl.sampling import Answer, judged

MALFORMED = -1.0
Source = Literal["frozen", "oracle", "shuffled", "live"]


@contextmanager
def frozen_copy(model: Any) -> Iterator[PreTrainedModel]:
    """The frozen copy behind a model: a model with LoRA adapters, the adapters off (exact, and at
    no memory), or the model itself."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield model.base_model.model
    else:
        yield model


@dataclass
class Reward:
    """A reward function as TRL calls it.

    source: where a claim's value comes from: the probe on the frozen copy, the truth, the frozen
    probe's values dealt at random among the batch's claims, or the same probe on the live policy
    (as a number). reader: the frozen copy, or the policy with adapters. policy: for `live`.
    """

    source: Source
    questions: Questions
    tokenizer: PreTrainedTokenizerBase
    probe: Probe
    reader: Any
    abstain: float
    policy: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.__name__ = self.source
        self.random = np.random.default_rng(self.seed)

    def __call__(
        self, completion_ids: Sequence[Sequence[int]], question: Sequence[int], **_: Any
    ) -> list[float]:
        """Rewards of a batch of completions (token ids) to the questions with these numbers in the
        `rl` split. Raises ValueError where one is not finite: TRL would quietly drop its group."""
        answers = [
            judged(self.questions.rl[k], self._stripped(ids), self.tokenizer, self.questions)
            for ids, k in zip(completion_ids, question, strict=True)
        ]
        values = self.of(answers)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{int((~np.isfinite(values)).sum())} of {len(values)} rewards are not finite: the "
                "probe or the states it reads have overflowed; lower the learning rate"
            )
        return [float(v) for v in values]

    def _stripped(self, ids: Sequence[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return list(ids[: list(ids).index(end)]) if end in ids else list(ids)

    def of(self, answers: Sequence[Answer]) -> np.ndarray:
        """[n] rewards of answers."""
        return values_of(answers, self.claims([a for a in answers if a.is_claim]), self.abstain)

    def claims(self, claims: Sequence[Answer]) -> np.ndarray:
        """[n] values of claims."""
        if not claims:
            return np.zeros(0)
        if self.source == "oracle":
            return np.array([float(a.outcome == "right") for a in claims])
        rows = [(a.question.prompt, a.tokens) for a in claims]
        if self.source == "live":
            return self.probe.score(live_copy(self.policy), self.tokenizer, rows)
        with frozen_copy(self.reader) as model:
            values = self.probe.score(model, self.tokenizer, rows)
        return self.random.permutation(values) if self.source == "shuffled" else values


def live_copy(model: Any) -> PreTrainedModel:
    """The policy itself, adapters on."""
    return model.base_model.model if hasattr(model, "disable_adapter") else model


def values_of(answers: Sequence[Answer], claims: np.ndarray, abstain: float) -> np.ndarray:
    """[n] rewards, given the values of the claims among the answers in their order."""
    worth = iter(claims)
    fixed = {"malformed": MALFORMED, "abstained": abstain}
    return np.array([next(worth) if a.is_claim else fixed[a.outcome] for a in answers], float)


def check_rewards(values: np.ndarray) -> None:
    """Raise ValueError before training where the rewards of sampled answers cannot teach."""
    if not np.isfinite(values).all():
        raise ValueError(
            f"{int((~np.isfinite(values)).sum())} of {len(values)} rewards of sampled answers are "
            "not finite: the probe does not fit this model"
        )
    if not len(values) or np.ptp(values) < 1e-6:
        raise ValueError(
            "all rewards of sampled answers are equal: there is nothing to learn; check that the "
            "questions hold known and unknown things"
        )
