"""Bodies of text with a role, and the batches of tokens that every estimate is made on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

Role = Literal["reference", "memorized", "reasoning"]


@dataclass(frozen=True)
class Document:
    """One document: a prompt that is given and an answer that is scored. Plain text is an answer without a prompt."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Population:
    """A body of text with a role: `reference` (ordinary text), `memorized` (what must go), `reasoning` (what must stay)."""

    name: str
    role: Role
    documents: tuple[Document, ...]
    source: str = ""

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.role.encode())
        for document in self.documents:
            digest.update(f"\x00{document.prompt}\x01{document.answer}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """Rows of tokens. ids, mask: [rows, width] long. scored: [rows, width] bool, True at tokens whose prediction counts
    (never the first of a row); what is predicted at position t is the token at t + 1."""

    ids: torch.Tensor
    mask: torch.Tensor
    scored: torch.Tensor


def batches(
    population: Population,
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int,
    batch_size: int,
    tokens: int | None = None,
    seed: int = 0,
) -> Iterator[Batch]:
    """Documents in a seeded order, each as `<bos> prompt answer <eos>`, packed first-fit into rows of `width` tokens and
    padded on the right; stops after `tokens` scored tokens."""
    raise NotImplementedError
