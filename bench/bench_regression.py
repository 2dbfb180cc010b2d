"""The cases that hold the line: our speed as a multiple of the eager loop's, in pairs of calls of one process.

`make bench-baseline` and `make bench-check` run this through bench/regression.py, which says what is made of the numbers. The MLP
head is MAR-B's. On one thread: with as many threads as cores each waits for the others while a neighbour has a core, and the ratio
is the neighbour's. Where there is a GPU, its backends.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from shapes import SIZES, Z_CHANNELS
from turns import interval, pairs

from disa_fast import FlowTransformerHead, MLPHead, models, solvers
from disa_fast.heads.flow_transformer import FlowTransformerSpec
from disa_fast.heads.mlp import MLPSpec

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PLANTED = float(os.environ.get("DISA_FAST_PLANT", 0))  # ours take so much longer, as a share: a regression made on purpose
PAIRS = int(os.environ.get("DISA_FAST_PAIRS", 31))  # that count, of each case

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """make(backend, dtype) draws, or integrates, by that backend; ours are backend and dtype, "reference" the eager loop."""

    make: Callable[[str, torch.dtype | None], Call]
    backend: str
    dtype: torch.dtype | None = None


@functools.cache
def mlp_head(width: int, depth: int) -> MLPHead:
    torch.manual_seed(0)
    shapes = MLPSpec(16, width, depth, Z_CHANNELS).shapes()
    return MLPHead.from_state_dict({name: torch.randn(s, device=DEVICE) * s[-1] ** -0.5 for name, s in shapes.items()})


def tokens(width: int, depth: int, rows: int, steps: int, backend: str, dtype: torch.dtype | None) -> Call:
    """A guided call of an MLP head; noise is given, so that drawing it is not timed."""
    head, table = mlp_head(width, depth), solvers.ddpm(steps)
    z, noise, step_noise = (torch.randn(s, device=DEVICE) for s in ((rows, Z_CHANNELS), (rows // 2, 16), (steps, rows // 2, 16)))
    return lambda: head.denoise(z, table, cfg=3.0, noise=noise, step_noise=step_noise, backend=backend, dtype=dtype)


@functools.cache
def flow_head() -> FlowTransformerHead:
    torch.manual_seed(0)
    shapes = FlowTransformerSpec(16, 1024, 2, 768, cross=False).shapes()  # FlowAR-S
    return FlowTransformerHead.from_state_dict({name: torch.randn(s, device=DEVICE) * s[-1] ** -0.5 for name, s in shapes.items()})


def scale(backend: str, dtype: torch.dtype | None) -> Call:
    """A scale of 4 x 4 tokens by FlowAR's head, guided."""
    head, table = flow_head(), solvers.flow_euler(3, grid="flowar")
    z, noise = torch.randn(2, 16, 768, device=DEVICE), torch.randn(1, 16, 16, device=DEVICE)
    return lambda: head.denoise(z, table, cfg=2.4, noise=noise, backend=backend, dtype=dtype)


@functools.cache
def shallow_xar() -> models.XAR:
    torch.manual_seed(0)
    half = {"embed_dim": 512, "depth": 1, "num_heads": 8}
    halves = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in half.items()}
    return models.xar(img_size=128, class_num=10, **halves).eval().to(DEVICE)


def cells(backend: str, dtype: torch.dtype | None) -> Call:
    """Four cells of 4 x 4 tokens by an xAR of width 512 and two blocks, guided."""
    model, labels = shallow_xar(), torch.tensor([1], device=DEVICE)
    return lambda: model.sample_tokens(labels, "constant:2", 2.7, (0.0, 1.0), backend=backend)


def mar_b(rows: int, steps: int) -> Callable[[str, torch.dtype | None], Call]:
    return functools.partial(tokens, *SIZES["MAR-B"], rows, steps)


ON_A_CPU = {
    "MAR-B, 2 rows, cpu": Case(mar_b(2, 3), "cpu"),
    "MAR-B, 8 rows, cpu": Case(mar_b(8, 3), "cpu"),
    "MAR-B, 8 rows, cpu, bfloat16": Case(mar_b(8, 3), "cpu", torch.bfloat16),
    "MAR-B, 8 rows, hoisted": Case(mar_b(8, 3), "hoisted"),
    "MAR-B, 32 rows, cpu": Case(mar_b(32, 3), "cpu"),
    "FlowAR-S, 16 tokens, hoisted": Case(scale, "hoisted"),
    "xAR, 16 tokens a cell, hoisted": Case(cells, "hoisted"),
}
ON_A_GPU = {
    f"MAR-B, {rows} rows, {backend}, bfloat16": Case(mar_b(rows, 10), backend, torch.bfloat16)
    for rows, backend in ((8, "cuda"), (8, "triton"), (32, "cuda"), (512, "triton"), (2048, "hoisted"))
} | {"FlowAR-S, 16 tokens, triton, bfloat16": Case(scale, "triton", torch.bfloat16)}
CASES = ON_A_GPU if ON_GPU else ON_A_CPU


def settled(call: Call) -> Call:
    """`call`, and the wait until the GPU is done with it."""

    def run() -> torch.Tensor:
        x = call()
        torch.cuda.synchronize()
        return x

    return run if ON_GPU else call


@pytest.mark.parametrize("name", CASES)
def test_over_eager(benchmark, name):
    case = CASES[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            measure(benchmark, case)
    finally:
        torch.set_num_threads(threads)


def measure(benchmark, case: Case) -> None:
    eager = settled(case.make("reference", case.dtype if ON_GPU else None))
    torch.manual_seed(1)
    expected = eager()
    ours = settled(case.make(case.backend, case.dtype))
    torch.manual_seed(1)
    assert ours().shape == expected.shape
    found, interrupted = pairs(eager, ours, PAIRS, PLANTED)
    low, median, high = interval([base / other for base, other in found])
    benchmark.extra_info.update(pairs=len(found), interrupted=interrupted, over_eager=median, interval=[low, high])
    benchmark.pedantic(ours, rounds=1)
