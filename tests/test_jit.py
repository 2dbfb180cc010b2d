"""Compiling at run time, which needs CuPy and NVRTC but no GPU, and what is kept on disk of it."""

import importlib.util
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from disa_fast import jit

ROOT = Path(__file__).parent.parent
ARCHITECTURE = "sm_90a"
MAIN = """
#include "part.cuh"

#ifndef FACTOR
#define FACTOR 2
#endif

extern "C" __global__ void scale(float* x) { x[threadIdx.x] = part(x[threadIdx.x]) * FACTOR; }
"""
PART = "#pragma once\n__device__ inline float part(float x) { return x + 1; }\n"
needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy: pip install 'disa-fast[cuda13]'")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DISA_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path, cache) -> Path:
    folder = tmp_path / "the sources"
    folder.mkdir()
    (folder / "part.cuh").write_text(PART)
    path = folder / "main.cu"
    path.write_text(MAIN)
    return path


@pytest.fixture
def compiled(monkeypatch) -> list[tuple[str, ...]]:
    """The options of every run of the compiler."""
    from cupy.cuda import nvrtc

    runs, compile_program = [], nvrtc.compileProgram

    def counted(program: int, options: tuple[str, ...]) -> None:
        runs.append(options)
        compile_program(program, options)

    monkeypatch.setattr(nvrtc, "compileProgram", counted)
    return runs


def is_cubin_for(architecture: str, cubin: bytes) -> bool:
    """An ELF file for it, and whole: its program headers are the last it has."""
    offset, (size, count) = int.from_bytes(cubin[32:40], "little"), struct.unpack_from("<HH", cubin, 54)
    assert offset + size * count == len(cubin)
    return cubin.startswith(b"\x7fELF") and b"scale" in cubin and f"-arch {architecture} ".encode() in cubin


@needs_cupy
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_compiles_for_gpus_that_are_not_there(architecture, source):
    assert jit.why_not() is None
    assert is_cubin_for(architecture, jit.compile_cubin(source, architecture))


@needs_cupy
def test_the_second_time_it_comes_from_the_disk(source, cache, compiled):
    first = jit.compile_cubin(source, ARCHITECTURE)
    assert compiled == [("--std=c++17", "-arch=sm_90a", f"--include-path={source.parent}")]
    assert jit.compile_cubin(source, ARCHITECTURE) == first
    assert len(compiled) == 1
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


def other_header(source: Path) -> bytes:
    (source.parent / "part.cuh").write_text(PART.replace("x + 1", "x + 3"))
    return jit.compile_cubin(source, ARCHITECTURE)


def other_main(source: Path) -> bytes:
    source.write_text(MAIN.replace("* FACTOR", "/ FACTOR"))
    return jit.compile_cubin(source, ARCHITECTURE)


def other_define(source: Path) -> bytes:
    return jit.compile_cubin(source, ARCHITECTURE, ("FACTOR=3",))


def other_architecture(source: Path) -> bytes:
    return jit.compile_cubin(source, "sm_80")


@needs_cupy
@pytest.mark.parametrize("other", [other_header, other_main, other_define, other_architecture], ids=lambda other: other.__name__)
def test_whatever_matters_makes_it_compile_again(other: Callable[[Path], bytes], source, compiled):
    first = jit.compile_cubin(source, ARCHITECTURE)
    assert other(source) != first
    assert len(compiled) == 2


@needs_cupy
def test_another_compiler_makes_it_compile_again(source, compiled, monkeypatch):
    from cupy.cuda import nvrtc

    first = jit.compile_cubin(source, ARCHITECTURE)
    monkeypatch.setattr(nvrtc, "getVersion", lambda: (99, 0))
    assert jit.compile_cubin(source, ARCHITECTURE) == first
    assert len(compiled) == 2


@needs_cupy
def test_the_same_sources_elsewhere_are_known(source, compiled):
    first = jit.compile_cubin(source, ARCHITECTURE)
    moved = source.parent.rename(source.parent.with_name("moved")) / source.name
    assert jit.compile_cubin(moved, ARCHITECTURE) == first
    assert len(compiled) == 1


