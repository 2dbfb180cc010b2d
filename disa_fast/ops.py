"""The denoising loop as operators of torch.library, which is how torch.compile sees it: one node.

Eager calls go past them, since the boundary costs tens of microseconds. A head is named by a number here, because operators take
tensors and plain values only; its parameters are arguments too, since a compiled program may hold changed ones back in copies.
"""

import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import numpy as np
import torch
from torch import Tensor

from .solvers import StepTable

if TYPE_CHECKING:
    from .heads.mlp import MLPHead

_heads: "weakref.WeakValueDictionary[int, MLPHead]" = weakref.WeakValueDictionary()
_numbers = itertools.count()

# Not for the graphs that torch.compile(mode="reduce-overhead") captures: the loop has graphs of its own, whose buffers and weights
# would come from that graph's memory pool, and noise is drawn on the CPU too.
_TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def register(head: "MLPHead") -> int:
    """The number by which the operators know this head as long as it lives."""
    number = next(_numbers)
    _heads[number] = head
    return number


@torch.library.custom_op("disa_fast::mlp_denoise", mutates_args=(), **_TAGS)
def mlp_denoise(
    parameters: Sequence[Tensor],
    z: Tensor,
    columns: Sequence[Tensor],
    cfg: Tensor,
    temperature: Tensor,
    noise: Tensor,
    step_noise: Optional[Tensor],  # noqa: UP045, torch reads these annotations
    head: int,
    backend: str,
    dtype: Optional[torch.dtype],  # noqa: UP045
    batch_invariant: bool,
) -> Tensor:
    """MLPHead.denoise with all noise given. columns: those of a StepTable; cfg, temperature: one element; head: its number."""
    known = _heads[head]
    own = dict(known._net.named_parameters(remove_duplicate=False))
    if any(p.data_ptr() != q.data_ptr() for p, q in zip(parameters, own.values(), strict=True)):
        known = type(known).from_state_dict(dict(zip(own, parameters, strict=True)))
    table = _table(tuple(column.numpy().tobytes() for column in columns), step_noise is not None)
    return known.denoise(
        z, table, cfg, temperature, noise, step_noise, backend=backend, dtype=dtype, batch_invariant=batch_invariant
    )


@mlp_denoise.register_fake
def _(parameters, z, columns, cfg, temperature, noise, step_noise, head, backend, dtype, batch_invariant):
    state = torch.promote_types(parameters[0].dtype if dtype is None else dtype, torch.float32)
    return z.new_empty((z.shape[0], noise.shape[1]), dtype=state)


@torch.library.custom_op("disa_fast::draw_noise", mutates_args=("noise", "step_noise"), **_TAGS)
def draw_noise(noise: Tensor, step_noise: Tensor, cfg: Tensor) -> None:
    """Fill [rows, channels] and [T, rows, channels] as heads.mlp.draw_noise draws them; either may be empty, and stays so.

    Under guidance only the first half of `noise` is drawn, and counts. An operator of its own, and one that mutates, so that a
    compiler never takes two draws for one.
    """
    if noise.numel():
        start = noise[: len(noise) // 2] if float(cfg) != 1.0 else noise
        start.copy_(torch.randn(start.shape, dtype=torch.float32))
    for i, step in enumerate(step_noise):
        step.copy_(torch.randn_like(step, dtype=torch.float32 if i == 0 else step.dtype))


@draw_noise.register_fake
def _(noise, step_noise, cfg):
    pass


@functools.lru_cache(1024)
def _table(columns: tuple[bytes, ...], draws: bool) -> StepTable:
    *numbers, noisy = columns
    return StepTable("compiled", *(np.frombuffer(column) for column in numbers), np.frombuffer(noisy, bool), draws)
