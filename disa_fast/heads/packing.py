"""What heads of every kind share: parameters that somebody else owns, what backends derive from them, checks of arguments."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Packed = TypeVar("Packed")
Net = TypeVar("Net", bound=nn.Module)


class Packing:
    """Holds on to the module that owns the parameters, copies nothing that need not be laid out anew, and notices at the next
    call when parameters were changed in place, loaded, moved or cast. (Writes through `param.data` leave no trace in
    PyTorch's version counter: call `refresh()` after those.)
    """

    any_parameter = "input_proj.weight"  # whose dtype and device are the head's

    def __init__(self, net: nn.Module, spec: Any) -> None:
        self._net, self.spec = net, spec
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._fingerprint: tuple = ()
        self._packed: dict[tuple[str, torch.dtype], Any] = {}

    def __getstate__(self) -> dict:
        return {"_net": self._net, "spec": self.spec}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def refresh(self) -> None:
        """Forget everything derived from the parameters; the next call lays it out anew."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        if self._packed and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # other streams may still be reading what goes
        self._packed.clear()

    @property
    def dtype(self) -> torch.dtype:
        return self._net.get_parameter(self.any_parameter).dtype

    @property
    def device(self) -> torch.device:
        return self._net.get_parameter(self.any_parameter).device

    def packed(self, kind: str, dtype: torch.dtype, build: Callable[[dict[str, Tensor], Any], Packed]) -> Packed:
        """build(parameters and buffers in `dtype`, spec), kept under (kind, dtype) until one changes."""
        with self._lock:
            fingerprint = tuple(
                (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in _tensors(self._net)
            )
            if fingerprint != self._fingerprint:
                self._forget()
                self._fingerprint = fingerprint
            if (kind, dtype) not in self._packed:
                named = (*self._net.named_parameters(), *self._net.named_buffers())
                self._packed[kind, dtype] = build({name: p.detach().to(dtype) for name, p in named}, self.spec)
                settle(self.device)
            return self._packed[kind, dtype]

    def graph_counters(self) -> dict[str, int]:
        """CUDA graphs of this head, as Graphs.counters says, over all dtypes; empty where none could be."""
        with self._lock:
            graphs = [packed.graphs for packed in self._packed.values() if hasattr(packed, "graphs")]
        held = [each.counters() for each in graphs]  # without the lock, for which a capture may be waiting
        return {name: sum(counters[name] for counters in held) for name in held[0]} if held else {}


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """module.parameters() and buffers(), which take 75 us of every call of a MAR-L head, against 21 here."""
    for held in (module._parameters, module._buffers):
        for tensor in held.values():
            if tensor is not None:
                yield tensor
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


def settle(device: torch.device) -> None:
    """Wait for the current stream: what was made on it and will be kept is then there for every stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def state_of(sd: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a state dict whose keys start with `prefix`, without it. ValueError for what is not a floating point tensor."""
    part = {name.removeprefix(prefix): tensor for name, tensor in sd.items() if name.startswith(prefix)}
    for name, tensor in part.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"state dict: {name}: expected a floating point tensor, got {describe(tensor)}")
    return part


def holding(sd: Mapping[str, Tensor], make: Callable[[Any], Net], spec: Any) -> Net:
    """make(spec) with the very tensors of `sd`, frozen."""
    with torch.device("meta"):
        net = make(spec)
    net.load_state_dict(sd, assign=True)
    return net.requires_grad_(False)


def scalar(name: str, value: float | Tensor) -> float:
    """A finite number. ValueError naming the argument for anything else."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a one-element tensor, got {describe(value)}")
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number or a one-element tensor, got {value!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} of {value.dtype} on {value.device}"
    return repr(value)