@needs_cupy
def test_what_the_compiler_says_is_in_the_error(source, cache):
    source.write_text(MAIN.replace("part(x", "no_such_part(x"))
    with pytest.raises(jit.JitError, match='identifier "no_such_part" is undefined') as raised:
        jit.compile_cubin(source, ARCHITECTURE)
    assert f"{source}(8): error" in raised.value.log
    assert "-arch=sm_90a" in str(raised.value)
    (source.parent / "part.cuh").write_text("#error here\n")
    with pytest.raises(jit.JitError, match=r"part\.cuh\(1\): .*error"):
        jit.compile_cubin(source, ARCHITECTURE)
    assert not cache.exists()


@needs_cupy
@pytest.mark.parametrize("architecture", ["sm_12", "compute_90"])
def test_an_architecture_without_machine_code_is_an_error(architecture, source):
    with pytest.raises(jit.JitError, match=f"-arch={architecture}"):
        jit.compile_cubin(source, architecture)


@needs_cupy
def test_a_source_that_is_not_there(source):
    with pytest.raises(FileNotFoundError):
        jit.compile_cubin(source.with_name("other.cu"), ARCHITECTURE)


@needs_cupy
@pytest.mark.parametrize("impossible", ["{source}", "{source}/below", "/proc/disa_fast"])
def test_a_cache_that_cannot_be_written_is_no_error(impossible, source, compiled, monkeypatch):
    monkeypatch.setenv("DISA_FAST_CACHE", impossible.format(source=source))
    for runs in (1, 2):
        assert is_cubin_for(ARCHITECTURE, jit.compile_cubin(source, ARCHITECTURE))
        assert len(compiled) == runs
    assert source.read_text() == MAIN


@needs_cupy
@pytest.mark.parametrize(
    "damage",
    [lambda code: b"", lambda code: b"\x7fELF", lambda code: code[:-100], lambda code: code[:500] + b"?" + code[501:]],
    ids=["empty", "short", "cut", "changed"],
)
def test_damaged_code_is_compiled_again(damage: Callable[[bytes], bytes], source, cache, compiled):
    first = jit.compile_cubin(source, ARCHITECTURE)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert jit.compile_cubin(source, ARCHITECTURE) == first
    assert len(compiled) == 2
    assert kept.read_bytes() == whole


def test_the_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("DISA_FAST_CACHE", "/own")
    assert jit.cache_folder() == Path("/own")
    monkeypatch.setenv("DISA_FAST_CACHE", "")
    assert jit.cache_folder() == Path("/caches/disa_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert jit.cache_folder() == Path("/home/someone/.cache/disa_fast")


def test_without_cupy(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert jit.why_not().startswith("CuPy cannot be imported (")
    assert jit.why_not().endswith("); pip install 'disa-fast[cuda13]'")
    with pytest.raises(jit.JitError, match=r"main\.cu cannot be compiled: CuPy cannot be imported"):
        jit.compile_cubin(source, ARCHITECTURE)


@needs_cupy
def test_without_nvrtc(source, monkeypatch):
    from cupy.cuda import nvrtc

    def missing() -> None:
        raise RuntimeError('Failure finding\n"libnvrtc.so.13"')

    monkeypatch.setattr(nvrtc, "getVersion", missing)
    assert jit.why_not() == "CuPy finds no NVRTC (Failure finding \"libnvrtc.so.13\"); pip install 'disa-fast[cuda13]'"
    with pytest.raises(jit.JitError, match="CuPy finds no NVRTC"):
        jit.compile_cubin(source, ARCHITECTURE)


@needs_cupy
def test_without_a_folder_for_cupy():
    """A process of its own, since CuPy asks for it once, when it is imported."""
    code = "import os; os.environ['CUPY_CACHE_DIR'] = '/proc/cupy'; from disa_fast import jit; print(jit.why_not())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "CuPy cannot be imported" in done.stdout
    assert "CUPY_CACHE_DIR" in done.stdout


def test_importing_disa_fast_leaves_cupy_alone():
    code = "import sys, disa_fast.jit; assert not any(name.startswith('cupy') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
