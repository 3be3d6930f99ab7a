"""``index.report`` and ``semid report``: the same figures, of an index and of IDs that others made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import semid_index as semid
from semid_index.cli import app
from semid_index.errors import InvalidArgumentError, InvalidIdsError, InvalidVectorsError, NotTrainedError
from semid_index.report.id_files import find_codes
from semid_index.report.quality import quality

pytest.importorskip("scipy", reason="churn is aligned by SciPy")

ROWS, DIM, LEVELS, WORDS = 500, 12, 3, 8
QUICK = ("--queries", "50")


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    random = np.random.default_rng(11)
    centres = 4 * random.standard_normal((8, DIM))
    return (centres[np.arange(ROWS) % 8] + random.standard_normal((ROWS, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def items() -> pa.Table:
    """What is known of the items; ``kind`` is the cluster, and so what IDs ought to find."""
    rows = range(ROWS)
    return pa.table(
        {
            "sku": [f"item {row}" for row in rows],
            "kind": [f"kind {row % 8}" for row in rows],
            "path": [["all", f"part {row % 4}"] for row in rows],
            "price": [row / 7 for row in rows],
            "same": ["x"] * ROWS,
            "stock": [row % 5 for row in rows],
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray, items: pa.Table) -> Path:
    """An index, and the same IDs in every layout that others may have."""
    folder = tmp_path_factory.mktemp("report")
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "held.npy", vectors[:40] + np.float32(0.5))
    pq.write_table(items, folder / "items.parquet")
    with semid.create(folder / "index.duckdb", dim=DIM, levels=LEVELS, codebook_size=WORDS) as index:
        index.train(vectors)
        index.add(vectors, ids=items["sku"], metadata=items.drop_columns(["sku"]))
        codes = index.encode(vectors)
    np.save(folder / "codes.npy", codes)
    lists = pa.table({"sku": items["sku"], "codes": codes.tolist()})
    texts = pa.table({"sku": items["sku"], "semantic_id": ["-".join(map(str, row)) for row in codes.tolist()]})
    columns = pa.table({"sku": items["sku"], "row": range(ROWS), **{f"c{i + 1}": codes[:, i] for i in range(LEVELS)}})
    for name, table in (("lists", lists), ("texts", texts), ("columns", columns)):
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def codes(folder: Path) -> np.ndarray:
    return np.load(folder / "codes.npy")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], prog_name="semid")


def report_of(*arguments: Any) -> dict[str, Any]:
    """The JSON that a run prints, without how long it took."""
    result = run(*arguments, "--format", "json", *QUICK)
    assert result.exit_code == 0, result.stderr
    return timeless(json.loads(result.stdout))


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    assert report.pop("seconds") > 0
    return report


def as_json(report: semid.QualityReport) -> dict[str, Any]:
    return timeless(json.loads(json.dumps(report.to_dict())))


@pytest.fixture(scope="module")
def of_index(folder: Path) -> dict[str, Any]:
    return report_of(folder / "index.duckdb", "--labels", "kind")


# -- an index ---------------------------------------------------------------------------------------------------------


def test_the_command_says_what_the_method_says(folder: Path, of_index: dict[str, Any]) -> None:
    with semid.open(folder / "index.duckdb", read_only=True) as index:
        assert as_json(index.report(labels=["kind"], queries=50)) == of_index


def test_the_method_measures_the_items(
    folder: Path, vectors: np.ndarray, codes: np.ndarray, items: pa.Table, of_index: dict[str, Any]
) -> None:
    """The same as measuring the arrays themselves; and some figures by hand."""
    with semid.open(folder / "index.duckdb", read_only=True) as index:
        codebooks = [np.array(rows) for rows in codebooks_of(index)]
    size = (folder / "index.duckdb").stat().st_size / ROWS
    expected = quality(
        codes, [WORDS] * LEVELS, vectors=vectors, codebooks=codebooks, labels={"kind": items["kind"]}, queries=50,
        bytes_per_item=size,
    )  # fmt: skip
    assert_alike(of_index | {"drift": None}, as_json(expected))  # which only an index has
    left = vectors - sum(book[codes[:, level]] for level, book in enumerate(codebooks))
    error = np.square(left).sum(axis=1).mean()
    assert of_index["levels"][-1]["error"] == pytest.approx(error, rel=1e-4)
    assert (of_index["drift"]["items"], of_index["drift"]["error"]) == (ROWS, pytest.approx(error, rel=1e-4))
    assert of_index["ids"]["distinct"] == len(np.unique(codes, axis=0))


def codebooks_of(index: semid.SemanticIndex) -> list[list[list[float]]]:
    query = "SELECT list(codeword ORDER BY code) FROM semid_codebook GROUP BY level ORDER BY level"
    return [row[0] for row in index.sql(query).fetchall()]


def assert_alike(got: Any, expected: Any) -> None:
    """Equal, but for the last digits of numbers."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert_alike(got[name], value)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_alike(one, other)
    else:
        assert got == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("tier", ["float16", "int8"])
