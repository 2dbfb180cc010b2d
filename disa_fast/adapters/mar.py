"""MAR- and Harmon-shaped objects: those whose `diffloss`, which a Harmon has in its `mar`, has a `net` with MAR's parameter names
and a `sample` method.

Written against MAR (LTH14/mar at fe470ac), Harmon (wusize/Harmon at 4eb6087), and MAR_DiSA and Harmon_DiSA (DiSA repository at
283fa59). Shadowed are `diffloss.sample` and, where that is not told the autoregressive step, the method that calls it in a loop.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from .. import backends, profiling
from ..errors import UnsupportedError
from ..heads import MLPHead
from ..schedule import Constant, Cosine, Linear, Schedule, TwoStage, as_schedule, steps_at
from ..solvers import DEFAULT_CLIP, DEFAULT_CLIPS, Solver, is_default, resolve
from ..solvers.ddim import ddim_timesteps
from ..solvers.diffusion import BASE_STEPS, respace
from ..untraced import untraced
from .accelerated import Accelerated, with_signature

DEFAULT_SCHEDULE = "linear:50-5"
_SOLVER_OF_SAMPLER = {"DiSA": "ddpm", "DDIM": "ddim", "DPM_Solver": "dpm_solver", "DPM_Solver++": "dpm_solver++"}


class AcceleratedMAR(Accelerated):
    system: ClassVar[str] = "MAR"
    diffloss_at: ClassVar[str] = "diffloss"
    loop_name: ClassVar[str] = "sample_tokens"
    head: MLPHead

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        at, loop_name = self.diffloss_at, self.loop_name
        diffloss: Any = functools.reduce(lambda owner, name: getattr(owner, name, None), at.split("."), model)
        if not isinstance(getattr(diffloss, "net", None), nn.Module) or not callable(getattr(diffloss, "sample", None)):
            raise UnsupportedError(
                f"model: expected a {self.system}-shaped object, with {at}.net and {at}.sample; {type(model).__name__} has not"
            )
        accepted = inspect.signature(diffloss.sample).parameters
        if not {"z", "temperature", "cfg"} <= accepted.keys():
            raise UnsupportedError(
                f"model: expected {at}.sample(z, temperature, cfg[, step, ar_num_iter]), got parameters {list(accepted)}"
            )
        self._told_the_step = {"step", "ar_num_iter"} <= accepted.keys()
        if not self._told_the_step:
            loop = getattr(model, loop_name, None)
            if not callable(loop) or "num_iter" not in inspect.signature(loop).parameters:
                raise UnsupportedError(
                    f"model: {at}.sample is not told the autoregressive step, and there is no {loop_name}(..., num_iter, ...) "
                    f"on {type(model).__name__} to count it in"
                )
        try:
            self.head = MLPHead.from_module(diffloss.net)
        except ValueError as error:
            raise UnsupportedError(f"model: {at}.net is not a MAR diffusion head: {error}") from error
        self._diffloss = diffloss
        self._original_loop: Any = None
        self._original_orders: Any = None
        self._loop = threading.local()

    def configure(self, schedule: Schedule | str | None, solver: str | Solver | None, clip: int | str | None, backend: str) -> None:
        own = _own_settings(self._diffloss) if schedule is None else None
        own_schedule, own_solver, own_clip = own or (DEFAULT_SCHEDULE, "ddpm", DEFAULT_CLIP)
        if solver is None:
            solver = own_solver
            clip = own_clip if is_default(clip) else clip
        checked_schedule, table_for = as_schedule(own_schedule if schedule is None else schedule), resolve(solver, clip)
        backends.choose(backend, self.head.spec, self.head.dtype, self.head.device, rows=2)
        self.schedule, self._table_for, self.backend = checked_schedule, table_for, backend
        self.solver, self.clip = solver, clip
        self.schedule_from = "argument" if schedule is not None else "model" if own else "default"

    def _shadow_all(self) -> None:
        owner: Any = functools.reduce(getattr, self.diffloss_at.split(".")[:-1], self._model)
        self._original_orders = getattr(owner, "sample_orders", None)
        if callable(self._original_orders):
            orders = with_signature(self._orders, inspect.signature(self._original_orders))
            self._shadow(owner, "sample_orders", orders)
        if self._told_the_step:
            self._shadow(self._diffloss, "sample", self._sample_told)
        else:
            self._original_loop = getattr(self._model, self.loop_name)
            loop = with_signature(self._counted_loop, inspect.signature(self._original_loop))
            self._shadow(self._model, self.loop_name, loop)
            self._shadow(self._diffloss, "sample", self._sample_counted)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_loop", "_table_for")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._loop = threading.local()
        self._table_for = resolve(self.solver, self.clip)

    # What shadows the model's own methods -----------------------------------------------------------------------------

    @untraced
    def _orders(self, *args: object, **kwargs: object) -> object:
        """The object's own, of NumPy's generator, where torch.compile would take one of PyTorch's."""
        return self._original_orders(*args, **kwargs)

    @untraced
    def _sample_told(
        self, z: Tensor, temperature: float = 1.0, cfg: float | Tensor = 1.0, step: int = 0, ar_num_iter: int = 64
    ) -> Tensor:
        table = self._table_for(steps_at(self.schedule, step, ar_num_iter))
        self._steps[len(table)] += 1
        with profiling.range(profiling.AR_STEP_OF_ANOTHER_LOOP, step, ar_num_iter, len(table), len(z)):
            return self.head.denoise(z, table, cfg=cfg, temperature=temperature, backend=self.backend)

    @untraced
    def _sample_counted(self, z: Tensor, temperature: float = 1.0, cfg: float | Tensor = 1.0) -> Tensor:
        if not hasattr(self._loop, "at"):  # called on its own, outside the loop: as a first step
            return self._sample_told(z, temperature, cfg, 0, 1)
        k, K = self._loop.at
        self._loop.at = (k + 1, K)
        return self._sample_told(z, temperature, cfg, k, K)

    @untraced(recursive=False)
    def _counted_loop(self, *args: object, **kwargs: object) -> object:
        bound = inspect.signature(self._original_loop).bind(*args, **kwargs)
        bound.apply_defaults()
        self._loop.at = (0, bound.arguments["num_iter"])
        try:
            return self._original_loop(*args, **kwargs)
        finally:
            del self._loop.at


