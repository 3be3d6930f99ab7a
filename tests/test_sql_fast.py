"""``semid_search`` and the like in ``index.sql``, where they run in Python: the same hits, many queries at a time."""

from __future__ import annotations

import gc
import gzip
import logging
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray
from typer.testing import CliRunner

import semid_index as semid
from semid_index.cli import app
from semid_index.errors import IndexClosedError
from semid_index.index import SemanticIndex
from semid_index.metrics import exact_search, normalized
from semid_index.sql_search import SEARCHES

pytest.importorskip("faiss", reason="training needs FAISS")

ROWS, DIM, K = 1_500, 24, 6
ALL = 10**6  # more leaves than there are
OPTIONS: dict[str, dict[str, Any]] = {
    "l2": {},
    "cosine": {"metric": "cosine"},
    "ip": {"metric": "ip"},
    "strings": {},
    "int8": {"vectors": "int8", "metric": "cosine"},
    "float16": {"vectors": "float16"},
    "no vectors": {"vectors": "none"},
    "long": {"levels": 9, "codebook_size": 200, "metric": "ip"},
    "flat": {"quantizer": "pq", "levels": 4},
    "scalar": {"quantizer": "sq8", "levels": 1, "codebook_size": 256},
}
FOUR = ("l2", "cosine", "ip", "strings")


class Case:
    """An index, and queries that are none of its items."""

    def __init__(self, name: str, path: Path, vectors: NDArray[np.float32]) -> None:
        options = {"levels": 3, "codebook_size": 16, **OPTIONS[name]}
        if name == "scalar":
            options = {"quantizer": "sq8"}
        self.vectors, self.queries = vectors[:ROWS], vectors[ROWS : ROWS + 5]
        self.ids = [f"item {row}" for row in range(ROWS)] if name == "strings" else list(range(0, 3 * ROWS, 3))
        with semid.create(path, dim=DIM, **options) as index:
            index.train(self.vectors)
            index.add(self.vectors, self.ids, metadata={"word": [f"word {row}" for row in range(ROWS)]})
        self.index = semid.open(path, read_only=True)

    def decoded(self) -> NDArray[np.float32]:
        return self.index.decode(self.index._store.codes_of(np.arange(ROWS)))


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory, vectors: NDArray[np.float32]) -> Iterator[Any]:
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp("fast") / "index.duckdb", vectors)
        return made[name]

    yield make
    for case in made.values():
        case.index.close()


@pytest.fixture(params=OPTIONS)
def case(request: pytest.FixtureRequest, make_case: Any) -> Case:
    return make_case(request.param)


