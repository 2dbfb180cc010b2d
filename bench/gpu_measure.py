"""What a phase of gpu_first.py measures: whether every backend is right, the limits of the machine, every contestant, in turns, on
the published heads of MAR and on whole images of FlowAR and xAR; and what that says about the targets.

Contestants are the published loop in plain PyTorch, as it is and under autocast as the published scripts run it, compiled, captured
in a CUDA graph, and every backend that can serve: whole calls, and the captured loop alone. Results are checked before they are
timed. Caches are as they are in use: a step finds what the step before left in L2.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import importlib
import importlib.util
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import disa_fast
from disa_fast import MLPHead, backends, graphs, solvers
from disa_fast.backends import cuda, triton
from disa_fast.files import written_aside
from disa_fast.heads.mlp import MLPSpec
from disa_fast.kernels.triton import tiles
from disa_fast.solvers import StepTable

from . import gpu_results, gpu_tests, probes, soak
from .counts import mlp_work
from .gpu_results import headline
from .images import FLOW_SETTINGS, Images
from .peers import autocast_step, captured, published_loop, published_step
from .shapes import SIZES, Z_CHANNELS, iterations

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CORRECT = ((1024, 6, 8), (1280, 8, 8), (1280, 8, 512))  # width, depth, rows
ROWS = {1: 8, 4: 32, 64: 512, 256: 2048}  # by batch size: guidance, and 256 tokens in 64 iterations, so 4 of an image at a time
SHARES = {"relative L2 error": 2.0, "worst element": 3.0}  # of eager's error, which a backend's may be in so few rows
TARGET_SIZES, TARGET_ROWS = ("MAR-L", "MAR-B"), (8, 2, 14)  # of the targets, in the order of interest
OVER_EAGER, OVER_PEERS, IMAGE_MS = 15, 3, 45  # the targets: speed, and milliseconds for one image of MAR-B on an H200
FLOW_FIRST = ("xAR-B", "FlowAR-L")  # of whole images, in the order of interest; in the long form these are compiled too
FLOW_TARGETS = {1: 3.0, 64: 1.3}  # by images at a time: speed over eager
REPORTED = {("xAR-B", 1): "users report 4.5 s for upstream on an A100"}
CFG = 3.0
STEPS = 50  # of a call, as many as an image begins with
MANY_ROWS, STEPS_OF_MANY = 512, 20  # beyond so many rows, where a step's time is that of its arithmetic
TURNS = 5  # each contestant is timed so often, in turns
SAMPLE_SECONDS, MOST_CALLS = 5e-3, 50  # calls one after the other in one sample, between two events
SLACK = 10  # seconds that should be left when something begins
SANITIZER_SECONDS = 60  # for each of its tools
SOAK_CALLS = 5000
SOAKED = ("cuda", "triton")
ENTRY_CALLS = 300  # of each shape of ENTRIES
ENTRIES = ((1280, 8, 8), (1536, 16, 8), (1280, 64, 8))  # width, rows, depth: two tiles a block, long rings, several groups
COMPILE_STEP_SECONDS = 25  # that should be left when a step of a head is to be compiled
COMPILE_SECONDS = 60  # that should be left when the network of a whole image is to be compiled
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}  # graphs are captured here, around the loop
TOLD = 5  # failures of each phase, on the terminal
OURS = "cuda bfloat16"
FLOW_OURS = "triton bfloat16"
ALONE = ", loop alone"
# Relative L2 errors of eager PyTorch and of `hoisted` over float32, found on a CPU with these heads and images
EXPECTED = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-6}
EXPECTED_TF32 = 6e-4  # as many bits of a factor as float16 has
EXPECTED_OF_IMAGES = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4}
TOLERATED = 3.0  # of what is expected; twice that where one trajectory is all there is

Call = Callable[[], Tensor]


@dataclass
class Contestant:
    """call: the whole loop, T steps. weight_bytes: of an element of the weights that it reads. tolerance: relative L2 error."""

    call: Call
    weight_bytes: int
    tolerance: float


class BrokenContextError(Exception):
    """No call of CUDA's in this process will succeed any more."""


