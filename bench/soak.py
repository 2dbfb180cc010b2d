"""`python -m bench.soak`: very many calls of small heads, at random. Memory has to stay flat, and bits what they were at first.

Rows, steps, solvers, guidance, temperature, dtypes, sources of noise and backends are drawn for each call. Half of the calls are of
a fixed set, each of which must give the bits of its first run, whatever ran before it and runs beside it: some of them run on
several threads at once, with one or two threads for arithmetic. In the first half of the run parameters change now and then, in
place and back, or a head is made anew. In the second half nothing is, so that what a head would keep of each call shows.

The exit status is 1 if anything is wrong; the calls concerned are printed so that `replay` takes them. Needs Linux with
glibc.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import functools
import gc
import json
import math
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disa_fast import FlowTransformerHead, MLPHead, Philox, backends, solvers
from disa_fast.backends import cuda
from disa_fast.collect_env import cpu_name, version_of
from disa_fast.files import written_aside
from disa_fast.heads import flow
from disa_fast.heads.flow_transformer import FlowTransformerNet, FlowTransformerSpec
from disa_fast.heads.mlp import MLPNet, MLPSpec

SPECS: dict[str, tuple[MLPSpec | FlowTransformerSpec, torch.dtype]] = {  # and the dtype of the parameters
    "MLP": (MLPSpec(16, 64, 2, 32), torch.float32),
    "MLP in bfloat16": (MLPSpec(8, 96, 1, 48), torch.bfloat16),
    "FlowAR": (FlowTransformerSpec(16, 64, 1, 32, cross=False), torch.float32),
    "FlowAR with cross-attention": (FlowTransformerSpec(16, 64, 1, 48, cross=True), torch.float32),
}
BACKENDS = {"cpu": ("cpu", "hoisted", "reference"), "cuda": ("cuda", "triton", "hoisted", "reference")}  # by kind of device
MLP_SOLVERS = {
    "ddpm": solvers.ddpm,
    "ddim": solvers.ddim,
    "dpm_solver": solvers.dpm_solver,
    "dpm_solver++": functools.partial(solvers.dpm_solver, plus_plus=True),
}  # and not by name, which gives the same table each time
FLOW_SOLVERS = {"euler": functools.partial(solvers.flow_euler, grid="uniform"), "euler_maruyama": solvers.flow_euler_maruyama}
DTYPES = ("float32", "bfloat16", "float16", "float64")
STEPS = (1, 2, 4, 7)
ROWS = (*range(1, 17), 32, 48, 64)  # of MLP heads; beyond 16 the sizes that a GPU backend does not round up
FLOW_ROWS, TOKENS = (1, 2, 3, 4), (1, 4, 9, 16)
MLP_NOISE, FLOW_NOISE = ("given", "generator", "philox", "streams"), ("given", "generator")
THREADS = (1, 1, 2)  # for arithmetic, one of these
CALLERS = (1, 1, 4)  # threads that call, one of these
FIXED = 200  # calls that are repeated
SAMPLES = 100
WARM_UP = 0.05  # of the run; what is measured in it does not count
SETTLED = 10_000  # calls, before which resident memory says nothing: allocators and libraries take what they will keep
MIN_SAMPLES = 10  # without so many there is no telling
LIBRARY = ("hoisted", "reference")  # on a CPU their bits depend on the number of threads, also on that at the time of laying out
CACHES = {  # PyTorch's on a CPU, of code for each shape of a product: by default 1024 in each, which take some 600 MB to fill
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "LRU_CACHE_CAPACITY": "16",
}
TOO_FEW = "too few calls to tell whether memory is flat"
MAX_FAILURES = 10  # ends the run

# By how much memory may be more at the end than at the beginning
RSS_BYTES, RSS_BYTES_PER_CALL = 16 << 20, 32  # code for shapes of products comes and goes
KEPT_TENSORS = 300  # in the last quarter: of the tables of steps, which are kept up to a number, some may still come in
GPU_RESERVED = 64 << 20  # in the last quarter; it comes in blocks of 20 MiB
GPU_ALLOCATED = 1 << 20  # when all is forgotten


@dataclass(frozen=True)
class Call:
    """A call of `denoise` in plain values. tokens: of a row of FlowAR's; noise: where it comes from, see `arguments`."""

    head: str
    backend: str
    dtype: str
    rows: int
    tokens: int
    solver: str
    steps: int
    cfg: float
    guidance: tuple[float, float]
    temperature: float
    noise: str
    batch_invariant: bool
    seed: int


