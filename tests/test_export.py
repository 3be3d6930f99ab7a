"""``index.export`` and ``semid export``: the IDs as one file that other programs read."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import semid_index as semid
from semid_index.cli import app
from semid_index.codes import CodeLayout, pack, parse_prefix, prefix_range
from semid_index.errors import IndexExistsError, IndexFileError, InvalidArgumentError, NotTrainedError, StorageError
from semid_index.export import rows_per_group
from semid_index.index import SemanticIndex
from semid_index.report.id_files import find_codes

pytest.importorskip("faiss", reason="training needs FAISS")

ROWS, DIM = 600, 24
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"levels": 3, "codebook_size": 16},
    "mixed": {"levels": 2, "codebook_size": [100, 7], "metric": "cosine", "vectors": "float16"},
    "int8": {"levels": 1, "codebook_size": 50, "metric": "ip", "vectors": "int8"},
    "long": {"levels": 12, "codebook_size": 40, "vectors": "none", "iterations": 2},
    "flat": {"quantizer": "pq", "levels": 4, "codebook_size": 16},
}


def ask(query: str) -> list[tuple[Any, ...]]:
    """By a connection of its own, whatever other tests do with DuckDB's common one."""
    with duckdb.connect() as connection:
        return connection.execute(query).fetchall()


def make(name: str, vectors: NDArray[np.float32]) -> SemanticIndex:
    """In memory; added in two parts, so that rows are not stored in the order of sids."""
    index = semid.create(dim=DIM, **SHAPES[name])
    index.train(vectors)
    ids = np.arange(ROWS)[::-1] * 2
    words = [f"word {row}" for row in range(ROWS)]
    for part in (slice(0, 350), slice(350, ROWS)):
        index.add(
            vectors[:ROWS][part], ids[part], metadata={"word": words[part], "c1": words[part], "Vector": words[part]}
        )
    return index


@pytest.fixture(scope="module")
def made(vectors: NDArray[np.float32]) -> Iterator[dict[str, SemanticIndex]]:
    indexes = {name: make(name, vectors) for name in SHAPES}
    yield indexes
    for index in indexes.values():
        index.close()


@pytest.fixture(params=SHAPES)
def index(request: pytest.FixtureRequest, made: dict[str, SemanticIndex]) -> SemanticIndex:
    return made[request.param]


@pytest.fixture
def plain(made: dict[str, SemanticIndex]) -> SemanticIndex:
    return made["plain"]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what is in the file ----------------------------------------------------------------------------------------------


def test_the_file_is_the_view_sorted(index, tmp_path):
    path = tmp_path / "ids.parquet"
    assert index.export(path) == ROWS
    assert left_in(tmp_path) == ["ids.parquet"]
    table = pq.read_table(path)
    levels = index._store.layout.levels
    names = ["id", "sid", "semantic_id", *(f"c{level}" for level in range(1, levels + 1)), "dup_rank", "version"]
    assert table.column_names == names
    view = index.sql(f"SELECT {', '.join(names)} FROM semantic_ids").to_arrow_table()
    assert table.sort_by("id").to_pylist() == view.sort_by("id").to_pylist()
    assert [str(table.schema.field(name).type) for name in names[:3]] == ["int64", "int64", "string"]

    codes = np.column_stack([table[f"c{level}"].to_numpy() for level in range(1, levels + 1)])
    ranked = [*map(tuple, np.column_stack([codes, table["dup_rank"].to_numpy()]).tolist())]
    assert ranked == sorted(ranked)
    np.testing.assert_array_equal(table["sid"].to_numpy(), pack(codes, index._store.layout))


def test_it_says_what_the_ids_are(index, tmp_path):
    index.export(tmp_path / "ids.parquet")
    told = {key.decode(): value.decode() for key, value in pq.read_schema(tmp_path / "ids.parquet").metadata.items()}
    assert json.loads(told["semid_codebook_sizes"]) == list(index._store.layout.codebook_sizes)
    assert told["semid_metric"] == index.config.metric
    assert told["semid_quantizer"] == index.config.quantizer
    assert told["semid_dim"] == "24"
    assert json.loads(told["semid_hierarchical"]) == (index.config.quantizer == "rq")
    found = ask(f"SELECT decode(key), decode(value) FROM parquet_kv_metadata('{tmp_path / 'ids.parquet'}')")
    assert dict(found) == {key: value for key, value in told.items() if key.startswith("semid_")}


