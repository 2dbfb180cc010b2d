"""On a GPU: the Triton backend, CUDA graphs and what goes around them. The formulas are checked without one in test_triton.py."""

import copy
import dataclasses
import functools
import threading

import pytest
import torch
from compare import assert_as_good_as
from random_parameters import random_parameters
from upstream_like import small_mar

from disa_fast import MLPHead, graphs, solvers
from disa_fast.backends import triton
from disa_fast.heads.mlp import MLPSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default", "error:disa_fast"),  # other people's warnings depend on their versions
    pytest.mark.skipif(torch.cuda.is_available() and triton.is_interpreted(), reason="TRITON_INTERPRET=1 is set; unset it"),
]

GPU = torch.device("cuda")


def fitted_head(width: int, depth: int, dtype: torch.dtype) -> MLPHead:
    """On the GPU. A small output layer keeps trajectories tame, as training does, so that errors compare precision and not luck."""
    sd = random_parameters(MLPSpec(16, width, depth, 128), 0)
    sd["final_layer.linear.weight"] *= 0.3
    return MLPHead.from_state_dict({name: tensor.to(GPU, dtype) for name, tensor in sd.items()})


def call(rows: int, steps: int, cfg: float, dtype: torch.dtype = torch.bfloat16) -> dict:
    n, table = rows // 2 if cfg != 1 else rows, solvers.ddpm(steps)  # of fewer than `steps` steps, where some are clipped
    noise, step_noise = torch.randn(n, 16, device=GPU), torch.randn(len(table), n, 16, device=GPU)
    z = torch.randn(rows, 128, device=GPU).to(dtype)
    return {"z": z, "table": table, "cfg": cfg, "noise": noise, "step_noise": step_noise}


@pytest.fixture(scope="module")
def head() -> MLPHead:
    return fitted_head(256, 2, torch.bfloat16)


