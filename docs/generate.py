"""Writes the pages that come from the code, and refreshes the files that other pages include.

    python docs/generate.py            writes what is stale
    python docs/generate.py --check    writes nothing; shows what is stale, and exits with 1 if anything is

A page includes a file between two comments; its content is kept as a code block::

    <!-- include: plugins/semid-sign-hash/semid_sign_hash.py -->
    <!-- end of include -->
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb

from semid_index import tables
from semid_index.bench.page import body as bench_results
from semid_index.codes import CodeLayout

ROOT = Path(__file__).resolve().parent.parent

# An index that has every column there can be: int8 vectors, a tail, and more levels than fit into a sid.
_EXAMPLE = {"dim": 384, "id_type": "str", "tier": "int8", "tail_bytes": 48, "hierarchical": True}
_EXAMPLE_LAYOUT = CodeLayout((256,) * 9)
_INCLUDE = re.compile(r"(<!-- include: (?P<path>\S+) -->\n).*?(<!-- end of include -->)", re.DOTALL)
_LANGUAGES = {".py": "python", ".toml": "toml", ".sql": "sql"}


# -- file-format.md ---------------------------------------------------------------------------------------------------


def file_format(template: str) -> str:
    """The page with the tables, columns and bits written into its places ``<!-- tables -->`` and so on."""
    sections = {"tables": table_sections(), "settings": settings_section(), "bits": bit_sections()}
    for name, content in sections.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        template, found = place.subn(lambda match, text=content: f"{match[1]}\n{text}\n{match[2]}", template)
        if found != 1:
            raise SystemExit(f"file-format.md needs one place '<!-- {name} -->', it has {found}.")
    return template


def table_sections() -> str:
    """Every table and the view, with the type and the meaning of each column."""
    types = column_types()
    if set(types) != set(tables.COLUMNS):
        raise SystemExit(f"tables.COLUMNS and the tables differ: {set(types) ^ set(tables.COLUMNS)}")
    sections = []
    for table, meanings in tables.COLUMNS.items():
        shown = merged_levels(types[table]) if table == "semantic_ids" else types[table]
        if set(shown) != set(meanings):
            raise SystemExit(f"tables.COLUMNS['{table}'] and the table differ: {set(shown) ^ set(meanings)}")
        rows = [f"| {column_name(table, name)} | `{shown[name]}` | {meaning} |" for name, meaning in meanings.items()]
        kind = "a view" if table == "semantic_ids" else "a table"
        head = [f"### `{table}`, {kind}", "", "| column | type | meaning |", "|---|---|---|"]
        sections.append("\n".join([*head, *rows, ""]))
    return "\n".join(sections)


def column_types() -> dict[str, dict[str, str]]:
    """The tables of the example index, as DuckDB describes them: table -> column -> type."""
    with duckdb.connect() as connection:
        tables.migrate(connection.execute, found=0)
        tables.create_codebook_table(connection.execute, _EXAMPLE["dim"])
        tables.create_bucket_table(connection.execute)
        tables.create_item_tables(connection.execute, _EXAMPLE_LAYOUT, **_EXAMPLE)
        found = connection.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal ORDER BY column_index"
        ).fetchall()
    types: dict[str, dict[str, str]] = {}
    for table, column, data_type in found:
        types.setdefault(table, {})[column] = data_type
    return types


def merged_levels(types: dict[str, str]) -> dict[str, str]:
    """Columns ``c1``, ``c2`` ... as one named ``c``, and the same for ``p``."""
    return {re.sub(r"^([cp])\d+$", r"\1", name): data_type for name, data_type in types.items()}


def column_name(table: str, name: str) -> str:
    """How the page writes a column."""
    return f"`{name}1`, `{name}2`, ..." if table == "semantic_ids" and name in ("c", "p") else f"`{name}`"


def settings_section() -> str:
    """The keys of ``semid_meta``."""
    rows = [f"| `{key}` | {meaning} |" for key, meaning in tables.SETTINGS.items()]
    return "\n".join(["| key | value |", "|---|---|", *rows, ""])


def bit_sections() -> str:
    """Where the codes sit in a sid, for three shapes of ID."""
    return "\n".join(bits_of(CodeLayout(sizes)) for sizes in ((256,) * 4, (1024, 300, 256), (256,) * 9))


def bits_of(layout: CodeLayout) -> str:
    """Where the code of each level sits, for one shape of ID."""
    sizes = layout.codebook_sizes
    shape = f"{len(sizes)} levels of {sizes[0]}" if len(set(sizes)) == 1 else f"Levels of {', '.join(map(str, sizes))}"
    rows = []
    for level, sql in enumerate(tables.code_expressions(layout).values()):
        if level < layout.packed_levels:
            first = layout.shifts[level]
            place = f"{first} to {first + layout.bits[level] - 1}"
        else:
            place = "in `sid_rest`"
        rows.append(f"| {level + 1} | {layout.bits[level]} | {place} | `{sql.removesuffix('::INTEGER')}` |")
    title = f"**{shape}**: {layout.sid_bits} bits in the sid"
    head = [title, "", "| level | bits | in the sid | SQL |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


# -- included files ---------------------------------------------------------------------------------------------------


def with_includes(page: str) -> str:
    """The page with every included file as it is now."""

    def fresh(match: re.Match[str]) -> str:
        path = ROOT / match["path"]
        return f"{match[1]}```{_LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8').strip()}\n```\n{match[3]}"

    return _INCLUDE.sub(fresh, page)


# -- benchmarks.md ----------------------------------------------------------------------------------------------------


def benchmarks_page(template: str) -> str:
    """The page with what the results in benchmarks/results say, in its place ``<!-- results -->``."""
    place = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)
    results = ROOT / "benchmarks" / "results"
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    text = importlib.import_module("benchmarks.targets").section(results) + bench_results(results, "benchmarks")
    page, found = place.subn(lambda match: f"{match[1]}\n{text}\n{match[2]}", template)
    if found != 1:
        raise SystemExit(f"benchmarks.md needs one place '<!-- results -->', it has {found}.")
    return page


# -- all pages --------------------------------------------------------------------------------------------------------


def cli_page(_old: str) -> str:
    """The page of the command line, written from its ``--help``."""
    return str(load("generate_cli").page())


PAGES: dict[str, Callable[[str], str]] = {
    "docs/benchmarks.md": benchmarks_page,
    "docs/cli.md": cli_page,
    "docs/file-format.md": file_format,
    "docs/plugins.md": with_includes,
}
"""Page -> a function of its text as it is now, which gives its text as it should be."""


def stale_pages(root: Path = ROOT) -> dict[str, tuple[str, str]]:
    """The pages that differ from what the code says: page -> text now, text wanted."""
    stale = {}
    for name, write in PAGES.items():
        path = root / name
        now = path.read_text(encoding="utf-8") if path.exists() else ""
        wanted = write(now)
        if now != wanted:
            stale[name] = now, wanted
    return stale


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write what is stale or, with ``--check``, show it; the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    stale = stale_pages(root)
    for name, (now, wanted) in stale.items():
        if not arguments:
            (root / name).write_text(wanted, encoding="utf-8")
            print(f"wrote {name}")
            continue
        lines = now.splitlines(keepends=True), wanted.splitlines(keepends=True)
        sys.stdout.writelines(difflib.unified_diff(*lines, f"{name} as it is", f"{name} as it should be"))
    if arguments and stale:
        print(f"stale: {', '.join(stale)}. Run: python docs/generate.py", file=sys.stderr)
    return 1 if arguments and stale else 0


def load(name: str) -> Any:
    """A module beside this one. The folder is no package, so that nothing of it is installed."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise SystemExit(f"There is no {name}.py beside generate.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
