"""On a GPU: the persistent CUDA kernel. Its formulas and its waiting are checked without one in test_cuda.py."""

import copy
import functools

import pytest
import torch
from compare import assert_as_good_as, assert_close
from soak import WithoutABlock
from test_gpu import GPU, call, fitted_head

from disa_fast import MLPHead, Philox, backends, graphs, jit, solvers
from disa_fast.backends import cuda, cuda_check, triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default", "error:disa_fast"),
    pytest.mark.skipif(torch.cuda.is_available() and triton.is_interpreted(), reason="TRITON_INTERPRET=1 is set; unset it"),
]

HEADS = [(1024, 6), (1280, 8), (1536, 12), (272, 3)]


@functools.cache
def low_head(width: int, depth: int, dtype: torch.dtype) -> MLPHead:
    return fitted_head(width, depth, dtype)


def bfloat16_head(width: int, depth: int) -> MLPHead:
    return low_head(width, depth, torch.bfloat16)


@functools.cache
def exact_head(width: int, depth: int, dtype: torch.dtype) -> MLPHead:
    parameters = low_head(width, depth, dtype)._net.state_dict()
    return MLPHead.from_state_dict({name: p.double() for name, p in parameters.items()})


@pytest.fixture
def head() -> MLPHead:
    return bfloat16_head(1024, 6)


def run(head: MLPHead, settings: dict, **how) -> torch.Tensor:
    return head.denoise(**settings, **{"backend": "cuda", **how})


def test_it_is_there():
    """Loaded, and right in its own check."""
    found = cuda.gpu(GPU)
    assert not isinstance(found, str), found
    assert found.multiprocessors > 0
    print(found.origin, found.multiprocessors, found.shared_bytes)


