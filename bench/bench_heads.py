"""The heads on a CPU against what one would use without this package: `make bench` writes bench/results/heads.json.

MAR's heads, which are Harmon's too (0.5B has MAR-B's, 1.5B MAR-H's), and FlowAR's, a denoising step at a time; and MAR-L's over
whole DiSA trajectories. xAR's head is its whole transformer, and so is in bench_images.py; for a GPU there is `make gpu-report`.

Contestants: "eager" is the published loop in plain PyTorch, and torch.compile, ONNX Runtime and OpenVINO run the network within it;
the others are this package's backends. They take turns call by call within one process, so that a neighbour's load meets all
alike, and with them the machine's own limits are measured: the bandwidth of reading as many bytes as the loop reads a step, again
and again, and the rate of float32 multiply-adds in registers. Against these stands the floor of a step: for the products of the
loop, and for what comes before it, the longer of the time to read the weights and the time to multiply them; the sum of both.
"""

import functools
import importlib.metadata
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from counts import Work, flow_work, mlp_work
from exported import PEERS, Head, Network, network_of, peers, with_network
from shapes import SIZES, Z_CHANNELS, iterations
from torch import Tensor
from turns import in_turns, ratio, seconds

from disa_fast import _C, FlowTransformerHead, MLPHead, solvers
from disa_fast.backends import cpu
from disa_fast.heads.flow_transformer import FlowTransformerSpec
from disa_fast.heads.mlp import MLPSpec
from disa_fast.models.flowar import SIZES as FLOWAR_SIZES
from disa_fast.solvers import StepTable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # compilers'

IMAGES = {2: 1, 8: 1, 14: 1, 32: 8, 64: 8, 512: 64, 2048: 256}  # by rows: with guidance, 1 to 7 tokens an image at a time
FLOWAR = [  # model, images, tokens of a scale
    ("FlowAR-S", 1, 1),
    ("FlowAR-S", 1, 16),
    ("FlowAR-S", 1, 256),
    ("FlowAR-S", 8, 256),
    ("FlowAR-L", 1, 1),
    ("FlowAR-L", 1, 256),
]
TRAJECTORIES = {1: (range(64), 1), 8: (range(0, 64, 8), 3), 256: ((0, 63), 1)}  # by images: AR iterations measured, turns
BACKENDS = {
    "hoisted": {"backend": "hoisted"},
    "hoisted bfloat16": {"backend": "hoisted", "dtype": torch.bfloat16},
    "cpu": {"backend": "cpu"},
    "cpu bfloat16": {"backend": "cpu", "dtype": torch.bfloat16},
}
MLP_BACKENDS, FLOW_BACKENDS = tuple(BACKENDS), ("hoisted", "hoisted bfloat16")
Calls = dict[str, Callable[[], Tensor]]


def steps_for(tokens: int) -> int:
    """Of a call over so many tokens, both halves of guidance counted: fewer where they take long."""
    return 10 if tokens <= 128 else 3 if tokens <= 512 else 1


def random_head(kind: type[Head], spec: MLPSpec | FlowTransformerSpec) -> Head:
    torch.manual_seed(0)
    return kind.from_state_dict({name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in spec.shapes().items()})


