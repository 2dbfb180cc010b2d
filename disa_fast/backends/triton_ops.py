"""The parts of a transformer block (disa_fast/transformer.py) on a GPU: torch's products and attention, and between them one Triton
kernel for each chain of elementwise operations.

The residual stream is float32 whatever the network's dtype, and so is all arithmetic of these kernels. Nothing here waits for the
device, so everything can be captured in a CUDA graph; launches go to the current device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transformer import RMS_EPS, Cache, Layer, Norm, Plain, Rotation, Stream

try:
    import triton

    from ..kernels.triton.gelu_gate import gelu_gate_kernel
    from ..kernels.triton.residual_norm import residual_norm_kernel
    from ..kernels.triton.rotate_heads import rotate_heads_kernel
except ImportError:
    triton = None  # and backends/triton.py, which alone makes a TritonOps, refuses every call

GELU_BLOCK = 1024
# Hidden units of a packed MLP are a multiple of it: 16-bit rows of 128 bytes, the slice of the inner dimension that Hopper's matrix
# kernels of cuBLAS load at a time. Rows that are no multiple of 16 bytes (2730 or 3413 units) it gives to older kernels.
HIDDEN_MULTIPLE = 64


class TritonOps(Plain):
    """For tensors on a GPU, or on a CPU in Triton's interpreter. dtype: of the network, float32, bfloat16 or float16; what its
    products read is in it.

    h, the residual stream: [rows, tokens, dim], float32, contiguous. Modulation (scale, shift, gate) may be views with any strides
    that broadcast to h's shape, in any dtype, as long as their columns lie next to each other; nothing is copied.
    """

    layout, captured = "with MLPs packed", True

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype=dtype)

    @staticmethod
    def lay_out(gate: Layer, up: Layer, down: Layer) -> tuple[Layer, ...]:
        """(gate and up as one layer, down), with hidden units of zeros behind theirs: gelu(0) * 0 = 0 adds nothing."""
        hidden, dim = gate[0].shape
        padding = -hidden % HIDDEN_MULTIPLE
        weight, bias = gate[0].new_zeros(2, hidden + padding, dim), gate[1].new_zeros(2, hidden + padding)
        for half, layer in enumerate((gate, up)):
            weight[half, :hidden], bias[half, :hidden] = layer
        return (weight.flatten(0, 1), bias.flatten()), (F.pad(down[0], (0, padding)), down[1]) if padding else down

    def residual(self, x: Tensor) -> Tensor:
        return x.float()

    def norm_modulate(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.residual_norm((h, None, None), (scale, shift))[1]

    def norm(self, h: Tensor, weight: Tensor) -> Tensor:
        """h may be in any dtype."""
        return self.residual_norm((h.contiguous(), None, None), (weight, None))[1]

    def residual_norm(self, stream: Stream, norm: Norm) -> tuple[Tensor, Tensor]:
        """The sum in place, so that h itself is what is returned."""
        (h, gate, x), (scale, shift) = stream, norm
        _check("h", h, h.shape)
        if x is not None:
            if h.dtype != torch.float32:
                raise ValueError(f"h: expected the residual stream in float32, got {h.dtype}")
            _check("x", x, h.shape)
        out, block = self._empty(h.shape, h.device), triton.next_power_of_2(h.shape[-1])
        residual_norm_kernel[(h.shape[0] * h.shape[1],)](
            h, h if gate is None else gate, h if x is None else x, scale, scale if shift is None else shift, out,
            h.shape[1], *_strides("gate", gate, h), *_strides("scale", scale, h), *_strides("shift", shift, h), RMS_EPS,
            DIM=h.shape[-1], SUMMED=x is not None, GATED=gate is not None, MODULATED=shift is not None,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return h, out

    def qkv(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads("qkv", self.linear(m, layer), head_dim, rotation)

    def cached_qkv(
        self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation, cache: Cache, start: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values are written where attention reads them."""
        rows, end = len(m), start + m.shape[1]
        here = cache.k[:rows, :, start:end], cache.v[:rows, :, start:end]
        q, _, _ = self._heads("qkv", self.linear(m, layer), head_dim, rotation, here)
        return q, cache.k[:rows, :, :end], cache.v[:rows, :, :end]

    def q(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> Tensor:
        return self._heads("q", self.linear(m, layer), head_dim, rotation)[0]

    def kv(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return self._heads("kv", self.linear(m, layer), head_dim, rotation)[1:]

    def gated_mlp(self, m: Tensor, layers: tuple[Layer, ...]) -> Tensor:
        """Of layers as lay_out leaves them, or as they lie: a backbone that passes once an AR step is not worth a copy of them."""
        *first, down = layers
        products = [self.linear(m, layer) for layer in first]
        gate, up = products if len(products) == 2 else products[0].chunk(2, dim=-1)
        hidden = self._empty(gate.shape, gate.device)
        columns = gate.shape[-1]
        rows = gate.numel() // columns
        if gate.is_contiguous():  # then all rows are one long one
            rows, columns = 1, gate.numel()
        gelu_gate_kernel[(rows * triton.cdiv(columns, GELU_BLOCK),)](
            gate, up, hidden, columns, gate.stride(-2), BLOCK=GELU_BLOCK, num_warps=_warps(GELU_BLOCK)
        )
        return self.linear(hidden, down)

    def _heads(
        self, parts: str, x: Tensor, head_dim: int, rotation: Rotation, here: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v), each [rows, heads, tokens, head_dim], q and k turned, of which those in `parts` ("qkv", "q" or "kv") come from
        x, [rows, tokens, parts * heads * head_dim], and the others are x. here: where to leave k and v, if not in new memory."""
        rows, tokens, _, heads, _ = x.unflatten(-1, (len(parts), -1, head_dim)).shape
        for name, table in zip(("cos", "sin"), rotation, strict=True):
            _check(f"rotation: {name}", table, (tokens, head_dim))
        shape = rows, heads, tokens, head_dim
        # Attention lays its output out as q, and the next product reads heads next to each other: no copy in between.
        q = self._empty((rows, tokens, heads, head_dim), x.device).transpose(1, 2) if "q" in parts else x
        k, v = here or (self._empty((2, *shape), x.device).unbind() if "k" in parts else (x, x))
        if here:
            for name, part in zip(("keys", "values"), here, strict=True):
                if part.shape != shape or part.dtype != x.dtype or part.stride() != k.stride() or part.stride(-1) != 1:
                    raise ValueError(
                        f"{name}: expected room for {list(shape)} in {x.dtype}, channels next to each other and strides as the "
                        f"keys'; got {list(part.shape)} in {part.dtype} with strides {list(part.stride())}"
                    )
        block = triton.next_power_of_2(heads * head_dim)
        rotate_heads_kernel[(rows * tokens, len(parts))](
            x, *rotation, q, k, v, tokens, *k.stride()[:3],
            HEADS=heads, HEAD_DIM=head_dim, FIRST="qkv".index(parts), PARTS=len(parts), BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return q, k, v

    def _empty(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=device)


def _check(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name}: expected {list(shape)}, contiguous; got {list(x.shape)} with strides {list(x.stride())}")


def _strides(name: str, x: Tensor | None, h: Tensor) -> tuple[int, int]:
    """Of rows and tokens, in elements, once broadcast to h's shape."""
    if x is None:
        return 0, 0
    row, token, column = x.expand(h.shape).stride()
    if column != 1:
        raise ValueError(f"{name}: expected columns next to each other, got {list(x.shape)} with strides {list(x.stride())}")
    return row, token


def _warps(block: int) -> int:
    """So that a thread writes 16 bytes, of a dtype that may have 16 bits."""
    return min(max(block // (32 * 8), 1), 16)
