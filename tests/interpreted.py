"""Triton's interpreter made to compute as a GPU: bfloat16 rounded to nearest, products of float32 added up one by one, and sums in
an order that rows do not change."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bits(numbers: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(numbers.shape)


def cast_impl(self, source, to):
    """The interpreter keeps bfloat16 as its bits, and cuts off what does not fit."""
    pair = source.dtype.scalar, to.scalar
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle(_from_bits(source.data), tl.float32)
    if pair == (tl.float32, tl.bfloat16):
        return TensorHandle(_to_bits(source.data), tl.bfloat16)
    return _cast(self, source, to)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter would multiply the bits of bfloat16, and leave the order to a BLAS, which has another at its edges. A GPU
    adds up products of float32 one by one, from d on."""
    if a.dtype.scalar == tl.float32:
        sums = d.data
        for column, row in zip(a.data.T.astype(np.float64), b.data.astype(np.float64), strict=True):
            sums = (column[:, None] * row + sums).astype(np.float32)
        return TensorHandle(sums, d.dtype.scalar)
    a, b = (_from_bits(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32) for x in (a, b))
    products = a[:, None, :] * np.ascontiguousarray(b.T)[None]
    return TensorHandle(products.sum(axis=2) + d.data, d.dtype.scalar)


def repair() -> None:
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
