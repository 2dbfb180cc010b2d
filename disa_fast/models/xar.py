"""xAR: next-cell prediction, the whole transformer being the flow network (arXiv 2502.20388), annealed by DiSA.

An image is a few cells of neighbouring tokens. Each cell is integrated from noise by the transformer, which attends to the
finished cells through a cache of their keys and values. Module and parameter names are those of the published checkpoints, so they
load unchanged; xAR_DiSA/models/xar.py of the DiSA repository at 283fa59 is what this was written against.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import profiling
from ..checks import check_dtype, check_flag, sized
from ..heads.cell_transformer import CellTransformerHead
from ..heads.flow_transformer import time_index
from ..heads.mlp import FREQUENCIES, Draw, embed_time
from ..schedule import Schedule
from ..solvers import Solver
from ..training import flow_loss
from ..transformer import BackboneWeights, Rotary, Rotation, grid_rotation, modulations, transform
from ..untraced import untraced
from ..watch import TokenWatch, warn_of_temperature
from .backbone import Backbone, block_causal_mask
from .flow_sampling import FlowStep, batch_labels, drawn, is_guided, longest, plan, undisturbed
from .sizes import preset

SIZES: dict[str, dict[str, int]] = {
    "base": {"embed_dim": 768, "depth": 8, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 16, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 20, "num_heads": 16},
}


def xar(size: str | None = None, **kwargs) -> XAR:
    """An xAR with freshly initialised weights.

    size: "base", "large" or "huge" as published; None: XAR's own defaults. Keyword arguments are XAR's and take
    precedence. ValueError for an unknown size.
    """
    return XAR(**(preset(SIZES, size) | kwargs))


def clusterify(grid: Tensor, on_a_side: int) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C]: cell after cell, row-major, and row-major in each."""
    cells = grid.unflatten(3, (on_a_side, -1)).unflatten(2, (on_a_side, -1))  # (B, C, cell row, row, cell column, column)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(1, 4)


def unclusterify(tokens: Tensor, on_a_side: int) -> Tensor:
    """The inverse of clusterify, for a square grid."""
    side = math.isqrt(tokens.shape[1]) // on_a_side
    cells = tokens.unflatten(1, (on_a_side, on_a_side, side, side))
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _tables(freqs: Tensor, side: int, on_a_side: int) -> Rotation:
    """The rotations of a side x side grid, in the order of its cells."""
    return tuple(
        clusterify(table.unflatten(0, (side, side)).permute(2, 0, 1)[None], on_a_side)[0] for table in grid_rotation(freqs, side)
    )


