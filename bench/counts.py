"""What a denoising step has to move and to compute, from the sizes of a head alone: the same on every machine.

Of the hoisted loop (disa_fast/backends/hoisted.py), whoever runs. Bytes are those of parameters, biases and norms included: what
must be read once a step in the loop, and once a call before it. Activations, modulations, noise, keys and values, which stay in
caches at few rows, are left out, and so is the padding of packed weights. FLOPs are those of matrix products and attention, 2 for a
multiply-add, nothing for biases and what is elementwise. The tables of embedded times are left out of both: calls share them (H1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disa_fast.heads.cell_transformer import CellTransformerSpec
from disa_fast.heads.flow_transformer import FlowTransformerSpec
from disa_fast.heads.mlp import MLPSpec
from disa_fast.transformer import gated_width


@dataclass(frozen=True)
class Work:
    """(bytes, FLOPs) of a call: of all its steps, and of what it does before them. Properties are per step."""

    steps: int
    loop: tuple[int, int]
    before: tuple[int, int]

    @property
    def parts(self) -> tuple[tuple[float, float], ...]:
        """(bytes, FLOPs) of a step's loop, and its share of what comes before."""
        return tuple((moved / self.steps, flops / self.steps) for moved, flops in (self.loop, self.before))

    @property
    def bytes(self) -> float:
        return sum(moved for moved, _ in self.parts)

    @property
    def flops(self) -> float:
        return sum(flops for _, flops in self.parts)


def mlp_work(spec: MLPSpec, rows: int, steps: int, weight_bytes: int, other_bytes: int | None = None, guided: bool = True) -> Work:
    """Of MAR's and Harmon's head, over `rows` rows of conditions, both halves of guidance counted.

    loop: input_proj (w x c), 2 linears (w x w) a block, final_layer.linear (2c x w); under guidance one half of the rows enters,
    and the unconditional half leaves without variance channels (H5). before: the modulation, (3*depth + 2)*w x w, of every row and
    step, and cond_embed (w x z) of every row. weight_bytes: of a number in the matrices of blocks and modulation; other_bytes: in
    all else, the same if None (on the CPU core it is always 4).
    """
    w, c, modulation = spec.width, spec.in_channels, spec.modulation_width
    other_bytes = weight_bytes if other_bytes is None else other_bytes
    blocks, edges, biases = 2 * spec.depth * w * w, 3 * c * w, (2 * spec.depth + 1) * w + 2 * c
    trajectories = rows // 2 if guided else rows
    edge_flops = 2 * trajectories * c * w * (4 if guided else 3)
    return Work(
        steps,
        loop=(steps * (weight_bytes * blocks + other_bytes * (edges + biases)), steps * (2 * rows * blocks + edge_flops)),
        before=(
            weight_bytes * modulation * w + other_bytes * (modulation + w * (spec.z_channels + 1)),
            2 * rows * w * (steps * modulation + spec.z_channels),
        ),
    )


def flow_work(spec: FlowTransformerSpec, rows: Sequence[int], tokens: int, weight_bytes: int) -> Work:
    """Of FlowAR's head over a scale of `tokens`. rows: of every step, both halves counted where it is guided (H8).

    loop: input_proj and final_layer.linear (w x c), and in a block of hidden width m qkv and proj (4w x w), the gated MLP (3m x w)
    and attention (2*tokens*w a token), with cross-attention its q and proj (2w x w) and as much attention again. before: cond_embed
    (w x z) and cross-attention's keys and values (2w x z a block, H7) of every token, and the modulation, (6*depth + 2)*w x w, of
    every token and step; with cross-attention half of a block's is of the time alone.
    """
    w, c, z, depth, cross = spec.width, spec.in_channels, spec.z_channels, spec.depth, int(spec.cross)
    hidden, steps, evaluated, seen = gated_width(w), len(rows), tokens * sum(rows), tokens * max(rows)
    products = 2 * c * w + depth * ((4 + 2 * cross) * w * w + 3 * hidden * w)
    vectors = w + c + depth * ((2 + 2 * cross) * w + 2 * hidden)  # biases, and the norm of cross-attention's queries
    attention = depth * (1 + cross) * 2 * tokens * w
    modulation, of_time = (6 * depth + 2) * w, cross * 3 * depth * w
    condition = (1 + cross * 2 * depth) * w * z
    return Work(
        steps,
        loop=(steps * weight_bytes * (products + vectors), 2 * evaluated * (products + attention)),
        before=(
            weight_bytes * (modulation * (w + 1) + condition + w + cross * depth * z),
            2 * (w * (evaluated * (modulation - of_time) + steps * of_time) + seen * condition),
        ),
    )


def cell_work(spec: CellTransformerSpec, rows: Sequence[int], at: int, weight_bytes: int) -> Work:
    """Of xAR over the cell at position `at`. rows: as in flow_work. A finished cell's pass for keys and values is apart.

    loop: z_proj and pred (w x c), decoder_embed (w x w), and in a block of hidden width m qkv and proj (4w x w), the gated MLP
    (3m x w) and attention (2*(at + tokens)*w a token). before: the modulation, 6*depth*w x w, of every row and step.
    """
    w, c, depth, tokens = spec.width, spec.in_channels, spec.depth, spec.tokens // spec.cells
    hidden, steps, evaluated = gated_width(w), len(rows), sum(rows)
    products = 2 * c * w + w * w + depth * (4 * w * w + 3 * hidden * w)
    vectors = (5 + 2 * tokens) * w + c + depth * (5 * w + 2 * hidden)  # biases, norms and the cell's positions
    attention = depth * 2 * (at + tokens) * w
    modulation = 6 * depth * w
    return Work(
        steps,
        loop=(steps * weight_bytes * (products + vectors), 2 * evaluated * tokens * (products + attention)),
        before=(weight_bytes * modulation * (w + 1), 2 * evaluated * modulation * w),
    )
