"""Loading and drawing with each of the systems, on small random models: nothing here depends on what the shipped ones learned."""

import argparse
import dataclasses

import numpy as np
import pytest
import torch
import upstream_like
from compare import assert_close
from PIL import Image

from disa_fast.checkpoint import save_checkpoint
from disa_fast.cli import main
from disa_fast.demo.captions import VOCABULARY, caption, every_prompt, label_of, make_tokenizer
from disa_fast.demo.data import cropped
from disa_fast.demo.run import draw_images
from disa_fast.generate import classes_of, sample, sample_numbered
from disa_fast.models import Harmon
from disa_fast.pictures import read_png, to_pixels
from disa_fast.systems import SYSTEMS, HarmonSampling, MARSampling, load_model
from disa_fast.vae import VAE

pytestmark = pytest.mark.usefixtures("one_thread")

BACKBONE = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("embed_dim", 32), ("num_heads", 2))}
BACKBONE |= {"img_size": 64, "encoder_depth": 1, "decoder_depth": 1, "class_num": 10}
LLM = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL = {
    "mar": upstream_like.SMALL,
    "flowar": BACKBONE | {"scale": [1, 2, 3, 4], "diffloss_d": 1, "diffloss_w": 64, "cross": True},
    "xar": BACKBONE | {"clusters": 4},
    "harmon": upstream_like.SMALL | {"llm": LLM | {"vocab_size": VOCABULARY}},
}
PIXELS = {"vae_embed_dim": 1, "vae_stride": 1, "img_size": 32, "patch_size": 8}  # 4 x 4 tokens, as the others
PUBLISHED = {"mar": "large", "flowar": "large", "xar": "large", "harmon": "0.5b"}
QUICK = {"mar": ["--num-iter", "2"], "flowar": [], "xar": [], "harmon": ["--num-iter", "2"]}
TOKENIZER = make_tokenizer(every_prompt())

every_system = pytest.mark.parametrize("system", SYSTEMS)
flow_systems = pytest.mark.parametrize("system", ["flowar", "xar"])


def small(system, **options):
    return random(lambda: SYSTEMS[system].make(**SMALL[system] | options), seed=0)


def random(make, seed):
    """Every parameter random, so that each of them matters."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if isinstance(model, Harmon):
        model.tokenizer = TOKENIZER
    return model.eval()


def quick(system, **changes):
    """A few steps, in which all that is random plays a part."""
    few = {"solver": "euler_maruyama"} if system in ("flowar", "xar") else {"num_iter": 3}
    return dataclasses.replace(SYSTEMS[system].demo, **{"schedule": "linear:4-2"} | few | changes)


def subjects(system, *classes):
    """What a model of the system is given for classes."""
    return [caption(c) for c in classes] if system == "harmon" else list(classes)


def asked(system, *classes):
    """On the command line."""
    if system == "harmon":
        return [part for c in classes for part in ("--prompt", caption(c))]
    return ["--labels", ",".join(map(str, classes))]


def names(system, *classes):
    """Of files, for a checkpoint of one's own."""
    of = (lambda c: caption(c).replace(" ", "-")) if system == "harmon" else str
    return [f"{i:05d}_{of(c)}" for i, c in enumerate(classes)]


def saved(folder, system, **options):
    """A file that says what it holds, its tokenizer beside it."""
    path = folder / f"{system}.safetensors"
    save_checkpoint(path, small(system, **options).state_dict(), system, SMALL[system] | options)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return path


def published(folder, system, monkeypatch):
    """(path, size, state) of a training checkpoint as the authors' scripts write it, in a size as small as can be."""
    size, sizes = PUBLISHED[system], SYSTEMS[system].sizes
    tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2, "diffloss_d": 1, "diffloss_w": 64, "llm": SMALL["harmon"]["llm"]}
    monkeypatch.setitem(sizes, size, {name: tiny.get(name, value) for name, value in sizes[size].items()})
    model, ema = (random(lambda: SYSTEMS[system].make(size=size), seed).state_dict() for seed in (1, 2))
    path = folder / "checkpoint-last.pth"
    options = argparse.Namespace(model=f"{system}_{size}", cfg=2.4)
    torch.save({"model": model, "model_ema": ema, "optimizer": {"state": {}}, "epoch": 399, "args": options}, path)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return path, size, {True: ema, False: model}


# Loading --------------------------------------------------------------------------------------------------------------