@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_stored_vectors_of_every_kind_are_read(vectors: np.ndarray, tier: str, metric: str) -> None:
    with semid.create(dim=DIM, levels=2, codebook_size=WORDS, vectors=tier, metric=metric) as index:
        index.train(vectors)
        index.add(vectors)
        report = index.report(queries=50)
        codes = index.encode(vectors)
        comparable = vectors / np.linalg.norm(vectors, axis=1)[:, None] if metric == "cosine" else vectors
        error = np.square(comparable - index.decode(codes)).sum(axis=1).mean()
    assert report.levels[-1].error == pytest.approx(error, rel=0.02)
    assert report.neighbours.queries == 50
    assert report.memory.bytes_per_item is None  # in memory


def test_without_vectors_there_are_errors_for_held_out_ones_only(vectors: np.ndarray) -> None:
    with semid.create(dim=DIM, levels=2, codebook_size=WORDS, vectors="none") as index:
        index.train(vectors)
        index.add(vectors)
        bare = index.report()
        report = index.report(vectors[:50] + np.float32(0.1))
    assert bare.neighbours is None
    assert [level.error for level in bare.levels] == [None, None]
    assert all(level.error > 0 for level in report.held_out)
    assert [level.error for level in report.levels] == [None, None]


def test_the_error_on_held_out_vectors(folder: Path, vectors: np.ndarray) -> None:
    held_out = report_of(folder / "index.duckdb", "--vectors", folder / "held.npy")["held_out"]
    unseen = vectors[:40] + np.float32(0.5)
    with semid.open(folder / "index.duckdb", read_only=True) as index:
        left = np.square(unseen - index.decode(index.encode(unseen))).sum(axis=1).mean()
        assert as_json(index.report(unseen, queries=50))["held_out"] == held_out
    assert held_out[-1]["error"] == pytest.approx(left, rel=1e-4)


def test_labels_are_chosen_where_none_are_named(folder: Path) -> None:
    """Texts and lists, then whole numbers; neither ids, nor prices, nor what all items have."""
    assert list(report_of(folder / "index.duckdb")["labels"]) == ["kind", "path", "stock"]


def test_labels_by_name_or_by_value(folder: Path, items: pa.Table, of_index: dict[str, Any]) -> None:
    with semid.open(folder / "index.duckdb", read_only=True) as index:
        by_value = index.report(labels={"kind": items["kind"].to_pylist()}, queries=50)
        assert as_json(by_value) == of_index
        assert index.report(labels=[], queries=50).labels == {}
        with pytest.raises(InvalidArgumentError, match=r"have no column 'colour'. They have 'kind', 'path'"):
            index.report(labels=["colour"])
        with pytest.raises(InvalidArgumentError, match=r"Write labels=\['kind'\]"):
            index.report(labels="kind")


