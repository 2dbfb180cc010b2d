"""Checkpoints: the published .pth layout, safetensors, and our own safetensors that also say how to build the model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from . import formats
from .checks import FLOATS, check_dtype, check_flag, check_shapes
from .contents import warn_not_finite
from .files import written_aside
from .formats import first_line

WRAPPERS = ("module.", "_orig_mod.")  # of torch.nn.DataParallel and its like, and of torch.compile
ABSURD = 10  # times the parameters that a file holds: more than the model that it describes can have

Model = TypeVar("Model", bound=nn.Module)


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Of a file: tensors by name, what has been taken off in front of all names, and whether there are averaged weights."""

    state: dict[str, Tensor]
    prefix: str
    has_ema: bool


def read_weights(path: str | Path, ema: bool = True) -> Weights:
    """The tensors of a safetensors file, or of a .pth/.pt file read with weights_only=True; which it is, its content tells.

    They are views of the mapped file, read where they are used; but those of a .pth from before PyTorch 1.6 are read at once. A
    published training checkpoint holds {"model": ..., "model_ema": ..., ...}: `ema` picks "model_ema" where there is one, else
    "model". Where all names begin with "module." or "_orig_mod.", or with both, as DataParallel and torch.compile leave them, the
    names are those behind that. Raises FileNotFoundError, or ValueError for a file that is not such a checkpoint.
    """
    check_flag("ema", ema)
    content, has_ema = formats.read(path), False
    if isinstance(content, Mapping):
        has_ema = isinstance(content.get("model_ema"), Mapping)
        for key in ("model_ema", "model") if ema else ("model",):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: expected a state dict, or a checkpoint with 'model' or 'model_ema', got {_summary(content)}")
    for name, tensor in content.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: expected tensors by name, got one by {name!r}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
            raise ValueError(f"{path}: {name}: expected a dense tensor with data, got another kind")
    prefix = _wrapping(content)
    return Weights({name.removeprefix(prefix): tensor for name, tensor in content.items()}, prefix, has_ema)


