"""One image by FlowAR and by xAR on a CPU: this package against upstream's structure in eager PyTorch and compiled.

`make bench` writes bench/results/flow.json. The ratios count: contestants take turns in one process.
"""

import pytest
import torch
from flow_images import SETTINGS, Images
from turns import in_turns, ratio

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own

TURNS = {"FlowAR-S": 3, "FlowAR-L": 2, "xAR-B": 2}  # others once: an image of theirs takes minutes
ALL_CONTESTANTS = ("FlowAR-S",)  # likewise


@pytest.mark.parametrize("name", SETTINGS)
def test_image(benchmark, name, capsys):
    images = Images(name, torch.device("cpu"), batch=1)
    calls = {
        "eager": images.eager,
        "hoisted": images.ours("hoisted"),
        "hoisted, bfloat16": images.ours("hoisted", torch.bfloat16),
    }
    if name in ALL_CONTESTANTS:
        calls |= {"torch.compile": images.compiled(images.eager), "reference": images.ours("reference")}
    expected = calls["eager"]()
    for contestant in calls.keys() - {"eager"}:
        error = float((calls[contestant]() - expected).norm() / expected.norm())
        assert error < (0.3 if "bfloat16" in contestant else 1e-4), (
            f"check the result before timing it: {contestant}, error {error}"
        )

    times = in_turns(calls, least=TURNS.get(name, 1), budget=0)
    results = {
        contestant: {
            "seconds": sorted(samples)[len(samples) // 2],
            "over_eager": ratio(times["eager"], samples)[1],
            "quartiles": ratio(times["eager"], samples)[::2],
        }
        for contestant, samples in times.items()
    }
    shares = images.shares(backend="hoisted")
    benchmark.extra_info.update(model=name, steps=images.steps, turns=len(times["eager"]), results=results, shares=shares)
    benchmark.pedantic(calls["hoisted"], rounds=1)
    with capsys.disabled():
        print(f"\n{name}, one image, {images.steps[0]} to {images.steps[1]} steps, {torch.get_num_threads()} threads")
        for contestant, r in results.items():
            low, high = r["quartiles"]
            print(f"{contestant:20} {r['seconds']:7.1f} s  {r['over_eager']:.2f}x ({low:.2f} to {high:.2f})")
        print("share of each step:", ", ".join(f"{share:.0%}" for share in shares))
