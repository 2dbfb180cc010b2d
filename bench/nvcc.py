"""Machine code by nvcc, as disa_fast.jit has it by NVRTC."""

import shutil
import subprocess
import tempfile
from pathlib import Path


def tool() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def why_not() -> str | None:
    return None if tool() else "no nvcc"


def compile_cubin(source: Path, architecture: str, defines: tuple[str, ...] = ()) -> bytes:
    """As jit.compile_cubin. RuntimeError with nvcc's words."""
    target = ["-gencode", f"arch=compute_{architecture.removeprefix('sm_')},code={architecture}"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        command = [tool(), "-std=c++17", "-cubin", *target, *(f"-D{name}" for name in defines), source, "-o", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc does not compile {source.name}: {architecture}: {done.stdout}{done.stderr}")
        return Path(file.name).read_bytes()