class Report:
    """What the phases of a run have found so far, in `out`. phase: the one that this process is. deadline: of time.monotonic().
    long: compiles, counts and repeats more."""

    def __init__(self, out: Path, phase: str, deadline: float, long: bool = False) -> None:
        self.out, self.phase, self.deadline, self.long = out, phase, deadline, long
        self.results = gpu_results.load(out)
        self.run = self.results["runs"].setdefault(phase, {"failures": [], "skipped": []})
        self.failures: list[str] = self.run["failures"]
        self.skipped: list[str] = self.run["skipped"]
        self.peaks: dict[str, float] = self.results["peaks"]
        triton_version = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
        self.results |= {
            "gpu": torch.cuda.get_device_name() if ON_GPU else f"CPU {platform.machine()}",
            "date": datetime.date.today().isoformat(),
            "commit": gpu_results.commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "triton": triton_version,
            },
        }

    # What is measured ------------------------------------------------------------------------------------------------

    def correct(self, name: str) -> None:
        """A backend against float64, beside eager PyTorch in its dtype; and the times of its first call and of a step."""
        served, last = False, None
        for (width, depth, rows), dtype in ((shape, dtype) for shape in CORRECT for dtype in DTYPES):
            what = f"{name} {in_words(dtype)} {width} x {depth}, {rows} rows"
            last = backends.survey(MLPSpec(16, width, depth, Z_CHANNELS), dtype, DEVICE, rows)[name]
            if last is not None:
                self.skipped.append(f"{what}: {last}")
            elif not self.out_of_time(what):
                served = True
                with self.surviving(what):
                    entry = self.checked_call(what, name, dtype, width, depth, rows)
                    self.add("correct", entry, "backend", "dtype", "width", "rows")
        if last is not None and not served:
            self.fail(f"{name} serves nothing here: {last}")

    def checked_call(self, what: str, name: str, dtype: torch.dtype, width: int, depth: int, rows: int) -> dict[str, Any]:
        head = random_head_of(width, depth)
        parameters = {key: p.to(dtype) for key, p in head._net.state_dict().items()}
        head, exact = (MLPHead.from_state_dict({k: p.to(d) for k, p in parameters.items()}) for d in (dtype, torch.float64))
        z, table, noise, step_noise = inputs(rows, STEPS)
        how = {"table": table, "cfg": CFG, "noise": noise, "step_noise": step_noise}
        truth = exact.denoise(z.to(dtype).double(), **how, backend="reference")
        eager = head.denoise(z.to(dtype), **how, backend="reference")

        def call() -> Tensor:
            return head.denoise(z.to(dtype), **how, backend=name)

        synchronize()
        start = time.perf_counter()
        ours = call()
        synchronize()
        first = time.perf_counter() - start
        errors, bars = errors_of(ours, truth), errors_of(eager, truth)
        us = seconds(call, 20) / len(table) * 1e6
        start = time.perf_counter()
        again = call()
        host = time.perf_counter() - start
        same = torch.equal(ours, again)
        print(f"{what}: errors {errors}, eager {bars}, host {host * 1e6:.0f} us a call", flush=True)
        of_eager = errors["relative L2 error"] / bars["relative L2 error"]
        tell = print if name == "hoisted" else headline  # which is here to compare with
        tell(
            f"{gpu_results.in_short(what)}: error {errors['relative L2 error']:.1e}, {of_eager:.2f} of eager's; "
            f"first {first:.1f} s, {us:.1f} us a step"
        )
        if not same:
            self.fail(f"{what}: the same call again gives other bits")
        for kind, error in errors.items():
            bar = SHARES[kind] * bars[kind] + torch.finfo(dtype).eps
            if not error <= bar:
                self.fail(f"{what}: {kind} {error:.2g}, expected at most {bar:.2g}; eager PyTorch has {bars[kind]:.2g}")
        return {
            "backend": name, "dtype": in_words(dtype), "width": width, "depth": depth, "rows": rows, "steps": len(table),
            "errors": errors, "eager": bars, "same_bits": same, "first_seconds": first, "us_per_step": us,
            "host_us_per_call": host * 1e6, "graphs": head.graph_counters(),
        }  # fmt: skip

    def tests(self, *files: str) -> None:
        """The tests that need a GPU, a process for each file; see gpu_tests.py."""
        gpu_tests.run(self, files, self.deadline)

    def tests_again(self) -> None:
        """Those that failed, each launch waited for, with all of their traces."""
        gpu_tests.run_again(self, self.deadline)

    def limits(self) -> None:
        """Into `peaks`: what the GPU gives, and what the persistent kernel's ways of working cost on it."""
        with self.surviving("limits of the machine"):
            self.peaks.update(measured_peaks())
            headline("measured: " + ", ".join(f"{name} {value:.4g}" for name, value in self.peaks.items()))
            self.write()
        reason = probes.why_not()
        if reason is not None:
            self.skipped.append(f"probes: {reason}")
            return
        with self.surviving("probes"):
            for what, measure in probes.measurements(probes.NvidiaGpu(DEVICE), seconds, captured):
                with self.surviving(f"probe of {what}"):
                    self.peaks.update(measure())
                self.write()
            probes.print_table(self.peaks)
            headline("probed: " + ", ".join(f"{name} {self.peaks[name]:.3g}" for name in probes.told(self.peaks)))

    def shapes(self, *shapes: tuple[str, int]) -> None:
        for size, rows in shapes:
            self.shape(size, rows)

    def shape(self, size: str, rows: int) -> None:
        """Microseconds a step of every contestant, in turns, and what they amount to. Without torch.compile first, so that
        these are on disk should it take too long."""
        what = f"{size}, {rows} rows"
        if self.out_of_time(what):
            return
        head = random_head(size)
        data = inputs(rows, STEPS if rows <= MANY_ROWS else STEPS_OF_MANY)
        truth = published(head, data, torch.float32)()
        checked = self.right(what, self.contestants(what, head, data), truth)
        self.time_shape(size, rows, head.spec, len(data[1]), checked, checked)
        modes = self.compile_modes(size, rows)
        if modes and not self.out_of_time(f"{what}, compiled", COMPILE_STEP_SECONDS):
            compiled = self.right(what, self.compiled(what, head, data, modes), truth)
            if compiled:
                self.time_shape(size, rows, head.spec, len(data[1]), checked | compiled, compiled)
        forget()

    def time_shape(
        self, size: str, rows: int, spec: MLPSpec, steps: int, contestants: dict[str, Contestant], told: Iterable[str]
    ) -> None:
        """All of them in turns, in the place of what was there; `told` on the terminal."""
        times = in_turns({name: contestant.call for name, contestant in contestants.items()}, until=self.deadline - SLACK)
        results = {}
        for name, contestant in contestants.items():
            step_seconds = statistics.median(times[name]) / steps
            results[name] = {"us_per_step": step_seconds * 1e6} | ratios(times, name)
            results[name] |= against_peaks(spec, rows, steps, step_seconds, contestant.weight_bytes, self.peaks)
        entry = {"size": size, "rows": rows, "steps": steps, "results": results}
        self.add("steps", entry, "size", "rows")
        print_shape(entry)
        words = ", ".join(f"{name} {results[name]['us_per_step']:.1f}" for name in told if worth_telling(name))
        headline(gpu_results.in_short(f"{size}, {rows} rows, us a step: {words}"))

    def compile_modes(self, size: str, rows: int) -> tuple[str, ...]:
        """Of torch.compile, which takes its time; for many sizes and rows none."""
        if self.long and (size, rows) in (("MAR-L", 8), ("MAR-L", 2048)):
            return tuple(COMPILE_MODES)
        wanted = (size in TARGET_SIZES and rows in TARGET_ROWS) or (size == "MAR-L" and rows in ROWS.values())
        return ("default",) if wanted else ()

    def right(self, what: str, contestants: dict[str, Contestant], truth: Tensor) -> dict[str, Contestant]:
        """Those that run, and whose result is near `truth`: as a whole, and its worst element."""
        right = {}
        for name, contestant in contestants.items():
            with self.surviving(f"{what}, {name}"):
                for kind, error in errors_of(contestant.call(), truth).items():
                    if not error < contestant.tolerance:
                        raise ArithmeticError(f"{kind} {error:.2g}, expected at most {contestant.tolerance}")
                right[name] = contestant
        return right

    def contestants(self, what: str, head: MLPHead, data: Inputs) -> dict[str, Contestant]:
        """The published loop in PyTorch, and ours. The hoisted loop too as a graph: what the same arithmetic takes by a library's
        products, so that what is gained by hoisting and by graphs can be told from what is gained by kernels."""
        z, table, noise, step_noise = data
        half, n = torch.bfloat16, len(noise)
        found: dict[str, Contestant] = {}
        add = functools.partial(self.add_contestant, found, what, n)

        def autocast(dtype: torch.dtype) -> Call:
            loop = published_loop(autocast_step(head, z, CFG), table, noise, step_noise)
            return torch.autocast(DEVICE.type, dtype)(loop)

        def ours(backend: str, dtype: torch.dtype) -> Call:
            return lambda: head.denoise(z, table, CFG, noise=noise, step_noise=step_noise, backend=backend, dtype=dtype)[:n]

        add("eager float32 TF32", torch.float32, lambda: published(head, data, torch.float32), tf32=True)
        for dtype in (torch.float16, half):
            add(f"eager autocast {in_words(dtype)}", dtype, lambda dtype=dtype: autocast(dtype))
        eager = functools.cache(lambda: published(head, data, half))  # one for both, whose tensors the graph needs
        add("eager bfloat16", half, eager)
        add("eager bfloat16, graph", half, lambda: captured(eager()))
        for backend, dtype in self.able(head, len(z)):
            name, captures = f"{backend} {in_words(dtype)}", backends.BACKENDS[backend].captures()
            add(name, dtype, lambda backend=backend, dtype=dtype: ours(backend, dtype))
            if backend == "hoisted":
                add(f"{name}, graph", dtype, lambda dtype=dtype: captured(ours("hoisted", dtype)))
            if captures and dtype != torch.float32:
                add(name + ALONE, dtype, lambda backend=backend, dtype=dtype: loop_alone(head, backend, dtype, *data))
            if captures and dtype == half:
                add(f"{name}, no graph", dtype, lambda backend=backend, dtype=dtype: without_graphs(ours(backend, dtype)))
            if dtype == torch.float32:
                add(f"{name} TF32", dtype, lambda backend=backend, dtype=dtype: ours(backend, dtype), tf32=True)
        return found

    def compiled(self, what: str, head: MLPHead, data: Inputs, modes: Iterable[str]) -> dict[str, Contestant]:
        """The published step compiled, in a loop and as a graph of the loop."""
        found: dict[str, Contestant] = {}
        add = functools.partial(self.add_contestant, found, what, len(data[2]))
        for mode in modes:
            make = functools.cache(functools.partial(published, head, data, torch.bfloat16, mode))  # one for both
            add(f"compile {mode} bfloat16", torch.bfloat16, make)
            add(f"compile {mode} bfloat16, graph", torch.bfloat16, lambda make=make: captured(make()))
        return found

    def add_contestant(
        self, found: dict[str, Contestant], what: str, n: int, name: str, dtype: torch.dtype, make: Callable[[], Call],
        tf32: bool = False,
    ) -> None:  # fmt: skip
        """n: trajectories."""
        with self.surviving(f"{what}, {name}"):
            call = in_precision("high", make) if tf32 else make()
            expected = EXPECTED_TF32 if tf32 else EXPECTED[dtype]
            found[name] = Contestant(call, dtype.itemsize, TOLERATED * expected * (2 if n == 1 else 1))

    def able(self, head: MLPHead, rows: int) -> list[tuple[str, torch.dtype]]:
        """Every backend of ours that serves such a call here, in each dtype; `hoisted` in one. Not those that have not come through
        `correct`, and might take the others with them."""
        able = []
        for name in backends.BACKENDS:
            if gpu_results.broke(self.results["runs"].get(f"correct {name}")):
                self.skipped.append(f"{name}: left out, since its check of correctness broke off")
                continue
            dtypes = {"reference": (), "hoisted": DTYPES[:1]}.get(name, DTYPES)
            able += [(name, d) for d in dtypes if backends.survey(head.spec, d, DEVICE, rows)[name] is None]
        return able

    def image(self, size: str, batch: int) -> None:
        """Seconds of the head for `batch` images: all 64 AR iterations, 50 steps down to 5."""
        what = f"{size}, {batch} image{'s' * (batch > 1)}"
        if self.out_of_time(what):
            return
        head = random_head(size)
        calls = [inputs(2 * batch * tokens, steps) for tokens, steps in iterations()]

        def published(step: Callable[..., Any]) -> Call:
            def run() -> Tensor:
                return torch.cat([published_loop(step(z), *rest)() for z, *rest in calls])

            return run

        def ours(backend: str) -> Tensor:
            how = {"backend": backend, "dtype": torch.bfloat16}
            return torch.cat(
                [
                    head.denoise(z, table, CFG, noise=noise, step_noise=step_noise, **how)[: len(noise)]
                    for z, table, noise, step_noise in calls
                ]
            )

        half = torch.bfloat16
        most = max(len(z) for z, *_ in calls)
        eager = published(lambda z: published_step(head, z, half, CFG))
        scripts = torch.autocast(DEVICE.type, torch.float16)(published(lambda z: autocast_step(head, z, CFG)))
        fs = {"eager bfloat16": Contestant(eager, 2, TOLERATED * EXPECTED[half])}
        fs["eager autocast float16"] = Contestant(scripts, 2, TOLERATED * EXPECTED[torch.float16])
        for name in [name for name, dtype in self.able(head, most) if dtype == half]:
            fs[f"{name} bfloat16"] = Contestant(functools.partial(ours, name), 2, TOLERATED * EXPECTED[half])
        truth = published(lambda z: published_step(head, z, torch.float32, CFG))()
        run = self.right(what, fs, truth)
        times = in_turns({name: contestant.call for name, contestant in run.items()}, 2, self.deadline - SLACK)
        results = {name: {"seconds": statistics.median(times[name])} | ratios(times, name) for name in run}
        self.add("images", {"size": size, "images": batch, "results": results, "graphs": head.graph_counters()}, "size", "images")
        told = ", ".join(f"{name} {r['seconds'] * 1e3:.1f}" for name, r in results.items())
        print(f"{what}, graphs: {head.graph_counters()}", flush=True)
        headline(gpu_results.in_short(f"{what}, ms of the head's part of 64 AR iterations: {told}"))
        forget()

    def flow_image(self, name: str, batch: int) -> None:
        """Seconds of `batch` whole images by FlowAR or xAR, in DiSA's setting, and what each scale or cell has of them."""
        what = f"{name}, {batch} image{'s' * (batch > 1)}"
        if self.out_of_time(what):
            return
        with self.surviving(what):
            entry = self.timed_images(what, name, batch)
            self.add("flow_images", entry, "model", "images")
            print_flow_image(entry)
            told = ", ".join(f"{who} {r['seconds']:.3f}" for who, r in entry["results"].items())
            headline(gpu_results.in_short(f"{what}, s: {told}"))
        forget()

    def timed_images(self, what: str, name: str, batch: int) -> dict:
        """An entry of `flow_images`. Its models are gone afterwards."""
        images = Images(name, DEVICE, batch)
        checked = self.right(what, *self.drawing(what, images, name, batch))
        turns = 2 if batch == 1 else 1
        times = in_turns({who: contestant.call for who, contestant in checked.items()}, turns, self.deadline - SLACK)
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
        """What draws these images, in half precision, and what upstream's structure draws in float32. Eager is under autocast."""
        half = torch.bfloat16
        found: dict[str, Contestant] = {}

        def add(who: str, dtype: torch.dtype, make: Callable[[], Call]) -> None:
            with self.surviving(f"{what}, {who}"):
                found[who] = Contestant(make(), dtype.itemsize, TOLERATED * EXPECTED_OF_IMAGES[dtype])

        for dtype in (half, torch.float16):
            eager = functools.partial(images.autocast, dtype)
            add(f"eager {in_words(dtype)}", dtype, lambda eager=eager: eager)
        if batch == 1:
            add("eager bfloat16, graph", half, lambda: images.captured(captured, half))
        add("hoisted bfloat16", half, lambda: images.ours("hoisted", half))
        for dtype in (half, torch.float16):
            if backends.survey(images.native.head.spec, dtype, DEVICE, batch)["triton"] is None:
                ours = functools.cache(functools.partial(images.ours, "triton", dtype))
                add(f"triton {in_words(dtype)}", dtype, ours)
                if dtype == half:
                    add(f"{FLOW_OURS}, no graph", half, lambda ours=ours: without_graphs(ours()))
        if batch == 1 and self.long and name in FLOW_FIRST and not self.out_of_time(f"{what}, compiled", COMPILE_SECONDS):
            add("compile default bfloat16", half, lambda: images.compiled(images.autocast))
        return found, in_precision("highest", lambda: images.eager)()

    def launches(self, size: str, *rows: int) -> None:
        """Kernels a step of every contestant, added to what `shape` found. Last, since the profiler may slow down what follows."""
        for count in rows:
            entry = next((e for e in self.results["steps"] if (e["size"], e["rows"]) == (size, count)), None)
            what = f"{size}, {count} rows, launches"
            if entry is None or self.out_of_time(what):
                continue
            data = inputs(count, STEPS if count <= MANY_ROWS else STEPS_OF_MANY)
            head = random_head(size)
            contestants = self.contestants(what, head, data) | self.compiled(what, head, data, self.compile_modes(size, count))
            for name in entry["results"]:
                with self.surviving(f"{what} of {name}"):
                    entry["results"][name]["launches_per_step"] = number = launches(contestants[name].call) / entry["steps"]
                    print(f"{name:36} {number:7.1f}", flush=True)
            self.write()
            forget()

    def tiles(self) -> None:
        """tune_triton.py, over what ships; what it finds lies in `out`."""
        tuner = importlib.import_module("bench.tune_triton")
        shutil.copy(tuner.TUNED, self.out / gpu_results.TUNED)
        tuner.TUNED = self.out / gpu_results.TUNED
        minutes = max(0.1, (self.deadline - time.monotonic() - SLACK) / 60)
        how = ["--sizes", "MAR-L", "MAR-B", "--rows", "8", *(["48", "192", "768", "2048"] if self.long else [])]
        sys.argv = ["tune_triton", *how, "--minutes", f"{minutes:.2f}"]
        tuner.main()

    def crossover(self) -> None:
        """tune_cuda.py, over what ships, against Triton with the tiles that were found before; what it finds lies in `out`."""
        if (self.out / gpu_results.TUNED).exists():
            tiles.TUNED = self.out / gpu_results.TUNED
            tiles.tuned.cache_clear()
            tiles.choose.cache_clear()
        tuner = importlib.import_module("bench.tune_cuda")
        tuner.main(["--out", str(self.out / gpu_results.CROSSOVER)])

    def sanitize(self) -> None:
        """compute-sanitizer over small calls of the persistent kernel, where there is one."""
        tool = sanitizer_tool()
        reason = backends.survey(MLPSpec(16, 1024, 1, 64), torch.bfloat16, DEVICE, 4)["cuda"]
        if tool is None or reason is not None:
            self.skipped.append(f"compute-sanitizer: {reason or 'is not on this machine'}")
            return
        for check in ("memcheck", "racecheck", "synccheck"):
            what = f"compute-sanitizer {check}"
            if self.out_of_time(what):
                continue
            with self.surviving(what):
                said, found = sanitized(tool, check, min(SANITIZER_SECONDS, self.deadline - time.monotonic() - SLACK / 2))
                self.results["sanitizer"][check] = said.splitlines()[0]
                headline(f"{what}: {said.splitlines()[0]}")
                if found:
                    raise ArithmeticError(said)
            self.write()

    def entries(self) -> None:
        """The persistent kernel's shipped shapes, again and again: one set of bits each. Then a launch that gives up at once."""
        reason = backends.survey(MLPSpec(16, 1024, 1, 64), torch.bfloat16, DEVICE, 4)["cuda"]
        if reason is not None:
            self.skipped.append(f"repeated calls of cuda: {reason}")
            return
        for width, rows, depth in ENTRIES:
            what = f"cuda {width} x {depth}, {rows} rows, repeated"
            if not self.out_of_time(what):
                with self.surviving(what):
                    calls, wrong = soak.repeated(random_head_of(width, depth), rows, ENTRY_CALLS, self.deadline - SLACK / 2)
                    headline(f"{what}: {calls} calls, {len(wrong)} of them wrong")
                    for line in wrong[:3]:
                        self.fail(f"{what}: {line}")
        with self.surviving("cuda, a launch that gives up"):
            for line in soak.given_up(random_head("MAR-B")):
                self.fail(f"cuda, a launch that gives up: {line}")

    def soak(self) -> None:
        """Many small calls at random: their bits, and memory; see soak.py."""
        why_not = backends.survey(MLPSpec(16, 1024, 1, 64), torch.bfloat16, DEVICE, 4)
        self.skipped += [f"soak, {name}: {why_not[name]}" for name in SOAKED if why_not[name] is not None]
        able = [name for name in SOAKED if why_not[name] is None]
        if not able or self.out_of_time("soak"):
            return
        with self.surviving("soak"):
            limit = self.deadline - time.monotonic() - SLACK / 2
            result = soak.Soak(SOAK_CALLS, device=DEVICE.type, names=able, dtypes=("bfloat16",), seconds=limit).run()
            soak.report(result)
            self.results["soak"] = {name: value for name, value in result.items() if name != "samples"}
            headline(f"soak: {result['calls']} calls, {result['repeats_compared']} compared, {len(soak.wrong(result))} wrong")
            for line in soak.wrong(result):
                self.fail(f"soak: {line}")
            if not result["verdicts"]:
                self.skipped.append(f"soak: {soak.TOO_FEW}")

    def plot(self) -> None:
        if self.results["steps"]:
            plot(self.results["steps"], self.results["gpu"], self.out / gpu_results.PLOT)

    # What becomes of it ----------------------------------------------------------------------------------------------

    def out_of_time(self, what: str, needed: float = SLACK) -> bool:
        over = time.monotonic() > self.deadline - needed
        if over:
            self.skipped.append(f"{what}{gpu_results.OUT_OF_TIME}")
        return over

    def fail(self, line: str) -> None:
        self.failures.append(line[:2000])
        if len(self.failures) <= TOLD:
            headline(f"FAILED {gpu_results.shortened(line)}")
        else:
            print(f"FAILED {line}", flush=True)
        self.write()

    @contextlib.contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """A contestant that fails, in whatever way, is reported, and the others go on, as long as the context is whole."""
        try:
            yield
        except Exception as error:
            self.fail(f"{what}: {type(error).__name__}: {str(error).strip()}")
            if ON_GPU and DEVICE.type == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError as broken:
                    raise BrokenContextError(f"{what}: {str(broken).splitlines()[0]}") from error

    def add(self, kind: str, entry: dict, *key: str) -> None:
        """In the place of one of the same key."""
        entries = self.results[kind]
        entries[:] = [other for other in entries if any(other[name] != entry[name] for name in key)] + [entry]
        self.write()

    def write(self) -> None:
        r = self.results
        r["targets"] = targets(r["steps"], r["images"], r["flow_images"])
        r["costs"] = costs(r["steps"], r["peaks"])
        gpu_results.save(self.out, r)


