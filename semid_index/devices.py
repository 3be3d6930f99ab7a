"""Where FAISS computes: on the CPU, or on GPUs; and if not there, why not, and what mends it.

A device is ``"cpu"``, ``"auto"``, ``"cuda"``, the number of a GPU, or ``"cuda:0"``. Nobody falls back silently: a GPU
that was asked for is used, or :class:`DeviceError` is raised; ``"auto"`` takes the CPU where there is no working GPU,
and logs why. ``"cuda"`` and ``"auto"`` begin with the first GPU, and take others when it is too small. Whether a GPU
works is found out in a process of its own, because a FAISS that has no code for it ends its process.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from semid_index.errors import DeviceError, InvalidArgumentError, MissingDependencyError
from semid_index.quantizers.kmeans import import_faiss

log = logging.getLogger("semid_index")

Device = str | int
VARIABLE = "SEMID_DEVICE"
"""The environment variable with the device of all calls that name none."""
_NODE = Path("/dev/nvidia0")
_NEEDED = ("StandardGpuResources", "GpuClonerOptions", "GpuIndexIVFScalarQuantizer")  # of a FAISS for NVIDIA's GPUs
_PROBE_SECONDS = 120  # the first use of a GPU after the machine started has been seen to take tens of seconds
_PROBE = """
import json, sys
import faiss, numpy
gpus, works = faiss.get_num_gpus(), False
number = int(sys.argv[1])
if number < gpus:
    vectors = numpy.eye(4, 32, dtype=numpy.float32)
    flat = faiss.IndexFlatL2(32)
    flat.add(vectors)
    resources = faiss.StandardGpuResources()
    resources.noTempMemory()
    found = faiss.index_cpu_to_gpu(resources, number, flat).search(vectors, 1)[1]
    works = found.ravel().tolist() == [0, 1, 2, 3]
