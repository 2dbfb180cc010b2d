"""Files of tensors: read by what they hold, whatever they are called. What is no such file is refused in words."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

ARCHIVE, PICKLE, SAFETENSORS = "an archive of torch.save", "a pickle of torch.save", "safetensors"

_TRUNCATED = "copy or download it again"
_FOREIGN = {  # what other files begin with
    b"version https://git-lfs": "a pointer of Git LFS to the file, not the file: `git lfs pull` gets it",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "an array of NumPy",
    b"GGUF": "a GGUF file",
}


def read(path: str | Path) -> object:
    """What a file holds, tensors mapped where they can be: of safetensors a dict of tensors, of torch.save what was saved, of which
    nothing is built but tensors, containers, numbers, texts, argparse.Namespace, scalars of NumPy, and paths as pure ones.

    Raises FileNotFoundError, and ValueError for a file of another kind, a damaged one, and one that holds other classes, by name.
    """
    path = existing(path)
    kind = None
    try:
        kind = kind_of(path)
        if kind == SAFETENSORS:
            return safetensors.torch.load_file(path)
        with _plain_data_allowed():
            if kind == ARCHIVE and path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with path.open("rb") as file:  # by a path PyTorch would go by its suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own ways to fail on a damaged file
        raise ValueError(f"{path}: cannot be read as a checkpoint: {_reason(error, kind, path)}") from error


def metadata(path: str | Path) -> dict[str, str]:
    """The texts in a safetensors file's header; none for a file of another kind. Raises as `read` does."""
    path = existing(path)
    kind = None
    try:
        kind = kind_of(path)
        if kind != SAFETENSORS:
            return {}
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint: {_reason(error, kind, path)}") from error


def existing(path: str | Path) -> Path:
    """A file's path. FileNotFoundError if there is none, ValueError for a folder."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path: expected that of a file, got {path!r}")
    path = Path(path)
    if os.path.isdir(path):
        inside = sorted(name for name in os.listdir(path) if name.endswith((".pth", ".pt", ".ckpt", ".safetensors")))
        such = f", such as {', '.join(inside[:3])} in it" if inside else ""
        raise ValueError(f"{path}: is a folder; expected a .pth or .safetensors file{such}")
    if not os.path.isfile(path):  # false also for a name that no file can have, at which path.is_file() fails
        raise FileNotFoundError(f"{path}: no such checkpoint")
    return path


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


# Kinds ----------------------------------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """ARCHIVE, PICKLE or SAFETENSORS, by the first bytes. ValueError says what it is instead, without the path."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError("it is empty")
    if head.startswith(b"PK"):
        _check_archive(path)
        return ARCHIVE
    for beginning, what in _FOREIGN.items():
        if head.startswith(beginning):
            raise ValueError(f"it is {what}")
    if head[257:262] == b"ustar":
        raise ValueError("it is a tar archive; unpack it first")
    if _is_text(head):
        text = head.decode(errors="replace").strip()
        if re.match(r"<(!doctype|html)", text, re.IGNORECASE):
            raise ValueError("it is a web page, which a download gave instead of the file")
        raise ValueError(f"it is text, which begins {text[:40]!r}")
    header, size = int.from_bytes(head[:8], "little"), path.stat().st_size
    if head[8:9] == b"{" and header <= size - 8:
        return SAFETENSORS
    if head[:1] == b"\x80":
        return PICKLE
    if head[8:9] == b"{":
        raise ValueError(f"as safetensors it would begin with a header of {header} bytes, and has {size} in all; {_TRUNCATED}")
    raise ValueError(f"it is neither safetensors nor of torch.save; it begins with the bytes {head[:8].hex(' ')}")


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # which minds no letter that is cut off at the end
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter in "\r\n\t\f" for letter in text)


