"""What `make gpu-report` measures: the limits of the machine, then every contestant, in turns, on the published heads of MAR and on
whole images of FlowAR and xAR; and what that says about the targets.

Contestants are the published loop in plain PyTorch, the same compiled, both captured in a CUDA graph, and every backend that can
serve. Results are checked before they are timed. Caches are as they are in use: a step finds what the step before left in L2.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import disa_fast
from disa_fast import MLPHead, backends, solvers
from disa_fast.files import written_aside
from disa_fast.heads.mlp import MLPSpec

from . import probes, soak
from .counts import mlp_work
from .images import FLOW_SETTINGS, Images
from .peers import captured, published_loop, published_step
from .shapes import SIZES, Z_CHANNELS, iterations

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROWS = {1: 8, 4: 32, 64: 512, 256: 2048}  # by batch size: guidance, and 256 tokens in 64 iterations, so 4 of an image at a time
TARGET_SIZES, TARGET_ROWS = ("MAR-L", "MAR-B"), (8, 2, 14)  # of the targets, in the order of interest
OVER_EAGER, OVER_PEERS, IMAGE_MS = 15, 3, 45  # the targets: speed, and milliseconds for one image of MAR-B on an H200
FLOW_FIRST = ("xAR-B", "FlowAR-L")  # of whole images, in the order of interest; these are compiled too, one at a time
FLOW_TARGETS = {1: 3.0, 64: 1.3}  # by images at a time: speed over eager
FLOW_SECONDS = {1: 20, 64: 90}  # likewise: that should be left when their measuring begins
FLOW_TOLERANCE = 0.1  # relative L2 error of bfloat16, of an image by a random model
REPORTED = {("xAR-B", 1): "users report 4.5 s for upstream on an A100"}
COMPILED = {8: ("default", "max-autotune"), 2048: ("default", "max-autotune")}  # by rows of MAR-L; see compile_modes
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}  # graphs are captured here, around the loop
CFG = 3.0
STEPS = 10  # of a call; half of them for many rows
TURNS = 5  # each contestant is called so often, in turns
SLACK = 20  # seconds that should be left when something begins
SANITIZER_SECONDS = 60  # for each of its tools
SOAK_CALLS, SOAK_SECONDS = 5000, 60  # whichever comes first
SOAKED = ("cuda", "triton")
COMPILE_SECONDS = 120  # that should be left when the network of a whole image is to be compiled
OURS = "cuda bfloat16"
FLOW_OURS = "triton bfloat16"

Call = Callable[[], Tensor]


@dataclass
class Contestant:
    """call: the whole loop, T steps. weight_bytes: of an element of the weights that it reads. tolerance: relative L2 error."""

    call: Call
    weight_bytes: int
    tolerance: float


@dataclass
class Report:
    """deadline: of time.monotonic(). out: folder of the results. tests: what became of them."""

    deadline: float
    out: Path | None
    tests: str
    peaks: dict[str, float] = field(default_factory=dict)
    steps: list[dict] = field(default_factory=list)
    images: list[dict] = field(default_factory=list)
    flow_images: list[dict] = field(default_factory=list)
    sanitizer: dict[str, str] = field(default_factory=dict)
    soaked: dict = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = torch.cuda.get_device_name() if ON_GPU else f"CPU {platform.machine()}"

    def run(self) -> None:
        print(f"{self.name}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
        if ON_GPU:
            self.on_gpu()
        else:
            self.skipped += [f"{size}, {rows} rows: no GPU" for size in SIZES for rows in ROWS.values()]
            self.skipped += [f"MAR-L, {batch} images: no GPU" for batch in ROWS]
            self.skipped += [f"{name}, {batch} images: no GPU" for name in FLOW_SETTINGS for batch in FLOW_TARGETS]
            for rows in (2, 8):
                self.shape("MAR-B", rows, compiled=())
        self.write()
        if self.out is not None and self.steps:
            plot(self.steps, self.name, self.out / f"{slug(self.name)}.png")
        print(f"\ntests that need a GPU: {self.tests}")
        for title, lines in (("skipped", self.skipped), ("FAILED", self.failures)):
            for line in lines:
                print(f"{title}: {line}")
        if ON_GPU:
            print_targets(self.name, targets(self.steps, self.images, self.flow_images), phases(self.steps, self.peaks))

    def on_gpu(self) -> None:
        """The most asked for first, since time may run out; what the profiler says last, since it may slow down what follows."""
        self.limits()
        first, then = order()
        for measure, size, count in first:
            getattr(self, measure)(size, count)
        self.sanitize()
        self.soak()
        for measure, size, count in then:
            getattr(self, measure)(size, count)
        for rows in COMPILED:
            self.launches("MAR-L", rows)

    # What is measured ------------------------------------------------------------------------------------------------

    def limits(self) -> None:
        """Into `peaks`: what the GPU gives, and what the persistent kernel's ways of working cost on it."""
        with self.surviving("limits of the machine"):
            self.peaks |= measured_peaks()
            print("measured: " + ", ".join(f"{name} {value:.4g}" for name, value in self.peaks.items()), flush=True)
        reason = probes.why_not()
        if reason is not None:
            self.skipped.append(f"probes: {reason}")
            return
        with self.surviving("probes"):
            for what, measure in probes.measurements(probes.NvidiaGpu(DEVICE), seconds, captured):
                with self.surviving(f"probe of {what}"):
                    self.peaks |= measure()
            probes.print_table(self.peaks)
        self.write()

    def shape(self, size: str, rows: int, compiled: tuple[str, ...] | None = None) -> None:
        """Microseconds a step of every contestant, in turns, and what they amount to. compiled: modes; see compile_modes."""
        what = f"{size}, {rows} rows"
        if self.out_of_time(what):
            return
        compiled = compile_modes(size, rows) if compiled is None else compiled
        head, steps = random_head(size), STEPS if rows <= 512 else STEPS // 2
        checked = self.checked(what, head, rows, steps, compiled)
        times = in_turns({name: contestant.call for name, contestant in checked.items()})
        results = {}
        for name, contestant in checked.items():
            step_seconds = statistics.median(times[name]) / steps
            results[name] = {"us_per_step": step_seconds * 1e6} | ratios(times, name)
            results[name] |= against_peaks(head.spec, rows, steps, step_seconds, contestant.weight_bytes, self.peaks)
        self.steps.append({"size": size, "rows": rows, "steps": steps, "results": results})
        print_shape(self.steps[-1])
        self.write()
        forget()

    def checked(self, what: str, head: MLPHead, rows: int, steps: int, compiled: tuple[str, ...]) -> dict[str, Contestant]:
        """The contestants that run, and whose result is near that of the published loop in exact float32."""
        return self.right(what, *self.contestants(what, head, rows, steps, compiled))

    def right(self, what: str, contestants: dict[str, Contestant], truth: Tensor) -> dict[str, Contestant]:
        """Those that run, and whose result is near `truth`."""
        right = {}
        for name, contestant in contestants.items():
            with self.surviving(f"{what}, {name}"):
                error = float((contestant.call().float() - truth).norm() / truth.norm())
                if not error < contestant.tolerance:
                    raise ArithmeticError(f"relative error {error:.2g}, expected at most {contestant.tolerance}")
                right[name] = contestant
        return right

    def contestants(
        self, what: str, head: MLPHead, rows: int, steps: int, compiled: tuple[str, ...]
    ) -> tuple[dict[str, Contestant], Tensor]:
        table, n = solvers.ddpm(steps), rows // 2
        z = torch.randn(rows, Z_CHANNELS, device=DEVICE)
        noise, step_noise = torch.randn(n, 16, device=DEVICE), torch.randn(steps, n, 16, device=DEVICE)
        half = torch.bfloat16
        found: dict[str, Contestant] = {}

        def add(name: str, dtype: torch.dtype, make: Callable[[], Call], tf32: bool = False) -> None:
            with self.surviving(f"{what}, {name}"):
                call = in_precision("high", make) if tf32 else make()
                found[name] = Contestant(call, dtype.itemsize, 0.3 if dtype == half else 2e-2 if tf32 else 1e-3)

        def published(dtype: torch.dtype, mode: str | None = None) -> Call:
            step = published_step(head, z, dtype, CFG)
            if mode is not None:
                step = torch.compile(step, mode=COMPILE_MODES[mode], dynamic=False)
            return published_loop(step, table, noise, step_noise)

        def ours(backend: str, dtype: torch.dtype) -> Call:
            return lambda: head.denoise(z, table, CFG, noise=noise, step_noise=step_noise, backend=backend, dtype=dtype)[:n]

        truth = published(torch.float32)()
        if ON_GPU:
            add("eager float32 TF32", torch.float32, lambda: published(torch.float32), tf32=True)
            for name, mode in {"eager": None, **{f"compile {mode}": mode for mode in compiled}}.items():
                make = functools.cache(functools.partial(published, half, mode))  # one for both, whose tensors the graph needs
                add(f"{name} bfloat16", half, make)
                add(f"{name} bfloat16, graph", half, lambda make=make: captured(make()))
        else:
            add("eager float32", torch.float32, lambda: published(torch.float32))
        for backend, dtype in self.able(head, rows):
            name = f"{backend} {str(dtype).removeprefix('torch.')}"
            add(name, dtype, lambda backend=backend, dtype=dtype: ours(backend, dtype))
            if ON_GPU and backends.BACKENDS[backend].captures():
                add(f"{name}, no graph", dtype, lambda backend=backend, dtype=dtype: without_graphs(ours(backend, dtype)))
            if ON_GPU and dtype == torch.float32:
                add(f"{name} TF32", dtype, lambda backend=backend, dtype=dtype: ours(backend, dtype), tf32=True)
        return found, truth

    @staticmethod
    def able(head: MLPHead, rows: int) -> list[tuple[str, torch.dtype]]:
        """Every backend of ours that serves such a call here, in both dtypes, the slow ones aside."""
        slow = {"reference"} if ON_GPU else {"reference", "triton"}  # on a CPU Triton would be interpreted
        return [
            (backend, dtype)
            for backend in backends.BACKENDS
            for dtype in (torch.bfloat16, torch.float32)
            if backend not in slow and backends.survey(head.spec, dtype, DEVICE, rows)[backend] is None
        ]

    def image(self, size: str, batch: int) -> None:
        """Seconds of the head for `batch` images: all 64 AR iterations, 50 steps down to 5."""
        what = f"{size}, {batch} images"
        if self.out_of_time(what):
            return
        head, calls = random_head(size), []
        for tokens, steps in iterations():
            n = batch * tokens
            z, noise, step_noise = (torch.randn(shape, device=DEVICE) for shape in ((2 * n, Z_CHANNELS), (n, 16), (steps, n, 16)))
            calls.append((z, solvers.ddpm(steps), noise, step_noise))

        def published() -> None:
            for z, table, noise, step_noise in calls:
                published_loop(published_step(head, z, torch.bfloat16, CFG), table, noise, step_noise)()

        def ours(backend: str) -> None:
            how = {"backend": backend, "dtype": torch.bfloat16}
            for z, table, noise, step_noise in calls:
                head.denoise(z, table, CFG, noise=noise, step_noise=step_noise, **how)

        most = max(len(z) for z, *_ in calls)
        able = [backend for backend, dtype in self.able(head, most) if dtype == torch.bfloat16]
        fs = {"eager bfloat16": published, **{f"{name} bfloat16": lambda name=name: ours(name) for name in able}}
        run = {}
        for name, f in fs.items():
            with self.surviving(f"{what}, {name}"):
                f()
                run[name] = f
        times = in_turns(run, turns=2)
        results = {name: {"seconds": statistics.median(times[name])} | ratios(times, name) for name in run}
        self.images.append({"size": size, "images": batch, "results": results, "graphs": head.graph_counters()})
        print(f"\n{what}, the head's part of 64 AR iterations, 50 to 5 steps; graphs: {head.graph_counters()}")
        for name, result in results.items():
            print(f"{name:36} {result['seconds'] * 1e3:9.1f} ms {as_ratio(result['over_eager'])}", flush=True)
        self.write()
        forget()

    def flow_image(self, name: str, batch: int) -> None:
        """Seconds of `batch` whole images by FlowAR or xAR, in DiSA's setting, and what each scale or cell has of them."""
        what = f"{name}, {batch} images"
        if self.out_of_time(what, FLOW_SECONDS[batch]):
            return
        with self.surviving(what):
            self.flow_images.append(self.timed_images(what, name, batch))
            print_flow_image(self.flow_images[-1])
        self.write()
        forget()

    def timed_images(self, what: str, name: str, batch: int) -> dict:
        """An entry of `flow_images`. Its models are gone afterwards."""
        images = Images(name, DEVICE, batch)
        checked = self.right(what, *self.drawing(what, images, name, batch))
        times = in_turns({who: contestant.call for who, contestant in checked.items()}, turns=2 if batch == 1 else 1)
        results = {}
        for who, samples in times.items():
            median = statistics.median(samples)
            results[who] = {"seconds": median, "images_per_second": batch / median} | ratios(times, who)
        graphs = checked[FLOW_OURS].call.head.graph_counters() if FLOW_OURS in checked else {}
        checked.clear()
        shares: list[float] = []
        with self.surviving(f"{what}, shares"):
            shares += images.shares(dtype=torch.bfloat16)
        entry = {"model": name, "images": batch, "steps": images.steps, "cfg": images.setting.sampling.cfg}
        return entry | {"results": results, "graphs": graphs, "shares": shares}

    def drawing(self, what: str, images: Images, name: str, batch: int) -> tuple[dict[str, Contestant], Tensor]:
        """What draws these images, in bfloat16, and what upstream's structure draws in float32, whose products may be TF32."""
        half = torch.bfloat16
        found: dict[str, Contestant] = {}

        def add(who: str, make: Callable[[], Call]) -> None:
            with self.surviving(f"{what}, {who}"):
                found[who] = Contestant(make(), half.itemsize, FLOW_TOLERANCE)

        add("eager bfloat16", lambda: images.autocast)
        add("hoisted bfloat16", lambda: images.ours("hoisted", half))
        if backends.survey(images.native.head.spec, half, DEVICE, batch)["triton"] is None:
            ours = functools.cache(functools.partial(images.ours, "triton", half))
            add(FLOW_OURS, ours)
            add(f"{FLOW_OURS}, no graph", lambda: without_graphs(ours()))
        if batch == 1 and name in FLOW_FIRST and not self.out_of_time(f"{what}, compiled", COMPILE_SECONDS):
            add("compile default bfloat16", lambda: images.compiled(images.autocast))
        return found, in_precision("high", lambda: images.eager)()

    def launches(self, size: str, rows: int) -> None:
        """Kernels a step of every contestant, added to what `shape` found."""
        entry = next((e for e in self.steps if (e["size"], e["rows"]) == (size, rows)), None)
        if entry is None or self.out_of_time(f"{size}, {rows} rows, launches"):
            return
        contestants, _ = self.contestants(size, random_head(size), rows, entry["steps"], compile_modes(size, rows))
        print(f"\n{size}, {rows} rows, kernels a step")
        for name in entry["results"]:
            with self.surviving(f"{size}, {rows} rows, launches of {name}"):
                entry["results"][name]["launches_per_step"] = count = launches(contestants[name].call) / entry["steps"]
                print(f"{name:36} {count:7.1f}", flush=True)
        self.write()
        forget()

    def sanitize(self) -> None:
        """compute-sanitizer over small calls of the persistent kernel, where there is one."""
        tool = sanitizer_tool()
        reason = backends.survey(MLPSpec(16, 1024, 1, 64), torch.bfloat16, DEVICE, 4)["cuda"]
        if tool is None or reason is not None:
            self.skipped.append(f"compute-sanitizer: {reason or 'is not on this machine'}")
            return
        print()
        for check in ("memcheck", "racecheck", "synccheck"):
            what = f"compute-sanitizer {check}"
            if self.out_of_time(what):
                continue
            with self.surviving(what):
                said, found = sanitized(tool, check, min(SANITIZER_SECONDS, self.deadline - time.monotonic() - SLACK / 2))
                self.sanitizer[check] = said.splitlines()[0]
                print(f"{what}: {self.sanitizer[check]}", flush=True)
                if found:
                    raise ArithmeticError(said)
        self.write()

    def soak(self) -> None:
        """Many small calls at random: their bits, and memory; see soak.py."""
        if self.out_of_time("soak"):
            return
        why_not = backends.survey(MLPSpec(16, 1024, 1, 64), torch.bfloat16, DEVICE, 4)
        self.skipped += [f"soak, {name}: {why_not[name]}" for name in SOAKED if why_not[name] is not None]
        able = [name for name in SOAKED if why_not[name] is None]
        if not able:
            return
        print()
        with self.surviving("soak"):
            limit = min(SOAK_SECONDS, self.deadline - time.monotonic() - SLACK / 2)
            result = soak.Soak(SOAK_CALLS, device=DEVICE.type, names=able, dtypes=("bfloat16",), seconds=limit).run()
            soak.report(result)
            self.soaked = {name: value for name, value in result.items() if name != "samples"}
            self.failures += [f"soak: {line}" for line in soak.wrong(result)]
            if not result["verdicts"]:
                self.skipped.append(f"soak: {soak.TOO_FEW}")
        self.write()

    # What becomes of it ----------------------------------------------------------------------------------------------

    def out_of_time(self, what: str, needed: float = SLACK) -> bool:
        over = time.monotonic() > self.deadline - needed
        if over:
            self.skipped.append(f"{what}: out of time")
        return over

    @contextlib.contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """A contestant that fails, in whatever way, is reported, and the others go on."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {str(error).strip()[:500]}")
            print(f"FAILED {self.failures[-1]}", flush=True)

    def write(self) -> None:
        if self.out is None:
            return
        triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
        result = {
            "gpu": self.name,
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "triton": triton,
            },
            "tests": self.tests,
            "peaks": self.peaks,
            "steps": self.steps,
            "images": self.images,
            "flow_images": self.flow_images,
            "targets": targets(self.steps, self.images, self.flow_images),
            "phases": phases(self.steps, self.peaks),
            "sanitizer": self.sanitizer,
            "soak": self.soaked,
            "skipped": self.skipped,
            "failures": self.failures,
        }
        with written_aside(self.out / f"{slug(self.name)}.json") as aside:
            aside.write_text(json.dumps(result, indent=1) + "\n")


# Measuring -----------------------------------------------------------------------------------------------------------


def order() -> tuple[list[tuple[str, str, int]], list[tuple[str, str, int]]]:
    """What the targets are about, then the rest: ("shape", size, rows), ("image", size, images), ("flow_image", model, images)."""
    first_rows, *other_rows = TARGET_ROWS
    first = [
        *(("shape", size, first_rows) for size in TARGET_SIZES),
        ("image", "MAR-B", 1),
        *(("flow_image", name, batch) for batch in FLOW_TARGETS for name in FLOW_FIRST),
        *(("shape", size, rows) for rows in (*other_rows, ROWS[4]) for size in TARGET_SIZES),
    ]
    then = [
        ("shape", "MAR-L", ROWS[256]),
        *(("image", "MAR-L", batch) for batch in ROWS),
        *(("shape", size, rows) for size in ("MAR-L", "MAR-B", "MAR-H") for rows in ROWS.values()),
        *(("flow_image", name, batch) for batch in FLOW_TARGETS for name in FLOW_SETTINGS),
    ]
    return first, [one for one in dict.fromkeys(then) if one not in first]


def compile_modes(size: str, rows: int) -> tuple[str, ...]:
    """Of torch.compile, which takes its time; for many sizes and rows none."""
    if size == "MAR-L":
        return COMPILED.get(rows, ("default",))
    return ("default",) if rows in COMPILED or (size in TARGET_SIZES and rows in TARGET_ROWS) else ()


def random_head(size: str) -> MLPHead:
    """Of the published shape; a small output layer keeps trajectories tame, as training does."""
    torch.manual_seed(0)
    sd = {}
    for name, shape in MLPSpec(16, *SIZES[size], Z_CHANNELS).shapes().items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        sd[name] = torch.randn(shape, device=DEVICE) * (0.3 * scale if name == "final_layer.linear.weight" else scale)
    return MLPHead.from_state_dict(sd)


def in_precision(precision: str, make: Callable[[], Call]) -> Call:
    """make(), made and always called under torch.set_float32_matmul_precision(precision)."""

    @contextlib.contextmanager
    def set_precision() -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    with set_precision():
        call = make()
    return set_precision()(call)


def without_graphs(call: Call) -> Call:
    def run() -> Tensor:
        os.environ["DISA_FAST_GRAPHS"] = "0"
        try:
            return call()
        finally:
            del os.environ["DISA_FAST_GRAPHS"]

    return run


def seconds(call: Callable[[], object]) -> float:
    """By events on a GPU, whose work goes on after the call."""
    if not ON_GPU:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(calls: dict[str, Callable[[], object]], turns: int = TURNS) -> dict[str, list[float]]:
    """Each once to warm up, then call by call in turns, so that clocks and neighbours meet all alike."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def ratios(times: dict[str, list[float]], name: str) -> dict[str, float | None]:
    """Speed over the published loop, eager in bfloat16 (on a CPU in float32), and over the best of what torch.compile gives."""
    median = {n: statistics.median(samples) for n, samples in times.items()}
    eager = median.get("eager bfloat16", median.get("eager float32"))
    compiled = min((t for n, t in median.items() if n.startswith("compile")), default=None)
    return {
        "over_eager": eager / median[name] if eager else None,
        "over_compile": compiled / median[name] if compiled else None,
    }


