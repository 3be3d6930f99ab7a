"""Pure functions on codes: pack, unpack, prefix range, text form.

The codes of an item are packed into one integer, the *sid*: coarsest level in the highest bits, right-aligned.
With four levels of 256 codewords, ``(12, 153, 87, 21)`` is ``12 << 24 | 153 << 16 | 87 << 8 | 21`` = 211375893.
Then a prefix is a contiguous range of sids, whatever the database: ``12-153`` is ``[211353600, 211419136)``.

A level with K codewords takes ``ceil(log2 K)`` bits. A sid has at most 63 bits, so that it is a BIGINT; the levels
that do not fit are the *rest*, kept beside it as small integers, and sort after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from semid_index.errors import InvalidArgumentError, InvalidCodesError

SID_BITS = 63
MIN_CODEBOOK_SIZE = 2
MAX_CODEBOOK_SIZE = 65_536

Prefix = tuple[int, ...]
_PREFIX_TEXT = re.compile(r"(\d{1,9}(-\d{1,9})*(-\*?)?|\*)?", re.ASCII)


@dataclass(frozen=True)
class CodeLayout:
    """Where each level's code sits, given how many codewords each level has."""

    codebook_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.codebook_sizes:
            raise InvalidArgumentError("A semantic ID needs at least one level.")
        for level, size in enumerate(self.codebook_sizes, 1):
            if not MIN_CODEBOOK_SIZE <= size <= MAX_CODEBOOK_SIZE:
                raise InvalidArgumentError(
                    f"Level {level} has {size} codewords; allowed are {MIN_CODEBOOK_SIZE} to {MAX_CODEBOOK_SIZE:,}."
                )

    @property
    def levels(self) -> int:
        """How many codes an ID has."""
        return len(self.codebook_sizes)

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Bits that each level takes."""
        return tuple((size - 1).bit_length() for size in self.codebook_sizes)

    @cached_property
    def packed_levels(self) -> int:
        """How many of the first levels fit into the sid."""
        return int((np.cumsum(self.bits) <= SID_BITS).sum())

    @cached_property
    def sid_bits(self) -> int:
        """Bits of the sid in use."""
        return sum(self.bits[: self.packed_levels])

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        """How far the code of each packed level is shifted left."""
        return tuple(self.sid_bits - sum(self.bits[: level + 1]) for level in range(self.packed_levels))

    @property
    def rest_levels(self) -> int:
        """How many levels are kept beside the sid."""
        return self.levels - self.packed_levels

    @cached_property
    def rest_dtype(self) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        """One byte a level where every codebook of the rest has at most 256 words, else two."""
        largest = max(self.codebook_sizes[self.packed_levels :], default=0)
        return np.dtype(np.uint8) if largest <= 256 else np.dtype(np.uint16)

    @property
    def bytes_per_item(self) -> int:
        """Bytes that the codes of one item need, packed."""
        return -(-sum(self.bits) // 8)


def pack(codes: NDArray[np.integer], layout: CodeLayout) -> NDArray[np.int64]:
    """The sid of each row: codes of shape (n, levels) in, (n,) int64 out."""
    codes = _checked(codes, layout)
    sids = np.zeros(len(codes), dtype=np.int64)
    for level, shift in enumerate(layout.shifts):
        sids |= codes[:, level].astype(np.int64) << shift
    return sids


def pack_rest(codes: NDArray[np.integer], layout: CodeLayout) -> NDArray[np.uint8 | np.uint16]:
    """The levels that the sid has no room for: (n, rest_levels) small integers."""
    return _checked(codes, layout)[:, layout.packed_levels :].astype(layout.rest_dtype)


def unpack(sids: NDArray[np.int64], layout: CodeLayout, rest: NDArray[np.integer] | None = None) -> NDArray[np.int32]:
    """The codes of each sid (and its rest): (n, levels) int32."""
    codes = np.empty((len(sids), layout.levels), dtype=np.int32)
    for level, (shift, bits) in enumerate(zip(layout.shifts, layout.bits, strict=False)):
        codes[:, level] = (sids >> shift) & ((1 << bits) - 1)
    if layout.rest_levels:
        if rest is None:
            raise InvalidCodesError(
                f"IDs of {layout.levels} levels need their rest ({layout.rest_levels} levels) to be unpacked."
            )
        codes[:, layout.packed_levels :] = rest
    return codes


def prefix_range(prefix: Sequence[int], layout: CodeLayout) -> tuple[int, int]:
    """The sids under a prefix, as ``[lo, hi)``. Levels beyond the sid do not narrow it.

    >>> prefix_range((3,), CodeLayout((256, 256, 256, 256)))
    (50331648, 67108864)
    """
    prefix = check_prefix(prefix, layout)[: layout.packed_levels]
    lo = sum(code << shift for code, shift in zip(prefix, layout.shifts, strict=False))
    free_bits = layout.shifts[len(prefix) - 1] if prefix else layout.sid_bits
    return lo, lo + (1 << free_bits)


def check_prefix(prefix: Sequence[int], layout: CodeLayout) -> Prefix:
    """The prefix as a tuple of ints, each of them in range."""
    if len(prefix) > layout.levels:
        raise InvalidCodesError(
            f"Prefix {format_id(prefix)} has {len(prefix)} codes, the IDs have {layout.levels} levels."
        )
    for level, (code, size) in enumerate(zip(prefix, layout.codebook_sizes, strict=False), 1):
        if not 0 <= code < size:
            raise InvalidCodesError(f"Code {code} at level {level} is outside 0 to {size - 1}.")
    return tuple(int(code) for code in prefix)


def parse_prefix(text: str, layout: CodeLayout) -> Prefix:
    """The prefix written as ``12-153`` or, with its open end shown, ``12-153-*``.

    >>> parse_prefix("12-153-*", CodeLayout((256, 256, 256, 256)))
    (12, 153)
    """
    if not _PREFIX_TEXT.fullmatch(text.strip()):
        raise InvalidCodesError(f"'{text}' is no prefix. Write codes with dashes between them, such as '12-153'.")
    return check_prefix(tuple(int(code) for code in re.findall(r"\d+", text)), layout)


def format_id(codes: Sequence[int]) -> str:
    """The text form of an ID or a prefix.

    >>> format_id((12, 153, 87, 21))
    '12-153-87-21'
    """
    return "-".join(str(int(code)) for code in codes)


def common_prefix_length(a: ArrayLike, b: ArrayLike) -> NDArray[np.int64]:
    """How many first codes are equal, row by row; both of shape (n, levels)."""
    same: NDArray[np.bool_] = np.asarray(a) == np.asarray(b)
    lengths: NDArray[np.int64] = np.logical_and.accumulate(same, axis=-1).sum(axis=-1)
    return lengths


def _checked(codes: NDArray[np.integer], layout: CodeLayout) -> NDArray[np.integer]:
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] != layout.levels:
        raise InvalidCodesError(f"Codes must have shape (n, {layout.levels}), not {codes.shape}.")
    if codes.dtype.kind not in "iu":
        raise InvalidCodesError(f"Codes must be integers, not {codes.dtype}.")
    if len(codes):
        bad = (codes.min(axis=0) < 0) | (codes.max(axis=0) >= np.array(layout.codebook_sizes))
        if bad.any():
            level = int(np.flatnonzero(bad)[0])
            raise InvalidCodesError(f"Codes at level {level + 1} must lie in 0 to {layout.codebook_sizes[level] - 1}.")
    return codes
