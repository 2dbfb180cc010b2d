"""The Triton kernels between the products of a transformer block, one by one and in a block, in Triton's interpreter: against plain
PyTorch in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_good_as, assert_close
from mutants import mutant
from torch import Tensor

from disa_fast.backends import triton_ops
from disa_fast.backends.triton_ops import HIDDEN_MULTIPLE, TritonOps
from disa_fast.transformer import (
    PLAIN,
    BlockWeights,
    Cache,
    CrossWeights,
    Modulation,
    Plain,
    block,
    cross_keys_values,
    gated_width,
    grid_rotation,
)

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 7.0  # what lies before and behind every tensor, and must still lie there afterwards
MARGIN = 1024  # how much of it: as much as any program owns


class Guarded(TritonOps):
    """With guards around its inputs and around all that it allocates."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.arenas: list[Tensor] = []
        self.held: list[tuple[Tensor, Tensor]] = []

    def hold(self, x: Tensor) -> Tensor:
        """x as an input, which is not to change."""
        held = self._guarded(x.shape, x.dtype).copy_(x)
        self.held.append((held, x.clone()))
        return held

    def check(self, changed: Tensor | None = None) -> None:
        for arena in self.arenas:
            assert (arena[:MARGIN] == GUARD).all(), "written before a tensor"
            assert (arena[-MARGIN:] == GUARD).all(), "written behind a tensor"
        for now, then in self.held:
            assert torch.equal(now, then) == (now is not changed)

    def linear(self, x, layer):
        out = super().linear(x, layer)
        return self._guarded(out.shape, out.dtype).copy_(out)

    def _empty(self, shape, device):
        return self._guarded(shape, self.dtype)

    def _guarded(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.arenas.append(torch.full((torch.Size(shape).numel() + 2 * MARGIN,), GUARD, dtype=dtype))
        return self.arenas[-1][MARGIN:-MARGIN].view(shape)


def assert_rounded(out: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Nothing but the rounding to dtype, and what float32 loses before it."""
    assert out.dtype == dtype
    assert_close(out, truth, worst=(0.51 * torch.finfo(dtype).eps + 1e-6) * float(truth.abs().max()))


def residual_stream(shape: tuple[int, ...]) -> Tensor:
    return 3 * torch.randn(shape) + 1


def modulation(ops: Guarded, shape: tuple[int, int, int], over: str, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`count` views of one projection, each to be broadcast to `shape`."""
    rows, tokens, dim = shape
    leading = {"each token": (rows, tokens), "each row": (rows, 1), "all": (1, 1), "a vector": ()}[over]
    return ops.hold(torch.randn(*leading, count * dim).to(dtype)).chunk(count, dim=-1)


def random_layer(columns: int, k: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    return (torch.randn(columns, k) * k**-0.5).to(dtype), torch.randn(columns).to(dtype) if bias else None


SHAPES = pytest.mark.parametrize("shape", [(1, 1, 16), (2, 3, 48), (3, 5, 80), (5, 1, 112)], ids=str)
OVER = ["each token", "each row", "all", "a vector"]


@SHAPES
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_modulate(dtype, over, shape):
    ops = Guarded(dtype)
    h = ops.hold(residual_stream(shape))
    _, shift, scale = modulation(ops, shape, over, 3, dtype)
    out = ops.norm_modulate(h, scale, shift)
    assert out.is_contiguous()
    assert_rounded(out, PLAIN.norm_modulate(h.double(), scale.double(), shift.double()), dtype)
    ops.check()


def test_scale_and_shift_may_differ_in_shape_and_dtype():
    ops, shape = Guarded(torch.bfloat16), (3, 5, 80)
    h = ops.hold(residual_stream(shape))
    scale, _ = modulation(ops, shape, "each token", 2, torch.float32)
    _, shift = modulation(ops, shape, "each row", 2, torch.bfloat16)
    out = ops.norm_modulate(h, scale, shift)
    assert_rounded(out, PLAIN.norm_modulate(h.double(), scale.double(), shift.double()), torch.bfloat16)
    ops.check()


@SHAPES
@pytest.mark.parametrize("of", ["the residual stream", "a condition"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype, of, shape):
    ops = Guarded(dtype)
    h, weight = (ops.hold(x) for x in (residual_stream(shape), torch.randn(shape[-1])))
    if of == "a condition":
        h, weight = ops.hold(h.to(dtype)), ops.hold(weight.to(dtype))
        h = h.transpose(0, 1)  # which may come in any layout
    assert_rounded(ops.norm(h, weight), PLAIN.norm(h.double(), weight.double()), dtype)
    ops.check()


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_norm_of_the_small_and_large(size):
    """Of the small, eps is the greater part."""
    ops = Guarded(torch.float16)
    h, weight = ops.hold(size * residual_stream((2, 3, 48))), torch.randn(48)
    assert_rounded(ops.norm(h, weight), PLAIN.norm(h.double(), weight.double()), torch.float16)


@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "head_dim", "bias"),
    [(1, 1, 1, 8, False), (2, 3, 3, 12, True), (3, 5, 1, 12, True), (2, 4, 10, 8, False)],
)
@pytest.mark.parametrize("rotation_dtype", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv_q_and_kv(dtype, rotation_dtype, rows, tokens, heads, head_dim, bias):
    """No angle need belong to cos and sin: their four numbers for a pair are told apart."""
    ops, dim = Guarded(dtype), heads * head_dim
    m = ops.hold(torch.randn(rows, tokens, dim).to(dtype))
    rotation = tuple(ops.hold(torch.randn(tokens, head_dim).to(rotation_dtype or dtype)) for _ in range(2))
    exact = rotation[0].double(), rotation[1].double()
    for name, parts in (("qkv", 3), ("q", 1), ("kv", 2)):
        layer = random_layer(parts * dim, dim, dtype, bias)
        out = getattr(ops, name)(m, layer, head_dim, rotation)
        projected, identity = F.linear(m, *layer).double(), (torch.eye(parts * dim).double(), None)
        expected = getattr(PLAIN, name)(projected, identity, head_dim, exact)
        if name == "q":
            out, expected = (out,), (expected,)
        for actual, truth in zip(out, expected, strict=True):
            assert_rounded(actual, truth, dtype)
        if name != "kv":
            assert out[0].transpose(1, 2).is_contiguous()
    ops.check()


@pytest.mark.parametrize(("start", "fewer"), [(0, 0), (2, 1), (5, 0)], ids=["first", "half the rows", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_put_where_attention_reads_them(dtype, start, fewer):
    """The same bits as without a cache, the cache's own memory, and nothing else of it changed."""
    ops, rows, tokens, heads, head_dim, length = Guarded(dtype), 2, 3, 3, 12, 8
    m = ops.hold(torch.randn(rows, tokens, heads * head_dim).to(dtype))
    rotation = torch.randn(tokens, head_dim), torch.randn(tokens, head_dim)
    layer = random_layer(3 * heads * head_dim, heads * head_dim, dtype)
    cache = Cache(*(ops._guarded((rows + fewer, heads, length, head_dim), dtype).normal_() for _ in range(2)))
    before = cache.k.clone(), cache.v.clone()
    q, k, v = ops.cached_qkv(m, layer, head_dim, rotation, cache, start)
    expected = ops.qkv(m, layer, head_dim, rotation)
    assert torch.equal(q, expected[0])
    for seen, held, then, new in zip((k, v), (cache.k, cache.v), before, expected[1:], strict=True):
        then[:rows, :, start : start + tokens] = new
        assert torch.equal(held, then)
        assert seen.shape == (rows, heads, start + tokens, head_dim)
        assert seen.data_ptr() == held.data_ptr() and seen.stride() == held.stride()
    ops.check()


def random_mlp(dim: int, hidden: int, dtype: torch.dtype) -> tuple:
    return tuple(random_layer(*sizes, dtype) for sizes in ((hidden, dim), (hidden, dim), (dim, hidden)))


@SHAPES
@pytest.mark.parametrize("layout", ["laid out", "as they lie"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_mlp(dtype, layout, shape):
    """The last product is by the identity, which leaves what the kernel wrote."""
    ops, hidden = Guarded(dtype), gated_width(shape[-1])
    m = ops.hold(2 * torch.randn(shape).to(dtype))
    gate, up, _ = random_mlp(shape[-1], hidden, dtype)
    layers = gate, up, (torch.eye(hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype))
    out = ops.gated_mlp(m, ops.lay_out(*layers) if layout == "laid out" else layers)
    assert_rounded(out, F.gelu(F.linear(m, *gate).double()) * F.linear(m, *up).double(), dtype)
    ops.check()


def test_gated_mlp_of_more_columns_than_a_program_owns(monkeypatch):
    monkeypatch.setattr(triton_ops, "GELU_BLOCK", 16)
    ops, m, layers = Guarded(torch.float32), torch.randn(3, 5, 48), random_mlp(48, 200, torch.float32)
    truth = PLAIN.gated_mlp(m.double(), tuple((w.double(), b.double()) for w, b in layers))
    for given in (layers, ops.lay_out(*layers)):
        assert_close(ops.gated_mlp(m, given), truth, worst=1e-5 * float(truth.abs().max()))
    ops.check()


@pytest.mark.parametrize("hidden", [64, 85, 128, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_adds_nothing(dtype, hidden):
    """Zeros behind each of the three, so that whole rows of 128 bytes lie in memory and the same numbers come out; of a width that
    needs none, the last layer is the very parameter."""
    gate, up, down = random_mlp(48, hidden, dtype)
    (weight, bias), packed_down = TritonOps.lay_out(gate, up, down)
    padded = weight.shape[0] // 2
    assert padded % HIDDEN_MULTIPLE == 0 and hidden <= padded < hidden + HIDDEN_MULTIPLE
    for half, (w, b) in zip(range(2), (gate, up), strict=True):
        assert torch.equal(weight.unflatten(0, (2, -1))[half, :hidden], w) and torch.equal(bias.view(2, -1)[half, :hidden], b)
        assert not weight.unflatten(0, (2, -1))[half, hidden:].any() and not bias.view(2, -1)[half, hidden:].any()
    assert torch.equal(packed_down[0][:, :hidden], down[0]) and not packed_down[0][:, hidden:].any()
    assert packed_down[1] is down[1]
    assert (packed_down is down) == (hidden % HIDDEN_MULTIPLE == 0)
    layers = weight, bias, *packed_down
    assert all(t.is_contiguous() and t.stride(0) * t.element_size() % 16 == 0 for t in layers if t.ndim == 2)

    ops, m = TritonOps(torch.float32), torch.randn(2, 3, 48)
    exact = [tuple(t.float() for t in layer) for layer in (gate, up, down)]
    truth = PLAIN.gated_mlp(m.double(), tuple((w.double(), b.double()) for w, b in exact))
    assert_close(ops.gated_mlp(m, ops.lay_out(*exact)), truth, worst=2e-6 * float(truth.abs().max()))


NORMS = ["modulated", "by a weight"]


def norm_of(ops: Guarded, shape: tuple[int, int, int], over: str, kind: str, dtype: torch.dtype) -> tuple[Tensor | None, tuple]:
    """(gate, norm), of one projection where there is a modulation."""
    gate, shift, scale, _ = modulation(ops, shape, over if over != "no gate" else "all", 4, dtype)
    norm = (scale, shift) if kind == "modulated" else (ops.hold(torch.randn(shape[-1])), None)
    return (None if over == "no gate" else gate), norm


def exact_residual_norm(h: Tensor, gate: Tensor | None, x: Tensor, norm: tuple) -> tuple[Tensor, Tensor]:
    stream = h.double(), None if gate is None else gate.double(), x.double()
    return PLAIN.residual_norm(stream, tuple(None if part is None else part.double() for part in norm))


@SHAPES
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("over", [*OVER, "no gate"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_norm(dtype, over, kind, shape):
    """The sum in place, and the norm of it: not of what was there before, nor of the sum rounded to dtype."""
    ops = Guarded(dtype)
    h, x = ops.hold(residual_stream(shape)), ops.hold(torch.randn(shape).to(dtype))
    gate, norm = norm_of(ops, shape, over, kind, dtype)
    sum_, normed = exact_residual_norm(h, gate, x, norm)
    out, m = ops.residual_norm((h, gate, x), norm)
    assert out is h and m.is_contiguous()
    assert_rounded(h, sum_, torch.float32)
    assert_rounded(m, normed, dtype)
    ops.check(changed=h)


@pytest.mark.parametrize(
    ("kernel", "change", "test"),
    [
        ("residual_norm", {"SUMMED": False}, "residual_norm"),
        ("residual_norm", {"GATED": False}, "residual_norm"),
        ("residual_norm", {"MODULATED": False}, "residual_norm"),
        ("residual_norm", {"moved": {3: 4, 4: 3}}, "residual_norm"),  # scale and shift
        ("residual_norm", {"moved": {8: 7, 7: 8}}, "residual_norm"),  # the strides of the gate
        ("rotate_heads", {"FIRST": 1, "moved": {3: 4, 4: 5}}, "cache"),  # values turned too
        ("rotate_heads", {"moved": {4: 5, 5: 4}}, "cache"),  # keys and values
        ("rotate_heads", {"moved": {7: 8, 8: 7}}, "cache"),  # strides of rows and heads
        ("gelu_gate", {"moved": {0: 1, 1: 0}}, "gated_mlp"),  # gate and up
        ("gelu_gate", {"moved": {4: 3}}, "gated_mlp"),  # rows that lie apart
    ],
)
def test_a_kernel_with_a_term_left_out_is_caught(kernel, change, test, monkeypatch):
    name = f"{kernel}_kernel"
    monkeypatch.setattr(triton_ops, name, mutant(getattr(triton_ops, name), **change))
    tests = {
        "residual_norm": lambda: test_residual_norm(torch.float32, "each token", "modulated", (3, 5, 80)),
        "cache": lambda: test_qkv_and_cache(),
        "gated_mlp": lambda: test_gated_mlp(torch.float32, "laid out", (3, 5, 80)),
    }
    with pytest.raises(AssertionError):
        tests[test]()


def test_qkv_and_cache():
    test_qkv_q_and_kv(torch.float32, torch.float32, 2, 3, 3, 12, True)
    test_keys_and_values_are_put_where_attention_reads_them(torch.float32, 2, 1)


def test_float16_beyond_its_range_is_held_at_its_largest():
    ops, largest = Guarded(torch.float16), torch.full((1, 1, 1, 8), 65504.0).half()
    m, layer = torch.full((1, 1, 8), 300.0).half(), (torch.full((8, 8), 300.0).half(), None)
    assert F.linear(m, *layer).isinf().all()
    assert torch.equal(ops.q(m, layer, 8, (torch.ones(1, 8), torch.zeros(1, 8))), largest)
    assert torch.equal(ops.q(m, layer, 8, (torch.ones(1, 8), -torch.ones(1, 8)))[..., ::2], largest[..., ::2])
    biased, identity = (layer[0], torch.zeros(8).half()), (torch.eye(8).half(), None)
    for layers in ((layer, layer, identity), ops.lay_out(biased, biased, identity)):
        assert torch.equal(ops.gated_mlp(m, layers), largest[0])
    assert not ops.gated_mlp(m, ((-layer[0], None), layer, identity)).any()
    h, normed = ops.residual_norm((torch.zeros(1, 1, 8), None, F.linear(m, *layer)), (torch.full((8,), 1e6), None))
    assert torch.equal(h, largest[0].float()) and torch.equal(normed, largest[0])
    assert torch.equal(ops.norm(torch.ones(1, 1, 8), torch.full((8,), -1e6)), -largest[0])
    ops.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_none(dtype):
    """Also where what overflows is held."""
    ops, m = TritonOps(dtype), torch.ones(1, 1, 8, dtype=dtype)
    layer, identity = (torch.full((8, 8), torch.nan, dtype=dtype), torch.zeros(8, dtype=dtype)), (torch.eye(8, dtype=dtype), None)
    rotation = torch.ones(1, 8), torch.zeros(1, 8)
    h, normed = ops.residual_norm((torch.zeros(1, 1, 8), None, F.linear(m, *layer)), (torch.ones(8), None))
    outs = ops.q(m, layer, 8, rotation), ops.gated_mlp(m, ops.lay_out(layer, layer, identity)), h, normed
    assert all(out.isnan().all() for out in outs)


# The block -------------------------------------------------------------------------------------------------------------


def random_block(dim: int, head_dim: int, condition_dim: int | None, dtype: torch.dtype) -> BlockWeights:
    hidden = gated_width(dim)
    cross = None
    if condition_dim:
        q, kv = random_layer(dim, dim, dtype, bias=False), random_layer(2 * dim, condition_dim, dtype, bias=False)
        norms = torch.randn(dim).to(dtype), torch.randn(condition_dim).to(dtype)
        cross = CrossWeights(q, kv, random_layer(dim, dim, dtype), *norms)
    return BlockWeights(
        random_layer(3 * dim, dim, dtype), random_layer(dim, dim, dtype), random_mlp(dim, hidden, dtype), cross, head_dim
    )


def in_dtype(x, dtype: torch.dtype):
    """x with every tensor in it in dtype, none the same as before."""
    if isinstance(x, Tensor):
        return x.to(dtype, copy=True)
    if isinstance(x, tuple):
        return tuple(in_dtype(item, dtype) for item in x)
    if isinstance(x, BlockWeights | CrossWeights | Modulation):
        return type(x)(**{name: in_dtype(value, dtype) for name, value in vars(x).items()})
    return x


@pytest.mark.parametrize("over", ["each token", "each row"])
@pytest.mark.parametrize("start", [None, 0, 3], ids=["no cache", "an empty cache", "a cache"])
@pytest.mark.parametrize("condition_dim", [None, 80], ids=["self", "cross"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_is_as_good_as_eager(dtype, condition_dim, start, over):
    rows, tokens, dim, head_dim = 2, 4, 48, 12
    weights = random_block(dim, head_dim, condition_dim, dtype)
    rotation = in_dtype(grid_rotation(torch.rand(head_dim // 4), 2), dtype)
    h = residual_stream((rows, tokens, dim)).to(dtype)
    of_block = Modulation(*modulation(Guarded(dtype), h.shape, over, 6, dtype))
    condition = torch.randn(rows, tokens, condition_dim or 1).to(dtype)
    past = torch.randn(2, rows, dim // head_dim, 8, head_dim).to(dtype)

    def run(ops: Plain, dtype: torch.dtype) -> Tensor:
        w, turns, cache, cross = in_dtype(weights, dtype), in_dtype(rotation, dtype), None, None
        if start is not None:
            cache = Cache(*in_dtype(past, dtype))
        if condition_dim is not None:
            cross = cross_keys_values(ops, w, in_dtype(condition, dtype), turns)
        w = dataclasses.replace(w, mlp=ops.lay_out(*w.mlp))
        stream = ops.residual(in_dtype(h, dtype)), None, None
        stream = block(ops, w, stream, in_dtype(of_block, dtype), turns, cache, start or 0, cross=cross)
        return torch.stack(ops.residual_norm(stream, (torch.ones(dim, dtype=dtype), None)))

    ours = run(TritonOps(dtype), dtype)
    assert ours.dtype == torch.float32
    assert_as_good_as(ours, run(PLAIN, dtype), run(PLAIN, torch.float64), dtype)


def test_refuses_what_the_kernels_cannot_address():
    ops, h = TritonOps(torch.bfloat16), torch.randn(2, 3, 48)
    rotation, norm = (torch.ones(3, 12), torch.ones(3, 12)), (torch.ones(48), None)
    with pytest.raises(ValueError, match="h: expected the residual stream in float32"):
        ops.residual_norm((h.bfloat16(), None, h), norm)
    with pytest.raises(ValueError, match=r"h: expected \[2, 48, 3\], contiguous"):
        ops.residual_norm((h.transpose(1, 2), None, h), norm)
    with pytest.raises(ValueError, match=r"x: expected \[2, 3, 48\], contiguous; got \[2, 1, 48\]"):
        ops.residual_norm((h, None, h[:, :1]), norm)
    with pytest.raises(ValueError, match="scale: expected columns next to each other"):
        ops.norm_modulate(h, torch.ones(2, 1, 96)[..., ::2], torch.ones(48))
    with pytest.raises(ValueError, match="gate: expected columns next to each other"):
        ops.residual_norm((h, torch.ones(2, 3, 1), h), norm)
    with pytest.raises(ValueError, match=r"rotation: cos: expected \[3, 12\], contiguous; got \[4, 12\]"):
        ops.q(h.bfloat16(), (torch.eye(48).bfloat16(), None), 12, (torch.ones(4, 12), rotation[1]))
    room, qkv = torch.ones(2, 4, 5, 12).bfloat16(), (torch.ones(144, 48).bfloat16(), None)
    with pytest.raises(ValueError, match=r"keys: expected room for \[2, 4, 3, 12\] in torch.bfloat16.*got \[2, 4, 2, 12\]"):
        ops.cached_qkv(h.bfloat16(), qkv, 12, rotation, Cache(room, room), 3)
    for odd in (room.float(), room.transpose(1, 2).contiguous().transpose(1, 2), room[:1], torch.ones(2, 4, 12, 5).bfloat16().mT):
        with pytest.raises(ValueError, match="values: expected room"):
            ops.cached_qkv(h.bfloat16(), qkv, 12, rotation, Cache(room, odd), 0)