def _check_archive(path: Path) -> None:
    """ValueError for an archive that is cut off, that torch.save has not written, or with compressed parts: mapped, those would be
    taken for tensors."""
    if not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise ValueError(f"it is truncated: it begins as an archive of torch.save, and has no end after {size} bytes; {_TRUNCATED}")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    names = [part.filename for part in parts]
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError("it is a TorchScript program, not a state dict; load it by torch.jit.load and save its state_dict()")
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError(f"it is a zip archive that torch.save has not written; it holds {', '.join(names[:3]) or 'nothing'}")
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{part.filename} is compressed, which torch.save does not do")


def _reason(error: Exception, kind: str | None, path: Path) -> str:
    """Why a file could not be read."""
    text = first_line(error)
    if kind is None:  # as kind_of has it
        return text if type(error) is ValueError else f"{type(error).__name__}: {text}"
    if kind == SAFETENSORS:
        return _missing_data(path) or f"as safetensors: {text}"
    if isinstance(error, pickle.UnpicklingError):  # of torch, whose advice goes before the cause, that a file holds more than data
        cause = first_line(error.__context__ or error).partition(". ")[0]
        if "nsupported global" in cause or "nsupported GLOBAL" in cause:
            return f"{cause}; save the tensors alone where that is at hand: torch.save(model.state_dict(), ...)"
        return f"as {kind}: {cause}"
    if isinstance(error, EOFError) or "unexpected EOF" in text or "Ran out of input" in text:
        return f"it is truncated: it begins as {kind}, and ends in the midst of it; {_TRUNCATED}"
    if "magic number" in text:
        return "it is a pickle that torch.save has not written"
    return f"as {kind}: {type(error).__name__}: {text}"


def _missing_data(path: Path) -> str:
    """Of a safetensors file: in words that it ends before its tensors do, if so."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        expected = 8 + length + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        size = path.stat().st_size
        return f"it is truncated: {size} of {expected} bytes are there; {_TRUNCATED}" if size < expected else ""
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ""


# Plain data beside the weights -----------------------------------------------------------------------------------------


class _Dtype:
    """Stands for numpy.dtype while a file is read: what a scalar needs of it, and nothing that a file could do harm with."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _scalar(dtype: object, content: bytes) -> np.generic:
    if not isinstance(dtype, _Dtype) or not re.fullmatch(r"[biufcSU]\d{1,5}", dtype.code):
        raise ValueError("expected a NumPy scalar that is a number or a text")
    return np.frombuffer(content, dtype.order + dtype.code, count=1)[0]


def _called(name: str, stands_in: Callable[..., object]) -> Callable[..., object]:
    """A stand-in of its own under the full name by which a pickle asks for something, as torch looks it up."""
    module, _, own = name.rpartition(".")
    if isinstance(stands_in, type):
        return type(own, (stands_in,), {"__module__": module, "__qualname__": own})

    def call(*args: object) -> object:
        return stands_in(*args)

    call.__module__ = module
    call.__name__ = call.__qualname__ = own
    return call


_PLAIN = [argparse.Namespace, _called("numpy.dtype", _Dtype)]
_PLAIN += [_called(f"numpy.{core}.multiarray.scalar", _scalar) for core in ("core", "_core")]  # NumPy 1 and 2
_PLAIN += [
    _called(f"{module}.{name}", lambda *parts, pure=pure: pure(*parts))
    for module in ("pathlib", "pathlib._local")
    for pure in (PurePosixPath, PureWindowsPath)
    for name in (pure.__name__, pure.__name__.removeprefix("Pure"))
]
_NAMES = {f"{each.__module__}.{each.__qualname__}" for each in _PLAIN}
_reading = threading.RLock()


@contextmanager
def _plain_data_allowed() -> Iterator[None]:
    """Training scripts store their options and their progress beside the weights. Stand-ins for what those are made of go before
    what the user has allowed by the same names; that is as it was afterwards."""
    with _reading:
        before = torch.serialization.get_safe_globals()
        others = [each for each in before if _full_name(each) not in _NAMES]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*others, *_PLAIN])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _full_name(allowed: Any) -> str:
    return allowed[1] if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"
