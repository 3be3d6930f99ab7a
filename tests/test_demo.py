"""``semid demo``: what it says is recomputed, by brute force and by hand."""

from __future__ import annotations

import importlib.util
import io
import re
import time
from collections import Counter
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import duckdb
import numpy as np
import pytest
from rich.console import Console

import semid_index as semid
from semid_index import demo
from semid_index.demo import DATA, NEW_PACKAGES, Sample, load_sample
from semid_index.errors import IndexExistsError, InvalidArgumentError

ROOT = Path(semid.__file__).parents[1]


@dataclass
class Shown:
    """One run of the demo: what it printed, and what it left."""

    text: str
    path: Path
    processor_seconds: float  # not those of a clock: how busy the machine is says nothing of the demo

    def part(self, heading: str) -> list[str]:
        """The lines below a heading."""
        lines = self.text.splitlines()
        start = next(row for row, line in enumerate(lines) if line.startswith(heading + "  "))
        body = lines[start + 1 :]
        return body[: next((row for row, line in enumerate(body) if line and not line.startswith(" ")), len(body))]


@pytest.fixture(scope="module")
def sample() -> Sample:
    return load_sample()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=100)
    started = time.process_time()
    with chdir(folder):
        demo.run(Path("demo.duckdb"), console)
    return Shown(console.file.getvalue(), folder / "demo.duckdb", time.process_time() - started)


@pytest.fixture(scope="module")
def codes(shown: Shown, sample: Sample) -> dict[str, list[int]]:
    """The code of every package."""
    with semid.open(shown.path, read_only=True) as index:
        return dict(zip(sample.ids, index.encode(sample.vectors).tolist(), strict=True))


def nearest(sample: Sample, query: np.ndarray, k: int, allowed: np.ndarray) -> list[tuple[str, float]]:
    """Brute force: names and cosine distances."""
    distances = np.where(allowed, 1 - sample.vectors.astype(np.float64) @ query, np.inf)
    return [(sample.ids[row], distances[row]) for row in np.argsort(distances, kind="stable")[:k]]


def is_known(sample: Sample) -> np.ndarray:
    return ~np.isin(sample.ids, NEW_PACKAGES)


# -- the sample -------------------------------------------------------------------------------------------------------


def test_the_sample_is_what_its_readme_says(sample: Sample) -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert f"{len(sample.ids):,} packages" in readme
    assert f"({len(sample.ids)}, 384) int8" in readme
    assert 6_000 <= len(sample.ids) == len(set(sample.ids)) <= 10_000
    assert sample.vectors.shape == (len(sample.ids), 384)
    assert sample.query_vectors.shape == (len(sample.query_texts), 384) == (64, 384)
    assert sample.vectors.dtype == sample.query_vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(sample.vectors, axis=1), 1, rtol=1e-6)
    assert sample.metadata.num_rows == len(sample.ids)
    assert sample.metadata.column_names == ["summary", "section", "installed_kb"]
    assert set(NEW_PACKAGES) <= set(sample.ids)
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 8e6


def test_rows_of_the_sample_belong_together(sample: Sample) -> None:
    """A package about chess is found by the query about chess, and so on: vectors, names and texts are in one order."""
    for words, name, summary, section in [
        ("chess", "gnuchess", "Plays a game of chess, either against the user or against itself", "games"),
        ("sudoku", "sudoku-solver", "sudoku puzzles solver", "games"),
    ]:
        row = int(np.argmax(sample.vectors @ sample.query(words)))
        assert sample.ids[row] == name
        assert {"summary": summary, "section": section}.items() <= sample.metadata.slice(row, 1).to_pylist()[0].items()


def test_an_unknown_query_names_those_that_are_known(sample: Sample) -> None:
    with pytest.raises(InvalidArgumentError, match=r"No bundled query contains 'nothing such'\. .*flight simulator"):
        sample.query("nothing such")


# -- what the demo shows ----------------------------------------------------------------------------------------------


def test_it_is_quick_and_fits_a_hundred_columns(shown: Shown) -> None:
    assert shown.processor_seconds < 60
    assert max(map(len, shown.text.splitlines())) == 100


def test_levels_show_the_error_that_is_left(shown: Shown, sample: Sample, codes: dict[str, list[int]]) -> None:
    vectors = sample.vectors[is_known(sample)].astype(np.float64)
    rows = np.array([codes[id] for id in np.array(sample.ids)[is_known(sample)]])
    left, variance = vectors.copy(), np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean()
    with semid.open(shown.path, read_only=True) as index:
        books = index.sql("SELECT level, code, codeword FROM semid_codebook ORDER BY level, code").fetchall()
    lines = shown.part("Train")[1:]
    for level in range(1, 5):
        book = np.array([word for of, _, word in books if of == level])
        left -= book[rows[:, level - 1]]
        shares = np.bincount(rows[:, level - 1], minlength=64) / len(rows)
        shares = shares[shares > 0]
        perplexity = np.exp(-(shares * np.log(shares)).sum())
        error = np.square(left).sum(axis=1).mean() / variance
        assert lines[level - 1].split()[:4] == [f"{level}", "64", f"{perplexity:.0f}", f"{error:.1%}"]
        assert lines[level - 1].count("█") == round(40 * error)


