"""A file in which anything was changed is refused, or gives what it always gave. No other answer, no crash, no hang.

Each mutant is opened and read to the last row by a child of its own, with a time limit. What may come of it:

- the same content (the bytes that were changed are not in use), or
- a typed error: :class:`CorruptIndexError` nearly always, and for the first bytes of a file :class:`NotAnIndexError` or
  :class:`NewerFormatError` (a flipped bit in DuckDB's magic word, or in its number of the format).
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "v1"
QUICK, LONG = 90, 2_400
DUCKDB_1 = duckdb.__version__.startswith("1.")  # it crashes when it finds blocks in each other's places
BLOCK = 262_144  # bytes in one of DuckDB's blocks; three headers of 4,096 bytes come before the first
HEADERS = 3 * 4_096
TYPED = {"CorruptIndexError", "NotAnIndexError", "NewerFormatError"}


def mutants(whole: bytes, count: int, random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Ways to damage a file: a name that says how, and what is left of it."""
    size = len(whole)
    used = np.flatnonzero(np.frombuffer(whole, dtype=np.uint8))  # zeros are mostly room that nothing uses
    blocks = max(2, (size - HEADERS) // BLOCK)
    kinds = [
        "bit",
        "bit in use",
        "byte",
        "header bit",
        "header byte",
        "bytes",
        "cut",
        "zeros",
        "swap",
        "repeat",
        "noise",
    ]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        changed = bytearray(whole)
        place = int(random.integers(size))
        if kind in ("bit", "bit in use", "header bit"):
            if kind == "bit in use":
                place = int(random.choice(used))
            place %= HEADERS if kind == "header bit" else size
            if kind == "header bit":
                place = int(random.choice(used[used < HEADERS]))
            changed[place] ^= 1 << int(random.integers(8))
        elif kind in ("byte", "header byte"):
            place %= HEADERS if kind == "header byte" else size
            changed[place] = int(random.integers(256))
        elif kind == "bytes":
            for spot in random.integers(size, size=int(random.integers(2, 40))):
                changed[spot] = int(random.integers(256))
        elif kind == "cut":
            del changed[place:]
        elif kind == "zeros":
            length = int(random.choice([16, 512, 4_096, BLOCK]))
            changed[place : place + length] = bytes(len(changed[place : place + length]))
        elif kind == "swap":
            a, b = (HEADERS + int(i) * BLOCK for i in random.choice(blocks, 2, replace=False))
            changed[a : a + BLOCK], changed[b : b + BLOCK] = whole[b : b + BLOCK], whole[a : a + BLOCK]
        elif kind == "repeat":
            length = int(random.choice([512, 4_096, BLOCK]))
            other = int(random.integers(size - length))
            changed[place : place + length] = whole[other : other + len(changed[place : place + length])]
        else:
            length = int(random.choice([64, 4_096]))
            changed[place : place + length] = random.bytes(len(changed[place : place + length]))
        yield f"{kind} {number} at {place}", bytes(changed)


@pytest.fixture(scope="module")
def files(zygote, tmp_path_factory) -> dict[str, Path]:
    """The files that are damaged: one of today's format, and golden ones that opening migrates."""
    folder = tmp_path_factory.mktemp("whole")
    made = {name: folder / f"{name}.duckdb" for name in ("today", "plain", "strings", "long")}
    outcome = zygote.run("live", path=made["today"], steps=["create", "train", "add", "append", "close"])
    assert outcome.status == 0, outcome.explain()
    for name in ("plain", "strings", "long"):
        made[name].write_bytes(gzip.decompress((GOLDEN / f"{name}.duckdb.gz").read_bytes()))
    return made


@pytest.mark.parametrize("name", ["today", "plain", "strings", "long"])
def test_a_damaged_file_gives_the_same_or_an_error(zygote, files, name, long, tmp_path):
    count = (LONG if long else QUICK) // (2 if name == "today" else 6)
    whole = files[name].read_bytes()
    path = tmp_path / "index.duckdb"
    contents = {}
    for read_only in (False, True):
        shutil.copy(files[name], path)
        contents[read_only] = zygote.run("read_all", path=path, read_only=read_only).one("content")
    outcomes: Counter[str] = Counter()
    wrong = []
    for number, (how, damaged) in enumerate(mutants(whole, count, np.random.default_rng(len(name)))):
        path.write_bytes(damaged)
        path.with_name(path.name + ".wal").unlink(missing_ok=True)
        read_only = number % 2 == 0
        outcome = zygote.run("read_all", path=path, read_only=read_only, limit=60)
        refused = outcome.of("refused")
        if outcome.hung or outcome.status:
            kind = "hang" if outcome.hung else f"signal {-outcome.status}" if outcome.status < 0 else "other error"
            if not (DUCKDB_1 and how.startswith("swap") and outcome.status < 0):
                wrong.append((how, kind, outcome.explain()))
        elif refused:
            kind = refused[0][0]
            if kind not in TYPED:
                wrong.append((how, kind, refused[0][1]))
        else:
            found, expected = outcome.one("content"), contents[read_only]
            if found == expected:
                kind = "same"
            elif found["problems"].startswith("verify: ") and found | {"problems": ""} == expected | {"problems": ""}:
                kind = "same, and verify tells"  # such as the index of a table, which only writing needs
            else:
                kind = "another answer"
                wrong.append((how, kind, json.dumps(found)))
        outcomes[kind] += 1
    print(f"\n{name}: {count} damaged files: {dict(outcomes)}")
    assert not wrong, f"{len(wrong)} of {count}: " + "\n".join(map(str, wrong[:10]))
    assert outcomes["same"] < count


@pytest.mark.skipif(DUCKDB_1, reason="DuckDB 1.5 may crash on blocks in each other's places")
def test_settings_that_duckdb_does_not_find_by_their_keys(zygote, files, tmp_path):
    """With the index of their keys in another place, a migration would write a second setting of the same key."""
    damaged = bytearray(files["plain"].read_bytes())
    first, second = (slice(HEADERS + block * BLOCK, HEADERS + (block + 1) * BLOCK) for block in (3, 9))
    damaged[first], damaged[second] = damaged[second], damaged[first]
    path = tmp_path / "index.duckdb"
    path.write_bytes(damaged)
    [[kind, message, _]] = zygote.run("read_all", path=path, read_only=False).of("refused")
    assert (kind, message) == (
        "CorruptIndexError",
        "The index is damaged: DuckDB does not find its settings by their keys. Restore it from a copy, or build it "
        "again.",
    )
    assert path.read_bytes() == damaged
    assert zygote.run("search_and_verify", path=path).one("failed") == ["blocks"]


def test_whole_blocks_that_changed_places(zygote, long, tmp_path):
    """What DuckDB's checksums cannot see: they say that a block is whole, and not that it is where it belongs.

    The checksums of items do. See docs/reliability.md.
    """
    path, damaged = tmp_path / "wide.duckdb", tmp_path / "damaged.duckdb"
    assert zygote.run("make_wide", path=path, rows=30_000, dim=32).status == 0
    expected = zygote.run("search_and_verify", path=path)
    assert expected.one("failed") == []
    whole, random = path.read_bytes(), np.random.default_rng(0)
    blocks = (len(whole) - HEADERS) // BLOCK
    outcomes: Counter[str] = Counter()
    for _ in range(100 if long else 5):
        a, b = (HEADERS + int(i) * BLOCK for i in random.choice(blocks, 2, replace=False))
        changed = bytearray(whole)
        changed[a : a + BLOCK], changed[b : b + BLOCK] = whole[b : b + BLOCK], whole[a : a + BLOCK]
        damaged.write_bytes(changed)
        outcome = zygote.run("search_and_verify", path=damaged)
        if DUCKDB_1 and outcome.status < 0:
            outcomes["crashed"] += 1
            continue
        assert outcome.status == 0, outcome.explain()
        if outcome.of("refused"):
            outcomes[outcome.of("refused")[0][0]] += 1
        else:
            kind = "the same" if outcome.one("hits") == expected.one("hits") else "other hits"
            outcomes[f"{kind}, verify {'finds' if outcome.one('failed') else 'misses'} it"] += 1
    print(f"\nblocks that changed places: {dict(outcomes)}")
    assert not [kind for kind in outcomes if kind.startswith("other hits")], outcomes
