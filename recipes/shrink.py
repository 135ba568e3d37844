"""The stages that make the model smaller and heal it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from curvature.artifacts import model_sha256
from curvature.factors import Factors
from curvature.populations import batches
from curvature.processes import is_main
from curvature.stages import Stage
from curvature.targets import count_parameters, mlp_blocks, select_targets
from recipes.measure import ROUND_SHARE, factors_stage, kept_factors, measure, memorized_factors
from recipes.patient import Run
from surgery.export import save_weights
from surgery.heal import Gate, heal
from surgery.plan import save_plan
from surgery.rankings import RANKINGS, plan_surgery
from surgery.repair import refit, refit_in_order, with_mlp_bias
from surgery.search import best_layers
from surgery.shrink import drop_layers, factorize, neurons_for, shrink, singular_share_for


def saved(model: PreTrainedModel, folder: Path) -> None:

    if is_main():
        save_weights(model, folder / "model")


def reloaded(run: Run, stage: Stage) -> PreTrainedModel:
    """A stage's model, always from its files: a run and its replay compute on the same bytes."""
    folder = stage.folder / "model"
    # the only code that is run unasked is the modelling file that this run wrote
    own_code = (folder / "modeling_lethe.py").exists()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=run.recipe.trust_remote_code or own_code
    )
    return model.to(run.patient.model.device).eval()  # type: ignore[arg-type]


def shrink_stage(run: Run, name: str, model: PreTrainedModel, ranking: str) -> PreTrainedModel:
    """Make the model smaller for good, and refit what stays on the kept populations. Controls lose
    neurons (`svd`: ranks), as many as gives them the parameters of the shrunk model."""
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
        if ranking == "svd":
            smaller = run.stages.done["shrink"].value["parameters"]
            small, record = thinner(model, smaller / count_parameters(model))
        elif control or r.shape in ("uniform", "ragged"):
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


def thinner(model: PreTrainedModel, parameters: float) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The control `svd`: every MLP matrix cut to its own largest singular values, until this share
    of all parameters stays. No data, and nothing to refit."""
    targets = [t for block in mlp_blocks(model) for t in block.targets]
    share = singular_share_for(model, targets, parameters)
    small, ranks = factorize(model, None, targets, share)
    return small, {"ranks": ranks}


def other_shape(
    run: Run, model: PreTrainedModel, factors: dict[str, dict[str, Factors]], keep: float
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Whole layers out (those with the most memory for what is kept), or MLP matrices as products
    of two thin ones where that is smaller."""
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


def heal_stage(
    run: Run, name: str, model: PreTrainedModel, before: PreTrainedModel
) -> PreTrainedModel:
    """A short fine-tune on fresh kept text, with a stated token budget. before: the model that
    `model` was made of, which teaches it where it is larger."""
    r, population = run.recipe, run.patient.material.heal
    if not r.heal_tokens or population is None:
        return model
    depends: dict[str, Any] = {"start": model_sha256(model), "population": population.sha256}
    names = ("heal_tokens", "heal_lr", "gate", "width", "batch_size", "seed")
    depends |= {k: getattr(r, k) for k in names}
    taught = r.heal_teacher > 0 and count_parameters(model) < count_parameters(before)
    if taught:
        depends |= {"teacher": model_sha256(before), "heal_teacher": r.heal_teacher}

    def compute(folder: Path) -> Any:
        gate = None
        if r.gate:
            targets = select_targets(model, r.targets, r.layers)
            factors = measure(run, model, targets, f"{name}: gate", ROUND_SHARE)
            kept, gone = kept_factors(factors, r.keep_weights), memorized_factors(factors)
            gate = Gate(targets, kept, gone, t=r.gate, eps=r.damping)
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
            teacher=before if taught else None,
            teacher_share=r.heal_teacher,
            progress=name,
        )
        saved(model, folder)
        return dataclasses.asdict(healing)

    return reloaded(run, run.stages.run(name, depends, compute))
