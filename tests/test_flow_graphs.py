"""The loops of FlowAR's and xAR's heads on the Triton backend as graphs, without a GPU: Triton's interpreter, and a capture that
records a Python function."""

import copy
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_good_as, assert_close
from flow_calls import KINDS, call, context_of, counted, in_dtype, run, small_model, with_context
from recorder import OWN_BYTES, Recorder, record_flow_graphs

from disa_fast import explain, graphs, models, solvers
from disa_fast.backends import hoisted, triton
from disa_fast.backends.triton_ops import HIDDEN_MULTIPLE, TritonOps
from disa_fast.heads import flow, packing
from disa_fast.transformer import gated_width

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    return record_flow_graphs(monkeypatch)


class Quick(hoisted.HoistedOps):
    layout, captured, lay_out = TritonOps.layout, True, staticmethod(TritonOps.lay_out)

    def gated_mlp(self, m, layers):
        gate, up = self.linear(m, layers[0]).chunk(2, dim=-1)
        return self.linear(F.gelu(gate) * up, layers[1])


@pytest.fixture
def quick(monkeypatch):
    """Where kernels do not matter: plain PyTorch between the products."""
    monkeypatch.setattr(triton, "TritonOps", Quick)


@pytest.fixture(params=KINDS)
def model(request):
    return small_model(request.param)


