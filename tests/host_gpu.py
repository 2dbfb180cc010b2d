"""kernels/cuda on the processor: tests/host_cuda built as a library, in the place of a GPU."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from disa_fast.backends import cuda

ROOT = Path(__file__).parent.parent
WARPS = 4
CPU = torch.device("cpu")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++")


@functools.cache
def library(launcher: str = "launch.cpp", sources: Path = ROOT / "kernels" / "cuda") -> ctypes.CDLL:
    """A launcher of tests/host_cuda over the kernels in `sources`. AssertionError with the words of a compiler that fails."""
    built = Path(tempfile.mkdtemp()) / "host_cuda.so"
    flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC", "-pthread", "-w"]
    defines = [f"-DDISA_FAST_WARPS={WARPS}", "-DDISA_FAST_DUMP"]
    includes = [f"-I{folder}" for folder in (sources, ROOT / "kernels" / "cuda", ROOT / "tests")]
    command = [compiler(), *flags, *defines, *includes, ROOT / "tests" / "host_cuda" / launcher, "-o", built]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = ctypes.CDLL(str(built))
    shutil.rmtree(built.parent)
    return loaded


class HostGpu:
    """A backends.cuda.Gpu. missing: how many of a grid's last blocks never run. slow: a block that reads what it is told slowly.
    clock_goes_back: from the start of a launch on."""

    warps = WARPS
    origin = "compiled for the processor"

    def __init__(
        self,
        kernels: Path | None = None,
        multiprocessors: int = 4,
        shared_bytes: int = 60_000,
        missing: int = 0,
        slow: int = -1,
        clock_goes_back: bool = False,
    ):
        self.library = library(sources=kernels) if kernels else library()
        self.multiprocessors, self.shared_bytes, self.missing = multiprocessors, shared_bytes, missing
        self.slow, self.clock_goes_back = slow, clock_goes_back
        self.gave_up = torch.zeros(1, dtype=torch.int32)
        self.entries: list[str] = []  # that were launched

    def launch(self, entry: str, call: cuda.Call, plan: cuda.Plan) -> None:
        self.entries.append(entry)
        self.library.host_cuda_slow_block(self.slow)
        self.library.host_cuda_clock_goes_back(self.clock_goes_back)
        kernel = getattr(self.library, entry)
        self.library.host_cuda_launch(kernel, ctypes.byref(call), plan.grid, plan.shared_bytes, self.missing)


def use(monkeypatch: pytest.MonkeyPatch, gpu: HostGpu) -> None:
    """As what the backend finds on the CPU."""
    found = cuda.gpu
    monkeypatch.setattr(cuda, "gpu", lambda device: gpu if device.type == "cpu" else found(device))
    monkeypatch.setattr(cuda, "dumping", lambda device: gpu)


def offsets() -> list[int]:
    """Of the fields of the kernel's parameters, and their size."""
    found = (ctypes.c_size_t * 64)()
    return list(found[: library().host_cuda_offsets(found)])
