"""A checksum for each stored item, which tells that its values belong together, and to that item.

DuckDB's own checksums say that a block of the file is whole, not that it is where it belongs. If a disk writes a block
to the place of another, items get the codes or vectors of others, and nothing looks wrong. So each row of
``semid_codes`` and ``semid_vectors`` has 16 bits that follow from all of it. One row in 65,521 may be wrong and have
the right checksum; but a block holds hundreds of rows or more.

Nothing here keeps out someone who changes a file on purpose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semid_index.arrow import numpy_column

if TYPE_CHECKING:
    import pyarrow as pa

Checksums = NDArray[np.uint16]
Hashes = NDArray[np.uint64]

MODULUS = 65_521
"""Checksums are 1 to 65,521. 0 stands for none: that item was written before there were any."""


def _factors(count: int) -> Hashes:
    """Numbers without a pattern, the same for ever (SplitMix64); odd, so that no bit of what they multiply is lost."""
    numbers = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (numbers ^ (numbers >> np.uint64(31))) | np.uint64(1)


_FACTORS = _factors(4_096)
_ID, _SID, _SCALE = _FACTORS[-3:]
_BLOCK = 65_536  # items at a time


def of_codes(
    rows: NDArray[np.int64], ids: pa.Array, sids: NDArray[np.int64], rest: NDArray[np.integer] | None
) -> Checksums:
    """The checksum of each item's number, id and codes; (n,) each, ``rest`` (n, levels) or None."""
    found = np.empty(len(rows), dtype=np.uint16)
    for start in range(0, len(rows), _BLOCK):  # what is computed on the way takes more room than all the rest
        part = slice(start, start + _BLOCK)
        hashes = _of_ids(ids[part]) * _ID + sids[part].view(np.uint64) * _SID
        if rest is not None:
            hashes += _of_bytes(rest[part])
        found[part] = _of_rows(rows[part], hashes)
    return found


def of_vectors(rows: NDArray[np.int64], vectors: NDArray[Any], scale: NDArray[np.float32] | None = None) -> Checksums:
    """The checksum of each item's number and stored vector, or tail codes: (n,), (n, width) and (n,) or None."""
    hashes = _of_bytes(vectors)
    if scale is not None:
        hashes += scale.view(np.uint32) * _SCALE
    return _of_rows(rows, hashes)


def moved(checksum: str, old: str, new: str) -> str:
    """SQL for the checksum of an item's codes when its number changes; all three are names of columns."""
    return (
        f"CASE WHEN {checksum} = 0 THEN 0 "
        f"ELSE 1 + (({checksum}::BIGINT - 1 + {new} - {old}) % {MODULUS} + {MODULUS}) % {MODULUS} END::USMALLINT"
    )


def wrong(stored: Checksums, found: Checksums) -> NDArray[np.bool_]:
    """Which items are not as they were written."""
    differ: NDArray[np.bool_] = (stored != found) & (stored != 0)
    return differ


def _of_bytes(matrix: NDArray[Any]) -> Hashes:
    """A number for the bytes of each row of a matrix (n, width): the sum of its words, each times a number of its own.

    Words have eight bytes, or where rows do not divide into such, four, two or one.
    """
    plain = np.ascontiguousarray(matrix)
    row_bytes = plain.shape[1] * plain.itemsize
    size = next(size for size in (8, 4, 2, 1) if row_bytes % size == 0)
    words = plain.view(np.dtype(f"u{size}"))
    factors = np.resize(_FACTORS, words.shape[1])
    sums: Hashes = np.einsum("ij,j->i", words, factors, dtype=np.uint64, casting="safe")
    return sums


def _of_rows(rows: NDArray[np.int64], hashes: Hashes) -> Checksums:
    folded = hashes % np.uint64(MODULUS)
    return (1 + (folded.astype(np.int64) + rows) % MODULUS).astype(np.uint16)


def _of_ids(ids: pa.Array) -> Hashes:
    """A number for each id: itself, or for text a sum over its bytes."""
    import pyarrow as pa

    if pa.types.is_integer(ids.type):
        return numpy_column(ids).astype(np.int64).view(np.uint64)
    wide = pa.types.is_large_string(ids.type)
    texts = ids if wide or pa.types.is_string(ids.type) else ids.cast(pa.string())
    _, offsets, values = texts.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64 if wide else np.int32)[texts.offset : texts.offset + len(texts) + 1]
    found = np.frombuffer(values, dtype=np.uint8)[ends[0] : ends[-1]] if values is not None else np.empty(0, np.uint8)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(_FACTORS[found])])
    hashes: Hashes = sums[ends[1:] - ends[0]] - sums[ends[:-1] - ends[0]]
    return hashes
