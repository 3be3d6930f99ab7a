"""The plots of a quality report, as PNGs for light and for dark screens."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidCodesError, MissingDependencyError
from semid_index.report.records import LevelQuality, QualityReport
from semid_index.report.words import BALANCE, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DRAWING = threading.Lock()  # matplotlib's settings are the whole process's
_LABELS_DRAWN = 3  # side by side; the tables have all labels
_BARS_LABELLED = 7  # more bars have no room for figures
_CSS_DPI = 96
_HALF = (4.5, 3.25)  # inches of a plot that stands beside another one
_LEVELS_DRAWN = 6  # lines in one plot; of more levels, as many are picked evenly


@dataclass(frozen=True)
class Plot:
    """One plot, on a light and on a dark ground."""

    name: str
    """For the file: ``probing``."""
    title: str
    reading: str
    """How to read it, in a sentence."""
    size: tuple[int, int]
    """Width and height on a page, in CSS pixels; the images have half as many again, for sharp text."""
    light: bytes
    """A PNG."""
    dark: bytes
    """The same for dark screens."""


@dataclass(frozen=True)
class _Theme:
    ground: str
    ink: str
    faint: str
    lines: tuple[str, ...]


_LIGHT = _Theme("#ffffff", "#24292f", "#c9ced4", ("#1f6fb4", "#c2571a", "#2b8a5f", "#8250a8", "#a0822a", "#5b6570"))
_DARK = _Theme("#161b22", "#d5dae0", "#3f4750", ("#6cb2f2", "#f0975a", "#5fcf9f", "#c79af0", "#d9bd5f", "#9aa5b1"))


@dataclass(frozen=True)
class _Drawing:
    """What is to be drawn: on as many axes side by side as ``panels``."""

    name: str
    title: str
    reading: str
    draw: Callable[[Sequence[Axes], _Theme], None]
    panels: int = 1
    inches: tuple[float, float] = (6.5, 3.5)


def plots(report: QualityReport, codes: Any = None) -> list[Plot]:
    """The plots of a report, in the order of the page.

    ``codes``: the (n, levels) codes that were measured, in any order; without them there is no plot of code frequencies
    and bucket sizes. Needs matplotlib.
    """
    require_matplotlib()
    matrix = None if codes is None else _checked(codes, report)
    return [_rendered(drawing) for drawing in _drawings(report, matrix)]


def require_matplotlib() -> None:
    """Refuse to go on without matplotlib, saying how to get it."""
    try:
        import matplotlib.figure  # noqa: F401 - heavy
    except ImportError as error:
        raise MissingDependencyError(
            "The plots of a report need matplotlib. Run: pip install 'semid-index[report]'"
        ) from error


def save_plots(drawn: Sequence[Plot], folder: Path) -> list[Path]:
    """Write the plots, on light ground, as PNG files into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{plot.name}.png" for plot in drawn]
    for path, plot in zip(paths, drawn, strict=True):
        path.write_bytes(plot.light)
    return paths


def _checked(codes: Any, report: QualityReport) -> NDArray[np.integer]:
    matrix = np.asarray(codes)
    if matrix.shape != (report.items, len(report.codebook_sizes)) or matrix.dtype.kind not in "iu":
        raise InvalidCodesError(
            f"codes must be those of the report, integers of shape ({report.items}, {len(report.codebook_sizes)}), "
            f"not {matrix.dtype} of shape {matrix.shape}."
        )
    return matrix


def _drawings(report: QualityReport, codes: NDArray[np.integer] | None) -> Iterator[_Drawing]:
    if report.labels:
        yield _meaning_drawing(report)
    if report.neighbours is not None and report.neighbours.probing:
        yield _probing_drawing(report)
    if report.hierarchical:
        yield _collision_drawing(report)
    if codes is not None:
        yield _bucket_drawing(codes)
    if any(level.relative_error is not None for level in report.levels):
        yield _error_drawing(report)
    if codes is not None:
        yield _frequency_drawing(report, codes)
    if report.memory is not None:
        yield _memory_drawing(report)
    if report.churn is not None:
        yield _churn_drawing(report)


