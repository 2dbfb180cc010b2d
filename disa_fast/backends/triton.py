"""Triton kernels on a GPU: two a block and two a step (kernels/triton), replayed as a CUDA graph for each shape of a call.

The hoists of `hoisted`. Accumulation, residual stream, statistics of the layer norms and state are float32; weights, modulation and
the operands of the matrix products are in the dtype asked for. Up to tiles.FEW rows, and under batch_invariant, a row's bits do
not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import graphs
from ..heads import flow, mlp
from ..heads.packing import read_here, settle
from ..kernels.triton import tiles
from ..kernels.triton.tiles import Tile, Tiles
from ..solvers import StepTable
from .triton_ops import TritonOps

try:
    import triton

    from ..kernels.triton.adaln import adaln_kernel
    from ..kernels.triton.adaln_linear import adaln_linear_kernel
    from ..kernels.triton.final_layer import final_layer_kernel
    from ..kernels.triton.flow_step import flow_step_kernel
    from ..kernels.triton.gated_residual import gated_residual_kernel
    from ..kernels.triton.input_projection import input_projection_kernel
    from ..kernels.triton.linear import linear_kernel
    from ..kernels.triton.sampler_step import sampler_step_kernel
except ImportError as error:
    triton, _IMPORT_ERROR = None, str(error)

if TYPE_CHECKING:
    from ..graphs import Buffers, Layout
    from ..heads.flow import FlowCall, FlowHead, Velocity
    from ..heads.mlp import MLPHead, MLPSpec

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MODULATION_BYTES = 256 << 20
ELEMENTWISE = {"BLOCK_M": 4, "BLOCK_K": 256}  # of adaln_kernel
FLOW_BLOCK = 256  # of flow_step_kernel: numbers in float64, two a thread


def is_installed() -> bool:
    return triton is not None


def is_interpreted() -> bool:
    """TRITON_INTERPRET=1 from the start of the process: kernels run as Python, on CPU tensors."""
    return is_installed() and not isinstance(linear_kernel, triton.JITFunction)


def about(dtype: torch.dtype) -> str:
    how = "in Triton's interpreter" if is_interpreted() else f"CUDA graphs {'on' if graphs.enabled() else 'off'}"
    return f"Triton {triton.__version__} kernels, two a block, in {dtype} with float32 accumulation; {how}"


def refuses(spec: MLPSpec, dtype: torch.dtype, device: torch.device, rows: int, batch_invariant: bool = False) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        interpreted = " (there only in Triton's interpreter: TRITON_INTERPRET=1)" if device.type == "cpu" else ""
        return f"runs on GPUs, not on {device}{interpreted}"
    if not is_installed():
        return f"Triton cannot be imported ({_IMPORT_ERROR}); pip install triton"
    if device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    if dtype not in DTYPES:
        return f"computes in float32, bfloat16 or float16, not in {dtype}"
    if spec.width % 16 or spec.z_channels % 16:
        return f"needs width and z_channels that are multiples of 16, not {spec.width} and {spec.z_channels}"
    return None


def draws() -> bool:
    return False


def captures() -> bool:
    return graphs.enabled()


AnyShape = TypeVar("AnyShape", bound="Shape")


@dataclass(frozen=True)
class Shape:
    """What decides which kernels a call launches, with what; hence the key of its graph."""

    steps: int
    rows: int
    guided: bool
    noisy: bool
    tiles: Tiles
    precision: str

    @property
    def trajectories(self) -> int:
        return self.rows // 2 if self.guided else self.rows

    def __str__(self) -> str:
        return f"T={self.steps} rows={self.rows} guided={self.guided} noisy={self.noisy}"


def denoise(
    head: MLPHead,
    z: Tensor,
    table: StepTable,
    cfg: float,
    temperature: float,
    noise: Tensor,
    step_noise: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    if len(z) == 0:
        return noise.clone()
    w = head.packed("triton", z.dtype, Weights)
    guided = cfg != 1.0

    def shape(rows: int) -> Shape:
        chosen = tiles.choose(w.gpu, DTYPES[z.dtype], w.spec.width, min(rows, tiles.FEW) if batch_invariant else rows)
        return Shape(len(table), rows, guided, step_noise is not None, chosen, _precision())

    return replayed(w, shape, layout, loop, inputs(w, z, table, cfg, temperature, noise, step_noise), z, noise)


def inputs(
    w: Weights, z: Tensor, table: StepTable, cfg: float, temperature: float, noise: Tensor, step_noise: Tensor | None
) -> Callable[[Buffers], None]:
    """What fills the inputs of `loop`, in buffers for as many rows or more: one launch each for z, the tables, the scalars, the
    start and the noise. One kernel for all would take as long to launch from Python as these five."""
    tables, guided = read_here(w.tables(table)), cfg != 1.0

    def fill(buffers: Buffers) -> None:
        into = buffers["z"]
        if guided and len(z) < len(into):  # both halves are padded
            halves = into.view(2, -1, into.shape[1])
            halves[:, : len(z) // 2].copy_(z.view(2, -1, into.shape[1]))
        else:
            into[: len(z)].copy_(z)
        buffers.span("times", "steps").copy_(tables)
        fill_scalars(buffers["scalars"], cfg, temperature)
        buffers["x"][: len(noise)].copy_(noise)
        if step_noise is not None:
            buffers["noise"][:, : len(noise)].copy_(step_noise)

    return fill


def fill_scalars(scalars: Tensor, cfg: float, temperature: float) -> None:
    """Both in one launch."""
    torch.view_as_complex(scalars).fill_(complex(cfg, temperature))


def replayed(
    w: Weights,
    shape: Callable[[int], AnyShape],
    layout: Callable[[Weights, AnyShape], Layout],
    loop: Callable[[Weights, AnyShape, Buffers], None],
    fill: Callable[[Buffers], None],
    z: Tensor,
    noise: Tensor,
) -> Tensor:
    """fill and loop, as the replay of a graph for the bucket of z's rows; launched one by one where there is none. shape: of a
    number of rows. Returns what is left in x, as many rows as `noise` has."""
    with graphs.on_device(z.device):
        padded = shape(graphs.row_bucket(len(z)))
        lay_out, run = functools.partial(layout, w, padded), functools.partial(loop, w, padded)
        out = w.graphs.run(padded, len(z), lay_out, fill, run, lambda buffers: buffers["x"][: len(noise)].clone())
        if out is None:
            exact = shape(len(z))
            buffers = graphs.allocate(layout(w, exact), z.device)
            fill(buffers)
            loop(w, exact, buffers)
            out = buffers["x"].clone()  # which does not keep the others
        return out


class Weights:
    """A head's parameters in one dtype, as the kernels read them, and the graphs captured over them."""

    def __init__(self, p: Mapping[str, Tensor], spec: MLPSpec) -> None:
        def layer(name: str) -> tuple[Tensor, Tensor]:
            return p[name + ".weight"].contiguous(), p[name + ".bias"].contiguous()

        self.spec = spec
        self.cond, self.input, self.output = (layer(name) for name in ("cond_embed", "input_proj", "final_layer.linear"))
        self.blocks = [tuple(layer(f"res_blocks.{i}.mlp.{j}") for j in (0, 2)) for i in range(spec.depth)]
        self.modulation = mlp.folded_modulation(p, spec)
        device = self.cond[0].device
        self.gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        self.graphs = graphs.Graphs(device)
        self.time_table = mlp.TimeTables(functools.partial(mlp.embed_time, p), device)
        self.step_table = functools.lru_cache(mlp.TIME_TABLES_KEPT)(functools.partial(_step_table, device=device))
        self.tables = functools.lru_cache(mlp.TIME_TABLES_KEPT)(functools.partial(_tables, self.time_table, self.step_table))