def test_items_added_in_parts_keep_their_labels(vectors: np.ndarray) -> None:
    """Codes, vectors and metadata stand in three tables, each in an order of its own."""
    with semid.create(dim=DIM, levels=2, codebook_size=WORDS) as index:
        index.train(vectors)
        for part in (slice(250, None), slice(0, 250)):
            index.add(vectors[part], ids=np.arange(ROWS)[part], metadata={"code": index.encode(vectors[part])[:, 0]})
        report = index.report(queries=50)
        left = np.square(vectors - index.decode(index.encode(vectors))).sum(axis=1).mean()
    assert report.labels["code"][0].purity == 1
    assert report.levels[-1].error == pytest.approx(left, rel=1e-4)


def test_nothing_to_report_on(vectors: np.ndarray) -> None:
    with semid.create(dim=DIM, levels=2, codebook_size=WORDS) as index:
        with pytest.raises(NotTrainedError):
            index.report()
        index.train(vectors)
        with pytest.raises(InvalidArgumentError, match="has no items"):
            index.report()
        index.add(vectors[:60])
        with pytest.raises(InvalidVectorsError, match="0 rows"):
            index.report(np.empty((0, DIM)))
        with pytest.raises(InvalidVectorsError, match="held-out vectors have 5 dimensions"):
            index.report(np.ones((3, 5)))
        with pytest.raises(InvalidArgumentError, match="k must be"):
            index.report(k=0)


# -- IDs that others made ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["codes.npy", "lists.parquet", "texts.parquet", "columns.parquet"])
def test_every_layout_gives_the_report_of_the_index(folder: Path, name: str, of_index: dict[str, Any]) -> None:
    """All but what needs the codebooks, which such files do not have."""
    more = ("--labels-from", folder / "items.parquet", "--labels", "kind")
    given = report_of("--ids", folder / name, "--vectors", folder / "vectors.npy", *more)
    assert given["labels"] == of_index["labels"]
    assert given["ids"] == of_index["ids"]
    assert given["codebooks_estimated"] is True
    for mine, theirs in zip(given["levels"], of_index["levels"], strict=True):
        assert {**mine, "error": 0, "relative_error": 0} == {**theirs, "error": 0, "relative_error": 0}
        assert mine["relative_error"] == pytest.approx(theirs["relative_error"], rel=0.1)  # near, as k-means converges


def test_ids_without_codebooks_are_measured_as_the_library_does(
    folder: Path, vectors: np.ndarray, codes: np.ndarray
) -> None:
    expected = quality(codes, [WORDS] * LEVELS, vectors=vectors, metric="cosine", queries=50)
    options = ("--vectors", folder / "vectors.npy", "--metric", "cosine", "--codebook-size", WORDS)
    assert report_of("--ids", folder / "codes.npy", *options) == as_json(expected)


def test_first_levels_and_codes_without_order(folder: Path, codes: np.ndarray) -> None:
    report = report_of("--ids", folder / "codes.npy", "--levels", 2, "--unordered", "--codebook-size", "16,32")
    assert report["ids"]["distinct"] == len(np.unique(codes[:, :2], axis=0))
    assert (report["codebook_sizes"], report["hierarchical"]) == ([16, 32], False)
    assert report_of("--ids", folder / "codes.npy")["codebook_sizes"] == (codes.max(axis=0) + 1).tolist()


