"""Which device is taken, and what is said where it cannot be."""

from __future__ import annotations

import logging
import subprocess

import numpy as np
import pytest

import semid_index as semid
from semid_index import devices
from semid_index.devices import GpuState, choose_gpu, gpu_problem, mending_line, parse_device
from semid_index.errors import DeviceError, InvalidArgumentError, MissingDependencyError


class Faiss:
    """As much of a FAISS for GPUs as is looked at before it is used."""

    StandardGpuResources = GpuClonerOptions = GpuIndexIVFScalarQuantizer = object

    @staticmethod
    def get_num_gpus():
        return 3


@pytest.fixture
def gpu_faiss(monkeypatch):
    """A FAISS for GPUs; what its probe finds is to be set with ``gpu_faiss(...)``."""
    monkeypatch.setattr(devices, "import_faiss", lambda: Faiss)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    forget()

    def finds(found):
        def probe(number):
            if isinstance(found, Exception):
                raise found
            return found

        forget()
        monkeypatch.setattr(devices, "probe", probe)

    yield finds
    forget()


def forget():
    devices._automatic.cache_clear()
    devices._probed.cache_clear()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("cpu", "cpu"),
        ("auto", "auto"),
        ("cuda", "cuda"),
        (0, 0),
        (3, 3),
        (np.int64(1), 1),
        ("cuda:0", 0),
        ("cuda:12", 12),
        ("1", 1),
    ],
)
def test_devices_that_are_understood(given, meant):
    assert parse_device(given) == meant
    assert type(parse_device(given)) is type(meant)


@pytest.mark.parametrize("given", ["CUDA", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", -1, True, 1.0, b"cpu", [0]])
def test_others_are_refused(given):
    with pytest.raises(
        InvalidArgumentError, match=r"device must be 'cpu', 'auto', 'cuda', or a GPU .* 'cuda:0', not"
    ) as error:
        parse_device(given)
    assert repr(given) in str(error.value)


def test_the_environment_is_the_default(monkeypatch, trained_file):
    monkeypatch.delenv("SEMID_DEVICE", raising=False)
    assert parse_device(None) == "cpu"
    monkeypatch.setenv("SEMID_DEVICE", "cuda:2")
    assert parse_device(None) == 2
    assert parse_device("cpu") == "cpu"
    monkeypatch.setenv("SEMID_DEVICE", "tpu")
    with pytest.raises(InvalidArgumentError, match=r"SEMID_DEVICE must be .* not 'tpu'"):
        semid.open(trained_file, read_only=True)
    with semid.open(trained_file, read_only=True, device="cpu") as index:
        assert index.stats()["device"]["used"] == "cpu"


@pytest.mark.parametrize(
    ("found", "number", "what", "mend"),
    [
        ({"gpus": 0, "works": False}, 0, "sees no GPU", "Install NVIDIA's driver"),
        ({"gpus": 2, "works": False}, 2, "only 2 counted from 0", "Name one of those"),
        ({"gpus": 1, "works": False}, 0, "wrong answer", "Do not use it"),
        (DeviceError("CUDA error 209 no kernel image is available"), 0, "no kernel image", "pip"),
        (subprocess.TimeoutExpired("probe", 120), 0, "did not end", "nvidia-smi"),
    ],
)
def test_a_named_gpu_never_falls_back(gpu_faiss, trained_file, found, number, what, mend):
    gpu_faiss(found)
    problem = gpu_problem(number)
    assert what in problem.what
    assert mend in problem.mend
    for attempt in (
        lambda: choose_gpu(number),
        lambda: semid.create(dim=4, device=number),
        lambda: semid.open(trained_file, read_only=True, device=f"cuda:{number}"),
    ):
        with pytest.raises(DeviceError, match=f"GPU {number} cannot be used: .*{what}.* or use device='cpu'"):
            attempt()


def test_a_working_gpu_is_taken(gpu_faiss):
    gpu_faiss({"gpus": 2, "works": True})
    assert gpu_problem(1) is None
    assert choose_gpu(1) == 1
    assert choose_gpu("auto") == choose_gpu("cuda") == 0
    assert choose_gpu("cpu") is None


def test_gpus_that_do_not_work_are_not_spread_over(gpu_faiss, monkeypatch):
    gpu_faiss({"gpus": 3, "works": True})
    monkeypatch.setattr(devices, "probe", lambda number: {"gpus": 3, "works": number != 1})
    assert devices.working_gpus() == [0, 2]
    assert [devices.may_spread(device) for device in ("cuda", "auto", "cpu", 0)] == [True, True, False, False]
    gpu_faiss({"gpus": 0, "works": False})
    assert devices.working_gpus() == []
    with pytest.raises(DeviceError, match="GPU 0 cannot be used"):
        choose_gpu("cuda")


def test_a_faiss_for_other_gpus_is_not_taken_for_one(gpu_faiss, monkeypatch):
    """That for Apple's has the first of the classes."""
    gpu_faiss({"gpus": 1, "works": True})
    monkeypatch.setattr(devices, "import_faiss", lambda: type("Metal", (), {"StandardGpuResources": object}))
    assert "has no code for GPUs" in gpu_problem(0).what


def test_gpus_that_the_environment_hides(gpu_faiss, monkeypatch):
    gpu_faiss({"gpus": 0, "works": False})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides all GPUs" in str(gpu_problem(0))


def test_a_faiss_for_the_cpu_is_named_with_the_line_that_mends_it(monkeypatch):
    monkeypatch.setattr(devices, "import_faiss", lambda: object())
    monkeypatch.setattr(devices, "faiss_distributions", lambda: [("faiss-cpu", "1.15.1")])
    line = "pip uninstall -y faiss-cpu && pip install --force-reinstall faiss-gpu"
    monkeypatch.setattr(devices, "gpu_node_exists", lambda: True)
    problem = gpu_problem(0)
    assert "faiss-cpu 1.15.1" in problem.what
    assert problem.mend == f"Run: {line}"
    monkeypatch.setattr(devices, "gpu_node_exists", lambda: False)
    monkeypatch.setattr(devices, "gpu_state", lambda number: None)
    problem = gpu_problem(0)
    assert "no NVIDIA GPU is seen here" in problem.what
    assert problem.mend == f"Where there is one, run: {line}"
    monkeypatch.setattr(devices, "faiss_distributions", list)
    assert mending_line("faiss-gpu") == "pip install --force-reinstall faiss-gpu"


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (ModuleNotFoundError("No module named 'faiss'", name="faiss"), "FAISS is not installed. Run: pip install"),
        (RuntimeError("libcublas.so.12: cannot open"), "FAISS does not load (libcublas.so.12: cannot open). Run: pip"),
    ],
)
def test_a_faiss_that_does_not_load(monkeypatch, cause, said):
    def missing():
        raise MissingDependencyError("no FAISS") from cause

    monkeypatch.setattr(devices, "import_faiss", missing)
    assert said in str(gpu_problem(0))


