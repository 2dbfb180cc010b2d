"""The end of a denoising step: guidance, the solver's update, and the input layer of the next step."""

import triton
import triton.language as tl

from .common import prefetching_after_kernel_before
from .input_projection import project


@triton.jit
def _output(
    parts_ptr, bias_ptr, r, rows, mask, first,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """CHANNELS outputs of the final layer from `first` on, [rows, channels], with bias."""
    c = first + tl.arange(0, BLOCK_C)
    at = parts_ptr + r[:, None] * (2 * CHANNELS) + c[None, :]
    out = tl.load(at, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):  # all are asked for at once, and added up one after the other
        out += tl.load(at + part * (rows.to(tl.int64) * (2 * CHANNELS)), mask=mask, other=0.0)
    return out + tl.load(bias_ptr + c, mask=c < first + CHANNELS, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows", "trajectories"])
def sampler_step_kernel(
    parts_ptr, out_bias_ptr, in_weight_ptr, in_bias_ptr, x_ptr, before_ptr, next_x_ptr, next_before_ptr, noise_ptr,
    step_ptr, scalars_ptr, h_ptr, stats_ptr, rows, trajectories,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    GUIDED: tl.constexpr, NOISY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One row of a StepTable (disa_fast/solvers/table.py), for trajectories t:

        (o, v) = the sum of PARTS parts + b_out                 under guidance o <- o_u + cfg * (o - o_u), o_u from row t + n
        next_x = a*x + b*o + c*before + [noisy] exp((l0 + l1*v) / 2) * noise * temperature;   next_before = o
        h = W_in next_x + b_in and its statistics, for both halves under guidance

    parts [PARTS, rows, 2 * CHANNELS], as final_layer.py left them; h [rows, WIDTH], stats, x, before, noise [trajectories,
    CHANNELS] float32; step: a, b, c, l0, l1, noisy; scalars: cfg, temperature; both float32. One program owns [BLOCK_T, BLOCK_N]
    of h. Each computes all channels of its next_x, which one of them stores: not over x, which others may still be reading.
    """
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetching_after_kernel_before(in_weight_ptr, n, 0, WIDTH, CHANNELS, CHANNELS, PDL, PREFETCH)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    live = t < trajectories
    at = t[:, None] * CHANNELS + c[None, :]
    mask = live[:, None] & (c < CHANNELS)[None, :]
    o = _output(parts_ptr, out_bias_ptr, t, rows, mask, 0, CHANNELS, PARTS, BLOCK_C)
    if GUIDED:
        o_u = _output(parts_ptr, out_bias_ptr, t + trajectories, rows, mask, 0, CHANNELS, PARTS, BLOCK_C)
        o = o_u + tl.load(scalars_ptr) * (o - o_u)
    x = tl.load(step_ptr) * tl.load(x_ptr + at, mask=mask, other=0.0) + tl.load(step_ptr + 1) * o
    x += tl.load(step_ptr + 2) * tl.load(before_ptr + at, mask=mask, other=0.0)
    if NOISY:
        v = _output(parts_ptr, out_bias_ptr, t, rows, mask, CHANNELS, CHANNELS, PARTS, BLOCK_C)
        added = tl.exp((tl.load(step_ptr + 3) + tl.load(step_ptr + 4) * v) / 2) * tl.load(noise_ptr + at, mask=mask, other=0.0)
        x += tl.where(tl.load(step_ptr + 5) != 0, added * tl.load(scalars_ptr + 1), 0.0)
    x = tl.where(mask, x, 0.0)
    if tl.program_id(1) == 0:
        tl.store(next_x_ptr + at, x, mask=mask)
        tl.store(next_before_ptr + at, o, mask=mask)
    project(
        x, in_weight_ptr, in_bias_ptr, h_ptr, stats_ptr, t, live, trajectories,
        CHANNELS, WIDTH, TILE, GUIDED, BLOCK_C, BLOCK_N, PRECISION,
    )  # fmt: skip
