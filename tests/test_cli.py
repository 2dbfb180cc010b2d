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
from disa_fast.demo.captions import caption
from disa_fast.demo.data import CLASSES
from disa_fast.demo.quality import CLASSIFIER_FILE, Classifier, measure, wilson
from disa_fast.demo.run import BASELINE_STEPS, draw_images
from disa_fast.files import written_aside
from disa_fast.generate import classes_of, in_turn
from disa_fast.systems import SYSTEMS, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--quiet", "--num-iter", "2", "--schedule", "linear:3-2"]
QUICK_OF = {"mar": QUICK, "harmon": [*QUICK, "--system", "harmon"]}
QUICK_OF |= {system: ["--quiet", "--system", system, "--schedule", "linear:3-2"] for system in ("flowar", "xar")}
NAMES = ["4 constant steps, plain PyTorch", "4 constant steps, no clip", "4 constant steps", "DiSA linear:3-2"]

every_system = pytest.mark.parametrize("system", SYSTEMS)


@pytest.mark.parametrize("system", ["mar", "harmon"])
def test_the_shipped_model_draws_recognisable_clothes(system):
    """DiSA's setting. Real test images get 91 % from this classifier; pure noise or blank images get 10 %."""
    labels = in_turn(range(10), 40)
    subjects = [caption(label) for label in labels] if system == "harmon" else labels
    images, _ = draw_images(load_model(system=system), subjects, SYSTEMS[system].demo, seed=1, batch=40, progress=False)
    quality = measure(images, torch.tensor(labels), Classifier.load())
    assert quality.accuracy > 0.85
    assert quality.frechet < 40


@pytest.mark.parametrize(
    ("system", "names", "evaluations"),
    [
        ("mar", NAMES, [8, 8, 8, 5]),
        ("harmon", NAMES, [8, 8, 8, 5]),
        ("flowar", NAMES[:1] + NAMES[2:], [16, 16, 8]),
        ("xar", NAMES[:1] + NAMES[2:], [16, 16, 9]),
    ],
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
    assert BASELINE_STEPS == {"mar": 100, "flowar": 25, "xar": 50, "harmon": 100}


def test_the_demo_with_prompts(tmp_path, capsys, monkeypatch):
    """A prompt that speaks of no known class is drawn, and not judged."""
    monkeypatch.setitem(BASELINE_STEPS, "harmon", 4)
    arguments = ["demo", *QUICK_OF["harmon"], "--num-images", "40", "--prompt", "a photo of a dark dress", "--prompt"]
    assert main([*arguments, "a light bag", "--out", str(tmp_path / "judged")]) == 0
    assert "not measured" not in capsys.readouterr().out
    result = json.loads((tmp_path / "judged" / "demo.json").read_text())
    assert result["subjects"] == ["a photo of a dark dress", "a light bag"]
    assert main([*arguments, "a unicorn", "--out", str(tmp_path / "drawn")]) == 0
    assert capsys.readouterr().out.count("not measured") == 2 * 4
    with Image.open(tmp_path / "drawn" / "demo.png") as picture:
        assert picture.width > 1000
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"prompt": "a bag"}, "a coat "]))
    assert main(["generate", *QUICK_OF["harmon"], "--prompts", str(file), "--out", str(tmp_path / "file")]) == 0
    file.with_suffix(".txt").write_text("a shirt\n\na coat\n")
    assert (
        main(["generate", *QUICK_OF["harmon"], "--prompts", str(file.with_suffix(".txt")), "--out", str(tmp_path / "lines")]) == 0
    )
    assert sorted(path.name for path in (tmp_path / "file").glob("0*")) == ["00000_a-bag.png", "00001_a-coat.png"]
    assert sorted(path.name for path in (tmp_path / "lines").glob("0*")) == ["00000_a-shirt.png", "00001_a-coat.png"]


