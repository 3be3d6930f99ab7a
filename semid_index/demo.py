"""``semid demo``: what semantic IDs are good for, shown on packages of Debian in under a minute, offline."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text

import semid_index as semid
from semid_index.errors import IndexExistsError, InvalidArgumentError, SemidError
from semid_index.output import grid, new_grid, screen

if TYPE_CHECKING:
    import pyarrow as pa

    from semid_index.index import SemanticIndex
    from semid_index.records import SearchResult, Shelf, TrainReport

DATA = Path(__file__).with_name("data")
NEW_PACKAGES = ("stockfish", "stellarium", "lmms", "mutt", "fonts-wqy-microhei")  # kept out of training, added at the end
QUERIES = ("play chess against the computer", "astronomy and star maps", "record and mix audio tracks")
FILTERED_QUERY = "mathematics games for children"
FILTER = "section = ? AND installed_kb < ?"
FILTER_PARAMS = ("games", 2_000)
QUESTION = "Which shelves take up the most disk space?"
SQL = """\
SELECT c1 AS shelf, count(*) AS packages, mode(section) AS mostly,
       round(sum(installed_kb) / 1e6, 1) AS gigabytes, arg_max(id, installed_kb) AS largest
FROM semantic_ids JOIN items USING (id)
GROUP BY shelf ORDER BY gigabytes DESC LIMIT 5"""


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
                return vector
        raise InvalidArgumentError(f"No bundled query contains '{words}'. They are: {'; '.join(self.query_texts)}.")


@cache
def load_sample() -> Sample:
    """The sample that comes with the package."""
    import pyarrow.parquet as pq  # heavy

    items = pq.read_table(DATA / "items.parquet")
    return Sample(
        ids=items["name"].to_pylist(),
        vectors=_at_length_1(np.load(DATA / "vectors.npy")),
        metadata=items.drop_columns(["name"]),
        query_texts=(DATA / "queries.txt").read_text(encoding="utf-8").splitlines(),
        query_vectors=_at_length_1(np.load(DATA / "queries.npy")),
    )


def _at_length_1(directions: NDArray[np.int8]) -> NDArray[np.float32]:
    vectors = directions.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# -- the demo ---------------------------------------------------------------------------------------------------------


def run(output: Path, console: Console | None = None, sample: Sample | None = None) -> None:
    """Show everything, and leave the index at ``output``. Replaces what an earlier demo left there, and nothing else."""
    console = console or screen()
    sample = sample or load_sample()
    _refuse_other_files(output, sample)
    started = time.perf_counter()
    new_rows = sample.rows(NEW_PACKAGES)
    new, known = sample.take(new_rows), sample.take(np.delete(np.arange(len(sample.ids)), new_rows))
    console.print(introduction(sample))
    with semid.create(output, dim=384, metric="cosine", levels=4, codebook_size=256, overwrite=True) as index:
        heading(console, "Train", "index.train(vectors)")
        console.print(training(index.train(known.vectors, progress=True)))
        heading(console, "Store", "index.add(vectors, ids=names, metadata=table)")
        index.add(known.vectors, known.ids, metadata=known.metadata, progress=True)
        console.print(sizes(index.stats()))
        heading(console, "Browse", "index.tree()")
        console.print(shelves(index, known))
        heading(console, "Search", "index.search(query, k=3)")
        for text in QUERIES:
            console.print(hits(text, index.search(sample.query(text), k=3), sample))
        heading(console, "Search with a filter", f'index.search(query, k=3, where="{FILTER}", params={list(FILTER_PARAMS)})')
        console.print(hits(FILTERED_QUERY, index.search(sample.query(FILTERED_QUERY), k=3, where=FILTER, params=FILTER_PARAMS), sample))
        heading(console, "Ask in SQL", QUESTION)
        console.print(answer(index))
        heading(console, "Add new packages, without training again", "index.add(new_vectors, ids=new_names)")
        index.add(new.vectors, new.ids, metadata=new.metadata)
        console.print(neighbours(index, new))
    console.print(farewell(output, time.perf_counter() - started))


def _refuse_other_files(output: Path, sample: Sample) -> None:
    """Only the index of an earlier demo may be replaced."""
    if not output.exists():
        return
    try:
        with semid.open(output, read_only=True) as index:
            if len(index) <= len(sample.ids) and all(id in index for id in NEW_PACKAGES):
                return
    except SemidError:
        pass
    raise IndexExistsError(f"{output} exists, and is not what semid demo wrote. Give another file with --output.")


# -- what is shown ----------------------------------------------------------------------------------------------------


def heading(console: Console, title: str, code: str) -> None:
    """What comes next, and the line of Python that does it."""
    console.print()
    console.print(Text.assemble((title, "bold"), "  ", (code, "dim")))


def introduction(sample: Sample) -> RenderableType:
    """What is going to happen."""
    return Text.assemble(
        ("semid demo", "bold cyan"),
        f"  {len(sample.ids):,} Debian packages get semantic IDs; then we browse, search and query them, and add new ones.",
    )
