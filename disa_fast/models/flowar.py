"""FlowAR: scale-wise autoregressive generation with a flow-matching head (arXiv 2412.15205), annealed by DiSA.

A transformer sees the image so far, enlarged to the next scale, and its output conditions the flow head that draws all tokens of
that scale at once. Module and parameter names are those of the published checkpoints, so they load unchanged;
FlowAR_DiSA/models/flowar.py of the DiSA repository at 283fa59 is what this was written against.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import backends, profiling
from ..checks import check_dtype, check_flag, scalar, sized, whole
from ..heads.flow_transformer import HEAD_DIM, FlowTransformerHead, FlowTransformerNet, FlowTransformerSpec
from ..heads.mlp import Draw
from ..heads.packing import Packing
from ..schedule import Schedule
from ..solvers import Solver
from ..training import flow_loss
from ..transformer import GRID, BackboneWeights, Rotary, grid_rotation, in_dtype, modulations, transform
from ..untraced import untraced
from ..watch import TokenWatch, warn_of_temperature
from .backbone import Backbone, block_causal_mask
from .flow_sampling import FlowStep, batch_labels, drawn, is_guided, longest, plan, undisturbed
from .sizes import preset

SIZES: dict[str, dict[str, int | bool]] = {
    "small": {"embed_dim": 768, "depth": 6, "num_heads": 12, "diffloss_d": 2, "diffloss_w": 1024, "cross": False},
    "large": {"embed_dim": 1024, "depth": 8, "num_heads": 16, "diffloss_d": 12, "diffloss_w": 1024, "cross": True},
    "huge": {"embed_dim": 1536, "depth": 15, "num_heads": 16, "diffloss_d": 12, "diffloss_w": 1536, "cross": True},
}


def flowar(size: str | None = None, **kwargs) -> FlowAR:
    """A FlowAR with freshly initialised weights.

    size: "small", "large" or "huge" as published, head included; None: FlowAR's own defaults. Keyword arguments are FlowAR's and
    take precedence. ValueError for an unknown size.
    """
    return FlowAR(**(preset(SIZES, size) | kwargs))


def enlarged(tokens: Tensor, side: int) -> Tensor:
    """[B, C, s, s] of a scale -> [B, C, side, side] of the next: bicubic to 16 x 16, then the mean over areas, as upstream."""
    return F.interpolate(F.interpolate(tokens, (GRID, GRID), mode="bicubic"), (side, side), mode="area")


def as_sequence(grid: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C]"""
    return grid.flatten(2).transpose(1, 2)


class CastBackbone(Packing):
    """A FlowAR's backbone cast for products in another dtype than its parameters', kept and followed as Packing does.

    It sees the model's parameters and parts without holding the model, which is thus freed as soon as nobody else holds it.
    """

    any_parameter = "encoder_norm.weight"

    def __init__(self, model: FlowAR) -> None:
        seen = nn.Module()
        for held in ("_parameters", "_buffers", "_modules"):
            seen.__dict__[held] = model.__dict__[held]
        super().__init__(seen, None)

    def weights(self, dtype: torch.dtype) -> BackboneWeights:
        return self.packed(f"backbone in {dtype}", self.dtype, functools.partial(self._cast, dtype=dtype))

    @staticmethod
    def _cast(p: dict[str, Tensor], spec: None, dtype: torch.dtype) -> BackboneWeights:
        multiplied = {name: t for name, t in p.items() if not name.startswith(("flownet.", "class_emb."))}
        return BackboneWeights.of(in_dtype(multiplied, dtype))


