"""CUDA graphs of whole denoising loops, one for each (step bucket, row bucket) that recurs.

A graph replays over the addresses that it was captured with. Here those are named buffers, cut from one arena that all graphs of
a head share: a call fills the inputs, replays, and copies the result out. Calls therefore wait for each other, also across
streams. Once captured, a call waits on its own stream; on the host only for the lock, while another thread launches. A call that
captures waits on the host for its own stream and compiles, and calls from other threads wait for that. Noise and coefficients are
inputs, so one graph serves every seed, solver, guidance scale and temperature of its shape.

Other threads may launch, allocate, and wait for streams and events during a capture, which is begun in CUDA's thread-local mode. A
wait for the whole device, torch.cuda.synchronize(), may end it: that call runs without a graph and a later one captures. Before
torch 2.13 a number drawn on the GPU by another thread in the moment in which a capture begins may fail ("Offset increment outside
graph capture") or come twice: warm up (MLPHead.warmup, or one image) before other threads draw there.

Of a graph's memory, working space and what cuBLAS takes (32 MiB on compute capability 9.0 for each thread that captures) lie in a
pool of the head's own. What an evicted graph had there serves the head's next one; it is given back with the last of them.

What decides (buckets, least recently used out, bytes) is apart from CUDA, and is tested without a GPU.
"""

from __future__ import annotations

import gc
import math
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from . import profiling

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], tuple[Replay, int]]

ALIGNMENT = 256
DEFAULT_MEGABYTES = 1024
MAX_FAILURES = 3  # to capture, one after the other, after which a head goes on without graphs
MAX_ROWS = 8192  # beyond, launches cost nothing beside the arithmetic

STREAMS = 32  # of each device and priority that PyTorch has, and hands out in turn
PRIORITY = -2  # of streams for captures: those of 0 and -1 are other people's

# Since torch 2.13 the default generator keeps what a capture needs apart from what others draw.
GENERATORS_ARE_APART = torch.__version__ >= "2.13"
# Up to torch 2.12 a CUDAGraph whose capture failed never gives back its share of the memory pool. Later ones may, by version: they
# are left to it, since a share given back twice is one taken from a graph that lives.
FAILED_CAPTURES_KEEP_THEIR_POOL = torch.__version__ < "2.13" and torch.version.hip is None


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


class Buffers(dict[str, Tensor]):
    """Tensors by name, cut from `arena` one behind the other."""

    def __init__(self, arena: Tensor, named: Mapping[str, Tensor]) -> None:
        super().__init__(named)
        self.arena = arena

    def span(self, first: str, last: str) -> Tensor:
        """The bytes from where one begins to where another, behind it, ends."""
        start, end = (self[name].data_ptr() - self.arena.data_ptr() for name in (first, last))
        return self.arena[start : end + self[last].nbytes]


def cut(arena: Tensor, layout: Layout) -> Buffers:
    """The buffers of a layout in `arena`, a uint8 tensor of layout_bytes(layout) or more."""
    named, at = {}, 0
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        named[name] = arena[at : at + size].view(dtype).view(shape)
        at += _up(size)
    return Buffers(arena, named)


def allocate(layout: Layout, device: torch.device) -> Buffers:
    with torch.inference_mode(False):
        return cut(torch.empty(layout_bytes(layout), dtype=torch.uint8, device=device), layout)


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
            try:
                fill(entry.buffers)
                with profiling.range(profiling.REPLAY, key):
                    entry.replay()
                return result(entry.buffers)
            finally:  # also after an error: what was launched before it may still run
                if self.device.type == "cuda":
                    entry.arena.record_stream(torch.cuda.current_stream(self.device))
                self._release()

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
            if self.device.type == "cuda":
                arena.record_stream(torch.cuda.current_stream(self.device))
            fill(buffers)
            with profiling.range(profiling.CAPTURE, key):
                replay, own_bytes = self._capture_loop(lambda: loop(buffers))
        except BaseException as error:
            self._release()
            # Out of memory, or something that another thread did on this device and no capture survives
            if not isinstance(error, RuntimeError):
                raise
            self.failures += 1
            self._failed_in_a_row += 1
            if isinstance(error, torch.OutOfMemoryError):
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()  # which has waited for the last replay
                self._cache.clear()
                self._arena = None
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

    def _release(self) -> None:
        """The arena is the next call's once this stream has done what was asked of it until now."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            if self._free is None:
                self._free = torch.cuda.Event()
                # Graphs may not go, and their pool with them, before the last replay has ended. A wait for an event is one that
                # another thread's capture survives.
                weakref.finalize(self, self._free.synchronize).atexit = False
            self._free.record(stream)


class _CudaCapture:
    """Captures in a mode that leaves other threads alone, into one memory pool for all graphs of a head."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Held by its graphs alone: PyTorch forgets a pool without any, and then refuses it.
        self._pool: Callable[[], _Pool | None] = lambda: None

    def __call__(self, loop: Callable[[], None]) -> tuple[Replay, int]:
        # Compiles kernels and sets up libraries, none of which may happen during a capture. Not on the stream of captures, so that
        # cuBLAS, which keeps a workspace for each stream, takes the graphs' one from their pool.
        loop()
        torch.cuda.current_stream(self.device).synchronize()  # also ends every replay before, so that graphs may be evicted
        pool = self._pool() or _Pool(self.device)
        self._pool = weakref.ref(pool)
        free = torch.cuda.mem_get_info(self.device)[0]
        with torch.cuda.stream(pool.stream), _without_collections():
            graph, began = torch.cuda.CUDAGraph(), False
            try:
                with _default_generator_set_aside():
                    graph.capture_begin(pool=pool.id, capture_error_mode="thread_local")
                began = True
                try:
                    loop()
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            except BaseException:
                self._pool = lambda: None  # the next capture gets another; graphs that live keep theirs
                _abandon(graph, began, pool)
                raise
        return _CapturedGraph(graph, pool).replay, max(0, free - torch.cuda.mem_get_info(self.device)[0])


