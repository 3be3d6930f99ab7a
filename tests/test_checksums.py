"""Checksums of items: what they are, that they are kept through all that changes an index, and what they find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

import semid_index as semid
from semid_index import checksums
from semid_index.errors import CorruptIndexError

OPTIONS: dict[str, Any] = {"dim": 24, "levels": 3, "codebook_size": 16}


def splitmix(number: int) -> int:
    """The number-th output of SplitMix64 from 0, made odd, with Python's own integers."""
    mask = (1 << 64) - 1
    z = number * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return (z ^ z >> 31) | 1


def of_words(row: int, words: list[int], *more: int) -> int:
    total = sum(word * splitmix(place) for place, word in enumerate(words, 1)) + sum(more)
    return 1 + (total % (1 << 64) % 65_521 + row) % 65_521


def test_the_generator_is_the_published_one():
    """The first outputs of SplitMix64 from the seed 0, as Vigna's program prints them."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [splitmix(place) for place in range(1, 5)] == [number | 1 for number in published]


@pytest.mark.parametrize(
    ("dtype", "width", "word"), [("f4", 24, "u8"), ("f4", 3, "u4"), ("i1", 5, "u1"), ("u2", 9, "u2")]
)
def test_vectors_agree_with_a_plain_loop(dtype, width, word):
    random = np.random.default_rng(0)
    vectors = (100 * random.standard_normal((50, width))).astype(dtype)
    rows = random.integers(1 << 40, size=50)
    scale = random.random(50, dtype=np.float32)
    plain, scaled = checksums.of_vectors(rows, vectors), checksums.of_vectors(rows, vectors, scale)
    for at, row in enumerate(rows.tolist()):
        words = vectors[at].view(word).tolist()
        assert plain[at] == of_words(row, words)
        assert scaled[at] == of_words(row, words, int(scale[at].view("u4")) * splitmix(4_096))


def test_codes_agree_with_a_plain_loop():
    random = np.random.default_rng(0)
    rows, sids = random.integers(1 << 40, size=(2, 50))
    numbers, rest = random.integers(-(1 << 62), 1 << 62, size=50), random.integers(256, size=(50, 3)).astype(np.uint8)
    texts = [f"item {number} \u00e9" * (number % 3) for number in range(50)]
    for ids, values in (
        (pa.array(numbers), numbers.tolist()),
        (pa.array(texts), [sum(splitmix(byte + 1) for byte in text.encode()) for text in texts]),
    ):
        found, with_rest = checksums.of_codes(rows, ids, sids, None), checksums.of_codes(rows, ids, sids, rest)
        for at, (row, value, sid) in enumerate(zip(rows.tolist(), values, sids.tolist(), strict=True)):
            parts = value * splitmix(4_094), sid * splitmix(4_095)
            assert found[at] == of_words(row, [], *parts)
            assert with_rest[at] == of_words(row, rest[at].tolist(), *parts)
    sliced = pa.array(["before", *texts]).cast(pa.large_string())[1:]
    assert np.array_equal(checksums.of_codes(rows, sliced, sids, None), found)


def test_the_checksum_of_an_item_that_gets_another_number():
    rows, new = np.array([0, 5, 70_000, 123]), np.array([9, 131_042, 3, 1 << 40])
    ids, sids = pa.array(["a", "b", "c", "d"]), np.array([7, 8, 9, 10])
    before = checksums.of_codes(rows, ids, sids, None)
    numbers = pa.table({"old": [*rows.tolist(), 1], "new": [*new.tolist(), 2], "checksum": [*before.tolist(), 0]})
    with duckdb.connect() as connection:
        connection.register("numbers", numbers)
        found = connection.execute(f"SELECT {checksums.moved('checksum', 'old', 'new')} FROM numbers").fetchall()
    assert [number for (number,) in found] == [*checksums.of_codes(new, ids, sids, None).tolist(), 0]


def checked(index: semid.SemanticIndex) -> tuple[str, int]:
    check = next(check for check in index.verify().checks if check.name == "checksums")
    return check.status, check.examined


@pytest.mark.parametrize(
    "options", [{}, {"vectors": "int8"}, {"vectors": "none", "tail": 8}, {"vectors": "float16", "levels": 12}]
)
def test_every_change_keeps_them(options, vectors, tmp_path):
    path = tmp_path / "index.duckdb"
    with semid.create(path, **{**OPTIONS, **options}) as index:
        index.train(vectors)
        index.add(vectors[:500], [f"id {number}" for number in range(500)])
        assert checked(index) == ("ok", 500)
        index.upsert(vectors[700:720], [f"id {number}" for number in range(490, 510)])
        index.delete(["id 3", "id 4"])
        assert checked(index) == ("ok", 508)
        if options.get("vectors") != "none":
            index.retrain(compare=False)
            index.upsert(vectors[800:810], [f"id {number}" for number in range(10)])
            with semid.open(path, version=1) as old:  # its items follow their vectors to new rows
                assert checked(old) == ("ok", 508)
                old.search(vectors[0])
        assert index.compact().bytes_after
        assert checked(index)[0] == "ok"
        index.search(vectors[0])


DAMAGE = {
    "vectors": "UPDATE semid_vectors SET v = (SELECT v FROM semid_vectors WHERE row = 9) WHERE row = 3",
    "tail codes": "UPDATE semid_vectors SET tail = list_transform(tail, lambda x: 255 - x)::UTINYINT[4] WHERE row = 3",
    "codes": "CREATE TABLE s AS FROM semid_codes; DROP TABLE semid_codes; ALTER TABLE s RENAME TO semid_codes; "
    "UPDATE semid_codes SET id = 10 - id WHERE id IN (4, 6)",
    "codes, the rows": "UPDATE semid_codes SET row = 10 - row WHERE row IN (4, 6)",
}


@pytest.mark.parametrize("vectors_in", ["memory", "file"])
@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_not_as_it_was_written_is_refused(what, vectors_in, vectors, tmp_path):
    path = tmp_path / "index.duckdb"
    with semid.create(path, **OPTIONS, tail=8) as index:
        index.train(vectors)
        index.add(vectors[:500])
    with duckdb.connect(str(path)) as connection:
        connection.execute(DAMAGE[what])
    with semid.open(path, read_only=True, vectors_in=vectors_in) as index:
        read = {"tail codes": lambda: list(index._store.vector_batches("tail"))}  # which not every executor does
        search = read.get(what, lambda: index.search(vectors[:500], 500, exact=True))
        words = what.split(",")[0]
        with pytest.raises(
            CorruptIndexError, match=rf"the {words} of \d+ of \d+ items are not those that were written"
        ):
            search()
        assert "checksums" in index.verify().failed


def as_format_4(path: Path) -> None:
    """Take out of a file what format 5 brought."""
    with duckdb.connect(str(path)) as connection:
        connection.execute("ALTER TABLE semid_codes DROP COLUMN checksum")
        connection.execute("ALTER TABLE semid_v1.semid_codes DROP COLUMN checksum")
        kept = "CREATE OR REPLACE VIEW semid_v1.semid_vectors AS SELECT row, v, tail FROM main.semid_vectors "
        connection.execute(f"{kept} SEMI JOIN semid_v1.semid_codes USING (row)")
        connection.execute("ALTER TABLE semid_vectors DROP COLUMN v_checksum")
        connection.execute("ALTER TABLE semid_vectors DROP COLUMN tail_checksum")
        connection.execute("UPDATE semid_meta SET value = '4' WHERE key = 'format_version'")


def test_items_of_an_older_format_have_none_until_they_are_written_again(vectors, tmp_path):
    path = tmp_path / "index.duckdb"
    with semid.create(path, **OPTIONS, tail=8) as index:
        index.train(vectors)
        index.add(vectors[:500])
        index.retrain(compare=False)
    as_format_4(path)
    with semid.open(path, read_only=True) as index:
        assert checked(index)[0] == "skipped"
        assert index.search(vectors[5], 1).ids.tolist() == [5]
    with semid.open(path) as index:
        assert checked(index) == ("ok", 0)
        assert index.search(vectors[5], 1).ids.tolist() == [5]
        index.upsert(vectors[600:620], range(20))
        assert checked(index) == ("ok", 20)
        assert index.search(vectors[605], 1).ids.tolist() == [5]
        with semid.open(path, version=1) as old:
            assert checked(old)[0] == "ok"
            assert old.search(vectors[605], 1).ids.tolist() == [5]
