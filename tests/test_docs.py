"""The documentation is run: code, SQL and commands; names, links, hooks, figures and generated pages are checked.

How blocks are run, in the order of the page, in an empty folder:

- ``python``: all blocks of a page share their names. Blocks with ``>>>`` are doctests.
- ``sql``: over ``packages.duckdb``, as any DuckDB client would.
- ``sh``: lines that begin with ``semid``; they must succeed.
- ``text`` right after one of these is its output. What differs from machine to machine is not compared: semantic IDs
  and times; after ``<!-- varies -->`` only the number of lines is.
- ``<!-- not run: reason -->`` before a block leaves it out. ``<!-- needs: packages.duckdb -->`` at the top of a page
  gives it the index that the first example of the README makes.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import duckdb
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import semid_index
from semid_index import hookspecs, records
from semid_index.cli import app
from semid_index.codes import CodeLayout, pack
from semid_index.demo import load_sample
from semid_index.index import SemanticIndex
from semid_index.quantizers.tail import default_tail
from semid_index.rerank import to_stored

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
INDEX = "packages.duckdb"
RUNNABLE = ("python", "sql", "sh")

pytest.importorskip("faiss", reason="the examples train, which needs FAISS")


# -- reading pages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Where its first line stands, counted from 1."""
    language: str
    text: str
    comment: str = ""
    """What the HTML comment right before it says."""
    output: Block | None = None
    """The ``text`` block that follows it."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


FENCE = re.compile(
    r"(?:^<!-- (?P<comment>[^\n]*?) -->\n)?^(?P<fence>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)\n", re.M | re.S
)


def fenced(page: Path, content: str | None = None) -> list[Block]:
    """All blocks of a page."""
    content = page.read_text(encoding="utf-8") if content is None else content
    blocks: list[Block] = []
    end = 0
    for match in FENCE.finditer(content):
        line = content[: match.start("text")].count("\n") + 1
        block = Block(page, line, match["language"], match["text"], match["comment"] or "")
        follows = blocks and blocks[-1].language in RUNNABLE and not content[end : match.start()].strip()
        if block.language == "text" and follows:
            blocks[-1] = replace(blocks[-1], output=block)
        else:
            blocks.append(block)
        end = match.end()
    return blocks


def prose(page: Path) -> str:
    """A page without its blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.S)


def code_spans(page: Path) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


# -- comparing outputs ------------------------------------------------------------------------------------------------

CODE = r"(?:\d+|\(\d+\.\.\d+\))"
VARYING = [
    (re.compile(rf"\b(?:{CODE}-)+(?:\d+\b|\*)|\({CODE}-\*|{CODE}-\*"), "ID"),  # k-means rounds as the processor does
    (re.compile(r"\b\d+(?:\.\d+)? (?:ms|s)\b"), "TIME"),
]


def comparable(text: str) -> str:
    """Output without what differs from machine to machine, and without spacing, which depends on it."""
    for pattern, name in VARYING:
        text = pattern.sub(name, text)
    return " ".join(re.sub(r"[─┌┬┐├┼┤└┴┘]+", "-", text).split())


class Checker(doctest.OutputChecker):
    """Compares what :func:`comparable` leaves."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return super().check_output(comparable(want), comparable(got), optionflags)


def check_output(block: Block, got: str) -> None:
    """The output of a block is what the page shows."""
    if block.output is None:
        return
    want = block.output.text
    if block.output.comment == "varies":
        same = got.strip().count("\n") == want.strip().count("\n")
    else:
        same = Checker().check_output(want, got, doctest.ELLIPSIS)
    assert same, f"{block}: expected\n{want}\ngot\n{got}"


# -- running blocks ---------------------------------------------------------------------------------------------------


def run_python(block: Block, names: dict[str, Any]) -> str:
    if ">>>" in block.text:
        run_doctest(block, names)
        return ""
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return printed.getvalue()


def run_doctest(block: Block, names: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, names, str(block), str(block.page), block.line - 1)
    runner = doctest.DocTestRunner(Checker(), verbose=False, optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    result = runner.run(test, out=said.append, clear_globs=False)
    assert not result.failed, "".join(said)
    names.update(test.globs)


def run_sql(block: Block, _names: dict[str, Any]) -> str:
    copy = Path("read-by-sql.duckdb")
    shutil.copy(INDEX, copy)
    with duckdb.connect(copy, read_only=True) as connection:
        relation = connection.sql(block.text)
        return "" if relation is None else str(relation)


def run_sh(block: Block, _names: dict[str, Any]) -> str:
    printed = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "semid":
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert result.exit_code == 0, f"{block}: {line}\n{result.output}"
            printed += result.stdout
    return printed


def run_page(page: Path, content: str | None = None) -> list[Block]:
    """Run a page's blocks in the current folder; the blocks that were run."""
    names: dict[str, Any] = {"__name__": "__docs__"}
    runners = {"python": run_python, "sql": run_sql, "sh": run_sh}
    run = [b for b in fenced(page, content) if b.language in runners and not b.comment.startswith("not run: ")]
    for block in run:
        check_output(block, runners[block.language](block, names))
    return run


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's examples were run. It has ``packages.duckdb``."""
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        run_page(README)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme(readme_folder: Path) -> None:
    with semid_index.open(readme_folder / INDEX, read_only=True) as index:
        assert len(index) == len(load_sample().ids)


