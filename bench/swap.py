"""What does it cost that `accelerate` proves itself and follows the object? On a CPU, in ten minutes:

    OMP_NUM_THREADS=2 python -m bench.swap                 writes bench/results/swap.json
    python -m bench.swap --only MAR-B --turns 5

For each system, at a published size, one image: the seconds of the check and of a check that was made before, over those of one of
the object's own autoregressive steps in eager PyTorch; the share of an accelerated image that is spent on following the object (its
weights' contents, its structure); and the image with all that over the image without, in turns in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import disa_fast
from disa_fast.adapters import check
from disa_fast.files import written_aside
from disa_fast.heads.packing import Packing

from .autocast import Case
from .gpu_results import commit
from .images import SETTINGS, Images
from .regression import stamp
from .turns import in_turns, ratio, seconds

RESULT = Path(__file__).resolve().parent / "results" / "swap.json"
TURNS = 3
CHECKS = 3
CASES = [
    Case("MAR-B", 1, {}, {"num_iter": 8}),
    Case("Harmon-0.5b", 1, {}, {"image_size": (256, 256), "num_iter": 4}),
    Case("FlowAR-S", 1),
    Case("xAR-B", 1, {}, {"schedule": "linear:16-8"}),
]


def ar_step(images: Images) -> float:
    """Seconds of one of the object's own AR steps as published: of a MAR or Harmon the second, backbone and
    head; of a FlowAR or xAR, whose steps differ, the mean over an image."""
    setting, at = images.setting, images.setting.head_at
    if setting.num_iter is None:
        images.setting = SETTINGS[images.name]
        step = seconds(images.eager) / len(images.ar_steps())
        images.setting = setting
        return step
    owner, marks = images.upstream.get_submodule(at[0]), []
    original = getattr(owner, at[1])

    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.append(time.perf_counter())
        if len(marks) == 3:
            raise _EnoughError
        return original(*args, **kwargs)

    owner.__dict__[at[1]] = marked
    try:
        images.eager()
    except _EnoughError:
        pass
    finally:
        del owner.__dict__[at[1]]
    return marks[2] - marks[1]


class _EnoughError(Exception):
    pass


@contextlib.contextmanager
def timed(spent: list[float], *methods: tuple[type, str]) -> Iterator[None]:
    """Adds up the seconds in these methods, of which one may call another."""
    originals, inside = [(owner, name, owner.__dict__[name]) for owner, name in methods], []

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            inside.append(original)
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:
                    spent.append(time.perf_counter() - start)

        return run

    for owner, name, original in originals:
        setattr(owner, name, wrapped(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextlib.contextmanager
def without(*methods: tuple[type, str]) -> Iterator[None]:
    """Nothing in the place of these methods."""
    originals = [(owner, name, owner.__dict__[name]) for owner, name in methods]
    for owner, name, _ in originals:
        setattr(owner, name, lambda self: None)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def measured(case: Case, turns: int) -> dict[str, Any]:
    """What goes into the result."""
    images = case.images()
    images.name = case.name
    step = ar_step(images)
    checks, again = [], []
    for _ in range(CHECKS):
        check._proven.pop(images.upstream, None)
        checks.append(seconds(lambda: disa_fast.accelerate(images.upstream).restore()))
        again.append(seconds(lambda: disa_fast.accelerate(images.upstream).restore()))
    handle = disa_fast.accelerate(images.upstream)
    following = [(Packing, "follow"), (type(handle) if "_follow" in vars(type(handle)) else type(handle).__mro__[1], "_follow")]
    images.eager()
    spent: list[float] = []
    with timed(spent, *following):
        image = seconds(images.eager)

    def unfollowed() -> None:
        with without(*following):
            images.eager()

    times = in_turns({"without": unfollowed, "with": images.eager}, least=turns, budget=0.0)
    low, median, high = ratio(times["with"], times["without"])
    error = handle.report()["check"]["error"]
    handle.restore()
    return {
        "model": case.name,
        "ar_step": step,
        "check": statistics.median(checks),
        "check_over_ar_step": statistics.median(checks) / step,
        "check_again": statistics.median(again),
        "error": error,
        "image": image,
        "follow_share": sum(spent) / image,
        "with_over_without": median,
        "quartiles": [low, high],
        "turns": turns,
    }


def line(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return (
        f"{found['model']:12} AR step {found['ar_step']:6.2f} s, check {found['check']:5.2f} s "
        f"({found['check_over_ar_step']:.2f}), again {1e3 * found['check_again']:5.1f} ms, image {found['image']:6.1f} s, "
        f"followed for {100 * found['follow_share']:.3f} %, "
        f"with over without {found['with_over_without']:.3f} ({low:.3f} to {high:.3f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.swap", description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=TURNS, help="of images with and without (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=sorted({case.name for case in CASES}), help="these systems alone")
    parser.add_argument("--json", type=Path, default=RESULT, help="file to write the result into (default: %(default)s)")
    options = parser.parse_args(argv)
    found = []
    for case in CASES:
        if options.only is None or case.name in options.only:
            found.append(measured(case, options.turns))
            print(line(found[-1]), flush=True)
    result = stamp() | {"commit": commit(), "torch": torch.__version__, "cases": found}
    with written_aside(options.json) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
