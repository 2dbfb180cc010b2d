"""The check of FlowAR- and xAR-shaped objects: an image of their own `sample_tokens` against ours, in few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .check import SEED, Difference, compared, hooked, in_float32, is_degenerate, parameters_made_by, random_like, refuse

BOUND = 2e-4  # relative, of a whole image in float32


def refuse_hooks(model: nn.Module) -> None:
    """Raise UnsupportedError for hooks and replaced methods, none of which would be called."""
    names = hooked(model)
    if names:
        raise UnsupportedError(
            f"model: forward hooks, or methods that were replaced on the object, in {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}: accelerated, the whole of sample_tokens runs here and none of them would be "
            "called. Remove them first, or pass check=False"
        )


def prove(
    model: nn.Module,
    theirs: Callable[[float], Tensor],
    ours: Callable[[str, float], Tensor],
    solvers: Sequence[str],
    guidance: float,
) -> Mapping[str, object]:
    """The errors of ours against the object's own, under "guided" and "unguided", each relative, and
    "error", the larger, "bound", and "solver", that of `solvers` which the object's own is.

    theirs(cfg), ours(solver, cfg): an image each, from the same seed, over the parameters that the
    object has at the time; those of 16 bits are float32 then, and random ones stand in for such as
    do not tell one function from another. Raises UnsupportedError, with the errors, where they differ.
    """
    make = (lambda _, p: random_like(p)) if is_degenerate(model) else in_float32
    with parameters_made_by(model, make):
        own = {cfg: _theirs(theirs, cfg) for cfg in (guidance, 1.0)}
        refusal: UnsupportedError | None = None
        for solver in solvers:
            try:
                errors = {_name(cfg): _compared(_name(cfg), image, _ours(ours, solver, cfg)) for cfg, image in own.items()}
            except UnsupportedError as error:
                refusal = refusal or error
                continue
            return {"error": max(errors.values()), "bound": BOUND, **errors, "solver": solver}
    raise refusal


def _name(cfg: float) -> str:
    return "guided" if cfg > 1 else "unguided"


def _theirs(draw: Callable[[float], Tensor], cfg: float) -> Tensor:
    torch.manual_seed(SEED)
    try:
        return draw(cfg)
    except Exception as error:
        raise UnsupportedError(
            f"model: its own sample_tokens fails on one image (cfg = {cfg:g}): {type(error).__name__}: {error}; nothing is proven "
            "then. Pass check=False to accelerate it all the same"
        ) from error


def _ours(draw: Callable[[str, float], Tensor], solver: str, cfg: float) -> Tensor:
    torch.manual_seed(SEED)
    return draw(solver, cfg)


def _compared(name: str, theirs: Any, ours: Tensor) -> float:
    theirs = theirs if isinstance(theirs, Tensor) else torch.full_like(ours, torch.nan)
    try:
        return compared(theirs, ours, least=BOUND)[0]
    except Difference as difference:
        raise refuse(
            f"its own sample_tokens generates another image than ours (one image, {name})",
            difference,
            "names and shapes are the same, so a method, a sampler or a module's computation is another",
            "Served are FlowAR and xAR as published, with Euler and Euler-Maruyama sampling",
        ) from None
