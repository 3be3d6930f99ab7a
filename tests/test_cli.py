"""The ``semid`` program: as a person runs it (real processes, real terminals), and command by command."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import semid_index as semid
from semid_index import arguments, records
from semid_index.arguments import read_table
from semid_index.cli import app, build
from semid_index.vectors import open_vectors

ROOT = Path(semid.__file__).parents[1]
COMMANDS = ["demo", "build", "add", "delete", "search", "tree", "sql", "export", "import", "verify", "copy"]
COMMANDS += ["compact", "retrain", "versions", "stats", "report", "bench", "plugins", "doctor"]
ROWS, DIM, LEVELS, WORDS = 600, 16, 3, 16
SECTIONS = ["games", "fonts", "mail"]


def environment(**more: str) -> dict[str, str]:
    """The same for everybody: no colour from CI, and the package found whether it is installed or not."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    path = os.pathsep.join(filter(None, [more.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH"), str(ROOT)]))
    return kept | {"PYTHONPATH": path, "COLUMNS": "100", "TERM": "xterm-256color"} | more


def semid_program(*arguments: Any, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a process of its own."""
    command = [sys.executable, "-m", "semid_index.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", input=stdin, env=environment(**env), timeout=120
    )


def on_a_terminal(*arguments: Any, stderr_too: bool = False, **env: str) -> tuple[int, str, str]:
    """Run the program with standard output (or standard error) on a terminal: exit code, stdout, stderr."""
    leader, follower = pty.openpty()
    streams = (
        {"stdout": subprocess.PIPE, "stderr": follower}
        if stderr_too
        else {"stdout": follower, "stderr": subprocess.PIPE}
    )
    command = [sys.executable, "-m", "semid_index.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment(**env), **streams) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 65_536)
            except OSError:  # the program has ended, and its terminal with it
                break
            if not part:
                break
            shown += part
        piped = (process.stdout or process.stderr).read()
    os.close(leader)
    text = shown.decode().replace("\r\n", "\n")
    return (process.returncode, piped.decode(), text) if stderr_too else (process.returncode, text, piped.decode())


def run(*arguments: Any, **options: Any) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="semid", **options)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    random = np.random.default_rng(7)
    centres = random.normal(size=(12, DIM)) * 3
    return (centres[random.integers(12, size=ROWS)] + random.normal(size=(ROWS, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> Path:
    """Files as a user has them, and the index ``catalog.duckdb`` built from them by the program."""
    folder = tmp_path_factory.mktemp("cli")
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", vectors[:5] + 0.1)
    np.save(folder / "one.npy", vectors[2] + 0.1)
    ids = [f"item-{row}" for row in range(ROWS)]
    (folder / "ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    metadata = pa.table(
        {
            "sku": ids,
            "section": [SECTIONS[row % 3] for row in range(ROWS)],
            "price": pa.array(range(ROWS), pa.int64()),
        }
    )
    pq.write_table(metadata, folder / "items.parquet")
    built = build_in(folder, "catalog.duckdb", "--metadata", folder / "items.parquet", "--ids", folder / "ids.txt")
    assert built.returncode == 0, built.stderr
    (folder / "build.json").write_text(built.stdout)
    return folder


def build_in(folder: Path, name: str, *more: Any) -> subprocess.CompletedProcess[str]:
    sizes = ("--levels", LEVELS, "--codebook-size", WORDS)
    return semid_program("build", folder / "vectors.npy", "-o", folder / name, *sizes, *more)


@pytest.fixture
def index_file(folder: Path) -> Path:
    return folder / "catalog.duckdb"


@pytest.fixture
def own_index(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copy(folder / "catalog.duckdb", tmp_path / "own.duckdb"))


def exact(vectors: np.ndarray, query: np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[tuple[str, float]]:
    """Brute force, in float64."""
    distances = np.linalg.norm(vectors.astype(np.float64) - query.astype(np.float64), axis=1)
    if allowed is not None:
        distances[~allowed] = np.inf
    return [(f"item-{row}", float(distances[row])) for row in np.argsort(distances, kind="stable")[:k]]


def assert_hits(rows: list[dict[str, Any]], expected: list[tuple[str, float]]) -> None:
    assert [row["id"] for row in rows] == [id for id, _ in expected]
    np.testing.assert_allclose([row["distance"] for row in rows], [distance for _, distance in expected], rtol=1e-5)


# -- the main flow, in processes of its own ---------------------------------------------------------------------------


def test_build_reports_what_it_built(folder: Path, vectors: np.ndarray) -> None:
    record = json.loads((folder / "build.json").read_text())
    assert (record["items"], record["dim"], record["metric"], record["quantizer"]) == (ROWS, DIM, "l2", "rq")
    assert record["float32_bytes_per_item"] == 4 * DIM
    assert record["code_bytes_per_item"] == 2  # three codes of four bits
    assert record["codebook_bytes"] == LEVELS * WORDS * DIM * 4
    assert record["file_bytes"] == (folder / "catalog.duckdb").stat().st_size

    with semid.open(folder / "catalog.duckdb", read_only=True) as index:
        codes = index.encode(vectors)
        left = np.square(vectors - index.decode(codes)).sum(axis=1).mean()
    last = record["train_report"]["levels"][-1]
    assert last["error"] == pytest.approx(left, rel=1e-4)
    assert last["relative_error"] == pytest.approx(
        left / np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean(), rel=1e-4
    )
    shares = np.unique(codes[:, -1], return_counts=True)[1] / ROWS
    assert last["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    twins = sum(count for count in Counter(map(tuple, codes.tolist())).values() if count > 1)
    assert record["items_sharing_an_id"] == twins > 0


def test_stats_says_what_build_said(folder: Path, index_file: Path) -> None:
    result = semid_program("stats", index_file)
    assert result.returncode == 0
    assert result.stderr == ""
    assert json.loads(result.stdout) == json.loads((folder / "build.json").read_text())


def test_search_finds_what_brute_force_finds(folder: Path, index_file: Path, vectors: np.ndarray) -> None:
    result = semid_program("search", index_file, "--query-vector", f"{folder / 'queries.npy'}:3", "-k", 7)
    assert result.returncode == 0, result.stderr
    rows = rows_of(result.stdout)
    assert_hits(rows, exact(vectors, vectors[3] + np.float32(0.1), 7))
    assert [row["rank"] for row in rows] == list(range(1, 8))
    assert [row["price"] for row in rows] == [int(row["id"].removeprefix("item-")) for row in rows]


def test_sql_counts_the_codes_that_encode_gives(index_file: Path, vectors: np.ndarray) -> None:
    result = semid_program("sql", index_file, "SELECT c1, count(*) AS n FROM semantic_ids GROUP BY c1")
    with semid.open(index_file, read_only=True) as index:
        expected = Counter(index.encode(vectors)[:, 0].tolist())
    assert {row["c1"]: row["n"] for row in rows_of(result.stdout)} == expected


def test_a_built_index_is_replaced_only_when_the_new_one_is_complete(folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copy(folder / "catalog.duckdb", tmp_path / "catalog.duckdb"))
    before = target.read_bytes()
    (folder / "twice.txt").write_text("same\n" * ROWS)

    refused = semid_program("build", folder / "vectors.npy", "-o", target)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"error: {target} exists.")

    failed = semid_program(
        "build", folder / "vectors.npy", "-o", target, "--ids", folder / "twice.txt", "--overwrite", "--levels", 1
    )
    assert failed.returncode == 1
    assert failed.stderr == "error: Ids occur more than once in this batch: 'same'. Each item needs an id of its own.\n"
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["catalog.duckdb"]

    replaced = semid_program(
        "build", folder / "vectors.npy", "-o", target, "--overwrite", "--levels", 1, "--codebook-size", 8
    )
    assert replaced.returncode == 0, replaced.stderr
    assert json.loads(replaced.stdout)["codebook_sizes"] == [8]
    assert [path.name for path in tmp_path.iterdir()] == ["catalog.duckdb"]


def test_a_reader_that_stops_early_is_no_error(index_file: Path) -> None:
    command = [sys.executable, "-m", "semid_index.cli", "sql", str(index_file), "FROM range(2000000)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout.readline() == b'{"range": 0}\n'
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


# -- screens ----------------------------------------------------------------------------------------------------------


def test_a_screen_gets_a_table_and_a_pipe_gets_json_lines(index_file: Path) -> None:
    code, screen, _ = on_a_terminal("tree", index_file)
    assert code == 0
    assert re.sub(r"\x1b\[[\d;]*m", "", screen).split()[:3] == ["prefix", "items", "examples"]
    assert set(rows_of(semid_program("tree", index_file).stdout)[0]) == {"prefix", "items", "examples"}


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_binary_formats_are_kept_off_the_screen(index_file: Path, format: str) -> None:
    code, screen, stderr = on_a_terminal("tree", index_file, "--format", format)
    assert (code, screen) == (2, "")
    assert f"--format {format} > out.{format}" in " ".join(stderr.split())


def test_no_color_is_obeyed(index_file: Path) -> None:
    color = re.compile(r"\x1b\[(?:\d+;)*3\dm")
    assert color.search(on_a_terminal("tree", index_file)[1])
    assert not color.search(on_a_terminal("tree", index_file, NO_COLOR="1")[1])


@pytest.mark.parametrize(("more", "bars"), [((), True), (("--quiet",), False)])
def test_progress_is_on_stderr_unless_quiet(folder: Path, tmp_path: Path, more: tuple[str, ...], bars: bool) -> None:
    arguments = ("build", folder / "vectors.npy", "-o", tmp_path / "new.duckdb", "--codebook-size", WORDS, *more)
    code, stdout, stderr = on_a_terminal(*arguments, stderr_too=True)
    assert code == 0
    assert json.loads(stdout)["items"] == ROWS
    assert (f"{ROWS}/{ROWS}" in stderr) is bars
    assert bars or not stderr


def test_a_long_table_is_cut_and_says_so(index_file: Path) -> None:
    result = semid_program("sql", index_file, "SELECT id FROM items", "--format", "table")
    assert len(result.stdout.splitlines()) == 101
    assert result.stderr.split("\n")[0] == f"100 of {ROWS} rows. --format jsonl gives all."
    assert len(semid_program("sql", index_file, "SELECT id FROM items").stdout.splitlines()) == ROWS


def test_a_table_fits_the_screen_and_keeps_short_columns_whole(index_file: Path) -> None:
    query = "SELECT id, price, repeat('long text ', 50) AS story FROM items ORDER BY price DESC LIMIT 3"
    lines = semid_program("sql", index_file, query, "--format", "table", COLUMNS="60").stdout.splitlines()
    assert all(len(line) <= 60 for line in lines)
    assert lines[1].startswith("item-599    599  long text long text")
    assert lines[1].rstrip().endswith("…")


def test_columns_without_room_are_left_out_from_the_right_and_named(index_file: Path) -> None:
    names = [f"column_{number}" for number in range(7)]
    query = f"SELECT id, price, {', '.join(f'id || repeat(id, 5) AS {name}' for name in names)} FROM items LIMIT 2"
    shown = semid_program("sql", index_file, query, "--format", "table", COLUMNS="80")
    assert shown.stdout.splitlines()[0].split() == ["id", "price", *names[:4]]
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    assert shown.stderr == "No room for column_4, column_5, column_6. --format jsonl gives all.\n"
    wide = semid_program("sql", index_file, query, "--format", "table", COLUMNS="140")
    assert wide.stdout.splitlines()[0].split() == ["id", "price", *names]
    assert wide.stderr == ""

    narrow = semid_program(
        "sql", index_file, "SELECT repeat(id, 9) AS id, price FROM items", "-f", "table", COLUMNS="9"
    )
    assert narrow.stdout.split()[0] == "id"
    assert narrow.stderr.startswith("No room for price.")


def test_hits_keep_rank_id_distance_and_semantic_id(own_index: Path, vectors: np.ndarray) -> None:
    with semid.open(own_index) as index:
        texts = {f"about_{number}": ["long text " * 9] * ROWS for number in range(6)}
        ids = [f"item-{row}" for row in range(ROWS)]
        index.upsert(vectors, ids, metadata=texts)
    shown = semid_program("search", own_index, "--like", "item-9", "--format", "table", COLUMNS="80")
    assert shown.stdout.split()[:4] == ["rank", "id", "distance", "semantic_id"]
    assert "…" not in shown.stdout.splitlines()[1].partition("long")[0]
    assert shown.stderr.startswith("No room for ")


def test_data_that_looks_like_markup_is_shown_as_it_is(index_file: Path) -> None:
    result = semid_program("sql", index_file, "SELECT '[red]x[/]' AS \"[bold]\"", "--format", "table")
    assert [line.strip() for line in result.stdout.splitlines()] == ["[bold]", "[red]x[/]"]


# -- formats ----------------------------------------------------------------------------------------------------------

EVERY_TYPE = """
SELECT 1 AS n, 0.1::FLOAT AS f, 'naïve "x", 日本' AS t, NULL AS nothing, [1, 2] AS list, {'a': 'b'} AS record,
       'NaN'::DOUBLE AS nan, DATE '2024-02-29' AS day, true AS yes, 12.50::DECIMAL(9, 2) AS money,
       '\\x00\\xFF'::BLOB AS raw
UNION ALL SELECT 2, -1, '', 7, [], {'a': NULL}, 1, NULL, false, 0, ''::BLOB
"""
AS_JSON = [
    {"n": 1, "f": float(np.float32(0.1)), "t": 'naïve "x", 日本', "nothing": None, "list": [1, 2], "record": {"a": "b"}}
    | {"nan": None, "day": "2024-02-29", "yes": True, "money": "12.50", "raw": "00ff"},
    {"n": 2, "f": -1.0, "t": "", "nothing": 7, "list": [], "record": {"a": None}}
    | {"nan": 1.0, "day": None, "yes": False, "money": "0.00", "raw": ""},
]


@pytest.fixture
def in_format(index_file: Path) -> Any:
    def give(format: str) -> bytes:
        result = run("sql", index_file, EVERY_TYPE, "--format", format)
        assert result.exit_code == 0, result.stderr
        return result.stdout_bytes

    return give


def test_json_and_jsonl_parse_back(in_format: Any) -> None:
    assert json.loads(in_format("json")) == AS_JSON
    assert rows_of(in_format("jsonl").decode()) == AS_JSON


def test_arrow_and_parquet_parse_back_with_their_types(in_format: Any) -> None:
    with duckdb.connect() as connection:  # of its own: other tests may leave the shared one in the middle of a result
        expected = connection.sql(EVERY_TYPE).to_arrow_table()
    assert repr(pa.ipc.open_stream(in_format("arrow")).read_all().to_pylist()) == repr(expected.to_pylist())
    assert repr(pq.read_table(io.BytesIO(in_format("parquet"))).to_pylist()) == repr(expected.to_pylist())


def test_csv_parses_back(in_format: Any) -> None:
    first, second = csv.DictReader(io.StringIO(in_format("csv").decode()))
    assert first["t"] == 'naïve "x", 日本'
    assert json.loads(first["list"]) == [1, 2]
    assert json.loads(second["record"]) == {"a": None}
    assert (second["n"], second["nothing"], second["money"]) == ("2", "7", "0.00")
    assert (first["raw"], second["raw"]) == ("00ff", "")


def test_a_record_is_one_object_or_one_row(index_file: Path) -> None:
    record = json.loads(run("stats", index_file, "--format", "json").stdout)
    row = pq.read_table(io.BytesIO(run("stats", index_file, "--format", "parquet").stdout_bytes)).to_pylist()
    assert len(row) == 1
    assert row[0]["items"] == record["items"] == ROWS
    assert row[0]["train_report_levels"] == record["train_report"]["levels"]


# -- commands ---------------------------------------------------------------------------------------------------------


def test_search_for_a_batch_says_which_query(folder: Path, index_file: Path, vectors: np.ndarray) -> None:
    rows = rows_of(run("search", index_file, "--query-vector", folder / "queries.npy", "-k", 2).stdout)
    assert [row["query"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for query in range(5):
        assert_hits(rows[2 * query : 2 * query + 2], exact(vectors, vectors[query] + np.float32(0.1), 2))


def test_search_takes_a_file_with_a_single_vector(folder: Path, index_file: Path, vectors: np.ndarray) -> None:
    rows = rows_of(run("search", index_file, "--query-vector", folder / "one.npy", "-k", 4).stdout)
    assert_hits(rows, exact(vectors, vectors[2] + np.float32(0.1), 4))


def test_search_with_a_filter(folder: Path, index_file: Path, vectors: np.ndarray) -> None:
    where = ("--where", "section = ? AND price < ?", "--param", "mail", "--param", 300)
    rows = rows_of(run("search", index_file, "--query-vector", f"{folder / 'queries.npy'}:0", "-k", 5, *where).stdout)
    numbers = np.arange(ROWS)
    assert_hits(rows, exact(vectors, vectors[0] + np.float32(0.1), 5, (numbers % 3 == 2) & (numbers < 300)))


def test_like_leaves_the_item_itself_out(index_file: Path, vectors: np.ndarray) -> None:
    rows = rows_of(run("search", index_file, "--like", "item-9", "-k", 3, "--exact").stdout)
    assert_hits(rows, exact(vectors, vectors[9], 4)[1:])


def test_like_takes_numbers_where_ids_are_numbers(folder: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    path = tmp_path / "numbers.duckdb"
    assert run("build", folder / "vectors.npy", "-o", path, "--levels", 2, "--codebook-size", "32,8").exit_code == 0
    rows = rows_of(run("search", path, "--like", 9, "-k", 3).stdout)
    assert [f"item-{row['id']}" for row in rows] == [id for id, _ in exact(vectors, vectors[9], 4)[1:]]


def test_demo_query_searches_for_the_bundled_vector(tmp_path: Path) -> None:
    from semid_index.demo import load_sample

    sample = load_sample()
    chess = sample.query("chess")
    with semid.create(tmp_path / "x.duckdb", dim=384, metric="cosine", codebook_size=4, levels=2) as index:
        index.train(sample.vectors[:2000])
        index.add(sample.vectors, sample.ids)
    rows = rows_of(run("search", tmp_path / "x.duckdb", "--demo-query", "CHESS", "-k", 3).stdout)
    assert [row["id"] for row in rows] == [sample.ids[row] for row in np.argsort(-sample.vectors @ chess)[:3]]
    unknown = run("search", tmp_path / "x.duckdb", "--demo-query", "unheard of")
    assert unknown.exit_code == 1
    assert "play chess against the computer" in unknown.stderr


def test_explain_gives_the_trace(folder: Path, index_file: Path, vectors: np.ndarray) -> None:
    arguments = (
        "search",
        index_file,
        "--query-vector",
        f"{folder / 'queries.npy'}:1",
        "-k",
        5,
        "--probes",
        2,
        "--explain",
    )
    trace = json.loads(run(*arguments).stdout)
    with semid.open(index_file, read_only=True) as index:
        expected = index.explain(vectors[1] + np.float32(0.1), 5, probes=2).to_dict()
    del trace["seconds"], expected["seconds"]
    assert trace == json.loads(json.dumps(expected))
    assert trace["probed"] == len(trace["probes"]) == 2
    shown = run(*arguments, "--format", "table").stdout
    assert trace["plan"] in " ".join(shown.split())
    assert trace["probes"][0]["prefix"] in shown


def test_tree_counts_shelves(index_file: Path, vectors: np.ndarray) -> None:
    with semid.open(index_file, read_only=True) as index:
        codes = index.encode(vectors)
    first = Counter(codes[:, 0].tolist()).most_common(1)[0]
    rows = rows_of(run("tree", index_file, "--examples", 2).stdout)
    assert rows[0]["items"] == first[1]
    assert {row["prefix"]: row["items"] for row in rows} == {
        f"{code}-*": n for code, n in Counter(codes[:, 0].tolist()).items()
    }
    below = rows_of(run("tree", index_file, first[0], "--examples", 2).stdout)
    inside = Counter(codes[codes[:, 0] == first[0], 1].tolist())
    assert {row["prefix"]: row["items"] for row in below} == {f"{first[0]}-{code}-*": n for code, n in inside.items()}
    for row in below:
        prefix = [int(code) for code in row["prefix"].removesuffix("-*").split("-")]
        assert len(row["examples"]) == min(2, row["items"])
        assert all(codes[int(id.removeprefix("item-")), :2].tolist() == prefix for id in row["examples"])


def test_sql_binds_parameters_and_reads_standard_input(index_file: Path) -> None:
    result = run(
        "sql",
        index_file,
        "-",
        "--param",
        "games",
        "--param",
        "30",
        input="SELECT count(*) AS n FROM items WHERE section = ? AND price < ?",
    )
    assert rows_of(result.stdout) == [{"n": 10}]


def test_sql_cannot_change_the_index(own_index: Path) -> None:
    before = own_index.read_bytes()
    result = run("sql", own_index, "DROP TABLE items")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert own_index.read_bytes() == before


def test_add_gives_new_items_ids_and_keeps_the_old(own_index: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    old = rows_of(run("sql", own_index, "SELECT id, semantic_id FROM semantic_ids").stdout)
    table = pa.table({"sku": ["new-1", "new-2"], "price": [1, 2], "emb": (vectors[:2] + 0.5).tolist()})
    pq.write_table(table, tmp_path / "new.parquet")
    arguments = ("add", own_index, tmp_path / "new.parquet", "--column", "emb", "--id-column", "sku")
    assert json.loads(run(*arguments).stdout) == {"added": 2, "items": ROWS + 2}
    now = rows_of(run("sql", own_index, "SELECT id, semantic_id FROM semantic_ids").stdout)
    assert [row for row in now if row["id"].startswith("item-")] == old
    with semid.open(own_index, read_only=True) as index:
        expected = ["-".join(map(str, codes)) for codes in index.encode(vectors[:2] + np.float32(0.5)).tolist()]
        assert index.get(["new-1", "new-2"])["semantic_id"].to_pylist() == expected

    again = run(*arguments)
    assert again.exit_code == 1
    assert again.stderr.startswith("error: Ids are in the index already: 'new-")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".arrow"])
def test_metadata_from_every_kind_of_file(folder: Path, tmp_path: Path, suffix: str) -> None:
    table = pq.read_table(folder / "items.parquet")
    path = tmp_path / f"items{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    elif suffix == ".arrow":
        pyarrow.feather.write_feather(table, path)
    elif suffix == ".csv":
        path.write_text(
            "sku,section,price\n"
            + "".join(f"{row['sku']},{row['section']},{row['price']}\n" for row in table.to_pylist())
        )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    options = ("--metadata", path, "--id-column", "sku", "--levels", 1, "--codebook-size", 4)
    built = run("build", folder / "vectors.npy", "-o", tmp_path / "x.duckdb", *options)
    assert built.exit_code == 0, built.stderr
    rows = rows_of(
        run("sql", tmp_path / "x.duckdb", "SELECT id, sku, section, price FROM items ORDER BY price LIMIT 2").stdout
    )
    assert rows == [
        {"id": "item-0", "sku": "item-0", "section": "games", "price": 0},
        {"id": "item-1", "sku": "item-1", "section": "fonts", "price": 1},
    ]


def test_build_passes_every_option_on(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.duckdb"
    options = (
        "--metric",
        "cosine",
        "--levels",
        2,
        "--codebook-size",
        "32,8",
        "--vectors",
        "int8",
        "--seed",
        5,
        "--sample",
        300,
    )
    built = run(
        "build",
        folder / "vectors.npy",
        "-o",
        path,
        *options,
        "--option",
        "iterations=3",
        "--option",
        "leaf-size=50",
        "--option",
        "tail=0",
    )
    assert built.exit_code == 0, built.stderr
    with semid.open(path, read_only=True) as index:
        config = index.config
    assert (config.metric, config.vectors, config.seed, config.leaf_size, config.tail) == ("cosine", "int8", 5, 50, 0)
    chosen = {"levels": 2, "codebook_size": [32, 8], "iterations": 3}
    assert {name: config.quantizer_config[name] for name in chosen} == chosen
    assert json.loads(built.stdout)["train_report"]["rows"] == 300


def test_build_can_leave_bad_vectors_out(folder: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    spoiled = vectors.copy()
    spoiled[[3, 4]] = np.nan
    np.save(tmp_path / "spoiled.npy", spoiled)
    arguments = (
        "add",
        Path(shutil.copy(folder / "catalog.duckdb", tmp_path)),
        tmp_path / "spoiled.npy",
        "--ids",
        tmp_path / "ids.txt",
    )
    (tmp_path / "ids.txt").write_text("".join(f"other-{row}\n" for row in range(ROWS)))
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "3, 4" in refused.stderr
    dropped = semid_program(*arguments, "--on-bad-vectors", "drop")
    assert json.loads(dropped.stdout) == {"added": ROWS - 2, "items": 2 * ROWS - 2}
    assert dropped.stderr == f"WARNING: dropped 2 of {ROWS} vectors that cannot be used\n"

    build = ("build", tmp_path / "spoiled.npy", "-o", tmp_path / "new.duckdb", "--levels", 2, "--codebook-size", 8)
    refused = run(*build)
    assert refused.exit_code == 1
    assert "--on-bad-vectors drop" in refused.stderr
    built = run(*build, "--on-bad-vectors", "drop", "--quiet")
    assert built.exit_code == 0, built.stderr
    assert json.loads(built.stdout)["items"] == json.loads(built.stdout)["train_report"]["rows"] == ROWS - 2
    with semid.create(dim=DIM, levels=2, codebook_size=8) as index:
        with pytest.raises(semid.SemidError, match="must be 'error' or 'drop'"):
            index.train(spoiled, on_bad_vectors="skip")
        index.train(np.delete(vectors, [3, 4], axis=0))
        codes = index.encode(vectors)
    with semid.open(tmp_path / "new.duckdb", read_only=True) as index:
        assert np.array_equal(index.encode(vectors), codes)

    np.save(tmp_path / "spoiled.npy", np.full_like(vectors, np.inf))
    refused = run(*build, "--overwrite", "--on-bad-vectors", "drop")
    assert refused.stderr.startswith(f"error: None of the {ROWS} vectors can be used")


def test_numbers_in_csv_that_begin_with_a_zero_or_plus_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text(
        "sku,zip,phone,ean,price,year,ratio,stock,grade,both,both\n"
        "00000,01067,+49351,12345678901234567890,0,2024,1.0,-0,,1,01\n"
        "00001,,0351,1,10,1999,2.0,0,-07,2,2\n"
    )
    table = read_table(path)
    assert table.column(9).to_pylist() == [1, 2]  # two columns with one name: the index refuses them
    assert table.select(range(9)).to_pydict() == {
        "sku": ["00000", "00001"],
        "zip": ["01067", None],
        "phone": ["+49351", "0351"],
        "ean": ["12345678901234567890", "1"],
        "price": [0, 10],
        "year": [2024, 1999],
        "ratio": [1.0, 2.0],
        "stock": [0, 0],
        "grade": [None, "-07"],
    }
    path.write_text("word,price\n01x,1.5\n2,2\n")
    assert read_table(path).to_pydict() == {"word": ["01x", "2"], "price": [1.5, 2.0]}


@pytest.mark.parametrize("suffix", [".npy", ".fvecs", ".parquet"])
def test_one_row_of_a_file_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    vectors = np.arange(44, dtype=np.float32).reshape(11, 4)
    path = tmp_path / f"queries{suffix}"
    if suffix == ".npy":
        np.save(path, vectors)
    elif suffix == ".fvecs":
        np.column_stack([np.full(11, 4, "<i4").view("<f4"), vectors]).tofile(path)
    else:
        pq.write_table(pa.table({"vector": vectors.tolist()}), path)
    monkeypatch.setattr(arguments, "_ROWS_AT_ONCE", 3)
    read: list[int] = []

    def batches(name: str) -> Any:
        source = open_vectors(name)
        rows = source.batches
        source.batches = lambda size: (read.append(len(batch)) or batch for batch in rows(size))
        return source

    monkeypatch.setattr("semid_index.vectors.open_vectors", batches)
    for row in (0, 2, 3, 10):
        read.clear()
        assert arguments.read_query_vectors(f"{path}:{row}").tolist() == vectors[row].tolist()
        assert sum(read) == min(11, 3 * (row // 3 + 1))
    assert arguments.read_query_vectors(str(path)).tolist() == vectors.tolist()


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(("place", "message"), [("", "is a folder"), ("missing/x.duckdb", "There is no folder")])
def test_build_looks_first_where_it_may_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str, overwrite: tuple[str, ...]
) -> None:
    monkeypatch.setattr(semid.SemanticIndex, "train", lambda *_, **__: pytest.fail("it has trained already"))
    result = run("build", folder / "vectors.npy", "-o", tmp_path / place, *overwrite)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_choices_are_those_of_the_library() -> None:
    hints = build.__annotations__
    for name, kind in (("metric", records.Metric), ("stored", records.Tier)):
        assert set(re.findall(r"'(\w+)'", hints[name].split("typer")[0].replace('"', "'"))) == set(get_args(kind))


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_ctrl_c_while_duckdb_runs_a_query(index_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Query interrupted")  # as DuckDB says it

    monkeypatch.setattr("semid_index.cli.write", interrupted)
    result = run("sql", index_file, "SELECT 1")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")
    monkeypatch.setattr("semid_index.cli.write", lambda *_: int("of another kind"))
    assert isinstance(run("sql", index_file, "SELECT 1").exception, ValueError)


def test_a_wrong_choice_is_named_once() -> None:
    result = run("build", "x.npy", "-o", "y.duckdb", "--metric", "euclid")
    assert result.exit_code == 2
    assert "Invalid value for '--metric': 'euclid' is not one of 'l2'" in " ".join(result.stderr.split())


BUILD = ["build", "{folder}/vectors.npy", "-o", "{out}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "missing.duckdb"], "There is no file missing.duckdb. Make an index with semid_index.create"),
        (["stats", "missing.duckdb"], "or semid build."),
        (["add", "{index}", "{folder}/vectors.npy"], "Pass ids=[...] (--ids)."),
        (["stats", "{folder}/ids.txt"], "is not an index of semid-index"),
        (["build", "missing.npy", "-o", "{out}"], "There is no file 'missing.npy'"),
        (["build", "{folder}/ids.txt", "-o", "{out}"], "Vectors cannot be read from"),
        ([*BUILD, "--quantizer", "rqq"], "Did you mean 'rq'?"),
        ([*BUILD, "--option", "colour=red"], "has no option 'colour'"),
        ([*BUILD, "--metadata", "{folder}/ids.txt"], "A table cannot be read from"),
        ([*BUILD, "--metadata", "missing.csv"], "'missing.csv' cannot be read"),
        ([*BUILD, "--metadata", "{folder}/items.parquet", "--id-column", "no"], "has no column 'no'"),
        (["search", "{index}", "--like", "nobody"], "There is no item with id 'nobody'"),
        (["search", "{index}", "--text", "chess"], "No plugin that embeds texts is installed"),
        (["search", "{index}", "--query-vector", "{folder}/queries.npy:5"], "it has rows 0 to 4"),
        (["search", "{index}", "--query-vector", "missing.npy:5"], "There is no file 'missing.npy'"),
        (["search", "{index}", "--like", "item-1", "-k", "0"], "k must be"),
        (["search", "{index}", "--like", "item-1", "--where", "1; DROP TABLE items"], ""),
        (["tree", "{index}", "99"], ""),
        (["tree", "{index}", "--depth", "9"], "depth=9"),
        (["sql", "{index}", "SELEC 1"], "syntax error"),
    ],
)
def test_a_failure_is_one_message_and_exit_code_1(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"folder": folder, "index": folder / "catalog.duckdb", "out": tmp_path / "out.duckdb"}
    result = run(*(argument.format(**places) for argument in arguments))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "sql" in arguments or result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["stats"],
        ["stats", "x.duckdb", "--format", "xml"],
        ["build", "x.npy"],
        ["build", "x.npy", "-o", "y.duckdb", "--metric", "manhattan"],
        ["build", "{folder}/vectors.npy", "-o", "y.duckdb", "--codebook-size", "many"],
        ["build", "{folder}/vectors.npy", "-o", "y.duckdb", "--option", "iterations"],
        ["search", "{folder}/catalog.duckdb"],
        ["search", "{folder}/catalog.duckdb", "--like", "item-1", "--text", "x"],
        ["search", "{folder}/catalog.duckdb", "--like", "item-1", "-k", "many"],
    ],
)
def test_wrong_usage_is_exit_code_2(folder: Path, arguments: list[str]) -> None:
    result = run(*(argument.format(folder=folder) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: semid" in result.stderr


# -- help and documentation -------------------------------------------------------------------------------------------


def test_the_commands_are_these() -> None:
    assert [info.name or info.callback.__name__ for info in app.registered_commands] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"• semid {command}" in result.stdout, "no example"
    from typer.main import get_command

    for parameter in get_command(app).commands[command].params:
        assert parameter.help, f"{parameter.name} is not explained"


def test_version() -> None:
    assert semid_program("--version").stdout == f"semid-index {semid.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, typer.testing; from semid_index.cli import app; "
        "assert typer.testing.CliRunner().invoke(app, ['build', '--help']).exit_code == 0; "
        "print(sorted({'numpy', 'duckdb', 'pyarrow', 'faiss', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True
    )
    assert result.stdout == "[]\n"


def test_the_page_about_the_command_line_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_cli.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert result.returncode == 0, result.stderr


# -- plugins and the doctor -------------------------------------------------------------------------------------------

PLUGIN = """
import numpy as np
from semid_index import hookimpl

class Letters:
    name = "letters"
    def embed(self, texts):
        letters = [np.frombuffer(text.encode(), np.uint8) % 16 for text in texts]
        return np.stack([np.bincount(each, minlength=16) for each in letters]).astype(np.float32)

def hello(name: str) -> None:
    "Say hello."
    print("hello", name)

@hookimpl
def semid_register_embedders(register):
    register(Letters)

@hookimpl
def semid_register_commands(register):
    register("hello", hello)
"""


def install(folder: Path, name: str, code: str) -> None:
    """A distribution with one plugin module, as pip would lay it down."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[semid_index]\n{module} = {module}\n")


