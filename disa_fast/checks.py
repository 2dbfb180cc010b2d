"""Checks of values and parameter sets that more than one module makes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import ParamSpec

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST = 2**31 - 1  # of whatever is counted


def is_whole(value: object) -> bool:
    """An integer of Python's or numpy's, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_dense(value: object) -> bool:
    """A tensor that has all its elements in memory."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def is_plain(value: object) -> bool:
    """Whether a value is no tensor of a class that computes in a way of its own, as quantised and
    sharded ones (torchao, DTensor) do."""
    if not isinstance(value, Tensor) or type(value) in (Tensor, torch.nn.Parameter):
        return True
    own_functions = type(value).__torch_function__ not in (
        Tensor.__torch_function__,
        torch.nn.Parameter.__torch_function__,
    )
    return not own_functions and type(value).__torch_dispatch__ == Tensor.__torch_dispatch__


def describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_nested:
        return f"a nested tensor of {value.dtype} on {value.device}"
    layout = "" if value.layout == torch.strided else f", {value.layout}"
    return f"{list(value.shape)} of {value.dtype} on {value.device}{layout}"


# Each ValueError from here on names the argument, what came and what was expected.


def whole(name: str, value: object, least: int = 1) -> int:
    """A whole number from `least` to MOST."""
    if not is_whole(value) or not least <= value <= MOST:
        raise ValueError(f"{name}: expected a whole number from {least} to {MOST}, got {value!r}")
    return int(value)


def scalar(name: str, value: object) -> float:
    """A finite number; it may come as a one-element tensor or array."""
    number = value
    if isinstance(value, Tensor | np.ndarray):
        if (isinstance(value, Tensor) and value.is_nested) or math.prod(value.shape) != 1:
            raise ValueError(f"{name}: expected a number or a one-element tensor, got {describe(value)}")
        with contextlib.suppress(RuntimeError):  # of a tensor without data, or of a layout that gives none
            number = value.detach().item() if isinstance(value, Tensor) else value.item()
    try:
        number = float(None if isinstance(number, Tensor) else number)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number or a one-element tensor, got {value!r}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def share(name: str, value: object) -> float:
    """A number from 0 to 1."""
    number = scalar(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {number:g}")
    return number


def positive(name: str, value: object) -> float:
    number = scalar(name, value)
    if number <= 0:
        raise ValueError(f"{name}: expected a positive number, got {number:g}")
    return number


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")


def check_dtype(value: object) -> None:
    if not isinstance(value, torch.dtype) or value not in FLOATS:
        raise ValueError(f"dtype: expected a floating point torch.dtype of 16 bits or more, got {value!r}")


def check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator or None, got {generator!r}")


def usable_device(name: str, value: object) -> torch.device:
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except Exception as error:  # each kind of device has its own ways to be missing
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{name}: cannot use {value!r}: {type(error).__name__}: {reason}") from None
    return device


SHARES = ("mask_ratio_min", "label_drop_prob", "attn_dropout", "proj_dropout")
P = ParamSpec("P")


def sized(init: Callable[P, None]) -> Callable[P, None]:
    """A model's constructor, whose arguments that are annotated int or float become such numbers, of Python's: from 1 on or
    positive, but for SHARES, which are from 0 to 1, and for a buffer_size, which may be 0."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].annotation
            if kind == "int":
                bound.arguments[name] = whole(name, value, least=0 if name == "buffer_size" else 1)
            elif kind == "float":
                bound.arguments[name] = share(name, value) if name in SHARES else positive(name, value)
        init(*bound.args, **bound.kwargs)

    return checked


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
    if not is_dense(labels) or labels.ndim != 1 or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: expected a [B] tensor of whole numbers or None, got {labels!r}")
    if labels.device != device:
        raise ValueError(f"labels: expected it on {device}, where the model is, got {labels.device}")
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(f"labels: expected classes 0..{classes - 1}, got {labels.tolist()}")
