"""Layer norm and modulation alone, for many rows, where modulating them once beats doing it in every program of the product."""

import triton
import triton.language as tl

from .common import after_kernel_before, load_statistics, modulated


@triton.jit(do_not_specialize=["rows"])
def adaln_kernel(
    h_ptr, stats_ptr, modulation_ptr, out_ptr, column, rows, eps,
    WIDTH: tl.constexpr, MODULATION: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[r] = norm(h[r]) * scale[r] + shift[r]

    Arguments as in adaln_linear.py; out [rows, WIDTH]. One program owns [BLOCK_M, BLOCK_K] of out.
    """
    after_kernel_before(PDL)
    r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = r < rows
    mean, deviation = load_statistics(stats_ptr, r, live, eps, WIDTH, TILE)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    m = modulated(h_ptr, modulation_ptr + column, r, live, k, mean, deviation, WIDTH, MODULATION, dtype)
    tl.store(out_ptr + r[:, None] * WIDTH + k[None, :], m, mask=live[:, None] & (k < WIDTH)[None, :])
