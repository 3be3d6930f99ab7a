"""Large jobs stay under a stated bound of memory, and a search with a timeout ends.

Memory is the most that a process of its own took beyond what it had before the call (``VmHWM`` in ``/proc``), so these
tests need Linux. How long a search goes on after its timeout is looked at in the long form only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

if not Path("/proc/self/clear_refs").exists():
    pytest.skip("only Linux tells the most memory that a process took", allow_module_level=True)

LONG = bool(os.environ.get("SEMID_LONG"))
MB = 1 << 20
ROWS = 10_000_000 if LONG else 200_000
ITEMS = 1_200_000 if LONG else 20_000
QUERIES = 100_000 if LONG else 20_000


def test_adding_from_a_generator(zygote, tmp_path):
    """The vectors alone are 32 bytes a row, which go through a temporary file. What grows is 8 bytes for each id, a few
    times over, and DuckDB's share of memory, which is limited to 512 MB."""
    outcome = zygote.run("add_from_generator", path=tmp_path / "index.duckdb", rows=ROWS, limit=1_200)
    assert outcome.one("items") == ROWS
    bound = 250 * MB + 150 * min(ROWS, 5_000_000) + 60 * ROWS
    report("add", f"{ROWS:,} rows", outcome, bound)


@pytest.mark.parametrize("options", [{}, {"exact": True}], ids=["default", "exact"])
def test_a_million_hits(zygote, tmp_path, options):
    """A hit is an id, a distance, a position and its codes, of a few candidates each."""
    arguments: dict[str, Any] = {"items": ITEMS, "queries": 2, "k": 1_000_000, "options": options}
    outcome = zygote.run("search_much", path=tmp_path / "index.duckdb", limit=600, **arguments)
    assert outcome.one("hits") == 2 * min(ITEMS, 1_000_000)
    assert outcome.one("in order")
    report("search", f"k=1,000,000 of {ITEMS:,} items {options}", outcome, 100 * MB + 250 * ITEMS)


def test_many_queries(zygote, tmp_path):
    """Queries go through in blocks: what grows is what is found, here ten hits for each."""
    arguments: dict[str, Any] = {"items": 20_000, "queries": QUERIES, "k": 10, "options": {}}
    outcome = zygote.run("search_much", path=tmp_path / "index.duckdb", limit=600, **arguments)
    assert outcome.one("hits") == 10 * QUERIES
    assert outcome.one("in order")
    report("search", f"{QUERIES:,} queries", outcome, 60 * MB + 10 * QUERIES * 60)


def test_many_queries_with_many_hits_each(zygote, tmp_path):
    """A block is smaller, where each of its queries has many candidates: 4 x 4,000 here."""
    arguments: dict[str, Any] = {"items": 60_000, "queries": 1_000, "k": 8_000, "options": {}}
    outcome = zygote.run("search_much", path=tmp_path / "index.duckdb", limit=600, **arguments)
    assert outcome.one("hits") == 8_000 * 1_000
    report("search", "1,000 queries, k=8,000", outcome, 300 * MB + 8_000_000 * 60)


CASES: dict[str, dict[str, Any]] = {
    "many queries": {"queries": 200_000},
    "exact": {"queries": 50_000, "exact": True},
    "exact, with a filter": {"queries": 20_000, "where": "number % 2 = 0", "exact": True},
    "filter": {"queries": 200_000, "where": "number % 50 = 0"},
    "many hits": {"queries": 20_000, "k": 10_000},
    "all leaves": {"queries": 50_000, "probes": 100_000},
}


def test_a_search_ends_at_its_timeout(zygote, tmp_path):
    items, timeout = (200_000, 1.0) if LONG else (40_000, 0.05)
    outcome = zygote.run(
        "search_with_timeout", path=tmp_path / "i.duckdb", items=items, dim=64, timeout=timeout, cases=CASES, limit=300
    )
    assert outcome.status == 0, outcome.explain()
    ended = {name: (error, seconds) for name, error, seconds in outcome.of("ended")}
    assert {name: error for name, (error, _) in ended.items()} == dict.fromkeys(CASES, "SearchTimeoutError")
    assert outcome.one("afterwards") == [7]
    late = {name: round(seconds - timeout, 3) for name, (_, seconds) in ended.items()}
    print(f"\nseconds after a timeout of {timeout} s: {late}")
    if LONG:
        assert max(late.values()) < 0.5


def report(what: str, how: str, outcome: Any, bound: int) -> None:
    """Compare the peak with its bound, and print both."""
    peak = outcome.one("peak")
    print(f"\n{what}, {how}: {peak / MB:,.0f} MB, bound {bound / MB:,.0f} MB, {outcome.one('seconds'):.1f} s")
    assert peak < bound
