"""The plots of a benchmark, as PNG files."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semid_index.bench.compare import Best, all_best, raced
from semid_index.bench.measures import front, growth
from semid_index.bench.referee import LARGE_CATALOGUE, Rulings
from semid_index.bench.results import Built, Mode, Results
from semid_index.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DRAWING = threading.Lock()  # matplotlib's settings are the whole process's
_DPI = 150
_INK, _FAINT, _GROUND = "#24292f", "#c9ced4", "#ffffff"
_RECALLS = (0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
_WIDE = 2_000  # an axis that spans more has no labels between powers of ten
_LEAST_MISSED = 4e-4  # a recall of 1 is drawn here, for a logarithm has no zero
_SETTINGS: Any = {
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": _GROUND,
    "font.size": 9.5,
    "grid.color": _FAINT,
    "grid.alpha": 0.45,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.markersize": 4.5,
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class _Style:
    color: str
    marker: str
    ours: bool = False

    @property
    def line(self) -> dict[str, Any]:
        """For matplotlib: ours in front, and thicker."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linewidth": 2.4 if self.ours else 1.4,
            "zorder": 5 if self.ours else 3,
            "markeredgecolor": _GROUND,
            "markeredgewidth": 0.5,
        }


_STYLES = {
    "semid-float32": _Style("#0b5cad", "o", True),
    "semid-float16": _Style("#3f8fdc", "s", True),
    "semid-int8": _Style("#17a2b8", "D", True),
    "semid-file": _Style("#7a5cd6", "^", True),
    "semid-codes": _Style("#4a4fb0", "v", True),
    "faiss-flat": _Style("#8c939b", "P"),
    "faiss-ivf-flat": _Style("#e0a100", "o"),
    "faiss-ivf-pq": _Style("#d1481f", "o"),
    "faiss-ivf-rabitq": _Style("#e58a6b", "s"),
    "faiss-ivf-sq8": _Style("#b8860b", "D"),
    "faiss-hnsw": _Style("#a61e4d", "^"),
    "hnswlib": _Style("#2b8a3e", "o"),
    "usearch": _Style("#74b816", "s"),
    "scann": _Style("#8d5524", "o"),
    "duckdb": _Style("#343a40", "X"),
    "rq": _Style("#0b5cad", "o", True),
    "balanced-rq": _Style("#3f8fdc", "s", True),
    "opq": _Style("#d1481f", "o"),
    "pq": _Style("#e58a6b", "s"),
    "lsq": _Style("#2b8a3e", "o"),
    "rabitq": _Style("#a61e4d", "^"),
    "sq8": _Style("#b8860b", "D"),
    "sq4": _Style("#e0a100", "D"),
    "binary": _Style("#8c939b", "P"),
}
_OTHERS = ("#5f3dc4", "#087f5b", "#c2255c", "#5c940d")


def _style(name: str) -> _Style:
    return _STYLES.get(name) or _Style(_OTHERS[sum(map(ord, name)) % len(_OTHERS)], "h")


@contextmanager
def _figure(inches: tuple[float, float], path: Path, panels: int = 1, **shared: Any) -> Iterator[list[Axes]]:
    """A figure of its own, which is written when the block ends; no setting of the caller's is touched."""
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "The plots of a benchmark need matplotlib. Run: pip install 'semid-index[bench]'"
        ) from error
    with _DRAWING, mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        figure: Figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(1, panels, squeeze=False, **shared)[0])
        part = path.with_suffix(".part.png")
        figure.savefig(part, dpi=_DPI, metadata={"Software": None})
        part.replace(path)


# -- one set of data --------------------------------------------------------------------------------------------------


def draw_all(results: Results, folder: Path) -> list[Path]:
    """All plots of one set of data: ``<data>-speed-<threads>.png`` and so on."""
    drawn = []
    for threads in results.threads:
        name = f"{results.data['name']}-{threads}t"
        drawn.append(draw_speed(results, "batch", threads, folder / f"{name}-speed.png"))
        drawn.append(draw_memory(results, threads, 0.95, folder / f"{name}-memory.png"))
    drawn.append(draw_builds(results, folder / f"{results.data['name']}-build.png"))
    return [path for path in drawn if path is not None]


