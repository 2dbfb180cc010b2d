"""What several kernels share: statistics of layer norm in tiles, operands and products, rounding, the hand-over between kernels."""

import triton
import triton.language as tl


@triton.jit
def store_statistics(stats_ptr, h, r, live, first, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Mean and sum of squared deviations of each TILE columns of h, [rows, columns] with columns starting at tile `first`.

    stats: [rows, 2, ceil(WIDTH / TILE)]: means, then sums of squares. Whoever writes h writes them, so that whoever needs the
    layer norm of a row reads the row once.
    """
    TILES: tl.constexpr = (WIDTH + TILE - 1) // TILE
    GROUPS: tl.constexpr = h.shape[1] // TILE
    parts = tl.reshape(h, (h.shape[0], GROUPS, TILE))
    tile = first + tl.arange(0, GROUPS)
    count = tl.minimum(tl.maximum(WIDTH - tile * TILE, 0), TILE)
    inside = tl.arange(0, TILE)[None, None, :] < count[None, :, None]
    mean = tl.sum(tl.where(inside, parts, 0.0), axis=2) / tl.maximum(count, 1).to(tl.float32)[None, :]
    deviation = tl.where(inside, parts - mean[:, :, None], 0.0)
    at = stats_ptr + r[:, None] * (2 * TILES) + tile[None, :]
    mask = live[:, None] & (tile < TILES)[None, :]
    tl.store(at, mean, mask=mask)
    tl.store(at + TILES, tl.sum(deviation * deviation, axis=2), mask=mask)


@triton.jit
def load_statistics(stats_ptr, r, live, eps, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """(mean, 1 / standard deviation) of each row, [rows] each, from what store_statistics left (Chan, Golub and LeVeque, 1979)."""
    TILES: tl.constexpr = (WIDTH + TILE - 1) // TILE
    tile = tl.arange(0, triton.next_power_of_2(TILES))
    mask = live[:, None] & (tile < TILES)[None, :]
    at = stats_ptr + r[:, None] * (2 * TILES) + tile[None, :]
    means = tl.load(at, mask=mask, other=0.0)
    squares = tl.load(at + TILES, mask=mask, other=0.0)
    count = tl.minimum(tl.maximum(WIDTH - tile * TILE, 0), TILE).to(tl.float32)
    mean = tl.sum(means * count[None, :], axis=1) / WIDTH
    deviation = means - mean[:, None]
    variance = tl.sum(squares + count[None, :] * deviation * deviation, axis=1) / WIDTH
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def add_product(sums, x, weight, PRECISION: tl.constexpr):
    """sums + x weight. In full float32 each product is summed apart: rounding errors grow with the length of a chain of additions,
    which is then that of one block, not of the whole row."""
    if weight.dtype == tl.float32 and PRECISION == "ieee":
        # Of `sums + tl.dot(x, weight)` the compiler makes one chain again, a dot that begins with sums.
        sums = tl.fma(tl.dot(x, weight, input_precision=PRECISION), 1.0, sums)
    else:
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)
    return sums


@triton.jit
def linear_sums(
    x_ptr, weight_ptr, bias_ptr, r, live, n,
    K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W x[r] + bias, [rows, n] in float32. x [rows, K], weight [N, K], bias [N]."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + r[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        weight = tl.load(weight_ptr + n[None, :] * K + k[:, None], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        sums = add_product(sums, x, weight, PRECISION)
    return sums + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def modulated(
    h_ptr, modulation_ptr, r, live, k, mean, deviation, WIDTH: tl.constexpr, MODULATION: tl.constexpr, dtype: tl.constexpr
):
    """(h - mean) * deviation * scale + shift, [rows, k] rounded to dtype; modulation_ptr is at the shift, the scale follows."""
    mask = live[:, None] & (k < WIDTH)[None, :]
    h = tl.load(h_ptr + r[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)
    at = modulation_ptr + r[:, None] * MODULATION + k[None, :]
    shift = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    return rounded((h - mean[:, None]) * deviation[:, None] * scale + shift, dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in dtype; beyond the range of float16 its largest number, since an infinity would turn into NaN further on. NaN stays."""
    if dtype == tl.float16:
        x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def after_kernel_before(PDL: tl.constexpr):
    """Under programmatic dependent launch, let the next kernel of the stream start, and wait for the one before to end.

    Comes first in every kernel: nothing that another kernel writes may be read before it.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetching_after_kernel_before(
    weight_ptr, n, k, N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr
):
    """As after_kernel_before. PREFETCH: have COLUMNS columns from k on of rows n of weight [N, K] brought to level 2 meanwhile.

    They may be asked for before the wait since nothing writes weights during the loop.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH:
            LINE: tl.constexpr = 128 * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth
            lines = k + LINE * tl.arange(0, triton.next_power_of_2((COLUMNS + LINE - 1) // LINE))
            at = weight_ptr + tl.minimum(n, N - 1)[:, None] * K + tl.minimum(lines, K - 1)[None, :]
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
            )
        tl.extra.cuda.gdc_wait()
