"""``semid demo``: what semantic IDs are good for, shown on packages of Debian in under a minute, offline."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text

import semid_index as semid
from semid_index.arguments import bars, complete_or_nothing
from semid_index.errors import IndexExistsError, InvalidArgumentError, SemidError
from semid_index.output import grid, new_grid, screen
from semid_index.views import indented, levels_view, one_line, sizes_view

if TYPE_CHECKING:
    import pyarrow as pa

    from semid_index.index import SemanticIndex
    from semid_index.records import SearchResult, Shelf

DATA = Path(__file__).with_name("data")
NEW_PACKAGES = (
    "stockfish",
    "stellarium",
    "audacity",
    "mutt",
    "fonts-wqy-microhei",
)  # kept out of training, added at the end
QUERIES = ("play chess against the computer", "astronomy and star maps", "record and mix audio tracks")
FILTERED_QUERY = "mathematics games for children"
FILTER = "section = ? AND installed_kb < ?"
FILTER_PARAMS = ("games", 2_000)
QUESTION = "Which shelves take up the most disk space?"
SQL = """\
SELECT c1 AS shelf, count(*) AS packages, mode(section) AS mostly,
       (sum(installed_kb) / 1e6)::DECIMAL(9, 1) AS gigabytes,
       arg_max(id, installed_kb) AS largest
FROM semantic_ids JOIN items USING (id)
GROUP BY shelf ORDER BY sum(installed_kb) DESC LIMIT 5"""


# -- the sample -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Packages of Debian with their embeddings; ``semid_index/data/README.md`` says where they come from."""

    ids: list[str]
    """Package names."""
    vectors: NDArray[np.float32]
    """(n, 384), of length 1: the embeddings of "name: summary"."""
    metadata: pa.Table
    """Columns summary, section, installed_kb; rows as in ``ids``."""
    query_texts: list[str]
    """Searches in plain English."""
    query_vectors: NDArray[np.float32]
    """(64, 384): their embeddings."""

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Where these packages are."""
        return np.array([self.ids.index(id) for id in ids])

    def take(self, rows: NDArray[np.int64]) -> Sample:
        """The sample with these rows only."""
        ids = [self.ids[row] for row in rows]
        return Sample(ids, self.vectors[rows], self.metadata.take(rows), self.query_texts, self.query_vectors)

    def query(self, words: str) -> NDArray[np.float32]:
        """The vector of the first query that contains these words; case does not matter."""
        for text, vector in zip(self.query_texts, self.query_vectors, strict=True):
            if words.lower() in text.lower():
                return np.asarray(vector)
        raise InvalidArgumentError(f"No bundled query contains '{words}'. They are: {'; '.join(self.query_texts)}.")


@cache
def load_sample() -> Sample:
    """The sample that comes with the package."""
    import pyarrow.parquet as pq  # heavy

    items = pq.read_table(DATA / "items.parquet")
    return Sample(
        ids=items["name"].to_pylist(),
        vectors=_at_length_1(np.load(DATA / "vectors.npy", allow_pickle=False)),
        metadata=items.drop_columns(["name"]),
        query_texts=(DATA / "queries.txt").read_text(encoding="utf-8").splitlines(),
        query_vectors=_at_length_1(np.load(DATA / "queries.npy", allow_pickle=False)),
    )


def _at_length_1(directions: NDArray[np.int8]) -> NDArray[np.float32]:
    vectors = directions.astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


# -- the demo ---------------------------------------------------------------------------------------------------------


def run(output: Path, console: Console | None = None, sample: Sample | None = None) -> None:
    """Show everything, and leave the index at ``output``.

    Raises :class:`IndexExistsError` if there is a file that no earlier demo left.
    """
    console = console or screen()
    sample = sample or load_sample()
    _refuse_other_files(output)
    started = time.perf_counter()
    new_rows = sample.rows(NEW_PACKAGES)
    new, known = sample.take(new_rows), sample.take(np.delete(np.arange(len(sample.ids)), new_rows))

    console.print(introduction(len(known.ids), len(new.ids)))
    with complete_or_nothing(output, overwrite=True) as path:
        _build_and_show(path, console, known)
        _use_and_show(path, console, sample, new)
    console.print(farewell(output, time.perf_counter() - started), soft_wrap=True)  # commands stay whole


def _build_and_show(path: Path, console: Console, known: Sample) -> None:
    progress = bars(quiet=False)
    with create(path) as index:
        heading(console, "Train", "index.train(vectors)")
        report = index.train(known.vectors, progress=progress)
        console.print(indented(levels_view(asdict(report)["levels"])))
        heading(console, "Store", "index.add(vectors, ids=names, metadata=table)")
        index.add(known.vectors, known.ids, metadata=known.metadata, progress=progress)
    with semid.open(path, read_only=True) as index:  # closing has written everything to the file
        console.print(indented(sizes_view(index.stats(), without_vectors=stats_without_vectors(known))))


def _use_and_show(path: Path, console: Console, sample: Sample, new: Sample) -> None:
    with semid.open(path) as index:
        heading(console, "Browse", "index.tree()")
        console.print(indented(shelves(index)))
        heading(console, "Search", "index.search(query, k=3)")
        for text in QUERIES:
            console.print(indented(hits(text, index, index.search(sample.query(text), k=3))))
        heading(console, "Filter", f'index.search(query, k=3, where="{FILTER}", params={list(FILTER_PARAMS)})')
        filtered = index.search(sample.query(FILTERED_QUERY), k=3, where=FILTER, params=FILTER_PARAMS)
        console.print(indented(hits(FILTERED_QUERY, index, filtered)))
        heading(console, "Ask in SQL", QUESTION)
        console.print(indented(answer(index)))
        heading(console, "Add what is new, and train nothing again", "index.add(new_vectors, ids=new_names)")
        landed = arrivals(index, new)
        index.add(new.vectors, new.ids, metadata=new.metadata)
        console.print(indented(landed))


def create(path: Path, **options: Any) -> SemanticIndex:
    """The index of the demo. 64 codewords a level suffice: eight thousand items could not teach many more."""
    return semid.create(path, dim=384, metric="cosine", levels=4, codebook_size=64, overwrite=True, **options)


def stats_without_vectors(sample: Sample) -> dict[str, Any]:
    """What the same items cost in a file that keeps no vectors: measured, by writing one."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "without.duckdb"
        with create(path, vectors="none") as index:
            index.train(sample.vectors)
            index.add(sample.vectors, sample.ids, metadata=sample.metadata)
        with semid.open(path, read_only=True) as index:
            return index.stats()


