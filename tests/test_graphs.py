"""The policy of CUDA graphs, and their use by a backend, with a capture that records a Python function: no GPU needed."""

import contextlib
import threading
import types

import pytest
import torch
from random_parameters import random_parameters
from recorder import Recorder, recorded_graphs

from disa_fast import Linear, MLPHead, explain, graphs, solvers
from disa_fast.backends import triton
from disa_fast.graphs import ByteLRU, Captured, Graphs, cut, layout_bytes, row_bucket
from disa_fast.heads.mlp import MLPSpec

CPU = torch.device("cpu")


# Buckets, buffers, bytes -----------------------------------------------------------------------------------------------


def test_row_buckets():
    buckets = [row_bucket(rows) for rows in range(1, 10000)]
    assert [row_bucket(rows) for rows in (1, 2, 3, 5, 9, 16, 17, 33, 64, 65, 129, 257, 2048)] == [
        2, 2, 4, 8, 16, 16, 32, 48, 64, 80, 160, 320, 2048,
    ]  # fmt: skip
    assert buckets == sorted(buckets)
    assert all(row_bucket(bucket) == bucket and bucket % 2 == 0 for bucket in buckets)
    assert all(
        rows <= bucket <= max(2 * rows, 2) and (rows <= 64 or bucket <= 1.25 * rows) for rows, bucket in enumerate(buckets, 1)
    )


def test_tile_choices_never_split_a_bucket():
    """A call and the bucket that it is padded to take the same tiles."""
    for dtype in triton.tiles.HEURISTIC:
        for rows in range(1, 3000):
            assert triton.tiles.choose("any", dtype, 1280, rows) is triton.tiles.choose("any", dtype, 1280, row_bucket(rows))


def test_buffers_are_cut_apart_and_aligned():
    layout = {"a": ((3, 5), torch.float32), "none": ((0, 7), torch.half), "b": ((7,), torch.bfloat16), "c": ((2, 2), torch.double)}
    arena = torch.zeros(layout_bytes(layout), dtype=torch.uint8)
    buffers = cut(arena, layout)
    for name, (shape, dtype) in layout.items():
        assert buffers[name].shape == shape
        assert buffers[name].dtype == dtype
        assert (buffers[name].data_ptr() - arena.data_ptr()) % graphs.ALIGNMENT == 0 or buffers[name].numel() == 0
        buffers[name].fill_(len(name) + ord(name[0]))
    assert all((buffers[name] == len(name) + ord(name[0])).all() for name in layout)
    with pytest.raises(RuntimeError):
        cut(arena[:-300], layout)


def entry(arena: torch.Tensor, own_bytes: int = 0) -> Captured:
    return Captured(lambda: None, {}, arena, own_bytes)


def test_least_recently_used_goes_first():
    cache, arena = ByteLRU(limit=1000), torch.empty(400, dtype=torch.uint8)
    for key in "abc":
        cache.put(key, entry(arena, own_bytes=200))
    assert cache.bytes == 400 + 3 * 200
    cache.get("a")
    cache.put("d", entry(arena, own_bytes=200))
    assert [key in cache for key in "abcd"] == [True, False, True, True]
    assert (cache.evictions, cache.bytes) == (1, 1000)
    assert cache.get("b") is None


def test_a_shared_arena_counts_once_and_goes_with_its_last_graph():
    cache, old, new = ByteLRU(limit=1000), torch.empty(300, dtype=torch.uint8), torch.empty(600, dtype=torch.uint8)
    cache.put("a", entry(old))
    cache.put("b", entry(old))
    assert cache.bytes == 300
    cache.put("c", entry(new))
    assert cache.bytes == 900
    cache.put("d", entry(new, own_bytes=150))
    assert list("cd") == [key for key in "abcd" if key in cache]
    assert cache.bytes == 750


def test_the_newest_stays_even_over_the_bound():
    cache = ByteLRU(limit=100)
    cache.put("a", entry(torch.empty(90, dtype=torch.uint8)))
    cache.put("b", entry(torch.empty(190, dtype=torch.uint8)))
    assert "b" in cache
    assert len(cache) == 1