class Subject:
    """A head of SPECS, and the two sets of parameters that it has in turn."""

    def __init__(self, name: str, device: torch.device) -> None:
        spec, dtype = SPECS[name]
        net = MLPNet(spec) if isinstance(spec, MLPSpec) else FlowTransformerNet(spec)
        self.net = net.requires_grad_(False).to(device, dtype)
        self._states = [_parameters(self.net, seed) for seed in (0, 1)]
        self.change(0)
        self.renew()

    def change(self, state: int) -> None:
        """In place."""
        self.net.load_state_dict(self._states[state], strict=False)
        self.state = state

    def renew(self) -> None:
        head = MLPHead if isinstance(self.net, MLPNet) else FlowTransformerHead
        self.head: MLPHead | FlowTransformerHead = head.from_module(self.net)

    def run(self, call: Call) -> Tensor:
        return self.head.denoise(**arguments(call, self.head))


def _parameters(net: nn.Module, seed: int) -> dict[str, Tensor]:
    """At random, with a small output layer, which keeps trajectories tame, as training does."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, p in net.named_parameters():
        scale = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.1
        made[name] = (torch.randn(p.shape, generator=generator) * (0.3 * scale if "final_layer.linear" in name else scale)).to(p)
    return made


def arguments(call: Call, head: MLPHead | FlowTransformerHead) -> dict[str, Any]:
    """Those of head.denoise; the same for the same call. The table is a new one each time."""
    generator = torch.Generator().manual_seed(call.seed)
    is_mlp, spec = isinstance(head, MLPHead), head.spec
    guided = call.cfg != 1 if is_mlp else call.cfg > 1
    trajectories = call.rows // 2 if guided else call.rows
    tokens = () if is_mlp else (call.tokens,)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(head.device)

    solver = (MLP_SOLVERS if is_mlp else FLOW_SOLVERS)[call.solver]
    made = {name: getattr(call, name) for name in ("cfg", "temperature", "backend")}
    made |= {"z": randn(call.rows, *tokens, spec.z_channels), "table": solver(call.steps), "dtype": getattr(torch, call.dtype)}
    made |= {"batch_invariant": call.batch_invariant} if is_mlp else {"guidance": call.guidance}
    size = (trajectories, *tokens, spec.in_channels)
    return (
        made
        | {
            "given": lambda: {"noise": randn(*size), "step_noise": randn(call.steps, *size)},
            "generator": lambda: {"generator": generator},
            "philox": lambda: {"generator": generator, "rng": "philox"},
            "streams": lambda: {"rng": Philox(call.seed, torch.arange(trajectories) + call.seed)},
        }[call.noise]()
    )


def replay(call: Call, device: str = "cpu", state: int = 0) -> Tensor:
    """The call on a head made for it. state: which of its two sets of parameters it has."""
    subject = Subject(call.head, torch.device(device))
    subject.change(state)
    return subject.run(call)


def repeated(head: MLPHead, rows: int, calls: int, deadline: float) -> tuple[int, list[str]]:
    """(how many guided calls of `cuda` were made, what was wrong with some): one call again and again, its bits those of the first.
    deadline: of time.monotonic()."""
    table, device = solvers.ddpm(50), head.device
    generator = torch.Generator().manual_seed(0)
    z, noise, step_noise = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((rows, head.spec.z_channels), (rows // 2, 16), (len(table), rows // 2, 16))
    )
    made, wrong, first = 0, [], None
    while made < calls and time.monotonic() < deadline:
        result = head.denoise(z, table, 3.0, noise=noise, step_noise=step_noise, backend="cuda", dtype=torch.bfloat16)
        first = result if first is None else first
        if not result.isfinite().all():
            wrong.append(f"call {made}: {int((~result.isfinite()).sum())} of {result.numel()} numbers are not finite")
        elif not torch.equal(result, first):
            wrong.append(f"call {made}: {int((result != first).sum())} of {result.numel()} numbers differ from the first call's")
        made += 1
    return made, wrong


class WithoutABlock:
    """A backends.cuda.Gpu on which the last block of a grid never runs, so that all others give up."""

    def __init__(self, on: cuda.Gpu) -> None:
        self.on, self.multiprocessors, self.shared_bytes = on, on.multiprocessors, on.shared_bytes
        self.warps, self.origin, self.gave_up = on.warps, on.origin, on.gave_up

    def launch(self, entry: str, call: cuda.Call, plan: cuda.Plan) -> None:
        self.on.launch(entry, call, dataclasses.replace(plan, blocks=plan.blocks - 1))


def given_up(head: MLPHead) -> list[str]:
    """What is wrong with a launch of `cuda` that gives up after a millisecond: it has to leave NaN, or be told, and leave the calls
    after it as they were."""
    rows, table = 8, solvers.ddpm(50)
    z = torch.ones(rows, head.spec.z_channels, device=head.device)
    noise = torch.ones(rows // 2, 16, device=head.device)
    how = {"cfg": 3.0, "noise": noise, "step_noise": torch.zeros(len(table), rows // 2, 16, device=head.device)}
    how |= {"backend": "cuda", "dtype": torch.bfloat16}
    expected = head.denoise(z, table, **how)
    gpu, patience, graphs = cuda.gpu, cuda.PATIENCE, os.environ.get("DISA_FAST_GRAPHS")
    cuda.gpu, cuda.PATIENCE, os.environ["DISA_FAST_GRAPHS"] = lambda device: WithoutABlock(gpu(device)), 1_000_000, "0"
    wrong = []
    try:
        if head.denoise(z, table, **how).isfinite().any():
            wrong.append("a launch without one of its blocks left what looks like a result")
    finally:
        cuda.gpu, cuda.PATIENCE = gpu, patience
        del os.environ["DISA_FAST_GRAPHS"]
        if graphs is not None:
            os.environ["DISA_FAST_GRAPHS"] = graphs
    for what in ("a call", "the next call"):
        try:
            if not torch.equal(head.denoise(z, table, **how), expected):
                wrong.append(f"{what} after it gives another result")
        except RuntimeError as error:  # which tells of the one that gave up, once
            if what == "the next call":
                wrong.append(f"the next call but one still fails: {error}")
    return wrong


class Soak:
    """seconds: it ends then, whether or not all calls were made. The rest as on the command line. ValueError for a backend or dtype
    that cannot serve."""

    def __init__(
        self,
        calls: int,
        seed: int = 0,
        device: str = "cpu",
        names: Sequence[str] | None = None,
        dtypes: Sequence[str] = DTYPES,
        seconds: float = math.inf,
    ) -> None:
        self.calls, self.seed, self.seconds = calls, seed, seconds
        self.device = torch.device(device)
        self.random = random.Random(seed)
        self.threads = sorted(set(THREADS)) if self.device.type == "cpu" else [1]
        self.subjects = {(name, threads): Subject(name, self.device) for name in SPECS for threads in self.threads}
        self.able = {
            backend: [(name, dtype) for name in SPECS for dtype in dtypes if self.serves(backend, name, dtype)]
            for backend in (BACKENDS[self.device.type] if names is None else names)
        }
        if names is None:
            self.able = {backend: able for backend, able in self.able.items() if able}
        for backend, able in self.able.items():
            if not able:
                raise ValueError(f"backends: expected some that serve on {self.device} in one of {list(dtypes)}, got {backend!r}")
        self.fixed = [self.new_call() for _ in range(max(1, min(FIXED, calls // 40)))]
        self.repeated = frozenset(self.fixed)
        self.first: dict[tuple[Call, int, int], bytes] = {}
        self.samples: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.by_backend: Counter[str] = Counter()
        self.repeats = self.beside_others = self.changes = 0
        self._lock = threading.Lock()

    # What is called ----------------------------------------------------------------------------------------------------

    def serves(self, backend: str, name: str, dtype: str, batch_invariant: bool = False) -> bool:
        return backends.survey(SPECS[name][0], getattr(torch, dtype), self.device, max(ROWS), batch_invariant)[backend] is None

    def new_call(self) -> Call:
        choice, uniform = self.random.choice, self.random.uniform
        backend = choice(list(self.able))
        name, dtype = choice(self.able[backend])
        is_mlp = isinstance(SPECS[name][0], MLPSpec)
        cfg, rows = choice((1.0, 3.0, round(uniform(0, 6), 2))), choice(ROWS if is_mlp else FLOW_ROWS)
        return Call(
            head=name,
            backend=backend,
            dtype=dtype,
            rows=rows if cfg == 1 else rows + rows % 2,
            tokens=choice(TOKENS),
            solver=choice(list(MLP_SOLVERS if is_mlp else FLOW_SOLVERS)),
            steps=choice(STEPS),
            cfg=cfg,
            guidance=choice(((0.0, 1.0), (0.0, 0.9), (0.3, 0.8))),
            temperature=choice((1.0, round(uniform(0, 1.2), 2))),
            noise=choice(MLP_NOISE if is_mlp else FLOW_NOISE),
            batch_invariant=is_mlp and self.serves(backend, name, dtype, True) and choice((False, True)),
            seed=self.random.randrange(1 << 31),
        )

    # The run -----------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """What came of it, as plain values. Something is wrong if there are `failures`, or a verdict does not hold."""
        threads = torch.get_num_threads()
        gc.collect()
        gc.freeze()  # what is there already is not looked at again and again
        self.began = time.monotonic()
        try:
            left = self.everything()
        finally:
            gc.unfreeze()
            torch.set_num_threads(threads)
        return self.result(verdicts(self.samples, *left) if len(left) == 2 else [])

    def everything(self) -> list[dict[str, int]]:
        """Makes all calls. Returns what is `left` after the warm-up and at the end, as far as it came."""
        for state in (0, 1):
            for subject in self.subjects.values():
                subject.change(state)
            for threads in self.threads:
                self.make(self.fixed, threads, callers=1)
        left = []
        while not self.is_over():
            phase = "warm-up" if self.progress() < WARM_UP else "changing" if self.progress() < 0.5 else "steady"
            if not left and phase != "warm-up":
                left.append(self.left())
            if phase != "steady":
                self.change_something()
            wanted = range(max(1, self.calls // SAMPLES))
            calls = [self.random.choice(self.fixed) if self.random.random() < 0.5 else self.new_call() for _ in wanted]
            self.make(calls, self.random.choice(THREADS), self.random.choice(CALLERS))
            self.samples.append({"calls": self.done, "phase": phase, **measured(self.device)})
            if len(self.samples) % (SAMPLES // 10) == 0:
                seconds = time.monotonic() - self.began
                print(f"{self.done} calls, {seconds:.0f} s, {len(self.failures)} failures, {self.samples[-1]}", flush=True)
        return [*left, self.left()] if left else []

    @property
    def done(self) -> int:
        return self.by_backend.total()

    def progress(self) -> float:
        return max(self.done / self.calls, (time.monotonic() - self.began) / self.seconds)

    def is_over(self) -> bool:
        return self.progress() >= 1 or len(self.failures) >= MAX_FAILURES

    def change_something(self) -> None:
        subject, event = self.random.choice(list(self.subjects.values())), self.random.choice(("parameters", "head", "nothing"))
        if event == "parameters":
            subject.change(1 - subject.state)
        elif event == "head":
            subject.renew()
        self.changes += event != "nothing"

    def left(self) -> dict[str, int]:
        """`measured` with all forgotten that was derived from parameters and tables."""
        for subject in self.subjects.values():
            subject.head.refresh()
        flow.coefficients.cache_clear()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch._C._cuda_clearCublasWorkspaces()  # one for each stream that there was; no graph is left that would need one
        return measured(self.device)

    def make(self, calls: Sequence[Call], threads: int, callers: int) -> None:
        """The calls, by so many callers at once, each with so many threads for its arithmetic."""
        one = functools.partial(self.one, threads=threads, alone=callers == 1)
        if callers == 1:
            torch.set_num_threads(threads)
            for call in calls:
                one(call)
        else:
            with ThreadPoolExecutor(callers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
                list(pool.map(one, calls))

    def one(self, call: Call, threads: int, alone: bool) -> None:
        if self.is_over():
            return
        laid_out = threads if call.backend in LIBRARY and self.device.type == "cpu" else self.threads[0]
        subject = self.subjects[call.head, laid_out]
        try:
            wrong = self.what_is_wrong(call, (call, subject.state, laid_out), subject.run(call).cpu())
        except Exception as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())}"
        with self._lock:
            self.by_backend[call.backend] += 1
            self.beside_others += not alone
            if wrong is not None:
                beside = "alone" if alone else "beside others"
                self.failures.append(f"{wrong}; call {self.done}, {beside}, {threads} threads, state {subject.state}: {call!r}")
                print(f"FAILED {self.failures[-1]}", flush=True)

    def what_is_wrong(self, call: Call, key: tuple[Call, int, int], result: Tensor) -> str | None:
        if not result.isfinite().all():
            return f"{int((~result.isfinite()).sum())} of {result.numel()} numbers are not finite"
        if call not in self.repeated:
            return None
        mine = result.numpy().tobytes()
        with self._lock:
            first = self.first.setdefault(key, mine)
            self.repeats += first is not mine
        if first == mine:
            return None
        differ = np.frombuffer(first, np.uint8) != np.frombuffer(mine, np.uint8)
        return f"{int(differ.sum())} of {len(differ)} bytes differ from the first run's"

    def depending_on_threads(self) -> dict[str, int]:
        """Of the fixed calls, how many gave other bits with two threads for the library's arithmetic, by backend."""
        found = dict.fromkeys(self.able, 0)
        for call in self.repeated:
            found[call.backend] += len({bits for (of, state, _), bits in self.first.items() if (of, state) == (call, 0)}) > 1
        return found

    # What comes of it --------------------------------------------------------------------------------------------------

    def result(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "date": datetime.date.today().isoformat(),
            "machine": {
                "cpu": cpu_name(),
                "cores": os.cpu_count(),
                "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": version_of("triton")},
            "caches": {name: os.environ.get(name, "default") for name in CACHES},
            "seed": self.seed,
            "calls": self.done,
            "seconds": round(time.monotonic() - self.began, 1),
            "calls_by_backend": dict(self.by_backend),
            "calls_beside_others": self.beside_others,
            "fixed_calls": len(self.fixed),
            "repeats_compared": self.repeats,
            "fixed_calls_whose_bits_depend_on_threads": self.depending_on_threads(),
            "changes_of_parameters_or_heads": self.changes,
            "samples": self.samples,
            "verdicts": found,
            "failures": self.failures,
        }


