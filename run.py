"""Lethe's front door: one command takes a causal language model and gives back a smaller one that
has forgotten what it recites and still reasons, with a report that proves it.

    python run.py                                    # the embedded organism, offline, a few minutes
    python run.py --model M                          # any causal model; built-in texts stand in
    python run.py --model M --memorized F --reasoning F --reference F
    python run.py --config runs/organism/recipe.yaml # replay
    python run.py --ask "..." --run runs/organism    # base and edited side by side

Exit status: 0 goals met, 1 goals not met (the report is there), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from curvature.factors import Factors
    from curvature.stages import Stage, Stages
    from curvature.targets import Target
    from evals.evalset import Material
    from evals.outcome import Goal
    from evals.verdict import Verdict
    from surgery.plan import Plan
    from surgery.rankings.base import Ranking

MET, NOT_MET, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
ATTACK_TOKENS = 16 * 128
"""Tokens per step of the relearning attack."""
ORGANISM_RECIPE = Path(__file__).parent / "recipes" / "organism.yaml"
NOT_SAVED = tuple(
    "update quiet scan_only measure_only plan_only ask run push_to_hub stated".split()
)
"""Settings that say what to do with a recipe: no part of it, and no reason to run a stage again."""


@dataclass(frozen=True)
class Recipe:
    """All settings of one run; saved resolved as `recipe.yaml`, which replays it.

    Args:
        model: The patient: `organism`, a checkpoint folder or a Hugging Face name.
        out: Run folder; `runs/<model name>` by default.
        update: Allow this recipe to differ from the one in the run folder; stages that nothing
            changed for are reused.
        memorized: Text that must go: .jsonl, .txt, .parquet or a `datasets` name.
        reasoning: Text that must stay: rows of prompt and answer, or plain text.
        reference: Ordinary text, for clean perplexity and to be kept; the reasoning text where none
            is given.
        families: Memory families of the organism given to the edit (passage, fact); the other one
            is untargeted.
        prefix_tokens: Tokens of a memorized text that are given.
        suffix_tokens: Tokens after them that must be recited.
        problems: Problems per task for the judge.
        targets: Weight matrices to edit: `mlp`, `attention`, `gate_proj`, a regular expression.
        layers: Layers to edit and shrink, such as `3-5`; all by default.
        factor_tokens: Scored tokens per population for the curvature factors.
        width: Tokens per row for factors, perplexity and training.
        batch_size: Rows at once for factors and training.
        judge_batch_size: Items at once for the judge.
        method: Ranking of the dense edit: contrast, kfac, ... or none.
        strength: Strength of the edit; found on the tune split by default.
        eps: Damping of `contrast`.
        keep_weights: Weights of the kept populations by name (reasoning, reference; on the organism
            reasoning, language, listed knowledge); equal by default.
        keep_reasoning: Reasoning on the tune split, as a share of the base, that the dense edit
            must keep.
        candidates: How many strengths are tried where none is given.
        neurons: Ranking of the neurons that are taken out: neurons, random, magnitude, wanda.
        keep_neurons: Share of each layer's neurons that stays; 1 leaves the shape alone.
        multiple: Kept neurons per layer are rounded down to a multiple of this.
        refit: Refit what stays in closed form on the kept populations.
        heal_tokens: Token budget of the short fine-tune on fresh kept text after shrinking; 0 for
            none.
        heal_lr: Learning rate of the healing.
        controls: Neuron rankings that are given the same parameter count, the same refit and the
            same healing.
        cost_tokens: Scored tokens per population for the predicted and the measured cost.
        attack_steps: Steps of the relearning attack; 0 for none.
        attack_lr: Learning rate of the relearning attack.
        spectrum: Whether to run PyHessian on the middle layer's down projection.
        seed: Seed of every draw.
        device: Where to compute.
        trust_remote_code: Run code that comes with the model.
        scan_only: Only look for what the model recites.
        measure_only: Only measure the curvature.
        plan_only: Only predict what cuts would cost; no weights are written.
        quiet: Print the verdict only.
        ask: A prompt for the base and the edited model of --run, side by side.
        run: A finished run folder, for --ask and --push-to-hub.
        push_to_hub: Upload the checkpoint with its card to this repository, user/name.
        stated: Settings that were given by hand or by a file; all others may be fitted to the
            model.
    """

    model: str = "organism"
    out: str | None = None
    update: bool = False
    memorized: str | None = None
    reasoning: str | None = None
    reference: str | None = None
    families: tuple[str, ...] = ("passage", "fact")
    prefix_tokens: int = 64
    suffix_tokens: int = 48
    problems: int = 200
    targets: tuple[str, ...] = ("mlp",)
    layers: str | None = None
    factor_tokens: int = 100_000
    width: int = 512
    batch_size: int = 16
    judge_batch_size: int = 64
    method: str = "contrast"
    strength: float | None = None
    eps: float = 0.1
    keep_weights: dict[str, float] | None = None
    keep_reasoning: float = 0.97
    candidates: int = 6
    neurons: str = "neurons"
    keep_neurons: float = 0.6
    multiple: int = 1
    refit: bool = True
    heal_tokens: int = 200_000
    heal_lr: float = 1e-3
    controls: tuple[str, ...] = ("random", "magnitude")
    cost_tokens: int = 2_000
    attack_steps: int = 120
    attack_lr: float = 3e-4
    spectrum: bool = True
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    scan_only: bool = False
    measure_only: bool = False
    plan_only: bool = False
    quiet: bool = False
    ask: str | None = None
    run: str | None = None
    push_to_hub: str | None = None
    stated: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """All that a replay needs, as plain data."""
        values = dataclasses.asdict(self)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {k: v for k, v in plain.items() if k not in NOT_SAVED}


@dataclass(frozen=True)
class Patient:
    """The model under the knife with its tokenizer and its texts. sha256: of its weights. dtype: as
    they were stored."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    material: Material
    sha256: str
    dtype: torch.dtype


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, operate, report. Exit status: 0 goals met, 1 goals not met, 2 bad input, 130
    interrupted."""
    recipe = parse(arguments)
    quiet_libraries(recipe.quiet)
    try:
        if recipe.ask is not None or recipe.run is not None:
            return on_finished_run(recipe)
        return scan(recipe) if recipe.scan_only else operate_on(recipe)
    except (ValueError, OSError) as error:
        print(f"lethe: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(
            "lethe: interrupted; the same command goes on after the last finished stage",
            file=sys.stderr,
        )
        return INTERRUPTED


def parse(arguments: Sequence[str] | None = None) -> Recipe:
    """The recipe that the command line asks for; without --model or --config, the organism's."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog="lethe", description=__doc__)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="A recipe file, such as recipes/organism.yaml."
    )
    parser.add_class_arguments(Recipe, skip={"stated"})
    given = spelled(sys.argv[1:] if arguments is None else arguments)
    if not any(a.split("=")[0] in ("--config", "--model") for a in given):
        given = ["--config", str(ORGANISM_RECIPE), *given]
    found = parser.parse_args(given, defaults=False).as_dict()
    stated = {f.name: found[f.name] for f in dataclasses.fields(Recipe) if f.name in found}
    recipe = Recipe(**stated, stated=tuple(stated))
    return dataclasses.replace(recipe, out=recipe.out or f"runs/{Path(recipe.model).name}")


