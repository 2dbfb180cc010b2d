"""Heads apart for attention, and rotary positions: what lies between a projection and the attention that reads it."""

import triton
import triton.language as tl

from .common import rounded


@triton.jit(do_not_specialize=["tokens"])
def rotate_heads_kernel(
    x_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, tokens, kv_row, kv_head, kv_token,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(q, k, v)[p][r, head, t] = x[r, t, p - FIRST, head], for FIRST <= p < FIRST + PARTS; of q and k each pair (x0, x1) of
    channels turned:

        (x0 * cos0[t] - x1 * sin0[t], x1 * cos1[t] + x0 * sin1[t])

    x [rows, tokens, PARTS, HEADS, HEAD_DIM] as the projection left it, where a float16 that overflowed counts as the largest;
    cos, sin [tokens, HEAD_DIM] in any dtype; q in memory [rows, tokens, HEADS, HEAD_DIM], as the next projection reads what
    attention lays out like it; k and v with the strides given and their channels next to each other, so that they may be part of
    a cache. One program owns one p, r and t.
    """
    at, p = tl.program_id(0), FIRST + tl.program_id(1)
    r, t = (at // tokens).to(tl.int64), (at % tokens).to(tl.int64)
    n = tl.arange(0, BLOCK)
    head, channel = n // HEAD_DIM, n % HEAD_DIM
    live = n < HEADS * HEAD_DIM
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + (at.to(tl.int64) * PARTS + p - FIRST) * (HEADS * HEAD_DIM) + n, mask=live, other=0.0)
    x = rounded(x, dtype).to(tl.float32)
    if p < 2:
        cos = tl.load(cos_ptr + t * HEAD_DIM + channel, mask=live, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + t * HEAD_DIM + channel, mask=live, other=0.0).to(tl.float32)
        x0, x1 = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        x = x * cos + tl.interleave(-x1, x0) * sin
    out = rounded(x, dtype)
    if p == 0:
        tl.store(q_ptr + at.to(tl.int64) * (HEADS * HEAD_DIM) + n, out, mask=live)
    else:
        to = r * kv_row + head * kv_head + t * kv_token + channel
        if p == 1:
            tl.store(k_ptr + to, out, mask=live)
        else:
            tl.store(v_ptr + to, out, mask=live)
