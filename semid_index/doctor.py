"""What this installation consists of, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from semid_index.plugins import installed

_LIBRARIES = ("numpy", "duckdb", "pyarrow")
_MEND_FAISS = "pip uninstall -y {names} && pip install --force-reinstall {keep}"


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
    return [*_versions(), *_faiss(), *_plugins()]


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
    mend = _MEND_FAISS.format(names=" ".join(names), keep="faiss-gpu" if names == ["faiss-gpu"] else "faiss-cpu")
    if len(owners) > 1:
        yield Finding("faiss", "wrong", f"{listed}: they overwrite each other", mend)
        return
    try:
        import faiss

        version, options, gpus = faiss.__version__, faiss.get_compile_options().split(), _gpus(faiss)
    except ModuleNotFoundError:
        yield Finding("faiss", "missing", "not installed: NumPy does the search", "pip install 'semid-index[cpu]'")
        return
    except Exception as error:  # what another distribution's removal leaves behind raises anything
        yield Finding("faiss", "wrong", f"{listed or 'no distribution'}, {type(error).__name__}: {error}", mend)
        return
    yield Finding("faiss", "ok", f"{version} from {listed or 'no known distribution'}")
    yield Finding("faiss SIMD", "ok", " ".join(option for option in options if option not in ("OPTIMIZE", "GPU")))
    yield gpus


def _gpus(faiss: Any) -> Finding:
    if not hasattr(faiss, "StandardGpuResources"):
        if Path("/dev/nvidia0").exists():
            advice = "pip uninstall -y faiss-cpu && pip install 'semid-index[gpu]'"
            return Finding("gpu", "missing", "there is one, and this FAISS uses the CPU only", advice)
        return Finding("gpu", "missing", "none; this FAISS uses the CPU only")
    count = faiss.get_num_gpus()
    return Finding("gpu", "ok", f"{count} visible to FAISS") if count else Finding("gpu", "missing", "FAISS sees none")


def faiss_distributions() -> list[tuple[str, str]]:
    """The installed distributions that provide ``import faiss``, with their versions."""
    names = set(importlib.metadata.packages_distributions().get("faiss", ()))
    return sorted((name, importlib.metadata.version(name)) for name in names)


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