@pytest.mark.parametrize("dtype", cuda.SUFFIXES)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("rows", [2, 8, 14, 16, 34, 64])
@pytest.mark.parametrize(("width", "depth"), HEADS)
def test_is_as_good_as_eager(width, depth, rows, cfg, dtype):
    low, exact = low_head(width, depth, dtype), exact_head(width, depth, dtype)
    results = []
    for _ in range(max(1, 120 // rows)):
        settings = call(rows, 6, cfg, dtype)
        truth = exact.denoise(**{**settings, "z": settings["z"].double()}, backend="reference")
        results.append((run(low, settings), run(low, settings, backend="reference"), truth))
    ours, eager, truth = (torch.cat(parts).cpu() for parts in zip(*results, strict=True))
    assert_as_good_as(ours, eager, truth, dtype)


@pytest.mark.parametrize("dtype", cuda.SUFFIXES)
@pytest.mark.parametrize(("width", "depth"), HEADS)
def test_no_phase_is_wrong(width, depth, dtype):
    if jit.why_not() is not None:
        pytest.skip(f"compiles a kernel that dumps: {jit.why_not()}")
    settings = call(20, 2, 3.0, dtype)
    assert cuda_check.first_wrong_phase(low_head(width, depth, dtype), **settings) is None


@pytest.mark.parametrize("dtype", cuda.SUFFIXES)
@pytest.mark.parametrize(("width", "depth"), HEADS)
def test_a_row_does_not_depend_on_its_company(width, depth, dtype):
    head, settings = low_head(width, depth, dtype), call(64, 5, 1.0, dtype)
    together = run(head, settings)
    for some in ([63], [3, 0, 5], list(range(14)), list(range(40))):
        part = {"z": settings["z"][some], "noise": settings["noise"][some], "step_noise": settings["step_noise"][:, some]}
        assert torch.equal(run(head, settings | part), together[some])


def test_a_thousand_times_the_same(head):
    """A moving result is a race."""
    settings = call(8, 50, 3.0)
    first = run(head, settings)
    assert first.isfinite().all()
    for _ in range(1000):
        assert torch.equal(run(head, settings), first)


def test_without_a_graph_and_within_another(head, monkeypatch):
    settings = call(8, 5, 3.0)
    expected = run(head, settings)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.current_stream().synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = run(head, settings)
    graph.replay()
    assert torch.equal(out, expected)
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    assert torch.equal(run(head, settings), expected)


def test_giving_up_is_told_at_the_next_call(head):
    """With a block that is not launched, in a graph too: NaN, then a RuntimeError, then what is right."""
    settings, w, on = call(8, 5, 3.0), head.packed("cuda", torch.bfloat16, cuda.Weights), cuda.gpu(GPU)
    expected = run(head, settings)
    shape = cuda.Shape(2, 8, True, True, *cuda.HOISTS)
    b = graphs.allocate(cuda.layout(w, shape), GPU)
    for buffer in b.values():
        buffer.zero_()

    def give_up() -> None:
        b["x"].zero_()
        cuda.launch(w, shape, b, range(2), b["modulation"], WithoutABlock(on), patience=1_000_000)

    give_up()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        give_up()
    for launch in (give_up, graph.replay):
        on.gave_up.zero_()
        launch()
        torch.cuda.synchronize()
        assert b["x"].isnan().all()
        with pytest.raises(RuntimeError, match="an earlier call on this GPU gave up"):
            run(head, settings)
        assert torch.equal(run(head, settings), expected)


def test_several_heads_on_several_streams(head):
    """Every launch takes all multiprocessors, so they come one after the other, and none waits for blocks that cannot start."""
    heads = [head, bfloat16_head(1280, 8), MLPHead.from_module(copy.deepcopy(head._net))]
    settings = [call(8, 20, 3.0) for _ in range(9)]
    expected = [run(heads[i % 3], some) for i, some in enumerate(settings)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for i, some in enumerate(settings):
        with torch.cuda.stream(streams[i % 3]):
            results.append(run(heads[i % 3], some))
            torch.randn(4096, 4096, device=GPU) @ torch.randn(4096, 4096, device=GPU)
    torch.cuda.synchronize()
    assert all(torch.equal(one, two) for one, two in zip(results, expected, strict=True))


def test_philox(head):
    settings = call(16, 10, 3.0) | {"step_noise": None}
    streams = torch.randint(0, 2**62, (8,), device=GPU)
    ours = run(head, settings, rng=Philox(11, streams))
    given = Philox(11, streams).normal(range(1, 11), 8, 16, device=GPU)
    assert_close(ours, run(head, settings | {"step_noise": given}), worst=2e-2 * float(ours.abs().max()))
    alone = {"z": settings["z"][[2, 10]], "noise": settings["noise"][[2]]}
    assert torch.equal(run(head, settings | alone, rng=Philox(11, streams[[2]]))[0], ours[2])


def test_nvcc_and_nvrtc_agree(head, monkeypatch):
    if not cuda.PREBUILT.exists() or jit.why_not() is not None:
        pytest.skip("needs both: the kernels compiled with the package, and CuPy with NVRTC")
    settings = call(8, 5, 3.0)
    expected = run(head, settings)
    monkeypatch.setattr(cuda, "PREBUILT", cuda.PREBUILT.with_name("none.fatbin"))
    again = cuda.NvidiaGpu(torch.device("cuda", torch.cuda.current_device()))
    assert again.origin == "compiled by NVRTC"
    monkeypatch.setattr(cuda, "gpu", lambda device: again)
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    assert_close(run(head, settings), expected, worst=1e-2 * float(expected.abs().max()))


def test_does_not_grow(head):
    settings = [call(rows, 4, 3.0) for rows in (2, 8, 60)]
    for some in settings:
        run(head, some)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        for some in settings:
            run(head, some)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_auto_takes_it_for_few_rows(head):
    few, many = cuda.fastest_up_to(1024, GPU), cuda.MAX_ROWS + 2
    for rows, expected in ((max(1, few), "cuda" if few else "triton"), (many, "triton")):
        assert backends.choose("auto", head.spec, torch.bfloat16, GPU, rows) == expected


def test_one_node_under_compile(head):
    settings = call(6, 4, 3.0)
    compiled = torch.compile(lambda z: head.denoise(**{**settings, "z": z}, backend="cuda") * 2, fullgraph=True)
    assert torch.equal(compiled(settings["z"]), 2 * run(head, settings))


@pytest.mark.parametrize("solver", [solvers.ddim, solvers.dpm_solver])
def test_other_solvers(head, solver):
    settings = call(8, 6, 2.0) | {"table": solver(6), "step_noise": None}
    expected = head.denoise(**settings, backend="hoisted")
    assert_close(run(head, settings), expected, worst=5e-2 * float(expected.abs().max()))
