"""DDPM ancestral sampling with learned variance (arXiv 2006.11239, algorithm 2; arXiv 2102.09672, eq. 15)."""

from __future__ import annotations

import numpy as np

from ..untraced import untraced
from .diffusion import descending, respace, respaced_betas
from .table import StepTable


@untraced
def ddpm(steps: int, clip: int | None = 950) -> StepTable:
    """The ancestral sampler of MAR and Harmon, respaced to `steps` of 1000 and clipped at timestep `clip`.

    steps: 1..1000, nominal; len() of the table is what is left after clipping (48 for 50 at clip 950).
    clip: highest timestep, DiSA's time offset; None leaves MAR's own grid, which starts at 999.

    Per step, with ab = alphas_cumprod of the respaced chain and ab' that of the next lower entry:

        x0   = x / sqrt(ab) - sqrt(1/ab - 1) * eps
        mean = beta sqrt(ab') / (1-ab) * x0 + (1-ab') sqrt(1-beta) / (1-ab) * x
        log variance = (v+1)/2 * log(beta) + (1-v)/2 * log(beta (1-ab') / (1-ab))

    composed in float64 into StepTable's a, b, l0 and l1. The lowest step adds no noise. Raises ValueError for steps
    outside 1..1000 or a clip that is not a timestep.
    """
    timesteps = respace(steps, clip)
    coefficients = posterior(respaced_betas(timesteps))
    a, b, l0, l1, t = descending(*coefficients, timesteps)
    noisy = np.arange(len(t)) < len(t) - 1
    return StepTable("ddpm", t=t, a=a, b=b, c=np.zeros_like(t), l0=l0, l1=l1, noisy=noisy, draws=True)


def posterior(betas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, l0, l1) of every step of a chain, ascending in time like `betas`."""
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    from_x0 = betas * np.sqrt(previous) / (1 - alphas_cumprod)
    from_x = (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod)
    a = from_x0 * np.sqrt(1 / alphas_cumprod) + from_x
    b = -from_x0 * np.sqrt(1 / alphas_cumprod - 1)
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # The posterior variance of the lowest step is 0 and never used: put a neighbour there, so that its logarithm exists.
    variance[0] = variance[1] if len(variance) > 1 else betas[0]
    low, high = np.log(variance), np.log(betas)
    return a, b, (high + low) / 2, (high - low) / 2