def test_sizes_are_true(shown: Shown, sample: Sample) -> None:
    items = len(sample.ids) - len(NEW_PACKAGES)
    lines = [re.split(r" {2,}", line.strip()) for line in shown.part("Store")[1:]]
    sizes = {line[0]: line[1:] for line in lines if len(line) > 1}
    assert sizes["float32 vectors"] == [f"{384 * 4:,}", f"{items * 384 * 4 / 1e6:.2f} MB"]
    # four codes below 64 are four times six bits: three bytes, and 1,536 / 3 = 512
    assert sizes["semantic IDs"] == ["3", f"{items * 3 / 1e6:.2f} MB", "512 times smaller"]
    codebooks = 4 * 64 * 384 * 4
    assert sizes["codebooks"][:2] == [f"{codebooks / items:.0f}", f"{codebooks / 1e6:.2f} MB"]
    whole, without = (
        float(sizes[name][1].removesuffix(" MB")) for name in ("the whole file", 'the file with vectors="none"')
    )
    # The file on disk has grown since by the new packages and the blocks that DuckDB has yet to reuse.
    assert 0.75 <= whole * 1e6 / shown.path.stat().st_size <= 1.0
    assert without < whole / 3


def test_shelves_are_the_largest_with_their_majority(shown: Shown, sample: Sample, codes: dict[str, list[int]]) -> None:
    known = [id for id in sample.ids if id not in NEW_PACKAGES]
    sections = dict(zip(sample.ids, sample.metadata["section"].to_pylist(), strict=True))
    lines = [line.split()[:4] for line in shown.part("Browse")[1:] if line]
    depths = [line[0].count("-") for line in lines]
    assert depths == [1, 2, 2, 2] * 4
    for line, depth in zip(lines, depths, strict=True):
        prefix = [int(code) for code in line[0].removesuffix("-*").split("-")]
        inside = [sections[id] for id in known if codes[id][:depth] == prefix]
        most = max(Counter(inside).values())
        assert line[1] == str(len(inside))
        assert Counter(inside)[line[2]] == most
        assert line[3] == f"{most / len(inside):.0%}"
    largest = Counter(codes[id][0] for id in known).most_common(4)
    assert [int(line[1]) for line in lines[::4]] == [count for _, count in largest]
    inner = Counter(codes[id][1] for id in known if codes[id][0] == int(lines[0][0].split("-")[0])).most_common(3)
    assert [int(line[1]) for line in lines[1:4]] == [count for _, count in inner]


def test_searches_find_what_brute_force_finds(shown: Shown, sample: Sample, codes: dict[str, list[int]]) -> None:
    lines = shown.part("Search")
    for number, text in enumerate(demo.QUERIES):
        block = lines[4 * number : 4 * number + 4]
        assert block[0].strip() == f"“{text}”"
        assert_hits(block[1:], nearest(sample, sample.query(text), 3, is_known(sample)), codes)


def test_the_filter_is_obeyed(shown: Shown, sample: Sample, codes: dict[str, list[int]]) -> None:
    section, limit = demo.FILTER_PARAMS
    metadata = sample.metadata
    fits = (metadata["section"].to_numpy(zero_copy_only=False) == section) & (
        metadata["installed_kb"].to_numpy() < limit
    )
    expected = nearest(sample, sample.query(demo.FILTERED_QUERY), 3, is_known(sample) & fits)
    assert expected != nearest(sample, sample.query(demo.FILTERED_QUERY), 3, is_known(sample)), (
        "the filter does nothing"
    )
    assert_hits(shown.part("Filter")[1:4], expected, codes)


def assert_hits(lines: list[str], expected: list[tuple[str, float]], codes: dict[str, list[int]]) -> None:
    for line, (name, distance) in zip(lines, expected, strict=True):
        assert line.split()[:3] == [f"{distance:.3f}", name, "-".join(map(str, codes[name]))]


def test_the_sql_answer_is_right(shown: Shown, sample: Sample, codes: dict[str, list[int]]) -> None:
    known = [
        (id, row) for id, row in zip(sample.ids, sample.metadata.to_pylist(), strict=True) if id not in NEW_PACKAGES
    ]
    total = Counter[int]()
    for id, row in known:
        total[codes[id][0]] += row["installed_kb"]
    answer = [line.split() for line in shown.part("Ask in SQL") if line.strip()][-5:]
    for line, (shelf, kilobytes) in zip(answer, total.most_common(5), strict=True):
        inside = [(id, row) for id, row in known if codes[id][0] == shelf]
        largest = max(inside, key=lambda item: item[1]["installed_kb"])[0]
        assert line[:2] == [str(shelf), str(len(inside))]
        assert float(line[3]) == pytest.approx(kilobytes / 1e6, abs=0.051)
        assert line[4] == largest


