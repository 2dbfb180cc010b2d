"""What does not depend on the machine, exactly: FLOPs and bytes of a step against bench/counts.py, kernel launches and graph
captures of an image, allocations of a call, network evaluations."""

import dataclasses
import math
from collections import Counter

import host_gpu
import pytest
import torch
import torch.nn.functional as F
from counts import Work, cell_work, flow_work, mlp_work
from flow_calls import KINDS, counted, small_model
from flow_calls import call as flow_call
from flow_calls import run as run_flow
from host_gpu import CPU
from random_parameters import random_parameters
from recorder import Recorder, record_flow_graphs
from shapes import iterations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from upstream_like import SMALL

from disa_fast import MLPHead, Philox, backends, models, onednn, solvers
from disa_fast.backends import cpu, cuda, hoisted, triton, triton_ops
from disa_fast.graphs import Graphs, row_bucket
from disa_fast.heads import flow
from disa_fast.heads.mlp import FREQUENCIES, MLPNet, MLPSpec
from disa_fast.kernels.triton import tiles
from disa_fast.schedule import as_schedule
from disa_fast.systems import SYSTEMS

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDED = pytest.mark.parametrize(("rows", "cfg"), [(6, 3.0), (5, 1.0)])


def mlp_head(width: int = 64, depth: int = 2, channels: int = 16, dtype: torch.dtype = torch.float32) -> MLPHead:
    parameters = random_parameters(MLPSpec(channels, width, depth, 48), 0)
    return MLPHead.from_state_dict({name: tensor.to(dtype) for name, tensor in parameters.items()})


def mlp_call(head: MLPHead, rows: int, cfg: float, steps: int = 3, **changed: object) -> dict:
    """Arguments of `denoise`, noise included."""
    n, channels = rows // 2 if cfg != 1 else rows, head.spec.in_channels
    drawn = {"noise": torch.randn(n, channels), "step_noise": torch.randn(steps, n, channels)}
    z = torch.randn(rows, head.spec.z_channels).to(head.dtype)
    return {"z": z, "table": solvers.ddpm(steps), "cfg": cfg, "dtype": head.dtype, **drawn} | changed


# FLOPs -----------------------------------------------------------------------------------------------------------------


def counted_flops(run) -> int:
    """By PyTorch's counter, taught the operators that it does not know."""

    def linear(x, *rest, out_shape=None, **others) -> int:
        return 2 * math.prod(out_shape) * x[-1]

    def attention(q, k, v, *rest, out_shape=None, **others) -> int:
        return sdpa_flop_count(q, k, v)

    known = {torch.ops.mkldnn._linear_pointwise: linear, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return counter.get_total_flops()


def total_flops(work: Work) -> int:
    return work.loop[1] + work.before[1]


@GUIDED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "depth", "channels"), [(64, 2, 16), (48, 3, 5)])
def test_flops_of_the_hoisted_mlp_head(width, depth, channels, dtype, rows, cfg, monkeypatch):
    head = mlp_head(width, depth, channels, dtype)
    settings = mlp_call(head, rows, cfg, steps=4, backend="hoisted")
    work = mlp_work(head.spec, rows, 4, 4, guided=cfg != 1.0)
    counted_flops(lambda: head.denoise(**settings))  # embeds the times
    assert counted_flops(lambda: head.denoise(**settings)) == total_flops(work)
    monkeypatch.setattr(hoisted, "MODULATION_BYTES", 1)  # of one step at a time
    assert counted_flops(lambda: head.denoise(**settings)) == total_flops(work)
    assert work.flops * 4 == sum(flops for _, flops in work.parts) * 4 == total_flops(work)


def flow_rows(settings: dict) -> list[int]:
    """Of every step, both halves where it is guided."""
    n = len(settings["noise"])
    return [2 * n if guided else n for guided in settings["table"].within(*settings["guidance"])]


def work_of(model: models.FlowAR | models.XAR, settings: dict, weight_bytes: int = 4) -> Work:
    if isinstance(model, models.XAR):
        return cell_work(model.head.spec, flow_rows(settings), settings["at"], weight_bytes)
    return flow_work(model.head.spec, flow_rows(settings), settings["noise"].shape[1], weight_bytes)


