"""xAR's head: the whole transformer, which predicts the velocity of a cell's tokens and attends to the cells before.

For tokens x at time t, [rows, tokens, channels], of a cell whose predecessors are in the cache of keys and values
(arXiv 2502.20388, section 3.2; xAR_DiSA/models/xar.py of the DiSA repository at 283fa59):

    y = class embedding + time_embed(trunc(1000 t));  h = z_proj(x)
    v = pred(transform(h))    every block modulated by W silu(y) + b (disa_fast/transformer.py)

A finished cell passes once, at t = 0, for its keys and values. The published code has it share a pass with the first step of the
next cell, under a mask; that computes the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, graphs
from ..solvers import StepTable
from ..transformer import (
    BackboneWeights,
    Cache,
    Layer,
    Modulation,
    Plain,
    Rotation,
    in_dtype,
    modulations,
    plain,
    transform,
)
from ..untraced import untraced
from .flow import Context, FlowHead, FlowWeights, Velocity, check_table, chunk_from, draw_flow_noise
from .flow_transformer import embed_flow_time
from .mlp import TimeTables, draws_of
from .packing import named_tensors

KEYS, VALUES = "keys.{}", "values.{}"  # of a block, in the context
CLASSES = "class_emb.weight"  # looked up, not multiplied


@dataclass(frozen=True)
class CellTransformerSpec:
    """Sizes: depth counts the blocks of encoder and decoder, tokens those of all cells."""

    loop: ClassVar[str] = "integrate"  # the function of a backend that runs it

    in_channels: int
    width: int
    depth: int
    tokens: int
    cells: int

    @property
    def z_channels(self) -> int:
        """Of the condition."""
        return self.width


class CellTransformerWeights(FlowWeights):
    def __init__(self, p: Mapping[str, Tensor], spec: CellTransformerSpec, dtype: torch.dtype, ops: Plain) -> None:
        p = in_dtype({name: tensor for name, tensor in p.items() if name != CLASSES}, dtype)
        self.backbone = BackboneWeights.of(p, ops)
        self.output: Layer = p["pred.weight"], p["pred.bias"]
        rope = "encoder_blocks.0.attn.rope.freqs_"
        self.rotations = p[rope + "cos"], p[rope + "sin"]
        of_time = {name: tensor for name, tensor in p.items() if name.startswith("time_embed.")}
        self.embed_time = functools.partial(embed_flow_time, of_time)
        self.time_table = TimeTables(self.embed_time, self.output[0].device)
        super().__init__(ops, self.output[0].device)

    def rotation(self, at: int, tokens: int) -> Rotation:
        return tuple(table[at : at + tokens] for table in self.rotations)


def forward_ref(
    w: CellTransformerWeights, ops: Plain, x: Tensor, t: Tensor, at: int, condition: Tensor, **keys_values: Tensor
) -> Tensor:
    """The network, as the formula above reads. x: [rows, tokens, in_channels] of the cell at position `at`, t: [rows], condition:
    [rows, width], keys and values: see CellTransformerHead.begin. Returns the velocity, [rows, tokens, in_channels]."""
    y = (condition + w.embed_time(t))[:, None]
    h = ops.linear(x, w.backbone.input)
    rotation, caches = w.rotation(at, x.shape[1]), caches_of(keys_values)
    return ops.linear(transform(ops, w.backbone, h, modulations(ops, w.backbone, y), rotation, caches, at), w.output)


def dtype_of(context: Context) -> torch.dtype:
    """Of the network's products, in which its keys and values are kept."""
    return context[KEYS.format(0)].dtype


def caches_of(context: Context) -> list[Cache]:
    count = sum(name.startswith(KEYS.format("")) for name in context)
    return [Cache(context[KEYS.format(i)], context[VALUES.format(i)]) for i in range(count)]


