"""What a machine with a GPU but no network would spend minutes on, made ahead without a GPU, in a folder to carry along:

    python -m bench.gpu_prepare DIR                       here: needs python3.12, nvcc, a C++ compiler and PyPI
    eval "$(python3 -m bench.gpu_prepare --use DIR)"      there; from Python: use(DIR)

The native core and the CUDA kernels are as setup.py builds them. Triton's cache is of the very version there: gpu_launches.py
records what will be launched, and python3.12, which has that Triton and no torch, launches the same for sm_90, with the dtypes
and addresses of tensors in their place.
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "prepare"  # what the next preparation need not make again
PYTHON, TRITON, CAPABILITY = "3.12", "3.6.0", 90  # of the machine with the GPU
PACKAGES = (f"triton=={TRITON}", "setuptools>=77", "pybind11>=2.13", "cmake>=3.20", "ninja>=1.11")
MOST_BYTES = 60 << 20
CACHE, MANIFEST, NATIVE = "triton.tar.xz", "prepared.json", ("_C.*.so", "mlp_denoise.fatbin")
SOURCES = ("csrc/**/*.*", "kernels/cuda/*.cu*", "kernels/cuda/*.h", "setup.py", "CMakeLists.txt")


def prepare(folder: Path) -> None:
    """Makes the folder, or makes it anew. RuntimeError where something cannot be made, or takes more than MOST_BYTES."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise RuntimeError(f"{folder}: has files that are not of an earlier preparation, and would be removed")
    start, of, python = time.monotonic(), sources(), _environment()
    made, launches, kept = WORK / "made", WORK / "launches.json", WORK / "triton"
    shutil.rmtree(made, ignore_errors=True)
    _build(python, made)
    _run([sys.executable, "-m", "bench.gpu_launches", launches])
    found = _compiled(python, launches, kept)
    with tarfile.open(made / CACHE, "w:xz") as archive:
        for path in sorted(path for name in found["folders"] for path in (kept / name).iterdir()):
            if path.suffix in (".cubin", ".json", ".so") and not path.name.startswith("__grp__"):
                archive.add(path, path.relative_to(kept))
    with tempfile.TemporaryDirectory() as elsewhere:
        again = _compiled(python, launches, unpacked(made / CACHE, Path(elsewhere)))
    if again["written"]:
        raise RuntimeError(f"what is packed is not what Triton looks for: it made {again['written']} again")
    manifest = {name: found[name] for name in ("python", "triton", "key")} | {"sources": of}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    size, what = check_size(made) / 2**20, f"{len(found['folders'])} kernels and launchers of Triton's"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    print(f"{folder}: {size:.1f} MiB with {what}, in {time.monotonic() - start:.0f} s")


def use(folder: Path) -> dict[str, str]:
    """On the machine with the GPU: puts the native core and the CUDA kernels beside the code, unpacks Triton's cache, and returns
    environment variables to set. RuntimeError where the folder is for another Python or of other sources. Where Triton alone is
    another, stderr says so, the cache is left out, and kernels are compiled as they are first launched."""
    made = json.loads((folder / MANIFEST).read_text())
    for what, here in (("python", sysconfig.get_config_var("SOABI")), ("sources", sources())):
        if made[what] != here:
            raise RuntimeError(f"{folder}: made for {what} {made[what]}, but here is {here}; bench.gpu_prepare makes another")
    for path in (path for pattern in NATIVE for path in folder.glob(pattern)):
        aside = ROOT / "disa_fast" / f".{os.getpid()}.{path.name}"
        shutil.copyfile(path, aside)
        aside.replace(ROOT / "disa_fast" / path.name)
    here = triton_here()
    if here["key"] != made["key"]:
        of = " but here is ".join(f"Triton {one['triton']} ({one['key'][:8]})" for one in (made, here))
        print(f"{folder}: Triton's cache is left out, which is of {of}", file=sys.stderr)
        return {}
    return {"TRITON_CACHE_DIR": str(unpacked(folder / CACHE, Path(tempfile.gettempdir())))}


def unpacked(archive: Path, into: Path) -> Path:
    """Triton's cache, in a folder of `into` that is named by its contents: it is made once, and is whole as soon as it is there."""
    cache = into.absolute() / f"disa_fast_triton_{hashlib.sha256(archive.read_bytes()).hexdigest()[:16]}"
    if not cache.is_dir():
        with tempfile.TemporaryDirectory(dir=into) as aside, tarfile.open(archive) as tar:
            filled = Path(aside) / "cache"
            tar.extractall(filled, filter="data")
            for metadata in list(filled.glob("*/*.json")):  # beside it Triton wants the absolute paths of a kernel's files
                paths = {path.name: str(cache / metadata.parent.name / path.name) for path in metadata.parent.iterdir()}
                metadata.with_name(f"__grp__{metadata.name}").write_text(json.dumps({"child_paths": paths}))
            with contextlib.suppress(OSError):  # where another process was faster
                filled.rename(cache)
    return cache.resolve(strict=True)


def sources() -> str:
    """A digest of what the native core and the CUDA kernels are compiled from. Each entry of Triton's cache has one of its own: a
    kernel that has changed since is compiled as it is first launched."""
    paths = sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()})
    return hashlib.sha256(repr([(str(path.relative_to(ROOT)), path.read_bytes()) for path in paths]).encode()).hexdigest()[:16]


def triton_here() -> dict[str, str]:
    """Its version, and a digest of what is part of the name of everything in its cache: compiler, assembler, environment."""
    from triton import __version__
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    key = triton_key(), make_backend(GPUTarget("cuda", CAPABILITY, 32)).hash(), sorted(get_cache_invalidating_env_vars().items())
    return {"triton": __version__, "key": hashlib.sha256(repr(key).encode()).hexdigest()}