@pytest.mark.parametrize("text", ["1 GiB", "-5", "0.5"])
def test_a_bound_that_is_no_number(monkeypatch, text):
    monkeypatch.setenv("DISA_FAST_GRAPHS_MB", text)
    with pytest.raises(ValueError, match="DISA_FAST_GRAPHS_MB: expected a whole number of MiB"):
        Graphs(CPU)


# A whole cache, on a loop that doubles x -------------------------------------------------------------------------------


def double(cache: Graphs, x: torch.Tensor, key: str = "key", rows: int = 2) -> torch.Tensor | None:
    return cache.run(
        key,
        rows,
        lambda: {"x": ((rows,), torch.float32)},
        fill=lambda buffers: buffers["x"][: len(x)].copy_(x),
        loop=lambda buffers: buffers["x"].mul_(2),
        result=lambda buffers: buffers["x"][: len(x)].clone(),
    )


def test_replays_with_new_inputs_and_counts():
    recorder = Recorder()
    cache = Graphs(CPU, recorder)
    first = double(cache, torch.tensor([1.0, 2.0]))
    second = double(cache, torch.tensor([5.0, 6.0]))
    assert first.tolist() == [2, 4]
    assert second.tolist() == [10, 12]
    double(cache, torch.tensor([1.0]), key="other")
    assert recorder.captured == 2
    assert cache.counters() == {
        "captures": 2, "hits": 1, "evictions": 0, "eager": 0, "failures": 0, "graphs": 2, "bytes": 256 + 2 * 1000,
    }  # fmt: skip


def test_largest_first_shares_one_arena_and_smallest_first_does_not():
    def total(sizes):
        cache = Graphs(CPU, lambda loop: (loop, 0))
        for rows in sizes:
            double(cache, torch.ones(rows), key=str(rows), rows=rows)
        return cache.counters()["bytes"]

    assert total([1000, 500, 100]) == 4096
    assert total([100, 500, 1000]) == 512 + 2048 + 4096


def test_declines_what_it_should(monkeypatch):
    def declined(cache, rows=2):
        before = cache.counters()["eager"]
        out = double(cache, torch.ones(1), rows=rows)
        return out is None and cache.counters()["eager"] == before + 1

    cache = Graphs(CPU, Recorder())
    assert not declined(cache)
    assert declined(cache, rows=graphs.MAX_ROWS + 1)
    assert declined(Graphs(CPU))
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    assert declined(cache)
    monkeypatch.delenv("DISA_FAST_GRAPHS")
    monkeypatch.setenv("DISA_FAST_GRAPHS_MB", "0")
    assert declined(Graphs(CPU, Recorder()))


def test_inference_mode_leaves_no_mark():
    cache = Graphs(CPU, Recorder())
    with torch.inference_mode():
        double(cache, torch.ones(2))
    assert double(cache, torch.ones(2)).tolist() == [2, 2]


def test_a_capture_that_fails_is_said_and_does_without():
    recorder = Recorder()

    def capture(loop):
        if recorder.captured == 1:
            raise torch.OutOfMemoryError("no memory left")
        return recorder(loop)

    cache = Graphs(CPU, capture)
    double(cache, torch.ones(1), key="a")
    for failures in range(1, graphs.MAX_FAILURES + 1):
        with pytest.warns(UserWarning, match=r"without a CUDA graph \(b\), since capturing failed: no memory left"):
            assert double(cache, torch.ones(1), key="b") is None
        assert cache.counters()["failures"] == failures
    assert double(cache, torch.ones(1), key="b") is None
    assert cache.counters() | {"graphs": 0, "evictions": 1, "captures": 1, "failures": 3, "eager": 4} == cache.counters()