@pytest.mark.parametrize("high", [1.0, 0.5, -1.0], ids=["guided", "partly", "not"])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_the_hoisted_flow_heads(kind, high, monkeypatch):
    model = small_model(kind, depth=2, side=3)
    settings = flow_call(model, n=2, steps=4, side=3, cell=2, guidance=(-2.0, high))
    assert len(set(flow_rows(settings))) == (2 if high == 0.5 else 1)
    run_flow(model, settings, "hoisted")
    expected = total_flops(work_of(model, settings))
    assert counted_flops(lambda: run_flow(model, settings, "hoisted")) == expected
    monkeypatch.setattr(hoisted, "MODULATION_BYTES", 1)
    assert counted_flops(lambda: run_flow(model, settings, "hoisted")) == expected


def published_flops(named: dict[str, tuple[int, ...]], rows: int, tokens: int, *of_rows: str) -> int:
    """Of an evaluation as published, without attention: every matrix for every row, and for every token of it but those named."""
    matrices = {name: math.prod(shape) for name, shape in named.items() if name.endswith(".weight") and len(shape) == 2}
    once = sum(size for name, size in matrices.items() if any(part in name for part in ("time_embed", *of_rows)))
    return 2 * rows * (once + tokens * (sum(matrices.values()) - once))


def test_flops_of_the_published_mlp_head():
    head = mlp_head(depth=3)
    settings = mlp_call(head, 6, 3.0, steps=4, backend="reference")
    assert counted_flops(lambda: head.denoise(**settings)) == 4 * published_flops(head.spec.shapes(), 6, 1)


@pytest.mark.parametrize(("kind", "of_rows"), [("plain", ()), ("cross", ("ada_lin_attn",)), ("cell", ("ada_lin",))])
def test_flops_of_the_published_flow_heads(kind, of_rows):
    """Both halves at every step, guided or not."""
    model, rows, tokens = small_model(kind, depth=2), 4, 4
    settings, spec = flow_call(model, n=2, steps=4), model.head.spec
    named = {name: tuple(p.shape) for name, p in model.head._net.named_parameters() if name != "class_emb.weight"}
    seen = settings["at"] + tokens if kind == "cell" else tokens
    attention = spec.depth * (2 if kind == "cross" else 1) * 4 * seen * spec.width
    expected = 4 * (published_flops(named, rows, tokens, *of_rows) + rows * tokens * attention)
    assert counted_flops(lambda: run_flow(model, settings, "reference")) == expected


# Bytes -----------------------------------------------------------------------------------------------------------------

# By parts of their names: parameters that no step needs, since calls share the times' and the block's layer norm is folded into the
# modulation, and those that a call reads once.
LEFT_OUT = ("time_embed", "in_ln", "class_emb")
ONCE_A_CALL = ("adaLN_modulation", "ada_lin", "cond_embed", "crossattn.kv", "norm2_2")


def parameter_bytes(net: torch.nn.Module, cells: int = 1) -> tuple[int, int]:
    """(once a step, once a call). cells: among which the position embeddings are shared out."""
    loop = before = 0
    for name, p in net.named_parameters():
        size = p.nbytes // (cells if "pos_embed" in name else 1)
        if any(part in name for part in ONCE_A_CALL):
            before += size
        elif not any(part in name for part in LEFT_OUT):
            loop += size
    return loop, before


def check_bytes(work: Work, steps: int, loop: int, before: int) -> None:
    assert (work.steps, work.loop[0], work.before[0]) == (steps, steps * loop, before)
    assert [moved for moved, _ in work.parts] == [loop, before / steps]
    assert work.bytes == loop + before / steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_parameters(dtype):
    for sizes in ((16, 64, 2, 48), (5, 48, 3, 32), (16, 1280, 8, 1024)):
        with torch.device("meta"):
            spec, net = MLPSpec(*sizes), MLPNet(MLPSpec(*sizes)).to(dtype)
        for guided in (False, True):
            check_bytes(mlp_work(spec, 8, 10, dtype.itemsize, guided=guided), 10, *parameter_bytes(net))
    for kind in KINDS:
        model = small_model(kind, dtype, depth=2)
        settings = flow_call(model, steps=4)
        check_bytes(work_of(model, settings, dtype.itemsize), 4, *parameter_bytes(model.head._net, cells=4))


