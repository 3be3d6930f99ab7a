"""Records as tables for people: what the command line and the demo print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from semid_index.output import new_grid, shown
from semid_index.report.words import BALANCE, ESTIMATED, percent, shape, times

if TYPE_CHECKING:
    from semid_index.records import RetrainReport, VerifyReport
    from semid_index.report.records import ChurnQuality, NeighbourQuality, QualityReport

_BAR = 40  # characters of a full bar
_CHURN_BAR = 28
_PROBES_SHOWN = 10
_DEPTHS_SHOWN = 4  # of each label: enough to see purity and chance come together


def stats_view(stats: Mapping[str, Any]) -> RenderableType:
    """What an index holds, how good its levels are, and what it costs."""
    facts = facts_view(
        {name: stats[name] for name in ("items", "dim", "metric", "quantizer", "vectors") if name in stats}
    )
    if not stats["trained"]:
        return Group(facts, Text("Not trained yet."))
    sizes, shared = stats["codebook_sizes"], stats["items_sharing_an_id"]
    facts.add_row("codewords", Text(" x ".join(str(size) for size in sizes[:8]) + (" ..." if len(sizes) > 8 else "")))
    facts.add_row("sharing an ID", Text(f"{shared:,} items, {shared / max(stats['items'], 1):.1%}"))
    if stats["collisions"]["policy"] != "share":
        facts.add_row("collisions", Text(_collisions_text(stats["collisions"])))
    parts: list[RenderableType] = [facts]
    if levels := stats["train_report"]["levels"]:
        parts += [Text(), levels_view(levels)]
    if "drift" in stats:
        parts += [Text(), Text(stats["drift"]["reason"], style="bold yellow" if stats["drift"]["due"] else "")]
    return Group(*parts, Text(), sizes_view(stats))


def _collisions_text(report: Mapping[str, Any]) -> str:
    """What the collision policy did, in a line."""
    before, after, moved = report["before"]["ids"], report["after"]["ids"], report["moved"]
    price = f"{moved:,} items moved, error {report['relative_extra_error']:+.2%}; " if moved else ""
    broken = "; not all are unique" if report["unique"] is False else ""
    return f"{report['policy']}: {price}{before:,} different IDs without it, {after:,} with it{broken}"


def levels_view(levels: Sequence[Mapping[str, Any]]) -> RenderableType:
    """How much of a vector is left to explain after each level."""
    table = new_grid()
    for name in ("level", "codewords", "perplexity", "error"):
        table.add_column(name, justify="right")
    table.add_column("what the ID so far leaves unexplained of a vector")
    for level in levels:
        left = round(_BAR * min(level["relative_error"], 1))
        bar = Text.assemble(("█" * left, "cyan"), ("░" * (_BAR - left), "dim"))
        table.add_row(
            str(level["level"]),
            str(level["codebook_size"]),
            f"{level['perplexity']:.0f}",
            f"{level['relative_error']:.1%}",
            bar,
        )
    return table


def sizes_view(stats: Mapping[str, Any], *, without_vectors: Mapping[str, Any] | None = None) -> RenderableType:
    """What an item costs, as a vector and as an ID; and all that the file holds.

    ``without_vectors`` are the stats of the same items in a file that keeps no vectors.
    """
    items, full, code = stats["items"], stats["float32_bytes_per_item"], stats["code_bytes_per_item"]
    kept = "no vectors" if stats["vectors"] == "none" else f"{stats['vectors']} vectors"
    rows = [
        ("float32 vectors", full * items, ""),
        ("semantic IDs", code * items, f"[bold green]{full / code:,.0f} times smaller[/]"),
        ("codebooks", stats["codebook_bytes"], "the same for 100 million items"),
        ("the whole file", stats["file_bytes"], f"all that, ids, metadata, {kept}"),
    ]
    if without_vectors is not None:
        rows.append(('the file with vectors="none"', without_vectors["file_bytes"], "distances are to decoded IDs"))
    table = new_grid()
    for name in ("", "bytes an item", "in all"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("", style="dim")
    for name, total, remark in rows:
        table.add_row(name, f"{total / max(items, 1):,.0f}", f"{total / 1e6:,.2f} MB", remark)
    return table


def trace_view(trace: Mapping[str, Any]) -> RenderableType:
    """How a search was carried out, and the first leaves that it opened."""
    counts = ("leaves", "probed", "candidates", "reranked", "matches", "distances", "executor")
    facts = facts_view({name: trace[name] for name in counts if trace[name] is not None})
    facts.add_row(
        "milliseconds", Text(", ".join(f"{step} {1000 * seconds:.2f}" for step, seconds in trace["seconds"].items()))
    )
    probes = new_grid()
    for name in ("leaf", "distance", "items"):
        probes.add_column(name, justify="left" if name == "leaf" else "right")
    for probe in trace["probes"][:_PROBES_SHOWN]:
        probes.add_row(Text(probe["prefix"], style="cyan"), f"{probe['score']:.4f}", f"{probe['items']:,}")
    parts: list[RenderableType] = [Text(trace["plan"], style="bold"), facts]
    if trace["probes"]:
        parts += [Text(), probes]
    if (more := len(trace["probes"]) - _PROBES_SHOWN) > 0:
        parts.append(Text(f"... and {more} more", style="dim"))
    return Group(*parts)


def verify_view(report: VerifyReport) -> RenderableType:
    """What each check of an index found, the failed ones in red."""
    table = new_grid()
    for name in ("check", "", "looked at"):
        table.add_column(name, justify="right" if name == "looked at" else "left")
    table.add_column("found", overflow="fold")
    styles = {"ok": "green", "failed": "bold red", "skipped": "dim"}
    for check in report.checks:
        table.add_row(check.name, Text(check.status, styles[check.status]), f"{check.examined:,}", Text(check.found))
    verdict = "The index is whole." if report.ok else f"The index is damaged: {', '.join(report.failed)}."
    return Group(table, Text(), Text(verdict, style="bold"))


def report_view(report: QualityReport) -> RenderableType:
    """A quality report: meaning and neighbourhood first, then collisions, then how the levels do."""
    parts: list[RenderableType] = [Text(shape(report), style="bold"), Text()]
    if report.labels:
        parts += [_meaning_table(report), Text()]
    if report.neighbours is not None:
        parts += [_neighbour_table(report.neighbours, report.items), Text()]
    parts += [_collision_table(report), Text(), _level_table(report), Text(BALANCE, style="dim")]
    if report.codebooks_estimated:
        parts.append(Text(ESTIMATED, style="dim"))
    if report.memory is not None:
        cost = f"{times(report.memory.reduction)} fewer parameters than an embedding table"
        parts += [Text(), Text(f"Memory: {report.memory.code_bytes:g} bytes an ID; {cost}.")]
    if report.churn is not None:
        parts += [Text(), _churn_table(report.churn)]
    if report.drift is not None:
        parts += [Text(), Text(report.drift.reason, style="bold yellow" if report.drift.due else "")]
    return Group(*parts)


def retrain_view(report: RetrainReport, *, dropped: bool) -> RenderableType:
    """What retraining did to the IDs and to the error."""
    error, ratio = report.error / (report.error_before or 1.0) - 1, report.error_ratio
    facts = facts_view({"version": report.version, "items": report.items, "learned from": report.rows})
    than_scratch = "" if ratio is None else f"; {ratio - 1:+.1%} against training from scratch"
    facts.add_row("error", Text(f"{error:+.1%}{than_scratch}"))
    table = new_grid()
    names = ["codes", "changed"]
    compared = report.churn[0].unaligned is not None
    names += ["from scratch", "and aligned"] if compared else []
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("items with other first codes")
    for level in report.churn:
        changed = round(_CHURN_BAR * level.prefix)
        bar = Text.assemble(("█" * changed, "cyan"), ("░" * (_CHURN_BAR - changed), "dim"))
        others = [level.unaligned, level.aligned] if compared else []
        table.add_row(str(level.level), percent(level.prefix), *map(percent, others), bar)
    old = f"Version {report.version - 1}"
    kept = f"{old} was dropped." if dropped else f"{old} is still there: semid_map leads from its IDs to the new ones."
    return Group(facts, Text(), table, Text(), Text(kept, style="dim"))


def _meaning_table(report: QualityReport) -> Table:
    table = new_grid("Meaning: are items that begin alike, alike?")
    for name in ("label", "codes", "prefixes", "purity", "by chance", "lift", "NMI"):
        table.add_column(name, justify="left" if name == "label" else "right")
    for label, depths in report.labels.items():
        for depth in depths[:_DEPTHS_SHOWN]:
            figures = (percent(depth.purity), percent(depth.shuffled_purity), f"{depth.lift:.2f}", f"{depth.nmi:.3f}")
            table.add_row(one_line(label, "cyan"), str(depth.depth), f"{depth.groups:,}", *figures)
    return table


def _neighbour_table(near: NeighbourQuality, items: int) -> RenderableType:
    table = new_grid("Neighbours: do they stay neighbours?")
    for name in ("searched", "items looked at", f"recall@{near.k}"):
        table.add_column(name, justify="left" if name == "searched" else "right")
    for probe in near.probing:
        opened = f"{probe.candidates:,.0f} ({percent(probe.candidates / items)})"
        table.add_row(f"nearest {percent(probe.share)}, then exact", opened, f"{probe.recall:.3f}")
    table.add_row("all, by their IDs alone", f"{items:,}", f"{near.recall:.3f}")
    return Group(table, Text(f"By IDs alone: Jaccard@{near.k} {near.jaccard:.3f}, RBO@{near.k} {near.rbo:.3f}"))


def _collision_table(report: QualityReport) -> Table:
    ids = report.ids
    table = facts_view(
        {
            "items that share their ID": percent(ids.shared),
            "collision rate": f"{percent(ids.collision_rate)}, {times(ids.excess)} that of random IDs",
            "most items with one ID": ids.largest_bucket,
        }
    )
    if ids.exact_duplicates is not None:
        table.add_row("repeat another's vector", f"{ids.exact_duplicates:,}")
    table.title = "Collisions"
    return table


def _level_table(report: QualityReport) -> Table:
    table = new_grid("Levels")
    names = ("level", "error", "held out", "collisions", "perplexity", "of K", "Gini", "dead", "largest")
    for name in names:
        table.add_column(name, justify="right")
    unseen = [level.relative_error for level in report.held_out] or [None] * len(report.levels)
    for level, held_out in zip(report.levels, unseen, strict=True):
        table.add_row(
            str(level.level),
            percent(level.relative_error),
            percent(held_out),
            percent(level.collision_rate),
            f"{level.perplexity:,.1f}",
            f"{level.codebook_size:,}",
            f"{level.gini:.2f}",
            f"{level.unused:,}",
            f"{level.largest:,}",
        )
    return table


def _churn_table(churn: ChurnQuality) -> Table:
    table = new_grid(f"Churn: changed since the earlier version, of {churn.common:,} items in both")
    for name in ("first codes", "renamed to fit", "as they are"):
        table.add_column(name, justify="right")
    for depth, (renamed, as_is) in enumerate(zip(churn.per_level, churn.unaligned, strict=True), 1):
        table.add_row(str(depth), percent(renamed), percent(as_is))
    return table


def facts_view(facts: Mapping[str, Any]) -> Table:
    """Names and values, one pair a row."""
    table = new_grid()
    table.show_header = False
    table.add_column(style="cyan")
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, Text(f"{value:,}" if isinstance(value, int) else shown(value)))
    return table


def one_line(text: str, style: str = "") -> Text:
    """A text for the last column of a table: cut where the screen ends."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def indented(what: RenderableType, by: int = 2) -> RenderableType:
    """Moved to the right, below its heading."""
    return Padding(what, (0, 0, 0, by))
