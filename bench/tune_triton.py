"""Finds the tiles of the Triton kernels on the GPU of this machine, and writes them to kernels/triton/tuned.json, which ships.

    python -m bench.tune_triton --sizes MAR-L --rows 8 2048 --minutes 8

From the choice that is in use now, one number of one tile after the other is changed, the whole loop timed as replays of a CUDA
graph, and a change kept that is more than a percent faster; round after round, until none is or the time is over. What was found is
then timed against where it began, in turns, and written only if it wins. A candidate is timed only if its tokens are right: as near
to those in float64 as where it began, and the same in every replay, which a race between kernels would hardly leave them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from disa_fast import MLPHead, graphs, solvers
from disa_fast.backends import triton as backend
from disa_fast.files import written_aside
from disa_fast.kernels.triton import tiles
from disa_fast.kernels.triton.tiles import Tile, Tiles

from .gpu_measure import DEVICE, in_turns, random_head, seconds
from .peers import captured
from .shapes import SIZES

TUNED = Path(__file__).resolve().parent.parent / "kernels" / "triton" / "tuned.json"
GAIN = 0.99  # of the time before, which a change must come below
STEPS = 10
CFG = 3.0
SAMPLES, REPLAYS = (
    5,
    10,
)  # of which the median counts; of a sample, one after the other, so that the first one's start is little of it

WORST, L2 = 2.0, 1.5  # times the errors of where it began, plus one unit in the last place, that a candidate may have

Measure = Callable[[Tiles], float]


def neighbours(chosen: Tiles) -> Iterator[Tiles]:
    """Every choice that differs in one number of one tile, or in one of the switches."""
    for name in ("first", "second", "step", "modulation"):
        tile = getattr(chosen, name)
        if tile is not None:
            for other in _changed(tile):
                yield dataclasses.replace(chosen, **{name: other})
    yield dataclasses.replace(chosen, fused=not chosen.fused)
    yield dataclasses.replace(chosen, pdl=not chosen.pdl, prefetch=False)
    if chosen.pdl:
        yield dataclasses.replace(chosen, prefetch=not chosen.prefetch)


def _changed(tile: Tile) -> Iterator[Tile]:
    bounds = {"m": (16, 256), "n": (16, 256), "k": (16, 1024), "warps": (1, 8), "stages": (1, 8)}
    for name, (low, high) in bounds.items():
        now = getattr(tile, name)
        for value in (now - 1, now + 1) if name == "stages" else (now // 2, now * 2):
            if low <= value <= high:
                yield dataclasses.replace(tile, **{name: value})


def descend(start: Tiles, measure: Measure, deadline: float) -> Tiles:
    """The best choice that single changes lead to from `start`. measure: seconds, infinite for what does not run."""
    best, least, tried = start, measure(start), {start}
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            if candidate in tried:
                continue
            if time.monotonic() > deadline:
                return best
            tried.add(candidate)
            taken = measure(candidate)
            if taken < GAIN * least:
                best, least, improved = candidate, taken, True
                break
    return best


def errors(out: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest absolute difference, relative L2 error); infinite where `out` is not finite."""
    if not out.isfinite().all():
        return math.inf, math.inf
    difference = out.double() - truth
    return float(difference.abs().max()), float(difference.norm() / truth.norm())