@every_system
def test_own_checkpoints_say_how_they_are_built(tmp_path, system):
    model = load_model(saved(tmp_path, system), system=system)
    assert not model.training
    for name, value in small(system).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@every_system
@pytest.mark.parametrize("ema", [True, False])
def test_published_checkpoints_need_a_size(tmp_path, monkeypatch, system, ema):
    path, size, state = published(tmp_path, system, monkeypatch)
    with pytest.raises(ValueError, match=rf"does not say how it is built; expected one of .* for {system}, got None"):
        load_model(path, system=system)
    loaded = load_model(path, size, ema, system, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, state[ema][name]) for name, tensor in loaded.items())
    assert not all(torch.equal(tensor, state[not ema][name]) for name, tensor in loaded.items())


@every_system
def test_a_file_of_another_system(tmp_path, system):
    path = saved(tmp_path, system)
    for other in SYSTEMS:
        if other != system:
            with pytest.raises(ValueError, match=rf"^system: .*says that it holds '{system}', got '{other}'"):
                load_model(path, system=other)


def test_load_model_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"system: expected one of \['mar', 'flowar', 'xar', 'harmon'\], got 'var'"):
        load_model(system="var")
    with pytest.raises(ValueError, match=r"tokenizer: only Harmon takes one, got .* for system 'mar'"):
        load_model(system="mar", tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"size: .* says itself how it is built, got 'small'"):
        load_model(saved(tmp_path, "flowar"), "small", system="flowar")
    published(tmp_path, "xar", monkeypatch)
    path, size, _ = published(tmp_path, "flowar", monkeypatch)
    with pytest.raises(ValueError, match="expected one of small, large, huge for flowar, got 'base'"):
        load_model(path, "base", system="flowar")
    with pytest.raises(ValueError, match="keys do not match: missing"):
        load_model(path, size, system="xar")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_model(tmp_path / "none.pth", "large", system="xar")


def test_tokenizers(tmp_path):
    checkpoint = saved(tmp_path, "harmon")
    beside = tmp_path / "tokenizer.json"
    expected = TOKENIZER.encode("a photo of a dress").ids
    assert load_model(checkpoint, system="harmon").tokenizer.encode("a photo of a dress").ids == expected
    beside.rename(tmp_path / "other.json")
    assert load_model(checkpoint, system="harmon").tokenizer is None
    named = load_model(checkpoint, system="harmon", tokenizer=tmp_path / "other.json")
    assert named.tokenizer.encode("a photo of a dress").ids == expected
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such tokenizer"):
        load_model(checkpoint, system="harmon", tokenizer=tmp_path / "none.json")
    beside.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read as a tokenizer\.json"):
        load_model(checkpoint, system="harmon")


@pytest.mark.parametrize("system", ["mar", "flowar", "xar"])
def test_no_class_is_not_a_class(system):
    model = small(system)
    assert list(classes_of(model)) == list(range(10))
    assert classes_of(model, [9, 0]) == [9, 0]
    for wrong in (10, -1):
        with pytest.raises(ValueError, match=rf"labels: expected classes 0..9, got \[3, {wrong}\]"):
            classes_of(model, [3, wrong])


# Drawing --------------------------------------------------------------------------------------------------------------