class _Pool:
    """Memory for the graphs of one head, and a stream on which nothing but their captures happens.

    A workspace of cuBLAS belongs to a thread and a stream, and graphs keep its address. So two heads, whose graphs may run at the
    same time, have two streams. What PyTorch clears (on a graph's end the workspaces of its stream, by version; with
    torch.compile's own graphs all of them) goes back to the pool and stays where it is as long as one of the pool's graphs lives;
    those that live may share it, since they never run at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self.id = torch.cuda.graph_pool_handle()
        self.stream = _unshared_stream(device)
        weakref.finalize(self, _streams_taken.discard, self.stream.cuda_stream).atexit = False


@dataclass(eq=False)
class _CapturedGraph:
    graph: torch.cuda.CUDAGraph
    pool: _Pool  # second, so that it goes after the graph

    def replay(self) -> None:
        self.graph.replay()


_streams_taken: set[int] = set()
_taking_stream = threading.Lock()


def _unshared_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no other pool has. They come in turn, so those that no pool has had come first: before torch 2.13 cuBLAS goes
    on using the workspace that a stream has in a pool which is no more, and loses it where somebody clears all workspaces."""
    with _taking_stream:
        for _ in range(STREAMS):
            stream = torch.cuda.Stream(device, priority=PRIORITY)
            if stream.cuda_stream not in _streams_taken:
                _streams_taken.add(stream.cuda_stream)
                return stream
    raise RuntimeError(f"all {STREAMS} streams that there are for captures belong to the graphs of other heads")


_abandoned: list[torch.cuda.CUDAGraph] = []


def _abandon(graph: torch.cuda.CUDAGraph, began: bool, pool: _Pool) -> None:
    """Undo for the memory allocator what a capture that failed began. Otherwise it goes on allocating to the pool, refuses the
    next capture into it, and frees nothing in torch.cuda.empty_cache()."""
    try:
        graph.pool()
        ended = True  # captured, if not instantiated: gives back its share of the pool itself
    except RuntimeError:
        ended = False
    graph.reset()
    index, took_share = pool.stream.device.index, began
    with suppress(AttributeError, RuntimeError):  # no such function, or ended already, as since torch 2.13
        torch._C._cuda_endAllocateToPool(index, pool.id)
        took_share = True
    if FAILED_CAPTURES_KEEP_THEIR_POOL:
        _abandoned.append(graph)  # the allocator of pinned memory, where nobody can end it, goes on asking this object
        if took_share and not ended:
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_releasePool(index, pool.id)


_captures = 0
_collecting = False
_counting_captures = threading.Lock()


@contextmanager
def _without_collections() -> Iterator[None]:
    """A garbage collection might free something of CUDA's, which ends a capture. On again after the last of several."""
    global _captures, _collecting
    with _counting_captures:
        if _captures == 0:
            _collecting = gc.isenabled()
            gc.disable()
        _captures += 1
    try:
        yield
    finally:
        with _counting_captures:
            _captures -= 1
            if _captures == 0 and _collecting:
                gc.enable()


_setting_aside = threading.Lock()


@contextmanager
def _default_generator_set_aside() -> Iterator[None]:
    """When a capture begins, PyTorch before 2.13 puts the state of this device's default generator into a mode in which drawing
    from it elsewhere is an error until the capture ends, and for ever if it fails. It gets a copy: nothing is drawn in these
    graphs. What other threads draw in that moment, they draw from the copy."""
    if GENERATORS_ARE_APART:
        yield
        return
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
