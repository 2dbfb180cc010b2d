"""C++ on a CPU, all steps for all rows in one call: packed weights, vector kernels, own threads (csrc/cpu).

The hoists of `hoisted`, with layer norm and modulation, bias, SiLU, gate, guidance, update and the next step's input layer fused
into the matrix products. Arithmetic is float32; the blocks' and the modulation's weights are stored in float32, or in bfloat16
where that is the dtype asked for. A row's bits depend neither on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import profiling
from ..heads import mlp
from ..solvers import StepTable

try:
    from .. import _C
except ImportError as error:
    _C, _IMPORT_ERROR = None, str(error)

if TYPE_CHECKING:
    from ..heads.mlp import MLPHead, MLPSpec

# Rows up to which these kernels, which widen bfloat16 and multiply in float32, beat `hoisted` on a processor with products of
# bfloat16, for heads of these widths and wider. Measured, see bench/NOTES.md.
FASTEST_UP_TO = {1024: 4, 768: 7, 512: 10, 256: 38}

STORAGE = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}  # by the call's dtype


def is_built() -> bool:
    return _C is not None


def about(dtype: torch.dtype) -> str:
    return f"C++ kernels for {instruction_set()}, {torch.get_num_threads()} threads, weights stored in {STORAGE[dtype]}"


def refuses(spec: MLPSpec, dtype: torch.dtype, device: torch.device, rows: int, batch_invariant: bool = False) -> str | None:
    if device.type != "cpu":
        return f"runs on CPUs, not on {device}"
    if not is_built():
        return f"not part of this installation ({_why_not_built()}); install a C++ compiler, then disa_fast anew"
    if dtype not in STORAGE:
        return f"computes in float32, not in {dtype}"
    return None


def fastest_up_to(width: int, dtype: torch.dtype) -> float:
    """The number of rows up to which "auto" prefers this backend."""
    if dtype != torch.bfloat16 or not multiplies_bfloat16():
        return math.inf
    return next((rows for least, rows in FASTEST_UP_TO.items() if width >= least), math.inf)


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it (AVX512-BF16 or AMX), and PyTorch products that use them."""
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return torch.backends.mkldnn.is_available() and any(supported is not None and supported() for supported in asked)


def draws() -> bool:
    return False


def captures() -> bool:
    return False


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
    storage = STORAGE[z.dtype]
    w = head.packed(f"cpu, stored in {storage}", torch.float32, functools.partial(Weights, storage=storage))
    times, conditions = w.time_table(table), w.embed_conditions(z.float())
    state = noise.clone(memory_format=torch.contiguous_format)
    if step_noise is not None:
        step_noise = step_noise.contiguous()
    with profiling.range(profiling.CPU_CORE):
        _C.mlp_denoise(
            weights=w.native,
            steps=len(table),
            **{name: getattr(table, name).ctypes.data for name in ("a", "b", "c", "l0", "l1", "noisy")},
            times=times.data_ptr(),
            conditions=conditions.data_ptr(),
            step_noise=0 if step_noise is None else step_noise.data_ptr(),
            state=state.data_ptr(),
            trajectories=len(state),
            guided=cfg != 1.0,
            cfg=cfg,
            temperature=temperature,
            isa=instruction_set(),
            threads=torch.get_num_threads(),
        )
    return state


def instruction_set() -> str:
    """Which kernels run: the best that this processor has, or DISA_FAST_CPU_ISA. ValueError if that is not among them."""
    available = _C.isas()
    isa = os.environ.get("DISA_FAST_CPU_ISA") or available[0]
    if isa not in available:
        raise ValueError(f"DISA_FAST_CPU_ISA: expected one of {available} on this processor, got {isa!r}")
    return isa


def _why_not_built() -> str:
    log = Path(__file__).parent.parent / "not_built.txt"  # written by setup.py
    return " ".join(log.read_text().split())[:300] if log.exists() else _IMPORT_ERROR