@pytest.mark.parametrize(("node", "level"), [(False, logging.INFO), (True, logging.WARNING)])
def test_auto_says_once_why_it_takes_the_cpu(gpu_faiss, monkeypatch, caplog, node, level):
    gpu_faiss({"gpus": 0, "works": False})
    monkeypatch.setattr(devices, "gpu_node_exists", lambda: node)
    with caplog.at_level(logging.INFO, "semid_index"):
        assert choose_gpu("auto") is None
        assert choose_gpu("auto") is None
    (record,) = caplog.records
    assert record.levelno == level
    assert "device='auto' takes the CPU: FAISS sees no GPU" in record.getMessage()


STUB = """
import os
class IndexFlatL2:
    def __init__(self, dim): pass
    def add(self, vectors): pass
    def search(self, vectors, k):
        {search}
class StandardGpuResources:
    def noTempMemory(self): pass
def index_cpu_to_gpu(resources, number, index): return index
def get_num_gpus(): return 2
"""


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("import numpy; return None, numpy.arange(4)[:, None]", {"gpus": 2, "works": True}),
        ("import numpy; return None, numpy.zeros((4, 1), int)", {"gpus": 2, "works": False}),
        ("os.write(2, b'Faiss assertion: CUDA error 209 no kernel image\\n'); os.abort()", "error 209 no kernel image"),
    ],
)
def test_the_probe_survives_a_faiss_that_does_not(monkeypatch, tmp_path, search, found):
    (tmp_path / "faiss.py").write_text(STUB.format(search=search))
    monkeypatch.syspath_prepend(str(tmp_path))
    if isinstance(found, dict):
        assert devices.probe(0) == found
        assert devices.probe(2) == {"gpus": 2, "works": False}
    else:
        with pytest.raises(DeviceError, match=found):
            devices.probe(0)


def test_without_a_driver_nothing_is_said_of_gpus(monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(devices.ctypes, "CDLL", no_library)
    assert devices.gpu_state(0) is None


def test_the_driver_is_asked_for_name_and_memory(monkeypatch):
    """Against a library that does what the driver's documentation says."""
    calls = []

    class Driver:
        def __getattr__(self, function):
            def call(*arguments):
                calls.append(function)
                if function == "cuDeviceGetName":
                    arguments[0].value = b"Pretend GPU"
                if function == "cuMemGetInfo_v2":
                    arguments[0]._obj.value, arguments[1]._obj.value = 3 << 30, 4 << 30
                return 0 if function != "cuDeviceGet" or arguments[1] == 0 else 101

            return call

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Driver())
    assert devices.gpu_state(0) == GpuState("Pretend GPU", 3 << 30, 4 << 30)
    assert calls[-3:] == ["cuMemGetInfo_v2", "cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]
    assert devices.gpu_state(7) is None