@every_system
def test_batches_draw_from_one_generator(system):
    model, settings, asked_for = small(system), quick(system), subjects(system, 3, 1, 4, 1, 5)
    before = torch.get_rng_state()
    images, seconds = draw_images(model, asked_for, settings, seed=7, batch=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(7)
    parts = [sample(model, part, settings, generator=generator) for part in (asked_for[:3], asked_for[3:])]
    assert torch.equal(images, torch.cat(parts))
    assert images.shape == (5, 16, 4, 4)
    assert images.dtype == torch.float32
    assert seconds > 0


@every_system
def test_one_seed_one_image(system):
    def draw(seed, **changes):
        return draw_images(small(system), subjects(system, 3, 1), quick(system, **changes), seed, batch=2, progress=False)[0]

    assert torch.equal(draw(7), draw(7))
    assert not torch.equal(draw(7), draw(8))
    changes = [{"schedule": "constant:3"}, {"cfg": 1.5}, {"temperature": 0.5}]
    if system in ("flowar", "xar"):
        changes.append({"guidance": (0.2, 0.3)})
    if system == "harmon":
        changes.append({"cfg_prompt": "a photo of a bag"})
    for change in changes:
        assert not torch.allclose(draw(7), draw(7, **change)), change


@pytest.mark.parametrize(
    ("system", "changes", "expected"),
    [
        ("mar", {"schedule": "linear:7-3", "num_iter": 4}, 7 + 5 + 4 + 3),
        ("mar", {"schedule": "constant:30", "num_iter": 1}, 29),  # clipped, the first two are one
        ("harmon", {"schedule": "linear:7-3", "num_iter": 4}, 7 + 5 + 4 + 3),
        ("flowar", {"schedule": "linear:7-3", "solver": "euler"}, 6 + 4 + 4 + 2),  # that grid loses the odd one
        ("flowar", {"schedule": "linear:7-3", "solver": "euler_maruyama"}, 7 + 5 + 4 + 3),
        ("xar", {"schedule": "linear:7-3", "solver": "euler"}, 7 + 5 + 4 + 3),
        ("xar", {"schedule": "linear:7-3", "solver": "euler_maruyama"}, 7 + 5 + 4 + 3),
        ("flowar", {"schedule": "list:5,2,3,2", "cfg": 1.0}, 4 + 2 + 2 + 2),
        ("xar", {"schedule": "list:5,2,3,1", "guidance": (0.5, 0.6)}, 5 + 2 + 3 + 1),
    ],
)
def test_network_evaluations_are_those_that_happen(system, changes, expected):
    model, seen = small(system), []
    settings, network = dataclasses.replace(SYSTEMS[system].demo, **changes, backend="reference"), model.head.network

    def counting(dtype):
        evaluate = network(dtype)
        return lambda *inputs, **context: seen.append(1) or evaluate(*inputs, **context)

    model.head.network = counting
    draw_images(model, subjects(system, 3), settings, seed=0, batch=1, progress=False)
    assert len(seen) == settings.network_evaluations(model) == expected


@pytest.mark.parametrize(
    ("system", "schedule", "expected"),
    [
        ("mar", "constant:100", 2304),
        ("mar", "linear:50-5", 629),
        ("harmon", "linear:50-5", 629),
        ("flowar", "constant:25", 4 * 24),
        ("flowar", "linear:25-15", 24 + 20 + 18 + 14),
        ("xar", "constant:50", 4 * 50),
        ("xar", "linear:50-15", 50 + 38 + 26 + 15),
    ],
)
def test_network_evaluations_of_disa_and_without(system, schedule, expected):
    settings = dataclasses.replace(SYSTEMS[system].demo, schedule=schedule)
    assert settings.network_evaluations(small(system)) == expected


def test_published_settings():
    """What DiSA's authors draw with."""
    mar, flowar, xar, harmon = (system.published for system in SYSTEMS.values())
    assert mar == {
        size: MARSampling("linear:50-5", num_iter=64, cfg=cfg) for size, cfg in (("base", 2.9), ("large", 3.0), ("huge", 3.3))
    }
    assert {size: (s.schedule, s.cfg, s.guidance) for size, s in flowar.items()} == {
        "small": ("linear:25-15", 4.2, (0.0, 0.9)),
        "large": ("linear:25-15", 2.4, (0.0, 0.9)),
        "huge": ("linear:50-15", 2.4, (0.0, 0.7)),
    }
    assert {size: (s.schedule, s.cfg, s.guidance) for size, s in xar.items()} == {
        size: ("linear:50-15", cfg, (0.0, 1.0)) for size, cfg in (("base", 2.7), ("large", 2.3), ("huge", 2.2))
    }
    assert {s.solver for s in flowar.values()} == {"euler"}
    assert {s.solver for s in xar.values()} == {"euler_maruyama"}
    expected = HarmonSampling("linear:50-5", num_iter=64, cfg=3.0, cfg_schedule="constant", image_size=(512, 512))
    assert harmon == {"0.5b": expected, "1.5b": expected}
    assert all(list(system.sizes) == list(system.published) for system in SYSTEMS.values())


# Images by number -----------------------------------------------------------------------------------------------------


@every_system
def test_an_image_does_not_depend_on_the_others(system):
    model, settings, asked_for = small(system), quick(system), subjects(system, 3, 1, 4, 1)
    together = sample_numbered(model, asked_for, [0, 1, 2, 1000000], settings, seed=5)
    for i, number in enumerate([0, 1, 2, 1000000]):
        alone = sample_numbered(model, asked_for[i : i + 1], [number], settings, seed=5)[0]
        assert_close(alone, together[i], worst=1e-4 * float(together.abs().max()))
    assert not torch.allclose(together[1], together[3])  # of one class
    assert not torch.allclose(together, sample_numbered(model, asked_for, [0, 1, 2, 1000000], settings, seed=6))
    assert torch.equal(together, sample_numbered(model, asked_for, [0, 1, 2, 1000000], settings, seed=5))
    with pytest.raises(ValueError, match="seed: expected a whole number of at least 0"):
        sample_numbered(model, asked_for, [0, 1, 2, 3], settings, seed=-1)


@pytest.mark.parametrize("system", ["mar", "harmon"])
def test_orders_are_random(system):
    model, seen = small(system), []
    target = model.mar if system == "harmon" else model
    encode = target.encode
    target.encode = lambda known, masked, *rest: seen.append(masked) or encode(known, masked, *rest)
    settings = quick(system, num_iter=16, cfg=1.0, schedule="constant:1")
    sample_numbered(model, subjects(system, *[1] * 64), range(64), settings, seed=0)
    last = seen[-1].double().argmax(dim=1)  # the token that is drawn last
    assert len(last.unique()) > 12
    assert all(int(masked.sum(dim=1).unique()) == 16 - k for k, masked in enumerate(seen))


def test_image_sizes():
    model = small("harmon")
    wide = quick("harmon", image_size=(32, 80))
    images = sample_numbered(model, ["a bag"], [0], wide, seed=0)
    assert images.shape == (1, 16, 2, 5)
    with pytest.raises(ValueError, match=r"image_size: expected multiples of 16 pixels, of which a token is one, got \(32, 81\)"):
        sample_numbered(model, ["a bag"], [0], dataclasses.replace(wide, image_size=(32, 81)), seed=0)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("a photo of an ankle boot", 9),
        ("T-shirt", 0),
        ("a dark shirt", 6),
        ("a pair of trousers", 1),
        ("a dog", None),
        ("bags", None),
    ],
)
def test_the_class_that_a_prompt_speaks_of(text, label):
    assert label_of(text) == label


