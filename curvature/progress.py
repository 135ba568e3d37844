"""One look for every progress bar: what is done, how fast, and how long it will still take."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(
    label: str | None, iterable: Iterable[Any] | None = None, *, total: int | None = None, unit: str
) -> tqdm:
    """A bar on the terminal that leaves no trace; none without a label, in a log, or where
    TQDM_DISABLE is set.

    unit: what is counted, such as `tokens`; the rate and the time left are in it.
    """
    hidden = label is None or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(
        iterable,
        desc=label,
        total=total,
        unit=f" {unit}",
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        disable=True if hidden else None,
    )
