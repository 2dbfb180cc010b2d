"""Plain PyTorch, the network at every step as the formulas read: the specification, and what eager costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..heads import flow
from ..heads.packing import read_here
from ..solvers import StepTable
from ..transformer import Plain, plain

if TYPE_CHECKING:
    from ..heads.flow import FlowCall, FlowHead
    from ..heads.mlp import MLPHead, MLPSpec


def about(dtype: torch.dtype) -> str:
    return "plain PyTorch, the network at every step as the formulas read"


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
    network = head.network(z.dtype)
    times = torch.tensor(table.t, device=z.device)
    x = noise
    eps_before = torch.zeros_like(x)
    for i in range(len(table)):
        both = torch.cat([x, x]) if cfg != 1.0 else x
        out = network(both.to(z.dtype), times[i].expand(len(z)), z).to(x.dtype)
        eps, v = out.chunk(2, dim=-1)
        if cfg != 1.0:
            (eps_c, eps_u), v = eps.chunk(2), v[: len(x)]
            eps = eps_u + cfg * (eps_c - eps_u)
        x = update(table, i, x, eps, v, eps_before, step_noise, temperature)
        eps_before = eps
    return x


def update(
    table: StepTable, i: int, x: Tensor, eps: Tensor, v: Tensor, eps_before: Tensor, step_noise: Tensor | None, temperature: float
) -> Tensor:
    """Step i of the table (see StepTable), all arguments in the state's dtype."""
    x = float(table.a[i]) * x + float(table.b[i]) * eps
    if table.c[i]:
        x = x + float(table.c[i]) * eps_before
    if table.noisy[i]:
        deviation = torch.exp((float(table.l0[i]) + float(table.l1[i]) * v) / 2)
        x = x + deviation * step_noise[i] * temperature
    return x


def transformer_ops(dtype: torch.dtype, own: torch.dtype) -> Plain:
    return plain(dtype, own)


def integrate(head: FlowHead, call: FlowCall) -> Tensor:
    """As published, both halves of a guided call are evaluated at every step, needed or not."""
    network = head.network(call.dtype)
    times = torch.tensor(call.table.t, device=call.noise.device)
    rows = len(next(iter(call.context.values())))

    def velocity(i: int, x: Tensor) -> Tensor:
        full = (x if len(x) == rows else torch.cat([x, x])).to(call.dtype)
        return network(full, times[i].expand(rows), call.at, **call.context)[: len(x)]

    steps = read_here(flow.coefficients(call.table, call.noise.device))
    return flow.integrate(velocity, steps, call.guided, call.noisy(), call.cfg, call.temperature, call.noise, call.step_noise)
