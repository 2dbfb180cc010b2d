"""Is anything slower than eager where the published scripts run, under torch.autocast? On a CPU, in bfloat16, in ten minutes:

    OMP_NUM_THREADS=2 python -m bench.autocast             writes bench/results/autocast.json; ends with 1 if anything is
    python -m bench.autocast --only FlowAR-L --turns 5

Each system's object of upstream's structure in eager PyTorch, and the same object under disa_fast.accelerate, both under one
autocast, with one schedule and over the same weights, take turns in one process. Images are smaller than published, with as many
tokens of each autoregressive step and as many denoising steps at either end of the schedule; FlowAR and xAR take fewer steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disa_fast.files import written_aside

from .gpu_results import commit
from .images import SETTINGS, Images, reduced
from .regression import stamp
from .turns import in_turns, ratio

RESULT = Path(__file__).resolve().parent / "results" / "autocast.json"
DTYPE = torch.bfloat16
TURNS = 3
TOLERANCE = 0.1  # relative L2 error of ours over eager's images, both in bfloat16
SLOWER = 1.0  # over eager, below which it is


@dataclass(frozen=True)
class Case:
    """`batch` images by one of images.SETTINGS, with other arguments of its models and of its sampling."""

    name: str
    batch: int
    model: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}, {self.batch} image{'s' * (self.batch > 1)}"

    def images(self) -> Images:
        setting = reduced(SETTINGS[self.name], self.model, **self.sampling)
        return Images(self.name, torch.device("cpu"), self.batch, setting)


SMALLER, FEWER = {"img_size": 128, "scale": (1, 2, 4, 8)}, {"schedule": "linear:8-5"}
CASES = [
    Case("MAR-B", 1, {"img_size": 128}, {"num_iter": 16}),
    Case("MAR-B", 8, {"img_size": 64}, {"num_iter": 4}),
    Case("Harmon-0.5b", 1, {}, {"image_size": (128, 128), "num_iter": 16}),
    Case("Harmon-0.5b", 8, {}, {"image_size": (64, 64), "num_iter": 4}),
    Case("FlowAR-S", 1),
    Case("FlowAR-S", 8, {}, FEWER),
    Case("FlowAR-L", 1, {}, FEWER),
    Case("FlowAR-L", 8, SMALLER, FEWER),
    Case("xAR-B", 1, {}, FEWER),
    Case("xAR-B", 8, {"img_size": 128}, FEWER),
]


def measured(case: Case, turns: int) -> dict[str, Any]:
    """What goes into the result. RuntimeError where the images are not the same."""
    images = case.images()
    accelerated = images.accelerated()

    def ours() -> Tensor:
        with torch.autocast("cpu", DTYPE):
            return accelerated()

    def eager() -> Tensor:
        return images.autocast(DTYPE)

    expected = eager()
    error = float((ours() - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise RuntimeError(f"{case}: wrong images, relative error {error:.2g} over eager's")
    contestants: dict[str, Callable[[], object]] = {"eager": eager, "disa_fast": ours}
    seconds = in_turns(contestants, least=turns, budget=0.0)
    low, median, high = ratio(seconds["eager"], seconds["disa_fast"])
    return {
        "model": case.name,
        "images": case.batch,
        "image_size": images.setting.image_size(images.upstream),
        "schedule": images.setting.sampling.schedule,
        "num_iter": images.setting.num_iter,
        "turns": turns,
        "seconds": {who: statistics.median(samples) for who, samples in seconds.items()},
        "over_eager": median,
        "quartiles": [low, high],
        "relative_difference": error,
    }


def line(found: dict[str, Any]) -> str:
    seconds, (low, high) = found["seconds"], found["quartiles"]
    return (
        f"{found['model']:12} {found['images']:2} {seconds['eager']:7.1f} s {seconds['disa_fast']:7.1f} s "
        f"{found['over_eager']:6.2f}x ({low:.2f} to {high:.2f}), difference {found['relative_difference']:.1e}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.autocast", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=TURNS, help="of each case (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=sorted({case.name for case in CASES}), help="these systems alone")
    parser.add_argument("--json", type=Path, default=RESULT, help="file to write the result into (default: %(default)s)")
    options = parser.parse_args(argv)
    cases = [case for case in CASES if options.only is None or case.name in options.only]
    found = []
    print("model       images  eager  disa_fast  over eager", flush=True)
    for case in cases:
        found.append(measured(case, options.turns))
        print(line(found[-1]), flush=True)
    result = stamp() | {"commit": commit(), "dtype": str(DTYPE).removeprefix("torch."), "cases": found}
    with written_aside(options.json) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n")
    slower = [str(case) for case, each in zip(cases, found, strict=True) if each["over_eager"] < SLOWER]
    if slower:
        print(f"FAILED: slower than eager: {'; '.join(slower)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