def _meaning_drawing(report: QualityReport) -> _Drawing:
    shown = list(report.labels.items())[:_LABELS_DRAWN]

    def draw(panels: Sequence[Axes], theme: _Theme) -> None:
        for axes, (name, depths) in zip(panels, shown, strict=True):
            at = [depth.depth for depth in depths]
            for values, shuffled, what, color in (
                ([d.purity for d in depths], [d.shuffled_purity for d in depths], "purity", theme.lines[0]),
                ([d.nmi for d in depths], [d.shuffled_nmi for d in depths], "NMI", theme.lines[1]),
            ):
                axes.plot(at, values, color=color, marker="o", label=what)
                axes.plot(at, shuffled, color=color, marker="o", linestyle=":", alpha=0.75, label=f"{what}, shuffled")
                axes.fill_between(at, shuffled, values, color=color, alpha=0.10, linewidth=0)
            axes.set_title(_plain_text(name))
            axes.set_ylim(0, 1.02)
            _whole_ticks(axes, at, "codes in the prefix")
        _legend_above(panels[0])

    reading = (
        "The gap between a line and its dotted twin is what prefixes know of the label; the dotted line is the same "
        "with labels shuffled, and rises by itself where groups become small."
    )
    return _Drawing(
        "meaning",
        "Do items that begin alike mean the same?",
        reading,
        draw,
        len(shown),
        (max(6.5, 4.0 * len(shown)), 3.5),
    )


def _probing_drawing(report: QualityReport) -> _Drawing:
    near = report.neighbours
    if near is None:
        raise ValueError("there are no neighbours to draw")

    def draw(panels: Sequence[Axes], theme: _Theme) -> None:
        [axes] = panels
        shares = [probe.candidates / report.items for probe in near.probing]
        axes.plot(shares, [probe.recall for probe in near.probing], color=theme.lines[0], marker="o", label="probing")
        axes.axhline(near.recall, color=theme.lines[1], linestyle="--", label="by the IDs alone")
        axes.plot(shares, shares, color=theme.lines[5], linestyle=":", label="random items")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("share of items opened")
        axes.set_ylabel(f"recall@{near.k}")
        axes.xaxis.set_major_locator(_ticks_at(1, 2, 5))
        axes.xaxis.set_major_formatter(_share)
        axes.xaxis.set_minor_formatter(lambda _value, _position: "")
        _legend_above(axes)

    reading = (
        f"How many of the true {near.k} nearest a search meets that opens the nearest prefixes; the further to the "
        "upper left, the fewer items it has to look at."
    )
    return _Drawing("probing", "Do neighbours stay neighbours?", reading, draw)


def _collision_drawing(report: QualityReport) -> _Drawing:
    def draw(panels: Sequence[Axes], theme: _Theme) -> None:
        [axes] = panels
        depths = [level.level for level in report.levels]
        rates = [level.collision_rate or 0.0 for level in report.levels]
        bars = axes.bar(depths, rates, color=theme.lines[0], width=0.6)
        if len(bars) <= _BARS_LABELLED:
            axes.bar_label(bars, [percent(rate) for rate in rates], padding=2, color=theme.ink, fontsize=9)
        axes.set_ylim(0, 1.1)
        axes.yaxis.set_major_formatter(_share)
        _whole_ticks(axes, depths, "codes in the ID")

    reading = "The share of items that would need another ID to be unique, if IDs ended after so many codes."
    return _Drawing("collisions", "Where do IDs become unique?", reading, draw, inches=_HALF)


