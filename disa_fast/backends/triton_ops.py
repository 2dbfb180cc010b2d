"""The parts of a transformer block (disa_fast/transformer.py) on a GPU: torch's products and attention, and between them one Triton
kernel for each chain of elementwise operations.

The residual stream is float32 whatever the network's dtype, and so is all arithmetic of these kernels. Nothing here waits for the
device, so everything can be captured in a CUDA graph; launches go to the current device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..transformer import RMS_EPS, Layer, Plain, Rotation

try:
    import triton

    from ..kernels.triton.gated_add import gated_add_kernel
    from ..kernels.triton.gelu_gate import gelu_gate_kernel
    from ..kernels.triton.rms_modulate import rms_modulate_kernel
    from ..kernels.triton.rotate_heads import rotate_heads_kernel
except ImportError:
    triton = None  # and backends/triton.py, which alone makes a TritonOps, refuses every call

GELU_BLOCK = 1024


class TritonOps(Plain):
    """For tensors on a GPU, or on a CPU in Triton's interpreter. dtype: of the network, float32, bfloat16 or float16; what its
    products read is in it.

    h, the residual stream: [rows, tokens, dim], float32, contiguous. Modulation (scale, shift, gate) may be views with any strides
    that broadcast to h's shape, in any dtype, as long as their columns lie next to each other; nothing is copied.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype=dtype)

    def residual(self, x: Tensor) -> Tensor:
        return x.float()

    def norm_modulate(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """rms(h) * (1 + scale) + shift"""
        return self._normed(h, scale, shift)

    def norm(self, h: Tensor, weight: Tensor) -> Tensor:
        """rms(h) * weight; h may be in any dtype."""
        return self._normed(h, weight, None)

    def qkv(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        return self._heads(self.linear(m, layer), 3, 2, head_dim, rotation)

    def q(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> Tensor:
        return self._heads(self.linear(m, layer), 1, 1, head_dim, rotation)[0]

    def gated_mlp(self, m: Tensor, gate: Layer, up: Layer, down: Layer) -> Tensor:
        g, u = self.linear(m, gate), self.linear(m, up)
        gelu_gate_kernel[(triton.cdiv(g.numel(), GELU_BLOCK),)](
            g, u, g, g.numel(), BLOCK=GELU_BLOCK, num_warps=_warps(GELU_BLOCK, 8)
        )
        return self.linear(g, down)

    def gated_residual(self, h: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
        """h + gate * x, or h + x without a gate: in place, so h itself is what is returned."""
        if h.dtype != torch.float32:
            raise ValueError(f"h: expected the residual stream in float32, got {h.dtype}")
        _check("h", h, h.shape)
        _check("x", x, h.shape)
        gate_strides = (0, 0) if gate is None else _strides("gate", gate, h)
        gated_add_kernel[(h.shape[0] * h.shape[1],)](
            h, h if gate is None else gate, x, h.shape[1], *gate_strides,
            GATED=gate is not None, **_columns(h, 4),
        )  # fmt: skip
        return h

    def _normed(self, h: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """rms(h) * (1 + scale) + shift, or rms(h) * scale without a shift."""
        h, out = h.contiguous(), self._empty(h.shape, h.device)
        shift_strides = (0, 0) if shift is None else _strides("shift", shift, h)
        rms_modulate_kernel[(h.shape[0] * h.shape[1],)](
            h, scale, scale if shift is None else shift, out, h.shape[1], *_strides("scale", scale, h), *shift_strides, RMS_EPS,
            MODULATED=shift is not None, **_columns(h, 8),
        )  # fmt: skip
        return out

    def _heads(self, x: Tensor, parts: int, turned: int, head_dim: int, rotation: Rotation) -> tuple[Tensor, ...]:
        """`parts` tensors [rows, heads, tokens, head_dim], of which the first `turned` are turned, from x,
        [rows, tokens, parts * heads * head_dim]."""
        rows, tokens, _, heads, _ = x.unflatten(-1, (parts, -1, head_dim)).shape
        for name, table in zip(("cos", "sin"), rotation, strict=True):
            _check(f"rotation: {name}", table, (tokens, head_dim))
        out = self._empty((parts, rows, heads, tokens, head_dim), x.device)
        block = triton.next_power_of_2(heads * head_dim)
        rotate_heads_kernel[(rows * tokens, parts)](
            x, *rotation, out, rows, tokens,
            HEADS=heads, HEAD_DIM=head_dim, PARTS=parts, TURNED=turned, BLOCK=block, num_warps=_warps(block, 8),
        )  # fmt: skip
        return out.unbind()

    def _empty(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=device)


def _check(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name}: expected {list(shape)}, contiguous; got {list(x.shape)} with strides {list(x.stride())}")


def _strides(name: str, x: Tensor, h: Tensor) -> tuple[int, int]:
    """Of rows and tokens, in elements, once broadcast to h's shape."""
    row, token, column = x.expand(h.shape).stride()
    if column != 1:
        raise ValueError(f"{name}: expected columns next to each other, got {list(x.shape)} with strides {list(x.stride())}")
    return row, token


def _columns(h: Tensor, each: int) -> dict[str, int]:
    """For a program that owns a whole row of h, and a thread of it `each` of its numbers."""
    block = triton.next_power_of_2(h.shape[-1])
    return {"DIM": h.shape[-1], "BLOCK": block, "num_warps": _warps(block, each)}


def _warps(block: int, each: int) -> int:
    """So that a thread writes 16 bytes: `each` is 8 where the dtype written may have 16 bits, and 4 where it has 32."""
    return min(max(block // (32 * each), 1), 16)
