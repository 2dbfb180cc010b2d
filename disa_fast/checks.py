"""Checks of values and parameter sets that more than one module makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor


def is_whole(value: object) -> bool:
    """An integer of Python's or numpy's, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_shapes(expected: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]], where: str) -> None:
    """ValueError naming the missing, the unexpected and the misshapen parameters, if any; `where` is what they came from."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        parts = [
            f"{kind} {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(f"{where}: keys do not match: {'; '.join(parts)}")
    for name, shape in expected.items():
        if tuple(given[name]) != tuple(shape):
            raise ValueError(f"{where}: {name}: expected shape {list(shape)}, got {list(given[name])}")


def check_labels(labels: object, classes: int, device: torch.device) -> None:
    """ValueError for what is not a [B] tensor of whole numbers from 0 to classes - 1 on `device`."""
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: expected a [B] tensor of whole numbers or None, got {labels!r}")
    if labels.device != device:
        raise ValueError(f"labels: expected it on {device}, where the model is, got {labels.device}")
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(f"labels: expected classes 0..{classes - 1}, got {labels.tolist()}")
