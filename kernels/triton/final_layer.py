"""The final layer's products, in parts: few rows have few outputs, and a program for each part reads its weights at once."""

import triton
import triton.language as tl

from .common import add_product, load_statistics, modulated, prefetching_after_kernel_before


@triton.jit(do_not_specialize=["rows"])
def final_layer_kernel(
    h_ptr, stats_ptr, modulation_ptr, weight_ptr, parts_ptr, column, rows, eps,
    WIDTH: tl.constexpr, MODULATION: tl.constexpr, TILE: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """parts[j, r] = W[:, k] (norm(h[r]) * scale[r] + shift[r])[k], k the j-th BLOCK_K columns

    h, stats, modulation and column as in adaln_linear.py; weight [OUTPUTS, WIDTH], parts [ceil(WIDTH / BLOCK_K), rows, OUTPUTS]
    float32; BLOCK_N is OUTPUTS or more. One program owns BLOCK_M rows of one part.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    prefetching_after_kernel_before(weight_ptr, n, tl.program_id(1) * BLOCK_K, OUTPUTS, WIDTH, BLOCK_K, PDL, PREFETCH)
    live = r < rows
    mean, deviation = load_statistics(stats_ptr, r, live, eps, WIDTH, TILE)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    m = modulated(h_ptr, modulation_ptr + column, r, live, k, mean, deviation, WIDTH, MODULATION, dtype)
    mask = (k < WIDTH)[:, None] & (n < OUTPUTS)[None, :]
    weight = tl.load(weight_ptr + n[None, :] * WIDTH + k[:, None], mask=mask, other=0.0)
    sums = add_product(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), m, weight, PRECISION)
    at = parts_ptr + (tl.program_id(1).to(tl.int64) * rows + r[:, None]) * OUTPUTS + n[None, :]
    tl.store(at, sums, mask=live[:, None] & (n < OUTPUTS)[None, :])