def test_a_plugin_adds_a_command_and_an_embedder(
    folder: Path, index_file: Path, tmp_path: Path, vectors: np.ndarray
) -> None:
    install(tmp_path, "semid-letters", PLUGIN)
    path = str(tmp_path)
    assert semid_program("hello", "world", PYTHONPATH=path).stdout == "hello world\n"
    assert "Say hello." in semid_program("--help", PYTHONPATH=path).stdout
    offers = rows_of(semid_program("plugins", PYTHONPATH=path).stdout)
    assert {(row["kind"], row["name"]) for row in offers if row["from"] == "semid-letters 1.0"} == {
        ("embedder", "letters"),
        ("command", "hello"),
    }
    rows = rows_of(semid_program("search", index_file, "--text", "abc", "-k", 3, PYTHONPATH=path).stdout)
    query = np.zeros(DIM, np.float32)
    query[[1, 2, 3]] = 1  # the codes of a, b and c are 97, 98 and 99: 1, 2 and 3 modulo 16
    assert_hits(rows, exact(vectors, query, 3))


def test_a_broken_plugin_is_reported_and_breaks_nothing(index_file: Path, tmp_path: Path) -> None:
    install(tmp_path, "semid-broken", "raise RuntimeError('no luck')")
    path = str(tmp_path)
    rows = rows_of(semid_program("plugins", PYTHONPATH=path).stdout)
    assert {"rq", "balanced-rq", "pq", "sq8", "sq4"} <= {row["name"] for row in rows}
    assert [row for row in rows if row["error"]] == [
        {"kind": "failed", "name": None, "class": None, "from": "semid-broken 1.0", "error": "RuntimeError: no luck"}
    ]
    assert semid_program("stats", index_file, PYTHONPATH=path).returncode == 0
    sick = semid_program("doctor", PYTHONPATH=path)
    assert sick.returncode == 1
    assert [row["check"] for row in rows_of(sick.stdout) if row["status"] == "wrong"] == ["plugin semid-broken 1.0"]


