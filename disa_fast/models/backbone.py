"""What FlowAR and xAR have in common as modules: images as tokens, and an encoder and a decoder of adaLN blocks over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformer import PLAIN, Block, Plain, RMSNorm, Rotary, initialize_linears
from .sizes import check_backbone


class Backbone(nn.Module):
    """An encoder and a decoder of such blocks, with the names of the published checkpoints; images as tokens.

    Images are [batch, vae_embed_dim, height, width] latents of img_size / vae_stride on a side (vae_stride = 1 and
    vae_embed_dim = 1: pixels), cut into patch_size x patch_size tokens. The class `class_num` stands for none.
    """

    def __init__(
        self,
        positions: int,
        rope: Callable[[int], Rotary],
        img_size: int,
        vae_stride: int,
        patch_size: int,
        encoder_embed_dim: int,
        encoder_depth: int,
        encoder_num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        mlp_ratio: float,
        vae_embed_dim: int,
        label_drop_prob: float,
        class_num: int,
        attn_dropout: float,
        proj_dropout: float,
    ) -> None:
        super().__init__()
        if (encoder_embed_dim, encoder_num_heads) != (decoder_embed_dim, decoder_num_heads):
            raise ValueError(
                "decoder_embed_dim, decoder_num_heads: class embedding and rotations serve both halves, so expected "
                f"the encoder's {encoder_embed_dim} and {encoder_num_heads}, got {decoder_embed_dim} and {decoder_num_heads}"
            )
        check_backbone(img_size, vae_stride, patch_size, mlp_ratio, (encoder_embed_dim,))
        if encoder_embed_dim % (4 * encoder_num_heads):
            raise ValueError(
                f"encoder_num_heads: expected heads of a multiple of 4 channels, got {encoder_num_heads} for {encoder_embed_dim}"
            )
        self.patch_size = patch_size
        self.vae_embed_dim = vae_embed_dim
        self.seq_h = self.seq_w = img_size // vae_stride // patch_size
        self.token_embed_dim = vae_embed_dim * patch_size**2
        self.label_drop_prob = label_drop_prob
        self.dropout = attn_dropout, proj_dropout

        dim = encoder_embed_dim
        self.class_emb = nn.Embedding(class_num + 1, dim)
        self.z_proj = nn.Linear(self.token_embed_dim, dim)
        self.z_proj_ln = RMSNorm(dim)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, dim))
        self.encoder_blocks = nn.ModuleList(Block(dim, mlp_ratio, rope(dim // encoder_num_heads)) for _ in range(encoder_depth))
        self.encoder_norm = RMSNorm(dim)
        self.decoder_embed = nn.Linear(dim, dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, dim))
        self.decoder_blocks = nn.ModuleList(Block(dim, mlp_ratio, rope(dim // encoder_num_heads)) for _ in range(decoder_depth))
        self.decoder_norm = RMSNorm(dim)

    def _initialize(self) -> None:
        initialize_linears(self)
        for name, parameter in self.named_parameters():
            if name.endswith("_learned") or name == "class_emb.weight":
                nn.init.normal_(parameter, std=0.02)

    @property
    def no_class(self) -> int:
        return self.class_emb.num_embeddings - 1

    def patchify(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C * patch_size^2, h, w], one token a position; channels ordered (C, row, column)."""
        return F.pixel_unshuffle(images, self.patch_size)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """The inverse of patchify."""
        return F.pixel_shuffle(tokens, self.patch_size)

    def drop_labels(self, labels: Tensor) -> Tensor:
        """In training, no class in place of label_drop_prob of them."""
        if not self.training:
            return labels
        return torch.where(torch.rand(labels.shape, device=labels.device) < self.label_drop_prob, self.no_class, labels)

    def named_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def training_ops(self) -> Plain:
        return Plain(self.dropout) if self.training else PLAIN


def block_causal_mask(sizes: Sequence[int]) -> Tensor:
    """[1, 1, n, n] float32: 0 where a token may attend, which is to its own part and those before it, else -inf."""
    part = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)])
    return torch.zeros(len(part), len(part)).masked_fill(part[:, None] < part, -torch.inf)[None, None]
