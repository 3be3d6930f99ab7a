"""The SQL macros, called through plain DuckDB over the file alone, and compared with Python and brute force."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import semid_index as semid
from semid_index import tables
from semid_index.codes import (
    CodeLayout,
    common_prefix_length,
    format_id,
    pack,
    pack_rest,
    parse_prefix,
    prefix_range,
    unpack,
)
from semid_index.errors import InvalidCodesError
from semid_index.index import SemanticIndex
from semid_index.macros import NAMES, IndexShape, create_macros
from semid_index.metrics import exact_search, normalized, paired_distances
from semid_index.testing import assert_same_codes

pytest.importorskip("faiss", reason="training needs FAISS")

ROOT = Path(__file__).resolve().parent.parent
ROWS = 1_100
EVERYTHING = 10**6  # more buckets, and more items, than there are

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"dim": 12, "levels": 4, "codebook_size": 16},
    "mixed": {"dim": 10, "levels": 3, "codebook_size": [100, 7, 33], "metric": "cosine"},
    "one level": {"dim": 5, "levels": 1, "codebook_size": 300, "metric": "ip"},
    "wide": {"dim": 9, "levels": 2, "codebook_size": [1_000, 600], "vectors": "int8"},
    "ten levels": {"dim": 8, "levels": 10, "codebook_size": 2, "metric": "ip", "vectors": "int8"},
    "long": {"dim": 16, "levels": 10, "codebook_size": 200, "metric": "cosine", "vectors": "none"},
    "long and mixed": {"dim": 6, "levels": 8, "codebook_size": [900, 700, 3, 1_000, 256, 257, 999, 400]},
    "long and small": {"dim": 5, "levels": 17, "codebook_size": 16, "metric": "ip", "vectors": "float16"},
    "balanced": {"dim": 8, "quantizer": "balanced-rq", "levels": 2, "codebook_size": 32, "vectors": "float16"},
    "strings": {"dim": 7, "levels": 3, "codebook_size": 8, "metric": "cosine", "vectors": "int8"},
    "vq": {"dim": 11, "quantizer": "vq", "levels": 1, "codebook_size": 70, "metric": "cosine"},
    "pq": {"dim": 12, "quantizer": "pq", "levels": 4, "codebook_size": 16, "metric": "ip"},
    "long pq": {"dim": 20, "quantizer": "pq", "levels": 10, "codebook_size": 256, "metric": "cosine"},
}


def random_shape(seed: int) -> dict[str, Any]:
    """Any number of levels from 1 to 10 of any sizes, any metric, anything stored."""
    random = np.random.default_rng(seed)
    levels = int(random.integers(1, 11))
    return {
        "dim": int(random.integers(1, 20)),
        "levels": levels,
        "codebook_size": [int(size) for size in np.exp(random.uniform(np.log(2), np.log(1_000), levels))],
        "metric": str(random.choice(["l2", "cosine", "ip"])),
        "vectors": str(random.choice(["float32", "float16", "int8", "none"])),
    }


SHAPES |= {f"random {seed}": random_shape(seed) for seed in range(4)}


@dataclass(repr=False)
class Case:
    """An index, and its file as any DuckDB client sees it."""

    index: SemanticIndex
    connection: duckdb.DuckDBPyConnection
    queries: NDArray[np.float32]

    def rows(self, query: str, *params: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(query, params).fetchall()

    def value(self, expression: str, *params: Any) -> Any:
        [[value]] = self.rows(f"SELECT {expression}", *params)
        return value

    def hits(self, call: str, *params: Any) -> tuple[list[Any], NDArray[np.float32]]:
        """Ids and distances that a search macro gives; their semantic IDs are those of the view."""
        found = self.rows(f"SELECT id, semantic_id, distance FROM {call}", *params)
        texts = dict(zip(self.ids, self.texts, strict=True))
        assert [text for _, text, _ in found] == [texts[id] for id, _, _ in found]
        return [id for id, _, _ in found], np.array([distance for _, _, distance in found], dtype=np.float32)

    @property
    def layout(self) -> CodeLayout:
        return self.index._store.layout

    @property
    def id_columns(self) -> str:
        return "sid, sid_rest" if self.layout.rest_levels else "sid"

    @cached_property
    def ids(self) -> list[Any]:
        return [id for (id,) in self.rows("SELECT id FROM semid_codes ORDER BY row")]

    @cached_property
    def codes(self) -> NDArray[np.int32]:
        """(n, levels), in the order of rows."""
        return self.index._store.codes_of(np.arange(len(self.ids)))

    @cached_property
    def texts(self) -> list[str]:
        return [format_id(codes) for codes in self.codes.tolist()]

    @cached_property
    def decoded(self) -> NDArray[np.float32]:
        return self.index.decode(self.codes)

    @cached_property
    def stored(self) -> NDArray[np.float32]:
        vectors = self.index.get(self.ids, vectors=True)["vector"].to_numpy(zero_copy_only=False)
        return np.stack(vectors).astype(np.float32)

    def distances(self, query: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return paired_distances(query[None], vectors[None], self.index.config.metric)[0]


@pytest.fixture(scope="module")
def make_case(tmp_path_factory, clustered) -> Iterator[Callable[[str], Case]]:
    cases: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in cases:
            folder = tmp_path_factory.mktemp("macros")
            vectors = clustered(ROWS + 5, SHAPES[name]["dim"], seed=3) + np.float32(1)
            ids = [f"item {number}" for number in range(ROWS)] if name == "strings" else np.arange(ROWS) * 3
            with semid.create(folder / "index.duckdb", iterations=2, **SHAPES[name]) as index:
                index.train(vectors)
                index.add(vectors[:700], ids[:700])
                index.add(vectors[700:ROWS], ids[700:])
            shutil.copy(folder / "index.duckdb", folder / "copy.duckdb")  # one process opens a file in one way only
            connection = duckdb.connect(folder / "copy.duckdb", read_only=True)
            cases[name] = Case(semid.open(folder / "index.duckdb", read_only=True), connection, vectors[ROWS:])
        return cases[name]

    yield make
    for case in cases.values():
        case.index.close()
        case.connection.close()


@pytest.fixture(params=SHAPES)
def case(request, make_case) -> Case:
    return make_case(request.param)


@pytest.fixture(params=[name for name, shape in SHAPES.items() if shape.get("quantizer") != "pq"])
def tree_case(request, make_case) -> Case:
    """One whose codes have prefixes."""
    return make_case(request.param)


@pytest.fixture
def plain(make_case) -> Case:
    return make_case("plain")


def assert_nearest(found: tuple[list[Any], NDArray[np.float32]], ids: list[Any], expected: NDArray[np.float32], k: int):
    """The k smallest of all distances, each with an item that has it; near-ties may come in any order."""
    tolerance = {"rtol": 1e-4, "atol": 2e-3 * float(np.abs(expected).max())}
    order = np.argsort(expected, kind="stable")[:k]
    assert len(found[0]) == len(set(found[0])) == len(order)
    np.testing.assert_allclose(found[1], expected[order], **tolerance)
    place = {id: row for row, id in enumerate(ids)}
    np.testing.assert_allclose(found[1], expected[[place[id] for id in found[0]]], **tolerance)
    assert np.all(np.diff(found[1]) >= 0)


# -- IDs and texts ----------------------------------------------------------------------------------------------------


def test_every_index_has_every_macro(case):
    found = case.rows("SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_name LIKE 'semid_%'")
    assert sorted(name for (name,) in found) == sorted(NAMES)


def test_text(case):
    assert case.rows(f"SELECT semid_text({case.id_columns}) FROM semid_codes ORDER BY row") == [
        (text,) for text in case.texts
    ]


def test_parse(case):
    parsed = [value for (value,) in case.rows("SELECT semid_parse(unnest(?))", case.texts)]
    sids = pack(case.codes, case.layout).tolist()
    if case.layout.rest_levels:
        rest = [tuple(row) for row in pack_rest(case.codes, case.layout).tolist()]
        assert [(one["sid"], one["sid_rest"]) for one in parsed] == list(zip(sids, rest, strict=True))
    else:
        assert parsed == sids


def test_parse_gives_the_lowest_sid_of_a_prefix(case):
    for depth in range(case.layout.levels + 1):
        prefix = case.codes[depth, :depth].tolist()
        for text in {format_id(prefix), format_id(prefix) + "-*"} if depth else {"", "*", " "}:
            parsed = case.value("semid_parse(?)", text)
            sid = parsed["sid"] if case.layout.rest_levels else parsed
            assert sid == prefix_range(prefix, case.layout)[0]
    assert case.value("semid_parse(NULL)") is None


@pytest.mark.parametrize(
    "text", ["x", "1-x", "1--2", "-1", "1-2-3-4-5", "16", "1-2-3-16", "1 2", "1.5", "9999999999", "1-*-2"]
)
def test_parse_refuses_what_python_refuses(text, plain):
    with pytest.raises(InvalidCodesError):
        parse_prefix(text, plain.layout)
    for call in ("SELECT semid_parse(?)", "FROM semid_under(?)", "FROM semid_children(?)"):
        with pytest.raises(duckdb.InvalidInputException, match=re.escape(f"'{text}'")):
            plain.rows(call, text)


def test_parse_takes_a_column(plain):
    assert plain.value("list(semid_parse(t) ORDER BY t) FROM (VALUES ('1-2'), ('3')) AS given (t)") == [0x1200, 0x3000]
    with pytest.raises(duckdb.InvalidInputException, match="no prefix"):
        plain.value("list(semid_parse(t)) FROM (VALUES ('1-2'), ('x')) AS given (t)")


# -- vectors ----------------------------------------------------------------------------------------------------------


def test_decode(case):
    found = case.rows(f"SELECT semid_decode({case.id_columns}) FROM semid_codes ORDER BY row LIMIT 300")
    np.testing.assert_array_equal(np.array([vector for (vector,) in found], dtype=np.float32), case.decoded[:300])


def test_encode(case):
    expected = case.index.encode(case.queries)
    found = [case.value("semid_encode(?)", query) for query in case.queries]
    if case.layout.rest_levels:
        rest = np.array([one["sid_rest"] for one in found])
        codes = unpack(np.array([one["sid"] for one in found]), case.layout, rest)
    else:
        codes = unpack(np.array(found), case.layout)
    comparable = normalized(case.queries) if case.index.config.metric == "cosine" else case.queries
    assert_same_codes(case.index._quantizer, comparable, expected, codes)
    assert case.value("semid_encode(NULL)") is None


def test_encode_and_decode_take_any_column(plain):
    """Also columns that are named like those of the tables of ours."""
    names = ("code", "level", "codeword", "sid", "left_over", "word", "b", "q", "z", "x")
    for name in names:
        found = plain.value(f"semid_decode({name}) FROM (SELECT sid AS {name} FROM semid_codes WHERE row = 3)")
        np.testing.assert_array_equal(np.array(found, dtype=np.float32), plain.decoded[3])
        expected = plain.value("semid_encode(?)", plain.stored[3])
        query = f"semid_encode({name}) FROM (SELECT v AS {name} FROM semid_vectors WHERE row = 3)"
        assert plain.value(query) == expected
        query = f"semid_text(semid_parse({name})) FROM (SELECT '1-2' AS {name})"
        assert plain.value(query) == "1-2-0-0"


# -- search -----------------------------------------------------------------------------------------------------------


def test_scan(case):
    for query in case.queries:
        expected = case.distances(query, case.decoded)
        assert_nearest(case.hits("semid_scan(?, 7)", query), case.ids, expected, 7)


def test_search_that_opens_everything_is_a_scan(case):
    for query in case.queries[:2]:
        found = case.hits(f"semid_search(?, 9, {EVERYTHING})", query)
        assert_nearest(found, case.ids, case.distances(query, case.decoded), 9)


def test_search_opens_the_best_buckets(tree_case):
    case, metric = tree_case, tree_case.index.config.metric
    depth = tables.bucket_depth(case.layout)
    names, bucket = np.unique(case.codes[:, :depth], axis=0, return_inverse=True)
    books = case.index._quantizer.codebooks
    sums = sum(books[level][names[:, level]] for level in range(depth))
    for query in normalized(case.queries) if metric == "cosine" else case.queries:
        scores = -(sums @ query) if metric == "ip" else ((sums - query) ** 2).sum(axis=1)
        order = np.argsort(scores)
        # as many as are clearly better than the next one, so that rounding does not matter
        probes = 1 + int(np.argmax(np.diff(scores[order])[: min(6, len(order) - 1)]))
        opened = np.isin(bucket.ravel(), order[:probes])
        ids = [id for id, inside in zip(case.ids, opened, strict=True) if inside]
        expected = case.distances(query, case.decoded[opened])
        assert_nearest(case.hits(f"semid_search(?, 5, nprobe := {probes})", query), ids, expected, 5)


def test_search_exact(case):
    if case.index.config.vectors not in ("float32", "int8"):
        with pytest.raises(duckdb.InvalidInputException, match=f'vectors="{case.index.config.vectors}"'):
            case.rows("FROM semid_search_exact(?, 5)", case.queries[0])
        return
    for query in case.queries:
        found = case.hits(f"semid_search_exact(?, 8, {EVERYTHING}, {EVERYTHING})", query)
        result = case.index.search(query, 8, exact=True)
        np.testing.assert_allclose(found[1], result.distances, rtol=1e-5, atol=1e-5)
        assert_nearest(found, case.ids, case.distances(query, case.stored), 8)


def test_search_exact_reranks_so_many(plain):
    """Of the 20 that are nearest by their codes, the 5 that are nearest."""
    for query in plain.queries:
        near, _ = plain.hits("semid_scan(?, 20)", query)
        rows = [plain.ids.index(id) for id in near]
        rows, distances = np.array(rows), plain.distances(query, plain.stored[rows])
        found = plain.hits(f"semid_search_exact(?, 5, {EVERYTHING}, rerank := 20)", query)
        assert_nearest(found, [plain.ids[row] for row in rows], distances, 5)


def test_search_many(case):
    with_all = f"semid_search_many('asked', 4, {EVERYTHING})"
    own = case.connection.cursor()
    own.execute(f"CREATE OR REPLACE TEMP TABLE asked (qid VARCHAR, v FLOAT[{case.index.config.dim}])")
    for number, query in enumerate(case.queries):
        own.execute("INSERT INTO asked VALUES (?, ?)", [f"query {number}", query])
    own.execute("INSERT INTO asked VALUES ('no query', NULL)")
    for call, single in ((with_all, "semid_scan(?, 4)"), ("semid_search_many('asked', 4, 3)", "semid_search(?, 4, 3)")):
        found = own.execute(f"SELECT qid, id, semantic_id, distance FROM {call}").fetchall()
        assert {qid for qid, *_ in found} == {f"query {number}" for number in range(len(case.queries))}
        for number, query in enumerate(case.queries):
            mine = [row[1:] for row in found if row[0] == f"query {number}"]
            alone = case.rows(f"SELECT id, semantic_id, distance FROM {single}", query)
            np.testing.assert_allclose([row[2] for row in mine], [row[2] for row in alone], rtol=1e-4, atol=1e-3)
            assert len({row[0] for row in mine}) == len(mine)


def test_similar(case):
    exact = case.index.config.vectors in ("float32", "int8")
    vectors = case.stored if exact else case.decoded
    for row in (0, 500, ROWS - 1):
        found = case.hits(f"semid_similar(?, 6, {EVERYTHING}, {EVERYTHING})", case.ids[row])
        others = np.arange(len(case.ids)) != row
        ids = [id for id in case.ids if id != case.ids[row]]
        assert_nearest(found, ids, case.distances(vectors[row], vectors[others]), 6)
        if exact:
            result = case.index.similar(case.ids[row], 6, exact=True)
            np.testing.assert_allclose(found[1], result.distances, rtol=1e-4, atol=1e-4)


def test_defaults_find_most_of_the_nearest(plain):
    """With 256 buckets and 200 candidates of 1,100 items, all but a few."""
    found = [set(plain.hits("semid_search_exact(?)", query)[0]) for query in plain.queries]
    true = [set(plain.index.search(query, exact=True).ids.tolist()) for query in plain.queries]
    assert sum(len(one & two) for one, two in zip(found, true, strict=True)) >= 0.9 * 10 * len(true)


def test_fewer_items_than_asked_for(plain):
    assert len(plain.rows(f"FROM semid_scan(?, {EVERYTHING})", plain.queries[0])) == ROWS
    assert len(plain.rows(f"FROM semid_search_exact(?, {EVERYTHING}, {EVERYTHING})", plain.queries[0])) == ROWS
    assert plain.rows("FROM semid_scan(?, 0)", plain.queries[0]) == []


SEARCHES = ("semid_scan", "semid_search", "semid_search_exact")


@pytest.mark.parametrize("name", SEARCHES)
def test_ways_to_give_a_query(name, plain):
    query = plain.stored[5]
    listed = ", ".join(repr(float(value)) for value in query)
    prepared = plain.connection.cursor()
    prepared.execute(f"PREPARE near AS SELECT id FROM {name}($1, $2)")
    expected = plain.rows(f"SELECT id FROM {name}(?, 3)", query)
    assert len(expected) == 3
    for found in (
        plain.rows(f"SELECT id FROM {name}([{listed}], 3)"),
        plain.rows(f"SELECT id FROM {name}((SELECT v FROM semid_vectors WHERE row = 5), k := 3)"),
        plain.rows(f"SELECT id FROM {name}(?, ?)", query.tolist(), 3),
        prepared.execute(f"EXECUTE near([{listed}], 3)").fetchall(),
    ):
        assert found == expected


@pytest.mark.parametrize("name", SEARCHES)
def test_queries_that_make_no_sense(name, make_case):
    plain = make_case("plain")
    assert plain.rows(f"FROM {name}(NULL)") == []
    with pytest.raises(duckdb.ConversionException, match="3 to array with length 12"):
        plain.rows(f"FROM {name}([1, 2, 3])")
    for value in ("nan", "inf", "1e30"):
        with pytest.raises(duckdb.InvalidInputException, match="finite values"):
            plain.rows(f"FROM {name}(list_resize(['{value}'::FLOAT], 12, 0))")
    if name != "semid_search_exact":
        with pytest.raises(duckdb.InvalidInputException, match="not be all zeros"):
            make_case("mixed").rows(f"FROM {name}(list_resize([]::FLOAT[], 10, 0))")


def test_an_item_that_is_not_there(plain):
    for name in ("semid_similar", "semid_siblings"):
        with pytest.raises(duckdb.InvalidInputException, match="no item with the id 1"):
            plain.rows(f"FROM {name}(1)")


def test_hits_join_with_items(plain):
    found = plain.rows(
        "SELECT id, distance FROM semid_search(?, 5) JOIN items USING (id) ORDER BY distance", plain.queries[0]
    )
    assert found == plain.rows("SELECT id, distance FROM semid_search(?, 5)", plain.queries[0])
    assert len(found) == 5


# -- prefixes ---------------------------------------------------------------------------------------------------------


def test_prefix(tree_case):
    case, sids = tree_case, pack(tree_case.codes, tree_case.layout)
    for depth, shift in enumerate(case.layout.shifts, 1):
        found = case.rows(
            f"SELECT semid_prefix(c.sid, {depth}), v.p{depth} "
            "FROM semid_codes AS c JOIN semantic_ids AS v USING (id) ORDER BY c.row"
        )
        assert found == [(prefix, prefix) for prefix in (sids >> shift).tolist()]
    for depth in (0, case.layout.packed_levels + 1, "NULL"):
        with pytest.raises(duckdb.InvalidInputException, match=f"from 1 to {case.layout.packed_levels}, not"):
            case.value(f"semid_prefix(5, {depth})")


def test_common_prefix_len(tree_case):
    case, random = tree_case, np.random.default_rng(0)
    one, two = random.integers(0, len(case.ids), size=(2, 400))
    # changed at one level only, so that every length occurs, and some are the same
    alike = case.codes[one].copy()
    level = random.integers(0, case.layout.levels, size=400)
    alike[np.arange(400), level] = case.codes[two, level]
    for a, b in ((case.codes[one], alike), (case.codes[one], case.codes[two])):
        columns = [value for codes in (a, b) for value in id_values(codes, case.layout)]
        arguments = ", ".join(f"unnest(?::{kind})" for kind, _ in columns)
        found = case.rows(f"SELECT semid_common_prefix_len({arguments})", *(values for _, values in columns))
        assert [length for (length,) in found] == common_prefix_length(a, b).tolist()
    missing = ", ".join(["NULL"] * len(columns))
    assert case.value(f"semid_common_prefix_len({missing})") is None


def id_values(codes: NDArray[np.int32], layout: CodeLayout) -> list[tuple[str, list[Any]]]:
    """The sids, and rests if there are any, with their types as lists in SQL."""
    values: list[tuple[str, list[Any]]] = [("BIGINT[]", pack(codes, layout).tolist())]
    if layout.rest_levels:
        values.append((f"{tables.rest_type(layout)}[]", pack_rest(codes, layout).tolist()))
    return values


def test_under(tree_case):
    case = tree_case
    for depth in range(case.layout.levels + 1):
        text = format_id(case.codes[7, :depth].tolist())
        found = case.rows("SELECT id, semantic_id FROM semid_under(?)", text)
        expected = case.index.prefix(text)
        assert sorted(found) == sorted(
            zip(expected["id"].to_pylist(), expected["semantic_id"].to_pylist(), strict=True)
        )
        assert found
        assert case.rows("FROM semid_under(?)", f" {text}-* " if text else "*") == found
    assert case.rows("FROM semid_under(NULL)") == []


def test_tree(tree_case):
    case = tree_case
    for depth in range(1, case.layout.levels + 1):
        expected = [(format_id(shelf.prefix), shelf.items) for shelf in case.index.tree(depth)]
        assert case.rows(f"SELECT prefix, items FROM semid_tree({depth})") == expected
    assert case.rows("FROM semid_tree()") == case.rows("FROM semid_tree(1)")
    for depth in (0, case.layout.levels + 1):
        with pytest.raises(duckdb.InvalidInputException, match=f"depth must be .* from 1 to {case.layout.levels}, not"):
            case.rows(f"FROM semid_tree({depth})")


def test_children(tree_case):
    case = tree_case
    for depth in range(case.layout.levels):
        prefix = case.codes[11, :depth].tolist()
        expected = [(format_id(shelf.prefix), shelf.items) for shelf in case.index.tree(1, under=prefix)]
        assert case.rows("SELECT prefix, items FROM semid_children(?)", format_id(prefix)) == expected
    with pytest.raises(duckdb.InvalidInputException, match="has too many codes"):
        case.rows("FROM semid_children(?)", case.texts[11])


def test_siblings(tree_case):
    case, row = tree_case, 13
    for depth in range(case.layout.levels + 1):
        same = common_prefix_length(case.codes, case.codes[row]) >= depth
        expected = sorted((case.ids[i], case.texts[i]) for i in np.flatnonzero(same) if i != row)
        assert sorted(case.rows("SELECT id, semantic_id FROM semid_siblings(?, ?)", case.ids[row], depth)) == expected
    usual = case.rows("FROM semid_siblings(?)", case.ids[row])
    assert usual == case.rows("FROM semid_siblings(?, ?)", case.ids[row], case.layout.levels - 1)


# -- what DuckDB does not read ----------------------------------------------------------------------------------------

MILLION = 1_000_000
ITEM = 49_221
SID = ITEM * ((1 << 32) // MILLION)  # 12-153-5-94
NEAR = (12 << 24) | (153 << 16)  # the lowest sid below 12-153

PRUNING = (
    "p1 = 12",
    "p2 = 3225",
    f"p3 = {SID >> 8}",
    f"p4 = {SID}",
    "p2 BETWEEN 3225 AND 3226",
    "p2 = semid_prefix(semid_parse('12-153'), 2)",
    "p2 = 3225 AND c3 = 5",
    f"sid BETWEEN {NEAR} AND {NEAR + 65535}",
    "sid BETWEEN semid_parse('12-153') AND semid_parse('12-154') - 1",
)
ONLY_IN_2 = ("p1 = 12", f"p3 = {SID >> 8}")
NOT_PRUNING = (
    "c1 = 12 AND c2 = 153",
    "p1 = 12 AND c3 = 5",
    "semid_prefix(sid, 2) = 3225",
    "semantic_id LIKE '12-153-%'",
)


@pytest.fixture(scope="module")
def million(tmp_path_factory, clustered) -> Iterator[duckdb.DuckDBPyConnection]:
    """4 x 256, with a million items written by SQL: their sids are spread evenly, and their rows are in that order."""
    path = tmp_path_factory.mktemp("million") / "index.duckdb"
    with semid.create(path, dim=2, levels=4, codebook_size=256, iterations=1, vectors="none") as index:
        index.train(clustered(600, 2))
    with duckdb.connect(path, config={"storage_compatibility_version": "v1.2.0"}) as connection:
        step = (1 << 32) // MILLION
        connection.execute(
            "INSERT INTO semid_codes BY NAME SELECT i AS row, i AS id, i * $1 AS sid, (i * $1) >> 16 AS bucket, "
            "0 AS dup_rank, 1 AS norm2 FROM range($2) AS numbers (i)",
            [step, MILLION],
        )
        tables.add_buckets(connection.execute, CodeLayout((256,) * 4))
    with duckdb.connect(path, read_only=True) as connection:
        yield connection


def rows_scanned(connection: duckdb.DuckDBPyConnection, query: str, folder: Path) -> int:
    """How many rows of ``semid_codes`` a query reads, to the row group of 122,880."""
    if duckdb.__version__.startswith("1."):
        output = folder / "profile.json"
        settings = json.dumps({"OPERATOR_ROWS_SCANNED": "true", "CUMULATIVE_ROWS_SCANNED": "true"})
        connection.execute(f"PRAGMA custom_profiling_settings='{settings}'")
        connection.execute("PRAGMA enable_profiling='json'")
        connection.execute(f"SET profiling_output='{output}'")
        connection.execute(query).fetchall()
        connection.execute("PRAGMA disable_profiling")
        return int(json.loads(output.read_text())["cumulative_rows_scanned"])
    plan = connection.execute(f"EXPLAIN ANALYZE {query}").fetchall()[0][1]
    scans = re.findall(r"Table: \S*semid_codes.*?Row Groups Scanned: *(\d+) */ *\d+", plan, re.S)
    assert scans, plan
    return 122_880 * sum(map(int, scans))


@pytest.mark.parametrize("condition", PRUNING)
def test_prefixes_skip_row_groups(condition, million, tmp_path):
    query = f"SELECT count(dup_rank) FROM semantic_ids WHERE {condition}"
    [[count]] = million.execute(query).fetchall()
    assert count == million.execute(f"SELECT count_if({condition}) FROM semantic_ids").fetchall()[0][0] > 0
    scanned = rows_scanned(million, query, tmp_path)
    if condition in ONLY_IN_2 and duckdb.__version__.startswith("1."):
        assert scanned == MILLION
    else:
        assert scanned <= 2 * 122_880


@pytest.mark.parametrize("condition", NOT_PRUNING)
def test_what_the_documentation_warns_of(condition, million, tmp_path):
    """Where this fails, DuckDB has learned something, and the documentation can be shorter."""
    query = f"SELECT count(dup_rank) FROM semantic_ids WHERE {condition}"
    assert rows_scanned(million, query, tmp_path) >= MILLION


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) FROM semid_under('12-153')",
        "SELECT count(*) FROM semid_under('12-153-*')",
        "SELECT sum(items) FROM semid_children('12-153')",
        "SELECT count(*) FROM semid_siblings(49221, 2)",
        "SELECT count(*) FROM semantic_ids AS one JOIN semantic_ids AS other ON other.p2 = one.p2 WHERE one.id = 49221",
        "SELECT count(*) FROM semid_search([1.0, 2.0], 5, nprobe := 1)",
    ],
)
def test_macros_skip_row_groups(query, million, tmp_path):
    assert million.execute(query).fetchall()[0][0] > 0
    if "siblings" in query and duckdb.__version__.startswith("1."):
        pytest.skip("DuckDB 1.5 looks at all sids, because it learns the range while it runs")
    assert rows_scanned(million, query, tmp_path) <= 4 * 122_880


# -- where there is no answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        "SELECT semid_prefix(1, 2)",
        "SELECT semid_common_prefix_len(1, 2)",
        "FROM semid_under('1')",
        "FROM semid_children('1')",
        "FROM semid_siblings(3)",
        "FROM semid_siblings(3, depth := 1)",
        "FROM semid_tree()",
        "SELECT count(*) FROM semid_tree(2)",
    ],
)
def test_codes_without_prefixes(call, make_case):
    with pytest.raises(duckdb.InvalidInputException, match="no hierarchy"):
        make_case("pq").rows(call)


def test_quantizers_without_codebooks(tmp_path, clustered):
    vectors = clustered(50, 70)
    with semid.create(tmp_path / "index.duckdb", dim=70, quantizer="sq4", tail=0) as index:
        index.train(vectors)
        index.add(vectors)
    with duckdb.connect(tmp_path / "index.duckdb", read_only=True) as connection:
        texts = connection.execute("SELECT semantic_id, sid, sid_rest FROM semantic_ids").fetchall()
        assert len({text for text, *_ in texts}) == 50
        for text, sid, rest in texts:
            parsed = connection.execute("SELECT p.sid, p.sid_rest FROM (SELECT semid_parse(?) AS p)", [text]).fetchall()
            assert parsed == [(sid, rest)]
            assert connection.execute("SELECT semid_text(?, ?)", [sid, rest]).fetchall() == [(text,)]
        calls = ["SELECT semid_decode(1, 2)", "SELECT semid_encode([1.0])", "FROM semid_scan([1.0], k := 3)"]
        calls += [f"FROM {name}([1.0], 3, nprobe := 4)" for name in ("semid_search", "semid_search_exact")]
        calls += ["FROM semid_search_many('items')", "FROM semid_similar(3, 5)"]
        for call in calls:
            with pytest.raises(duckdb.InvalidInputException, match="no codebooks"):
                connection.execute(call).fetchall()


@pytest.mark.parametrize(
    "options",
    [{"beam": 3}, {"prefix_levels": 1, "prefix_beam": 4}, {"normalize_residuals": True}, {"quantizer": "lsq"}],
    ids=str,
)
def test_encoding_that_is_not_level_by_level_is_refused(options, vectors):
    """Everything else works as ever."""
    with semid.create(dim=24, levels=3, codebook_size=16, **options) as index:
        index.train(vectors[:500])
        index.add(vectors[:500])
        with pytest.raises(duckdb.InvalidInputException, match="level by level"):
            index.sql("SELECT semid_encode(?)", [vectors[0]]).fetchall()
        codes = index.encode(vectors[:1])
        [[decoded]] = index.sql("SELECT semid_decode(?)", [int(pack(codes, CodeLayout((16,) * 3))[0])]).fetchall()
        np.testing.assert_allclose(np.array(decoded), index.decode(codes)[0], rtol=1e-5, atol=1e-5)
        _, [expected] = exact_search(vectors[:1], index.decode(index._store.codes_of(np.arange(500))), 4, "l2")
        found = index.sql("SELECT distance FROM semid_scan(?, 4)", [vectors[0]]).fetchall()
        np.testing.assert_allclose([distance for (distance,) in found], expected, rtol=1e-3)


def test_levels_without_codewords_add_nothing(tmp_path, plain):
    """As if the last level told items apart that share an ID."""
    shape = IndexShape(plain.layout, 12, "l2", "float32", codeword_levels=3, hierarchical=True, greedy=True)
    source = str(next(path for (path,) in plain.rows("SELECT path FROM duckdb_databases() WHERE NOT internal")))
    shutil.copy(source, tmp_path / "index.duckdb")
    three = plain.codes.copy()
    three[:, 3] = 0
    books = plain.index._quantizer.codebooks
    decoded = sum(books[level][plain.codes[:, level]] for level in range(3))
    with duckdb.connect(tmp_path / "index.duckdb") as connection:
        connection.execute("DELETE FROM semid_codebook WHERE level = 4")
        norms = {"row": np.arange(ROWS), "norm2": (decoded**2).sum(axis=1)}
        connection.register("norms", pa.table(norms))
        connection.execute("UPDATE semid_codes SET norm2 = norms.norm2 FROM norms WHERE norms.row = semid_codes.row")
        connection.execute("DELETE FROM semid_buckets")
        tables.add_buckets(connection.execute, plain.layout)
        for statement in create_macros(shape):
            connection.execute(statement)
        cut = Case(plain.index, connection, plain.queries)
        for query in plain.queries:
            expected = plain.distances(query, decoded)
            assert_nearest(cut.hits("semid_scan(?, 5)", query), plain.ids, expected, 5)
            assert_nearest(cut.hits(f"semid_search(?, 5, {EVERYTHING})", query), plain.ids, expected, 5)
        codes = [unpack(np.array([cut.value("semid_encode(?)", q)]), plain.layout)[0] for q in plain.queries]
        expected = plain.index.encode(plain.queries)
        expected[:, 3] = 0
        np.testing.assert_array_equal(codes, expected)
        found = np.array(cut.value("semid_decode(sid) FROM semid_codes WHERE row = 9"), dtype=np.float32)
        np.testing.assert_allclose(found, decoded[9], rtol=1e-6)


# -- the buckets ------------------------------------------------------------------------------------------------------


def test_buckets_are_those_of_the_items(tree_case):
    """After two adds; with the squared lengths of what their codes decode to."""
    case, depth = tree_case, tables.bucket_depth(tree_case.layout)
    names = np.unique(case.codes[:, :depth], axis=0)
    sums = sum(case.index._quantizer.codebooks[level][names[:, level]] for level in range(depth))
    part = CodeLayout(case.layout.codebook_sizes[:depth])
    found = case.rows("SELECT bucket, norm2 FROM semid_buckets ORDER BY bucket")
    assert [bucket for bucket, _ in found] == pack(names, part).tolist()
    np.testing.assert_allclose([norm2 for _, norm2 in found], (sums**2).sum(axis=1), rtol=1e-4, atol=1e-3)


# -- older files ------------------------------------------------------------------------------------------------------

GOLDEN = ROOT / "tests" / "golden" / "v1"


@pytest.mark.parametrize("name", ["plain", "strings", "long", "flat", "scalar"])
def test_a_file_of_format_1_gets_the_macros(name, tmp_path):
    path = tmp_path / "index.duckdb"
    path.write_bytes(gzip.decompress((GOLDEN / f"{name}.duckdb.gz").read_bytes()))
    queries = np.array(json.loads((GOLDEN / f"{name}.json").read_text())["queries"], dtype=np.float32)
    before = path.read_bytes()
    with semid.open(path, read_only=True) as index, pytest.raises(duckdb.CatalogException, match="semid_text"):
        index.sql("SELECT semid_text(sid) FROM semid_codes")
    assert path.read_bytes() == before
    with semid.open(path) as index:
        assert index._store.meta("format_version") == tables.FORMAT_VERSION
        decoded = index.decode(index._store.codes_of(np.arange(len(index)))) if name != "scalar" else None
        metric = index.config.metric
    with duckdb.connect(path, read_only=True) as connection:
        found = connection.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_name[:6] = 'semid_'"
        )
        assert sorted(name for (name,) in found.fetchall()) == sorted(NAMES)
        if decoded is not None:
            for query in queries:
                _, [expected] = exact_search(query[None], decoded, 4, metric)
                for call in ("semid_scan(?, 4)", f"semid_search(?, 4, {EVERYTHING})"):
                    hits = connection.execute(f"SELECT distance FROM {call}", [query]).fetchall()
                    np.testing.assert_allclose([distance for (distance,) in hits], expected, rtol=1e-4, atol=1e-4)


def test_an_untrained_file_of_format_1(tmp_path, vectors):
    path = tmp_path / "index.duckdb"
    semid.create(path, dim=24, levels=2, codebook_size=8).close()
    with duckdb.connect(path) as connection:  # what format 1 had before training is the same
        connection.execute("UPDATE semid_meta SET value = '1' WHERE key = 'format_version'")
    with semid.open(path) as index:
        index.train(vectors)
        index.add(vectors)
        assert len(index.sql("FROM semid_search(?, 3)", [vectors[0]]).fetchall()) == 3


# -- other clients ----------------------------------------------------------------------------------------------------

OTHER_DUCKDB = ROOT / ".duckdb-1.5"

CALLS = {
    "text": "SELECT semid_text(sid) FROM semid_codes ORDER BY row",
    "prefix": "SELECT semid_prefix(sid, 2), semid_common_prefix_len(sid, 0) FROM semid_codes ORDER BY row",
    "parse": "SELECT semid_parse('3-1')",
    "decode": "SELECT semid_decode(sid) FROM semid_codes WHERE row < 3 ORDER BY row",
    "encode": "SELECT semid_encode(v) FROM semid_vectors WHERE row = 3",
    "scan": "FROM semid_scan((SELECT v FROM semid_vectors WHERE row = 7), 5)",
    "search": "FROM semid_search((SELECT v FROM semid_vectors WHERE row = 7), 5)",
    "search_exact": "FROM semid_search_exact((SELECT v FROM semid_vectors WHERE row = 7), 5)",
    "search_many": "FROM semid_search_many('picked', 3)",
    "similar": "FROM semid_similar(7)",
    "under": "SELECT * FROM semid_under('3-1') ORDER BY id",
    "children": "FROM semid_children('3')",
    "siblings": "SELECT * FROM semid_siblings(7, 1) ORDER BY id",
    "tree": "FROM semid_tree(2)",
}
PICKED = "CREATE TEMP VIEW picked AS SELECT row AS qid, v FROM {}semid_vectors WHERE row IN (3, 4)"


@pytest.fixture(scope="module")
def answers(trained_file) -> dict[str, list[list[Any]]]:
    with duckdb.connect(trained_file, read_only=True) as connection:
        connection.execute(PICKED.format(""))
        found = {name: connection.execute(call).fetchall() for name, call in CALLS.items()}
    assert all(found.values())
    return json.loads(json.dumps(found))


def assert_same_answers(found: dict[str, list[list[Any]]], expected: dict[str, list[list[Any]]]) -> None:
    assert set(found) == set(expected)
    for name, rows in expected.items():
        for one, two in zip(found[name], rows, strict=True):
            for a, b in zip(one, two, strict=True):
                assert a == (pytest.approx(b, rel=1e-4) if isinstance(b, float | list) else b), name


def test_attached(trained_file, answers):
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{trained_file}' AS attached (READ_ONLY)")
        assert connection.execute("SELECT attached.semid_text(5)").fetchall() == [("0-0-5",)]
        connection.execute(PICKED.format("attached."))
        connection.execute("USE attached")
        found = {name: connection.execute(call).fetchall() for name, call in CALLS.items()}
    assert_same_answers(json.loads(json.dumps(found)), answers)


def test_a_copy_has_them(trained_file, answers, tmp_path):
    with duckdb.connect(tmp_path / "copy.duckdb") as connection:
        connection.execute(f"ATTACH '{trained_file}' AS original (READ_ONLY)")
        connection.execute("COPY FROM DATABASE original TO copy")
        connection.execute(PICKED.format(""))
        found = {name: connection.execute(call).fetchall() for name, call in CALLS.items()}
    assert_same_answers(json.loads(json.dumps(found)), answers)


def test_command_line_client(trained_file, answers):
    if importlib.util.find_spec("duckdb_cli") is None:
        pytest.skip("the package duckdb-cli is not installed")
    command = [sys.executable, "-m", "duckdb_cli", "-readonly", "-json", str(trained_file)]
    found = {}
    for name, call in CALLS.items():
        script = f"{PICKED.format('')};\n{call};\n"
        done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[name] = [list(row.values()) for row in json.loads(done.stdout)]
    for name in ("decode",):  # arrays are printed as text
        found[name] = [[json.loads(value) if isinstance(value, str) else value for value in row] for row in found[name]]
    assert_same_answers(found, answers)


WITH_THE_OTHER = """
import json, sys
file, picked, calls, *not_from = sys.argv[1:]
sys.path = [folder for folder in sys.path if folder not in not_from]
import duckdb

