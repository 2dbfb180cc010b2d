"""What a checkpoint is: of which system, of which size, and what keeps it from being that. Of the numbers no more is asked than
whether they are numbers."""

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
from .checkpoint import on_meta, read_config, read_weights, used
from .contents import listed, not_finite
from .infer import NOTHING, Given, Inferred, NotToldError, infer
from .systems import CUSTOM, SYSTEMS, Model, config_beside

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
FAR_NEARER = 4  # times as many differences make a published size less likely than a custom one
VAE, UNKNOWN = "a VAE like KL-16, which makes pixels of latents", "nothing that is known here"


@dataclass(frozen=True)
class Found:
    """What a checkpoint is.

    system: a key of SYSTEMS; None for anything else, of which `other` says what it seems to be. size: the published one that comes
    nearest; OWN where the file says how it is built; CUSTOM where names and shapes tell it, as `inferred` has it. Compared with the
    model of that size: missing, unexpected and misshapen names, the latter with the (expected, found) shapes, and `unused` ones,
    which that model does without. head: that of the model. parameters: numbers that are loaded, but for buffers. dtypes: how many
    tensors are of each. prefix: what was taken off in front of all names. not_finite: how many NaN and inf are in which tensors of
    those that are used. nearly: the custom size to which the file comes far nearer than to a published one, without fitting it.
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
    inferred: Inferred | None = None
    prefix: str = ""
    not_finite: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    nearly: Found | None = None

    @property
    def differences(self) -> int:
        """How many names keep it from being of its size."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)


def identify(path: str | Path, ema: bool = True, given: Given = NOTHING) -> Found:
    """What the checkpoint at `path` is; of a training checkpoint, those weights that `ema` picks (see read_state_dict). Reads it
    from end to end. given: what shapes do not tell of a custom size.

    Raises FileNotFoundError, ValueError for a file that cannot be read, ModuleNotFoundError for a Harmon without transformers.
    """
    weights, config = read_weights(path, ema), read_config(path)
    state = weights.state
    if config is None:
        found = recognize(state, dataclasses.replace(given, config=config_beside(path)), path)
    elif config[0] in SYSTEMS:
        system, arguments = config
        found = compare(state, system, OWN, on_meta(lambda: SYSTEMS[system].make(**arguments), path, state))
    else:
        found = _other(state, f"what calls itself {config[0]!r}")
    needed = {name: tensor for name, tensor in state.items() if name not in set(found.unused)}
    return dataclasses.replace(found, has_ema=weights.has_ema, prefix=weights.prefix, not_finite=not_finite(needed))


def recognize(state: Mapping[str, Tensor], given: Given = NOTHING, path: str | Path = "") -> Found:
    """What a state dict is, whose tensors may be on meta: of the system that most names tell of, in its nearest published size, or
    in the custom one that it fits."""
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
            return found[-1]
    published = min(found, key=lambda one: one.differences)
    custom = _custom(state, system, given, path)
    if custom is None or custom.differences * FAR_NEARER > published.differences:
        return published
    return dataclasses.replace(published, nearly=custom) if custom.differences else custom


def _custom(state: Mapping[str, Tensor], system: str, given: Given, path: str | Path) -> Found | None:
    """Against the model whose size names and shapes tell, if they tell one."""
    try:
        inferred = infer(system, state, given)
        model = on_meta(lambda: SYSTEMS[system].make(**inferred.arguments), path, state, described=True)
    except ModuleNotFoundError:
        raise
    except NotToldError:
        return None
    except ValueError:
        if given != Given(config=given.config):  # what the user gave may be what does not fit
            raise
        return None
    return dataclasses.replace(compare(state, system, CUSTOM, model), inferred=inferred)


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
    elif found.inferred is not None:
        lines = {"system": found.system, "size": f"custom size: {found.inferred}"}
        lines |= {"taken for granted": "".join(f"\n  {text}" for text in found.inferred.assumed)} if found.inferred.assumed else {}
        lines |= {"to be given": "".join(f"\n  {text}" for text in found.inferred.open)} if found.inferred.open else {}
    else:
        lines = {"system": found.system, "size": found.size if not found.differences else f"{found.size} comes nearest"}
    lines["parameters"] = f"{found.parameters:,}"
    lines["dtype"] = ", ".join(f"{_name(dtype)} ({count} tensors)" for dtype, count in found.dtypes.items())
    lines["model_ema"] = "yes" if found.has_ema else "no"
    if found.prefix:
        lines["prefix"] = f"{found.prefix}, taken off all names"
    if found.not_finite:
        lines["NaN or inf"] = f"in {len(found.not_finite)} tensors: {listed(found.not_finite)}"
    if found.system is not None:
        lines |= {kind: _few(names) for kind, names in _kinds(found).items()}
        if found.nearly is not None:
            but = "; ".join(f"{kind} {_few(names)}" for kind, names in _kinds(found.nearly).items() if names and kind != "unused")
            lines["custom size"] = f"it comes far nearer to {found.nearly.inferred}, but for: {but}"
        if not found.differences:
            lines |= _backends(found, rows)
    return "\n".join(f"{name}:{'' if text.startswith(chr(10)) else ' '}{text}" for name, text in lines.items())


def _kinds(found: Found) -> dict[str, Sequence[str]]:
    """Names by what is the matter with them."""
    misshapen = [f"{name}: {shape} where {expected} is expected" for name, (expected, shape) in found.misshapen.items()]
    return {"missing": found.missing, "unexpected": found.unexpected, "misshapen": misshapen, "unused": found.unused}


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
