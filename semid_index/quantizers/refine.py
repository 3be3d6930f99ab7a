"""Refinement of residual codebooks: all levels together, instead of one after the other.

Training level by level fixes a codebook before the next one exists. Refinement alternates two steps: encode again (with
a beam), and move all codewords to the least-squares solution for these codes (as with other additive codebooks: Babenko
and Lempitsky, 2014; Martinez et al., 2016). The solution is found level by level, each codeword moving by the mean of
what its vectors have left over, in some sweeps; a little weight on staying put keeps rare codewords from fitting their
few vectors by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from semid_index.quantizer import Codes, Vectors

_SWEEPS = 4
_STAY = 1.0  # how many vectors with nothing left over each codeword counts besides its own


def refine_codebooks(
    codebooks: Sequence[Vectors],
    vectors: Vectors,
    *,
    encode: Callable[[Sequence[Vectors]], Codes],
    search: Callable[[Sequence[Vectors]], Codes],
    rounds: int,
    report: Callable[[int], None],
) -> tuple[list[Vectors], Codes]:
    """The best codebooks of at most so many rounds for vectors (n, dim), and the codes of the vectors with them.

    ``encode`` gives codes as the quantizer will, with some codebooks: its error decides which are best. ``search`` may
    look further; codewords move to suit its codes.
    """
    best = list(codebooks)
    codes = encode(best)
    least = mean_error(vectors, best, codes)
    moved = [codebook.copy() for codebook in codebooks]
    for done in range(rounds):
        report(done)
        move_codewords(moved, vectors, search(moved))
        new_codes = encode(moved)
        error = mean_error(vectors, moved, new_codes)
        if error < least:
            least, codes, best = error, new_codes, [codebook.copy() for codebook in moved]
    report(rounds)
    return best, codes


def mean_error(vectors: Vectors, codebooks: Sequence[Vectors], codes: Codes) -> float:
    """Mean squared length of what codes (n, levels) leave over of vectors (n, dim)."""
    residuals = left_over(vectors, codebooks, codes)
    return float(np.einsum("ij,ij->i", residuals, residuals).mean())


def move_codewords(codebooks: Sequence[Vectors], vectors: Vectors, codes: Codes, *, sweeps: int = _SWEEPS) -> None:
    """Move the codewords, in place, towards the least squared error for these codes (n, levels)."""
    residuals = left_over(vectors, codebooks, codes)
    orders = [np.argsort(chosen, kind="stable") for chosen in codes.T]
    counts = [np.bincount(chosen, minlength=len(book)) for chosen, book in zip(codes.T, codebooks, strict=True)]
    for _ in range(sweeps):
        for codebook, chosen, order, count in zip(codebooks, codes.T, orders, counts, strict=True):
            weights: NDArray[np.float32] = (1 / (count + _STAY)).astype(np.float32)
            step = _sums(residuals, order, count) * weights[:, None]
            codebook += step
            residuals -= step[chosen]


def _sums(rows: Vectors, order: NDArray[np.int64], counts: NDArray[np.int64]) -> Vectors:
    """The sum of the rows of each group, (groups, dim); ``order`` sorts the rows by group."""
    sums = np.zeros((len(counts), rows.shape[1]), dtype=np.float32)
    present = np.flatnonzero(counts)
    starts = np.cumsum(counts)[present] - counts[present]
    sums[present] = np.add.reduceat(rows[order], starts, axis=0)
    return sums


def left_over(vectors: Vectors, codebooks: Sequence[Vectors], codes: Codes) -> Vectors:
    """Vectors (n, dim) less the codewords of their codes (n, levels)."""
    residuals = vectors.copy()
    for codebook, chosen in zip(codebooks, codes.T, strict=True):
        residuals -= codebook[chosen]
    return residuals
