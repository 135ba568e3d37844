"""The policy and its training: TRL's GRPO against the saved frozen copy.

GRPO (arXiv 2402.03300) in Dr. GRPO's form (arXiv 2503.20783: no division by the group's standard
deviation or the answer's length): advantage = reward - mean reward of the group; the KL penalty
holds the policy to the *saved* model. TRL loads that reference from `config._name_or_path`, so the
policy itself is loaded from the folder, and both are compared before the first step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from rl.probe import Probe
from rl.questions import Questions
from rl.rewards import Reward, frozen_copy, live_copy

SMALL = 50_000_000
"""Parameters up to which a model takes, and needs, the higher learning rate."""
RATES: dict[tuple[str, bool], float] = {
    ("lora", True): 1e-3,
    ("lora", False): 1e-4,
    ("full", True): 5e-4,
    ("full", False): 1e-6,
}
"""Learning rates by what is trained, and whether the model is small."""
SAME = 1e-4
"""Largest difference of logits between policy and reference at step 0."""


@dataclass(frozen=True)
class Training:
    """Settings of the reinforcement learning.

    weights: LoRA adapters (arXiv 2106.09685), or all weights. Adapters forget less of what is not
    asked in training (arXiv 2405.09673), and with them off the policy is the frozen copy. lr: by
    `RATES` where None. prompts: questions per step, each answered `generations`
    times. beta: weight of the KL penalty: at its optimum an abstention gains exp((t - p) / beta) in
    odds over a claim that the probe gives p, so .1 stops half-way and .04 does not. every: steps
    between audits (and saved states).
    """

    steps: int = 120
    prompts: int = 8
    generations: int = 8
    lr: float | None = None
    beta: float = 0.04
    every: int = 40
    weights: Literal["full", "lora"] = "lora"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"teaching: {name} is {getattr(self, name)}: expected at least 1")
        if self.generations < 2:
            raise ValueError(
                f"teaching: generations is {self.generations}: a group needs at least 2 answers to "
                "compare"
            )


class _Trainer(GRPOTrainer):
    """GRPO, plus, for the positive control, a loss through the live probe."""

    live_probe: tuple[Probe, float] | None = None

    def load(self, saved: str) -> None:
        """The policy as it was saved at `saved`, without training on."""
        self._load_from_checkpoint(saved)

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.live_probe is None:
            return loss
        probe, weight = self.live_probe
        tokenizer: Any = self.processing_class
        end = tokenizer.eos_token_id
        rows = []
        for prompt, mask, answer, kept in zip(
            inputs["prompt_ids"],
            inputs["prompt_mask"],
            inputs["completion_ids"],
            inputs["completion_mask"],
            strict=True,
        ):
            said = [t for t in answer[kept.bool()].tolist() if t != end]
            if said:
                rows.append((prompt[mask.bool()].tolist(), said))
        if not rows:
            return loss
        scores = probe.live(live_copy(self.accelerator.unwrap_model(model)), tokenizer, rows)
        return loss - weight * scores.mean()


class _EachStep(TrainerCallback):
    """Calls back when training begins, with the weights of a saved state loaded, and after every
    optimizer step; True stops the training."""

    def __init__(self, begin: Callable[[], None], after: Callable[[int], bool]) -> None:
        self.begin, self.after = begin, after

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.begin()
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.after(int(state.global_step)):
            control.should_training_stop = True
        return control


def check_dataset(questions: Questions, training: Training) -> None:
    """Raise ValueError where the `rl` split does not fill one generation batch: TRL would train for
    no step and say nothing."""
    if len(questions.rl) < training.prompts:
        raise ValueError(
            f"{questions.source}: the rl split has {len(questions.rl)} questions, fewer than one "
            f"generation batch of {training.prompts}: give more questions or lower prompts"
        )


def balanced(known: Sequence[bool]) -> list[int]:
    """Places of questions for training, the fewer of the known and the unknown ones repeated until
    both are as many: where most prompts are better met with silence, silence is what is learned."""
    knows = [k for k, right in enumerate(known) if right]
    unknown = [k for k, right in enumerate(known) if not right]
    few, many = sorted((knows, unknown), key=len)
    if not few:
        return many
    return many + [few[k % len(few)] for k in range(len(many))]


def batches(lengths: Sequence[int], places: Sequence[int], training: Training) -> list[int]:
    """Places in the order of training, `prompts` of them per step, and prompts of a step of like
    length (within a factor of two), because the longest one sets the cost of all. Each length comes
    as often as its share; each question of a length comes before any comes again. lengths: tokens
    of the prompt at each place."""
    rng = random.Random(training.seed)
    groups: dict[int, list[int]] = {}
    for k in places:
        groups.setdefault(lengths[k].bit_length(), []).append(k)
    waiting: dict[int, list[int]] = {size: [] for size in groups}
    sizes, weights = list(groups), [len(group) for group in groups.values()]
    out: list[int] = []
    for size in rng.choices(sizes, weights, k=training.steps):
        while len(waiting[size]) < training.prompts:
            waiting[size] += rng.sample(groups[size], len(groups[size]))
        out += waiting[size][: training.prompts]
        del waiting[size][: training.prompts]
    return out


def load_policy(reference: str | Path, training: Training, device: torch.device) -> Any:
    """A trainable copy of the saved frozen copy, on `device`.

    All weights are trained, and then saved, in single precision: a step of 1e-6 is far less than
    half the distance between two bfloat16 numbers (1e-4 at .02), so it would be rounded away.
    Adapters are in single precision too, beside weights as they were saved.
    """
    full = training.weights == "full"
    dtype = torch.float32 if full else "auto"
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype)
    model = model.to(device)  # type: ignore[arg-type]
    if full:
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)  # one factor of an adapter begins at random
        return get_peft_model(model, settings)


def build_trainer(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    reward: Reward,
    training: Training,
    folder: Path,
    *,
    after: Callable[[int], bool],
    begin: Callable[[], None] = lambda: None,
    live_gradient: float = 0.0,
    line: str = "",
    asked: Sequence[int] | None = None,
) -> _Trainer:
    """A trainer whose KL reference is the saved frozen copy. begin, after: called when training
    begins (with a saved state loaded), and after each step, with its number; True stops it. line:
    put before the prompts in training, and only there. asked: places in the `rl` split of the
    questions to train on, all of it where None."""
    check_dataset(questions, training)
    adapters = hasattr(policy, "disable_adapter")
    device = next(policy.parameters()).device.type
    size = sum(p.numel() for p in policy.parameters())
    config = GRPOConfig(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.prompts * training.generations,
        num_generations=training.generations,
        steps_per_generation=1,
        max_completion_length=questions.new_tokens,
        temperature=1.0,
        top_k=0,
        learning_rate=training.lr or RATES["lora" if adapters else "full", size <= SMALL],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        beta=training.beta,
        loss_type="dr_grpo",
        scale_rewards="none",
        seed=training.seed,
        data_seed=training.seed,
        shuffle_dataset=False,
        use_cpu=device == "cpu",
        bf16=False,
        gradient_checkpointing=device != "cpu",
        save_strategy="steps",
        save_steps=training.every,
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    lengths = [len(tokenizer(q.prompt)["input_ids"]) for q in questions.rl]
    places = batches(lengths, asked or range(len(questions.rl)), training)
    dataset = Dataset.from_dict(
        {
            "prompt": [line + questions.rl[k].prompt for k in places],
            "question": places,
        }
    )
    trainer = _Trainer(
        model=policy,
        reward_funcs=reward,  # type: ignore[arg-type]
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[_EachStep(begin, after)],
    )
    # without a bar it would print its record in the middle of ours
    trainer.remove_callback(PrinterCallback)
    if live_gradient:
        trainer.live_probe = (reward.probe, live_gradient)
    return trainer


@torch.no_grad()
def check_reference(trainer: GRPOTrainer, tokenizer: Any, prompts: Sequence[str]) -> None:
    """Raise ValueError where the KL reference is not the policy before its first step."""
    policy = live_copy(trainer.model)
    ids = tokenizer(list(prompts[:8]), return_tensors="pt", padding=True).to(policy.device)
    model: Any = trainer.model
    model.eval()
    mine = policy(**ids).logits
    if trainer.ref_model is not None:
        theirs = trainer.ref_model.eval()(**ids).logits
    else:
        with frozen_copy(trainer.model) as frozen:
            theirs = frozen(**ids).logits
    kept = ids["attention_mask"].bool()
    difference = float((mine - theirs)[kept].abs().max())
    if not difference <= SAME:
        raise ValueError(
            f"the KL reference is not the policy at step 0 (logits differ by {difference:.2g}): it "
            f"was loaded from {policy.config._name_or_path!r}, which does not hold this model"
        )


def resume_point(folder: Path) -> str | None:
    """The last saved state of an interrupted training, None where there is none."""
    saved = sorted(
        (p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()),
        key=lambda p: int(p.name.rsplit("-", 1)[1]),
    )
    return str(saved[-1]) if saved else None


def merged(policy: Any) -> Any:
    """The policy as an ordinary model: adapters merged into the weights."""
    model = policy.merge_and_unload() if hasattr(policy, "merge_and_unload") else policy
    if any(not math.isfinite(float(p.detach().abs().max())) for p in model.parameters()):
        raise ValueError("the taught weights are not finite: lower the learning rate")
    return model.eval()