def mlp_call(head: MLPHead, rows: int, table: StepTable) -> Callable[..., Tensor]:
    """(head=..., backend=..., dtype=...) -> a guided call; noise is given, so that drawing it is not timed."""
    z, noise, step_noise = torch.randn(rows, Z_CHANNELS), torch.randn(rows // 2, 16), torch.randn(len(table), rows // 2, 16)
    return lambda head=head, **how: head.denoise(z, table, cfg=3.0, noise=noise, step_noise=step_noise, **how)


def flow_call(head: FlowTransformerHead, rows: int, tokens: int, table: StepTable) -> Callable[..., Tensor]:
    """Likewise, guided at every step: what is saved outside of the guidance interval shows in bench_images.py."""
    z, noise = torch.randn(rows, tokens, head.spec.z_channels), torch.randn(rows // 2, tokens, 16)
    return lambda head=head, **how: head.denoise(z, table, cfg=2.4, guidance=(0.0, 1.0), noise=noise, **how)


def contestants(head: Head, run: Callable[..., Tensor], networks: Mapping[str, Network], backends: tuple[str, ...]) -> Calls:
    """The same run by everyone. networks: what takes the place of the published network in its loop."""
    others = {name: functools.partial(run, with_network(head, network), backend="reference") for name, network in networks.items()}
    return {
        "eager": functools.partial(run, backend="reference"),
        **others,
        **{name: functools.partial(run, **BACKENDS[name]) for name in backends},
    }


def compiled(head: Head, dynamic: bool) -> dict[str, Network]:
    torch.compiler.reset()
    return {"torch.compile": torch.compile(network_of(head), dynamic=dynamic)}


def check(calls: Calls) -> None:
    expected = calls["eager"]()
    for name in calls.keys() - {"eager"}:
        error = float((calls[name]() - expected).norm() / expected.norm())
        assert error < (0.2 if "bfloat16" in name else 1e-4), f"check the result before timing it: {name}, error {error}"


def versions(calls: Calls) -> dict[str, str]:
    """Of the peers among them that are packages of their own."""
    return {name: importlib.metadata.version(name) for name in PEERS if name in calls}


class Limits:
    """What the machine can do, measured as one of the contestants. bytes: what the loop reads a step, by the dtype of weights."""

    def __init__(self, bytes: dict[str, int]) -> None:
        self.threads, self.isa = torch.get_num_threads(), cpu.instruction_set()
        self.bytes = bytes
        self.memory = cpu.empty(max(bytes.values()), torch.uint8).fill_(1)
        self.samples: dict[str, list[float]] = {name: [] for name in (*bytes, "multiply-add")}

    def __call__(self) -> None:
        for name, size in self.bytes.items():
            read = [
                seconds(lambda size=size: _C.read_memory(self.memory.data_ptr(), size, self.isa, self.threads)) for _ in range(3)
            ]
            self.samples[name].append(size / read[-1])
        start = time.perf_counter()
        done = _C.multiply_add(1_000_000, self.isa, self.threads)
        self.samples["multiply-add"].append(2 * done / (time.perf_counter() - start))

    def report(self) -> dict[str, float]:
        """Bytes or operations a second."""
        return {name: statistics.median(samples) for name, samples in self.samples.items()}


def against_limits(name: str, work: Work, step_seconds: float, limits: Mapping[str, float]) -> dict[str, float]:
    """The hoisted loop's work by the time of contestant `name`; of ours also against the limits."""
    rates = {
        "GB/s": work.bytes / step_seconds / 1e9,
        "GFLOP/s": work.flops / step_seconds / 1e9,
        "flops_per_byte": work.flops / work.bytes,
    }
    if name in BACKENDS:
        bandwidth, peak = limits["bfloat16" if "bfloat16" in name else "float32"], limits["multiply-add"]
        rates["of_bandwidth"] = work.bytes / step_seconds / bandwidth
        if name != "hoisted bfloat16":  # whose products are in bfloat16, for which nothing was measured
            floor = sum(max(moved / bandwidth, flops / peak) for moved, flops in work.parts)
            rates |= {"of_peak": work.flops / step_seconds / peak, "floor_us": floor * 1e6, "of_floor": floor / step_seconds}
    return rates


def measure_step(benchmark, capsys, about: dict, calls: Calls, works: dict[str, Work], absent: dict[str, str]) -> None:
    """about: what of the extra_info says which step this is. works: by the dtype of weights."""
    check(calls)
    steps = works["float32"].steps
    limits = Limits({dtype: int(work.parts[0][0]) for dtype, work in works.items()})
    times = in_turns({**calls, "limits": limits})
    measured, results = limits.report(), {}
    for name in calls:
        step_seconds = statistics.median(times[name]) / steps
        low, median, high = ratio(times["eager"], times[name])
        results[name] = {"us_per_step": step_seconds * 1e6, "over_eager": median, "quartiles": [low, high]}
        results[name] |= against_limits(name, works["bfloat16" if "bfloat16" in name else "float32"], step_seconds, measured)
    about = {"kind": "step", **about, "steps": steps, "turns": len(times["eager"]), "isa": limits.isa}
    benchmark.extra_info.update(about, limits=measured, versions=versions(calls), results=results)
    benchmark.pedantic(calls["hoisted"], rounds=1)
    with capsys.disabled():
        print(
            f"\n{about['model']}, batch of {about['images']}, {about['rows']} rows x {about['tokens_per_row']} tokens, "
            f"{steps} steps a call, {len(times['eager'])} turns, {limits.threads} threads, {limits.isa}: "
            f"reads {measured['float32'] / 1e9:.0f} GB/s, peak {measured['multiply-add'] / 1e9:.0f} GFLOP/s"
        )
        print(f"{'':16} us/step   GB/s  %read  GFLOP/s  %peak  %floor  over eager")
        for name, r in results.items():
            read, peak, floor = (f"{r[of]:.0%}" if of in r else "" for of in ("of_bandwidth", "of_peak", "of_floor"))
            low, high = r["quartiles"]
            print(
                f"{name:16} {r['us_per_step']:7.0f} {r['GB/s']:6.1f} {read:>6} {r['GFLOP/s']:8.0f} {peak:>6} {floor:>7} "
                f"{r['over_eager']:6.2f}x ({low:.2f} to {high:.2f})"
            )
        for name, reason in absent.items():
            print(f"{name:16} absent: {reason}")


@pytest.fixture(scope="module", params=SIZES)
def mar(request) -> Iterator[tuple[str, MLPHead, dict[str, Network], dict[str, str]]]:
    """(model, head, its network by others, why some of them are absent). The networks take any number of rows, which change from
    one AR iteration to the next; torch.compile makes it so by itself when it meets a second number."""
    head = random_head(MLPHead, MLPSpec(16, *SIZES[request.param], Z_CHANNELS))
    with tempfile.TemporaryDirectory() as folder:  # pytest's own would be kept, gigabytes of it
        networks, absent = peers(head, Path(folder))
        yield request.param, head, compiled(head, dynamic=True) | networks, absent


@pytest.mark.parametrize("rows", IMAGES)
def test_step(benchmark, mar, rows, capsys):
    """Time of a denoising step of MAR's head, rows guided."""
    model, head, networks, absent = mar
    steps = steps_for(rows)
    calls = contestants(head, mlp_call(head, rows, solvers.ddpm(steps)), networks, MLP_BACKENDS)
    works = {
        "float32": mlp_work(head.spec, rows, steps, weight_bytes=4),
        "bfloat16": mlp_work(head.spec, rows, steps, weight_bytes=2, other_bytes=4),
    }
    about = {"system": "MAR", "model": model, "images": IMAGES[rows], "rows": rows, "tokens_per_row": 1}
    measure_step(benchmark, capsys, about, calls, works, absent)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize(("model", "images", "tokens"), FLOWAR)
def test_flow_step(benchmark, model, images, tokens, folder, capsys):
    """Time of a denoising step of FlowAR's head over one scale."""
    size = FLOWAR_SIZES[{"FlowAR-S": "small", "FlowAR-L": "large"}[model]]
    spec = FlowTransformerSpec(16, size["diffloss_w"], size["diffloss_d"], size["embed_dim"], size["cross"])
    head, rows, steps = random_head(FlowTransformerHead, spec), 2 * images, steps_for(2 * images * tokens)
    networks, absent = peers(head, folder, (tokens,))
    run = flow_call(head, rows, tokens, solvers.flow_euler(steps, "uniform"))
    calls = contestants(head, run, compiled(head, dynamic=False) | networks, FLOW_BACKENDS)
    works = {dtype: flow_work(spec, [rows] * steps, tokens, bytes) for dtype, bytes in (("float32", 4), ("bfloat16", 2))}
    about = {"system": "FlowAR", "model": model, "images": images, "rows": rows, "tokens_per_row": tokens}
    measure_step(benchmark, capsys, about, calls, works, absent)


@pytest.mark.parametrize("mar", ["MAR-L"], indirect=True)
@pytest.mark.parametrize("images", TRAJECTORIES)
def test_trajectory(benchmark, mar, images, capsys):
    """The head's part of `images` images, 64 AR iterations with 50 to 5 steps and guidance, or of some of these iterations.

    Turns are taken within each iteration, and summed. Without torch.compile, which takes as long as eager does.
    """
    model, head, networks, _ = mar
    networks = {name: network for name, network in networks.items() if name in PEERS}
    measured, turns = TRAJECTORIES[images]
    of_all, calls = list(iterations()), {}
    totals: dict[str, list[float]] = {}
    for k in measured:
        drawn, steps = of_all[k]
        rows = 2 * images * drawn
        check(contestants(head, mlp_call(head, rows, solvers.ddpm(1)), networks, MLP_BACKENDS))  # and get to know these shapes
        calls = contestants(head, mlp_call(head, rows, solvers.ddpm(steps)), networks, MLP_BACKENDS)
        for name, times in in_turns(calls, least=turns, budget=0).items():
            totals[name] = [sum(turn) for turn in zip(totals.get(name, [0.0] * turns), times, strict=True)]
    results = {}
    for name, sums in totals.items():
        low, median, high = ratio(totals["eager"], sums)
        results[name] = {"seconds": statistics.median(sums), "over_eager": median, "quartiles": [low, high]}
    about = {"kind": "trajectory", "system": "MAR", "model": model, "images": images, "iterations": list(measured)}
    benchmark.extra_info.update(about, num_iter=len(of_all), turns=turns, versions=versions(calls), results=results)
    benchmark.pedantic(calls["cpu"], rounds=1)
    with capsys.disabled():
        print(f"\n{model}, batch of {images}, {len(measured)} of {len(of_all)} AR iterations, 50 to 5 steps, {turns} turns:")
        for name, r in results.items():
            low, high = r["quartiles"]
            print(f"{name:16} {r['seconds']:7.2f} s  {r['over_eager']:.2f}x ({low:.2f} to {high:.2f})")


@pytest.mark.parametrize("mar", ["MAR-L"], indirect=True)
@pytest.mark.parametrize("rows", [2, 8, 32])
def test_beside_busy_neighbours(benchmark, mar, rows, capsys):
    """How much slower a call gets when every core has another program that never rests: about 2x is its fair share."""
    model, head, _, _ = mar
    run, slower = mlp_call(head, rows, solvers.ddpm(10)), {}
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
    benchmark.extra_info.update(kind="neighbours", model=model, rows=rows, slower=slower)
    benchmark.pedantic(run, rounds=1)
    with capsys.disabled():
        print(f"\n{model}, {rows} rows, beside busy neighbours: {slower}")
    assert slower["cpu"]["worst"] < 10