def test_demo_shows_what_the_readme_says(folder: Path) -> None:
    """The headings, and the hits with their distances; shelves and codes differ from machine to machine."""
    [excerpt] = [block.text for block in fenced(README) if block.text.startswith("semid demo ")]
    promised = [line for line in excerpt.splitlines() if re.match(r"[A-Z]|    0\.\d{3}  ", line)]
    result = CliRunner().invoke(
        app, ["demo", "--output", "demo.duckdb"], env={"COLUMNS": "110"}, catch_exceptions=False
    )
    shown = {comparable(line.rstrip("\n ─")) for line in result.stdout.splitlines()}
    assert len(promised) > 8
    assert [line for line in promised if comparable(line) not in shown] == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_page(page: Path, folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if f"<!-- needs: {INDEX} -->" in page.read_text(encoding="utf-8"):
        shutil.copy(request.getfixturevalue("readme_folder") / INDEX, folder)
    for plugin in (ROOT / "plugins").iterdir():
        monkeypatch.syspath_prepend(plugin)
    run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_little_is_left_out(page: Path) -> None:
    """Code that is not run says why, and is the exception."""
    blocks = [block for block in fenced(page) if block.language in RUNNABLE]
    left_out = [block for block in blocks if block.comment.startswith("not run")]
    assert all(re.fullmatch(r"not run: \S.*", block.comment) for block in left_out), left_out
    assert len(left_out) <= 2


@pytest.mark.parametrize(
    "page",
    [
        "```python\n>>> 1 + 1\n3\n\n```\n",
        "```python\nprint(2)\n```\n\n```text\n3\n```\n",
        "```python\nprint(2)\n```\n\n<!-- varies -->\n```text\n3\n4\n```\n",
        "```python\nraise AssertionError\n```\n",
        "```sh\nsemid stats missing.duckdb\n```\n",
        "```sql\nSELECT 1 AS one\n```\n\n```text\n│ two │\n```\n",
    ],
)
def test_a_wrong_page_fails(page: str, folder: Path) -> None:
    duckdb.connect(INDEX).close()
    with pytest.raises(AssertionError):
        run_page(Path("wrong.md"), page)


def test_outputs_are_compared_without_what_varies() -> None:
    got = comparable("0.281  gnuchess  7-9-97-33 in 3.1 ms, under 7-* and 12-(64..127)-*")
    assert got == "0.281 gnuchess ID in TIME, under ID and ID"


# -- names ------------------------------------------------------------------------------------------------------------

OWNERS = {
    "semid": semid_index,
    "index": SemanticIndex,
    "hits": records.SearchResult,
    "trace": records.SearchTrace,
    "shelf": records.Shelf,
    "probe": records.Probe,
}
ATTRIBUTE = re.compile(rf"(?<![\w./])({'|'.join(OWNERS)})\.([a-z]\w*)")
FILES = ("duckdb", "md", "npy", "py", "parquet")


def has(owner: Any, name: str) -> bool:
    """Whether a module or class has it; a record has its fields, an index its ``config``."""
    known = {*dir(owner), *getattr(owner, "__dataclass_fields__", ()), *(["config"] if owner is SemanticIndex else [])}
    return name in known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    """``index.search``, ``semid.open`` and whatever begins with ``semid_index.`` is there."""
    code = "\n".join([*code_spans(page), *(block.text for block in fenced(page) if block.language == "python")])
    named = [(owner, name) for owner, name in ATTRIBUTE.findall(code) if name not in FILES]
    assert [f"{owner}.{name}" for owner, name in named if not has(OWNERS[owner], name)] == []
    assert [name for name in re.findall(r"\bsemid_index(?:\.\w+)+", code) if not resolves(name)] == []


def resolves(dotted: str) -> bool:
    """Whether a name such as ``semid_index.rerank.Executor`` can be imported."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:split]))
            for part in parts[split:]:
                found = getattr(found, part, None)
            return found is not None
    return False


def commands() -> frozenset[str]:
    return frozenset(typer.main.get_command(app).list_commands(None))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    shell = [block.text for block in fenced(page) if block.language == "sh"]
    named = re.findall(r"(?:^|\s)semid ([a-z]\w*)", "\n".join([*code_spans(page), *shell]))
    assert set(named) <= commands()


def test_wrong_names_are_found() -> None:
    assert resolves("semid_index.rerank.Executor")
    assert not resolves("semid_index.rerank.Nothing")
    assert not resolves("semid_index.nothing")
    assert has(SemanticIndex, "config")
    assert not has(SemanticIndex, "searches")
    assert has(records.SearchTrace, "candidates")
    assert "search" in commands()


# -- links ------------------------------------------------------------------------------------------------------------

LINKED = [*PAGES, ROOT / "SECURITY.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> frozenset[str]:
    """The names that headings get, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [first or second for first, second in LINK.findall(prose(page))]
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {(README.parent / link.partition("#")[0]).resolve() for link, _ in LINK.findall(prose(README))}
    assert set(PAGES[1:]) <= linked


# -- what the code says -----------------------------------------------------------------------------------------------


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh() -> None:
    # in a process of its own: the page of the command line depends on how Typer was imported
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_stale_page_is_noticed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = load_generator()
    name = "docs/file-format.md"
    monkeypatch.setattr(generator, "PAGES", {name: generator.PAGES[name]})
    whole = (ROOT / name).read_text(encoding="utf-8")
    page = tmp_path / name
    page.parent.mkdir()
    page.write_text(whole.replace("`dup_rank`", "`dup`"), encoding="utf-8")
    assert generator.main(["--check"], tmp_path) == 1
    assert "-| `dup` |" in capsys.readouterr().out
    assert generator.main([], tmp_path) == 0
    assert page.read_text(encoding="utf-8") == whole
    assert generator.main(["--check"], tmp_path) == 0


def hook_signatures() -> Iterator[str]:
    for name, hook in vars(hookspecs).items():
        if hasattr(hook, "semid_index_spec"):
            yield f"{name}({', '.join(inspect.signature(hook).parameters)})"


def test_every_hook_has_a_heading_with_its_arguments() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert re.findall(r"^### `(semid_register\w*\([^`]*\))`$", page, re.M) == list(hook_signatures())


def test_plugins_page_shows_the_whole_plugin() -> None:
    """The module as it is, with quantizer and hook; the contract is run over it in its own folder."""
    [block] = [b for b in fenced(ROOT / "docs" / "plugins.md") if "def semid_register_quantizers" in b.text]
    modules = {path: path.read_text(encoding="utf-8").strip() for path in (ROOT / "plugins").glob("*/*.py")}
    [folder] = [path.parent for path, text in modules.items() if text == block.text.strip()]
    assert "QuantizerContract" in "".join(test.read_text(encoding="utf-8") for test in folder.glob("tests/*.py"))


def test_search_page_lists_every_option() -> None:
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    section = page.partition("## Options")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.M)
    assert listed == list(inspect.signature(SemanticIndex.search).parameters)[2:]  # after self and query


