"""bench/probe.cu on the processor: tests/host_cuda built as a library, in the place of a GPU."""

import ctypes
from pathlib import Path

import host_gpu
from host_gpu import CPU, ROOT, WARPS

SOURCE = ROOT / "bench" / "probe.cu"


def library(source: Path = SOURCE) -> ctypes.CDLL:
    return host_gpu.library("launch_probe.cpp", source.parent)


class HostGpu:
    """A Gpu of bench/probes.py. missing: how many of a grid's last blocks never run. slow: a block that reads slowly."""

    device, warps = CPU, WARPS

    def __init__(self, source: Path = SOURCE, multiprocessors: int = 3, missing: int = 0, slow: int = -1) -> None:
        self.library, self.multiprocessors, self.missing, self.slow = library(source), multiprocessors, missing, slow

    def launch(self, entry: str, probe: ctypes.Structure, grid: int) -> None:
        self.library.host_probe_launch(entry.encode(), ctypes.byref(probe), grid, self.missing, self.slow)


def offsets() -> list[int]:
    """Of the fields of the kernels' parameters, and their size."""
    found = (ctypes.c_size_t * 16)()
    return list(found[: library().host_probe_offsets(found)])
