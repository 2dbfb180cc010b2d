import dataclasses
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
from disa_fast.demo.run import BASELINE_STEPS
from disa_fast.files import written_aside
from disa_fast.generate import SYSTEMS, MARSampling, classes_of, draw_images, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--quiet", "--num-iter", "2", "--schedule", "linear:3-2"]
QUICK_OF = {"mar": QUICK, **{system: ["--quiet", "--system", system, "--schedule", "linear:3-2"] for system in ("flowar", "xar")}}
NAMES = ["4 constant steps, plain PyTorch", "4 constant steps, no clip", "4 constant steps", "DiSA linear:3-2"]

every_system = pytest.mark.parametrize("system", SYSTEMS)


def test_the_shipped_model_draws_recognisable_clothes():
    """DiSA's setting. Real test images get 91 % from this classifier; pure noise or blank images get 10 %."""
    labels = torch.arange(60) % 10
    images, _ = draw_images(load_model(), labels, MARSampling(num_iter=24, cfg=3.0), seed=1, batch=60, progress=False)
    quality = measure(images, labels, Classifier.load())
    assert quality.accuracy > 0.85
    assert quality.frechet < 40


@pytest.mark.parametrize(
    ("system", "names", "evaluations"),
    [("mar", NAMES, [8, 8, 8, 5]), ("flowar", NAMES[:1] + NAMES[2:], [16, 16, 8]), ("xar", NAMES[:1] + NAMES[2:], [16, 16, 9])],
)
def test_demo(tmp_path, capsys, monkeypatch, system, names, evaluations):
    monkeypatch.setitem(BASELINE_STEPS, system, 4)
    assert main(["demo", *QUICK_OF[system], "--num-images", "40", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name, count in zip(names, evaluations, strict=True):
        assert f"| {name} | {count} |" in out
    with Image.open(tmp_path / "demo.png") as picture:
        panels = len(names) - 1
        assert picture.width == panels * 10 * (2 * 28 + 2) + (panels - 1) * 24
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["system"] == system
    assert set(result["settings"]) == {*vars(SYSTEMS[system].demo), "num_images", "seed", "batch"}
    assert [row["name"] for row in result["rows"]] == names
    assert [row["evaluations"] for row in result["rows"]] == evaluations
    assert result["rows"][0]["speed_up"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]


def test_the_demo_compares_with_the_published_step_counts():
    assert BASELINE_STEPS == {"mar": 100, "flowar": 25, "xar": 50}


@every_system
def test_generate_with_the_shipped_model(tmp_path, capsys, system):
    assert main(["generate", *QUICK_OF[system], "--labels", "9,0", "--num-images", "3", "--out", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000_ankle-boot.png", "00001_t-shirt.png", "00002_ankle-boot.png", "grid.png"]
    with Image.open(tmp_path / names[0]) as picture:
        assert picture.size == (28, 28)
    assert "3 files in" in capsys.readouterr().out


@every_system
def test_one_seed_one_picture(tmp_path, system):
    runs = [("a", "7"), ("b", "7"), ("c", "8")]
    for name, seed in runs:
        out = str(tmp_path / name)
        main(["generate", *QUICK_OF[system], "--labels", "3", "--num-images", "1", "--seed", seed, "--out", out])
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
        (["--checkpoint", str(CLASSIFIER_FILE)], "says that it holds 'classifier', got 'mar'"),
        (["--backend", "tpu"], "backend: 'tpu' is not one"),
    ],
)
def test_refusals_leave_no_files(tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert main(["generate", *QUICK, "--num-images", "1", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("system", "arguments", "message"),
    [
        ("flowar", ["--num-iter", "2"], "--num-iter: system flowar has no such option"),
        ("flowar", ["--clip", "none"], "--clip: system flowar has no such option"),
        ("xar", ["--clip", "default"], "--clip: system xar has no such option"),
        ("xar", ["--cfg-schedule", "constant"], "--cfg-schedule: system xar has no such option"),
        ("mar", ["--guidance", "0,1"], "--guidance: system mar has no such option"),
        ("flowar", ["--solver", "ddpm"], "--solver: expected one of euler, euler_maruyama for system flowar, got 'ddpm'"),
        (
            "mar",
            ["--solver", "euler"],
            "dpm_solver, dpm_solver++ for system mar, got 'euler'",
        ),
        ("xar", ["--guidance", "0.9,0.1"], "guidance: expected low <= high"),
        ("flowar", ["--schedule", "constant:1"], "FlowAR's grid needs at least 2 denoising steps"),
        ("xar", ["--schedule", "list:3,2"], "expected one entry for each of the 4 autoregressive steps"),
        ("xar", ["--labels", "3,10"], "labels: expected classes 0..9, got [3, 10]"),
        ("flowar", ["--backend", "tpu"], "backend: 'tpu' is not one"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "demo"])
def test_what_a_system_does_not_have(tmp_path, capsys, command, system, arguments, message):
    out = tmp_path / "out"
    assert main([command, *QUICK_OF[system], *arguments, "--num-images", "40", "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_demo_refuses_a_schedule_before_it_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("disa_fast.demo.run.draw_images", None)
    assert main(["demo", "--system", "xar", "--schedule", "list:3,2", "--out", str(tmp_path / "out")]) == 2
    assert "expected one entry for each of the 4 autoregressive steps" in capsys.readouterr().err


@every_system
def test_defaults_and_what_is_given(tmp_path, monkeypatch, system):
    seen = []

    def draw(model, labels, sampling, *rest, **named):
        seen.append(sampling)
        return torch.zeros(len(labels), 16, 2, 2), 1.0

    monkeypatch.setattr("disa_fast.cli.load_model", lambda *arguments: small_mar())
    monkeypatch.setattr("disa_fast.cli.draw_images", draw)
    given = {"schedule": "cosine:9-2", "cfg": 1.5, "temperature": 0.5, "backend": "hoisted"}
    given |= {"clip": None, "num_iter": 7, "cfg_schedule": "constant"} if system == "mar" else {"guidance": (0.25, 0.5)}
    values = {"clip": "none", "guidance": "0.25,0.5"}
    options = [part for name in given for part in (f"--{name.replace('_', '-')}", values.get(name, str(given[name])))]
    for more in ([], ["--size", "large"], options):
        assert main(["generate", "--system", system, "--checkpoint", "some.pth", "--out", str(tmp_path), *more]) == 0
    demo = SYSTEMS[system].demo
    assert seen == [demo, SYSTEMS[system].published, dataclasses.replace(demo, **given)]


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
        (["--system", "harmon"], "invalid choice: 'harmon'"),
        (["--guidance", "0.9"], "expected two times, LOW,HIGH, got '0.9'"),
        (["--guidance", "0,high"], "expected two times, LOW,HIGH, got '0,high'"),
    ],
)
def test_malformed_options(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_help_tells_defaults(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert "(default: mar linear:50-5; flowar linear:25-15; xar linear:50-15)" in out
    assert "mar ddpm, ddim, dpm_solver, dpm_solver++; flowar euler, euler_maruyama; xar euler, euler_maruyama" in out
    assert "(default: mar 24, with --size 64)" in out
    assert "(default: auto)" in out
    assert "(default: 200)" in out or "(default: 10)" in out
    for name in ("flowar", "xar"):
        low, high = SYSTEMS[name].demo.guidance
        assert f"{name} {low:g},{high:g}" in out


def test_quality_needs_enough_images():
    with pytest.raises(ValueError, match="images: expected at least 40"):
        measure(torch.zeros(39, 1, 28, 28), torch.zeros(39, dtype=torch.int64), Classifier.load())


def test_wilson_interval():
    low, high = wilson(0.9, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-3), pytest.approx(0.9448, abs=1e-3))


@every_system
def test_there_are_ten_classes(system):
    assert len(CLASSES) == len(classes_of(load_model(system=system)))
