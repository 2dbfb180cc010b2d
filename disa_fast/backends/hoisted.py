"""Plain PyTorch on any device, with everything that does not depend on x taken out of the loop.

H1 time table, H2 cond_embed once, H3 all modulations as one GEMM over (steps, rows) in chunks of steps, H4 LN's affine folded into
it, H5 one state for both guidance halves and no variance channels for the unconditional one, H6 combination and update
on that half alone. Exact: the same function, other rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..solvers import StepTable
from .reference import update

if TYPE_CHECKING:
    from ..heads.mlp import HoistedWeights, MLPHead, MLPSpec

MODULATION_BYTES = 64 << 20


def about(dtype: torch.dtype) -> str:
    return "plain PyTorch, with everything that does not depend on the state taken out of the loop"


def refuses(spec: MLPSpec, dtype: torch.dtype, device: torch.device, rows: int, batch_invariant: bool = False) -> str | None:
    return "a library's matrix products, picked by size, are not batch-invariant" if batch_invariant else None


def draws() -> bool:
    return False


def captures() -> bool:
    return False


def denoise(
    head: MLPHead,
    z: Tensor,
    table: StepTable,
    cfg: float,
    temperature: float,
    noise: Tensor,
    step_noise: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    w = head.hoisted(z.dtype)
    times = w.time_table(table)
    cond = F.linear(z, *w.cond)
    bytes_per_step = len(z) * w.spec.modulation_width * z.element_size()
    chunk = max(1, MODULATION_BYTES // max(1, bytes_per_step))
    x = noise
    eps_before = torch.zeros_like(x)
    for start in range(0, len(table), chunk):
        y = F.silu(times[start : start + chunk, None] + cond)
        modulations = w.modulation(y.flatten(0, 1)).unflatten(0, y.shape[:2])
        for i, modulation in enumerate(modulations, start):
            eps, v = evaluate(w, x, modulation, cfg)
            x = update(table, i, x, eps, v, eps_before, step_noise, temperature)
            eps_before = eps
    return x


def evaluate(w: HoistedWeights, x: Tensor, modulation: Tensor, cfg: float) -> tuple[Tensor, Tensor]:
    """One network evaluation and the guidance: (eps, v), [n, channels] each, in the state's dtype.

    x: [n, channels], the state; modulation: [n or 2n, (3*depth+2)*width] in the network's dtype. The matrix products are in the
    network's dtype; the residual stream and all that is elementwise but SiLU in the state's, float32 or float64.
    """
    state, dtype = x.dtype, modulation.dtype
    width, channels = w.spec.width, w.spec.in_channels
    parts = modulation.to(state).split(width, dim=-1)
    h = F.linear(x.to(dtype), *w.input).to(state)
    if cfg != 1.0:
        h = torch.cat([h, h])
    for i, (linear1, linear2) in enumerate(w.blocks):
        shift, scale, gate = parts[3 * i : 3 * i + 3]
        m = torch.addcmul(shift, F.layer_norm(h, (width,), eps=w.eps), scale).to(dtype)
        m = linear2(F.silu(linear1(m), inplace=True)).to(state)
        h = torch.addcmul(h, gate, m)
    m = torch.addcmul(parts[-2], F.layer_norm(h, (width,), eps=w.eps), parts[-1]).to(dtype)
    eps, v = F.linear(m[: len(x)], *w.output).to(state).split(channels, dim=-1)
    if cfg != 1.0:
        weight, bias = w.output
        eps_u = F.linear(m[len(x) :], weight[:channels], bias[:channels]).to(state)
        eps = eps_u + cfg * (eps - eps_u)
    return eps, v
