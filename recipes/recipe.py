"""Everything that a user can set in one run, checked before any work."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from evals.reasoning import Benchmarks
    from surgery.search import Goals

ORGANISM_RECIPE = Path(__file__).parent / "organism.yaml"


NOT_SAVED = tuple(
    "update quiet teach_only scan_only measure_only plan_only ask run push_to_hub stated "
    "compare".split()
)
"""Settings that say what to do with a recipe: no part of it, and no reason to run a stage again."""
DAMPINGS = (0.03, 0.1, 0.3)
"""Dampings of `contrast` that a search chooses between: which one suits differs from model to
model. The first one is taken where nothing is searched."""


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
        rounds: Cuts that `contrast` makes, measured again after every one. With a strength all of
            them are made; without one the tune split says how strong they are and where to stop:
            where nothing is recited or nearly so, where the goals allow no more, or after twice as
            many. 1 for a single cut.
        harden: Further rounds of `contrast` at most, against what a short relearning of half of the
            edit split's memories brings back of the other half.
        eps: Damping of `contrast`. By default .03; where the search tries several candidates it
            chooses between .03, .1 and .3.
        keep_weights: Weights of the kept populations by name (reasoning, reference; on the organism
            reasoning, language, listed knowledge); equal by default. In rounds these are the
            weights to begin with: what loses weighs more in the next one.
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
        heal_teacher: Share of what the healing learns that is what the model said before it was
            shrunk (of a control: the base), 0 to 1; the rest is the text itself.
        gate: Strength that keeps the healing's updates off the directions that serve memory; 0 for
            none.
        controls: Neuron rankings that are given the same parameter count, the same refit and the
            same healing; or `svd`: MLP matrices of low rank instead.
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
        teach_updates: free; watched (the report says how much of the updates falls on what serves
            the memorized text, which takes one more measurement of the curvature); or held (that
            part is taken off after every step; all weights are trained then, not adapters).
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
    eps: float | None = None
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
    heal_lr: float = 5e-4
    heal_teacher: float = 0.5
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
    teach_steps: int = 120
    teach_line: str = ""
    teach_updates: Literal["free", "watched", "held"] = "free"
    quiet: bool = False
    ask: str | None = None
    run: str | None = None
    push_to_hub: str | None = None
    stated: tuple[str, ...] = ()
    evals_only: tuple[str, ...] = ()
    compare: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """All that a replay needs, as plain data."""
        values = dataclasses.asdict(self)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {k: v for k, v in plain.items() if k not in NOT_SAVED}

    @property
    def patient(self) -> str:
        """The checkpoint that is operated on, or the first of two that are only judged."""
        return self.evals_only[0] if self.evals_only else self.model

    @property
    def in_rounds(self) -> bool:
        """Whether the dense edit is a path of small cuts, measured again after each."""
        return self.method == "contrast" and self.rounds > 1

    @property
    def neurons_kept(self) -> float:
        """`keep_neurons` as given, or .6; the goal `shrink` goes before it."""
        return 0.6 if self.keep_neurons is None else self.keep_neurons

    @property
    def damping(self) -> float:
        """The damping of `contrast` where no search has chosen another one."""
        return DAMPINGS[0] if self.eps is None else self.eps

    @property
    def middle_lr(self) -> float:
        """The learning rate of the relearning attack that every arm is given."""
        return sorted(self.attack_lrs)[len(self.attack_lrs) // 2]


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
        if setting != "method" and not ranks_neurons and setting != "controls svd":
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
    positive = {
        "eps": (recipe.damping,),
        "heal_lr": (recipe.heal_lr,),
        "attack_lrs": recipe.attack_lrs,
    }
    for setting, values in positive.items():
        for value in values:
            if not 0 < value < math.inf:
                raise ValueError(f"{setting} is {value}: expected a number above 0")
    if not 0 <= recipe.heal_teacher <= 1:
        raise ValueError(f"heal_teacher is {recipe.heal_teacher}: expected a share, 0 to 1")
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


def goals_of(recipe: Recipe) -> Goals:
    """What the user asked for, as the search has it."""
    from surgery.search import Goals

    return Goals(recipe.keep_reasoning, recipe.keep_perplexity, recipe.forget, recipe.shrink)


def benchmarks(recipe: Recipe) -> Benchmarks:
    """Tasks of lm-eval by name, as the recipe asks for them."""
    from evals.reasoning import Benchmarks

    return Benchmarks(recipe.tasks, recipe.num_fewshot, recipe.limit, recipe.apply_chat_template)


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