class Loop:
    """A guided loop of STEPS steps of a head, for any choice of tiles; start: the one that is known to be right."""

    def __init__(self, head: MLPHead, rows: int, dtype: torch.dtype, start: Tiles) -> None:
        self.w, self.rows, self.device = head.packed("triton", dtype, backend.Weights), rows, head.device
        spec, table = head.spec, solvers.ddpm(STEPS)
        draw = torch.Generator(self.device).manual_seed(0)
        shapes = (rows, spec.z_channels), (rows // 2, spec.in_channels), (STEPS, rows // 2, spec.in_channels)
        z, noise, step_noise = (torch.randn(shape, generator=draw, device=self.device) for shape in shapes)
        z, self.noise = z.to(dtype), noise
        self.fill = backend.inputs(self.w, z, table, CFG, 1.0, noise, step_noise)
        rounded = head.packed("parameters", dtype, lambda parameters, spec: parameters)
        exact = MLPHead.from_state_dict({name: p.double() for name, p in rounded.items()})
        draws = {"noise": noise, "step_noise": step_noise, "backend": "hoisted"}
        self.truth = exact.denoise(z.double(), table, CFG, **draws)[: len(noise)]  # what it returns is for both halves
        worst, l2 = errors(self.call(start)(), self.truth)
        unit = torch.finfo(dtype).eps
        self.bounds = WORST * worst + unit * float(self.truth.abs().max()), L2 * l2 + unit

    def call(self, chosen: Tiles) -> Callable[[], Tensor]:
        """The loop as a graph's replay. Raises whatever Triton raises for tiles that it cannot do."""
        shape = backend.Shape(STEPS, self.rows, True, True, chosen, "ieee")
        buffers = graphs.allocate(backend.layout(self.w, shape), self.device)
        self.fill(buffers)

        def loop() -> Tensor:
            buffers["x"].copy_(self.noise)
            backend.loop(self.w, shape, buffers)
            return buffers["x"]

        return captured(loop)

    def measure(self, chosen: Tiles) -> float:
        """Seconds, infinite for what does not run or is wrong."""
        try:
            call = self.call(chosen)
        except Exception as error:  # too much shared memory, too many threads, a tile that Triton refuses
            print(f"  {type(error).__name__}: {chosen}")
            return math.inf
        first = call().clone()
        taken = statistics.median(seconds(call, REPLAYS) for _ in range(SAMPLES))
        return taken if self.is_right(chosen, first, call()) else math.inf

    def is_right(self, chosen: Tiles, *outs: Tensor) -> bool:
        found = errors(outs[0], self.truth)
        if all(torch.equal(out, outs[0]) for out in outs) and all(a <= b for a, b in zip(found, self.bounds, strict=True)):
            return True
        print(f"  wrong by {found}, where {self.bounds} are allowed, or not the same twice: {chosen}")
        return False


def tune(loop: Loop, start: Tiles, deadline: float) -> tuple[Tiles, float]:
    """(what was found, how many times faster it is than `start`); 1.0 if it is `start`, or after all not right."""
    found = descend(start, loop.measure, deadline)
    if found == start:
        return start, 1.0
    calls = {"start": loop.call(start), "found": loop.call(found)}
    first = calls["found"]().clone()
    times = in_turns(calls, turns=20)
    if not loop.is_right(found, first, calls["found"]()):
        return found, 1.0
    return found, statistics.median(a / b for a, b in zip(times["start"], times["found"], strict=True))


def write(gpu: str, dtype: str, width: int, rows: int, chosen: Tiles) -> None:
    table = json.loads(TUNED.read_text())
    by_class = table.setdefault(gpu, {}).setdefault(dtype, {}).setdefault(str(width), {})
    by_class[str(tiles.row_class(rows))] = chosen.as_dict()
    with written_aside(TUNED) as aside:
        aside.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 48, 192, 768, 2048], help="one for each row class to be tuned")
    parser.add_argument("--dtype", choices=tiles.HEURISTIC, default="bfloat16")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together, shared out evenly")
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        parser.error("needs a GPU; torch sees none")
    gpu, end = torch.cuda.get_device_name(), time.monotonic() + 60 * options.minutes
    jobs = [(size, rows) for rows in options.rows for size in options.sizes]
    for i, (size, rows) in enumerate(jobs):
        now = time.monotonic()
        width = SIZES[size][0]
        start = tiles.choose(gpu, options.dtype, width, rows)
        loop = Loop(random_head(size), rows, getattr(torch, options.dtype), start)
        found, gain = tune(loop, start, now + (end - now) / (len(jobs) - i))
        if gain > 1 / GAIN:
            write(gpu, options.dtype, width, rows, found)
        print(f"{size}, {rows} rows: {gain:.2f}x of {start}\n  by {found}", flush=True)


if __name__ == "__main__":
    main()