def _bucket_drawing(codes: NDArray[np.integer]) -> _Drawing:
    sizes = np.unique(codes, axis=0, return_counts=True)[1]

    def draw(panels: Sequence[Axes], theme: _Theme) -> None:
        [axes] = panels
        names, shares = _bucket_bars(sizes)
        bars = axes.bar(names, shares, color=theme.lines[0], width=0.7)
        if len(bars) <= _BARS_LABELLED:
            axes.bar_label(bars, [percent(share) for share in shares], padding=2, color=theme.ink, fontsize=9)
        else:
            axes.tick_params(axis="x", labelrotation=60)
        axes.set_ylim(0, 1.12 * max(shares))
        axes.set_xlabel("items with one ID")
        axes.yaxis.set_major_formatter(_share)

    reading = "The first bar are items with an ID of their own; bars far to the right are IDs that say too little."
    return _Drawing("buckets", "How many items share an ID?", reading, draw, inches=_HALF)


def _bucket_bars(sizes: NDArray[np.int64]) -> tuple[list[str], list[float]]:
    """Shares of the items in buckets of 1, 2, 3-4, 5-8, 9-16 ... items; the last range is the last that has any."""
    groups = np.ceil(np.log2(sizes)).astype(int)
    shares = np.bincount(groups, weights=sizes) / sizes.sum()
    ranges = [(2 ** (group - 1) + 1 if group else 1, 2**group) for group in range(len(shares))]
    return [f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last in ranges], shares.tolist()


def _error_drawing(report: QualityReport) -> _Drawing:
    def draw(panels: Sequence[Axes], theme: _Theme) -> None:
        [axes] = panels
        for levels, what, color in (
            (report.levels, "items of the index" if report.held_out else "all items", theme.lines[0]),
            (report.held_out, "held out", theme.lines[1]),
        ):
            if levels:
                errors = [1.0, *(_or_nan(level.relative_error) for level in levels)]
                axes.plot(range(len(errors)), errors, color=color, marker="o", label=what)
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(_share)
        _whole_ticks(axes, range(len(report.levels) + 1), "levels used")
        if report.held_out:
            _legend_above(axes)

    reading = (
        "The share of the vectors' variance that is left after each level; a level where the line is flat adds bytes "
        "and little else."
    )
    if report.held_out:
        reading += " Where the line of held-out vectors is far above, the codebooks fit their own items too closely."
    return _Drawing("error", "What do the IDs leave unexplained?", reading, draw)