def read_state_dict(path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """The tensors of a file by name, see `read_weights`."""
    return read_weights(path, ema).state


def shapes_of(path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """Names, shapes and dtypes of what `read_state_dict` gives, as tensors on meta; no data are read. Raises as it does."""
    return {name: tensor.detach().to("meta") for name, tensor in read_state_dict(path, ema).items()}


def has_ema(path: str | Path) -> bool:
    """Whether a file is a training checkpoint with averaged weights. Raises as `read_state_dict` does for an unreadable one."""
    content = formats.read(path)
    return isinstance(content, Mapping) and isinstance(content.get("model_ema"), Mapping)


def read_config(path: str | Path) -> tuple[str, dict] | None:
    """(model name, constructor arguments) of a file that `save_checkpoint` wrote; None for any other checkpoint."""
    metadata = formats.metadata(path)
    if "model" not in metadata or "config" not in metadata:
        return None
    try:
        config = json.loads(metadata["config"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its constructor arguments cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected constructor arguments by name, got {config!r}")
    return metadata["model"], config


def _wrapping(names: Iterable[str]) -> str:
    """What all names begin with that DataParallel and torch.compile put there."""
    names, prefix = list(names), ""
    while names:
        more = [wrapper for wrapper in WRAPPERS if all(name.startswith(prefix + wrapper) for name in names)]
        if not more or prefix + more[0] in names:
            break
        prefix += more[0]
    return prefix


def _summary(content: object) -> str:
    if isinstance(content, Mapping):
        return f"keys {list(content)[:5]}"
    return type(content).__name__


# Loading --------------------------------------------------------------------------------------------------------------


def load_checkpoint(model: nn.Module, path: str | Path, ema: bool = True) -> None:
    """Load a file's weights into `model`; names that begin with one of its `unused_keys`, if it has such, are left out.

    ValueError names what is missing, unexpected, misshapen or of another kind; then nothing has changed. A UserWarning names
    tensors that hold NaN or inf.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {model!r}")
    state = used(model, _named_as_in(model, read_state_dict(path, ema)))
    _check(model, state, path)
    model.load_state_dict(state)
    warn_not_finite(path, model.state_dict())


def build(
    make: Callable[[], Model],
    path: str | Path,
    ema: bool = True,
    dtype: torch.dtype = torch.float32,
    check: Callable[[Model], None] | None = None,
) -> Model:
    """make() with a file's weights, bit for bit what make(), load_checkpoint() and .to(dtype) give, on the CPU.

    The model is made on meta, and the file is compared with it before anything is allocated. Each tensor is then copied once, into
    memory of its own, so there is one model in memory, which needs the file no longer. Constants that no checkpoint holds have to
    be real even where `make` runs on meta. `check` is called with the model on meta, once the file is known to fit: what it raises
    comes before anything is allocated. Raises and warns as `load_checkpoint` does, and raises ValueError for a model that cannot
    be made.
    """
    check_dtype(dtype)
    state = read_state_dict(path, ema)
    model = on_meta(make, path, state)
    state = used(model, _named_as_in(model, state))
    _check(model, state, path)
    _check_bytes(state, path)
    if check is not None:
        check(model)
    for name, own in model.state_dict().items():
        copy = torch.empty(own.shape, dtype=own.dtype, device="cpu").copy_(state[name].detach())
        state[name] = copy.to(dtype) if own.is_floating_point() else copy
    model.load_state_dict(state, assign=True)
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ValueError(f"make: expected constants that no checkpoint holds to be real, got meta tensors {', '.join(empty)}")
    model = model.to(dtype)
    warn_not_finite(path, model.state_dict())
    return model


def _named_as_in(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with what the model's own names begin with where it is wrapped itself, as `read_weights` has taken it off."""
    prefix = _wrapping(model.state_dict())
    return {prefix + name: tensor for name, tensor in state.items()}


def used(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the names that begin with one of the model's `unused_keys`."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(getattr(model, "unused_keys", ()))}


def on_meta(make: Callable[[], Model], path: str | Path, state: Mapping[str, Tensor], described: bool | None = None) -> Model:
    """make() on meta, for a file that holds `state`. ValueError where it fails, and where the file says how its model is built (see
    `read_config`, or `described`) and says so of one that is far larger than what it holds."""
    if described is None:
        described = read_config(path) is not None
    try:
        with torch.device("meta"), _limited(path, state) if described else nullcontext():
            return make()
    except ModuleNotFoundError:
        raise
    except ValueError as error:
        if not described or str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: its model cannot be made: {error}") from error
    except Exception as error:  # whatever a constructor makes of arguments that come from a file
        raise ValueError(f"{path}: its model cannot be made: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def _limited(path: str | Path, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Stops a module from being made, by a ValueError, as soon as it has ABSURD times the parameters of `state` or their size: a
    few bytes can describe a model of a billion blocks, which even on meta take up memory."""
    most, largest = ABSURD * len(state), ABSURD * sum(tensor.numel() for tensor in state.values())
    here, count, size = threading.get_ident(), 0, 0

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, size
        if parameter is not None and threading.get_ident() == here:
            count, size = count + 1, size + parameter.numel()
            if count > most or size > largest:
                raise ValueError(f"{path}: describes a model of more than {ABSURD} times the {len(state)} tensors that it holds")

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def _check(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """ValueError where `state` is not what the model's parameters and buffers can be loaded from."""
    own = model.state_dict()
    check_shapes(*({name: tensor.shape for name, tensor in tensors.items()} for tensors in (own, state)), str(path))
    for name, tensor in own.items():
        expected = FLOATS if tensor.is_floating_point() else (tensor.dtype,)
        if state[name].dtype not in expected:
            raise ValueError(f"{path}: {name}: expected {' or '.join(map(str, expected))}, got {state[name].dtype}")


def _check_bytes(state: Mapping[str, Tensor], path: str | Path) -> None:
    """ValueError where the tensors, each in memory of its own, would take far more than the file does."""
    claimed, size = sum(tensor.numel() * tensor.element_size() for tensor in state.values()), Path(path).stat().st_size
    if claimed > ABSURD * size:
        raise ValueError(f"{path}: holds tensors of {claimed} bytes, as it says, in a file of {size}")


# Writing --------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], model: str, config: Mapping[str, object]) -> None:
    """Weights as safetensors, with the model's name and constructor arguments in the metadata (see `read_config`)."""
    metadata = {"model": model, "config": json.dumps(dict(config))}
    with written_aside(Path(path)) as aside:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, aside, metadata)
