"""What a model recites: everything that one teacher-forced pass can tell.

For a prompt x and a target y_1..y_n, one forward pass over (x, y) gives the arg-max prediction at
every target position. Greedy decoding from x yields exactly y if and only if all n arg-maxes are
right (each step then sees the same context), so strict accuracy needs no generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Recitation:
    """One scored item.

    strict: all target tokens are the arg-max. right: share of target tokens that are the arg-max.
    extraction: extraction strength 1 - (shortest revealed part of the target after which the rest
    is recited) / length, in [0, 1]. logprob: sum of log p(target token), nats. tokens: target
    length.
    """

    strict: bool
    right: float
    extraction: float
    logprob: float
    tokens: int


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str
) -> tuple[list[int], int]:
    """Token ids of `prompt + target` and the number of prompt tokens.

    Raises ValueError where the target is empty or where the prompt tokenizes differently alone and
    in context (the border would then fall inside a token, and the score would belong to another
    text).
    """
    ids = tokenizer(prompt + target)["input_ids"]
    start = tokenizer(prompt)["input_ids"]
    if len(start) > 1 and start[-1] == tokenizer.eos_token_id and ids[: len(start)] != start:
        start = start[:-1]
    if ids[: len(start)] != start:
        raise ValueError(
            f"the prompt {prompt[-40:]!r} tokenizes differently alone and before {target[:40]!r}: "
            "move the border to a place where the tokenizer splits"
        )
    if len(ids) == len(start):
        raise ValueError(f"the target after {prompt[-40:]!r} has no tokens")
    if not start:
        raise ValueError(
            f"the prompt before {target[:40]!r} has no tokens, so its first token cannot be scored"
        )
    return ids, len(start)


@torch.no_grad()
def recite(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 32,
    progress: str | None = None,
) -> list[Recitation]:
    """Score (prompt, target) pairs by one teacher-forced pass each, in the order given.

    Sequences are right-padded and batched by length; under a causal mask padding on the right
    changes nothing to its left. Raises ValueError on non-finite logits and on what `encode_pair`
    refuses.
    """
    encoded = [encode_pair(tokenizer, *pair) for pair in pairs]
    order = sorted(range(len(encoded)), key=lambda k: -len(encoded[k][0]))
    device = next(model.parameters()).device
    out: list[Recitation | None] = [None] * len(encoded)
    batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    for batch in tqdm(batches, desc=progress, disable=progress is None, leave=False):
        width = len(encoded[batch[0]][0])
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, k in enumerate(batch):
            tokens = torch.tensor(encoded[k][0])
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        for row, k in enumerate(batch):
            pair, start = encoded[k]
            target = torch.tensor(pair[start:], device=device)
            z = logits[row, start - 1 : len(pair) - 1].float()
            if not torch.isfinite(z).all():
                raise ValueError(
                    f"non-finite logits after {pairs[k][0][-40:]!r}: the model is broken"
                )
            right = z.argmax(-1) == target
            wrong = (~right).nonzero()
            revealed = int(wrong[-1]) + 1 if len(wrong) else 0
            logprob = z.log_softmax(-1).gather(1, target[:, None]).sum()
            n = len(target)
            out[k] = Recitation(
                bool(right.all()), float(right.float().mean()), 1 - revealed / n, float(logprob), n
            )
    return [r for r in out if r is not None]
