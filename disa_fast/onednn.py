"""Linear layers on a CPU through oneDNN, by PyTorch's private operators for it; elsewhere, and where they are missing, plain ones.

A plain F.linear goes to MKL's row-major GEMM, which on processors that are not Intel's is two to four times slower
(bench/NOTES.md). None of this is differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = tuple[Tensor, Tensor | None]


def serves(weight: Tensor) -> bool:
    """Whether oneDNN takes a layer with such a weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> F.linear(x, weight, bias), with a copy of the weight laid out for oneDNN: the fastest at few rows."""
    if serves(weight):
        onednn = torch.ops.mkldnn
        packed = onednn._reorder_linear_weight(weight)
        return lambda x: onednn._linear_pointwise(x, packed, bias, "none", [], "")
    return functools.partial(F.linear, weight=weight, bias=bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias) over the weight as it lies: from a hundred rows on within a tenth of a packed one, and no copy."""
    if _serves_unpacked(weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def gated_linear(x: Tensor, gate: Layer, up: Layer) -> Tensor:
    """gelu(gate(x)) * up(x), activation and product in the epilogues of the two linear layers."""
    if _serves_unpacked(gate[0]) and _serves_unpacked(up[0]):
        activated = torch.ops.mkldnn._linear_pointwise(x, *gate, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, activated, *up, "mul")
    return F.gelu(F.linear(x, *gate)).mul_(F.linear(x, *up))


def _serves_unpacked(weight: Tensor) -> bool:
    return weight.is_contiguous() and serves(weight) and _takes_unpacked(weight.dtype)


@functools.cache
def _takes_unpacked(dtype: torch.dtype) -> bool:
    """Whether this PyTorch's operators take a weight that was not packed: tried once, since nothing documents it."""
    x, weight, bias = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((2, 4), (3, 4), (3,)))
    try:
        made = torch.ops.mkldnn._linear_pointwise.binary(x, torch.full_like(x[:, :3], 2), weight, bias, "mul")
    except (AttributeError, RuntimeError):
        return False
    return bool((made == 10).all())