def run(head: MLPHead, settings: dict, **how) -> torch.Tensor:
    return head.denoise(**settings, **{"backend": "triton", **how})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(
    ("width", "depth", "rows"), [(1280, 2, 2), (1280, 2, 14), (1024, 2, 60), (272, 3, 250), (1536, 1, 1000), (1280, 1, 2048)]
)
def test_is_as_good_as_eager(dtype, cfg, width, depth, rows):
    low = fitted_head(width, depth, dtype)
    exact = MLPHead.from_state_dict({name: p.double() for name, p in low._net.state_dict().items()})
    results = []
    for _ in range(max(1, 120 // rows)):
        settings = call(rows, 6, cfg, dtype)
        truth = exact.denoise(**{**settings, "z": settings["z"].double()}, backend="reference")
        results.append((run(low, settings), run(low, settings, backend="reference"), truth))
    ours, eager, truth = (torch.cat(parts).cpu() for parts in zip(*results, strict=True))
    assert_as_good_as(ours, eager, truth, dtype)


@pytest.mark.parametrize("rows", [2, 6, 16, 40, 300])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_replay_equals_the_same_bucket_without_a_graph(head, rows, cfg, monkeypatch):
    """Twice with other inputs. Up to 16 rows bitwise for any number of rows in the bucket, else for the bucket's own."""
    sizes = [rows, graphs.row_bucket(rows)] if rows <= 16 else [graphs.row_bucket(rows)] * 2
    settings = [call(size, 5, cfg) for size in sizes]
    head.refresh()
    replayed = [run(head, some) for some in settings]
    counters = head.graph_counters()
    assert (counters["captures"], counters["hits"]) == (1, 1)
    assert counters["bytes"] > 0
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    for some, out in zip(settings, replayed, strict=True):
        assert torch.equal(out, run(head, some))


@pytest.mark.parametrize(("rows", "batch_invariant"), [(16, False), (130, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(rows, batch_invariant, dtype):
    head, settings = fitted_head(1280, 1, dtype), call(rows, 3, 1.0, dtype)
    together = run(head, settings, batch_invariant=batch_invariant)
    for some in ([rows - 1], [3, 0, 5], list(range(rows // 2))):
        part = {"z": settings["z"][some], "noise": settings["noise"][some], "step_noise": settings["step_noise"][:, some]}
        assert torch.equal(run(head, {**settings, **part}, batch_invariant=batch_invariant), together[some])


@pytest.mark.parametrize("rows", [4, 500])
def test_the_same_call_twice_is_the_same(head, rows):
    settings = call(rows, 5, 3.0)
    assert torch.equal(run(head, settings), run(head, settings))


def test_one_seed_gives_one_result_with_graphs_and_without(head, monkeypatch):
    def drawn():
        torch.manual_seed(5)
        out = head.denoise(torch.ones(6, 128, device=GPU).bfloat16(), solvers.ddpm(5), cfg=2.0)
        return out, torch.rand((), device=GPU), torch.rand(())

    head.refresh()
    first, replayed = drawn(), drawn()
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    for one, two, three in zip(first, replayed, drawn(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_several_streams(head):
    settings = [call(8, 20, 3.0) for _ in range(12)]
    expected = [run(head, some) for some in settings]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for i, some in enumerate(settings):
        with torch.cuda.stream(streams[i % 4]):
            results.append(run(head, some))
    torch.cuda.synchronize()
    assert all(torch.equal(one, two) for one, two in zip(results, expected, strict=True))


@pytest.mark.filterwarnings("default:disa_fast")  # a capture may be spoiled by another thread's wait, and then says so
def test_captures_while_other_threads_use_the_gpu(head):
    """Others draw, allocate and wait meanwhile; nobody gets an error or a wrong result."""
    head.refresh()
    settings, stop, wrong = {steps: call(6, steps, 3.0) for steps in range(2, 8)}, threading.Event(), []
    expected = {steps: run(head, some) for steps, some in settings.items()}
    torch.cuda.synchronize()
    head.refresh()

    def disturb():
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                try:
                    x = torch.randn(512, 512, device=GPU)
                    float((x @ x).sum())
                except RuntimeError as error:
                    if graphs.GENERATORS_ARE_APART or "Offset increment outside graph capture" not in str(error):
                        wrong.append(error)  # the other is told of in graphs.py, and the next draw is right again
                        return

    def work(steps):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                if not torch.equal(run(head, settings[steps]), expected[steps]):
                    wrong.append(steps)

    other = threading.Thread(target=disturb)
    workers = [threading.Thread(target=work, args=(steps,)) for steps in settings]
    for thread in (other, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    other.join()
    assert not wrong
    assert head.graph_counters()["captures"] >= 1


def test_a_capture_leaves_the_default_generator_alone(head):
    settings = call(6, 4, 3.0)
    head.refresh()
    torch.manual_seed(11)
    expected = torch.randn(4, device=GPU), torch.randn(4, device=GPU)
    torch.manual_seed(11)
    first = torch.randn(4, device=GPU)
    run(head, settings)
    assert head.graph_counters()["captures"] == 1
    assert torch.equal(first, expected[0])
    assert torch.equal(torch.randn(4, device=GPU), expected[1])


def test_few_bytes_evict_and_go_on(monkeypatch):
    """A bound of 8 MiB, and memory handed back to the allocator all the while."""
    monkeypatch.setenv("DISA_FAST_GRAPHS_MB", "8")
    head = fitted_head(256, 2, torch.bfloat16)
    settings = [call(rows, steps, 3.0) for rows in (2, 8, 32, 128) for steps in (3, 10)]
    first = [run(head, some) for some in settings]
    torch.cuda.empty_cache()
    second = [run(head, some) for some in settings]
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    counters = head.graph_counters()
    assert counters["evictions"] > 0 or counters["eager"] > 0
    assert counters["failures"] == 0


def test_does_not_grow(head):
    settings = [call(rows, 4, 3.0) for rows in (2, 8, 100)]
    for some in settings:
        run(head, some)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        for some in settings:
            run(head, some)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_within_somebody_elses_graph(head):
    settings = call(8, 4, 3.0)
    expected = run(head, settings)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run(head, settings)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        out = run(head, settings)
    graph.replay()
    assert torch.equal(out, expected)


def test_warmup_leaves_nothing_to_capture(head):
    head.refresh()
    head.warmup("linear:6-3", K=4, rows=[4, 16], backend="triton")
    captures = head.graph_counters()["captures"]
    assert captures == 2 * 4
    for steps in (6, 5, 4, 3):
        run(head, call(4, steps, 3.0))
        run(head, call(14, steps, 2.0))
    assert head.graph_counters()["captures"] == captures


def test_one_node_under_compile(head):
    settings = call(6, 4, 3.0)
    compiled = torch.compile(lambda z: head.denoise(**{**settings, "z": z}) * 2, fullgraph=True)
    assert torch.equal(compiled(settings["z"]), 2 * run(head, settings))


def test_dependent_launch_changes_no_bit(head):
    """Where the hardware has it: a race between kernels would."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    w, results = head.packed("triton", torch.bfloat16, triton.Weights), []
    settings = call(14, 10, 3.0)
    times, steps = w.time_table(settings["table"]), w.step_table(settings["table"])
    for pdl, prefetch in ((False, False), (True, False), (True, False), (True, True), (True, True)):
        tiles = dataclasses.replace(triton.tiles.choose(w.gpu, "bfloat16", 256, 14), pdl=pdl, prefetch=prefetch)
        shape = triton.Shape(10, 14, True, True, tiles, "ieee")
        b = graphs.allocate(triton.layout(w, shape), GPU)
        for name, tensor in (("z", settings["z"]), ("times", times), ("steps", steps), ("x", settings["noise"])):
            b[name].copy_(tensor)
        b["noise"].copy_(settings["step_noise"])
        b["scalars"].copy_(torch.tensor([3.0, 1.0]))
        triton.loop(w, shape, b)
        results.append(b["x"].clone())
    assert results[0].isfinite().all()
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_autocast_and_inference_mode_change_nothing(head):
    settings = call(6, 4, 3.0)
    expected = run(head, settings)
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        assert torch.equal(run(head, settings), expected)
    assert torch.equal(run(head, settings), expected)


def test_a_whole_model():
    model = small_mar().cuda()
    orders = torch.stack([torch.randperm(model.seq_len) for _ in range(2)]).cuda()
    noise = functools.partial(torch.Generator().manual_seed)
    images = []
    for backend in ("triton", "reference"):
        generator = noise(3)
        draw = functools.partial(torch.randn, generator=generator)
        images.append(
            model.sample_tokens(
                torch.tensor([1, 2]).cuda(), "linear:6-3", num_iter=4, orders=orders, backend=backend,
                draw=lambda shape, dtype, draw=draw: draw(shape, dtype=dtype),
            )
        )  # fmt: skip
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


def test_a_copy_on_the_cpu_is_served_too(head):
    settings = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in call(4, 3, 3.0).items()}
    moved = MLPHead.from_module(copy.deepcopy(head._net).cpu().float())
    assert moved.denoise(**settings).device.type == "cpu"
