"""Layer norm, modulation, linear and SiLU: the first half of a residual block, for few rows."""

import triton
import triton.language as tl

from .common import add_product, load_statistics, modulated, prefetching_after_kernel_before, rounded


@triton.jit(do_not_specialize=["rows"])
def adaln_linear_kernel(
    h_ptr, stats_ptr, modulation_ptr, weight_ptr, bias_ptr, out_ptr, column, rows, eps,
    WIDTH: tl.constexpr, MODULATION: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """out[r] = silu(W (norm(h[r]) * scale[r] + shift[r]) + bias)     norm(h) = (h - mean) / sqrt(variance + eps)

    h [rows, WIDTH] and its stats float32; modulation [rows, MODULATION], shift at `column`, scale WIDTH behind it; weight
    [WIDTH, WIDTH], bias [WIDTH], out [rows, WIDTH]. One program owns [BLOCK_M, BLOCK_N] of out. Every program modulates its rows
    anew, which is cheaper than another launch as long as rows are few.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetching_after_kernel_before(weight_ptr, n, 0, WIDTH, WIDTH, WIDTH, PDL, PREFETCH)
    live = r < rows
    mean, deviation = load_statistics(stats_ptr, r, live, eps, WIDTH, TILE)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        m = modulated(h_ptr, modulation_ptr + column, r, live, k, mean, deviation, WIDTH, MODULATION, dtype)
        mask = (k < WIDTH)[:, None] & (n < WIDTH)[None, :]
        weight = tl.load(weight_ptr + n[None, :] * WIDTH + k[:, None], mask=mask, other=0.0)
        sums = add_product(sums, m, weight, PRECISION)
    sums += tl.load(bias_ptr + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
    out = rounded(sums * tl.sigmoid(sums), dtype)
    tl.store(out_ptr + r[:, None] * WIDTH + n[None, :], out, mask=live[:, None] & (n < WIDTH)[None, :])
