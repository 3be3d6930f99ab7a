"""The small tiers in the native scan: codes alone, and vectors left in the file."""

import json
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

import semid_index as semid
from semid_index import metrics, native
from semid_index.rerank import MemoryVectors
from semid_index.scan import NativeScan

ROOT = Path(__file__).resolve().parent.parent
DIM, ITEMS = 24, 3_000
EVERY = 10**6  # leaves: more than there are
MISSING = native.unavailable_because()
needs_native = pytest.mark.skipif(MISSING is not None, reason=f"no native scan: {MISSING}")


def filled(path, rows, ids=None, **options):
    """An index of these vectors."""
    chosen = {"levels": 4, "codebook_size": 32, "leaf_size": 60, **options}
    index = semid.create(path, dim=DIM, **chosen)
    index.train(rows)
    index.add(rows, ids=ids)
    return index


@pytest.fixture(scope="module")
def built(clustered, tmp_path_factory):
    """The file of an index with ITEMS clustered vectors: made once for some options, whichever kernel then scans it."""
    folder, files = tmp_path_factory.mktemp("built"), {}

    def get(ids=None, **options):
        key = (ids is None, *sorted(options.items()))
        if key not in files:
            files[key] = folder / f"{len(files)}.duckdb"
            filled(files[key], np.array(clustered(ITEMS, DIM)), ids, **options).close()
        return files[key]

    return get


def named(count):
    return [f"item {number}" for number in range(count)]


def state_of(index):
    """What the index holds of its items."""
    return index._live.now().states[0]


def as_faiss_finds(queries, decoded, metric, k):
    """Brute force by FAISS: rows, and distances as ours."""
    if metric == "cosine":
        queries, decoded = metrics.normalized(queries), metrics.normalized(decoded)
    flat = faiss.IndexFlatL2(DIM) if metric == "l2" else faiss.IndexFlatIP(DIM)
    flat.add(np.ascontiguousarray(decoded))
    near, rows = flat.search(queries, k)
    return rows, np.sqrt(near) if metric == "l2" else 1 - near if metric == "cosine" else -near


def assert_same(found, rows, distances):
    np.testing.assert_allclose(np.array(found.distances), distances, rtol=1e-4, atol=2e-3)
    assert (np.array(found.ids) == rows).mean() > 0.98, "only items at equal distances may change places"


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("levels", [4, 16])
def test_codes_alone_find_what_brute_force_finds_among_the_decoded(clustered, built, kernel, metric, levels):
    vectors, queries = np.array(clustered(ITEMS, DIM)), np.array(clustered(50, DIM, seed=9))
    with semid.open(built(metric=metric, vectors="none", levels=levels)) as index:
        decoded = index.decode(index.encode(vectors))
        found = index.search(queries, 10, probes=EVERY, rerank=400)
        assert found.trace.executor == "native-codes"
        assert found.trace.distances == "decoded"
        assert_same(found, *as_faiss_finds(queries, decoded, metric, 10))
        np.testing.assert_allclose(
            np.array(index.search(queries, 10, exact=True).distances), np.array(found.distances), rtol=1e-4, atol=2e-3
        )


def test_a_default_search_of_codes_alone_misses_next_to_nothing(clustered, built, kernel):
    vectors, queries = np.array(clustered(ITEMS, DIM)), np.array(clustered(50, DIM, seed=9))
    with semid.open(built(metric="l2", vectors="none", levels=16)) as index:
        rows, distances = as_faiss_finds(queries, index.decode(index.encode(vectors)), "l2", 10)
        assert_same(index.search(queries, 10, probes=EVERY), rows, distances)


@needs_native
@pytest.mark.parametrize("sizes", [[32, 16, 8], [300, 256, 3, 2], [16] * 20])
def test_codes_are_read_back_from_the_scan(clustered, sizes):
    """Those of IDs beyond 63 bits included. With 300 first words blocks would be half empty: the scan takes none."""
    vectors = np.array(clustered(ITEMS, DIM))
    for tier in ({"vectors": "none"}, {"vectors": "float32"}):
        with filled(None, vectors, levels=len(sizes), codebook_size=sizes, **tier) as index:
            state = state_of(index)
            stored = index._store.codes()
            everything = np.arange(ITEMS)
            held = isinstance(state.executor, NativeScan) and state.executor.holds_codes
            assert held == (sizes[0] < 256 and (len(sizes) <= 4 or tier["vectors"] == "none"))
            if held:
                assert np.array_equal(state.executor.codes_at(everything), index.encode(vectors)[stored.rows])
            assert np.array_equal(state.codes_at(everything), index.encode(vectors)[stored.rows])
            for name in ("rows", "sids", "rest"):
                assert np.array_equal(getattr(state.codes, name), getattr(stored, name))


