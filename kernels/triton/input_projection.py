"""The input layer: what a state becomes before the first block."""

import triton
import triton.language as tl

from .common import after_kernel_before, store_statistics


@triton.jit
def project(
    x, weight_ptr, bias_ptr, h_ptr, stats_ptr, t, live, copy,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, GUIDED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h[t] = W x[t] + bias and its statistics; under guidance also to row t + copy, the unconditional one.

    x [trajectories, BLOCK_C] float32, columns from CHANNELS on zero; weight [WIDTH, CHANNELS].
    """
    c = tl.arange(0, BLOCK_C)
    x = x.to(weight_ptr.dtype.element_ty)
    for start in range(0, WIDTH, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < WIDTH)[:, None] & (c < CHANNELS)[None, :]
        weight = tl.load(weight_ptr + n[:, None] * CHANNELS + c[None, :], mask=mask, other=0.0)
        if x.shape[0] < 16:  # rows that a matrix instruction takes
            h = tl.sum(x.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :], axis=2)
        else:
            h = tl.dot(x, tl.trans(weight), input_precision=PRECISION)
        h += tl.load(bias_ptr + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
        mask = live[:, None] & (n < WIDTH)[None, :]
        tl.store(h_ptr + t[:, None] * WIDTH + n[None, :], h, mask=mask)
        store_statistics(stats_ptr, h, t, live, start // TILE, WIDTH, TILE)
        if GUIDED:
            tl.store(h_ptr + (t + copy)[:, None] * WIDTH + n[None, :], h, mask=mask)
            store_statistics(stats_ptr, h, t + copy, live, start // TILE, WIDTH, TILE)


@triton.jit(do_not_specialize=["trajectories"])
def input_projection_kernel(
    x_ptr, weight_ptr, bias_ptr, h_ptr, stats_ptr, trajectories,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, GUIDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h[t] = W x[t] + bias and its statistics, for both halves under guidance. x [trajectories, CHANNELS] float32.

    One program owns BLOCK_T trajectories.
    """
    after_kernel_before(PDL)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    live = t < trajectories
    x = tl.load(x_ptr + t[:, None] * CHANNELS + c[None, :], mask=live[:, None] & (c < CHANNELS)[None, :], other=0.0)
    project(
        x, weight_ptr, bias_ptr, h_ptr, stats_ptr, t, live, trajectories,
        CHANNELS, WIDTH, TILE, GUIDED, BLOCK_C, BLOCK_N, PRECISION,
    )  # fmt: skip
