"""One CUDA kernel for the whole loop on a GPU: all steps in one launch, weights on the chip, for few rows (kernels/cuda).

The hoists of `hoisted`, made by `triton`'s product. Weights, modulation and the operands of the matrix products are in bfloat16 or
float16, all else in float32; an operand beyond float16's range is its largest number. A row's bits never depend on the rows beside
it. Whole calls are replayed as CUDA graphs, as `triton`'s are.
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import graphs, jit
from ..kernels.triton import tiles
from ..philox import Philox
from ..solvers import StepTable
from . import triton

try:
    from .. import _C
except ImportError as error:
    _C, _IMPORT_ERROR = None, str(error)

if TYPE_CHECKING:
    from ..graphs import Buffers, Layout
    from ..heads.mlp import MLPHead, MLPSpec

PACKAGE = Path(__file__).parent.parent
SOURCE = PACKAGE / "kernels" / "cuda" / "mlp_denoise.cu"
PREBUILT = PACKAGE / "mlp_denoise.fatbin"
CROSSOVER = SOURCE.with_name("crossover.json")

MAX_ROWS = 64
FASTEST_UP_TO = 16  # rows, on a GPU that CROSSOVER does not know
WIDTHS = (1024, 1280, 1536)  # that have an entry of their own
SUFFIXES = {torch.bfloat16: "", torch.float16: "_float16"}  # of entries
ENTRIES = tuple(f"mlp_denoise_{width}{suffix}" for suffix in SUFFIXES.values() for width in (*WIDTHS, "any"))
COLUMNS, GROUP_ROWS, CHANNELS = 8, 16, 16  # kColumns, kRows, kChannels of mlp_denoise.h
OUT_TILES = 2 * CHANNELS // COLUMNS
PAD = 8
PASS = 2  # kPass of mlp_denoise.cuh
MAX_RING = 2 * PASS
PATIENCE = 10_000_000_000  # nanoseconds that a launch may take before it gives up, leaving NaN


class Call(ctypes.Structure):
    """MlpDenoise of kernels/cuda/mlp_denoise.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("units", "bias", "out_bias", "in_weight", "in_bias", "modulation", "table")),
        *((name, ctypes.c_void_p) for name in ("scalars", "noise", "philox", "x", "before", "words", "dump", "gave_up")),
        ("patience", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("width", "depth", "channels", "steps", "trajectories", "guided", "first_step")),
        *((name, ctypes.c_int) for name in ("blocks", "each", "more", "activations_at", "own_at", "units_at")),
        *((name, ctypes.c_int) for name in ("out_resident", "resident", "ring", "dump_step", "dump_phase")),
    )


@dataclass(frozen=True)
class Plan:
    """How the work is laid over thread blocks: `groups` of them draw a share of the trajectories each. Offsets into shared memory
    in bytes, and what of the weights stays there; see kernels/cuda/mlp_denoise.h."""

    groups: int
    blocks: int
    activations_at: int
    own_at: int
    units_at: int
    out_resident: int
    resident: int
    ring: int
    shared_bytes: int

    @property
    def grid(self) -> int:
        return self.groups * self.blocks


class Gpu(Protocol):
    """Where the kernel runs: how many multiprocessors there are, of how much shared memory each, and a way to launch.

    gave_up: [1] int32 in the host's memory, of which a launch that gives up makes 1.
    """

    multiprocessors: int
    shared_bytes: int
    gave_up: Tensor
    warps: int
    origin: str

    def launch(self, entry: str, call: Call, plan: Plan) -> None: ...


def about(dtype: torch.dtype) -> str:
    how = f"CUDA graphs {'on' if graphs.enabled() else 'off'}"
    return f"one persistent CUDA kernel for all steps, in {dtype} with float32 accumulation, up to {MAX_ROWS} rows; {how}"


def refuses(spec: MLPSpec, dtype: torch.dtype, device: torch.device, rows: int, batch_invariant: bool = False) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        found = gpu(device)  # before all that would not help there, and loading nothing
        if isinstance(found, str):
            return found
    if dtype not in SUFFIXES:
        return f"computes in bfloat16 or float16, not in {dtype}"
    if rows > MAX_ROWS:
        return f"serves up to {MAX_ROWS} rows, not {rows}"
    if spec.in_channels > CHANNELS:
        return f"serves tokens of up to {CHANNELS} channels, not {spec.in_channels}"
    reason = triton.refuses(spec, dtype, device, rows)  # its kernel makes the modulation
    if reason is not None:
        return reason
    found = gpu(device)
    if isinstance(found, str):
        return found
    if any(plan_for(spec, Shape(1, graphs.row_bucket(rows), guided, False, *HOISTS), found) is None for guided in (False, True)):
        return (
            f"width {spec.width} and {rows} rows do not fit {found.multiprocessors} multiprocessors with "
            f"{found.shared_bytes >> 10} KiB of shared memory each"
        )
    return None


