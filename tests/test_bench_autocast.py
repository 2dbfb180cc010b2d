"""bench/autocast.py: what it writes and says, on tiny models."""

import importlib
import json
import sys
from pathlib import Path

import harmon_peers
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # last, so that the installed package is the one that is tested
autocast = importlib.import_module("bench.autocast")
Case = autocast.Case
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2}
SIZES = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in SIZES.items()} | {"img_size": 64}
HEAD = {"diffloss_w": 64, "diffloss_d": 1}
FEW = {"schedule": "linear:4-3"}
TINY = [
    Case("MAR-B", 2, SIZES | HEAD | {"buffer_size": 4}, FEW | {"num_iter": 3}),
    Case("FlowAR-S", 1, SIZES | HEAD | {"scale": (1, 2, 4)}, FEW),
    Case("xAR-B", 1, SIZES, FEW),
]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(autocast, "CASES", TINY)
    monkeypatch.setattr(autocast, "SLOWER", 0.0)


def test_a_result_for_each_case(tiny, tmp_path, capsys):
    path = tmp_path / "autocast.json"
    assert autocast.main(["--turns", "2", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert {"machine", "date", "commit", "dtype", "cases"} == result.keys()
    assert result["dtype"] == "bfloat16"
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert [(case["model"], case["images"]) for case in result["cases"]] == [("MAR-B", 2), ("FlowAR-S", 1), ("xAR-B", 1)]
    printed = capsys.readouterr().out
    for case in result["cases"]:
        assert case["image_size"] == [64, 64]
        assert case["schedule"] == "linear:4-3"
        assert case["turns"] == 2
        low, high = case["quartiles"]
        assert low <= case["over_eager"] <= high
        assert 0 < case["relative_difference"] < autocast.TOLERANCE
        assert f"{case['over_eager']:.2f}x" in printed


def test_both_run_under_autocast(monkeypatch):
    """And the object is as before afterwards."""
    images, seen = TINY[1].images(), []
    before, draw = dict(vars(images.upstream)), images.eager

    def watched():
        accelerated = "sample_tokens" in vars(images.upstream)
        seen.append((accelerated, torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")))
        return draw()

    monkeypatch.setattr(images, "eager", watched)
    monkeypatch.setattr(Case, "images", lambda self: images)
    autocast.measured(TINY[1], 1)
    assert seen == [(False, torch.bfloat16), (True, torch.bfloat16)] * 2
    assert vars(images.upstream) == before


def test_slower_fails(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(autocast, "SLOWER", 1e9)
    assert autocast.main(["--turns", "2", "--only", "xAR-B", "--json", str(tmp_path / "x.json")]) == 1
    assert "FAILED: slower than eager: xAR-B, 1 image\n" in capsys.readouterr().out


def test_wrong_images_are_an_error(monkeypatch):
    monkeypatch.setattr(autocast, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="FlowAR-S, 1 image: wrong images, relative error "):
        autocast.measured(TINY[1], 1)


def test_every_case_is_of_sizes_that_fit():
    """On meta, so nothing is computed: the models are made, and draw the tokens that they are to."""
    for case in autocast.CASES:
        setting = autocast.reduced(autocast.SETTINGS[case.name], case.model, **case.sampling)
        with torch.device("meta"):
            model = setting.build() if "Harmon" not in case.name else harmon_peers.harmon_small()
        assert sum(setting.tokens(model)) > 0
        assert setting.num_iter is None or all(setting.tokens(model))
