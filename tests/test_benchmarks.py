"""The benchmark scripts run, on 2,000 rows, and count as they should."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_main_job_runs_on_the_sample(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.main_job", "--tiny", "--rounds", "1", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert set(found) == {f"{part} sample" for part in ("train", "encode", "build", "open", "search", "import")}
    searched = found["search sample"]["codebooks 32"]
    recalls = [row["recall@10"] for name, row in searched.items() if name.startswith("ours")]
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.95
    assert searched["memory bytes per item"]["vectors"] == 4 * 384


def test_quality_runs_on_the_sample(tmp_path):
    output = tmp_path / "targets.json"
    command = [sys.executable, "-m", "benchmarks.quality", "targets", "--tiny", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = {row["subject"]: row for row in json.loads(output.read_text())}
    assert rows["rq, beam 5"]["error"] < rows["rq"]["error"] < rows["rq, not refined"]["error"] < rows["pq"]["error"]
    assert rows["rq"]["error"] <= 1.005 * rows["FAISS ResidualQuantizer, beam 1"]["error"]
    assert rows["rq"]["recall"] > rows["opq"]["recall"]


def test_prefixes_run_on_the_sample():
    command = [sys.executable, "-m", "benchmarks.prefixes", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 12


@pytest.mark.parametrize(
    ("found", "share"), [([[1, 2], [3, 4]], 1.0), ([[2, 9], [9, 8]], 0.25), ([[7, 8], [7, 8]], 0.0)]
)
def test_recall_by_hand(found, share, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.main_job import recall

    assert recall(np.array(found), np.array([[1, 2], [4, 3]])) == share


def test_filtered_runs_on_the_sample(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.filtered", "--tiny", "--rounds", "1", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())["sample"]
    assert len(found) == 8
    for name, subjects in found.items():
        assert subjects["ours"]["rows"] == subjects["exact on the matches"]["rows"] > 0, name
        assert subjects["ours"]["recall@10"] > 0.95, name
        assert subjects["exact on the matches"]["recall@10"] > 0.999, name


def test_retrain_runs_on_the_sample():
    command = [sys.executable, "-m", "benchmarks.retrain", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    churn = {}
    for line in done.stdout.splitlines():
        words = line.split("churn")[1].split()
        churn.setdefault(line[11:23].strip(), []).append(float(words[0].rstrip("%")))
    assert set(churn) == {"rq", "balanced-rq", "rq, refined"}
    for was, scratch, aligned, *again in churn.values():
        assert was == 0 < min(again) <= max(again) < aligned < scratch


def test_latency_runs_on_the_sample(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.latency", "--tiny", "--rounds", "1", "--json", str(figures)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(figures.read_text())["sample"]
    assert set(found) == {"ours, tuned", "ours, defaults", "FAISS, tuned", "batch"}
    batch = found.pop("batch")
    assert batch["ratio"] == pytest.approx(batch["2"] / batch["1"], rel=0.01)
    for label, row in found.items():
        assert row["recall@10"] >= 0.95, label
        assert 0 < row["p50"] <= row["p99"], label


def test_opening_runs_on_the_sample(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.opening", "--tiny", "--rounds", "1", "--tiers", "int8"]
    done = subprocess.run([*command, "--json", str(figures)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())["2 threads"]
    built, opened = found["build int8"], found["open int8"]
    assert built["bytes per item"] > 384
    assert built["total"]["s"] == pytest.approx(sum(part["s"] for part in built["parts"].values()))
    assert opened["recall"] > 0.9
    assert 0 < opened["second search"]["s"] < opened["total"]["s"]
