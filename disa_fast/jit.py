"""CUDA sources compiled at run time by NVRTC, which CuPy finds and calls. Neither nvcc nor a GPU is needed for it.

What was compiled is kept on disk, in DISA_FAST_CACHE, else in $XDG_CACHE_HOME/disa_fast, else in ~/.cache/disa_fast. Its name is a
hash of what it came from: all sources in the folder, options, and NVRTC's version, of which CuPy tells major and minor. The folder
can be removed at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from .files import written_aside

SUFFIXES = (".cu", ".cuh", ".h")
DIGEST_BYTES = 32


class JitError(RuntimeError):
    """A source cannot be compiled. `log` is what the compiler said, if it came to that."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}\n{log}" if log else message)
        self.log = log


def why_not() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        return f"CuPy cannot be imported ({_one_line(error)}); pip install 'disa-fast[cuda13]'"
    except OSError as error:  # on import it makes a folder for a cache of its own
        return f"CuPy cannot be imported ({_one_line(error)}); CUPY_CACHE_DIR must name a folder that can be written to"
    try:
        nvrtc.getVersion()
    except (OSError, RuntimeError) as error:
        return f"CuPy finds no NVRTC ({_one_line(error)}); pip install 'disa-fast[cuda13]'"
    return None


def compile_cubin(source: Path, architecture: str, defines: tuple[str, ...] = ()) -> bytes:
    """The machine code of `source` for an `architecture` such as "sm_90a", from the disk if it was compiled before.

    source: includes only files of its own folder, in quotes: nothing of CUDA's and nothing of the system's. defines: NAME or
    NAME=VALUE each.
    """
    reason = why_not()
    if reason is not None:
        raise JitError(f"{source} cannot be compiled: {reason}")
    from cupy.cuda import nvrtc

    source = source.absolute()
    options = ("--std=c++17", f"-arch={architecture}", *(f"-D{define}" for define in defines))
    texts = {path.name: path.read_bytes() for path in (source, *_beside(source))}
    key = repr((source.name, sorted(texts.items()), options, nvrtc.getVersion()))
    kept = cache_folder() / f"{source.stem}-{architecture}-{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    cubin = _read(kept)
    if cubin is None:
        cubin = _compile(source, texts[source.name].decode(), options)
        _write(kept, cubin)
    return cubin


def cache_folder() -> Path:
    """Where compiled code is kept; it may not exist."""
    own = os.environ.get("DISA_FAST_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "disa_fast"


def _beside(source: Path) -> list[Path]:
    return [path for path in source.parent.iterdir() if path.suffix in SUFFIXES and path.is_file()]


def _compile(source: Path, text: str, options: tuple[str, ...]) -> bytes:
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(text, str(source), (), ())
    try:
        nvrtc.compileProgram(program, (*options, f"--include-path={source.parent}"))
        return nvrtc.getCUBIN(program) + b"\0"  # CuPy takes the last byte for the end of a text, and drops it
    except RuntimeError as error:
        raise JitError(f"{source} does not compile ({' '.join(options)}): {error}", nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)


def _read(kept: Path) -> bytes | None:
    """The code in `kept`, unless there is none or it is not what was written: a digest follows it."""
    try:
        content = kept.read_bytes()
    except OSError:
        return None
    cubin, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _write(kept: Path, cubin: bytes) -> None:
    with contextlib.suppress(OSError), written_aside(kept) as aside:  # where nothing can be kept, the next process compiles again
        aside.write_bytes(cubin + hashlib.sha256(cubin).digest())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
