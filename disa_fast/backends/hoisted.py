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

from .. import onednn
from ..heads import flow
from ..heads.packing import read_here
from ..solvers import StepTable
from ..transformer import RMS_EPS, Layer, Plain, Rotation
from .reference import update

if TYPE_CHECKING:
    from ..heads.flow import FlowCall, FlowHead
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


class HoistedOps(Plain):
    """A transformer block's parts in PyTorch, as fast as that goes: few passes over memory, oneDNN on a CPU. The residual stream is
    float32, or float64, and is overwritten."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype=dtype)
        self.state = torch.promote_types(dtype, torch.float32)

    def linear(self, x: Tensor, layer: Layer) -> Tensor:
        return onednn.linear(x.to(self.dtype), *layer)

    def residual(self, x: Tensor) -> Tensor:
        return x.to(self.state)

    def norm_modulate(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed = F.rms_norm(h, h.shape[-1:], eps=RMS_EPS)
        return torch.addcmul(normed, normed, scale).add_(shift).to(self.dtype)

    def norm(self, h: Tensor, weight: Tensor) -> Tensor:
        return (F.rms_norm(h.to(self.state), h.shape[-1:], eps=RMS_EPS) * weight).to(self.dtype)

    def qkv(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.linear(m, layer).unflatten(-1, (3, -1, head_dim))
        q, k = self._turned(parts[:, :, :2], rotation).permute(2, 0, 3, 1, 4)
        return q, k, parts[:, :, 2].transpose(1, 2)

    def q(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> Tensor:
        return self._turned(self.linear(m, layer).unflatten(-1, (1, -1, head_dim)), rotation)[:, :, 0].transpose(1, 2)

    @staticmethod
    def _turned(x: Tensor, rotation: Rotation) -> Tensor:
        """x: [rows, tokens, parts, heads, head_dim], turned in one pass as complex numbers."""
        state = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (table[:, ::2].to(state) for table in rotation)
        pairs = torch.view_as_complex(x.to(state).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None, None]).flatten(-2).to(x.dtype)

    def gated_mlp(self, m: Tensor, layers: tuple[Layer, ...]) -> Tensor:
        gate, up, down = layers
        return self.linear(onednn.gated_linear(m, gate, up), down)

    def gated_residual(self, h: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
        return h.add_(x) if gate is None else h.addcmul_(gate, x)


def transformer_ops(dtype: torch.dtype, own: torch.dtype) -> Plain:
    return HoistedOps(dtype)


def integrate(head: FlowHead, call: FlowCall) -> Tensor:
    return integrate_by(HoistedOps(call.dtype), MODULATION_BYTES, head, call)


def integrate_by(ops: Plain, budget: int, head: FlowHead, call: FlowCall) -> Tensor:
    """The hoisted loop with the parts of blocks computed by `ops`. budget: bytes of modulation at a time."""
    w = head.weights(call.dtype, ops)
    velocity = head.hoisted(ops, w, w.time_table(call.table), call.guided, call.needed(), call.at, budget)
    steps = read_here(flow.coefficients(call.table, call.noise.device))
    return flow.integrate(velocity, steps, call.guided, call.noisy(), call.cfg, call.temperature, call.noise, call.step_noise)
