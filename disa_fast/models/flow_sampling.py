"""What sampling with FlowAR and with xAR have in common: which steps each AR step takes, guided how, from what noise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import graphs, profiling
from ..checks import check_labels, is_whole, scalar
from ..heads.flow import STATE, check_guidance, draw_flow_noise
from ..heads.mlp import Draw, checked, draws_of
from ..schedule import Schedule, as_schedule, steps_at
from ..solvers import Solver, StepTable, resolve_flow
from ..untraced import untraced
from .backbone import Backbone

P = ParamSpec("P")
T = TypeVar("T")


def undisturbed(method: Callable[P, T]) -> Callable[P, T]:
    """A model's method outside of torch.autocast, whatever surrounds the call, since backends mind their dtypes themselves; and on
    the model's device."""

    @functools.wraps(method)
    def wrapped(self: Backbone, *args: P.args, **kwargs: P.kwargs) -> T:
        device = self.class_emb.weight.device
        with torch.autocast(device.type, enabled=False), graphs.on_device(device):
            return method(self, *args, **kwargs)

    return wrapped


@dataclass(frozen=True)
class FlowStep:
    """AR step k: its table, and its guidance scale, which grows from 1 at the first to the nominal one at the last."""

    k: int
    table: StepTable
    cfg: float


@untraced
def plan(K: int, schedule: Schedule | str, rounding: str, solver: str | Solver, grid: str, cfg: float | Tensor) -> list[FlowStep]:
    """Every AR step in turn. A single one has the nominal scale."""
    schedule, table_for, cfg = as_schedule(schedule, rounding), resolve_flow(solver, grid), scalar("cfg", cfg)
    return [FlowStep(k, table_for(steps_at(schedule, k, K)), (cfg - 1) * k / (K - 1) + 1 if K > 1 else cfg) for k in range(K)]


def longest(steps: list[FlowStep]) -> StepTable:
    """The table of the AR step with the most denoising steps."""
    return max((step.table for step in steps), key=len)


def is_guided(steps: list[FlowStep], guidance: tuple[float, float]) -> bool:
    """Whether any step of any network evaluation is: else nothing unconditional need be computed."""
    low, high = check_guidance(guidance)
    return any(step.cfg > 1 and step.table.within(low, high).any() for step in steps)


def batch_labels(model: Backbone, labels: Tensor | None, bsz: int | None) -> Tensor:
    """[B] int64 on the model's device: `labels`, or bsz times no class. ValueError for anything else."""
    device = model.class_emb.weight.device
    if labels is None:
        if not is_whole(bsz) or bsz < 1:
            raise ValueError(f"labels, bsz: expected labels, or bsz as the number of unconditional images, got bsz = {bsz!r}")
        return torch.full((int(bsz),), model.no_class, device=device)
    check_labels(labels, model.class_emb.num_embeddings, device)
    if bsz is not None and (not is_whole(bsz) or bsz != len(labels)):
        raise ValueError(f"bsz: expected {len(labels)} or None beside as many labels, got {bsz!r}")
    return labels.long()


def drawn(
    table: StepTable, shape: tuple[int, ...], draw: Draw | None, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(noise, step_noise) of all rows that upstream draws for, by `draw` or from `generator`."""
    draws = draws_of(generator, device) if draw is None else (checked(draw),) * 2
    with profiling.range(profiling.NOISE, len(table)):
        noise, step_noise = draw_flow_noise(table, shape, *draws)
        return noise.to(device, STATE), None if step_noise is None else step_noise.to(device, STATE)
