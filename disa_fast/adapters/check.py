"""What the checks of `accelerate` share: leaving an object as it was, other weights for a while, comparison, and what is
already proven."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import inspect
import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UnsupportedError

LEAST_BOUND = 5e-5  # relative: float32's rounding over a few steps, whatever the object
FLOORS = 10  # times the rounding error that float32 has on this very input
SEED = 20250520

# Half of what a bound is in float32: what a backend may be off in 16 bits.
HALF_BOUND = {torch.bfloat16: 0.1, torch.float16: 0.02}


# The object as it was ---------------------------------------------------------------------------------------------------


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


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    attributes = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    contents = {name: value.copy() for name, value in attributes.items() if isinstance(value, _CONTAINERS)}
    buffers = {name: (b, b.clone()) for name, b in module._buffers.items() if b is not None}
    return attributes, contents, buffers


_OF_TORCH = ("_parameters", "_buffers", "_modules")


def _same_members(a: Any, b: Any) -> bool:
    """Whether two containers hold the very same objects, whose own comparison may not be one."""
    pairs = [list(c.items()) if isinstance(c, dict) else [(None, one) for one in c] for c in (a, b)]
    return [(key, id(value)) for key, value in pairs[0]] == [(key, id(value)) for key, value in pairs[1]]


def _put_back(module: nn.Module, snapshot: tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]) -> None:
    attributes, contents, buffers = snapshot
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
    generator = torch.Generator().manual_seed(SEED + parameter.numel() % 1009)
    pattern = torch.randn(min(_PATTERN, max(1, parameter.numel())), generator=generator)
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


def compared(theirs: Tensor, ours: Tensor, truth: Tensor | None = None, least: float = LEAST_BOUND) -> tuple[float, float]:
    """(error, bound) of theirs against ours, relative to the truth, ours in float64 if there is one.

    The error is the larger of the relative L2 error and the worst element's, relative to the largest.
    The bound is `least`, or FLOORS times the rounding error of ours. Raises DifferenceError above it.
    """
    if theirs.shape != ours.shape:
        raise DifferenceError(float("inf"), least)
    theirs, ours = theirs.double(), ours.double()
    truth = ours if truth is None else truth.double()
    bound = max(least, FLOORS * relative_error(ours, truth))
    error = relative_error(theirs, truth)
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


def structure_of(*parts: object) -> bytes:
    """A digest of what decides a function but for the values of parameters: of modules the classes,
    their sampling methods, hooks, shapes and what shadows their methods; of anything else its content."""
    digest = hashlib.sha256()
    for part in parts:
        for fact in _facts(part, set()):
            digest.update(fact if isinstance(fact, bytes) else repr(fact).encode())
            digest.update(b"\0")
    return digest.digest()


def _facts(part: object, seen: set[int]) -> Iterator[object]:
    if isinstance(part, nn.Module | dict) or hasattr(part, "__dict__"):
        if id(part) in seen:
            return
        seen.add(id(part))
    if isinstance(part, nn.Module):
        for name, module in part.named_modules():
            yield name, id(type(module))
            yield [tuple(hooks) for hooks in _hooks(module)]
            yield from _own_attributes(module)
            for tensor_name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield tensor_name, tuple(tensor.shape), tensor.dtype, str(tensor.device), id(type(tensor))
        return
    if isinstance(part, np.ndarray):
        yield part.dtype.str, part.shape
        yield np.ascontiguousarray(part).tobytes() if part.dtype != object else repr(part)
    elif isinstance(part, Tensor):
        yield part.dtype, tuple(part.shape), part.detach().reshape(-1)[:4096].tolist()
    elif isinstance(part, list | tuple):
        for one in part:
            yield from _facts(one, seen)
    elif callable(part):
        yield _identity(part)
    elif isinstance(part, dict) or hasattr(part, "__dict__"):
        yield id(type(part))
        for name, value in (part if isinstance(part, dict) else vars(part)).items():
            if name != "training":
                yield name
                yield from _facts(value, seen)
    else:
        yield repr(part)


def _hooks(module: nn.Module) -> list[Mapping[int, object]]:
    return [module._forward_hooks, module._forward_pre_hooks]


def _own_attributes(module: nn.Module) -> Iterator[object]:
    """Plain values and callables that a module itself holds, among them what shadows its methods."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") and name != "_hf_hook":
            continue
        if name == "training":
            continue
        if isinstance(value, bool | int | float | str | type(None)):
            yield name, value
        elif callable(value):
            yield name, _identity(value)


def _identity(function: Any) -> tuple[object, ...]:
    inner = inspect.unwrap(getattr(function, "__func__", function))
    return id(inner), getattr(inner, "__qualname__", type(inner).__qualname__)


def shadowing(module: nn.Module) -> list[str]:
    """Methods of a module's class that the module itself replaces, as `forward` of LoRA or of offloading."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not isinstance(value, nn.Module) and inspect.isroutine(getattr(type(module), name, None))
    ]


def hooked(module: nn.Module) -> list[str]:
    """Names of the submodules that call forward hooks, or whose own methods are shadowed."""
    return [name or type(module).__name__ for name, child in module.named_modules() if any(_hooks(child)) or shadowing(child)]


def not_finite(module: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or inf. One reading, and one wait for a GPU."""
    named = [(name, p.detach()) for name, p in module.named_parameters() if not p.is_meta]
    if not named:
        return []
    sums = torch.stack([p.sum(dtype=torch.promote_types(p.dtype, torch.float32)).double() for _, p in named])
    doubtful = [pair for pair, total in zip(named, sums.tolist(), strict=True) if not np.isfinite(total)]
    return [name for name, p in doubtful if not torch.isfinite(p).all()]
