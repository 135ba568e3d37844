"""Lethe's front door: one command takes a causal language model and gives back a smaller one that
has forgotten what it recites and still reasons, with a report that proves it.

    python run.py                                    # the embedded organism, offline, a few minutes
    python run.py --model M                          # any causal model; built-in texts stand in
    python run.py --model M --memorized F --reasoning F --reference F
    python run.py --config runs/organism/recipe.yaml # replay
    python run.py --evals-only A B                   # judge two checkpoints, no surgery
    python run.py --compare runA runB                # finished runs side by side
    python run.py --ask "..." --run runs/organism    # base and edited side by side

Exit status: 0 goals met, 1 goals not met (the report is there), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from curvature.estimate import Work
    from curvature.factors import Factors
    from curvature.forward import Labels
    from curvature.populations import Population
    from curvature.stages import Stage, Stages
    from curvature.targets import Target
    from evals.evalset import Material
    from evals.outcome import Goal
    from evals.reasoning import Benchmarks
    from evals.verdict import Verdict
    from rl.questions import Questions
    from rl.teach import Teaching
    from surgery.plan import Plan
    from surgery.rankings.base import Ranking
    from surgery.search import Goals, Outcome

MET, NOT_MET, BAD_INPUT, LOST, INTERRUPTED = 0, 1, 2, 3, 130
ATTACK_TOKENS = 8 * 128
"""Tokens per step of a relearning attack."""
HARDEN_STEPS, HARDEN_LR = 40, 3e-4
"""Steps and learning rate of the relearning that a hardening round is measured on."""
ROUND_SHARE = 0.3
"""Share of the token budget for measuring again after a round."""
ORGANISM_RECIPE = Path(__file__).parent / "recipes" / "organism.yaml"
NOT_SAVED = tuple(
    "update quiet teach_only scan_only measure_only plan_only ask run push_to_hub stated "
    "compare".split()
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
        memorized: Text that must go: .jsonl, .txt, .parquet or a `datasets` name; `scan` for what
            the model recites of the reference text (of the organism: of passages and fresh text).
        reasoning: Text that must stay: rows of prompt and answer, or plain text.
        reference: Ordinary text, for clean perplexity and to be kept; the reasoning text where none
            is given.
        families: Memory families of the organism given to the edit (passage, fact); the other one
            is untargeted.
        prefix_tokens: Tokens of a memorized text that are given.
        suffix_tokens: Tokens after them that must be recited.
        problems: Problems per task for the judge.
        tasks: Tasks of lm-eval for the judge: presets (closed-book, open-book, arithmetic, logic,
            recitation, language) or lm-eval's own names.
        num_fewshot: Examples before each question of `tasks`; the task's own number by default.
        limit: Documents per task of `tasks`; all by default.
        apply_chat_template: Ask `tasks` through the tokenizer's chat template.
        targets: Weight matrices to edit: `mlp`, `attention`, `gate_proj`, a regular expression.
        layers: Layers to edit and shrink, such as `3-5`; all by default.
        factor_tokens: Scored tokens per population for the curvature factors.
        width: Tokens per row for factors, perplexity and training.
        batch_size: Rows at once for factors and training.
        judge_batch_size: Items at once for the judge.
        method: Ranking of the dense edit: contrast, kfac, ... or none.
        strength: Strength of the edit (of every round); found on the tune split by default.
        rounds: Cuts that `contrast` makes at most, measured again after every one; the tune split
            says where to stop. 1 for a single cut.
        harden: Further rounds of `contrast` at most, twice as strong, against what a short
            relearning of half of the edit split's memories brings back of the other half.
        eps: Damping of `contrast`.
        keep_weights: Weights of the kept populations by name (reasoning, reference; on the organism
            reasoning, language, listed knowledge); equal by default.
        keep_reasoning: Goal: reasoning on the tune split, as a share of the base, at least.
        keep_perplexity: Goal: clean perplexity on the tune split over the base's, at most.
        forget: Goal: recall on the tune split, as a share of the base, at most.
        shrink: Goal: parameters, as a share of the base, at most; goes before keep_neurons.
        candidates: How many settings the search for the goals may try where no strength is given;
            for `contrast` each is a strength per round and a choice of layers.
        neurons: Ranking of the neurons that are taken out: neurons, random, magnitude, wanda.
        keep_neurons: Share of each layer's neurons that stays, 0.6 by default; 1 leaves the shape
            alone.
        shape: How the model is made smaller: uniform (neurons, one width; loads anywhere), ragged
            (neurons, a width per layer; ships a small modelling file), low-rank (MLP matrices as
            products, keep_neurons is then the share of squared singular mass; ships one too) or
            layers (whole layers out).
        multiple: Kept neurons per layer are rounded down to a multiple of this.
        refit: Refit what stays in closed form on the kept populations.
        bias: Give the MLPs biases that hold the mean output of what went, where the architecture
            knows them; the refit then goes layer by layer.
        heal_tokens: Token budget of the short fine-tune on fresh kept text after shrinking; 0 for
            none.
        heal_lr: Learning rate of the healing.
        gate: Strength that keeps the healing's updates off the directions that serve memory; 0 for
            none.
        controls: Neuron rankings that are given the same parameter count, the same refit and the
            same healing.
        map_tokens: Scored tokens per population for the map of component groups; 0 for no map.
        cost_tokens: Scored tokens per population for the predicted and the measured cost.
        attack_steps: Steps of each relearning attack; 0 for none.
        attack_lrs: Learning rates of the relearning attack on the edited model.
        attack_everyone: Attack the base and all controls at every rate, not at the middle one only.
        spectrum: Whether to run PyHessian on the middle layer's down projection.
        seed: Seed of every draw.
        device: Where to compute.
        trust_remote_code: Run code that comes with the model.
        scan_only: Only look for what the model recites.
        measure_only: Only measure the curvature.
        plan_only: Only predict what cuts would cost; no weights are written.
        teach: After the cut, teach the result to say what it does not know.
        teach_only: Teach this checkpoint and do nothing else.
        teach_questions: Questions with their answers, .jsonl; the organism has its own.
        teach_arms: Rewards to train with, the first is handed on: frozen, oracle, shuffled, live,
            live-gradient, inoculated.
        teach_steps: Steps of reinforcement learning per arm.
        teach_line: Line before the training prompts of the arm `inoculated`.
        quiet: Print the verdict only.
        ask: A prompt for the base and the edited model of --run, side by side.
        run: A finished run folder, for --ask and --push-to-hub.
        push_to_hub: Upload the checkpoint with its card to this repository, user/name.
        stated: Settings that were given by hand or by a file; all others may be fitted to the
            model.
        evals_only: Two checkpoints to judge and attack as base and edited, without surgery.
        compare: Finished run folders to table side by side.
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
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    targets: tuple[str, ...] = ("mlp",)
    layers: str | None = None
    factor_tokens: int = 100_000
    width: int = 512
    batch_size: int = 16
    judge_batch_size: int = 64
    method: str = "contrast"
    strength: float | None = None
    rounds: int = 4
    harden: int = 3
    eps: float = 0.1
    keep_weights: dict[str, float] | None = None
    keep_reasoning: float = 0.97
    keep_perplexity: float | None = None
    forget: float | None = None
    shrink: float | None = None
    candidates: int = 6
    neurons: str = "neurons"
    keep_neurons: float | None = None
    shape: Literal["uniform", "ragged", "low-rank", "layers"] = "uniform"
    multiple: int = 1
    refit: bool = True
    bias: bool = False
    heal_tokens: int = 200_000
    heal_lr: float = 1e-3
    gate: float = 0.0
    controls: tuple[str, ...] = ("random", "magnitude")
    map_tokens: int = 400
    cost_tokens: int = 2_000
    attack_steps: int = 100
    attack_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    attack_everyone: bool = False
    spectrum: bool = True
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    scan_only: bool = False
    measure_only: bool = False
    plan_only: bool = False
    teach: bool = False
    teach_only: str | None = None
    teach_questions: str | None = None
    teach_arms: tuple[str, ...] = ("frozen",)
    teach_steps: int = 150
    teach_line: str = ""
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

    evals_only: tuple[str, ...] = ()
    compare: tuple[str, ...] = ()

    @property
    def patient(self) -> str:
        """The checkpoint that is operated on, or the first of two that are only judged."""
        return self.evals_only[0] if self.evals_only else self.model

    @property
    def middle_lr(self) -> float:
        """The learning rate of the relearning attack that every arm is given."""
        return sorted(self.attack_lrs)[len(self.attack_lrs) // 2]


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
    """Parse, operate, report. Exit status: 0 goals met, 1 goals not met, 2 bad input or no room, 3
    another process died, 130 interrupted."""
    who = f"lethe (process {os.environ['RANK']})" if int(os.environ.get("RANK", 0)) else "lethe"
    again = "the same command goes on after the last finished stage"

    def said(text: object, status: int) -> int:
        print(f"{who}: {' '.join(str(text).split())}", file=sys.stderr, flush=True)
        return status

    try:
        recipe = parse(arguments)
        quiet_libraries(recipe.quiet)
        from curvature.memory import is_out_of_memory
        from curvature.processes import joined, world
        from curvature.progress import plain_warnings

        with terminable(), plain_warnings(recipe.quiet), joined(device_of(recipe)):
            try:
                if recipe.ask is not None or recipe.run is not None:
                    return on_finished_run(recipe)
                if recipe.teach_only is not None:
                    return teach_checkpoint(recipe)
                return scan(recipe) if recipe.scan_only else operate_on(recipe)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    return said(
                        "out of memory: choose fewer --layers, lower --batch-size or --width, or "
                        "use a machine with more memory",
                        BAD_INPUT,
                    )
                if world() == 1:
                    raise
                ignore_termination()
                return said(f"lost the other processes ({first_line(error)}); {again}", LOST)
    except (ValueError, OSError) as error:
        return said(error, BAD_INPUT)
    except KeyboardInterrupt:
        return said(f"interrupted; {again}", INTERRUPTED)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def ignore_termination() -> None:
    """The launcher ends the others too: one message is enough."""
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def terminable() -> Iterator[None]:
    """A polite request to end (SIGTERM, as launchers and schedulers send it) is a Ctrl-C."""
    import signal
    import threading

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(arguments: Sequence[str] | None = None) -> Recipe:
    """The recipe that the command line asks for; without --model or --config, the organism's."""
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    parser = ArgumentParser(prog="lethe", description=__doc__, exit_on_error=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="A recipe file, such as recipes/organism.yaml."
    )
    parser.add_class_arguments(Recipe, skip={"stated", "evals_only", "compare"})
    parser.add_argument("--evals_only", nargs=2, help="Two checkpoints to judge, no surgery.")
    parser.add_argument("--compare", nargs="+", help="Finished run folders, side by side.")
    given = spelled(sys.argv[1:] if arguments is None else arguments)
    if not any(a.split("=")[0] in ("--config", "--model") for a in given):
        given = ["--config", str(ORGANISM_RECIPE), *given]
    try:
        found = parser.parse_args(given, defaults=False).as_dict()
    except ArgumentError as error:
        files = [a.removeprefix("--config=") for a in given if a.startswith("--config=")]
        raise ValueError(f"{' '.join([*files, str(error)])} (see --help)") from error
    stated = {f.name: found[f.name] for f in dataclasses.fields(Recipe) if f.name in found}
    for several in {"evals_only", "compare"} & set(stated):
        stated[several] = tuple(stated[several] or ())
    recipe = Recipe(**stated, stated=tuple(stated))
    name = "-".join(Path(model).name for model in recipe.evals_only or (recipe.model,))
    return dataclasses.replace(recipe, out=recipe.out or f"runs/{name}")


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
    """No progress bars or log lines but ours; nothing is fetched where HF_HUB_OFFLINE=1. quiet: no
    bars of ours either."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if quiet or not sys.stderr.isatty() or int(os.environ.get("RANK", 0)):
        # bars are for people; a log gets one line per stage
        os.environ.setdefault("TQDM_DISABLE", "1")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


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
        ask(recipe, recipe.ask, path_of(trained), checkpoint)
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

    taught = checkpoint.parent / "taught"
    said = {
        name: say(folder, prompt, trust_remote_code=recipe.trust_remote_code)
        for name, folder in (("base", base), ("edited", checkpoint), ("taught", taught))
        if name != "taught" or (taught / "config.json").is_file()
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
    model, tokenizer, _ = load_model(dataclasses.replace(recipe, quiet=True))
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
    labels: dict[str, Labels] = dataclasses.field(default_factory=dict)
    """Whose gradients were measured, by population."""
    other: PreTrainedTokenizerBase | None = None

    def tokenizer(self, arm: str) -> PreTrainedTokenizerBase:
        """The tokenizer of an arm; only where two checkpoints are judged may they differ."""
        return self.other or self.patient.tokenizer if arm == "edited" else self.patient.tokenizer

    @property
    def keep_neurons(self) -> float:
        """Share of the neurons that stays: what the goal `shrink` asks for, else as given."""
        from surgery.shrink import neurons_for

        r = self.recipe
        if r.shrink is not None:
            return neurons_for(self.patient.model, r.shrink)
        return 0.6 if r.keep_neurons is None else r.keep_neurons

    @property
    def source(self) -> dict[str, str]:
        """What all stages depend on: the weights and the texts."""
        return {"model": self.patient.sha256, "material": self.patient.material.sha256}


def path_of(model: str) -> str | Path:
    """Where the model is: a folder or a hub name. Raises ValueError for a folder without one."""
    from evals import organism

    path: str | Path = organism.MODEL if model == "organism" else model
    local = Path(path).exists() or str(path).startswith((".", "/"))
    if local and not (Path(path) / "config.json").exists():
        raise ValueError(f"{path}: expected a folder with config.json, weights and a tokenizer")
    return path


def device_of(recipe: Recipe) -> str:
    """cpu or cuda. Raises ValueError for a GPU that is not there."""
    import torch

    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device cuda: this machine has no GPU that torch can use; use --device cpu"
        )
    if recipe.device != "auto":
        return recipe.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def fit(recipe: Recipe) -> Recipe:
    """The recipe with what nobody stated fitted to the model's shape and to the free memory; a run
    that goes on keeps what it began with."""
    import psutil
    import torch

    from curvature.checkpoint import read_shape
    from curvature.targets import mlp_blocks
    from recipes import fitted

    path = path_of(recipe.model)
    if recipe.model == "organism":
        return recipe
    file = Path(str(recipe.out)) / "recipe.yaml"
    began = saved_settings(file)
    config, shape = read_shape(path, recipe.trust_remote_code)
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


def work_of(recipe: Recipe) -> Work:
    """The size of the job, for the estimate of memory and time."""
    from curvature.estimate import Work

    r = recipe
    arms, kept = 3 + 2 * len(r.controls), 0.6 if r.keep_neurons is None else r.keep_neurons
    rates = len(r.attack_lrs)
    runs = 1 + rates + (2 + len(r.controls)) * (rates if r.attack_everyone else 1) + 2
    attacked = runs * r.attack_steps * ATTACK_TOKENS
    return Work(
        width=r.width,
        batch_size=r.batch_size,
        judge_batch_size=r.judge_batch_size,
        populations=5 if r.model == "organism" else 3,
        factor_tokens=r.factor_tokens,
        trained_tokens=attacked + (1 + len(r.controls)) * r.heal_tokens,
        judged_tokens=(arms + 2 * r.candidates) * 3 * r.problems * r.width,
        keep=kept,
        trains=bool(r.attack_steps or (r.heal_tokens and kept < 1)),
    )


def look_for_room(recipe: Recipe, path: str | Path, device: str) -> dict[str, Any]:
    """Print what the run needs beside what is free, refuse what cannot fit, before any weight is
    read. Returns how to load the weights: spread over all GPUs where one does not hold them."""
    import torch

    from curvature.checkpoint import read_shape
    from curvature.estimate import estimate, refuse, report, room
    from curvature.processes import is_main, world
    from curvature.targets import select_targets

    config, shape = read_shape(path, recipe.trust_remote_code)
    dtype = torch.float32 if device == "cpu" else config.dtype or torch.float32
    shape.to(dtype)  # type: ignore[arg-type]
    chosen = select_targets(shape, recipe.targets, recipe.layers)
    work = work_of(recipe)
    if work.keep < 1:
        chosen += select_targets(shape, ("mlp",))
    needed = estimate(shape, list({t.name: t for t in chosen}.values()), work)
    free = room(device, str(recipe.out))
    if is_main() and not recipe.quiet:
        print(report(needed, free), flush=True)
    refuse(needed, free)
    if device == "cpu" or torch.cuda.device_count() == 1 or world() > 1:
        return {}
    return {"device_map": "auto"} if needed.memory > torch.cuda.mem_get_info()[0] else {}


def load_model(
    recipe: Recipe, model_name: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.dtype]:
    """Model (the patient, or the one named) and tokenizer on their device, ready to be read; and
    the dtype as it was stored."""
    import torch

    from curvature.checkpoint import read_checkpoint

    path, device = path_of(model_name or recipe.patient), device_of(recipe)
    spread = {} if model_name else look_for_room(recipe, path, device)
    model, tokenizer = read_checkpoint(path, recipe.trust_remote_code, **spread)
    dtype = model.dtype
    # Half precision has no fast kernels on most CPUs, and second derivatives need fp32 in any case.
    model = model.float() if device == "cpu" else model
    model = model if spread else model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), tokenizer, dtype


def load(recipe: Recipe) -> Patient:
    """The patient and its texts, checked as far as can be known before any long work."""
    from curvature.artifacts import model_sha256
    from curvature.populations import Population, batches, load_population
    from curvature.recitation import recited_and_rest
    from curvature.targets import mlp_blocks, select_targets
    from evals import organism
    from evals.evalset import material_from_files
    from evals.organism.tokenizer import build_tokenizer
    from evals.reasoning import check_benchmarks
    from evals.standins import standin_material
    from recipes import context_of
    from surgery.export import check_exportable
    from surgery.rankings.base import shares_of

    of_the_organism = recipe.model == "organism" and recipe.memorized in (None, "scan")
    own_texts = bool(recipe.memorized) and not of_the_organism
    if own_texts != bool(recipe.reasoning):
        raise ValueError(
            f"--model {recipe.model} needs both --memorized (text that must go) and --reasoning "
            "(text that must stay), or neither: then built-in texts stand in"
        )
    model, tokenizer, dtype = load_model(recipe)
    # the world's texts are for models of that world: others are asked the built-in ones
    of_the_world = tokenizer.get_vocab() == build_tokenizer().get_vocab()
    standins = not own_texts and not (recipe.model == "organism" and of_the_world)
    if recipe.tasks:
        check_benchmarks(benchmarks(recipe), tokenizer)
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
    if not recipe.evals_only:
        check_exportable(model)
        select_targets(model, recipe.targets, recipe.layers)
        mlp_blocks(model, recipe.layers)
    memorized: str | Population = str(recipe.memorized)
    reference: str | Population = recipe.reference or str(recipe.reasoning)
    if recipe.memorized == "scan":
        if recipe.model == "organism":
            searched = organism.scan_population()
        elif recipe.reference:
            searched = load_population(recipe.reference, "reference", limit=20_000)
        else:
            raise ValueError("--memorized scan needs --reference: the text to search")
        memorized, reference = recited_and_rest(
            model,
            tokenizer,
            searched,
            prefix=recipe.prefix_tokens,
            suffix=recipe.suffix_tokens,
            batch_size=recipe.judge_batch_size,
            progress="scan",
        )
    if not own_texts and not standins:
        seed = organism.organism_seed()
        material = organism.material(seed, families=recipe.families, problems=recipe.problems)
        if isinstance(memorized, Population):
            # a window is as long as a passage: of the families, a scan can find only these
            material = organism.material(seed, families=("passage",), problems=recipe.problems)
            material = dataclasses.replace(material, memorized=(memorized,))
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
            memorized=memorized,
            reasoning=str(recipe.reasoning),
            reference=reference,
            prefix_tokens=recipe.prefix_tokens,
            suffix_tokens=recipe.suffix_tokens,
            problems=recipe.problems,
            seed=recipe.seed,
        )
    if not recipe.evals_only:
        shares_of({p.name: {} for p in material.keep}, recipe.keep_weights)
    for population in (*material.keep, *material.memorized):
        # one pass over the tokens raises for a problem that does not fit into a row
        for _ in batches(population, tokenizer, width=recipe.width, batch_size=recipe.batch_size):
            pass
    return Patient(model, tokenizer, material, model_sha256(model), dtype)


def benchmarks(recipe: Recipe) -> Benchmarks:
    """Tasks of lm-eval by name, as the recipe asks for them."""
    from evals.reasoning import Benchmarks

    return Benchmarks(recipe.tasks, recipe.num_fewshot, recipe.limit, recipe.apply_chat_template)


AT_LEAST = {
    "prefix_tokens": 1,
    "suffix_tokens": 1,
    "problems": 1,
    "width": 2,
    "batch_size": 1,
    "judge_batch_size": 1,
    "factor_tokens": 1,
    "candidates": 1,
    "multiple": 1,
    "cost_tokens": 1,
    "map_tokens": 0,
    "rounds": 1,
    "heal_tokens": 0,
    "attack_steps": 0,
    "seed": 0,
}


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
    for setting, name in rankings.items():
        ranks_neurons = name != "none" and "multiple" in RANKINGS[name].settings
        if setting != "method" and not ranks_neurons:
            raise ValueError(f"{setting}: {name} edits matrices and does not rank neurons")
    if len(set(recipe.controls)) < len(recipe.controls):
        twice = next(c for c in recipe.controls if recipe.controls.count(c) > 1)
        raise ValueError(f"controls names {twice} twice")
    if 0 < recipe.heal_tokens < recipe.batch_size * recipe.width:
        raise ValueError(
            f"heal_tokens is {recipe.heal_tokens}, less than one step of batch_size "
            f"{recipe.batch_size} x width {recipe.width}: raise it, or give 0 for no healing"
        )
    if recipe.keep_neurons is not None and not 0 < recipe.keep_neurons <= 1:
        raise ValueError(
            f"keep_neurons is {recipe.keep_neurons}: expected a share above 0, at most 1"
        )
    goals_of(recipe).check()
    for setting, least in AT_LEAST.items():
        if getattr(recipe, setting) < least:
            raise ValueError(f"{setting} is {getattr(recipe, setting)}: expected at least {least}")
    positive = {"eps": (recipe.eps,), "heal_lr": (recipe.heal_lr,), "attack_lrs": recipe.attack_lrs}
    for setting, values in positive.items():
        for value in values:
            if not 0 < value < math.inf:
                raise ValueError(f"{setting} is {value}: expected a number above 0")
    if recipe.attack_steps and not recipe.attack_lrs:
        raise ValueError("attack_lrs is empty: give a rate, or attack_steps 0 for no attack")
    for name, weight in (recipe.keep_weights or {}).items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"keep_weights {name} is {weight}: expected a number, 0 or more")
    if recipe.method != "none" and recipe.strength is not None:
        low, high = RANKINGS[recipe.method].bounds
        if not low <= recipe.strength <= high:
            raise ValueError(
                f"strength is {recipe.strength}: {recipe.method} expects {low:g} to {high:g}"
            )


def run_folder(recipe: Recipe) -> Path:
    """The run folder, made where it is new. A folder of another recipe is refused unless `update`
    is set, and so is a folder of something else."""

    from curvature.stages import LOCK

    folder = Path(str(recipe.out))
    file, settings = folder / "recipe.yaml", recipe.settings
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out")
    if file.exists():
        before = saved_settings(file)
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
    elif folder.exists() and any(
        p.name not in (LOCK, ".recipe.tmp", "scan.json") for p in folder.iterdir()
    ):
        raise ValueError(f"{folder} exists and is not a run folder: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def saved_settings(file: Path) -> Any:
    """What a `recipe.yaml` holds; None where there is none or it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return None


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """Write `recipe.yaml`, which replays the run."""
    import yaml

    temporary = folder / ".recipe.tmp"
    temporary.write_text(yaml.safe_dump(recipe.settings, sort_keys=False), encoding="utf-8")
    os.replace(temporary, folder / "recipe.yaml")