# Measuring -----------------------------------------------------------------------------------------------------------

Inputs = tuple[Tensor, StepTable, Tensor, Tensor]


def inputs(rows: int, steps: int) -> Inputs:
    """(z, table, noise, step_noise) of a guided call. A table may have fewer steps than it was asked for."""
    table, n = solvers.ddpm(steps), rows // 2
    z, noise = torch.randn(rows, Z_CHANNELS, device=DEVICE), torch.randn(n, 16, device=DEVICE)
    return z, table, noise, torch.randn(len(table), n, 16, device=DEVICE)


def random_head(size: str) -> MLPHead:
    return random_head_of(*SIZES[size])


def random_head_of(width: int, depth: int) -> MLPHead:
    """Of the published shape; a small output layer keeps trajectories tame, as training does."""
    torch.manual_seed(0)
    sd = {}
    for name, shape in MLPSpec(16, width, depth, Z_CHANNELS).shapes().items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        sd[name] = torch.randn(shape, device=DEVICE) * (0.3 * scale if name == "final_layer.linear.weight" else scale)
    return MLPHead.from_state_dict(sd)


def published(head: MLPHead, data: Inputs, dtype: torch.dtype, mode: str | None = None) -> Call:
    """The published loop. mode: of COMPILE_MODES, where its step is to be compiled."""
    z, table, noise, step_noise = data
    step = published_step(head, z, dtype, CFG)
    if mode is not None:
        step = torch.compile(step, mode=COMPILE_MODES[mode], dynamic=False)
    return published_loop(step, table, noise, step_noise)


