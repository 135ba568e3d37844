"""Residual-stream states of a model over questions with their answers.

A state is read at the question's last token, at the answer's last token, as the mean over the
answer, or as `support`: mean over the answer's tokens y_t of h_{t-1} * u_{y_t}, the state that
predicts a token times that token's unembedding row, entry by entry. A linear probe on `support` is
a logit lens with learned weights (nostalgebraist 2020): it reads how far the states back this very
answer, which no linear reading of one state can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from curvature.forward import device_of

Position = Literal["question", "answer", "mean", "support", "attention"]
POSITIONS: tuple[Position, ...] = ("question", "answer", "mean", "support")
Row = tuple[str | Sequence[int], Sequence[int]]
"""A prompt (text or tokens), and the tokens of an answer without the end-of-text token."""


@dataclass(frozen=True)
class Texts:
    """Rows ready for a forward pass. ids, mask: [n, width], padded on the right. answer: [n, width]
    bool, True at the answer's tokens. last: [n] index of the prompt's last token."""

    ids: torch.Tensor
    mask: torch.Tensor
    answer: torch.Tensor
    last: torch.Tensor


def texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], device: torch.device) -> Texts:
    """Token ids of `prompt + answer`: the prompt as the tokenizer makes it, then the very tokens
    that were sampled (never decoded and read again). Raises ValueError for an empty answer."""
    prompts = [list(tokenizer(p)["input_ids"] if isinstance(p, str) else p) for p, _ in rows]
    if not all(len(answer) for _, answer in rows):
        raise ValueError("an answer without tokens has no state to read")
    lengths = [len(p) + len(a) for p, (_, a) in zip(prompts, rows, strict=True)]
    pad = next(t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if t is not None)
    ids = torch.full((len(rows), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for k, (prompt, (_, answer)) in enumerate(zip(prompts, rows, strict=True)):
        ids[k, : lengths[k]] = torch.tensor([*prompt, *answer])
        mask[k, : lengths[k]] = 1
        answers[k, len(prompt) : lengths[k]] = True
    last = torch.tensor([len(p) - 1 for p in prompts])
    return Texts(ids.to(device), mask.to(device), answers.to(device), last.to(device))


def pooled(
    hidden: torch.Tensor, text: Texts, position: Position, unembedding: torch.Tensor
) -> torch.Tensor:
    """[n, d] from hidden states [n, width, d] at one position. unembedding: [vocabulary, d]."""
    rows = torch.arange(len(hidden), device=hidden.device)
    if position == "question":
        return hidden[rows, text.last].float()
    if position == "answer":
        return hidden[rows, text.mask.sum(1) - 1].float()
    weights = text.answer[..., None].float()
    if position == "support":
        backed = hidden[:, :-1].float() * unembedding[text.ids[:, 1:]].float()
        return (backed * weights[:, 1:]).sum(1) / weights.sum(1)
    return (hidden.float() * weights).sum(1) / weights.sum(1)


def unembedding(model: PreTrainedModel) -> torch.Tensor:
    """The matrix [vocabulary, d] that turns states into logits."""
    return model.get_output_embeddings().weight


def attend(hidden: torch.Tensor, text: Any, query: torch.Tensor) -> torch.Tensor:
    """[n, d]: states of the answer weighed by softmax(q . h / sqrt d)."""
    scores = (hidden.float() @ query) / hidden.shape[-1] ** 0.5
    weights = scores.masked_fill(~text.answer, -torch.inf).softmax(1)
    return (weights[..., None] * hidden.float()).sum(1)


@dataclass(frozen=True)
class States:
    """What one pass over the rows gives. pooled: position -> [n, layers + 1, d] (layer 0 is the
    embedding). logprob: [n] sum over the answer of log p(token), nats. length: [n] answer tokens.
    """

    pooled: dict[Position, torch.Tensor]
    logprob: torch.Tensor
    length: torch.Tensor


@torch.no_grad()
def read_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 64,
) -> States:
    """States of every layer at each position, on the CPU."""
    was_training = model.training
    model.eval()
    gathered: dict[Position, list[torch.Tensor]] = {p: [] for p in POSITIONS}
    logprobs, lengths = [], []
    for start in range(0, len(rows), batch_size):
        text = texts(tokenizer, rows[start : start + batch_size], device_of(model))
        out = model(
            input_ids=text.ids, attention_mask=text.mask, output_hidden_states=True, use_cache=False
        )
        for position in POSITIONS:
            layers = torch.stack(
                [pooled(h, text, position, unembedding(model)) for h in out.hidden_states], 1
            )
            gathered[position].append(layers.cpu())
        logp = out.logits[:, :-1].float().log_softmax(-1)
        logp = logp.gather(-1, text.ids[:, 1:, None])[..., 0]
        logprobs.append((logp * text.answer[:, 1:]).sum(1).cpu())
        lengths.append(text.answer.sum(1).cpu())
    model.train(was_training)
    return States(
        {position: torch.cat(parts) for position, parts in gathered.items()},
        torch.cat(logprobs),
        torch.cat(lengths),
    )


def token_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], layer: int
) -> tuple[torch.Tensor, Texts]:
    """Hidden states [n, width, d] of one layer at every token, differentiable."""
    text = texts(tokenizer, rows, device_of(model))
    out = model(
        input_ids=text.ids, attention_mask=text.mask, output_hidden_states=True, use_cache=False
    )
    return out.hidden_states[layer], text
