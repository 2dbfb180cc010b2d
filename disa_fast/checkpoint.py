"""Checkpoints: the published .pth layout, safetensors, and our own safetensors that also say how to build the model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .checks import check_shapes
from .files import written_aside


def read_state_dict(path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth/.pt file read with weights_only=True.

    A published training checkpoint holds {"model": ..., "model_ema": ..., ...}: `ema` picks "model_ema" where there is one,
    else "model". Raises FileNotFoundError, or ValueError for a file that is not such a checkpoint.
    """
    path = _existing(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Upstream stores its command line beside the weights; a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # each reader has its own ways to fail on a truncated or foreign file
        raise ValueError(f"{path}: cannot be read as a checkpoint: {type(error).__name__}: {_first_line(error)}") from error
    if isinstance(content, Mapping):
        for key in ("model_ema", "model") if ema else ("model",):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: expected a state dict, or a checkpoint with 'model' or 'model_ema', got {_summary(content)}")
    return dict(content)


def load_checkpoint(model: nn.Module, path: str | Path, ema: bool = True) -> None:
    """Load a file's weights into `model`. ValueError names what is missing, unexpected or misshapen; then nothing has changed."""
    state = read_state_dict(path, ema)
    own, given = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (model.state_dict(), state))
    check_shapes(own, given, str(path))
    model.load_state_dict(state)


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], model: str, config: Mapping[str, object]) -> None:
    """Weights as safetensors, with the model's name and constructor arguments in the metadata (see `read_config`)."""
    metadata = {"model": model, "config": json.dumps(dict(config))}
    with written_aside(Path(path)) as aside:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, aside, metadata)


def read_config(path: str | Path) -> tuple[str, dict] | None:
    """(model name, constructor arguments) of a file that `save_checkpoint` wrote; None for any other checkpoint."""
    path = _existing(path)
    if path.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint: {_first_line(error)}") from error
    if "model" not in metadata or "config" not in metadata:
        return None
    return metadata["model"], json.loads(metadata["config"])


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    return path


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _summary(content: object) -> str:
    if isinstance(content, Mapping):
        return f"keys {list(content)[:5]}"
    return type(content).__name__
