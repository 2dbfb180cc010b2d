"""One image of each system on a CPU, everything included: this package against upstream's structure in eager PyTorch, and what of
the time is the head's. `make bench` writes bench/results/images.json.

The ratios count: contestants take turns in one process, over one set of weights, and every result is checked. MAR's head is not
compiled here: every AR iteration has rows of its own, for each of which torch.compile would take longer than it saves; it is among
the contestants of bench_heads.py. A batch of 256 is a GPU's: gpu_measure.py. DISA_FAST_BENCH=all adds the larger sizes, whose
images take minutes each; choose among them by -k.
"""

from __future__ import annotations

import os

import pytest
import torch
from images import SETTINGS, Images, Run, Stopwatch
from turns import ratio

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own

OURS, HALF = "disa_fast", "disa_fast bfloat16"
CASES = [("MAR-B", 1), ("Harmon-0.5b", 1), ("FlowAR-S", 1), ("FlowAR-S", 8), ("FlowAR-L", 1), ("xAR-B", 1)]
if os.environ.get("DISA_FAST_BENCH") == "all":
    CASES += [(name, 1) for name in SETTINGS if (name, 1) not in CASES]
COMPILED = [("FlowAR-S", 1)]  # others take minutes to compile
TURNS = {("FlowAR-S", 1): 3, ("FlowAR-S", 8): 1, ("Harmon-0.5b", 1): 1}  # others 2
TOLERANCE = {
    OURS: 1e-4,
    "torch.compile": 1e-4,
    HALF: 0.05,
}  # relative L2 error; found were 5e-7 and 0.004, also after 24 iterations


def contestants(images: Images, compiled: bool = False) -> dict[str, Run]:
    runs = {"eager": images.upstreams(images.eager)}
    if compiled:
        runs["torch.compile"] = images.upstreams(images.compiled(images.eager))
        runs["torch.compile"]()
    return runs | {OURS: images.accelerated(), HALF: images.ours(dtype=torch.bfloat16)}


def in_turns(images: Images, runs: dict[str, Run], turns: int) -> dict[str, list[Stopwatch]]:
    """Where the time of each went, turn by turn, operators of ours in the first one; that costs 0.2 us for each of them."""
    watches: dict[str, list[Stopwatch]] = {who: [] for who in runs}
    for turn in range(turns):
        for who, run in runs.items():
            drawn, watch = images.watched(run, operators=who == OURS and turn == 0)
            watches[who].append(watch)
            if who == "eager":
                expected = drawn
            else:
                error = float((drawn - expected).norm() / expected.norm())
                assert error < TOLERANCE[who], f"wrong images: {who}, relative error {error:.2g}"
    return watches


def measured(images: Images, watches: dict[str, list[Stopwatch]]) -> dict:
    """For extra_info. `seconds`, `parts` and `ar_steps` are of one turn, the one in the middle."""
    seconds = {who: [watch.seconds() for watch in of_turns] for who, of_turns in watches.items()}
    middle = {who: sorted(of_turns, key=Stopwatch.seconds)[len(of_turns) // 2] for who, of_turns in watches.items()}
    results = {}
    for who, samples in seconds.items():
        low, median, high = ratio(seconds["eager"], samples)
        results[who] = {"seconds": middle[who].seconds(), "over_eager": median, "quartiles": [low, high]}
        results[who]["parts"] = middle[who].parts()
    both = {who: middle[who].steps for who in ("eager", OURS)}
    steps = [step | {"seconds": {who: both[who][step["k"]] for who in both}} for step in images.ar_steps()]
    operators = watches[OURS][0].shares()
    return {
        "images": images.batch,
        "dtype": "float32",
        "schedule": images.setting.sampling.schedule,
        "num_iter": images.setting.num_iter,
        "cfg": images.setting.sampling.cfg,
        "image_size": images.setting.image_size(images.upstream),
        "turns": len(seconds["eager"]),
        "results": results,
        "ar_steps": steps,
        "operators": operators,
        "next": max(operators, key=operators.get),
    }


def print_table(model: str, found: dict) -> None:
    what = f"{found['images']} image{'s' * (found['images'] > 1)} of {found['image_size'][0]} x {found['image_size'][1]} pixels"
    print(f"\n{model}, {what}, {found['schedule']}, guidance {found['cfg']}, {torch.get_num_threads()} threads")
    print(f"{'':20} seconds   head  backbone  other  over eager")
    for who, r in found["results"].items():
        parts, (low, high) = r["parts"], r["quartiles"]
        detail = f"{parts['head']:6.1f} {parts['backbone']:9.1f} {parts['other']:6.1f}"
        print(f"{who:20} {r['seconds']:7.1f} {detail}  {r['over_eager']:.2f}x ({low:.2f} to {high:.2f})")
    print(f"{OURS}: " + ", ".join(f"{what} {share:.0%}" for what, share in found["operators"].items()))
    print(f"next: {found['next']}")


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_image(benchmark, name, batch, capsys):
    images = Images(name, torch.device("cpu"), batch)
    runs = contestants(images, compiled=(name, batch) in COMPILED)
    watches = benchmark.pedantic(in_turns, (images, runs, TURNS.get((name, batch), 2)), rounds=1)
    found = measured(images, watches)
    benchmark.extra_info.update({"kind": "image", "system": name.split("-")[0], "model": name} | found)
    with capsys.disabled():
        print_table(name, found)
