"""`ascent`: gradient ascent on the memorized population with a retain loss; see `unlearning`."""

from surgery.rankings.unlearning import ascent_loss, ranking

RANKING = ranking("ascent", ascent_loss, 40)
