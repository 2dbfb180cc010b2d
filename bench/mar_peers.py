"""MAR as it was published: the object that a user of it has, the eager baseline to compare with, and Harmon's part of that name.

Written from what MAR_DiSA/models and Harmon_DiSA/src/models/mar of the DiSA repository at 283fa59 do; nothing of disa_fast is used.
Names of parameters and the signatures are theirs, so checkpoints load, and so is everything that costs time or decides a result:

- every denoising step looks its coefficients up in tables of float64, makes the frequencies of the time embedding anew, projects
  all modulations, and updates both guidance halves, each with noise of its own, of which the second one's nobody reads;
- under guidance tokens, masks and class embeddings are written out twice at every autoregressive iteration;
- orders come from numpy's global generator, all other noise from torch.randn and torch.randn_like;
- in bfloat16 the network and what is combined of its outputs alone are bfloat16, the sampler's state and coefficients float32.

Only sampling is here, without dropout: `training` is not consulted. Of the samplers there is DiSA's ancestral one, and the constant
one that models had before DiSA; of the ways to anneal all but the one in two stages.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

BASE_STEPS = 1000

# Diffusion head --------------------------------------------------------------------------------------------------------


@functools.cache
def cosine_schedule() -> np.ndarray:
    """[BASE_STEPS] float64: the share of the signal that is left, squared."""

    def left(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - left((i + 1) / BASE_STEPS) / left(i / BASE_STEPS), 0.999) for i in range(BASE_STEPS)]
    return np.cumprod(1 - np.array(betas))


class Diffusion:
    """Ancestral sampling over `steps` of the schedule's steps, evenly spread and none above `clip`, by tables in ascending time."""

    def __init__(self, steps: int, clip: int = BASE_STEPS - 1) -> None:
        stride, at, taken = (BASE_STEPS - 1) / (steps - 1), 0.0, set()
        for _ in range(steps):
            taken.add(min(round(at), clip))
            at += stride
        self.timestep_map = sorted(taken)
        kept = cosine_schedule()[self.timestep_map]
        betas = 1 - kept / np.append(1.0, kept[:-1])
        now = np.cumprod(1 - betas)
        before = np.append(1.0, now[:-1])
        variance = betas * (1 - before) / (1 - now)
        self.log_betas = np.log(betas)
        self.variance, self.log_variance = variance, np.log(np.append(variance[1], variance[1:]))
        self.clean_of_x, self.clean_of_eps = np.sqrt(1 / now), np.sqrt(1 / now - 1)
        self.mean_of_clean, self.mean_of_x = betas * np.sqrt(before) / (1 - now), (1 - before) * np.sqrt(1 - betas) / (1 - now)

    def posterior(self, clean: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, variance, log variance) of the state before x, were `clean` known."""
        mean = looked_up(self.mean_of_clean, t, x) * clean + looked_up(self.mean_of_x, t, x) * x
        return mean, looked_up(self.variance, t, x), looked_up(self.log_variance, t, x)

    def prediction(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same by the network, which knows neither: between both extremes of the variance it chooses itself."""
        eps, v = network(x, torch.tensor(self.timestep_map, device=t.device)[t]).split(x.shape[1], dim=1)
        lowest, highest = looked_up(self.log_variance, t, x), looked_up(self.log_betas, t, x)
        share = (v + 1) / 2
        log_variance = share * highest + (1 - share) * lowest
        clean = looked_up(self.clean_of_x, t, x) * x - looked_up(self.clean_of_eps, t, x) * eps
        return self.posterior(clean, x, t)[0], log_variance.exp(), log_variance

    def sample(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, temperature: float) -> Tensor:
        """[rows, C] noise -> [rows, C]. network(x, timesteps) -> [rows, 2 C]"""
        for i in reversed(range(len(self.timestep_map))):
            t = torch.tensor([i] * len(x)).to(x.device)
            mean, _, log_variance = self.prediction(network, x, t)
            noise = torch.randn_like(x)
            x = mean + (t != 0).float()[:, None] * torch.exp(0.5 * log_variance) * noise * temperature
        return x


