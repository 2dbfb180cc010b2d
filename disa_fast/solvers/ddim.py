"""DDIM with eta = 0 (arXiv 2010.02502, eq. 12)."""

from __future__ import annotations

import numpy as np

from ..untraced import untraced
from .diffusion import BASE_STEPS, Diffusion, checked_steps, clip_timesteps, cosine, descending
from .table import StepTable


@untraced
def ddim(steps: int, clip: int | None = 980, diffusion: Diffusion | None = None) -> StepTable:
    """Deterministic DDIM on the integer-stride grid, clipped at timestep `clip`.

    The grid is 0, s, 2s, ... below n, for the largest n <= 1000 that has a stride s giving exactly `steps` entries.
    Per step: x <- sqrt(ab'/ab) * x + (sqrt(1-ab') - sqrt(ab' (1/ab - 1))) * eps. Temperature has no effect: there is no noise.
    diffusion: the process that the network was trained with, if not MAR's and Harmon's, as in `ddpm`.
    Raises ValueError for steps outside 1..1000 or a clip that is not a timestep.
    """
    diffusion = cosine() if diffusion is None else diffusion
    return deterministic(ddim_timesteps(steps, clip, diffusion.base_steps), diffusion)


def deterministic(timesteps: np.ndarray, diffusion: Diffusion) -> StepTable:
    """The table of `ddim` over these timesteps, ascending. Not for a network that predicts previous_x."""
    alphas_cumprod = np.cumprod(1 - diffusion.betas(timesteps))
    previous = np.append(1.0, alphas_cumprod[:-1])
    of_x, of_output = diffusion.clean_token(alphas_cumprod)
    # x' = sqrt(ab') x0 + sqrt(1 - ab') eps with eps = (x - sqrt(ab) x0) / sqrt(1 - ab)
    if diffusion.predicts == "epsilon":
        a = np.sqrt(previous / alphas_cumprod)
        b = np.sqrt(1 - previous) + np.sqrt(previous) * of_output
    else:
        kept = np.sqrt((1 - previous) / (1 - alphas_cumprod))
        from_x0 = np.sqrt(previous) - np.sqrt(alphas_cumprod) * kept
        a, b = from_x0 * of_x + kept, from_x0 * of_output
    a, b, t = descending(a, b, diffusion.times(timesteps))
    zero, silent = np.zeros_like(t), np.full_like(t, -np.inf)
    silence = {"l0": silent, "l1": zero, "noisy": np.zeros(len(t), bool)}
    return StepTable("ddim", t=t, a=a, b=b, c=zero, draws=True, output="noise", **silence)


def ddim_timesteps(steps: int, clip: int | None, base: int = BASE_STEPS) -> np.ndarray:
    """The base timesteps of `ddim`, ascending; one step starts at the top, not at time 0."""
    steps = checked_steps(steps, base)
    if steps == 1:
        return clip_timesteps([base - 1], clip, base)
    fits = (
        range(0, end, stride)
        for end in range(base, steps - 1, -1)
        for stride in range(max(1, end // steps), end // (steps - 1) + 1)
        if len(range(0, end, stride)) == steps
    )
    return clip_timesteps(list(next(fits)), clip, base)
