"""Which backend runs, at what precision, and why."""

from __future__ import annotations

import torch

from . import backends
from .accelerate import Accelerated, handle_of
from .adapters.accelerated import PARAMETERS
from .checks import whole
from .errors import UnsupportedError
from .heads.packing import Packing


def explain(head_or_model: object, rows: int = 8) -> dict[str, object]:
    """Print, and return as a dict, what a call with `rows` rows would run.

    head_or_model: a head, one of disa_fast.models, or a model given to `accelerate`. Raises UnsupportedError for anything else.

    "dtype" is that of the network's matrix products and "dtype_from" says why: of an accelerated
    model it is torch.autocast's where explain is called under it.
    """
    head, dtype, facts = _head_of(head_or_model)
    rows = whole("rows", rows)
    why_not = backends.survey(head.spec, dtype, head.device, rows)
    facts = {
        "head": str(head.spec),
        "dtype": str(dtype),
        "dtype_from": facts.get("dtype_from", PARAMETERS),
        "device": str(head.device),
        "backend": backends.choose(facts.get("backend", "auto"), head.spec, dtype, head.device, rows),
        "graphs": head.graph_counters(),
        "why": {name: reason or backends.BACKENDS[name].about(dtype) for name, reason in why_not.items()},
        **{name: value for name, value in facts.items() if name not in ("backend", "dtype_from")},
    }
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:" if value else f"{name}: none")
            for key, text in value.items():
                print(f"  {key}: {text}")
        else:
            print(f"{name}: {value}")
    return facts


def _head_of(thing: object) -> tuple[Packing, torch.dtype, dict[str, object]]:
    """(head, dtype of its products, what else there is to say)."""
    if isinstance(thing, Packing):
        return thing, thing.dtype, {}
    if isinstance(getattr(thing, "head", None), Packing) and not isinstance(thing, Accelerated):
        return thing.head, thing.head.dtype, {}
    handle = thing if isinstance(thing, Accelerated) else handle_of(thing)
    if handle is not None:
        dtype, reason = handle.network_dtype()
        settings = {"backend": handle.backend, "schedule": handle.schedule, "solver": handle.solver, "clip": handle.clip}
        return handle.head, dtype, settings | {"dtype_from": reason}
    kind = f"an unaccelerated {type(thing).__name__}" if isinstance(thing, torch.nn.Module) else repr(thing)
    raise UnsupportedError(f"head_or_model: expected a head, a disa_fast model or an accelerated model, got {kind}")
