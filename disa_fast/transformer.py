"""The adaLN transformer that FlowAR's backbone, FlowAR's flow head and xAR are made of: one block, and ways to compute its parts.

    h += gate1 * proj(attention(rms(h) * (1 + scale1) + shift1))
    h += cross_proj(cross_attention(rms(h) * g_q, rms(condition) * g_kv))          (FlowAR-L and -H's flow head alone)
    h += gate2 * fc2(gelu(fc1_g m) * fc1_x m),   m = rms(h) * (1 + scale2) + shift2

with 2D rotary positions stretched to a 16 x 16 grid (FlowAR_DiSA/models/flowmodel.py, xAR_DiSA/models/xar.py and rope.py of the
DiSA repository at 283fa59). The published code calls the gated unit SwiGLU and gives it GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-6
GRID = 16  # on a side; positions of other grids are stretched to it

Layer = tuple[Tensor, Tensor | None]
Rotation = tuple[Tensor, Tensor]
Norm = tuple[Tensor, Tensor | None]  # of rms(h) * (1 + scale) + shift, (scale, shift); of rms(h) * weight, (weight, None)
Stream = tuple[Tensor, Tensor | None, Tensor | None]  # (h, gate, x): h + gate * x, h + x, or h, the sum yet to be taken

GATED_MLP = ".mlp.fc"  # in the names of its parameters, and of no others


# Parameters ------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Rotary(nn.Module):
    """Where checkpoints keep the rotary frequencies, and xAR's also the tables made of them."""

    def __init__(self, head_dim: int, tables: Callable[[Tensor], Rotation] | None = None) -> None:
        super().__init__()
        half = head_dim // 2  # for the rows; the other half is for the columns
        self.register_buffer("freqs", 1.0 / 10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half))
        if tables is not None:
            cos, sin = tables(self.freqs)
            self.register_buffer("freqs_cos", cos)
            self.register_buffer("freqs_sin", sin)


class Attention(nn.Module):
    def __init__(self, dim: int, rope: Rotary, qkv_bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.rope = rope


class CrossAttention(nn.Module):
    def __init__(self, dim: int, condition_dim: int, rope: Rotary) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(condition_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.rope = rope


class GatedMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """Parameters of a block whose modulation depends on one condition for all tokens of a row: the backbones'."""

    def __init__(self, dim: int, mlp_ratio: float, rope: Rotary) -> None:
        super().__init__()
        self.attn = Attention(dim, rope, qkv_bias=True)
        self.mlp = GatedMlp(dim, gated_width(dim, mlp_ratio))
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))


def gated_width(dim: int, mlp_ratio: float = 4.0) -> int:
    """Hidden units of a gated MLP: two thirds of a plain one's."""
    return int(dim * mlp_ratio * 2 / 3.0)


