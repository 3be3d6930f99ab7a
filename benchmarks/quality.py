"""Codes of equal size compared: their errors, what they find by themselves, and what making them costs.

    python -m benchmarks.quality targets      # rq against FAISS's residual quantizer and OPQ at 4, 8 and 16 bytes
    python -m benchmarks.quality starts       # where k-means starts: the first axes, or all dimensions at once
    python -m benchmarks.quality depths       # the error after each level, by how codebooks are trained
    python -m benchmarks.quality published    # beauty beside figures that others published

Everything is trained on 30,000 rows of ``debian`` and measured on the 61,666 rows that are left when 2,000 are held out
as queries. "error" is the squared error of the decoded vectors over their variance; "recall" compares the 10 nearest by
decoded vectors with the true 10 nearest. Rows per second are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import datasets
from semid_index.plugins import quantizer_class
from semid_index.quantizers.beam import choose_codes
from semid_index.quantizers.kmeans import import_faiss, kmeans, nearest
from semid_index.quantizers.refine import mean_error
from semid_index.report.measures import perplexity
from semid_index.report.quality import quality

TRAINED_ON = 30_000
WORDS = 256
TINY_WORDS = 64
BEAM = 5
REFINE = 8
TIMED_ROWS = 10_000


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    subject: str
    bytes: int
    error: float
    recall: float
    train_seconds: float
    rows_per_second: float | None = None


@dataclass(frozen=True)
class Subject:
    """Something that makes codes: how it is trained, and how vectors are then encoded and decoded."""

    name: str
    train: Callable[[np.ndarray], tuple[Callable, Callable]]
    """Gives (vectors -> codes, codes -> vectors)."""


def faiss_residual(levels: int, words: int, beam: int) -> Subject:
    """FAISS's residual quantizer as it comes: trained with a beam of 5, encoding with residuals instead of tables."""

    def train(rows: np.ndarray) -> tuple[Callable, Callable]:
        faiss = import_faiss()
        quantizer = faiss.ResidualQuantizer(rows.shape[1], levels, bits(words))
        quantizer.train(rows)
        quantizer.max_beam_size = beam
        return quantizer.compute_codes, quantizer.decode

    return Subject(f"FAISS ResidualQuantizer, beam {beam}", train)


def bits(words: int) -> int:
    """Of a number of one of so many words."""
    return (words - 1).bit_length()


def ours(name: str, levels: int, words: int, label: str = "", **options) -> Subject:
    def train(rows: np.ndarray) -> tuple[Callable, Callable]:
        made = quantizer_class(name)(levels=levels, codebook_size=words, **options).fit(rows)
        return made.encode, made.decode

    return Subject(label or name, train)