def spelled(arguments: Sequence[str]) -> list[str]:
    """Arguments as the parser wants them: `--keep-neurons=.5` as `--keep_neurons=.5`, and a flag
    without a value, `--update`, as `--update=true`."""
    flags = {f.name for f in dataclasses.fields(Recipe) if f.type == "bool"}
    out: list[str] = []
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        if name[2:] in flags and not equals and following.lower() not in ("true", "false"):
            equals, value = "=", "true"
        out.append(name + equals + value)
    return out


def quiet_libraries(quiet: bool = False) -> None:
    """No progress bars, warnings or log lines but ours; nothing is fetched where
    HF_HUB_OFFLINE=1. quiet: no bars of ours either."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if quiet or not sys.stderr.isatty():
        # bars are for people; a log gets one line per stage
        os.environ.setdefault("TQDM_DISABLE", "1")
    # our own warnings are UserWarnings; what libraries say to their developers is not for users
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


# Without an operation -----------------------------------------------------------------------------


def on_finished_run(recipe: Recipe) -> int:
    """`--ask` and `--push-to-hub` on the folder of a finished run."""
    from evals.verdict import read_results
    from surgery.publish import push_to_hub

    folder = Path(recipe.run or str(recipe.out))
    trained = read_results(folder)["recipe"]["model"]
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint}: expected the checkpoint of a finished run")
    if recipe.ask is not None:
        ask(recipe, recipe.ask, path_of(dataclasses.replace(recipe, model=trained)), checkpoint)
    if recipe.push_to_hub is not None:
        print(f"uploaded    {push_to_hub(checkpoint, recipe.push_to_hub)}")
    if recipe.ask is None and recipe.push_to_hub is None:
        raise ValueError("--run needs --ask or --push-to-hub: what shall be done with this run?")
    return MET


def ask(recipe: Recipe, prompt: str, base: str | Path, checkpoint: Path) -> None:
    """What base and edited say to one prompt, side by side, and how the probe reads the answer of
    the edited one where the run has taught."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel

    from evals.ask import say

    said = {
        name: say(folder, prompt, trust_remote_code=recipe.trust_remote_code)
        for name, folder in (("base", base), ("edited", checkpoint))
    }
    probe = next(checkpoint.parent.glob("**/probe.safetensors"), None)
    if probe is not None:
        from rl.monitor import Monitor

        answer = Monitor.load(checkpoint, probe.parent).answer([prompt], temperature=0.0)[0]
        said["probe"] = f"{answer.probability:.0%} likely to be right: {answer.text.strip()}"
    if recipe.quiet or not sys.stdout.isatty():
        for name, text in said.items():
            print(f"{name}\t{' '.join(text.split())}")
        return
    panels = [Panel(escape(text) or "(nothing)", title=name) for name, text in said.items()]
    Console().print(Columns(panels, equal=True, expand=True))


def scan(recipe: Recipe) -> int:
    """`--scan-only`: which windows of a text the model recites; `scan.json` in the run folder."""
    from collections import Counter

    from curvature.artifacts import write_json
    from evals.standins import recited_windows, texts_to_scan

    recipe = fit(recipe)
    model, tokenizer, _ = load_model(recipe)
    texts = texts_to_scan(recipe.memorized, organism=recipe.model == "organism")
    items, scores = recited_windows(
        model,
        tokenizer,
        texts,
        prefix_tokens=recipe.prefix_tokens,
        suffix_tokens=recipe.suffix_tokens,
        batch_size=recipe.judge_batch_size,
        progress="scan",
    )
    folder = Path(str(recipe.out))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text": item.family, "prompt": item.prompt, "target": item.target}
        | {"recited": score.strict, "right": score.right}
        for item, score in zip(items, scores, strict=True)
    ]
    write_json(folder / "scan.json", rows)
    recited = Counter(row["text"] for row in rows if row["recited"])
    for name, count in Counter(row["text"] for row in rows).items():
        if not recipe.quiet and recited[name]:
            print(f"{recited[name]:>6} of {count:<6} {name}")
    total = sum(recited.values())
    print(f"recited     {total} of {len(rows)} windows\nscan        {folder / 'scan.json'}")
    return MET


# Before the long work -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What every stage of one run shares."""

    recipe: Recipe
    patient: Patient
    stages: Stages
    folder: Path

    def stored_bytes(self, model: PreTrainedModel) -> int:
        """Size of the model's weights in the dtype that the patient was stored in, bytes."""
        from evals.speed import count_parameters

        return count_parameters(model) * self.patient.dtype.itemsize

    @property
    def source(self) -> dict[str, str]:
        """What all stages depend on: the weights and the texts."""
        return {"model": self.patient.sha256, "material": self.patient.material.sha256}


def path_of(recipe: Recipe) -> str | Path:
    """Where the model is: a folder or a hub name. Raises ValueError for a folder without one."""
    from evals import organism

    path: str | Path = organism.MODEL if recipe.model == "organism" else recipe.model
    local = Path(path).exists() or str(path).startswith((".", "/"))
    if local and not (Path(path) / "config.json").exists():
        raise ValueError(f"{path}: expected a folder with config.json, weights and a tokenizer")
    return path


