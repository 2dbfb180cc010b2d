"""What heads of every kind share: parameters that somebody else owns, what backends derive from them, checks of arguments."""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checks import FLOATS, describe, is_dense, is_plain
from ..graphs import Graphs
from ..untraced import untraced

WORD = 8  # bytes
ROW = 1024  # numbers
_FACTORS = torch.randn(ROW, generator=torch.Generator(device="cpu").manual_seed(ROW), device="cpu", dtype=torch.float32)

_NOTHING = torch.empty(0, dtype=torch.int64, device="cpu")

Packed = TypeVar("Packed")
Net = TypeVar("Net", bound=nn.Module)


class Packing:
    """Holds on to the module that owns the parameters, copies nothing that need not be laid out anew, and notices at the next
    call when parameters were changed in place, loaded, moved or cast. Writes through `param.data` leave no trace in
    PyTorch's version counter: `follow()` compares the contents, once an image in the models and
    under `accelerate`; whoever calls `denoise` alone calls that, or `refresh()`, after such writes.
    """

    any_parameter = "input_proj.weight"  # whose dtype and device are the head's

    def __init__(self, net: nn.Module, spec: Any) -> None:
        self._net, self.spec = net, spec
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._seen: _Seen | None = None
        self._digest = _NOTHING
        self._packed: dict[tuple[str, torch.dtype], Any] = {}
        self._streams: set[int] = set()  # on which all of them may be read

    def __getstate__(self) -> dict:
        return {"_net": self._net, "spec": self.spec}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def refresh(self) -> None:
        """Forget everything derived from the parameters; the next call lays it out anew."""
        with self._lock:
            self._forget()

    @untraced
    def follow(self) -> None:
        """Notice parameters that were written through `.data` since they were laid out.

        Reads twice what there are copies of, which on a CPU takes less than 0.5 % of an image
        (bench/results/swap.json). Does nothing before the first call has laid anything out.
        """
        with self._lock:
            self._forget_if_written()

    def _forget_if_written(self) -> None:
        if self._packed and not same_digest(digest_of(self._copied()), self._digest):
            self._forget()

    def _copied(self) -> Iterable[Tensor]:
        """The parameters and buffers of which what is laid out holds copies, or other things made of them."""
        return _tensors(self._net)

    def _forget(self) -> None:
        """Without a wait for the device, which would end captures that other threads are in the middle of: `_read_here` has told
        the allocator which streams may still be reading what goes, and Graphs wait for their own."""
        self._packed.clear()
        self._digest = _NOTHING

    def _read_here(self) -> None:
        """From now on the memory of what is laid out, once freed, also waits for the current stream before it is used again.

        PyTorch forgets that for a stream which is told during one capture, any thread's, of memory that is freed during one.
        """
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._streams:
            for tensor in tensors_in(self._packed):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
            self._streams.add(stream.cuda_stream)

    @property
    def dtype(self) -> torch.dtype:
        return operator.attrgetter(self.any_parameter)(self._net).dtype

    @property
    def device(self) -> torch.device:
        return operator.attrgetter(self.any_parameter)(self._net).device

    def packed(self, kind: str, dtype: torch.dtype, build: Callable[[dict[str, Tensor], Any], Packed]) -> Packed:
        """build(parameters and buffers in `dtype`, spec), kept under (kind, dtype) until one changes."""
        with self._lock:
            if self._seen is None or not self._seen.is_still_so():
                seen = _Seen(self._net)
                self.check_structure()
                self._forget()
                self._seen = seen
            if (kind, dtype) not in self._packed:
                self._forget_if_written()
                named = named_tensors(self._net).items()
                made = build({name: p.detach().to(dtype) for name, p in named}, self.spec)
                settle(self.device)  # an error within a capture, where nothing that is made is there yet
                self._packed[kind, dtype] = made
                self._digest = digest_of(self._copied())
                self._streams.clear()
            if self.device.type == "cuda":
                self._read_here()
            return self._packed[kind, dtype]

    def check_structure(self) -> None:
        """Raise UnsupportedError if the module is not of this head's sizes any more."""

    def graph_counters(self) -> dict[str, int]:
        """CUDA graphs of this head, as Graphs.counters says, over all dtypes; empty where none could be."""
        with self._lock:
            graphs = [packed.graphs for packed in self._packed.values() if hasattr(packed, "graphs")]
        held = [each.counters() for each in graphs]  # without the lock, for which a capture may be waiting
        return {name: sum(counters[name] for counters in held) for name in held[0]} if held else {}


_version, _dtype = operator.attrgetter("_version"), operator.attrgetter("dtype")