class Reads(TorchDispatchMode):
    """Bytes of weights and biases that linear layers were given."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.addmm, torch.ops.mkldnn._linear_pointwise):
            layer = args[::2] if func._overloadpacket is torch.ops.aten.addmm else args[1:3]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in layer)
        return func(*args, **(kwargs or {}))


@GUIDED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_that_hoisted_reads(dtype, rows, cfg):
    """The output layer's half without variance channels is read for the unconditional rows once more."""
    head = mlp_head(dtype=dtype)
    settings = mlp_call(head, rows, cfg, backend="hoisted")
    head.denoise(**settings)
    with Reads() as reads:
        head.denoise(**settings)
    work = mlp_work(head.spec, rows, 3, dtype.itemsize)
    again = 16 * (64 + 1) * dtype.itemsize if cfg != 1.0 else 0
    assert reads.bytes == work.loop[0] + work.before[0] + 3 * again


@pytest.mark.native
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "channels"), [(64, 16), (40, 5)])
def test_bytes_that_the_cpu_core_packs(width, channels, storage):
    """Panels and biases. Columns of a layer are padded to whole panels and its inputs to pairs; of published sizes nothing is."""
    head, panel = mlp_head(width, channels=channels), cpu._C.PANEL
    packed = head.packed("cpu", torch.float32, lambda p, spec: cpu.Weights(p, spec, storage))
    sizes = {
        name: (layers._panels.nbytes, sum(bias.nbytes for bias in layers._biases))
        for name, layers in vars(packed).items()
        if isinstance(layers, cpu.PackedLinears)
    }

    def up(n: int, multiple: int) -> int:
        return -(-n // multiple) * multiple

    w, k, out = up(width, panel), up(width, 2), up(2 * channels, panel)
    small = [(w, FREQUENCIES), (w, k), (w, 48), (w, up(channels, 2)), (out, k)]
    assert sizes == {
        "_blocks": (4 * w * k * storage.itemsize, 4 * w * 4),
        "_modulation": (8 * w * k * storage.itemsize, 8 * w * 4),
        "_small": (4 * sum(columns * inputs for columns, inputs in small), 4 * sum(columns for columns, _ in small)),
    }
    if (width, channels) == (64, 16):
        work = mlp_work(head.spec, 2, 1, storage.itemsize, other_bytes=4)
        of_time = 4 * (64 * (FREQUENCIES + 1) + 64 * (64 + 1))
        assert work.bytes == sum(map(sum, sizes.values())) - of_time


# Kernel launches -------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch) -> Counter:
    """Launches of Triton's kernels by name. They do nothing, so what a call returns is whatever lay in memory."""
    counter = Counter()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: counter.update([self.name])

    for module in (triton, triton_ops):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counted(name.removesuffix("_kernel")))
    return counter


class Operators(TorchDispatchMode):
    """PyTorch's operators that compute, by name: on a GPU each is a launch, those that make views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counter[func._overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counting_gpu(monkeypatch, launched) -> None:
    """As what `cuda` finds on the CPU: launches are counted among Triton's."""

    class CountingGpu:
        multiprocessors, shared_bytes, warps, origin = 132, 227 << 10, 16, "launches nothing"
        gave_up = torch.zeros(1, dtype=torch.int32)

        def launch(self, entry: str, call: cuda.Call, plan: cuda.Plan) -> None:
            launched.update([entry])

    host_gpu.use(monkeypatch, CountingGpu())


def weights_of(head: MLPHead, backend: str) -> triton.Weights:
    return head.packed(backend, head.dtype, backends.BACKENDS[backend].Weights)


