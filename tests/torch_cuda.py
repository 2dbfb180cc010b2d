"""torch.cuda as captures meet it, on the CPU: its streams, events, graphs, memory pools and cuBLAS's workspaces, with what each
version of PyTorch refuses, forgets and breaks.

Nothing is computed on it. A loop says that it multiplies by `product()`, and a graph fails at its replay, as on a GPU by an illegal
access, where the memory that its products were captured with is gone.
"""

import contextlib
import itertools
import threading
from dataclasses import dataclass, field

import pytest
import torch

from disa_fast import graphs

VERSIONS = ("2.11", "2.13", "2.14")
SPOILED = "CUDA error: operation failed due to a previous error during capture"
STREAMS = 32
GRAPH_BYTES = 1000  # that every capture seems to take


@dataclass(eq=False)
class Workspace:
    """Of cuBLAS, for one thread and stream. pool: where it lies, None among everybody's memory."""

    pool: tuple[int, int] | None
    kept: bool = True


@dataclass(eq=False)
class Pool:
    shares: int = 0
    underway: bool = False


@dataclass(eq=False)
class Stream:
    cuda_stream: int
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    cuda: "TorchCuda | None" = None

    def synchronize(self) -> None:
        self.cuda.spoil(self.cuda_stream)

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass


class TorchCuda:
    """version: of PyTorch. Up to 2.12 capture_end throws before it ends allocating to the pool, from 2.14 on a graph whose capture
    failed gives back its share of the pool; from 2.13 on a graph's end clears the workspaces of the stream of its capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        self.version = VERSIONS.index(version)
        self.pools: dict[tuple[int, int], Pool] = {}
        self.workspaces: dict[tuple[int, int], Workspace] = {}
        self.capturing: dict[int, Graph] = {}
        self.spoiled: set[int] = set()  # streams whose capture cannot succeed any more
        self.to_spoil = ""  # of the next capture: its "begin", "end" or "instantiation"
        self.recorded: list[tuple[torch.Tensor, Stream]] = []  # by Tensor.record_stream
        self.waits: list[str] = []  # of the host
        self.events: list[Stream] = []  # that recorded one
        self.aborted: list[str] = []  # errors of destructors, which end the process
        self._numbers, self._asked = itertools.count(1), itertools.count()
        self._handed_out: dict[int, itertools.cycle] = {}
        self._here = threading.local()
        self.default = Stream(0, cuda=self)
        self._put_in_place(monkeypatch)

    def _put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Event:
            def record(self, stream: Stream) -> None:
                cuda.events.append(stream)

            def synchronize(self) -> None:
                cuda.waits.append("event")

        def new_stream(device: object = None, priority: int = 0) -> Stream:
            made = [Stream(next(self._numbers), cuda=self) for _ in range(STREAMS)]
            return next(self._handed_out.setdefault(priority, itertools.cycle(made)))

        for name, value in {
            "Stream": new_stream,
            "Event": Event,
            "CUDAGraph": lambda: Graph(self),
            "current_stream": lambda device=None: self.current,
            "stream": self.on,
            "synchronize": self.synchronize,
            "is_current_stream_capturing": lambda: self.current.cuda_stream in self.capturing,
            "graph_pool_handle": lambda: (0, next(self._numbers)),
            "mem_get_info": lambda device=None: ((1 << 30) - GRAPH_BYTES * next(self._asked), 1 << 30),
            "device": lambda device: contextlib.nullcontext(),
            "default_generators": (Generator(),),
            "current_device": lambda: 0,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.recorded.append((tensor, stream)))
        monkeypatch.setattr(graphs, "GENERATORS_ARE_APART", self.version >= 1)
        monkeypatch.setattr(graphs, "FAILED_CAPTURES_KEEP_THEIR_POOL", self.version == 0)
        monkeypatch.setattr(graphs, "_streams_taken", set())

    # Streams

    @property
    def current(self) -> Stream:
        return getattr(self._here, "stream", self.default)

    @contextlib.contextmanager
    def on(self, stream: Stream):
        before, self._here.stream = self.current, stream
        try:
            yield
        finally:
            self._here.stream = before

    def spoil(self, handle: int) -> None:
        if handle in self.capturing:
            self.spoiled.add(handle)
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def synchronize(self, device: object = None) -> None:
        """A wait for the device ends all captures on it."""
        self.waits.append("device")
        self.spoiled |= self.capturing.keys()

    # Memory

    def end_allocation(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.pools or not self.pools[pool].underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools[pool].underway = False

    def release(self, device: int, pool: tuple[int, int]) -> None:
        self.pools[pool].shares -= 1
        if self.pools[pool].shares < 0:
            raise RuntimeError("uc >= 0 INTERNAL ASSERT FAILED")

    def empty_cache(self) -> None:
        if any(pool.underway for pool in self.pools.values()):
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        if any(pool.shares < 0 for pool in self.pools.values()):
            raise RuntimeError("use_count == 0 INTERNAL ASSERT FAILED")
        self.pools = {name: pool for name, pool in self.pools.items() if pool.shares}

    def product(self) -> None:
        """By cuBLAS, on the current stream."""
        handle = self.current.cuda_stream
        graph = self.capturing.get(handle)
        workspace = self.workspaces.setdefault((threading.get_ident(), handle), Workspace(graph.name if graph else None))
        if graph:
            graph.workspaces.add(workspace)

    def clear_workspaces(self, handle: int | None = None) -> None:
        """Of a stream, or all, as torch.compile(mode="reduce-overhead") does."""
        for key in [key for key in self.workspaces if handle in (None, key[1])]:
            self.workspaces.pop(key).kept = False

    def is_there(self, workspace: Workspace) -> bool:
        pool = self.pools.get(workspace.pool)
        return workspace.kept or (pool is not None and pool.shares > 0)


class Generator:
    def graphsafe_get_state(self) -> str:
        return "own"

    def graphsafe_set_state(self, state: str) -> None:
        pass

    def clone_state(self) -> str:
        return "copy"


class Graph:
    """A CUDAGraph."""

    def __init__(self, cuda: TorchCuda) -> None:
        self.cuda, self.name, self.workspaces = cuda, None, set()
        self.has_share = self.ended = False
        self.handle = 0

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        cuda, self.handle = self.cuda, self.cuda.current.cuda_stream
        assert capture_error_mode == "thread_local"
        assert self.handle != 0, "CUDA graphs must be captured on a non-default stream"
        known = cuda.pools.get(pool)
        if known and known.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        if known and not known.shares:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        known = cuda.pools.setdefault(pool, Pool())
        known.shares += 1
        known.underway = self.has_share = True
        self.name = pool
        if cuda.to_spoil == "begin":
            cuda.to_spoil = ""
            raise RuntimeError(SPOILED)
        cuda.capturing[self.handle] = self

    def capture_end(self) -> None:
        cuda = self.cuda
        del cuda.capturing[self.handle]
        pool = cuda.pools[self.name]
        spoiled = self.handle in cuda.spoiled or cuda.to_spoil == "end"
        cuda.spoiled.discard(self.handle)
        if not spoiled or cuda.version >= 1:
            pool.underway = False
        if spoiled:
            cuda.to_spoil = ""
            raise RuntimeError(SPOILED)
        self.ended = True
        if cuda.to_spoil == "instantiation":
            cuda.to_spoil = ""
            raise RuntimeError("CUDA error: out of memory")

    def pool(self) -> tuple[int, int]:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self.name

    def replay(self) -> None:
        assert self.ended
        if not all(map(self.cuda.is_there, self.workspaces)):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def reset(self) -> None:
        if self.has_share and (self.ended or self.cuda.version >= 2):
            if self.ended and self.cuda.version >= 1:
                self.cuda.clear_workspaces(self.handle)
            self.cuda.release(0, self.name)
            self.has_share = self.ended = False

    def __del__(self) -> None:
        try:
            self.reset()
        except RuntimeError as error:
            self.cuda.aborted.append(str(error))
