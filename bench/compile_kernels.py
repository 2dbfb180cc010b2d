"""Compiles every kernel that ships for GPUs that need not be there, and prints what each takes: `make kernels`.

For Triton every tile choice, by the real launch code of disa_fast/backends/triton.py on tensors without storage, with a driver that
names an architecture and stops short of the launch; likewise the kernels of a transformer block (triton_ops.py). For CUDA every
entry, by nvcc and by NVRTC as far as they are here, against the budget in mlp_denoise.cu; and plans for each GPU. Registers and
stack are read from the machine code: a stack means a spill.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton's kernels are imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from disa_fast import graphs, jit
from disa_fast.backends import cuda, triton_ops
from disa_fast.backends import triton as backend
from disa_fast.heads.mlp import MLPSpec
from disa_fast.kernels.triton import tiles
from disa_fast.kernels.triton.tiles import Tiles
from disa_fast.transformer import BlockWeights, Cache, CrossWeights, Modulation, block, cross_keys_values, gated_width

from . import nvcc

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
WIDTHS = (1024, 1280, 1536)
HEAD_DIMS = {768: (64,), 1024: (64,), 1280: (80,), 1536: (64, 96)}  # of published transformers, by dim
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # that one program may have


@dataclass(frozen=True)
class Case:
    architecture: str
    dtype: str
    width: int
    rows: int
    tiles: Tiles
    guided: bool = True

    def __str__(self) -> str:
        return f"{self.architecture:8}{self.dtype:9}{self.width:6}{self.rows:6} {self.guided!s:6}"

    def launch(self) -> None:
        """A loop of this shape."""
        dtype = getattr(torch, self.dtype)
        spec = MLPSpec(16, self.width, 1, 1024)
        w = backend.Weights({name: torch.empty(shape, dtype=dtype) for name, shape in spec.shapes().items()}, spec)
        shape = backend.Shape(1, self.rows, self.guided, True, self.tiles, "ieee")
        buffers = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in backend.layout(w, shape).items()}
        backend.loop(w, shape, buffers)


@dataclass(frozen=True)
class BlockCase:
    architecture: str
    dtype: str
    dim: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.architecture:8}{self.dtype:9}{self.dim:6} heads of {self.head_dim:2} "

    def launch(self) -> None:
        """A block with cross-attention, with a cache and without, modulated by token and by row, its MLP laid out; of one token,
        its MLP as it lies, whose hidden units may be an odd number; and steps along a flow."""
        dtype, dim, hidden = getattr(torch, self.dtype), self.dim, gated_width(self.dim)

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype)

        def layer(columns: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            return empty(columns, k), empty(columns)

        ops = triton_ops.TritonOps(dtype)
        cross = CrossWeights(layer(dim, dim), layer(2 * dim, dim), layer(dim, dim), empty(dim), empty(dim))
        mlp = layer(hidden, dim), layer(hidden, dim), layer(dim, hidden)
        for rows, tokens, modulated, layers in ((2, 16, 16, ops.lay_out(*mlp)), (2, 16, 1, ops.lay_out(*mlp)), (1, 1, 1, mlp)):
            w = BlockWeights(layer(3 * dim, dim), layer(dim, dim), layers, cross, self.head_dim)
            stream = torch.empty(rows, tokens, dim, dtype=torch.float32), None, None
            rotation = torch.empty(2, tokens, self.head_dim, dtype=torch.float32).unbind()
            keys_values = cross_keys_values(ops, w, empty(rows, tokens, dim), rotation)
            cache = Cache(*(empty(rows, dim // self.head_dim, 4 * tokens, self.head_dim) for _ in range(2)))
            modulation = Modulation.split(empty(rows, modulated, 6 * dim))
            stream = block(ops, w, stream, modulation, rotation, cache, tokens, cross=keys_values)
            block(ops, w, stream, modulation, rotation, cross=keys_values)
        for guided, noisy in itertools.product((True, False), repeat=2):
            shape = backend.FlowShape(2, 1, 16, 0, (guided, False), (noisy, not noisy), "ieee")
            sizes = {"steps": (2, 4), "scalars": (2,), "step_noise": (2, 1, 16, 16), "x": (1, 16, 16)}
            buffers = {name: torch.empty(size, dtype=torch.float64) for name, size in sizes.items()}
            backend.flow_steps(lambda i, x: torch.empty_like(x), shape, buffers, dtype)


def shipped(widths: tuple[int, ...] = WIDTHS) -> Iterator[Case]:
    """Every heuristic tile choice for every architecture, with guidance and without, also with programmatic dependent launch where
    there is such a thing, without prefetch and with it, and every tuned one for Hopper."""
    for dtype, by_class in tiles.HEURISTIC.items():
        for (rows, chosen), width, architecture in itertools.product(by_class.items(), widths, ARCHITECTURES):
            for guided in (True, False):
                yield Case(architecture, dtype, width, min(rows, 2048), chosen, guided)
            if rows == tiles.FEW and architecture != "sm_80":
                for prefetch in (False, True):
                    yield Case(architecture, dtype, width, rows, dataclasses.replace(chosen, pdl=True, prefetch=prefetch))
    for by_dtype in tiles.tuned().values():
        for dtype, by_width in by_dtype.items():
            for width, by_class in by_width.items():
                for rows, fields in by_class.items():
                    yield Case("sm_90", dtype, int(width), min(int(rows), 2048), Tiles.from_dict(fields))


def shipped_blocks(dims: Iterable[int] = tuple(HEAD_DIMS)) -> Iterator[BlockCase]:
    for dim, dtype, architecture in itertools.product(dims, backend.DTYPES.values(), ARCHITECTURES):
        for head_dim in HEAD_DIMS.get(dim, (64,)):
            yield BlockCase(architecture, dtype, dim, head_dim)


class _NoDevice:
    """Stands in for Triton's driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: Case | BlockCase) -> list[dict]:
    """What each kernel that it launches takes: registers a thread, bytes of stack and of shared memory, seconds to compile. How
    often it waits for the kernel before it, what it prefetches and reads before that, and how many of its products go on from a
    sum instead of beginning with zeros."""
    compiled = {}
    run = triton.JITFunction.run

    def record(self, *arguments, grid, warmup, **keywords):
        start = time.perf_counter()
        kernel = run(self, *arguments, grid=grid, warmup=True, **keywords)
        if kernel.hash not in compiled:
            compiled[kernel.hash] = (self.__name__, kernel, time.perf_counter() - start)

    for kernel in (*vars(backend).values(), *vars(triton_ops).values()):
        if isinstance(kernel, triton.JITFunction):
            kernel.device_caches.clear()
    driver.set_active(_NoDevice(ARCHITECTURES[case.architecture]))
    triton.JITFunction.run = record
    try:
        with torch.device("meta"):
            case.launch()
    finally:
        triton.JITFunction.run = run
    return [
        {
            "kernel": name,
            **_resources(_cuobjdump(kernel.asm["cubin"])),
            "shared": kernel.metadata.shared,
            **_waits(kernel.asm["ptx"]),
            "chains": _chains(kernel.asm["ttir"]),
            "seconds": round(seconds, 2),
        }
        for name, kernel, seconds in compiled.values()
    ]


