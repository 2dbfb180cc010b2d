"""Swap the fast head into a model object that somebody else wrote, in place, and take it out again.

Works by structure, not by class name; disa_fast/adapters has a file for each structure.
"""

from __future__ import annotations

from torch import nn

from .adapters import adapter_of
from .adapters.accelerated import HANDLE, Accelerated
from .schedule import Schedule
from .solvers import DEFAULT_CLIP, Solver

__all__ = ["Accelerated", "accelerate", "handle_of", "restore"]


def accelerate(
    model: nn.Module,
    schedule: Schedule | str | None = None,
    solver: str | Solver | None = None,
    clip: int | str | None = DEFAULT_CLIP,
    backend: str = "auto",
) -> Accelerated:
    """Make `model` draw its tokens with disa_fast, `schedule` deciding the denoising steps of each autoregressive step.

    model: a MAR, Harmon, FlowAR or xAR of the original or of the DiSA repository, or any object of that structure. Its parameters
        are shared, and its methods keep their signatures.
    schedule: T(k). None: the object's own annealing settings where it has them, which with FlowAR and xAR are arguments of each
        call, otherwise "linear:50-5", for FlowAR "linear:25-15" and for xAR "linear:50-15". "constant:25" with clip=None is
        what a MAR or Harmon that was built for 25 unannealed steps does by itself.
    solver: None: the object's own; see disa_fast.solvers.resolve, for FlowAR and xAR disa_fast.solvers.resolve_flow.
    clip: of MAR's and Harmon's solvers, see disa_fast.solvers.resolve; otherwise 950.
    backend: see MLPHead.denoise and FlowTransformerHead.denoise.

    With step counts and solver unchanged, one seed gives the same tokens before and after, up to rounding (upstream's
    DPM-Solver ignores guidance; this one does not). Returns a handle, also a context manager that restores on exit. A second
    call changes the settings. Raises UnsupportedError for a structure that is not recognised, ValueError for bad settings.
    """
    handle = handle_of(model) or adapter_of(model)(model)
    handle.configure(schedule, solver, clip, backend)
    handle.install()
    return handle


def restore(model: nn.Module) -> None:
    """Undo `accelerate`; nothing happens to a model that is not accelerated."""
    handle = handle_of(model)
    if handle is not None:
        handle.restore()


def handle_of(model: object) -> Accelerated | None:
    """The handle of a model that is accelerated now, else None."""
    return getattr(model, "__dict__", {}).get(HANDLE)
