"""Packing codes into integers, and back: worked by hand, and against Python's own big integers."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semid_index.codes import (
    SID_BITS,
    CodeLayout,
    check_prefix,
    common_prefix_length,
    format_id,
    pack,
    pack_rest,
    parse_prefix,
    prefix_range,
    unpack,
)
from semid_index.errors import InvalidArgumentError, InvalidCodesError, SemidError

BYTES = CodeLayout((256, 256, 256, 256))

# Sizes at and beside powers of two, where the number of bits changes, and any others.
sizes = st.one_of(st.sampled_from([2, 3, 4, 5, 255, 256, 257, 1_000, 65_535, 65_536]), st.integers(2, 65_536))
layouts = st.lists(sizes, min_size=1, max_size=64).map(lambda sizes: CodeLayout(tuple(sizes)))


@st.composite
def layouts_and_codes(draw, rows=4):
    """A layout, and codes that fit it; often the smallest or the largest."""
    layout = draw(layouts)
    one_row = st.tuples(
        *(st.one_of(st.just(0), st.just(size - 1), st.integers(0, size - 1)) for size in layout.codebook_sizes)
    )
    return layout, np.array(draw(st.lists(one_row, min_size=1, max_size=rows)), dtype=np.int32)


def bits_of(size):
    """Bits that ``size`` different codes need, by counting."""
    return next(bits for bits in range(1, 17) if 2**bits >= size)


def packed_by_hand(row, layout):
    """The sid of one row in Python integers, and how many levels are in it: as many of the first as 63 bits hold."""
    sid = used = level = 0
    for level, (code, size) in enumerate(zip(row, layout.codebook_sizes, strict=True)):
        if used + bits_of(size) > 63:
            return sid, level
        sid, used = sid * 2 ** bits_of(size) + int(code), used + bits_of(size)
    return sid, level + 1


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_worked_example():
    """12 * 16777216 + 153 * 65536 + 87 * 256 + 21 = 211,375,893."""
    codes = np.array([[12, 153, 87, 21]])
    assert pack(codes, BYTES).tolist() == [211_375_893] == [12 * 16_777_216 + 153 * 65_536 + 87 * 256 + 21]
    assert unpack(np.array([211_375_893]), BYTES).tolist() == codes.tolist()
    assert prefix_range((12, 153), BYTES) == (211_353_600, 211_419_136)
    assert prefix_range((), BYTES) == (0, 2**32)
    assert prefix_range((12, 153, 87, 21), BYTES) == (211_375_893, 211_375_894)
    assert format_id((12, 153, 87, 21)) == "12-153-87-21"


def test_uneven_levels():
    """1,000 codewords take 10 bits, 3 take 2, 2 take 1: 5 2 1 is 5 * 8 + 2 * 2 + 1 = 45."""
    layout = CodeLayout((1_000, 3, 2))
    assert layout.bits == (10, 2, 1)
    assert (layout.sid_bits, layout.shifts, layout.bytes_per_item) == (13, (3, 1, 0), 2)
    assert pack(np.array([[5, 2, 1], [999, 0, 0]]), layout).tolist() == [45, 999 * 8]
    assert prefix_range((5,), layout) == (40, 48)
    assert prefix_range((5, 2), layout) == (44, 46)


def test_eight_levels_of_256_keep_the_eighth_beside_the_sid():
    layout = CodeLayout((256,) * 8)
    assert (layout.packed_levels, layout.rest_levels, layout.sid_bits, layout.bytes_per_item) == (7, 1, 56, 8)
    codes = np.array([[255, 1, 2, 3, 4, 5, 6, 7]])
    assert pack(codes, layout).tolist() == [0xFF010203040506]
    assert pack_rest(codes, layout).tolist() == [[7]]
    assert pack_rest(codes, layout).dtype == np.uint8
    assert prefix_range((255, 1, 2, 3, 4, 5, 6, 7), layout) == prefix_range((255, 1, 2, 3, 4, 5, 6), layout)


def test_63_levels_of_2_fill_the_sid_and_it_stays_positive():
    layout = CodeLayout((2,) * 64)
    assert (layout.packed_levels, layout.rest_levels) == (63, 1)
    assert pack(np.ones((1, 64), dtype=int), layout).tolist() == [2**63 - 1]
    assert prefix_range((1,), layout) == (2**62, 2**63)


@pytest.mark.parametrize(
    ("rest", "dtype", "top"), [((256,), np.uint8, 255), ((257,), np.uint16, 256), ((2, 65_536), np.uint16, 65_535)]
)
def test_rest_takes_one_byte_or_two(rest, dtype, top):
    layout = CodeLayout((65_536,) * 3 + (32_768,) + rest)
    assert layout.packed_levels == 4
    codes = np.array([[0] * 4 + [size - 1 for size in rest]])
    assert pack_rest(codes, layout).dtype == layout.rest_dtype == dtype
    assert pack_rest(codes, layout)[0, -1] == top


# -- any layout, against Python integers ------------------------------------------------------------------------------


@given(layouts_and_codes())
def test_pack_and_unpack(case):
    layout, codes = case
    sids, rest = pack(codes, layout), pack_rest(codes, layout)
    by_hand = [packed_by_hand(row, layout) for row in codes.tolist()]
    assert sids.tolist() == [sid for sid, _ in by_hand]
    assert layout.packed_levels == by_hand[0][1]
    assert sids.dtype == np.int64
    assert (sids >= 0).all()
    assert rest.tolist() == codes[:, layout.packed_levels :].tolist()
    unpacked = unpack(sids, layout, rest)
    assert unpacked.dtype == np.int32
    assert np.array_equal(unpacked, codes)


@given(layouts_and_codes())
def test_sizes_of_a_layout(case):
    layout, _ = case
    assert layout.bits == tuple(bits_of(size) for size in layout.codebook_sizes)
    assert layout.packed_levels + layout.rest_levels == layout.levels == len(layout.codebook_sizes)
    assert layout.sid_bits <= SID_BITS
    if layout.rest_levels:
        assert layout.sid_bits + layout.bits[layout.packed_levels] > SID_BITS
    assert 8 * layout.bytes_per_item - 7 <= sum(layout.bits) <= 8 * layout.bytes_per_item


@given(layouts_and_codes(rows=8), st.data())
def test_a_prefix_is_a_range(case, data):
    """A sid lies in the range of a prefix exactly if its codes start with it (as far as the sid has them)."""
    layout, codes = case
    depth = data.draw(st.integers(0, layout.levels), label="depth")
    row = data.draw(st.integers(0, len(codes) - 1), label="row")
    prefix = codes[row, :depth].tolist()
    if prefix and data.draw(st.booleans(), label="another last code"):
        prefix[-1] = data.draw(st.integers(0, layout.codebook_sizes[depth - 1] - 1), label="last code")
    lo, hi = prefix_range(prefix, layout)
    kept = min(depth, layout.packed_levels)
    for row_codes, sid in zip(codes.tolist(), pack(codes, layout).tolist(), strict=True):
        assert (lo <= sid < hi) == (row_codes[:kept] == prefix[:kept])


@given(layouts_and_codes(rows=8))
def test_order_of_sids_is_the_order_of_codes(case):
    layout, codes = case
    keys = [tuple(row) for row in codes.tolist()]
    sids, rest = pack(codes, layout).tolist(), pack_rest(codes, layout).tolist()
    assert sorted(range(len(keys)), key=lambda i: (sids[i], rest[i])) == sorted(range(len(keys)), key=keys.__getitem__)


@given(layouts_and_codes(rows=1), st.data())
def test_text_and_back(case, data):
    layout, codes = case
    prefix = tuple(codes[0, : data.draw(st.integers(0, layout.levels))].tolist())
    text = format_id(prefix)
    assert text.split("-") == [str(code) for code in prefix] or not prefix
    assert parse_prefix(text, layout) == prefix
    assert parse_prefix(f" {text}-* " if prefix else "*", layout) == prefix


@given(layouts_and_codes(rows=6))
def test_common_prefix_length(case):
    _, codes = case
    pairs = zip(codes.tolist(), codes[::-1].tolist(), strict=True)
    expected = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    assert common_prefix_length(codes, codes[::-1]).tolist() == expected


def test_common_prefix_length_of_one_id_and_many():
    assert common_prefix_length([1, 2, 3], [[1, 2, 3], [1, 2, 9], [1, 9, 3], [9, 2, 3]]).tolist() == [3, 2, 1, 0]


def test_no_rows():
    none = np.empty((0, 4), dtype=np.int32)
    assert pack(none, BYTES).shape == (0,)
    assert pack_rest(none, BYTES).shape == (0, 0)
    assert unpack(np.empty(0, dtype=np.int64), BYTES).shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint64])
def test_small_integers_do_not_overflow(dtype):
    layout = CodeLayout((128, 256, 256))
    codes = np.array([[127, 100, 99]], dtype=dtype)
    assert pack(codes, layout).tolist() == [(127 << 16) + (100 << 8) + 99]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "at least one level"),
        ((256, 1), "Level 2 has 1 codewords; allowed are 2 to 65,536"),
        ((65_537,), "Level 1 has 65537 codewords"),
        ((0,), "Level 1 has 0"),
        ((-5,), "Level 1 has -5"),
    ],
)
def test_layouts_that_cannot_be(sizes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        CodeLayout(sizes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([1, 2, 3, 4], "shape (n, 4), not (4,)"),
        ([[1, 2, 3]], "shape (n, 4), not (1, 3)"),
        ([[1.0, 2, 3, 4]], "must be integers, not float64"),
        ([[True, False, True, True]], "must be integers, not bool"),
        ([["1", "2", "3", "4"]], "must be integers"),
        ([[0, 0, 256, 0]], "Codes at level 3 must lie in 0 to 255"),
        ([[0, 0, 0, 0], [0, -1, 0, 0]], "Codes at level 2 must lie in 0 to 255"),
    ],
)
@pytest.mark.parametrize("function", [pack, pack_rest])
def test_codes_that_do_not_fit(codes, message, function):
    with pytest.raises(InvalidCodesError, match=re.escape(message)):
        function(np.array(codes), BYTES)


def test_unpack_needs_the_rest():
    with pytest.raises(InvalidCodesError, match=re.escape("IDs of 8 levels need their rest (1 levels)")):
        unpack(np.array([0]), CodeLayout((256,) * 8))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ((1, 2, 3, 4, 5), "Prefix 1-2-3-4-5 has 5 codes, the IDs have 4 levels"),
        ((0, 256), "Code 256 at level 2 is outside 0 to 255"),
        ((-1,), "Code -1 at level 1 is outside 0 to 255"),
    ],
)
def test_prefixes_that_do_not_fit(prefix, message):
    for function in (check_prefix, prefix_range):
        with pytest.raises(InvalidCodesError, match=message):
            function(prefix, BYTES)
    with pytest.raises(InvalidCodesError):
        parse_prefix(format_id(prefix), BYTES)


@pytest.mark.parametrize("text", ["a", "12--3", "-1", "1.5", "12-153-*-*", "12;153", "1-2-3-4-5", "300", "--"])
def test_texts_that_are_no_prefix(text):
    with pytest.raises(InvalidCodesError):
        parse_prefix(text, BYTES)


@given(st.text(alphabet="0123456789-* ._+a", max_size=12))
def test_any_text_is_a_prefix_or_a_typed_error(text):
    try:
        prefix = parse_prefix(text, BYTES)
    except SemidError:
        return
    assert check_prefix(prefix, BYTES) == prefix
