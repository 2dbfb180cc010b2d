"""What limits the persistent CUDA kernel on a GPU, measured by the kernels of probe.cu: launches, barriers, exchanges, level 2."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from disa_fast import jit
from disa_fast.backends import cuda

from . import nvcc

SOURCE = Path(__file__).with_name("probe.cu")
KERNELS = cuda.SOURCE.parent
ROUNDS = 500  # within one launch
TURNS = 5  # launches, of which the median counts
LAUNCHES = 100
SHAPES = [(rows, width) for width in cuda.WIDTHS for rows in (2, 8, 16)]
LEVEL2_BYTES = (16 << 20, 32 << 20)
PATIENCE = 1_000_000_000  # nanoseconds that a launch may take before it gives up
EXCHANGES = ("exchange", "barrier exchange")

Launch = Callable[[], object]
Peaks = dict[str, float]


class Probe(ctypes.Structure):
    """Probe of probe.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "counter", "sums", "failed")),
        ("patience", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("rows", "rounds", "quadruples")),
    )


class Gpu(Protocol):
    """Where probes run: blocks of so many warps, one on each multiprocessor."""

    device: torch.device
    multiprocessors: int
    warps: int

    def launch(self, entry: str, probe: Probe, grid: int) -> None: ...


def why_not() -> str | None:
    """Why nothing can be probed on this machine's GPU; None if it can."""
    if torch.version.hip:
        return "probe.cu is for NVIDIA GPUs; this is a PyTorch for AMD's"
    if cuda._C is None:
        return "the native core, which launches probe.cu, is not part of this installation"
    reason = jit.why_not()
    return None if reason is None or nvcc.why_not() is None else f"probe.cu cannot be compiled: no nvcc, and {reason}"


