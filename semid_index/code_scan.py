"""The native scan where no vectors are stored: of the codes of the semantic ID alone, all levels of it.

Each level is looked up in a table of 8 bits for every word, so sums are off by a little; the best of the scan are
compared anew by what their codes decode to. The codes are held once, in the blocks that are scanned; what they decode
to is read from there, too (docs/decisions/0016).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from semid_index import native
from semid_index.lookup import LeafScorer
from semid_index.native import NativeIndex, ScanParts
from semid_index.quantizer import Vectors
from semid_index.rerank import (
    DecodedVectors,
    Executor,
    FileVectors,
    MemoryVectors,
    Positions,
    ScanData,
    choose_executor,
)
from semid_index.scan import (
    LEAST_ITEMS,
    NativeExecutor,
    NativeScan,
    Words,
    first_codes_of,
    head_codes_of,
    leaf_terms_of,
    words_of,
)

_BATCH = 16_384


def fastest_executor(data: ScanData, scorer: Callable[[], LeafScorer]) -> Executor:
    """The native one where it can be had, else one of those in :mod:`semid_index.rerank`."""
    vectors = data.vectors
    if vectors.count < LEAST_ITEMS or native.unavailable_because() is not None:
        return choose_executor(data)
    if isinstance(vectors, DecodedVectors):
        words = words_of(data, data.leaves.layout.levels)
        if len(words.sizes) == data.leaves.layout.levels:
            return NativeCodeExecutor(data, vectors, words, scorer())
    elif data.tail is not None and isinstance(vectors, MemoryVectors | FileVectors):
        return NativeExecutor(data, vectors, scorer())
    return choose_executor(data)


class NativeCodeExecutor(NativeScan):
    """Scans all levels of the semantic ID; from then on, vectors are decoded from what it holds."""

    name = "native-codes"

    def __init__(self, data: ScanData, vectors: DecodedVectors, words: Words, scorer: LeafScorer) -> None:
        self._index = NativeIndex(_parts(data, words, scorer), vectors.dim, None, None)
        self._centre = np.zeros(vectors.dim, dtype=np.float32)
        self._offsets = words.offsets_of_all(data)
        self._words = words.words
        self._vectors = vectors
        vectors.decode_by(self.decoded)

    @property
    def nbytes(self) -> int:
        """Codes, norms and tables."""
        return super().nbytes + self._words.nbytes

    def decoded(self, positions: Positions) -> Vectors:
        """What the codes at some positions decode to: (m, dim)."""
        return native.sum_words(self._words, self._index.columns(positions))


def _parts(data: ScanData, words: Words, scorer: LeafScorer) -> ScanParts:
    all_words, terms, zero = leaf_terms_of(data.leaves, scorer, words.words)
    count, dim = len(data.codes.rows), words.words.shape[1]
    first = first_codes_of(data)
    shared = np.zeros(len(all_words), dtype=np.float32)  # of the scalars of items, what their first words make up
    scalars = None
    if data.metric != "ip":
        codebook = words.words[: words.sizes[0]]
        shared[: words.sizes[0]] = np.einsum("ij,ij->i", codebook, codebook)
        scalars = _squared_lengths(data, words) - shared[first]
    return ScanParts(
        metric=data.metric,
        starts=data.leaves.starts,
        words=all_words,
        leaf_terms=terms,
        zero_column=zero,
        leaf_constants=scorer.constants,
        rotation=None,
        centre=np.zeros(dim, dtype=np.float32),
        codebooks=np.empty((0, 16, 1), dtype=np.float32),
        tail_codes=np.empty((count, 0), dtype=np.uint8),
        first_codes=first,
        first_constants=shared,
        head_codes=head_codes_of(data, words),
        head_columns=np.array(words.offsets[1:], dtype=np.int32),
        head_sizes=np.array(words.sizes[1:], dtype=np.int32),
        scalars=scalars,
        factor=scorer.factor,
    )


def _squared_lengths(data: ScanData, words: Words) -> NDArray[np.float32]:
    """Of what the codes of each item decode to."""
    lengths = np.empty(len(data.codes.rows), dtype=np.float32)
    for start in range(0, len(lengths), _BATCH):
        batch = slice(start, start + _BATCH)
        decoded = native.sum_words(words.words, words.columns_of(data, batch))
        lengths[batch] = np.einsum("ij,ij->i", decoded, decoded)
    return lengths
