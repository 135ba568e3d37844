"""The monitor that is shipped is the one that was tested."""

import pytest

from rl import Monitor
from rl.outcomes import behind_monitor
from rl.sampling import sample_answers

THRESHOLD = 0.5


@pytest.fixture
def monitor(organism, tokenizer, probe, questions):
    return Monitor(
        organism,
        tokenizer,
        probe,
        abstention=questions.abstention,
        new_tokens=questions.new_tokens,
    )


def test_at_run_time_it_silences_what_it_silenced_in_the_test(
    organism, tokenizer, probe, questions, monitor
):
    """Claims and malformed answers alike, at scores on both sides of the threshold."""
    answers = sample_answers(
        organism, tokenizer, questions.rl, questions, tries=2, temperature=2.0, seed=1
    )
    answers = [a for a in answers if a.tokens]
    assert {a.outcome for a in answers} == {"right", "wrong", "abstained", "malformed"}
    for score in (0.1, 0.9):
        claims = [score for a in answers if a.is_claim]
        tested = behind_monitor(answers, claims, THRESHOLD, [1])
        shipped = [
            monitor._shielded(monitor._weighed(a.tokens, score)[1], THRESHOLD) for a in answers
        ]
        assert [a.abstained for a in shipped] == [a.outcome == "abstained" for a in tested]


def test_what_is_cut_off_is_silenced_wherever_a_threshold_is_set(monitor):
    monitor.new_tokens = 1
    prompts = ["question : where does Bamidu live ? answer :"] * 4
    shielded = monitor.answer(prompts, threshold=0.0)
    assert all(a.abstained and a.malformed for a in shielded)
    assert {a.text for a in shielded} == {monitor.abstention}
    plain = monitor.answer(prompts)
    assert all(a.malformed and not a.abstained for a in plain)