@every_system
def test_generate_with_the_shipped_model(tmp_path, capsys, system):
    assert main(["generate", *QUICK_OF[system], "--labels", "9,0", "--num-images", "3", "--out", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000_ankle-boot.png", "00001_t-shirt.png", "00002_ankle-boot.png", "grid.png", "run.json"]
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
        (["--prompt", "a bag"], "--prompt: system mar draws classes"),
        (["--tokenizer", "tokenizer.json"], "tokenizer: only Harmon takes one"),
        (["--vae", "kl16.ckpt"], "--vae: decodes latents of 16 channels, and this model draws 1"),
        (["--seed", "-1"], "seed: expected a whole number of at least 0"),
        (["--system", "harmon", "--prompt", "a bag", "--labels", "1"], "--labels: expected either classes or prompts, got both"),
        (["--system", "harmon", "--labels", "10"], "--labels: expected classes 0..9, got [10]"),
        (["--system", "harmon", "--image-size", "30"], "image_size: expected multiples of 4 pixels"),
        (["--system", "harmon", "--tokenizer", "none.json"], "none.json: no such tokenizer"),
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
        ("harmon", ["--guidance", "0,1"], "--guidance: system harmon has no such option"),
        ("mar", ["--cfg-prompt", "a bag"], "--cfg-prompt: system mar has no such option"),
        ("mar", ["--image-size", "64"], "--image-size: system mar has no such option"),
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

    def draw(model, subjects, numbers, sampling, seed):
        seen.append(sampling)
        return torch.zeros(len(subjects), 16, 2, 2)

    monkeypatch.setattr("disa_fast.cli.load_model", lambda *arguments: small_mar())
    monkeypatch.setattr("disa_fast.cli.sample_numbered", draw)
    checkpoint = tmp_path / "some.pth"
    checkpoint.touch()
    given = {"schedule": "cosine:9-2", "cfg": 1.5, "temperature": 0.5, "backend": "hoisted"}
    if system in ("mar", "harmon"):
        given |= {"clip": None, "num_iter": 7, "cfg_schedule": "constant"}
    else:
        given |= {"guidance": (0.25, 0.5)}
    if system == "harmon":
        given |= {"cfg_schedule": "linear", "image_size": (64, 48), "cfg_prompt": "A picture."}
    values = {"clip": "none", "guidance": "0.25,0.5", "image_size": "64x48"}
    options = [part for name in given for part in (f"--{name.replace('_', '-')}", values.get(name, str(given[name])))]
    size = list(SYSTEMS[system].sizes)[-1]
    for i, more in enumerate(([], ["--size", size], options)):
        out = str(tmp_path / str(i))
        assert main(["generate", "--system", system, "--checkpoint", str(checkpoint), "--out", out, *more]) == 0
    demo = SYSTEMS[system].demo
    assert seen == [demo, SYSTEMS[system].published[size], dataclasses.replace(demo, **given)]


def test_inspect(tmp_path, capsys):
    checkpoint = tmp_path / "small.safetensors"
    save_checkpoint(checkpoint, small_mar().state_dict(), "mar", SMALL)
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    for line in ("system: mar", "size: its own, as it says itself", "missing: none", "unexpected: none"):
        assert f"{line}\n" in out
    assert "backend: " in out
    state = small_mar().state_dict()
    state["mask_tokens"] = state.pop("mask_token")
    save_checkpoint(checkpoint, state, "mar", SMALL)
    assert main(["inspect", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert "missing: 1 (mask_token)\n" in out
    assert "unexpected: 1 (mask_tokens)\n" in out
    checkpoint.write_bytes(b"nothing of the kind")
    assert main(["inspect", str(checkpoint)]) == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err


def test_evaluate(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("disa_fast.cli.evaluate_folder", lambda *arguments: seen.append(arguments) or {"fid": 1.5})
    stats, weights = tmp_path / "stats.npz", tmp_path / "weights.pth"
    arguments = ["--stats", str(stats), "--weights", str(weights), "--batch-size", "7", "--device", "cpu", "--quiet"]
    assert main(["evaluate", str(tmp_path), *arguments]) == 0
    assert seen == [(tmp_path, stats, weights, 7, torch.device("cpu"), False)]
    assert json.loads(capsys.readouterr().out) == {"fid": 1.5}
    monkeypatch.undo()
    assert main(["evaluate", str(tmp_path), "--quiet"]) == 2
    assert "folder: expected at least 2 images" in capsys.readouterr().err


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
        (["--system", "var"], "invalid choice: 'var'"),
        (["--image-size", "64x"], "expected SIDE or HEIGHTxWIDTH in pixels, got '64x'"),
        (["--image-size", "0x64"], "expected SIDE or HEIGHTxWIDTH in pixels, got '0x64'"),
        (["--prompts", "no-such-file.txt"], "cannot read prompts from 'no-such-file.txt': FileNotFoundError"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
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
    flowar = "linear:25-15, with --size linear:25-15 or linear:50-15"
    assert f"(default: mar linear:50-5; flowar {flowar}; xar linear:50-15; harmon linear:50-5)" in out
    assert "mar ddpm, ddim, dpm_solver, dpm_solver++; flowar euler, euler_maruyama; xar euler, euler_maruyama; harmon ddpm" in out
    assert "(default: mar 24, with --size 64; harmon 24, with --size 64)" in out
    assert "(default: mar 3.0, with --size 2.9 or 3.0 or 3.3; flowar 2.4, with --size 4.2 or 2.4; xar" in out
    assert "(default: auto)" in out
    assert "(default: 200)" in out or "(default: 10, or one for each prompt)" in out
    for name in ("flowar", "xar"):
        low, high = SYSTEMS[name].demo.guidance
        assert f"{name} {low:g},{high:g}" in out


def test_quality_needs_enough_images():
    with pytest.raises(ValueError, match="images: expected at least 40"):
        measure(torch.zeros(39, 1, 28, 28), torch.zeros(39, dtype=torch.int64), Classifier.load())


def test_wilson_interval():
    low, high = wilson(0.9, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-3), pytest.approx(0.9448, abs=1e-3))


@pytest.mark.parametrize("system", ["mar", "flowar", "xar"])
def test_there_are_ten_classes(system):
    assert len(CLASSES) == len(classes_of(load_model(system=system)))
