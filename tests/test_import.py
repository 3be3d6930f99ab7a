"""``index.import_items`` and ``semid import``: items come back from an export with the IDs that they had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import semid_index as semid
from semid_index.cli import app
from semid_index.errors import (
    DimensionMismatchError,
    DuplicateIdError,
    IndexExistsError,
    InvalidArgumentError,
    InvalidCodesError,
    InvalidIdsError,
    NotTrainedError,
    ReadOnlyError,
    SourceNotFoundError,
)
from semid_index.index import SemanticIndex

pytest.importorskip("faiss", reason="training needs FAISS")

ROWS, DIM = 500, 24
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"levels": 3, "codebook_size": 8},
    "cosine, float16, with a tail": {
        "levels": 2,
        "codebook_size": [50, 7],
        "metric": "cosine",
        "vectors": "float16",
        "tail": 8,
    },
    "ip, int8": {"levels": 1, "codebook_size": 50, "metric": "ip", "vectors": "int8"},
    "long": {"levels": 12, "codebook_size": 40, "iterations": 2},
    "flat": {"quantizer": "pq", "levels": 4, "codebook_size": 16},
    "balanced": {"quantizer": "balanced-rq", "levels": 2, "codebook_size": 16},
    "moved": {"levels": 2, "codebook_size": 16, "collisions": {"policy": "capacity", "items": 1}},
    "a level more": {"levels": 2, "codebook_size": 16, "collisions": "digit"},
}
NAMES = "id, semantic_id, dup_rank"


def make(path: Path | None, data: np.ndarray, **shape: Any) -> SemanticIndex:
    """Items in two parts; every tenth vector is there twice, so that some share an ID."""
    index = semid.create(path, dim=DIM, **shape)
    index.train(data)
    kept = data[:ROWS].copy()
    kept[::10] = kept[1::10]
    ids = [f"item {row}" for row in range(ROWS)]
    for part in (slice(200, ROWS), slice(0, 200)):
        words = {"word": ids[part], "c1": ids[part], "c9": list(range(part.stop - part.start)), "day.s": ids[part]}
        index.add(kept[part], ids[part], metadata=words)
    return index


def names_in(index: SemanticIndex) -> list[tuple[Any, ...]]:
    return index.sql(f"SELECT {NAMES} FROM semantic_ids ORDER BY id").fetchall()


@pytest.fixture(scope="module", params=SHAPES)
def made(request, vectors, tmp_path_factory) -> tuple[SemanticIndex, Path, Path]:
    """An index, what it exports, and a copy of it without items."""
    folder = tmp_path_factory.mktemp("made")
    index = make(None, vectors, **SHAPES[request.param])
    index.export(folder / "all.parquet", vectors=True, metadata=True)
    index.save_copy(folder / "empty.duckdb", items=False)
    return index, folder / "all.parquet", folder / "empty.duckdb"


@pytest.fixture
def empty(made, tmp_path) -> SemanticIndex:
    (tmp_path / "new.duckdb").write_bytes(made[2].read_bytes())
    with semid.open(tmp_path / "new.duckdb") as index:
        yield index


@pytest.fixture(scope="module")
def plain(vectors, tmp_path_factory) -> Path:
    """A folder with an index, what it exports, and a copy of it without items."""
    folder = tmp_path_factory.mktemp("plain")
    with make(folder / "index.duckdb", vectors, **SHAPES["plain"]) as index:
        index.export(folder / "all.parquet", vectors=True, metadata=True)
        index.export(folder / "ids.parquet")
        index.save_copy(folder / "empty.duckdb", items=False)
    return folder


@pytest.fixture
def target(plain, tmp_path) -> SemanticIndex:
    (tmp_path / "new.duckdb").write_bytes((plain / "empty.duckdb").read_bytes())
    with semid.open(tmp_path / "new.duckdb") as index:
        yield index


def written(table: pa.Table, folder: Path) -> Path:
    pq.write_table(table, folder / "changed.parquet")
    return folder / "changed.parquet"


# -- there and back ---------------------------------------------------------------------------------------------------


def test_a_copy_without_items_gives_the_same_ids(made, empty, vectors):
    index, _, _ = made
    assert (len(empty), empty.config) == (0, index.config)
    np.testing.assert_array_equal(empty.encode(vectors[:100]), index.encode(vectors[:100]))
    assert empty.verify().ok


def test_items_keep_their_ids(made, empty, vectors):
    index, file, _ = made
    assert empty.import_items(file, batch_size=170) == ROWS
    assert names_in(empty) == names_in(index)
    metadata = 'SELECT id, word, c1, c9, "day.s" FROM items ORDER BY id'
    assert empty.sql(metadata).fetchall() == index.sql(metadata).fetchall()
    report = empty.verify(sample=ROWS)
    assert report.ok, [check for check in report.checks if not check.ok]
    for exact in (False, True):
        ours, theirs = (one.search(vectors[:20], 5, probes=10_000, exact=exact) for one in (empty, index))
        for found, expected in zip(ours.distances, theirs.distances, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_so_do_some_of_them(made, empty, tmp_path):
    """Written anew by another program, which does not keep what the file told of the index."""
    index, file, _ = made
    few = tmp_path / "few.parquet"
    with duckdb.connect() as connection:
        connection.execute(f"COPY (FROM '{file}' WHERE id LIKE '%7%' ORDER BY word DESC) TO '{few}'")
    expected = [row for row in names_in(index) if "7" in row[0]]
    assert empty.import_items(few) == len(expected)
    assert names_in(empty) == expected
    assert empty.verify().ok


def test_what_is_written_later_goes_on_from_there(target, plain, vectors):
    target.import_items(plain / "all.parquet")
    before = {(semantic, rank) for _, semantic, rank in names_in(target)}
    target.delete(["item 3"])
    target.add(vectors[:20], [f"new {row}" for row in range(20)])
    added = {(semantic, rank) for id, semantic, rank in names_in(target) if id.startswith("new")}
    assert len(added) == 20
    assert not added & before
    assert target.verify().ok


def test_a_deleted_item_can_come_back(target, plain, tmp_path):
    target.import_items(plain / "all.parquet")
    expected = names_in(target)
    target.delete(["item 10", "item 11"])
    table = pq.read_table(plain / "all.parquet")
    target.import_items(written(table.filter(pc.is_in(table["id"], pa.array(["item 10", "item 11"]))), tmp_path))
    assert names_in(target) == expected
    assert target.verify().ok


# -- what is refused, and changes nothing -----------------------------------------------------------------------------


def one_more(table: pa.Table, column: str, value: Any, row: int = 3) -> pa.Table:
    """The same table with another value in one row."""
    values = table[column].to_pylist()
    values[row] = value
    position = table.column_names.index(column)
    return table.set_column(position, column, pa.array(values, table[column].type))


def turned(table: pa.Table) -> pa.Table:
    """The vectors of other items, which a file without a hash has to be refused for."""
    position = table.column_names.index("vector")
    moved = table["vector"].take(np.roll(np.arange(len(table)), len(table) // 2))
    return table.set_column(position, "vector", moved).replace_schema_metadata()


def given_twice(table: pa.Table) -> pa.Table:
    """Two items with one ID and one rank."""
    for name in ("sid", "semantic_id", "c1", "c2", "c3", "dup_rank", "vector"):
        table = one_more(table, name, table[name][7].as_py())
    return table


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no vectors": (lambda t: t.drop_columns("vector"), InvalidArgumentError, "'vector' is needed"),
    "no ids": (lambda t: t.drop_columns("id"), InvalidArgumentError, "'id' is needed"),
    "a level less": (lambda t: t.drop_columns("c3"), InvalidArgumentError, "'c3' is needed"),
    "no ranks": (lambda t: t.drop_columns("dup_rank"), InvalidArgumentError, "'dup_rank' is needed"),
    "a rank below 0": (lambda t: one_more(t, "dup_rank", -1), InvalidArgumentError, "dup_rank"),
    "a code missing": (lambda t: one_more(t, "c2", None), InvalidArgumentError, "1 are missing"),
    "a code too large": (lambda t: one_more(t, "c2", 8), InvalidCodesError, r"row 3 is \d+-8-\d+"),
    "an id missing": (lambda t: one_more(t, "id", None), InvalidIdsError, "missing"),
    "an id twice": (lambda t: one_more(t, "id", t["id"][7].as_py()), DuplicateIdError, "more than once"),
    "an ID twice": (given_twice, DuplicateIdError, "same dup_rank"),
    "vectors of others": (turned, InvalidCodesError, "do not fit the vectors"),
    "too few dimensions": (
        lambda t: t.drop_columns("vector").append_column("vector", pa.array([[1.0, 2.0]] * len(t))),
        DimensionMismatchError,
        "24",
    ),
    "text as ranks": (
        lambda t: t.drop_columns("dup_rank").append_column("dup_rank", pa.array(["0"] * len(t))),
        InvalidArgumentError,
        "whole number",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, target, plain, tmp_path):
    change, error, words = BAD[case]
    path = written(change(pq.read_table(plain / "all.parquet")), tmp_path)
    with pytest.raises(error, match=words):
        target.import_items(path)
    assert len(target) == 0
    assert target.verify().ok


def test_ids_of_other_codebooks(plain, target, vectors, tmp_path):
    """Nearly the same codebooks: those that retraining made of them."""
    with semid.open(plain / "index.duckdb", read_only=True) as index:
        index.save_copy(tmp_path / "index.duckdb")
    with semid.open(tmp_path / "index.duckdb") as index:
        index.retrain(vectors[: ROWS + 100], compare=False)
        index.export(tmp_path / "new.parquet", vectors=True)
    with pytest.raises(InvalidCodesError, match=r"other codebooks.*--no-items"):
        target.import_items(tmp_path / "new.parquet")


def test_files_that_cannot_be_read(target, tmp_path, plain):
    with pytest.raises(SourceNotFoundError):
        target.import_items(tmp_path / "none.parquet")
    (tmp_path / "ids.csv").write_text("id\n")
    with pytest.raises(InvalidArgumentError, match=r"only \.parquet can"):
        target.import_items(tmp_path / "ids.csv")
    (tmp_path / "cut.parquet").write_bytes((plain / "all.parquet").read_bytes()[:5_000])
    with pytest.raises(InvalidArgumentError, match="Is it whole"):
        target.import_items(tmp_path / "cut.parquet")
    table = pq.read_table(plain / "all.parquet")
    for told in (b"[1, 2]", b"{"):
        path = written(table.replace_schema_metadata({b"semid_metadata": told}), tmp_path)
        with pytest.raises(InvalidArgumentError, match="cannot be read"):
            target.import_items(path)


def test_items_that_are_there(plain, target, tmp_path):
    target.import_items(plain / "all.parquet")
    before = names_in(target)
    with pytest.raises(DuplicateIdError, match="in the index already"):
        target.import_items(plain / "all.parquet")
    table = pq.read_table(plain / "all.parquet")
    renamed = pa.array([f"other {row}" for row in range(len(table))])
    with pytest.raises(DuplicateIdError, match="same dup_rank"):
        target.import_items(written(table.set_column(0, "id", renamed), tmp_path))
    assert names_in(target) == before
    target.delete(where="true")
    with pytest.raises(DuplicateIdError, match="same dup_rank"):  # what was given once is not given to others
        target.import_items(written(table.set_column(0, "id", renamed), tmp_path))


def test_indexes_that_take_none(plain, vectors, tmp_path):
    with semid.create(dim=DIM) as index, pytest.raises(NotTrainedError, match="items=False"):
        index.import_items(plain / "all.parquet")
    with semid.open(plain / "index.duckdb", read_only=True) as index, pytest.raises(ReadOnlyError):
        index.import_items(plain / "all.parquet")
    with semid.create(dim=DIM, levels=2, codebook_size=8, vectors="none") as index:
        index.train(vectors)
        with pytest.raises(InvalidArgumentError, match="save_copy"):
            index.import_items(plain / "all.parquet")


def test_a_copy_without_items_of_an_untrained_index(tmp_path):
    with semid.create(dim=DIM, levels=2) as index:
        index.save_copy(tmp_path / "new.duckdb", items=False)
        with pytest.raises(IndexExistsError):
            index.save_copy(tmp_path / "new.duckdb", items=False)
    with semid.open(tmp_path / "new.duckdb") as copy:
        assert copy.config == index.config
    assert [path.name for path in tmp_path.iterdir()] == ["new.duckdb"]


# -- the command line -------------------------------------------------------------------------------------------------


def test_commands(plain, tmp_path):
    new = str(tmp_path / "new.duckdb")
    run = CliRunner().invoke
    copied = run(app, ["copy", str(plain / "index.duckdb"), new, "--no-items", "--format", "json"])
    assert (copied.exit_code, json.loads(copied.stdout)["items"]) == (0, 0)
    imported = run(app, ["import", new, str(plain / "all.parquet"), "--format", "json"])
    assert imported.exit_code == 0, imported.output
    assert json.loads(imported.stdout) == {"index": new, "imported": ROWS, "items": ROWS}
    refused = run(app, ["import", new, str(plain / "ids.parquet")])
    assert refused.exit_code == 1
    assert "'vector' is needed" in refused.output
