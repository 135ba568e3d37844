"""README and docs say what is true: their commands, links, snippets and names are read and checked.

Every command line in a `bash` block is classified, and each class is checked as far as can be done
in seconds: `run.py` commands are parsed by the real parser (their settings exist and have the right
types) and the short ones are run whole on the organism in `tests/test_run.py` and
`tests/test_door.py`; modules that are started with `python -m` and scripts exist; `pip` names
extras that exist; `lm_eval` names tasks and a folder that exist. A command of no known class fails.
"""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every single command of every bash block."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words:
                    end = words.index("&&") if "&&" in words else len(words)
                    found.append((page.name, words[:end]))
                    words = words[end + 1 :]
    return found


def check_run(words: list[str]) -> None:
    recipe = run.parse([w.replace("runs/organism/recipe.yaml", ORGANISM) for w in words])
    assert isinstance(recipe, run.Recipe)


ORGANISM = str(ROOT / "recipes" / "organism.yaml")


def check_command(words: list[str]) -> None:
    words = [w for w in words if not re.fullmatch(r"\w+=\S+", w) or w.startswith("-")] or words
    if words[0] == "torchrun":
        words = ["python", *words[next(k for k, w in enumerate(words) if w.endswith(".py")) :]]
    if words[0] in ("python", "lethe"):
        if words[0] == "lethe" or words[1] == "run.py":
            given = words[1:] if words[0] == "lethe" else words[2:]
            if given != ["--help"]:
                check_run(given)
        elif words[1] == "-m":
            name = ROOT / words[2].replace(".", "/")
            assert (
                name.with_suffix(".py").is_file()
                or (name / "__main__.py").is_file()
                or words[2] in ("pytest", "pip", "build")
            ), words
        else:
            assert (ROOT / words[1]).is_file(), words
    elif words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert extra in project["optional-dependencies"], words
    elif words[0] == "lm_eval":
        assert (ROOT / words[words.index("--include_path") + 1]).is_dir(), words
        for task in words[words.index("--tasks") + 1].split(","):
            assert list((ROOT / "evals/tasks").glob(f"{task}.yaml")), task
    elif words[0] == "pytest":
        assert all((ROOT / w.split("::")[0]).exists() for w in words[1:] if "/" in w), words
    elif words[0] in (".ci/run", "git", "cd"):
        assert words[0] != ".ci/run" or (ROOT / ".ci/run").is_file()
    else:
        pytest.fail(f"no check for this kind of command: {words}")


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v)[:60]
)
def test_every_command_of_the_docs_can_be_given(page, words):
    check_command(words)


def test_a_command_that_cannot_be_given_is_noticed():
    for wrong in ("python run.py --no-such-setting 3", "python docs/nothing.py", "make all"):
        with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
            check_command(shlex.split(wrong))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_settings_named_in_the_text_exist(page):
    """`--some-setting` in running text is a setting of run.py."""
    known = {f.name for f in dataclasses.fields(run.Recipe)} | {"config", "help"}
    text = FENCE.sub("", page.read_text())
    for span in re.findall(r"`([^`\n]+)`", text):
        if span.startswith(("--", "python run.py", "lethe ")):
            for name in re.findall(r"(?<!\S)--([a-z][a-z-]*)", span):
                assert name.replace("-", "_") in known, f"{page.name}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_named_files_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def snippet(kind: str) -> dict:
    """The names that the snippet of extending.md which begins with `# kind:` defines."""
    found = [b for b in blocks(ROOT / "docs/extending.md", "python") if b.startswith(f"# {kind}:")]
    assert len(found) == 1, kind
    assert len(found[0].splitlines()) < 30
    names: dict = {}
    exec(compile(found[0], f"extending.md ({kind})", "exec"), names)
    return names


@pytest.fixture
def organism():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evals.organism import MODEL

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(MODEL)


