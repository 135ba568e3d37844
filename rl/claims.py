"""Claims with labels: what a probe is fitted and judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.sampling import Answer
from rl.states import POSITIONS, Position, Row, States, read_states

FEWEST = 20
"""Claims of each class that a probe needs in each split."""


@dataclass(frozen=True)
class Claims:
    """Claims with labels: what a probe is fitted and judged on. right: [n] 0/1."""

    rows: tuple[Row, ...]
    right: np.ndarray
    entities: np.ndarray
    kinds: np.ndarray
    states: States

    @classmethod
    def gather(
        cls,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        answers: Sequence[Answer],
        *,
        fewest: int = FEWEST,
        positions: Sequence[Position] = POSITIONS,
    ) -> Claims:
        """The well-formed claims among the answers, read at these positions. Raises ValueError
        where a class has fewer than `fewest`, naming the split."""
        claims = [a for a in answers if a.is_claim]
        right = np.array([int(a.outcome == "right") for a in claims])
        count = {"right": int(right.sum()), "wrong": int(len(right) - right.sum())}
        for label, n in count.items():
            if n == 0:
                raise ValueError(
                    f"the {name} split has {len(claims)} claims and none of them is {label}: a "
                    "probe needs both; add questions that the model "
                    f"{'knows' if label == 'right' else 'does not know'}"
                )
            if n < fewest:
                raise ValueError(
                    f"the {name} split has {n} {label} claims, fewer than {fewest}: too few labels "
                    "for a probe; give more questions"
                )
        rows = tuple((a.question.prompt, a.tokens) for a in claims)
        return cls(
            rows,
            right,
            np.array([a.question.entity for a in claims]),
            np.array([a.question.kind for a in claims]),
            read_states(model, tokenizer, rows, positions=positions),
        )