def initialize_linears(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


# A block's parameters, by role -----------------------------------------------------------------------------------------


def in_dtype(p: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters and buffers for products in `dtype`, without a copy of what is in it already.

    Weights [out, in] and biases are cast. Norms, positions and rotary tables are elementwise factors and terms: as under
    torch.autocast they keep their own dtype, unless `dtype` is wider.
    """

    def cast(name: str, tensor: Tensor) -> Tensor:
        multiplied = name.endswith(".bias") or (name.endswith(".weight") and tensor.ndim == 2)
        return tensor.to(dtype if multiplied else torch.promote_types(tensor.dtype, dtype))

    return {name: cast(name, tensor) for name, tensor in p.items()}


@dataclass(frozen=True)
class CrossWeights:
    q: Layer
    kv: Layer
    proj: Layer
    norm_q: Tensor
    norm_kv: Tensor


@dataclass(frozen=True)
class BlockWeights:
    """Weights and biases as checkpoints have them; biases that are not there are None. mlp: fc1_g, fc1_x and fc2, or what
    `Plain.lay_out` of the parts that read it made of them."""

    qkv: Layer
    proj: Layer
    mlp: tuple[Layer, ...]
    cross: CrossWeights | None
    head_dim: int

    @classmethod
    def of(cls, p: Mapping[str, Tensor], prefix: str, ops: Plain | None = None) -> BlockWeights:
        def layer(name: str) -> Layer:
            return p[f"{prefix}{name}.weight"], p.get(f"{prefix}{name}.bias")

        cross = None
        if f"{prefix}crossattn.q.weight" in p:
            norms = (p[f"{prefix}norm2_1.weight"], p[f"{prefix}norm2_2.weight"])
            cross = CrossWeights(layer("crossattn.q"), layer("crossattn.kv"), layer("crossattn.proj"), *norms)
        mlp = (ops or PLAIN).lay_out(*(layer(f"mlp.{name}") for name in ("fc1_g", "fc1_x", "fc2")))
        return cls(layer("attn.qkv"), layer("attn.proj"), mlp, cross, 4 * len(p[f"{prefix}attn.rope.freqs"]))


@dataclass(frozen=True)
class Modulation:
    """What adaLN makes of the condition, each broadcastable to [rows, tokens, dim]."""

    gate1: Tensor
    gate2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor

    @classmethod
    def split(cls, projected: Tensor) -> Modulation:
        """Of [..., 6 * dim], the order of the published checkpoints."""
        return cls(*projected.chunk(6, dim=-1))

    @property
    def norm1(self) -> Norm:
        return self.scale1, self.shift1

    @property
    def norm2(self) -> Norm:
        return self.scale2, self.shift2


# Rotary positions ------------------------------------------------------------------------------------------------------


def grid_rotation(freqs: Tensor, side: int) -> Rotation:
    """(cos, sin), [side * side, 4 * len(freqs)] each, of the positions of a side x side grid in row-major order."""
    # The positions are float32 in the published code, whatever the frequencies are.
    angles = (torch.arange(side, dtype=torch.float32, device=freqs.device) / side * GRID)[:, None] * freqs
    angles = angles.repeat_interleave(2, dim=-1)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Each pair (x0, x1) of channels turned by its angle, in x's dtype. x: [..., tokens, head_dim]."""
    cos, sin = rotation
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-x1, x0], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """x over its root mean square, which is taken in float32 at least; in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + RMS_EPS)).to(x.dtype)
    return normed if weight is None else normed * weight


# The block -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Keys and values of a block's finished tokens, at full length from the start: [rows, heads, length, head_dim] each."""

    k: Tensor
    v: Tensor

    def put(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write k and v, [rows or fewer, heads, tokens, head_dim], at `start`; returns all up to their end, for these rows."""
        rows, end = len(k), start + k.shape[2]
        self.k[:rows, :, start:end] = k
        self.v[:rows, :, start:end] = v
        return self.k[:rows, :, :end], self.v[:rows, :, :end]


class Plain:
    """A block's parts in plain PyTorch, as the formulas read; differentiable.

    dropout: of attention weights, of projections. dtype: of products whose weights were cast to it, see `in_dtype`; the residual
    stream is then float32 or wider. None: everything is in the dtype of what it is given.
    """

    layout: ClassVar[str] = "as they lie"  # of a flow head's weights, those that `lay_out` copies apart from the others'
    captured: ClassVar[bool] = False  # whether a backend captures loops of these parts, so that weights come with graphs

    def __init__(self, dropout: tuple[float, float] = (0.0, 0.0), dtype: torch.dtype | None = None) -> None:
        self.attention_dropout, self.dropout = dropout
        self.dtype = dtype

    @staticmethod
    def lay_out(gate: Layer, up: Layer, down: Layer) -> tuple[Layer, ...]:
        """What `gated_mlp` is given of these."""
        return gate, up, down

    def linear(self, x: Tensor, layer: Layer) -> Tensor:
        return F.linear(x if self.dtype is None else x.to(self.dtype), *layer)

    def residual(self, x: Tensor) -> Tensor:
        """x in the dtype of the residual stream, which may be x itself."""
        return x if self.dtype is None else x.to(torch.promote_types(self.dtype, torch.float32))

    def norm_modulate(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return rms_norm(h) * (1 + scale) + shift

    def norm(self, h: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(h, weight)

    def qkv(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both turned) and values, [rows, heads, tokens, head_dim]."""
        q, k, v = self.linear(m, layer).unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
        return rotate(q, rotation), rotate(k, rotation), v

    def q(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> Tensor:
        return rotate(self.linear(m, layer).unflatten(-1, (-1, head_dim)).transpose(1, 2), rotation)

    def cached_qkv(
        self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation, cache: Cache, start: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As qkv, with keys and values put into the cache at `start`: all that it has up to their end."""
        q, k, v = self.qkv(m, layer, head_dim, rotation)
        return q, *cache.put(k, v, start)

    def kv(self, m: Tensor, layer: Layer, head_dim: int, rotation: Rotation) -> tuple[Tensor, Tensor]:
        k, v = self.linear(m, layer).unflatten(-1, (2, -1, head_dim)).permute(2, 0, 3, 1, 4)
        return rotate(k, rotation), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """[rows, tokens, dim]"""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.attention_dropout)
        return out.transpose(1, 2).flatten(2)

    def gated_mlp(self, m: Tensor, layers: tuple[Layer, ...]) -> Tensor:
        gate, up, down = layers
        hidden = F.gelu(self.linear(m, gate)) * self.linear(m, up)
        return self.linear(F.dropout(hidden, self.dropout, self.dropout > 0), down)

    def gated_residual(self, h: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
        """h + gate * x, or h + x without a gate. h may be overwritten: what is returned counts."""
        x = F.dropout(x, self.dropout, self.dropout > 0)
        return h + x if gate is None else h + gate * x

    def residual_norm(self, stream: Stream, norm: Norm) -> tuple[Tensor, Tensor]:
        """The stream's sum h, and its norm. What the stream holds may be overwritten."""
        (h, gate, x), (scale, shift) = stream, norm
        if x is not None:
            h = self.gated_residual(h, gate, x)
        return h, self.norm(h, scale) if shift is None else self.norm_modulate(h, scale, shift)


PLAIN = Plain()


def plain(dtype: torch.dtype, own: torch.dtype) -> Plain:
    """Plain parts with products in `dtype`, for parameters of which `own` is the dtype."""
    return PLAIN if dtype == own else Plain(dtype=dtype)


def cross_keys_values(ops: Plain, w: BlockWeights, condition: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """What cross-attention reads of the condition, [rows, tokens, condition_dim]: independent of state and time (H7)."""
    return ops.kv(ops.norm(condition, w.cross.norm_kv), w.cross.kv, w.head_dim, rotation)


def block(
    ops: Plain,
    w: BlockWeights,
    stream: Stream,
    modulation: Modulation,
    rotation: Rotation,
    cache: Cache | None = None,
    start: int = 0,
    mask: Tensor | None = None,
    cross: tuple[Tensor, Tensor] | None = None,
) -> Stream:
    """The formula at the top, but for its last sum, which whoever reads the stream takes together with a norm. stream: of
    [rows, tokens, dim], may be overwritten; attention is among these tokens (under `mask`), or also to those before `start` in the
    cache, where theirs are put; cross: what cross_keys_values made of the condition."""
    h, m = ops.residual_norm(stream, modulation.norm1)
    if cache is None:
        q, k, v = ops.qkv(m, w.qkv, w.head_dim, rotation)
    else:
        q, k, v = ops.cached_qkv(m, w.qkv, w.head_dim, rotation, cache, start)
    stream = h, modulation.gate1, ops.linear(ops.attend(q, k, v, mask), w.proj)
    if cross is not None:
        h, m = ops.residual_norm(stream, (w.cross.norm_q, None))
        q = ops.q(m, w.cross.q, w.head_dim, rotation)
        stream = h, None, ops.linear(ops.attend(q, *cross), w.cross.proj)
    h, m = ops.residual_norm(stream, modulation.norm2)
    return h, modulation.gate2, ops.gated_mlp(m, w.mlp)


# The backbone that FlowAR and xAR share --------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackboneWeights:
    """A backbone's parameters, by role."""

    input: Layer
    input_norm: Tensor
    encoder_position: Tensor
    encoder: tuple[BlockWeights, ...]
    encoder_norm: Tensor
    decoder_embed: Layer
    decoder_position: Tensor
    decoder: tuple[BlockWeights, ...]
    decoder_norm: Tensor
    ada_lin: tuple[Layer, ...]
    freqs: Tensor

    @classmethod
    def of(cls, p: Mapping[str, Tensor], ops: Plain | None = None) -> BackboneWeights:
        def blocks(part: str) -> list[str]:
            count = sum(name.startswith(f"{part}_blocks.") and name.endswith(".attn.qkv.weight") for name in p)
            return [f"{part}_blocks.{i}." for i in range(count)]

        encoder, decoder = blocks("encoder"), blocks("decoder")
        return cls(
            input=(p["z_proj.weight"], p["z_proj.bias"]),
            input_norm=p["z_proj_ln.weight"],
            encoder_position=p["encoder_pos_embed_learned"],
            encoder=tuple(BlockWeights.of(p, prefix, ops) for prefix in encoder),
            encoder_norm=p["encoder_norm.weight"],
            decoder_embed=(p["decoder_embed.weight"], p["decoder_embed.bias"]),
            decoder_position=p["decoder_pos_embed_learned"],
            decoder=tuple(BlockWeights.of(p, prefix, ops) for prefix in decoder),
            decoder_norm=p["decoder_norm.weight"],
            ada_lin=tuple((p[f"{prefix}ada_lin.1.weight"], p[f"{prefix}ada_lin.1.bias"]) for prefix in (*encoder, *decoder)),
            freqs=p["encoder_blocks.0.attn.rope.freqs"],
        )

    @property
    def dim(self) -> int:
        return len(self.encoder_norm)

    @property
    def blocks(self) -> tuple[BlockWeights, ...]:
        return self.encoder + self.decoder

    def caches(self, rows: int, dtype: torch.dtype | None = None) -> list[Cache]:
        """One for each block, for all positions; in `dtype`, or the parameters' own."""
        length = self.encoder_position.shape[1]
        shapes = [(rows, self.dim // w.head_dim, length, w.head_dim) for w in self.blocks]
        weight, _ = self.input
        return [Cache(*(weight.new_zeros(shape, dtype=dtype) for _ in range(2))) for shape in shapes]


def modulations(ops: Plain, w: BackboneWeights, condition: Tensor) -> list[Modulation]:
    """Of every block, from its condition, [..., dim]; broadcast over tokens where that is [rows, 1, dim]."""
    y = F.silu(condition)
    return [Modulation.split(ops.linear(y, layer)) for layer in w.ada_lin]


def transform(
    ops: Plain,
    w: BackboneWeights,
    x: Tensor,
    modulations: Sequence[Modulation],
    rotation: Rotation,
    caches: Sequence[Cache | None],
    start: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Encoder and decoder over embedded tokens x, [rows, tokens, dim], at positions from `start`. Returns the same shape."""
    here = slice(start, start + x.shape[1])
    steps = list(zip(w.blocks, modulations, caches, strict=True))
    stream = ops.residual(ops.norm(x + w.encoder_position[:, here], w.input_norm)), None, None
    for weights, modulation, cache in steps[: len(w.encoder)]:
        stream = block(ops, weights, stream, modulation, rotation, cache, start, mask)
    _, m = ops.residual_norm(stream, (w.encoder_norm, None))
    stream = ops.residual(ops.linear(m, w.decoder_embed) + w.decoder_position[:, here]), None, None
    for weights, modulation, cache in steps[len(w.encoder) :]:
        stream = block(ops, weights, stream, modulation, rotation, cache, start, mask)
    return ops.residual_norm(stream, (w.decoder_norm, None))[1]