def without_graphs(model, settings):
    """On a copy, whose parameters are packed anew; of a call that may write into its context, so on a copy of that too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISA_FAST_GRAPHS", "0")
        return run(copy.deepcopy(model), in_dtype(settings, model.head.dtype))


# Results ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_replays_are_bitwise_the_loop_and_as_good_as_eager(kind, dtype):
    """Once captured, then replayed with other inputs; the second of two steps is guided, the first noisy."""
    model = small_model(kind, dtype)
    exact = copy.deepcopy(model).double()
    calls = [call(model, seed, n=2, steps=2) for seed in (1, 2)]
    ours = [run(model, settings) for settings in calls]
    assert counted(model, "captures", "hits", "eager") == (1, 1, 0)
    assert torch.equal(ours[1], without_graphs(model, calls[1]))
    eager = [run(model, in_dtype(settings, dtype), "reference") for settings in calls]
    truth = [run(exact, in_dtype(settings, torch.float64), "reference") for settings in calls]
    assert_as_good_as(*(torch.cat(parts) for parts in (ours, eager, truth)), dtype)


@pytest.mark.parametrize("kind", ["cross", "cell"])
def test_a_whole_image_is_what_reference_draws(kind):
    """A graph for each scale or cell; the next image, of other classes, noise and guidance, replays them."""
    model = small_model(kind)
    ar_steps = 4 if kind == "cell" else 2
    for image, (cfg, labels) in enumerate([(2.4, [1]), (1.7, [7])]):
        tokens = {
            backend: model.sample_tokens(
                torch.tensor(labels), "linear:3-2", cfg=cfg, generator=torch.Generator().manual_seed(image), backend=backend
            )
            for backend in ("triton", "reference")
        }
        assert_close(tokens["triton"], tokens["reference"], worst=2e-5 * float(tokens["reference"].abs().max()))
        assert counted(model, "captures", "hits") == (ar_steps, image * ar_steps)


def test_other_numbers_are_inputs_of_the_same_graph(model, quick):
    """Noise, condition, guidance scale, temperature, coefficients and times."""
    first = call(model)
    table = first["table"]
    other = dataclasses.replace(table, t=0.95 * table.t, a=0.9 * table.a, b=1.1 * table.b, c=table.a - 0.8, l0=table.l0 - 0.3)
    second = call(model, seed=1)
    calls = [
        first,
        {**first, "noise": second["noise"]},
        {**first, "step_noise": second["step_noise"]},
        {**first, "cfg": 1.3},
        {**first, "cfg": torch.tensor([3.0])},
        {**first, "temperature": 0.5},
        {**first, "guidance": (0.01, 0.6)},
        {**first, "table": other},
        second,
        {**second, "table": other, "cfg": 1.3, "temperature": 0.5},
    ]
    outs = [run(model, settings) for settings in calls]
    assert counted(model, "captures", "hits") == (1, len(calls) - 1)
    for i, (settings, out) in enumerate(zip(calls, outs, strict=True)):
        assert torch.equal(out, without_graphs(model, settings))
        same = [j for j in range(i) if torch.equal(out, outs[j])]
        assert same == ([0] if i == 6 else []), "another interval that guides the same steps is alone in changing nothing"


def test_other_shapes_are_other_graphs(model, quick):
    """Steps, batch, position or number of tokens, where guidance is, where noise is; and each is replayed for what it is."""
    table = call(model)["table"]
    euler = {"solver": solvers.flow_euler, "steps": 4, "step_noise": None}
    calls = [
        call(model),
        call(model, steps=2),
        call(model, n=2),
        call(model, side=1, cell=2),
        call(model, guidance=(0.0, 1.0)),
        call(model, guidance=(0.9, 1.0)),
        call(model, guidance=(2.0, 3.0)),
        call(model, table=dataclasses.replace(table, noisy=table.noisy[::-1], l0=table.l0[::-1])),
        call(model, **euler),
        call(model, **euler, guidance=(0.0, 0.2)),
    ]
    for hits in (0, len(calls)):
        for settings in calls:
            assert torch.equal(run(model, settings), without_graphs(model, settings))
        assert counted(model, "captures", "hits") == (len(calls), hits)


def test_a_guidance_that_guides_nowhere_is_no_guidance(model, quick):
    """Not even a graph of its own: the unconditional half is not among what is copied in."""
    settings = call(model, guidance=(2.0, 3.0))
    half = with_context(settings, lambda name, t: t[:1])
    alone = {**half, "cfg": 1.0, **({"guided_rows": False} if "context" in half else {})}
    outs = [run(model, one) for one in (alone, settings, alone)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert counted(model, "captures", "hits") == (1, 2)


@pytest.mark.parametrize("kind", ["plain", "cross"])
def test_a_dtype_has_its_own_graphs_and_all_are_counted(kind, quick):
    model = small_model(kind)
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        run(model, call(model), dtype=dtype)
    assert counted(model, "captures", "hits", "graphs") == (2, 1, 2)


def test_another_precision_is_another_graph(model, quick):
    run(model, call(model))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
        run(model, call(model))
    finally:
        torch.set_float32_matmul_precision(before)
    assert counted(model, "captures", "hits") == (2, 0)


def test_no_images(model, quick):
    assert run(model, call(model, n=0)).shape == (0, 4, 16)


# Whose memory it is ----------------------------------------------------------------------------------------------------


def test_inputs_are_copied_in_and_the_result_out(model, quick):
    """A graph reads nothing of the call that it was captured for, and no later call changes what an earlier one gave."""
    first, second = call(model, 1), call(model, 2)
    expected = without_graphs(model, first), without_graphs(model, second)
    out = run(model, first)
    for tensor in (*context_of(first).values(), first["noise"], first["step_noise"]):
        tensor.fill_(torch.nan)
    assert torch.equal(run(model, second), expected[1])
    assert torch.equal(out, expected[0])
    third = with_context(second, lambda name, t: t.mul_(1.5))  # the very tensors of before
    assert torch.equal(run(model, third), without_graphs(model, third))
    assert counted(model, "captures", "hits") == (1, 2)


def test_a_replay_leaves_the_callers_keys_and_values_alone(quick, monkeypatch):
    """Also with a graph for a later cell in between, and without graphs as far as cells are finished."""
    model = small_model("cell")
    settings = call(model, cell=1)
    at = settings["at"]
    before = {name: t.clone() for name, t in settings["context"].items()}
    for cell in (1, 3, 1):
        run(model, {**settings, "at": cell * at})
        assert all(torch.equal(t, before[name]) for name, t in settings["context"].items())
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    run(model, settings)
    finished = {name: (t if name == "condition" else t[:, :, :at]) for name, t in settings["context"].items()}
    assert all(torch.equal(t, before[name] if name == "condition" else before[name][:, :, :at]) for name, t in finished.items())


def test_finished_cells_are_read_and_no_others(quick):
    model = small_model("cell")
    settings = call(model, cell=2)
    at = settings["at"]

    def changed(value, some, where):
        def change(name, tensor):
            tensor = tensor.clone()
            if name in some:
                tensor[:, :, where] = value
            return tensor

        return run(model, with_context(settings, change))

    out, names = run(model, settings), set(settings["context"]) - {"condition"}
    assert len(names) == 4
    assert torch.equal(changed(torch.nan, names, slice(at, None)), out)
    for name in names:
        for position in range(at):
            assert not torch.equal(changed(2.0, {name}, position), out)


@pytest.mark.parametrize("change", ["in place", "loaded", "refreshed after a write through data"])
def test_changed_parameters_are_captured_anew(model, quick, change):
    settings = call(model)
    before, p = run(model, settings), model.head._net.get_parameter(model.head.any_parameter)
    if change == "in place":
        with torch.no_grad():
            p.mul_(1.5)
    elif change == "loaded":
        model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})
    else:
        p.data.mul_(1.5)
        model.head.refresh()
    after = run(model, settings)
    assert not torch.equal(after, before)
    assert torch.equal(after, without_graphs(model, settings))
    assert counted(model, "captures", "hits") == (1, 0)


MLP = [f"mlp.{layer}.{part}" for layer in ("fc1_g", "fc1_x", "fc2") for part in ("weight", "bias")]


def write(model, name: str, through_data: bool) -> None:
    """Into the parameter of that name in every block."""
    for own, p in model.head._net.named_parameters():
        if own.endswith(name):
            with torch.no_grad():
                (p.data if through_data else p).add_(0.3 * torch.randn_like(p))
    if through_data:
        model.head.follow()  # as at the start of an image


def check_followed(kind: str, names: list[str], through_data: bool) -> None:
    model = small_model(kind)
    settings = call(model, steps=1)
    before = run(model, settings)
    for name in names:
        write(model, name, through_data)
        after = run(model, settings)
        assert not torch.equal(after, before), f"{name} was written, and the graph goes on with what it was"
        assert torch.equal(after, without_graphs(model, settings)), name
        before = after


@pytest.mark.parametrize("through_data", [False, True], ids=["in place", "through data"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_follow_their_parameters(kind, through_data, quick):
    """Those of the gated MLPs are copied."""
    check_followed(kind, MLP, through_data)


def first_of_packed():
    """Packing.packed that never looks whether anything has changed."""
    packed, kept = packing.Packing.packed, {}

    def first(self, kind, dtype, build):
        key = self, kind, dtype
        if key not in kept:
            kept[key] = packed(self, kind, dtype, build)
        return kept[key]

    return first


@pytest.mark.parametrize(("through_data", "module", "name", "blind"), [
    (True, flow, "GATED_MLP", "no such name"),
    (False, flow.FlowHead, "packed", first_of_packed()),
])  # fmt: skip
def test_packed_weights_that_follow_nothing_are_caught(through_data, module, name, blind, monkeypatch, quick):
    monkeypatch.setattr(module, name, blind)
    with pytest.raises(AssertionError, match="the graph goes on"):
        check_followed("plain", MLP[:1], through_data)


def test_contents_are_compared_in_few_tensors(monkeypatch):
    """In order, each of one dtype and of no more bytes than are allowed, unless it is one."""
    monkeypatch.setattr(flow, "JOINED_BYTES", 100)
    sizes = [
        (10, torch.float32),
        (15, torch.float32),
        (1, torch.float32),
        (30, torch.float32),
        (2, torch.bfloat16),
        (4, torch.bfloat16),
    ]
    tensors = [torch.randn(size).to(dtype) for size, dtype in sizes]
    joined = list(flow.joined(tensors))
    assert [(len(each), each.dtype) for each in joined] == [
        (25, torch.float32), (1, torch.float32), (30, torch.float32), (6, torch.bfloat16),
    ]  # fmt: skip
    assert torch.equal(torch.cat(joined), torch.cat(tensors))
    assert list(flow.joined([])) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_the_only_copy(kind, dtype):
    """In the parameters' own dtype nothing else is copied, and a cast of what is packed is not kept beside it."""
    model = small_model(kind)
    w = model.head.weights(dtype, TritonOps(dtype))
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    blocks = w.backbone.blocks if kind == "cell" else w.blocks
    (first, bias), (down, _) = blocks[0].mlp
    hidden, dim = gated_width(len(down)), len(down)
    padded = hidden + -hidden % HIDDEN_MULTIPLE
    assert padded > hidden and first.shape == (2 * padded, dim) and down.shape == (dim, padded)
    held = {}
    for tensor in tensors_of(vars(w)):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    copied = sum(size for address, size in held.items() if address not in own)
    packed = len(blocks) * (first.nbytes + bias.nbytes + down.nbytes)
    if dtype == torch.float32:
        assert copied == packed
    else:
        named = model.head._net.named_parameters()
        cast = sum(
            dtype.itemsize * p.numel()
            for name, p in named
            if (name.endswith(".bias") or (name.endswith(".weight") and p.ndim == 2))
            and not (".mlp.fc" in name and not name.endswith("fc2.bias"))
            and name != "class_emb.weight"
        )
        assert copied <= packed + cast


