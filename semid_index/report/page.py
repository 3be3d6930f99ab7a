"""A quality report as a page: one HTML file with its plots inside, without scripts, that asks no server for anything.

What a reader should look at first comes first: whether prefixes mean something and neighbours stay neighbours, then
collisions, then error, balance and memory.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from semid_index.report.plots import Plot, plots
from semid_index.report.records import QualityReport
from semid_index.report.words import ESTIMATED, codes_text, headlines, percent, shape, summary, times

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #24292f; --soft: #57606a; --line: #d8dee4; --tile: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161b22; --ink: #d5dae0; --soft: #9aa5b1; --line: #3f4750; --tile: #1f262e; } }
body { background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; margin: 0; }
main { max-width: 58rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; border-top: 1px solid var(--line); padding-top: 1.25rem; }
.shape, figcaption, footer, caption, .tiles span { color: var(--soft); }
.shape { margin: .25rem 0 1.25rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0; padding: 0; list-style: none; }
.tiles li { flex: 1 1 9rem; background: var(--tile); border-radius: 6px; padding: .75rem 1rem; }
.tiles strong { display: block; font-size: 1.5rem; line-height: 1.3; }
.tiles span { font-size: .85rem; }
.figures { display: flex; flex-wrap: wrap; gap: 0 2rem; }
figure { flex: 1 1 24rem; max-width: 100%; margin: 0 0 1.25rem; }
img { max-width: 100%; height: auto; }
figcaption, caption, footer { font-size: .9rem; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: 0 0 1.5rem; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .25rem 1.4rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; }
.note { border-left: 3px solid var(--line); padding-left: 1rem; color: var(--soft); max-width: 46rem; }
"""


def page(report: QualityReport, codes: Any = None, *, title: str = "Quality of semantic IDs") -> str:
    """A whole page in HTML: a summary in words, then each question with a plot, how to read it, and its figures.

    ``codes``: as for :func:`semid_index.report.plots.plots`. ``title``: the heading. Needs matplotlib.
    """
    drawn = {plot.name: plot for plot in plots(report, codes)}
    sections = "".join(
        _section(heading, [drawn[name] for name in names if name in drawn], tables(report))
        for heading, names, tables in _SECTIONS
    )
    words = " ".join(escape(sentence) for sentence in summary(report))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="shape">{escape(shape(report))}</p>\n<p>{words}</p>\n'
        f"{_tiles(report)}{sections}"
        f"<footer><p>Made by semid-index. {escape(_BASIS)}</p></footer>\n</main>\n</body>\n</html>\n"
    )


_BASIS = (
    "Neighbours and labels are measured on the items themselves; every figure is defined in docs/report.md of the "
    "project, and its value, with all digits, is in the output of semid report --format json."
)


def _tiles(report: QualityReport) -> str:
    """The figures to look at first."""
    found = "".join(
        f"<li><strong>{escape(value)}</strong><span>{escape(what)}</span></li>\n" for value, what in headlines(report)
    )
    return f'<ul class="tiles">\n{found}</ul>\n'


def _section(heading: str, drawn: Sequence[Plot], tables: Sequence[str]) -> str:
    if not drawn and not tables:
        return ""
    figures = f'<div class="figures">\n{"".join(map(_figure, drawn))}</div>\n' if drawn else ""
    return "".join([f"<section>\n<h2>{escape(heading)}</h2>\n", figures, *tables, "</section>\n"])


def _figure(plot: Plot) -> str:
    width, height = plot.size
    alternative = escape(f"{plot.title} A plot; the tables of this section have its figures.")
    return (
        f'<figure>\n<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_url(plot.dark)}">'
        f'<img src="{_data_url(plot.light)}" width="{width}" height="{height}" alt="{alternative}"></picture>\n'
        f"<figcaption><strong>{escape(plot.title)}</strong> {escape(plot.reading)}</figcaption>\n</figure>\n"
    )


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows. All texts are escaped here."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(value)}</td>" for value in others)}</tr>\n'
        for first, *others in rows
    )
    return (
        f'<div class="wide"><table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>\n"
    )


def _meaning_tables(report: QualityReport) -> list[str]:
    header = ("codes", "prefixes", "purity", "shuffled", "lift", "NMI", "shuffled")
    return [
        _table(
            f"{name}: {depths[0].classes:,} values, {depths[0].items:,} items that have one",
            header,
            [
                (
                    str(depth.depth),
                    f"{depth.groups:,}",
                    percent(depth.purity),
                    percent(depth.shuffled_purity),
                    f"{depth.lift:.2f}",
                    f"{depth.nmi:.3f}",
                    f"{depth.shuffled_nmi:.3f}",
                )
                for depth in depths
            ],
        )
        for name, depths in report.labels.items()
    ]