def _refuse_other_files(output: Path) -> None:
    """Only the index of an earlier demo may be replaced."""
    if not output.exists():
        return
    try:
        with semid.open(output, read_only=True) as index:
            if index.stats().get("codebook_sizes") == [64] * 4 and all(id in index for id in NEW_PACKAGES):
                return
    except SemidError:
        pass
    raise IndexExistsError(f"{output} exists, and is not what semid demo wrote. Give another file with --output.")


# -- what is shown ----------------------------------------------------------------------------------------------------


def heading(console: Console, title: str, code: str) -> None:
    """What comes next, and the line of Python that does it."""
    console.print()
    console.print(Rule(Text.assemble((title, "bold cyan"), "  ", (code, "default")), align="left", style="cyan dim"))


def introduction(known: int, new: int) -> RenderableType:
    """What is going to happen."""
    what = f"  {known:,} Debian packages get semantic IDs, to browse, search and query; then {new} more arrive."
    return Text.assemble(("semid demo", "bold"), what)


def shelves(index: SemanticIndex, largest: int = 4, inner: int = 3) -> RenderableType:
    """The largest shelves, and the largest shelves within them."""
    summaries = [summary for (summary,) in index.sql("SELECT summary FROM items").fetchall()]
    table = new_grid()
    for name in ("shelf", "packages", "mostly", "they say", "such as"):
        table.add_column(name, justify="right" if name == "packages" else "left")
    for shelf in index.tree()[:largest]:
        table.add_row(*shelf_row(index, shelf, summaries, style="bold"))
        around = index.prefix(shelf.prefix)["summary"].to_pylist()
        for below in index.tree(under=shelf.prefix)[:inner]:
            table.add_row(*shelf_row(index, below, around, style=""))
    return table


def shelf_row(index: SemanticIndex, shelf: Shelf, around: list[str], *, style: str) -> tuple[Text, ...]:
    """A shelf, its size, its main section with its share, what sets it apart, and the packages in its middle."""
    items = index.prefix(shelf.prefix)
    section, count = majority(items["section"].to_pylist())
    vectors = np.stack(index.get(items["id"], vectors=True)["vector"].to_pylist())
    typical = [items["id"][int(row)].as_py() for row in np.argsort(-vectors @ vectors.mean(axis=0))[:10]]
    names = ", ".join(sorted(typical, key=len))  # short ones first, since the line is cut
    indent = "  " * (len(shelf.prefix) - 1)
    said = fitting(telling_words(items["summary"].to_pylist(), around), 27)
    cells = (indent + shelf.text, f"{shelf.items}", f"{section} {count / shelf.items:.0%}", said)
    return *(Text(cell, style=style, no_wrap=True) for cell in cells), one_line(names, style="dim")


