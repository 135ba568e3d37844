"""Answers that a model samples, each with what it is worth: the labels of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.generation import generate
from rl.questions import Outcome, Question, Questions, outcome


@dataclass(frozen=True)
class Answer:
    """One sampled answer. tokens: without the end-of-text token. ended: the model ended it."""

    question: Question
    tokens: tuple[int, ...]
    outcome: Outcome
    ended: bool = True

    @property
    def is_claim(self) -> bool:
        """A well-formed answer that is not an abstention."""
        return self.outcome in ("right", "wrong")


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    about: Questions,
    *,
    tries: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[Answer]:
    """`tries` answers to each question, in order, as the plain softmax at `temperature` gives them
    (0: the greedy one)."""
    produced = generate(
        model,
        tokenizer,
        [q.prompt for q in questions],
        new_tokens=about.new_tokens,
        tries=tries,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return [
        judged(question, tokens, tokenizer, about)
        for question, continuations in zip(questions, produced, strict=True)
        for tokens in continuations
    ]


def judged(
    question: Question, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, about: Questions
) -> Answer:
    """An answer with its outcome. One as long as the budget was cut off, not ended."""
    ended = len(tokens) < about.new_tokens
    kind = outcome(
        question, tokens, tokenizer, abstention=about.abstention, ended=ended, marks=about.marks
    )
    return Answer(question, tuple(tokens), kind, ended)


def known_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    about: Questions,
) -> list[bool]:
    """Whether the model knows each answer: its greedy answer is right. Shares are then taken over
    samples, which this choice has not seen."""
    greedy = sample_answers(model, tokenizer, questions, about, tries=1, temperature=0.0)
    return [answer.outcome == "right" for answer in greedy]
