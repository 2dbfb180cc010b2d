"""Functions that torch.compile runs as they are, instead of tracing them.

Whatever makes tables with NumPy, draws noise, or keeps what it made, is such a function. Traced, NumPy becomes PyTorch's
imitation of it, whose numbers are float32; inductor draws other noise for a seed; and a cache would give what was made so to every
later call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar, overload

import torch

P = ParamSpec("P")
T = TypeVar("T")


@overload
def untraced(function: Callable[P, T]) -> Callable[P, T]: ...
@overload
def untraced(*, recursive: bool) -> Callable[[Callable[P, T]], Callable[P, T]]: ...


def untraced(function=None, *, recursive=True):
    """A decorator of functions and methods: torch.compile traces neither `function` nor what it calls.

    recursive: False leaves what it calls to torch.compile, which makes a program of each call: for a loop that cannot be traced
        around a network that can. Goes inside of torch.no_grad then.

    The program is cut there, so with fullgraph=True it is an error. Goes outside of functools.cache, which torch.compile would
    look past. As torch.compiler.disable; but that loads torch._dynamo, which takes as long as importing torch. This leaves it to
    those who compile.
    """
    if function is None:
        return functools.partial(untraced, recursive=recursive)
    outside: list[Callable] = []

    @functools.wraps(function)
    def untraced_call(*args, **kwargs):
        if not outside:
            if "torch._dynamo" not in sys.modules:  # then nothing is being traced
                return function(*args, **kwargs)
            outside.append(_disabled(function, untraced_call, recursive))
        return outside[0](*args, **kwargs)

    return untraced_call


def _disabled(function: Callable[P, T], wrapper: Callable[P, T], recursive: bool) -> Callable[P, T]:
    """`function` with tracing off. The wrapper's code, which all of them share, is not to be traced either: that would happen anew
    for each function, up to a limit at which torch.compile complains."""
    from torch._dynamo import decorators

    skip = getattr(decorators, "skip", None)
    if skip is not None:
        skip(wrapper)
    return torch.compiler.disable(function, recursive=recursive)
