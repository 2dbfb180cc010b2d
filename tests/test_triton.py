"""The Triton kernels one by one, and the loop that they make, in Triton's interpreter: against the formulas in float64."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_good_as, assert_close, errors
from random_parameters import random_parameters
from recorded import golden, golden_cases
from test_mlp_head import run_recorded

from disa_fast import MLPHead, UnsupportedError, backends, solvers
from disa_fast.backends import triton
from disa_fast.heads.mlp import LN_EPS, MLPSpec
from disa_fast.kernels.triton import tiles
from disa_fast.kernels.triton.tiles import Tile, Tiles

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tiles(Tile(16, 16, 32, 2, 2), Tile(16, 32, 16, 2, 2), Tile(16, 32, 32, 2, 1), Tile(16, 32, 16, 2, 2), fused=True)
APART = dataclasses.replace(SMALL, fused=False, step=Tile(32, 64, 128, 2, 1))
GUARD = 7.0  # what lies behind every buffer, and must still lie there afterwards


class Case:
    """Weights and random buffers for one step of a head with one block, and the same in float64."""

    def __init__(self, rows=5, width=48, channels=16, dtype=torch.float32, tiles=SMALL, guided=False, noisy=True):
        spec = MLPSpec(channels, width, 1, 32)
        parameters = {name: tensor.to(dtype) for name, tensor in random_parameters(spec, 0).items()}
        self.w = triton.Weights(parameters, spec)
        self.exact = triton.Weights({name: tensor.double() for name, tensor in parameters.items()}, spec)
        self.shape = triton.Shape(1, rows, guided, noisy, tiles, "ieee")
        self._arenas, self.b = {}, {}
        for name, (shape, kind) in triton.layout(self.w, self.shape).items():
            arena = torch.full((math.prod(shape) + 64,), GUARD, dtype=kind)
            arena[: math.prod(shape)] = torch.randn(math.prod(shape))
            self._arenas[name], self.b[name] = arena, arena[: math.prod(shape)].view(shape)
        self.b["h"].mul_(3).add_(1)
        self.b["stats"].copy_(statistics(self.b["h"].double(), tiles.second.n))
        self.before = {name: tensor.double().clone() for name, tensor in self.b.items()}

    def part(self, name: str) -> torch.Tensor:
        """shift, scale or gate of the block, or shift or scale of the final layer (final_shift, final_scale)."""
        names = ["shift", "scale", "gate", "final_shift", "final_scale"]
        return self.before["modulation"][0].split(self.w.spec.width, dim=-1)[names.index(name)]

    def modulated(self, shift: str, scale: str) -> torch.Tensor:
        h = self.before["h"]
        return F.layer_norm(h, h.shape[-1:], eps=LN_EPS) * self.part(scale) + self.part(shift)

    def projected(self) -> torch.Tensor:
        """h of the next step, from the x that is there: operands of a product are rounded, sums are not."""
        h = F.linear(self.b["x"].to(self.w.input[0].dtype).double(), *self.exact.input)
        return torch.cat([h, h]) if self.shape.guided else h

    def check(self, worst: float, **expected: torch.Tensor) -> None:
        """Those buffers as expected, `h` and its `stats` in float32, all others as before, and nothing written behind any."""
        for name, tensor in self.b.items():
            assert (self._arenas[name][tensor.numel() :] == GUARD).all(), f"written behind {name}"
            if name == "stats" and "h" in expected:
                truth = statistics(self.b["h"].double(), self.shape.tiles.second.n)
                assert_close(tensor.double(), truth, worst=1e-5 * float(truth.abs().max()))
            elif name in expected:
                bound = (1e-5 if name == "h" else worst) * float(expected[name].abs().max())
                assert_close(tensor.double(), expected[name], worst=bound)
            else:
                assert torch.equal(tensor.double(), self.before[name]), f"{name} has changed"


def statistics(h: torch.Tensor, tile: int) -> torch.Tensor:
    """[rows, 2, tiles]: mean and sum of squared deviations of every `tile` columns."""
    parts = [(part.mean(dim=1), (part - part.mean(dim=1, keepdim=True)).square().sum(dim=1)) for part in h.split(tile, dim=1)]
    return torch.stack([torch.stack(column, dim=1) for column in zip(*parts, strict=True)], dim=1)


WORST = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SIZES = pytest.mark.parametrize(("rows", "width"), [(1, 16), (2, 64), (5, 48), (16, 80), (17, 112)])


@SIZES
@pytest.mark.parametrize("tiles", [SMALL, APART], ids=["fused", "apart"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_half(dtype, tiles, rows, width):
    case = Case(rows, width, dtype=dtype, tiles=tiles)
    m = case.modulated("shift", "scale")
    (weight, bias), _ = case.exact.blocks[0]
    triton.first_half(case.w, case.shape, case.b, case.b["modulation"][0], 0)
    case.check(WORST[dtype], u=F.silu(F.linear(m, weight, bias)), **({} if tiles.fused else {"m": m}))


@SIZES
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_half(dtype, rows, width):
    case = Case(rows, width, dtype=dtype)
    _, (weight, bias) = case.exact.blocks[0]
    h = case.before["h"] + case.part("gate") * F.linear(case.before["u"], weight, bias)
    triton.second_half(case.w, case.shape, case.b, case.b["modulation"][0], 0)
    case.check(WORST[dtype], h=h)


@pytest.mark.parametrize("tiles", [SMALL, APART], ids=["parts", "one part"])
@pytest.mark.parametrize(("rows", "width", "channels"), [(2, 64, 16), (6, 48, 5), (34, 80, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_final_layer(dtype, tiles, rows, width, channels):
    case = Case(rows, width, channels, dtype, tiles)
    m, (weight, _), k = case.modulated("final_shift", "final_scale"), case.exact.output, tiles.step.k
    parts = [F.linear(x, w) for x, w in zip(m.split(k, dim=1), weight.split(k, dim=1), strict=True)]
    triton.final_layer(case.w, case.shape, case.b, case.b["modulation"][0])
    case.check(WORST[dtype], parts=torch.stack(parts))


@pytest.mark.parametrize("tiles", [SMALL, APART], ids=["parts", "one part"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("noisy", [True, False, None], ids=["noisy", "a step without", "a table without"])
@pytest.mark.parametrize(
    ("rows", "width", "channels", "dtype"), [(2, 64, 16, torch.bfloat16), (6, 48, 5, torch.float32), (34, 80, 16, torch.float16)]
)
def test_sampler_step(tiles, guided, noisy, rows, width, channels, dtype):
    case = Case(rows, width, channels, dtype, tiles, guided, noisy is not None)
    for name, value in (("steps", [0.9, -0.7, 0.3, -1.0, 0.5, float(bool(noisy)), 9, 9]), ("scalars", [2.5, 0.8])):
        case.b[name].copy_(torch.tensor(value).expand_as(case.b[name]))
        case.before[name] = case.b[name].double()
    o, v = (case.before["parts"].sum(dim=0) + case.exact.output[1]).split(channels, dim=-1)
    if guided:
        (o, o_u), v = o.chunk(2), v.chunk(2)[0]
        o = o_u + 2.5 * (o - o_u)
    x = 0.9 * case.before["other_x"] - 0.7 * o + 0.3 * case.before["other_before"]
    if noisy:
        x = x + torch.exp((-1.0 + 0.5 * v) / 2) * case.before["noise"][0] * 0.8
    triton.sampler_step(case.w, case.shape, case.b, 0)
    case.check(WORST[torch.float32], x=x, before=o, h=case.projected())


def test_a_step_writes_over_nothing_that_it_reads(monkeypatch):
    """Each program computes the new x. Where it took the place of the old one, those that come later would go on from it."""
    states = triton._states

    def run() -> None:
        case = Case(6, 96, guided=True)
        now, _ = states(case.shape, case.b, 0)
        triton.sampler_step(case.w, case.shape, case.b, 0)
        left = case.b["x"] if triton._states is states else now[0]
        h = F.linear(left.double(), *case.exact.input)
        assert_close(case.b["h"].double(), torch.cat([h, h]), worst=1e-5 * float(h.abs().max()))

    run()
    monkeypatch.setattr(triton, "_states", lambda *arguments: (states(*arguments)[0],) * 2)
    with pytest.raises(AssertionError, match="worst element"):
        run()


@pytest.mark.parametrize("tiles", [SMALL, APART], ids=["sixteen", "thirty-two"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_projection(dtype, guided, tiles):
    case = Case(18, 80, dtype=dtype, tiles=tiles, guided=guided)
    triton.input_projection(case.w, case.shape, case.b)
    case.check(WORST[dtype], h=case.projected())


@pytest.mark.parametrize("half", ["first", "second"])
def test_float32_is_as_good_as_eager_at_a_published_width(half, monkeypatch):
    """A library splits long sums; so do these products, by blocks of k. One chain of additions would show."""
    from disa_fast.kernels.triton import adaln_linear, common

    chosen = tiles.HEURISTIC["float32"][tiles.FEW]
    chosen = dataclasses.replace(chosen, **{half: dataclasses.replace(getattr(chosen, half), n=256)})  # few programs to interpret

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ours, eager, truth"""
        torch.manual_seed(0)
        case = Case(2, 1280, tiles=chosen)
        results = []
        for kind in (torch.float32, torch.float64):
            h, modulation, u = (case.before[name].to(kind) for name in ("h", "modulation", "u"))
            shift, scale, gate = modulation[0].split(1280, dim=-1)[:3]
            (w1, b1), (w2, b2) = ((weight.to(kind), bias.to(kind)) for weight, bias in case.w.blocks[0])
            m = F.layer_norm(h, (1280,), eps=LN_EPS) * scale + shift
            results.append(F.silu(F.linear(m, w1, b1)) if half == "first" else h + gate * F.linear(u, w2, b2))
        {"first": triton.first_half, "second": triton.second_half}[half](case.w, case.shape, case.b, case.b["modulation"][0], 0)
        return case.b["u" if half == "first" else "h"], *results

    ours, eager, truth = run()
    assert_as_good_as(ours, eager, truth, torch.float32)

    def one_chain(sums, x, weight, precision):
        return common.tl.dot(x, weight, sums, input_precision=precision)

    for module in (common, adaln_linear):
        monkeypatch.setattr(module, "add_product", one_chain)
    (worst, l2), (chained_worst, chained_l2) = errors(ours, truth), errors(run()[0], truth)
    assert chained_l2 > 1.5 * l2, (l2, chained_l2)
    assert chained_worst > 1.5 * worst, (worst, chained_worst)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 16, 16), (33, 48, 80), (16, 80, 48)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype, rows, k, n, silu):
    case = Case(dtype=dtype)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, k), (n, k), (n,)))
    expected = F.linear(x.double(), weight.double(), bias.double())
    for tile in (SMALL.modulation, None):
        out = torch.full((rows + 1, n), GUARD, dtype=dtype)
        if tile is None and silu:
            continue
        triton.linear(x, weight, bias, out[:rows], case.shape, tile, silu)
        assert_close(out[:rows].double(), F.silu(expected) if silu else expected, worst=WORST[dtype] * float(expected.abs().max()))
        assert (out[rows:] == GUARD).all()


