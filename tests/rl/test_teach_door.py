"""`--teach` from the front door: what is refused before any long work."""

import pytest

import run
from evals.organism.tokenizer import build_tokenizer


@pytest.fixture
def foreign(tmp_path, tiny_llama):
    """A model that is not the organism."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["another"])
    tiny_llama.resize_token_embeddings(len(tokenizer))
    tiny_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_of_one_s_own_needs_questions(foreign, capsys):
    assert run.main(["--teach-only", str(foreign)]) == 2
    assert "give --teach-questions" in capsys.readouterr().err
    missing = ["--teach-only", str(foreign), "--teach-questions", str(foreign / "none.jsonl")]
    assert run.main(missing) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(foreign, capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trl" else found(name, *a)
    )
    assert run.main(["--teach-only", str(foreign)]) == 2
    assert "pip install -e '.[rl]'" in capsys.readouterr().err
