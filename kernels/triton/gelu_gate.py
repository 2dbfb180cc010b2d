"""The gate of a gated MLP, between its first two products and its last."""

import triton
import triton.language as tl

from .common import rounded


@triton.jit
def gelu_gate_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = gelu(gate) * up     gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

    `size` numbers each, of one dtype, where a float16 that overflowed counts as the largest; out may be gate or up. One program
    owns BLOCK of them.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < size
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate = rounded(tl.load(gate_ptr + i, mask=live, other=0.0), dtype).to(tl.float32)
    up = rounded(tl.load(up_ptr + i, mask=live, other=0.0), dtype).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out_ptr + i, rounded(gelu * up, dtype), mask=live)
