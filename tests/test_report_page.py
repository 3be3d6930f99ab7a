"""The page of a quality report: well-formed, complete on its own, escaped, and with the figures of the report."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from semid_index.errors import InvalidCodesError, MissingDependencyError
from semid_index.report.page import page
from semid_index.report.plots import Plot, _bucket_bars, plots, save_plots
from semid_index.report.quality import quality
from semid_index.report.records import (
    ChurnQuality,
    IdQuality,
    LabelQuality,
    LevelQuality,
    MemoryCost,
    NeighbourQuality,
    ProbeQuality,
    QualityReport,
)
from semid_index.report.words import BALANCE, ESTIMATED, percent, summary, times

pytest.importorskip("matplotlib")
pytest.importorskip("scipy", reason="churn is aligned by SciPy")
from PIL import Image

ITEMS, DIM, SIZES = 400, 6, (8, 8, 4)
EVIL = "<script>alert('&')</script>"


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    random = np.random.default_rng(3)
    return np.column_stack([random.integers(size, size=ITEMS) for size in SIZES]).astype(np.int32)


@pytest.fixture(scope="module")
def codebooks() -> list[np.ndarray]:
    random = np.random.default_rng(4)
    return [(4.0**-level * random.standard_normal((size, DIM))).astype(np.float32) for level, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def report(codes: np.ndarray, codebooks: list[np.ndarray]) -> QualityReport:
    """With everything that a report can have."""
    random = np.random.default_rng(5)
    vectors = sum(book[codes[:, level]] for level, book in enumerate(codebooks))
    vectors = (vectors + 0.01 * random.standard_normal((ITEMS, DIM))).astype(np.float32)
    labels = {
        EVIL: [f"kind {code // 2}" for code in codes[:, 0]],
        "日本語": [["a", "b", None][row % 3] for row in range(ITEMS)],
    }
    return quality(
        codes,
        SIZES,
        vectors=vectors,
        codebooks=codebooks,
        labels=labels,
        held_out=(codes[:50], vectors[:50] + np.float32(0.1)),
        previous=np.where(np.arange(ITEMS)[:, None] < 40, (codes + 1) % SIZES, codes),
        queries=50,
        bytes_per_item=123.4,
    )


class Parsed(HTMLParser):
    """The tags, attributes and texts of a page whose every tag is closed where it should be."""

    VOID = ("meta", "img", "source")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self._open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def text(report: QualityReport, codes: np.ndarray) -> str:
    return page(report, codes, title=f"IDs of {EVIL}")


@pytest.fixture(scope="module")
def parsed(text: str) -> Parsed:
    return Parsed(text)


@pytest.fixture(scope="module")
def drawn(report: QualityReport, codes: np.ndarray) -> list[Plot]:
    return plots(report, codes)


def test_it_is_one_whole_document(parsed: Parsed) -> None:
    assert [parsed.tags.count(tag) for tag in ("html", "head", "title", "body", "main", "h1")] == [1] * 6
    assert parsed.tags.count("section") == 7
    assert parsed.tags.count("figure") == parsed.tags.count("img") == parsed.tags.count("figcaption") == 8
    assert ("html", "lang", "en") in parsed.attributes


def test_it_asks_nobody_for_anything(parsed: Parsed, text: str) -> None:
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(parsed.tags)
    loaded = [value for _, name, value in parsed.attributes if name in ("src", "srcset", "href", "data", "action")]
    assert len(loaded) == 16
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert not re.search(r"url\(|@import|https?:", text)
    assert not any(name.startswith("on") for _, name, _ in parsed.attributes)


def test_what_users_wrote_is_text(parsed: Parsed) -> None:
    assert f"IDs of {EVIL}" in parsed.texts
    assert any(text.startswith(f"{EVIL}: 4 values") for text in parsed.texts)
    assert any(EVIL in text for text in parsed.texts if text.startswith("Items that begin alike"))


def test_every_image_is_a_png_of_the_size_it_says(parsed: Parsed) -> None:
    images = [value for _, name, value in parsed.attributes if name in ("src", "srcset")]
    sizes = [opened(base64.b64decode(image.partition(",")[2])).size for image in images]
    said = [int(value) for tag, name, value in parsed.attributes if tag == "img" and name in ("width", "height")]
    pairs = list(zip(said[::2], said[1::2], strict=True))
    assert [(round(w / 1.5), round(h / 1.5)) for w, h in sizes] == [pair for pair in pairs for _ in range(2)]


def opened(png: bytes) -> Image.Image:
    Image.open(io.BytesIO(png)).verify()
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return image


def test_light_and_dark_plots_have_their_ground(drawn: list[Plot]) -> None:
    for plot in drawn:
        light, dark = (opened(png).convert("L") for png in (plot.light, plot.dark))
        assert light.getpixel((0, 0)) == 255
        assert dark.getpixel((0, 0)) < 40
        assert len(light.getcolors()) > 20  # something is drawn


def test_tables_have_the_figures_of_the_report(parsed: Parsed, report: QualityReport) -> None:
    for depths in report.labels.values():
        for depth in depths:
            start = [str(depth.depth), f"{depth.groups:,}", percent(depth.purity), percent(depth.shuffled_purity)]
            assert any(row[:4] == start for row in parsed.rows)
    assert ["different IDs", f"{report.ids.distinct:,}"] in parsed.rows
    near = report.neighbours
    assert [f"{near.recall:.3f}", f"{near.jaccard:.3f}", f"{near.rbo:.3f}"] in parsed.rows
    for level, unseen in zip(report.levels, report.held_out, strict=True):
        errors = [percent(level.relative_error), percent(unseen.relative_error)]
        assert [str(level.level), f"{level.error:.4g}", *errors] in parsed.rows
        assert any(
            row[:3] == [str(level.level), str(level.codebook_size), f"{level.perplexity:,.1f}"] for row in parsed.rows
        )
    assert ["parameters of the codebooks", f"{sum(SIZES) * DIM:,}"] in parsed.rows
    assert ["1", percent(report.churn.per_level[0]), percent(report.churn.unaligned[0])] in parsed.rows


def test_it_begins_with_meaning_and_says_what_balance_is_not(parsed: Parsed) -> None:
    headings = ["Meaning", "Neighbours", "Collisions", "Error", "Balance", "Memory", "Churn"]
    assert [text for text in parsed.texts if text in headings] == headings
    assert any(BALANCE in text for text in parsed.texts)


def test_it_says_when_codebooks_were_estimated(codes: np.ndarray) -> None:
    vectors = np.random.default_rng(0).standard_normal((ITEMS, DIM)).astype(np.float32)
    estimated = quality(codes, SIZES, vectors=vectors, queries=20)
    assert estimated.codebooks_estimated
    assert ESTIMATED in Parsed(page(estimated, codes)).texts


@pytest.mark.parametrize(
    ("hierarchical", "with_codes", "names"),
    [
        (True, True, ["collisions", "buckets", "frequencies"]),
        (False, True, ["buckets", "frequencies"]),
        (True, False, ["collisions"]),
    ],
)
def test_plots_are_those_that_there_are_figures_for(
    codes: np.ndarray, hierarchical: bool, with_codes: bool, names: list[str]
) -> None:
    bare = quality(codes, SIZES, hierarchical=hierarchical)
    given = codes if with_codes else None
    assert [plot.name for plot in plots(bare, given)] == names
    assert Parsed(page(bare, given)).tags.count("img") == len(names)


def test_many_levels_and_dead_codes_can_be_drawn() -> None:
    codes = np.random.default_rng(0).integers(2, size=(400, 40)).astype(np.int32)
    codes[:300] = codes[0]  # as many with one ID, so that there are many sizes of buckets
    report = quality(codes, [5] * 40)
    assert report.levels[0].unused == 3
    assert len(plots(report, codes)) == 3


def test_plots_are_saved_as_they_are(drawn: list[Plot], tmp_path: Path) -> None:
    paths = save_plots(drawn, tmp_path / "new" / "plots")
    assert [path.stem for path in paths] == [
        "meaning", "probing", "collisions", "buckets", "error", "frequencies", "memory", "churn"
    ]  # fmt: skip
    assert [path.read_bytes() for path in paths] == [plot.light for plot in drawn]


def test_codes_must_be_those_of_the_report(report: QualityReport, codes: np.ndarray) -> None:
    with pytest.raises(InvalidCodesError, match=r"integers of shape \(400, 3\), not int32 of shape \(400, 2\)"):
        page(report, codes[:, :2])


def test_shares_of_bucket_sizes() -> None:
    """12 items: two alone, a pair, a group of three and one of five."""
    names, shares = _bucket_bars(np.array([1, 1, 2, 3, 5]))
    assert names == ["1", "2", "3-4", "5-8"]
    assert shares == pytest.approx([2 / 12, 2 / 12, 3 / 12, 5 / 12])


def test_matplotlib_is_left_as_it_was(
    report: QualityReport, codes: np.ndarray, drawn: list[Plot], run_python: Callable[..., str]
) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 33, "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        again = plots(report, codes)
        assert dict(mpl.rcParams) == before
    assert again == drawn
    program = (
        "import sys, numpy as np; from semid_index.report.page import page;"
        "from semid_index.report.quality import quality;"
        "page(quality(np.arange(8).reshape(4, 2), [8, 8]));"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    assert run_python(program).split() == ["True", "False"]


def test_without_matplotlib_it_says_what_to_install(report: QualityReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'semid-index\[report\]'"):
        page(report)


# -- words ------------------------------------------------------------------------------------------------------------


def test_the_summary_names_the_figures(report: QualityReport) -> None:
    text = " ".join(summary(report))
    best = report.labels[EVIL][0]  # the first code says which kind: 8 codes, two for each
    assert best.purity == 1
    assert f"100 % have the {EVIL} that is most frequent among those with the same first code" in text
    assert f"by chance it would be {percent(best.shuffled_purity)}" in text
    assert f"find {percent(report.neighbours.recall)} of their true 10 nearest" in text
    assert f"{percent(report.ids.shared)} of 400 items share their ID" in text
    assert f"({percent(report.held_out[-1].relative_error)} of vectors held out)" in text
    assert f"Of 400 items that the earlier version has too, {percent(report.churn.per_level[-1])} changed" in text


def test_the_summary_does_not_praise_labels_that_say_nothing() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(4, size=(5_000, 2)).astype(np.int32)
    noise = random.integers(3, size=5_000).astype(str)
    rare = np.where(np.arange(5_000) % 50 == 0, "rare", "usual")
    unrelated, uniform = summary(quality(codes, 4, labels={"noise": noise, "kind": rare}))[:2]
    assert unrelated.startswith("The IDs say next to nothing about noise")
    assert uniform == "kind tells nothing: by chance alone, groups would be 98.0 % pure in it."


def test_unique_ids_are_said_to_be_unique() -> None:
    assert summary(quality(np.arange(6).reshape(3, 2), 8)) == ["Every one of the 3 items has an ID of its own."]


@pytest.mark.parametrize(("share", "text"), [(0.5, "50.0 %"), (0.0049, "0.49 %"), (0.0, "0 %"), (1.0, "100 %")])
def test_shares_are_written_as_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_factors_are_short() -> None:
    assert [times(976.6), times(1.5)] == ["977 times", "1.5 times"]


# -- the page about reports -------------------------------------------------------------------------------------------


def test_the_documentation_names_every_figure() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    kinds = (LevelQuality, IdQuality, LabelQuality, NeighbourQuality, ProbeQuality, MemoryCost, ChurnQuality)
    figures = {field.name for kind in kinds for field in fields(kind)}
    plain = {"level", "depth", "codebook_size", "k", "queries", "items", "distinct", "distinct_prefixes", "common"}
    plain |= {"entropy", "shuffled_nmi", "probe_depth", "probe_groups"}  # said in words
    assert [name for name in sorted(figures - plain) if f"`{name}`" not in text] == []
