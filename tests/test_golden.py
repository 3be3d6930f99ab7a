"""Indexes of each format are read as they were when they were written. A file that is missing is a failure."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import semid_index as semid
from semid_index.index import SemanticIndex
from semid_index.testing import assert_same_codes

FOLDER = Path(__file__).resolve().parent / "golden"
FORMATS = ("v1", "v2", "v4", "v5")  # written out, as are the names, so that a file that is missing is noticed
NAMES = ("plain", "strings", "long", "flat", "scalar")


def copy_of(version: str, name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a golden index, and what is to be found in it."""
    path = folder / "index.duckdb"
    path.write_bytes(gzip.decompress((FOLDER / version / f"{name}.duckdb.gz").read_bytes()))
    return path, json.loads((FOLDER / version / f"{name}.json").read_text())


@pytest.fixture(scope="module", params=product(FORMATS, NAMES, ("read-only", "read-write")), ids="-".join)
def opened(request, tmp_path_factory) -> Iterator[tuple[SemanticIndex, dict[str, Any]]]:
    version, name, mode = request.param
    path, expected = copy_of(version, name, tmp_path_factory.mktemp(name))
    with semid.open(path, read_only=mode == "read-only") as index:
        yield index, expected


def test_the_folders_have_these_files_and_no_others():
    files = [path for path in FOLDER.glob("v*/*") if path.is_file()]
    assert {(path.parent.name, path.name) for path in files} == {
        (version, f"{name}.{kind}") for version in FORMATS for name in NAMES for kind in ("duckdb.gz", "json")
    }
    assert all(path.stat().st_size < 1_000_000 for path in files)


def test_what_the_index_is(opened):
    index, expected = opened
    assert {name: getattr(index.config, name) for name in expected["config"]} == expected["config"]
    assert index.stats()["codebook_sizes"] == expected["codebook_sizes"]
    assert len(index) == len(expected["items"]) == 310


def test_nothing_is_wrong_with_it(opened):
    """Also where it is read in the format that it was written in."""
    assert opened[0].verify().failed == ()


def test_ids_codes_and_metadata(opened):
    index, expected = opened
    view = index.sql("SELECT id, semantic_id, dup_rank FROM semantic_ids ORDER BY id").fetchall()
    assert [list(row) for row in view] == expected["items"]
    first = [row[0] for row in view[:20]]
    found = index.get(first)
    assert found.drop_columns("semantic_id").to_pylist() == expected["metadata"]
    assert found["semantic_id"].to_pylist() == [row[1] for row in view[:20]]


def test_codes_decode_to_the_same_vectors(opened):
    index, expected = opened
    codes = np.array([[int(code) for code in row[1].split("-")] for row in expected["items"][:20]])
    np.testing.assert_allclose(index.decode(codes), expected["decoded"], rtol=1e-6, atol=1e-6)


def test_stored_vectors_get_the_same_codes(opened):
    """Only where they are stored to the bit; near-ties may go the other way on another machine."""
    index, expected = opened
    if index.config.vectors != "float32":
        pytest.skip(f"vectors={index.config.vectors!r} keeps them less precisely")
    ids = [row[0] for row in expected["items"]]
    vectors = np.stack(index.get(ids, vectors=True)["vector"].to_numpy(zero_copy_only=False))
    codes = np.array([[int(code) for code in row[1].split("-")] for row in expected["items"]], dtype=np.int32)
    assert_same_codes(index._quantizer, vectors, codes, index.encode(vectors))


@pytest.mark.parametrize(("search", "options"), [("default", {}), ("exact", {"exact": True}), ("filtered", None)])
def test_hits(opened, search, options):
    index, expected = opened
    if options is None:
        options = {"where": "number % 2 = 1 AND word IS NOT NULL"}
    result = index.search(np.array(expected["queries"], dtype=np.float32), 5, **options)
    hits = expected["hits"][search]
    np.testing.assert_allclose(np.stack(result.distances), hits["distances"], rtol=1e-5, atol=1e-5)
    assert [row.tolist() for row in result.semantic_ids] == hits["semantic_ids"]
    for ids, expected_ids, distances in zip(result.ids, hits["ids"], hits["distances"], strict=True):
        # items that are equally near may come in another order, and the last one may be as near as one left out
        clear = [expected_ids[i] for i in range(4) if np.isclose(distances, distances[i], rtol=1e-5).sum() == 1]
        assert [id for id in ids.tolist() if id in clear] == clear
        assert index.config.vectors == "none" or len(clear) >= 2


def test_shelves(opened):
    index, expected = opened
    if expected["shelves"] is None:
        pytest.skip(f"the codes of {index.config.quantizer} have no prefixes")
    assert {shelf.text: shelf.items for shelf in index.tree(1)} == expected["shelves"]
    text, items = max(expected["shelves"].items(), key=lambda shelf: shelf[1])
    below = [row[0] for row in expected["items"] if row[1].startswith(text.removesuffix("*"))]
    assert sorted(index.prefix(text)["id"].to_pylist()) == sorted(below)
    assert len(below) == items


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", FORMATS)
def test_the_index_goes_on_living(version, name, tmp_path):
    path, expected = copy_of(version, name, tmp_path)
    queries = np.array(expected["queries"], dtype=np.float32)
    ids = ["new"] if isinstance(expected["items"][0][0], str) else [10_000]
    with semid.open(path) as index:
        index.add(queries[:1], ids, metadata={"number": [-1]})
    with semid.open(path) as index:
        assert len(index) == 311
        assert index.search(queries[0], where="number = -1").ids.tolist() == ids
        view = index.sql("SELECT id, semantic_id, dup_rank FROM semantic_ids ORDER BY id").fetchall()
        assert [list(row) for row in view if row[0] != ids[0]] == expected["items"]
        index.delete(ids)
        changed = [row[0] for row in expected["items"][:2]]
        index.upsert(queries[:2] + 100, changed)
        view = index.sql("SELECT id, semantic_id, dup_rank FROM semantic_ids ORDER BY id").fetchall()
        now = [list(row) for row in view]
        assert now[2:] == expected["items"][2:]
        renamed = [new[0] for new, old in zip(now[:2], expected["items"], strict=False) if new != old]
        history = index.sql("SELECT id FROM semid_history").fetchall()
        assert {id for (id,) in history} == {*ids, *renamed}