def launches_of_a_graph(weights: triton.Weights, run) -> Counter:
    """PyTorch's in one graph of `weights`, whose capture `run` is made to begin."""
    operators = Operators()

    def capture(loop):
        with operators:
            loop()
        return lambda: None, 0

    weights.graphs = Graphs(CPU, capture)
    run()
    return operators.counter


@pytest.mark.interpreter
@pytest.mark.parametrize(("steps", "chunks"), [(4, 1), (4, 4), (5, 1)])
@pytest.mark.parametrize(
    ("rows", "block", "products"),
    [
        (6, ["adaln_linear", "gated_residual"], "linear"),
        (40, ["adaln_linear", "gated_residual"], "addmm"),
        (130, ["adaln", "linear", "gated_residual"], "addmm"),
    ],
)
def test_launches_of_a_call_on_triton(launched, monkeypatch, rows, block, products, steps, chunks):
    """Two a block and two a step, 18 a step of MAR-L's 8 blocks (of many rows three a block); before the loop three, for an odd
    number of steps four, and three for each chunk of modulation."""
    head, depth = mlp_head(depth=3), 3
    if chunks > 1:
        monkeypatch.setattr(triton, "MODULATION_BYTES", 1)
    settings = mlp_call(head, rows, 3.0, steps, backend="triton")
    operators = launches_of_a_graph(weights_of(head, "triton"), lambda: head.denoise(**settings))
    expected = Counter({"zero_": 1, "input_projection": 1, products: 1})
    expected.update({"add": chunks, "silu_": chunks, products: chunks})
    expected.update(dict.fromkeys(block, steps * depth) | {"final_layer": steps, "sampler_step": steps, "copy_": steps % 2})
    assert launched + operators == expected
    assert expected.total() == steps * (len(block) * depth + 2) + 3 + steps % 2 + 3 * chunks


@pytest.mark.interpreter
@pytest.mark.parametrize("chunks", [1, 4])
def test_launches_of_a_call_on_cuda(launched, counting_gpu, monkeypatch, chunks):
    """One for all steps, of each chunk of modulation; beside it what `triton` launches before its loop, and what clears words."""
    head = mlp_head(depth=3, dtype=torch.bfloat16)
    if chunks > 1:
        monkeypatch.setattr(triton, "MODULATION_BYTES", 1)
    settings = mlp_call(head, 6, 3.0, 4, backend="cuda")
    operators = launches_of_a_graph(weights_of(head, "cuda"), lambda: head.denoise(**settings))
    each = {"add": chunks, "silu_": chunks, "mlp_denoise_any": chunks}
    assert launched + operators == each | {"zero_": 1 + chunks, "linear": 1 + chunks}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("backend", "dtype", "images", "schedule", "evaluations", "captures"),
    [
        ("triton", torch.float32, 1, "linear:50-5", 1681, 47),
        ("triton", torch.float32, 3, "linear:50-5", 1681, 47),
        ("triton", torch.float32, 1, "constant:50", 64 * 48, 4),
        ("cuda", torch.bfloat16, 1, "linear:50-5", 1681, 47),
    ],
)
def test_launches_and_captures_of_an_image_by_mar(launched, counting_gpu, backend, dtype, images, schedule, evaluations, captures):
    """Published numbers of tokens, iterations and steps; Harmon's loop is the same. The first image captures a graph for each pair
    of steps and row bucket that there is, the second none: it replays 64, which launch what is counted here."""
    model = models.MAR(**SMALL | {"img_size": 256}).to(dtype).eval()
    weights = weights_of(model.head, backend)
    weights.graphs = Graphs(CPU, Recorder())
    for image in range(2):
        launched.clear()
        model.sample_tokens(torch.arange(images), schedule, num_iter=64, cfg=3.0, backend=backend)
        made = weights.graphs.counters()
        assert (made["captures"], made["hits"]) == (captures, 64 * (image + 1) - captures)
        assert made["eager"] == made["evictions"] == 0

    steps = [len(solvers.ddpm(as_schedule(schedule)(k, 64))) for k in range(64)]
    buckets = [row_bucket(2 * images * tokens) for tokens, _ in iterations()]
    assert captures == len(set(zip(steps, buckets, strict=True)))
    assert sum(steps) == evaluations
    if backend == "cuda":
        assert launched == {"mlp_denoise_any": 64, "linear": 2 * 64}
        return
    loop = dict.fromkeys(("adaln_linear", "gated_residual"), 2 * evaluations)
    loop |= dict.fromkeys(("final_layer", "sampler_step"), evaluations)
    assert launched == loop | {"input_projection": 64, "linear": 2 * sum(rows <= tiles.FEW for rows in buckets)}


