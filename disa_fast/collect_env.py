"""`python -m disa_fast.collect_env`: what a report of a bug needs to say of the machine; `--json` for programs.

Imports nothing that disa_fast itself does not, and starts CUDA only where there is a GPU. What cannot be found out says
so in its line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import backends
from .backends import cpu, cuda
from .heads.flow_transformer import FlowTransformerSpec
from .heads.mlp import MLPSpec
from .models.flowar import SIZES as FLOWAR_SIZES
from .models.mar import SIZES as MAR_SIZES

if TYPE_CHECKING:
    from .backends import Spec

PACKAGES = (
    *("numpy", "safetensors", "tokenizers", "transformers", "diffusers", "triton", "nvtx"),
    *("cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "pybind11", "cmake"),
)
TOOLS = ("c++", "g++", "clang++", "cmake", "nvcc", "nsys", "ncu", "compute-sanitizer", "nvidia-smi")
VARIABLES = ("DISA_FAST_", "TRITON_", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "PYTORCH_")  # names that begin so
CHANNELS = 16
ROWS = 8  # of the calls that backends are asked about: guidance, and one token of four images
GIB = 1 << 30


def collect() -> dict[str, Any]:
    """Plain values by topic and name; "failed: ..." in the place of what cannot be found out."""
    topics = {
        "disa_fast": _disa_fast,
        "Python": _python,
        "packages": lambda: {name: version_of(name) for name in PACKAGES},
        "torch": _torch,
        "CPU": _cpu,
        "memory": _memory,
        "GPUs": _gpus,
        "tools": lambda: {name: shutil.which(name) or "not on the path" for name in TOOLS},
        "environment": lambda: {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
        "backends": _backends,
    }
    return {topic: tried(probe) for topic, probe in topics.items()}


def tried(probe: Callable[[], Any]) -> Any:
    """What it returns, or how it failed, in one line."""
    try:
        return probe()
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"


def _each(probes: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    return {name: tried(probe) for name, probe in probes.items()}


def version_of(distribution: str) -> str:
    """As installed; nothing is imported for it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _disa_fast() -> dict[str, Any]:
    return _each(
        {
            "version": lambda: version_of("disa-fast"),
            "imported from": lambda: str(cuda.PACKAGE),
            "C++ core": lambda: "built" if cpu.is_built() else f"not built: {cpu._why_not_built()}",
            "CUDA kernel": lambda: (
                "compiled by nvcc" if cuda.PREBUILT.exists() else f"not compiled with the package: {cuda._why_not_compiled()}"
            ),
        }
    )


def _python() -> dict[str, Any]:
    return {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()}


def _torch() -> dict[str, Any]:
    return _each(
        {
            "version": lambda: torch.__version__,
            "CUDA it was built for": lambda: torch.version.cuda or torch.version.hip or "none",
            "threads": torch.get_num_threads,
            "OpenMP": lambda: ", ".join(openmp_libraries()) or torch.backends.openmp.is_available(),
            "MKL": torch.backends.mkl.is_available,
            "oneDNN": torch.backends.mkldnn.is_available,
            "its instruction set": torch.backends.cpu.get_cpu_capability,
            "float32 products": torch.get_float32_matmul_precision,
        }
    )


