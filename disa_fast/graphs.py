"""CUDA graphs of whole denoising loops, one for each (step bucket, row bucket) that recurs.

A graph replays over the addresses that it was captured with. Here those are named buffers, cut from one arena that all graphs of
a head share: a call fills the inputs, replays, and copies the result out. Calls therefore wait for each other, also across
streams; each waits on its own stream, not on the host. Noise and coefficients are inputs, so one graph serves every seed, solver,
guidance scale and temperature of its shape.

What decides (buckets, least recently used out, bytes) is apart from CUDA, and is tested without a GPU.
"""

from __future__ import annotations

import gc
import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from . import profiling

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Buffers = dict[str, Tensor]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], tuple[Replay, int]]

ALIGNMENT = 256
DEFAULT_MEGABYTES = 1024
MAX_FAILURES = 3  # to capture, one after the other, after which a head goes on without graphs
MAX_ROWS = 8192  # beyond, launches cost nothing beside the arithmetic


def enabled() -> bool:
    """Unless DISA_FAST_GRAPHS=0."""
    return os.environ.get("DISA_FAST_GRAPHS", "1") != "0"


def bytes_allowed() -> int:
    """For the graphs of one head in one dtype: DISA_FAST_GRAPHS_MB, in MiB."""
    text = os.environ.get("DISA_FAST_GRAPHS_MB") or str(DEFAULT_MEGABYTES)
    if not text.isdecimal():
        raise ValueError(f"DISA_FAST_GRAPHS_MB: expected a whole number of MiB, got {text!r}")
    return int(text) << 20


def row_bucket(rows: int) -> int:
    """`rows` rounded up to 2, 4, 8, 16, then in quarters of the power of two below it, by 16 at least: 32, 48, 64, 80, ..."""
    if rows <= 16:
        return max(2, 1 << (rows - 1).bit_length())
    step = max(16, 1 << ((rows - 1).bit_length() - 3))
    return -(-rows // step) * step


def layout_bytes(layout: Layout) -> int:
    return sum(_up(math.prod(shape) * dtype.itemsize) for shape, dtype in layout.values())


def cut(arena: Tensor, layout: Layout) -> Buffers:
    """The named buffers, one behind the other in `arena`, a uint8 tensor of layout_bytes(layout) or more."""
    buffers, at = {}, 0
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        buffers[name] = arena[at : at + size].view(dtype).view(shape)
        at += _up(size)
    return buffers


def allocate(layout: Layout, device: torch.device) -> Buffers:
    with torch.inference_mode(False):
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}


@dataclass(eq=False)
class Captured:
    """replay: runs the loop over `buffers`, which lie in `arena`; own_bytes: what it takes beside the arena."""

    replay: Replay
    buffers: Buffers
    arena: Tensor
    own_bytes: int