def _tables(time_table: Callable[[StepTable], Tensor], step_table: Callable[[StepTable], Tensor], table: StepTable) -> Tensor:
    """Of a StepTable, uint8: times and steps as they lie in the buffers of `layout`, to be copied at once."""
    made = {"times": time_table(table), "steps": step_table(table)}
    joined = graphs.allocate({name: (tuple(part.shape), part.dtype) for name, part in made.items()}, made["times"].device)
    for name, part in made.items():
        joined[name].copy_(part)
    settle(joined.arena.device)
    return joined.span(*made)


def _step_table(table: StepTable, device: torch.device) -> Tensor:
    """[T, 8] float32, a row for each sampler_step: a, b, c, l0, l1, noisy, and two unused that keep rows aligned."""
    unused = torch.zeros(len(table))
    columns = [torch.tensor(getattr(table, name), dtype=torch.float32) for name in ("a", "b", "c", "l0", "l1", "noisy")]
    packed = torch.stack([*columns, unused, unused], dim=1).to(device)
    settle(device)
    return packed


def layout(w: Weights, shape: Shape) -> Layout:
    """Every buffer of the loop: the inputs z, times, steps, scalars, noise and x, which becomes the result; then working space."""
    spec, dtype = w.spec, w.cond[0].dtype
    rows, n, width, channels = shape.rows, shape.trajectories, spec.width, spec.in_channels
    chunk = min(shape.steps, max(1, MODULATION_BYTES // (rows * spec.modulation_width * dtype.itemsize)))
    return {
        "z": ((rows, spec.z_channels), dtype),
        "times": ((shape.steps, width), dtype),
        "steps": ((shape.steps, 8), torch.float32),
        "scalars": ((2,), torch.float32),
        "noise": ((shape.steps if shape.noisy else 0, n, channels), torch.float32),
        "x": ((n, channels), torch.float32),
        "before": ((n, channels), torch.float32),
        "other_x": ((n, channels), torch.float32),
        "other_before": ((n, channels), torch.float32),
        "condition": ((rows, width), dtype),
        "y": ((chunk, rows, width), dtype),
        "modulation": ((chunk, rows, spec.modulation_width), dtype),
        "h": ((rows, width), torch.float32),
        "stats": ((rows, 2, triton.cdiv(width, shape.tiles.second.n)), torch.float32),
        "m": ((0 if shape.tiles.fused else rows, width), dtype),
        "u": ((rows, width), dtype),
        "parts": ((triton.cdiv(width, shape.tiles.step.k), rows, 2 * channels), torch.float32),
    }


def loop(w: Weights, shape: Shape, b: Buffers) -> None:
    """All steps, on the current stream and without a wait of the host. Reads the inputs, leaves the tokens in x."""
    (x, before), _ = _states(shape, b, 0)
    before.zero_()
    if x is not b["x"]:
        x.copy_(b["x"])
    input_projection(w, shape, b)
    for steps, modulation in modulations(w, shape, b):
        for i in steps:
            for block in range(w.spec.depth):
                first_half(w, shape, b, modulation[i - steps.start], block)
                second_half(w, shape, b, modulation[i - steps.start], block)
            final_layer(w, shape, b, modulation[i - steps.start])
            sampler_step(w, shape, b, i)


def modulations(w: Weights, shape: Shape, b: Buffers) -> Iterator[tuple[range, Tensor]]:
    """(steps, their modulation [steps, rows, modulation_width]), as many steps at a time as there is room for (H1 to H4)."""
    linear(b["z"], *w.cond, b["condition"], shape, shape.tiles.modulation)
    chunk = len(b["y"])
    for start in range(0, shape.steps, chunk):
        steps = range(start, min(start + chunk, shape.steps))
        y, modulation = b["y"][: len(steps)], b["modulation"][: len(steps)]
        torch.add(b["times"][steps.start : steps.stop, None], b["condition"], out=y)
        F.silu(y, inplace=True)
        linear(y.flatten(0, 1), *w.modulation, modulation.flatten(0, 1), shape, shape.tiles.modulation)
        yield steps, modulation


# One launch each ------------------------------------------------------------------------------------------------------


def first_half(w: Weights, shape: Shape, b: Buffers, modulation: Tensor, block: int) -> None:
    """u = silu(W1 (norm(h) * scale + shift) + b1)"""
    (weight, bias), _ = w.blocks[block]
    column, tile = 3 * block * w.spec.width, shape.tiles.first
    if shape.tiles.fused:
        adaln_linear_kernel[_grid(shape.rows, w.spec.width, tile)](
            b["h"], b["stats"], modulation, weight, bias, b["u"], column, shape.rows, mlp.LN_EPS,
            **_norm(w, shape), **_blocks(tile, shape),
        )  # fmt: skip
        return
    grid = triton.cdiv(shape.rows, ELEMENTWISE["BLOCK_M"]), triton.cdiv(w.spec.width, ELEMENTWISE["BLOCK_K"])
    adaln_kernel[grid](
        b["h"], b["stats"], modulation, b["m"], column, shape.rows, mlp.LN_EPS,
        **_norm(w, shape), **ELEMENTWISE, **_launch(shape),
    )  # fmt: skip
    linear(b["m"], weight, bias, b["u"], shape, tile, silu=True)


def second_half(w: Weights, shape: Shape, b: Buffers, modulation: Tensor, block: int) -> None:
    """h += gate * (W2 u + b2)"""
    _, (weight, bias) = w.blocks[block]
    tile = shape.tiles.second
    gated_residual_kernel[_grid(shape.rows, w.spec.width, tile)](
        b["u"], modulation, weight, bias, b["h"], b["stats"], (3 * block + 2) * w.spec.width, shape.rows,
        WIDTH=w.spec.width, MODULATION=w.spec.modulation_width, **_blocks(tile, shape),
    )  # fmt: skip


def final_layer(w: Weights, shape: Shape, b: Buffers, modulation: Tensor) -> None:
    """parts of W_out (norm(h) * scale + shift), by columns of h"""
    tile, (outputs, width) = shape.tiles.step, w.output[0].shape
    final_layer_kernel[triton.cdiv(shape.rows, tile.m), len(b["parts"])](
        b["h"], b["stats"], modulation, w.output[0], b["parts"], 3 * w.spec.depth * width, shape.rows, mlp.LN_EPS,
        OUTPUTS=outputs, **_norm(w, shape), **_blocks(tile, shape) | {"BLOCK_N": _columns(outputs)},
    )  # fmt: skip


def sampler_step(w: Weights, shape: Shape, b: Buffers, step: int) -> None:
    """(o, v) from parts, x from those, and h of the next step from x."""
    now, after = _states(shape, b, step)
    noise = b["noise"][step] if shape.noisy else b["x"]
    sampler_step_kernel[_state_grid(w, shape)](
        b["parts"], w.output[1], *w.input, *now, *after, noise, b["steps"][step], b["scalars"], b["h"], b["stats"],
        shape.rows, shape.trajectories, PARTS=len(b["parts"]), NOISY=shape.noisy, **_state(w, shape),
    )  # fmt: skip


def _states(shape: Shape, b: Buffers, step: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, before) before this step and after it: two that alternate so that the last step leaves its x in `x`."""
    two = (b["x"], b["before"]), (b["other_x"], b["other_before"])
    now = (shape.steps - step) % 2
    return two[now], two[1 - now]


def input_projection(w: Weights, shape: Shape, b: Buffers) -> None:
    """h of the first step from x."""
    input_projection_kernel[_state_grid(w, shape)](b["x"], *w.input, b["h"], b["stats"], shape.trajectories, **_state(w, shape))


def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, shape: Shape, tile: Tile | None, silu: bool = False) -> None:
    """out = W x + bias, or silu of it; by the library where there is no tile."""
    if tile is None:
        torch.addmm(bias, x, weight.t(), out=out)
        return
    rows, (n, k) = len(x), weight.shape
    linear_kernel[_grid(rows, n, tile)](x, weight, bias, out, rows, K=k, N=n, SILU=silu, **_blocks(tile, shape))


def _grid(rows: int, columns: int, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(rows, tile.m), triton.cdiv(columns, tile.n)


def _norm(w: Weights, shape: Shape) -> dict[str, int]:
    return {"WIDTH": w.spec.width, "MODULATION": w.spec.modulation_width, "TILE": shape.tiles.second.n}


def _blocks(tile: Tile, shape: Shape) -> dict[str, object]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k} | _product(tile, shape)


def _state(w: Weights, shape: Shape) -> dict[str, object]:
    tile, channels, width = _state_tile(shape), w.spec.in_channels, w.spec.width
    sizes = {"BLOCK_T": tile.m, "BLOCK_C": _columns(channels), "BLOCK_N": tile.n}
    sizes |= {"CHANNELS": channels, "WIDTH": width, "TILE": shape.tiles.second.n, "GUIDED": shape.guided}
    return sizes | _product(tile, shape)


def _state_grid(w: Weights, shape: Shape) -> tuple[int, int]:
    return _grid(shape.trajectories, w.spec.width, _state_tile(shape))


def _state_tile(shape: Shape) -> Tile:
    """In whole tiles of the statistics."""
    tile = shape.tiles.step
    return dataclasses.replace(tile, n=max(tile.n, shape.tiles.second.n))


def _product(tile: Tile, shape: Shape) -> dict[str, object]:
    how = {"num_warps": tile.warps, "num_stages": tile.stages, "PREFETCH": shape.tiles.prefetch}
    return {"PRECISION": shape.precision} | how | _launch(shape)


def _columns(count: int) -> int:
    """So many or more, as a matrix product takes them."""
    return max(16, triton.next_power_of_2(count))


def _launch(shape: Shape) -> dict[str, bool]:
    options = {"PDL": True, "launch_pdl": True} if shape.tiles.pdl else {"PDL": False}
    return options | {"enable_fp_fusion": True}


def _precision() -> str:
    """Of products of float32 operands; as torch.set_float32_matmul_precision has it for torch's own."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9; once it was set, the getter below raises
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# Transformers along a flow ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowShape:
    """What decides which kernels a call launches, with what; hence the key of its graph. The number of trajectories is not rounded
    up: one is a whole image, and batches are mostly of one size."""

    steps: int
    trajectories: int
    tokens: int
    at: int
    guided: tuple[bool, ...]
    noisy: tuple[bool, ...]
    precision: str

    def __str__(self) -> str:
        return f"T={self.steps} images={self.trajectories} tokens={self.tokens} at={self.at} guided={sum(self.guided)}"


def transformer_ops(dtype: torch.dtype, own: torch.dtype) -> TritonOps:
    return TritonOps(dtype)


def integrate(head: FlowHead, call: FlowCall) -> Tensor:
    """Matrix products and attention are the library's, what lies between them is in kernels/triton."""
    device, context, ops = call.noise.device, call.needed(), TritonOps(call.dtype)
    (n, tokens, _), rows = call.noise.shape, len(next(iter(context.values())))
    shape = FlowShape(len(call.table), n, tokens, call.at, call.guided, call.noisy(), _precision())
    w, steps = head.weights(call.dtype, ops), read_here(flow.coefficients(call.table, device))
    times = w.time_table(call.table)

    def layout() -> Layout:
        """The inputs, x becoming the result; working space comes from the graphs' memory pool."""
        return {
            **{name: (tuple(tensor.shape), tensor.dtype) for name, tensor in context.items()},
            "times": (tuple(times.shape), times.dtype),
            "steps": (tuple(steps.shape), steps.dtype),
            "scalars": ((2,), steps.dtype),
            "step_noise": ((shape.steps if any(shape.noisy) else 0, *call.noise.shape), call.noise.dtype),
            "x": (tuple(call.noise.shape), call.noise.dtype),
        }

    def fill(buffers: Buffers) -> None:
        for name, tensor in (*context.items(), ("times", times), ("steps", steps), ("x", call.noise)):
            buffers[name].copy_(tensor)
        if call.step_noise is not None:
            buffers["step_noise"].copy_(call.step_noise)
        fill_scalars(buffers["scalars"], call.cfg, call.temperature)

    def loop(b: Buffers) -> None:
        seen = {name: b[name] for name in context}
        velocity = head.hoisted(ops, w, b["times"], shape.guided, seen, shape.at, MODULATION_BYTES)
        flow_steps(velocity, shape, b, call.dtype)

    with graphs.on_device(device):
        out = w.graphs.run(shape, rows * tokens, layout, fill, loop, lambda buffers: buffers["x"].clone())
        if out is None:
            out, scalars = call.noise.clone(memory_format=torch.contiguous_format), steps.new_empty(2)
            fill_scalars(scalars, call.cfg, call.temperature)
            step_noise = None if call.step_noise is None else call.step_noise.contiguous()
            loop({**context, "times": times, "steps": steps, "scalars": scalars, "step_noise": step_noise, "x": out})
        return out


def flow_steps(velocity: Velocity, shape: FlowShape, b: Buffers, dtype: torch.dtype) -> None:
    """heads/flow.py's `integrate`, one launch a step beside the network's, which sees x in `dtype`. Leaves the last state in x."""
    x, before = b["x"], torch.zeros_like(b["x"])
    both = any(shape.guided)
    seen = x.new_empty((1 + both, *x.shape), dtype=dtype).copy_(x).flatten(0, 1)
    for i, (guided, noisy) in enumerate(zip(shape.guided, shape.noisy, strict=True)):
        v = velocity(i, seen if guided else seen[: len(x)])
        flow_step_kernel[(triton.cdiv(x.numel(), FLOW_BLOCK),)](
            v, x, before, b["step_noise"][i] if noisy else x, b["steps"][i], b["scalars"], seen, x.numel(),
            GUIDED=guided, NOISY=noisy, BOTH=both, BLOCK=FLOW_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
