"""The residual stream's next sum and the RMS norm that reads it, with what scales it: adaLN's modulation or a learned weight."""

import triton
import triton.language as tl

from .common import rounded


@triton.jit(do_not_specialize=["tokens"])
def residual_norm_kernel(
    h_ptr, gate_ptr, x_ptr, scale_ptr, shift_ptr, out_ptr,
    tokens, gate_row, gate_token, scale_row, scale_token, shift_row, shift_token, eps,
    DIM: tl.constexpr, SUMMED: tl.constexpr, GATED: tl.constexpr, MODULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h[r, t] += gate[r, t] * x[r, t]        if SUMMED; h += x, unless GATED
    out[r, t] = rms(h[r, t]) * (1 + scale[r, t]) + shift[r, t]     rms(h) = h / sqrt(mean(h * h) + eps)
    out[r, t] = rms(h[r, t]) * scale[r, t]                         unless MODULATED

    h, x and out [rows, tokens, DIM], h float32 where it is SUMMED; of x, a float16 that overflowed counts as the largest. gate,
    scale and shift likewise, with the strides given (0 where they are broadcast) and their columns next to each other. Each of
    any dtype, and all arithmetic in float32. One program owns one r and t.
    """
    at = tl.program_id(0)
    r, t = (at // tokens).to(tl.int64), (at % tokens).to(tl.int64)
    k = tl.arange(0, BLOCK)
    live = k < DIM
    own = at.to(tl.int64) * DIM + k
    h = tl.load(h_ptr + own, mask=live, other=0.0).to(tl.float32)
    if SUMMED:
        x = rounded(tl.load(x_ptr + own, mask=live, other=0.0), x_ptr.dtype.element_ty).to(tl.float32)
        if GATED:
            x *= tl.load(gate_ptr + r * gate_row + t * gate_token + k, mask=live, other=0.0).to(tl.float32)
        h += x
        tl.store(h_ptr + own, h, mask=live)
    scale = tl.load(scale_ptr + r * scale_row + t * scale_token + k, mask=live, other=0.0).to(tl.float32)
    out = h * tl.rsqrt(tl.sum(h * h, axis=0) / DIM + eps)
    if MODULATED:
        shift = tl.load(shift_ptr + r * shift_row + t * shift_token + k, mask=live, other=0.0).to(tl.float32)
        out = out * (1.0 + scale) + shift
    else:
        out = out * scale
    tl.store(out_ptr + own, rounded(out, out_ptr.dtype.element_ty), mask=live)