class AcceleratedHarmon(AcceleratedMAR):
    system, diffloss_at, loop_name = "Harmon", "mar.diffloss", "sample"


def _own_settings(diffloss: nn.Module) -> tuple[Schedule, str, int | str | None] | None:
    """(schedule, solver, clip) that an object of the DiSA repository was built with, or None if it has no annealing.

    UnsupportedError where it says that it anneals, but not between which counts.
    """
    strategy = getattr(diffloss, "diff_annealing_strategy", None)
    sampler = str(getattr(diffloss, "sampler", "DiSA"))  # Harmon's has no choice of sampler
    if strategy is None or sampler == "default":
        return None
    makers: dict[str, Callable[[int, int], Schedule]] = {
        "linear": Linear,
        "cosine": Cosine,
        "two-stage": TwoStage,
        "constant": lambda early, late: Constant(late),
    }
    if str(strategy) not in makers or sampler not in _SOLVER_OF_SAMPLER:
        raise UnsupportedError(f"model: unknown annealing {strategy!r} or sampler {sampler!r}; pass schedule= and solver=")
    solver = _SOLVER_OF_SAMPLER[sampler]
    counts = _annealed_counts(diffloss, solver)
    if counts is None:
        raise UnsupportedError("model: it anneals, but its step counts cannot be read from diffloss.gen_diffusion; pass schedule=")
    early, late, clip = counts
    return makers[str(strategy)](early, late), solver, clip


def _annealed_counts(diffloss: nn.Module, solver: str) -> tuple[int, int, int | str | None] | None:
    """(early, late, clip): one entry of gen_diffusion for each count from late to early, either the count itself or a respaced
    diffusion, whose timesteps must be exactly those of our own grid."""
    entries = getattr(diffloss, "gen_diffusion", None)
    if not isinstance(entries, list) or not entries:
        return None
    if all(isinstance(entry, int) for entry in entries):
        return entries[-1], entries[0], DEFAULT_CLIP
    if not all(hasattr(entry, "timestep_map") for entry in entries):
        return None
    grids = [np.asarray(entry.timestep_map) for entry in entries]
    if not all(grid.ndim == 1 and len(grid) and grid.dtype.kind in "iu" for grid in grids):
        return None
    highest = max(int(grid[-1]) for grid in grids)
    make = ddim_timesteps if solver == "ddim" else respace
    for clip in (DEFAULT_CLIPS[solver], None if highest == BASE_STEPS - 1 else highest):
        for late in range(len(grids[0]), BASE_STEPS - len(grids) + 2):
            if all(np.array_equal(make(late + i, clip), grid) for i, grid in enumerate(grids)):
                return late + len(grids) - 1, late, clip
    return None