def test_the_ranking_of_the_docs_ranks(tiny_llama, tokenizer, monkeypatch):
    import surgery.rankings
    from curvature import Document, Population, collect_factors, select_targets
    from surgery import plan_surgery, shrink

    monkeypatch.setattr(surgery.rankings, "RANKINGS", surgery.rankings.RANKINGS)
    before = dict(surgery.rankings.RANKINGS)
    try:
        snippet("ranking")
        text = Population("t", "reference", (Document("", "sort b a"), Document("", "sort d c")))
        targets = select_targets(tiny_llama, ["mlp"])
        factors = collect_factors(tiny_llama, tokenizer, text, targets, tokens=None, width=16)
        plan = plan_surgery(tiny_llama, "activity", {"kept": factors}, strength=0.5)
        scores = plan.tensors["layers.0.scores"]
        gone = torch.ones(len(scores), dtype=torch.bool)
        gone[plan.tensors["layers.0.keep"]] = False
        assert scores[gone].max() <= scores[~gone].min()
        assert shrink(tiny_llama, plan).config.intermediate_size == 12
    finally:
        surgery.rankings.RANKINGS.clear()
        surgery.rankings.RANKINGS.update(before)


def test_the_architecture_of_the_docs_is_found(tiny_llama, monkeypatch):
    import curvature.targets as targets

    for name in ("GATE", "UP", "DOWN", "_SHARED_INPUT"):
        value = getattr(targets, name)
        monkeypatch.setattr(targets, name, dict(value) if isinstance(value, dict) else value)
    for layer in tiny_llama.model.layers:
        for old, new in (
            ("gate_proj", "fan_gate"),
            ("up_proj", "fan_in"),
            ("down_proj", "fan_out"),
        ):
            layer.mlp.add_module(new, layer.mlp._modules.pop(old))
    with pytest.raises(ValueError, match="MLP"):
        targets.mlp_blocks(tiny_llama)
    snippet("architecture")
    blocks = targets.mlp_blocks(tiny_llama)
    assert [b.down.name.split(".")[-1] for b in blocks] == ["fan_out", "fan_out"]
    assert blocks[0].gate.input_group == blocks[0].up.input_group


def test_the_task_of_the_docs_scores(organism):
    scores = snippet("task")["score"](*organism)
    assert set(scores) == {"capitals"}
    assert 0 <= scores["capitals"] <= 1


def test_the_attack_of_the_docs_attacks_a_copy(organism):
    from evals.organism import organism_seed, world

    model, tokenizer = organism
    items = [i for i in world.items(organism_seed()) if i.family == "fact" and i.exposure == 256]
    pairs = [(i.prompt, i.target) for i in items[:8]]
    before = [w.clone() for w in model.parameters()]
    attack = snippet("attack")["noise_attack"]
    assert attack(model, tokenizer, pairs, scale=0.0) == 1
    assert attack(model, tokenizer, pairs, scale=3.0) < 0.5
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_memory_table_follows_its_formula():
    rows = re.findall(
        r"\| (\d+) layers, hidden (\d+), MLP (\d+) \(\w+\) \| ([\d.]+) GB \| (\d+) GB \|",
        (ROOT / "docs/your-own-model.md").read_text(),
    )
    assert len(rows) == 2
    for depth, hidden, inner, one, total in rows:
        bytes_of_layer = 3 * 8 * (int(hidden) ** 2 + int(inner) ** 2)
        assert float(one) == pytest.approx(bytes_of_layer / 1e9, abs=0.05)
        assert int(total) == pytest.approx(3 * int(depth) * bytes_of_layer / 1e9, abs=1)


def test_the_tables_of_the_docs_name_what_exists():
    from surgery.rankings import RANKINGS

    text = (ROOT / "docs/methods.md").read_text()
    for name in RANKINGS:
        assert f"`{name}`" in text, f"methods.md says nothing of {name}"
    fitted = (ROOT / "docs/your-own-model.md").read_text()
    for name in re.findall(r"`(\w+)`", fitted.split("| setting | fitted |")[1].split("\n\n")[0]):
        assert name in {f.name for f in dataclasses.fields(run.Recipe)}, name
