"""`npo`: negative preference optimization with a retain loss; see `unlearning`."""

from surgery.rankings.unlearning import npo_loss, ranking

RANKING = ranking("npo", npo_loss, 60)
