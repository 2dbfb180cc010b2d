"""MAR: masked autoregressive image generation with a diffusion head (arXiv 2406.11838), annealed by DiSA.

A ViT encoder sees the known tokens (and `buffer_size` class tokens), a ViT decoder puts mask tokens in the gaps, and each gap's
output conditions the diffusion head that draws its token. Module and parameter names are those of the published checkpoints, so
they load unchanged; MAR_DiSA/models/mar.py of the DiSA repository at 283fa59 is what this was written against.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_labels, describe, is_dense, scalar, sized, whole
from ..heads.mlp import Draw, MLPHead, MLPNet, MLPSpec
from ..philox import Philox
from ..schedule import Schedule
from ..solvers import DEFAULT_CLIP, Solver
from ..training import diffusion_loss
from ..untraced import untraced
from .masked_sampling import masked_by, random_orders, sample_masked
from .sizes import check_backbone, preset

LN_EPS = 1e-6
# Half a normal distribution around mask ratio 1, cut at mask_ratio_min.
MASK_RATIO_STD = 0.25

SIZES: dict[str, dict[str, int]] = {
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "diffloss_d": 6, "diffloss_w": 1024},
    "large": {"embed_dim": 1024, "depth": 16, "num_heads": 16, "diffloss_d": 8, "diffloss_w": 1280},
    "huge": {"embed_dim": 1280, "depth": 20, "num_heads": 16, "diffloss_d": 12, "diffloss_w": 1536},
}


def mar(size: str | None = None, **kwargs) -> MAR:
    """A MAR with freshly initialised weights.

    size: "base", "large" or "huge" as published, head included; None: MAR's own defaults. Keyword arguments are MAR's and
    take precedence. ValueError for an unknown size.
    """
    return MAR(**(preset(SIZES, size) | kwargs))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, attn_dropout: float, proj_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_dropout if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm ViT block, (batch, tokens, dim) -> same."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, attn_dropout: float, proj_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LN_EPS)
        self.attn = Attention(dim, num_heads, attn_dropout, proj_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=LN_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DiffLoss(nn.Module):
    """Where the published checkpoints keep the head: diffloss.net.*"""

    def __init__(self, spec: MLPSpec) -> None:
        super().__init__()
        self.net = MLPNet(spec)


class MAR(nn.Module):
    """The model. Arguments carry upstream's names; images are [batch, vae_embed_dim, height, width] latents, of
    img_size / vae_stride on a side (vae_stride = 1 and vae_embed_dim = 1: pixels), cut into patch_size x patch_size tokens."""

    @sized
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
    ) -> None:
        super().__init__()
        check_backbone(img_size, vae_stride, patch_size, mlp_ratio, (encoder_embed_dim, decoder_embed_dim))
        if buffer_size < 1:
            raise ValueError(f"buffer_size: expected at least 1 token for the class, got {buffer_size}")
        backbone = {"encoder": (encoder_embed_dim, encoder_num_heads), "decoder": (decoder_embed_dim, decoder_num_heads)}
        for part, (dim, heads) in backbone.items():
            if dim % heads:
                raise ValueError(f"{part}_num_heads: expected a divisor of {dim} channels, got {heads}")
        self.vae_stride = vae_stride
        self.patch_size = patch_size
        self.vae_embed_dim = vae_embed_dim
        self.seq_h = self.seq_w = img_size // vae_stride // patch_size
        self.seq_len = self.seq_h * self.seq_w
        self.token_embed_dim = vae_embed_dim * patch_size**2
        self.buffer_size = buffer_size
        self.mask_ratio_min = mask_ratio_min
        self.label_drop_prob = label_drop_prob
        self.diffusion_batch_mul = diffusion_batch_mul

        self.class_emb = nn.Embedding(class_num, encoder_embed_dim)
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_embed_dim))

        self.z_proj = nn.Linear(self.token_embed_dim, encoder_embed_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_embed_dim, eps=LN_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, buffer_size + self.seq_len, encoder_embed_dim))
        self.encoder_blocks = nn.ModuleList(
            Block(encoder_embed_dim, encoder_num_heads, mlp_ratio, attn_dropout, proj_dropout) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_embed_dim, eps=LN_EPS)

        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, buffer_size + self.seq_len, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, attn_dropout, proj_dropout) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=LN_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, decoder_embed_dim))
        self._initialize()

        self.diffloss = DiffLoss(MLPSpec(self.token_embed_dim, diffloss_w, diffloss_d, decoder_embed_dim))
        self.head = MLPHead.from_module(self.diffloss.net)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("_learned", "mask_token", "fake_latent", "class_emb.weight")):
                nn.init.normal_(parameter, std=0.02)

    # Tokens ----------------------------------------------------------------------------------------------------------

    def patchify(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, seq_len, C * patch_size^2], channels of a token ordered (C, row, column)."""
        p = self.patch_size
        x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The inverse of patchify. grid: rows and columns of tokens, if not those of the model's own images."""
        p = self.patch_size
        x = tokens.reshape(-1, *(grid or (self.seq_h, self.seq_w)), self.vae_embed_dim, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    # Backbone --------------------------------------------------------------------------------------------------------

    def positions(self, learned: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """[1, buffer tokens if any + tokens, dim]: position embeddings for another grid, interpolated bilinearly."""
        if grid in (None, (self.seq_h, self.seq_w)):
            return learned
        buffer, image = learned.split([learned.shape[1] - self.seq_len, self.seq_len], dim=1)
        image = image.transpose(1, 2).unflatten(2, (self.seq_h, self.seq_w))
        return torch.cat([buffer, F.interpolate(image, grid, mode="bilinear").flatten(2).transpose(1, 2)], dim=1)

    def encode(self, tokens: Tensor, masked: Tensor, class_embedding: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Known tokens and the class -> [B, buffer_size + known, dim].

        tokens: [B, seq_len, token_embed_dim]; masked: [B, seq_len] bool, equally many in each row; class_embedding: [B, dim];
        grid: rows and columns of tokens, if not those of the model's own images.
        """
        x = self.z_proj(tokens)
        x = torch.cat([class_embedding[:, None].to(x.dtype).expand(-1, self.buffer_size, -1), x], dim=1)
        x = self.z_proj_ln(x + self.positions(self.encoder_pos_embed_learned, grid))
        x = x[~F.pad(masked, (self.buffer_size, 0))].reshape(len(x), -1, x.shape[-1])
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x: Tensor, masked: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Encoder output -> the head's condition for every token, [B, seq_len, decoder_embed_dim]."""
        x = self.decoder_embed(x)
        known = ~F.pad(masked, (self.buffer_size, 0))
        full = self.mask_token.to(x.dtype).expand(len(x), known.shape[1], -1).clone()
        full[known] = x.flatten(0, 1)
        x = full + self.positions(self.decoder_pos_embed_learned, grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.positions(self.diffusion_pos_embed_learned, grid)

    # Training --------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Training loss, a scalar: the head's diffusion loss on the masked tokens.

        images: [B, vae_embed_dim, H, W]; labels: [B] int64. The mask ratio is one draw a batch from the upper-truncated normal
        of upstream; labels are dropped with label_drop_prob. Only masked tokens reach the head: the others carry weight
        zero in upstream's loss.
        """
        tokens = self.patchify(images)
        batch, device = len(tokens), tokens.device
        masked = self.random_mask(batch)

        class_embedding = self.class_emb(labels)
        if self.training:
            drop = torch.rand(batch, 1, device=device) < self.label_drop_prob
            class_embedding = torch.where(drop, self.fake_latent, class_embedding)
        return self.loss(tokens, self.decode(self.encode(tokens, masked, class_embedding), masked), masked)

    def loss(self, tokens: Tensor, z: Tensor, masked: Tensor) -> Tensor:
        """The head's diffusion loss on the masked tokens, each diffusion_batch_mul times; a scalar."""
        repeats = (self.diffusion_batch_mul, 1)
        return diffusion_loss(self.diffloss.net, tokens[masked].repeat(repeats), z[masked].repeat(repeats))

    def random_mask(self, batch: int) -> Tensor:
        """[batch, seq_len] bool: which tokens to learn from, equally many of each image. One draw of the mask ratio."""
        orders = random_orders(batch, self.seq_len, None, self.fake_latent.device)
        return masked_by(orders, math.ceil(self.seq_len * self._mask_ratio()))

    def _mask_ratio(self) -> float:
        """1 - |N(0, 0.25)| conditioned on being at least mask_ratio_min, by inverting the normal's distribution function."""
        normal = torch.distributions.Normal(0.0, 1.0)
        low = normal.cdf(torch.tensor((self.mask_ratio_min - 1) / MASK_RATIO_STD))
        return float(1 + MASK_RATIO_STD * normal.icdf(low + (0.5 - low) * torch.rand(())))

    # Sampling --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_tokens(
        self,
        labels: Tensor | None,
        schedule: Schedule | str = "linear:50-5",
        num_iter: int = 64,
        cfg: float = 3.0,
        cfg_schedule: str = "linear",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        orders: Tensor | None = None,
        draw: Draw | None = None,
        progress: bool = False,
        backend: str = "auto",
        solver: str | Solver = "ddpm",
        clip: int | str | None = DEFAULT_CLIP,
        bsz: int | None = None,
        rng: str | Philox = "torch",
    ) -> Tensor:
        """Generate images: `num_iter` autoregressive iterations, iteration k's tokens in T(k) denoising steps.

        labels: [B] int64 classes, or None for `bsz` unconditional images.
        schedule: T(k), a callable (k, K) -> int or its text form ("linear:50-5": DiSA's setting for MAR).
        cfg: guidance scale; 1 is none. cfg_schedule: "linear" (grows with the share of tokens known) or "constant".
        temperature: factor on the head's step noise.
        generator: source of orders and noise; torch's global generator if None.
        orders: [B, seq_len] int64, each row a permutation; drawn if None.
        draw: draw(shape, dtype) -> Tensor replaces `generator` for the head's noise, called in upstream's order and shapes.
        solver, clip: see disa_fast.solvers.resolve. backend: see MLPHead.denoise.
        rng: "torch", "philox" or a disa_fast.Philox, as in MLPHead.denoise, for the head's noise; `draw` must then be None, and
            with a Philox `generator` gives the orders alone. Its streams are numbers of images, [B] or None for 0, 1, 2, ...:
            the token at position p of image i draws from stream i * seq_len + p, whenever and beside whatever it is drawn.

        Returns [B, vae_embed_dim, H, W] latents. Raises ValueError for arguments that do not fit, among them more
        iterations than tokens. torch.compile compiles the backbone, and leaves the rest as it is.
        """
        batch, cfg = self._batch_size(labels, orders, bsz), scalar("cfg", cfg)
        guided = cfg != 1.0
        class_embedding = self.fake_latent.expand(batch, -1) if labels is None else self.class_emb(labels)
        if guided:
            class_embedding = torch.cat([class_embedding, self.fake_latent.expand(batch, -1)])
        tokens = sample_masked(
            lambda known, masked: self.decode(self.encode(known, masked, class_embedding), masked),
            self.head, batch, self.seq_len, self.token_embed_dim,
            schedule, num_iter, cfg, cfg_schedule, temperature, generator, orders, draw, progress, backend, solver, clip, rng,
        )  # fmt: skip
        return self.unpatchify(tokens)

    @untraced
    def _batch_size(self, labels: Tensor | None, orders: Tensor | None, bsz: int | None) -> int:
        classes, device = self.class_emb.num_embeddings, self.fake_latent.device
        if labels is not None:
            check_labels(labels, classes, device)
        if orders is not None and not (is_dense(orders) and orders.ndim == 2):
            raise ValueError(f"orders: expected a [B, {self.seq_len}] tensor or None, got {describe(orders)}")
        given = {name: len(value) for name, value in {"labels": labels, "orders": orders}.items() if value is not None}
        given |= {} if bsz is None else {"bsz": whole("bsz", bsz)}
        if len(set(given.values())) != 1 or 0 in given.values():
            raise ValueError(f"labels, orders, bsz: expected one batch size, at least 1, got {given or 'none of them'}")
        return next(iter(given.values()))