def subjects(*shape: int) -> Iterator[Subject]:
    """All that make codes of so many levels, with so many words each."""
    levels, words = shape
    yield faiss_residual(*shape, 1)
    yield ours("rq", *shape, "rq", refine=REFINE)
    yield faiss_residual(*shape, BEAM)
    yield ours("rq", *shape, f"rq, beam {BEAM}", refine=REFINE, beam=BEAM)
    yield ours("rq", *shape, "rq, not refined", refine=0)
    yield ours("balanced-rq", *shape)
    yield ours("opq", *shape)
    yield ours("pq", *shape)
    yield ours("binary", levels * bits(words) // 8, 256)  # its levels are bytes
    if levels <= 8:
        yield ours("lsq", *shape)
        yield ours("prq", *shape)
    if levels == 16:
        yield ours("rabitq", *shape, "rabitq of 64 principal axes", dims=64)


def compare(levels: int, words: int, data: datasets.Dataset) -> list[Row]:
    """All subjects at so many bytes."""
    size = levels * bits(words) // 8
    rows, faiss = data.base[:TRAINED_ON], import_faiss()
    variance = float(np.square(data.base - data.base.mean(axis=0)).sum(axis=1).mean())
    timed: dict[str, Callable] = {}
    results = []
    for subject in subjects(levels, words):
        started = time.perf_counter()
        encode, decode = subject.train(rows)
        seconds = time.perf_counter() - started
        decoded = decode(encode(data.base))
        error = float(np.square(data.base - decoded).sum(axis=1).mean()) / variance
        _, found = faiss.knn(data.queries, decoded, 10)
        hits = (found[:, :, None] == data.neighbours[:, None]).any(axis=2).mean()
        if "ResidualQuantizer" in subject.name or subject.name.startswith("rq"):
            timed[subject.name] = encode
        results.append(Row(subject.name, size, error, float(hits), seconds))
        print(f"{size:3} bytes  {subject.name:32} error {error:.4f}  recall@10 {hits:.3f}  trained in {seconds:.1f} s")
    speeds = encoding_speeds(timed, data.base)
    return [Row(**{**asdict(row), "rows_per_second": speeds.get(row.subject)}) for row in results]


def encoding_speeds(encoders: dict[str, Callable], vectors: np.ndarray, rounds: int = 3) -> dict[str, float]:
    """Rows per second of each, in interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for turn in range(rounds):
        rows = np.ascontiguousarray(vectors[turn::rounds][:TIMED_ROWS])
        for name, encode in encoders.items():
            started = time.perf_counter()
            encode(rows)
            times[name].append(len(rows) / (time.perf_counter() - started))
    return {name: statistics.median(each) for name, each in times.items()}


def targets(folder: Path, output: Path | None, *, tiny: bool) -> None:
    """The table, and whether rq is at least as good as it should be."""
    data = datasets.load("sample" if tiny else "debian", folder)
    shapes = [(4, TINY_WORDS)] if tiny else [(levels, WORDS) for levels in (4, 8, 16)]
    results = [row for shape in shapes for row in compare(*shape, data)]
    print()
    print("| bytes | codes | error | recall@10 | train s | encoded rows/s |")
    print("|---|---|---|---|---|---|")
    for row in results:
        speed = f"{row.rows_per_second:,.0f}" if row.rows_per_second else ""
        print(
            f"| {row.bytes} | {row.subject} | {row.error:.4f} | {row.recall:.3f} | {row.train_seconds:.1f} | {speed} |"
        )
    print()
    by = {(row.bytes, row.subject): row for row in results}
    for size in sorted({row.bytes for row in results}):
        for beam, name in ((1, "rq"), (BEAM, f"rq, beam {BEAM}")):
            mine, theirs = by[size, name], by[size, f"FAISS ResidualQuantizer, beam {beam}"]
            print(f"{size} bytes, beam {beam}: error {mine.error / theirs.error:.3f} x FAISS (at most 1.005 wanted),")
            print(f"    recall@10 {mine.recall:.3f}, OPQ {by[size, 'opq'].recall:.3f} (more wanted)")
        mine, theirs = by[size, f"rq, beam {BEAM}"], by[size, f"FAISS ResidualQuantizer, beam {BEAM}"]
        ratio = mine.rows_per_second / theirs.rows_per_second
        print(f"    beam {BEAM}: {mine.rows_per_second:,.0f} rows/s, {ratio:.1f} x FAISS (2 wanted at 8 bytes)")
        print(f"    greedy: {by[size, 'rq'].rows_per_second:,.0f} rows/s (100,000 wanted at 4 bytes)")
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in results], indent=1) + "\n")


def starts(folder: Path) -> None:
    """Error and perplexity of four levels of 256, by where k-means starts."""
    faiss = import_faiss()

    def at_once(points: np.ndarray, seed: int) -> np.ndarray:
        theirs = faiss.Kmeans(points.shape[1], 256, niter=20, seed=seed, min_points_per_centroid=1)
        theirs.train(points)
        return theirs.centroids

    ways = {"all dimensions at once": at_once, "the first axes": lambda points, seed: kmeans(points, 256, seed=seed)}
    for name in ("debian", "sift128"):
        vectors = datasets.load(name, folder).base
        rows = vectors[np.random.default_rng(0).permutation(len(vectors))[:TRAINED_ON]]
        variance = float(np.square(rows - rows.mean(axis=0)).sum(axis=1).mean())
        for way, train in ways.items():
            residuals, started, levels = rows, time.perf_counter(), []
            for level in range(4):
                codebook = train(np.ascontiguousarray(residuals), level)
                chosen = nearest(residuals, codebook)
                residuals = residuals - codebook[chosen]
                error = float(np.square(residuals).sum(axis=1).mean()) / variance
                levels.append(f"{error:.4f} ({perplexity(np.bincount(chosen, minlength=256)):.0f})")
            seconds = time.perf_counter() - started
            print(f"{name:8} {way:24} error (perplexity) {', '.join(levels)}; {seconds:.1f} s")


def depths(folder: Path) -> None:
    """Errors of unseen rows after each level, encoded greedily, for codebooks trained in several ways."""
    data, faiss = datasets.load("debian", folder), import_faiss()
    rows, unseen = data.base[:TRAINED_ON], data.base[TRAINED_ON:]
    variance = float(np.square(unseen - unseen.mean(axis=0)).sum(axis=1).mean())
    theirs = faiss.ResidualQuantizer(rows.shape[1], 4, 8)
    theirs.train(rows)
    words = faiss.vector_to_array(theirs.codebooks).reshape(4, 256, -1)
    ways = {"FAISS, trained with a beam of 5": list(words)}
    for options in ({}, {"refine": 4}, {"refine": REFINE}, {"refine": REFINE, "prefix_levels": 1}):
        ways[f"rq {options}"] = quantizer_class("rq")(levels=4, **options).fit(rows).codebooks
    for way, codebooks in ways.items():
        codes = choose_codes(unseen, codebooks, 1)
        errors = (mean_error(unseen, codebooks[:depth], codes[:, :depth]) / variance for depth in range(1, 5))
        best = mean_error(unseen, codebooks, choose_codes(unseen, codebooks, BEAM)) / variance
        print(f"{way:36} {' '.join(f'{error:.4f}' for error in errors)}; with a beam of {BEAM} {best:.4f}", flush=True)


def published(folder: Path) -> None:
    """``beauty`` at 3 x 256 beside what others published of sets like it, and the IDs that others made for it."""
    vectors, items, others = datasets.beauty(folder)
    shown = {"second category": np.array([([*path, "", ""])[1] for path in items["category"].to_pylist()])}
    ways = {"rq": {}, "rq, refine=8": {"refine": REFINE}, "balanced-rq": {}}
    print("| codes | mean squared error a dimension | perplexity | entropy / ln K | collision rate |")
    print("|---|---|---|---|---|")
    reports = {}
    for way, options in ways.items():
        made = quantizer_class(way.split(",")[0])(levels=3, codebook_size=256, **options).fit(vectors)
        reports[way] = report = quality(
            made.encode(vectors), 256, vectors=vectors, codebooks=made.codebooks, labels=shown, metric="cosine"
        )
        columns = (
            " / ".join(f"{level.error / vectors.shape[1]:.6f}" for level in report.levels),
            " / ".join(f"{level.perplexity:.1f}" for level in report.levels),
            " / ".join(f"{level.normalized_entropy:.3f}" for level in report.levels),
            f"{report.ids.collision_rate:.2%}",
        )
        print(f"| {way} | {' | '.join(columns)} |")
    for name in others.column_names[2:]:
        codes = np.array(others[name].to_pylist())
        ordered = "opq" not in name
        reports[name] = quality(codes, 256, vectors=vectors, labels=shown, metric="cosine", hierarchical=ordered)
    print()
    print(
        "| IDs | codes | purity of one code (by chance) | lift | recall@10 by IDs alone | items sharing an ID | error |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, report in reports.items():
        label = report.labels["second category"][0]
        meaning = (
            f"{label.purity:.1%} ({label.shuffled_purity:.1%}) | {label.lift:.2f}" if label.depth == 1 else "- | -"
        )
        neighbours, left = f"{report.neighbours.recall:.3f}", f"{report.levels[-1].relative_error:.1%}"
        print(f"| {name} | {len(report.levels)} | {meaning} | {neighbours} | {report.ids.shared:.1%} | {left} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["targets", "starts", "depths", "published"])
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER, help="the folder with the data sets")
    parser.add_argument("--tiny", action="store_true", help="`targets` at 3 bytes on the bundled sample")
    parser.add_argument("--output", type=Path, help="write the table of `targets` as JSON too")
    arguments = parser.parse_args()
    if arguments.what == "targets":
        targets(arguments.data, arguments.output, tiny=arguments.tiny)
    else:
        {"starts": starts, "depths": depths, "published": published}[arguments.what](arguments.data)


if __name__ == "__main__":
    main()
