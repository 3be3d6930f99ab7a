"""What ``benchmarks/gpu_parity.py`` found on a GPU, as Markdown: a section of ``docs/benchmarks.md``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

FILES = "gpu*.json"
"""How the names of its files look; other files of the folder are results of ``semid bench``."""
TARGET = 0.95
"""The recall at which speed is told."""

Row = dict[str, Any]


def gpu_section(folder: Path) -> str:
    """All files of a folder; "" if there is none."""
    paths = sorted(folder.glob(FILES))
    if not paths:
        return ""
    parts = [
        "## On a GPU",
        "By `benchmarks/gpu_parity.py`. What it compares, and how to run it: [GPU](gpu.md#measure-it).",
    ]
    for path in paths:
        figures = json.loads(path.read_text())
        parts += [_measured_on(path.stem, figures["environment"]), *_agreement(figures), *_speed(figures)]
    return "\n\n".join(parts)


def _measured_on(name: str, where: Row) -> str:
    memory = f", {where['gpu_bytes'] / 1e9:.0f} GB" if where.get("gpu_bytes") else ""
    device = f"{where['gpu']}{memory}" if where.get("gpu") else "**no GPU**"
    return f"### {name}\n\n{where['date']}: {device}, {where['cores']} cores, FAISS {where['faiss']}."


def _agreement(figures: dict[str, Any]) -> list[str]:
    """Whether all cases agreed, what did not, how training compares, and what a copy reaches."""
    lines = []
    if rows := figures.get("parity"):
        good = sum(bool(row.get("ok")) for row in rows)
        lines.append(f"- {good} of {len(rows)} cases agree with exact distances and with the CPU{_on_gpu(rows)}.")
    for row in figures.get("training", []):
        if "other_codes" in row:
            seconds = ", ".join(f"{where} {value:.1f} s" for where, value in row["seconds"].items())
            lines.append(
                f"- k-means, {row['codewords']:,} codewords of {row['rows']:,} vectors: {seconds}; "
                f"{row['other_codes']:,} vectors get another code{_on_gpu([row])}."
            )
    for row in figures.get("bandwidth", []):
        if row.get("bytes_per_second"):
            lines.append(f"- A copy reads and writes {row['bytes_per_second'] / 1e9:,.0f} GB a second{_on_gpu([row])}.")
    lines += [f"- **{line}**" for line in _failures(figures)]
    return ["\n".join(lines)] if lines else []


def _failures(figures: dict[str, Any]) -> list[str]:
    """What disagreed or was not done, and how often."""
    found: Counter[str] = Counter()
    for part in ("parity", "training", "bandwidth", "speed"):
        for row in figures.get(part, []):
            name = " ".join(str(row[key]) for key in ("metric", "precision", "case", "subject") if key in row)
            if not row.get("ok", True):
                found[f"{part} {name}: {row.get('error', 'wrong') if 'case' not in row else 'disagrees'}"] += 1
            elif "left_out" in row:
                found[f"{part}: {row['left_out']}"] += 1
    return [text if times == 1 else f"{text} ({times} times)" for text, times in found.items()]


def _on_gpu(rows: list[Row]) -> str:
    return "" if all(row.get("gpu", True) for row in rows) else " (on the CPU)"


def _speed(figures: dict[str, Any]) -> list[str]:
    """For each batch and subject the first setting that reaches the recall, or the best if none does."""
    rows = [row for row in figures.get("speed", []) if "queries_per_second" in row]
    if not rows:
        return []
    chosen: dict[tuple[int, str], Row] = {}
    for row in rows:
        key = row["batch"], row["subject"]
        before = chosen.get(key)
        if before is None or (before["recall@10"] < TARGET and row["recall@10"] > before["recall@10"]):
            chosen[key] = row
    table = [
        f"{rows[0]['rows']:,} x {rows[0]['dim']}, recall@10 of {TARGET} or the most that was reached:",
        "",
        "| batch | subject | on | recall@10 | queries/s (slowest-fastest round) | bytes/item | of copying | build |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (batch, subject), row in sorted(chosen.items(), key=lambda item: (item[0][0], -item[1]["queries_per_second"])):
        slowest, fastest = row["spread"]
        share = row.get("share_of_copy_bandwidth")
        columns = [
            f"{batch:,}",
            f"**{subject}**" if subject.startswith("ours") else subject,
            "GPU" if row["gpu"] else "CPU",
            f"{row['recall@10']:.3f}",
            f"{row['queries_per_second']:,.0f} ({slowest:,.0f}-{fastest:,.0f})",
            f"{row['bytes'] / row['rows']:,.0f}",
            "" if share is None else f"{share:.0%}",
            f"{row['build_seconds']:,.0f} s",
        ]
        table.append(f"| {' | '.join(columns)} |")
    return ["\n".join(table)]
