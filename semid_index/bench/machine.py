"""What a result was measured with: the machine, without names or paths, and versions; and the memory of a process."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from semid_index import __version__
from semid_index.devices import cores

_STATUS = Path("/proc/self/status")
_CPU = Path("/proc/cpuinfo")
_STAT = Path("/proc/stat")


def machine() -> dict[str, str | int]:
    """Processor, cores, memory, system and Python."""
    described: dict[str, str | int] = {
        "processor": _processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    return described


def _processor() -> str:
    if not _CPU.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in _CPU.read_text(encoding="utf-8").splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    widest = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    return ", ".join(part for part in (fields.get("model name", platform.machine()), widest) if part)


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The installed versions of some distributions, ours and NumPy's among them."""
    found = {"semid-index": __version__}
    for name in ("numpy", *distributions):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # faiss-gpu instead of faiss-cpu, or a checkout that is not installed
    return found


def private_bytes() -> int | None:
    """Memory that this process alone has, mapped files not counted; None where the system does not tell (not Linux).

    What was freed is given back to the system first, as far as the C library can.
    """
    if not _STATUS.exists():
        return None
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return _status("RssAnon")


def peak_bytes() -> int | None:
    """The most memory that this process ever had, mapped files counted; None where the system does not tell."""
    return _status("VmHWM") if _STATUS.exists() else None


def available_bytes() -> int | None:
    """Memory of the machine that is free; None where the system does not tell."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


class Others:
    """How many processors other programs have, from when this begins: 0 on a quiet machine.

    What this process and its ended children use is its own; None where the system does not tell (not Linux).
    """

    def __init__(self) -> None:
        self._began = _used_by_all(), _used_by_us(), time.perf_counter()

    def processors(self) -> float | None:
        """On average so far."""
        everything, ours, began = self._began
        now, seconds = _used_by_all(), time.perf_counter() - began
        if everything is None or now is None or seconds <= 0:
            return None
        return max(0.0, (now - everything - (_used_by_us() - ours)) / seconds)


def _used_by_all() -> float | None:
    """Seconds that all processors together have worked since the machine started."""
    if not _STAT.exists():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal: what was stolen went to another machine's programs
    fields = [int(field) for field in _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _used_by_us() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _status(field: str) -> int | None:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