def test_metadata_and_vectors(index, tmp_path):
    path = tmp_path / "all.parquet"
    if index.config.vectors == "none":
        with pytest.raises(InvalidArgumentError, match='vectors="none"'):
            index.export(path, vectors=True)
        assert left_in(tmp_path) == []
        return
    index.export(path, metadata=True, vectors=True)
    table = pq.read_table(path)
    assert table.column_names[-4:] == ["word", "item_c1", "item_Vector", "vector"]
    rows = (2 * ROWS - 2 - table["id"].to_numpy()) // 2
    for name in ("word", "item_c1", "item_Vector"):
        assert table[name].to_pylist() == [f"word {row}" for row in rows]
    assert table["vector"].type.value_type == pa.float32()
    stored = np.stack(index.get(table["id"], vectors=True)["vector"].to_numpy(zero_copy_only=False))
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy(zero_copy_only=False)), stored)


def test_some_metadata(plain, tmp_path):
    plain.export(tmp_path / "one.parquet", metadata=["c1"])
    assert pq.read_table(tmp_path / "one.parquet").column_names[-2:] == ["version", "item_c1"]
    with pytest.raises(InvalidArgumentError, match=r"no column 'wrod'. They have 'word', 'c1', 'Vector'"):
        plain.export(tmp_path / "two.parquet", metadata=["wrod"])
    with pytest.raises(InvalidArgumentError, match=r"metadata=\['word'\]"):
        plain.export(tmp_path / "two.parquet", metadata="word")
    plain.export(tmp_path / "three.parquet", metadata=["Vector"])
    assert pq.read_table(tmp_path / "three.parquet").column_names[-1] == "Vector"


