"""What the checks of `accelerate` share: a copy to try, other weights for a while, comparison, and what is already proven."""

from __future__ import annotations

import collections
import contextlib
import copy
import hashlib
import inspect
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..heads.packing import digest_of

LEAST_BOUND = 5e-5  # relative: float32's rounding over a few steps, whatever the object
FLOORS = 10  # times the rounding error that float32 has on this very input
SEED = 20250520

# What a backend may be off in 16 bits, relative.
HALF_BOUND = {torch.bfloat16: 0.1, torch.float16: 0.02}

LOCK = threading.RLock()  # around whatever changes objects that other threads may accelerate, too


# The object as it was ---------------------------------------------------------------------------------------------------


def stand_in(module: nn.Module, shadowed: Iterable[tuple[nn.Module, str, dict[str, object]]]) -> nn.Module:
    """A copy of a module with the very parameters of the original, so that nothing large is copied and
    whatever the copy changes is its own; without what shadows the original's methods now."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    shadowed = [(owner, name, before) for owner, name, before in shadowed if id(owner) in map(id, module.modules())]
    memo |= {id(owner.__dict__[name]): owner.__dict__[name] for owner, name, _ in shadowed}
    copied = copy.deepcopy(module, memo)
    for owner, name, before in shadowed:
        memo[id(owner)].__dict__.pop(name, None)
        memo[id(owner)].__dict__.update(before)
    return copied


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Run an object's own code in evaluation mode, without gradients, autocast and TF32; then put
    back random states, training modes, buffers, and the attributes of all its modules."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    modules = list(model.modules())
    held = [(module, _snapshot(module)) for module in modules]
    states = np.random.get_state(), random.getstate()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
        ):
            torch.backends.cuda.matmul.allow_tf32 = False
            for module in modules:
                module.training = False
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        np.random.set_state(states[0])
        random.setstate(states[1])
        for module, snapshot in held:
            _put_back(module, snapshot)


_CONTAINERS = (list, dict, set, bytearray, collections.deque)


Snapshot = tuple[dict[str, Any], dict[str, Any], dict[str, tuple[Tensor, Tensor]], list[tuple[Any, Any]]]


def _snapshot(module: nn.Module) -> Snapshot:
    attributes = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    contents = {name: value.copy() for name, value in attributes.items() if isinstance(value, _CONTAINERS)}
    buffers = {name: (b, b.clone()) for name, b in module._buffers.items() if b is not None}
    generators = [(value, _state(value)) for value in attributes.values() if isinstance(value, _GENERATORS)]
    return attributes, contents, buffers, generators


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


_OF_TORCH = ("_parameters", "_buffers", "_modules")


def _same_members(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same objects, whose own comparison may not be one."""
    pairs = [list(c.items()) if isinstance(c, dict) else [(None, one) for one in c] for c in (a, b)]
    return [(key, id(value)) for key, value in pairs[0]] == [(key, id(value)) for key, value in pairs[1]]


def _put_back(module: nn.Module, snapshot: Snapshot) -> None:
    attributes, contents, buffers, generators = snapshot
    for generator, state in generators:
        _set_state(generator, state)
    held = vars(module)
    for name in [name for name in held if name not in attributes and name not in _OF_TORCH]:
        del held[name]
    held.update(attributes)
    for name, content in contents.items():
        container = attributes[name]
        if not _same_members(container, content):
            container.clear()
            container.extend(content) if hasattr(container, "extend") else container.update(content)
    for name in [name for name in module._buffers if name not in buffers and module._buffers[name] is not None]:
        del module._buffers[name]
    for name, (buffer, content) in buffers.items():
        if not torch.equal(buffer, content):
            buffer.copy_(content)
        module._buffers[name] = buffer