@pytest.fixture
def plain(make_case: Any) -> Case:
    return make_case("l2")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Takes down which macros ran in Python, and for how many queries."""
    caplog.set_level(logging.DEBUG, logger="semid_index")
    return caplog


def ran(log: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    """Macros that ran in Python since this was asked last, with the number of queries of each run."""
    told = [re.fullmatch(r"(\w+) ran in Python: (\d+) queries, .*", record.message) for record in log.records]
    log.clear()
    return [(match[1], int(match[2])) for match in told if match]


def hits(index: SemanticIndex, call: str, *params: Any, pure: bool = False) -> list[tuple[Any, str, float]]:
    return index.sql(f"SELECT id, semantic_id, distance FROM {call}", params, pure=pure).fetchall()


def assert_same(found: list[tuple[Any, str, float]], expected: semid.SearchResult) -> None:
    assert [id for id, *_ in found] == expected.ids.tolist()
    assert [text for _, text, _ in found] == expected.semantic_ids.tolist()
    assert [distance for *_, distance in found] == expected.distances.tolist()


# -- the same hits ----------------------------------------------------------------------------------------------------


def test_exact_search_is_that_of_the_index(case, log):
    for query in case.queries:
        if case.index.config.vectors == "none":
            with pytest.raises(duckdb.Error, match='vectors="none"'):
                hits(case.index, "semid_search_exact(?)", query)
            continue
        assert_same(hits(case.index, f"semid_search_exact(?, {K})", query), case.index.search(query, K))
        assert_same(
            hits(case.index, f"semid_search_exact(?, {K}, nprobe := 2, rerank := 20)", query),
            case.index.search(query, K, probes=2, rerank=20),
        )
        assert ran(log) == [("semid_search_exact", 1)] * 2


def test_search_is_by_codes(case, log):
    """Brute force over what the codes decode to, once all leaves are opened."""
    metric, decoded = case.index.config.metric, case.decoded()
    for query in case.queries:
        found = hits(case.index, f"semid_search(?, {K}, {ALL})", query)
        asked = normalized(query[None]) if metric == "cosine" else query[None]
        rows, distances = exact_search(asked, decoded, ROWS, metric)
        np.testing.assert_allclose([distance for *_, distance in found], distances[0, :K], rtol=1e-4, atol=1e-4)
        of = dict(zip(rows[0].tolist(), distances[0].tolist(), strict=True))
        mine = [of[case.ids.index(id)] for id, *_ in found]
        np.testing.assert_allclose(mine, distances[0, :K], rtol=1e-4, atol=1e-4)
        texts = dict(zip(*(case.index.get([id for id, *_ in found])[name].to_pylist() for name in TEXT), strict=True))
        assert [texts[id] for id, *_ in found] == [text for _, text, _ in found]
        assert ran(log) == [("semid_search", 1)]


TEXT = ("id", "semantic_id")


@pytest.mark.parametrize("probes", [1, 3])
def test_search_opens_the_leaves_that_the_index_opens(probes, make_case):
    """With ``vectors="none"``, searching by codes is all that searching is."""
    case = make_case("no vectors")
    for query in case.queries:
        found = hits(case.index, f"semid_search(?, {K}, nprobe := {probes})", query)
        assert_same(found, case.index.search(query, K, probes=probes))


def test_similar_is_that_of_the_index(case, log):
    for id in case.ids[3:6]:
        assert_same(hits(case.index, f"semid_similar(?, {K})", id), case.index.similar(id, K))
        found = hits(case.index, f"semid_similar(?, {K}, 2, 30)", id)
        assert_same(found, case.index.similar(id, K, probes=2, rerank=30))
        assert ran(log) == [("semid_similar", 1)] * 2


@pytest.mark.parametrize("name", FOUR)
def test_what_is_alike_in_the_file(name, make_case):
    """Columns and types; and, where all is opened, the distances too."""
    case = make_case(name)
    calls = {f"semid_search(?, {K}, {ALL})": case.queries[0], f"semid_similar(?, {K}, {ALL}, {ALL})": case.ids[7]}
    calls[f"semid_search_exact(?, {K}, {ALL}, {ALL})"] = case.queries[0]
    for call, value in calls.items():
        fast, pure = (case.index.sql(f"FROM {call}", [value], pure=pure) for pure in (False, True))
        assert (fast.columns, fast.types) == (pure.columns, pure.types)
        assert len(pure.fetchall()) == K
        for one, other in zip(fast.fetchall(), pure.fetchall(), strict=True):
            assert one[2] == pytest.approx(other[2], rel=1e-4, abs=1e-4)


def test_pure_is_what_the_file_has(plain, log, tmp_path):
    shutil.copy(plain.index._store.path, tmp_path / "copy.duckdb")
    calls = ("semid_search(?, 5, 3)", "semid_search_exact(?, 5, 3, 9)")
    with duckdb.connect(tmp_path / "copy.duckdb", read_only=True) as connection:
        for call in calls:
            stored = connection.execute(f"FROM {call}", [plain.queries[1]]).fetchall()
            assert hits(plain.index, call, plain.queries[1], pure=True) == stored
    assert ran(log) == []


# -- all that SQL can do with them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
def test_a_search_for_each_row_of_a_table_is_one_search(name, make_case, log):
    case = make_case(name)
    count = 300
    given = case.vectors[:count] + np.float32(0.25)
    table = f"(SELECT row AS number, v::FLOAT[{DIM}] AS v FROM (SELECT unnest(?) AS v, unnest(range({count})) AS row))"
    found = case.index.sql(
        f"SELECT asked.number, list(hit.id ORDER BY hit.distance), list(hit.distance ORDER BY hit.distance) "
        f"FROM {table} AS asked, LATERAL semid_search_exact(asked.v, {K}) AS hit GROUP BY ALL ORDER BY ALL",
        [given.tolist()],
    ).fetchall()
    assert sum(queries for _, queries in ran(log)) == count
    assert len(found) == count
    expected = case.index.search(given, K)
    for number, ids, distances in found:
        assert ids == expected.ids[number].tolist()
        assert distances == pytest.approx(expected.distances[number].tolist(), rel=1e-5, abs=1e-5)


def test_thousands_of_queries_take_few_searches(plain, log):
    found = plain.index.sql(
        "SELECT count(*), count(DISTINCT v.row) FROM semid_vectors AS v, LATERAL semid_search(v.v, 3) AS hit"
    ).fetchall()
    assert found == [(3 * ROWS, ROWS)]
    runs = ran(log)
    assert sum(queries for _, queries in runs) == len(np.unique(plain.vectors, axis=0))
    assert len(runs) <= 4


def test_similar_for_each_row(plain, log):
    found = plain.index.sql(
        "SELECT i.id, list(hit.id ORDER BY hit.distance) FROM items AS i, LATERAL semid_similar(i.id, 4) AS hit "
        "WHERE i.id < 300 GROUP BY i.id ORDER BY i.id"
    ).fetchall()
    assert found == [(id, plain.index.similar(id, 4).ids.tolist()) for id in range(0, 300, 3)]
    assert sum(queries for _, queries in ran(log)) == 100
    assert all(id not in others for id, others in found)


def test_options_may_differ_from_row_to_row(plain):
    found = plain.index.sql(
        "SELECT asked.k, count(hit.id) FROM (SELECT unnest([1, 4, 4, 7]) AS k, unnest([1, 2, 3, 4]) AS n) AS asked, "
        "LATERAL semid_search(list_resize([]::FLOAT[], 24, asked.n), asked.k) AS hit GROUP BY asked.n, asked.k "
        "ORDER BY ALL"
    ).fetchall()
    assert found == [(1, 1), (4, 4), (4, 4), (7, 7)]


def test_search_many(plain, log):
    script = """
        CREATE TEMP TABLE asked AS SELECT 'from ' || id AS qid, v FROM semid_codes JOIN semid_vectors USING (row)
        WHERE id IN (30, 60, 90);
        FROM semid_search_many('asked', 2)
    """
    fast, pure = plain.index.sql(script), plain.index.sql(script.replace("2)", "2, 100000)"), pure=True)
    assert (fast.columns, fast.types) == (pure.columns, pure.types)
    found, expected = fast.fetchall(), pure.fetchall()
    assert ran(log) == [("semid_search_many", 3)]
    assert [qid for qid, *_ in found] == ["from 30"] * 2 + ["from 60"] * 2 + ["from 90"] * 2
    assert [row[3] for row in found] == pytest.approx([row[3] for row in expected], rel=1e-4)


def test_null_and_nothing(plain):
    assert hits(plain.index, "semid_search(NULL)") == []
    assert hits(plain.index, "semid_similar(NULL)") == []
    found = plain.index.sql(
        "SELECT n, count(*) FROM (VALUES (1, NULL), (2, ?)) AS asked (n, v), LATERAL semid_search_exact(v::FLOAT[], 3) "
        "GROUP BY n",
        [plain.queries[0]],
    ).fetchall()
    assert found == [(2, 3)]
    nobody = "FROM (SELECT v FROM semid_vectors WHERE false) AS asked, LATERAL semid_search(asked.v)"
    assert plain.index.sql(nobody).fetchall() == []


def test_names_that_callers_use(plain):
    """Columns named like what the macros are made of."""
    expected = plain.index.search(plain.queries[0], 3).ids.tolist()
    for name in ("hit", "id", "k", "query", "nprobe", "rerank", "distance", "semid_found", "semid_t", "table_name"):
        found = plain.index.sql(
            f"SELECT found.id FROM (SELECT ?::FLOAT[{DIM}] AS {name}) AS asked, "
            f"LATERAL semid_search_exact(asked.{name}, 3) AS found ORDER BY found.distance",
            [plain.queries[0]],
        )
        assert [id for (id,) in found.fetchall()] == expected, name


@pytest.mark.parametrize("name", ["SEMID_SEARCH_EXACT", "main.semid_search_exact", "temp.semid_search_exact"])
def test_spellings(name, plain, log):
    assert_same(hits(plain.index, f"{name}(?, 3)", plain.queries[0]), plain.index.search(plain.queries[0], 3))
    assert ran(log) == [("semid_search_exact", 1)]


def test_filters_and_joins(plain):
    found = plain.index.sql(
        "SELECT word FROM semid_search_exact(?, 20) JOIN items USING (id) WHERE id % 2 = 0 ORDER BY distance",
        [plain.queries[2]],
    ).fetchall()
    ids = plain.index.search(plain.queries[2], 20).ids
    assert [word for (word,) in found] == [f"word {id // 3}" for id in ids if id % 2 == 0]


def test_a_subquery_as_query(plain):
    found = hits(plain.index, "semid_search_exact((SELECT v FROM semid_vectors WHERE row = 11), 4)")
    assert_same(found, plain.index.search(plain.vectors[11], 4))


# -- changes ----------------------------------------------------------------------------------------------------------


def test_prepared_statements_see_what_was_added(index_file, vectors):
    """Also one whose query is constant: nothing of an answer is kept."""
    with semid.open(index_file) as index:
        new = vectors[7] + np.float32(0.01)
        one = index.sql("FROM semid_search_exact(?, 1)", [new])
        connection = index._store.cursor()
        index._make_searchable(connection, SEARCHES)
        connection.execute("PREPARE bound AS SELECT id FROM semid_search_exact($1, 1)")
        connection.execute(f"PREPARE constant AS SELECT id FROM semid_search_exact({new.tolist()}, 1)")
        calls = [f"EXECUTE bound({new.tolist()})", "EXECUTE constant"]
        assert [connection.execute(call).fetchall() for call in calls] == [[(7,)], [(7,)]]
        for added in (5_000, 5_001):
            index.add((new + np.float32(0.001) * (5_001 - added))[None], [added])
            assert [connection.execute(call).fetchall() for call in calls] == [[(added,)], [(added,)]]
            assert hits(index, "semid_search_exact(?, 1)", new)[0][0] == added
            assert hits(index, f"semid_search(?, 5, {ALL})", new)[0][2] == pytest.approx(
                index.sql(f"SELECT distance FROM semid_search(?, 1, {ALL})", [new], pure=True).fetchall()[0][0],
                abs=1e-3,
            )
        assert one.fetchall()[0][0] in (7, 5_001)  # DuckDB runs a relation when it is read, or when it is made
        connection.close()


def test_new_items_are_found_by_their_codes(index_file, vectors):
    with semid.open(index_file) as index:
        before = hits(index, f"semid_search(?, 2000, {ALL})", vectors[0])
        index.add(vectors[:3] + np.float32(0.02), [9_000, 9_001, 9_002])
        after = hits(index, f"semid_search(?, 2003, {ALL})", vectors[0])
        assert len(before) == 2_000
        assert {id for id, *_ in after} - {id for id, *_ in before} == {9_000, 9_001, 9_002}


@pytest.mark.parametrize("ids", [[4, 5, 6], ["a", "b", "c"]])
def test_from_the_first_item_on(ids, vectors):
    """Before, the index does not know of which type its ids will be."""
    with semid.create(dim=DIM, levels=2, codebook_size=8) as index:
        with pytest.raises(duckdb.CatalogException, match="semid_search"):
            index.sql("FROM semid_search([1])")
        index.train(vectors)
        assert hits(index, "semid_search(?)", vectors[0]) == []
        index.add(vectors[:3], ids)
        assert_same(hits(index, "semid_search_exact(?, 2)", vectors[1]), index.search(vectors[1], 2))
        assert [id for id, *_ in hits(index, "semid_similar(?)", ids[0])] == index.similar(ids[0]).ids.tolist()


# -- connections ------------------------------------------------------------------------------------------------------


def test_first_thing_after_opening(index_file, vectors, log):
    """So everything is read by the function, while a query runs; from the file alone, too."""
    for vectors_in in ("memory", "file"):
        with semid.open(index_file, vectors_in=vectors_in) as index:
            found = index.sql(
                "SELECT count(*) FROM (SELECT v FROM semid_vectors LIMIT 50) AS asked, LATERAL semid_search(asked.v, 2)"
            )
            assert found.fetchall() == [(100,)]
            assert_same(hits(index, "semid_similar(3, 4)"), index.similar(3, 4))
            assert sum(queries for _, queries in ran(log)) == 50 + 1


def test_threads(plain):
    expected = [plain.index.search(query, K).ids.tolist() for query in plain.queries]

    def ask(number: int) -> bool:
        found = hits(plain.index, f"semid_search_exact(?, {K})", plain.queries[number % 5])
        return [id for id, *_ in found] == expected[number % 5]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(60)))


def test_searching_while_items_are_added(index_file, vectors):
    with semid.open(index_file) as index, ThreadPoolExecutor(1) as pool:
        adding = pool.submit(lambda: [index.add(vectors[:20], np.arange(20) + 10_000 + 20 * n) for n in range(10)])
        while not adding.done():
            assert hits(index, "semid_search_exact(?, 1)", vectors[500])[0][2] == 0
        adding.result()
        assert len(hits(index, "semid_search_exact(?, 11)", vectors[3])) == 11
        assert [distance for *_, distance in hits(index, "semid_search_exact(?, 11)", vectors[3])] == [0] * 11


def names_in(connection: duckdb.DuckDBPyConnection) -> set[str]:
    found = connection.execute("SELECT function_name FROM duckdb_functions() WHERE function_name LIKE 'semid_%python%'")
    return {name for (name,) in found.fetchall()}


def test_others_in_the_process_notice_nothing(index_file, vectors, log):
    """Two indexes on one file, and a plain connection, which has the macros of the file before and after."""
    with duckdb.connect(index_file, read_only=True, config=dict(CONFIG)) as other:
        with semid.open(index_file, read_only=True) as one, semid.open(index_file, read_only=True) as two:
            for index in (one, two, one):
                assert_same(hits(index, "semid_search_exact(?, 3)", vectors[0]), index.search(vectors[0], 3))
            assert len(names_in(other)) == 4
            ran(log)
            assert len(other.execute("FROM semid_search_exact(?, 3)", [vectors[0]]).fetchall()) == 3
            assert len(one._store.cursor().execute("FROM semid_search_exact(?, 3)", [vectors[0]]).fetchall()) == 3
            assert ran(log) == []
            two.close()
            assert len(names_in(other)) == 2
            assert len(hits(one, "semid_search_exact(?, 3)", vectors[0])) == 3
        assert names_in(other) == set()
        assert len(other.execute("FROM semid_search_exact(?, 3)", [vectors[0]]).fetchall()) == 3


CONFIG = {"storage_compatibility_version": "v1.2.0", "autoinstall_known_extensions": "false"}


def test_closing_while_a_result_is_read(index_file):
    """Whoever has the result gets rows or an error, and the process lives."""
    with duckdb.connect(index_file, read_only=True, config=dict(CONFIG)) as other:
        index = semid.open(index_file, read_only=True)
        index._make_searchable(other, SEARCHES)
        other.execute("SELECT hit.id FROM range(10) AS t (n), semid_vectors AS v, LATERAL semid_search(v.v, 2) AS hit")
        assert other.fetchone() is not None
        index.close()
        del index
        gc.collect()
        with suppress(duckdb.Error):  # where more had to be searched for, the index being closed
            assert len(other.fetchall()) == 10 * 2 * 2_000 - 1


def test_nothing_keeps_an_index_that_nobody_has(index_file, vectors):
    with duckdb.connect(index_file, read_only=True, config=dict(CONFIG)) as other:
        index = semid.open(index_file, read_only=True)
        index._make_searchable(other, SEARCHES)
        del index
        gc.collect()
        with pytest.raises(duckdb.Error, match=f"{IndexClosedError.__name__}: The index is closed"):
            other.execute("FROM semid_search(?)", [vectors[0]]).fetchall()
    with semid.open(index_file) as index:  # for writing, which no one else may have it open for
        assert len(hits(index, "semid_search(?)", vectors[0])) == 10


def test_a_closed_index(index_file):
    index = semid.open(index_file)
    relation = index.sql("FROM semid_similar(1)")
    index.close()
    index.close()
    with pytest.raises(IndexClosedError):
        index.sql("FROM semid_similar(1)")
    with pytest.raises(duckdb.Error, match="closed"):
        relation.fetchall()


def test_sqlalchemy_has_them(index_file, vectors, log):
    with semid.open(index_file) as index, index.engine().connect() as connection:
        found = connection.execute(
            sa.text("SELECT id, semantic_id, distance FROM semid_search_exact(:query, 4)"),
            {"query": vectors[2].tolist()},
        ).all()
        assert_same([tuple(row) for row in found], index.search(vectors[2], 4))
        assert ran(log) == [("semid_search_exact", 1)]
        index.add(vectors[2:3], [8_000])
        found = connection.execute(sa.text("SELECT id FROM semid_similar(2, 1)")).all()
        assert found == [(8_000,)]


def test_a_file_without_macros(tmp_path, log):
    path = tmp_path / "index.duckdb"
    path.write_bytes(gzip.decompress((Path(__file__).parent / "golden" / "v1" / "plain.duckdb.gz").read_bytes()))
    with semid.open(path, read_only=True) as index:
        id = index.sql("SELECT min(id) FROM semid_codes").fetchall()[0][0]
        vector = index.get([id], vectors=True)["vector"][0].as_py()
        with pytest.raises(duckdb.CatalogException, match="semid_search"):
            hits(index, "semid_search(?)", vector, pure=True)
        assert_same(hits(index, "semid_search_exact(?, 3)", vector), index.search(vector, 3))
        assert len(hits(index, "semid_search(?, 3)", vector)) == 3
        assert len(ran(log)) == 2


def test_queries_without_a_search_get_no_macros(plain):
    found = "SELECT count(*) FROM duckdb_functions() WHERE database_name = 'temp'"
    assert plain.index.sql(found).fetchall() == [(0,)]
    assert plain.index.sql(f"{found} AND 'semid_similar' <> ''").fetchall() == [(1,)]


# -- errors -----------------------------------------------------------------------------------------------------------

BAD = {
    "semid_search([1, 2])": "DimensionMismatchError: queries have 2 dimensions, the index has 24",
    "semid_search_exact([1 for n in range(25)])": "DimensionMismatchError: queries have 25 dimensions",
    "semid_search(['nan'::FLOAT for n in range(24)])": "InvalidVectorsError: queries: row 0 with values NaN",
    "semid_search([NULL for n in range(24)])": "InvalidVectorsError: queries: row 0 with missing values",
    "semid_search([1e30 for n in range(24)])": "InvalidVectorsError: Query 0 cannot be used",
    "semid_search([1 for n in range(24)], 0)": "InvalidArgumentError: k must be a whole number, at least 1, not 0",
    "semid_search([1 for n in range(24)], NULL)": "InvalidArgumentError: k must be",
    "semid_search([1 for n in range(24)], nprobe := -1)": "InvalidArgumentError: probes must be",
    "semid_similar(1)": "UnknownIdError: There is no item with the id 1.",
    "semid_similar(3, 0)": "InvalidArgumentError: k must be a whole number, at least 1, not 0",
}


@pytest.mark.parametrize("call", BAD)
def test_errors_say_what_ours_say(call, plain):
    with pytest.raises(duckdb.Error, match=re.escape(BAD[call])):
        hits(plain.index, call)


def test_rows_that_do_not_fit(plain):
    script = "FROM (VALUES ([1.0, 2]), ([3.0])) AS asked (v), LATERAL semid_search(asked.v)"
    with pytest.raises(duckdb.Error, match="InvalidVectorsError"):
        plain.index.sql(script).fetchall()


def test_zero_vectors_under_cosine(make_case):
    with pytest.raises(duckdb.Error, match="InvalidVectorsError: Query 0 cannot be used"):
        hits(make_case("cosine").index, "semid_search([0 for n in range(24)])")


# -- command line -----------------------------------------------------------------------------------------------------


def test_command_line(index_file, log):
    def rows(*options: str) -> str:
        done = CliRunner().invoke(app, ["sql", str(index_file), "SELECT id FROM semid_similar(5, 3)", *options])
        assert done.exit_code == 0, done.output
        return done.stdout

    fast = rows()
    assert ran(log) == [("semid_similar", 1)]
    assert rows("--pure") == fast
    assert ran(log) == []


def test_command_line_errors_are_one_line(index_file):
    done = CliRunner().invoke(app, ["sql", str(index_file), "FROM semid_search([1, 2])"])
    assert done.exit_code == 1
    assert done.stderr == "error: queries have 2 dimensions, the index has 24. Give arrays of shape (n, 24).\n"