def _neighbour_tables(report: QualityReport) -> list[str]:
    near = report.neighbours
    if near is None:
        return []
    alone = _table(
        f"The top {near.k} by decoded vectors against the true top {near.k}, {near.queries:,} queries",
        (f"recall@{near.k}", f"Jaccard@{near.k}", f"RBO@{near.k}"),
        [(f"{near.recall:.3f}", f"{near.jaccard:.3f}", f"{near.rbo:.3f}")],
    )
    if not near.probing:
        return [alone]
    rows = [(percent(probe.share), f"{probe.candidates:,.0f}", f"{probe.recall:.3f}") for probe in near.probing]
    groups = f": {near.probe_groups:,} prefixes, the {codes_text(near.probe_depth)}" if near.probe_depth else ""
    return [_table(f"Probing{groups}", ("share wanted", "items opened", f"recall@{near.k}"), rows), alone]


def _collision_tables(report: QualityReport) -> list[str]:
    ids = report.ids
    rows = [
        ("items", f"{ids.items:,}"),
        ("different IDs", f"{ids.distinct:,}"),
        ("collision rate: (items - different IDs) / items", percent(ids.collision_rate)),
        ("items that share their ID", percent(ids.shared)),
        ("items with the most frequent ID", f"{ids.largest_bucket:,}"),
        ("collision rate over that of random IDs", times(ids.excess)),
    ]
    if ids.exact_duplicates is not None:
        rows.append(("items that only repeat another's vector", f"{ids.exact_duplicates:,}"))
    return [_table("Whole IDs", ("figure", "value"), rows)]


def _level_tables(report: QualityReport) -> list[str]:
    held_out = [level.relative_error for level in report.held_out] or [None] * len(report.levels)
    if all(level.relative_error is None for level in report.levels):
        return []
    rows = [
        (str(level.level), _error_text(level.error), percent(level.relative_error), percent(unseen))
        for level, unseen in zip(report.levels, held_out, strict=True)
    ]
    note = f'<p class="note">{escape(ESTIMATED)}</p>\n' if report.codebooks_estimated else ""
    return [_table("After each level", ("level", "squared error", "relative", "held out"), rows), note]


def _balance_tables(report: QualityReport) -> list[str]:
    rows = [
        (
            str(level.level),
            f"{level.codebook_size:,}",
            f"{level.perplexity:,.1f}",
            f"{level.normalized_entropy:.3f}",
            f"{level.gini:.3f}",
            f"{level.unused:,}",
            f"{level.largest:,}",
        )
        for level in report.levels
    ]
    header = ("level", "codewords", "perplexity", "entropy / ln K", "Gini", "dead", "largest")
    return [_table("Use of the codes", header, rows)]


def _memory_tables(report: QualityReport) -> list[str]:
    memory = report.memory
    if memory is None:
        return []
    rows = [
        ("parameters of an embedding table", f"{memory.table_parameters:,}"),
        ("parameters of the codebooks", f"{memory.parameters:,}"),
        ("bytes of an ID", f"{memory.code_bytes:g}"),
    ]
    if memory.bytes_per_item is not None:
        rows.append(("bytes an item takes in the file, all included", f"{memory.bytes_per_item:,.0f}"))
    return [_table("Cost", ("figure", "value"), rows)]


def _churn_tables(report: QualityReport) -> list[str]:
    churn = report.churn
    if churn is None:
        return []
    rows = [
        (str(depth), percent(renamed), percent(as_is))
        for depth, (renamed, as_is) in enumerate(zip(churn.per_level, churn.unaligned, strict=True), 1)
    ]
    header = ("first codes", "changed, renamed to fit", "changed, as they are")
    return [_table(f"{churn.common:,} items that both versions have", header, rows)]


_SECTIONS: tuple[tuple[str, tuple[str, ...], Callable[[QualityReport], list[str]]], ...] = (
    ("Meaning", ("meaning",), _meaning_tables),
    ("Neighbours", ("probing",), _neighbour_tables),
    ("Collisions", ("collisions", "buckets"), _collision_tables),
    ("Error", ("error",), _level_tables),
    ("Balance", ("frequencies",), _balance_tables),
    ("Memory", ("memory",), _memory_tables),
    ("Churn", ("churn",), _churn_tables),
)


def _error_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
