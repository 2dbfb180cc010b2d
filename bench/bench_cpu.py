"""The CPU core against what one would use without it, on MAR's head sizes: `make bench`.

Contestants take turns call by call within one process, so that a neighbour's load meets all alike, and with them the machine's own
limits are measured: the bandwidth of reading as many bytes as the loop reads a step, again and again, and the rate of multiply-adds
in registers. Against these stands the floor of a step: for the products of the loop, and for those of the modulation, the longer of
the time to read the weights and the time to multiply them; the sum of both.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from shapes import SIZES, Z_CHANNELS, iterations
from turns import in_turns, ratio, seconds

from disa_fast import _C, MLPHead, solvers
from disa_fast.backends import cpu
from disa_fast.heads.mlp import MLPSpec
from disa_fast.solvers import StepTable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own

ROWS = [2, 8, 14, 32, 128, 512, 2048]
STEPS = {512: 3, 2048: 2}  # of a call; 10 where there are fewer rows
STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONTESTANTS = ["eager", "torch.compile", "hoisted", *STORAGE]


@pytest.fixture(scope="module", params=SIZES)
def head(request) -> MLPHead:
    torch.manual_seed(0)
    shapes = MLPSpec(16, *SIZES[request.param], Z_CHANNELS).shapes()
    return MLPHead.from_state_dict({name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()})


def guided_call(head: MLPHead, rows: int, table: StepTable) -> Callable[..., torch.Tensor]:
    """A guided call; noise is given, so that drawing it is not timed."""
    z = torch.randn(rows, Z_CHANNELS)
    noise, step_noise = torch.randn(rows // 2, 16), torch.randn(len(table), rows // 2, 16)
    return lambda **how: head.denoise(z, table, cfg=3.0, noise=noise, step_noise=step_noise, **how)


def ways(head: MLPHead, run: Callable[..., torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """The same run by every contestant. "eager" is the published loop: the network at every step, in plain PyTorch."""
    torch.compiler.reset()
    compiled = torch.compile(head.network(torch.float32), dynamic=False)

    def run_compiled() -> torch.Tensor:
        head.network = lambda dtype: compiled
        try:
            return run(backend="reference")
        finally:
            del head.network

    return {
        "eager": lambda: run(backend="reference"),
        "torch.compile": run_compiled,
        "hoisted": lambda: run(backend="hoisted"),
        "float32": lambda: run(backend="cpu"),
        "bfloat16": lambda: run(backend="cpu", dtype=torch.bfloat16),
    }


class Limits:
    """What the machine can do, measured as one of the contestants."""

    def __init__(self, head: MLPHead) -> None:
        self.threads, self.isa = torch.get_num_threads(), cpu.instruction_set()
        width, depth = head.spec.width, head.spec.depth
        self.loop_weights = 2 * depth * width**2 + 3 * head.spec.in_channels * width
        self.modulation_weights = head.spec.modulation_width * width
        self.memory = cpu.empty(self.loop_weights, torch.float32).fill_(1)
        self.samples: dict[str, list[float]] = {"float32": [], "bfloat16": [], "multiply-add": []}

    def __call__(self) -> None:
        for name, dtype in STORAGE.items():
            size = self.loop_weights * dtype.itemsize
            read = [
                seconds(lambda size=size: _C.read_memory(self.memory.data_ptr(), size, self.isa, self.threads)) for _ in range(3)
            ]
            self.samples[name].append(size / read[-1])
        start = time.perf_counter()
        done = _C.multiply_add(1_000_000, self.isa, self.threads)
        self.samples["multiply-add"].append(2 * done / (time.perf_counter() - start))

    def report(self, name: str, rows: int, steps: int, step_seconds: float) -> dict[str, float]:
        """Against the limits: bytes that a step has to read, operations that it has to do."""
        bandwidth, peak = statistics.median(self.samples[name]), statistics.median(self.samples["multiply-add"])
        parts = [(self.loop_weights, 1), (self.modulation_weights, steps)]  # each weight is read once in so many steps
        reads = [weights * STORAGE[name].itemsize / once for weights, once in parts]
        flops = [2 * weights * rows for weights, _ in parts]
        floor = sum(max(r / bandwidth, f / peak) for r, f in zip(reads, flops, strict=True))
        return {
            "GB/s": sum(reads) / step_seconds / 1e9,
            "of_bandwidth": sum(reads) / step_seconds / bandwidth,
            "GFLOP/s": sum(flops) / step_seconds / 1e9,
            "of_peak": sum(flops) / step_seconds / peak,
            "floor_us": floor * 1e6,
            "of_floor": floor / step_seconds,
        }


@pytest.mark.parametrize("rows", ROWS)
def test_step(benchmark, head, rows, capsys):
    """Time of a denoising step, rows guided."""
    table = solvers.ddpm(STEPS.get(rows, 10))
    steps = len(table)
    fs = ways(head, guided_call(head, rows, table))
    expected = fs["eager"]()
    for name, f in fs.items():
        error = float((f() - expected).norm() / expected.norm())
        assert error < (0.2 if name == "bfloat16" else 1e-4), f"check the result before timing it: {name}, error {error}"

    limits = Limits(head)
    times = in_turns({**fs, "limits": limits})
    size = next(name for name, shape in SIZES.items() if shape == (head.spec.width, head.spec.depth))
    results = {}
    for name in CONTESTANTS:
        us = statistics.median(times[name]) / steps * 1e6
        low, median, high = ratio(times["eager"], times[name])
        results[name] = {"us_per_step": us, "over_eager": median, "quartiles": [low, high]}
        if name in STORAGE:
            results[name] |= limits.report(name, rows, steps, us / 1e6)
    benchmark.extra_info.update(
        size=size,
        rows=rows,
        steps=steps,
        turns=len(times["eager"]),
        isa=limits.isa,
        limits={name: statistics.median(samples) for name, samples in limits.samples.items()},
        results=results,
    )
    benchmark.group = f"{size}, {rows} rows"
    benchmark.pedantic(fs["float32"], rounds=3)
    with capsys.disabled():
        bandwidth, peak = limits.samples["float32"], limits.samples["multiply-add"]
        print(
            f"\n{size}, {rows} rows, {steps} steps a call, {limits.threads} threads, {limits.isa}: "
            f"reads {statistics.median(bandwidth) / 1e9:.0f} GB/s, peak {statistics.median(peak) / 1e9:.0f} GFLOP/s"
        )
        print(f"{'':14} us/step  GB/s  %read  GFLOP/s  %peak  %floor  over eager")
        for name, r in results.items():
            detail = " " * 36
            if name in STORAGE:
                detail = f"{r['GB/s']:6.1f} {r['of_bandwidth']:6.0%} {r['GFLOP/s']:8.0f} {r['of_peak']:6.0%} {r['of_floor']:6.0%}"
            low, high = r["quartiles"]
            print(f"{name:14} {r['us_per_step']:7.0f} {detail:36} {r['over_eager']:5.2f}x ({low:.2f} to {high:.2f})")


@pytest.mark.parametrize("head", ["MAR-L"], indirect=True)
def test_image(benchmark, head, capsys):
    """The head's part of one image: 64 AR iterations with guidance."""
    calls = [guided_call(head, 2 * drawn, solvers.ddpm(steps)) for drawn, steps in iterations()]

    def run(**how) -> None:
        for call in calls:
            call(**how)

    fs = {name: f for name, f in ways(head, run).items() if name != "torch.compile"}  # it would compile for every number of rows
    times = in_turns(fs)
    results = {name: {"seconds": statistics.median(t), "over_eager": ratio(times["eager"], t)[1]} for name, t in times.items()}
    benchmark.extra_info.update(size="MAR-L", turns=len(times["eager"]), results=results)
    benchmark.pedantic(fs["float32"], rounds=1)
    with capsys.disabled():
        print("\nMAR-L, all 64 AR iterations of an image, 50 to 5 steps:")
        for name, r in results.items():
            print(f"{name:14} {r['seconds']:6.2f} s  {r['over_eager']:.2f}x")


@pytest.mark.parametrize("head", ["MAR-L"], indirect=True)
@pytest.mark.parametrize("rows", [2, 8, 32])
def test_beside_busy_neighbours(benchmark, head, rows, capsys):
    """How much slower a call gets when every core has another program that never rests: about 2x is its fair share."""
    run, slower = guided_call(head, rows, solvers.ddpm(10)), {}
    for backend in ("hoisted", "cpu"):
        run(backend=backend)
        alone = statistics.median(seconds(lambda backend=backend: run(backend=backend)) for _ in range(20))
        neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(torch.get_num_threads())]
        try:
            time.sleep(1)
            beside = [seconds(lambda backend=backend: run(backend=backend)) for _ in range(20)]
        finally:
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.wait()
        slower[backend] = {"median": statistics.median(beside) / alone, "worst": max(beside) / alone}
    benchmark.extra_info.update(size="MAR-L", rows=rows, slower=slower)
    benchmark.pedantic(run, rounds=1)
    with capsys.disabled():
        print(f"\nMAR-L, {rows} rows, beside busy neighbours: {slower}")
    assert slower["cpu"]["worst"] < 10
