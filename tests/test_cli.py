import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from upstream_like import SMALL, small_mar

from disa_fast.checkpoint import save_checkpoint
from disa_fast.cli import main
from disa_fast.demo.data import CLASSES
from disa_fast.demo.quality import CLASSIFIER_FILE, Classifier, measure, wilson
from disa_fast.files import written_aside
from disa_fast.generate import Sampling, draw_images, load_model

QUICK = ["--quiet", "--num-iter", "2", "--schedule", "linear:3-2"]


def test_the_shipped_model_draws_recognisable_clothes():
    """DiSA's setting. Real test images get 91 % from this classifier; pure noise or blank images get 10 %."""
    labels = torch.arange(60) % 10
    images, _ = draw_images(load_model(), labels, Sampling(num_iter=24, cfg=3.0), seed=1, batch=60, progress=False)
    quality = measure(images, labels, Classifier.load())
    assert quality.accuracy > 0.85
    assert quality.frechet < 40


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("disa_fast.demo.run.BASELINE_STEPS", 4)
    assert main(["demo", *QUICK, "--num-images", "50", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| 4 constant steps, plain PyTorch | 8 |" in out
    assert "| 4 constant steps, no clip | 8 |" in out
    assert "| 4 constant steps | 8 |" in out
    assert "| DiSA linear:3-2 | 5 |" in out
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 3 * 10 * 56
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["evaluations"] for row in rows] == [8, 8, 8, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]


def test_generate_with_the_shipped_model(tmp_path, capsys):
    assert main(["generate", *QUICK, "--labels", "9,0", "--num-images", "3", "--out", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000_ankle-boot.png", "00001_t-shirt.png", "00002_ankle-boot.png", "grid.png"]
    with Image.open(tmp_path / names[0]) as picture:
        assert picture.size == (28, 28)
    assert "3 files in" in capsys.readouterr().out


def test_one_seed_one_picture(tmp_path):
    runs = [("a", "7"), ("b", "7"), ("c", "8")]
    for name, seed in runs:
        main(["generate", *QUICK, "--labels", "3", "--num-images", "1", "--seed", seed, "--out", str(tmp_path / name)])
    a, b, c = ((tmp_path / name / "00000_dress.png").read_bytes() for name, _ in runs)
    assert a == b
    assert a != c


def test_generate_latents_of_a_checkpoint(tmp_path):
    checkpoint, out = tmp_path / "small.safetensors", tmp_path / "out"
    save_checkpoint(checkpoint, small_mar().state_dict(), "mar", SMALL)
    assert main(["generate", *QUICK, "--checkpoint", str(checkpoint), "--num-images", "2", "--out", str(out)]) == 0
    latents = np.load(out / "00001_1.npy")
    assert latents.shape == (16, 4, 4)
    assert np.isfinite(latents).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-iter", "50"], "num_iter: expected 1 to 49 iterations"),
        (["--labels", "10"], "labels: expected classes 0..9, got [10"),
        (["--checkpoint", "no-such-file.pth"], "no-such-file.pth: no such checkpoint"),
        (["--solver", "dpm_solver", "--clip", "900"], "clip: only 'ddpm' and 'ddim' take one"),
        (["--size", "base"], "says itself how it is built, got 'base'"),
        (["--checkpoint", str(CLASSIFIER_FILE)], "expected a mar, it holds a classifier"),
        (["--backend", "tpu"], "backend: 'tpu' is not one"),
    ],
)
def test_refusals_leave_no_files(tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert main(["generate", *QUICK, "--num-images", "1", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_demo_without_torchmetrics(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    assert main(["demo", *QUICK, "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'disa-fast[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_demo_refuses_other_models_and_classes(tmp_path, capsys):
    checkpoint, out = tmp_path / "small.safetensors", tmp_path / "out"
    save_checkpoint(checkpoint, small_mar().state_dict(), "mar", SMALL)
    assert main(["demo", *QUICK, "--checkpoint", str(checkpoint), "--out", str(out)]) == 2
    assert "the demo needs a model of 28x28 grey images" in capsys.readouterr().err
    assert main(["demo", *QUICK, "--labels", "3,10", "--out", str(out)]) == 2
    assert "labels: expected classes 0..9, got [3, 10]" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "cannot use 'abacus'"),
        (["--schedule", "linear:5-50"], "late: expected at most early = 5, got 50"),
        (["--schedule", "fast"], "schedule: expected 'linear:50-5'"),
        (["--num-images", "0"], "expected a whole number from 1, got '0'"),
        (["--labels", "boots"], "expected whole numbers separated by commas, got 'boots'"),
        (["--clip", "low"], "expected a timestep, 'none' or 'default', got 'low'"),
    ],
)
def test_malformed_options(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", *arguments])
    assert message in capsys.readouterr().err


def test_help_tells_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    assert "(default: linear:50-5)" in capsys.readouterr().out


def test_quality_needs_enough_images():
    with pytest.raises(ValueError, match="images: expected at least 40"):
        measure(torch.zeros(39, 1, 28, 28), torch.zeros(39, dtype=torch.int64), Classifier.load())


def test_wilson_interval():
    low, high = wilson(0.9, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-3), pytest.approx(0.9448, abs=1e-3))


def test_there_are_ten_classes():
    assert len(CLASSES) == load_model().class_emb.num_embeddings
