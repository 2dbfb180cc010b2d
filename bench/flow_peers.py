"""FlowAR and xAR as they were published: the objects that a user of theirs has, and the eager baseline to compare with.

Written from what FlowAR_DiSA/models and xAR_DiSA/models of the DiSA repository at 283fa59 do; nothing of disa_fast is used. Names
of parameters and buffers and the signatures are theirs, so checkpoints load, and so is everything that costs time or decides a
result:

- keys and values are kept on the attention modules and grow by concatenation;
- every block projects its adaLN modulation, and its cross attention's keys and values, at every evaluation of the network;
- rotary angles of FlowAR are made anew for every use, and so are the frequencies of the time embedding;
- both guidance halves are evaluated even where only one is used;
- the state is float64 around a float32 network, and all noise comes from torch.randn and torch.randn_like.

Only sampling is here: `training` is not consulted. Attributes of the model that are this file's own: `solver`, a callable as the
functions below, functools.partial of one for another guidance interval. The published scripts sample under torch.no_grad(), which
is built in here, and torch.autocast("cuda"), thus in float16, with TF32 allowed; both are the caller's to ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

NO_CLASS = 1000  # row of class_emb for "unconditional", whatever class_num says
GRID = 16  # on a side; rotary positions of other grids are stretched to it


# Parts of both ---------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, dim: int, weight: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = (wide * (wide.pow(2).mean(dim=-1, keepdim=True) + self.eps).rsqrt()).type_as(x)
        return normed if self.weight is None else normed * self.weight


class GatedMlp(nn.Module):
    """timm's SwiGLU, which upstream gives GELU."""

    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio * 2 / 3.0)
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc1_g(x)
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(gate) * self.fc1_x(x)))))


