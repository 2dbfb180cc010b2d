"""A step along a flow: guidance, the solver's update, its noise, and what the network sees next."""

import triton
import triton.language as tl

from .common import rounded


@triton.jit
def flow_step_kernel(
    v_ptr, x_ptr, before_ptr, noise_ptr, step_ptr, scalars_ptr, seen_ptr, size,
    GUIDED: tl.constexpr, NOISY: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """v = v_u + cfg * (v_c - v_u)                if GUIDED; v_u is the second half of v
    x = a * x + b * v + c * before                (+ deviation * temperature * noise, if NOISY)
    before = v;  seen = x, in the network's dtype, once for each half if BOTH

    v: `size` numbers, or twice as many, and seen: likewise, in one dtype, where a float16 beyond its range counts as the largest;
    x, before and noise: `size` in float64, as all arithmetic is, in the order of heads/flow.py's `integrate`. step: a, b, c,
    deviation; scalars: cfg, temperature; float64. x and before are overwritten. One program owns BLOCK of each.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < size
    dtype: tl.constexpr = seen_ptr.dtype.element_ty
    v = rounded(tl.load(v_ptr + i, mask=live, other=0.0), dtype).to(tl.float64)
    if GUIDED:
        v_u = rounded(tl.load(v_ptr + size + i, mask=live, other=0.0), dtype).to(tl.float64)
        v = v_u + tl.load(scalars_ptr) * (v - v_u)
    x = tl.load(step_ptr) * tl.load(x_ptr + i, mask=live, other=0.0) + tl.load(step_ptr + 1) * v
    x += tl.load(step_ptr + 2) * tl.load(before_ptr + i, mask=live, other=0.0)
    if NOISY:
        x += tl.load(step_ptr + 3) * tl.load(scalars_ptr + 1) * tl.load(noise_ptr + i, mask=live, other=0.0)
    tl.store(x_ptr + i, x, mask=live)
    tl.store(before_ptr + i, v, mask=live)
    seen = rounded(x.to(tl.float32), dtype)
    tl.store(seen_ptr + i, seen, mask=live)
    if BOTH:
        tl.store(seen_ptr + size + i, seen, mask=live)