def loop_alone(
    head: MLPHead, name: str, dtype: torch.dtype, z: Tensor, table: StepTable, noise: Tensor, step_noise: Tensor
) -> Call:
    """The guided loop of `cuda` or `triton` as the replay of a graph, over buffers of its own: no call around it."""
    module, rows = {"cuda": cuda, "triton": triton}[name], graphs.row_bucket(len(z))
    w = head.packed(name, dtype, module.Weights)
    if module is cuda:
        shape = cuda.Shape(len(table), rows, True, True, *cuda.HOISTS)
    else:
        shape = triton.Shape(len(table), rows, True, True, tiles.choose(w.gpu, in_words(dtype), w.spec.width, rows), "ieee")
    buffers = graphs.allocate(module.layout(w, shape), DEVICE)
    triton.inputs(w, z.to(dtype), table, CFG, 1.0, noise, step_noise)(buffers)

    def run() -> Tensor:
        buffers["x"][: len(noise)].copy_(noise)
        module.loop(w, shape, buffers)
        return buffers["x"][: len(noise)]

    return captured(run)


def errors_of(result: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative L2 error, and the worst element's over the largest; nan where anything is not finite."""
    difference = result.double() - truth.double()
    l2, worst = difference.norm() / truth.double().norm(), difference.abs().max() / truth.double().abs().max()
    return {"relative L2 error": float(l2), "worst element": float(worst)}


def in_words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def worth_telling(name: str) -> bool:
    return "float32" not in name and "no graph" not in name


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


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


def seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Of one of so many calls, one after the other. By events on a GPU, whose work goes on after the call."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def in_turns(calls: dict[str, Callable[[], object]], turns: int = TURNS, until: float = math.inf) -> dict[str, list[float]]:
    """Seconds of a call. Each once to warm up, then in turns, so that clocks and neighbours meet all alike; as many calls in a row
    as take SAMPLE_SECONDS, so that the host's start of the first is not what is measured. until: of time.monotonic(), after which
    no turn begins but the first."""
    often = {}
    for name, call in calls.items():
        call()
        often[name] = min(MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / max(seconds(call), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        if turn and time.monotonic() > until:
            break
        for name, call in calls.items():
            times[name].append(seconds(call, often[name]))
    return times


def ratios(times: dict[str, list[float]], name: str) -> dict[str, float | None]:
    """Speed over the published loop, eager in bfloat16, and over the best of what torch.compile gives; spread: of its samples, from
    the least to the largest, as a share of their median."""
    median = {n: statistics.median(samples) for n, samples in times.items()}
    eager = median.get("eager bfloat16")
    compiled = min((t for n, t in median.items() if n.startswith("compile")), default=None)
    return {
        "over_eager": eager / median[name] if eager else None,
        "over_compile": compiled / median[name] if compiled else None,
        "spread": (max(times[name]) - min(times[name])) / median[name],
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


def costs(steps: list[dict], peaks: dict[str, float]) -> list[dict]:
    """A step of the persistent kernel at 8 rows beside what its exchanges alone would take."""
    found = []
    for entry in steps:
        width, depth = SIZES[entry["size"]]
        exchange = peaks.get(f"exchange 8 x {width} us")
        if entry["rows"] == 8 and OURS in entry["results"] and exchange:
            us = entry["results"][OURS]["us_per_step"]
            found.append({"size": entry["size"], "us_per_step": us, "exchanges": 2 * depth + 1, "exchange_us": exchange})
    return found


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
