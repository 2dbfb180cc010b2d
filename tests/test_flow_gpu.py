"""On a GPU: FlowAR's and xAR's heads on the Triton backend, as CUDA graphs and without. What needs no GPU is in
test_flow_graphs.py."""

import contextlib
import copy
import functools
import threading

import pytest
import torch
from compare import assert_as_good_as, assert_close
from flow_calls import KINDS, call, context_of, counted, in_dtype, run, small_model, with_context
from flow_peers import UpstreamFlowAR, UpstreamXAR
from recorded import golden, golden_cases
from test_flow_step import both_ways

import disa_fast
from disa_fast import graphs, models, solvers
from disa_fast.backends import triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default", "error:disa_fast"),  # other people's warnings depend on their versions
    pytest.mark.skipif(torch.cuda.is_available() and triton.is_interpreted(), reason="TRITON_INTERPRET=1 is set; unset it"),
]

GPU = torch.device("cuda", 0)
LARGER = {"width": 256, "depth": 2, "side": 8}
LABELS = torch.tensor([1, 7])


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32, in libraries and kernels, whatever was set."""
    with precision("highest"):
        yield


@contextlib.contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def model_of(kind, dtype=torch.bfloat16):
    return small_model(kind, dtype, GPU, **LARGER)


@pytest.fixture(params=KINDS)
def model(request):
    """Without graphs of earlier tests."""
    model = model_of(request.param)
    model.head.refresh()
    return model


def without_graphs(model, settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISA_FAST_GRAPHS", "0")
        return run(model, in_dtype(settings, model.head.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_solver_is_bitwise_the_loop_in_pytorch(dtype):
    """As in the interpreter: no two operations in float64 are fused."""
    (state, seen), (last, expected) = both_ways(dtype, (True, False, True), (True, True, False), 3, 9, 16, GPU)
    assert torch.equal(state, last)
    assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))


# As published ----------------------------------------------------------------------------------------------------------


@functools.cache
def recorded_model(which, stem, tag):
    file = golden(which, stem)
    if stem == "xar":
        m = file.meta["model"]
        sizes = {"embed_dim": m["embed_dim"], "num_heads": m["heads"]}
        depths = {f"{part}_depth": m[f"{part}_depth"] for part in ("encoder", "decoder")}
        weights, prefix = functools.partial(models.XAR, img_size=m["img_size"], clusters=m["clusters"], **depths), "sd/"
    else:
        m = next(m for m in file.meta["models"] if m["tag"] == tag)
        sizes = {"embed_dim": m["E"], "depth": m["depth"], "num_heads": m["heads"]}
        head = {"scale": m["scale"], "diffloss_w": m["w"], "diffloss_d": m["d"], "cross": m["cross"]}
        weights, prefix = functools.partial(models.FlowAR, img_size=16 * m["scale"][-1], **head), f"sd_{tag}/"
    model = weights(**{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()})
    model.load_state_dict({key.removeprefix(prefix): t for key, t in file.arrays.items() if key.startswith(prefix)})
    return model.eval().to(GPU)


def recorded_draws(file, case, parts):
    for part in parts:
        yield file[f"case/{case['name']}/{part}/latents"]
        if case.get("sampler") == "euler_maruyama":
            yield from file[f"case/{case['name']}/{part}/step_noise_f64"]


@pytest.mark.parametrize(("which", "stem", "case"), golden_cases("flowar_e2e", "xar"))
def test_images_as_recorded(which, stem, case):
    """Captured, and again as replays, which change no bit."""
    file, model = golden(which, stem), recorded_model(which, stem, case.get("model"))
    model.head.refresh()
    solver, last = (case["sampler"], "guidance_high") if stem == "xar" else ("euler", "guidance")
    parts = [f"{'c' if stem == 'xar' else 's'}{i}" for i in range(len(case["T"]))]
    images = []
    for hits in (0, len(parts)):
        draws = recorded_draws(file, case, parts)
        images.append(
            model.sample_tokens(
                file[f"case/{case['name']}/labels"].to(GPU),
                f"linear:{case['upper']}-{case['lower']}",
                cfg=case["cfg"],
                guidance=(case.get("guidance_low", 0.0), case.get(last, 1.0)),
                solver=solver,
                draw=lambda shape, dtype, draws=draws: next(draws),
                backend="triton",
            )
        )
        assert next(draws, None) is None
        assert counted(model, "captures", "hits", "eager") == (len(parts), hits, 0)
    assert_close(images[0].cpu(), file[f"case/{case['name']}/tokens"], worst=max(1e-5, 10 * case["f32_vs_f64"]))
    assert torch.equal(*images)


def upstream(kind):
    both = {"embed_dim": 128, "depth": 2, "num_heads": 2}
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in both.items()}
    if kind == "cell":
        model = UpstreamXAR(img_size=128, clusters=4, **sizes)
    else:
        model = UpstreamFlowAR(img_size=64, scale=(1, 2, 4), diffloss_w=128, diffloss_d=2, cross=kind == "cross", **sizes)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.4 * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return model.eval().requires_grad_(False).to(GPU)


def drawn(model, seed, cfg=2.4):
    """(image, what either generator gives next)"""
    torch.manual_seed(seed)
    name = "label" if isinstance(model, UpstreamXAR) else "labels"
    image = model.sample_tokens(**{name: LABELS.to(GPU), "cfg": cfg, "flow_upper_steps": 8, "flow_lower_steps": 4})
    return image, torch.rand(()), torch.rand((), device=GPU)


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_image_before_and_after_accelerate(kind):
    """The start's noise is the CPU generator's, that of the steps the GPU's; the second image replays the first one's graphs."""
    model = upstream(kind)
    expected = [drawn(model, seed, cfg) for seed, cfg in ((0, 2.4), (1, 1.8))]
    with disa_fast.accelerate(model) as handle:
        assert disa_fast.explain(model)["backend"] == "triton"
        for (seed, cfg), (image, *after) in zip(((0, 2.4), (1, 1.8)), expected, strict=True):
            ours, *ours_after = drawn(model, seed, cfg)
            assert_close(ours, image, worst=1e-4 * float(image.abs().max()))
            assert [float(x) for x in ours_after] == [float(x) for x in after]
        ar_steps = 4 if kind == "cell" else 3
        assert counted(handle, "captures", "hits") == (ar_steps, ar_steps)
        assert disa_fast.explain(model)["graphs"]["captures"] == ar_steps
    assert torch.equal(drawn(model, 0)[0], expected[0][0])


# Numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "cell"), [(1, 0), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_is_as_good_as_eager(kind, n, cell, dtype):
    """In FlowAR of one token and of a whole scale, in xAR with no cell before and with two."""
    low = model_of(kind, dtype)
    exact, results = copy.deepcopy(low).double(), []
    for seed in range(12 if cell == 0 else 3):
        settings = call(low, seed, n=n, steps=5, side=1 if cell == 0 else LARGER["side"], cell=cell)
        truth = run(exact, in_dtype(settings, torch.float64), "reference")
        results.append((run(low, settings), run(low, in_dtype(settings, dtype), "reference"), truth))
    assert_as_good_as(*(torch.cat(parts).cpu() for parts in zip(*results, strict=True)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", [solvers.flow_euler, solvers.flow_euler_maruyama])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_equals_the_call_without_a_graph(kind, solver, dtype):
    """With other inputs than at the capture."""
    model = model_of(kind, dtype)
    model.head.refresh()
    calls = [call(model, seed, steps=6, solver=solver, cfg=2 + seed, temperature=1 / (1 + seed)) for seed in range(3)]
    outs = [run(model, settings) for settings in calls]
    assert counted(model, "captures", "hits") == (1, 2)
    assert counted(model, "bytes")[0] > sum(t.nbytes for t in context_of(calls[0]).values())
    for settings, out in zip(calls, outs, strict=True):
        assert torch.equal(out, without_graphs(model, settings))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_image_with_graphs_and_without(kind, monkeypatch):
    model = model_of(kind)

    def image():
        generator = torch.Generator(GPU).manual_seed(3)
        return model.sample_tokens(LABELS.to(GPU), "linear:8-4", cfg=2.4, generator=generator, backend="triton")

    model.head.refresh()
    captured, replayed = image(), image()
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    assert captured.isfinite().all()
    assert torch.equal(captured, replayed)
    assert torch.equal(captured, image())


def test_inputs_are_copied_in_and_the_result_out(model):
    first, second = call(model, 1), call(model, 2)
    expected = without_graphs(model, first), without_graphs(model, second)
    out = run(model, first)
    for tensor in (*context_of(first).values(), first["noise"], first["step_noise"]):
        tensor.fill_(torch.nan)
    assert torch.equal(run(model, second), expected[1])
    assert torch.equal(out, expected[0])
    third = with_context(second, lambda name, t: t.mul_(1.5))  # the very tensors of before
    assert torch.equal(run(model, third), without_graphs(model, third))


def test_changed_parameters_are_captured_anew():
    model = copy.deepcopy(model_of("cross"))
    settings = call(model)
    before = run(model, settings)
    with torch.no_grad():
        for p in model.flownet.parameters():
            p.mul_(1.1)
    after = run(model, settings)
    assert counted(model, "captures", "hits") == (1, 0)
    assert not torch.equal(after, before)
    assert torch.equal(after, without_graphs(model, settings))


def test_precision_of_float32_is_that_of_the_call():
    model, settings = model_of("plain", torch.float32), call(model_of("plain", torch.float32))
    model.head.refresh()
    exact = run(model, settings)
    with precision("high"):
        assert torch.equal(run(model, settings), without_graphs(model, settings))
    assert torch.equal(run(model, settings), exact)


def test_autocast_and_inference_mode_change_nothing(model):
    settings = call(model)
    expected = run(model, settings)
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        assert torch.equal(run(model, settings), expected)
    assert torch.equal(run(model, settings), expected)


# Beside others ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [solvers.flow_euler, solvers.flow_euler_maruyama])
def test_a_replayed_call_does_not_make_the_host_wait(model, solver):
    """With noise for every step, and as the models draw it, for every noisy one."""
    every = call(model, steps=4, solver=solver)
    noisy = {**every, "step_noise": every["step_noise"][:3] if every["table"].draws else None}
    for settings in (every, noisy):
        expected = run(model, settings)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run(model, settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again, expected)


def test_several_streams(model):
    calls = [call(model, seed, steps=2 + seed % 2) for seed in range(8)]
    expected = [run(model, settings) for settings in calls]
    streams, outs = [torch.cuda.Stream(GPU) for _ in range(2)], []
    torch.cuda.synchronize()
    for i, settings in enumerate(calls):
        with torch.cuda.stream(streams[i // 2 % 2]):
            outs.append(run(model, settings))
    torch.cuda.synchronize()
    assert all(torch.equal(out, one) for out, one in zip(outs, expected, strict=True))


@pytest.mark.filterwarnings("default:disa_fast")  # a capture may be spoiled by another thread's wait, and then says so
def test_several_threads(model):
    """Two capture and replay, one draws, allocates and waits, one asks for the counters."""
    model = copy.deepcopy(model)  # whose locks are its own
    calls = {steps: call(model, steps, steps=steps) for steps in range(2, 6)}
    expected = {steps: run(model, settings) for steps, settings in calls.items()}
    torch.cuda.synchronize()
    model.head.refresh()
    stop, wrong = threading.Event(), []

    def disturb():
        with torch.cuda.stream(torch.cuda.Stream(GPU)):
            while not stop.is_set():
                try:
                    x = torch.randn(256, 256, device=GPU)
                    float((x @ x).sum())
                except RuntimeError as error:
                    if graphs.GENERATORS_ARE_APART or "Offset increment outside graph capture" not in str(error):
                        wrong.append(error)  # the other is told of in graphs.py, and the next draw is right again
                        return

    def count():
        while not stop.is_set():
            model.head.graph_counters()

    def work(mine):
        own = copy.deepcopy({steps: calls[steps] for steps in mine})  # keys and values of a cell's tokens are written in place
        with torch.cuda.stream(torch.cuda.Stream(GPU)):
            for _ in range(5):
                for steps in mine:
                    if not torch.equal(run(model, own[steps]), expected[steps]):
                        wrong.append(steps)

    others = [threading.Thread(target=f, daemon=True) for f in (disturb, count)]
    workers = [threading.Thread(target=work, args=(mine,), daemon=True) for mine in ((2, 3, 4), (5, 4, 3))]
    for thread in (*others, *workers):
        thread.start()
    for thread in workers:
        thread.join(20)
    stop.set()
    for thread in others:
        thread.join(5)
    assert not any(thread.is_alive() for thread in (*others, *workers)), "they wait for each other"
    assert not wrong
    assert counted(model, "captures")[0] >= 1


def test_a_capture_leaves_the_default_generator_alone(model):
    torch.manual_seed(11)
    expected = torch.randn(4, device=GPU), torch.randn(4, device=GPU)
    settings = call(model)
    torch.manual_seed(11)
    first = torch.randn(4, device=GPU)
    run(model, settings)
    assert counted(model, "captures") == (1,)
    assert torch.equal(first, expected[0])
    assert torch.equal(torch.randn(4, device=GPU), expected[1])


def test_does_not_grow(model):
    calls = [call(model, seed, steps=steps) for seed, steps in ((0, 2), (1, 3))]
    for settings in calls:
        run(model, settings)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        for settings in calls:
            run(model, settings)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert counted(model, "captures", "hits") == (2, 200)


def test_few_bytes_evict_and_go_on(model, monkeypatch):
    """A bound of 8 MiB, and memory handed back to the allocator all the while."""
    monkeypatch.setenv("DISA_FAST_GRAPHS_MB", "8")
    model.head.refresh()
    calls = [call(model, n=n, steps=steps, side=8) for n in (1, 2, 8) for steps in (2, 4)]
    first = [run(model, settings) for settings in calls]
    torch.cuda.empty_cache()
    second = [run(model, settings) for settings in calls]
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    evictions, eager, failures = counted(model, "evictions", "eager", "failures")
    assert evictions + eager > 0
    assert failures == 0


def test_graphs_go_on_after_one_that_found_no_memory(model, monkeypatch):
    """Which gives up all that there were."""
    calls = [call(model, steps=steps) for steps in (2, 3, 4)]
    expected = [without_graphs(model, settings) for settings in calls]
    flow_steps, failing = triton.flow_steps, iter([True])

    def without_memory(*arguments):
        if next(failing, False):
            raise torch.OutOfMemoryError("no memory left")
        return flow_steps(*arguments)

    assert torch.equal(run(model, calls[0]), expected[0])
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="since capturing failed: no memory left"):
        patch.setattr(triton, "flow_steps", without_memory)
        assert torch.equal(run(model, calls[1]), expected[1])
    assert counted(model, "captures", "failures", "graphs") == (1, 1, 0)
    for settings, out in (*zip(calls, expected, strict=True), (calls[2], expected[2])):
        assert torch.equal(run(model, settings), out)
    assert counted(model, "captures", "hits", "failures", "graphs") == (4, 1, 1, 3)


def test_within_somebody_elses_graph(model):
    settings = call(model)
    expected = run(model, settings)
    stream, graph = torch.cuda.Stream(GPU), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run(model, settings)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        out = run(model, settings)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_that_is_not_the_current_one(kind):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = small_model(kind, torch.float32, torch.device("cuda", 1), **LARGER)
    images = [
        model.sample_tokens(LABELS.to("cuda:1"), "linear:6-3", cfg=2.4, generator=torch.Generator().manual_seed(3), backend=backend)
        for backend in ("triton", "reference")
    ]
    assert_close(*images, worst=1e-4 * float(images[1].abs().max()))
