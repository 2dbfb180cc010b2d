"""Training losses: of diffusion heads with learned variance, and of flow networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .solvers.ddpm import posterior
from .solvers.diffusion import cosine, cosine_alphas_cumprod, cosine_betas

TRAIN_CLIP = 950
# [951] float64 each, over t. Made once, and not in the loss: torch.compile would trace that.
_POSTERIOR = tuple(torch.from_numpy(c) for c in posterior(cosine_betas()[: TRAIN_CLIP + 1], cosine()))
_SIGNAL = torch.tensor(cosine_alphas_cumprod()[: TRAIN_CLIP + 1])


def diffusion_loss(net: nn.Module, target: Tensor, z: Tensor) -> Tensor:
    """E |eps - eps_theta|^2 plus the variational bound, in bits, that trains the variance channels alone.

    net(x, t, z) -> [rows, 2 * channels]; target: clean tokens [rows, channels]; z: conditions [rows, z_channels]. Timesteps are
    drawn from 0..950: the head is never asked for a later one (arXiv 2102.09672, section 3.1; diffusion/gaussian_diffusion.py and
    the clip of MAR_DiSA/diffusion/__init__.py in the DiSA repository at 283fa59). Returns a scalar.
    """
    a, b, l0, l1 = (c.to(target) for c in _POSTERIOR)
    signal = _SIGNAL.to(target)
    t = torch.randint(0, TRAIN_CLIP + 1, (len(target),), device=target.device)
    noise = torch.randn_like(target)
    x = signal[t, None].sqrt() * target + (1 - signal[t, None]).sqrt() * noise
    eps, v = net(x, t, z).float().chunk(2, dim=-1)
    mse = (noise - eps).square().mean(dim=-1)

    # The true posterior has the same mean with the true noise in place of eps; both variances lie on the l0 + l1 v line, at v = -1.
    a, b, l0, l1 = (c[t, None] for c in (a, b, l0, l1))
    mean_error = b * (noise - eps.detach())
    log_variance, true_log_variance = l0 + l1 * v, l0 - l1
    kl = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + mean_error.square() * (-log_variance).exp()
    )
    nll = -_discretized_log_likelihood(target - (a * x + b * eps.detach()), target, 0.5 * log_variance)
    bound = torch.where(t == 0, nll.mean(dim=-1), kl.mean(dim=-1)) / math.log(2)
    return (mse + bound).mean()


def _discretized_log_likelihood(centred: Tensor, target: Tensor, log_scale: Tensor) -> Tensor:
    """log p of `target` in [-1, 1], a 255-level pixel, under a normal with target - mean = `centred`; the ends are open."""
    scale = log_scale.exp()
    upper = torch.special.ndtr((centred + 1 / 255) / scale)
    lower = torch.special.ndtr((centred - 1 / 255) / scale)
    mass = torch.where(target > 0.999, 1 - lower, torch.where(target < -0.999, upper, upper - lower))
    return mass.clamp(min=1e-12).log()


def flow_loss(velocity: Callable[[Tensor], Tensor], target: Tensor, t: Tensor) -> Tensor:
    """E |v_theta - (noise - target)|^2 on the straight path x = (1-t) target + t noise (arXiv 2210.02747, eq. 23).

    velocity(x) -> same shape, of the network at time t, which broadcasts against target. Returns a scalar. As FlowAR_DiSA's
    flowloss.py and xAR_DiSA's xar.py of the DiSA repository at 283fa59.
    """
    noise = torch.randn_like(target)
    return (velocity((1 - t) * target + t * noise) - (noise - target)).square().mean()
