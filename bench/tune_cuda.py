"""Finds up to how many rows the persistent kernel beats Triton's on the GPU of this machine, for kernels/cuda/crossover.json, which
ships and decides what "auto" takes.

    python -m bench.tune_cuda --sizes MAR-L --dry-run

Both are timed as replays of CUDA graphs of the whole guided loop, in turns. What is written is the largest number of rows of those
tried at which, as at all smaller ones, `cuda` is faster; 0 if there is none.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from disa_fast import MLPHead, graphs
from disa_fast.backends import cuda, triton
from disa_fast.files import written_aside
from disa_fast.kernels.triton import tiles

from .gpu_measure import DEVICE, forget, in_turns, random_head
from .peers import captured
from .shapes import SIZES

CROSSOVER = Path(__file__).resolve().parent.parent / "kernels" / "cuda" / "crossover.json"
ROWS = (2, 4, 8, 16, 32, 48, 64)
STEPS = 10
TURNS = 20


def fastest_up_to(rows: Iterable[int], speed: Callable[[int], float]) -> int:
    """speed: of `cuda` over `triton`, 0 where it does not run. Larger numbers than the first that is slower are not tried."""
    largest = 0
    for count in sorted(rows):
        if not speed(count) > 1:
            break
        largest = count
    return largest


def speed(head: MLPHead, rows: int) -> float:
    """Of `cuda` over `triton`, the median of turns."""
    reason = cuda.refuses(head.spec, torch.bfloat16, DEVICE, rows)
    if reason is not None:
        print(f"  {rows} rows: {reason}", flush=True)
        return 0.0
    times = in_turns({"cuda": cuda_loop(head, rows), "triton": triton_loop(head, rows)}, turns=TURNS)
    found = statistics.median(b / a for a, b in zip(times["cuda"], times["triton"], strict=True))
    taken = ", ".join(f"{name} {statistics.median(times[name]) / STEPS * 1e6:.1f} us a step" for name in times)
    print(f"  {rows} rows: {taken}, {found:.2f}x", flush=True)
    return found


def cuda_loop(head: MLPHead, rows: int) -> Callable[[], object]:
    w = head.packed("cuda", torch.bfloat16, cuda.Weights)
    shape = cuda.Shape(STEPS, rows, True, True, *cuda.HOISTS)
    return as_graph(functools.partial(cuda.loop, w, shape), cuda.layout(w, shape))


def triton_loop(head: MLPHead, rows: int) -> Callable[[], object]:
    w = head.packed("triton", torch.bfloat16, triton.Weights)
    shape = triton.Shape(STEPS, rows, True, True, tiles.choose(w.gpu, "bfloat16", w.spec.width, rows), "ieee")
    return as_graph(functools.partial(triton.loop, w, shape), triton.layout(w, shape))


def as_graph(loop: Callable[[graphs.Buffers], None], layout: graphs.Layout) -> Callable[[], object]:
    """The replay of a guided loop over buffers of its own, which it returns: so they live as long as it does."""
    buffers = filled(layout)

    def run() -> graphs.Buffers:
        loop(buffers)
        return buffers

    return captured(run)


def filled(layout: graphs.Layout) -> graphs.Buffers:
    buffers = graphs.allocate(layout, DEVICE)
    for buffer in buffers.values():
        if buffer.is_floating_point():
            buffer.normal_(std=0.1)
        else:
            buffer.zero_()
    return buffers


def write(gpu: str, width: int, rows: int) -> None:
    table = json.loads(CROSSOVER.read_text())
    table.setdefault(gpu, {})[str(width)] = rows
    with written_aside(CROSSOVER) as aside:
        aside.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        parser.error("needs a GPU; torch sees none")
    gpu = torch.cuda.get_device_name()
    for size in options.sizes:
        print(f"{size} on {gpu}", flush=True)
        head = random_head(size)
        largest = fastest_up_to(options.rows, lambda rows, head=head: speed(head, rows))
        print(f"{size}: cuda up to {largest} rows", flush=True)
        if not options.dry_run:
            write(gpu, SIZES[size][0], largest)
        forget()


if __name__ == "__main__":
    main()
