"""What the flow heads of FlowAR and xAR share: the arguments of `denoise`, guidance within an interval of time, and the draws.

A flow head's loop is a StepTable over a network that predicts the velocity of all tokens of a scale or cell at once. The state is
float64, as the published samplers keep it; the network sees it in its own dtype.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import backends, profiling
from ..checks import describe, is_dense, scalar
from ..graphs import Graphs
from ..solvers import StepTable
from ..transformer import GATED_MLP, PLAIN, Plain
from .mlp import Draw, TimeTables, without_autocast
from .packing import Packing, named_tensors, settle

Context = Mapping[str, Tensor]
Velocity = Callable[[int, Tensor], Tensor]

STATE = torch.float64
JOINED_BYTES = 64 << 20
TIMES = ("time_embed.", "encoder_blocks.0.attn.rope.", "res_blocks.0.attn.rope.")  # of what tables are kept


@dataclass(frozen=True)
class FlowCall:
    """What a backend is given, n trajectories of `tokens` tokens each.

    context: what the network sees beside state and time, with rows first: [n, ...], or [2n, ...] where there may be guidance,
        conditional half first.
    at: position of the first token, before which others are finished.
    guided: at which steps there is guidance.
    noise: [n, tokens, channels] float64; step_noise: [T, n, tokens, channels] float64 where the table has noisy steps, else None.
    """

    context: Context
    at: int
    table: StepTable
    guided: tuple[bool, ...]
    cfg: float
    temperature: float
    noise: Tensor
    step_noise: Tensor | None
    dtype: torch.dtype

    def needed(self) -> Context:
        """The context without an unconditional half that no step reads (H8)."""
        rows = len(self.noise) * (2 if any(self.guided) else 1)
        return {name: tensor[:rows] for name, tensor in self.context.items()}

    def noisy(self) -> tuple[bool, ...]:
        return tuple(self.table.noisy.tolist())


class FlowWeights:
    """A flow head's parameters by role, for products in one dtype; nothing is copied but a cast and what `ops` lays out anew.

    time_table: what the network makes of the time of each step, [T, width] of a StepTable (H1). graphs: those captured over
    these weights, where loops of `ops` are.
    """

    time_table: TimeTables

    def __init__(self, ops: Plain, device: torch.device) -> None:
        if ops.captured:
            self.graphs = Graphs(device)


class FlowHead(Packing, ABC):
    """A flow network ready to draw tokens; see Packing for how it follows its parameters."""

    weights_type: ClassVar[Callable[..., FlowWeights]]  # of (parameters, spec, dtype, ops)

    def weights(self, dtype: torch.dtype, ops: Plain = PLAIN) -> FlowWeights:
        """In `dtype`, laid out for `ops`."""
        # From the parameters' own dtype: what is elementwise keeps it.
        build = functools.partial(self.weights_type, dtype=dtype, ops=ops)
        return self.packed(f"{ops.layout} in {dtype}", self.dtype, build)

    def _copied(self) -> Iterable[Tensor]:
        """In the parameters' own dtype most weights are used as they lie. The tables of times are made of others, and so is what
        some backends lay out anew."""
        kinds = [kind for kind, _ in self._packed]
        if not all(kind.endswith(f" in {self.dtype}") for kind in kinds):
            return super()._copied()
        named = named_tensors(self._net).items()
        copied = [tensor for name, tensor in named if name.startswith(TIMES)]
        if not all(kind.startswith(PLAIN.layout) for kind in kinds):
            copied += joined([tensor for name, tensor in named if GATED_MLP in name])
        return copied

    @abstractmethod
    def network(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        """The reference forward, (x, t, at, **context) -> velocity, over the parameters in `dtype`; t [rows]."""

    @abstractmethod
    def hoisted(
        self, ops: Plain, w: FlowWeights, times: Tensor, guided: tuple[bool, ...], context: Context, at: int, budget: int
    ) -> Velocity:
        """(step, x) -> velocity, with all that does not depend on x done before the steps, as many at a time as their modulation
        takes no more than `budget` bytes. w: laid out for `ops`; times: of its time_table. x: [rows of the context, ...] at
        guided steps, else [n, ...] (H8)."""

    def _denoise(
        self,
        context: Context,
        at: int,
        size: tuple[int, int],
        table: StepTable,
        cfg: float | Tensor,
        guidance: tuple[float, float],
        temperature: float | Tensor,
        noise: Tensor,
        step_noise: Tensor | None,
        backend: str,
        dtype: torch.dtype,
        halves: int,
    ) -> Tensor:
        """The loop on the backend asked for. size: (tokens, channels). halves: 2 if the context has an unconditional half.
        Returns [n, tokens, channels] float64."""
        cfg, temperature = scalar("cfg", cfg), scalar("temperature", temperature)
        if temperature < 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature:g}")
        like, rows = next(iter(context.values())), len(next(iter(context.values())))
        n = rows // halves
        within = table.within(*check_guidance(guidance))
        guided = tuple((within & (cfg > 1 and halves == 2)).tolist())
        backend = backends.choose(backend, self.spec, dtype, self.device, rows * size[0])
        with profiling.range(profiling.DENOISE, len(table), rows * size[0], backend):
            noise = _trajectories("noise", noise, like.device, (), n, rows, size)
            if step_noise is not None:
                step_noise = _of_every_step(step_noise, table)
            if step_noise is not None:
                step_noise = _trajectories("step_noise", step_noise, like.device, (len(table),), n, rows, size)
            call = FlowCall(context, at, table, guided, cfg, temperature, noise, step_noise, dtype)
            with without_autocast(like.device.type):
                return backends.BACKENDS[backend].integrate(self, call)


def joined(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The numbers of all, in as few tensors as JOINED_BYTES allow: a digest of many takes a GPU's host longer than the GPU."""
    group: list[Tensor] = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if group and (flat.dtype != group[0].dtype or sum(part.nbytes for part in group) + flat.nbytes > JOINED_BYTES):
            yield torch.cat(group)
            group = []
        group.append(flat)
    if group:
        yield torch.cat(group)