def against_peaks(
    spec: MLPSpec, rows: int, steps: int, step_seconds: float, weight_bytes: int, peaks: dict[str, float]
) -> dict[str, float | None]:
    """A guided step of the hoisted loop (counts.py), whoever runs, against what the machine gives."""
    done = mlp_work(spec, rows, steps, weight_bytes)
    rate, work = done.bytes / step_seconds / 1e9, done.flops / step_seconds / 1e12
    matrix = peaks.get("bfloat16 TFLOP/s" if weight_bytes == 2 else "TF32 TFLOP/s")
    return {
        "GB/s": rate,
        "TFLOP/s": work,
        "of_HBM": rate / peaks["HBM GB/s"] if "HBM GB/s" in peaks else None,
        "of_L2": rate / peaks["L2 GB/s"] if "L2 GB/s" in peaks else None,
        "of_matrix": work / matrix if matrix else None,
    }


def measured_peaks() -> dict[str, float]:
    """What this GPU gives: a copy far larger than L2, reading 16 MiB again and again, and large products of random matrices."""

    def fastest(call: Callable[[], object]) -> float:
        call()
        return min(seconds(call) for _ in range(5))

    source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    small, repeats = torch.ones(1 << 22, dtype=torch.float32, device=DEVICE), 50
    reread = repeats * small.nbytes / fastest(captured(lambda: [small.sum() for _ in range(repeats)][-1]))
    peaks = {"HBM GB/s": copied / 1e9, "L2 GB/s": reread / 1e9}
    for name, dtype, precision in (("bfloat16", torch.bfloat16, "highest"), ("TF32", torch.float32, "high")):
        a, b = (torch.randn(8192, 8192, device=DEVICE).to(dtype) for _ in range(2))
        product = in_precision(precision, lambda a=a, b=b: lambda: a @ b)
        peaks[f"{name} TFLOP/s"] = 2 * 8192**3 / fastest(product) / 1e12
    return peaks


