"""Euler's method on the flow ODE, from t = 1 (noise) to t = 0 (image): x <- x + (t' - t) v."""

from __future__ import annotations

import numpy as np
import torch

from ..checks import check_choice
from ..untraced import untraced
from .diffusion import checked_steps
from .table import StepTable

GRIDS = ("flowar", "uniform")
_UNIFORM_AT = 50  # the one count at which FlowAR's grid is uniform


@untraced
def flow_euler(steps: int, grid: str = "flowar") -> StepTable:
    """Euler steps over a velocity; the network is given t itself, in [0, 1].

    grid "flowar": floor(steps/2) times from 1 to 0.3 and floor(steps/2) + 1 from 0.25 to 0, so that an odd count loses one step
        and the step from 0.3 to 0.25 is a short one; 50 steps are uniform (FlowAR_DiSA/models/sampler.py of the DiSA repository
        at 283fa59). 1 step is a ValueError: that grid has none.
    grid "uniform": steps + 1 times from 1 to 0 (xAR_DiSA/models/sampler.py).

    Deterministic: temperature has no effect. Raises ValueError for steps outside 1..1000 or another grid.
    """
    steps = checked_steps(steps)
    check_choice("grid", grid, GRIDS)
    if grid == "flowar" and steps == 1:
        raise ValueError("steps: FlowAR's grid needs at least 2 denoising steps, got 1; grid='uniform' can do 1")
    if grid == "uniform" or steps == _UNIFORM_AT:
        times = linspace(1, 0, steps + 1)
    else:
        times = np.append(linspace(1, 0.3, steps // 2), linspace(0.25, 0, steps // 2 + 1))
    t, dt = times[:-1], np.diff(times)
    zero, silent = np.zeros_like(t), np.full_like(t, -np.inf)
    silence = {"l0": silent, "l1": zero, "noisy": np.zeros(len(t), bool), "draws": False, "output": "velocity"}
    return StepTable("flow_euler", t=t, a=np.ones_like(t), b=dt, c=zero, **silence)


def linspace(start: float, end: float, count: int) -> np.ndarray:
    """torch's, to the last bit: whether a time lies in a guidance interval may hang on it."""
    return torch.linspace(start, end, count, dtype=torch.float64).numpy()