# Dependent launch -----------------------------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, np.ndarray | None]]:
    """What programs do, in order: "launch" of dependents, "wait", "prefetch" and "load" with addresses. The interpreter by itself
    knows neither dependent launch nor prefetches."""
    from triton.language.extra import cuda
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    seen, load = [], InterpreterBuilder.create_masked_load

    def create_inline_asm(self, asm, constraints, values, kinds, is_pure, pack):
        assert "prefetch" in asm
        seen.append(("prefetch", values[0].data))
        result = TensorHandle(np.zeros(values[0].data.shape, np.int32), kinds[0].scalar)
        return type("Operation", (), {"get_result": lambda self, i: result})()

    def create_masked_load(self, pointers, *rest):
        seen.append(("load", pointers.data))
        return load(self, pointers, *rest)

    monkeypatch.setattr(cuda, "gdc_launch_dependents", lambda: seen.append(("launch", None)))
    monkeypatch.setattr(cuda, "gdc_wait", lambda: seen.append(("wait", None)))
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
    return seen


# What launches, the weights that its programs have in turn, where these are: every kernel of a loop with a first tile for few rows.
LAUNCHES = {
    "first half": (lambda c: triton.first_half(c.w, c.shape, c.b, c.b["modulation"][0], 0), lambda w: w.blocks[0][0]),
    "second half": (lambda c: triton.second_half(c.w, c.shape, c.b, c.b["modulation"][0], 0), lambda w: w.blocks[0][1]),
    "final layer": (lambda c: triton.final_layer(c.w, c.shape, c.b, c.b["modulation"][0]), lambda w: w.output),
    "sampler step": (lambda c: triton.sampler_step(c.w, c.shape, c.b, 0), lambda w: w.input),
    "input projection": (lambda c: triton.input_projection(c.w, c.shape, c.b), lambda w: w.input),
    "linear": (lambda c: triton.linear(c.b["z"], *c.w.cond, c.b["condition"], c.shape, SMALL.modulation), lambda w: w.cond),
}