def launches(call: Call) -> int:
    """Kernels that a call runs, those of a graph's replay included."""
    call()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


SANITIZED = """
import torch
from disa_fast import MLPHead, solvers
from disa_fast.backends import cuda, cuda_check
from disa_fast.heads.mlp import MLPSpec

cuda.PATIENCE = 600_000_000_000
cuda_check.is_wrong = lambda on, device: None  # which would take its time, and is made up for below
device = "cuda" if torch.cuda.is_available() else "cpu"
for width in (64, 1024):
    torch.manual_seed(0)
    shapes = MLPSpec(16, width, 1, 64).shapes()
    sd = {name: torch.randn(shape, device=device).bfloat16() * shape[-1] ** -0.5 for name, shape in shapes.items()}
    z, noise, step_noise = (torch.randn(shape, device=device) for shape in ((4, 64), (2, 16), (2, 2, 16)))
    ours, expected = (
        MLPHead.from_state_dict(sd).denoise(
            z.bfloat16(), solvers.ddpm(2), 3.0, noise=noise, step_noise=step_noise, backend=backend
        ).float()
        for backend in ("cuda", "hoisted")
    )
    error = float((ours - expected).norm() / expected.norm())
    if not error < 0.05:
        raise SystemExit(f"wrong: width {width}, relative error {error:.2g}")
"""


