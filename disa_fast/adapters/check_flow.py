"""The check of FlowAR- and xAR-shaped objects: an image of their own `sample_tokens` against ours, in few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .check import SEED, DifferenceError, compared, hooked, in_float32, is_degenerate, parameters_made_by, random_like, refuse

BOUND = 1e-4  # relative, of a whole image in float32


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
    ours: Callable[[str, str, float], Tensor],
    solvers: Sequence[str],
    backend: str,
    guidance: float,
) -> Mapping[str, object]:
    """The errors of ours against the object's own, each relative: "guided" with random weights, which
    tell one function from another whatever the object's are, and "unguided" with the object's, in
    float32; "error", the larger, "bound", and "solver", that of `solvers` which the object's own is.

    theirs(cfg), ours(backend, solver, cfg): an image each, from the same seed, over the parameters
    that the object has at the time. Raises UnsupportedError, with the errors, where they differ.
    """
    degenerate = is_degenerate(model)
    refusals = []
    for solver in solvers:
        errors = {}
        try:
            for cfg in (guidance, 1.0):
                as_random = cfg > 1 or degenerate
                with parameters_made_by(model, _random if as_random else in_float32):
                    errors["guided" if cfg > 1 else "unguided"] = _error(theirs, ours, backend, solver, cfg)
        except UnsupportedError as refusal:
            refusals.append(refusal)
            continue
        return {"error": max(errors.values()), "bound": BOUND, **errors, "solver": solver}
    raise refusals[0]


def _random(name: str, parameter: Tensor) -> Tensor:
    return random_like(parameter)


def _error(
    theirs: Callable[[float], Tensor], ours: Callable[[str, str, float], Tensor], backend: str, solver: str, cfg: float
) -> float:
    torch.manual_seed(SEED)
    try:
        their_image = theirs(cfg)
    except Exception as error:
        raise UnsupportedError(
            f"model: its own sample_tokens fails on one image (cfg = {cfg:g}): {type(error).__name__}: {error}; nothing is proven "
            "then. Pass check=False to accelerate it all the same"
        ) from error
    torch.manual_seed(SEED)
    our_image = ours(backend, solver, cfg)
    their_image = their_image if isinstance(their_image, Tensor) else torch.full_like(our_image, torch.nan)
    try:
        return compared(their_image, our_image, least=BOUND)[0]
    except DifferenceError as difference:
        torch.manual_seed(SEED)
        plain = ours("reference", solver, cfg)  # whose difference from the backend's is what rounding makes here
        try:
            return compared(their_image, our_image, plain, BOUND)[0]
        except DifferenceError:
            pass
        raise refuse(
            f"its own sample_tokens generates another image than ours (one image, {'guided' if cfg > 1 else 'unguided'})",
            difference,
            "names and shapes are the same, so a method, a sampler or a module's computation is another",
            "Served are FlowAR and xAR as published, with Euler and Euler-Maruyama sampling",
        ) from None