def check_dependent_launch(events: list, launch: str) -> None:
    """Each program lets the next kernel start, asks for weights, waits, and only then reads; together they ask for all weights and
    nothing else; and the results are those without."""
    run, layer = LAUNCHES[launch]
    torch.manual_seed(0)
    plain = Case(5, 80, 24, torch.bfloat16)
    run(plain)
    torch.manual_seed(0)
    case = Case(5, 80, 24, torch.bfloat16, dataclasses.replace(SMALL, pdl=True, prefetch=True))
    events.clear()
    run(case)
    assert all(torch.equal(case.b[name], plain.b[name]) for name in case.b)
    whats = [what for what, _ in events]
    starts = [i for i, what in enumerate(whats) if what == "launch"]
    assert starts[0] == 0
    for start, end in zip(starts, [*starts[1:], len(whats)], strict=True):
        assert whats[start : start + 3] == ["launch", "prefetch", "wait"]
        assert set(whats[start + 3 : end]) == {"load"}
    weight = layer(case.w)[0]
    asked = (
        np.unique(np.concatenate([at.ravel() for what, at in events if what == "prefetch"])).astype(np.int64) - weight.data_ptr()
    )
    assert asked[0] == 0
    assert np.diff([*asked, weight.nbytes]).max() <= 128
    assert asked[-1] < weight.nbytes


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_program_waits_before_it_reads_and_asks_for_its_weights_before_it_waits(events, launch):
    check_dependent_launch(events, launch)


