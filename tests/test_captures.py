"""What captures leave behind, whatever goes wrong, by a stand-in for torch.cuda that behaves as its versions do: no GPU needed."""

import contextlib
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from meanwhile import done_while_capturing
from torch_cuda import GRAPH_BYTES, STREAMS, VERSIONS, TorchCuda

from disa_fast import MLPHead, graphs, solvers
from disa_fast.graphs import Graphs, _CudaCapture
from disa_fast.heads import mlp, packing
from disa_fast.heads.mlp import MLPNet, MLPSpec
from disa_fast.heads.packing import Packing

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=VERSIONS)
def cuda(request, monkeypatch):
    return TorchCuda(monkeypatch, request.param)


@pytest.fixture
def cuda_213(monkeypatch):
    return TorchCuda(monkeypatch, "2.13")


def captured() -> Graphs:
    """The graphs of a head."""
    return Graphs(CPU, _CudaCapture(CPU))


def call(cache: Graphs, key: str, loop: Callable[[], None] = lambda: None) -> str:
    layout = {"x": ((2,), torch.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = cache.run(key, 2, lambda: layout, lambda b: None, lambda b: loop(), lambda b: b["x"])
    return "eager" if out is None else "graph"


def shares(cuda: TorchCuda) -> list[int]:
    return [pool.shares for pool in cuda.pools.values()]


def undone(monkeypatch: pytest.MonkeyPatch, check: Callable[[], None], **parts: object) -> None:
    """The check fails once parts of graphs.py are replaced by what they repair."""
    for name, part in parts.items():
        monkeypatch.setattr(graphs, name, part)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


# A capture that fails --------------------------------------------------------------------------------------------------


def check_a_spoiled_capture(cuda: TorchCuda, how: str) -> None:
    cache = captured()
    assert call(cache, "a", cuda.product) == "graph"
    cuda.to_spoil = how
    assert [call(cache, key, cuda.product) for key in "bbcab"] == ["eager", "graph", "graph", "graph", "graph"]
    assert cache.counters() | {"captures": 3, "failures": 1, "hits": 2, "eager": 1} == cache.counters()
    assert shares(cuda) == ([1, 2] if cuda.version != 1 or how == "instantiation" else [2, 2])
    cuda.empty_cache()
    del cache
    cuda.empty_cache()
    assert len(cuda.pools) == (1 if cuda.version == 1 and how != "instantiation" else 0), "2.13 alone keeps a failed one's share"
    assert not graphs._streams_taken
    assert not cuda.aborted


@pytest.mark.parametrize("how", ["begin", "end", "instantiation"])
def test_a_spoiled_capture_costs_nothing_but_itself(cuda, how):
    """Neither the graphs that there are, nor later ones, nor the allocator's ability to free."""
    check_a_spoiled_capture(cuda, how)


def abandoned_as_it_is(graph, began, pool):
    pass


def released_in_any_case(graph, began, pool):
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(0, pool.id)
    torch._C._cuda_releasePool(0, pool.id)


@pytest.mark.parametrize("how", ["begin", "end"])
def test_without_the_repair_it_ends_all_graphs(monkeypatch, how):
    cuda = TorchCuda(monkeypatch, "2.11")
    undone(monkeypatch, lambda: check_a_spoiled_capture(cuda, how), _abandon=abandoned_as_it_is)


@pytest.mark.parametrize(("version", "how"), [("2.11", "instantiation"), ("2.13", "instantiation"), ("2.14", "end")])
def test_a_share_given_back_twice_is_seen(monkeypatch, version, how):
    cuda = TorchCuda(monkeypatch, version)
    undone(monkeypatch, lambda: check_a_spoiled_capture(cuda, how), _abandon=released_in_any_case)


def test_a_pytorch_without_the_private_functions(monkeypatch):
    cuda = TorchCuda(monkeypatch, "2.13")
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.delattr(torch._C, name)
    check_a_spoiled_capture(cuda, "end")


def test_an_error_of_the_loop_is_what_is_said(cuda):
    """And not that its capture, which it interrupts, cannot be ended."""

    def loop():
        if cuda.capturing:
            cuda.to_spoil = "end"
            raise torch.OutOfMemoryError("no memory left")

    layout = {"x": ((2,), torch.float32)}
    with pytest.warns(UserWarning, match="no memory left"):
        assert captured().run("a", 2, lambda: layout, lambda b: None, lambda b: loop(), lambda b: b["x"]) is None
    assert not cuda.capturing


def test_out_of_memory_forgets_the_pool_with_its_graphs(cuda):
    """PyTorch refuses one that has been given back by all."""
    cache = captured()
    call(cache, "a")

    def loop():
        raise torch.OutOfMemoryError("no memory left")

    assert call(cache, "b", loop) == "eager"
    cuda.empty_cache()
    assert call(cache, "a") == "graph"
    assert shares(cuda) == [1]


# cuBLAS's workspaces ---------------------------------------------------------------------------------------------------


def check_workspaces(cuda: TorchCuda) -> None:
    """Graphs go on when others are evicted, when all workspaces are cleared, and when memory is given back."""
    cache, other = captured(), captured()
    for each in (cache, other):
        for key in "abc":
            assert call(each, key, cuda.product) == "graph"
    used = [
        {w for entry in each._cache._entries.values() for w in entry.replay.__self__.graph.workspaces} for each in (cache, other)
    ]
    assert not used[0] & used[1], "heads, whose graphs may run at the same time, share none"
    cache._cache.limit = graphs.ALIGNMENT + 2 * GRAPH_BYTES
    assert call(cache, "d", cuda.product) == "graph"
    assert cache.counters() | {"evictions": 2, "graphs": 2} == cache.counters()
    cuda.clear_workspaces()
    cuda.empty_cache()
    assert [call(each, key) for each, key in ((cache, "c"), (cache, "d"), (other, "a"))] == ["graph"] * 3
    assert cache.counters()["failures"] == 0


def test_graphs_outlive_what_pytorch_clears(cuda):
    check_workspaces(cuda)


def warmed_up_on_the_stream_of_captures(self: _CudaCapture, loop: Callable[[], None]):
    self.kept = getattr(self, "kept", None) or graphs._Pool(self.device)
    self._pool = lambda: self.kept
    with torch.cuda.stream(self.kept.stream):
        loop()
    return capture(self, loop)


capture = _CudaCapture.__call__


@pytest.mark.parametrize("mutant", ["warmed up on the stream of captures", "one stream for all"])
def test_one_stream_for_warming_up_or_for_all_heads_is_seen(cuda, monkeypatch, mutant):
    if mutant == "one stream for all":
        one = torch.cuda.Stream()
        undone(monkeypatch, lambda: check_workspaces(cuda), _unshared_stream=lambda device: one)
    else:
        monkeypatch.setattr(_CudaCapture, "__call__", warmed_up_on_the_stream_of_captures)
        undone(monkeypatch, lambda: check_workspaces(cuda))


def test_streams_for_captures_come_back_and_run_out(cuda_213):
    heads = [captured() for _ in range(STREAMS + 1)]
    assert [call(head, "a") for head in heads] == ["graph"] * STREAMS + ["eager"]
    del heads[3]
    assert call(heads[-1], "a") == "graph"
    own = {head._cache.get("a").replay.__self__.pool.stream.cuda_stream for head in heads}
    assert len(own) == STREAMS
    assert torch.cuda.Stream().cuda_stream not in own, "nor are they other people's"


# Other threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """Heads believe that their parameters are on a GPU."""
    monkeypatch.setattr(Packing, "device", property(lambda self: GPU))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def small_head() -> MLPHead:
    return MLPHead.from_module(MLPNet(MLPSpec(16, 32, 1, 32)).requires_grad_(False))


def check_forgetting_during_a_capture(cuda: TorchCuda) -> None:
    head, cache = small_head(), captured()
    head.hoisted(torch.float32)
    with done_while_capturing(head.refresh) as loop:
        outcome = call(cache, "a", loop)
    assert not head._packed
    assert outcome == "graph"
    assert "device" not in cuda.waits


def test_weights_are_forgotten_while_another_thread_captures(cuda, on_gpu):
    check_forgetting_during_a_capture(cuda)


def test_a_wait_for_the_device_there_is_seen(cuda, on_gpu, monkeypatch):
    forget = Packing._forget

    def waiting(self):
        torch.cuda.synchronize(self.device)
        forget(self)

    monkeypatch.setattr(Packing, "_forget", waiting)
    undone(monkeypatch, lambda: check_forgetting_during_a_capture(cuda))


def check_streams_that_read(cuda: TorchCuda) -> None:
    """Memory of weights that are forgotten waits for every stream that may be reading them, also by replays, which read all."""
    head, side = small_head(), torch.cuda.Stream()
    first = head.hoisted(torch.float32)
    with torch.cuda.stream(side):
        head.packed("other", torch.float32, lambda p, spec: [p["input_proj.bias"] * 2])
        head.hoisted(torch.float32)
    head.hoisted(torch.float32)
    recorded = {(tensor.data_ptr(), stream.cuda_stream) for tensor, stream in cuda.recorded}
    for tensor in (first.cond[0], first.output[1], first.modulation.keywords["weight"], *head._packed["other", torch.float32]):
        assert {stream for address, stream in recorded if address == tensor.data_ptr()} == {0, side.cuda_stream}
    before = len(cuda.recorded)
    head.hoisted(torch.float32)
    assert len(cuda.recorded) == before, "once for each stream"


def test_every_stream_that_read_weights_is_known(cuda_213, on_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # layers as on a GPU
    check_streams_that_read(cuda_213)


class NeverCleared(set):
    def clear(self) -> None:
        pass


@pytest.mark.parametrize("mutant", ["none recorded", "none anew"])
def test_streams_that_are_not_known_are_seen(cuda_213, on_gpu, monkeypatch, mutant):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    reset = Packing._reset

    def changed(self):
        reset(self)
        self._streams = NeverCleared()

    if mutant == "none recorded":
        monkeypatch.setattr(packing, "tensors_in", lambda held: ())
    else:
        monkeypatch.setattr(Packing, "_reset", changed)
    undone(monkeypatch, lambda: check_streams_that_read(cuda_213))


@pytest.mark.parametrize("mutant", [False, True])
def test_tables_that_go_out_of_use_wait_for_the_streams_that_read_them(cuda_213, on_gpu, monkeypatch, mutant):
    """Which lie in caches of their own."""
    if mutant:
        monkeypatch.setattr(mlp, "read_here", lambda kept: kept)
    kept, side = mlp.TimeTables(lambda t: t.float(), CPU), torch.cuda.Stream()
    for stream in (cuda_213.default, side, side):
        with torch.cuda.stream(stream):
            made = kept(solvers.ddpm(3))
    read = [stream.cuda_stream for tensor, stream in cuda_213.recorded if tensor is made]
    assert read == ([] if mutant else [0, side.cuda_stream, side.cuda_stream])


def test_what_is_made_within_a_capture_is_not_kept(cuda_213, on_gpu):
    """Of a head that another thread made forget its weights since the loop was warmed up: nothing is computed there."""
    head, cache = small_head(), captured()

    def loop():
        if torch.cuda.is_current_stream_capturing():
            head.refresh()
        head.hoisted(torch.float32)

    assert call(cache, "a", loop) == "eager"
    assert not head._packed
    head.hoisted(torch.float32)
    assert call(cache, "b", lambda: head.hoisted(torch.float32)) == "graph"


@pytest.mark.parametrize("fails", [False, True])
def test_an_arena_waits_for_the_stream_that_fills_it(cuda, monkeypatch, fails):
    """Also where the capture then fails, and nothing is replayed."""
    monkeypatch.setattr(Graphs, "_arena_of", lambda self, size: torch.empty(size, dtype=torch.uint8))
    cuda.to_spoil = "end" if fails else ""
    side, cache = torch.cuda.Stream(), Graphs(GPU, _CudaCapture(GPU))
    with torch.cuda.stream(side):
        assert call(cache, "a") == ("eager" if fails else "graph")
    assert [stream.cuda_stream for _, stream in cuda.recorded] == [side.cuda_stream] * (1 if fails else 2)


def check_an_error_releases_the_arena(cuda: TorchCuda, where: str) -> None:
    def wrong(buffers: graphs.Buffers) -> torch.Tensor:
        raise LookupError("wrong")

    parts = {"fill": lambda b: None, "loop": lambda b: None, "result": lambda b: b["x"]}
    side, cache, layout = torch.cuda.Stream(), Graphs(GPU, _CudaCapture(GPU)), {"x": ((2,), torch.float32)}
    with torch.cuda.stream(side), pytest.raises(LookupError, match="wrong"):
        cache.run("a", 2, lambda: layout, *(parts | {where: wrong}).values())
    assert side in cuda.events


@pytest.mark.parametrize("where", ["fill", "loop", "result"])
def test_the_next_call_waits_for_one_that_raised(cuda, monkeypatch, where):
    """Its launches before the error may still read and write the arena that they share."""
    monkeypatch.setattr(Graphs, "_arena_of", lambda self, size: torch.empty(size, dtype=torch.uint8))
    check_an_error_releases_the_arena(cuda, where)
    monkeypatch.setattr(Graphs, "_release", lambda self: None)
    with pytest.raises(AssertionError):
        check_an_error_releases_the_arena(cuda, where)


def test_graphs_go_after_their_last_replay(cuda, monkeypatch):
    monkeypatch.setattr(Graphs, "_arena_of", lambda self, size: torch.empty(size, dtype=torch.uint8))
    cache = Graphs(GPU, _CudaCapture(GPU))
    assert [call(cache, key) for key in "aab"] == ["graph"] * 3
    assert cuda.waits == []
    del cache
    assert cuda.waits == ["event"]


def test_collections_stay_off_until_the_last_capture_ends():
    """One of several that overlap does not switch them on for the others."""
    assert gc.isenabled()
    one, two = graphs._without_collections(), graphs._without_collections()
    with one:
        two.__enter__()
        assert not gc.isenabled()
    assert not gc.isenabled()
    two.__exit__(None, None, None)
    assert gc.isenabled()
    gc.disable()
    try:
        with graphs._without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