def telling_words(summaries: list[str], around: list[str], most: int = 3) -> list[str]:
    """Words that many of these summaries have, and few of all that are around them (tf-idf)."""
    here, there = (Counter(word for text in texts for word in words(text)) for texts in (summaries, around))
    ranked = sorted(here, key=lambda word: (-here[word] * math.log(len(around) / there[word]), word))
    chosen: dict[str, str] = {}
    for word in ranked:
        chosen.setdefault(word[:5], word)  # one of sequence, sequences and sequencing
    return list(chosen.values())[:most]


def fitting(names: list[str], width: int) -> str:
    """As many of the names as have room in so many characters; one at least."""
    while len(names) > 1 and len(", ".join(names)) > width:
        names = names[:-1]
    return ", ".join(names)


def words(text: str) -> set[str]:
    """The words of a text that can tell something."""
    return set(re.findall("[a-z]{4,}", text.lower())) - {"from", "that", "this", "using", "with"}


def majority(sections: list[str]) -> tuple[str, int]:
    """The most frequent section, and how often it occurs."""
    return Counter(sections).most_common(1)[0]


def hits(query: str, index: SemanticIndex, result: SearchResult) -> RenderableType:
    """Packages found, nearest first."""
    table = new_grid()
    table.show_header = False
    table.add_column(justify="right")
    for style in ("bold", "cyan", ""):
        table.add_column(style=style)
    items = index.get(result.ids)
    for distance, name, semantic_id, summary in zip(
        result.distances,
        items["id"].to_pylist(),
        items["semantic_id"].to_pylist(),
        items["summary"].to_pylist(),
        strict=True,
    ):
        table.add_row(f"{distance:.3f}", f"{name:<18}", f"{semantic_id:<15}", one_line(summary))
    return Group(Text(f"\u201c{query}\u201d", style="italic"), indented(table))


def answer(index: SemanticIndex) -> RenderableType:
    """An SQL query and its result."""
    query = Syntax(SQL, "sql", theme="ansi_dark", background_color="default")
    return Group(query, Text(), grid(index.sql(SQL).to_arrow_table()))


def arrivals(index: SemanticIndex, new: Sample) -> RenderableType:
    """Where packages land that the codebooks were not trained on, and which of those on the shelf are nearest."""
    table = new_grid()
    for name in ("new package", "semantic ID", "joins", "where it meets"):
        table.add_column(name)
    for name, vector, codes in zip(new.ids, new.vectors, index.encode(new.vectors).tolist(), strict=True):
        prefix = shelf_to_join(index, codes)
        on_shelf = " AND ".join(f"c{level} = ?" for level, _ in enumerate(prefix, 1))
        nearest = index.search(vector, k=6, where=on_shelf, params=prefix).ids
        joins = "-".join(map(str, prefix)) + "-*"
        table.add_row(
            Text(name, style="bold"), Text("-".join(map(str, codes)), style="cyan"), joins, one_line(", ".join(nearest))
        )
    return table


def shelf_to_join(index: SemanticIndex, codes: list[int], enough: int = 3) -> list[int]:
    """The longest prefix of the codes that has enough packages already, or the first code."""
    depths = [depth for depth in range(1, len(codes)) if index.prefix(codes[:depth]).num_rows >= enough]
    return codes[: max(depths, default=1)]


def farewell(output: Path, seconds: float) -> Text:
    """Where the index is, and what to try next."""
    lines = {
        f'duckdb {output} "FROM semantic_ids LIMIT 5"': "any DuckDB client reads it",
        f"semid tree {output}": "the shelves",
        f"semid search {output} --like stockfish": "what is like a package",
        f'semid search {output} --demo-query "solve sudoku"': "one of the 64 bundled queries",
    }
    width = max(map(len, lines))
    text = Text.assemble("\n", (str(output), "bold"), f" is yours, made in {seconds:.0f} seconds. Go on with:")
    for line, remark in lines.items():
        text.append(f"\n  {line:<{width}}", "cyan").append(f"  {remark}", "dim")
    return text
