"""The persistent kernel phase by phase, in plain PyTorch: for a check at first use, and to name the first phase that is wrong."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import graphs
from ..heads.mlp import LN_EPS, MLPSpec
from ..solvers import StepTable, ddpm
from . import cuda

if TYPE_CHECKING:
    from ..graphs import Buffers
    from ..heads.mlp import MLPHead

TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3}  # relative L2 error, by the operands' type
OTHER_WIDTHS = (256,)
CHECK_PATIENCE = 200_000_000  # nanoseconds


def phases(w: cuda.Weights, shape: cuda.Shape, b: Buffers, modulation: Tensor) -> Iterator[tuple[int, int, str, Tensor]]:
    """(step, phase, name, value): what the kernel has after each of its phases, [rows, width], and at the end of a step the tokens,
    [trajectories, channels]. Phase 0 is the input layer, 2i + 1 and 2i + 2 are the halves of block i. modulation: of all steps."""
    halves, channels, dtype = 1 + shape.guided, w.spec.in_channels, w.units.dtype
    x, before = b["x"].clone(), torch.zeros_like(b["x"])
    for step, (row, parts) in enumerate(zip(b["steps"], modulation.float(), strict=True)):
        parts = list(parts.split(w.spec.width, dim=-1))
        h = F.linear(x, *(p.float() for p in w.input)).repeat(halves, 1)
        yield step, 0, "h from the input layer", h
        for i, layers in enumerate(w.blocks):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            (weight1, bias1), (weight2, bias2) = ((weight.float(), bias.float()) for weight, bias in layers)
            u = F.silu(F.linear(_rounded(_norm(h) * scale + shift, dtype), weight1, bias1))
            yield step, 2 * i + 1, f"u of block {i}", u
            h = h + gate * F.linear(_rounded(u, dtype), weight2, bias2)
            yield step, 2 * i + 2, f"h after block {i}", h
        shift, scale = parts[-2:]
        o, v = F.linear(_rounded(_norm(h) * scale + shift, dtype), *(p.float() for p in w.output)).split(channels, dim=-1)
        if shape.guided:
            (o, unconditional), v = o.chunk(2), v.chunk(2)[0]
            o = unconditional + b["scalars"][0] * (o - unconditional)
        x = row[0] * x + row[1] * o + row[2] * before
        if shape.noisy:
            x = x + (row[5] != 0) * torch.exp((row[3] + row[4] * v) / 2) * b["noise"][step] * b["scalars"][1]
        before = o
        yield step, 2 * w.spec.depth + 1, "the tokens", x


def _norm(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=LN_EPS)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To dtype; what is beyond its range, to its largest number."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).float()


def first_wrong_phase(
    head: MLPHead, z: Tensor, table: StepTable, cfg: float, noise: Tensor, step_noise: Tensor | None, tolerance: float | None = None
) -> str | None:
    """Run the kernel again and again, each time for one phase more, and say where it first differs from `phases`.

    Returns such as "step 3: u of block 1, relative error 0.8", or None if nowhere. Arguments as MLPHead.denoise checks them, z in
    the dtype to compute in, with all noise given. tolerance: by default the dtype's. Compiles a kernel that dumps, at first use.
    """
    w = head.packed("cuda", z.dtype, cuda.Weights)
    tolerance = tolerance or TOLERANCES[z.dtype]
    shape = cuda.Shape(len(table), len(z), cfg != 1.0, step_noise is not None, *cuda.HOISTS)
    b = graphs.allocate(cuda.layout(w, shape), z.device)
    cuda.triton.inputs(w, z, table, cfg, 1.0, noise, step_noise)(b)
    modulation = torch.cat([part.clone() for _, part in cuda.triton.modulations(w, shape, b)])
    dumping = cuda.dumping(z.device)
    for step, phase, name, expected in phases(w, shape, b, modulation):
        b["x"].copy_(noise)
        b["before"].zero_()
        if phase <= 2 * w.spec.depth:
            found = torch.full_like(expected, torch.nan)
            cuda.launch(
                w, shape, b, range(len(table)), modulation, dumping, dump=found.data_ptr(), dump_step=step, dump_phase=phase
            )
        else:
            cuda.launch(w, shape, b, range(step + 1), modulation[: step + 1], dumping)
            found = b["x"]
        error = float((found - expected).norm() / expected.norm())
        if not error < tolerance:
            return f"step {step}: {name}, relative error {error:.2g}"
    return None


def is_wrong(on: cuda.Gpu, device: torch.device) -> str | None:
    """Two steps of a small head of each entry's width and type, guided, against `phases`: None if all are right. For a first use on
    a GPU, where a launch whose blocks cannot all run at once (limits of MPS, other programs) would not come to its end."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        cases = itertools.product(cuda.SUFFIXES, (*cuda.WIDTHS, *OTHER_WIDTHS))
        return next(filter(None, (_error(on, device, width, dtype) for dtype, width in cases)), None)


def _error(on: cuda.Gpu, device: torch.device, width: int, dtype: torch.dtype) -> str | None:
    draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.float32)
    spec, rows, table = MLPSpec(16, width, 1, 16), 4, ddpm(2)
    p = {name: (draw(shape) * shape[-1] ** -0.5).to(dtype) for name, shape in spec.shapes().items()}
    w, shape = cuda.Weights(p, spec), cuda.Shape(len(table), rows, True, True, *cuda.HOISTS)
    b = graphs.allocate(cuda.layout(w, shape, on), device)
    for name in ("x", "noise", "modulation"):
        b[name].copy_(draw(b[name].shape))
    b["steps"].copy_(w.step_table(table))
    b["scalars"].fill_(2.0)
    b["before"].zero_()
    *_, (_, _, _, expected) = phases(w, shape, b, b["modulation"])
    cuda.launch(w, shape, b, range(len(table)), b["modulation"], on, patience=CHECK_PATIENCE)
    error = float((b["x"] - expected).norm() / expected.norm())
    if error < TOLERANCES[dtype]:
        return None
    what = f"width {width} in {dtype}, relative error {error:.2g}, expected below {TOLERANCES[dtype]}"
    return f"a check at first use failed on this GPU: {what}"