def test_labels_are_joined_by_id(folder: Path, items: pa.Table, tmp_path: Path, of_index: dict[str, Any]) -> None:
    shuffled = items.take(np.random.default_rng(0).permutation(ROWS))
    pq.write_table(shuffled, tmp_path / "shuffled.parquet")
    options = ("--labels-from", tmp_path / "shuffled.parquet", "--labels", "kind")
    assert report_of("--ids", folder / "lists.parquet", *options)["labels"] != of_index["labels"]
    joined = report_of("--ids", folder / "lists.parquet", *options, "--id-column", "sku")
    assert joined["labels"] == of_index["labels"]

    pq.write_table(shuffled.slice(0, 300), tmp_path / "fewer.parquet")
    options = ("--labels-from", tmp_path / "fewer.parquet", "--labels", "kind")
    fewer = report_of("--ids", folder / "lists.parquet", *options, "--id-column", "sku")
    assert fewer["labels"]["kind"][0]["items"] == 300
    refused = run("--ids", folder / "lists.parquet", *options)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "has 300 rows for 500 IDs" in refused.stderr


def test_labels_are_chosen_from_the_table_of_the_ids(folder: Path, items: pa.Table, tmp_path: Path) -> None:
    table = pq.read_table(folder / "columns.parquet").append_column("kind", items["kind"])
    pq.write_table(table, tmp_path / "ids.parquet")
    assert list(report_of("--ids", tmp_path / "ids.parquet")["labels"]) == ["kind"]  # neither sku nor row


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": [[1, 2]], "b": [[3, 4]]}, "IDs could be in 'a', 'b'. Choose a column with --ids-column."),
        ({"a": ["1-2", "3-4-5"]}, "row 0 has 2 codes, row 1 has 3"),
        ({"a": [[1, 2], [3]]}, "row 0 has 2 codes, row 1 has 1"),
        ({"a": [[1, 2], None]}, "1 rows have no ID"),
        ({"a": [[1, None]]}, "1 codes are missing"),
        ({"a": [[1, -2]]}, "row 0 is 1--2. Codes lie in 0 to 65535."),
        ({"c1": [1, None], "c2": [1, 2]}, "column 'c1' has rows without a code"),
        ({"a": ["one", "two"], "b": [1.5, 2.5]}, "no IDs among 'a', 'b'. They are a column of lists of integers, "),
        ({"a": pa.array([], pa.list_(pa.int16()))}, "it has 0 rows"),
    ],
)
def test_tables_without_usable_ids(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "ids.parquet")
    result = run("--ids", tmp_path / "ids.parquet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_named_column_is_taken() -> None:
    table = pa.table({"a": [[1, 2]], "b": [[3, 4]], "text": ["5-6"], "number": [7]})
    assert find_codes(table, "t", column="b").codes.tolist() == [[3, 4]]
    assert find_codes(table, "t", column="text").codes.tolist() == [[5, 6]]
    with pytest.raises(semid.SemidError, match=r"column 'number' holds int64. IDs are a column of lists"):
        find_codes(table, "t", column="number")
    with pytest.raises(InvalidArgumentError, match=r"t has no column 'c'. It has 'a', 'b', 'text', 'number'"):
        find_codes(table, "t", column="c")


def test_vectors_for_other_items_are_refused(folder: Path) -> None:
    result = run("--ids", folder / "codes.npy", "--vectors", folder / "held.npy")
    assert result.exit_code == 1
    assert result.stderr == "error: There are 40 vectors for 500 rows of codes. Give one each.\n"


# -- two versions -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renamed(folder: Path, codes: np.ndarray) -> Path:
    """The same IDs with the codes of the first level renamed, and the items in another order."""
    order = np.random.default_rng(1).permutation(ROWS)
    changed = codes.copy()
    changed[:, 0] = (changed[:, 0] + 3) % WORDS
    table = pq.read_table(folder / "lists.parquet")
    table = table.set_column(1, "codes", pa.array(changed.tolist())).take(order)
    pq.write_table(table, folder / "renamed.parquet")
    return folder / "renamed.parquet"


def test_nothing_changed_against_itself(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copy(folder / "index.duckdb", tmp_path / "copy.duckdb")
    churn = report_of(folder / "index.duckdb", "--against", copy)["churn"]
    assert churn == {"common": ROWS, "per_level": [0, 0, 0], "unaligned": [0, 0, 0]}
    with semid.open(folder / "index.duckdb", read_only=True) as index, semid.open(copy, read_only=True) as old:
        assert index.report(against=old, labels=[], queries=5).churn.unaligned == (0, 0, 0)


def test_renamed_codes_are_not_taken_for_moved_items(folder: Path, renamed: Path) -> None:
    """Against a table and an index, of an index and a table."""
    expected = {"common": ROWS, "per_level": [0, 0, 0], "unaligned": [1, 1, 1]}
    id_column = ("--id-column", "sku")
    assert report_of(folder / "index.duckdb", "--against", renamed, *id_column)["churn"] == expected
    assert report_of("--ids", renamed, "--against", folder / "index.duckdb", *id_column)["churn"] == expected
    assert report_of("--ids", renamed, "--against", folder / "texts.parquet", *id_column)["churn"] == expected


def test_versions_row_by_row(folder: Path, codes: np.ndarray, tmp_path: Path) -> None:
    changed = codes.copy()
    changed[:25, 2] = (changed[:25, 2] + 1) % WORDS
    np.save(tmp_path / "old.npy", changed)
    churn = report_of("--ids", folder / "codes.npy", "--against", tmp_path / "old.npy")["churn"]
    assert churn["unaligned"] == pytest.approx([0, 0, 25 / ROWS])
    np.save(tmp_path / "old.npy", changed[:-1])
    result = run("--ids", folder / "codes.npy", "--against", tmp_path / "old.npy")
    assert result.exit_code == 1
    assert "has 499 IDs" in result.stderr


def test_versions_without_common_items_are_refused(folder: Path, codes: np.ndarray) -> None:
    with semid.open(folder / "index.duckdb", read_only=True) as index:
        some = index.report(against=(["item 3", "new"], codes[[3, 4]]), queries=5)
        assert some.churn.common == 1
        with pytest.raises(InvalidIdsError, match="has none of the items"):
            index.report(against=(["new"], codes[:1]))
        with pytest.raises(InvalidIdsError, match="more than once"):
            index.report(against=(["item 1", "item 1"], codes[:2]))
        with pytest.raises(InvalidIdsError, match="There are 1 ids for 2"):
            index.report(against=(["item 1"], codes[:2]))
    result = run(folder / "index.duckdb", "--against", folder / "texts.parquet")
    assert result.exit_code == 1
    assert "Say with --id-column which column of" in result.stderr


# -- requirements -----------------------------------------------------------------------------------------------------


def test_requirements_become_the_exit_code(folder: Path, of_index: dict[str, Any]) -> None:
    rate, recall = of_index["ids"]["collision_rate"], of_index["neighbours"]["recall"]
    met = ("--require", f"collision_rate<={rate + 1e-6}", "--require", f"recall@10 > {recall - 1e-6}")
    base = (folder / "index.duckdb", "--labels", "kind", *QUICK, "--format", "json")
    assert run(*base, *met).exit_code == 0
    failed = run(*base, *met, "--require", "kind.purity_1>=1.5", "--require", "collision_rate<0.0001")
    assert failed.exit_code == 1
    assert timeless(json.loads(failed.stdout)) == of_index
    purity = of_index["labels"]["kind"][0]["purity"]
    assert failed.stderr.splitlines() == [
        f"not met: kind.purity_1 is {purity:.6g}, required is >= 1.5.",
        f"not met: collision_rate is {rate:.6g}, required is < 0.0001.",
    ]


def test_requirements_in_a_process_of_its_own(folder: Path) -> None:
    command = [sys.executable, "-m", "semid_index.cli", "report", str(folder / "index.duckdb"), *QUICK]
    path = os.pathsep.join([str(Path(semid.__file__).parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    failed = subprocess.run(
        [*command, "--require", "shared<0"], capture_output=True, text=True, env=environment, check=False
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("not met: shared is 0.")
    assert json.loads(failed.stdout)["items"] == ROWS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give the file of an index, or --ids"),
        (["{index}", "--ids", "{folder}/codes.npy"], "one of the two"),
        (["{index}", "--require", "collision_rate"], "is no requirement"),
        (["{index}", "--require", "beauty<1", "--queries", "5"], "no figure 'beauty'"),
        (["{index}", "--metric", "cosine"], "--metric is for --ids"),
        (["{index}", "--labels-from", "{folder}/items.parquet"], "--labels-from is for --ids"),
        (["--ids", "{folder}/codes.npy", "--codebook-size", "many"], "--codebook-size is a number"),
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str], message: str) -> None:
    result = run(*(argument.format(folder=folder, index=folder / "index.duckdb") for argument in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.duckdb"], "There is no file missing.duckdb"),
        (["--ids", "missing.parquet"], "'missing.parquet' cannot be read"),
        (["--ids", "missing.npy"], "'missing.npy' cannot be read"),
        (["--ids", "{folder}/codes.npy", "--ids-column", "x"], "there is no column 'x'"),
        (["--ids", "{folder}/codes.npy", "--levels", "4"], "levels=4 is more than the IDs"),
        (["--ids", "{folder}/codes.npy", "--codebook-size", "8,8"], "There are 2 codebook sizes for IDs of 3 levels"),
        (["--ids", "{folder}/codes.npy", "--labels", "x"], "has no column 'x'"),
        (["--ids", "{folder}/codes.npy", "-o", "{folder}/no/page.html"], "page.html cannot be written"),
        (["--ids", "{folder}/codes.npy", "--against", "{folder}/index.duckdb"], "say with --id-column"),
    ],
)
def test_failures_are_one_line(folder: Path, arguments: list[str], message: str) -> None:
    result = run(*(argument.format(folder=folder) for argument in arguments))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# -- what people see --------------------------------------------------------------------------------------------------


def test_the_table_begins_with_what_matters(folder: Path, of_index: dict[str, Any]) -> None:
    result = run(folder / "index.duckdb", "--labels", "kind", "--format", "table", *QUICK)
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    starts = ["Meaning", "Neighbours", "Collisions", "Levels", "Balance is not quality", "Memory"]
    places = [next(number for number, line in enumerate(lines) if line.startswith(start)) for start in starts]
    assert places == sorted(places)
    assert places[2] < 24  # on the first screen
    first = of_index["labels"]["kind"][0]
    assert [f"{100 * first['purity']:.1f}", "%"] == lines[places[0] + 2].split()[3:5] or first["purity"] == 1
    assert f"{of_index['neighbours']['recall']:.3f}" in result.stdout


def test_the_page_and_the_plots_are_written(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("--labels", "kind", "--output", tmp_path / "report.html", "--plots", tmp_path / "plots", *QUICK)
    result = run(folder / "index.duckdb", *arguments, "--require", "shared<0")
    assert result.exit_code == 1, "the page is written whether requirements are met or not"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>Semantic IDs in index.duckdb</h1>" in page
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == sorted(
        f"{name}.png" for name in ("meaning", "probing", "collisions", "buckets", "error", "frequencies", "memory")
    )
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in names)


def test_without_matplotlib_nothing_is_measured_in_vain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(folder / "index.duckdb", "--output", folder / "page.html")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "pip install 'semid-index[report]'" in result.stderr
    assert run("--ids", folder / "codes.npy").exit_code == 0


@pytest.mark.parametrize("format", ["jsonl", "parquet", "csv"])
def test_other_formats_have_one_row(folder: Path, format: str) -> None:
    result = run("--ids", folder / "codes.npy", "--format", format)
    assert result.exit_code == 0
    if format == "parquet":
        assert pq.read_table(pa.BufferReader(result.stdout_bytes))["items"].to_pylist() == [ROWS]
    else:
        assert len(result.stdout.splitlines()) == {"jsonl": 1, "csv": 2}[format]