connection = duckdb.connect(file, read_only=True)
connection.execute(picked)
found = {name: connection.execute(call).fetchall() for name, call in json.loads(calls).items()}
print(json.dumps([duckdb.__version__, found]))
"""


def test_the_other_duckdb(trained_file, answers, run_python):
    """In the run with DuckDB 2 that is DuckDB 1.5, and in the run with 1.5 it is the one that is installed."""
    arguments = (WITH_THE_OTHER, trained_file, PICKED.format(""), json.dumps(CALLS))
    if duckdb.__version__.startswith("1."):
        version, found = json.loads(run_python(*arguments, Path(duckdb.__file__).parent.parent))
    elif (OTHER_DUCKDB / "duckdb").is_dir():
        version, found = json.loads(run_python(*arguments, path=OTHER_DUCKDB))
    else:
        pytest.skip(f"'make test-duckdb-1.5' installs the other DuckDB into {OTHER_DUCKDB.name}, and it is not there")
    if version == duckdb.__version__:
        pytest.skip(f"there is only one DuckDB here, {version}")
    assert_same_answers(found, answers)


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.sql_search", "--rows", "2000", "--dim", "8", "--codebook-size", "16"]
    command += ["--folder", str(tmp_path), "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recalls = dict(re.findall(r"^(.*): .* recall@10 ([\d.]+)$", done.stdout, re.M))
    assert float(recalls["brute force"]) == 1
    assert float(recalls["semid_search_exact, 1,024 probes, 1,000 re-ranked"]) > 0.95