# Other weights for a while ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def parameters_made_by(module: nn.Module, make: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """make(name, parameter) in the place of each parameter, and floating point buffers in float32, for
    as long as the block lasts; what modules share stays shared."""
    made: dict[int, Tensor] = {}
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for prefix, child in module.named_modules():
            for name, parameter in child._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    new = make(f"{prefix}.{name}".lstrip("."), parameter.detach())
                    made[id(parameter)] = nn.Parameter(new, requires_grad=False)
                changed.append((child._parameters, name, parameter))
                child._parameters[name] = made[id(parameter)]
            for name, buffer in child._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    changed.append((child._buffers, name, buffer))
                    child._buffers[name] = in_float32(name, buffer)
        yield
    finally:
        for held, name, tensor in changed:
            held[name] = tensor


def in_float32(name: str, parameter: Tensor) -> Tensor:
    """A parameter in float32; one that is, as it is."""
    return parameter.float()


_PATTERN = 65521  # a prime: no row of a weight repeats another


def random_like(parameter: Tensor, scale: float = 1.0) -> Tensor:
    """Normal numbers, float32, of a spread that keeps activations near 1, times `scale`; the same each
    time. A pattern over and over, which costs no more than a copy."""
    generator = torch.Generator(device="cpu").manual_seed(SEED + parameter.numel() % 1009)
    count = min(_PATTERN, max(1, parameter.numel()))
    pattern = torch.randn(count, generator=generator, device="cpu", dtype=torch.float32)
    spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
    pattern = (pattern * spread * scale).to(parameter.device)
    times = -(-parameter.numel() // len(pattern))
    return pattern.repeat(times)[: parameter.numel()].reshape(parameter.shape)


def is_degenerate(module: nn.Module) -> bool:
    """Whether a matrix of the parameters is zero everywhere, or any is not finite: then the module's
    output does not tell its function."""
    for parameter in module.parameters():
        total = parameter.detach().abs().sum(dtype=torch.float32 if parameter.element_size() < 4 else None)
        if not torch.isfinite(total) or (parameter.ndim > 1 and total == 0):
            return True
    return False


# Comparison -------------------------------------------------------------------------------------------------------------


class DifferenceError(Exception):
    """The object's own numbers and ours differ: by `error`, relative, where `bound` was allowed."""

    def __init__(self, error: float, bound: float) -> None:
        super().__init__(error, bound)
        self.error, self.bound = error, bound


def compared(
    theirs: Tensor, ours: Tensor, truth: Callable[[], Tensor] | None = None, least: float = LEAST_BOUND
) -> tuple[float, float]:
    """(error, bound) of theirs against ours.

    The error is the larger of the relative L2 error and the worst element's, relative to the largest.
    The bound is `least`. Beyond that theirs is measured against the truth, which is only then
    computed, and may be off by FLOORS times what ours is. Raises DifferenceError above the bound.
    """
    if theirs.shape != ours.shape:
        raise DifferenceError(float("inf"), least)
    theirs, ours = theirs.double(), ours.double()
    error, bound = relative_error(theirs, ours), least
    if not error <= bound and truth is not None:
        exact = truth().double()
        error, bound = relative_error(theirs, exact), max(least, FLOORS * relative_error(ours, exact))
    if not error <= bound:
        raise DifferenceError(error, bound)
    return error, bound


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """inf where one is finite and the other is not."""
    finite = truth.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    difference = torch.where(finite, actual - truth, 0.0)
    truth = torch.where(finite, truth, 0.0)
    tiny = torch.finfo(truth.dtype).tiny
    l2 = float(difference.norm() / truth.norm().clamp(min=tiny))
    worst = float(difference.abs().max() / truth.abs().max().clamp(min=tiny)) if truth.numel() else 0.0
    return max(l2, worst)


def refuse(what: str, difference: DifferenceError, why: str, served: str) -> UnsupportedError:
    """What `accelerate` says of an object that is not what it looks like."""
    return UnsupportedError(
        f"model: {what}: relative difference {difference.error:.2g}, where rounding explains {difference.bound:.2g}; {why}. "
        f"{served}. Pass check=False to accelerate it all the same, with other tokens than its own"
    )


# What is proven ---------------------------------------------------------------------------------------------------------

_proven: weakref.WeakKeyDictionary[nn.Module, dict[bytes, Mapping[str, object]]] = weakref.WeakKeyDictionary()
KEPT = 8  # proofs of one object, with other solvers and backends


def proven(model: nn.Module, key: bytes) -> Mapping[str, object] | None:
    """What the check of this very object found, if it has not changed since."""
    return _proven.get(model, {}).get(key)


