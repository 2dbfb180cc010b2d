"""The MLP head's denoising loop, backend against backend: `make bench`.

Each backend is timed by pytest-benchmark; the ratio that counts is measured apart, in pairs that alternate within one process,
so that a neighbour's load meets both alike.
"""

import statistics
import time

import pytest
import torch

from disa_fast import MLPHead, solvers
from disa_fast.heads.mlp import MLPSpec

STEPS = 10
WIDTH, DEPTH, Z_CHANNELS = 1280, 8, 1024  # MAR-L
PAIRS = 15


def random_head() -> MLPHead:
    torch.manual_seed(0)
    shapes = MLPSpec(16, WIDTH, DEPTH, Z_CHANNELS).shapes()
    return MLPHead.from_state_dict({name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def head() -> MLPHead:
    return random_head()


def call(head: MLPHead, rows: int, backend: str):
    """One guided call of STEPS steps as a function without arguments; noise is given, so that drawing it is not timed."""
    torch.manual_seed(rows)
    z, table = torch.randn(rows, Z_CHANNELS), solvers.ddpm(STEPS)
    noise, step_noise = torch.randn(rows // 2, 16), torch.randn(STEPS, rows // 2, 16)
    return lambda: head.denoise(z, table, cfg=3.0, noise=noise, step_noise=step_noise, backend=backend)


@pytest.mark.parametrize("rows", [2, 8, 32, 128])
@pytest.mark.parametrize("backend", ["reference", "hoisted"])
def test_denoise(benchmark, head, rows, backend):
    benchmark.group = f"MAR-L head, {STEPS} steps, {rows} rows"
    benchmark.pedantic(call(head, rows, backend), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("rows", [2, 8, 32, 128])
def test_hoisted_over_reference(benchmark, head, rows, capsys):
    """Median over alternating pairs of (reference time / hoisted time), with its quartiles."""
    plain, hoisted = call(head, rows, "reference"), call(head, rows, "hoisted")
    expected = plain()
    error = float((hoisted() - expected).norm() / expected.norm())
    assert error < 1e-4, f"check the result before timing it: relative error {error}"
    ratios = []
    for _ in range(PAIRS):
        times = []
        for run in (plain, hoisted):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    low, median, high = statistics.quantiles(ratios, n=4)
    benchmark.extra_info.update(rows=rows, ratio=median, quartiles=[low, high], pairs=PAIRS, threads=torch.get_num_threads())
    benchmark.pedantic(hoisted, rounds=1)
    with capsys.disabled():
        print(f"\n{rows} rows: hoisted is {median:.2f}x the plain loop ({low:.2f} to {high:.2f} over {PAIRS} pairs)")
