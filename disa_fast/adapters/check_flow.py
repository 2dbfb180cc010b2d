"""The check of FlowAR- and xAR-shaped objects: an image of their own `sample_tokens` against ours, in few steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .check import (
    SEED,
    DifferenceError,
    Shadowed,
    compared,
    hooked,
    in_float32,
    is_degenerate,
    parameters_made_by,
    random_like,
    refuse,
    structure_of,
)

BOUND = 1e-4  # relative, of a whole image in float32
ILL_CONDITIONED = 1e-2  # relative bound above which rounding hides too much


def refuse_hooks(model: nn.Module, shadowed: Shadowed) -> None:
    """Raise UnsupportedError for hooks and replaced methods, none of which would be called."""
    names = hooked(model, shadowed)
    if names:
        raise UnsupportedError(
            f"model: forward hooks, or methods that were replaced on the object, in {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}: accelerated, the whole of sample_tokens runs here and none of them would be "
            "called. Remove them first, or pass check=False"
        )


def one_of_a_kind(blocks: nn.ModuleList) -> nn.ModuleList:
    """The first of all blocks that compute the same function of their parameters."""
    kinds: dict[bytes, nn.Module] = {}
    for block in blocks:
        kinds.setdefault(structure_of(block, apart_from=block), block)
    return nn.ModuleList(kinds.values())


@dataclass(frozen=True)
class Image:
    """An image to compare: its class, counted over all of them, its guidance scale, and whether with random
    weights, which tell one function from another whatever the object's are, or with the object's."""

    label: int
    cfg: float
    as_random: bool

    @property
    def name(self) -> str:
        return "guided" if self.cfg > 1 else "unguided"


IMAGES = (Image(-1, 5.0, as_random=True), Image(1, 1.0, as_random=False))


def prove(
    model: nn.Module,
    theirs: Callable[[Image], Tensor],
    ours: Callable[[Image, str, str], Tensor],
    solvers: Sequence[str],
    backend: str,
) -> Mapping[str, object]:
    """The errors of ours against the object's own over IMAGES, each relative, under "guided" and
    "unguided"; "error", the larger, and its "bound"; "solver", that of `solvers` which the object's own is.

    theirs(image), ours(image, backend, solver): from the same seed, over the parameters that the model
    has at the time. Raises UnsupportedError, with the errors, where they differ.
    """
    degenerate = is_degenerate(model)
    refusals = []
    for solver in solvers:
        errors: dict[str, tuple[float, float]] = {}
        try:
            for image in IMAGES:
                as_random = image.as_random or degenerate
                with parameters_made_by(model, _random if as_random else in_float32):
                    errors[image.name] = _compared(theirs, ours, backend, solver, image)
                if errors[image.name][1] > ILL_CONDITIONED:  # the object's weights tell nothing, so that others must
                    with parameters_made_by(model, _random):
                        errors[image.name] = _compared(theirs, ours, backend, solver, image)
        except UnsupportedError as refusal:
            refusals.append(refusal)
            continue
        error, bound = max(errors.values())
        return {"error": error, "bound": bound, **{name: each for name, (each, _) in errors.items()}, "solver": solver}
    raise refusals[0]


def _random(name: str, parameter: Tensor) -> Tensor:
    return random_like(parameter)


def _compared(
    theirs: Callable[[Image], Tensor], ours: Callable[[Image, str, str], Tensor], backend: str, solver: str, image: Image
) -> tuple[float, float]:
    torch.manual_seed(SEED)
    try:
        their_image = theirs(image)
    except Exception as error:
        raise UnsupportedError(
            f"model: its own sample_tokens fails on one image (cfg = {image.cfg:g}): {type(error).__name__}: {error}; nothing is "
            "proven then. Pass check=False to accelerate it all the same"
        ) from error
    torch.manual_seed(SEED)
    our_image = ours(image, backend, solver)
    their_image = their_image if isinstance(their_image, Tensor) else torch.full_like(our_image, torch.nan)
    try:
        return compared(their_image, our_image, least=BOUND)
    except DifferenceError as difference:

        def plain() -> Tensor:  # whose difference from the backend's is what rounding makes here
            torch.manual_seed(SEED)
            return ours(image, "reference", solver)

        with contextlib.suppress(DifferenceError):
            return compared(their_image, our_image, plain, BOUND)
        raise refuse(
            f"its own sample_tokens generates another image than ours (one image, {image.name})",
            difference,
            "names and shapes are the same, so a method, a sampler or a module's computation is another",
            "Served are FlowAR and xAR as published, with Euler and Euler-Maruyama sampling",
        ) from None
