"""Results as Markdown: the tables of ``docs/benchmarks.md``, and of the page beside the files of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from semid_index.bench.compare import OURS, Best, Compared, all_best, compared, raced
from semid_index.bench.gpu_page import FILES as GPU_FILES
from semid_index.bench.gpu_page import gpu_section
from semid_index.bench.harness import TARGETS
from semid_index.bench.measures import growth, ratio, spread
from semid_index.bench.plots import draw_growth, growth_lines
from semid_index.bench.referee import LARGE_CATALOGUE, Judged, Rulings
from semid_index.bench.results import Built, Opened, Point, Results, key_of

RULINGS = ".bytes.json"
"""How the names of the referee's files end."""
GROWTH_TARGET = 0.95
"""The recall at which growth is told."""

_GENERATED = "generated-"
_SHOWN = {"factory": "{}", "lists": "", "rows": "", "ef_construction": ""}  # the factory string says these already
_BUSY = 0.05  # the share of the time that others had
_SMALL = 1_000_000  # bytes that are not worth telling
_CLOSE = 0.25  # what a subject counts may be so far from what is measured


def read_folder(folder: Path) -> tuple[list[Results], list[Rulings]]:
    """All results and rulings of a folder, by name."""
    paths = sorted(set(folder.glob("*.json")) - set(folder.glob(GPU_FILES)))
    results = [Results.load(path) for path in paths if not path.name.endswith(RULINGS)]
    rulings = [Rulings.load(path) for path in paths if path.name.endswith(RULINGS)]
    return sorted(results, key=lambda r: (r.data["name"].startswith(_GENERATED), r.data["rows"])), rulings


