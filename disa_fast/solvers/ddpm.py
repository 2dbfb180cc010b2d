"""DDPM ancestral sampling with learned variance (arXiv 2006.11239, algorithm 2; arXiv 2102.09672, eq. 15)."""

from __future__ import annotations

import numpy as np

from ..untraced import untraced
from .diffusion import Diffusion, cosine, descending, respace
from .table import StepTable


@untraced
def ddpm(steps: int, clip: int | None = 950, diffusion: Diffusion | None = None) -> StepTable:
    """The ancestral sampler of MAR and Harmon, respaced to `steps` of 1000 and clipped at timestep `clip`.

    steps: 1..1000, nominal; len() of the table is what is left after clipping (48 for 50 at clip 950).
    clip: highest timestep, DiSA's time offset; None leaves MAR's own grid, which starts at 999.
    diffusion: the process that the network was trained with, if not MAR's and Harmon's; its number
        of base steps is then what steps and clip are counted in.

    Per step, with ab = alphas_cumprod of the respaced chain and ab' that of the next lower entry:

        x0   = x / sqrt(ab) - sqrt(1/ab - 1) * eps
        mean = beta sqrt(ab') / (1-ab) * x0 + (1-ab') sqrt(1-beta) / (1-ab) * x
        log variance = (v+1)/2 * log(beta) + (1-v)/2 * log(beta (1-ab') / (1-ab))

    composed in float64 into StepTable's a, b, l0 and l1. The lowest step adds no noise. Raises ValueError for steps
    outside 1..1000 or a clip that is not a timestep.
    """
    diffusion = cosine() if diffusion is None else diffusion
    return ancestral(respace(steps, clip, diffusion.base_steps), diffusion)


def ancestral(timesteps: np.ndarray, diffusion: Diffusion) -> StepTable:
    """The table of `ddpm` over these timesteps, ascending."""
    coefficients = posterior(diffusion.betas(timesteps), diffusion)
    a, b, l0, l1, t = descending(*coefficients, diffusion.times(timesteps))
    noisy = np.arange(len(t)) < len(t) - 1
    return StepTable("ddpm", t=t, a=a, b=b, c=np.zeros_like(t), l0=l0, l1=l1, noisy=noisy, draws=True, output="noise")


def posterior(betas: np.ndarray, diffusion: Diffusion) -> tuple[np.ndarray, ...]:
    """(a, b, l0, l1) of every step of a chain, ascending in time like `betas`."""
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    from_x0 = betas * np.sqrt(previous) / (1 - alphas_cumprod)
    from_x = (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod)
    if diffusion.predicts == "previous_x":
        a, b = np.zeros_like(betas), np.ones_like(betas)
    else:
        of_x, of_output = diffusion.clean_token(alphas_cumprod)
        a, b = from_x0 * of_x + from_x, from_x0 * of_output
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # The posterior variance of the lowest step is 0 and never used: put a neighbour there, so that its logarithm exists.
    variance[0] = variance[1] if len(variance) > 1 else betas[0]
    low, high = np.log(variance), np.log(betas)
    zero = np.zeros_like(betas)
    l0, l1 = {
        "learned_range": ((high + low) / 2, (high - low) / 2),
        "learned": (zero, np.ones_like(betas)),
        "fixed_small": (low, zero),
        "fixed_large": (high, zero),
    }[diffusion.variance]
    return a, b, l0, l1