print(json.dumps({"gpus": gpus, "works": works}))
"""


@dataclass(frozen=True)
class Problem:
    """Why a GPU cannot be used."""

    what: str
    mend: str
    """What to do about it, in one line."""

    def __str__(self) -> str:
        return f"{self.what}. {self.mend}"


@dataclass(frozen=True)
class GpuState:
    """A GPU, as its driver sees it."""

    name: str
    free: int
    """Bytes."""
    total: int


def parse_device(device: Device | None) -> Device:
    """``"cpu"``, ``"auto"``, ``"cuda"`` or a GPU's number; None stands for what ``SEMID_DEVICE`` says, or ``"cpu"``.

    >>> parse_device("cuda:1"), parse_device(0), parse_device("cpu")
    (1, 0, 'cpu')
    """
    source, given = "device", device
    if given is None:
        source, given = f"The environment variable {VARIABLE}", os.environ.get(VARIABLE) or "cpu"
    if isinstance(given, str) and given in ("cpu", "auto", "cuda"):
        return given
    number: int | None = None
    if isinstance(given, str):
        digits = given.removeprefix("cuda:")
        number = int(digits) if digits.isascii() and digits.isdigit() else None
    elif isinstance(given, int | np.integer) and not isinstance(given, bool) and given >= 0:
        number = int(given)
    if number is None:
        raise InvalidArgumentError(
            f"{source} must be 'cpu', 'auto', 'cuda', or a GPU by its number, as 0 or 'cuda:0', not {given!r}."
        )
    return number


def device_name(gpu: int | None) -> str:
    """``"cpu"`` or ``"cuda:0"``."""
    return "cpu" if gpu is None else f"cuda:{gpu}"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_gpu(device: Device) -> int | None:
    """The number of the GPU to use for what :func:`parse_device` returned, the first of several; None for the CPU.

    Raises :class:`DeviceError` if a GPU is named that cannot be used.
    """
    if device == "cpu":
        return None
    if device == "auto":
        return _automatic()
    number = 0 if device == "cuda" else int(device)
    if (problem := gpu_problem(number)) is not None:
        raise DeviceError(f"GPU {number} cannot be used: {problem}; or use device='cpu'.")
    return number


def may_spread(device: Device) -> bool:
    """Whether other GPUs may be taken, too, when the first is too small: unless one was named."""
    return device in ("auto", "cuda")


def working_gpus() -> list[int]:
    """The numbers of all GPUs that FAISS computes on. Each is tried once in a process, in some seconds."""
    if gpu_problem(0) is not None:  # without asking FAISS in this process, which it could end
        return []
    return [number for number in range(import_faiss().get_num_gpus()) if gpu_problem(number) is None]


@cache
def _automatic() -> int | None:
    """The first GPU, if it works."""
    problem = gpu_problem(0)
    if problem is None:
        return 0
    level = logging.WARNING if gpu_node_exists() else logging.INFO  # with a GPU in the machine, someone will wonder
    log.log(level, "device='auto' takes the CPU: %s", problem)
    return None


def gpu_problem(number: int = 0) -> Problem | None:
    """Why FAISS cannot compute on a GPU; None if it can. Looked for once in a process."""
    try:
        faiss = import_faiss()
    except MissingDependencyError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name == "faiss":
            return Problem("FAISS is not installed", "Run: pip install 'semid-index[gpu]'")
        return Problem(f"FAISS does not load ({cause})", f"Run: {mending_line('faiss-gpu')}")
    if not all(hasattr(faiss, name) for name in _NEEDED):
        seen = gpu_node_exists() or gpu_state(number) is not None
        return Problem(
            f"the FAISS that is installed ({installed_faiss()}) has no code for GPUs"
            + ("" if seen else ", and no NVIDIA GPU is seen here"),
            f"{'Run' if seen else 'Where there is one, run'}: {mending_line('faiss-gpu')}",
        )
    return _probed(number)


@cache
def _probed(number: int) -> Problem | None:
    try:
        found = probe(number)
    except subprocess.TimeoutExpired:
        return Problem(
            f"a search of four vectors on it did not end within {_PROBE_SECONDS} s",
            "See with nvidia-smi whether it hangs",
        )
    except DeviceError as error:
        return Problem(
            f"FAISS ({installed_faiss()}) ended with '{error}' on it",
            "'no kernel image' means that FAISS was built for other GPUs: "
            f"{mending_line('faiss-gpu')} has code for compute capability 7.0 to 9.0",
        )
    if not found["gpus"]:
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return Problem("CUDA_VISIBLE_DEVICES hides all GPUs", "Unset it, or set it to 0")
        return Problem("FAISS sees no GPU", "Install NVIDIA's driver (version 525 or later); nvidia-smi shows the GPUs")
    if number >= found["gpus"]:
        return Problem(f"there is none of this number, only {found['gpus']} counted from 0", "Name one of those")
    if not found["works"]:
        return Problem("a search of four vectors on it gave a wrong answer", "Do not use it")
    return None


def probe(number: int) -> dict[str, Any]:
    """Let FAISS search four vectors on a GPU, in a process of its own: how many GPUs there are, and whether it works.

    Raises :class:`DeviceError` with the last line of what that process said if it failed.
    """
    paths = os.pathsep.join(path for path in sys.path if path)  # FAISS is to be the same
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _PROBE, str(number)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=_PROBE_SECONDS,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        told = [line for line in said if "rror" in line] or said
        raise DeviceError(told[-1].strip())
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def gpu_state(number: int = 0) -> GpuState | None:
    """What the driver says of a GPU and its memory; None where it says nothing."""
    try:
        return _ask_driver(number)
    except (OSError, AttributeError) as error:
        log.debug("NVIDIA's driver does not answer: %s", error)
        return None


def _ask_driver(number: int) -> GpuState:
    """By the driver's own library: it is there wherever CUDA runs, and goes by CUDA_VISIBLE_DEVICES as FAISS does."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)

    def call(function: str, *arguments: Any) -> None:
        if (code := getattr(cuda, function)(*arguments)) != 0:
            raise OSError(f"{function} returned {code}")

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), number)
    call("cuDeviceGetName", name, len(name), device)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        call("cuCtxPushCurrent_v2", context)
        try:
            call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            call("cuCtxPopCurrent_v2", ctypes.byref(context))
    finally:
        call("cuDevicePrimaryCtxRelease_v2", device)
    return GpuState(name.value.decode(), free.value, total.value)


def gpu_node_exists() -> bool:
    """Whether the system has a device file of an NVIDIA GPU, whatever works with it."""
    return _NODE.exists()


def faiss_distributions() -> list[tuple[str, str]]:
    """The installed distributions that provide ``import faiss``, with their versions."""
    names = set(importlib.metadata.packages_distributions().get("faiss", ()))
    return sorted((name, importlib.metadata.version(name)) for name in names)


def installed_faiss() -> str:
    """Their names and versions, in words."""
    return ", ".join(f"{name} {version}" for name, version in faiss_distributions()) or "from no known distribution"


def mending_line(keep: str, installed: Sequence[str] | None = None) -> str:
    """The line that leaves one FAISS of those that are installed: two overwrite each other's files."""
    names = [name for name, _ in faiss_distributions()] if installed is None else installed
    install = f"pip install --force-reinstall {keep}"
    return f"pip uninstall -y {' '.join(names)} && {install}" if names else install