def test_new_packages_land_where_their_code_says(shown: Shown, sample: Sample, codes: dict[str, list[int]]) -> None:
    lines = shown.part("Add what is new, and train nothing again")[1:6]
    for line, name in zip(lines, NEW_PACKAGES, strict=True):
        cells = re.split(r" {2,}", line.strip())
        assert cells[:2] == [name, "-".join(map(str, codes[name]))]
        joined = [int(code) for code in cells[2].removesuffix("-*").split("-")]
        assert codes[name][: len(joined)] == joined
        on_shelf = np.array([codes[id][: len(joined)] == joined for id in sample.ids]) & is_known(sample)
        assert len(joined) == 1 or on_shelf.sum() >= 3
        vector = sample.vectors[sample.rows([name])[0]]
        expected = [id for id, _ in nearest(sample, vector, min(6, int(on_shelf.sum())), on_shelf)]
        assert ", ".join(expected).startswith(cells[3].rstrip("…"))


def test_the_file_it_leaves_is_read_by_any_duckdb(shown: Shown, sample: Sample, codes: dict[str, list[int]]) -> None:
    command = next(line for line in shown.text.splitlines() if line.strip().startswith("duckdb "))
    query = command.split('"')[1]
    with duckdb.connect(str(shown.path), read_only=True) as connection:
        assert len(connection.sql(query).fetchall()) == 5
        stored = dict(connection.sql("SELECT id, semantic_id FROM semantic_ids").fetchall())
    assert stored == {id: "-".join(map(str, each)) for id, each in codes.items()}
    assert set(stored) == set(sample.ids)


# -- care with files --------------------------------------------------------------------------------------------------


def test_it_replaces_its_own_file_and_no_other(shown: Shown, tmp_path: Path) -> None:
    demo._refuse_other_files(shown.path)
    text, other = tmp_path / "text.duckdb", tmp_path / "other.duckdb"
    text.write_text("precious")
    semid.create(other, dim=2).close()
    before = other.read_bytes()
    for path in (text, other):
        with pytest.raises(IndexExistsError, match="is not what semid demo wrote"):
            demo.run(path, Console(file=io.StringIO()))
    assert text.read_text() == "precious"
    assert other.read_bytes() == before


class StopDemoError(Exception):
    """What a person's Ctrl-C is for this test."""


class Interrupted(Console):
    def print(self, *objects: object, **options: object) -> None:
        super().print(*objects, **options)
        if "codewords" in self.file.getvalue():
            raise StopDemoError


def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StopDemoError):
        demo.run(tmp_path / "demo.duckdb", Interrupted(file=io.StringIO(), width=100))
    assert list(tmp_path.iterdir()) == []


# -- parts ------------------------------------------------------------------------------------------------------------


def test_telling_words_by_hand() -> None:
    around = ["tool for spam", "tool for mail", "tool for games", "tools for mail"]
    # spam: 1 x log(4/1) = 1.39; mail: 1 x log(4/2) = 0.69; tool: 2 x log(4/3) = 0.58; "for" is too short
    assert demo.telling_words(["tool for spam", "tool for mail"], around) == ["spam", "mail", "tool"]
    # sequence: 2 x log(4/1), sequences: 1 x log(4/1), of which one is enough
    assert demo.telling_words(["sequence", "sequence sequences"], ["sequence sequences", "b", "c", "d"]) == ["sequence"]
    assert demo.fitting(["four", "five", "nine"], 10) == "four, five"
    assert demo.fitting(["enormous"], 3) == "enormous"


@pytest.fixture(scope="module")
def make_sample() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "benchmarks" / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sample_leaves_out_parts_and_series(make_sample: ModuleType) -> None:
    items = [
        {"name": "chess", "summary": "plays chess", "section": "games"},
        {"name": "chess-data", "summary": "other words", "section": "games"},  # a part, by its name
        {"name": "chess-gtk", "summary": "plays chess (window)", "section": "games"},  # the same summary
        {"name": "libchess", "summary": "chess moves", "section": "games"},  # a library
        {"name": "libreoffice", "summary": "office suite", "section": "editors"},
        {"name": "old", "summary": "transitional package", "section": "mail"},
        {"name": "shell", "summary": "a shell", "section": "shells"},  # not one of the sections
        {"name": "near", "summary": "what the query is about", "section": "shells"},  # but near to the query
        {"name": "near-doc", "summary": "even nearer", "section": "doc"},
        *({"name": f"aspell-{n:02}", "summary": f"dictionary {n}", "section": "text"} for n in range(20)),
    ]
    vectors = np.zeros((len(items), 2), np.float32)
    vectors[7:9] = [[1, 0], [2, 0]]
    vectors[:7] = [-1, 0]
    vectors[9:] = [-1, 0]
    make_sample.NEAREST_TO_QUERY = 1
    rows = make_sample.chosen_rows(items, vectors, np.array([[1, 0]], np.float32))
    names = [items[row]["name"] for row in rows]
    assert names == sorted([*(f"aspell-{n:02}" for n in range(12)), "chess", "libreoffice", "near"])


def test_directions_are_kept(make_sample: ModuleType) -> None:
    vectors = np.array([[0.6, -0.8, 0.0], [0.001, 0.002, 0.004]], np.float32)
    assert make_sample.as_directions(vectors).tolist() == [[95, -127, 0], [32, 64, 127]]