def test_every_caption_speaks_of_its_class():
    for label in range(10):
        assert {label_of(caption(label, shade, frame)) for shade in range(3) for frame in range(3)} == {label}


# disa-fast generate ---------------------------------------------------------------------------------------------------


@every_system
def test_latents_of_a_checkpoint(tmp_path, system):
    checkpoint, out = saved(tmp_path, system), tmp_path / "out"
    arguments = ["--system", system, "--checkpoint", str(checkpoint), "--schedule", "linear:3-2", *QUICK[system]]
    arguments += [*asked(system, 0, 1, 2), "--num-images", "3", "--seed", "5", "--out", str(out)]
    assert main(["generate", "--quiet", *arguments]) == 0
    settings = dataclasses.replace(SYSTEMS[system].demo, schedule="linear:3-2", **{"num_iter": 2} if QUICK[system] else {})
    expected = sample_numbered(small(system), subjects(system, 0, 1, 2), range(3), settings, seed=5)
    files = [f"{name}.npy" for name in names(system, 0, 1, 2)]
    assert sorted(path.name for path in out.iterdir()) == [*files, "run.json"]
    for i, file in enumerate(files):
        assert np.array_equal(np.load(out / file), expected[i].numpy())


@every_system
def test_latents_of_a_published_checkpoint(tmp_path, monkeypatch, system):
    path, size, _ = published(tmp_path, system, monkeypatch)
    arguments = ["--system", system, "--checkpoint", str(path), "--size", size, "--schedule", "constant:2", *QUICK[system]]
    shape = (16, 2, 3) if system == "harmon" else (16, 16, 16)
    arguments += ["--image-size", "32x48"] if system == "harmon" else []
    for name, more in (("a", []), ("b", []), ("c", ["--no-ema"])):
        out = str(tmp_path / name)
        given = asked(system, 7, 9) if system == "harmon" else ["--labels", "207,999"]
        assert main(["generate", "--quiet", *arguments, *more, "--num-images", "2", *given, "--out", out]) == 0
    file = "00001_a-photo-of-an-ankle-boot.npy" if system == "harmon" else "00001_999.npy"
    a, b, c = (np.load(tmp_path / name / file) for name in "abc")
    assert (a.shape, a.dtype) == (shape, np.float32)
    assert np.isfinite(a).all()
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_published_harmon_is_bfloat16_unless_told(tmp_path, monkeypatch):
    path, size, _ = published(tmp_path, "harmon", monkeypatch)
    assert load_model(path, size, system="harmon").head.dtype == torch.bfloat16
    assert load_model(path, size, system="harmon", dtype=torch.float32).head.dtype == torch.float32
    assert load_model(saved(tmp_path, "harmon"), system="harmon").head.dtype == torch.float32


