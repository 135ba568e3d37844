"""Tiny random models of the architectures that must shrink and load."""

import torch
import transformers

ARCHITECTURES = ["Llama", "Olmo2", "Qwen3", "Gemma3", "Mistral"]


def build(architecture, **settings):
    torch.manual_seed(0)
    name = "Gemma3TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
    config = getattr(transformers, name)(
        **{
            "vocab_size": 200,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **settings,
        }
    )
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
