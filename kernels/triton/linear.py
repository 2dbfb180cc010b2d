"""A linear layer, with SiLU or without. Its bits do not depend on the number of rows, which a library's may."""

import triton
import triton.language as tl

from .common import linear_sums, prefetching_after_kernel_before, rounded


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows,
    K: tl.constexpr, N: tl.constexpr, SILU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """out[r] = W x[r] + bias, or silu of it

    x [rows, K], weight [N, K], bias [N], out [rows, N], all of one dtype. One program owns [BLOCK_M, BLOCK_N] of out; neighbours
    in launch order share the weights.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetching_after_kernel_before(weight_ptr, n, 0, N, K, K, PDL, PREFETCH)
    live = r < rows
    sums = linear_sums(x_ptr, weight_ptr, bias_ptr, r, live, n, K, N, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if SILU:
        sums *= tl.sigmoid(sums)
    out = rounded(sums, out_ptr.dtype.element_ty)
    tl.store(out_ptr + r[:, None] * N + n[None, :], out, mask=live[:, None] & (n < N)[None, :])
