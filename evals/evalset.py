"""What the judge asks: held-out memories, knowledge that should stay, problems and clean text, of one split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from curvature.populations import Document, Population
from evals.memorization import encode_pair


@dataclass(frozen=True)
class Item:
    """One memory or piece of knowledge: is `target` produced after `prompt`?

    exposure: how often training showed it, None where unknown. targeted: its family was given to the edit.
    forms: further ways to ask for it, (prompt, target) by name. well_exposed: it counts for the headline recall.
    """

    id: str
    family: str
    prompt: str
    target: str
    exposure: int | None = None
    late: bool = False
    well_exposed: bool = True
    targeted: bool = True
    forms: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalSet:
    """One split of the judge's material.

    memories: what should be forgotten. listed, unlisted: general knowledge that is, and is not, in the keep population.
    tasks: problems by task name. aside: names of tasks that are judged as a class of their own (arithmetic).
    clean: ordinary text for perplexity.
    """

    split: Literal["edit", "tune", "test"]
    memories: tuple[Item, ...]
    listed: tuple[Item, ...]
    unlisted: tuple[Item, ...]
    tasks: dict[str, tuple[Document, ...]]
    clean: Population
    aside: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def headline(self) -> tuple[Item, ...]:
        """The memories behind the headline recall: well exposed and targeted."""
        return tuple(item for item in self.memories if item.well_exposed and item.targeted)


@dataclass(frozen=True)
class Material:
    """All text of one run, split before anything is estimated.

    memorized, keep, reference: populations of the *edit* split, for estimation. relearn: the documents that the relearning
    attack trains on. heal: fresh text for healing, None where there is none. tune, test: the judge's two other splits.
    """

    memorized: Population
    keep: Population
    reference: Population
    relearn: Population
    heal: Population | None
    tune: EvalSet
    test: EvalSet

    @property
    def sha256(self) -> str:
        parts = [self.memorized.sha256, self.keep.sha256, self.reference.sha256, self.relearn.sha256]
        parts += [self.heal.sha256 if self.heal else "", self.tune.sha256, self.test.sha256]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def windows(
    population: Population,
    tokenizer: PreTrainedTokenizerBase,
    prefix_tokens: int,
    suffix_tokens: int,
) -> list[Item]:
    """Prefix/suffix items of a body of text: the first `prefix_tokens` of a document and the `suffix_tokens` after them.

    Documents with a prompt of their own keep it. Text that is too short, and windows whose border falls inside a token,
    are left out; where nothing is left a ValueError says how long the documents are.
    """
    items: list[Item] = []
    longest = 0
    for k, document in enumerate(population.documents):
        if document.prompt:
            prompt, target = document.prompt, document.answer
        else:
            ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
            longest = max(longest, len(ids))
            if len(ids) < prefix_tokens + suffix_tokens:
                continue
            whole = tokenizer.decode(ids[: prefix_tokens + suffix_tokens])
            prompt = tokenizer.decode(ids[:prefix_tokens])
            if not whole.startswith(prompt):
                continue
            target = whole[len(prompt) :]
        try:
            encode_pair(tokenizer, prompt, target)
        except ValueError:
            continue
        items.append(Item(f"{population.name}-{k}", population.name, prompt, target))
    if not items:
        raise ValueError(
            f"{population.source or population.name}: no document holds a prefix of {prefix_tokens} and a suffix of "
            f"{suffix_tokens} tokens (the longest has {longest}): lower --prefix-tokens and --suffix-tokens or give longer texts"
        )
    return items


def without_duplicates(items: Sequence[Item]) -> list[Item]:
    """The first of all items with the same prompt and target: duplicates inflate every count."""
    return list({(item.prompt, item.target): item for item in reversed(items)}.values())[::-1]