def looked_up(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """[rows, C] float32, a row of one value for each of t [rows]."""
    values = torch.from_numpy(table).to(t.device)[t].float()[:, None]
    return values + torch.zeros(like.shape, device=t.device)


class TimeEmbedding(nn.Module):
    """[rows] -> [rows, width]"""

    frequency_embedding_size = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequency_embedding_size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_embedding_size // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        angles = t.float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class HeadBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulated(self.in_ln(x), shift, scale))


class OutputLayer(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(modulated(self.norm_final(x), *self.adaLN_modulation(y).chunk(2, dim=-1)))


class HeadNetwork(nn.Module):
    """x [rows, C], t [rows], c [rows, z_channels] -> [rows, 2 C]: noise, then what the variance is."""

    def __init__(self, channels: int, width: int, z_channels: int, depth: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = channels, 2 * channels
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(z_channels, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = OutputLayer(width, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        h = self.input_proj(x.to(self.input_proj.weight.dtype))
        y = self.time_embed(t) + self.cond_embed(c.to(self.cond_embed.weight.dtype))
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)

    def forward_with_cfg(self, x: Tensor, t: Tensor, c: Tensor, cfg_scale: float | Tensor) -> Tensor:
        """Both halves at the first half's x. A tensor for the scale makes float32 of the result, a float leaves it as it is."""
        first = x.chunk(2)[0]
        eps, rest = self(torch.cat([first, first]), t, c).tensor_split([self.in_channels], dim=1)
        conditional, unconditional = eps.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class DiffLoss(nn.Module):
    """What the two kinds of it share."""

    def __init__(self, channels: int, z_channels: int, depth: int, width: int) -> None:
        super().__init__()
        self.in_channels = channels
        self.net = HeadNetwork(channels, width, z_channels, depth)

    def _sample(self, diffusion: Diffusion, z: Tensor, temperature: float, cfg: float | Tensor) -> Tensor:
        if cfg == 1.0:
            noise = torch.randn(z.shape[0], self.in_channels).to(z.device)
            return diffusion.sample(lambda x, t: self.net(x, t, z), noise, temperature)
        noise = torch.randn(z.shape[0] // 2, self.in_channels).to(z.device)
        return diffusion.sample(lambda x, t: self.net.forward_with_cfg(x, t, z, cfg), torch.cat([noise, noise]), temperature)


class AnnealedDiffLoss(DiffLoss):
    """DiSA's: a diffusion for each number of steps, of which the autoregressive step takes one."""

    def __init__(
        self, *sizes: int, diff_upper_steps: int = 50, diff_lower_steps: int = 5, diff_annealing_strategy: str = "linear"
    ) -> None:
        super().__init__(*sizes)
        self.gen_diffusion = [Diffusion(steps, clip=950) for steps in range(diff_lower_steps, diff_upper_steps + 1)]
        self.diff_annealing_strategy = diff_annealing_strategy

    def sample(
        self, z: Tensor, temperature: float = 1.0, cfg: float | Tensor = 1.0, step: int = 0, ar_num_iter: int = 64
    ) -> Tensor:
        last, highest = ar_num_iter - 1, len(self.gen_diffusion) - 1
        if self.diff_annealing_strategy == "linear":
            index = int((last - step) / last * highest)
        elif self.diff_annealing_strategy == "cosine":
            index = int((math.cos(math.pi * step / last) + 1) / 2 * highest)
        elif self.diff_annealing_strategy == "constant":
            index = 0
        else:
            raise ValueError(f"diff_annealing_strategy: expected linear, cosine or constant, got {self.diff_annealing_strategy!r}")
        return self._sample(self.gen_diffusion[index], z, temperature, cfg)


class ConstantDiffLoss(DiffLoss):
    """The original Harmon's, which is not told of autoregressive steps."""

    def __init__(self, *sizes: int, num_sampling_steps: str = "100") -> None:
        super().__init__(*sizes)
        self.gen_diffusion = Diffusion(int(num_sampling_steps))

    def sample(self, z: Tensor, temperature: float = 1.0, cfg: float | Tensor = 1.0) -> Tensor:
        return self._sample(self.gen_diffusion, z, temperature, cfg)


# MAR -------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """timm's, [B, N, dim] -> same."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UpstreamMAR(nn.Module):
    """Both repositories' class of that name. mask_ratio_min, label_drop_prob, attn_dropout, proj_dropout, diffusion_batch_mul and
    grad_checkpointing are taken and have no effect on sampling; `steps` are the arguments of `diffloss` that say how many.
    image_shape is Harmon's: (h, w) tokens, if not the model's own grid."""

    def __init__(
        self,
        diffloss: type[DiffLoss],
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        encoder_embed_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_num_heads: int = 16,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        vae_embed_dim: int = 16,
        mask_ratio_min: float = 0.7,
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        buffer_size: int = 64,
        diffloss_d: int = 3,
        diffloss_w: int = 1024,
        diffusion_batch_mul: int = 4,
        grad_checkpointing: bool = False,
        **steps: Any,
    ) -> None:
        super().__init__()
        self.vae_embed_dim, self.img_size, self.vae_stride, self.patch_size = vae_embed_dim, img_size, vae_stride, patch_size
        self.seq_h = self.seq_w = img_size // vae_stride // patch_size
        self.seq_len, self.token_embed_dim = self.seq_h * self.seq_w, vae_embed_dim * patch_size**2
        self.encoder_embed_dim, self.decoder_embed_dim, self.buffer_size = encoder_embed_dim, decoder_embed_dim, buffer_size
        positions = self.seq_len + buffer_size
        self.class_emb = nn.Embedding(class_num, encoder_embed_dim)
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_embed_dim))
        self.z_proj = nn.Linear(self.token_embed_dim, encoder_embed_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_embed_dim, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, encoder_embed_dim))
        self.encoder_blocks = nn.ModuleList(Block(encoder_embed_dim, encoder_num_heads, mlp_ratio) for _ in range(encoder_depth))
        self.encoder_norm = nn.LayerNorm(encoder_embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, decoder_embed_dim))
        self.diffloss = diffloss(self.token_embed_dim, decoder_embed_dim, diffloss_d, diffloss_w, **steps)

    @property
    def dtype(self) -> torch.dtype:
        return self.fake_latent.dtype

    def sample_orders(self, bsz: int, seq_len: int | None = None) -> Tensor:
        """[bsz, seq_len] int64, of numpy's global generator."""
        orders = np.tile(np.arange(self.seq_len if seq_len is None else seq_len), (bsz, 1))
        for order in orders:
            np.random.shuffle(order)
        return torch.from_numpy(orders).to(self.fake_latent.device)

    def positions(self, learned: Tensor, image_shape: tuple[int, int] | None) -> Tensor:
        """[1, buffer tokens if any + h * w, dim]: made for the model's own grid, else interpolated."""
        if image_shape in (None, (self.seq_h, self.seq_w)):
            return learned
        buffer, image = learned.split([learned.shape[1] - self.seq_len, self.seq_len], dim=1)
        image = image.transpose(1, 2).reshape(1, -1, self.seq_h, self.seq_w)
        return torch.cat([buffer, F.interpolate(image, size=image_shape, mode="bilinear").flatten(2).transpose(1, 2)], dim=1)

    def forward_mae_encoder(
        self, x: Tensor, mask: Tensor, class_embedding: Tensor, image_shape: tuple[int, int] | None = None
    ) -> Tensor:
        """x: [B, h * w, C]; mask: [B, h * w], 1 where a token is not known -> [B, buffer_size + known tokens, E]"""
        x = self.z_proj(x.to(self.dtype))
        buffer = class_embedding[:, None].expand(-1, self.buffer_size, -1)
        x = self.z_proj_ln(torch.cat([buffer, x], dim=1) + self.positions(self.encoder_pos_embed_learned, image_shape))
        known = 1 - torch.cat([mask.new_zeros(len(x), self.buffer_size), mask], dim=1)
        x = x[known.nonzero(as_tuple=True)].reshape(len(x), -1, x.shape[-1])
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def forward_mae_decoder(
        self, x: Tensor, mask: Tensor, image_shape: tuple[int, int] | None = None, x_con: Tensor | None = None
    ) -> Tensor:
        """[B, buffer_size + known tokens, E] -> [B, h * w, D], the head's condition. x_con: [B, buffer_size + h * w, E] in place
        of mask tokens."""
        x = self.decoder_embed(x)
        known = 1 - torch.cat([torch.zeros(len(x), self.buffer_size, device=x.device), mask], dim=1)
        full = self.mask_token.repeat(*known.shape, 1).to(x.dtype) if x_con is None else self.decoder_embed(x_con)
        full[known.nonzero(as_tuple=True)] = x.flatten(0, 1)
        x = full + self.positions(self.decoder_pos_embed_learned, image_shape)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.positions(self.diffusion_pos_embed_learned, image_shape)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, seq_len, C * p * p] -> [B, C, seq_h * p, seq_w * p]"""
        p = self.patch_size
        patches = x.reshape(len(x), self.seq_h, self.seq_w, self.vae_embed_dim, p, p)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(x), self.vae_embed_dim, self.seq_h * p, self.seq_w * p)

    @torch.no_grad()
    def sample_tokens(
        self,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: Tensor | None = None,
        temperature: float = 1.0,
        progress: bool = False,
    ) -> Tensor:
        """[bsz] int64 labels, or none -> [bsz, vae_embed_dim, H, W] latents. For a `diffloss` that is told the step."""
        device, guided = self.fake_latent.device, cfg != 1.0
        mask = torch.ones(bsz, self.seq_len, device=device)
        tokens = torch.zeros(bsz, self.seq_len, self.token_embed_dim, device=device)
        orders = self.sample_orders(bsz)
        for step in tqdm(range(num_iter), disable=not progress):
            drawn = tokens.clone()
            embedding = self.fake_latent.repeat(bsz, 1) if labels is None else self.class_emb(labels)
            if guided:
                tokens, mask = torch.cat([tokens, tokens]), torch.cat([mask, mask])
                embedding = torch.cat([embedding, self.fake_latent.repeat(bsz, 1)])
            z = self.forward_mae_decoder(self.forward_mae_encoder(tokens, mask, embedding), mask)

            left, still_masked, chosen = next_masks(mask[:bsz], orders, step, num_iter)
            rows = torch.cat([chosen, chosen]) if guided else chosen
            scale = guidance_scale(cfg, cfg_schedule, left, self.seq_len)
            latents = self.diffloss.sample(z[rows.nonzero(as_tuple=True)], temperature, scale, step=step, ar_num_iter=num_iter)
            drawn[chosen.nonzero(as_tuple=True)] = latents.chunk(2)[0] if guided else latents
            tokens, mask = drawn.clone(), still_masked.float()
        return self.unpatchify(tokens)


def masked_first(count: Tensor, orders: Tensor) -> Tensor:
    """[B, tokens] bool: the first `count`, a [1] tensor, of each order."""
    masked = torch.zeros(orders.shape, device=orders.device)
    return masked.scatter(1, orders[:, : count.long()], torch.ones(orders.shape, device=orders.device)).bool()


def next_masks(mask: Tensor, orders: Tensor, step: int, num_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """(how many tokens `step` leaves, a [1] tensor; which, [B, tokens] bool; which it draws, likewise). mask: [B, tokens], nonzero
    where a token is not known; of an image, as the others have as many."""
    count = orders.shape[1]
    left = torch.tensor([np.floor(count * np.cos(math.pi / 2 * (step + 1) / num_iter))], dtype=torch.float32)
    left = torch.minimum(mask.sum(dim=-1, keepdim=True) - 1, left.to(orders.device))
    left = torch.maximum(torch.ones(1, device=orders.device), left)[0]
    still_masked = masked_first(left, orders)
    return left, still_masked, mask.bool() if step == num_iter - 1 else mask.bool() ^ still_masked


def guidance_scale(cfg: float, cfg_schedule: str, left: Tensor, count: int) -> float | Tensor:
    """Of a step that leaves `left` of `count` tokens. A tensor if it grows with what is known."""
    if cfg_schedule == "linear":
        return 1 + (cfg - 1) * (count - left) / count
    if cfg_schedule == "constant":
        return cfg
    # upstream's exception: whoever catches that one catches this one
    raise NotImplementedError(f"cfg_schedule: expected linear or constant, got {cfg_schedule!r}")


def _published(dim: int, depth: int, heads: int, head_depth: int, head_width: int) -> dict[str, Any]:
    """Arguments of UpstreamMAR: sizes of the encoder and of the decoder, which are alike, and of the head."""
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads}
    both = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()}
    return both | {"diffloss_d": head_depth, "diffloss_w": head_width}


BASE = _published(768, 12, 12, 6, 1024)
LARGE = _published(1024, 16, 16, 8, 1280)
HUGE = _published(1280, 20, 16, 12, 1536)


def mar_base(**kw: Any) -> UpstreamMAR:
    """MAR-B, head included (upstream's commands name it apart), with DiSA. Arguments of UpstreamMAR take precedence."""
    return UpstreamMAR(**({"diffloss": AnnealedDiffLoss} | BASE | kw))


def mar_large(**kw: Any) -> UpstreamMAR:
    """MAR-L; see mar_base."""
    return mar_base(**(LARGE | kw))


def mar_huge(**kw: Any) -> UpstreamMAR:
    """MAR-H; see mar_base."""
    return mar_base(**(HUGE | kw))
