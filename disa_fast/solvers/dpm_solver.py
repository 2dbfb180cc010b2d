"""First-order DPM-Solver and DPM-Solver++ (arXiv 2206.00927, eq. 3.7; arXiv 2211.01095, eq. 9)."""

from __future__ import annotations

import numpy as np

from ..checks import check_flag
from ..untraced import untraced
from .diffusion import BASE_STEPS, checked_steps, cosine_alphas_cumprod
from .table import StepTable

_T_START = 0.95
_CLIP = 950


@untraced
def dpm_solver(steps: int, plus_plus: bool = False) -> StepTable:
    """`steps` + 1 evenly spaced times from 0.95 down to 1/951 and the exponential integrator between them.

    log alpha is interpolated linearly over timesteps 0..950 of the base schedule, spread over (0, 0.95]. The network gets
    1000 t, a fraction. With h the increase of log(alpha/sigma) over the step:

        DPM-Solver:    x <- alpha'/alpha * x - sigma' expm1(h) * eps
        DPM-Solver++:  x <- sigma'/sigma * x - alpha' expm1(-h) * (x - sigma eps)/alpha

    which are equal at first order but for rounding. Deterministic: temperature has no effect. Raises ValueError for steps
    outside 1..1000.
    """
    steps = checked_steps(steps)
    check_flag("plus_plus", plus_plus)
    log_alpha_grid = 0.5 * np.log(cosine_alphas_cumprod()[: _CLIP + 1])
    t_grid = np.linspace(0, _T_START, len(log_alpha_grid) + 1)[1:]
    t = np.linspace(_T_START, 1 / len(log_alpha_grid), steps + 1)

    log_alpha = np.interp(t, t_grid, log_alpha_grid)
    alpha, sigma, half_log_snr = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha)), _half_log_snr(log_alpha)
    h = np.diff(half_log_snr)
    if plus_plus:
        to_x0 = -alpha[1:] * np.expm1(-h) / alpha[:-1]
        a, b = sigma[1:] / sigma[:-1] + to_x0, -to_x0 * sigma[:-1]
    else:
        a, b = np.exp(np.diff(log_alpha)), -sigma[1:] * np.expm1(h)
    zero, silent = np.zeros(steps), np.full(steps, -np.inf)
    name = "dpm_solver++" if plus_plus else "dpm_solver"
    t_network = t[:-1] * BASE_STEPS
    still = {"noisy": np.zeros(steps, bool), "draws": False, "output": "noise"}
    return StepTable(name, t=t_network, a=a, b=b, c=zero, l0=silent, l1=zero, **still)


def _half_log_snr(log_alpha: np.ndarray) -> np.ndarray:
    return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))