@pytest.mark.filterwarnings("ignore:the tokens of AR step:UserWarning")  # of kernels that only count
@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_launches_and_captures_of_an_image_by_flowar_and_xar(launched, monkeypatch, kind):
    """A graph for each scale or cell. Triton's launches, among products by the library: 4 a block, with cross-attention 6,
    the norms around the blocks, and one a step. FlowAR's backbone passes once a scale, xAR's finished cells once more."""
    record_flow_graphs(monkeypatch)
    model = small_model(kind, depth=2)
    for image in range(2):
        launched.clear()
        model.sample_tokens(torch.tensor([image]), "linear:6-4", backend="triton")
    K = 4 if kind == "cell" else 2
    assert counted(model, "captures", "hits", "eager") == (K, K, 0)
    evaluations = sum(len(step.table) for step in model.plan("linear:6-4", "euler_maruyama" if kind == "cell" else "euler"))

    def launches(passes: int, blocks: int, cross: int = 0, norms: int = 3) -> Counter:
        per_pass = {"residual_norm": (2 + cross) * blocks + norms, "rotate_heads": (1 + cross) * blocks, "gelu_gate": blocks}
        return Counter({name: passes * number for name, number in per_pass.items()})

    steps = Counter({"flow_step": evaluations})
    if kind == "cell":
        assert launched == launches(evaluations + K - 1, blocks=4) + steps
        return
    cross = int(kind == "cross")
    of_condition = Counter(dict.fromkeys(("residual_norm", "rotate_heads"), cross * 2 * K))
    assert launched == launches(K, blocks=4) + launches(evaluations, blocks=2, cross=cross, norms=1) + of_condition + steps


NOT_LAUNCHED = {"empty", "new_empty", "_unsafe_view", "slice"}  # what allocates, and views


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_launches_of_a_flow_step(launched, monkeypatch, kind):
    """Nine a block, with cross-attention fourteen; beside them what is listed here, of which the solver's is one. Not counted: the
    library's attention over few tokens, which may split it, then launches another kernel that joins the parts."""

    def counted_launches(depth: int, steps: int) -> Counter:
        operators = Operators()

        def capture(loop):
            with operators:
                loop()
            return lambda: None, 0

        launched.clear()
        monkeypatch.setattr(flow, "Graphs", lambda device: Graphs(device, capture))
        model = small_model(kind, torch.bfloat16, depth=depth)
        run_flow(model, flow_call(model, steps=steps, guidance=(0.0, 1.0)))
        counted = launched + operators.counter
        counted["addmm"] += counted.pop("mm", 0)  # products without a bias
        return Counter({name: number for name, number in counted.items() if name not in NOT_LAUNCHED})

    few = counted_launches(1, 2)
    blocks = 2 if kind == "cell" else 1  # an encoder's and a decoder's
    of_block, of_step = counted_launches(2, 2) - few, counted_launches(1, 3) - few
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    block = Counter({"residual_norm": 2, "rotate_heads": 1, "gelu_gate": 1, attention: 1, "addmm": 4})
    if kind == "cross":
        block += Counter({"residual_norm": 1, "rotate_heads": 1, attention: 1, "addmm": 2})
    # Input and output layer, the residual stream in float32, the last norm, the solver; between xAR's encoder and decoder a layer,
    # a norm and the stream once more, and positions before each.
    step = Counter({"addmm": 2, "_to_copy": 1, "residual_norm": 1, "flow_step": 1})
    if kind == "cell":
        step += Counter({"addmm": 1, "_to_copy": 1, "residual_norm": 2, "add": 2})
    assert (block.total(), step.total()) == {"plain": (9, 5), "cross": (14, 5), "cell": (9, 11)}[kind]

    # Before the steps, of each block: its modulation, and of cross-attention modulation by time, keys and values.
    once = Counter({"addmm": blocks})
    if kind == "cross":
        once += Counter({"addmm": 2, "silu": 1, "residual_norm": 1, "rotate_heads": 1})
    each = Counter({name: blocks * number for name, number in block.items()})
    assert of_block == each + each + once
    assert of_step == each + step


