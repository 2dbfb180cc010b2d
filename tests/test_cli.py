import dataclasses
import errno
import json
import os
import re
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
from disa_fast.demo.quality import CLASSIFIER_FILE, Classifier, measure, measure_accuracy, no_distance, wilson
from disa_fast.demo.run import BASELINE_STEPS, draw_images
from disa_fast.files import check_folder, written_aside
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
    """A prompt that speaks of no known class is drawn, and not judged; those of some classes are not held against all ten."""
    monkeypatch.setitem(BASELINE_STEPS, "harmon", 4)
    arguments = ["demo", *QUICK_OF["harmon"], "--num-images", "40", "--prompt", "a photo of a dark dress", "--prompt"]
    assert main([*arguments, "a light bag", "--out", str(tmp_path / "judged")]) == 0
    out = capsys.readouterr().out
    assert "not measured: that takes images of all 10 classes, as the real ones are, got 2 (dress, bag)." in out
    result = json.loads((tmp_path / "judged" / "demo.json").read_text())
    assert result["subjects"] == ["a photo of a dark dress", "a light bag"]
    assert all("accuracy" in row and "frechet" not in row for row in result["rows"])
    assert main([*arguments, "a unicorn", "--out", str(tmp_path / "drawn")]) == 0
    out = capsys.readouterr().out
    assert out.count("| not measured") == 2 * 4
    assert "Class accuracy and Frechet distance were not measured: 'a unicorn' names none of the ten classes." in out
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
        (["--num-iter", "50"], "--num-iter: expected 1 to 49 iterations"),
        (["--labels", "10"], "labels: expected classes 0..9, got [10"),
        (["--checkpoint", "no-such-file.pth"], "no-such-file.pth: no such checkpoint"),
        (["--solver", "dpm_solver", "--clip", "900"], "clip: only 'ddpm' and 'ddim' take one"),
        (["--size", "base"], "--size: expected a --checkpoint beside it; without one the demo's model draws"),
        (["--num-heads", "2", "--patch-size", "4"], "--num-heads, --patch-size: expected a --checkpoint beside it"),
        (["--checkpoint", str(CLASSIFIER_FILE)], "says that it holds 'classifier', got 'mar'"),
        (["--backend", "tpu"], "backend: 'tpu' is not one"),
        (["--prompt", "a bag"], "--prompt: system mar draws classes"),
        (["--tokenizer", "tokenizer.json"], "tokenizer: only Harmon takes one"),
        (["--vae", "kl16.ckpt"], "--vae: decodes latents of 16 channels, and this model draws 1"),
        (["--seed", "-1"], "seed: expected a whole number of at least 0"),
        (["--system", "harmon", "--prompt", "a bag", "--labels", "1"], "--labels: expected either classes or prompts, got both"),
        (["--system", "harmon", "--labels", "10"], "--labels: expected classes 0..9, got [10]"),
        (["--system", "harmon", "--image-size", "30"], "--image-size: expected multiples of 4 pixels"),
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
    with pytest.raises(ValueError, match="images: expected at least 40 images, got 39"):
        measure(torch.zeros(39, 1, 28, 28), torch.zeros(39, dtype=torch.int64), Classifier.load())


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([3] * 200, r"images of all 10 classes, as the real ones are, got 1 \(dress\)"),
        (in_turn(range(9), 200), "images of all 10 classes, as the real ones are, got 9"),
        (in_turn([0, *range(10)], 220), "as many images of each class, as the real ones are, got 20 to 40"),
        (in_turn(range(10), 39), "at least 40 images, got 39"),
        (in_turn(range(10), 40), None),
        (in_turn(range(10), 49), None),
        (in_turn(range(10), 200), None),
    ],
)
def test_what_a_distance_can_be_taken_of(labels, reason):
    found = no_distance(labels)
    assert found is None if reason is None else re.fullmatch(reason + ".*", found)
    if reason is not None:
        with pytest.raises(ValueError, match=f"images: expected {reason}"):
            measure(torch.zeros(len(labels), 1, 28, 28), torch.tensor(labels), Classifier.load())


def test_an_accuracy_can_be_taken_of_anything():
    images = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = Classifier.load()
    labels = labels.logits(labels(images)).argmax(dim=1)
    assert measure_accuracy(images, labels, Classifier.load()) == (1.0, wilson(1.0, 7))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--num-images", "20"], "The Frechet distance was not measured: that takes at least 40 images, got 20."),
        (["--num-images", "40", "--labels", "3"], "as the real ones are, got 1 (dress)."),
    ],
)
def test_a_demo_of_few_images_or_classes(tmp_path, capsys, monkeypatch, more, sentence):
    """Whatever cannot be measured, what was drawn is written."""
    monkeypatch.setitem(BASELINE_STEPS, "mar", 2)
    assert main(["demo", *QUICK, *more, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert sentence in out
    assert out.count("not measured") == 4 + 1
    result = json.loads((tmp_path / "demo.json").read_text())
    assert all("accuracy" in row and "frechet" not in row for row in result["rows"])
    assert list(result["not_measured"]) == ["frechet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip", "2000"], "--clip: expected a timestep (a whole number from 0 to 999) or None, got 2000"),
        (["--clip", "-1"], "--clip: expected a timestep (a whole number from 0 to 999) or None, got -1"),
        (["--solver", "dpm_solver", "--clip", "900"], "--clip: only 'ddpm' and 'ddim' take one"),
        (["--cfg", "-2"], "--cfg: expected a number of at least 0, got -2"),
        (["--cfg", "nan"], "--cfg: expected a number of at least 0, got nan"),
        (["--cfg", "inf"], "--cfg: expected a number of at least 0, got inf"),
        (["--temperature", "-0.5"], "--temperature: expected a number of at least 0, got -0.5"),
        (["--seed", "-1"], "--seed: expected a whole number of at least 0 and below 2**64, got -1"),
        (["--seed", str(2**64)], "--seed: expected a whole number of at least 0 and below 2**64"),
        (["--schedule", "linear:2000-5"], "--schedule: expected up to 1000 denoising steps, got linear:2000-5"),
        (["--schedule", "list:5,2000"], "--schedule: expected up to 1000 denoising steps"),
        (["--system", "xar", "--guidance", "0.9,0.1"], "--guidance: expected low <= high"),
        (["--system", "xar", "--guidance", "0,1.5"], "--guidance: expected times from 0 to 1, got 0,1.5"),
        (["--system", "flowar", "--guidance", "nan,1"], "--guidance: expected a finite number, got nan"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "demo"])