# The stages ---------------------------------------------------------------------------------------


def operate_on(asked: Recipe) -> int:
    """load -> judge base -> factors -> strength -> cut -> shrink -> heal -> judge -> attack ->
    controls [-> teach -> judge] -> export -> report."""
    from curvature.processes import from_main, is_main
    from curvature.stages import Stages, locked, sweep
    from surgery.publish import check_repository

    if asked.compare:
        return from_main(lambda: compare_runs(asked.compare))
    started = time.perf_counter()
    if asked.push_to_hub is not None:
        check_repository(asked.push_to_hub)
    if asked.evals_only:
        check(asked)
        return evaluate_only(asked, started)
    recipe = from_main(lambda: fit(asked))
    check(recipe)
    patient = load(recipe)
    questions = questions_of(recipe, patient.tokenizer) if recipe.teach else None
    folder = from_main(lambda: run_folder(recipe))
    with locked(folder):
        from_main(lambda: sweep(folder))
        from_main(lambda: save_recipe(recipe, folder))
        say = silence if recipe.quiet else announce
        run = Run(recipe, patient, Stages(folder, say), folder)
        if is_main():
            introduce(run)
        if recipe.measure_only or recipe.plan_only:
            return measure_and_predict(run)
        judge_stage(run, "base", patient.model)
        spectrum_stage(run)
        factors = factors_stage(run, "factors", patient.model)
        map_stage(run, factors)
        strength_stage(run, factors)
        harden_stage(run, factors)
        dense = cut_stage(run, factors)
        cost_stage(run)
        judge_stage(run, "cut", dense)
        small = shrink_stage(run, "shrink", dense, recipe.neurons)
        judge_stage(run, "shrunk", small)
        edited = heal_stage(run, "heal", small)
        judge_stage(run, "edited", edited)
        attack_stage(run, "base", patient.model)
        attack_stage(run, "edited", edited)
        for ranking in recipe.controls:
            control = shrink_stage(run, f"control-{ranking}", patient.model, ranking)
            judge_stage(run, f"control-{ranking}-unhealed", control)
            control = heal_stage(run, f"control-{ranking}-healed", control)
            judge_stage(run, f"control-{ranking}", control)
            attack_stage(run, f"control-{ranking}", control)
        taught = None if questions is None else teach_stage(run, edited, questions)
        if taught is not None:
            judge_stage(run, "taught", taught)
        speed_stage(run, edited)
        samples_stage(run, edited)

        def concluded() -> int:
            verdict = conclude(run, edited, taught, time.perf_counter() - started)
            goals = judged_goals(verdict, recipe)
            show(verdict, goals, folder, recipe.quiet)
            if recipe.push_to_hub is not None:
                from surgery.publish import push_to_hub

                print(f"uploaded    {push_to_hub(folder / 'checkpoint', recipe.push_to_hub)}")
            return goals_met(goals)

        return from_main(concluded)


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
        map_stage(run, factors)
        if "curvature-map" in run.stages.done:
            print(f"map         {run.stages.done['curvature-map'].folder / 'stage.json'}")
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
            plan = plan_dense(run, factors, r.method, value, r.layers)
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


