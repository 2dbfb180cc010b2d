"""What a checkpoint is: of which system, of which size, and what keeps it from being that. Reads names, shapes and dtypes alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends
from .checkpoint import has_ema, on_meta, read_config, shapes_of, used
from .systems import SYSTEMS, Model

if TYPE_CHECKING:
    from .backends import Spec

OWN = "own"

# What names begin with in checkpoints of this kind alone.
TELLTALES = {
    "mar": ("diffloss.",),
    "flowar": ("flownet.",),
    "xar": ("pred.", "time_embed."),
    "harmon": ("mar.", "llm."),
    None: ("encoder.down.", "decoder.up."),
}
VAE, UNKNOWN = "a VAE like KL-16, which makes pixels of latents", "nothing that is known here"


@dataclass(frozen=True)
class Found:
    """What a checkpoint is.

    system: a key of SYSTEMS; None for anything else, of which `other` says what it seems to be. size: the published one that comes
    nearest, or OWN where the file says how it is built. Compared with the model of that size: missing, unexpected and misshapen
    names, the latter with the (expected, found) shapes, and `unused` ones, which that model does without. head: that of the model.
    parameters: numbers that are loaded, but for buffers. dtypes: how many tensors are of each.
    """

    parameters: int
    dtypes: Mapping[torch.dtype, int]
    system: str | None = None
    other: str = ""
    size: str | None = None
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    misshapen: Mapping[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    unused: Sequence[str] = ()
    head: Spec | None = None
    has_ema: bool = False

    @property
    def differences(self) -> int:
        """How many names keep it from being of its size."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)


def identify(path: str | Path, ema: bool = True) -> Found:
    """What the checkpoint at `path` is; of a training checkpoint, those weights that `ema` picks (see read_state_dict).

    Raises FileNotFoundError, ValueError for a file that cannot be read, ModuleNotFoundError for a Harmon without transformers.
    """
    state, config = shapes_of(path, ema), read_config(path)
    if config is None:
        found = recognize(state)
    elif config[0] in SYSTEMS:
        system, arguments = config
        found = compare(state, system, OWN, on_meta(lambda: SYSTEMS[system].make(**arguments), path, state))
    else:
        found = _other(state, f"what calls itself {config[0]!r}")
    return dataclasses.replace(found, has_ema=has_ema(path))


def recognize(state: Mapping[str, Tensor]) -> Found:
    """What a state dict is, whose tensors may be on meta: of the system that most names tell of, in its nearest size."""
    told = {system: sum(name.startswith(begin) for name in state) for system, begin in TELLTALES.items()}
    system = max(told, key=told.__getitem__)
    if system is None or not told[system]:
        return _other(state, VAE if told[None] else UNKNOWN)
    found = []
    for size in SYSTEMS[system].sizes:
        with torch.device("meta"):
            model = SYSTEMS[system].make(size=size)
        found.append(compare(state, system, size, model))
        if not found[-1].differences:
            break
    return min(found, key=lambda one: one.differences)


def compare(state: Mapping[str, Tensor], system: str, size: str, model: Model) -> Found:
    """A state dict against a model of `system`; both may be on meta."""
    own, given, buffers = model.state_dict(), used(model, state), dict(model.named_buffers())
    shapes = {name: (list(own[name].shape), list(tensor.shape)) for name, tensor in given.items() if name in own}
    return Found(
        parameters=sum(tensor.numel() for name, tensor in given.items() if name not in buffers),
        dtypes=_dtypes(given),
        system=system,
        size=size,
        missing=[name for name in own if name not in given],
        unexpected=[name for name in given if name not in own],
        misshapen={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        unused=[name for name in state if name not in given],
        head=model.head.spec,
    )


def report(found: Found, rows: int = 8) -> str:
    """Lines for people. For a checkpoint that fits, also which backend would run its head here with `rows` rows, and why."""
    if found.system is None:
        lines = {"system": f"none; it is {found.other}"}
    elif found.size == OWN:
        lines = {"system": found.system, "size": "its own, as it says itself"}
    else:
        lines = {"system": found.system, "size": found.size if not found.differences else f"{found.size} comes nearest"}
    lines["parameters"] = f"{found.parameters:,}"
    lines["dtype"] = ", ".join(f"{_name(dtype)} ({count} tensors)" for dtype, count in found.dtypes.items())
    lines["model_ema"] = "yes" if found.has_ema else "no"
    if found.system is not None:
        misshapen = [f"{name}: {shape} where {expected} is expected" for name, (expected, shape) in found.misshapen.items()]
        kinds = {"missing": found.missing, "unexpected": found.unexpected, "misshapen": misshapen, "unused": found.unused}
        lines |= {kind: _few(names) for kind, names in kinds.items()}
        if not found.differences:
            lines |= _backends(found, rows)
    return "\n".join(f"{name}: {text}" for name, text in lines.items())


def _other(state: Mapping[str, Tensor], other: str) -> Found:
    return Found(sum(tensor.numel() for tensor in state.values()), _dtypes(state), other=other)


def _dtypes(state: Mapping[str, Tensor]) -> Mapping[torch.dtype, int]:
    return Counter(tensor.dtype for tensor in state.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "none"


def _backends(found: Found, rows: int) -> dict[str, str]:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.float32 if found.size == OWN else SYSTEMS[found.system].dtype  # as load_model has it
    why_not = backends.survey(found.head, dtype, device, rows)
    why = "".join(f"\n  {name}: {reason or backends.BACKENDS[name].about(dtype)}" for name, reason in why_not.items())
    chosen = backends.choose("auto", found.head, dtype, device, rows)
    return {"head": str(found.head), "backend": f"{chosen}, for {rows} rows in {_name(dtype)} on {device}{why}"}