def image(architecture: str) -> bytes:
    """probe.cu as machine code for such as "sm_90a", by NVRTC, else by nvcc. All sources in one folder, as jit.py wants them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in (SOURCE, *KERNELS.glob("*.cuh"), *KERNELS.glob("*.h")):
            shutil.copy(path, folder)
        compiler = jit if jit.why_not() is None else nvcc
        return compiler.compile_cubin(folder / SOURCE.name, architecture)


class NvidiaGpu:
    """A Gpu, for real."""

    warps = cuda.NvidiaGpu.warps

    def __init__(self, device: torch.device) -> None:
        self.device = device
        index = torch.cuda.current_device() if device.index is None else device.index
        self._module = cuda._C.CudaModule(image=image(cuda.architecture(device)), device=index)
        self.multiprocessors = self._module.multiprocessors()

    def launch(self, entry: str, probe: Probe, grid: int) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._module.launch(name=entry, parameters=bytes(probe), grid=grid, threads=32 * self.warps, shared_bytes=0, stream=stream)


# What is measured ----------------------------------------------------------------------------------------------------


def measurements(
    gpu: Gpu, seconds: Callable[[Launch], float], captured: Callable[[Launch], Launch]
) -> Iterator[tuple[str, Callable[[], Peaks]]]:
    """(what, a function that measures it). seconds: of the GPU, for a call. captured: a call as the replay of a CUDA graph."""
    yield "launch", lambda: launch(gpu, seconds, captured)
    yield "barrier", lambda: barrier(gpu, seconds)
    for rows, width in SHAPES:
        yield f"exchange {rows} x {width}", lambda rows=rows, width=width: exchange(gpu, seconds, rows, width)
    for size in LEVEL2_BYTES:
        yield f"level 2, {size >> 20} MiB", lambda size=size: level2(gpu, seconds, size)


def launch(gpu: Gpu, seconds: Callable[[Launch], float], captured: Callable[[Launch], Launch]) -> Peaks:
    """Of an empty kernel: from Python, one after the other, and as a node of a graph."""
    once = Run(gpu, "probe_nothing", gpu.multiprocessors, rounds=0).launch

    def many() -> None:
        for _ in range(LAUNCHES):
            once()

    many()
    synchronize(gpu)
    start = time.perf_counter()
    many()
    synchronize(gpu)
    from_python = time.perf_counter() - start
    replay = captured(many)
    replay()
    in_graph = statistics.median(seconds(replay) for _ in range(TURNS))
    return {"launch us": 1e6 * from_python / LAUNCHES, "graph node us": 1e6 * in_graph / LAUNCHES}


def barrier(gpu: Gpu, seconds: Callable[[Launch], float]) -> Peaks:
    run = Run(gpu, "probe_barrier", gpu.multiprocessors, rounds=ROUNDS)
    return {"barrier us": 1e6 * run.seconds(seconds) / ROUNDS}


def exchange(gpu: Gpu, seconds: Callable[[Launch], float], rows: int, width: int) -> Peaks:
    """From all blocks to all, as the kernel does it and by a barrier. ArithmeticError if what arrives is wrong."""
    grid, peaks = min(width // cuda.COLUMNS, gpu.multiprocessors), {}
    expected = exchanged_sums(rows, width, ROUNDS, gpu.warps, gpu.device)
    for name in EXCHANGES:
        run = Run(gpu, f"probe_{name.replace(' ', '_')}_{width}", grid, rows=rows, rounds=ROUNDS)
        run.words = torch.empty(2 * cuda.GROUP_ROWS * width, dtype=torch.int32, device=gpu.device)
        peaks[f"{name} {rows} x {width} us"] = 1e6 * run.seconds(seconds, expected.expand(grid, -1)) / ROUNDS
    return peaks


def level2(gpu: Gpu, seconds: Callable[[Launch], float], size: int) -> Peaks:
    run = Run(gpu, "probe_level2", gpu.multiprocessors, rounds=ROUNDS, quadruples=size // 16)
    run.words, run.clears = torch.arange(size // 4, dtype=torch.int32, device=gpu.device), False
    taken = run.seconds(seconds)
    found, words = int(unsigned(run.sums).sum()), size // 4
    if (found - ROUNDS * (words * (words - 1) // 2)) % (1 << 32):
        raise ArithmeticError(f"probe_level2 has not read all of {size} bytes")
    return {f"level 2, {size >> 20} MiB, GB/s": ROUNDS * size / taken / 1e9}


class Run:
    """Launches of one probe, and what they leave."""

    def __init__(self, gpu: Gpu, entry: str, grid: int, rounds: int, rows: int = 0, quadruples: int = 0) -> None:
        self.gpu, self.entry, self.grid = gpu, entry, grid
        self.sizes = {"rows": rows, "rounds": rounds, "quadruples": quadruples}
        self.words, self.clears = self._zeros(4), True
        self.flags = self._zeros(2 * 32)  # the counter; and whether it failed, in another line of the cache
        self.sums = self._zeros(grid * 32 * gpu.warps)

    def launch(self) -> None:
        counter, failed = self.flags[:1], self.flags[32:]
        tensors = {"words": self.words, "counter": counter, "sums": self.sums, "failed": failed}
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        self.gpu.launch(self.entry, Probe(**addresses, patience=PATIENCE, **self.sizes), self.grid)

    def seconds(self, seconds: Callable[[Launch], float], expected: Tensor | None = None) -> float:
        """Of one launch. expected: what each thread should have summed up."""
        times = []
        for turn in range(1 + TURNS):
            for tensor in (self.flags, self.sums, *[self.words] * self.clears):
                tensor.zero_()
            synchronize(self.gpu)
            times.append(seconds(self.launch))
            if self.flags[32:].any():
                raise RuntimeError(f"{self.entry}, {self.grid} blocks: gave up after {PATIENCE / 1e9:g} s, or let blocks through")
            if expected is not None and turn == 0 and not torch.equal(unsigned(self.sums).view(expected.shape), expected):
                raise ArithmeticError(f"{self.entry}, {self.grid} blocks: what was read is not what was told")
        return statistics.median(times[1:])

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.gpu.device)


def exchanged_sums(rows: int, width: int, rounds: int, warps: int, device: torch.device) -> Tensor:
    """What each thread of a block sums up in exchanges, modulo 2^32: `told` of probe.cu, over rounds, its rows and its columns."""
    count = torch.arange(1, rounds + 1, device=device)[:, None]
    place = torch.arange(rows * width, device=device)
    words = (count * 0x9E3779B9 ^ place * 0x85EBCA6B) & 0xFFFFFFFC | count & 3
    lanes = words.sum(0).view(rows, -1, 32, 4).sum((1, 3))
    by_warp = torch.zeros(-(-rows // warps) * warps, 32, dtype=torch.int64, device=device)
    by_warp[:rows] = lanes
    return by_warp.view(-1, warps * 32).sum(0) & 0xFFFFFFFF


def unsigned(words: Tensor) -> Tensor:
    return words.long() & 0xFFFFFFFF


def synchronize(gpu: Gpu) -> None:
    if gpu.device.type == "cuda":
        torch.cuda.synchronize(gpu.device)


# Reporting -----------------------------------------------------------------------------------------------------------


def told(peaks: Peaks) -> list[str]:
    """The names of the few that say most."""
    few = ("launch us", "graph node us", "barrier us", *(f"exchange 8 x {width} us" for width in cuda.WIDTHS))
    return [name for name in peaks if name in few or name.startswith("level 2,")]


def print_table(peaks: Peaks) -> None:
    """The exchange as the kernel does it, beside the one by a barrier."""
    print(f"{'from all multiprocessors to all, us':36}    words  barrier    ratio")
    for rows, width in SHAPES:
        words, by_barrier = (peaks.get(f"{name} {rows} x {width} us") for name in EXCHANGES)
        if words and by_barrier:
            print(f"{f'{rows} rows of {width}':36} {words:8.2f} {by_barrier:8.2f} {by_barrier / words:7.2f}x", flush=True)
