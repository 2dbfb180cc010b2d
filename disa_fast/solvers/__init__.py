"""Solvers as StepTables: one file each, chosen by name in `resolve`."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..checks import check_choice
from ..errors import UnsupportedError
from ..untraced import untraced
from .ddim import ddim
from .ddpm import ddpm
from .diffusion import BASE_STEPS, Diffusion, checked_clip
from .dpm_solver import dpm_solver
from .flow_euler import GRIDS, flow_euler
from .flow_euler_maruyama import flow_euler_maruyama
from .table import StepTable

__all__ = [
    "FLOW_NAMES",
    "NAMES",
    "Solver",
    "StepTable",
    "ddim",
    "ddpm",
    "dpm_solver",
    "flow_euler",
    "flow_euler_maruyama",
    "resolve",
    "resolve_flow",
]

Solver = Callable[[int], StepTable]

NAMES = ("ddpm", "ddim", "dpm_solver", "dpm_solver++")
FLOW_NAMES = ("euler", "euler_maruyama")
DEFAULT_CLIP = "default"
DEFAULT_CLIPS = {"ddpm": 950, "ddim": 980}


@untraced
def resolve(solver: str | Solver, clip: int | str | None = DEFAULT_CLIP, diffusion: Diffusion | None = None) -> Solver:
    """steps -> StepTable, cached by step count, for a name of `NAMES` or for any callable of the same kind.

    clip: highest timestep for "ddpm" and "ddim" (None: unclipped; default: the solver's own, 950 and 980 of 1000). DPM-Solver's
    grid is fixed, and a callable has settled the matter itself, so a clip with either is a ValueError.
    diffusion: the process that the network was trained with, if not MAR's and Harmon's. DPM-Solver
    serves these alone, so another process with it is an UnsupportedError.
    """
    by_name: dict[str, Callable[..., StepTable]] = {
        "ddpm": ddpm,
        "ddim": ddim,
        "dpm_solver": dpm_solver,
        "dpm_solver++": functools.partial(dpm_solver, plus_plus=True),
    }
    build = _named(solver, by_name)
    base = BASE_STEPS if diffusion is None else diffusion.base_steps
    if build in (ddpm, ddim):
        if is_default(clip):
            clip = default_clip(solver, base)
        return _clipped(build, checked_clip(clip, base), diffusion)
    if not is_default(clip):
        raise ValueError(f"clip: only 'ddpm' and 'ddim' take one, got clip = {clip!r} with solver {solver!r}")
    if diffusion is not None and isinstance(solver, str):
        raise UnsupportedError(
            f"solver: {solver!r} serves the cosine schedule of {BASE_STEPS} steps and noise prediction alone; "
            "the model was trained with another diffusion, which 'ddpm' and 'ddim' serve"
        )
    return _kept(build) if callable(solver) else _unclipped(solver == "dpm_solver++")


def _kept(build: Solver) -> Solver:
    """`build`, which makes a table of a number of steps once. True is no number, and what stands for 1 elsewhere is refused."""
    return untraced(functools.lru_cache(maxsize=256, typed=True)(build))


# The same for all calls, so that one image after the other makes no table anew.
@functools.lru_cache(64)
def _clipped(build: Callable[..., StepTable], clip: int | None, diffusion: Diffusion | None) -> Solver:
    return _kept(functools.partial(build, clip=clip, diffusion=diffusion))


@functools.lru_cache(2)
def _unclipped(plus_plus: bool) -> Solver:
    return _kept(functools.partial(dpm_solver, plus_plus=plus_plus))


def default_clip(solver: str, base: int = BASE_STEPS) -> int:
    """The highest timestep of "ddpm" and "ddim" unless another is asked for: DiSA's, as a share of
    the base steps."""
    return DEFAULT_CLIPS[solver] * base // BASE_STEPS


def is_default(clip: object) -> bool:
    return isinstance(clip, str) and clip == DEFAULT_CLIP


def _named(solver: str | Solver, by_name: dict[str, Solver]) -> Solver:
    """A name's solver; a user's callable, checked. ValueError for anything else."""
    if callable(solver):
        return functools.partial(_made_by, solver)
    if not isinstance(solver, str) or solver not in by_name:
        raise ValueError(f"solver: expected one of {list(by_name)} or a callable steps -> StepTable, got {solver!r}")
    return by_name[solver]


def _made_by(solver: Solver, steps: int) -> StepTable:
    table = solver(steps)
    if not isinstance(table, StepTable):
        raise ValueError(f"solver: expected {solver!r} to make a StepTable of {steps} steps, got {table!r}")
    return table


# One table for all calls, as above.
_flow_euler, _flow_euler_maruyama = _kept(flow_euler), _kept(flow_euler_maruyama)


@untraced
def resolve_flow(solver: str | Solver, grid: str) -> Solver:
    """steps -> StepTable, cached by step count, for a name of `FLOW_NAMES` or for any callable of the same kind. grid: Euler's, as
    in flow_euler."""
    by_name: dict[str, Solver] = {"euler": functools.partial(_flow_euler, grid=grid), "euler_maruyama": _flow_euler_maruyama}
    check_choice("grid", grid, GRIDS)
    build = _named(solver, by_name)
    return _kept(build) if callable(solver) else build
