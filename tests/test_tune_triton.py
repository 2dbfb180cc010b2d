"""The search for tiles, with a made-up cost in place of a GPU, and what it takes for right, in Triton's interpreter."""

import dataclasses
import importlib
import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from random_parameters import random_parameters

from disa_fast import MLPHead
from disa_fast.heads.mlp import MLPSpec
from disa_fast.kernels.triton import tiles
from disa_fast.kernels.triton.tiles import Tile, Tiles

ROOT = Path(__file__).parent.parent
START = Tiles(Tile(16, 16, 64, 2, 4), Tile(16, 16, 64, 2, 4), Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 4, 3), fused=True)
BEST = dataclasses.replace(
    START, first=Tile(16, 64, 128, 4, 6), second=Tile(16, 32, 64, 2, 2), fused=False, pdl=True, prefetch=True
)


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.tune_triton")


def cost(chosen: Tiles) -> float:
    """Grows with every halving or doubling that lies between `chosen` and BEST; what does not fit costs all the world."""
    if chosen.first.n > 64:
        return math.inf
    far = sum(getattr(chosen, switch) != getattr(BEST, switch) for switch in ("fused", "pdl", "prefetch"))
    for one, other in ((chosen.first, BEST.first), (chosen.second, BEST.second), (chosen.step, BEST.step)):
        far += sum(abs(math.log2(a / b)) for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True))
    return 1 + 0.1 * far


def test_finds_the_best_by_single_changes(tune):
    assert tune.descend(START, cost, deadline=time.monotonic() + 60) == dataclasses.replace(BEST, modulation=START.modulation)


def test_keeps_what_it_has_when_time_is_over_or_nothing_gains(tune):
    assert tune.descend(START, cost, deadline=0) == START
    assert tune.descend(START, lambda chosen: 1.0 if chosen == START else 0.995, deadline=math.inf) == START


def test_changes_stay_within_what_triton_takes(tune):
    for chosen in (*tiles.HEURISTIC["bfloat16"].values(), *tiles.HEURISTIC["float32"].values()):
        for candidate in tune.neighbours(chosen):
            assert candidate != chosen
            for tile in (candidate.first, candidate.second, candidate.step):
                assert all(size & (size - 1) == 0 for size in (tile.m, tile.n, tile.k, tile.warps))
                assert min(tile.m, tile.n, tile.k) >= 16
                assert tile.stages >= 1


def test_what_is_written_is_what_is_then_chosen(tune, monkeypatch, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    for module in (tune, tiles):
        monkeypatch.setattr(module, "TUNED", path)
    tune.write("NVIDIA X", "bfloat16", 1280, 8, BEST)
    tune.write("NVIDIA X", "bfloat16", 1280, 2048, START)
    assert set(json.loads(path.read_text())["NVIDIA X"]["bfloat16"]["1280"]) == {"16", str(1 << 30)}
    for cache in (tiles.tuned, tiles.choose):
        cache.cache_clear()
    try:
        assert tiles.choose("NVIDIA X", "bfloat16", 1280, 2) == BEST
    finally:
        monkeypatch.undo()
        for cache in (tiles.tuned, tiles.choose):
            cache.cache_clear()


def test_only_dependent_launch_prefetches(tune):
    for pdl, prefetches in ((False, {False}), (True, {False, True})):
        candidates = list(tune.neighbours(dataclasses.replace(START, pdl=pdl)))
        assert {candidate.prefetch for candidate in candidates if candidate.pdl is pdl} == prefetches
        assert not any(candidate.prefetch for candidate in candidates if candidate.pdl is not pdl)


# What is right ---------------------------------------------------------------------------------------------------------

FEW = Tiles(Tile(16, 16, 32, 2, 2), Tile(16, 16, 32, 2, 2), Tile(16, 32, 32, 2, 1), Tile(16, 32, 16, 2, 2), fused=True)
OTHER = dataclasses.replace(FEW, first=Tile(16, 32, 16, 2, 2), step=Tile(16, 16, 16, 2, 1), fused=False)
PLANTED = {
    "one number": lambda x, run: x.view(-1)[5].add_(0.3),
    "all a little": lambda x, run: x.mul_(1.05),
    "not a number": lambda x, run: x.view(-1)[0].fill_(math.nan),
    "another in each run": lambda x, run: x.view(-1)[2].mul_(1 + 1e-7 * run),
}


@pytest.fixture
def loop(tune, monkeypatch):
    """Of a small head. A candidate whose second tile has 8 warps is wrong as `loop.planted` says."""
    monkeypatch.setattr(tune, "captured", lambda run: run)
    monkeypatch.setattr(tune, "seconds", lambda call, calls: call() is None or 10.0 / calls)
    call, runs = tune.Loop.call, itertools.count(1)

    def run_once(self, chosen: Tiles):
        out = call(self, chosen)()
        planted = self.planted if chosen.second.warps == 8 else lambda x, run: x
        return lambda: planted(out.clone(), next(runs))

    monkeypatch.setattr(tune.Loop, "call", run_once)
    monkeypatch.setattr(tune, "STEPS", 2)
    return tune.Loop(MLPHead.from_state_dict(random_parameters(MLPSpec(16, 32, 1, 32), 0)), 4, torch.float32, FEW)


@pytest.mark.interpreter
def test_right_candidates_are_timed(loop):
    assert loop.measure(FEW) == loop.measure(OTHER) == 1.0


@pytest.mark.interpreter
def test_a_wrong_candidate_is_not_taken_however_fast_it_is(loop, monkeypatch, capsys):
    wrong = dataclasses.replace(FEW, second=dataclasses.replace(FEW.second, warps=8))
    for how, loop.planted in PLANTED.items():
        assert loop.measure(wrong) == math.inf, how
        assert "wrong by" in capsys.readouterr().out
    monkeypatch.setattr(loop, "is_right", lambda *arguments: True)
    assert loop.measure(wrong) == 1.0


def test_what_turns_out_wrong_at_last_gains_nothing(tune, monkeypatch):
    """Right when it was measured, wrong between the last turns."""

    class Fake:
        right = True

        def measure(self, chosen: Tiles) -> float:
            return cost(chosen)

        def call(self, chosen: Tiles):
            return lambda: torch.zeros(1)

        def is_right(self, chosen: Tiles, *outs: torch.Tensor) -> bool:
            return self.right

    monkeypatch.setattr(tune, "in_turns", lambda calls, turns: {"start": [2.0], "found": [1.0]})
    found = dataclasses.replace(BEST, modulation=START.modulation)
    assert tune.tune(Fake(), START, math.inf) == (found, 2.0)
    Fake.right = False
    assert tune.tune(Fake(), START, math.inf) == (found, 1.0)
    assert tune.tune(Fake(), found, math.inf) == (found, 1.0)