def test_settings_are_checked_before_anything_is_read(tmp_path, capsys, monkeypatch, command, arguments, message):
    monkeypatch.setattr("disa_fast.cli.load_model", None)
    assert main([command, *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-iter", "50"], "--num-iter: expected 1 to 49 iterations"),
        (["--schedule", "list:3,2"], "--schedule: list:3,2 does not fit: steps: expected one entry for each of the 24"),
        (["--system", "flowar", "--schedule", "constant:1"], "--schedule: constant:1 does not fit: steps: FlowAR's grid needs"),
        (["--backend", "tpu"], "--backend: 'tpu' is not one"),
        (["--labels", "10"], "--labels: expected classes 0..9"),
        (["--system", "harmon", "--image-size", "30"], "--image-size: expected multiples of 4 pixels"),
        (["--system", "harmon", "--cfg-prompt", "\udc80"], "--cfg-prompt: expected text"),
        (["--vae", "none.ckpt"], "--vae: decodes latents of 16 channels"),
    ],
)
def test_settings_are_checked_before_a_model_is_allocated(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    assert main(["generate", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_backend_for_few_rows_is_refused_before_it_meets_many(tmp_path, capsys, monkeypatch):
    """Which would be in the midst of the first image."""
    asked, most = [], 1000

    def refuses(spec, dtype, device, rows, batch_invariant=False):
        asked.append(rows)
        return f"serves up to {most} rows" if rows > most else None

    monkeypatch.setattr("disa_fast.backends.hoisted.refuses", refuses)
    arguments = ["generate", "--quiet", "--schedule", "constant:1", "--backend", "hoisted", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert asked[0] == max(asked) == 60  # 10 images' guided halves, of whose 49 tokens the largest of 24 iterations draws 3
    most = 59
    assert main([*arguments[:-1], str(tmp_path / "other")]) == 2
    assert "--backend: 'hoisted' cannot serve this call: serves up to 59 rows" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# Folders to write into ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "generate", "profile"])
@pytest.mark.parametrize("kind", ["a file", "below a file", "a name too long", "a folder in the way", "a full disk"])
def test_a_folder_that_cannot_be_written_to(tmp_path, capsys, monkeypatch, command, kind):
    """Is found before anything is read, and leaves no trace."""
    out = {"a file": "file", "below a file": "file/x", "a name too long": "x" * 300}.get(kind, "new/folder")
    (tmp_path / "file").touch()
    name = {"demo": "demo.json", "generate": "grid.png", "profile": "summary.json"}[command]
    if kind == "a folder in the way":
        (tmp_path / out / name).mkdir(parents=True)
    if kind == "a full disk":
        monkeypatch.setattr("disa_fast.files.Path.write_bytes", full_disk)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("disa_fast.cli.load_model", None)
    monkeypatch.setattr("disa_fast.profile._run", None)
    more = ["--", sys.executable, "-c", "pass"] if command == "profile" else []
    assert main([command, "--out", str(tmp_path / out), *more]) == 2
    told = capsys.readouterr().err
    assert f"disa-fast {command}: error: --out: " in told
    assert str(tmp_path / out) in told and "choose another" in told
    if kind == "a full disk":
        assert "No space left on device" in told
    assert sorted(tmp_path.rglob("*")) == before


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path):
    check_folder(tmp_path / "a" / "b", ["x.png"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.png").write_bytes(b"there")
    check_folder(tmp_path, ["x.png"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError("1024 requested and 512 written")])
def test_a_full_disk_in_the_midst_of_a_run_names_the_file(tmp_path, error):
    """Whatever wrote: of a write that fails the system names none, and NumPy tells no number either."""
    with pytest.raises(OSError, match=r"picture\.png") as raised, written_aside(tmp_path / "picture.png"):
        raise error
    assert raised.value.errno == error.errno
    assert list(tmp_path.iterdir()) == []


def test_wilson_interval():
    low, high = wilson(0.9, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-3), pytest.approx(0.9448, abs=1e-3))


@pytest.mark.parametrize("system", ["mar", "flowar", "xar"])
def test_there_are_ten_classes(system):
    assert len(CLASSES) == len(classes_of(load_model(system=system)))
