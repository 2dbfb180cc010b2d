"""Euler-Maruyama on the reverse SDE of a flow, whose score is read off the velocity (arXiv 2401.08740, eq. 4 and 9)."""

from __future__ import annotations

import numpy as np

from ..untraced import untraced
from .diffusion import checked_steps
from .flow_euler import linspace
from .table import StepTable

T_LAST = 0.04  # the last time at which noise is still added


@untraced
def flow_euler_maruyama(steps: int) -> StepTable:
    """`steps` times from 1 to 0.04, then a step without noise to 0 (FlowAR_DiSA/models/sampler.py, DiSA repository, 283fa59).

    On the path x = (1-t) x0 + t eps with diffusion coefficient w = 2t, the score is ((t-1) v - x)/t, hence the drift

        v - w/2 * score = (2-t) v + x,    x <- x + dt * drift + sqrt(2t |dt|) * noise

    which is affine in (x, v). The network is given t itself, in [0, 1]. Raises ValueError for steps outside 1..1000.
    """
    steps = checked_steps(steps)
    times = np.append(linspace(1, T_LAST, steps), 0.0)
    t, dt = times[:-1], np.diff(times)
    noisy = np.arange(steps) < steps - 1
    return StepTable(
        "flow_euler_maruyama",
        t=t,
        a=1 + dt,
        b=dt * (2 - t),
        c=np.zeros(steps),
        l0=np.log(2 * t * np.abs(dt)),
        l1=np.zeros(steps),
        noisy=noisy,
        draws=bool(noisy.any()),
        output="velocity",
    )
