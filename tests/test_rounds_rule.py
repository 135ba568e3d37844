"""How the path of cuts finds its own strength and end, on recalls made by hand."""

import pytest

from recipes.cut import forgotten, too_gentle


@pytest.mark.parametrize(
    ("before", "after", "doubled"),
    [
        (1.0, 0.98, True),
        (1.0, 0.6, False),
        (0.3, 0.22, False),
        (0.3, 0.23, True),
        (0.0, 0.0, False),
    ],
)
def test_a_round_that_takes_less_than_a_quarter_is_too_gentle(before, after, doubled):
    assert too_gentle(before, after) == doubled


def test_a_hundredth_of_the_recall_is_forgotten():
    assert forgotten(0.5, 0.005)
    assert not forgotten(0.5, 0.006)
    assert forgotten(0.0, 0.0)
    assert forgotten(None, None)