def test_a_capture_that_another_thread_spoils_costs_nothing_but_itself():
    """The graphs that there are stay, and failures count only as long as none succeeds in between."""
    spoiled = iter([False, True, True, False, True, True, False])

    def capture(loop):
        if next(spoiled):
            raise RuntimeError("operation failed due to a previous error during capture")
        return loop, 0

    cache = Graphs(CPU, capture)
    double(cache, torch.ones(1), key="a")
    for key in "bc":
        for _ in range(2):
            with pytest.warns(UserWarning, match="previous error during capture"):
                assert double(cache, torch.ones(1), key=key) is None
        assert double(cache, torch.ones(1), key=key).tolist() == [2]
    assert double(cache, torch.ones(1), key="a").tolist() == [2]
    assert cache.counters() | {"graphs": 3, "evictions": 0, "captures": 3, "failures": 4, "hits": 1} == cache.counters()


@pytest.mark.parametrize("apart", [False, True])
def test_the_default_generator_has_its_own_state_again_after_a_capture_began(monkeypatch, apart):
    """And is not touched where PyTorch keeps apart what a capture needs of it."""

    class Generator:
        state = "own"

        def graphsafe_get_state(self):
            return self.state

        def clone_state(self):
            return f"copy of {self.state}"

        def graphsafe_set_state(self, state):
            self.state = state

    generator = Generator()
    monkeypatch.setattr(graphs, "GENERATORS_ARE_APART", apart)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for spoiled in (False, True):
        with contextlib.suppress(RuntimeError), graphs._default_generator_set_aside():
            assert generator.state == ("own" if apart else "copy of own")
            if spoiled:
                raise RuntimeError("capture failed")
        assert generator.state == "own"


def test_many_threads_share_the_buffers():
    cache, wrong = Graphs(CPU, Recorder()), []

    def work(value):
        for _ in range(50):
            if double(cache, torch.full((64,), value), rows=64).ne(2 * value).any():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Under the Triton backend ----------------------------------------------------------------------------------------------


@pytest.fixture
def head():
    return MLPHead.from_state_dict(random_parameters(MLPSpec(16, 32, 1, 32), 0))


def draws(rows: int, steps: int, cfg: float) -> dict:
    n = rows // 2 if cfg != 1 else rows
    return {"z": torch.randn(rows, 32), "cfg": cfg, "noise": torch.randn(n, 16), "step_noise": torch.randn(steps, n, 16)}


@pytest.mark.interpreter
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_replay_is_bitwise_the_loop_for_every_number_of_rows_in_a_bucket(head, cfg, monkeypatch):
    """Twice a graph with other inputs, and once without one; what a bucket adds must not show, NaN of an earlier call included."""
    table = solvers.ddpm(3)
    calls = [draws(rows, 3, cfg) for rows in (8, 6, 6, 2, 14, 12)]
    poison = draws(8, 3, cfg)
    poison["z"][:] = torch.nan
    cache = recorded_graphs(head)
    head.denoise(table=table, backend="triton", **poison)
    replayed = [head.denoise(table=table, backend="triton", **call) for call in calls]
    assert cache.counters()["captures"] == 3  # 2, 8 and 16
    assert cache.counters()["hits"] == 4
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    for call, out in zip(calls, replayed, strict=True):
        assert out.isfinite().all()
        assert torch.equal(out, head.denoise(table=table, backend="triton", **call))
    assert cache.counters()["eager"] == len(calls)


@pytest.mark.interpreter
def test_one_graph_serves_other_solvers_scales_temperatures_and_times(head):
    cache, call = recorded_graphs(head), draws(4, 4, 3.0)
    for table in (solvers.ddpm(4), solvers.ddpm(4, clip=700), solvers.ddim(4)):
        for cfg, temperature in ((3.0, 1.0), (1.5, 0.7)):
            settings = {**call, "table": table, "cfg": cfg, "temperature": temperature}
            out, plain = (head.denoise(backend=backend, **settings) for backend in ("triton", "reference"))
            torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    assert cache.counters()["captures"] == 1