def check_size(folder: Path) -> int:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    if sum(sizes.values()) > MOST_BYTES:
        raise RuntimeError(f"{folder}: takes {sum(sizes.values())} bytes, of {MOST_BYTES} that can be carried: {sizes}")
    return sum(sizes.values())


# With python3.12 -------------------------------------------------------------------------------------------------------


def python_there() -> str | None:
    """An interpreter of the other machine's version."""
    found = [shutil.which(f"python{PYTHON}"), *sorted(Path("~/.pyenv/versions").expanduser().glob(f"{PYTHON}.*/bin/python"))]
    runs = (str(path) for path in found if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0)
    return next(runs, None)  # pyenv has commands that run nothing


def _run(command: list, **environment: str) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=others | environment, **how)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))} failed:\n{done.stdout[-4000:]}")


def _environment() -> Path:
    """The interpreter of a virtual environment with PACKAGES."""
    venv = WORK / "venv"
    python, installed = venv / "bin" / "python", venv / "installed.txt"
    if not installed.is_file() or installed.read_text() != repr(PACKAGES):
        if python_there() is None:
            raise RuntimeError(f"there is no python{PYTHON}, neither on PATH nor of pyenv")
        _run([python_there(), "-m", "venv", "--clear", venv])
        _run([python, "-m", "pip", "install", "--quiet", *PACKAGES])
        installed.write_text(repr(PACKAGES))
    return python


def _build(python: Path, made: Path) -> None:
    """The native core and the CUDA kernels, by setup.py."""
    built = WORK / "built"
    shutil.rmtree(built, ignore_errors=True)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    command = [python, "setup.py", "build_ext", "--build-lib", built, "--build-temp", WORK / "cmake"]
    _run(command, DISA_FAST_REQUIRE_NATIVE="1", PATH=path)
    why_not = built / "disa_fast" / "no_fatbin.txt"
    if why_not.exists():
        raise RuntimeError(f"the CUDA kernels were not compiled: {why_not.read_text()}")
    made.mkdir(parents=True)
    for pattern in NATIVE:
        (path,) = (built / "disa_fast").glob(pattern)
        shutil.copyfile(path, made / path.name)


def _compiled(python: Path, launches: Path, cache: Path) -> dict:
    """What `compile_launches` found, with `cache` as Triton's."""
    (nvidia,) = python.parent.parent.glob("lib/python*/site-packages/triton/backends/nvidia")
    functions = set(re.findall(r"\bcu[A-Z]\w+(?=\()", (nvidia / "driver.c").read_text() + (nvidia / "driver.py").read_text()))
    driver, found = WORK / "driver", WORK / "found.json"
    driver.mkdir(exist_ok=True)  # where Triton's own modules find what they link to, and can be loaded
    (driver / "libcuda.c").write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(functions)))
    _run(["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", driver / "libcuda.c", "-o", driver / "libcuda.so.1"])
    where = {"TRITON_CACHE_DIR": str(cache), "TRITON_LIBCUDA_PATH": str(driver), "LD_LIBRARY_PATH": str(driver)}
    command = "import sys; from bench.gpu_prepare import compile_launches; compile_launches(*sys.argv[1:])"
    _run([python, "-c", command, launches, found], **where)
    return json.loads(found.read_text())


def compile_launches(launches: str, found: str) -> None:
    """Fills Triton's cache. Writes what that is for, the folders of the cache asked for, and the files that were not there yet."""
    by_options = defaultdict(list)
    for module, kernel, arguments, options in json.loads(Path(launches).read_text()):
        by_options[module, kernel, json.dumps(options)].append(arguments)
    with ProcessPoolExecutor() as pool:
        folders, written = zip(*pool.map(_compile, by_options, by_options.values()), strict=True)
    result = {"folders": sorted(set().union(*folders)), "written": sorted(itertools.chain(*written))}
    Path(found).write_text(json.dumps({"python": sysconfig.get_config_var("SOABI"), **triton_here(), **result}))


def _compile(launch: tuple[str, str, str], calls: list[list]) -> tuple[set[str], list[str]]:
    """(folders asked for, files written) of launches with the same options, and of the modules by which Triton launches."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime.cache import FileCacheManager
    from triton.runtime.driver import driver

    folders, written = set(), []

    class Watched(FileCacheManager):
        def __init__(self, key: str, **how: bool) -> None:
            folders.add(key)
            super().__init__(key, **how)

        def put(self, data: bytes | str, filename: str, binary: bool = True) -> str:
            written.append(filename)
            return super().put(data, filename, binary)

    knobs.cache.manager_class = Watched
    target = GPUTarget("cuda", CAPABILITY, 32)
    answers = {"get_current_target": lambda: target, "get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
    driver.set_active(SimpleNamespace(**answers))
    CudaUtils()
    module, name, options = launch
    kernel, options = getattr(importlib.import_module(module), name), json.loads(options)
    for arguments in calls:
        compiled = kernel.run(*map(_stand_in, arguments), grid=(1,), warmup=True, **options)
        CudaLauncher(compiled.src, compiled.metadata)
    return folders, written


def _stand_in(x: object) -> object:
    """What gpu_launches.plain made of an argument, as Triton takes it."""
    return SimpleNamespace(dtype=x["dtype"], data_ptr=lambda: x["address"]) if isinstance(x, dict) else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what to make, or to use")
    parser.add_argument("--use", action="store_true", help="print what a shell is to export")
    options = parser.parse_args()
    if options.use:
        print(*(f"export {name}={shlex.quote(value)}" for name, value in use(options.folder).items()), sep="\n")
    else:
        prepare(options.folder)


if __name__ == "__main__":
    main()
