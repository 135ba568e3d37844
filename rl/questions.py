"""Questions with their truth, split by entity, and how an answer is judged.

Five splits that share no entity: `fit` (the probe), `calibration` (its probabilities, thresholds
and the audits), `rl` (training), `test` (the reported figures) and `ood` (other wordings or another
kind of question). What is known is decided by the model's own samples after surgery, never by what
it was once taught.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

Split = Literal["fit", "calibration", "rl", "test", "ood"]
Outcome = Literal["right", "wrong", "abstained", "malformed"]
SHARES: dict[Split, float] = {"fit": 0.35, "calibration": 0.2, "rl": 0.25, "test": 0.2}
"""Shares of the entities of a user's file that names no splits."""
DONT_KNOW = "I don't know."


@dataclass(frozen=True)
class Question:
    """One question about one entity.

    answers: what counts as right; empty where nobody can know. entity: whom it is about; splits
    never share one. kind: a class of questions, for the tables.
    """

    prompt: str
    answers: tuple[str, ...]
    entity: str
    kind: str = "question"


@dataclass(frozen=True)
class Questions:
    """Five splits of questions that share no entity, and the words that say "I do not know".

    Raises ValueError where two splits share an entity, or one of the first four is empty.
    """

    fit: tuple[Question, ...]
    calibration: tuple[Question, ...]
    rl: tuple[Question, ...]
    test: tuple[Question, ...]
    ood: tuple[Question, ...] = ()
    abstention: str = " " + DONT_KNOW
    new_tokens: int = 32
    source: str = "questions"

    def __post_init__(self) -> None:
        for name, part in self.splits():
            if not part and name != "ood":
                raise ValueError(f"{self.source}: the split {name!r} is empty: give more entities")
        entities = {name: {q.entity for q in part} for name, part in self.splits()}
        for a, b in combinations(entities, 2):
            if shared := entities[a] & entities[b]:
                raise ValueError(
                    f"{self.source}: {len(shared)} entities stand in both the {a} and the {b} "
                    f"split (such as {min(shared)!r}): a probe could learn names; give each "
                    "entity one split"
                )

    def splits(self) -> Iterator[tuple[str, tuple[Question, ...]]]:
        for field in fields(self)[:5]:
            yield field.name, getattr(self, field.name)

    @cached_property
    def marks(self) -> bool:
        """Whether some answer is nothing but punctuation ("+"): only then can it be one."""
        return any(only_marks(a) for _, part in self.splits() for q in part for a in q.answers)


# Judging an answer --------------------------------------------------------------------------------


DROPPED = re.compile(
    r"(?<=\d),(?=\d{3}(?!\d))|"  # commas of thousands, and every mark but
    r"(?!(?<=\d)[.,:/](?=\d)|(?<!\w)\.(?=\d)|"  # those inside a number, a point that begins one,
    r"((?<!\w)|(?<=\de))-(?=[^\w\s]*\d))"  # and a minus before one or in its exponent
    rf"[{re.escape(string.punctuation)}]"
)
"""Punctuation that answers are compared without."""


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces, as SQuAD's evaluation does, but
    numbers stay what they are: -5, 3.5, 1/2 (1,000 is 1000). Where nothing is left: with the
    articles; where there are only marks ("+"): the marks."""
    low = text.lower().replace("\N{MINUS SIGN}", "-")
    bare = " ".join(DROPPED.sub("", low).split())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split()) or bare or low.strip()


def only_marks(text: str) -> bool:
    """Whether there is nothing in it but punctuation."""
    return not text.translate(str.maketrans("", "", string.punctuation)).strip()


def outcome(
    question: Question,
    tokens: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    abstention: str,
    ended: bool,
    marks: bool = False,
) -> Outcome:
    """What an answer is worth. tokens: without the end-of-text token. ended: it was there. marks:
    see `Questions.marks`.

    malformed: cut off, empty, with special tokens inside (a decoder would hide them), more than one
    line, or, without `marks`, nothing but punctuation. abstained: exactly the words of
    `abstention`. right: equal to one of the answers after `normalized`; anything else is wrong,
    however much of the answer is in it.
    """
    special = set(tokenizer.all_special_ids)
    text = str(tokenizer.decode(list(tokens)))
    said = normalized(text)
    empty = not said or (only_marks(said) and not marks)
    if not ended or empty or "\n" in text.strip() or any(t in special for t in tokens):
        return "malformed"
    if said == normalized(abstention):
        return "abstained"
    return "right" if said in {normalized(a) for a in question.answers} else "wrong"


# A user's file ------------------------------------------------------------------------------------


def questions_from_file(
    path: str | Path, *, abstention: str = " " + DONT_KNOW, new_tokens: int = 32, seed: int = 0
) -> Questions:
    """Questions of a .jsonl file with rows of `prompt`, `answers` (a list, or `answer`, a text;
    empty where nobody can know), `entity` and optionally `kind` and `split`.

    Rows without a split are dealt by entity (`SHARES`), so that no entity stands in two of them.
    Raises ValueError that names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file: expected questions, one JSON object per line")
    names = [f.name for f in fields(Questions)[:5]]
    splits: dict[str, list[Question]] = {name: [] for name in names}
    undealt: dict[str, list[Question]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        question, split = _read_question(f"{path}, line {number}", line)
        if split is None:
            undealt.setdefault(question.entity, []).append(question)
        elif split not in splits:
            raise ValueError(
                f"{path}, line {number}: split {split!r} is unknown: expected one of "
                f"{', '.join(names)}, or none"
            )
        else:
            splits[split].append(question)
    entities = sorted(undealt)
    random.Random(seed).shuffle(entities)
    start = 0.0
    for split, share in SHARES.items():
        first, last = round(start * len(entities)), round((start + share) * len(entities))
        splits[split] += [q for e in entities[first:last] for q in undealt[e]]
        start += share
    return Questions(
        **{name: tuple(part) for name, part in splits.items()},
        abstention=abstention,
        new_tokens=new_tokens,
        source=str(path),
    )


def _read_question(where: str, line: str) -> tuple[Question, str | None]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise ValueError(f"{where}: expected an object with a text `prompt`")
    answers = row.get("answers", row.get("answer", ""))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError(f"{where}: `answers` is a list of texts (empty where nobody can know)")
    entity = row.get("entity")
    if not isinstance(entity, str) or not entity:
        raise ValueError(
            f"{where}: `entity` is missing: name whom the question is about, splits are made by it"
        )
    known = tuple(a for a in answers if a.strip())
    return Question(row["prompt"], known, entity, str(row.get("kind", "question"))), row.get(
        "split"
    )
