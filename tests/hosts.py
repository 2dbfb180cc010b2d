"""Model objects that look like MAR and sample otherwise: the diffusion families of the field, written from their papers.

A process is ancestral or DDIM sampling (arXiv 2006.11239, 2010.02502, 2102.09672) over some timesteps of some betas, with the
attributes by which guided-diffusion's descendants show what they are.
"""

import enum
import math

import numpy as np
import torch
from mar_peers import HeadNetwork
from torch import nn
from upstream_like import UpstreamLikeMAR, spread


class MeanType(enum.Enum):
    PREVIOUS_X = 1
    START_X = 2
    EPSILON = 3
    VELOCITY = 4


class VarType(enum.Enum):
    LEARNED = 1
    FIXED_SMALL = 2
    FIXED_LARGE = 3
    LEARNED_RANGE = 4


def cosine(steps=1000, most=0.999):
    def left(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - left((i + 1) / steps) / left(i / steps), most) for i in range(steps)])


def linear(steps=1000):
    return np.linspace(0.1 / steps, 20 / steps, steps)


class Process:
    """Sampling over `timesteps` of the process with these `betas`."""

    def __init__(self, betas, timesteps, mean=MeanType.EPSILON, variance=VarType.LEARNED_RANGE, rescale=False):
        kept = np.cumprod(1 - betas)
        self.timestep_map = sorted(set(timesteps))
        self.original_num_steps = len(betas)
        self.betas = 1 - kept[self.timestep_map] / np.append(1.0, kept[self.timestep_map][:-1])
        self.num_timesteps = len(self.betas)
        self.model_mean_type, self.model_var_type, self.rescale_timesteps = mean, variance, rescale
        self.now = np.cumprod(1 - self.betas)
        self.before = np.append(1.0, self.now[:-1])
        variance = self.betas * (1 - self.before) / (1 - self.now)
        self.log_variance = np.log(np.append(variance[1], variance[1:]))

    def loop(self, network, x, temperature=1.0, clip=False, denoised=None, ddim=False):
        for i in reversed(range(self.num_timesteps)):
            x = self.step(network, x, i, temperature, clip, denoised, ddim)
        return x

    def step(self, network, x, i, temperature, clip, denoised, ddim):
        at, channels = self.timestep_map[i], x.shape[1]
        t = torch.full((len(x),), at * (1000 / self.original_num_steps) if self.rescale_timesteps else at)
        output, v = network(x, t).split(channels, dim=1)
        now, before, beta = float(self.now[i]), float(self.before[i]), float(self.betas[i])
        noise = torch.randn_like(x)
        x0 = {
            MeanType.EPSILON: lambda: x / math.sqrt(now) - math.sqrt(1 / now - 1) * output,
            MeanType.START_X: lambda: output,
            MeanType.VELOCITY: lambda: math.sqrt(now) * x - math.sqrt(1 - now) * output,
            MeanType.PREVIOUS_X: lambda: (output * (1 - now) - math.sqrt(1 - beta) * (1 - before) * x) / (math.sqrt(before) * beta),
        }[self.model_mean_type]()
        if denoised is not None:
            x0 = denoised(x0)
        if clip:
            x0 = x0.clamp(-1, 1)
        if ddim:
            eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
            return math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
        mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - now)
        log_variance = {
            VarType.LEARNED_RANGE: (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * float(self.log_variance[i]),
            VarType.LEARNED: v,
            VarType.FIXED_SMALL: torch.full_like(v, float(self.log_variance[i])),
            VarType.FIXED_LARGE: torch.full_like(v, math.log(beta)),
        }[self.model_var_type]
        return mean + (i > 0) * torch.exp(0.5 * log_variance) * noise * temperature


class HostDiffLoss(nn.Module):
    """MAR's, with whatever another host does differently."""

    options = ("clip", "denoised", "ddim")

    def __init__(self, net, betas=None, timesteps=None, shows_training=True, scale=1.0, **rest):
        super().__init__()
        self.net = modular(net)
        self.in_channels, self.scale = self.net.in_channels, scale
        betas = cosine() if betas is None else betas
        self.how = {name: rest.pop(name) for name in self.options if name in rest}
        timesteps = spaced(12, len(betas)) if timesteps is None else timesteps
        if shows_training:
            self.train_diffusion = Process(betas, range(len(betas)), **rest)
        self.gen_diffusion = Process(betas, timesteps, **rest)

    def guided(self, conditional, unconditional, cfg):
        return unconditional + cfg * (conditional - unconditional)

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return self.drawn(z, temperature, cfg)

    def drawn(self, z, temperature, cfg):
        if cfg == 1.0:
            noise = torch.randn(len(z), self.in_channels)
            return self.scale * self.gen_diffusion.loop(lambda x, t: self.net.forward(x, t, z), noise, temperature, **self.how)

        def network(x, t):
            half = x[: len(x) // 2]
            output, v = self.net.forward(torch.cat([half, half]), t, z).split(self.in_channels, dim=1)
            both = self.guided(*output.chunk(2), cfg)
            return torch.cat([torch.cat([both, both]), v], dim=1)

        noise = torch.randn(len(z) // 2, self.in_channels)
        return self.scale * self.gen_diffusion.loop(network, torch.cat([noise, noise]), temperature, **self.how)


def modular(net):
    """A head of the same parameters as a module of modules, which hooks and replacements reach."""
    spec = net.spec
    made = HeadNetwork(spec.in_channels, spec.width, spec.z_channels, spec.depth)
    made.load_state_dict(net.state_dict())
    return made.requires_grad_(False)


def spaced(count, base=1000):
    stride = (base - 1) / (count - 1)
    return [round(i * stride) for i in range(count)] if base != 1000 else spread(count, 999)


def host(diffloss=HostDiffLoss, **options):
    return UpstreamLikeMAR(diffloss, **options).eval()


def draw(model, cfg=3.0, seed=0, num_iter=5, **kwargs):
    torch.manual_seed(seed)
    np.random.seed(seed)
    return model.sample_tokens(2, num_iter=num_iter, cfg=cfg, labels=torch.tensor([1, 7]), **kwargs)
