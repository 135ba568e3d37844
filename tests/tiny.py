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
    folder: Path,
    seed: int = 1,
    *,
    hidden: int = 16,
    intermediate: int = 24,
    texts: int = 16,
    context: int = 128,
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
        max_position_embeddings=context,
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


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def write_english(folder: Path, kind: str) -> Path:
    """A random model (`qwen3` or `gemma3`) with a byte-level tokenizer learnt from the built-in
    passages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    from evals import standins

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for _, text in standins.passages()], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(wrapped)}
    if kind == "qwen3":
        Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    else:
        config = Gemma3TextConfig(**shape, sliding_window=64)
        Gemma3ForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
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
