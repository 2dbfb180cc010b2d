"""What the diffusion solvers share: the cosine noise schedule of 1000 base steps, and its respacing.

Cosine schedule: Nichol and Dhariwal, arXiv 2102.09672, eq. 17, betas capped at 0.999. Respacing and clipping:
MAR_DiSA/diffusion/respace.py and __init__.py of the DiSA repository at 283fa59. All in float64.
"""

from __future__ import annotations

import functools

import numpy as np

from ..checks import is_whole
from ..untraced import untraced

BASE_STEPS = 1000


@untraced
@functools.cache
def cosine_betas() -> np.ndarray:
    """beta_t of the base schedule, [1000] float64."""
    edges = np.arange(BASE_STEPS + 1) / BASE_STEPS
    alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    betas.flags.writeable = False
    return betas


@untraced
@functools.cache
def cosine_alphas_cumprod() -> np.ndarray:
    """Product of (1 - beta) up to t, [1000] float64."""
    alphas_cumprod = np.cumprod(1 - cosine_betas())
    alphas_cumprod.flags.writeable = False
    return alphas_cumprod


def checked_steps(steps: int) -> int:
    """As Python's number, which does not overflow. ValueError for what is not a whole number from 1 to 1000."""
    if not is_whole(steps):
        raise ValueError(f"steps: expected a whole number of denoising steps, got {steps!r}")
    if not 1 <= steps <= BASE_STEPS:
        raise ValueError(f"steps: expected 1 to {BASE_STEPS} denoising steps, got {steps}")
    return int(steps)


def respace(steps: int, clip: int | None) -> np.ndarray:
    """The base timesteps that a nominal step count visits: ascending int64, at most `steps` of them.

    Positions are spread evenly over 0..999, accumulated in floating point, rounded half to even, then clipped from above;
    those that meet at the clip become one, so 50 steps are 48 at clip 950. One step starts at the top, not at time 0.
    """
    steps = checked_steps(steps)
    if steps == 1:
        return clip_timesteps([BASE_STEPS - 1], clip)
    stride = (BASE_STEPS - 1) / (steps - 1)
    position, timesteps = 0.0, []
    for _ in range(steps):
        timesteps.append(round(position))
        position += stride
    return clip_timesteps(timesteps, clip)


def clip_timesteps(timesteps: list[int], clip: int | None) -> np.ndarray:
    """min(t, clip), without duplicates, ascending."""
    if clip is None:
        clip = BASE_STEPS - 1
    if not is_whole(clip) or clip < 0:
        raise ValueError(f"clip: expected a timestep (a whole number from 0) or None, got {clip!r}")
    return np.unique(np.minimum(timesteps, min(int(clip), BASE_STEPS - 1)))


def respaced_betas(timesteps: np.ndarray) -> np.ndarray:
    """beta of the chain that visits only these timesteps: 1 minus the ratio of neighbouring alphas_cumprod.

    Solvers take the chain's alphas_cumprod from these betas again, as the published code does. Near t = 999 the round trip
    costs nine digits, which counts there: 1/sqrt(alphas_cumprod) is 20291.
    """
    alphas_cumprod = cosine_alphas_cumprod()[timesteps]
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def descending(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arrays over ascending time, turned into the order of sampling."""
    return tuple(np.ascontiguousarray(a[::-1], dtype=np.float64) for a in arrays)