def evaluate_only(recipe: Recipe, started: float) -> int:
    """Two checkpoints as base and edited: judged, attacked, reported; nothing is cut."""
    from curvature.processes import from_main
    from curvature.stages import Stages, locked

    patient = load(recipe)
    edited, tokenizer, _ = load_model(recipe, recipe.evals_only[1])
    folder = from_main(lambda: run_folder(recipe))
    with locked(folder):
        from_main(lambda: save_recipe(recipe, folder))
        say = silence if recipe.quiet else announce
        run = Run(recipe, patient, Stages(folder, say), folder, other=tokenizer)
        for arm, model in (("base", patient.model), ("edited", edited)):
            judge_stage(run, arm, model)
            attack_stage(run, arm, model)
        speed_stage(run, edited)
        samples_stage(run, edited)

        def concluded() -> int:
            verdict = conclude(run, edited, None, time.perf_counter() - started)
            goals = judged_goals(verdict, recipe)
            show(verdict, goals, folder, recipe.quiet)
            return goals_met(goals)

        return from_main(concluded)


def compare_runs(folders: Sequence[str]) -> int:
    """The numbers of several finished runs, one column each."""
    from rich.console import Console
    from rich.table import Table

    from evals.report import runs_table

    runs = runs_table(folders)
    table = Table(*runs.columns, box=None)
    for row in runs.rows:
        table.add_row(*row)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    return 0