def _cuobjdump(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _resources(text: str) -> dict[str, int]:
    return {name.lower(): int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "SHARED")}


def _waits(ptx: str) -> dict[str, int]:
    before, *after = ptx.split("griddepcontrol.wait")
    early = len(re.findall(r"\b(?:ld\.global|cp\.async)", before)) if after else 0
    return {"waits": len(after), "early": early, "prefetches": before.count("prefetch.global.L2") if after else 0}


def _chains(ttir: str) -> int:
    zeros = re.findall(r"(%\w+) = arith\.constant dense<0\.", ttir)
    return sum(begins not in zeros for begins in re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", ttir))


# CUDA ------------------------------------------------------------------------------------------------------------------

CUDA_ARCHITECTURES = {"sm_80": 108, "sm_90a": 132, "sm_100": 148}  # multiprocessors
CUDA_COMPILERS = {"nvcc": nvcc, "NVRTC": jit}


@dataclass(frozen=True)
class NoGpu:
    """Stands in for a backends.cuda.Gpu where only its sizes count."""

    multiprocessors: int
    shared_bytes: int
    warps: int = cuda.NvidiaGpu.warps


def compile_cuda(compiler: str, source: Path = cuda.SOURCE, architectures: Iterable[str] = tuple(CUDA_ARCHITECTURES)) -> list[dict]:
    """What each entry takes on each architecture, and what of it is over the budget; kernels that dump have none."""
    budget = {name: int(value) for name, value in re.findall(r"constexpr int (kMax\w+) = (\d+);", source.read_text())}
    limits = {"reg": budget["kMaxRegisters"], "stack": budget["kMaxStackBytes"], "shared": budget["kMaxStaticSharedBytes"]}
    compiled = []
    for architecture in architectures:
        for defines in ((), ("DISA_FAST_DUMP",)):
            cubin = CUDA_COMPILERS[compiler].compile_cubin(source, architecture, defines)
            for name, text in re.findall(r"Function (\w+):\n(.*)", _cuobjdump(cubin)):
                found = _resources(text)
                found["shared"] -= 1024 * (architecture != "sm_80")  # that the system keeps for itself
                over = [] if defines else [what for what, limit in limits.items() if found[what] > limit]
                kernel = " ".join([name, *defines])
                compiled.append({"compiler": compiler, "architecture": architecture, "kernel": kernel, **found, "over": over})
    return compiled


def impossible_plans() -> list[str]:
    """Published heads and numbers of rows for which there is no plan on some GPU."""
    missing = []
    for (architecture, count), width, rows in itertools.product(CUDA_ARCHITECTURES.items(), WIDTHS, range(2, cuda.MAX_ROWS + 1, 2)):
        shape = cuda.Shape(1, graphs.row_bucket(rows), True, True, *cuda.HOISTS)
        if cuda.plan_for(MLPSpec(16, width, 12, 1024), shape, NoGpu(count, SHARED_BYTES[architecture.removesuffix("a")])) is None:
            missing.append(f"{architecture}: no plan for width {width}, {rows} rows")
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", help="of heads and transformers; by default the published ones")
    parser.add_argument("--only", choices=("triton", "cuda"))
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args()
    everything, bad = [], 0
    if options.only != "cuda":
        cases = [*shipped(tuple(options.widths or WIDTHS)), *shipped_blocks(options.widths or HEAD_DIMS)]
        bad += triton_kernels(cases, everything)
    if options.only != "triton":
        bad += cuda_kernels(everything)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    print(f"{len(everything)} kernels, {bad} that spill or take more than there is")
    sys.exit(bad > 0)


def triton_kernels(cases: list[Case | BlockCase], everything: list[dict]) -> int:
    """Adds to `everything` what each takes, and returns how many take too much."""
    bad = 0
    print(f"{'':8}{'dtype':9} width  rows guided  {'kernel':24} registers stack shared  s")
    with ProcessPoolExecutor() as pool:
        for case, kernels in zip(cases, pool.map(compile_case, cases), strict=True):
            for k in kernels:
                bad += k["stack"] > 0 or k["shared"] > SHARED_BYTES[case.architecture]
                everything.append({**dataclasses.asdict(case), **k})
                print(f"{case}  {k['kernel']:24} {k['reg']:9} {k['stack']:5} {k['shared']:6} {k['seconds']:4.1f}", flush=True)
    return bad


def cuda_kernels(everything: list[dict]) -> int:
    """As triton_kernels; also plans that are impossible."""
    bad = 0
    for compiler, module in CUDA_COMPILERS.items():
        why_not = module.why_not()
        if why_not is not None:
            print(f"CUDA kernels by {compiler}: skipped: {why_not}")
            continue
        for k in compile_cuda(compiler):
            bad += bool(k["over"])
            everything.append(k)
            over = f"  over the budget: {', '.join(k['over'])}" if k["over"] else ""
            print(f"{k['architecture']:8}{k['compiler']:9}{k['kernel']:39}{k['reg']:10} {k['stack']:5} {k['shared']:6}{over}")
    for problem in impossible_plans():
        bad += 1
        print(problem)
    return bad


if __name__ == "__main__":
    main()