@needs_native
@pytest.mark.parametrize("count", [0, 1, 70])
def test_sums_of_words_are_numpys(count):
    rng = np.random.default_rng(0)
    words = rng.standard_normal((40, 19), dtype=np.float32)
    columns = rng.integers(0, 40, (count, 5), dtype=np.int32)
    np.testing.assert_allclose(native.sum_words(words, columns), words[columns].sum(axis=1), rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("ids", ["rows", "numbers", "text"])
def test_what_is_held_beside_the_scan_is_four_bytes_an_item(clustered, tmp_path, ids):
    vectors = np.array(clustered(ITEMS, DIM))
    names = {"rows": None, "numbers": 7 * np.arange(ITEMS), "text": named(ITEMS)}[ids]
    filled(tmp_path / "a.duckdb", vectors, names).close()
    filled(tmp_path / "b.duckdb", vectors, names, vectors="none").close()
    with semid.open(tmp_path / "a.duckdb", vectors_in="file") as index:
        index.search(vectors[0])
        memory = index.stats()["memory_bytes"]
        assert memory.pop("codes") == 4 * ITEMS
        assert memory.pop("vectors") == 0
        assert set(memory) == {"executor", "leaves", "codebooks", "database"}
    with semid.open(tmp_path / "b.duckdb") as index:
        index.search(vectors[0])
        memory = index.stats()["memory_bytes"]
        assert memory["codes"] == 4 * ITEMS
        assert ("ids" in memory) == (ids != "rows"), "ids that equal the rows are not held"
        assert "positions" not in memory


LEDGER = """
import json, sys
from pathlib import Path
import numpy as np
from semid_index.bench.machine import private_bytes
from semid_index.bench.subject import Shape
from semid_index.bench.subjects.ours import SemidInt8

queries = np.load(sys.argv[2])
shape = Shape(int(sys.argv[3]), queries.shape[1], "l2")
subject = SemidInt8()
subject.load()
subject.take_once(shape.dim)
before = private_bytes()
subject.open(Path(sys.argv[1]), shape, {}, threads=1)
subject.prepare({"probes": 64, "rerank": 100})
for _ in range(3):
    subject.search(queries, 10)
print(json.dumps({"grown": private_bytes() - before, "counted": subject.memory()}))
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private memory")
def test_the_memory_that_is_counted_is_what_the_process_has(clustered, tmp_path):
    """While it is searched, in a process of its own, as the benchmark has it; what libraries take once is apart."""
    items, dim = 60_000, 256
    vectors = np.array(clustered(items, dim))
    with semid.create(tmp_path / "index.duckdb", dim=dim, vectors="int8", levels=2, codebook_size=64) as index:
        index.train(vectors[:10_000])
        index.add(vectors)
    np.save(tmp_path / "queries.npy", vectors[:512])
    places = [str(tmp_path), str(tmp_path / "queries.npy"), str(items)]
    told = subprocess.run([sys.executable, "-c", LEDGER, *places], check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(told.stdout)
    assert set(found["counted"]) >= {"vectors", "executor", "codes", "leaves", "codebooks", "database"}
    assert found["counted"].pop("database") <= 4 << 20, "DuckDB has let go of the vectors, which are held elsewhere"
    counted = sum(found["counted"].values())
    assert counted > items * (dim + 4), "more than the vectors alone"
    assert counted <= 1.05 * found["grown"], "nothing is counted that is not there"
    assert found["grown"] <= 1.6 * counted, "it was 1.2 to 1.4, and 1.9 to 2.8 before DuckDB let go of all"


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("tier", ["float32", "float16", "int8"])
def test_vectors_in_the_file_give_the_hits_of_those_in_memory(clustered, built, kernel, metric, tier):
    queries, path = np.array(clustered(40, DIM, seed=9)), built(named(ITEMS), metric=metric, vectors=tier)
    with semid.open(path) as index:
        expected = index.search(queries, 10)
        single = index.search(queries[3], 10)
    with semid.open(path, vectors_in="file") as index:
        found = index.search(queries, 10)
        assert found.trace.executor == expected.trace.executor == "native"
        assert found.trace.distances == "exact"
        np.testing.assert_allclose(np.array(found.distances), np.array(expected.distances), rtol=1e-4, atol=2e-3)
        assert (np.array(found.ids) == np.array(expected.ids)).mean() > 0.99
        assert [list(texts) for texts in found.semantic_ids] == [list(texts) for texts in expected.semantic_ids]
        one = index.search(queries[3], 10)
        assert one.ids.tolist() == single.ids.tolist()
        assert [probe.prefix for probe in one.trace.probes] == [probe.prefix for probe in single.trace.probes]


@needs_native
@pytest.mark.parametrize("tier", [{"vectors": "none"}, {"vectors": "float32"}])
def test_the_same_is_found_without_the_native_scan(clustered, tmp_path, monkeypatch, tier):
    """With filters of every kind, after adding and deleting."""
    vectors, queries = np.array(clustered(ITEMS + 500, DIM)), np.array(clustered(30, DIM, seed=9))
    path = tmp_path / "i.duckdb"
    filled(path, vectors[:ITEMS], named(ITEMS), **tier).close()
    filters = [None, "id LIKE '%7%'", "c1 < 20", "c1 >= 0", "id = 'item 17'", "c1 < 0"]

    def searched(index):
        return [index.search(queries, 10, where=where, probes=EVERY, rerank=500) for where in filters]

    found = {}
    for way in ("", "0"):
        monkeypatch.setenv("SEMID_NATIVE", way)
        with semid.open(path, vectors_in="file") as index:
            found[way] = searched(index)
            if not way:
                index.add(vectors[ITEMS:], ids=[f"new {number}" for number in range(500)])
                index.delete([f"item {number}" for number in range(100, 400)])
                found["changed"] = searched(index)
                gone = {f"item {number}" for number in range(100, 400)}
                assert not gone & {id for result in found["changed"] for ids in result.ids for id in ids}
        if not way:
            with semid.open(path, vectors_in="file") as index:
                found["opened again"] = searched(index)
            continue
        with semid.open(path, vectors_in="file") as index:
            assert_same_results(found["changed"], searched(index))
    assert_same_results(found["opened again"], found["changed"])


def assert_same_results(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert [len(ids) for ids in one.ids] == [len(ids) for ids in other.ids]
        for ours, theirs in zip(one.distances, other.distances, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-3)


@needs_native
def test_sql_searches_by_codes_where_ids_are_in_the_file(clustered, tmp_path):
    vectors = np.array(clustered(ITEMS, DIM))
    path = tmp_path / "i.duckdb"
    filled(path, vectors, named(ITEMS)).close()
    query = "SELECT id FROM semid_search(?, 5)"
    with semid.open(path) as index:
        expected = index.sql(query, [vectors[7].tolist()]).fetchall()
    with semid.open(path, vectors_in="file") as index:
        index.search(vectors[0])
        assert index.sql(query, [vectors[7].tolist()]).fetchall() == expected


def test_few_items_are_searched_as_before(clustered, tmp_path):
    """Fewer than codewords could be learned from."""
    vectors = np.array(clustered(200, DIM))
    filled(tmp_path / "i.duckdb", vectors, levels=2, codebook_size=8).close()
    with semid.open(tmp_path / "i.duckdb", vectors_in="file") as index:
        found = index.search(vectors[:5], 3, probes=EVERY)
        rows, distances = metrics.exact_search(vectors[:5], vectors, 3, "l2")
        assert np.array(found.ids).tolist() == rows.tolist()
        np.testing.assert_allclose(np.array(found.distances), distances, atol=0.05)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_distances_taken_together_are_those_one_by_one(clustered, metric):
    """Candidates that repeat, lack, or are none at all."""
    from semid_index.rerank import _distances_taken_together

    vectors, queries = np.array(clustered(50, DIM)), np.array(clustered(6, DIM, seed=9))
    if metric == "cosine":
        vectors, queries = metrics.normalized(vectors), metrics.normalized(queries)
    rows = MemoryVectors(vectors, None, metric)
    positions = np.random.default_rng(0).integers(-1, 50, (6, 9))
    positions[2] = -1
    found = _distances_taken_together(rows, queries, positions)
    assert np.isinf(found[2]).all()
    np.testing.assert_allclose(found, rows.distances(queries, positions), rtol=1e-5, atol=1e-5)


@needs_native
def test_the_benchmark_runs(tmp_path):
    figures = tmp_path / "figures.json"
    size = ["--rows", "1000", "--queries", "20", "--codebook-size", "16"]
    command = [sys.executable, "-m", "benchmarks.tiers", "--set", "sample", *size, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes, file = json.loads(figures.read_text())
    assert codes["executor"] == "native-codes"
    assert file["executor"] == "native"
    recalls = [row["recall"] for row in codes["codes"]]
    assert recalls[0] < recalls[-2], "16 levels tell more than 10"
    assert codes["search, all leaves"]["recall"] >= recalls[-2] - 0.05
    assert file["searches"][-1]["recall"] > 0.95
    assert file["memory"]["codes"] == 4