def draws() -> bool:
    return True


def captures() -> bool:
    return graphs.enabled()


def fastest_up_to(width: int, device: torch.device) -> int:
    """The number of rows up to which "auto" prefers this backend: measured on this GPU, else a guess."""
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    return _crossover().get(name, {}).get(str(width), FASTEST_UP_TO)


@functools.cache
def _crossover() -> dict[str, dict[str, int]]:
    return json.loads(CROSSOVER.read_text())


def denoise(
    head: MLPHead,
    z: Tensor,
    table: StepTable,
    cfg: float,
    temperature: float,
    noise: Tensor,
    step_noise: Tensor | Philox | None,
    batch_invariant: bool,
) -> Tensor:
    if len(z) == 0:
        return noise.clone()
    raise_if_gave_up(gpu(z.device))
    w = head.packed("cuda", z.dtype, Weights)
    philox = step_noise if isinstance(step_noise, Philox) else None
    given = None if philox else step_noise
    fill_rest = triton.inputs(w, z, table, cfg, temperature, noise, given)
    streams = None if philox is None or philox.streams is None else philox.streams_of(len(noise), z.device)

    def shape(rows: int) -> Shape:
        return Shape(len(table), rows, cfg != 1.0, given is not None, *HOISTS, philox is not None)

    def fill(buffers: Buffers) -> None:
        fill_rest(buffers)
        if philox:
            buffers["philox"][0].fill_(philox.seed - (philox.seed >> 63 << 64))  # the same bits, signed
            into = buffers["philox"][1 : 1 + len(noise)]
            torch.arange(len(noise), out=into) if streams is None else into.copy_(streams)

    return triton.replayed(w, shape, layout, loop, fill, z, noise)


HOISTS = tiles.HEURISTIC["bfloat16"][tiles.FEW], "ieee"  # of the product before the loop: one choice, whatever the rows and type


@dataclass(frozen=True)
class Shape(triton.Shape):
    """philox: noise is drawn in the kernel."""

    philox: bool = False


class Weights(triton.Weights):
    """As `triton` has them, and again as the kernel reads them: in fragments of the matrix instruction; biases in float32."""

    def __init__(self, p: Mapping[str, Tensor], spec: MLPSpec) -> None:
        super().__init__(p, spec)
        width, channels = spec.width, spec.in_channels
        layers = [layer for block in self.blocks for layer in block]
        weight, bias = self.output
        halves = [F.pad(part, (0, 0, 0, CHANNELS - channels)) for part in weight.split(channels)]
        self.units = torch.cat([fragments(weight) for weight in (*(weight for weight, _ in layers), *halves)])
        self.bias = torch.stack([bias for _, bias in layers]).float()
        self.out_bias = torch.cat([F.pad(part.float(), (0, CHANNELS - channels)) for part in bias.split(channels)])
        weight, bias = self.input
        self.in_weight = F.pad(weight.float(), (0, CHANNELS - channels)).contiguous()
        self.in_bias = bias.float()
        self.entry = f"mlp_denoise_{width if width in WIDTHS else 'any'}{SUFFIXES[self.units.dtype]}"


