"""What heads of every kind share: parameters that somebody else owns, what backends derive from them, checks of arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checks import FLOATS, describe, is_dense

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
    """The part of a state dict whose keys start with `prefix`, without it. ValueError for what are no parameters."""
    if not isinstance(sd, Mapping) or not all(isinstance(name, str) for name in sd):
        raise ValueError(f"sd: expected a state dict, tensors by name, got {sd!r}")
    if not isinstance(prefix, str):
        raise ValueError(f"prefix: expected what the names begin with, got {prefix!r}")
    part = {name.removeprefix(prefix): tensor for name, tensor in sd.items() if name.startswith(prefix)}
    check_parameters(part, "state dict")
    return part


def parameters_of(net: nn.Module, buffers: bool = False) -> dict[str, Tensor]:
    """A module's parameters by name, and its buffers or not. ValueError for what is no module, and for what are no parameters."""
    if not isinstance(net, nn.Module):
        raise ValueError(f"net: expected a torch.nn.Module, got {net!r}")
    named = dict(net.named_parameters()) | (dict(net.named_buffers()) if buffers else {})
    check_parameters(named, f"net ({type(net).__name__})")
    return named


def check_parameters(named: Mapping[str, Tensor], where: str) -> None:
    """ValueError for what is not a dense floating point tensor on the device of the first; `where` is what they came from."""
    first = next(iter(named.values()), None)
    for name, tensor in named.items():
        if not is_dense(tensor) or tensor.dtype not in FLOATS:
            raise ValueError(f"{where}: {name}: expected a floating point tensor, got {describe(tensor)}")
        if tensor.device != first.device:
            raise ValueError(f"{where}: {name}: expected it on {first.device}, where the others are, got {describe(tensor)}")


def holding(sd: Mapping[str, Tensor], make: Callable[[Any], Net], spec: Any) -> Net:
    """make(spec) with the very tensors of `sd`, frozen."""
    with torch.device("meta"):
        net = make(spec).requires_grad_(False)  # before: tensors of inference mode may not be asked for gradients, not even once
    net.load_state_dict(sd, assign=True)
    return net
