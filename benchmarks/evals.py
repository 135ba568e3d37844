"""The judge's speed, as ratios measured side by side in one process.

    python -m benchmarks.evals [--model FOLDER] [--items N]

Strict accuracy of passages by one teacher-forced pass against greedy generation of the same items,
48 target tokens each; both must give the same answers, which is checked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.generation import generate
from evals.memorization import encode_pair, recite
from evals.organism import world

SUFFIX_TOKENS = 48


def pairs_of(tokenizer, n: int) -> list[tuple[str, str]]:
    """Prefixes and targets of SUFFIX_TOKENS words from the organism's passages."""
    passages = [i for i in world.items(0) if i.family == "passage"][:n]
    out = []
    for item in passages:
        words = (item.prompt + item.target).split(" ")
        cut = len(words) - SUFFIX_TOKENS
        out.append((" ".join(words[:cut]), " " + " ".join(words[cut:])))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default=str(Path(__file__).parent.parent / "evals/organism/model")
    )
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = pairs_of(tokenizer, args.items)
    encoded = [encode_pair(tokenizer, *pair) for pair in pairs]

    def one_pass() -> list[bool]:
        return [r.strict for r in recite(model, tokenizer, pairs, args.batch_size)]

    def generation() -> list[bool]:
        written = generate(
            model,
            tokenizer,
            [ids[:start] for ids, start in encoded],
            new_tokens=[len(ids) - start for ids, start in encoded],
            batch_size=args.batch_size,
            stop=False,
        )
        return [tries[0] == ids[start:] for (ids, start), tries in zip(encoded, written)]

    ratios = []
    for repeat in range(args.repeats + 1):
        started = time.perf_counter()
        fast = one_pass()
        middle = time.perf_counter()
        slow = generation()
        ended = time.perf_counter()
        if fast != slow:
            raise SystemExit("the two ways disagree: the speed-up means nothing")
        if repeat:
            ratios.append((ended - middle) / (middle - started))
    print(
        f"{len(pairs)} items of {SUFFIX_TOKENS} tokens, batch {args.batch_size}, "
        f"{torch.get_num_threads()} threads: one pass is {statistics.median(ratios):.1f} times as "
        f"fast as generation (rounds: {', '.join(f'{r:.1f}' for r in ratios)}); {sum(fast)} recited"
    )


if __name__ == "__main__":
    main()
