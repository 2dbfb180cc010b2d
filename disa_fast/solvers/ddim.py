"""DDIM with eta = 0 (arXiv 2010.02502, eq. 12)."""

from __future__ import annotations

import numpy as np

from ..untraced import untraced
from .diffusion import BASE_STEPS, checked_steps, clip_timesteps, descending, respaced_betas
from .table import StepTable


@untraced
def ddim(steps: int, clip: int | None = 980) -> StepTable:
    """Deterministic DDIM on the integer-stride grid, clipped at timestep `clip`.

    The grid is 0, s, 2s, ... below n, for the largest n <= 1000 that has a stride s giving exactly `steps` entries.
    Per step: x <- sqrt(ab'/ab) * x + (sqrt(1-ab') - sqrt(ab' (1/ab - 1))) * eps. Temperature has no effect: there is no noise.
    Raises ValueError for steps outside 1..1000 or a clip that is not a timestep.
    """
    timesteps = ddim_timesteps(steps, clip)
    alphas_cumprod = np.cumprod(1 - respaced_betas(timesteps))
    previous = np.append(1.0, alphas_cumprod[:-1])
    a = np.sqrt(previous / alphas_cumprod)
    b = np.sqrt(1 - previous) - np.sqrt(previous) * np.sqrt(1 / alphas_cumprod - 1)
    a, b, t = descending(a, b, timesteps)
    zero, silent = np.zeros_like(t), np.full_like(t, -np.inf)
    return StepTable("ddim", t=t, a=a, b=b, c=zero, l0=silent, l1=zero, noisy=np.zeros(len(t), bool), draws=True)


def ddim_timesteps(steps: int, clip: int | None) -> np.ndarray:
    """The base timesteps of `ddim`, ascending; one step starts at the top, not at time 0."""
    steps = checked_steps(steps)
    if steps == 1:
        return clip_timesteps([BASE_STEPS - 1], clip)
    fits = (
        range(0, end, stride)
        for end in range(BASE_STEPS, steps - 1, -1)
        for stride in range(max(1, end // steps), end // (steps - 1) + 1)
        if len(range(0, end, stride)) == steps
    )
    return clip_timesteps(list(next(fits)), clip)
