"""The Triton kernels between the products of a transformer block, one by one and in a block, in Triton's interpreter: against plain
PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_good_as, assert_close
from torch import Tensor

from disa_fast.backends.triton_ops import TritonOps
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
def test_qkv_and_q(dtype, rotation_dtype, rows, tokens, heads, head_dim, bias):
    """No angle need belong to cos and sin: their four numbers for a pair are told apart."""
    ops, dim = Guarded(dtype), heads * head_dim
    m = ops.hold(torch.randn(rows, tokens, dim).to(dtype))
    rotation = tuple(ops.hold(torch.randn(tokens, head_dim).to(rotation_dtype or dtype)) for _ in range(2))
    exact = rotation[0].double(), rotation[1].double()
    for parts in (3, 1):
        layer = random_layer(parts * dim, dim, dtype, bias)
        out = ops.qkv(m, layer, head_dim, rotation) if parts == 3 else (ops.q(m, layer, head_dim, rotation),)
        projected, identity = F.linear(m, *layer).double(), (torch.eye(parts * dim).double(), None)
        if parts == 3:
            expected = PLAIN.qkv(projected, identity, head_dim, exact)
        else:
            expected = (PLAIN.q(projected, identity, head_dim, exact),)
        for actual, truth in zip(out, expected, strict=True):
            assert actual.is_contiguous()
            assert_rounded(actual, truth, dtype)
    ops.check()


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_mlp(dtype, shape):
    """The last product is by the identity, which leaves what the kernel wrote."""
    ops, hidden = Guarded(dtype), gated_width(shape[-1])
    m = ops.hold(2 * torch.randn(shape).to(dtype))
    gate, up = random_layer(hidden, shape[-1], dtype), random_layer(hidden, shape[-1], dtype)
    out = ops.gated_mlp(m, gate, up, (torch.eye(hidden, dtype=dtype), None))
    assert_rounded(out, F.gelu(F.linear(m, *gate).double()) * F.linear(m, *up).double(), dtype)
    ops.check()


@SHAPES
@pytest.mark.parametrize("over", [*OVER, "no gate"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_residual(dtype, over, shape):
    ops = Guarded(dtype)
    h, x = ops.hold(residual_stream(shape)), ops.hold(torch.randn(shape).to(dtype))
    gate = None if over == "no gate" else modulation(ops, shape, over, 6, dtype)[4]
    truth = PLAIN.gated_residual(h.double(), gate if gate is None else gate.double(), x.double())
    out = ops.gated_residual(h, gate, x)
    assert out is h
    assert_rounded(out, truth, torch.float32)
    ops.check(changed=h)


def test_float16_beyond_its_range_is_held_at_its_largest():
    ops, largest = Guarded(torch.float16), torch.full((1, 1, 1, 8), 65504.0).half()
    m, layer = torch.full((1, 1, 8), 300.0).half(), (torch.full((8, 8), 300.0).half(), None)
    assert F.linear(m, *layer).isinf().all()
    assert torch.equal(ops.q(m, layer, 8, (torch.ones(1, 8), torch.zeros(1, 8))), largest)
    assert torch.equal(ops.q(m, layer, 8, (torch.ones(1, 8), -torch.ones(1, 8)))[..., ::2], largest[..., ::2])
    assert torch.equal(ops.gated_mlp(m, layer, layer, (torch.eye(8).half(), None)), largest[0])
    assert not ops.gated_mlp(m, (-layer[0], None), layer, (torch.eye(8).half(), None)).any()
    assert torch.equal(ops.gated_residual(torch.zeros(1, 1, 8), None, F.linear(m, *layer)), largest[0].float())
    assert torch.equal(ops.norm(torch.ones(1, 1, 8), torch.full((8,), 1e6)), largest[0])
    ops.check()


# The block -------------------------------------------------------------------------------------------------------------


def random_block(dim: int, head_dim: int, condition_dim: int | None, dtype: torch.dtype) -> BlockWeights:
    hidden = gated_width(dim)
    cross = None
    if condition_dim:
        q, kv = random_layer(dim, dim, dtype, bias=False), random_layer(2 * dim, condition_dim, dtype, bias=False)
        norms = torch.randn(dim).to(dtype), torch.randn(condition_dim).to(dtype)
        cross = CrossWeights(q, kv, random_layer(dim, dim, dtype), *norms)
    layers = ((3 * dim, dim), (dim, dim), (hidden, dim), (hidden, dim), (dim, hidden))
    return BlockWeights(*(random_layer(*sizes, dtype) for sizes in layers), cross, head_dim)


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
        stream = ops.residual(in_dtype(h, dtype))
        return block(ops, w, stream, in_dtype(of_block, dtype), turns, cache, start or 0, cross=cross)

    ours = run(TritonOps(dtype), dtype)
    assert ours.dtype == torch.float32
    assert_as_good_as(ours, run(PLAIN, dtype), run(PLAIN, torch.float64), dtype)


def test_refuses_what_the_kernels_cannot_address():
    ops, h = TritonOps(torch.bfloat16), torch.randn(2, 3, 48)
    rotation = torch.ones(3, 12), torch.ones(3, 12)
    with pytest.raises(ValueError, match="h: expected the residual stream in float32"):
        ops.gated_residual(h.bfloat16(), None, h)
    with pytest.raises(ValueError, match=r"h: expected \[2, 48, 3\], contiguous"):
        ops.gated_residual(h.transpose(1, 2), None, h)
    with pytest.raises(ValueError, match=r"x: expected \[2, 3, 48\], contiguous; got \[2, 1, 48\]"):
        ops.gated_residual(h, None, h[:, :1])
    with pytest.raises(ValueError, match="scale: expected columns next to each other"):
        ops.norm_modulate(h, torch.ones(2, 1, 96)[..., ::2], torch.ones(48))
    with pytest.raises(ValueError, match="gate: expected columns next to each other"):
        ops.gated_residual(h, torch.ones(2, 3, 1), h)
    with pytest.raises(ValueError, match=r"rotation: cos: expected \[3, 12\], contiguous; got \[4, 12\]"):
        ops.q(h.bfloat16(), (torch.eye(48).bfloat16(), None), 12, (torch.ones(4, 12), rotation[1]))
