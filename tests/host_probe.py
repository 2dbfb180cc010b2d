"""bench/probe.cu on the processor: tests/host_cuda built as a library, in the place of a GPU."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from host_gpu import CPU, ROOT, WARPS, compiler

SOURCE = ROOT / "bench" / "probe.cu"


@functools.cache
def library(source: Path = SOURCE) -> ctypes.CDLL:
    """AssertionError with the compiler's words if it cannot be compiled."""
    built = Path(tempfile.mkdtemp()) / "host_probe.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", f"-DDISA_FAST_WARPS={WARPS}"]
    includes = [f"-I{folder}" for folder in (source.parent, ROOT / "kernels" / "cuda", ROOT / "tests")]
    command = [compiler(), *flags, *includes, ROOT / "tests" / "host_cuda" / "launch_probe.cpp", "-o", built]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = ctypes.CDLL(str(built))
    shutil.rmtree(built.parent)
    return loaded


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
