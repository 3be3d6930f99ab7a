"""The native scan, kernel by kernel, against NumPy."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import semid_index as semid
from semid_index import doctor, metrics, native, scan
from semid_index.codes import CodeLayout, pack, pack_rest
from semid_index.contents import StoredCodes
from semid_index.lookup import Probes, additive_scorer, choose_probes, make_leaves, whole_index
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.quantizers.tail import Tail
from semid_index.rerank import MemoryVectors, NumpyExecutor, ScanData, to_stored
from semid_index.scan import NativeExecutor

ROOT = Path(__file__).resolve().parent.parent
MISSING = native.unavailable_because()
KERNELS = () if MISSING else native.KERNELS[: native.KERNELS.index(native.kernel_name()) + 1]  # that can run here
needs_native = pytest.mark.skipif(MISSING is not None, reason=f"no native scan: {MISSING}")


def scan_data(clustered, metric, *, n=3_000, dim=24, sizes=(16, 16, 8), tier="float32", leaf_size=50, same=0):
    """What an executor gets, and its scorer; ``same``: so many items are copies of the first."""
    vectors = np.array(clustered(n, dim))
    vectors[n - same :] = vectors[0]
    if metric == "cosine":
        vectors = metrics.normalized(vectors)
    quantizer = ResidualKMeans(len(sizes), sizes, iterations=4).fit(vectors[: max(n - same, 1)], seed=0)
    layout = CodeLayout(quantizer.codebook_sizes)
    codes = quantizer.encode(vectors)
    sids, rest = pack(codes, layout), pack_rest(codes, layout) if layout.rest_levels else None
    order = np.argsort(sids, kind="stable")
    stored = StoredCodes(order, sids[order], None if rest is None else rest[order])
    leaves = make_leaves(stored.sids, layout, leaf_size) if leaf_size else whole_index(n, layout)
    columns = to_stored(vectors[order], tier)
    rows = columns["v"].view(np.float16) if tier == "float16" else columns["v"]
    memory = MemoryVectors(rows, columns.get("scale"), metric)
    data = ScanData(leaves, stored, quantizer, memory, metric, Tail.train(vectors, 4, seed=0), lambda: np.empty((0, 0)))
    return data, additive_scorer(leaves, quantizer.codebooks, stored.sids, metric)


def queries_for(clustered, metric, count, dim):
    queries = np.array(clustered(count, dim, seed=9))
    return metrics.normalized(queries) if metric == "cosine" else queries


def all_of(found):
    """Native hits as NumPy executors give them."""
    return found.distances, found.positions


def assert_same_hits(got, expected, *, atol=1e-5):
    """Equal distances rank by rank, and the same items wherever the distances tell them apart."""
    (near, positions), (true_near, true_positions) = got, expected
    np.testing.assert_allclose(near, true_near, rtol=2e-5, atol=atol)
    assert ((positions >= 0) == (true_positions >= 0)).all()
    differs = positions != true_positions
    gap = np.minimum(np.abs(np.diff(true_near, axis=1, prepend=-np.inf)), np.inf)
    gap = np.minimum(gap, np.abs(np.diff(true_near, axis=1, append=np.inf)))
    with np.errstate(invalid="ignore"):
        assert not (differs & (gap > 1e-3)).any()


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("tier", ["float32", "float16", "int8"])
def test_all_that_is_probed_is_found_with_exact_distances(clustered, kernel, metric, tier):
    data, scorer = scan_data(clustered, metric, tier=tier)
    executor = NativeExecutor(data, data.vectors, scorer)
    queries = queries_for(clustered, metric, 70, 24)
    found = executor.search_leaves(
        queries, 10, rerank=3_000, budget=400, probes=None, matches=None, shown=200, threads=2
    )
    assert (found.candidates >= 400).all()
    assert (found.opened == (found.leaves >= 0).sum(axis=1)).all()
    probes = Probes(found.leaves, found.scores, found.candidates)
    assert (data.leaves.sizes[np.maximum(found.leaves, 0)] * (found.leaves >= 0)).sum(axis=1).tolist() == (
        found.candidates.tolist()
    )
    assert_same_hits(all_of(found), NumpyExecutor(data).search(queries, probes, 10), atol=2e-3)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("goal", [{"budget": 300, "probes": None}, {"budget": 0, "probes": 9}])
def test_leaves_are_those_that_the_look_up_chooses(clustered, kernel, metric, goal):
    data, scorer = scan_data(clustered, metric, n=9_000, sizes=(32, 64), leaf_size=20)
    executor = NativeExecutor(data, data.vectors, scorer)
    queries = queries_for(clustered, metric, 50, 24)
    found = executor.search_leaves(queries, 5, rerank=50, matches=None, shown=400, threads=1, **goal)
    expected = choose_probes(scorer, queries, data.leaves.sizes, at_least=5, **goal)
    same = [
        np.array_equal(mine[mine >= 0], theirs[theirs >= 0])
        for mine, theirs in zip(found.leaves, expected.leaves, strict=True)
    ]
    assert np.mean(same) >= 0.9, "two leaves of almost the same score may change places"
    np.testing.assert_allclose(found.candidates, expected.candidates, atol=20)
    scores = scorer.distances(queries[0], expected.scores[0, :9], metric)
    np.testing.assert_allclose(executor.leaf_distances(queries[0], found.scores[0, :9], metric), scores, rtol=1e-3)


@needs_native
@pytest.mark.parametrize("seed", range(12))
def test_kernels_agree_on_any_shape(clustered, seed):
    random = np.random.default_rng(seed)
    metric = ("l2", "cosine", "ip")[seed % 3]
    dim, n = int(random.integers(1, 90)), int(random.integers(300, 1_500))
    sizes = tuple(int(size) for size in random.choice([2, 3, 16, 70, 130, 256], random.integers(1, 6)))
    data, scorer = scan_data(
        clustered, metric, n=n, dim=dim, sizes=sizes, leaf_size=int(random.choice([0, 1, 33, 400])), same=40
    )
    executor = NativeExecutor(data, data.vectors, scorer)
    queries = queries_for(clustered, metric, 9, dim)
    found = {}
    for name in KERNELS:
        executor._index.kernel = name
        options = {"budget": n // 3, "probes": None, "matches": None, "shown": len(data.leaves), "threads": 1}
        found[name] = executor.search_leaves(queries, 7, rerank=n, **options)
        probes = Probes(found[name].leaves, found[name].scores, found[name].candidates)
        assert_same_hits(all_of(found[name]), NumpyExecutor(data).search(queries, probes, 7), atol=2e-3)
        scanned = executor.search(queries, probes, 5)
        assert (np.diff(scanned[0], axis=1) >= 0).all()
    best = max(np.abs(found["plain"].distances).max(), 1)
    for name in KERNELS[1:]:
        np.testing.assert_allclose(found[name].distances, found["plain"].distances, rtol=1e-4, atol=1e-4 * best)


@needs_native
def test_queries_together_find_what_each_finds_alone(clustered):
    """More queries than are scanned together, and codes of several pieces of memory; one thread, and several."""
    data, scorer = scan_data(clustered, "l2", n=60_000, sizes=(64, 32), leaf_size=40)
    executor = NativeExecutor(data, data.vectors, scorer)
    queries = queries_for(clustered, "l2", 600, 24)
    options = {"rerank": 40, "budget": 3_000, "probes": None, "matches": None}
    for name in KERNELS:
        executor._index.kernel = name
        together = executor.search_leaves(queries, 10, **options, shown=5, threads=1)
        for count, threads in ((600, 2), (600, 7), (17, 2), (2, 2)):
            shared = executor.search_leaves(queries[:count], 10, **options, shown=5, threads=threads)
            for mine, theirs in zip(shared[:-1], together[:-1], strict=True):
                np.testing.assert_array_equal(mine, theirs[:count])
        search = executor.search_for_one(10, **options)
        for query in range(0, 600, 9):
            alone = search(queries[query], 1.0)
            np.testing.assert_array_equal(alone.positions, together.positions[query])
            np.testing.assert_array_equal(alone.distances, together.distances[query])
            assert alone.counts == [together.candidates[query], together.opened[query]]
            np.testing.assert_array_equal(native.opened_leaves(alone.opened[24:])[0][:5], together.leaves[query])


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("tier", ["float32", "float16", "int8"])
def test_lengths_divide_queries(clustered, kernel, metric, tier):
    """By a power of two, so that nothing is rounded; and by any number, as NumPy divides."""
    data, scorer = scan_data(clustered, metric, tier=tier)
    executor = NativeExecutor(data, data.vectors, scorer)
    queries = queries_for(clustered, metric, 40, 24)
    options = {"rerank": 60, "budget": 400, "probes": None, "matches": None}
    shown = {"shown": 9, "threads": 1}
    plain = executor.search_leaves(queries, 10, **options, **shown)
    assert (plain.positions >= 0).all()
    fours = np.full(40, 4, dtype=np.float32)
    assert_identical(executor.search_leaves(4 * queries, 10, **options, **shown, lengths=fours), plain)
    lengths = np.random.default_rng(0).uniform(0.1, 9, 40).astype(np.float32)
    divided = executor.search_leaves(queries / lengths[:, None], 10, **options, **shown)
    assert_identical(executor.search_leaves(queries, 10, **options, **shown, lengths=lengths), divided)
    search = executor.search_for_one(10, **options)
    for number, length in enumerate(lengths.tolist()):
        alone = search(queries[number], length)
        np.testing.assert_array_equal(alone.positions, divided.positions[number])
        np.testing.assert_array_equal(alone.distances, divided.distances[number])


def assert_identical(got, expected):
    for mine, theirs in zip(got[:-1], expected[:-1], strict=True):  # all but the seconds
        np.testing.assert_array_equal(mine, theirs)


def test_opened_leaves_come_best_first():
    scores = np.array([3, 1, 2, 1, -np.inf], dtype=np.float32)
    numbers = np.array([7, 9, 2, 4, 70_000], dtype=np.int32)
    pairs = np.stack([scores, numbers.view(np.float32)], axis=1)
    leaves, sorted_scores = native.opened_leaves(pairs.ravel())
    expected = sorted(zip(scores.tolist(), numbers.tolist(), strict=True))
    assert list(zip(sorted_scores.tolist(), leaves.tolist(), strict=True)) == expected
    assert [len(array) for array in native.opened_leaves(pairs[:0].ravel())] == [0, 0]


@needs_native
def test_threads_of_a_program_do_not_disturb_each_other(clustered):
    data, scorer = scan_data(clustered, "l2")
    executor = NativeExecutor(data, data.vectors, scorer)
    queries = queries_for(clustered, "l2", 400, 24)
    searches = [
        executor.search_for_one(k, rerank=60, budget=budget, probes=None, matches=None)
        for k, budget in ((10, 400), (3, 900))
    ]

    def found(number):
        return [search(queries[number], 1.0).positions.tolist() for search in searches]

    expected = [found(number) for number in range(400)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(found, range(400))) == expected


def test_the_scan_ranks_as_what_its_codes_stand_for(clustered, kernel):
    """At 24 dimensions, 12 parts and 3 levels, nine of ten true neighbours are among the best 40 of 3,000."""
    data, scorer = scan_data(clustered, "l2")
    executor = NativeExecutor(data, data.vectors, scorer)
    queries = queries_for(clustered, "l2", 60, 24)
    every = np.broadcast_to(np.arange(len(data.leaves)), (60, len(data.leaves)))
    probes = Probes(every, np.zeros(every.shape, dtype=np.float32), np.full(60, 3_000))
    estimates, positions = executor.search(queries, probes, 40)
    exact = metrics.exact_search(queries, data.vectors.take(slice(0, 3_000)), 10, "l2")[0]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact, positions, strict=True)]) >= 0.9
    # estimates are squared distances, less what only the query decides
    truth = np.square(data.vectors.distances(queries, positions))
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(estimates, truth, strict=True)]) > 0.5


@pytest.mark.parametrize(("n", "dim", "exact"), [(300, 40, 400), (300, 700, 400), (300, 700, 200), (700, 300, 200)])
def test_directions_are_those_in_which_vectors_differ_most(clustered, monkeypatch, n, dim, exact):
    """More vectors than dimensions or fewer, all eigenvectors or nearly those of the largest eigenvalues."""
    monkeypatch.setattr(scan, "_EXACT_EIGENVECTORS", exact)
    rows = clustered(n, dim) - clustered(n, dim).mean(axis=0)
    found = scan._directions(rows, 30)
    np.testing.assert_allclose(found.T @ found, np.eye(30), atol=1e-6)
    most = np.square(np.linalg.svd(rows, compute_uv=False)[:30]).sum()
    assert np.square(rows @ found).sum() == pytest.approx(most, rel=1e-5 if min(n, dim) <= exact else 2e-3)
    alike = scan._directions(rows[np.arange(n) % 3], 30)
    np.testing.assert_allclose(alike.T @ alike, np.eye(30), atol=1e-6, err_msg="also where most directions are empty")


@pytest.mark.parametrize("scale", [2.0**58, 2.0**-70])  # whose squares float32 does not hold, or hardly
def test_the_space_does_not_depend_on_the_scale(clustered, kernel, scale):
    data, _ = scan_data(clustered, "l2", sizes=(16,))
    words = scan.words_of(data)
    rows = data.vectors.take(slice(0, 3_000))

    def space(factor):
        scaled = MemoryVectors(rows * np.float32(factor), None, "l2")
        return scan._learn_space(data, scaled, replace(words, words=words.words * np.float32(factor)), threads=1)

    np.testing.assert_array_equal(space(scale).rotation, space(1).rotation)


def test_few_items_many_wanted(clustered, kernel):
    data, scorer = scan_data(clustered, "l2", n=300, leaf_size=10)
    executor = NativeExecutor(data, data.vectors, scorer)
    queries = queries_for(clustered, "l2", 3, 24)
    found = executor.search_leaves(queries, 300, rerank=300, budget=1, probes=None, matches=None, shown=0, threads=1)
    assert (np.sort(found.positions, axis=1) == np.arange(300)).all()
    few = executor.search_leaves(queries, 50, rerank=50, budget=0, probes=1, matches=None, shown=1, threads=1)
    assert (few.candidates >= 50).all(), "opened on until there are k"
    none = Probes(np.full((3, 4), -1), np.zeros((3, 4), dtype=np.float32), np.zeros(3, dtype=np.int64))
    near, positions = executor.search(queries, none, 2)
    assert (positions == -1).all()
    assert np.isinf(near).all()


def test_only_what_is_allowed_is_found(clustered, kernel):
    from semid_index.lookup import Matches

    data, scorer = scan_data(clustered, "l2")
    executor = NativeExecutor(data, data.vectors, scorer)
    queries = queries_for(clustered, "l2", 20, 24)
    allowed = np.arange(3_000) % 5 != 0
    matches = Matches.among(data.leaves, allowed)
    found = executor.search_leaves(
        queries, 10, rerank=3_000, budget=10**6, probes=None, matches=matches, shown=0, threads=1
    )
    expected = data.vectors.nearest(queries, 10, matches.positions)
    assert_same_hits(all_of(found), expected[::-1], atol=1e-4)
    assert (found.candidates == len(matches)).all()


@needs_native
def test_the_index_finds_the_same_with_and_without(clustered, tmp_path, monkeypatch):
    vectors = clustered(6_000, 20)
    with semid.create(tmp_path / "x.duckdb", dim=20, levels=3, codebook_size=16) as index:
        index.train(vectors)
        index.add(vectors)
        index.delete(list(range(0, 600, 2)))
        options = {"k": 10, "probes": 60, "rerank": 1_000}
        mine = index.search(vectors[:50], **options)
        one = index.search(vectors[7], 5)
    assert mine.trace.executor == "native"
    assert len(one.trace.probes) == min(one.trace.probed, 64)
    assert set(mine.trace.seconds) >= {"lookup", "scan", "rerank"}
    monkeypatch.setenv("SEMID_NATIVE", "0")
    with semid.open(tmp_path / "x.duckdb") as index:
        other = index.search(vectors[:50], **options)
    assert other.trace.executor == "faiss-tail"
    assert np.mean([np.isin(a, b).mean() for a, b in zip(mine.ids, other.ids, strict=True)]) >= 0.99
    np.testing.assert_allclose(mine.distances[0], other.distances[0], rtol=1e-5, atol=1e-4)


def test_doctor_says_which_scan_is_used(monkeypatch):
    monkeypatch.setenv("SEMID_NATIVE", "0")
    off = next(finding for finding in doctor.examine() if finding.check == "native scan")
    assert (off.status, off.found) == ("missing", "SEMID_NATIVE=0 switches it off: FAISS does the scanning")
    if MISSING is None:
        monkeypatch.setenv("SEMID_NATIVE", "plain")
        on = next(finding for finding in doctor.examine() if finding.check == "native scan")
        assert (on.status, on.found) == ("ok", "plain")


@pytest.mark.parametrize(("parts", "width"), [(6, 4), (5, 2), (3, 3)])
def test_codes_and_codewords_are_those_of_numpy(kernel, parts, width):
    """Whole numbers, so that sums are exact, many distances are equal, and the first of the nearest words counts."""
    random = np.random.default_rng(width)
    vectors, words, centre = (
        random.integers(-3, 4, size).astype(np.float32) for size in ((400, parts * width), (9, parts * width), width)
    )
    centre = np.tile(centre, parts)
    codebooks = random.integers(-3, 4, (parts, 16, width)).astype(np.float32)
    codebooks[:, 11] = codebooks[:, 4]
    columns = random.integers(0, 9, (400, 2)).astype(np.int32)
    lengths = random.integers(0, 50, 400).astype(np.float32)
    codes, scalars = native.encode(vectors, lengths, columns, words, centre, codebooks, threads=2)

    stood_for = words[columns].sum(axis=1) - centre
    left = (vectors - stood_for).reshape(400, parts, 1, width)
    distances = np.square(left - codebooks).sum(axis=3)
    best = distances.argmin(axis=2)
    assert (np.sort(distances, axis=2)[:, :, 0] == np.sort(distances, axis=2)[:, :, 1]).any()
    unpacked = np.stack([codes & 15, codes >> 4], axis=2).reshape(400, -1)[:, :parts]
    np.testing.assert_array_equal(unpacked, best)
    decoded = stood_for + codebooks[np.arange(parts), best].reshape(400, -1)
    shorter = lengths - np.square(vectors).sum(axis=1)  # what rotation cut off
    expected = np.square(decoded).sum(axis=1) + np.square(vectors - decoded).sum(axis=1) + shorter
    np.testing.assert_allclose(scalars, expected, atol=1e-3)

    points = vectors.reshape(400, parts, width)
    trained = native.train(points, codebooks, iterations=1, threads=2)
    nearest = np.square(points[:, :, None] - codebooks).sum(axis=3).argmin(axis=2)
    for part in range(parts):
        for word in range(16):
            mine = points[nearest[:, part] == word, part]
            expected = mine.mean(axis=0) if len(mine) else codebooks[part, word]
            np.testing.assert_allclose(trained[part, word], expected, atol=1e-5)


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from semid_index.native import NativeIndex, ScanParts

n, threads = 400_000, int(sys.argv[1])
one, nothing = np.ones((1, 2), dtype=np.float32), np.empty(0, dtype=np.int32)
parts = ScanParts(
    "l2", np.array([0, n]), one, np.zeros((1, 1), dtype=np.int32), 0, one[0, :1], None, one[0, :1],
    np.arange(32, dtype=np.float32).reshape(1, 16, 2), np.zeros((n, 1), dtype=np.uint8), None, None,
    np.empty((n, 0), dtype=np.uint8), nothing, nothing, None, -2.0,
)
index = NativeIndex(parts, 1, np.arange(n, dtype=np.float32)[:, None], None)
queries = np.arange(64, dtype=np.float32)[:, None]
few = index.search(queries, k=3, keep=9, goal=n, threads=threads).positions
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (12 << 20), limit[1]))
try:
    index.search(queries, k=3, keep=n, goal=n, threads=threads)  # each thread needs 19 MB
except MemoryError as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_AS, limit)
print(np.array_equal(index.search(queries, k=3, keep=9, goal=n, threads=threads).positions, few))
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_search_that_memory_is_too_short_for_says_so(run_python, threads):
    """In the thread that asks, and in those that help it; the next search finds the same again."""
    printed = run_python(LITTLE_MEMORY, threads)
    assert printed.split() == ["MemoryError", "True"]


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_nothing_is_built(tmp_path, compiler):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hatch_build; from pathlib import Path\n"
        "print(hatch_build.build(Path(sys.argv[2])))"
    )
    pytest.importorskip("hatchling")
    command = [sys.executable, "-c", program, str(ROOT), str(tmp_path / "x.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "CXX": compiler})
    assert done.stdout.strip() not in ("", "None")
    assert not (tmp_path / "x.so").exists()


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_where_there_is_a_compiler_there_is_a_native_scan():
    if os.environ.get("SEMID_NATIVE") == "0" or os.environ.get("CXX"):
        pytest.skip("switched off")
    assert MISSING is None, "run: python hatch_build.py"