def fragments(weight: Tensor) -> Tensor:
    """[columns, k] -> flat: for every 8 columns and 16 k, lane by lane, the second operand of the matrix instruction (PTX ISA,
    "Matrix Fragments for mma.m16n8k16"): lane l has k = 2*(l%4) + 0, 1, 8, 9 of column l/4."""
    columns, k = weight.shape
    return weight.reshape(columns // COLUMNS, COLUMNS, k // 16, 2, 4, 2).permute(0, 2, 1, 4, 3, 5).flatten()


def layout(w: Weights, shape: Shape, on: Gpu | None = None) -> Layout:
    """Every buffer of the loop, as `triton`'s; words: what thread blocks tell each other. on: the GPU of the weights if None."""
    of_triton = triton.layout(w, shape)
    names = ("z", "times", "steps", "scalars", "noise", "x", "before", "condition", "y", "modulation")
    return {name: of_triton[name] for name in names} | {
        "philox": ((1 + shape.trajectories if shape.philox else 0,), torch.int64),
        "words": ((plan_for(w.spec, shape, on or gpu(w.units.device)).groups, 3, GROUP_ROWS, w.spec.width), torch.int32),
    }


def loop(w: Weights, shape: Shape, b: Buffers) -> None:
    """All steps, on the current stream: the modulation of as many steps as there is room for, then one launch for those."""
    b["before"].zero_()
    for steps, modulation in triton.modulations(w, shape, b):
        launch(w, shape, b, steps, modulation)


def launch(w: Weights, shape: Shape, b: Buffers, steps: range, modulation: Tensor, on: Gpu | None = None, **fields: object) -> None:
    """The kernel, for some of the steps. fields: of Call, other than what follows from the rest."""
    on, spec = on or gpu(w.units.device), w.spec
    plan = plan_for(spec, shape, on)
    b["words"].zero_()

    def address(tensor: Tensor) -> int | None:
        return tensor.data_ptr() if tensor.numel() else None

    call = Call(
        **{name: address(getattr(w, name)) for name in ("units", "bias", "out_bias", "in_weight", "in_bias")},
        **{name: address(b[name]) for name in ("scalars", "philox", "x", "before", "words")},
        gave_up=address(on.gave_up),
        modulation=address(modulation),
        table=address(b["steps"][steps.start :]),
        noise=address(b["noise"][steps.start :]),
        width=spec.width,
        depth=spec.depth,
        channels=spec.in_channels,
        steps=len(steps),
        trajectories=shape.trajectories,
        guided=shape.guided,
        first_step=steps.start,
        each=shape.trajectories // plan.groups,
        more=shape.trajectories % plan.groups,
        **{name: getattr(plan, name) for name in ("blocks", "activations_at", "own_at", "units_at")},
        **{name: getattr(plan, name) for name in ("out_resident", "resident", "ring")},
        **{"patience": PATIENCE, "dump_step": -1, **fields},
    )
    on.launch(w.entry, call, plan)


def raise_if_gave_up(on: Gpu) -> None:
    """RuntimeError, once, if a launch before now gave up, a graph's replay or not. Does not wait for launches that still run."""
    flag = on.gave_up.numpy()  # no operators of PyTorch, which inference mode may forbid, and which take longer
    if flag[0]:
        flag[0] = 0
        raise RuntimeError(
            f"backend cuda: an earlier call on this GPU gave up after {PATIENCE / 1e9:g} s and returned NaN: its thread blocks did "
            "not all run (a limit of MPS, another program, a debugger, a GPU that stood still). Discard what it returned; the "
            "backends triton and hoisted do not need all blocks at once"
        )


def plan_for(spec: MLPSpec, shape: Shape, on: Gpu) -> Plan | None:
    """None if there is no way to lay it out."""
    return _plan_for(spec.width, spec.depth, shape.trajectories, 1 + shape.guided, on.multiprocessors, on.shared_bytes, on.warps)


@functools.lru_cache(1024)
def _plan_for(
    width: int, depth: int, trajectories: int, halves: int, multiprocessors: int, shared_bytes: int, warps: int
) -> Plan | None:
    """As few groups as rows and shared memory allow, since every group reads all weights, of as many blocks as shorten a step."""
    for groups in range(-(-trajectories * halves // GROUP_ROWS), min(trajectories, multiprocessors) + 1):
        rows = -(-trajectories // groups) * halves
        if rows > GROUP_ROWS:
            continue
        blocks = min(width // COLUMNS, multiprocessors // groups)
        own_tiles = -(-(width // COLUMNS) // blocks)
        blocks = -(-(width // COLUMNS) // own_tiles)  # more would read all activations and shorten no block's work
        at_once = min(PASS, own_tiles)
        tile = GROUP_ROWS * COLUMNS
        # kPartialAt of kernels/cuda/mlp_denoise.cuh, and what it says there of what follows
        activations_at = 8 * GROUP_ROWS * CHANNELS + 16 + 8 * MAX_RING + 8 * CHANNELS + at_once * 4 * warps * tile
        own_at = _up(activations_at + 2 * rows * (width + PAD), 16)
        units_at = _up(own_at + 4 * own_tiles * (tile + COLUMNS * (CHANNELS + 2)), 128)
        unit, own = 2 * COLUMNS * width, 2 * depth * own_tiles
        slots = (shared_bytes - units_at) // unit
        if slots < at_once:
            continue
        ring = 0 if slots >= own + OUT_TILES else 2 * at_once if slots >= 2 * at_once else at_once
        out_resident = int(slots - ring >= OUT_TILES)
        resident = min(own, slots - ring - OUT_TILES * out_resident)
        total = units_at + (OUT_TILES * out_resident + resident + ring) * unit
        return Plan(groups, blocks, activations_at, own_at, units_at, out_resident, resident, ring, total)
    return None


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# The GPU ----------------------------------------------------------------------------------------------------------------


def gpu(device: torch.device) -> Gpu | str:
    """The GPU with the kernel loaded and checked; or why there is none."""
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {device}"
    if torch.version.hip:
        return "runs on NVIDIA GPUs, not on AMD's"
    if not torch.cuda.is_available():
        return "runs on NVIDIA GPUs, of which torch sees none"
    index = torch.cuda.current_device() if device.index is None else device.index
    with _loading:
        if index not in _loaded:
            if torch.cuda.is_current_stream_capturing():
                return "is loaded at its first call, which cannot be within a CUDA graph's capture; call it once before"
            _loaded[index] = _load(index)
    return _loaded[index]


_loaded: dict[int, Gpu | str] = {}
_loading = threading.RLock()


def _load(index: int) -> Gpu | str:
    from .cuda_check import is_wrong

    device = torch.device("cuda", index)
    try:
        with torch.cuda.device(device):
            found = NvidiaGpu(device)
            return is_wrong(found, device) or found
    except (RuntimeError, OSError) as error:
        return f"could not be set up on {torch.cuda.get_device_name(device)}: {error}"


@functools.cache
def dumping(device: torch.device) -> Gpu:
    """The kernel compiled so that it leaves the outputs of a phase in `dump`."""
    return NvidiaGpu(device, dumps=True)


class NvidiaGpu:
    """The kernel on one GPU: what nvcc compiled with the package, else what NVRTC compiles now.

    dumps: compiled so that it leaves a phase's outputs; see cuda_check.first_wrong_phase. RuntimeError if it cannot be had.
    """

    warps = 16  # DISA_FAST_WARPS of mlp_denoise.cuh

    def __init__(self, device: torch.device, dumps: bool = False) -> None:
        if torch.version.hip:
            raise RuntimeError("is made for NVIDIA GPUs; this is a PyTorch for AMD's")
        if _C is None:
            raise RuntimeError(f"the native core, which launches it, is not part of this installation ({_IMPORT_ERROR})")
        self.device = device
        self._module, self.origin = _module(device, dumps)
        self.gave_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)  # which a GPU reaches under its address here
        self.multiprocessors = self._module.multiprocessors()
        # Asking also loads the kernels, which cannot be done while a graph is captured.
        static = max(self._module.resources(entry).shared_bytes for entry in ENTRIES)
        self.shared_bytes = self._module.shared_bytes() - static
        for entry in ENTRIES:
            if not self._module.fits(name=entry, threads=32 * self.warps, shared_bytes=self.shared_bytes):
                raise RuntimeError(f"{entry}: not one block fits a multiprocessor")

    def launch(self, entry: str, call: Call, plan: Plan) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._module.launch(
            name=entry,
            parameters=bytes(call),
            grid=plan.grid,
            threads=32 * self.warps,
            shared_bytes=plan.shared_bytes,
            stream=stream,
        )


def _module(device: torch.device, dumps: bool) -> tuple[_C.CudaModule, str]:
    """The kernels loaded, and how they were compiled. What nvcc made may be too new for the driver; what NVRTC, which comes with
    PyTorch, makes is not."""
    if PREBUILT.exists() and not dumps:
        try:
            return _C.CudaModule(image=PREBUILT.read_bytes(), device=device.index), "compiled by nvcc"
        except RuntimeError as error:
            before = f"what nvcc compiled does not load here ({error})"
    else:
        before = f"it was not compiled with the package ({_why_not_compiled()})"
    why_not = jit.why_not()
    if why_not is not None:
        raise RuntimeError(f"{before}, and NVRTC cannot compile it now: {why_not}")
    image = jit.compile_cubin(SOURCE, architecture(device), ("DISA_FAST_DUMP",) * dumps)
    return _C.CudaModule(image=image, device=device.index), "compiled by NVRTC"


def _why_not_compiled() -> str:
    log = PREBUILT.with_name("no_fatbin.txt")  # written by setup.py
    return " ".join(log.read_text().split())[:300] if log.exists() else "built without setup.py"


def architecture(device: torch.device) -> str:
    """sm_90a and the like, for NVRTC."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major == 9 else ''}"
