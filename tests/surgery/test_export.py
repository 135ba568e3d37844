"""Exports that cannot be silently wrong: each trap has a test."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import surgery.export
from surgery.export import check_exportable, export
from surgery.rankings import plan_surgery
from surgery.shrink import shrink


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_a_whole_folder(dtype, tmp_path, tiny_llama, tokenizer):
    small = shrink(tiny_llama, plan_surgery(tiny_llama, "random", {}, strength=0.5))
    folder = tmp_path / "deep" / "checkpoint"
    record = export(small, tokenizer, folder, "# A card\n", dtype=dtype)
    names = {p.name for p in folder.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    } <= names
    assert (folder / "README.md").read_text() == "# A card\n"
    assert record["bytes"] == (folder / "model.safetensors").stat().st_size
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == dtype
    assert small.dtype == torch.float32
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


def test_sharded_weights_load_back(tmp_path, tiny_llama, tokenizer):
    export(tiny_llama, tokenizer, tmp_path / "out", "card", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_an_existing_folder_is_not_overwritten(tmp_path, tiny_llama, tokenizer):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        export(tiny_llama, tokenizer, folder, "card")
    assert contents(folder) == {"mine.txt": b"mine"}
    export(tiny_llama, tokenizer, folder, "card", overwrite=True)
    assert "mine.txt" not in contents(folder)


def test_generation_config_trap_is_found_before_the_work(tmp_path, tiny_llama, tokenizer):
    tiny_llama.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match="do_sample") as caught:
        check_exportable(tiny_llama)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="generation config"):
        export(tiny_llama, tokenizer, tmp_path / "out", "card")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["missing", "random", "shape"])
def test_weights_that_do_not_load_back_leave_nothing(
    fault, tmp_path, tiny_llama, tokenizer, monkeypatch
):
    """A file that lost or changed a tensor between saving and loading."""
    original = PreTrainedModel.save_pretrained

    def faulty(self, folder, **arguments):
        original(self, folder, **arguments)
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        name = "model.layers.0.mlp.up_proj.weight"
        if fault == "missing":
            del tensors[name]
        elif fault == "random":
            tensors[name] = torch.randn_like(tensors[name])
        else:
            tensors[name] = tensors[name][:4].clone()
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", faulty)
    with pytest.raises((ValueError, RuntimeError)):
        export(tiny_llama, tokenizer, tmp_path / "out", "card")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_folder(tmp_path, tiny_llama, tokenizer, monkeypatch):
    folder = tmp_path / "out"
    export(tiny_llama, tokenizer, folder, "old")
    before = contents(folder)

    def full(self, folder, **arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        export(tiny_llama, tokenizer, folder, "new", overwrite=True)
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_quantized_weights_are_refused(tiny_llama):
    tiny_llama.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="quantized"):
        check_exportable(tiny_llama)


def test_plain_modules_are_refused():
    with pytest.raises(ValueError, match="not a transformers model"):
        check_exportable(torch.nn.Linear(2, 2))


def test_tied_embeddings_stay_tied(tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    small = shrink(model, plan_surgery(model, "random", {}, strength=0.5))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    export(small, tokenizer, tmp_path / "out", "card")


def test_the_probe_covers_text_and_the_vocabulary(tiny_llama, tokenizer):
    ids = surgery.export.probe_ids(tiny_llama, tokenizer)
    assert ids.shape[0] == 2
    assert int(ids.max()) < tiny_llama.config.vocab_size
