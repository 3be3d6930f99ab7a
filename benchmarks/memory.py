"""Memory of building and searching an index over a file of generated vectors, beyond what was held before.

    python -m benchmarks.memory --rows 1000000 --dim 384 --folder /tmp

Counts private memory (``RssAnon`` of /proc/self/status, Linux only): pages of the mapped input file can be dropped at
any time and are not counted.
"""

import argparse
import threading
import time
from pathlib import Path

import numpy as np

import semid_index as semid
from semid_index.vectors import open_vectors

_BATCH = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--folder", type=Path, required=True, help="where the files go; they stay there")
    arguments = parser.parse_args()
    vectors, built = arguments.folder / "generated.npy", arguments.folder / "generated.duckdb"
    if not vectors.exists():
        generate(vectors, arguments.rows, arguments.dim)
    with semid.create(built, dim=arguments.dim, metric="cosine", overwrite=True) as index:
        measured("train", lambda: index.train(vectors))
        measured("encode only", lambda: [index.encode(batch) for batch in open_vectors(vectors).batches(_BATCH)])
        measured("add", lambda: index.add(vectors))
    print(f"file: {built.stat().st_size / arguments.rows:,.0f} bytes per item")
    query = np.load(vectors, mmap_mode="r")[0]
    with semid.open(built) as index:
        measured("first search", lambda: index.search(query))
        print({name: round(size / arguments.rows, 1) for name, size in index.stats()["memory_bytes"].items()})


def generate(path: Path, rows: int, dim: int) -> None:
    """2,000 Gaussian clusters."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2_000, dim), dtype=np.float32)
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, dim))
    for start in range(0, rows, _BATCH):
        part = vectors[start : start + _BATCH]
        part[:] = centres[rng.integers(0, len(centres), len(part))]
        part += 0.7 * rng.standard_normal(part.shape, dtype=np.float32)
    vectors.flush()


def measured(name: str, work) -> None:
    """Do some work, and print its seconds and the most private memory held meanwhile."""
    before, peak, done = private_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    print(f"{name}: {seconds:.1f} s, {(peak[0] - before) / 1e9:.2f} GB", flush=True)


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not tell RssAnon.")


if __name__ == "__main__":
    main()