class Weights:
    """A head's parameters, given in float32, as csrc reads them."""

    def __init__(self, p: Mapping[str, Tensor], spec: MLPSpec, storage: torch.dtype) -> None:
        padded = _up(spec.width, _C.PANEL)

        def layer(name: str) -> tuple[Tensor, Tensor]:
            return p[name + ".weight"], p[name + ".bias"]

        modulation = tuple(
            F.pad(part.unflatten(0, (-1, spec.width)).movedim(1, -1), (0, padded - spec.width)).movedim(-1, 1).flatten(0, 1)
            for part in mlp.folded_modulation(p, spec)
        )
        blocks = [layer(f"res_blocks.{i}.mlp.{j}") for i in range(spec.depth) for j in (0, 2)]
        small = [layer(name) for name in ("time_embed.mlp.0", "time_embed.mlp.2", "cond_embed", "input_proj", "final_layer.linear")]
        self._blocks = PackedLinears(blocks, storage)
        self._modulation = PackedLinears([modulation], storage)
        self._small = PackedLinears(small, torch.float32)
        _, _, self._condition, input_layer, output_layer = self._small.layers
        self.native = _C.MlpWeights(
            channels=spec.in_channels,
            width=spec.width,
            eps=mlp.LN_EPS,
            modulation=self._modulation.layers[0],
            input=input_layer,
            first=self._blocks.layers[0::2],
            second=self._blocks.layers[1::2],
            output=output_layer,
        )
        self.time_table = mlp.TimeTables(functools.partial(_embed_times, self._small), torch.device("cpu"))

    def embed_conditions(self, z: Tensor) -> Tensor:
        """cond_embed(z), [rows, padded width]."""
        return linear(self._condition, z)


def _embed_times(small: PackedLinears, t: Tensor) -> Tensor:
    """[T] -> [T, padded width]"""
    return linear(small.layers[1], linear(small.layers[0], mlp.frequencies(t), silu=True))


class PackedLinears:
    """Linear layers, (weight [columns, k], bias [columns]) each, in the panels of csrc/cpu/kernels.h, one behind the other."""

    def __init__(self, linears: Sequence[tuple[Tensor, Tensor]], storage: torch.dtype) -> None:
        pair = 2 if storage == torch.bfloat16 else 1
        shapes = [(_up(weight.shape[0], _C.PANEL), _up(weight.shape[1], 2)) for weight, _ in linears]
        self._panels = empty(sum(columns * k for columns, k in shapes), storage)
        self._biases = []
        self.layers = []
        for (weight, bias), (columns, k), panels in zip(
            linears, shapes, self._panels.split([columns * k for columns, k in shapes]), strict=True
        ):
            padded = F.pad(weight, (0, k - weight.shape[1], 0, columns - weight.shape[0]))
            panels.view(-1, k // pair, _C.PANEL, pair).copy_(padded.reshape(-1, _C.PANEL, k // pair, pair).transpose(1, 2))
            self._biases.append(F.pad(bias, (0, columns - len(bias))).contiguous())
            self.layers.append(
                _C.Linear(
                    panels=panels.data_ptr(),
                    bias=self._biases[-1].data_ptr(),
                    k=k,
                    columns=columns,
                    bfloat16=storage == torch.bfloat16,
                )
            )


def linear(layer: _C.Linear, x: Tensor, silu: bool = False) -> Tensor:
    """x @ weight^T + bias, through SiLU or not. x: [rows, k or more] float32; the result has the layer's padded columns."""
    x = F.pad(x, (0, max(0, layer.k - x.shape[1]))).contiguous()
    out = torch.empty(len(x), layer.columns, device="cpu")  # also where another device is the default
    with profiling.range(profiling.CPU_CORE):
        _C.linear(
            linear=layer,
            input=x.data_ptr(),
            stride=x.shape[1],
            rows=len(x),
            silu=silu,
            out=out.data_ptr(),
            isa=instruction_set(),
            threads=torch.get_num_threads(),
        )
    return out


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """[count] uninitialised, aligned to a page. NumPy asks the system for huge pages, which torch.empty does not."""
    page = 4096
    memory = torch.from_numpy(np.empty(count * dtype.itemsize + page, dtype=np.uint8))
    start = -memory.data_ptr() % page
    return memory[start : start + count * dtype.itemsize].view(dtype)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
