"""Nothing in a file is ever run: the package's own source has no way to.

Each module's syntax tree is searched for what could unpickle, evaluate or execute data.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "semid_index").rglob("*.py"), *(ROOT / "plugins").glob("*/*.py")])
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "codeop"}
FUNCTIONS = {"eval", "exec", "compile", "read_pickle", "to_pickle"}
METHODS = {"os.system", "os.popen", "builtins.eval", "builtins.exec", "pd.read_pickle", "pandas.read_pickle"}


def offences(source: str) -> list[str]:
    """What in a source could run or unpickle something, line by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        else:
            names = []
        found += [f"line {node.lineno}: import {name}" for name in names if name in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = (
            node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
        )
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        pickles = keywords.get("allow_pickle")
        if pickles is not None and not (isinstance(pickles, ast.Constant) and pickles.value is False):
            found.append(f"line {node.lineno}: allow_pickle is not False")
        if (owner, called) in {("np", "load"), ("numpy", "load"), ("format", "read_array")} and pickles is None:
            found.append(f"line {node.lineno}: {owner}.{called} without allow_pickle=False")
        if f"{owner}.{called}" in METHODS or (isinstance(node.func, ast.Name) and called in FUNCTIONS):
            found.append(f"line {node.lineno}: {called}()")
        if owner == "yaml" and called != "safe_load":
            found.append(f"line {node.lineno}: yaml.{called}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_executed(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os, marshal",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "eval(text)",
        "exec(text)",
        "compile(text, '', 'exec')",
        "pd.read_pickle(path)",
        "os.system(text)",
        "yaml.load(text)",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert len(offences(source)) == 1


def test_what_is_harmless_is_let_through():
    assert offences("import re\nre.compile('x')\nnp.load(path, allow_pickle=False, mmap_mode='r')\nimport json") == []