def _frequency_drawing(report: QualityReport, codes: NDArray[np.integer]) -> _Drawing:
    levels = _picked(report.levels, _LEVELS_DRAWN)

    def draw(panels: Sequence[Axes], theme: _Theme) -> None:
        [axes] = panels
        for level, color in zip(levels, theme.lines, strict=False):
            counts = np.sort(np.bincount(codes[:, level.level - 1]))[::-1]
            used = counts[counts > 0]
            label = f"level {level.level}: Gini {level.gini:.2f}" + (f", {level.unused:,} dead" * bool(level.unused))
            axes.plot(np.arange(1, len(used) + 1), used, color=color, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("codes, the most frequent first")
        axes.set_ylabel("items")
        axes.xaxis.set_major_formatter(_count)
        axes.yaxis.set_major_formatter(_count)
        axes.legend(loc="lower left")

    reading = "A flat line is a level whose codes are used alike. " + BALANCE
    return _Drawing("frequencies", "How evenly are codes used?", reading, draw)


def _memory_drawing(report: QualityReport) -> _Drawing:
    memory = report.memory
    if memory is None:
        raise ValueError("there is no memory to draw")

    def draw(panels: Sequence[Axes], theme: _Theme) -> None:
        [axes] = panels
        names = ["embedding table", "codebooks"]
        values = [memory.table_parameters, memory.parameters]
        bars = axes.barh(names, values, color=[theme.lines[5], theme.lines[0]], height=0.5)
        axes.bar_label(bars, [f" {value:,}" for value in values], padding=2, color=theme.ink, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(values))
        axes.set_xlabel("parameters")
        axes.xaxis.set_major_formatter(_count)
        axes.grid(visible=False, axis="y")

    reading = (
        f"A model that reads IDs learns {memory.reduction:,.0f} times fewer parameters than one with a row for every "
        "item, and as many for ten times the items."
    )
    return _Drawing("memory", "What do they cost?", reading, draw, inches=(6.5, 2.0))


def _churn_drawing(report: QualityReport) -> _Drawing:
    churn = report.churn
    if churn is None:
        raise ValueError("there is no churn to draw")

    def draw(panels: Sequence[Axes], theme: _Theme) -> None:
        [axes] = panels
        depths = range(1, len(churn.per_level) + 1)
        axes.plot(depths, churn.per_level, color=theme.lines[0], marker="o", label="codes renamed to fit best")
        axes.plot(depths, churn.unaligned, color=theme.lines[1], marker="o", linestyle=":", label="codes as they are")
        axes.set_ylim(-0.02, 1.05)
        axes.yaxis.set_major_formatter(_share)
        _whole_ticks(axes, depths, "codes in the prefix")
        _legend_above(axes)

    reading = (
        "The share of items whose first codes changed between the two versions; the dotted line is what somebody sees "
        "who stored the codes, the other one how far items really moved."
    )
    return _Drawing("churn", "What changed since the earlier version?", reading, draw)


# -- drawing ----------------------------------------------------------------------------------------------------------


def _rendered(drawing: _Drawing) -> Plot:
    width, height = (round(_CSS_DPI * length) for length in drawing.inches)
    light, dark = (_png(drawing, theme) for theme in (_LIGHT, _DARK))
    return Plot(drawing.name, drawing.title, drawing.reading, (width, height), light, dark)


def _png(drawing: _Drawing, theme: _Theme) -> bytes:
    """The drawing as a PNG, on a figure of its own, so that no open figure or setting of the caller's is touched."""
    import matplotlib as mpl  # heavy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _DRAWING, mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # in a label's name; a box is drawn
        mpl.rcdefaults()  # a person's own style must not make a page unreadable
        mpl.rcParams.update(_settings(theme))
        figure = Figure(figsize=drawing.inches, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, drawing.panels, squeeze=False, sharey=True)[0]
        drawing.draw(list(panels), theme)
        return _saved(figure)


def _saved(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=1.5 * _CSS_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _settings(theme: _Theme) -> Any:
    return {
        "figure.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "grid.alpha": 0.5,
        "grid.linewidth": 0.6,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "font.size": 10,
        "lines.markersize": 4,
        "lines.linewidth": 1.8,
        "text.parse_math": False,
    }


def _legend_above(axes: Axes) -> None:
    """One legend for all panels, above them, where no line can be."""
    figure = axes.figure
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _ticks_at(*digits: float) -> Any:
    """Ticks of a logarithmic axis at these multiples of powers of ten."""
    from matplotlib.ticker import LogLocator  # heavy

    return LogLocator(subs=digits)


def _whole_ticks(axes: Axes, at: Sequence[int], label: str) -> None:
    """Ticks at whole numbers, at most twelve of them."""
    axes.set_xticks(list(at)[:: max(1, -(-len(at) // 12))])
    axes.set_xlabel(label)
    axes.grid(visible=False, axis="x")


def _plain_text(text: str) -> str:
    """A user's text in a plot: short, and without the characters that fonts have no shapes for."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= 40 else printable[:39] + "..."


def _picked(levels: Sequence[LevelQuality], most: int) -> list[LevelQuality]:
    """Some of the levels, evenly, the first and the last among them."""
    places = np.unique(np.linspace(0, len(levels) - 1, min(most, len(levels))).round().astype(int))
    return [levels[place] for place in places]


def _share(value: float, _position: object = None) -> str:
    return f"{100 * value:.3g} %" if -1e-9 <= value <= 1 + 1e-9 else ""


def _count(value: float, _position: object = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