# Allocations -----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Of operators: how many results lie in memory that no argument does, and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        before = set(storages((args, kwargs)))
        made = {address: size for address, size in storages(out).items() if address not in before}
        self.count += len(made)
        self.bytes += sum(made.values())
        return out


def storages(tree: object) -> dict[int, int]:
    """Bytes by address of those of all tensors, but of oneDNN's packed weights, which have none."""
    held = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.layout == torch.strided]
    return {storage._cdata: storage.nbytes() for storage in held}


def allocated(run) -> tuple[int, int]:
    """(tensors, bytes) of a call like calls before it; of the next and the one after as well."""
    run()
    each = []
    for _ in range(3):
        with Allocations() as allocations:
            run()
        each.append((allocations.count, allocations.bytes))
    assert each[0] == each[1] == each[2]
    return each[0]


@pytest.mark.native
@pytest.mark.parametrize("steps", [1, 20])
@GUIDED
def test_allocations_on_cpu(rows, cfg, steps):
    """Conditions (F.pad copies them, also where nothing is padded), what they are embedded to, the state, and the result where it
    is both halves; whatever the steps. The core's own memory is not PyTorch's: a team of threads keeps it (csrc/cpu/team.h)."""
    head, guided, n = mlp_head(), cfg != 1.0, rows // 2 if cfg != 1.0 else rows
    settings = mlp_call(head, rows, cfg, steps, backend="cpu")
    assert allocated(lambda: head.denoise(**settings)) == (3 + guided, 4 * (rows * (48 + 64 + guided * 16) + n * 16))


@pytest.mark.parametrize("steps", [1, 5])
@GUIDED
def test_allocations_on_hoisted(rows, cfg, steps):
    """One for every operator that is neither a view nor in place, three for a layer norm (its statistics too)."""
    head, guided, depth = mlp_head(), cfg != 1.0, 2
    settings = mlp_call(head, rows, cfg, steps, backend="hoisted")
    n = rows // 2 if guided else rows
    call = 2 + 3  # cond_embed, the first output before; times + condition, its silu, the modulation
    block = 3 + 4  # the layer norm; modulated, both linear layers, h
    step = 1 + 3 + 2 + 3  # input_proj; the layer norm; modulated, the output; a*x, b*eps, their sum
    noise = 7  # l1*v, + l0, / 2, exp, * noise, * temperature, + x
    guidance = 1 + 1 + 3  # h of both halves; the output of the other; the difference, * cfg, + the other
    count = call + steps * (step + depth * block + guided * guidance) + (steps - 1) * noise + guided  # last, the result's halves
    floats = rows * 64 + n * 16 + steps * rows * (2 * 64 + head.spec.modulation_width)
    floats += steps * (n * 64 + (depth + 1) * rows * (64 + 2) + rows * 64 + depth * rows * 4 * 64 + n * 32 + 3 * n * 16)
    floats += (steps - 1) * noise * n * 16 + guided * (steps * (rows * 64 + 4 * n * 16) + rows * 16)
    assert allocated(lambda: head.denoise(**settings)) == (count, 4 * floats)