class XAR(Backbone):
    """The model. Arguments carry upstream's names; see Backbone for images and tokens. clusters: cells of an image, a square
    number."""

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
        clusters: int = 4,
    ) -> None:
        side, on_a_side = img_size // vae_stride // patch_size, math.isqrt(clusters)
        if on_a_side**2 != clusters or side % on_a_side:
            raise ValueError(f"clusters: expected a square number whose root divides the {side} tokens on a side, got {clusters}")
        tables = functools.partial(_tables, side=side, on_a_side=on_a_side)
        super().__init__(
            positions=side * side,
            rope=functools.partial(Rotary, tables=tables),
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
        self.clusters = clusters
        dim = encoder_embed_dim
        self.time_embed = nn.Module()
        self.time_embed.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.pred = nn.Linear(dim, self.token_embed_dim)
        self.register_buffer("mask", block_causal_mask([side * side // clusters] * clusters))
        self._initialize()
        self.head = CellTransformerHead.from_module(self, clusters)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Training loss, a scalar: the flow loss of all cells, each at a time of its own and seeing the noisy ones before it.

        images: [B, vae_embed_dim, H, W]; labels: [B] int64, dropped with label_drop_prob. Times are the logistic of a normal.
        """
        target = clusterify(self.patchify(images), math.isqrt(self.clusters))
        p = self.named_tensors()
        ops, w = self.training_ops(), BackboneWeights.of(p)
        t = torch.randn(len(images), self.clusters, device=images.device).sigmoid()
        e = embed_time(p, time_index(t).flatten()).unflatten(0, t.shape)
        condition = self.class_emb(self.drop_labels(labels))[:, None] + e
        per_cell = target.shape[1] // self.clusters
        of_tokens = condition.repeat_interleave(per_cell, dim=1)
        rotation = p["encoder_blocks.0.attn.rope.freqs_cos"], p["encoder_blocks.0.attn.rope.freqs_sin"]
        nowhere = [None] * len(w.blocks)

        def velocity(x: Tensor) -> Tensor:
            h = transform(ops, w, ops.linear(x, w.input), modulations(ops, w, of_tokens), rotation, nowhere, mask=self.mask)
            return self.pred(h)

        return flow_loss(velocity, target, t.repeat_interleave(per_cell, dim=1)[..., None])

    def plan(self, schedule: Schedule | str, solver: str | Solver, cfg: float = 1.0) -> list[FlowStep]:
        """What `sample_tokens` does at each cell, with xAR's rounding of text schedules and a uniform grid for "euler"."""
        return plan(self.clusters, schedule, "xar", solver, "uniform", cfg)

    @torch.no_grad()
    @untraced
    @undisturbed
    def sample_tokens(
        self,
        labels: Tensor | None,
        schedule: Schedule | str = "linear:50-15",
        cfg: float = 2.7,
        guidance: tuple[float, float] = (0.0, 1.0),
        solver: str | Solver = "euler_maruyama",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        draw: Draw | None = None,
        progress: bool = False,
        backend: str = "auto",
        bsz: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Generate images: one AR step for each cell, step k's tokens in T(k) steps along the flow.

        labels: [B] int64 classes, or None for `bsz` images without one.
        schedule: T(k), a callable (k, K) -> int or its text form ("linear:50-15": DiSA's setting for xAR), whose rounding is then
            xAR's.
        cfg: guidance scale at the last cell, to which it grows linearly from 1; up to 1 there is none.
        guidance: (low, high); guidance is applied at times low <= t <= high alone.
        solver: "euler_maruyama", "euler", on a uniform grid, or a callable steps -> StepTable. temperature: factor on its noise.
        generator: source of noise; torch's global generator if None.
        draw: draw(shape, dtype) -> Tensor replaces `generator`, called in upstream's order and shapes.
        backend: see FlowTransformerHead.denoise.
        dtype: of the transformer's products, and of its cached keys and values; the parameters' own if None. See
            FlowTransformerHead.denoise.

        Returns [B, vae_embed_dim, H, W] latents, float64 if dtype is, else float32. ValueError for arguments that do not fit.
        torch.autocast is not consulted, and torch.compile leaves all of this as it is. One step for a cell works, and two are two
        (upstream fails with one step, and with two in a cell between first and last).
        """
        dtype = self.head.dtype if dtype is None else dtype
        check_dtype(dtype)
        labels, K = batch_labels(self, labels, bsz), self.clusters
        check_flag("progress", progress)
        steps = self.plan(schedule, solver, cfg)
        warn_of_temperature(longest(steps), temperature)
        self.head.follow()
        watch = TokenWatch()
        guided, batch = is_guided(steps, guidance), len(labels)
        rows = torch.cat([labels, torch.full_like(labels, self.no_class)]) if guided else labels
        context, per_cell, cells = self.head.begin(rows, dtype), self.head.tokens_of_a_cell, []
        for step in tqdm(steps, desc="cells", disable=not progress):
            at = step.k * per_cell
            with profiling.range(profiling.AR_STEP, step.k, K, len(step.table), len(rows) * per_cell):
                if cells:
                    self.head.finish(context, at - per_cell, torch.cat([cells[-1]] * (1 + guided)), backend)
                noise, step_noise = drawn(step.table, (batch, per_cell, self.token_embed_dim), draw, generator, labels.device)
                cell = self.head.denoise(
                    context, at, step.table, step.cfg, guidance, temperature, noise, step_noise, backend=backend, guided_rows=guided
                )
                watch.add(step.k, K, cell)
                cells.append(cell.to(torch.promote_types(dtype, torch.float32)))
        watch.warn()
        return self.unpatchify(unclusterify(torch.cat(cells, dim=1), math.isqrt(K)))
