"""What this installation consists of, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from semid_index import native
from semid_index.devices import faiss_distributions, gpu_node_exists, gpu_problem, gpu_state, mending_line
from semid_index.plugins import installed

_LIBRARIES = ("numpy", "duckdb", "pyarrow")
_GET_NATIVE = "install a C++ compiler (g++ or clang++), then: pip install --force-reinstall --no-deps semid-index"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    status: Literal["ok", "missing", "wrong"]
    """``missing`` is worth knowing and no fault; ``wrong`` is a fault."""
    found: str
    advice: str = ""
    """What to do about it."""


def examine() -> list[Finding]:
    """Look at everything."""
    return [*_versions(), *_faiss(), _native(), *_plugins()]


def _versions() -> Iterator[Finding]:
    yield Finding("semid-index", "ok", _version("semid-index"))
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Finding("platform", "ok", platform.platform())
    for name in _LIBRARIES:
        try:
            module = __import__(name)
        except Exception as error:  # a broken binary raises whatever it likes
            yield Finding(name, "wrong", f"{type(error).__name__}: {error}", f"pip install --force-reinstall {name}")
        else:
            yield Finding(name, "ok", str(module.__version__))


def _faiss() -> Iterator[Finding]:
    """Distributions of FAISS overwrite each other's files, and removing one of two breaks the other."""
    owners = faiss_distributions()
    names = [name for name, _ in owners]
    listed = ", ".join(f"{name} {version}" for name, version in owners)
    for_gpu = names == ["faiss-gpu"] or (len(names) > 1 and gpu_node_exists())
    mend = mending_line("faiss-gpu" if for_gpu else "faiss-cpu", names)
    if len(owners) > 1:
        yield Finding("faiss", "wrong", f"{listed}: they overwrite each other", mend)
        return
    try:
        import faiss

        version, options = faiss.__version__, faiss.get_compile_options().split()
    except ModuleNotFoundError:
        yield Finding("faiss", "missing", "not installed: NumPy does the search", "pip install 'semid-index[cpu]'")
        return
    except Exception as error:  # what another distribution's removal leaves behind raises anything
        yield Finding("faiss", "wrong", f"{listed or 'no distribution'}, {type(error).__name__}: {error}", mend)
        return
    yield Finding("faiss", "ok", f"{version} from {listed or 'no known distribution'}")
    yield Finding("faiss SIMD", "ok", " ".join(option for option in options if option not in ("OPTIMIZE", "GPU")))
    yield _gpu()


def _native() -> Finding:
    """The compiled scan; without it FAISS scans, several times as slowly."""
    why = native.unavailable_because()
    if why is None:
        return Finding("native scan", "ok", native.kernel_name())
    advice = "unset SEMID_NATIVE" if os.environ.get("SEMID_NATIVE") == "0" else _GET_NATIVE
    return Finding("native scan", "missing", f"{why}: FAISS does the scanning", advice)


def _gpu() -> Finding:
    """Whether FAISS computes on the first GPU; it is given four vectors to search there."""
    problem, state = gpu_problem(0), gpu_state(0)
    seen = "there is one"
    if state is not None:
        seen = f"{state.name}, {state.free / 1e9:.1f} of {state.total / 1e9:.1f} GB free"
    if problem is None:
        return Finding("gpu", "ok", f"{seen}; FAISS computes on it")
    if state is None and not gpu_node_exists():
        return Finding("gpu", "missing", "none; FAISS uses the CPU only")
    return Finding("gpu", "missing", f"{seen}, and is not used: {problem.what}", problem.mend)


def _plugins() -> Iterator[Finding]:
    plugins = installed()
    for source, reason in plugins.failed.items():
        yield Finding(f"plugin {source}", "wrong", reason, f"pip install --upgrade {source.split()[0]}")
    yield Finding("plugins", "ok", f"{len(plugins.offers)} offers, {len(plugins.failed)} plugins failed to load")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package (run from its folder)"