@pytest.mark.skipif(not onednn.serves(torch.ones(1)), reason="counts oneDNN's operators, and this PyTorch has none")
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_allocations_of_flow_heads_on_hoisted(kind, guided, steps):
    """As above, tensors alone. Of PyTorch's norm and attention, which make some of their own, it is asked how many."""
    model, cross, cell = small_model(kind, depth=2), kind == "cross", kind == "cell"
    settings = flow_call(model, n=2, steps=steps, guidance=(0.0, 1.0) if guided else (-2.0, -1.0))
    x, blocks = torch.ones(1, 2, 4, 16), 4 if cell else 2
    rms = allocated(lambda: F.rms_norm(x, (16,)))[0]
    attention = allocated(lambda: F.scaled_dot_product_attention(x, x, x))[0]
    modulated, normed = rms + 1, rms + 1  # * (1 + scale) (+ shift in place); * weight
    queries = 1 + 2  # the product; rotation as complex numbers, applied
    of_block = 2 * modulated + queries + attention + 1 + 3 + cross * (normed + queries + attention + 1)  # proj; the gated MLP
    step = 2 + 2 + 5  # to the network's dtype and back; input, output; a*x, b*v, c*before, their sum
    step += 3 * normed + 3 if cell else modulated  # decoder_embed, and positions twice
    noise, guidance = 3, 4  # deviation * temperature * noise, + x; both halves' x, the difference, * cfg, + the other
    call = 4 + blocks  # the noise in float64, the first output before; times + condition, its silu; a block's modulation
    if not cell:
        call += 1 + 1 + 2  # cond_embed; the final layer's modulation; the result's halves, in the network's dtype
    if cross:
        call += blocks * (2 + normed + 1 + 5)  # silu and modulation of time; keys and values: norm, product, rotation of keys
    count = call + steps * (step + guided * guidance + blocks * of_block) + (steps - 1) * noise
    assert allocated(lambda: run_flow(model, settings, "hoisted"))[0] == count


@pytest.mark.interpreter
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize(("backend", "dtype"), [("triton", torch.float32), ("cuda", torch.bfloat16)])
def test_allocations_of_a_replay(launched, counting_gpu, backend, dtype, steps):
    """The state copied out, and the result's two halves: every other buffer is the graph's."""
    head = mlp_head(dtype=dtype)
    settings = mlp_call(head, 6, 3.0, steps, backend=backend)
    weights_of(head, backend).graphs = Graphs(CPU, Recorder())
    assert allocated(lambda: head.denoise(**settings)) == (2, 4 * (3 + 6) * 16)


# What a call costs beside its loop -------------------------------------------------------------------------------------

FILL = Counter({"copy_": 4, "fill_": 1})  # z, the tables, start and noise; both scalars
RESULT = Counter({"clone": 1})


def operators_of(run) -> Counter:
    """Without those that make views or look at dtypes."""
    with Operators() as operators:
        run()
    return operators.counter - Counter({"promote_types": 1})


def replaying(head: MLPHead, backend: str) -> None:
    """What a replay launches is not counted: it does nothing."""
    weights_of(head, backend).graphs = Graphs(CPU, lambda loop: (lambda: None, 0))


def filled_one_by_one(w, z, table, cfg, temperature, noise, step_noise):
    times, steps, halves = w.time_table(table), w.step_table(table), 2 if cfg != 1.0 else 1

    def fill(buffers):
        for half, into in zip(z.chunk(halves), buffers["z"].chunk(halves), strict=True):
            into[: len(half)].copy_(half)
        for name, part in (("times", times), ("steps", steps), ("x", noise), ("noise", step_noise)):
            buffers[name].narrow(-2, 0, part.shape[-2]).copy_(part)
        for scalar, value in zip(buffers["scalars"], (cfg, temperature), strict=True):
            scalar.fill_(value)

    return fill


@pytest.mark.interpreter
@pytest.mark.parametrize(("rows", "cfg"), [(6, 3.0), (8, 3.0), (5, 1.0)])
@pytest.mark.parametrize(("backend", "dtype"), [("triton", torch.float32), ("cuda", torch.bfloat16)])
def test_launches_around_a_replay(launched, counting_gpu, monkeypatch, backend, dtype, rows, cfg):
    """Five before it and one after, or two under guidance; padded or not. Noise that is drawn is one more a step, and two for all:
    the start, and memory for the rest."""
    head = mlp_head(dtype=dtype)
    replaying(head, backend)
    settings = mlp_call(head, rows, cfg, 4, backend=backend)
    drawn = {name: value for name, value in settings.items() if "noise" not in name}
    head.denoise(**settings)
    around = FILL + RESULT + Counter({"cat": int(cfg != 1.0)})
    assert operators_of(lambda: head.denoise(**settings)) == around
    draws = Counter({"randn": 1, "empty": 1, "normal_": 4})
    assert operators_of(lambda: head.denoise(**drawn)) == around + draws
    monkeypatch.setattr(triton, "inputs", filled_one_by_one)
    assert operators_of(lambda: head.denoise(**settings)).total() == around.total() + (3 if cfg != 1.0 else 2)