def measured(device: torch.device) -> dict[str, int]:
    """Of this process, after a garbage collection: resident bytes, live tensors that are not frozen, threads, open files; on a GPU
    bytes allocated and reserved. Allocators give back what they have in stock before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    process = Path("/proc/self")
    found = {
        "rss": int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
        "threads": len(list((process / "task").iterdir())),
        "files": len(list((process / "fd").iterdir())),
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        found |= {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    return found


def verdicts(samples: list[dict[str, Any]], left_before: dict[str, int], left_after: dict[str, int]) -> list[dict[str, Any]]:
    """Each with what grew, by how much, what is allowed, and whether that holds. None if there are too few samples; none of
    resident memory if there are too few calls."""
    counted = [sample for sample in samples if sample["phase"] != "warm-up"]
    steady = [sample for sample in counted if sample["phase"] == "steady"]
    if len(steady) < MIN_SAMPLES:
        return []
    found = [
        ("tensors in the last quarter, last tenth over first", growth(steady[len(steady) // 2 :], "tensors"), KEPT_TENSORS),
        ("tensors left when all is forgotten", left_after["tensors"] - left_before["tensors"], 0),
        ("threads, last tenth over first", growth(counted, "threads"), 0),
        ("open files, last tenth over first", growth(counted, "files"), 0),
    ]
    settled = [sample for sample in counted if sample["calls"] > SETTLED]
    if len(settled) >= MIN_SAMPLES:
        calls = settled[-1]["calls"] - settled[0]["calls"]
        line = statistics.linear_regression([sample["calls"] for sample in settled], [sample["rss"] for sample in settled])
        allowed = RSS_BYTES + RSS_BYTES_PER_CALL * calls
        found.append(("resident bytes, fitted over the run", line.slope * calls, allowed))
        found.append(("resident bytes, last tenth over first", growth(settled, "rss"), allowed))
    if "reserved" in left_after:
        reserved = growth(steady[len(steady) // 2 :], "reserved")
        found.append(("GPU bytes reserved in the last quarter, last tenth over first", reserved, GPU_RESERVED))
        left = left_after["allocated"] - left_before["allocated"]
        found.append(("GPU bytes allocated when all is forgotten", left, GPU_ALLOCATED))
    return [{"what": what, "grew": grew, "allowed": allowed, "holds": grew <= allowed} for what, grew, allowed in found]


def growth(samples: list[dict[str, Any]], name: str) -> float:
    """Median of the last tenth over that of the first."""
    tenth = max(1, len(samples) // 10)
    first, last = ([sample[name] for sample in part] for part in (samples[:tenth], samples[-tenth:]))
    return statistics.median(last) - statistics.median(first)


def wrong(result: dict[str, Any]) -> list[str]:
    """What is wrong, a line each: calls, then what grew."""
    grown = [verdict for verdict in result["verdicts"] if not verdict["holds"]]
    return result["failures"] + [f"{each['what']}: {each['grew']:+,.0f}, allowed {each['allowed']:,.0f}" for each in grown]


def report(result: dict[str, Any]) -> None:
    """Print it, but for the series."""
    for name, value in result.items():
        if name not in ("samples", "verdicts", "failures"):
            print(f"{name}: {value}")
    for verdict in result["verdicts"]:
        print(f"{verdict['what']}: {verdict['grew']:+,.0f}, allowed {verdict['allowed']:,.0f}")
    if not result["verdicts"]:
        print(TOO_FEW)
    for line in wrong(result):
        print(f"FAILED: {line}")


def main(argv: Sequence[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=list(BACKENDS), default=device, help="(default: %(default)s)")
    parser.add_argument("--backends", nargs="+", choices=list(backends.BACKENDS), help="(default: all that serve on such a device)")
    parser.add_argument("--json", type=Path, help="file to write the result into")
    options = parser.parse_args(argv)
    for name, capacity in CACHES.items():  # read at the first product
        os.environ.setdefault(name, capacity)
    result = Soak(options.calls, options.seed, options.device, options.backends).run()
    report(result)
    if options.json is not None:
        with written_aside(options.json) as aside:
            aside.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong(result) or not result["verdicts"] else 0


if __name__ == "__main__":
    sys.exit(main())
