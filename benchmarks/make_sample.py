"""Makes the sample that ``semid demo`` uses (``semid_index/data``) from the ``debian`` set.

    python benchmarks/make_sample.py --data ../shared/data

The same input gives the same files, byte for byte. What is kept, and why, is told in ``semid_index/data/README.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

# Sections whose packages are things a reader can picture, kept whole ...
WHOLE = {
    *("comm", "database", "editors", "education", "electronics", "fonts", "games", "graphics", "hamradio", "httpd"),
    *("mail", "math", "news", "otherosfs", "science", "sound", "tex", "text", "vcs", "video", "web"),
}
# ... and large ones of which this many packages are kept, the same at every run.
CAPPED = {"gnu-r": 200, "net": 400, "perl": 200, "python": 300, "ruby": 150, "utils": 400}

# Parts that a program is split into, and series with one member for each language: they would be shelves of their own.
PARTS = re.compile(r"-(common|data|dbg|dev|docs?|examples|l10n|locales?|rules)$|-(data|doc|help|l10n|lang|locale)-")
LIBRARY = re.compile(r"lib(?!.*-perl$|reoffice|recad)")
NOT_A_THING = re.compile(
    r"transitional|dummy|meta-?package|debug symbols|development files|documentation", re.IGNORECASE
)
SERIES_LIMIT = 12  # packages whose names begin with the same word, such as aspell-de, aspell-fr ...
NOT_A_SERIES = {"fonts", "python3", "r", "ruby"}  # ... unless the word is only a naming convention

NEAREST_TO_QUERY = (
    10  # the packages nearest to each query are kept wherever they come from, so that no query finds nothing
)
NEVER = ["doc", "metapackages", "tasks"]


def chosen_rows(
    items: list[dict[str, object]], vectors: NDArray[np.float32], queries: NDArray[np.float32]
) -> list[int]:
    """The rows to keep, ordered by name."""
    never = np.isin([str(item["section"]) for item in items], NEVER)
    scores = np.where(never, -np.inf, queries @ vectors.T)
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :NEAREST_TO_QUERY]
    kept = set(nearest.ravel().tolist())
    summaries: set[str] = set()
    series: dict[str, int] = defaultdict(int)
    sections: dict[str, list[int]] = defaultdict(list)
    names = [str(item["name"]) for item in items]
    for row in sorted(range(len(items)), key=lambda row: (len(names[row]), names[row])):  # foo before foo-plugins
        name, summary, section = names[row], str(items[row]["summary"]), str(items[row]["section"])
        if (section not in WHOLE and section not in CAPPED) or is_part(name, summary):
            continue
        stem = re.split(r" [-–(]|: ", summary.lower())[0]  # "chess program (data files)" -> "chess program"
        word = name.split("-")[0]
        if stem in summaries or (series[word] >= SERIES_LIMIT and word not in NOT_A_SERIES):
            continue
        summaries.add(stem)
        series[word] += 1
        sections[section].append(row)
    for section, rows in sections.items():
        rows.sort(key=lambda row: hashlib.sha256(names[row].encode()).digest())
        kept.update(rows[: CAPPED.get(section, len(rows))])
    return sorted(kept, key=lambda row: names[row])


def is_part(name: str, summary: str) -> bool:
    """Whether the package is a piece of another one, rather than something to look for."""
    return bool(PARTS.search(name) or LIBRARY.match(name) or NOT_A_THING.search(summary))


def as_directions(vectors: NDArray[np.float32]) -> NDArray[np.int8]:
    """Each row scaled so that its largest value is 127 and rounded: its direction in a quarter of the bytes.

    The vectors have length 1, so nothing but their direction is needed, and no scale is kept.
    """
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    return np.rint(vectors / largest * 127).astype(np.int8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the debian set")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "semid_index" / "data")
    arguments = parser.parse_args()

    table = pq.read_table(
        arguments.data / "debian.items.parquet", columns=["name", "summary", "section", "installed_kb"]
    )
    vectors = np.load(arguments.data / "debian.minilm384.f16.npy").astype(np.float32)
    queries = np.load(arguments.data / "debian.queries384.f16.npy").astype(np.float32)
    texts = (arguments.data / "debian.queries.txt").read_text(encoding="utf-8")

    rows = chosen_rows(table.to_pylist(), vectors, queries)
    arguments.output.mkdir(exist_ok=True)
    # An explicit schema: no metadata of the writer's gets into the file.
    items = table.take(pa.array(rows)).replace_schema_metadata(None)
    pq.write_table(items, arguments.output / "items.parquet", compression="zstd", compression_level=19)
    np.save(arguments.output / "vectors.npy", as_directions(vectors[rows]))
    np.save(arguments.output / "queries.npy", as_directions(queries))
    (arguments.output / "queries.txt").write_text(texts, encoding="utf-8")
    print(f"{len(rows):,} of {len(vectors):,} packages -> {arguments.output}")


if __name__ == "__main__":
    main()