def remember(model: nn.Module, key: bytes, found: Mapping[str, object]) -> None:
    proofs = _proven.setdefault(model, {})
    proofs.pop(key, None)
    proofs[key] = found
    while len(proofs) > KEPT:
        del proofs[next(iter(proofs))]


Shadowed = Iterable[tuple[nn.Module, str, dict[str, object]]]

_MODULES_OWN = frozenset(nn.Module().__dict__)
_OF_CLASSES = frozenset(("__slotnames__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__static_attributes__"))


def structure_of(*parts: object, apart_from: nn.Module | None = None, shadowed: Shadowed = ()) -> bytes:
    """A digest of what decides a function but for the values of parameters: of modules the classes with
    their methods and what these call, hooks, shapes, attributes, and contents of buffers; of anything
    else its content.

    apart_from: a part of one of the modules whose parameters' values do not count; those of the rest
    do. shadowed: attributes that are there for now, taken for what they were before.
    """
    facts = _Facts(apart_from, shadowed)
    digest = hashlib.sha256()
    for part in parts:
        for fact in facts.of(part):
            digest.update(fact if isinstance(fact, bytes) else repr(fact).encode())
            digest.update(b"\0")
    return digest.digest()


class _Facts:
    def __init__(self, apart_from: nn.Module | None, shadowed: Shadowed) -> None:
        self._seen: set[int] = set()
        self._apart = set() if apart_from is None else {id(p) for p in apart_from.parameters()}
        self._before = {(id(owner), name): before for owner, name, before in shadowed}

    def of(self, part: Any) -> Iterator[object]:
        if part is None or isinstance(part, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
            yield part
            return
        if id(part) in self._seen:
            return
        self._seen.add(id(part))
        if isinstance(part, nn.Module):
            yield from self._of_module(part)
        elif isinstance(part, np.ndarray):
            yield part.dtype.str, part.shape
            yield np.ascontiguousarray(part).tobytes() if part.dtype != object else repr(part)
        elif isinstance(part, Tensor):
            yield part.dtype, tuple(part.shape), str(part.device), id(type(part))
            if type(part) is Tensor and not part.is_meta:
                yield digest_of([part]).cpu().numpy().tobytes()
        elif isinstance(part, Mapping):
            for name in sorted(part, key=repr):
                yield repr(name)
                yield from self.of(part[name])
        elif isinstance(part, list | tuple | set | frozenset | collections.deque):
            yield type(part).__name__, len(part)
            for one in part:
                yield from self.of(one)
        elif isinstance(part, type):
            yield from self._of_class(part)
        elif isinstance(part, types.ModuleType):
            yield part.__name__
        elif inspect.isroutine(part):
            yield from self._of_function(part)
        else:
            yield from self._of_class(type(part))
            for name, value in sorted(getattr(part, "__dict__", {}).items()):
                yield name
                yield from self.of(value)

    def _of_module(self, root: nn.Module) -> Iterator[object]:
        yield tuple(torch.nn.modules.module._global_forward_hooks), tuple(torch.nn.modules.module._global_forward_pre_hooks)
        others = []
        for name, module in root.named_modules():
            self._seen.add(id(module))
            yield name
            yield from self._of_class(type(module))
            yield [tuple(hooks) for hooks in _hooks(module)]
            for tensor_name, parameter in module._parameters.items():
                if parameter is not None:
                    yield tensor_name, tuple(parameter.shape), parameter.dtype, str(parameter.device), id(type(parameter))
                    if self._apart and id(parameter) not in self._apart:
                        others.append(parameter)
            yield from self.of({f"buffer {key}": b for key, b in module._buffers.items() if b is not None})
            for attribute, value in sorted(self._attributes(module).items()):
                yield attribute
                yield from self.of(value)
        if others:
            yield digest_of(others).cpu().numpy().tobytes()

    def _attributes(self, module: nn.Module) -> dict[str, object]:
        """What a module holds beyond what every module does, without what shadows it now, and without the keys and values that it
        keeps from one call to the next."""
        held: dict[str, object] = {}
        for name, value in vars(module).items():
            before = self._before.get((id(module), name))
            if before is not None:
                held |= before
            elif name not in _MODULES_OWN and not _is_cache(name, value):
                held[name] = value
        return held

    def _of_class(self, kind: type) -> Iterator[object]:
        """The methods of a class and of its bases as they are now, which may have been patched."""
        if id(kind) in self._seen:
            yield id(kind)
            return
        self._seen.add(id(kind))
        for base in kind.__mro__[:-1]:
            own = base.__module__.partition(".")[0] not in ("torch", "builtins", "numpy", "enum")
            for name, value in vars(base).items():
                if own and inspect.isfunction(value):
                    yield name
                    yield from self._of_function(value)
                elif (own and name not in _OF_CLASSES) or name == "forward":
                    yield name, id(value) if callable(value) or isinstance(value, property) else repr(value)[:100]

    def _of_function(self, function: Any) -> Iterator[object]:
        """A function's code, defaults, what it closes over, and the globals that it names, one level deep."""
        inner = inspect.unwrap(getattr(function, "__func__", function))
        code = getattr(inner, "__code__", None)
        if code is None:
            yield id(inner)
            return
        if id(code) in self._seen:
            yield id(code)
            return
        self._seen.add(id(code))
        yield code.co_code, repr(code.co_consts), code.co_names
        yield from self.of([inner.__defaults__, inner.__kwdefaults__])
        for cell in inner.__closure__ or ():
            with contextlib.suppress(ValueError):  # of a cell that is still empty
                yield from self._of_name(cell.cell_contents, code.co_names)
        for name in code.co_names:
            if name in inner.__globals__:
                yield name
                yield from self._of_name(inner.__globals__[name], code.co_names)

    def _of_name(self, value: object, names: tuple[str, ...]) -> Iterator[object]:
        """Whatever a function's name stands for: of another module, what the function may take from it."""
        if isinstance(value, types.ModuleType):
            if value.__name__.partition(".")[0] not in ("torch", "numpy", "math"):
                yield [(name, id(vars(value)[name])) for name in names if name in vars(value)]
        elif inspect.isfunction(value):
            yield id(value), value.__code__.co_code, repr(value.__code__.co_consts)
        elif isinstance(value, bool | int | float | str | np.ndarray | Tensor | tuple | list | dict):
            yield from self.of(value)
        else:
            yield id(value) if isinstance(value, type) else type(value).__qualname__


def _is_cache(name: str, value: object) -> bool:
    """Whether an attribute is one of keys or values, by the names that published models give them."""
    return (name in ("k", "v") or "cache" in name) and (value is None or isinstance(value, Tensor))


def _hooks(module: nn.Module) -> list[Mapping[int, object]]:
    return [module._forward_hooks, module._forward_pre_hooks]


def shadowing(module: nn.Module, ours: set[str]) -> list[str]:
    """Methods of a module's class that the module itself replaces, as `forward` of LoRA or of offloading, but for `ours`."""
    return [
        name
        for name, value in vars(module).items()
        if name not in ours
        and callable(value)
        and not isinstance(value, nn.Module)
        and inspect.isroutine(getattr(type(module), name, None))
    ]


def hooked(module: nn.Module, shadowed: Shadowed = ()) -> list[str]:
    """Names of the submodules that call forward hooks, or whose own methods are replaced, but for `shadowed`."""
    ours: dict[int, set[str]] = {}
    for owner, name, before in shadowed:
        if not before:
            ours.setdefault(id(owner), set()).add(name)
    return [
        name or type(module).__name__
        for name, child in module.named_modules()
        if any(_hooks(child)) or shadowing(child, ours.get(id(child), set()))
    ]


def not_finite(module: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or inf. One reading, and one wait for a GPU."""
    named = [(name, p.detach()) for name, p in module.named_parameters() if not p.is_meta]
    if not named:
        return []
    sums = torch.stack([p.sum(dtype=torch.promote_types(p.dtype, torch.float32)).double() for _, p in named])
    doubtful = [pair for pair, total in zip(named, sums.tolist(), strict=True) if not np.isfinite(total)]
    return [name for name, p in doubtful if not torch.isfinite(p).all()]


def drops(module: nn.Module) -> bool:
    """Whether a module drops values as it is now."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
