"""What the diffusion solvers share: the diffusion that a network was trained with, and its respacing.

Cosine schedule: Nichol and Dhariwal, arXiv 2102.09672, eq. 17, betas capped at 0.999. Respacing and clipping:
MAR_DiSA/diffusion/respace.py and __init__.py of the DiSA repository at 283fa59. All in float64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ..checks import check_choice, is_whole
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


PREDICTIONS = ("epsilon", "start_x", "previous_x", "velocity")
VARIANCES = ("learned_range", "learned", "fixed_small", "fixed_large")


@dataclass(frozen=True, eq=False)
class Diffusion:
    """The diffusion process that a network was trained with.

    alphas_cumprod: [N] float64, the product of (1 - beta) up to each of the N base timesteps; NaN
        at a timestep where it is not known.
    predicts: what the first half of the network's output is, one of PREDICTIONS: the noise, the
        clean token, the state of the next lower timestep, or sqrt(ab) noise - sqrt(1 - ab) x0.
    variance: what the second half decides, one of VARIANCES (arXiv 2102.09672, eq. 15, and the
        log-variance itself), or that it decides nothing and the posterior variance or beta is used.
    time_scale: the network is given the timestep times this.
    """

    alphas_cumprod: np.ndarray
    predicts: str = "epsilon"
    variance: str = "learned_range"
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice("predicts", self.predicts, PREDICTIONS)
        check_choice("variance", self.variance, VARIANCES)

    @property
    def base_steps(self) -> int:
        return len(self.alphas_cumprod)

    def betas(self, timesteps: np.ndarray) -> np.ndarray:
        """beta of the chain that visits only these timesteps, ascending: 1 minus the ratio of
        neighbouring alphas_cumprod.

        Solvers take the chain's alphas_cumprod from these betas again, as the published code does.
        Near t = 999 of the cosine schedule the round trip costs nine digits, which counts there:
        1/sqrt(alphas_cumprod) is 20291.
        """
        alphas_cumprod = self.alphas_cumprod[timesteps]
        return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])

    def clean_token(self, alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(of_x, of_output): x0 = of_x * x + of_output * output at each step of a chain. Not for a
        network that predicts previous_x."""
        if self.predicts == "start_x":
            return np.zeros_like(alphas_cumprod), np.ones_like(alphas_cumprod)
        if self.predicts == "velocity":
            return np.sqrt(alphas_cumprod), -np.sqrt(1 - alphas_cumprod)
        return np.sqrt(1 / alphas_cumprod), -np.sqrt(1 / alphas_cumprod - 1)

    def times(self, timesteps: np.ndarray) -> np.ndarray:
        """[T] float64, what the network is given at these timesteps."""
        return timesteps * self.time_scale


@untraced
@functools.cache
def cosine() -> Diffusion:
    """MAR's and Harmon's: the cosine schedule of 1000 base steps, noise prediction, learned range."""
    return Diffusion(cosine_alphas_cumprod())


def checked_steps(steps: int, most: int = BASE_STEPS) -> int:
    """`steps` as Python's number, which does not overflow. Raises ValueError for what is not a whole
    number from 1 to `most`."""
    if not is_whole(steps):
        raise ValueError(f"steps: expected a whole number of denoising steps, got {steps!r}")
    if not 1 <= steps <= most:
        raise ValueError(f"steps: expected 1 to {most} denoising steps, got {steps}")
    return int(steps)


def checked_clip(clip: object, base: int = BASE_STEPS) -> int | None:
    """`clip` as Python's number. Raises ValueError for what is neither a timestep nor None."""
    if clip is None:
        return None
    if not is_whole(clip) or not 0 <= clip < base:
        raise ValueError(f"clip: expected a timestep (a whole number from 0 to {base - 1}) or None, got {clip!r}")
    return int(clip)


def respace(steps: int, clip: int | None, base: int = BASE_STEPS) -> np.ndarray:
    """The base timesteps that a nominal step count visits: ascending int64, at most `steps` of them.

    Positions are spread evenly over 0..base - 1, accumulated in floating point, rounded half to even, then clipped from above;
    those that meet at the clip become one, so 50 steps are 48 at clip 950. One step starts at the top, not at time 0.
    """
    steps = checked_steps(steps, base)
    if steps == 1:
        return clip_timesteps([base - 1], clip, base)
    stride = (base - 1) / (steps - 1)
    position, timesteps = 0.0, []
    for _ in range(steps):
        timesteps.append(round(position))
        position += stride
    return clip_timesteps(timesteps, clip, base)


def clip_timesteps(timesteps: list[int], clip: int | None, base: int = BASE_STEPS) -> np.ndarray:
    """min(t, clip), without duplicates, ascending."""
    clip = checked_clip(clip, base)
    return np.unique(np.minimum(timesteps, base - 1 if clip is None else clip))


def descending(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arrays over ascending time, turned into the order of sampling."""
    return tuple(np.ascontiguousarray(a[::-1], dtype=np.float64) for a in arrays)