def body(folder: Path, plots: str | None) -> str:
    """Everything that the results in a folder say. ``plots``: where its plots are, seen from the page, if anywhere."""
    results, rulings = read_folder(folder)
    sets = [r for r in results if not r.data["name"].startswith(_GENERATED)]
    generated = [r for r in results if r.data["name"].startswith(_GENERATED)]
    parts = [in_short(sets), measured_with(results or rulings)]
    parts += [search_section(one, plots) for one in sets]
    parts += [memory_section(sets)] if sets else []
    parts += [bytes_section(rulings, plots)] if rulings else []
    parts += [growth_section(generated, plots)] if generated else []
    parts += [gpu_section(folder), left_out_section(results)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


# -- in short ---------------------------------------------------------------------------------------------------------


def in_short(sets: Sequence[Results]) -> str:
    """Who wins where, in one table: at each recall the fastest of all, and ours beside the fastest peer."""
    lines = []
    for results in sets:
        for threads in results.threads:
            for target in TARGETS:
                found = all_best(results, "batch", threads, target)
                if found:
                    lines.append(_short_line(results, threads, target, found))
    if not lines:
        return ""
    head = [
        "## In short",
        "",
        "The fastest of all subjects at each recall, batches; then ours, as its multiple of the fastest peer's queries "
        "a second (above 1: ours is faster), by whichever of our tiers is fastest, and by the fastest that counts no "
        "more bytes in memory than that peer. A tie is what was not the same in every round.",
        "",
        "| data | threads | recall@10 | fastest | queries/s | fastest peer | ours / it | within its memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines])


def _short_line(results: Results, threads: int, target: float, found: dict[str, Best]) -> str:
    winner, best = next(iter(found.items()))
    peer = next((name for name in found if not name.startswith(OURS)), None)
    mine = next((name for name in found if name.startswith(OURS)), None)
    freely = within = "-"
    if peer is not None and mine is not None:
        freely = _times(Compared(target, found[mine], found[peer], ratio(found[mine].seconds, found[peer].seconds)))
        row = next((c for c in compared(results, "batch", threads, [target]) if c.peer.point.subject == peer), None)
        within = "none is so small" if row is None else f"{_times(row)} ({row.ours.point.subject})"
    elif mine is None:
        freely = within = "none of ours reaches it"
    name, rate = results.data["name"], _number(best.rate.median)
    return f"| {name} | {threads} | {target} | {winner} | {rate} | {peer or '-'} | {freely} | {within} |"


def _times(row: Compared) -> str:
    """How many times as fast ours is; a tie is called one."""
    text = f"{row.times.median:.2f} x"
    return f"{text}, tie" if row.verdict == "tie" else text


def measured_with(results: Sequence[Results | Rulings]) -> str:
    """The machine and the versions."""
    if not results:
        return ""
    versions: dict[str, str] = {}
    for one in results:
        versions |= one.versions
    machines = list(dict.fromkeys(_machine(one.machine) for one in results))
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return f"Measured on: {'; '.join(machines)}. With {listed}."


def _machine(machine: dict[str, Any]) -> str:
    memory = f", {machine['memory_gb']} GB" if "memory_gb" in machine else ""
    cores = machine["cores"]
    where = f"{machine['system']}, Python {machine['python']}"
    return f"{machine['processor']}, {cores} core{'s' if cores != 1 else ''}{memory}, {where}"


# -- one set of data --------------------------------------------------------------------------------------------------


def search_section(results: Results, plots: str | None) -> str:
    """Plots and tables of one set of data."""
    data = results.data
    parts = [
        f"## {data['name']}: {data['rows']:,} x {data['dim']}, {data['metric']}",
        f"{data['queries']:,} queries, recall@{results.k}; {_effort(results)}",
    ]
    for threads in results.threads:
        title = "1 thread" if threads == 1 else f"{threads} threads"
        parts.append(f"### {data['name']}, {title}")
        if plots is not None:
            stem = f"{plots}/{data['name']}-{threads}t"
            parts.append(f"![Recall against queries a second]({stem}-speed.png)")
        parts.append(speed_table(results, threads))
        race = results.race("batch", threads)
        if race is not None and (race.waited or 0.0) > _BUSY:
            parts.append(
                f"The machine was busy: other programs had the processor {race.waited:.0%} of the time. Believe what "
                "is faster than what, and not the figures themselves."
            )
        if plots is not None:
            parts.append(f"![Memory against queries a second]({stem}-memory.png)")
    if plots is not None and results.threads:
        parts.append(f"![Time to build]({plots}/{data['name']}-build.png)")
    return "\n\n".join(part for part in parts if part)


def _effort(results: Results) -> str:
    """How much was tried."""
    searched = [opened for opened in results.opened if opened.threads == results.opened[0].threads]
    builds, subjects = len(searched), len({opened.subject for opened in searched})
    race = next((race for race in results.races if race.mode == "batch"), None)
    if race is None:
        return f"{builds} builds of {subjects} subjects."
    return (
        f"{builds} builds of {subjects} subjects were searched, and {len(race.contestants)} ways to search them raced, "
        f"rounds: {len(race.rounds)}."
    )


def speed_table(results: Results, threads: int) -> str:
    """At each recall each subject that reaches it: its fastest way, speed, latency, memory, disk, time to build."""
    head = [
        "| recall | subject | how | reached | queries/s (slowest-fastest round) | one query: p50, p99 | "
        "bytes/item in memory, counted (measured) | on disk | build |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = results.data["rows"]
    lines = []
    for target in TARGETS:
        singles = all_best(results, "single", threads, target)
        for name, best in all_best(results, "batch", threads, target).items():
            columns = [
                f"{target}",
                f"**{name}**" if name.startswith(OURS) else name,
                _how(best.point),
                f"{best.point.recall:.3f}",
                f"{_number(best.rate.median)} ({_number(best.rate.least)}-{_number(best.rate.most)})",
                _latency(singles.get(name)),
                _memory(best.opened, rows),
                "" if best.built is None else f"{best.built.disk_bytes / rows:,.0f}",
                _build(best.built),
            ]
            lines.append(f"| {' | '.join(columns)} |")
    notes = [_not_reaching(results, threads), _built_when_busy(results, threads)]
    return "\n\n".join(["\n".join([*head, *lines]), *(note for note in notes if note)])


def _build(built: Built | None) -> str:
    """Seconds; a star where the machine was busy with other work, or nobody knows."""
    return "" if built is None else f"{_seconds(built.seconds)}{'' if built.quiet else '*'}"


def _built_when_busy(results: Results, threads: int) -> str:
    """What the star means: how busy the machine was."""
    starred = [one.built for one in raced(results, "batch", threads) if one.built and not one.built.quiet]
    if not starred:
        return ""
    known = [built.others for built in starred if built.others is not None]
    busy = f"when other programs had {min(known):.1f} to {max(known):.1f} processors on average" if known else "earlier"
    return f"\\* built {busy}: not to be compared with other times."


def _not_reaching(results: Results, threads: int) -> str:
    least = min(TARGETS)
    everyone = dict.fromkeys(best.point.subject for best in raced(results, "batch", threads))
    found = all_best(results, "batch", threads, least)
    texts = []
    for name in everyone:
        if name not in found:
            best = max((p for p in results.points_of(threads, name)), key=lambda p: p.recall)
            texts.append(f"{name} reaches {best.recall:.3f} ({_number(1 / best.cost)} queries/s)")
    return f"Below a recall of {least}: {'; '.join(texts)}." if texts else ""


def _how(point: Point) -> str:
    """Parameters, without those that another one says already."""
    shown = {name: value for name, value in point.parameters.items() if _SHOWN.get(name, "{}")}
    if "factory" in shown:
        return " ".join(filter(None, [f"`{shown['factory']}`", key_of(point.search)]))
    return " ".join(filter(None, [key_of(shown), key_of(point.search)])) or "-"


def _memory(opened: Opened | None, rows: int) -> str:
    if opened is None:
        return ""
    counted = f"{opened.counted / rows:,.0f}"
    return counted if opened.measured is None else f"{counted} ({opened.measured / rows:,.0f})"


def _latency(best: Best | None) -> str:
    if best is None or best.tails is None:
        return ""
    p50, p99 = (spread(values).median for values in (best.seconds, best.tails))
    return f"{_short_time(p50)}, {_short_time(p99)}"


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_section(sets: Sequence[Results]) -> str:
    """What each subject holds in memory, part by part, beside what its process was seen to take."""
    parts = [
        "## Memory, counted and measured",
        "Bytes for an item while it is searched: what each subject says it holds, and by how much the private memory "
        "of its process grew from before it was opened until after it was searched. The first build of each, with the "
        "time until it could be searched. What libraries take once, whatever the number of items, is told apart for "
        "ours: DuckDB, Arrow and BLAS take it when a first tiny index is searched.",
    ]
    for results in sets:
        rows = results.data["rows"]
        table = [
            "| data | subject | parts | counted | measured | measured / counted | once | opened in |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for opened in _first_builds(results):
            held = ", ".join(f"{name} {size / rows:,.1f}" for name, size in _largest_first(opened))
            measured = "" if opened.measured is None else f"{opened.measured / rows:,.0f}"
            columns = [results.data["name"], opened.subject, held, f"{opened.counted / rows:,.0f}", measured]
            columns += [_agreement(opened), _once(opened), _seconds(opened.seconds)]
            table.append(f"| {' | '.join(columns)} |")
        parts.append("\n".join(table))
    return "\n\n".join(parts)


def _first_builds(results: Results) -> Iterator[Opened]:
    seen = set()
    for opened in results.opened:
        if opened.subject not in seen and opened.threads == results.opened[0].threads:
            seen.add(opened.subject)
            yield opened


def _largest_first(opened: Opened) -> list[tuple[str, int]]:
    return sorted(opened.memory.items(), key=lambda part: -part[1])


def _once(opened: Opened) -> str:
    """Megabytes."""
    return "" if not opened.once or opened.once < _SMALL else f"{opened.once / 1e6:,.0f} MB"


def _agreement(opened: Opened) -> str:
    """Measured divided by counted; what is far off is said to be."""
    if opened.measured is None or not opened.counted:
        return ""
    share = opened.measured / opened.counted
    return f"{share:.2f}" if abs(share - 1) <= _CLOSE else f"{share:.2f}, **off**"


# -- codes alone ------------------------------------------------------------------------------------------------------


def bytes_section(rulings: Sequence[Rulings], plots: str | None) -> str:
    """Kinds of code at equal bytes."""
    parts = [
        "## Codes alone, at equal bytes",
        "What codes find by themselves, without any vector to re-rank from. An item's bytes are all it needs: its "
        "code, norms and correction factors, and its share of codebooks, rotations and ranges. So there are two tables "
        "for each set: as it is, and as if ten million items shared the codebooks. `rq` is made with `beam=5, "
        "refine=8`; `sq8` and `sq4` keep as many principal axes as fit.",
    ]
    for ruling in rulings:
        name = ruling.data["name"]
        if plots is not None:
            parts.append(f"![Recall against bytes, {name}]({plots}/{name}-bytes.png)")
        for count in sorted({row.items for row in ruling.judged}):
            parts.append(_bytes_table(ruling, count))
        if ruling.left_out:
            kinds: dict[str, list[str]] = {}
            for what, why in ruling.left_out.items():
                kinds.setdefault(why, []).append(what)
            listed = "; ".join(f"{', '.join(what)}: {why}" for why, what in kinds.items())
            parts.append(f"<details><summary>Left out</summary>\n\n{listed}.\n\n</details>")
    return "\n\n".join(parts)


def _bytes_table(ruling: Rulings, count: int) -> str:
    where = "ten million items" if count == LARGE_CATALOGUE else f"its {count:,} items"
    head = [
        f"**{ruling.data['name']}, {ruling.data['dim']} dimensions, codebooks shared by {where}**",
        "",
        "| bytes | code | taken | code + beside + share | recall@1, 10, 100 | error | train | items/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines = []
    rows = [row for row in ruling.judged if row.items == count]
    for budget in sorted({row.bytes for row in rows}):
        mine = sorted((row for row in rows if row.bytes == budget), key=lambda row: -row.recall["10"])
        lines += [_bytes_line(row, best=row is mine[0]) for row in mine]
    return "\n".join([*head, *lines])


def _bytes_line(row: Judged, *, best: bool) -> str:
    shape = row.shape
    options = key_of(shape["options"]).replace("codebook_size=", "x ").replace("levels=", "")
    name = f"{shape['kind']} {options}"
    parts = f"{shape['code']:g} + {shape['beside']:g} + {shape['shared'] / row.items:.2g}"
    recalls = ", ".join(f"{value:.3f}" for value in row.recall.values())
    columns = [str(row.bytes), f"**{name}**" if best else name, f"{row.total:.2f}", parts, recalls]
    return (
        f"| {' | '.join(columns)} | {row.error:.3f} | {_seconds(row.train_seconds)} | {_number(row.rows_per_second)} |"
    )


# -- growth -----------------------------------------------------------------------------------------------------------


def growth_section(generated: Sequence[Results], plots: str | None) -> str:
    """Time for a query against the number of rows."""
    if not generated:
        return ""
    threads = generated[0].threads[0] if generated[0].threads else 1
    lines = {name: line for (name, t), line in growth_lines(generated, GROWTH_TARGET).items() if t == threads}
    sizes = sorted({rows for line in lines.values() for rows, _, _ in line})
    parts = [
        "## Growth",
        f"Generated vectors of {generated[0].data['dim']} dimensions, threads: {threads}. Microseconds for a query at "
        f"a recall@{generated[0].k} of {GROWTH_TARGET} or more, and the exponent e of the N^e by which they grow.",
    ]
    if plots is not None:
        parts.append(f"![Time against the number of rows]({plots}/growth.png)")
    head = f"| subject | {' | '.join(f'{rows:,}' for rows in sizes)} | e |"
    table = [head, "|---" * (len(sizes) + 2) + "|"]
    for name, line in sorted(lines.items(), key=lambda item: item[1][-1][1]):
        at = {rows: f"{1e6 * seconds:,.0f}" for rows, seconds, _ in line}
        exponent = f"{growth(*zip(*[(n, s) for n, s, _ in line], strict=True)):.2f}" if len(line) > 1 else ""
        table.append(f"| {name} | {' | '.join(at.get(rows, '') for rows in sizes)} | {exponent} |")
    return "\n\n".join([*parts, "\n".join(table)])


def growth_plot(results: Sequence[Results], path: Path) -> Path | None:
    """The plot of that section, if there are results of generated data."""
    generated = [one for one in results if one.data["name"].startswith(_GENERATED) and one.threads]
    return draw_growth(generated, GROWTH_TARGET, generated[0].threads[0], path) if generated else None


# -- what is missing --------------------------------------------------------------------------------------------------


def left_out_section(results: Sequence[Results]) -> str:
    """Subjects that did not run, and those that failed."""
    reasons = [(r.data["name"], name, why) for r in results for name, why in r.skipped.items()]
    failures = [(r.data["name"], name, why) for r in results for name, why in r.failed.items()]
    if not reasons and not failures:
        return "" if not results else "Every subject that was asked for ran; none failed."
    lines = ["## Left out", "", "| data | subject | why |", "|---|---|---|"]
    lines += [f"| {_cells(data, name, why)} |" for data, name, why in [*reasons, *failures]]
    return "\n".join(lines)


def _cells(*texts: str) -> str:
    return " | ".join(text.replace("|", "/").replace("\n", " ") for text in texts)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Three digits."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    if value < 10:
        return f"{value:.1f} s"
    return f"{value:,.0f} s" if value < 600 else f"{value / 60:,.0f} min"


def _short_time(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} us" if seconds < 1e-3 else f"{1e3 * seconds:,.1f} ms"


def summary_rows(results: Results) -> Iterable[dict[str, Any]]:
    """The fastest of each subject at each recall, as plain records for the screen or a program."""
    for threads in results.threads:
        for target in TARGETS:
            singles = all_best(results, "single", threads, target)
            for name, best in all_best(results, "batch", threads, target).items():
                single = singles.get(name)
                yield {
                    "threads": threads,
                    "target": target,
                    "subject": name,
                    "recall": round(best.point.recall, 4),
                    "queries_per_second": round(best.rate.median, 1),
                    "slowest_round": round(best.rate.least, 1),
                    "fastest_round": round(best.rate.most, 1),
                    "p50_us": None if single is None else round(1e6 * spread(single.seconds).median, 1),
                    "p99_us": None
                    if single is None or single.tails is None
                    else round(1e6 * spread(single.tails).median, 1),
                    "bytes_per_item": None if best.memory is None else round(best.memory / results.data["rows"], 1),
                    "build_seconds": None if best.built is None else round(best.built.seconds, 2),
                    "how": _how(best.point).replace("`", ""),
                }
