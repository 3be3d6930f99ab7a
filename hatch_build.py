"""Compiles the native scan when the package is built or installed, if there is a C++ compiler; see semid_index/native.

Without a compiler, or if compiling fails, the package is built without it and searches by FAISS: nothing else changes.
``CXX`` names the compiler; ``SEMID_BUILD_NATIVE=0`` leaves the scan out, ``SEMID_BUILD_NATIVE=1`` insists on it.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path(__file__).resolve().parent / "semid_index" / "native"
LIBRARY = "libsemid_scan.so"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# immintrin.h of GCC 12 sets registers to themselves, and warns of it
QUIET = ("-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi")
_SECONDS = 300  # for one file; it takes some seconds


class NativeScan(BuildHookInterface):
    """Called by hatchling."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and put the library into the wheel."""
        if self.target_name != "wheel":
            return
        wish = os.environ.get("SEMID_BUILD_NATIVE", "")
        library = FOLDER / LIBRARY
        problem = "SEMID_BUILD_NATIVE=0" if wish == "0" else build(library)
        if problem is None:
            build_data["artifacts"].append(f"semid_index/native/{LIBRARY}")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform_tag()}"
            return
        library.unlink(missing_ok=True)
        if wish == "1":
            raise RuntimeError(f"The native scan was not built: {problem}")
        self.app.display_warning(f"The native scan was not built, so searching is slower: {problem}")


def build(library: Path, *extra: str) -> str | None:
    """Compile the library; None, or why that failed. ``extra``: more flags, such as ``-fsanitize=address``."""
    compiler = shlex.split(os.environ.get("CXX", "")) or _found("c++", "g++", "clang++")
    if not compiler:
        return "there is no C++ compiler (c++, g++ or clang++)"
    if sys.platform == "win32":
        return "it is written for Linux and macOS"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    kernels = {0: (), **({1: AVX2, 2: AVX512} if x86 else {})}
    flags = [*FLAGS, *QUIET, *extra, *(["-DSEMID_X86"] if x86 else [])]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for isa, target in kernels.items():
            objects.append(f"{folder}/kernel{isa}.o")
            command = [*compiler, *flags, *target, f"-DSEMID_ISA={isa}", "-c", str(FOLDER / "kernel.cpp")]
            if problem := _run([*command, "-o", objects[-1]]):
                return problem
        made = f"{folder}/{LIBRARY}"
        command = [*compiler, *flags, "-shared", "-pthread", str(FOLDER / "scan.cpp"), *objects, "-o", made]
        if problem := _run(command):
            return problem
        # moved into its place in one step, for it may be loaded there by a running program
        beside = library.with_suffix(".new")
        shutil.copyfile(made, beside)
        beside.replace(library)
    return None


def _found(*names: str) -> list[str]:
    return next(([path] for name in names if (path := shutil.which(name))), [])


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return f"{shlex.join(command[:1])} failed: {done.stderr.strip()[-500:] or done.returncode}"
    return None


def _platform_tag() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    if found := build(FOLDER / LIBRARY, *sys.argv[1:]):
        sys.exit(f"The native scan was not built: {found}")
