"""The gate of a gated MLP, between its first products and its last."""

import triton
import triton.language as tl

from .common import rounded


@triton.jit
def gelu_gate_kernel(gate_ptr, up_ptr, out_ptr, columns, row, BLOCK: tl.constexpr):
    """out[r] = gelu(gate[r]) * up[r]     gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

    gate and up: rows of `columns` numbers, `row` apart; out: the same, one row behind the other. All of one dtype, where a float16
    that overflowed counts as the largest. One program owns BLOCK columns of one r.
    """
    blocks = tl.cdiv(columns, BLOCK)
    at = tl.program_id(0)
    r, k = (at // blocks).to(tl.int64), (at % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = k < columns
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate = rounded(tl.load(gate_ptr + r * row + k, mask=live, other=0.0), dtype).to(tl.float32)
    up = rounded(tl.load(up_ptr + r * row + k, mask=live, other=0.0), dtype).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out_ptr + r * columns + k, rounded(gelu * up, dtype), mask=live)