class TimeEmbedding(nn.Module):
    """[n] int64 -> [n, dim]"""

    frequency_embedding_size = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequency_embedding_size, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_embedding_size // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -math.log(10000) / half).to(t.device)
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def rotary_frequencies(half_head_dim: int) -> Tensor:
    """[half_head_dim / 2]: half of a head turns with the row, half with the column."""
    return 1.0 / 10000 ** (torch.arange(0, half_head_dim, 2)[: half_head_dim // 2].float() / half_head_dim)


def grid_angles(frequencies: Tensor, side: int) -> Tensor:
    """[side, side, head_dim]. By einsum, as upstream, which autocast on a GPU makes in half precision."""
    positions = torch.arange(side).to(frequencies.device) / side * GRID
    of_one_axis = torch.einsum("p,f->pf", positions, frequencies).repeat_interleave(2, dim=-1)
    rows, columns = of_one_axis[:, None, :], of_one_axis[None, :, :]
    return torch.cat([rows.expand(-1, side, -1), columns.expand(side, -1, -1)], dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., tokens, head_dim], neighbouring channels in pairs; cos, sin: [tokens, head_dim]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


class Attention(nn.Module):
    """What the self attentions share: [B, N, dim] -> queries, keys and values, [B, heads, N, head_dim] each, and the way back."""

    def __init__(self, dim: int, num_heads: int, rope: nn.Module, qkv_bias: bool, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rope = rope

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, attended: Tensor) -> Tensor:
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x.mul(scale.add(1)).add_(shift)


class Block(nn.Module):
    """Attention and MLP, modulated by a condition. What attention wants besides x goes through `options`."""

    def __init__(self, dim: int, attn: Attention, mlp_ratio: float = 4.0, drop: float = 0.0) -> None:
        super().__init__()
        self.dim, self.attn = dim, attn
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.mlp = GatedMlp(dim, mlp_ratio, drop)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def modulation(self, condition: Tensor, x: Tensor) -> Tensor:
        """[B, dim] -> [B, 1, 6, dim]"""
        return self.ada_lin(condition).view(-1, 1, 6, self.dim)

    def forward(self, x: Tensor, condition: Tensor, **options) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(condition, x).unbind(2)
        x = x + self.drop_path1(self.attn(modulated(self.norm1(x), shift1, scale1), **options).mul_(gate1))
        return x + self.drop_path2(self.mlp(modulated(self.norm2(x), shift2, scale2)).mul_(gate2))


class Backbone(nn.Module):
    """Parameters of both models: an encoder and a decoder of `blocks`, which are made from (dim, heads).

    sizes: (dim, depth, heads) of the encoder, then of the decoder; length: number of positions.
    """

    def __init__(
        self, channels: int, length: int, sizes: dict[str, tuple[int, int, int]], block: Callable[[int, int], Block]
    ) -> None:
        super().__init__()
        for part, (dim, depth, heads) in sizes.items():
            setattr(self, f"{part}_pos_embed_learned", nn.Parameter(torch.zeros(1, length, dim)))
            setattr(self, f"{part}_blocks", nn.ModuleList(block(dim, heads) for _ in range(depth)))
            setattr(self, f"{part}_norm", RMSNorm(dim, weight=True))
        encoder_dim, decoder_dim = sizes["encoder"][0], sizes["decoder"][0]
        self.class_emb = nn.Embedding(NO_CLASS + 1, encoder_dim)
        self.z_proj = nn.Linear(channels, encoder_dim)
        self.z_proj_ln = RMSNorm(encoder_dim, weight=True)
        self.decoder_embed = nn.Linear(encoder_dim, decoder_dim)

    def initialize(self) -> None:
        """As upstream, where nothing starts at zero but biases."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("pos_embed_learned"):
                nn.init.normal_(parameter, std=0.02)


def block_causal_mask(lengths: list[int]) -> Tensor:
    """[1, 1, n, n], n = sum(lengths): 0 where a token may look, which is at its own group and at those before, else -inf."""
    group = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    return torch.zeros(1, 1, len(group), len(group)).masked_fill(group[None, :] > group[:, None], -torch.inf)


# Solvers: both run from t = 1 (noise) to t = 0 --------------------------------------------------------------------------


def score(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Of x_t = (1 - t) x_0 + t noise. velocity, x: [B, N, C]; t: [B]."""
    t, slope = t[:, None, None], torch.ones_like(x)
    ratio = (1 - t) / -slope
    return (ratio * velocity - x) / (t**2 - ratio * slope * t)


def euler_maruyama_times(num_steps: int) -> Tensor:
    return torch.cat([torch.linspace(1.0, 0.04, num_steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def times_for(x: Tensor, t: Tensor) -> Tensor:
    """t for each row of x, float64."""
    return torch.ones(len(x)).to(device=x.device, dtype=torch.float64) * t


def flowar_drift(
    model: Callable[..., Tensor], x: Tensor, t: Tensor, condition: Tensor, dtype: torch.dtype,
    cfg_scale: float, guidance_low: float, guidance_high: float, stochastic: bool,
) -> Tensor:  # fmt: skip
    """[2B, N, C]: one evaluation. Where guidance is on, both halves move as one; elsewhere each on its own."""
    guided = cfg_scale > 1.0 and t <= guidance_high and t >= guidance_low
    seen = torch.cat([x[: len(x) // 2]] * 2) if guided else x
    at = times_for(seen, t)
    drift = model(seen.to(dtype), at.to(dtype), condition.to(dtype)).to(torch.float64)
    if stochastic:
        drift = drift - t * score(drift, seen, at)
    if guided:
        conditional, unconditional = drift.chunk(2)
        drift = unconditional + cfg_scale * (conditional - unconditional)
        drift = torch.cat([drift, drift])
    return drift


@torch.no_grad()
def flowar_euler(
    model: Callable[..., Tensor], latents: Tensor, condition: Tensor, num_steps: int = 20,
    cfg_scale: float = 1.0, guidance_low: float = 0.0, guidance_high: float = 1.0,
) -> Tensor:  # fmt: skip
    """FlowAR's published solver: model(x, t, condition), x and latents [B, N, C], condition [B, N, z]. Returns float64."""
    if num_steps == 50:
        times = torch.linspace(1, 0, 51, dtype=torch.float64)
    else:  # odd: one evaluation less than asked for, and a gap between the parts
        half = num_steps // 2
        parts = torch.linspace(1, 0.3, half, dtype=torch.float64), torch.linspace(0.25, 0, half + 1, dtype=torch.float64)
        times = torch.cat(parts)
    x = latents.to(torch.float64)
    for t, after in pairwise(times):
        drift = flowar_drift(model, x, t, condition, latents.dtype, cfg_scale, guidance_low, guidance_high, stochastic=False)
        x = x + (after - t) * drift
    return x


@torch.no_grad()
def flowar_euler_maruyama(
    model: Callable[..., Tensor], latents: Tensor, condition: Tensor, num_steps: int = 20,
    cfg_scale: float = 1.0, guidance_low: float = 0.0, guidance_high: float = 1.0,
) -> Tensor:  # fmt: skip
    """The other one, which upstream has and does not use. Draws float64 noise for all rows at all steps but the last."""
    times = euler_maruyama_times(num_steps)
    x = latents.to(torch.float64)
    for i, (t, after) in enumerate(pairwise(times)):
        last, dt = i == num_steps - 1, after - t
        noise = None if last else torch.randn_like(x) * dt.abs().sqrt()
        drift = flowar_drift(model, x, t, condition, latents.dtype, cfg_scale, guidance_low, guidance_high, stochastic=True)
        x = x + drift * dt
        if not last:
            x = x + (2 * t).sqrt() * noise
    return x


def xar_drift(
    model: Callable[..., Tensor], x: Tensor, y: Tensor, scale_index: int, condition: Tensor | None, t: Tensor, dtype: torch.dtype,
    first: bool, mask: Tensor | None, cfg_scale: float, guidance_low: float, guidance_high: float, stochastic: bool,
) -> Tensor:  # fmt: skip
    """[B, N, C]: one evaluation, of twice the rows wherever t <= guidance_high, with guidance or without.

    The first also takes the cell before (condition) in at time 0 and lets the model store that one's keys and values.
    """
    seen = torch.cat([condition, x], dim=1) if first and condition is not None else x
    doubled = bool(first or t <= guidance_high)
    if doubled:
        seen, y = torch.cat([seen, seen]), torch.cat([y, torch.full_like(y, NO_CLASS)])
    at = times_for(seen, t)
    if first:  # the float64 zeros make all times float64, even where there are none of them
        clean = torch.zeros(len(seen) if scale_index else 0).to(device=x.device, dtype=torch.float64)
        drift = model(seen.to(dtype), y, torch.cat([clean, at.to(dtype)]), True, scale_index, mask).to(torch.float64)
    else:
        drift = model(seen.to(dtype), y, at.to(dtype), False, scale_index).to(torch.float64)
    if stochastic:
        drift = drift - t * score(drift, seen[:, -x.shape[1] :], at)
    if not doubled:
        return drift
    conditional, unconditional = drift.chunk(2)
    if cfg_scale > 1.0 and t <= guidance_high and t >= guidance_low:
        return unconditional + cfg_scale * (conditional - unconditional)
    return conditional


@torch.no_grad()
def xar_euler(
    model: Callable[..., Tensor], latents: Tensor, y: Tensor, scale_index: int, condition: Tensor | None = None,
    num_steps: int = 50, cfg_scale: float = 1.0, guidance_low: float = 0.0, guidance_high: float = 1.0, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The other one, which upstream has and does not use: num_steps equal steps. Arguments as of xar_euler_maruyama."""
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    guidance = cfg_scale, guidance_low, guidance_high
    x = latents.to(torch.float64)
    for i, (t, after) in enumerate(pairwise(times)):
        first = i == 0
        drift = xar_drift(model, x, y, scale_index, condition, t, latents.dtype, first, mask, *guidance, stochastic=False)
        x = x + (after - t) * drift
    return x


@torch.no_grad()
def xar_euler_maruyama(
    model: Callable[..., Tensor], latents: Tensor, y: Tensor, scale_index: int, condition: Tensor | None = None,
    num_steps: int = 50, cfg_scale: float = 1.0, guidance_low: float = 0.0, guidance_high: float = 1.0, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """xAR's published solver: model(x, y, t, update_cache, scale_index[, mask]), see UpstreamXAR.sample_inference.

    latents: [B, cell, C]; y: [B] labels; condition: the cell before, none at scale_index 0. Draws float64 noise at all steps but
    the last. ValueError for a single step, where upstream falls over an unbound name.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps: expected 2 or more, got {num_steps}")
    times = euler_maruyama_times(num_steps)
    guidance = cfg_scale, guidance_low, guidance_high
    x = latents.to(torch.float64)
    for i, (t, after) in enumerate(pairwise(times[:-1])):
        dt, first = after - t, i == 0
        noise = torch.randn_like(x) * dt.abs().sqrt()
        drift = xar_drift(model, x, y, scale_index, condition, t, latents.dtype, first, mask, *guidance, stochastic=True)
        x = x + drift * dt + (2 * t).sqrt() * noise
    # With two steps the last one takes the cell before in once more, now without the mask, since upstream goes by the counter of a
    # loop that is over. A cell that follows finds that one stored twice, which the mask does not fit: an error there as here.
    first = num_steps == 2
    drift = xar_drift(model, x, y, scale_index, condition, times[-2], latents.dtype, first, None, *guidance, stochastic=True)
    return x + (times[-1] - times[-2]) * drift


# FlowAR ----------------------------------------------------------------------------------------------------------------


class StretchedRotary(nn.Module):
    """Rotates the tokens of any square grid, by angles made on the spot."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", rotary_frequencies(dim))

    def forward(self, x: Tensor) -> Tensor:
        angles = grid_angles(self.freqs, math.isqrt(x.shape[2]))
        return rotated(x, angles.cos().flatten(0, 1), angles.sin().flatten(0, 1))


class ScaleAttention(Attention):
    """Of the backbone: every call adds a scale to the keys and values, and sees all of them."""

    k: Tensor | None = None
    v: Tensor | None = None

    def clear_cache(self) -> None:
        self.k, self.v = None, None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q, k = self.rope(q), self.rope(k)
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.join(F.scaled_dot_product_attention(q, self.k, self.v))


class HeadAttention(Attention):
    """Of the flow network, over the tokens of one scale."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.join(F.scaled_dot_product_attention(self.rope(q), self.rope(k), v))


class CrossAttention(nn.Module):
    """From x [B, N, dim] to the condition [B, N, semantic_dim], both on the same grid."""

    def __init__(self, dim: int, semantic_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(semantic_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.rope = StretchedRotary(self.head_dim // 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k, v = self.kv(condition).unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v)
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


class PlainHeadBlock(Block):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, HeadAttention(dim, num_heads, StretchedRotary(dim // num_heads // 2), qkv_bias=False))
        self.ada_lin = nn.Linear(dim, 6 * dim)

    def modulation(self, condition: Tensor, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, 6, dim]"""
        return self.ada_lin(F.silu(condition)).unflatten(-1, (6, self.dim))

    def forward(self, x: Tensor, t: Tensor, c: Tensor, condition: Tensor) -> Tensor:
        """x, c: [B, N, dim]; t: [B, 1, dim]; condition: [B, N, z], which c was made of."""
        return super().forward(x, t + c)


class CrossHeadBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, semantic_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.attn = HeadAttention(dim, num_heads, StretchedRotary(dim // num_heads // 2), qkv_bias=False)
        self.crossattn = CrossAttention(dim, semantic_dim, num_heads)
        self.mlp = GatedMlp(dim)
        self.norm1, self.norm3 = RMSNorm(dim), RMSNorm(dim)
        self.norm2_1, self.norm2_2 = RMSNorm(dim, weight=True), RMSNorm(semantic_dim, weight=True)
        self.ada_lin_attn, self.ada_lin_mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, t: Tensor, c: Tensor, condition: Tensor) -> Tensor:
        """As PlainHeadBlock's; attention is modulated by the time alone."""
        gate1, scale1, shift1 = self.ada_lin_attn(F.silu(t)).unflatten(-1, (3, self.dim)).unbind(2)
        gate2, scale2, shift2 = self.ada_lin_mlp(F.silu(c + t)).unflatten(-1, (3, self.dim)).unbind(2)
        x = x + self.drop_path1(self.attn(modulated(self.norm1(x), shift1, scale1)).mul_(gate1))
        asked, offered = self.norm2_1(x), self.norm2_2(condition)
        x = x + self.crossattn(asked, offered)
        return x + self.drop_path2(self.mlp(modulated(self.norm3(x), shift2, scale2)).mul_(gate2))


class OutputLayer(nn.Module):
    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class FlowNetwork(nn.Module):
    """x [B, N, channels], t [B] in [0, 1], condition [B, N, z_channels] -> velocity [B, N, channels]."""

    def __init__(self, channels: int, dim: int, z_channels: int, depth: int, cross: bool) -> None:
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.model_channels, self.num_res_blocks = dim, depth
        heads = dim // 64
        self.time_embed = TimeEmbedding(dim)
        self.cond_embed = nn.Linear(z_channels, dim)
        self.input_proj = nn.Linear(channels, dim)
        self.res_blocks = nn.ModuleList(
            CrossHeadBlock(dim, heads, z_channels) if cross else PlainHeadBlock(dim, heads) for _ in range(depth)
        )
        self.final_layer = OutputLayer(dim, channels)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        e = self.time_embed((t * 1000).long()).unsqueeze(1)
        h, c = self.input_proj(x), self.cond_embed(condition)
        for res_block in self.res_blocks:
            h = res_block(h, e, c, condition)
        return self.final_layer(h, c + e)


class UpstreamFlowAR(Backbone):
    """FlowAR. norm_layer, attn_dropout and use_checkpoint are taken and have no effect on sampling; with a buffer_size upstream
    cannot sample, and nor can this."""

    def __init__(
        self,
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
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        vae_embed_dim: int = 16,
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        buffer_size: int = 0,
        diffloss_d: int = 3,
        diffloss_w: int = 1024,
        scale: tuple[int, ...] = (1, 2, 4, 8, 16),
        cross: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        def block(dim: int, heads: int) -> Block:
            attention = ScaleAttention(dim, heads, StretchedRotary(dim // heads // 2), qkv_bias=True, proj_drop=proj_dropout)
            return Block(dim, attention, mlp_ratio, proj_dropout)

        channels, lengths = vae_embed_dim * patch_size**2, [side**2 for side in scale]
        lengths[0] += buffer_size
        sizes = {
            "encoder": (encoder_embed_dim, encoder_depth, encoder_num_heads),
            "decoder": (decoder_embed_dim, decoder_depth, decoder_num_heads),
        }
        super().__init__(channels, sum(lengths), sizes, block)
        self.solver = flowar_euler
        self.img_size, self.vae_stride, self.patch_size = img_size, vae_stride, patch_size
        self.vae_embed_dim, self.token_embed_dim = vae_embed_dim, channels
        self.seq_h = self.seq_w = img_size // (vae_stride * patch_size)
        self.scale, self.seq_len = [*scale], sum(side**2 for side in scale)
        self.num_classes, self.label_drop_prob, self.buffer_size = class_num, label_drop_prob, buffer_size
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, self.seq_len, decoder_embed_dim))
        self.flownet = FlowNetwork(channels, diffloss_w, decoder_embed_dim, diffloss_d, cross)
        self.initialize()
        self.register_buffer("mask", block_causal_mask(lengths))

    def forward_mae_encoder(self, x: Tensor, condition: Tensor, start: int, end: int) -> Tensor:
        """x: [B, end - start, E], the tokens of a scale; condition: [B, E]."""
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned[:, start:end])
        for block in self.encoder_blocks:
            x = block(x, condition)
        return self.encoder_norm(x)

    def forward_mae_decoder(self, x: Tensor, condition: Tensor, start: int, end: int) -> Tensor:
        """[B, end - start, E] -> [B, end - start, D], the flow network's condition."""
        x = self.decoder_embed(x) + self.decoder_pos_embed_learned[:, start:end]
        for block in self.decoder_blocks:
            x = block(x, condition)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned[:, start:end]

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, h * w, C * p * p] -> [B, C, h * p, w * p]"""
        p, h, w = self.patch_size, self.seq_h, self.seq_w
        patches = x.reshape(len(x), h, w, self.vae_embed_dim, p, p)
        return torch.einsum("bhwcij->bchiwj", patches).reshape(len(x), self.vae_embed_dim, h * p, w * p)

    def enlarged(self, x: Tensor, step: int) -> Tensor:
        """[B, s * s, C] of a scale -> [B, r * r, C] as the next one starts from."""
        side, following = self.scale[step], self.scale[step + 1]
        image = F.interpolate(x.transpose(1, 2).reshape(*x.shape[::2], side, side), (GRID, GRID), mode="bicubic")
        return F.interpolate(image, (following, following), mode="area").flatten(2).transpose(1, 2)

    @torch.no_grad()
    def sample_tokens(
        self,
        flow_upper_steps: int = 50,
        flow_lower_steps: int = 15,
        guidance: float = 0.9,
        cfg: float = 1.0,
        labels: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """[B] int64 labels, needed in spite of the default -> [B, vae_embed_dim, H, W] latents. guidance: end of its interval."""
        doubled = cfg != 1.0
        condition = self.class_emb(labels)
        if doubled:
            condition = torch.cat([condition, self.class_emb(torch.full_like(labels, NO_CLASS))])
        for block in chain(self.encoder_blocks, self.decoder_blocks):
            block.attn.clear_cache()

        x, end, last = condition.unsqueeze(1), 0, len(self.scale) - 1
        for step in tqdm(range(len(self.scale)), disable=not progress):
            start, end = end, end + self.scale[step] ** 2
            z = self.forward_mae_encoder(x, condition, start, end)
            z = self.forward_mae_decoder(z, condition, start, end)
            num_steps = int((flow_upper_steps - flow_lower_steps) * (last - step) / last + flow_lower_steps)
            latents = torch.randn([z.shape[0], z.shape[1], self.token_embed_dim]).to(z.device)  # the halves differ
            cfg_scale = (cfg - 1) * step / last + 1
            drawn = self.solver(self.flownet, latents, z, num_steps=num_steps, cfg_scale=cfg_scale, guidance_high=guidance).float()
            if doubled:
                drawn = drawn.chunk(2)[0]
            if step < last:
                x = self.z_proj(self.enlarged(drawn.repeat(2, 1, 1) if doubled else drawn, step))
        return self.unpatchify(drawn)


def flowar_small(**kw) -> UpstreamFlowAR:
    """FlowAR-S, head included (upstream's commands name it apart). Keyword arguments of the model take precedence."""
    return _flowar(768, 6, 12, {"diffloss_d": 2, "diffloss_w": 1024} | kw)


def flowar_large(**kw) -> UpstreamFlowAR:
    """FlowAR-L; see flowar_small."""
    return _flowar(1024, 8, 16, {"diffloss_d": 12, "diffloss_w": 1024, "cross": True} | kw)


def flowar_huge(**kw) -> UpstreamFlowAR:
    """FlowAR-H; see flowar_small."""
    return _flowar(1536, 15, 16, {"diffloss_d": 12, "diffloss_w": 1536, "cross": True, "use_checkpoint": True} | kw)


def _flowar(dim: int, depth: int, heads: int, kw: dict) -> UpstreamFlowAR:
    return UpstreamFlowAR(**(_alike(dim, depth, heads) | kw))


def _alike(dim: int, depth: int, heads: int) -> dict[str, int]:
    """Encoder and decoder of one size."""
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads}
    return {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()}


# xAR -------------------------------------------------------------------------------------------------------------------


class CellRotary(nn.Module):
    """Rotates tokens in the order of the cells, from tables."""

    def __init__(self, dim: int, side: int, clusters: int) -> None:
        super().__init__()
        self.register_buffer("freqs", rotary_frequencies(dim))
        angles = grid_angles(self.freqs, side)
        cells = math.isqrt(clusters)
        self.cell = side**2 // clusters
        for name, table in (("freqs_cos", angles.cos()), ("freqs_sin", angles.sin())):
            by_cell = table.reshape(cells, side // cells, cells, side // cells, -1).transpose(1, 2)
            self.register_buffer(name, by_cell.reshape(side**2, -1))

    def forward(self, x: Tensor, scale_index: int) -> Tensor:
        """x: [B, heads, N, head_dim], of which the last cell is scale_index."""
        end = (scale_index + 1) * self.cell
        here = slice(end - x.shape[2], end)
        return rotated(x, self.freqs_cos[here], self.freqs_sin[here])


class CellAttention(Attention):
    """Behind what is stored; update_cache stores all but the last cell. Only then the mask matters."""

    k: Tensor | None = None
    v: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None, update_cache: bool, scale_index: int) -> Tensor:
        q, k, v = self.split(x)
        q, k = self.rope(q, scale_index), self.rope(k, scale_index)
        if self.k is not None:
            rows = len(k)  # fewer than stored where only the conditional half is evaluated
            k, v = torch.cat([self.k[:rows], k], dim=2), torch.cat([self.v[:rows], v], dim=2)
        if not update_cache:
            return self.join(F.scaled_dot_product_attention(q, k, v))
        cell = self.rope.cell
        self.k, self.v = k[:, :, :-cell], v[:, :, :-cell]
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class CellBlock(Block):
    def modulation(self, condition: Tensor, x: Tensor) -> Tensor:
        """[cells * B, dim], cell by cell -> [B, N, 6, dim], written out for every token of x [B, N, dim]."""
        cells = len(condition) // len(x)
        parts = super().modulation(condition, x).chunk(cells)
        return torch.cat([part.repeat(1, x.shape[1] // cells, 1, 1) for part in parts], dim=1)


class UpstreamXAR(Backbone):
    """xAR. norm_layer, attn_dropout and diffusion_batch_mul are taken and have no effect on sampling. Grids of other than 16 x 16
    tokens and other than 4 cells are this file's generalisation."""

    def __init__(
        self,
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
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        vae_embed_dim: int = 16,
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        diffusion_batch_mul: int = 4,
        clusters: int = 4,
    ) -> None:
        side = img_size // (vae_stride * patch_size)
        channels, length = vae_embed_dim * patch_size**2, side**2

        def block(dim: int, heads: int) -> Block:
            rope = CellRotary(dim // heads // 2, side, clusters)
            return CellBlock(dim, CellAttention(dim, heads, rope, qkv_bias=True, proj_drop=proj_dropout), mlp_ratio, proj_dropout)

        sizes = {
            "encoder": (encoder_embed_dim, encoder_depth, encoder_num_heads),
            "decoder": (decoder_embed_dim, decoder_depth, decoder_num_heads),
        }
        super().__init__(channels, length, sizes, block)
        self.solver = xar_euler_maruyama
        self.img_size, self.vae_stride, self.patch_size = img_size, vae_stride, patch_size
        self.vae_embed_dim, self.token_embed_dim = vae_embed_dim, channels
        self.seq_h = self.seq_w = side
        self.seq_len, self.clusters = length, clusters
        self.cluster_h = self.cluster_w = math.isqrt(clusters)
        self.num_classes, self.label_drop_prob, self.diffusion_batch_mul = class_num, label_drop_prob, diffusion_batch_mul
        self.time_embed = TimeEmbedding(encoder_embed_dim)
        self.pred = nn.Linear(decoder_embed_dim, channels)
        self.initialize()
        self.register_buffer("mask", block_causal_mask([length // clusters] * clusters))

    def window(self, x: Tensor, scale_index: int) -> slice:
        """Where the tokens x [B, N, dim], which end with the cell scale_index, are in the sequence."""
        end = (scale_index + 1) * self.seq_len // self.clusters
        return slice(end - x.shape[1], end)

    def forward_mae_encoder(
        self, x: Tensor, condition: Tensor, mask: Tensor | None, update_cache: bool = True, scale_index: int = 0
    ) -> Tensor:
        """x: [B, N, E]; condition: [cells * B, E]; mask: [1, 1, s, s], s tokens being known or drawn."""
        here = self.window(x, scale_index)
        mask = None if mask is None else mask[:, :, here]
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned[:, here])
        for block in self.encoder_blocks:
            x = block(x, condition, mask=mask, update_cache=update_cache, scale_index=scale_index)
        return self.encoder_norm(x)

    def forward_mae_decoder(
        self, x: Tensor, condition: Tensor, mask: Tensor | None, update_cache: bool = True, scale_index: int = 0
    ) -> Tensor:
        """[B, N, E] -> velocities [B, N, token_embed_dim]"""
        here = self.window(x, scale_index)
        mask = None if mask is None else mask[:, :, here, : here.stop]
        x = self.decoder_embed(x) + self.decoder_pos_embed_learned[:, here]
        for block in self.decoder_blocks:
            x = block(x, condition, mask=mask, update_cache=update_cache, scale_index=scale_index)
        return self.pred(self.decoder_norm(x))

    def sample_inference(
        self, x: Tensor, label: Tensor, time_input: Tensor, update_cache: bool, scale_index: int, mask: Tensor | None = None
    ) -> Tensor:
        """Velocity of the cell scale_index, [B, cell, C]. x: [B, N, C], one or two cells; label: [B]; time_input: [cells * B]."""
        e = self.time_embed((time_input * 1000).long())
        condition = self.class_emb(label.long()).repeat(len(e) // len(x), 1) + e
        x = self.forward_mae_encoder(self.z_proj(x), condition, mask, update_cache=update_cache, scale_index=scale_index)
        x = self.forward_mae_decoder(x, condition, mask, update_cache=update_cache, scale_index=scale_index)
        return x[:, -(self.seq_len // self.clusters) :] if update_cache else x

    def unclusterify(self, x: Tensor) -> Tensor:
        """[B, seq_len, C], cell by cell -> [B, C, h, w]"""
        cells, side = self.cluster_h, self.seq_h // self.cluster_h
        grid = x.reshape(len(x), cells, cells, side, side, -1)
        return torch.einsum("byxijc->bcyixj", grid).reshape(len(x), -1, self.seq_h, self.seq_w)

    @torch.no_grad()
    def sample_tokens(
        self, cfg: float = 1.0, label: Tensor | None = None, flow_upper_steps: int = 50, flow_lower_steps: int = 10
    ) -> Tensor:
        """[B] int64 labels, needed in spite of the default -> [B, C, h, w] latents."""
        for block in chain(self.encoder_blocks, self.decoder_blocks):
            block.attn.k, block.attn.v = None, None
        cell, last = self.seq_len // self.clusters, self.clusters - 1
        known, previous = None, None
        for step in range(self.clusters):
            end = (step + 1) * cell
            latents = torch.randn([len(label), cell, self.token_embed_dim]).to(self.mask.device)
            num_steps = int((last - step) / last * (flow_upper_steps - flow_lower_steps) + flow_lower_steps)
            previous = self.solver(
                self.sample_inference, latents, label, step, condition=previous, num_steps=num_steps,
                cfg_scale=(cfg - 1) * step / last + 1, mask=self.mask[:, :, :end, :end],
            ).float()  # fmt: skip
            known = previous if known is None else torch.cat([known, previous], dim=1)
        return self.unclusterify(known)


def xar_base(**kw) -> UpstreamXAR:
    """xAR-B. Keyword arguments of the model take precedence."""
    return UpstreamXAR(**(_alike(768, 8, 12) | kw))


def xar_large(**kw) -> UpstreamXAR:
    """xAR-L; see xar_base."""
    return UpstreamXAR(**(_alike(1024, 16, 16) | kw))


def xar_huge(**kw) -> UpstreamXAR:
    """xAR-H; see xar_base."""
    return UpstreamXAR(**(_alike(1280, 20, 16) | kw))