@every_system
def test_pictures_by_a_vae(tmp_path, monkeypatch, system):
    vae = random(lambda: VAE(ch=32), seed=1)
    monkeypatch.setattr("disa_fast.cli.load_vae", lambda path: vae)
    (tmp_path / "kl16.ckpt").touch()
    checkpoint, out = saved(tmp_path, system), tmp_path / "out"
    arguments = ["--system", system, "--checkpoint", str(checkpoint), "--schedule", "constant:2", *QUICK[system]]
    arguments += [*asked(system, 1, 2), "--num-images", "2", "--vae", str(tmp_path / "kl16.ckpt"), "--out", str(out)]
    assert main(["generate", "--quiet", *arguments]) == 0
    settings = dataclasses.replace(SYSTEMS[system].demo, schedule="constant:2", **{"num_iter": 2} if QUICK[system] else {})
    latents = sample_numbered(small(system), subjects(system, 1, 2), range(2), settings, seed=0)
    expected = vae.decode(latents / 0.2325).detach()
    assert 0.05 < float((expected.abs() < 1).float().mean())
    for name, image in zip(names(system, 1, 2), expected, strict=True):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.size == (64, 64)
            assert np.array_equal(np.asarray(picture), to_pixels(image))
    assert {path.name for path in out.iterdir()} == {*(f"{name}.png" for name in names(system, 1, 2)), "grid.png", "run.json"}


@flow_systems
def test_pictures_of_ones_own_checkpoint_are_written_whole(tmp_path, system):
    """A margin is the shipped models' affair alone: what another model draws there may matter."""
    checkpoint, out = saved(tmp_path, system, **PIXELS), tmp_path / "out"
    arguments = ["--system", system, "--checkpoint", str(checkpoint), "--schedule", "constant:2", "--num-images", "1"]
    assert main(["generate", "--quiet", *arguments, "--out", str(out)]) == 0
    with Image.open(out / "00000_0.png") as picture:
        assert picture.size == (32, 32)


@every_system
def test_pictures_of_a_shipped_model_are_without_the_margin(tmp_path, system):
    settings = dataclasses.replace(SYSTEMS[system].demo, schedule="constant:2", **{"num_iter": 2} if QUICK[system] else {})
    arguments = ["--system", system, "--schedule", "constant:2", "--labels", "9", "--num-images", "1", "--seed", "5"]
    assert main(["generate", "--quiet", *arguments, *QUICK[system], "--out", str(tmp_path)]) == 0
    images = sample_numbered(load_model(system=system), subjects(system, 9), [0], settings, seed=5)
    assert images.shape[2:] == ((32, 32) if system in ("flowar", "xar") else (28, 28))
    with Image.open(tmp_path / "00000_ankle-boot.png") as picture:
        assert np.array_equal(np.asarray(picture), to_pixels(cropped(images)[0]))
        assert picture.size == (28, 28)
    assert torch.equal(
        read_png(tmp_path / "00000_ankle-boot.png"), (cropped(images)[0].clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    )


@every_system
def test_a_file_of_another_system_on_the_command_line(tmp_path, capsys, system):
    other = "flowar" if system == "xar" else "xar"
    checkpoint, out = saved(tmp_path, other), tmp_path / "out"
    for command in ("generate", "demo"):
        assert main([command, "--quiet", "--system", system, "--checkpoint", str(checkpoint), "--out", str(out)]) == 2
        assert f"says that it holds '{other}', got '{system}'" in capsys.readouterr().err
    assert not out.exists()


@flow_systems
@pytest.mark.parametrize("options", [{}, PIXELS | {"class_num": 9}, PIXELS | {"img_size": 64, "patch_size": 16}])
def test_the_demo_refuses_other_models(tmp_path, capsys, system, options):
    """Latents; one class too few, whose embeddings are ten; images of another size."""
    checkpoint, out = saved(tmp_path, system, **options), tmp_path / "out"
    assert main(["demo", "--quiet", "--system", system, "--checkpoint", str(checkpoint), "--out", str(out)]) == 2
    assert "checkpoint: the demo needs a model of 28x28 grey images, or 32x32 with a margin" in capsys.readouterr().err
    assert not out.exists()
