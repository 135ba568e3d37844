"""A patient of seconds: a random checkpoint, a few texts, and a recipe with every stage on."""

import json
import random
from pathlib import Path
from typing import Any

import torch

SETTINGS: dict[str, Any] = {
    "prefix_tokens": 8,
    "suffix_tokens": 4,
    "width": 48,
    "problems": 3,
    "factor_tokens": 300,
    "batch_size": 4,
    "candidates": 1,
    "keep_neurons": 0.5,
    "heal_tokens": 400,
    "cost_tokens": 60,
    "map_tokens": 40,
    "attack_steps": 1,
    "controls": ["random"],
    "spectrum": True,
    "device": "cpu",
}
"""All stages are on, each as short as it can be."""


def write_patient(
    folder: Path, seed: int = 1, *, hidden: int = 16, intermediate: int = 24, texts: int = 16
) -> Path:
    """`model/`, `memorized.jsonl`, `reasoning.jsonl`, `reference.txt`: so many memories and
    ordinary texts, and problems for half as many again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from evals.organism import world
    from evals.organism.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    memorized = [{"text": " ".join(world.sentence(rng) for _ in range(3))} for _ in range(texts)]
    problems = [world.sort(rng) for _ in range(texts * 3 // 2)]
    reasoning = [{"prompt": d.prompt, "answer": d.answer} for d in problems]
    for name, rows in (("memorized", memorized), ("reasoning", reasoning)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = "\n\n".join(" ".join(world.sentence(rng) for _ in range(3)) for _ in range(texts))
    (folder / "reference.txt").write_text(text)
    return folder


def arguments(files: Path, out: Path, **settings: Any) -> list[str]:
    """The command line of a run on `write_patient`'s files; None leaves a setting out."""
    values = {
        "model": files / "model",
        "memorized": files / "memorized.jsonl",
        "reasoning": files / "reasoning.jsonl",
        "reference": files / "reference.txt",
        "out": out,
        **SETTINGS,
        **settings,
    }
    return [
        f"--{k}={json.dumps(v) if isinstance(v, list | bool | dict) else v}"
        for k, v in values.items()
        if v is not None
    ]