def draw_speed(results: Results, mode: Mode, threads: int, path: Path) -> Path | None:
    """Recall against queries a second: of each subject the front, with the spread of its rounds."""
    everyone = raced(results, mode, threads)
    if not everyone:
        return None
    names = list(dict.fromkeys(best.point.subject for best in everyone))
    with _figure((8.2, 4.9), path) as [axes]:
        ends = []
        for name in names:
            mine = [best for best in everyone if best.point.subject == name]
            line = front(mine, lambda b: b.rate.median, lambda b: -b.point.recall)
            at = [_missed(best.point.recall) for best in line]
            rates = [best.rate for best in line]
            axes.plot(at, [rate.median for rate in rates], label=name, **_style(name).line)
            axes.vlines(
                at, [r.least for r in rates], [r.most for r in rates], color=_style(name).color, alpha=0.35, linewidth=3
            )
            ends.append(_best_rate(line))
        overall = front(everyone, lambda b: b.rate.median, lambda b: -b.point.recall)
        axes.plot(
            [_missed(b.point.recall) for b in overall],
            [b.rate.median for b in overall],
            color=_INK,
            alpha=0.13,
            linewidth=9,
            solid_capstyle="round",
            zorder=1,
            label="the best of all",
        )
        _recall_axis(axes, min(best.point.recall for best in everyone))
        _logarithmic(axes, "y")
        axes.set_ylabel("queries a second")
        axes.set_title(_title(results, f"{mode}, {_threads(threads)}"))
        _legend(axes, [names[i] for i in sorted(range(len(names)), key=lambda i: -ends[i])])
    return path


def _best_rate(line: Sequence[Best]) -> float:
    """The speed at a recall of 0.95, or the speed of the best recall there is, far behind: the order of a legend."""
    able = [best.rate.median for best in line if best.point.recall >= 0.95]
    return max(able) if able else 1e-9 * max(best.point.recall for best in line)


def draw_memory(results: Results, threads: int, target: float, path: Path) -> Path | None:
    """Memory against speed, of the fastest of each subject's builds that reach a recall."""
    rows = results.data["rows"]
    everyone = [b for b in raced(results, "batch", threads) if b.point.recall >= target and b.memory]
    builds: dict[tuple[str, str], Best] = {}
    for best in everyone:
        key = best.point.key[:2]
        if key not in builds or best.rate.median > builds[key].rate.median:
            builds[key] = best
    if not builds:
        return None
    with _figure((8.2, 4.4), path) as [axes]:
        names = list(dict.fromkeys(name for name, _ in builds))
        for name in names:
            mine = [best for (subject, _), best in builds.items() if subject == name]
            style = _style(name)
            axes.scatter(
                [(best.memory or 0) / rows for best in mine],
                [best.rate.median for best in mine],
                s=75 if style.ours else 45,
                color=style.color,
                marker=style.marker,
                edgecolors=_GROUND,
                linewidths=0.7,
                zorder=5 if style.ours else 3,
                label=name,
            )
        least = front(list(builds.values()), lambda b: b.rate.median, lambda b: float(b.memory or 0))
        axes.step(
            [(b.memory or 0) / rows for b in least],
            [b.rate.median for b in least],
            where="post",
            color=_INK,
            alpha=0.35,
            linewidth=1,
            linestyle="--",
            zorder=2,
            label="nothing smaller is faster",
        )
        _logarithmic(axes, "xy")
        axes.set_xlabel("bytes in memory for an item, everything counted")
        axes.set_ylabel("queries a second")
        axes.set_title(_title(results, f"at recall@{results.k} of {target} or more, {_threads(threads)}"))
        _legend(axes, names)
    return path


def draw_builds(results: Results, path: Path) -> Path | None:
    """The time to build what is fastest at a recall of 0.95, or at the best that a subject reaches."""
    if not results.threads:
        return None
    threads = results.threads[0]
    builds: dict[str, Built] = {}
    for best in raced(results, "batch", threads):
        fast = all_best(results, "batch", threads, 0.95).get(best.point.subject, best)
        if fast.built is not None:
            builds[best.point.subject] = fast.built
    if not builds:
        return None
    chosen = {name: built.seconds for name, built in builds.items()}
    order = sorted(chosen, key=lambda name: -chosen[name])
    with _figure((8.2, 0.9 + 0.27 * len(order)), path) as [axes]:
        bars = axes.barh(order, [chosen[name] for name in order], color=[_style(n).color for n in order], height=0.65)
        labels = [f"{_seconds(chosen[name])}{'' if builds[name].quiet else '*'}" for name in order]
        axes.bar_label(bars, labels, padding=3, fontsize=8.5)
        axes.set_xscale("log")
        axes.set_xlim(right=3 * max(chosen.values()))
        axes.xaxis.set_major_formatter(lambda value, _: _seconds(value))
        axes.grid(visible=False, axis="y")
        built = results.built[0].threads
        star = "" if all(each.quiet for each in builds.values()) else "; * on a busy machine"
        axes.set_xlabel(f"from vectors in memory to files that can be opened, {_threads(built)}{star}")
        axes.set_title(_title(results, "time to build"))
    return path


# -- codes alone, and growth ------------------------------------------------------------------------------------------


