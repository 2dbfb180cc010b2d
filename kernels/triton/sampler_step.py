"""The end of a denoising step: final layer, guidance, the solver's update, and the input layer of the next step."""

import triton
import triton.language as tl

from .common import after_kernel_before, load_statistics, modulated
from .input_projection import project


@triton.jit
def _zeros(BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where products are added up: [trajectories, channels]; for fewer trajectories than a matrix instruction takes rows, still
    apart by k, [trajectories, channels, k]."""
    if BLOCK_T < 16:
        sums = tl.zeros((BLOCK_T, BLOCK_C, BLOCK_K), tl.float32)
    else:
        sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    return sums


@triton.jit
def _add_products(
    sums, m, k, weight_ptr, first,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + the products of m [trajectories, k] with CHANNELS rows of the output layer's weights, starting at `first`."""
    c = tl.arange(0, BLOCK_C)
    mask = (c < CHANNELS)[:, None] & (k < WIDTH)[None, :]
    weight = tl.load(weight_ptr + (first + c)[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)
    if m.shape[0] < 16:
        sums += m.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
    else:
        sums = tl.dot(m, tl.trans(weight), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _with_bias(sums, bias_ptr, first, CHANNELS: tl.constexpr):
    """[trajectories, channels]"""
    if len(sums.shape) == 3:
        sums = tl.sum(sums, axis=2)
    c = tl.arange(0, sums.shape[1])
    return sums + tl.load(bias_ptr + first + c, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["trajectories"])
def sampler_step_kernel(
    h_ptr, stats_ptr, modulation_ptr, out_weight_ptr, out_bias_ptr, in_weight_ptr, in_bias_ptr,
    x_ptr, before_ptr, noise_ptr, step_ptr, scalars_ptr, column, trajectories, eps,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, MODULATION: tl.constexpr, TILE: tl.constexpr,
    GUIDED: tl.constexpr, NOISY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of a StepTable (disa_fast/solvers/table.py), for trajectories t:

        (o, v) = W_out (norm(h) * scale + shift) + b_out        under guidance o <- o_u + cfg * (o - o_u), o_u from row t + n
        x <- a*x + b*o + c*before + [noisy] exp((l0 + l1*v) / 2) * noise * temperature;   before <- o
        h <- W_in x + b_in

    h [rows, WIDTH], stats, x, before, noise [trajectories, CHANNELS] float32; modulation as in adaln_linear.py, without gate;
    step: a, b, c, l0, l1, noisy; scalars: cfg, temperature; both float32. One program owns BLOCK_T trajectories, and under
    guidance both rows of each; the unconditional row's v is not computed. x, before, h and stats are written in place.
    """
    after_kernel_before(PDL)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    live = t < trajectories
    dtype: tl.constexpr = out_weight_ptr.dtype.element_ty
    shift_ptr = modulation_ptr + column

    # Final layer
    mean, deviation = load_statistics(stats_ptr, t, live, eps, WIDTH, TILE)
    o = _zeros(BLOCK_T, BLOCK_C, BLOCK_K)
    v = _zeros(BLOCK_T, BLOCK_C, BLOCK_K)
    if GUIDED:
        mean_u, deviation_u = load_statistics(stats_ptr, t + trajectories, live, eps, WIDTH, TILE)
        o_u = _zeros(BLOCK_T, BLOCK_C, BLOCK_K)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        m = modulated(h_ptr, shift_ptr, t, live, k, mean, deviation, WIDTH, MODULATION, dtype)
        o = _add_products(o, m, k, out_weight_ptr, 0, CHANNELS, WIDTH, BLOCK_C, PRECISION)
        v = _add_products(v, m, k, out_weight_ptr, CHANNELS, CHANNELS, WIDTH, BLOCK_C, PRECISION)
        if GUIDED:
            m = modulated(h_ptr, shift_ptr, t + trajectories, live, k, mean_u, deviation_u, WIDTH, MODULATION, dtype)
            o_u = _add_products(o_u, m, k, out_weight_ptr, 0, CHANNELS, WIDTH, BLOCK_C, PRECISION)
    o = _with_bias(o, out_bias_ptr, 0, CHANNELS)
    v = _with_bias(v, out_bias_ptr, CHANNELS, CHANNELS)
    if GUIDED:
        o_u = _with_bias(o_u, out_bias_ptr, 0, CHANNELS)
        o = o_u + tl.load(scalars_ptr) * (o - o_u)

    # Update
    at = t[:, None] * CHANNELS + c[None, :]
    mask = live[:, None] & (c < CHANNELS)[None, :]
    x = tl.load(step_ptr) * tl.load(x_ptr + at, mask=mask, other=0.0) + tl.load(step_ptr + 1) * o
    x += tl.load(step_ptr + 2) * tl.load(before_ptr + at, mask=mask, other=0.0)
    if NOISY:
        added = tl.exp((tl.load(step_ptr + 3) + tl.load(step_ptr + 4) * v) / 2) * tl.load(noise_ptr + at, mask=mask, other=0.0)
        x += tl.where(tl.load(step_ptr + 5) != 0, added * tl.load(scalars_ptr + 1), 0.0)
    x = tl.where(mask, x, 0.0)

    # The next step's input layer; what it overwrites, other threads of this program may still be reading
    tl.debug_barrier()
    tl.store(x_ptr + at, x, mask=mask)
    tl.store(before_ptr + at, o, mask=mask)
    project(
        x, in_weight_ptr, in_bias_ptr, h_ptr, stats_ptr, t, live, trajectories,
        CHANNELS, WIDTH, TILE, GUIDED, BLOCK_C, BLOCK_N, PRECISION,
    )  # fmt: skip