def openmp_libraries(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Names of those that this process has loaded; empty where the system does not tell."""
    found = re.findall(r"/(lib[gi]?omp\d*(?:-\w+)?\.so[.\d]*)$", maps.read_text(), re.MULTILINE) if maps.exists() else []
    return sorted(set(found))


def _cpu() -> dict[str, Any]:
    def of_core(ask: Callable[[], Any]) -> Any:
        return ask() if cpu.is_built() else "the C++ core is not built"

    return _each(
        {
            "name": cpu_name,
            "cores": os.cpu_count,
            "cores that this process may use": lambda: len(os.sched_getaffinity(0)),
            "cores' worth of time allowed": lambda: cgroup_limits()[0] or "no limit",
            "instruction sets": lambda: of_core(lambda: ", ".join(cpu._C.isas())),
            "instruction set of backend cpu": lambda: of_core(cpu.instruction_set),
        }
    )


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> dict[str, Any]:
    def of_system(name: str) -> str:
        (kibibytes,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return _gib(int(kibibytes) << 10)

    def allowed() -> str:
        limit = cgroup_limits()[1]
        return "no limit" if limit is None else _gib(limit)

    return _each({"total": lambda: of_system("MemTotal"), "available": lambda: of_system("MemAvailable"), "allowed": allowed})


def cgroup_limits(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[float | None, int | None]:
    """(cores' worth of time, bytes of memory) that this process's control groups allow it, the tightest of each; None: no limit."""
    times, sizes = [], []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        top = mounted / controllers.split(",")[0]  # of version 1; `mounted` itself in version 2
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents)[: len(inner.parts) - len(mounted.parts) + 1]:
            times += [_words(folder / "cpu.max"), _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")]
            sizes += [_words(folder / "memory.max"), _words(folder / "memory.limit_in_bytes")]
    quotas = [int(both[0]) / int(both[1]) for both in times if len(both) == 2 and both[0] not in ("max", "-1")]
    limits = [int(one[0]) for one in sizes if one and one[0] != "max" and int(one[0]) < 1 << 60]  # version 1 has no word for none
    return min(quotas, default=None), min(limits, default=None)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _gpus() -> dict[str, Any] | str:
    if not _sees_gpu():
        return "none that torch sees" if torch.version.cuda or torch.version.hip else "none: this PyTorch is for CPUs alone"

    def described(index: int) -> str:
        p = torch.cuda.get_device_properties(index)
        return f"{p.name}, capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, {_gib(p.total_memory)}"

    def mig() -> str:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return "in use" if any("MIG" in text for text in (*names, os.environ.get("CUDA_VISIBLE_DEVICES", ""))) else "no sign of it"

    def mps() -> str:
        pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
        return f"{pipes} is there" if pipes.exists() else "no sign of it"

    return _each(
        {
            **{str(index): lambda index=index: described(index) for index in range(torch.cuda.device_count())},
            "driver": lambda: Path("/proc/driver/nvidia/version").read_text().splitlines()[0],
            "MIG": mig,
            "MPS": mps,
        }
    )


def _sees_gpu() -> bool:
    """What PyTorch says by a warning, such as of a driver that is too old, is an error here, and so gets into the line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return torch.cuda.is_available()


def _backends() -> dict[str, Any]:
    """What each says to a call of a published head: what would run, or why not."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * (tried(_sees_gpu) is True)
    mar, flowar = MAR_SIZES["base"], FLOWAR_SIZES["small"]
    specs: dict[str, Spec] = {
        "MAR-B": MLPSpec(CHANNELS, mar["diffloss_w"], mar["diffloss_d"], mar["embed_dim"]),
        "FlowAR-S": FlowTransformerSpec(CHANNELS, flowar["diffloss_w"], flowar["diffloss_d"], flowar["embed_dim"], flowar["cross"]),
    }
    return {
        f"head of {name}, {str(dtype).removeprefix('torch.')}, on {device.type}": tried(
            lambda spec=spec, dtype=dtype, device=device: _answers(spec, dtype, device)
        )
        for device in devices
        for name, spec in specs.items()
        for dtype in (torch.float32, torch.bfloat16)
    }


def _answers(spec: Spec, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    why_not = backends.survey(spec, dtype, device, ROWS)
    return {
        name: f"no: {reason}" if reason else tried(lambda name=name: f"yes: {backends.BACKENDS[name].about(dtype)}")
        for name, reason in why_not.items()
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _print(facts: Mapping[str, Any], indent: str = "") -> None:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:" if value else f"{indent}{name}: none")
            _print(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m disa_fast.collect_env", description="What a report of a bug needs to say.")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    as_json = parser.parse_args(argv).json
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
