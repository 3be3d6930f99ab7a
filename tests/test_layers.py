"""Modules import only modules before them, and importing the package stays quick."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "semid_index"

# The order of the modules, as in the table of the design: each imports only from those before it. "__init__" stands
# for the package root: only what is used like any other program, from outside, may import that.
ORDER = [
    "errors",
    "codes",
    "quantizer",
    "records",
    "metrics",
    "hookspecs",
    "vectors",
    "progress",
    "quantizers",
    "quantizers.kmeans",
    "devices",
    "quantizers.beam",
    "quantizers.refine",
    "quantizers.rq",
    "quantizers.balanced_rq",
    "quantizers.vq",
    "quantizers.pq",
    "quantizers.scalar",
    "quantizers.rotation",
    "quantizers.additive",
    "quantizers.opq",
    "quantizers.bits",
    "quantizers.tail",
    "tables",
    "items",
    "report",
    "report.measures",
    "report.reconstruction",
    "report.records",
    "report.quality",
    "report.words",
    "report.plots",
    "report.page",
    "report.id_files",
    "alignment",
    "drift",
    "collisions",
    "coder",
    "arrow",
    "checksums",
    "versions",
    "macros",
    "filters",
    "copying",
    "database",
    "whole_files",
    "appending",
    "item_places",
    "session",
    "contents",
    "store",
    "sql.dbapi",
    "sql.column_types",
    "sql.dialect",
    "sql.conditions",
    "sql",
    "plugins",
    "lookup",
    "native",
    "rerank",
    "scan",
    "code_scan",
    "vector_lists",
    "incoming",
    "build",
    "lifecycle",
    "segments",
    "live",
    "search",
    "gpu",
    "sql_search",
    "export",
    "importing",
    "compact",
    "verify",
    "report.inputs",
    "retrain",
    "index",
    "__init__",
    "output",
    "views",
    "arguments",
    "demo",
    "bench",
    "bench.subject",
    "bench.subjects",
    "bench.subjects.ours",
    "bench.subjects.faiss_indexes",
    "bench.subjects.graphs",
    "bench.subjects.scann_tree",
    "bench.subjects.brute_force",
    "bench.measures",
    "bench.data",
    "bench.machine",
    "bench.worker",
    "bench.workers",
    "bench.results",
    "bench.builds",
    "bench.harness",
    "bench.compare",
    "bench.referee",
    "bench.plots",
    "bench.gpu_page",
    "bench.page",
    "doctor",
    "report.command",
    "bench.command",
    "cli",
    "testing",
]


def module_names() -> list[str]:
    """The modules of the package, as the parts of their paths joined by dots."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def source_of(module: str) -> ast.Module:
    path = PACKAGE / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = PACKAGE / module.replace(".", "/") / "__init__.py"
    return ast.parse(path.read_text())


def imports(source: ast.AST) -> Iterator[str]:
    """The full names of what is imported anywhere in the source, in functions too, unless only for type hints."""
    for node in ast.iter_child_nodes(source):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def imported_modules(source: ast.AST) -> set[str]:
    """Which modules of ours the source imports."""
    return {module_of(name) for name in imports(source) if name.split(".")[0] == "semid_index"}


def module_of(name: str) -> str:
    """The module that ``semid_index.some.thing`` is or belongs to: the longest of its beginnings that is one."""
    parts = name.split(".")[1:]
    beginnings = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((beginning for beginning in beginnings if beginning in ORDER), "__init__")


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(module_names()), "write a new module into ORDER, where it belongs"


@pytest.mark.parametrize("module", [name for name in ORDER if name != "__init__"])
def test_imports_run_one_way(module):
    earlier = set(ORDER[: ORDER.index(module)])
    later = imported_modules(source_of(module)) - earlier
    assert not later, f"{module} imports {', '.join(sorted(later))}, which do not come before it"


def test_the_root_imports_nothing_until_it_is_used():
    assert imported_modules(source_of("__init__")) == set()


def test_what_is_not_allowed_is_seen():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from semid_index.segments import SearchState
import semid_index.cli
from semid_index import build, create
from semid_index.quantizers import rq
def function():
    from semid_index.index import SemanticIndex
"""
    assert imported_modules(ast.parse(source)) == {"cli", "build", "__init__", "quantizers.rq", "index"}


HEAVY = {
    "faiss",
    "h5py",
    "numpy",
    "duckdb",
    "pandas",
    "pyarrow",
    "rich",
    "scipy",
    "sklearn",
    "sqlalchemy",
    "torch",
    "typer",
}


@pytest.mark.parametrize(
    ("code", "light"),
    [
        ("import semid_index", HEAVY),
        ("import semid_index; semid_index.create; semid_index.open", HEAVY - {"duckdb", "numpy"}),
        ("import semid_index.testing", HEAVY - {"duckdb", "numpy"}),
    ],
)
def test_importing_leaves_heavy_packages_out(code, light, run_python):
    loaded = json.loads(run_python(f"{code}; import json, sys; print(json.dumps(list(sys.modules)))"))
    assert "semid_index" in loaded
    assert light.isdisjoint(loaded)


def test_no_module_has_a_name_of_the_standard_library():
    assert not {name for name in module_names() if name in sys.stdlib_module_names}
