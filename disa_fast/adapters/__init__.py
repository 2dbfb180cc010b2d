"""Which structure an object has, and who knows how to accelerate it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UnsupportedError
from ..heads.packing import Packing
from .accelerated import Accelerated
from .flow import AcceleratedFlowAR, AcceleratedXAR
from .mar import AcceleratedHarmon, AcceleratedMAR

ADAPTERS: dict[str, type[Accelerated]] = {
    "flownet": AcceleratedFlowAR,
    "clusters": AcceleratedXAR,
    "diffloss": AcceleratedMAR,
    "mar": AcceleratedHarmon,
}


def adapter_of(model: nn.Module) -> type[Accelerated]:
    """The adapter for objects like this. UnsupportedError if there is none, or no need of one."""
    if isinstance(getattr(model, "head", None), Packing):
        raise UnsupportedError(
            f"model: {type(model).__name__} is disa_fast's own, already fast: pass schedule= to its sample_tokens"
        )
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        raise UnsupportedError(f"model: {type(model).__name__} wraps the model; pass model.module, which each process has")
    if isinstance(model, nn.Module) and "_orig_mod" in model._modules:
        raise UnsupportedError(
            "model: it is compiled; pass model._orig_mod, and compile it afterwards, or call its sample_tokens compiled"
        )
    for attribute, adapter in ADAPTERS.items():
        if isinstance(model, nn.Module) and hasattr(model, attribute):
            return adapter
    raise UnsupportedError(
        "model: expected a MAR-shaped object, with diffloss.net and diffloss.sample, a Harmon-shaped one, with these in its mar, a "
        f"FlowAR-shaped one, with flownet, or an xAR-shaped one, with clusters; {type(model).__name__} has none of them"
    )