def test_other_formats(plain, tmp_path):
    expected = plain.sql(
        "SELECT id, sid, semantic_id, c1, c2, c3, dup_rank, version FROM semantic_ids ORDER BY sid, dup_rank"
    )
    records = expected.to_arrow_table().to_pylist()
    for name in ("ids.csv", "ids.json", "ids.JSONL"):
        assert plain.export(tmp_path / name) == ROWS
    with (tmp_path / "ids.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in row.items()} for row in records]
    assert json.loads((tmp_path / "ids.json").read_text()) == records
    assert [json.loads(line) for line in (tmp_path / "ids.JSONL").read_text().splitlines()] == records


def test_ids_that_are_texts(vectors, tmp_path):
    with semid.create(dim=DIM, levels=2, codebook_size=8) as index:
        index.train(vectors)
        ids = ["it's", 'a "name"', "ünïcode", "", "a,b\nc"]
        index.add(vectors[:5], ids)
        for name in ("a 'quoted' name.parquet", "[1].csv", "*.jsonl"):
            assert index.export(tmp_path / name) == 5
        assert left_in(tmp_path) == ["*.jsonl", "[1].csv", "a 'quoted' name.parquet"]
        assert set(pq.read_table(tmp_path / "a 'quoted' name.parquet")["id"].to_pylist()) == set(ids)


def test_an_index_without_items(vectors, tmp_path):
    with semid.create(dim=DIM, levels=2, codebook_size=8) as index:
        with pytest.raises(NotTrainedError):
            index.export(tmp_path / "ids.parquet")
        index.train(vectors)
        assert index.export(tmp_path / "ids.parquet", vectors=True, metadata=True) == 0
        assert pq.read_table(tmp_path / "ids.parquet").num_rows == 0


@pytest.mark.parametrize("name", ["plain", "strings", "long", "flat", "scalar"])
def test_an_old_file_that_may_not_be_written(name, tmp_path):
    path = tmp_path / "index.duckdb"
    path.write_bytes(gzip.decompress((Path(__file__).parent / "golden" / "v1" / f"{name}.duckdb.gz").read_bytes()))
    with semid.open(path, read_only=True) as index:
        assert index.export(tmp_path / "ids.parquet", metadata=True) == len(index) > 0


# -- prefixes ---------------------------------------------------------------------------------------------------------

BIG, WORDS = 300_000, 64


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory, vectors: NDArray[np.float32]) -> Path:
    """The IDs of 300,000 items, added in two parts."""
    path = tmp_path_factory.mktemp("export") / "ids.parquet"
    random = np.random.default_rng(0)
    many = random.standard_normal((BIG, 4), dtype=np.float32)
    with semid.create(dim=4, levels=3, codebook_size=WORDS, vectors="none", iterations=2) as index:
        index.train(many[:5_000])
        index.add(many[: BIG // 3])
        index.add(many[BIG // 3 :])
        assert index.export(path) == BIG
    return path


def groups_with(path: Path, column: str, low: int, high: int) -> list[int]:
    """The row groups that may have values in this range, by what the file says of them."""
    meta = pq.read_metadata(path)
    place = meta.schema.to_arrow_schema().get_field_index(column)
    statistics = [meta.row_group(group).column(place).statistics for group in range(meta.num_row_groups)]
    return [group for group, told in enumerate(statistics) if told.min <= high and told.max >= low]


@pytest.mark.parametrize("text", ["12", "0", "63", "12-17", "12-17-3"])
def test_a_prefix_is_in_few_row_groups(text, big_file):
    layout = CodeLayout((WORDS,) * 3)
    prefix = parse_prefix(text, layout)
    low, end = prefix_range(prefix, layout)
    table = pq.read_table(big_file)
    codes = np.column_stack([table[f"c{level}"].to_numpy() for level in range(1, len(prefix) + 1)])
    wanted = int((codes == prefix).all(axis=1).sum())
    groups = groups_with(big_file, "sid", low, end - 1)
    assert pq.read_metadata(big_file).num_row_groups == -(-BIG // rows_per_group(BIG)) == 19
    assert len(groups) <= 2 + wanted // rows_per_group(BIG)
    assert len(groups_with(big_file, "c1", prefix[0], prefix[0])) <= 3
    sid = pq.ParquetFile(big_file).read_row_groups(groups, columns=["sid"])["sid"].to_numpy()
    assert ((sid >= low) & (sid < end)).sum() == wanted

    found = ask(f"SELECT count(*) FROM '{big_file}' WHERE sid BETWEEN {low} AND {end - 1}")
    assert found == [(wanted,)]
    by_codes = " AND ".join(f"c{level} = {code}" for level, code in enumerate(prefix, 1))
    assert ask(f"SELECT count(*) FROM '{big_file}' WHERE {by_codes}") == [(wanted,)]


@pytest.mark.skipif(duckdb.__version__.startswith("1."), reason="DuckDB 1.5 does not tell how many row groups it read")
@pytest.mark.parametrize("condition", ["sid BETWEEN {low} AND {high}", "c1 = 12 AND c2 = 17", "c1 = 12"])
def test_duckdb_reads_few_row_groups(condition, big_file):
    low, end = prefix_range((12, 17), CodeLayout((WORDS,) * 3))
    query = f"SELECT max(dup_rank) FROM '{big_file}' WHERE {condition.format(low=low, high=end - 1)}"
    [[_, plan]] = ask(f"EXPLAIN ANALYZE {query}")
    read, all_groups = map(int, re.findall(r"Row Groups Scanned: *(\d+) */ *(\d+)", plan)[0])
    assert read <= 3
    assert all_groups == 19


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 16_384), (16_000_000, 16_384), (16_500_000, 18_432), (10**9, 1_001_472)]
)
def test_rows_per_group(rows, expected):
    assert rows_per_group(rows) == expected
    assert expected % 2_048 == 0


# -- places -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_there(plain, tmp_path):
    path = tmp_path / "ids.csv"
    path.write_text("mine")
    with pytest.raises(IndexExistsError, match="overwrite=True"):
        plain.export(path)
    assert path.read_text() == "mine"
    assert plain.export(path, overwrite=True) == ROWS
    assert len(path.read_text().splitlines()) == ROWS + 1
    assert left_in(tmp_path) == ["ids.csv"]


def test_places_that_are_none(plain, tmp_path):
    with pytest.raises(IndexFileError, match="There is no folder"):
        plain.export(tmp_path / "missing" / "ids.parquet")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(IndexExistsError, match="is a folder"):
        plain.export(tmp_path / "folder.parquet", overwrite=True)
    for name in ("ids.txt", "ids", ".parquet"):
        with pytest.raises(InvalidArgumentError, match=r"end with one of \.parquet, \.csv, \.json, \.jsonl"):
            plain.export(tmp_path / name)
    assert left_in(tmp_path) == ["folder.parquet"]


def test_the_index_itself_is_not_overwritten(vectors, tmp_path):
    path = tmp_path / "index.parquet"
    with semid.create(path, dim=DIM, levels=2, codebook_size=8) as index:
        index.train(vectors)
        index.add(vectors[:5])
        with pytest.raises(IndexExistsError, match="the index itself"):
            index.export(path, overwrite=True)
        assert index.export(tmp_path / "ids.parquet") == 5


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import semid_index as semid
from semid_index.errors import StorageError

index, target = map(Path, sys.argv[1:])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with semid.open(index, read_only=True) as opened:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        opened.export(target, vectors=True, overwrite=True)
    except StorageError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk(trained_file, tmp_path, run_python):
    target = tmp_path / "ids.parquet"
    target.write_bytes(b"as it was")
    told = run_python(
        FULL_DISK,
        trained_file,
        target,
    )
    assert told.startswith(f"Writing {target} failed: ")
    assert target.read_bytes() == b"as it was"
    assert left_in(tmp_path) == ["ids.parquet"]


@pytest.mark.parametrize("length", [240, 300])
def test_a_name_that_is_too_long(length, plain, tmp_path):
    """Whatever goes wrong while writing, nothing is left behind."""
    target = tmp_path / f"{'x' * length}.parquet"
    with pytest.raises(StorageError, match=r"[Uu]se another path"):
        plain.export(target)
    assert left_in(tmp_path) == []


# -- command line -----------------------------------------------------------------------------------------------------


def semid_program(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="semid")


def test_command_line(trained_file, tmp_path):
    path = tmp_path / "ids.parquet"
    done = semid_program("export", trained_file, "-o", path)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"file": str(path), "items": 2_000, "bytes": path.stat().st_size}
    assert semid_program("export", trained_file, "-o", path).stderr.startswith(f"error: {path} exists.")
    done = semid_program(
        "export", trained_file, "-o", path, "--metadata", "--vectors", "--overwrite", "--format", "table"
    )
    assert " ".join(done.stdout.split()).startswith("Wrote the IDs of 2,000 items to")
    assert pq.read_table(path).column_names[-3:] == ["number", "word", "vector"]


@pytest.mark.parametrize("name", ["plain", "long"])
def test_the_report_reads_it(name, made, tmp_path):
    made[name].export(tmp_path / "ids.parquet", metadata=["word"])
    codes = made[name]._store.codes_of(np.arange(ROWS))
    done = semid_program("report", "--ids", tmp_path / "ids.parquet", "--format", "json", "--queries", 20)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ids"]["collision_rate"] == pytest.approx(1 - len(np.unique(codes, axis=0)) / ROWS)
    assert len(report["levels"]) == codes.shape[1]
    assert [level["largest"] for level in report["levels"]] == [np.bincount(level).max() for level in codes.T]


def test_the_report_takes_no_list_of_numbers_for_the_ids(tmp_path):
    """A column of metadata may hold lists of integers, as IDs that others made do."""
    with semid.create(dim=4, levels=2, codebook_size=4) as index:
        vectors = np.random.default_rng(0).standard_normal((50, 4), dtype=np.float32)
        index.train(vectors)
        index.add(vectors, metadata={"sizes": [[1, 2, 3]] * 50})
        index.export(tmp_path / "ids.parquet", metadata=True)
        expected = index.encode(vectors)
    table = pq.read_table(tmp_path / "ids.parquet")
    found = find_codes(table, "the file")
    assert np.array_equal(found.codes[np.argsort(table["id"].to_numpy())], expected)