def test_trace_table_lists_every_field() -> None:
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    section = page.partition("## The trace")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.M)
    fields = records.SearchTrace.__dataclass_fields__.keys() - {"read_probes"} | {"probes"}
    assert sorted(listed) == sorted(fields)


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "search.md"], ids=lambda page: page.name)
def test_bytes_per_item_of_the_tiers(page: Path) -> None:
    """The table's figures are those of the code, at 384 dimensions."""
    vectors = np.ones((1, 384), dtype=np.float32)
    rows = re.findall(r'^\| `"(\w+)"` \| ([\d,]+) \| (\d+) \|', page.read_text(encoding="utf-8"), re.M)
    assert [tier for tier, *_ in rows] == ["float32", "float16", "int8", "none"]
    for tier, stored, tail in rows:
        assert int(stored.replace(",", "")) == sum(column.nbytes for column in to_stored(vectors, tier).values())
        assert int(tail) == (0 if tier == "none" else default_tail(384) // 2)


def test_concepts_pack_by_hand() -> None:
    """The number that the page arrives at is the one that the code packs."""
    sid = int(pack(np.array([[12, 153, 87, 21]]), CodeLayout((256,) * 4))[0])
    assert f"{sid:,}" in (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")


def test_settings_are_all_described(readme_folder: Path) -> None:
    from semid_index import tables

    with duckdb.connect(readme_folder / INDEX, read_only=True) as connection:
        keys = [key for (key,) in connection.execute("SELECT key FROM semid_meta").fetchall()]
    assert sorted(keys) == sorted(tables.SETTINGS)


@pytest.mark.parametrize("name", ["README.md", "docs/concepts.md", "docs/search.md", "docs/tutorial.md"])
def test_residual_quantization_is_said_in_full(name: str) -> None:
    """RQ means other things elsewhere."""
    text = prose(ROOT / name)
    assert "residual quantization" in text
    assert not re.search(r'(?<!")\bRQ\b(?!")', text)


def test_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.M)[1] == semid_index.__version__
    assert "license: Apache-2.0" in citation


def test_changelog_has_the_version() -> None:
    changelog = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.M)[0] == semid_index.__version__


def test_python_blocks_parse() -> None:
    """Also those that are not run."""
    for page in PAGES:
        for block in fenced(page):
            if block.language == "python" and ">>>" not in block.text:
                ast.parse(block.text, filename=str(block))