def tensors_of(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(thing):
        yield from tensors_of(vars(thing))


def test_copies_have_graphs_of_their_own(model, quick):
    settings = call(model)
    out, twin = run(model, settings), copy.deepcopy(model)
    assert twin.head.graph_counters() == {}
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    assert not torch.equal(run(twin, settings), out)
    assert torch.equal(run(model, settings), out)
    assert (counted(model, "captures", "hits"), counted(twin, "captures", "hits")) == ((1, 1), (1, 0))


def test_inference_mode_leaves_no_mark(model, quick):
    settings = call(model)
    with torch.inference_mode():
        inside = run(model, settings)
    assert torch.equal(run(model, settings), inside)
    assert counted(model, "captures", "hits") == (1, 1)


# Where there is no graph -----------------------------------------------------------------------------------------------


def test_without_a_graph_when_told_so(model, quick, monkeypatch):
    settings = call(model)
    expected = run(model, settings)
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    assert torch.equal(run(model, settings), expected)
    assert counted(model, "captures", "hits", "eager") == (1, 0, 1)


def test_without_a_graph_for_too_many_rows(model, quick, monkeypatch):
    """Rows are those of the products: of every token and half."""
    settings = call(model, n=2)
    monkeypatch.setattr(graphs, "MAX_ROWS", 2 * 2 * 4 - 1)
    assert torch.equal(run(model, settings), without_graphs(model, settings))
    assert counted(model, "captures", "eager") == (0, 1)
    monkeypatch.setattr(graphs, "MAX_ROWS", 2 * 2 * 4)
    run(model, settings)
    assert counted(model, "captures", "eager") == (1, 1)


def test_without_a_graph_for_inputs_over_the_limit(model, quick, monkeypatch):
    monkeypatch.setenv("DISA_FAST_GRAPHS_MB", "0")
    settings = call(model)
    assert torch.equal(run(model, settings), without_graphs(model, settings))
    assert counted(model, "captures", "eager", "bytes") == (0, 1, 0)


def test_bytes_are_counted_and_bounded(model, quick, recorder, monkeypatch):
    """Inputs of all graphs, which share an arena, and what each takes besides."""
    run(model, call(model))
    assert counted(model, "bytes")[0] > OWN_BYTES + sum(t.nbytes for t in context_of(call(model)).values())
    monkeypatch.setenv("DISA_FAST_GRAPHS_MB", "1")
    recorder.own_bytes = 1 << 20
    model.head.refresh()
    calls = [call(model), call(model, steps=2)]
    for _ in range(2):
        for settings in calls:
            assert torch.equal(run(model, settings), without_graphs(model, settings))
    assert counted(model, "captures", "hits", "evictions", "graphs") == (4, 0, 3, 1)


def test_a_capture_that_fails_is_said_and_changes_nothing(model, quick, recorder, monkeypatch):
    def spoiled(self, loop):
        loop()
        raise RuntimeError("operation failed due to a previous error during capture")

    settings = call(model)
    monkeypatch.setattr(Recorder, "__call__", spoiled)
    with pytest.warns(
        UserWarning, match=r"without a CUDA graph \(T=3 images=1 tokens=4 at=[04] guided=2\), since capturing failed"
    ):
        out = run(model, settings)
    assert torch.equal(out, without_graphs(model, settings))
    assert counted(model, "captures", "failures", "eager") == (0, 1, 1)


# Several at once, and what is told -------------------------------------------------------------------------------------


def test_many_threads_share_a_head(model, quick):
    calls = {seed: call(model, seed, steps=2 + seed % 2) for seed in range(4)}
    expected = {seed: without_graphs(model, settings) for seed, settings in calls.items()}
    wrong = []

    def work(seed):
        for _ in range(5):
            if not torch.equal(run(model, calls[seed]), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert counted(model, "captures", "hits") == (2, 18)


def test_counting_during_a_capture(quick, monkeypatch):
    model, capturing, asking = small_model("plain"), threading.Event(), threading.Event()
    capture = Recorder.__call__

    def slow(self, loop):
        capturing.set()
        asking.wait(10)
        threading.Event().wait(0.2)  # until it has the one lock, and waits for the other
        return capture(self, loop)

    def count():
        capturing.wait(10)
        asking.set()
        model.head.graph_counters()

    monkeypatch.setattr(Recorder, "__call__", slow)
    threads = [threading.Thread(target=f, daemon=True) for f in (count, lambda: run(model, call(model)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(1)
    assert not any(thread.is_alive() for thread in threads)


def test_what_is_told(model, quick, nvtx, capsys):
    assert explain(model)["graphs"] == {}
    for _ in range(2):
        run(model, call(model))
    assert explain(model)["graphs"] == model.head.graph_counters()
    assert "captures: 1" in capsys.readouterr().out
    at = 4 if isinstance(model, models.XAR) else 0
    shape = f"T=3 images=1 tokens=4 at={at} guided=2"
    denoise = "denoise T=3 rows=8 backend=triton"
    assert nvtx.ranges == [denoise, f"capture {shape}", f"replay {shape}", denoise, f"replay {shape}"]


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_go_before_the_tables_that_they_read(kind):
    """An object's attributes go in the order in which they came, and those graphs wait for their last replay."""
    model = small_model(kind)
    w = vars(model.head.weights(torch.float32, TritonOps(torch.float32)))
    assert next(iter(w)) == "graphs" or "rotation" not in w
