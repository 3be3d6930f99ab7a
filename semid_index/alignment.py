"""New codebooks that mean what the old ones meant: codes are renamed, so that as many items as possible keep theirs.

Codewords have no order of their own. Codebooks that are learned again, even on nearly the same vectors, come out in
another order, and then every item would get another ID for no reason. Two things keep IDs:

1. *Warm start* (:class:`WarmStarting`): k-means goes on from the old codewords, so that each of them stays near its
   place and keeps its number.
2. *Alignment* (:func:`aligned`): at each level the new codewords get the old numbers, one to one, such that most
   vectors keep their code. That is an assignment problem on the table that counts how many vectors have old code i and
   new code j (Kuhn, 1955). The decoded vector is a sum, so each level can be numbered by itself, at no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.report.measures import best_names

_CHECKED_ROWS = 1_000
_LEAST_SAME = 0.99  # of the checked rows; near-ties may go either way
_TIE = 0.02  # of a vector's length: by so much errors differ at most where two codewords were equally near
_MOST_PLACED = 4_096  # codewords without items in common with old ones; of more, any may get any number


@runtime_checkable
class WarmStarting(Protocol):
    """A quantizer that can learn on from the codebooks that it has."""

    def refit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn from vectors (n, dim), such that most of them keep their codes, and return itself."""
        ...


def aligned(old: Quantizer, new: Quantizer, vectors: Vectors) -> Quantizer:
    """The new quantizer with codewords renumbered, so that as many codes of vectors (n, dim) as possible stay.

    Both have codebooks of the same sizes. Raises :class:`InvalidArgumentError` for a quantizer whose codes are more
    than numbers of codewords, so that they cannot be changed, and :class:`MissingDependencyError` without SciPy.
    """
    if old.codebooks is None or new.codebooks is None:
        raise _cannot_be_aligned(new)
    before, after = old.encode(vectors), new.encode(vectors)
    names = [
        new_names(before[:, level], after[:, level], was, now)
        for level, (was, now) in enumerate(zip(old.codebooks, new.codebooks, strict=True))
    ]
    if all(np.array_equal(name, np.arange(len(name))) for name in names):
        return new
    state: dict[str, NDArray[Any]] = new.state()
    for level, (name, codebook) in enumerate(zip(names, new.codebooks, strict=True), 1):
        state[f"codebook_{level}"] = renumbered(codebook, name)
    result = type(new).restore(new.get_config(), state)
    if _share_equal(result, new, vectors[:_CHECKED_ROWS], renamed(after[:_CHECKED_ROWS], names)) < _LEAST_SAME:
        raise _cannot_be_aligned(new)
    return result


def _share_equal(result: Quantizer, new: Quantizer, vectors: Vectors, expected: Codes) -> float:
    """The share of vectors whose codes are as expected, or stand for them as well as those of the new quantizer do.

    Of few vectors k-means makes codewords that are equally near; then their numbers decide which one is taken, and
    these have changed. Codes that mean something else would miss by about the length of the vector.
    """
    codes = result.encode(vectors)
    equal = (codes == expected).all(axis=1)
    if not equal.all():
        as_is, renamed_ = (np.linalg.norm(q.decode(q.encode(vectors)) - vectors, axis=1) for q in (new, result))
        equal |= renamed_ <= as_is + _TIE * np.linalg.norm(vectors, axis=1)
    return float(equal.mean())


def _cannot_be_aligned(quantizer: Quantizer) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"The codes of '{quantizer.name}' are more than numbers of codewords, so they cannot be renamed to stay as "
        "they were. Retrain with keep_ids=False, or use a residual quantizer such as 'rq'."
    )


def new_names(
    old: NDArray[np.integer], new: NDArray[np.integer], old_codebook: Vectors, new_codebook: Vectors
) -> NDArray[np.int64]:
    """The number that each new codeword (K, dim) is to have, each once, such that most items keep their code.

    ``old``, ``new``: the codes of the same items (n,), at one level. New codewords that share no item with an old one
    that is free get the numbers that are left, each as near as can be to what that number stood for.
    """
    size = len(new_codebook)
    names = np.full(size, -1, dtype=np.int64)
    found = best_names(old, new)
    names[: len(found)] = found
    unnamed = np.flatnonzero(names < 0)
    free = np.setdiff1d(np.arange(size), names)
    names[unnamed] = free[_nearest_one_to_one(new_codebook[unnamed], old_codebook[free])]
    return names


def _nearest_one_to_one(points: Vectors, places: Vectors) -> NDArray[np.int64]:
    """A place of its own for each point, (m, dim) both, at the least sum of squared distances: (m,)."""
    if len(points) > _MOST_PLACED:
        return np.arange(len(points))
    from scipy.optimize import linear_sum_assignment  # best_names has seen to it that SciPy is there

    apart = np.square(points).sum(axis=1)[:, None] - 2 * points @ places.T + np.square(places).sum(axis=1)
    chosen: NDArray[np.int64] = linear_sum_assignment(apart)[1]
    return chosen


def renumbered(codebook: Vectors, names: NDArray[np.int64]) -> Vectors:
    """The codewords (K, dim) in the order of the numbers (K,) that they are to have."""
    ordered = np.empty_like(codebook)
    ordered[names] = codebook
    return ordered


def renamed(codes: Codes, names: Sequence[NDArray[np.int64]]) -> Codes:
    """Codes (n, levels) by the new numbers of the codewords."""
    return np.stack([name[chosen] for name, chosen in zip(names, codes.T, strict=True)], axis=1).astype(np.int32)


def changed(old: Codes, new: Codes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many items have another code at each level, and how many another prefix of each depth: both (levels,)."""
    differs = old != new
    return differs.sum(axis=0), np.logical_or.accumulate(differs, axis=1).sum(axis=0)
