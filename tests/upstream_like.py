"""Model objects of the two published MAR structures, written independently of the package's own sampling code.

The diffusion here is the textbook one, step by step, from its own tables: nothing of disa_fast's StepTable or loop is used.
"""

import math

import numpy as np
import torch
from torch import nn

from disa_fast.models import MAR

SMALL = {
    "img_size": 64,
    "vae_stride": 16,
    "encoder_embed_dim": 32,
    "encoder_depth": 1,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 48,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "buffer_size": 4,
    "class_num": 10,
    "diffloss_d": 2,
    "diffloss_w": 32,
}


def small_mar(seed: int = 0) -> MAR:
    """A small native MAR with every parameter random, so that each of them matters."""
    torch.manual_seed(seed)
    model = MAR(**SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


class PlainDiffusion:
    """Ancestral or DDIM sampling over a subset of the cosine schedule's 1000 steps."""

    def __init__(self, timesteps: list[int]) -> None:
        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)]
        full = np.cumprod([1 - b for b in betas])
        self.timestep_map = sorted(set(timesteps))
        self.alpha_bar = full[self.timestep_map]
        self.alpha_bar_before = np.append(1.0, self.alpha_bar[:-1])

    def sample(self, network, x, temperature=1.0, ddim=False):
        for i in reversed(range(len(self.timestep_map))):
            ab, before = float(self.alpha_bar[i]), float(self.alpha_bar_before[i])
            beta = 1 - ab / before
            t = torch.full((len(x),), self.timestep_map[i])
            eps, v = network(x, t).chunk(2, dim=1)
            noise = torch.randn_like(x)
            x0 = x / math.sqrt(ab) - math.sqrt(1 / ab - 1) * eps
            if ddim:
                x = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
                continue
            x = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - ab)
            if i > 0:
                low, high = math.log(beta * (1 - before) / (1 - ab)), math.log(beta)
                x = x + torch.exp(0.5 * ((v + 1) / 2 * high + (1 - v) / 2 * low)) * noise * temperature
        return x


def spread(steps: int, clip: int) -> list[int]:
    stride, at, found = 999 / (steps - 1), 0.0, []
    for _ in range(steps):
        found.append(min(round(at), clip))
        at += stride
    return found


class _DiffLoss(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.in_channels = 16
        self.net = net

    def _start(self, z, cfg):
        """(noise, network) as the published heads begin: guided halves share their start."""
        if cfg == 1.0:
            return torch.randn(len(z), 16), lambda x, t: self.net(x, t, z)

        def guided(x, t):
            half = x[: len(x) // 2]
            eps, rest = self.net(torch.cat([half, half]), t, z).chunk(2, dim=1)
            eps_c, eps_u = eps.chunk(2)
            eps = eps_u + cfg * (eps_c - eps_u)
            return torch.cat([torch.cat([eps, eps]), rest], dim=1)

        noise = torch.randn(len(z) // 2, 16)
        return torch.cat([noise, noise]), guided


class UnannealedDiffLoss(_DiffLoss):
    """As in the original MAR: knows nothing of autoregressive steps."""

    def __init__(self, net: nn.Module, steps: int = 12) -> None:
        super().__init__(net)
        self.gen_diffusion = PlainDiffusion(spread(steps, 999))

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        noise, network = self._start(z, cfg)
        return self.gen_diffusion.sample(network, noise, temperature)


class AnnealedDiffLoss(_DiffLoss):
    """As in the DiSA repository: one diffusion for each count from lower to upper, chosen by the autoregressive step."""

    def __init__(self, net: nn.Module, upper: int = 12, lower: int = 3, strategy: str = "linear", clip: int = 950) -> None:
        super().__init__(net)
        self.sampler = "DiSA"
        self.diff_annealing_strategy = strategy
        self.gen_diffusion = [PlainDiffusion(spread(steps, clip)) for steps in range(lower, upper + 1)]

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0, step=0, ar_num_iter=64):
        noise, network = self._start(z, cfg)
        last, span = ar_num_iter - 1, len(self.gen_diffusion) - 1
        index = {
            "linear": lambda: int((last - step) / last * span),
            "cosine": lambda: int((math.cos(math.pi * step / last) + 1) / 2 * span),
            "two-stage": lambda: span if step < last / 2 else 0,
            "constant": lambda: 0,
        }[self.diff_annealing_strategy]()
        return self.gen_diffusion[index].sample(network, noise, temperature)


class UpstreamLikeMAR(nn.Module):
    """Somebody else's MAR: the backbone is borrowed, `sample_tokens` has upstream's signature and loop."""

    def __init__(self, diffloss, **options) -> None:
        super().__init__()
        self.backbone = small_mar()
        self.diffloss = diffloss(self.backbone.diffloss.net, **options)
        self.seq_len = self.backbone.seq_len

    @torch.no_grad()
    def sample_tokens(self, bsz, num_iter=64, cfg=1.0, cfg_schedule="linear", labels=None, temperature=1.0, progress=False):
        order = torch.from_numpy(np.stack([np.random.permutation(self.seq_len) for _ in range(bsz)]))
        rank = order.argsort(dim=1)
        classes = self.backbone.class_emb(labels)
        unconditional = self.backbone.fake_latent.repeat(bsz, 1)
        embedding = torch.cat([classes, unconditional]) if cfg != 1.0 else classes
        tokens, left = torch.zeros(bsz, self.seq_len, 16), self.seq_len
        for step in range(num_iter):
            masked = rank < left
            wanted = max(1, min(left - 1, int(self.seq_len * math.cos(math.pi / 2 * (step + 1) / num_iter))))
            chosen = masked if step == num_iter - 1 else masked & (rank >= wanted)
            copies = 2 if cfg != 1.0 else 1
            z = self.backbone.decode(
                self.backbone.encode(tokens.repeat(copies, 1, 1), masked.repeat(copies, 1), embedding), masked.repeat(copies, 1)
            )[chosen.repeat(copies, 1)]
            scale = cfg if cfg_schedule == "constant" else 1 + (cfg - 1) * torch.tensor([self.seq_len - wanted]) / self.seq_len
            if isinstance(self.diffloss, AnnealedDiffLoss):
                drawn = self.diffloss.sample(z, temperature, scale, step=step, ar_num_iter=num_iter)
            else:
                drawn = self.diffloss.sample(z, temperature, scale)
            tokens[chosen] = drawn[: chosen.sum()]
            left = wanted
        return tokens.transpose(1, 2).reshape(bsz, 16, 4, 4)
