"""Whether new items are still like those the codebooks were learned from, and if retraining is due.

Three things are compared, which cost next to nothing to keep or to count: how far items are from what their codes
decode to, beside what is to be expected of vectors that training did not see (:func:`unseen_bias`); how evenly they
fill the shelves of the first level; and how many repeat an ID, among as many of the first and of the newest items.
(Collisions with all earlier items grow with any catalogue.) The sums of squared errors are kept in the settings of the
index, and written in the transaction that writes the items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index.records import Drift

ERROR_LIMIT = 1.15
"""Times the error that was to be expected, from which retraining is due."""
PERPLEXITY_LIMIT = 0.75
"""Times the perplexity of the first level at training, below which retraining is due."""
REPEATED_LIMIT = 0.10
"""From so many more of the newest items than of the first ones on that repeat an ID, retraining is due."""
LEAST_SHARE = 0.05
"""Of the items have to be new for retraining to pay."""
LEAST_ITEMS = 100
"""New items, below which nothing can be told."""
_LARGEST_BIAS = 2.0  # of codebooks learned from few vectors; beyond, the formula means nothing


def counted(
    before: Mapping[str, Any] | None, *, items: int, error: float, first_row: int, next_row: int
) -> dict[str, Any]:
    """The sums, with those of some more items, which have the rows from ``first_row`` to before ``next_row``.

    The items encoded first after training are kept apart from those that come later.
    """
    more = {"items": items, "error": error}
    if before is None:
        if first_row:  # others were added by a version of this package that did not count
            return {"since": first_row, "first": None, "later": more}
        return {"since": next_row, "first": more, "later": {"items": 0, "error": 0.0}}
    later = before["later"]
    return {**before, "later": {"items": later["items"] + items, "error": later["error"] + error}}


def assess(
    sums: Mapping[str, Any] | None,
    train_report: Mapping[str, Any],
    *,
    items: int,
    shelves: NDArray[np.int64] | None = None,
    repeated: tuple[float, float] | None = None,
) -> Drift:
    """Compare the items with the training.

    ``items``: how many there are. ``shelves``: how many of them have each code of the first level; None for codes
    without shelves. ``repeated``: the shares of the first and of the newest items, as many of either, that repeat the
    ID of another of them.
    """
    if sums is None:
        why = "no items were added since it was trained" if not items else "its items were added by an older version"
        return Drift(0, 0.0, None, None, None, None, None, None, False, f"Retraining is not due: {why}.")
    levels, first, later = train_report["levels"], sums["first"], sums["later"]
    part = later if later["items"] else first
    trained = levels[-1]["error"] * unseen_bias(train_report["rows"], levels) if levels else _mean(first)
    at_training = levels[0]["perplexity"] if levels and shelves is not None else None
    drift = Drift(
        items=part["items"],
        share=min(part["items"] / max(items, 1), 1.0),
        error=_mean(part),
        expected_error=trained,
        perplexity=None if at_training is None or shelves is None else _perplexity(shelves),
        perplexity_at_training=at_training,
        repeated=None if repeated is None else repeated[1],
        repeated_first=None if repeated is None else repeated[0],
        due=False,
        reason="",
    )
    which = f"the {drift.items:,} items added " + ("since the first" if later["items"] else "first")
    if due := _why_due(drift, which):
        return replace(drift, due=True, reason=f"Retraining is due: {due}.")
    return replace(drift, reason=f"Retraining is not due: {_why_not(drift, which)}.")


def unseen_bias(rows: int, levels: Sequence[Mapping[str, Any]]) -> float:
    """How much larger the error is on vectors that training did not see, if they are of the same kind.

    A codeword that is the mean of m vectors is nearer to them than to others: they keep (1 - 1/m) of their variance,
    others get (1 + 1/m) of it. With K codewords for n vectors that is (n + K) / (n - K), at each level. On real
    embeddings it comes within some percent of the truth; where vectors have no structure at all, it is too little.
    """
    bias = 1.0
    for level in levels:
        size = min(level["codebook_size"], rows / 2)
        bias *= (rows + size) / (rows - size)
    return min(bias, _LARGEST_BIAS)


def _why_due(drift: Drift, which: str) -> str | None:
    if _too_few(drift):
        return None
    ratio = drift.error_ratio
    if ratio is not None and ratio >= ERROR_LIMIT:
        return f"{which} are described badly, with {ratio:.2f} times the error that was to be expected"
    now, before = drift.perplexity, drift.perplexity_at_training
    if now is not None and before is not None and now < PERPLEXITY_LIMIT * before:
        return f"items crowd into few shelves, with a perplexity of {now:,.1f} at level 1 instead of {before:,.1f}"
    new, first = drift.repeated, drift.repeated_first
    if new is not None and first is not None and new > first + REPEATED_LIMIT:
        return f"{new:.1%} of the newest items repeat the ID of another of them, and {first:.1%} of as many first ones"
    return None


def _why_not(drift: Drift, which: str) -> str:
    if _too_few(drift):
        return f"{which} are {drift.share:.1%} of all, too few for it to pay"
    ratio = drift.error_ratio
    like = "" if ratio is None else f", with {ratio:.2f} times the error that was to be expected"
    return f"{which} are described well enough{like}"


def _too_few(drift: Drift) -> bool:
    return drift.items < LEAST_ITEMS or drift.share < LEAST_SHARE


def _mean(sums: Mapping[str, Any] | None) -> float | None:
    return None if sums is None or not sums["items"] else sums["error"] / sums["items"]


def _perplexity(counts: NDArray[np.int64]) -> float:
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum()))
