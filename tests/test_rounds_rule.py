"""How the path of cuts finds its own strength and end, on recalls made by hand."""

import pytest

from recipes.cut import forgotten, too_gentle


@pytest.mark.parametrize(
    ("base", "before", "after", "doubled"),
    [
        (1.0, 1.0, 0.98, True),
        (1.0, 1.0, 0.6, False),
        (1.0, 0.3, 0.22, False),
        (1.0, 0.3, 0.23, True),
        (1.0, 0.11, 0.1, False),
        (0.5, 0.11, 0.1, True),
        (1.0, 0.02, 0.02, False),
        (0.0, 0.0, 0.0, False),
        (None, None, None, False),
    ],
)
def test_a_round_that_takes_less_than_a_quarter_is_too_gentle(base, before, after, doubled):
    assert too_gentle(base, before, after) == doubled


def test_a_hundredth_of_the_recall_is_forgotten():
    assert forgotten(0.5, 0.005)
    assert not forgotten(0.5, 0.006)
    assert forgotten(0.0, 0.0)
    assert forgotten(None, None)