def check_table(table: StepTable) -> None:
    """ValueError for what is not a table for networks without variance channels."""
    if not isinstance(table, StepTable):
        raise ValueError(f"table: expected a StepTable such as disa_fast.solvers.flow_euler(25), got {table!r}")
    if table.l1.any() or table.output == "noise":
        raise ValueError(
            "table: expected one of a flow solver, whose network predicts no variance but a velocity, such as "
            f"disa_fast.solvers.flow_euler(25), got {table!r}"
        )


def check_guidance(guidance: tuple[float, float]) -> tuple[float, float]:
    """(low, high) as numbers. ValueError for anything else, or where low > high."""
    if not isinstance(guidance, tuple | list) or len(guidance) != 2:
        raise ValueError(f"guidance: expected (low, high), times between which guidance is applied, got {guidance!r}")
    low, high = (scalar("guidance", bound) for bound in guidance)
    if low > high:
        raise ValueError(f"guidance: expected low <= high, got {guidance!r}")
    return low, high


def draw_flow_noise(
    table: StepTable,
    shape: tuple[int, ...],
    draw_start: Draw,
    draw_step: Draw,
    noise: Tensor | None = None,
    step_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(noise [*shape], step_noise [T, *shape]), what is None drawn as the published samplers draw it: the start in float32, then
    float64 at each noisy step. step_noise stays None for a table without any."""
    if noise is None:
        noise = draw_start(shape, torch.float32)
    if step_noise is None and table.noisy.any():
        drawn = [draw_step(shape, STATE) for _ in range(int(table.noisy.sum()))]
        step_noise = torch.stack(drawn)
    return noise, step_noise


def _of_every_step(step_noise: Tensor, table: StepTable) -> Tensor | None:
    """[T, ...] of what may also be one entry a noisy step; None for a table without any."""
    if not table.noisy.any():
        return None
    if is_dense(step_noise) and step_noise.ndim == 4 and len(step_noise) == int(table.noisy.sum()) < len(table):
        given, nothing = iter(step_noise), torch.zeros_like(step_noise[0])
        return torch.stack([next(given) if noisy else nothing for noisy in table.noisy])
    return step_noise


def _trajectories(
    name: str, tensor: Tensor, device: torch.device, lead: tuple[int, ...], n: int, rows: int, size: tuple[int, int]
) -> Tensor:
    """`tensor` checked against [*lead, rows or n, *size] and cut to [*lead, n, *size], float64."""
    allowed = {(*lead, count, *size) for count in (n, rows)}
    shapes = " or ".join(str(list(shape)) for shape in sorted(allowed))
    if not is_dense(tensor) or tuple(tensor.shape) not in allowed or not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating point {shapes} tensor, got {describe(tensor)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device}, where the head's parameters are, got {describe(tensor)}")
    return tensor.narrow(len(lead), 0, n).to(STATE)


# The loop --------------------------------------------------------------------------------------------------------------


@functools.lru_cache(256)
def coefficients(table: StepTable, device: torch.device) -> Tensor:
    """[T, 4] float64: a, b, c and the deviation of the noise of every step. `packing.read_here` what is used on a GPU."""
    with np.errstate(over="ignore"):
        deviation = np.where(table.noisy, np.exp(table.l0 / 2), 0.0)
    packed = torch.from_numpy(np.stack([table.a, table.b, table.c, deviation], axis=1)).to(device)
    settle(device)
    return packed


def integrate(
    velocity: Velocity,
    steps: Tensor,
    guided: tuple[bool, ...],
    noisy: tuple[bool, ...],
    cfg: Tensor | float,
    temperature: Tensor | float,
    x: Tensor,
    step_noise: Tensor | None,
) -> Tensor:
    """Rows of a StepTable, `steps` as of `coefficients`, from x [n, tokens, channels]. At guided steps both halves see x, and
    v = v_u + cfg * (v_c - v_u). numbers may be one-element tensors. Returns the last state."""
    before = torch.zeros_like(x)
    for i, (a, b, c, deviation) in enumerate(row.unbind() for row in steps):
        v = velocity(i, torch.cat([x, x]) if guided[i] else x).to(x.dtype)
        if guided[i]:
            v, v_u = v.chunk(2)
            v = v_u + cfg * (v - v_u)
        x = a * x + b * v + c * before
        if noisy[i]:
            x = x + deviation * temperature * step_noise[i]
        before = v
    return x


def chunk_from(step: int, guided: tuple[bool, ...], most: int) -> range:
    """The steps from `step` on that are guided as it is, `most` at most, and one at least."""
    stop = step + 1
    while stop < len(guided) and guided[stop] == guided[step] and stop - step < most:
        stop += 1
    return range(step, stop)