class _Seen:
    """The tensors that a module and its submodules have, and what tells whether one was changed in place, moved or cast.

    Compared at every call. Walking the modules again would take most of its time, so what is looked at are their own
    dictionaries. Devices are not: no two have an address in common.
    """

    def __init__(self, net: nn.Module) -> None:
        held = [each for module in net.modules() for each in (module._parameters, module._buffers, module._modules)]
        self._empty, self._filled = [each for each in held if not each], [each for each in held if each]
        self._values = self._values_now()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._numbers = self._numbers_now()

    def is_still_so(self) -> bool:
        values = self._values_now()
        if any(self._empty) or len(values) != len(self._values) or not all(map(operator.is_, values, self._values)):
            return False
        try:
            return self._numbers_now() == self._numbers
        except RuntimeError:  # one has become a tensor of inference mode, which has no version
            return False

    def _values_now(self) -> list[Tensor | nn.Module | None]:
        return list(itertools.chain.from_iterable(map(dict.values, self._filled)))

    def _numbers_now(self) -> list[Any]:
        return [*map(Tensor.data_ptr, self._tensors), *map(_version, self._versioned), *map(_dtype, self._tensors)]


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors that a value holds in attributes, containers and arguments of partial functions, but for those of graphs, which
    look after their memory themselves, and of caches, which are empty at first."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    elif isinstance(value, functools.partial):
        parts = (*value.args, *value.keywords.values())
    else:
        parts = () if isinstance(value, Graphs | type) else vars(value).values() if hasattr(value, "__dict__") else ()
    for part in parts:
        yield from tensors_in(part)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """module.parameters() and buffers(), in a third of their time."""
    for held in (module._parameters, module._buffers):
        for tensor in held.values():
            if tensor is not None:
                yield tensor
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that two modules share has two names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def digest_of(tensors: Iterable[Tensor]) -> Tensor:
    """A fingerprint of contents, [n] int64. Of each tensor the sum of its 64-bit words, which sees any
    single change, and each 1024 numbers times random ones, which sees changed signs and orders too.
    Two readings, at memory's speed."""
    tensors = [tensor.detach() for tensor in tensors if not tensor.is_meta]
    if not tensors:
        return _NOTHING
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.cat([part for tensor in tensors for part in _digest(tensor)])


@functools.cache
def _factors(device: torch.device, dtype: torch.dtype) -> Tensor:
    return _FACTORS.to(device, dtype)  # and not for each parameter, which on a GPU is a copy from the host


def same_digest(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and torch.equal(a, b)


def _digest(tensor: Tensor) -> list[Tensor]:
    flat = tensor.reshape(-1).contiguous()
    if flat.data_ptr() % WORD:
        flat = flat.clone()
    bytes_ = flat.view(torch.uint8)
    whole = len(bytes_) // WORD * WORD
    parts = [bytes_[:whole].view(torch.int64).sum()[None], bytes_[whole:].long()]
    if flat.is_floating_point() and len(flat):
        length = min(ROW, len(flat))
        rows = len(flat) // length
        factors = _factors(flat.device, flat.dtype)
        products = [flat[: rows * length].view(rows, length) @ factors[:length]]
        products += [(flat[rows * length :] * factors[: len(flat) - rows * length]).sum()[None]]
        parts += [_bits(product) for product in products]
    return parts


def _bits(numbers: Tensor) -> Tensor:
    """Floating point numbers as whole ones, which equal themselves also where they are NaN."""
    return numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()]).long()


def settle(device: torch.device) -> None:
    """Wait for the current stream: what was made on it and will be kept is then there for every stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def read_here(kept: Tensor) -> Tensor:
    """`kept`, which may go while the current stream still reads it: its memory then waits for that."""
    if kept.is_cuda:
        kept.record_stream(torch.cuda.current_stream(kept.device))
    return kept


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
    named = named_tensors(net) if buffers else dict(net.named_parameters(remove_duplicate=False))
    check_parameters(named, f"net ({type(net).__name__})")
    return named


def check_parameters(named: Mapping[str, Tensor], where: str) -> None:
    """ValueError for what is not a dense floating point tensor on the device of the first, or is of a class with operators of its
    own; `where` is what they came from."""
    first = next(iter(named.values()), None)
    for name, tensor in named.items():
        if not is_plain(tensor):
            raise ValueError(
                f"{where}: {name}: expected a plain tensor, got {type(tensor).__name__}, which has operators of its own; pass the "
                "model before it is quantised or sharded, or dequantise it"
            )
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