@pytest.mark.parametrize("change", ["too late", "too early", "half"])
def test_a_misplaced_wait_or_prefetch_is_noticed(events, change, monkeypatch):
    from disa_fast.kernels.triton import adaln_linear

    begin = adaln_linear.prefetching_after_kernel_before

    def changed(weight_ptr, n, k, size_n, size_k, columns, pdl, prefetch):
        if change == "half":
            return begin(weight_ptr, n, k, size_n, size_k, 32, pdl, prefetch)
        if change == "too early":
            adaln_linear.tl.load(weight_ptr)
            return begin(weight_ptr, n, k, size_n, size_k, columns, pdl, prefetch)
        begin(weight_ptr, n, k, size_n, size_k, columns, pdl, False)
        return begin(weight_ptr, n, k, size_n, size_k, columns, pdl, prefetch)

    monkeypatch.setattr(adaln_linear, "prefetching_after_kernel_before", changed)
    with pytest.raises(AssertionError):
        check_dependent_launch(events, "first half")


# The whole loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "stem", "case"), [c for c in golden_cases("mar_head") if c.values[0] == "slim" and c.values[2]["nominal"] <= 10]
)
def test_samples_as_recorded(which, stem, case):
    out, truth = run_recorded(which, stem, case, torch.float32, "triton")
    assert_close(out, truth, worst=max(1e-5, 10 * case["f32_vs_f64"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cfg"), [(12, 3.0), (12, 1.0), (72, 3.0)])
def test_is_as_good_as_eager(dtype, rows, cfg):
    recorded, table = golden("slim", "mar_head"), solvers.ddpm(4)
    sd = {name: tensor.to(dtype) for name, tensor in recorded.state_dict().items()}
    low, exact = MLPHead.from_state_dict(sd), MLPHead.from_state_dict({name: t.double() for name, t in sd.items()})
    z = recorded["z/r10"][torch.randint(0, 10, (rows,))].to(dtype)
    draws = {"cfg": cfg, "noise": torch.randn(rows, 16), "step_noise": torch.randn(4, rows, 16)}
    ours, eager = (low.denoise(z, table, backend=name, **draws) for name in ("triton", "reference"))
    assert_as_good_as(ours, eager, exact.denoise(z.double(), table, backend="reference", **draws), dtype)


def test_float16_stays_finite_where_eager_does_not():
    """A residual stream beyond 65504 is no trouble, since it is kept in float32, nor is a hidden activation there."""
    sd = random_parameters(MLPSpec(16, 64, 2, 32), 0)
    sd["res_blocks.0.mlp.2.bias"] += 60000.0
    sd["res_blocks.0.adaLN_modulation.1.bias"][128:] = 50.0
    sd["res_blocks.1.mlp.0.bias"][:3] = 60000.0
    sd["res_blocks.1.mlp.0.weight"] *= 3000.0
    sd["res_blocks.1.mlp.2.weight"][:, :3] *= 1e-4
    head = MLPHead.from_state_dict({name: tensor.half() for name, tensor in sd.items()})
    draws = {"z": torch.randn(4, 32).half(), "table": solvers.dpm_solver(3), "noise": torch.randn(4, 16)}
    assert not head.denoise(backend="reference", **draws).isfinite().all()
    assert head.denoise(backend="triton", **draws).isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_result_is_where_it_is_looked_for_after_any_number_of_steps(steps):
    sd, z, table = random_parameters(MLPSpec(5, 80, 1, 32), 0), torch.randn(4, 32), solvers.ddpm(steps)
    exact = MLPHead.from_state_dict({name: tensor.double() for name, tensor in sd.items()})
    draws = {"cfg": 3.0, "noise": torch.randn(2, 5), "step_noise": torch.randn(steps, 2, 5)}
    truth = exact.denoise(z.double(), table, backend="reference", **draws)
    out = MLPHead.from_state_dict(sd).denoise(z, table, backend="triton", **draws)
    assert_close(out, truth, worst=2e-5 * float(truth.abs().max()))


def test_modulation_in_chunks_is_the_same(monkeypatch):
    head, call = MLPHead.from_state_dict(random_parameters(MLPSpec(16, 32, 1, 32), 0)), {"cfg": 3.0, "backend": "triton"}
    call |= {"z": torch.randn(6, 32), "table": solvers.ddpm(5), "noise": torch.randn(3, 16), "step_noise": torch.randn(5, 3, 16)}
    whole = head.denoise(**call)
    monkeypatch.setattr(triton, "MODULATION_BYTES", 2 * 6 * head.spec.modulation_width * 4)
    assert torch.equal(head.denoise(**call), whole)


@pytest.mark.parametrize(("rows", "batch_invariant"), [(16, False), (34, True)])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(rows, batch_invariant, cfg, dtype):
    head = MLPHead.from_state_dict({name: t.to(dtype) for name, t in random_parameters(MLPSpec(16, 32, 1, 32), 0).items()})
    n, table = rows // 2 if cfg != 1 else rows, solvers.ddpm(2)
    z, noise, step_noise = torch.randn(rows, 32), torch.randn(n, 16), torch.randn(2, n, 16)

    def run(some: list[int]) -> torch.Tensor:
        both = [*some, *(n + i for i in some)] if cfg != 1 else some
        draws = {"noise": noise[some], "step_noise": step_noise[:, some]}
        return head.denoise(z[both], table, cfg, backend="triton", batch_invariant=batch_invariant, **draws)[: len(some)]

    together = run(list(range(n)))
    for some in ([n - 1], [3, 0, n - 2, 1, 2]):
        assert torch.equal(run(some), together[some])


# Choice ----------------------------------------------------------------------------------------------------------------


def test_library_backends_refuse_to_be_batch_invariant():
    head, z = MLPHead.from_state_dict(random_parameters(MLPSpec(16, 32, 1, 32), 0)), torch.randn(2, 32)
    for backend in ("hoisted", "reference"):
        with pytest.raises(UnsupportedError, match="picked by size, are not batch-invariant"):
            head.denoise(z, solvers.ddpm(2), backend=backend, batch_invariant=True)


@pytest.mark.parametrize(
    ("spec", "dtype", "device", "reason"),
    [
        (MLPSpec(16, 64, 1, 32), torch.float64, "cuda", "computes in float32, bfloat16 or float16, not in torch.float64"),
        (MLPSpec(16, 72, 1, 32), torch.float32, "cuda", "multiples of 16, not 72 and 32"),
        (MLPSpec(16, 64, 1, 32), torch.float32, "mps", "runs on GPUs, not on mps"),
        (MLPSpec(16, 64, 1, 32), torch.bfloat16, "cuda", None),
    ],
)
def test_refuses(spec, dtype, device, reason):
    answer = triton.refuses(spec, dtype, torch.device(device), 8)
    assert answer is None if reason is None else reason in answer


def test_an_installation_without_triton(monkeypatch):
    monkeypatch.setattr(triton, "triton", None)
    monkeypatch.setattr(triton, "_IMPORT_ERROR", "No module named 'triton'", raising=False)
    with pytest.raises(UnsupportedError, match=r"Triton cannot be imported \(No module named 'triton'\); pip install triton"):
        backends.choose("triton", MLPSpec(16, 64, 1, 32), torch.bfloat16, torch.device("cuda"), 8)


def test_auto_takes_it_on_a_gpu_and_not_in_the_interpreter():
    spec = MLPSpec(16, 64, 1, 32)
    assert backends.choose("auto", spec, torch.bfloat16, torch.device("cuda"), 8) == "triton"
    assert backends.choose("auto", spec, torch.bfloat16, torch.device("cpu"), 8) != "triton"


def test_tuned_tiles_come_before_the_heuristic(monkeypatch, tmp_path):
    table = {"NVIDIA X": {"bfloat16": {"1280": {"16": APART.as_dict()}}}}
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    monkeypatch.setattr(tiles, "TUNED", tmp_path / "tuned.json")
    for cache in (tiles.tuned, tiles.choose):
        cache.cache_clear()
    try:
        assert tiles.choose("NVIDIA X", "bfloat16", 1280, 7) == APART
        for other in (("NVIDIA Y", "bfloat16", 1280, 7), ("NVIDIA X", "float16", 1280, 7), ("NVIDIA X", "bfloat16", 1280, 17)):
            assert tiles.choose(*other) == tiles.HEURISTIC[other[1]][tiles.row_class(other[3])]
    finally:
        monkeypatch.undo()
        for cache in (tiles.tuned, tiles.choose):
            cache.cache_clear()
