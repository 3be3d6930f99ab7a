"""Encoding with a beam: the best of several partial codes instead of the first.

Greedy encoding takes the nearest codeword level by level, and a near miss at one level can be worse for all that
follow. A beam keeps the B best partial codes after each level and lets the last level decide (FAISS calls it
``max_beam_size``; Babenko and Lempitsky describe it for additive codes, 2014). FAISS does the search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError
from semid_index.quantizer import Codes, Vectors
from semid_index.quantizers.kmeans import import_faiss, nearest

LARGEST_BEAM = 4_096
_TABLE_WORDS = 8_192  # with at most so many codewords in all, FAISS uses tables of their inner products: up to 256 MB
_TABLE_ROWS = 1_000  # and with at least so many rows, for which making the tables pays; then 8 times quicker


def check_beam(beam: Any, what: str = "beam") -> int:
    """A beam as an int, or :class:`InvalidArgumentError`."""
    if isinstance(beam, bool) or not isinstance(beam, int | np.integer) or not 1 <= beam <= LARGEST_BEAM:
        raise InvalidArgumentError(f"{what} must be a whole number from 1 to {LARGEST_BEAM:,}, not {beam!r}.")
    return int(beam)


def choose_codes(residuals: Vectors, codebooks: Sequence[Vectors], beam: int) -> Codes:
    """For each row (n, dim), codes (n, levels) whose codewords sum up to about it.

    ``beam=1`` takes the nearest codeword at each level; with as many as there are partial codes, it is the best sum.
    """
    beam = min(beam, math.prod(len(codebook) for codebook in codebooks))  # a wider one gives wrong codes in FAISS
    if beam > 1 and len(codebooks) > 1 and len(residuals):
        return _with_beam(residuals, codebooks, beam)
    left = residuals.copy()
    codes = np.empty((len(left), len(codebooks)), dtype=np.int32)
    for level, codebook in enumerate(codebooks):
        codes[:, level] = nearest(left, codebook)
        if level + 1 < len(codebooks):
            left -= codebook[codes[:, level]]
    return codes


def _with_beam(vectors: Vectors, codebooks: Sequence[Vectors], beam: int) -> Codes:
    faiss = import_faiss()
    bits = [(len(codebook) - 1).bit_length() for codebook in codebooks]
    sizes = faiss.UInt64Vector()
    for each in bits:
        sizes.push_back(each)
    quantizer = faiss.ResidualQuantizer(vectors.shape[1], sizes)
    quantizer.max_beam_size = beam
    faiss.copy_array_to_vector(_padded(codebooks, bits).ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    if len(vectors) >= _TABLE_ROWS and sum(1 << each for each in bits) <= _TABLE_WORDS:
        quantizer.use_beam_LUT = 1
        quantizer.compute_codebook_tables()
    packed = quantizer.compute_codes(np.ascontiguousarray(vectors))
    return np.asarray(faiss.unpack_bitstrings(packed, bits), dtype=np.int32)


def _padded(codebooks: Sequence[Vectors], bits: Sequence[int]) -> NDArray[np.float32]:
    """All codewords, each codebook filled up to a power of two with words too far away to be anyone's best."""
    longest = max(float(np.abs(codebook).max(initial=0)) for codebook in codebooks)
    far = np.float32(1e4 * longest + 1)
    return np.concatenate(
        [
            np.pad(codebook, ((0, (1 << each) - len(codebook)), (0, 0)), constant_values=far)
            for codebook, each in zip(codebooks, bits, strict=True)
        ]
    )
