"""Finds up to how many rows the persistent kernel beats Triton's on the GPU of this machine, for kernels/cuda/crossover.json, which
ships and decides what "auto" takes.

    python -m bench.tune_cuda --sizes MAR-L --dry-run

Both are timed as replays of CUDA graphs of the whole guided loop, in turns. What is written is the largest number of rows of those
tried at which, as at all smaller ones, `cuda` is faster; 0 if there is none.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from disa_fast import MLPHead
from disa_fast.backends import cuda
from disa_fast.files import written_aside

from .gpu_measure import DEVICE, forget, in_turns, inputs, loop_alone, random_head
from .gpu_results import headline
from .shapes import SIZES

CROSSOVER = Path(__file__).resolve().parent.parent / "kernels" / "cuda" / "crossover.json"
ROWS = (2, 4, 8, 16, 32, 48, 64)
LEAST_ROWS = 2
STEPS = 50
TURNS = 20


def fastest_up_to(rows: Iterable[int], speed: Callable[[int], float]) -> int:
    """speed: of `cuda` over `triton`. Larger numbers than the first that is slower are not tried."""
    largest = 0
    for count in sorted(rows):
        if not speed(count) > 1:
            break
        largest = count
    return largest


def speed(head: MLPHead, rows: int) -> float:
    """Of `cuda` over `triton`, the median of turns; 0 for more rows than `cuda` serves. RuntimeError where it serves no call at
    all, of which nothing is to be concluded: the native core is missing, a driver is too old."""
    reason = cuda.refuses(head.spec, torch.bfloat16, DEVICE, rows)
    if reason is not None:
        at_all = cuda.refuses(head.spec, torch.bfloat16, DEVICE, LEAST_ROWS)
        if at_all is not None:
            raise RuntimeError(f"cuda cannot be timed here: {at_all}")
        print(f"  {rows} rows: {reason}", flush=True)
        return 0.0
    data = inputs(rows, STEPS)
    calls = {name: loop_alone(head, name, torch.bfloat16, *data) for name in ("cuda", "triton")}
    times = in_turns(calls, turns=TURNS)
    found = statistics.median(b / a for a, b in zip(times["cuda"], times["triton"], strict=True))
    steps = len(data[1])
    taken = ", ".join(f"{name} {statistics.median(times[name]) / steps * 1e6:.1f} us a step" for name in times)
    print(f"  {rows} rows: {taken}, {found:.2f}x", flush=True)
    return found


def write(path: Path, gpu: str, width: int, rows: int) -> None:
    table = json.loads((path if path.exists() else CROSSOVER).read_text())
    table.setdefault(gpu, {})[str(width)] = rows
    with written_aside(path) as aside:
        aside.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune_cuda", description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--out", type=Path, default=CROSSOVER, help="file to write, after each size (default: the one that ships)")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    if DEVICE.type != "cuda":
        parser.error("needs a GPU; torch sees none")
    gpu = torch.cuda.get_device_name()
    for size in options.sizes:
        print(f"{size} on {gpu}", flush=True)
        head = random_head(size)
        largest = fastest_up_to(options.rows, lambda rows, head=head: speed(head, rows))
        headline(f"{size}: cuda up to {largest} rows")
        if not options.dry_run:
            write(options.out, gpu, SIZES[size][0], largest)
        forget()


if __name__ == "__main__":
    main()