def sanitizer_tool() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def sanitized(tool: str, check: str, limit: float) -> tuple[str, bool]:
    """(what compute-sanitizer says about the calls of SANITIZED, whether it has found an error)."""
    options = ["--tool", check, "--report-api-errors", "no", "--kernel-name", "kernel_substring=mlp_denoise", "--print-limit", "10"]
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that what lies behind a tensor is not torch's too
    process = subprocess.Popen(
        [tool, *options, sys.executable, "-c", SANITIZED],
        cwd=Path(disa_fast.__file__).parent.parent,
        env=os.environ | {"DISA_FAST_GRAPHS": "0"} | no_cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the program as well as the tool
        process.communicate()
        return f"stopped after {limit:.0f} s", False
    return outcome(output, process.returncode)


def outcome(output: str, code: int) -> tuple[str, bool]:
    """What `sanitized` makes of it. A tool that does not run here, or not to its end, has found nothing."""
    wrong = re.search(r"^wrong: .*", output, re.MULTILINE)
    if wrong is not None:
        return wrong[0], True
    summary = re.search(r"SUMMARY: (.*?(\d+) errors?\b.*)", output)
    if summary is not None and int(summary[2]):
        told = [line for line in output.splitlines() if line.startswith("=========") and "COMPUTE-SANITIZER" not in line]
        return "\n".join([summary[1], *told]), True
    refused = re.search(r"^=.*not supported.*", output, re.MULTILINE)
    if refused is None and summary is not None and code == 0:
        return summary[1], False
    lines = [line for line in output.splitlines() if line.strip("= ")]
    programs = [line for line in lines if not line.startswith("=")]
    last = refused[0] if refused else (programs or lines or ["no word"])[-1]
    return f"did not run: {last.strip('= ')}", False


def forget() -> None:
    torch.compiler.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


# Reporting -----------------------------------------------------------------------------------------------------------


def targets(steps: list[dict], images: list[dict], flow_images: list[dict]) -> list[dict]:
    """What was hoped for beside what was measured; None where it was not. First of the persistent kernel, whose peers are the
    published loop compiled or captured, whichever is fastest; then of whole images."""
    found = []
    for size in reversed(TARGET_SIZES):
        for rows in sorted(TARGET_ROWS):
            results = next((entry["results"] for entry in steps if (entry["size"], entry["rows"]) == (size, rows)), {})
            us = {name: result["us_per_step"] for name, result in results.items()}
            peers = [us[name] for name in us if name.startswith("compile") or name == "eager bfloat16, graph"]
            for what, other, target in (
                ("eager bfloat16", us.get("eager bfloat16"), OVER_EAGER),
                ("the best compiled or captured", min(peers, default=None), OVER_PEERS),
            ):
                speed = other / us[OURS] if other and OURS in us else None
                found.append({"what": f"{size}, {rows} rows, over {what}", "measured": speed, "target": target, "unit": "x"})
    one = next((entry["results"] for entry in images if (entry["size"], entry["images"]) == ("MAR-B", 1)), {})
    milliseconds = one[OURS]["seconds"] * 1e3 if OURS in one else None
    what = "MAR-B, 1 image, the head's part of all steps (on an H200)"
    found.append({"what": what, "measured": milliseconds, "target": IMAGE_MS, "unit": " ms"})
    for name in FLOW_SETTINGS:
        for batch, target in FLOW_TARGETS.items():
            of_batch = (entry["results"] for entry in flow_images if (entry["model"], entry["images"]) == (name, batch))
            speed = next(of_batch, {}).get(FLOW_OURS, {}).get("over_eager")
            what = f"{name}, {batch} image{'s' * (batch > 1)}, {FLOW_OURS} over eager bfloat16"
            found.append({"what": what, "measured": speed, "target": target, "unit": "x"})
    return found


def is_met(target: dict) -> bool | None:
    if target["measured"] is None:
        return None
    return target["measured"] >= target["target"] if target["unit"] == "x" else target["measured"] <= target["target"]


def phases(steps: list[dict], peaks: dict[str, float]) -> list[dict]:
    """A step of the persistent kernel at 8 rows beside what its exchanges alone would take."""
    found = []
    for entry in steps:
        width, depth = SIZES[entry["size"]]
        exchange = peaks.get(f"exchange 8 x {width} us")
        if entry["rows"] == 8 and OURS in entry["results"] and exchange:
            us = entry["results"][OURS]["us_per_step"]
            found.append({"size": entry["size"], "us_per_step": us, "exchanges": 2 * depth + 1, "exchange_us": exchange})
    return found


def print_targets(gpu: str, found: list[dict], costs: list[dict]) -> None:
    print()
    for cost in costs:
        together = cost["exchanges"] * cost["exchange_us"]
        print(
            f"{cost['size']}, 8 rows: {cost['us_per_step']:.1f} us a step of {OURS}; {cost['exchanges']} exchanges of "
            f"{cost['exchange_us']:.2f} us are {together:.1f} us, {together / cost['us_per_step']:.0%} of it"
        )
    print(f"{f'{OURS}, or as said, on {gpu}':64} measured   target")
    for target in found:
        measured = "-" if target["measured"] is None else f"{target['measured']:.2f}{target['unit']}"
        word = {None: "not measured", True: "met", False: "missed"}[is_met(target)]
        print(f"{target['what']:64} {measured:>8} {target['target']:>5}{target['unit']:3} {word}", flush=True)


def print_shape(entry: dict) -> None:
    print(f"\n{entry['size']}, {entry['rows']} rows guided, {entry['steps']} steps a call")
    print(f"{'':36} us/step   GB/s  %HBM   %L2 TFLOP/s %peak  over eager  compile")
    for name, r in entry["results"].items():
        hbm, l2, matrix = ("     " if r[key] is None else f"{r[key]:5.0%}" for key in ("of_HBM", "of_L2", "of_matrix"))
        print(
            f"{name:36} {r['us_per_step']:7.1f} {r['GB/s']:6.0f} {hbm} {l2} {r['TFLOP/s']:7.1f} {matrix}    "
            f"{as_ratio(r['over_eager'])} {as_ratio(r['over_compile'])}",
            flush=True,
        )


def print_flow_image(entry: dict) -> None:
    (early, late), s = entry["steps"], "s" * (entry["images"] > 1)
    print(f"\n{entry['model']}, {entry['images']} whole image{s}, {early} to {late} steps, guidance {entry['cfg']}")
    print(f"graphs of {FLOW_OURS}: {entry['graphs']}")
    print(f"{'':36} seconds   images/s  over eager  compile")
    for name, r in entry["results"].items():
        rates = f"{r['seconds']:7.3f} {r['images_per_second']:10.2f}"
        print(f"{name:36} {rates}    {as_ratio(r['over_eager'])} {as_ratio(r['over_compile'])}", flush=True)
    if (entry["model"], entry["images"]) in REPORTED:
        print(REPORTED[entry["model"], entry["images"]])
    print("share of each scale or cell:", ", ".join(f"{share:.0%}" for share in entry["shares"]), flush=True)


def as_ratio(value: float | None) -> str:
    return "       -" if value is None else f"{value:7.2f}x"


def plot(steps: list[dict], name: str, path: Path) -> None:
    """Speed over the published loop by rows, a bar for each contestant, of the first size."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    size = steps[0]["size"]
    shapes = sorted((entry for entry in steps if entry["size"] == size), key=lambda entry: entry["rows"])
    names = list(dict.fromkeys(contestant for entry in shapes for contestant in entry["results"]))
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    width = 0.85 / len(names)
    for i, contestant in enumerate(names):
        heights = [entry["results"].get(contestant, {}).get("over_eager") or 0 for entry in shapes]
        at = [position + (i - (len(names) - 1) / 2) * width for position in range(len(shapes))]
        axes.bar(at, heights, width, label=contestant, color=pyplot.get_cmap("tab20")(i % 20))
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [f"{entry['rows']} rows" for entry in shapes])
    axes.set_ylabel("speed over the published loop in eager PyTorch")
    axes.set_title(f"{size} head, one denoising step with guidance, {name}")
    axes.legend(fontsize=8, ncols=2)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=120)
    pyplot.close(figure)
    print(f"written: {path}")


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