def judge_stage(run: Run, arm: str, model: PreTrainedModel) -> None:
    """Ask a model everything in the test split, and read it beside the base."""
    from curvature.artifacts import model_sha256
    from evals.judge import judge

    r, test = run.recipe, run.patient.material.test
    tokenizer = run.tokenizer(arm)
    same_words = tokenizer.get_vocab() == run.patient.tokenizer.get_vocab()
    depends = {
        "base": run.patient.sha256,
        "test": test.sha256,
        "judged": model_sha256(model),
        "tokens": tokenizer.get_vocab(),
        "width": r.width,
        "benchmarks": benchmarks(r),
    }

    def compute(_: Path) -> Any:
        judgement = judge(
            model,
            tokenizer,
            test,
            # another vocabulary has other events: no divergence from it
            base=run.patient.model if arm != "base" and same_words else None,
            benchmarks=benchmarks(r) if r.tasks else None,
            batch_size=r.judge_batch_size,
            width=r.width,
            progress=arm,
        )
        return judgement.to_json()

    run.stages.run(f"judge-{arm}", depends, compute)


def spectrum_stage(run: Run) -> None:
    """PyHessian on the middle layer's down projection: top eigenvalues, trace and density."""
    from curvature.capture import pieces
    from curvature.memory import RowsAtOnce
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
        batch = next(stream)
        spectra = RowsAtOnce("spectrum", None, 8).run(
            lambda rows: pyhessian_spectra(
                run.patient.model,
                [part for _, part in pieces(batch, rows)],
                [blocks[len(blocks) // 2].down],
                top=2,
                trace_probes=8,
                density_steps=20,
                seed=r.seed,
                progress="spectrum",
            )
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
    from curvature.factors import load_factors, save_factors

    r = run.recipe
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
    settings |= {"shrinks": run.keep_neurons < 1, "memorized": memorized}
    depends = {**run.source, "measured": model_sha256(model), **settings}
    sources = populations_of(run, memorized)

    def compute(folder: Path) -> Any:
        targets = measured_targets(run, model)
        factors = measure(run, model, targets, name, memorized=memorized)
        for key, measured in factors.items():
            save_factors(factors_file(folder, key), measured, {"population": sources[key].sha256})
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
            "labels": {key: run.labels[key] for key in factors},
        }

    stage = run.stages.run(name, depends, compute)
    return {key: load_factors(factors_file(stage.folder, key))[0] for key in sources}


def populations_of(run: Run, memorized: bool = True) -> dict[str, Population]:
    """What is measured, by the name that its factors go under."""
    material = run.patient.material
    found = {p.name: p for p in material.keep}
    return found | ({f"memorized/{p.name}": p for p in material.memorized} if memorized else {})


def measure(
    run: Run,
    model: nn.Module,
    targets: Sequence[Target],
    title: str,
    share: float = 1.0,
    memorized: bool = True,
) -> dict[str, dict[str, Factors]]:
    """Factors by population: sampled labels on what is kept, margins of what is recited (of all
    tokens where the patient recites nothing). share: of the token budget."""
    return measure_all(run, model, targets, populations_of(run, memorized), title, share)


def measure_all(
    run: Run,
    model: nn.Module,
    targets: Sequence[Target],
    populations: dict[str, Population],
    title: str,
    share: float = 1.0,
) -> dict[str, dict[str, Factors]]:
    """`measure` of the given populations."""
    from curvature.factors import collect_factors

    r, found = run.recipe, {}
    labels = run.stages.done["factors"].value["labels"] if "factors" in run.stages.done else {}
    for key, population in populations.items():
        likely: Labels = "recited" if population.role == "memorized" else "sampled"
        ways: tuple[Labels, Labels] = (labels.get(key, likely), "margin")
        for way in ways:
            found[key] = collect_factors(
                model,
                run.patient.tokenizer,
                population,
                targets,
                labels=way,
                tokens=round(r.factor_tokens * share),
                width=r.width,
                batch_size=r.batch_size,
                seed=r.seed,
                # a round asks for A and G alone
                coupled=share == 1.0,
                progress=f"{title}: {population.name}",
            )
            if key in labels or any(f.G.any() for f in found[key].values()):
                break
        run.labels.setdefault(key, way)
    return found


def map_stage(run: Run, factors: dict[str, dict[str, Factors]]) -> None:
    """Where memorized text lives in the curvature of what is kept, what each group of components
    hurts, and what the model recites."""
    from curvature.survey import survey
    from curvature.targets import select_targets

    r, material = run.recipe, run.patient.material
    names = "targets layers map_tokens keep_weights width batch_size seed".split()
    names += ["prefix_tokens", "suffix_tokens"]
    depends = {"factors": run.stages.done["factors"].fingerprint}
    depends |= {k: getattr(r, k) for k in names}

    def compute(_: Path) -> Any:
        return survey(
            run.patient.model,
            run.patient.tokenizer,
            (*material.keep, *material.memorized),
            select_targets(run.patient.model, r.targets, r.layers),
            kept_factors(factors, r.keep_weights),
            {name.removeprefix("memorized/"): f for name, f in factors.items()},
            material.scan,
            tokens=r.map_tokens,
            scan_tokens=100 * r.map_tokens,
            prefix=r.prefix_tokens,
            suffix=r.suffix_tokens,
            width=r.width,
            batch_size=r.batch_size,
            seed=r.seed,
            progress="curvature map",
        )

    if r.map_tokens:
        run.stages.run("curvature-map", depends, compute)


def measured_targets(run: Run, model: PreTrainedModel) -> list[Target]:
    """What the edit changes and, where neurons go, every MLP matrix: shrinking is uniform."""
    from curvature.targets import select_targets

    chosen = select_targets(model, run.recipe.targets, run.recipe.layers)
    if run.keep_neurons < 1:
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
    run: Run,
    factors: dict[str, dict[str, Factors]],
    method: str,
    strength: float,
    layers: str | None,
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
        targets=select_targets(model, r.targets, layers),
        model_hash=run.patient.sha256,
        **settings,
    )


def goals_of(recipe: Recipe) -> Goals:
    """What the user asked for, as the search has it."""
    from surgery.search import Goals

    return Goals(recipe.keep_reasoning, recipe.keep_perplexity, recipe.forget, recipe.shrink)


def tune_figures(run: Run, model: PreTrainedModel) -> dict[str, Any]:
    """What a candidate is chosen by: the tune split, without the harness, which starts slowly."""
    from evals.judge import judge

    r, tune = run.recipe, run.patient.material.tune
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


def outcome_of(point: dict[str, Any], base: dict[str, Any]) -> Outcome:
    """A candidate's figures over the base's; what the patient cannot do at all counts as kept."""
    from surgery.search import Outcome

    def share(name: str, missing: float) -> float:
        return (point[name] or 0.0) / base[name] if base.get(name) else missing

    return Outcome(
        recall=share("recall", 0.0),
        reasoning=share("reasoning", 1.0),
        perplexity=share("perplexity", 1.0),
        others=min(share("arithmetic", 1.0), share("listed", 1.0)),
    )


def strength_stage(run: Run, factors: dict[str, dict[str, Factors]]) -> None:
    """The search for the goals on the tune split: every candidate judged, the best one chosen, and
    the published edit beside it."""
    from surgery.search import Axis, objective, search

    r, tune = run.recipe, run.patient.material.tune
    depends = {"factors": run.stages.done["factors"].fingerprint, "tune": tune.sha256}
    base = run.stages.run(
        "try-base",
        {**depends, "batch": r.judge_batch_size},
        lambda _: tune_figures(run, run.patient.model),
    ).value
    goals = goals_of(r)
    result, points = None, []
    if r.method != "none":
        from surgery.rankings import RANKINGS

        ranking, layers = RANKINGS[r.method], placements(run)
        low, high = (0.002, 0.02) if in_rounds(r) else ranking.span
        space: dict[str, Axis] = {"strength": Axis(min(low, high), max(low, high), log=ranking.log)}
        start: list[dict[str, Any]] = [
            {"strength": x} for x in ([0.005] if in_rounds(r) else strengths(ranking, r.candidates))
        ]
        if in_rounds(r) and len(layers) > 1:
            space["layers"] = Axis(choices=tuple(layers))
            start = [{**s, "layers": next(iter(layers))} for s in start]
        if r.strength is not None:
            start = [{**start[0], "strength": r.strength}]

        def points_of(settings: dict[str, Any]) -> list[dict[str, Any]]:
            return [s.value for s in tries(run, factors, goals, base, settings, layers)]

        def evaluate(settings: dict[str, Any]) -> Outcome:
            outcomes = [outcome_of(p, base) for p in points_of(settings)]
            return min(outcomes, key=lambda o: objective(goals, o))

        result = search(
            dataclasses.replace(goals, shrink=None),
            space,
            evaluate,
            evaluations=1 if r.strength is not None else r.candidates,
            journal=run.folder / "search.journal",
            predict=lambda settings: predicted_cost(run, factors, settings, layers),
            start=start,
            seed=r.seed,
            key=str(run.stages.done["try-base"].fingerprint),
        )
        for candidate in result.candidates:
            if candidate.outcome is not None:
                points += points_of(candidate.settings)
    chosen = None
    if points:
        pool = points[-1:] if r.strength is not None else points
        chosen = min(pool, key=lambda p: objective(goals, outcome_of(p, base)))
    published = [] if r.method == "kfac" else tries_once(run, factors, "kfac", 4)

    def compute(_: Path) -> Any:
        met = chosen is not None and miss_of(goals, chosen, base) == 0
        return {
            "base": base,
            "candidates": points + [s.value for s in published],
            "chosen": chosen,
            "goal_met": met,
            "sentence": result.sentence if result is not None and not met else "",
            "skipped": [dataclasses.asdict(c) for c in result.candidates if c.skipped]
            if result is not None
            else [],
        }

    marks = [s.fingerprint for s in run.stages.done.values() if s.name.startswith("try-")]
    run.stages.run("strength", {**depends, "tries": marks, "goals": goals, "of": r.method}, compute)


def miss_of(goals: Goals, point: dict[str, Any], base: dict[str, Any]) -> float:
    """By how much a candidate misses the goals that a dense edit can meet."""
    from surgery.search import miss

    return miss(dataclasses.replace(goals, shrink=None), outcome_of(point, base))


def in_rounds(recipe: Recipe) -> bool:
    return recipe.method == "contrast" and recipe.rounds > 1


def placements(run: Run) -> dict[str, str | None]:
    """Layers that the search may choose between, by name: all that the recipe allows, and the half
    that the layer map favours."""
    from surgery.search import best_layers

    r = run.recipe
    found = run.stages.done["factors"].value["layers"].get("values", {})
    layers = {int(k): float(v) for k, v in found.items()}
    if r.candidates == 1 or len(layers) < 2 or r.strength is not None:
        return {"all": r.layers}
    best = best_layers(layers, max(1, len(layers) // 2))
    return {"all": r.layers, "half": ",".join(map(str, best))}


def predicted_cost(
    run: Run,
    factors: dict[str, dict[str, Factors]],
    settings: dict[str, Any],
    layers: dict[str, str | None],
) -> float:
    """Predicted cost of a candidate to the kept text, nats per token: the Kronecker form of its
    first cut, times the square of the number of rounds that it may make."""
    from surgery.predict import plan_deltas, quadratic_cost

    r = run.recipe
    where = layers[settings.get("layers", "all")]
    plan = plan_dense(run, factors, r.method, settings["strength"], where)
    cost = quadratic_cost(
        plan_deltas(run.patient.model, plan), kept_factors(factors, r.keep_weights)
    )
    return cost * (r.rounds**2 if in_rounds(r) else 1)


def tries(
    run: Run,
    factors: dict[str, dict[str, Factors]],
    goals: Goals,
    base: dict[str, Any],
    settings: dict[str, Any],
    layers: dict[str, str | None],
) -> list[Stage]:
    """One candidate of the search: a single cut, or the path of cuts up to where it no longer keeps
    what it must. Every cut is a stage."""
    from curvature.targets import select_targets
    from surgery.operate import operate
    from surgery.plan import load_plan, save_plan
    from surgery.rounds import joined, memory_scales, next_round

    r, model = run.recipe, run.patient.model
    if not in_rounds(r):
        return tries_once(run, factors, r.method, 0, [settings["strength"]])
    where = settings.get("layers", "all")
    kept_goals = dataclasses.replace(goals, forget=None)
    names = ("eps", "keep_weights", "width", "batch_size", "seed", "targets", "factor_tokens")
    path: list[Stage] = []
    for number in range(1, r.rounds + 1):
        before = path[-1] if path else None
        depends = {
            "before": before.fingerprint if before else run.stages.done["factors"].fingerprint,
            "settings": settings,
            "layers": layers[where],
            "tune": run.patient.material.tune.sha256,
            **{k: getattr(r, k) for k in names},
        }

        def compute(folder: Path, number: int = number, before: Stage | None = before) -> Any:
            start = (
                model
                if before is None
                else operate(model, load_plan(before.folder), copy_model=True, check=False)
            )
            targets = select_targets(start, r.targets, layers[where])
            if before is None:
                measured = factors
                scales = memory_scales(factors, r.keep_weights, [t.name for t in targets])
            else:
                measured = measure(run, start, targets, f"round {number}", ROUND_SHARE)
                scales = before.value["scales"]
            cut = next_round(
                start,
                measured,
                scales,
                number=number,
                strength=settings["strength"],
                targets=targets,
                keep=r.keep_weights,
                seed=r.seed,
                eps=r.eps,
            )
            save_plan(joined(model, cut.model, cut.plan, number), folder)
            figures = tune_figures(run, cast("PreTrainedModel", cut.model))
            about = {"method": r.method, **settings, "rounds": number, "scales": scales}
            return {**about, **figures, "energy": cut.energy}

        name = f"try-{r.method}-{where}-{settings['strength']:.3g}-{number}"
        path.append(run.stages.run(name, depends, compute))
        if r.strength is None and miss_of(kept_goals, path[-1].value, base) > 0:
            break
    return path


def harden_stage(run: Run, factors: dict[str, dict[str, Factors]]) -> None:
    """Further rounds against what an attacker would bring back: half of the edit split's memories
    is relearned on a copy, and the margins of the other half that return are cut out of the edit.
    Ends before the goals are missed."""
    from curvature.targets import select_targets
    from surgery.operate import operate
    from surgery.plan import load_plan, save_plan
    from surgery.rounds import halves, joined, next_round, relearned

    r, model, done = run.recipe, run.patient.model, run.stages.done
    base, chosen = done["try-base"].value, done["strength"].value["chosen"]
    if not r.harden or not in_rounds(r):
        return
    goals, where = dataclasses.replace(goals_of(r), forget=None), chosen.get("layers", "all")
    layers = placements(run)[where]
    parts = halves(run.patient.material.memorized)
    before = tried_stage(run)
    names = ("eps", "keep_weights", "width", "batch_size", "seed", "targets", "factor_tokens")
    for number in range(1, r.harden + 1):
        depends = {"before": before.fingerprint, "layers": layers, "lr": HARDEN_LR}
        depends |= {k: getattr(r, k) for k in names}

        def compute(folder: Path, number: int = number, before: Stage = before) -> Any:
            start = operate(model, load_plan(before.folder), copy_model=True, check=False)
            targets = select_targets(start, r.targets, layers)
            attacked = relearned(
                start,
                run.patient.tokenizer,
                parts[number % 2],
                steps=HARDEN_STEPS,
                lr=HARDEN_LR,
                batch_size=max(1, ATTACK_TOKENS // r.width),
                width=r.width,
                seed=r.seed + number,
                progress=f"harden {number}: relearning",
            )
            returned = select_targets(attacked, r.targets, layers)
            title = f"harden {number}"
            kept = measure(run, start, targets, title, ROUND_SHARE, memorized=False)
            gone = {f"memorized/{p.name}": p for p in parts[1 - number % 2]}
            back = measure_all(run, attacked, returned, gone, title, ROUND_SHARE)
            cut = next_round(
                start,
                {**kept, **back},
                chosen["scales"],
                number=number,
                strength=2 * chosen["strength"],
                targets=targets,
                keep=r.keep_weights,
                seed=r.seed,
                eps=r.eps,
            )
            save_plan(joined(model, cut.model, cut.plan, chosen["rounds"] + number), folder)
            figures = tune_figures(run, cast("PreTrainedModel", cut.model))
            return {**chosen, "hardened": number, **figures, "energy": cut.energy}

        before = run.stages.run(f"harden-{number}", depends, compute)
        if miss_of(goals, before.value, base) > 0:
            break


def tried_stage(run: Run) -> Stage:
    """The stage of the candidate that the search chose."""
    chosen = run.stages.done["strength"].value["chosen"]
    return next(s for n, s in run.stages.done.items() if n.startswith("try-") and s.value == chosen)


def hardened(run: Run) -> list[Stage]:
    """The hardening rounds that kept what must be kept."""
    base = run.stages.done["try-base"].value
    goals = dataclasses.replace(goals_of(run.recipe), forget=None)
    found = [s for n, s in run.stages.done.items() if n.startswith("harden-")]
    return [s for s in found if miss_of(goals, s.value, base) == 0]


def tries_once(
    run: Run,
    factors: dict[str, dict[str, Factors]],
    method: str,
    n: int,
    values: Sequence[float] | None = None,
) -> list[Stage]:
    """Single cuts by `method`, at `n` strengths over its span or at the given ones."""
    from surgery.operate import operate
    from surgery.rankings import RANKINGS

    r, done = run.recipe, []
    for value in strengths(RANKINGS[method], n) if values is None else values:
        depends = {
            "factors": run.stages.done["factors"].fingerprint,
            "tune": run.patient.material.tune.sha256,
            "method": method,
            "strength": value,
            **{k: getattr(r, k) for k in ("eps", "keep_weights", "seed", "targets", "layers")},
        }

        def compute(_: Path, value: float = value) -> Any:
            plan = plan_dense(run, factors, method, value, r.layers)
            edited = operate(run.patient.model, plan, copy_model=True, check=False)
            figures = tune_figures(run, cast("PreTrainedModel", edited))
            return {"method": method, "strength": value, "rounds": 1, **figures}

        done.append(run.stages.run(f"try-{method}-{value:.4g}", depends, compute))
    return done


def strengths(ranking: Ranking, n: int) -> list[float]:
    """`n` strengths from weak to strong over the ranking's span; shares just below 1 are spaced by
    what they leave out."""
    import numpy as np

    low, high = ranking.span
    if 0.99 < low < 1:
        return [float(1 - v) for v in np.geomspace(1 - low, 1 - high, n)]
    return [float(v) for v in (np.geomspace if ranking.log else np.linspace)(low, high, n)]


def cut_stage(run: Run, factors: dict[str, dict[str, Factors]]) -> PreTrainedModel:
    """The dense edit that the search chose."""
    from surgery.operate import operate
    from surgery.plan import load_plan, save_plan

    r = run.recipe
    if r.method == "none":
        return run.patient.model
    chosen = run.stages.done["strength"].value["chosen"]
    tried = [s for s in (tried_stage(run), *hardened(run)) if (s.folder / "plan.json").exists()]
    settings = {k: chosen.get(k) for k in ("method", "strength", "rounds", "layers")}
    depends = {
        "factors": run.stages.done["factors"].fingerprint,
        "tried": tried[-1].fingerprint if tried else None,
        **settings,
        **{k: getattr(r, k) for k in ("eps", "keep_weights", "seed", "targets")},
    }

    def compute(folder: Path) -> Any:
        plan = (
            load_plan(tried[-1].folder)
            if tried
            else plan_dense(run, factors, r.method, chosen["strength"], r.layers)
        )
        save_plan(plan, folder)
        return {**settings, "removed": plan.removed, "total": plan.total}

    stage = run.stages.run("cut", depends, compute)
    return cast(
        "PreTrainedModel", operate(run.patient.model, load_plan(stage.folder), copy_model=True)
    )


def saved(model: PreTrainedModel, folder: Path) -> None:
    from curvature.processes import is_main
    from surgery.export import save_weights

    if is_main():
        save_weights(model, folder / "model")


def reloaded(run: Run, stage: Stage) -> PreTrainedModel:
    """A stage's model, always from its files: a run and its replay compute on the same bytes."""
    from transformers import AutoModelForCausalLM

    folder = stage.folder / "model"
    # the only code that is run unasked is the modelling file that this run wrote
    own_code = (folder / "modeling_lethe.py").exists()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=run.recipe.trust_remote_code or own_code
    )
    return model.to(run.patient.model.device).eval()  # type: ignore[arg-type]


def shrink_stage(run: Run, name: str, model: PreTrainedModel, ranking: str) -> PreTrainedModel:
    """Make the model smaller for good, and refit what stays on the kept populations. Controls lose
    neurons, as many as gives them the parameters of the shrunk model."""
    from curvature.artifacts import model_sha256
    from curvature.targets import count_parameters
    from surgery.shrink import neurons_for

    r = run.recipe
    if run.keep_neurons == 1:
        return model
    control = name != "shrink"
    keep = run.keep_neurons
    if control and r.shape != "uniform":
        smaller = run.stages.done["shrink"].value["parameters"]
        keep = neurons_for(model, smaller / count_parameters(model))
    unedited = model_sha256(model) == run.patient.sha256
    measured = "factors" if unedited else "factors-after-cut"
    # after the cut only what is kept is measured again: the ranking of neurons asks for no more
    factors = factors_stage(run, measured, model, memorized=unedited)
    names = ("multiple", "refit", "bias", "seed", "keep_weights")
    depends: dict[str, Any] = {"ranking": ranking, "shape": "uniform" if control else r.shape}
    depends["factors"] = run.stages.done[measured].fingerprint
    depends |= {"keep_neurons": keep}
    depends |= {k: getattr(r, k) for k in names}

    def compute(folder: Path) -> Any:
        if control or r.shape in ("uniform", "ragged"):
            small, record = fewer_neurons(
                run, model, factors, ranking, keep, folder, uniform=control or r.shape == "uniform"
            )
        else:
            small, record = other_shape(run, model, factors, keep)
        saved(small, folder)
        return {**record, "parameters": count_parameters(small)}

    return reloaded(run, run.stages.run(name, depends, compute))


def fewer_neurons(
    run: Run,
    model: PreTrainedModel,
    factors: dict[str, dict[str, Factors]],
    ranking: str,
    keep: float,
    folder: Path,
    *,
    uniform: bool,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The lowest-ranked neurons out, and the rest refitted in closed form."""
    from curvature.populations import batches
    from surgery.plan import save_plan
    from surgery.rankings import RANKINGS, plan_surgery
    from surgery.repair import refit, refit_in_order, with_mlp_bias
    from surgery.shrink import shrink

    r = run.recipe
    wanted = {"multiple": r.multiple, "grain": "neurons"}
    settings: dict[str, Any] = {k: v for k, v in wanted.items() if k in RANKINGS[ranking].settings}
    if not uniform:
        settings |= {"uniform": False, "score": "deletion"}
    plan = plan_surgery(
        model, ranking, factors, strength=keep, seed=r.seed, keep=r.keep_weights, **settings
    )
    save_plan(plan, folder)
    small = shrink(model, plan, uniform=uniform)
    left = refit(small, model, plan, kept_factors(factors, r.keep_weights)) if r.refit else {}
    if r.bias:
        small = with_mlp_bias(small)
        rows = [
            batch
            for population in run.patient.material.keep
            for batch in batches(
                population,
                run.patient.tokenizer,
                width=r.width,
                batch_size=r.batch_size,
                tokens=round(r.factor_tokens * ROUND_SHARE),
                seed=r.seed,
            )
        ]
        refit_in_order(small, model, lambda: rows)
    return small, {"removed": plan.removed, "total": plan.total, "output_error_left": left}


def other_shape(
    run: Run, model: PreTrainedModel, factors: dict[str, dict[str, Factors]], keep: float
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Whole layers out (those with the most memory for what is kept), or MLP matrices as products
    of two thin ones where that is smaller."""
    from curvature.targets import mlp_blocks
    from surgery.search import best_layers
    from surgery.shrink import drop_layers, factorize

    if run.recipe.shape == "layers":
        found = run.stages.done["factors"].value["layers"]["values"]
        ratios = {int(k): float(v) for k, v in found.items()}
        count = min(len(ratios) - 1, max(1, round((1 - keep) * len(ratios))))
        gone = best_layers(ratios, count)
        stay = [n for n in sorted(ratios) if n not in gone]
        return drop_layers(model, stay), {"layers_dropped": list(gone)}
    targets = [t for block in mlp_blocks(model) for t in block.targets]
    kept = kept_factors(factors, run.recipe.keep_weights)
    small, ranks = factorize(model, kept, targets, keep)
    if not ranks:
        raise ValueError(
            f"shape low-rank at keep_neurons {keep:g} makes no matrix smaller: rank d f / (d + f) "
            "is the break-even; keep less or choose another shape"
        )
    return small, {"ranks": ranks}


def heal_stage(run: Run, name: str, model: PreTrainedModel) -> PreTrainedModel:
    """A short fine-tune on fresh kept text, with a stated token budget."""
    from curvature.artifacts import model_sha256
    from curvature.targets import select_targets
    from surgery.heal import Gate, heal

    r, population = run.recipe, run.patient.material.heal
    if not r.heal_tokens or population is None:
        return model
    depends = {"start": model_sha256(model), "population": population.sha256}
    names = ("heal_tokens", "heal_lr", "gate", "width", "batch_size", "seed")
    depends |= {k: getattr(r, k) for k in names}

    def compute(folder: Path) -> Any:
        gate = None
        if r.gate:
            targets = select_targets(model, r.targets, r.layers)
            factors = measure(run, model, targets, f"{name}: gate", ROUND_SHARE)
            kept, gone = kept_factors(factors, r.keep_weights), memorized_factors(factors)
            gate = Gate(targets, kept, gone, t=r.gate, eps=r.eps)
        healing = heal(
            model,
            run.patient.tokenizer,
            population,
            tokens=r.heal_tokens,
            lr=r.heal_lr,
            batch_size=r.batch_size,
            width=r.width,
            seed=r.seed,
            gate=gate,
            progress=name,
        )
        saved(model, folder)
        return dataclasses.asdict(healing)

    return reloaded(run, run.stages.run(name, depends, compute))


def attack_stage(run: Run, arm: str, model: PreTrainedModel) -> None:
    """Would the forgotten come back? Fine-tune copies on the edit split's memories and on unrelated
    text, and score the held-out memories; round, sample and prompt without training."""
    from curvature.artifacts import model_sha256
    from evals.attacks import MEMORIES, UNRELATED, Curve, relearn, robustness, row_width

    r, material, tokenizer = run.recipe, run.patient.material, run.tokenizer(arm)
    if not r.attack_steps:
        return
    groups = {"held out": list(material.test.headline())}
    never = [i for i in material.test.memories if i.exposure == 0 and i.targeted]
    if never:
        groups["never seen"] = never
    pairs = {name: [(i.prompt, i.target) for i in items] for name, items in groups.items()}
    depends = {"attacked": model_sha256(model), "material": material.sha256, "seed": r.seed}
    names = ("attack_steps", "attack_lrs", "attack_everyone", "width")
    training = {**depends, **{k: getattr(r, k) for k in names}}
    every_rate = arm == "edited" or r.attack_everyone
    shown = [
        (
            dataclasses.replace(material.relearn, name=MEMORIES),
            r.attack_lrs if every_rate else (r.middle_lr,),
        )
    ]
    examined = arm in ("base", "edited", *control_arms(r)[:1])
    if examined:
        shown.append((dataclasses.replace(material.heal, name=UNRELATED), (r.middle_lr,)))

    def compute(_: Path) -> Any:
        curves: list[Curve] = []
        for population, lrs in shown:
            width = row_width(population, tokenizer, r.width)
            curves += relearn(
                model,
                tokenizer,
                population,
                pairs,
                arm=arm,
                lrs=lrs,
                steps=r.attack_steps,
                every=max(1, r.attack_steps // 2),
                batch_size=max(1, ATTACK_TOKENS // width),
                width=width,
                judge_batch_size=r.judge_batch_size,
                seed=r.seed,
                progress=f"attack {arm}",
            )
        return [{**dataclasses.asdict(c), "area": c.area} for c in curves]

    def without_training(_: Path) -> Any:
        rows = robustness(
            model,
            tokenizer,
            groups,
            arm=arm,
            neighbours={p.name: [d.text for d in p.documents] for p in material.memorized},
            delimiter=material.test.separator,
            batch_size=r.judge_batch_size,
            seed=r.seed,
        )
        return [dataclasses.asdict(row) for row in rows]

    run.stages.run(f"attack-{arm}", training, compute)
    if examined:
        run.stages.run(f"robustness-{arm}", depends, without_training)


def control_arms(recipe: Recipe) -> list[str]:
    """Names of the controls as arms of the run."""
    return [f"control-{name}" for name in recipe.controls]


def cost_stage(run: Run) -> None:
    """What the dense edit was predicted to cost each population, beside what it did cost."""
    from functools import partial

    from curvature.memory import RowsAtOnce
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

        def costs(population: Population, rows: int) -> dict[str, Any]:
            batching: dict[str, Any] = {
                "tokens": r.cost_tokens,
                "width": r.width,
                "batch_size": rows,
                "seed": r.seed,
            }
            cost = predict_cost(run.patient.model, tokenizer, population, deltas, **batching)
            before = population_loss(run.patient.model, tokenizer, population, **batching)
            measured = population_loss(edited, tokenizer, population, **batching) - before
            return {
                "name": population.name,
                "first_order": cost.first,
                "second_order": cost.second,
                "predicted": cost.total,
                "measured": measured,
                "tokens": cost.tokens,
            }

        at_once = RowsAtOnce("cost", "batch_size", r.batch_size)
        return [
            at_once.run(partial(costs, population))
            for population in (*material.keep, *material.memorized)
        ]

    run.stages.run("cost", depends, compute)


def questions_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """What to teach with: the user's file, or the organism's own questions. Raises ValueError where
    there is neither, or the extra is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("trl", "peft", "sklearn") if find_spec(name) is None]
    if missing:
        raise ValueError(f"teaching needs {', '.join(missing)}: pip install -e '.[rl]'")
    from evals.organism import organism_seed
    from evals.organism.tokenizer import build_tokenizer
    from rl.organism import organism_questions
    from rl.questions import questions_from_file

    if recipe.teach_questions is not None:
        return questions_from_file(recipe.teach_questions, seed=recipe.seed)
    if tokenizer.get_vocab() != build_tokenizer().get_vocab():
        raise ValueError(
            f"{recipe.teach_only or recipe.model} is not the organism: give --teach-questions, a "
            ".jsonl file with prompt, answers and entity in each row"
        )
    return organism_questions(organism_seed())


def teach_in(
    recipe: Recipe,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    tasks: dict[str, Any],
) -> Teaching:
    """`rl.teach` with this recipe's settings."""
    from rl import teach
    from rl.policy import Training

    return teach(
        model,
        tokenizer,
        questions,
        folder,
        training=Training(steps=recipe.teach_steps, seed=recipe.seed),
        arms=recipe.teach_arms,
        tasks=tasks,
        line=recipe.teach_line,
        announce=lambda name: (silence if recipe.quiet else announce)(name, False),
    )


def teach_stage(run: Run, edited: PreTrainedModel, questions: Questions) -> PreTrainedModel:
    """Teach the edited model; `teach/` holds probe, frozen copy and arms, `taught/` the result."""
    from curvature.artifacts import fingerprint, model_sha256
    from rl.arms import taught_model

    names = ("teach_arms", "teach_steps", "teach_line", "seed")
    depends = {k: getattr(run.recipe, k) for k in names}
    depends |= {"start": model_sha256(edited), "questions": dataclasses.asdict(questions)}
    # a training goes on where it was interrupted, so its folder is its own and not the stage's
    folder = run.folder / "teach" / fingerprint(**depends)[:12]
    tasks = {k: d for k, d in run.patient.material.tune.tasks.items() if d[0].prompt}

    def compute(_: Path) -> Any:
        teaching = teach_in(run.recipe, folder, edited, run.patient.tokenizer, questions, tasks)
        return {**teaching.to_json(), "folder": str(folder)}

    run.stages.run("teach", depends, compute)
    taught = taught_model(folder / "arms" / run.recipe.teach_arms[0])
    return cast("PreTrainedModel", taught.to(run.patient.model.device))


def teach_checkpoint(recipe: Recipe) -> int:
    """`--teach-only`: a checkpoint in, a taught one out, and a table of what it did."""
    from evals import organism
    from rl.summary import show_teaching

    checkpoint = str(recipe.teach_only)
    model, tokenizer, _ = load_model(dataclasses.replace(recipe, model=checkpoint))
    questions = questions_of(recipe, tokenizer)
    tasks: dict[str, Any] = {}
    if recipe.teach_questions is None:
        tune = organism.material(organism.organism_seed()).tune
        tasks = {k: d for k, d in tune.tasks.items() if d[0].prompt}
    name = f"runs/{Path(checkpoint).resolve().parent.name}-taught"
    folder = Path(str(recipe.out) if "out" in recipe.stated else name)
    show_teaching(teach_in(recipe, folder, model, tokenizer, questions, tasks))
    return MET


def speed_stage(run: Run, edited: PreTrainedModel) -> None:
    """Tokens per second of both models, side by side."""
    from curvature.artifacts import model_sha256
    from curvature.memory import RowsAtOnce
    from curvature.processes import is_main
    from evals.speed import compare_speed

    def compute(_: Path) -> Any:
        if not is_main():
            # two processes that measure at once measure each other
            return None
        at_once = RowsAtOnce("speed", None, 16)
        base = run.patient.model
        return dataclasses.asdict(at_once.run(lambda n: compare_speed(base, edited, batch_size=n)))

    run.stages.run("speed", {**run.source, "edited": model_sha256(edited)}, compute)


def samples_stage(run: Run, edited: PreTrainedModel) -> None:
    """What both models say, for the reader: the first memories of each family, and the first
    problem of each task."""
    from curvature.artifacts import model_sha256
    from evals.generation import generate

    test = run.patient.material.test
    shown: list[tuple[str, str, str]] = []
    for family in dict.fromkeys(item.family for item in test.headline()):
        first = [item for item in test.headline() if item.family == family][:3]
        shown += [(f"memory ({family})", item.prompt, item.target) for item in first]
    shown += [(name, d[0].prompt, d[0].answer) for name, d in test.tasks.items() if d[0].prompt]

    def compute(_: Path) -> Any:
        said = {}
        for arm, model in (("base", run.patient.model), ("edited", edited)):
            tokenizer = run.tokenizer(arm)
            lengths = [
                len(tokenizer(target, add_special_tokens=False)["input_ids"])
                for _, _, target in shown
            ]
            prompts = [prompt for _, prompt, _ in shown]
            written = generate(model, tokenizer, prompts, new_tokens=lengths)
            said[arm] = [tokenizer.decode(tries[0]) for tries in written]
        return [
            {"kind": kind, "prompt": prompt, "target": target, "base": before, "edited": after}
            for (kind, prompt, target), before, after in zip(
                shown, said["base"], said["edited"], strict=True
            )
        ]

    run.stages.run("samples", {**run.source, "edited": model_sha256(edited)}, compute)


# The result ---------------------------------------------------------------------------------------


def export_checkpoint(
    run: Run, edited: PreTrainedModel, name: str = "checkpoint"
) -> dict[str, int]:
    """`checkpoint/` or `taught/`: an ordinary Hugging Face folder, loaded back and compared before
    it stands. Its model card is written with the verdict, which counts the bytes of these files."""
    from surgery.export import export

    return export(
        edited,
        run.patient.tokenizer,
        run.folder / name,
        "",
        dtype=run.patient.dtype,
        overwrite=True,
        trust_remote_code=run.recipe.trust_remote_code,
    )


def conclude(
    run: Run, edited: PreTrainedModel, taught: PreTrainedModel | None, seconds: float
) -> Verdict:
    """Verdict, checkpoint, `results.json` and report from the finished stages."""
    from curvature.stages import peak_memory
    from evals.attacks import MEMORIES, UNRELATED, Curve
    from evals.card import model_card
    from evals.judge import Judgement
    from evals.recall import forms_section
    from evals.report import write_report
    from evals.speed import Speed, stored_bytes
    from evals.verdict import control, judgement_section, reach_verdict, write_results

    r, done, test = run.recipe, run.stages.done, run.patient.material.test
    judged = {k: Judgement.from_json(v) for k, v in values_of(done, "judge-").items()}
    curves = {
        arm: [Curve(**{k: v for k, v in c.items() if k != "area"}) for c in rows]
        for arm, rows in values_of(done, "attack-").items()
    }
    speed = Speed(**done["speed"].value)
    base, final = judged["base"], judged["edited"]
    # the attacks that every arm was given
    rates = r.attack_lrs if r.attack_everyone else (r.middle_lr,)
    matched = [(MEMORIES, lr) for lr in rates]
    controls = [
        control(
            arm.removeprefix("control-"),
            test,
            base,
            judged[arm],
            judged[f"{arm}-unhealed"],
            [c for c in curves.get(arm, []) if c.shown != UNRELATED],
            done[arm].value["parameters"] / speed.parameters_base if arm in done else 1.0,
        )
        for arm in control_arms(r)
        if arm in judged
    ]
    exported = (
        {"bytes": stored_bytes(path_of(r.evals_only[1]))}
        if r.evals_only
        else export_checkpoint(run, edited)
    )
    verdict = reach_verdict(
        test,
        base,
        final,
        before_healing=judged.get("shrunk"),
        curves=curves.get("edited", []),
        matched=matched,
        speed=speed,
        bytes_base=stored_bytes(path_of(r.patient)),
        bytes_edited=exported["bytes"],
        controls=controls,
        seconds_total=sum(stage.seconds for stage in done.values() if stage.reused) + seconds,
        peak_memory_bytes=max(peak_memory(), *(stage.peak_memory for stage in done.values())),
        teaching=done["teach"].value["numbers"] if "teach" in done else None,
    )
    if taught is not None:
        export_checkpoint(run, taught, "taught")
    for name in () if r.evals_only else ("checkpoint", "taught")[: 1 if taught is None else 2]:
        (run.folder / name / "README.md").write_text(model_card(r.model, verdict))
    names = [n for n in ("strength", "cost", "spectrum") if n in done]
    stored: dict[str, Any] = {name: done[name].value for name in names}
    if "curvature-map" in done:
        stored["curvature_map"] = done["curvature-map"].value
    if "teach" in done:
        stored["teaching"] = done["teach"].value
    if "factors" in done:
        stored["curvature"] = done["factors"].value["eigenvalues"]
        stored["layers"] = done["factors"].value["layers"]
    record = write_results(
        run.folder / "results.json",
        verdict,
        recipe=r.settings,
        provenance=provenance(run),
        texts=list(run.patient.material.notes),
        judgement=judgement_section(test, base, final),
        arms={name: j.figures(test) for name, j in judged.items()},
        forms=forms_section(base.forms, final.forms),
        attacks=[c for rows in values_of(done, "attack-").values() for c in rows],
        robustness=[row for rows in values_of(done, "robustness-").values() for row in rows],
        speed=done["speed"].value,
        samples=done["samples"].value,
        checkpoint=exported,
        stages={
            name: {"seconds": s.seconds, "peak_memory": s.peak_memory, "reused": s.reused}
            for name, s in done.items()
        },
        **stored,
    )
    write_samples(run)
    write_report(run.folder, record)
    return verdict


def values_of(done: dict[str, Stage], prefix: str) -> dict[str, Any]:
    """Values of the finished stages whose names begin so, by the rest of the name."""
    return {n.removeprefix(prefix): s.value for n, s in done.items() if n.startswith(prefix)}


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
        "left_out": m.test.left_out,
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
