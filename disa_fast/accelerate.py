"""Swap the fast head into a model object that somebody else wrote, in place, and take it out again.

Works by structure, not by class name; disa_fast/adapters has a file for each structure.
"""

from __future__ import annotations

import torch
from torch import nn

from .adapters import adapter_of
from .adapters.accelerated import HANDLE, Accelerated, forget_copied_shadows
from .adapters.check import LOCK
from .schedule import Schedule
from .solvers import DEFAULT_CLIP, Solver

__all__ = ["Accelerated", "accelerate", "handle_of", "restore"]


def accelerate(
    model: nn.Module,
    schedule: Schedule | str | None = None,
    solver: str | Solver | None = None,
    clip: int | str | None = DEFAULT_CLIP,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    check: bool = True,
) -> Accelerated:
    """Make `model` draw its tokens with disa_fast, `schedule` deciding the denoising steps of each autoregressive step.

    model: a MAR, Harmon, FlowAR or xAR of the original or of the DiSA repository, or any object of that structure. Its parameters
        are shared, and its methods keep their signatures.
    schedule: T(k). None: the object's own annealing settings where it has them, which with FlowAR and xAR are arguments of each
        call, otherwise "linear:50-5", for FlowAR "linear:25-15" and for xAR "linear:50-15". "constant:25" with clip=None is
        what a MAR or Harmon that was built for 25 unannealed steps does by itself.
    solver: None: the object's own; see disa_fast.solvers.resolve, for FlowAR and xAR disa_fast.solvers.resolve_flow.
    clip: of MAR's and Harmon's solvers, see disa_fast.solvers.resolve; otherwise 950 of 1000.
    backend: see MLPHead.denoise and FlowTransformerHead.denoise.
    dtype: of the network's matrix products. None: that of torch.autocast around the call, where that is on, else the
        parameters' own. The state, and where there is one the residual stream, are float32 or wider.
    check: compare the object's own code with ours before it is replaced: its network and two tokens, guided and not, or, of a
        FlowAR or xAR, an image in few steps. Takes about as long as one of its autoregressive steps (bench/results/swap.json),
        leaves random states, training modes and attributes as they were, and is not repeated for an object that has not
        changed. The relative errors are in the handle's report()["check"].

    The diffusion of a MAR or Harmon is read off its diffloss.gen_diffusion: other betas, numbers of
    base steps and timesteps than MAR's, and networks that predict the clean token or a velocity, are
    served with tables of their own.

    With step counts and solver unchanged, and clip=None where the object has none, one seed gives the
    same tokens before and after, up to rounding. (The published DPM-Solver ignores guidance. As the
    object's own solver it still does; asked for by solver= it does not.) Returns a handle, also a
    context manager: leaving the block undoes this call. A second call changes the settings. Raises
    UnsupportedError for an object that is not recognised, or whose own code computes something else,
    ValueError for bad settings.
    """
    with LOCK:
        handle = handle_of(model)
        if handle is None:
            handle = adapter_of(model)(model)
        handle.configure(schedule, solver, clip, backend, dtype, check)
        handle.install()
        return handle


def restore(model: nn.Module) -> None:
    """Undo `accelerate`; nothing happens to a model that is not accelerated."""
    handle = handle_of(model)
    if handle is not None:
        handle.restore()
    elif isinstance(model, nn.Module):
        forget_copied_shadows(model)


def handle_of(model: object) -> Accelerated | None:
    """The handle of a model that is accelerated now, else None."""
    handle = getattr(model, "__dict__", {}).get(HANDLE)
    return handle if handle is not None and handle.is_of(model) else None