@pytest.mark.interpreter
@pytest.mark.parametrize("streams", [None, torch.arange(5) + 7])
def test_launches_around_a_replay_that_draws(launched, counting_gpu, streams):
    """No noise of the steps; seed and streams are two."""
    head = mlp_head(dtype=torch.bfloat16)
    replaying(head, "cuda")
    settings = mlp_call(head, 5, 1.0, 4, backend="cuda", step_noise=None, rng=Philox(3, streams))
    head.denoise(**settings)
    others = Counter({"fill_": 1, "arange" if streams is None else "copy_": 1})
    assert operators_of(lambda: head.denoise(**settings)) == FILL - Counter({"copy_": 1}) + others + RESULT


def check_images(head: MLPHead, image) -> None:
    """The second derives nothing of its tables."""
    w, missed = weights_of(head, "triton"), []
    for _ in range(2):
        image()
        missed.append([kept.cache_info().misses for kept in (w.tables, w.step_table, w.time_table)])
    assert missed[0] == missed[1] == [5] * 3


@pytest.mark.interpreter
@pytest.mark.parametrize("mutant", [None, "hashed by identity"])
def test_an_image_after_the_first_derives_nothing(launched, monkeypatch, mutant):
    """Also of a user's solver, whose tables are new for every image. Tables by identity would be: that is seen."""
    model = models.MAR(**SMALL).eval()
    replaying(model.head, "triton")

    def own(steps: int) -> solvers.StepTable:
        return solvers.ddpm(steps)

    def image():
        model.sample_tokens(torch.tensor([1]), "linear:7-3", num_iter=5, backend="triton", solver=own)

    if mutant:
        monkeypatch.setattr(solvers.StepTable, "__hash__", object.__hash__)
        monkeypatch.setattr(solvers.StepTable, "__eq__", object.__eq__)
        with pytest.raises(AssertionError):
            check_images(model.head, image)
    else:
        check_images(model.head, image)


def test_only_the_backend_asked_for_is_asked(monkeypatch):
    asked = []
    for name, backend in backends.BACKENDS.items():
        monkeypatch.setattr(backend, "refuses", lambda *rest, name=name: asked.append(name))
    choose = (mlp_head().spec, torch.float32, CPU, 4)
    assert backends.choose("hoisted", *choose) == "hoisted"
    assert backends.choose("auto", *choose) == "cpu"
    assert asked == ["hoisted", "cpu"]


# Network evaluations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "size", "annealed", "steps", "constant"),
    [
        *(("mar", size, 1681, 100, 64 * 96) for size in ("base", "large", "huge")),
        *(("harmon", size, 1681, 100, 64 * 96) for size in ("0.5b", "1.5b")),
        *(("flowar", size, 24 + 22 + 20 + 16 + 14, 25, 5 * 24) for size in ("small", "large")),
        ("flowar", "huge", 50 + 40 + 32 + 22 + 14, 50, 5 * 50),
        *(("xar", size, 50 + 38 + 26 + 15, 50, 4 * 50) for size in ("base", "large", "huge")),
    ],
)
def test_network_evaluations_of_published_settings(system, size, annealed, steps, constant):
    """Of an image with DiSA, and with as many steps at every AR step as the systems' own authors take (100 clipped are 96)."""
    settings, model = SYSTEMS[system].published[size], None
    if system in ("flowar", "xar"):
        with torch.device("meta"):
            model = SYSTEMS[system].make(size=size)
    unannealed = dataclasses.replace(settings, schedule=f"constant:{steps}")
    assert [each.network_evaluations(model) for each in (settings, unannealed)] == [annealed, constant]