def test_the_doctor_finds_this_installation_sound() -> None:
    result = semid_program("doctor")
    findings = {row["check"]: row for row in rows_of(result.stdout)}
    assert result.returncode == 0, result.stdout
    assert findings["duckdb"]["found"] == duckdb.__version__
    assert findings["numpy"]["found"] == np.__version__
    import faiss

    assert findings["faiss"]["found"].startswith(faiss.__version__ + " from faiss-")
    assert set(findings["faiss SIMD"]["found"].split()) < set(faiss.get_compile_options().split())


def test_the_doctor_finds_two_distributions_of_faiss(tmp_path: Path) -> None:
    for name in ("faiss_cpu", "faiss_gpu"):
        info = tmp_path / f"{name}-1.15.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.15.1\n")
        (info / "top_level.txt").write_text("faiss\n")
    result = semid_program("doctor", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    (wrong,) = [row for row in rows_of(result.stdout) if row["status"] == "wrong"]
    assert wrong["found"] == "faiss-cpu 1.15.1, faiss-gpu 1.15.1: they overwrite each other"
    assert wrong["advice"] == "pip uninstall -y faiss-cpu faiss-gpu && pip install --force-reinstall faiss-cpu"


def test_the_doctor_finds_what_an_uninstalled_faiss_leaves_behind(tmp_path: Path) -> None:
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").write_text("")  # as after removing one of two distributions
    result = semid_program("doctor", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    (wrong,) = [row for row in rows_of(result.stdout) if row["status"] == "wrong"]
    assert wrong["check"] == "faiss"
    assert "AttributeError" in wrong["found"]
    assert "--force-reinstall faiss-cpu" in wrong["advice"]