class CellTransformerHead(FlowHead):
    """xAR's transformer, ready to draw cells: `begin`, then `denoise` and `finish` for one cell after the other. See Packing for
    how it follows its parameters."""

    spec: CellTransformerSpec
    any_parameter = "z_proj.weight"
    weights_type = CellTransformerWeights

    @classmethod
    def from_module(cls, net: nn.Module, cells: int) -> CellTransformerHead:
        """The head of a module with xAR's parameter names (its own forward is not used)."""
        width, in_channels = net.get_parameter("z_proj.weight").shape
        depth = len(net.get_submodule("encoder_blocks")) + len(net.get_submodule("decoder_blocks"))
        tokens = net.get_parameter("encoder_pos_embed_learned").shape[1]
        return cls(net, CellTransformerSpec(in_channels, width, depth, tokens, cells))

    @property
    def tokens_of_a_cell(self) -> int:
        return self.spec.tokens // self.spec.cells

    @untraced
    def begin(self, labels: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The context of an image without a cell: `condition`, the embeddings of labels [rows], and room for the keys and values of
        all its tokens, `keys.0`, `values.0`, `keys.1`, ..., [rows, heads, tokens, head_dim] each, one of both for each block.

        dtype: of the products of `finish` and `denoise` with this context, and of its keys and values; the parameters' own if
        None. The condition is in the parameters' dtype.
        """
        dtype = self.dtype if dtype is None else dtype
        caches = BackboneWeights.of(named_tensors(self._net)).caches(len(labels), dtype)
        context = {"condition": F.embedding(labels, self._net.get_parameter(CLASSES).detach())}
        for i, cache in enumerate(caches):
            context |= {KEYS.format(i): cache.k, VALUES.format(i): cache.v}
        return context

    @torch.no_grad()
    @untraced
    def finish(self, context: Context, at: int, tokens: Tensor, backend: str = "auto") -> None:
        """Put the keys and values of a finished cell's tokens, [rows, tokens, in_channels], at position `at` into the context."""
        rows, dtype = tokens.shape[0] * tokens.shape[1], dtype_of(context)
        chosen = backends.choose(backend, self.spec, dtype, self.device, rows)
        ops = backends.BACKENDS[chosen].transformer_ops(dtype, self.dtype)
        w = self.weights(dtype, ops)
        y = (context["condition"] + w.embed_time(torch.zeros(1, device=tokens.device)))[:, None]
        x = ops.linear(tokens.to(dtype), w.backbone.input)
        rotation = w.rotation(at, tokens.shape[1])
        with graphs.on_device(self.device):
            transform(ops, w.backbone, x, modulations(ops, w.backbone, y), rotation, caches_of(context), at)

    @torch.no_grad()
    @untraced
    def denoise(
        self,
        context: Context,
        at: int,
        table: StepTable,
        cfg: float = 1.0,
        guidance: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
        guided_rows: bool = False,
    ) -> Tensor:
        """Draw the cell at position `at`: the whole loop along the flow. Arguments as FlowTransformerHead.denoise has them, noise
        for each image. guided_rows: the context's second half is unconditional. Returns [images, tokens, in_channels] float64."""
        check_table(table)
        condition, halves, size = context["condition"], 1 + guided_rows, (self.tokens_of_a_cell, self.spec.in_channels)
        shape = (len(condition) // halves, *size)
        noise, step_noise = draw_flow_noise(table, shape, *draws_of(generator, condition.device), noise, step_noise)
        dtype = dtype_of(context)
        return self._denoise(context, at, size, table, cfg, guidance, temperature, noise, step_noise, backend, dtype, halves)

    # What backends build on --------------------------------------------------------------------------------------------

    def network(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        return functools.partial(forward_ref, self.weights(dtype), plain(dtype, self.dtype))

    def hoisted(
        self, ops: Plain, w: CellTransformerWeights, times: Tensor, guided: tuple[bool, ...], context: Context, at: int, budget: int
    ) -> Velocity:
        """H1, and all modulation, which depends on class and time alone, for as many steps at a time as there is room (H3)."""
        condition, caches, dtype = context["condition"], caches_of(context), dtype_of(context)
        backbone, rotation = w.backbone, w.rotation(at, self.tokens_of_a_cell)
        width = sum(len(bias) for _, bias in backbone.ada_lin)
        steps, ready = range(0), []

        def velocity(i: int, x: Tensor) -> Tensor:
            nonlocal steps, ready
            if i not in steps:
                steps = chunk_from(i, guided, budget // max(1, len(x) * width * dtype.itemsize))
                y = F.silu(times[steps.start : steps.stop, None] + condition[: len(x)])
                ready = [ops.linear(y, layer) for layer in backbone.ada_lin]
            of_step = [Modulation.split(part[i - steps.start, :, None]) for part in ready]
            some = [Cache(cache.k[: len(x)], cache.v[: len(x)]) for cache in caches]
            h = ops.linear(x.to(dtype), backbone.input)
            return ops.linear(transform(ops, backbone, h, of_step, rotation, some, at), w.output)

        return velocity