class ByteLRU:
    """What was captured, by key. Over the bound the least recently used goes, but never the newest; an arena that several share
    counts once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.evictions = 0
        self._entries: OrderedDict[Hashable, Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> Captured | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, entry: Captured) -> None:
        self._entries[key] = entry
        while self.bytes > self.limit and len(self._entries) > 1:
            self._entries.popitem(last=False)
            self.evictions += 1

    def clear(self) -> None:
        self.evictions += len(self._entries)
        self._entries.clear()

    @property
    def bytes(self) -> int:
        arenas = {entry.arena.data_ptr(): entry.arena.nbytes for entry in self._entries.values()}
        return sum(arenas.values()) + sum(entry.own_bytes for entry in self._entries.values())


class Graphs:
    """The graphs of one head on one device, safe to use from several threads and streams.

    capture: records the launches of a loop on `device` and returns (replay, bytes); without one, on a device that has no graphs,
    `run` always declines.
    """

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        self.device = device
        self.captures = self.hits = self.eager = self.failures = 0
        self._failed_in_a_row = 0
        self._capture_loop = capture or (_CudaCapture(device) if device.type == "cuda" else None)
        self._cache = ByteLRU(bytes_allowed())
        self._lock = threading.Lock()
        self._arena: Tensor | None = None
        self._free: torch.cuda.Event | None = None

    def run(
        self,
        key: Hashable,
        rows: int,
        layout: Callable[[], Layout],
        fill: Callable[[Buffers], None],
        loop: Callable[[Buffers], None],
        result: Callable[[Buffers], Tensor],
    ) -> Tensor | None:
        """fill, loop and result, the loop as a graph's replay; None where this call is better or only run without one.

        key: whatever decides what `loop` launches, the layout included, which is asked for only to capture. result: copies what
        the caller gets out of the buffers.
        """
        with self._lock:
            if not self._should(rows):
                self.eager += 1
                return None
            self._wait()
            entry = self._cache.get(key)
            if entry is not None:
                self.hits += 1
            else:
                entry = self._captured(key, layout(), fill, loop)
            if entry is None:
                self.eager += 1
                return None
            fill(entry.buffers)
            with profiling.range(profiling.REPLAY, key):
                entry.replay()
            copied = result(entry.buffers)
            self._release(entry.arena)
            return copied

    def counters(self) -> dict[str, int]:
        """captures, hits, evictions, eager (calls without a graph), failures (captures that did not succeed), graphs, bytes."""
        with self._lock:
            return {
                "captures": self.captures,
                "hits": self.hits,
                "evictions": self._cache.evictions,
                "eager": self.eager,
                "failures": self.failures,
                "graphs": len(self._cache),
                "bytes": self._cache.bytes,
            }

    def _should(self, rows: int) -> bool:
        if self._capture_loop is None or self._failed_in_a_row >= MAX_FAILURES or not enabled() or rows > MAX_ROWS:
            return False
        return self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()

    def _captured(
        self, key: Hashable, layout: Layout, fill: Callable[[Buffers], None], loop: Callable[[Buffers], None]
    ) -> Captured | None:
        size = layout_bytes(layout)
        if size > self._cache.limit:
            return None
        try:
            with torch.inference_mode(False):
                arena = self._arena_of(size)
                buffers = cut(arena, layout)
            fill(buffers)
            with profiling.range(profiling.CAPTURE, key):
                replay, own_bytes = self._capture_loop(lambda: loop(buffers))
        except RuntimeError as error:  # out of memory, or something that another thread did on this device and no capture survives
            self.failures += 1
            self._failed_in_a_row += 1
            if isinstance(error, torch.OutOfMemoryError):
                self._cache.clear()
                self._arena = None
                if isinstance(self._capture_loop, _CudaCapture):
                    self._capture_loop.pool = None  # PyTorch forgets one without graphs, and then refuses it
            warnings.warn(f"disa_fast: this call runs without a CUDA graph ({key}), since capturing failed: {error}", stacklevel=2)
            return None
        entry = Captured(replay, buffers, arena, own_bytes)
        self.captures += 1
        self._failed_in_a_row = 0
        self._cache.put(key, entry)
        return entry

    def _arena_of(self, size: int) -> Tensor:
        if self._arena is None or self._arena.nbytes < size:
            self._arena = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._arena

    def _wait(self) -> None:
        if self._free is not None:
            torch.cuda.current_stream(self.device).wait_event(self._free)

    def _release(self, arena: Tensor) -> None:
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            arena.record_stream(stream)
            self._free = self._free or torch.cuda.Event()
            self._free.record(stream)


class _CudaCapture:
    """Captures on a side stream, in a mode that leaves other threads alone, into one memory pool for all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self.pool: tuple[int, int] | None = None

    def __call__(self, loop: Callable[[], None]) -> tuple[Replay, int]:
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                loop()  # compiles kernels and sets up libraries, none of which may happen during a capture
                self._stream.synchronize()
                free = torch.cuda.mem_get_info(self.device)[0]
                with _without_collections():
                    with _default_generator_set_aside():
                        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    try:
                        loop()
                    finally:
                        graph.capture_end()
        finally:
            caller.wait_stream(self._stream)  # also where it failed: what it worked on may go to others now
        return graph.replay, max(0, free - torch.cuda.mem_get_info(self.device)[0])


@contextmanager
def _without_collections() -> Iterator[None]:
    """A garbage collection might free something of CUDA's, which ends a capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


_setting_aside = threading.Lock()


@contextmanager
def _default_generator_set_aside() -> Iterator[None]:
    """When a capture begins, PyTorch puts the state of this device's default generator into a mode in which drawing from it
    elsewhere is an error until the capture ends, and for ever if it fails. It gets a copy: nothing is drawn in these graphs."""
    with _setting_aside:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        own = generator.graphsafe_get_state()
        generator.graphsafe_set_state(generator.clone_state())
        try:
            yield
        finally:
            generator.graphsafe_set_state(own)


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
