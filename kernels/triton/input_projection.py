"""The input layer: what a state becomes before the first block."""

import triton
import triton.language as tl

from .common import prefetching_after_kernel_before, store_statistics


@triton.jit
def project(
    x, weight_ptr, bias_ptr, h_ptr, stats_ptr, t, live, copy,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, GUIDED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of h[t] = W x[t] + bias and their statistics; under guidance also to row t + copy, the unconditional one.

    x [trajectories, BLOCK_C] float32, columns from CHANNELS on zero; weight [WIDTH, CHANNELS]; BLOCK_N is a multiple of TILE.
    """
    c = tl.arange(0, BLOCK_C)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (n < WIDTH)[None, :] & (c < CHANNELS)[:, None]
    weight = tl.load(weight_ptr + n[None, :] * CHANNELS + c[:, None], mask=mask, other=0.0)
    h = tl.dot(x.to(weight.dtype), weight, input_precision=PRECISION)
    h += tl.load(bias_ptr + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
    mask = live[:, None] & (n < WIDTH)[None, :]
    first = tl.program_id(1) * (BLOCK_N // TILE)
    tl.store(h_ptr + t[:, None] * WIDTH + n[None, :], h, mask=mask)
    store_statistics(stats_ptr, h, t, live, first, WIDTH, TILE)
    if GUIDED:
        tl.store(h_ptr + (t + copy)[:, None] * WIDTH + n[None, :], h, mask=mask)
        store_statistics(stats_ptr, h, t + copy, live, first, WIDTH, TILE)


@triton.jit(do_not_specialize=["trajectories"])
def input_projection_kernel(
    x_ptr, weight_ptr, bias_ptr, h_ptr, stats_ptr, trajectories,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, GUIDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """h[t] = W x[t] + bias and its statistics, for both halves under guidance. x [trajectories, CHANNELS] float32.

    One program owns [BLOCK_T, BLOCK_N] of h.
    """
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetching_after_kernel_before(weight_ptr, n, 0, WIDTH, CHANNELS, CHANNELS, PDL, PREFETCH)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    live = t < trajectories
    x = tl.load(x_ptr + t[:, None] * CHANNELS + c[None, :], mask=live[:, None] & (c < CHANNELS)[None, :], other=0.0)
    project(
        x, weight_ptr, bias_ptr, h_ptr, stats_ptr, t, live, trajectories,
        CHANNELS, WIDTH, TILE, GUIDED, BLOCK_C, BLOCK_N, PRECISION,
    )  # fmt: skip