def draw_bytes(rulings: Rulings, path: Path) -> Path | None:
    """Recall of codes alone against bytes in all, for each number of items that share the codebooks."""
    counts = sorted({row.items for row in rulings.judged})
    if not counts:
        return None
    with _figure((8.6, 4.2), path, len(counts), sharey=True) as panels:
        kinds = list(dict.fromkeys(row.shape["kind"] for row in rulings.judged))
        for axes, count in zip(panels, counts, strict=True):
            for kind in kinds:
                rows = [row for row in rulings.judged if row.items == count and row.shape["kind"] == kind]
                rows.sort(key=lambda row: row.total)
                axes.plot([r.total for r in rows], [r.recall["10"] for r in rows], label=kind, **_style(kind).line)
            axes.set_xscale("log", base=2)
            axes.set_xlim(
                *(factor * edge(row.total for row in rulings.judged) for factor, edge in ((0.85, min), (1.2, max)))
            )
            axes.xaxis.set_major_formatter(_count)
            axes.set_ylim(0, 1)
            whose = "ten million items" if count == LARGE_CATALOGUE else f"its {count:,} items"
            axes.set_title(f"{rulings.data['name']}: {whose} share codebooks", fontsize=9)
            axes.set_xlabel("bytes of an item, everything counted")
        panels[0].set_ylabel("recall@10 of codes alone")
        last = {kind: max(r.recall["10"] for r in rulings.judged if r.shape["kind"] == kind) for kind in kinds}
        _legend(panels[-1], sorted(kinds, key=lambda kind: -last[kind]))
    return path


def growth_lines(
    all_results: Iterable[Results], target: float
) -> dict[tuple[str, int], list[tuple[int, float, float]]]:
    """Subject and threads -> (rows, seconds a query, seconds to build), where a recall is reached; generated data."""
    lines: dict[tuple[str, int], list[tuple[int, float, float]]] = {}
    for results in all_results:
        for threads in results.threads:
            for name, best in all_best(results, "batch", threads, target).items():
                built = best.built.seconds if best.built else float("nan")
                lines.setdefault((name, threads), []).append((results.data["rows"], 1 / best.rate.median, built))
    return {key: sorted(line) for key, line in lines.items()}


def draw_growth(all_results: Sequence[Results], target: float, threads: int, path: Path) -> Path | None:
    """Time of a query, and of building, against the number of rows; with the exponent of each line."""
    lines = {name: line for (name, t), line in growth_lines(all_results, target).items() if t == threads}
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    dim = all_results[0].data["dim"]
    with _figure((9.4, 4.9), path, 2) as [left, right]:
        for name, line in lines.items():
            rows, queries, builds = zip(*line, strict=True)
            exponent = growth(rows, queries)
            left.plot(rows, [1e6 * s for s in queries], label=f"{name}  N^{exponent:.2f}", **_style(name).line)
            right.plot(rows, builds, label=f"{name}  N^{growth(rows, builds):.2f}", **_style(name).line)
        for axes, what, order in (
            (left, f"microseconds for a query at recall {target}", 1),
            (right, "seconds to build", 2),
        ):
            _logarithmic(axes, "xy")
            axes.set_xlabel(f"rows of {dim} dimensions, generated")
            axes.set_title(what)
            handles, labels = axes.get_legend_handles_labels()
            slowest = sorted(range(len(labels)), key=lambda i: -list(lines.values())[i][-1][order])
            handles, labels = ([entries[i] for i in slowest] for entries in (handles, labels))
            axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(-0.1, -0.16), ncols=2)
    return path


# -- parts ------------------------------------------------------------------------------------------------------------


def _title(results: Results, what: str) -> str:
    data = results.data
    return f"{data['name']}, {data['rows']:,} x {data['dim']}, {data['metric']}: {what}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _missed(recall: float) -> float:
    return max(_LEAST_MISSED, 1 - recall)


def _logarithmic(axes: Axes, which: str) -> None:
    """Logarithmic axes with plain numbers: at the powers of ten and, where there are few of these, at 2 and 5, too."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        least, most = getattr(axes, f"get_{name}lim")()
        axis.set_major_formatter(_count)
        axis.set_minor_formatter(_count_if_two_or_five if most < _WIDE * least else _nothing)


def _nothing(_value: float, _position: object = None) -> str:
    return ""


def _recall_axis(axes: Axes, least: float) -> None:
    """Recall from left to right, the last percents drawn wide: a logarithmic axis of what is missed."""
    axes.set_xscale("log")
    axes.set_xlim(1.15 * max(0.1, 1 - least), 0.85 * _LEAST_MISSED)
    ticks = [value for value in _RECALLS if value >= least - 0.05]
    axes.set_xticks([*(1 - value for value in ticks), _LEAST_MISSED], [*(f"{value:g}" for value in ticks), "1"])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("recall, the last percents drawn wide")


def _legend(axes: Axes, order: Sequence[str]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    names = [*(name for name in order if name in known), *(name for name in labels if name not in order)]
    axes.legend([known[name] for name in names], names, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s" if value < 120 else f"{value / 60:,.0f} min"


def _count(value: float, _position: object = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _count_if_two_or_five(value: float, _position: object = None) -> str:
    digit = f"{value:e}"[0]
    return _count(value) if digit in "25" else ""