@pytest.mark.interpreter
def test_other_steps_rows_guidance_noise_and_precision_are_other_graphs(head):
    cache = recorded_graphs(head)
    for rows, steps, cfg in ((4, 2, 3.0), (4, 3, 3.0), (8, 2, 3.0), (4, 2, 1.0)):
        head.denoise(table=solvers.ddpm(steps), backend="triton", **draws(rows, steps, cfg))
    head.denoise(table=solvers.dpm_solver(2), backend="triton", **{**draws(4, 2, 3.0), "step_noise": None})
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        head.denoise(table=solvers.ddpm(2), backend="triton", **draws(4, 2, 3.0))
    finally:
        torch.set_float32_matmul_precision(before)
    assert cache.counters()["captures"] == 6
    assert cache.counters()["hits"] == 0


@pytest.mark.parametrize(("set_to", "precision"), [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")])
def test_the_newer_switch_of_float32_products_counts(monkeypatch, set_to, precision):
    """Once it was set, the older getter raises."""

    def raises():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", raises)
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(fp32_precision=set_to))
    assert triton._precision() == precision


@pytest.mark.interpreter
def test_changed_parameters_leave_their_graphs_behind(head):
    recorded_graphs(head)
    call = {"table": solvers.ddpm(2), "backend": "triton", **draws(2, 2, 1.0)}
    before = head.denoise(**call)
    with torch.no_grad():
        head._net.input_proj.bias.add_(1)
    assert not torch.equal(before, head.denoise(**call))
    assert head.graph_counters()["captures"] == 0


@pytest.mark.interpreter
def test_warmup_captures_what_a_generation_then_replays(head):
    cache = recorded_graphs(head)
    state = torch.get_rng_state()
    head.warmup("linear:4-2", K=3, rows=lambda k, K: 4 * (k + 1), backend="triton")
    assert torch.equal(state, torch.get_rng_state())
    sizes = [(key.rows, key.steps) for key in cache._cache._entries]
    assert sizes == [(16, 2), (8, 3), (4, 4)], "largest first"
    assert len({entry.arena.data_ptr() for entry in cache._cache._entries.values()}) == 1
    for k in range(3):
        steps = Linear(4, 2)(k, 3)
        head.denoise(table=solvers.ddpm(steps), backend="triton", **draws(4 * (k + 1), steps, 3.0))
    assert (cache.counters()["captures"], cache.counters()["hits"]) == (3, 3)


@pytest.mark.interpreter
def test_warmup_takes_every_combination_of_steps_and_rows(head):
    cache = recorded_graphs(head)
    head.warmup("linear:3-2", 2, rows=[2, 4, 3], guided=False, backend="triton", solver="dpm_solver", clip="default")
    assert {(key.rows, key.steps, key.guided) for key in cache._cache._entries} == {
        (rows, steps, False) for rows in (2, 4) for steps in (3, 2)
    }


def test_warmup_without_graphs_is_one_short_call(head, monkeypatch):
    seen = []
    monkeypatch.setattr(head, "denoise", lambda z, table, *rest, **named: seen.append((len(z), len(table))))
    head.warmup("linear:50-5", 64, rows=range(2, 16, 2), backend="hoisted")
    assert seen == [(2, 5)]


@pytest.mark.parametrize("rows", [0, 2.5, [2, -4], [None]])
def test_warmup_names_bad_rows(head, rows):
    with pytest.raises((ValueError, TypeError), match=r"rows|iterable"):
        head.warmup("linear:4-2", 2, rows=rows)


@pytest.mark.interpreter
def test_explain_tells_of_graphs(head, capsys):
    assert explain(head)["graphs"] == {}
    recorded_graphs(head)
    head.denoise(table=solvers.ddpm(2), backend="triton", **draws(2, 2, 1.0))
    assert explain(head)["graphs"]["captures"] == 1
    assert "captures: 1" in capsys.readouterr().out


@pytest.mark.interpreter
def test_ranges_of_captures_and_replays(head, nvtx):
    recorded_graphs(head)
    for _ in range(2):
        head.denoise(table=solvers.ddpm(2), backend="triton", **draws(6, 2, 3.0))
    shape = "T=2 rows=8 guided=True noisy=True"
    denoise = "denoise T=2 rows=6 backend=triton"
    assert nvtx.ranges == [denoise, f"capture {shape}", f"replay {shape}", denoise, f"replay {shape}"]