def device_of(recipe: Recipe) -> str:
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    return found if recipe.device == "auto" else recipe.device


def fit(recipe: Recipe) -> Recipe:
    """The recipe with what nobody stated fitted to the model's shape and to the free memory; a run
    that goes on keeps what it began with."""
    import psutil
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    from curvature.targets import mlp_blocks
    from recipes import fitted

    path = path_of(recipe)
    if recipe.model == "organism":
        return recipe
    file = Path(str(recipe.out)) / "recipe.yaml"
    began = yaml.safe_load(file.read_text()) if file.exists() else None
    trust = {"trust_remote_code": recipe.trust_remote_code}
    config = AutoConfig.from_pretrained(path, **trust)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config, **trust)
    gpu = device_of(recipe) == "cuda"
    free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    sides = [(t.d_in, t.d_out) for b in mlp_blocks(shape) for t in b.targets]
    settings = fitted(
        config,
        parameters=sum(p.numel() for p in shape.parameters()),
        factor_bytes=sum(8 * (i * i + o * o) for i, o in sides),
        free_bytes=free,
        gpu=gpu,
    )
    if isinstance(began, dict) and began.get("model") == recipe.model:
        settings = {k: began.get(k, v) for k, v in settings.items()}
    known = {f.name for f in dataclasses.fields(Recipe)} - set(recipe.stated)
    return dataclasses.replace(recipe, **{k: v for k, v in settings.items() if k in known})


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype]:
    """Model and tokenizer on their device, ready to be read; and the dtype as it was stored."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, device = path_of(recipe), device_of(recipe)
    trust = {"trust_remote_code": recipe.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(path, **trust)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **trust)
    dtype = model.dtype
    # Half precision has no fast kernels on most CPUs, and second derivatives need fp32 in any case.
    model = model.float() if device == "cpu" else model
    return model.to(torch.device(device)).eval(), tokenizer, dtype  # type: ignore[arg-type]


def load(recipe: Recipe) -> Patient:
    """The patient and its texts, checked as far as can be known before any long work."""
    from curvature.artifacts import model_sha256
    from curvature.populations import batches
    from curvature.targets import mlp_blocks, select_targets
    from evals import organism
    from evals.evalset import material_from_files
    from evals.standins import standin_material
    from recipes import context_of
    from surgery.export import check_exportable

    standins = recipe.model != "organism" and not recipe.memorized
    if recipe.model != "organism" and bool(recipe.memorized) != bool(recipe.reasoning):
        raise ValueError(
            f"--model {recipe.model} needs both --memorized (text that must go) and --reasoning "
            "(text that must stay), or neither: then built-in texts stand in"
        )
    model, tokenizer, dtype = load_model(recipe)
    context = context_of(model.config)
    if recipe.prefix_tokens + recipe.suffix_tokens + 1 > context:
        raise ValueError(
            f"--prefix-tokens {recipe.prefix_tokens} and --suffix-tokens {recipe.suffix_tokens} "
            f"do not fit into the context of {recipe.model}, {context} tokens: make them shorter"
        )
    if recipe.width > context:
        raise ValueError(
            f"--width {recipe.width} is longer than the context of {recipe.model}, {context} tokens"
        )
    check_exportable(model)
    select_targets(model, recipe.targets, recipe.layers)
    mlp_blocks(model, recipe.layers)
    if recipe.model == "organism":
        seed = organism.organism_seed()
        material = organism.material(seed, families=recipe.families, problems=recipe.problems)
    elif standins:
        material = standin_material(
            model,
            tokenizer,
            prefix_tokens=recipe.prefix_tokens,
            suffix_tokens=recipe.suffix_tokens,
            width=recipe.width,
            problems_per_task=recipe.problems,
            seed=recipe.seed,
            batch_size=recipe.judge_batch_size,
        )
    else:
        material = material_from_files(
            tokenizer,
            memorized=str(recipe.memorized),
            reasoning=str(recipe.reasoning),
            reference=recipe.reference or str(recipe.reasoning),
            prefix_tokens=recipe.prefix_tokens,
            suffix_tokens=recipe.suffix_tokens,
            problems=recipe.problems,
            seed=recipe.seed,
        )
    for population in (*material.keep, *material.memorized):
        # one pass over the tokens raises for a problem that does not fit into a row
        for _ in batches(population, tokenizer, width=recipe.width, batch_size=recipe.batch_size):
            pass
    return Patient(model, tokenizer, material, model_sha256(model), dtype)


def check(recipe: Recipe) -> None:
    """Raise ValueError for settings that cannot be meant."""
    from surgery.rankings import RANKINGS

    rankings = {
        "method": recipe.method,
        "neurons": recipe.neurons,
        **{f"controls {c}": c for c in recipe.controls},
    }
    for setting, name in rankings.items():
        if name not in RANKINGS and not (setting == "method" and name == "none"):
            raise ValueError(
                f"{setting} {name!r} is unknown: expected one of {', '.join(RANKINGS)}"
            )
    if 0 < recipe.heal_tokens < recipe.batch_size * recipe.width:
        raise ValueError(
            f"heal_tokens is {recipe.heal_tokens}, less than one step of batch_size "
            f"{recipe.batch_size} x width {recipe.width}: raise it, or give 0 for no healing"
        )
    for setting in ("keep_neurons", "keep_reasoning"):
        if not 0 < getattr(recipe, setting) <= 1:
            raise ValueError(
                f"{setting} is {getattr(recipe, setting)}: expected a share above 0, at most 1"
            )
    for setting in (
        "prefix_tokens",
        "suffix_tokens",
        "problems",
        "width",
        "batch_size",
        "factor_tokens",
        "candidates",
    ):
        if getattr(recipe, setting) < 1:
            raise ValueError(f"{setting} is {getattr(recipe, setting)}: expected at least 1")


def prepare_folder(recipe: Recipe) -> Path:
    """The run folder with its `recipe.yaml`; a folder of another recipe is refused unless `update`
    is set."""
    import yaml

    folder = Path(str(recipe.out))
    file = folder / "recipe.yaml"
    settings = recipe.settings
    if file.exists():
        before = yaml.safe_load(file.read_text())
        changed = (
            [k for k in settings if before.get(k) != settings[k]]
            if isinstance(before, dict)
            else ["all"]
        )
        if changed and not recipe.update:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)}): "
                "choose another --out, or give "
                "--update to run again what depends on them"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not a run folder: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(settings, sort_keys=False))
    os.replace(temporary, file)
    return folder


# The stages ---------------------------------------------------------------------------------------


def operate_on(recipe: Recipe) -> int:
    """load -> judge base -> factors -> strength -> cut -> shrink -> heal -> judge -> attack ->
    controls -> export -> report."""
    from curvature.stages import Stages, locked
    from surgery.publish import check_repository

    started = time.perf_counter()
    if recipe.push_to_hub is not None:
        check_repository(recipe.push_to_hub)
    recipe = fit(recipe)
    check(recipe)
    patient = load(recipe)
    folder = prepare_folder(recipe)
    with locked(folder):
        say = silence if recipe.quiet else announce
        run = Run(recipe, patient, Stages(folder, say), folder)
        introduce(run)
        if recipe.measure_only or recipe.plan_only:
            return measure_and_predict(run)
        judge_stage(run, "base", patient.model)
        spectrum_stage(run)
        factors = factors_stage(run, "factors", patient.model)
        strength_stage(run, factors)
        dense = cut_stage(run, factors)
        cost_stage(run)
        judge_stage(run, "cut", dense)
        small = shrink_stage(run, "shrink", dense, recipe.neurons)
        judge_stage(run, "shrunk", small)
        edited = heal_stage(run, "heal", small)
        judge_stage(run, "edited", edited)
        attack_stage(run, "edited", edited)
        for ranking in recipe.controls:
            control = shrink_stage(run, f"control-{ranking}", patient.model, ranking)
            judge_stage(run, f"control-{ranking}-unhealed", control)
            control = heal_stage(run, f"control-{ranking}-healed", control)
            judge_stage(run, f"control-{ranking}", control)
            attack_stage(run, f"control-{ranking}", control)
        speed_stage(run, edited)
        samples_stage(run, edited)
        verdict = conclude(run, edited, time.perf_counter() - started)
    goals = judged_goals(verdict, recipe)
    show(verdict, goals, folder, recipe.quiet)
    if recipe.push_to_hub is not None:
        from surgery.publish import push_to_hub

        print(f"uploaded    {push_to_hub(folder / 'checkpoint', recipe.push_to_hub)}")
    return goals_met(goals)


def measure_and_predict(run: Run) -> int:
    """`--measure-only` and `--plan-only`: the curvature, and what cuts of every strength would cost
    by its prediction. No weights are written."""
    spectrum_stage(run)
    factors = factors_stage(run, "factors", run.patient.model)
    if run.recipe.plan_only:
        for row in prediction_stage(run, factors):
            costs = ", ".join(f"{name} {cost:+.3g}" for name, cost in row["cost"].items())
            print(f"{row['method']} {row['strength']:.4g}: {costs} nats per token")
        print(f"predictions {run.stages.done['prediction'].folder / 'stage.json'}")
    else:
        for layer, energy in run.stages.done["factors"].value["layers"]["values"].items():
            print(f"layer {layer}: {energy:.3g}")
        print(f"factors     {run.stages.done['factors'].folder}")
    return MET


def prediction_stage(run: Run, factors: dict[str, dict[str, Factors]]) -> list[dict[str, Any]]:
    """Predicted change of the loss of every population under cuts from weak to strong."""
    from curvature.progress import bar
    from surgery.predict import plan_deltas, predict_cost
    from surgery.rankings import RANKINGS

    r, material = run.recipe, run.patient.material
    if r.method == "none":
        raise ValueError("--plan-only needs a method: there is nothing to predict for none")
    values = [r.strength] if r.strength is not None else strengths(RANKINGS[r.method], 4)
    names = ("method", "strength", "eps", "keep_weights", "cost_tokens", "width", "batch_size")
    depends = {"factors": run.stages.done["factors"].fingerprint, "seed": r.seed}
    depends |= {k: getattr(r, k) for k in names}

    def compute(_: Path) -> Any:
        rows = []
        for value in bar("prediction", values, unit="cuts"):
            plan = plan_dense(run, factors, r.method, value)
            deltas = plan_deltas(run.patient.model, plan)
            cost = {
                p.name: predict_cost(
                    run.patient.model,
                    run.patient.tokenizer,
                    p,
                    deltas,
                    tokens=r.cost_tokens,
                    width=r.width,
                    batch_size=r.batch_size,
                    seed=r.seed,
                ).total
                for p in (*material.keep, *material.memorized)
            }
            rows.append({"method": r.method, "strength": value, "cost": cost})
        return rows

    return run.stages.run("prediction", depends, compute).value


def judge_stage(run: Run, arm: str, model: PreTrainedModel) -> None:
    """Ask a model everything in the test split."""
    from curvature.artifacts import model_sha256
    from evals.judge import judge

    r, test = run.recipe, run.patient.material.test
    depends = {
        "judged": model_sha256(model),
        "test": test.sha256,
        "width": r.width,
    }

    def compute(_: Path) -> Any:
        judgement = judge(
            model,
            run.patient.tokenizer,
            test,
            batch_size=r.judge_batch_size,
            width=r.width,
            progress=arm,
        )
        return judgement.to_json()

    run.stages.run(f"judge-{arm}", depends, compute)


def spectrum_stage(run: Run) -> None:
    """PyHessian on the middle layer's down projection: top eigenvalues, trace and density."""
    from curvature.populations import batches
    from curvature.spectra import pyhessian_spectra
    from curvature.targets import mlp_blocks

    if not run.recipe.spectrum:
        return
    r, keep = run.recipe, run.patient.material.keep[0]

    def compute(_: Path) -> Any:
        blocks = mlp_blocks(run.patient.model)
        stream = batches(
            keep, run.patient.tokenizer, width=r.width, batch_size=8, tokens=None, seed=r.seed
        )
        spectra = pyhessian_spectra(
            run.patient.model,
            [next(stream)],
            [blocks[len(blocks) // 2].down],
            top=2,
            trace_probes=8,
            density_steps=20,
            seed=r.seed,
            progress="spectrum",
        )
        return {name: dataclasses.asdict(spectrum) for name, spectrum in spectra.items()}

    run.stages.run("spectrum", {**run.source, "width": r.width, "seed": r.seed}, compute)


def factors_stage(
    run: Run, name: str, model: PreTrainedModel, *, memorized: bool = True
) -> dict[str, dict[str, Factors]]:
    """Kronecker factors of every target: sampled labels on what is kept, logit margins on what is
    memorized."""
    from curvature.artifacts import model_sha256
    from curvature.eigenbases import eigenbases
    from curvature.factors import collect_factors, load_factors, save_factors

    r, material = run.recipe, run.patient.material
    settings = {
        k: getattr(r, k)
        for k in (
            "factor_tokens",
            "width",
            "batch_size",
            "seed",
            "targets",
            "layers",
            "keep_weights",
        )
    }
    settings |= {"shrinks": r.keep_neurons < 1, "memorized": memorized}
    depends = {**run.source, "measured": model_sha256(model), **settings}
    populations = {p.name: p for p in material.keep}
    if memorized:
        populations |= {f"memorized/{p.name}": p for p in material.memorized}

    def compute(folder: Path) -> Any:
        targets = measured_targets(r, model)
        factors = {}
        for key, population in populations.items():
            factors[key] = collect_factors(
                model,
                run.patient.tokenizer,
                population,
                targets,
                labels="margin" if population.role == "memorized" else "sampled",
                tokens=r.factor_tokens,
                width=r.width,
                batch_size=r.batch_size,
                seed=r.seed,
                progress=f"{name}: {population.name}",
            )
            about = {"population": population.sha256}
            save_factors(factors_file(folder, key), factors[key], about)
        bases = eigenbases(kept_factors(factors, r.keep_weights))
        spectra = {
            n: {"A": spread(b.A.values.flip(0).tolist()), "G": spread(b.G.values.flip(0).tolist())}
            for n, b in bases.items()
        }
        return {
            "tokens": {
                key: max(f.tokens for f in measured.values()) for key, measured in factors.items()
            },
            "eigenvalues": spectra,
            "layers": layer_map(factors, targets, r.keep_weights) if memorized else {},
        }

    stage = run.stages.run(name, depends, compute)
    return {key: load_factors(factors_file(stage.folder, key))[0] for key in populations}


def measured_targets(recipe: Recipe, model: PreTrainedModel) -> list[Target]:
    """What the edit changes and, where neurons go, every MLP matrix: shrinking is uniform."""
    from curvature.targets import select_targets

    chosen = select_targets(model, recipe.targets, recipe.layers)
    if recipe.keep_neurons < 1:
        chosen += select_targets(model, ("mlp",))
    return list({target.name: target for target in chosen}.values())


def factors_file(folder: Path, population: str) -> Path:
    return folder / f"{population.replace('/', '-')}.safetensors"


def kept_factors(
    factors: dict[str, dict[str, Factors]], weights: dict[str, float] | None
) -> dict[str, Factors]:
    """All kept populations as one."""
    from surgery.rankings import is_memorized
    from surgery.rankings.base import mix_factors

    kept = {name: f for name, f in factors.items() if not is_memorized(name)}
    return mix_factors(kept, weights)


def layer_map(
    factors: dict[str, dict[str, Factors]],
    targets: Sequence[Target],
    weights: dict[str, float] | None,
) -> dict[str, Any]:
    """tr(A) tr(G) summed over a layer's targets, on the memories over on the kept text."""
    sides = {"keep": kept_factors(factors, weights), "memorized": memorized_factors(factors)}
    energy = {side: dict.fromkeys((t.layer for t in targets), 0.0) for side in sides}
    for side, measured in sides.items():
        for target in targets:
            f = measured[target.name]
            energy[side][target.layer] += float(f.A.trace() * f.G.trace())
    ratio = {str(n): energy["memorized"][n] / energy["keep"][n] for n in energy["keep"]}
    return {"label": "margin energy of memories over curvature of kept text", "values": ratio}


def memorized_factors(factors: dict[str, dict[str, Factors]]) -> dict[str, Factors]:
    """All memorized populations as one, each weighing the same."""
    from surgery.rankings import is_memorized
    from surgery.rankings.base import mix_factors

    return mix_factors({name: f for name, f in factors.items() if is_memorized(name)})


def spread(values: list[float], points: int = 128) -> list[float]:
    """At most `points` of a sorted list, evenly spread, ends included: enough to draw it."""
    if len(values) <= points:
        return values
    return [values[round(k * (len(values) - 1) / (points - 1))] for k in range(points)]


def plan_dense(
    run: Run, factors: dict[str, dict[str, Factors]], method: str, strength: float
) -> Plan:
    """The plan of a dense edit of the patient."""
    from curvature.targets import select_targets
    from surgery.rankings import plan_surgery

    r, model = run.recipe, run.patient.model
    settings: dict[str, Any] = {"eps": r.eps} if method == "contrast" else {}
    return plan_surgery(
        model,
        method,
        factors,
        strength=strength,
        seed=r.seed,
        keep=r.keep_weights,
        targets=select_targets(model, r.targets, r.layers),
        model_hash=run.patient.sha256,
        **settings,
    )


def strength_stage(run: Run, factors: dict[str, dict[str, Factors]]) -> None:
    """The strongest cut whose reasoning on the tune split stays above the goal, and the trade-off
    of every candidate."""
    from curvature.progress import bar
    from evals.judge import judge
    from surgery.operate import operate
    from surgery.rankings import RANKINGS

    r, tune = run.recipe, run.patient.material.tune
    methods = [m for m in dict.fromkeys((r.method, "kfac")) if m != "none"]
    names = (
        "method",
        "strength",
        "eps",
        "keep_weights",
        "keep_reasoning",
        "candidates",
        "judge_batch_size",
        "width",
    )
    depends = {"factors": run.stages.done["factors"].fingerprint, "tune": tune.sha256}
    depends |= {k: getattr(r, k) for k in names}

    def figures(model: PreTrainedModel) -> dict[str, float | None]:
        j = judge(
            model,
            run.patient.tokenizer,
            tune,
            batch_size=r.judge_batch_size,
            harness=False,
            width=r.width,
        )
        return {
            "recall": j.recall(tune),
            "reasoning": j.reasoning(tune),
            "arithmetic": j.aside(tune),
            "listed": j.knowledge(True),
            "unlisted": j.knowledge(False),
            "perplexity": j.perplexity,
        }

    def compute(_: Path) -> Any:
        base = figures(run.patient.model)
        grid = []
        for method in methods:
            values = strengths(RANKINGS[method], r.candidates)
            if method == r.method and r.strength is not None:
                values = sorted({*values, r.strength})
            grid += [(method, value) for value in values]
        candidates: list[dict[str, Any]] = []
        for method, value in bar("strength", grid, unit="cuts"):
            edited = operate(
                run.patient.model,
                plan_dense(run, factors, method, value),
                copy_model=True,
                check=False,
            )
            after = figures(cast("PreTrainedModel", edited))
            candidates.append({"method": method, "strength": value, **after})
        goal = r.keep_reasoning * (base["reasoning"] or 0.0)
        mine = [c for c in candidates if c["method"] == r.method]
        fitting = [c for c in mine if (c["reasoning"] or 0.0) >= goal]
        chosen = r.strength
        if chosen is None and mine:
            pool = fitting or [max(mine, key=lambda c: c["reasoning"] or 0.0)]
            chosen = min(pool, key=lambda c: (c["recall"] or 0.0, -(c["reasoning"] or 0.0)))[
                "strength"
            ]
        return {"base": base, "candidates": candidates, "chosen": chosen, "goal_met": bool(fitting)}

    run.stages.run("strength", depends, compute)


def strengths(ranking: Ranking, n: int) -> list[float]:
    """`n` strengths from weak to strong over the ranking's span; shares just below 1 are spaced by
    what they leave out."""
    import numpy as np

    low, high = ranking.span
    if 0.99 < low < 1:
        return [float(1 - v) for v in np.geomspace(1 - low, 1 - high, n)]
    return [float(v) for v in (np.geomspace if ranking.log else np.linspace)(low, high, n)]


def cut_stage(run: Run, factors: dict[str, dict[str, Factors]]) -> PreTrainedModel:
    """The dense edit at the chosen strength."""
    from surgery.operate import operate
    from surgery.plan import load_plan, save_plan

    r = run.recipe
    if r.method == "none":
        return run.patient.model
    strength = run.stages.done["strength"].value["chosen"]
    depends = {
        "factors": run.stages.done["factors"].fingerprint,
        "method": r.method,
        "strength": strength,
        "eps": r.eps,
        "keep_weights": r.keep_weights,
    }

    def compute(folder: Path) -> Any:
        plan = plan_dense(run, factors, r.method, strength)
        save_plan(plan, folder)
        return {"strength": strength, "removed": plan.removed, "total": plan.total}

    stage = run.stages.run("cut", depends, compute)
    return cast(
        "PreTrainedModel", operate(run.patient.model, load_plan(stage.folder), copy_model=True)
    )


def saved(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder / "model")


def reloaded(run: Run, stage: Stage) -> PreTrainedModel:
    """A stage's model, always from its files: a run and its replay compute on the same bytes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        stage.folder / "model", dtype="auto", trust_remote_code=run.recipe.trust_remote_code
    )
    return model.to(run.patient.model.device).eval()  # type: ignore[arg-type]


def shrink_stage(run: Run, name: str, model: PreTrainedModel, ranking: str) -> PreTrainedModel:
    """Take the lowest-ranked neurons out for good, and refit what stays on the kept populations."""
    from curvature.artifacts import model_sha256
    from evals.speed import count_parameters
    from surgery.plan import save_plan
    from surgery.rankings import RANKINGS, plan_surgery
    from surgery.repair import refit
    from surgery.shrink import shrink

    r = run.recipe
    if r.keep_neurons == 1:
        return model
    unedited = model_sha256(model) == run.patient.sha256
    measured = "factors" if unedited else "factors-after-cut"
    # after the cut only what is kept is measured again: the ranking of neurons asks for no more
    factors = factors_stage(run, measured, model, memorized=unedited)
    names = ("keep_neurons", "multiple", "refit", "seed", "keep_weights")
    depends = {"factors": run.stages.done[measured].fingerprint, "ranking": ranking}
    depends |= {k: getattr(r, k) for k in names}

    def compute(folder: Path) -> Any:
        settings: dict[str, Any] = {}
        if "multiple" in RANKINGS[ranking].settings:
            settings["multiple"] = r.multiple
        if "grain" in RANKINGS[ranking].settings:
            settings["grain"] = "neurons"
        plan = plan_surgery(
            model,
            ranking,
            factors,
            strength=r.keep_neurons,
            seed=r.seed,
            keep=r.keep_weights,
            **settings,
        )
        save_plan(plan, folder)
        small = shrink(model, plan)
        left = refit(small, model, plan, kept_factors(factors, r.keep_weights)) if r.refit else {}
        saved(small, folder)
        return {
            "removed": plan.removed,
            "total": plan.total,
            "parameters": count_parameters(small),
            "output_error_left": left,
        }

    return reloaded(run, run.stages.run(name, depends, compute))


def heal_stage(run: Run, name: str, model: PreTrainedModel) -> PreTrainedModel:
    """A short fine-tune on fresh kept text, with a stated token budget."""
    from curvature.artifacts import model_sha256
    from surgery.heal import heal

    r, population = run.recipe, run.patient.material.heal
    if not r.heal_tokens or population is None:
        return model
    depends = {"start": model_sha256(model), "population": population.sha256}
    depends |= {k: getattr(r, k) for k in ("heal_tokens", "heal_lr", "width", "batch_size", "seed")}

    def compute(folder: Path) -> Any:
        healing = heal(
            model,
            run.patient.tokenizer,
            population,
            tokens=r.heal_tokens,
            lr=r.heal_lr,
            batch_size=r.batch_size,
            width=r.width,
            seed=r.seed,
            progress=name,
        )
        saved(model, folder)
        return dataclasses.asdict(healing)

    return reloaded(run, run.stages.run(name, depends, compute))


def attack_stage(run: Run, arm: str, model: PreTrainedModel) -> None:
    """Relearning: fine-tune a copy on the edit split's memories and see whether the held-out ones
    come back."""
    from curvature.artifacts import model_sha256
    from evals.attacks import relearn

    r, material = run.recipe, run.patient.material
    if not r.attack_steps:
        return
    groups = {"held out": [(i.prompt, i.target) for i in material.test.headline()]}
    never = [(i.prompt, i.target) for i in material.test.memories if i.exposure == 0 and i.targeted]
    if never:
        groups["never seen"] = never
    depends = {"attacked": model_sha256(model), "material": material.sha256}
    depends |= {k: getattr(r, k) for k in ("attack_steps", "attack_lr", "seed", "judge_batch_size")}

    tokenizer = run.patient.tokenizer
    prompted = [d.text for d in material.relearn.documents if d.prompt]
    longest = max((len(tokenizer(text)["input_ids"]) + 1 for text in prompted), default=0)
    width = 128 if longest <= 128 else r.width

    def compute(_: Path) -> Any:
        curves = relearn(
            model,
            run.patient.tokenizer,
            material.relearn,
            groups,
            arm=arm,
            lrs=(r.attack_lr,),
            steps=r.attack_steps,
            every=max(1, r.attack_steps // 4),
            batch_size=max(1, ATTACK_TOKENS // width),
            width=width,
            judge_batch_size=r.judge_batch_size,
            seed=r.seed,
            progress=f"attack {arm}",
        )
        return [{**dataclasses.asdict(c), "area": c.area} for c in curves]

    run.stages.run(f"attack-{arm}", depends, compute)


def cost_stage(run: Run) -> None:
    """What the dense edit was predicted to cost each population, beside what it did cost."""
    from surgery.operate import operate
    from surgery.plan import load_plan
    from surgery.predict import plan_deltas, population_loss, predict_cost

    r, material = run.recipe, run.patient.material
    if r.method == "none":
        return
    cut = run.stages.done["cut"]
    depends = {
        "cut": cut.fingerprint,
        **{k: getattr(r, k) for k in ("width", "batch_size", "seed", "cost_tokens")},
    }

    def compute(_: Path) -> Any:
        plan, tokenizer = load_plan(cut.folder), run.patient.tokenizer
        edited = operate(run.patient.model, plan, copy_model=True, check=False)
        deltas = plan_deltas(run.patient.model, plan)
        batching: dict[str, Any] = {
            "tokens": r.cost_tokens,
            "width": r.width,
            "batch_size": r.batch_size,
            "seed": r.seed,
        }
        rows = []
        for population in (*material.keep, *material.memorized):
            cost = predict_cost(run.patient.model, tokenizer, population, deltas, **batching)
            before = population_loss(run.patient.model, tokenizer, population, **batching)
            measured = population_loss(edited, tokenizer, population, **batching) - before
            rows.append(
                {
                    "name": population.name,
                    "first_order": cost.first,
                    "second_order": cost.second,
                    "predicted": cost.total,
                    "measured": measured,
                    "tokens": cost.tokens,
                }
            )
        return rows

    run.stages.run("cost", depends, compute)


def speed_stage(run: Run, edited: PreTrainedModel) -> None:
    """Tokens per second of both models, side by side."""
    from curvature.artifacts import model_sha256
    from evals.speed import compare_speed

    def compute(_: Path) -> Any:
        return dataclasses.asdict(compare_speed(run.patient.model, edited))

    run.stages.run("speed", {**run.source, "edited": model_sha256(edited)}, compute)


def samples_stage(run: Run, edited: PreTrainedModel) -> None:
    """What both models say, for the reader: the first memories of each family, and the first
    problem of each task."""
    from curvature.artifacts import model_sha256
    from evals.generation import generate

    test, tokenizer = run.patient.material.test, run.patient.tokenizer
    shown: list[tuple[str, str, str]] = []
    for family in dict.fromkeys(item.family for item in test.headline()):
        first = [item for item in test.headline() if item.family == family][:3]
        shown += [(f"memory ({family})", item.prompt, item.target) for item in first]
    shown += [(name, d[0].prompt, d[0].answer) for name, d in test.tasks.items() if d[0].prompt]

    def compute(_: Path) -> Any:
        lengths = [
            len(tokenizer(target, add_special_tokens=False)["input_ids"]) for _, _, target in shown
        ]
        prompts = [prompt for _, prompt, _ in shown]
        said = {
            arm: [
                tokenizer.decode(tries[0])
                for tries in generate(model, tokenizer, prompts, new_tokens=lengths)
            ]
            for arm, model in (("base", run.patient.model), ("edited", edited))
        }
        return [
            {"kind": kind, "prompt": prompt, "target": target, "base": before, "edited": after}
            for (kind, prompt, target), before, after in zip(
                shown, said["base"], said["edited"], strict=True
            )
        ]

    run.stages.run("samples", {**run.source, "edited": model_sha256(edited)}, compute)


# The result ---------------------------------------------------------------------------------------


def export_checkpoint(run: Run, edited: PreTrainedModel, verdict: Verdict) -> dict[str, int]:
    """`checkpoint/`: an ordinary Hugging Face folder, loaded back and compared before it stands."""
    from evals.card import model_card
    from surgery.export import export

    card = model_card(run.recipe.model, verdict)
    return export(
        edited,
        run.patient.tokenizer,
        run.folder / "checkpoint",
        card,
        dtype=run.patient.dtype,
        overwrite=True,
        trust_remote_code=run.recipe.trust_remote_code,
    )


def conclude(run: Run, edited: PreTrainedModel, seconds: float) -> Verdict:
    """Verdict, checkpoint, `results.json` and report from the finished stages."""
    from curvature.stages import peak_memory
    from evals.attacks import Curve
    from evals.judge import Judgement
    from evals.report import write_report
    from evals.speed import Speed
    from evals.verdict import (
        Control,
        judgement_section,
        reach_verdict,
        reasoning_share,
        recall_share,
        relearned_share,
        write_results,
    )

    r, done, test = run.recipe, run.stages.done, run.patient.material.test
    judged = {
        name[6:]: Judgement.from_json(stage.value)
        for name, stage in done.items()
        if name.startswith("judge-")
    }
    curves = {
        name[7:]: [Curve(**{k: v for k, v in c.items() if k != "area"}) for c in stage.value]
        for name, stage in done.items()
        if name.startswith("attack-")
    }
    speed = Speed(**done["speed"].value)
    base, final = judged["base"], judged["edited"]

    def value(interval: Any) -> float | None:
        return None if interval is None else interval.value

    parameters = {
        name: done[f"control-{name}"].value["parameters"]
        if f"control-{name}" in done
        else speed.parameters_base
        for name in r.controls
    }
    controls = []
    for name in r.controls:
        healed, unhealed = judged[f"control-{name}"], judged[f"control-{name}-unhealed"]
        controls.append(
            Control(
                name,
                value(recall_share(test, base, healed)),
                value(reasoning_share(test, base, healed)),
                parameters[name] / speed.parameters_base,
                value(relearned_share(test, base, curves.get(f"control-{name}", []), "held out")),
                value(reasoning_share(test, base, unhealed)),
                healed.perplexity / base.perplexity,
            )
        )
    written = {"bytes": run.stored_bytes(edited), "base": run.stored_bytes(run.patient.model)}
    verdict = reach_verdict(
        test,
        base,
        final,
        before_healing=judged["shrunk"],
        curves=curves.get("edited", []),
        speed=speed,
        bytes_base=written["base"],
        bytes_edited=written["bytes"],
        controls=controls,
        seconds_total=sum(stage.seconds for stage in done.values() if stage.reused) + seconds,
        peak_memory_bytes=max(peak_memory(), *(stage.peak_memory for stage in done.values())),
    )
    exported = export_checkpoint(run, edited, verdict)
    record = write_results(
        run.folder / "results.json",
        verdict,
        recipe=r.settings,
        provenance=provenance(run),
        texts=list(run.patient.material.notes),
        judgement=judgement_section(test, base, final),
        arms={
            name: {
                "recall": j.recall(test),
                "reasoning": j.reasoning(test),
                "arithmetic": j.aside(test),
                "listed": j.knowledge(True),
                "unlisted": j.knowledge(False),
                "perplexity": j.perplexity,
            }
            for name, j in judged.items()
        },
        attacks=[
            c for name, stage in done.items() if name.startswith("attack-") for c in stage.value
        ],
        curvature=done["factors"].value["eigenvalues"],
        layers=done["factors"].value["layers"],
        spectrum=done["spectrum"].value if "spectrum" in done else {},
        strength=done["strength"].value,
        cost=done["cost"].value if "cost" in done else [],
        speed=done["speed"].value,
        samples=done["samples"].value,
        checkpoint=exported,
        stages={
            name: {"seconds": s.seconds, "peak_memory": s.peak_memory, "reused": s.reused}
            for name, s in done.items()
        },
    )
    write_samples(run)
    write_report(run.folder, record)
    return verdict


def write_samples(run: Run) -> None:
    """`samples/`: the per-item records behind each number."""
    from curvature.artifacts import write_json

    for name, stage in run.stages.done.items():
        if name.startswith("judge-"):
            write_json(run.folder / "samples" / f"{name[6:]}.json", stage.value)


def provenance(run: Run) -> dict[str, Any]:
    """Versions, hashes and the machine, to be written with every result."""
    import platform
    from importlib.metadata import version

    import torch

    from curvature.stages import code_sha256

    m = run.patient.material
    return {
        "lethe": version("lethe"),
        "code_sha256": code_sha256(),
        "model_sha256": run.patient.sha256,
        "populations": {
            p.name: {
                "role": p.role,
                "sha256": p.sha256,
                "documents": len(p.documents),
                "source": p.source,
            }
            for p in (*m.memorized, *m.keep, m.relearn, m.heal)
        },
        "test_sha256": m.test.sha256,
        "tune_sha256": m.tune.sha256,
        "versions": {
            p: version(p)
            for p in ("torch", "transformers", "lm-eval", "pyhessian", "numpy", "datasets")
        },
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {run.patient.model.device.type}",
        "threads": torch.get_num_threads(),
    }


def judged_goals(verdict: Verdict, recipe: Recipe) -> list[Goal]:
    """The recipe's goals on the reported figures."""
    from evals.outcome import judge_goals

    names = ("keep_reasoning", "keep_perplexity", "forget", "shrink")
    return judge_goals(verdict, **{name: getattr(recipe, name, None) for name in names})


def goals_met(goals: Sequence[Goal]) -> int:
    """The exit status of a finished run."""
    return MET if all(goal.met for goal in goals) else NOT_MET


def show(verdict: Verdict, goals: Sequence[Goal], folder: Path, quiet: bool = False) -> None:
    """The verdict as a small table, the goals, and where the report lies: the last lines on the
    terminal."""
    from rich.console import Console
    from rich.table import Table

    from evals.outcome import summary

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    columns, rows = summary(verdict)
    if quiet or not sys.stdout.isatty():
        for label, *cells in rows:
            named = [f"{c} {x}" for c, x in zip(columns[1:], cells, strict=True) if x]
            print(f"{label.strip()}: {', '.join(named)}")
    else:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in columns:
            table.add_column(column, justify="left" if column == columns[0] else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for goal in goals:
        mark = "met" if goal.met else "NOT MET"
        console.print(f"goal        {goal.name}, {goal.wanted}: {goal.reached}, {mark}")
    console.print(f"report      {folder / 'report.html'}\ncheckpoint  {folder / 'checkpoint'}")


def introduce(run: Run) -> None:
    """What will happen, and how long it may take."""
    from recipes.outlook import expected_seconds, outlook, tokens_per_second

    r, patient, seconds = run.recipe, run.patient, None
    if r.quiet:
        return
    if not (r.measure_only or r.plan_only):
        speed = tokens_per_second(patient.model, width=r.width, batch_size=r.batch_size)
        text = patient.material.test.clean.documents[0].text
        characters = len(text) / max(1, len(patient.tokenizer(text)["input_ids"]))
        seconds = expected_seconds(r, patient.material, speed, characters=characters)
    for label, line in outlook(r, patient.model, patient.material, seconds):
        print(f"{label:<11} {line}", flush=True)


def announce(name: str, reused: bool) -> None:
    """One line per stage."""
    print(f"{'found  ' if reused else 'running'} {name}", flush=True)


def silence(name: str, reused: bool) -> None:
    """Nothing: what `--quiet` says of a stage."""


if __name__ == "__main__":
    sys.exit(main())