class FlowAR(Backbone):
    """The model. Arguments carry upstream's names; see Backbone for images and tokens. scale: sides of the token grids that are
    drawn one after the other, the last that of the image."""

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
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        buffer_size: int = 0,
        diffloss_d: int = 3,
        diffloss_w: int = 1024,
        scale: Sequence[int] = (1, 2, 4, 8, 16),
        cross: bool = False,
    ) -> None:
        if buffer_size:
            raise ValueError(f"buffer_size: expected 0, with which alone the published sampler works, got {buffer_size}")
        side = img_size // vae_stride // patch_size
        if not isinstance(scale, Sequence):
            raise ValueError(f"scale: expected sides from 1 to the image's {side} tokens, got {scale!r}")
        scale = [whole("scale", s) for s in scale]
        if not scale or (scale[0], scale[-1]) != (1, side):
            raise ValueError(f"scale: expected sides from 1 to the image's {side} tokens, got {scale}")
        check_flag("cross", cross)
        if diffloss_w % HEAD_DIM:
            raise ValueError(f"diffloss_w: expected a multiple of {HEAD_DIM}, got {diffloss_w}")
        super().__init__(
            positions=sum(s * s for s in scale),
            rope=Rotary,
            img_size=img_size,
            vae_stride=vae_stride,
            patch_size=patch_size,
            encoder_embed_dim=encoder_embed_dim,
            encoder_depth=encoder_depth,
            encoder_num_heads=encoder_num_heads,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            mlp_ratio=mlp_ratio,
            vae_embed_dim=vae_embed_dim,
            label_drop_prob=label_drop_prob,
            class_num=class_num,
            attn_dropout=attn_dropout,
            proj_dropout=proj_dropout,
        )
        self.scale = scale
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros_like(self.decoder_pos_embed_learned))
        self._initialize()
        self.flownet = FlowTransformerNet(
            FlowTransformerSpec(self.token_embed_dim, diffloss_w, diffloss_d, decoder_embed_dim, cross)
        )
        self.register_buffer("mask", block_causal_mask([s * s for s in self.scale]))
        self.head = FlowTransformerHead.from_module(self.flownet)
        self._cast = CastBackbone(self)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Training loss, a scalar: the flow loss at every scale, each weighted by its share of the last one's tokens.

        images: [B, vae_embed_dim, H, W]; labels: [B] int64, dropped with label_drop_prob.
        """
        tokens = self.patchify(images)
        targets = [F.interpolate(tokens, (s, s), mode="area") for s in self.scale[:-1]] + [tokens]
        nothing = [tokens.new_zeros(len(tokens), 0, self.token_embed_dim)]
        inputs = [as_sequence(enlarged(t, s)) for t, s in zip(targets, self.scale[1:], strict=False)]
        inputs = torch.cat(nothing + inputs, dim=1)
        condition = self.class_emb(self.drop_labels(labels))[:, None]

        ops, w = self.training_ops(), BackboneWeights.of(self.named_tensors())
        x = torch.cat([condition, ops.linear(inputs, w.input)], dim=1)
        rotations = [grid_rotation(w.freqs, s) for s in self.scale]
        rotation = tuple(torch.cat(part) for part in zip(*rotations, strict=True))
        nowhere = [None] * len(w.blocks)
        z = transform(ops, w, x, modulations(ops, w, condition), rotation, nowhere, mask=self.mask)
        z = z + self.diffusion_pos_embed_learned

        loss = torch.zeros((), device=images.device)
        for s, target, condition_of_scale in zip(self.scale, targets, z.split([s * s for s in self.scale], dim=1), strict=True):
            t = torch.rand(len(images), 1, 1, device=images.device)
            velocity = functools.partial(self.flownet, t=t.flatten(), condition=condition_of_scale)
            loss = loss + flow_loss(velocity, as_sequence(target), t) * (s / self.scale[-1]) ** 2
        return loss

    def plan(self, schedule: Schedule | str, solver: str | Solver, cfg: float = 1.0) -> list[FlowStep]:
        """What `sample_tokens` does at each scale, with FlowAR's rounding of text schedules and its grid for "euler"."""
        return plan(len(self.scale), schedule, "flowar", solver, "flowar", cfg)

    @torch.no_grad()
    @untraced
    @undisturbed
    def sample_tokens(
        self,
        labels: Tensor | None,
        schedule: Schedule | str = "linear:25-15",
        cfg: float = 2.4,
        guidance: tuple[float, float] = (0.0, 0.9),
        solver: str | Solver = "euler",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        draw: Draw | None = None,
        progress: bool = False,
        backend: str = "auto",
        bsz: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Generate images: one AR step for each scale, step k's tokens in T(k) steps along the flow.

        labels: [B] int64 classes, or None for `bsz` images without one.
        schedule: T(k), a callable (k, K) -> int or its text form ("linear:25-15": DiSA's setting for FlowAR-S and -L, 50-15 for
            -H), whose rounding is then FlowAR's.
        cfg: guidance scale at the last scale, to which it grows linearly from 1; up to 1 there is none.
        guidance: (low, high); guidance is applied at times low <= t <= high alone.
        solver: "euler", on FlowAR's grid, "euler_maruyama", or a callable steps -> StepTable. temperature: factor on its noise.
        generator: source of noise; torch's global generator if None.
        draw: draw(shape, dtype) -> Tensor replaces `generator`, called in upstream's order and shapes.
        backend: of flow head and backbone, see FlowTransformerHead.denoise.
        dtype: of the products of flow head and backbone, see FlowTransformerHead.denoise; the parameters' own if None.

        Returns [B, vae_embed_dim, H, W] latents, float64 if dtype is, else float32. ValueError for arguments that do not fit.
        torch.autocast is not consulted, and torch.compile leaves all of this as it is.
        """
        own = self.encoder_norm.weight.dtype
        dtype = own if dtype is None else dtype
        check_dtype(dtype)
        labels, K, cfg = batch_labels(self, labels, bsz), len(self.scale), scalar("cfg", cfg)
        check_flag("progress", progress)
        steps = self.plan(schedule, solver, cfg)
        warn_of_temperature(longest(steps), temperature)
        self.head.follow()
        self._cast.follow()
        watch = TokenWatch()
        guided, batch = is_guided(steps, guidance), len(labels)
        drawn_rows = batch * (1 if cfg == 1.0 else 2)  # upstream doubles the batch then, guided or not
        rows = torch.cat([labels, torch.full_like(labels, self.no_class)]) if guided else labels

        w, device = BackboneWeights.of(self.named_tensors()) if dtype == own else self._cast.weights(dtype), labels.device
        ops = backends.BACKENDS[backends.choose(backend, self.head.spec, dtype, device, len(rows))].transformer_ops(dtype, own)
        condition = self.class_emb(rows)[:, None]
        x, start, caches, by_class = condition, 0, w.caches(len(rows)), modulations(ops, w, condition)
        for step in tqdm(steps, desc="scales", disable=not progress):
            side, table = self.scale[step.k], step.table
            with profiling.range(profiling.AR_STEP, step.k, K, len(table), len(rows) * side * side):
                z = transform(ops, w, x, by_class, grid_rotation(w.freqs, side), caches, start)
                z = z + self.diffusion_pos_embed_learned[:, start : start + side * side]
                noise, step_noise = drawn(table, (drawn_rows, side * side, self.token_embed_dim), draw, generator, device)
                both = guided and step.cfg > 1
                tokens = self.head.denoise(
                    z if both else z[:batch], table, step.cfg if both else 1.0, guidance, temperature,
                    noise[:batch], None if step_noise is None else step_noise[:, :batch], backend=backend, dtype=dtype,
                )[:batch]  # fmt: skip
                watch.add(step.k, K, tokens)
                grid = tokens.transpose(1, 2).unflatten(2, (side, side))
                start += side * side
                if step.k + 1 < K:
                    x = ops.linear(as_sequence(enlarged(grid, self.scale[step.k + 1])).to(dtype), w.input)
                    x = torch.cat([x, x]) if guided else x
        watch.warn()
        return self.unpatchify(grid)
