"""What the tests share: vectors in clusters, a small index file, and a way to run code in another process."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for every core: more threads would only get in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy reads this once, when it is imported

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")
pytest.register_assert_rewrite("semid_index.testing")

ROOT = Path(__file__).resolve().parent.parent
LONGEST = (
    "test_quality_runs_on_the_sample",
    "test_any_sequence_of_calls",
    "test_bench.py",
    "test_docs.py",
    "test_65_536",
)
"""What takes ten seconds or more each, by a part of its name."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker still has such a test when the others have nothing left."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``gpu`` is skipped where FAISS has none to compute on; SEMID_REQUIRE_GPU=1 makes that a failure."""
    if item.get_closest_marker("gpu") is None:
        return
    from semid_index.devices import gpu_problem

    if (problem := gpu_problem(0)) is not None:
        end = pytest.fail if os.environ.get("SEMID_REQUIRE_GPU") == "1" else pytest.skip
        end(f"GPU 0 cannot be used: {problem}")


def _clustered(rows: int, dim: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Points around 40 centres, which are the same for one seed however many points there are: (rows, dim)."""
    random = np.random.default_rng(seed)
    centres = 5 * random.standard_normal((40, dim))
    points = (centres[random.integers(40, size=rows)] + 3 * random.standard_normal((rows, dim))).astype(np.float32)
    points.flags.writeable = False
    return points


@pytest.fixture(scope="session")
def clustered() -> Callable[..., NDArray[np.float32]]:
    """Makes vectors in clusters, read-only: ``clustered(rows, dim, seed=0)``."""
    return _clustered


@pytest.fixture(scope="session")
def vectors() -> NDArray[np.float32]:
    """(2000, 24)"""
    return _clustered(2_000, 24)


@pytest.fixture(scope="session")
def queries() -> NDArray[np.float32]:
    """(20, 24), from the same clusters as ``vectors`` and none of them."""
    return _clustered(20, 24)


@pytest.fixture(scope="session")
def trained_file(tmp_path_factory: pytest.TempPathFactory, vectors: NDArray[np.float32]) -> Path:
    """An index of ``vectors``, ids 0 to 1999, with the metadata columns ``number`` and ``word``. Do not change it."""
    import semid_index as semid

    path = tmp_path_factory.mktemp("trained") / "trained.duckdb"
    with semid.create(path, dim=24, levels=3, codebook_size=16) as index:
        index.train(vectors)
        numbers = np.arange(len(vectors))
        index.add(vectors, metadata={"number": numbers, "word": [f"word {number}" for number in numbers]})
    return path


@pytest.fixture
def index_file(trained_file: Path, tmp_path: Path) -> Path:
    """A copy of ``trained_file`` of one's own."""
    return Path(shutil.copy(trained_file, tmp_path / "index.duckdb"))


@pytest.fixture(params=["plain", "avx2", "avx512"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the native kernels that this processor can run."""
    from semid_index import native

    missing = native.unavailable_because()
    if missing is not None:
        pytest.skip(f"no native scan: {missing}")
    monkeypatch.setenv("SEMID_NATIVE", request.param)
    if native.kernel_name() != request.param:
        pytest.skip(f"this processor has no {request.param}")
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def start_python() -> Callable[..., subprocess.Popen[str]]:
    """Starts code in a fresh interpreter, which imports what this one does; from ``path`` first, if given."""

    def start(code: str, *arguments: object, path: Path | None = None) -> subprocess.Popen[str]:
        folders = [*([str(path)] if path else []), str(ROOT), *(entry for entry in sys.path if entry)]
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def run_python(start_python: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Runs code in a fresh interpreter and gives what it printed; a failure of it is a failure of the test."""

    def run(code: str, *arguments: object, path: Path | None = None) -> str:
        process = start_python(code, *arguments, path=path)
        printed, errors = process.communicate()
        assert process.returncode == 0, f"exit code {process.returncode}\n{printed}\n{errors}"
        return printed

    return run
