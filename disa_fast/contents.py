"""What the numbers of a checkpoint are: a fingerprint of them, and which are NaN or inf. Tensor by tensor, in little memory."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

WHOLE = 64 << 10  # bytes of a tensor that are hashed as they are
BLOCK = 8 << 10  # bytes of a larger one that become one word
PIECE = 1 << 20  # numbers that are looked at together
NAMED = 4  # tensors that a warning names

_words = np.frombuffer(hashlib.shake_256(b"disa_fast").digest(BLOCK), "<u8")
_FACTORS = _words | np.uint64(1)  # odd, so that a change of one word always changes a sum of words times factors


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits: the SHA-256 of every tensor's name, dtype, shape and contents, in the order of their names.

    A tensor of up to 64 KiB enters as it is; of a larger one the sum modulo 2^64 of each 8 KiB, whose 64-bit words are each times
    an odd factor of their own. So a change of a single number anywhere always shows, and one of several does but by a chance of
    about 2^-64 for each 8 KiB. It is no defence against tensors that somebody made in order to collide. Takes as long as reading
    the numbers once.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
        if content.nbytes > WHOLE:
            rest = content[content.nbytes // BLOCK * BLOCK :]
            words = content[: content.nbytes - rest.nbytes].view("<u8").reshape(-1, BLOCK // 8)
            digest.update(np.einsum("ij,j->i", words, _FACTORS).tobytes())
            content = rest
        digest.update(content.tobytes())
    return digest.hexdigest()


def not_finite(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """{name: (how many NaN, how many inf)} of the tensors that hold any. Numbers that share their memory count once; inf in
    attention masks, called `mask`, is what it should be."""
    found = {}
    for name, tensor in state.items():
        nan, inf = _not_finite(tensor)
        if name.rpartition(".")[2] == "mask":
            inf = 0
        if nan or inf:
            found[name] = (nan, inf)
    return found


def _not_finite(tensor: Tensor) -> tuple[int, int]:
    nan = inf = 0
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return nan, inf
    for piece in _pieces(tensor.detach()):
        piece = torch.view_as_real(piece).flatten() if piece.is_complex() else piece
        piece = piece.float() if piece.element_size() == 1 else piece  # of 8 bits, for which there is no minimum
        low, high = piece.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            nan += int(piece.isnan().sum())
            inf += int(piece.isinf().sum())
    return nan, inf


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers as one-dimensional parts of up to PIECE, views where that can be; those that lie on one another once."""
    if not tensor.numel():
        return
    extent = 1 + sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if extent <= tensor.numel():
        yield from tensor.as_strided((extent,), (1,)).split(PIECE)
    elif tensor.numel() <= PIECE:
        yield tensor.reshape(-1)
    else:
        longest = max(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
        for half in tensor.tensor_split(2, dim=longest):
            yield from _pieces(half)


def listed(found: Mapping[str, tuple[int, int]]) -> str:
    """What `not_finite` found, for people: 'fc.bias (2 NaN), fc.weight (1 NaN, 3 inf), ...'."""
    counted = [f"{name} ({', '.join(f'{n} {kind}' for n, kind in zip(counts, ('NaN', 'inf'), strict=True) if n)})"
               for name, counts in found.items()]  # fmt: skip
    return ", ".join(counted[:NAMED] + ["..."] * (len(counted) > NAMED))


def warn_not_finite(path: object, state: Mapping[str, Tensor]) -> None:
    """A UserWarning, seen from the caller's caller, that names the tensors of what was loaded from `path` that hold NaN or inf."""
    found = not_finite(state)
    if found:
        dtype = str(state[next(iter(found))].dtype).removeprefix("torch.")
        told = f"{path}: {len(found)} of {len(state)} tensors hold NaN or inf in {dtype}: {listed(found)}"
        warnings.warn(f"{told}; images may be NaN", UserWarning, stacklevel=3)
