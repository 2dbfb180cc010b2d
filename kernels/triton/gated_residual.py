"""Linear, gate and residual: the second half of a residual block."""

import triton
import triton.language as tl

from .common import linear_sums, prefetching_after_kernel_before, store_statistics


@triton.jit(do_not_specialize=["rows"])
def gated_residual_kernel(
    x_ptr, modulation_ptr, weight_ptr, bias_ptr, h_ptr, stats_ptr, column, rows,
    WIDTH: tl.constexpr, MODULATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """h[r] += gate[r] * (W x[r] + bias), in place, and the statistics of the new h in tiles of BLOCK_N

    x [rows, WIDTH]; modulation [rows, MODULATION], gate at `column`; weight [WIDTH, WIDTH], bias [WIDTH]; h [rows, WIDTH] and its
    stats float32. One program owns [BLOCK_M, BLOCK_N] of h.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetching_after_kernel_before(weight_ptr, n, 0, WIDTH, WIDTH, WIDTH, PDL, PREFETCH)
    live = r < rows
    sums = linear_sums(x_ptr, weight_ptr, bias_ptr, r, live, n, WIDTH, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    mask = live[:, None] & (n < WIDTH)[None, :]
    gate = tl.load(modulation_ptr + column + r[:, None] * MODULATION + n[None, :], mask=mask, other=0.0).to(tl.float32)
    at = h_ptr + r[:, None] * WIDTH + n[None, :]
    h = tl.load(at, mask=mask, other=0.0) + gate * sums
    tl.store(at, h, mask=mask)
    store_statistics(stats_ptr, h, r, live, tl.program_id(1), WIDTH, BLOCK_N)
