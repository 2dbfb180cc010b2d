"""The end of each half of a transformer block: gate and residual. gated_residual.py, of the MLP head, has the linear layer too."""

import triton
import triton.language as tl

from .common import rounded


@triton.jit(do_not_specialize=["tokens"])
def gated_add_kernel(
    h_ptr, gate_ptr, x_ptr, tokens, gate_row, gate_token, DIM: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """h[r, t] += gate[r, t] * x[r, t], in place     or h += x, unless GATED

    h [rows, tokens, DIM] float32; x [rows, tokens, DIM] in any dtype, where a float16 that overflowed counts as the largest; gate
    likewise, with the strides given (0 where it is broadcast) and its columns next to each other. One program owns one r and t.
    """
    at = tl.program_id(0)
    r, t = (at // tokens).to(tl.int64), (at % tokens).to(tl.int64)
    k = tl.arange(0, BLOCK)
    live = k < DIM
    own = at.to(tl.int64) * DIM + k
    x = rounded(tl.load(x_ptr + own, mask=live, other=0.0), x_ptr.dtype.element_ty).to(tl.float32)
    if GATED:
        x *= tl.load(gate_ptr + r * gate_row + t * gate_token + k, mask=live, other=0.0).to(tl.float32)
    tl.store(h_ptr + own, tl.load(h_ptr + own, mask=live, other=0.0) + x, mask=live)
