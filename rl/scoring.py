"""How well a probe reads, beside what it has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.comparison import Interval
from rl.claims import Claims
from rl.fitting import regression
from rl.measures import auroc, auroc_interval, calibration_error, paired_gain
from rl.probe import Probe, linear_position
from rl.states import Row

FLOOR = 0.75
"""AUROC below which the probe is no reward."""
SHUFFLES = 20
"""Times that the labels are shuffled for the control."""


@dataclass(frozen=True)
class Scores:
    """How well something tells right claims from wrong ones on one split.

    recall: by false-alarm rate, the share of the wrong claims flagged at the threshold that the
    calibration split set. kinds: AUROC within each kind of question that has both classes.
    """

    name: str
    split: str
    claims: int
    right: float
    auroc: Interval
    ece: float | None = None
    recall: Mapping[str, float] = field(default_factory=dict)
    kinds: Mapping[str, float] = field(default_factory=dict)


def score_probe(
    probe: Probe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    claims: Claims,
    split: str,
    seed: int = 0,
) -> Scores:
    """The probe on one split."""
    p = probe.score(model, tokenizer, claims.rows)
    wrong = p[claims.right == 0]
    recall = {rate: float((wrong < bar).mean()) for rate, bar in probe.thresholds.items()}
    ece = calibration_error(claims.right, p)
    return _scores("probe", split, claims, p, seed, ece, recall)


def _scores(
    name: str,
    split: str,
    claims: Claims,
    values: np.ndarray,
    seed: int,
    ece: float | None = None,
    recall: Mapping[str, float] | None = None,
) -> Scores:
    kinds = {
        k: auroc(claims.right[claims.kinds == k], values[claims.kinds == k])
        for k in sorted(set(claims.kinds))
    }
    return Scores(
        name,
        split,
        len(claims.right),
        float(claims.right.mean()),
        auroc_interval(claims.right, values, claims.entities, seed),
        ece,
        recall or {},
        {k: v for k, v in kinds.items() if np.isfinite(v)},
    )


def baselines(
    probe: Probe,
    tokenizer: PreTrainedTokenizerBase,
    fit: Claims,
    claims: Claims,
    split: str,
    seed: int = 0,
) -> tuple[list[Scores], np.ndarray]:
    """What a probe has to beat, on one split: the answer's log-probability (sum), a bag of words
    over question and answer, and the same regression on shuffled labels. Also the bag's scores."""
    bag = bag_of_words(tokenizer, fit, claims)
    logprob = claims.states.logprob.numpy()
    return [
        _scores("log-probability of the answer", split, claims, logprob, seed),
        _scores("bag of words", split, claims, bag, seed),
        shuffled_labels(probe, fit, claims, split, seed),
    ], bag


def shuffled_labels(probe: Probe, fit: Claims, claims: Claims, split: str, seed: int = 0) -> Scores:
    """The probe's regression on shuffled labels: mean AUROC over shuffles, and the range of 95 % of
    them. One shuffle says nothing: along few features its direction is right or wrong by luck."""
    rng = np.random.default_rng(seed)
    position = linear_position(probe)
    known, asked = (c.states.pooled[position][:, probe.layer].numpy() for c in (fit, claims))
    values = [
        auroc(
            claims.right,
            regression().fit(known, rng.permutation(fit.right)).decision_function(asked),
        )
        for _ in range(SHUFFLES)
    ]
    low, high = np.quantile(values, (0.025, 0.975))
    return Scores(
        "shuffled labels",
        split,
        len(claims.right),
        float(claims.right.mean()),
        Interval(float(np.mean(values)), float(low), float(high)),
    )


def bag_of_words(tokenizer: PreTrainedTokenizerBase, fit: Claims, claims: Claims) -> np.ndarray:
    """Scores of a logistic regression on token counts of question and answer (apart)."""

    def words(rows: Sequence[Row]) -> list[list[str]]:
        return [
            [f"q{t}" for t in tokenizer(prompt)["input_ids"]] + [f"a{t}" for t in answer]
            for prompt, answer in rows
        ]

    vectorizer = CountVectorizer(analyzer=lambda tokens: tokens)
    counts = vectorizer.fit_transform(words(fit.rows))
    logistic = LogisticRegression(C=1.0, class_weight="balanced", max_iter=500)
    logistic.fit(counts, fit.right)
    return logistic.decision_function(vectorizer.transform(words(claims.rows)))


def check_worth(
    probe: Probe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    claims: Claims,
    bag: np.ndarray,
    seed: int = 0,
) -> None:
    """Raise ValueError where the probe is no reward: AUROC below the floor, or no better than a bag
    of words (paired bootstrap)."""
    p = probe.score(model, tokenizer, claims.rows)
    value = auroc(claims.right, p)
    if value < FLOOR:
        raise ValueError(
            f"the probe's AUROC on the calibration split is {value:.3f}, below {FLOOR}: its "
            "probabilities would be a misleading reward; give more questions"
        )
    gain = paired_gain(claims.right, p, bag, claims.entities, seed=seed)
    if gain.low <= 0:
        raise ValueError(
            f"a bag of words does as well as the probe (AUROC {value - gain.value:.3f} against "
            f"{value:.3f}): the questions' wording gives the answer away; ask known and unknown "
            "things in the same words"
        )
