"""Adds the trees that the installed DuckDB's parser makes of some filters to ``filter_trees.json.gz``.

The filters are those in it, and any given as arguments. Run it once with each DuckDB whose trees differ:

    python tests/golden/make_filter_trees.py "n = 1"
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import duckdb

from semid_index import filters

FILE = Path(__file__).resolve().parent / "filter_trees.json.gz"


def without_places(tree: Any) -> Any:
    """The tree without where in the text each part was."""
    if isinstance(tree, dict):
        return {key: without_places(value) for key, value in tree.items() if key != "query_location"}
    return [without_places(part) for part in tree] if isinstance(tree, list) else tree


def main() -> None:
    """Write the file anew."""
    trees = json.loads(gzip.decompress(FILE.read_bytes()))
    wanted = [*next(iter(trees.values())), *sys.argv[1:]]
    trees[duckdb.__version__] = {where: without_places(filters._tree(where)) for where in wanted}
    text = json.dumps(trees, separators=(",", ":"))
    FILE.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
