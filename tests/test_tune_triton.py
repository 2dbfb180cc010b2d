"""The search for tiles, with a made-up cost in place of a GPU."""

import dataclasses
import importlib
import json
import math
import time
from pathlib import Path

import pytest

from disa_fast.kernels.triton import tiles
from disa_fast.kernels.triton.tiles import Tile, Tiles

ROOT = Path(__file__).parent.parent
START = Tiles(Tile(16, 16, 64, 2, 4), Tile(16, 16, 64, 2, 4), Tile(16, 64, 64, 4, 2), Tile(64, 64, 64, 4, 3), fused=True)
BEST = dataclasses.replace(START, first=Tile(16, 64, 128, 4, 6), second=Tile(16, 32, 64, 2, 2), fused=False, pdl=True)


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.tune_triton")


def cost(chosen: Tiles) -> float:
    """Grows with every halving or doubling that lies between `chosen` and BEST; what does not fit costs all the world."""
    if chosen.first.n > 64:
        return math.inf
    far = float(chosen.fused != BEST.fused) + float(chosen.pdl != BEST.pdl)
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
