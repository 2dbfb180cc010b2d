"""Loading and drawing with each of the systems, on small random models: nothing here depends on what the shipped ones learned."""

import argparse
import dataclasses

import numpy as np
import pytest
import torch
import upstream_like
from PIL import Image

from disa_fast.checkpoint import save_checkpoint
from disa_fast.cli import main
from disa_fast.demo.data import cropped
from disa_fast.generate import SYSTEMS, MARSampling, classes_of, draw_images, load_model
from disa_fast.pictures import to_pixels

pytestmark = pytest.mark.usefixtures("one_thread")

BACKBONE = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("embed_dim", 32), ("num_heads", 2))}
BACKBONE |= {"img_size": 64, "encoder_depth": 1, "decoder_depth": 1, "class_num": 10}
SMALL = {
    "mar": upstream_like.SMALL,
    "flowar": BACKBONE | {"scale": [1, 2, 3, 4], "diffloss_d": 1, "diffloss_w": 64, "cross": True},
    "xar": BACKBONE | {"clusters": 4},
}
PIXELS = {"vae_embed_dim": 1, "vae_stride": 1, "img_size": 32, "patch_size": 8}  # 4 x 4 tokens, as the others
QUICK = {"mar": ["--num-iter", "2"], "flowar": [], "xar": []}

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
    return model.eval()


def quick(system, **changes):
    """A few steps, in which all that is random plays a part."""
    changes |= {"num_iter": 3} if system == "mar" else {"solver": "euler_maruyama"}
    return dataclasses.replace(SYSTEMS[system].demo, **{"schedule": "linear:4-2"} | changes)


def saved(folder, system, **options):
    """A file that says what it holds."""
    path = folder / f"{system}.safetensors"
    save_checkpoint(path, small(system, **options).state_dict(), system, SMALL[system] | options)
    return path


def published(folder, system, monkeypatch):
    """(path, size, state) of a training checkpoint as the authors' scripts write it, in a size as small as can be."""
    size, sizes = "large", SYSTEMS[system].sizes
    tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2, "diffloss_d": 1, "diffloss_w": 64}
    monkeypatch.setitem(sizes, size, {name: tiny.get(name, value) for name, value in sizes[size].items()})
    model, ema = (random(lambda: SYSTEMS[system].make(size=size), seed).state_dict() for seed in (1, 2))
    path = folder / "checkpoint-last.pth"
    options = argparse.Namespace(model=f"{system}_{size}", cfg=2.4)
    torch.save({"model": model, "model_ema": ema, "optimizer": {"state": {}}, "epoch": 399, "args": options}, path)
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
    model = load_model(path, size, ema, system)
    assert torch.equal(model.class_emb.weight, state[ema]["class_emb.weight"])
    assert not torch.equal(model.class_emb.weight, state[not ema]["class_emb.weight"])


@every_system
def test_a_file_of_another_system(tmp_path, system):
    path = saved(tmp_path, system)
    for other in SYSTEMS:
        if other != system:
            with pytest.raises(ValueError, match=rf"^system: .*says that it holds '{system}', got '{other}'"):
                load_model(path, system=other)


def test_load_model_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"system: expected one of \['mar', 'flowar', 'xar'\], got 'harmon'"):
        load_model(system="harmon")
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


@every_system
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
    model, settings, labels = small(system), quick(system), torch.tensor([3, 1, 4, 1, 5])
    before = torch.get_rng_state()
    images, seconds = draw_images(model, labels, settings, seed=7, batch=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(7)
    parts = [model.sample_tokens(part, generator=generator, **vars(settings)) for part in (labels[:3], labels[3:])]
    assert torch.equal(images, torch.cat(parts))
    assert images.shape == (5, 16, 4, 4)
    assert images.dtype == torch.float32
    assert seconds > 0


@every_system
def test_one_seed_one_image(system):
    def draw(seed, **changes):
        return draw_images(small(system), torch.tensor([3, 1]), quick(system, **changes), seed, batch=2, progress=False)[0]

    assert torch.equal(draw(7), draw(7))
    assert not torch.equal(draw(7), draw(8))
    changes = [{"schedule": "constant:3"}, {"cfg": 1.5}, {"temperature": 0.5}]
    if system != "mar":
        changes.append({"guidance": (0.2, 0.3)})
    for change in changes:
        assert not torch.allclose(draw(7), draw(7, **change)), change


@pytest.mark.parametrize(
    ("system", "changes", "expected"),
    [
        ("mar", {"schedule": "linear:7-3", "num_iter": 4}, 7 + 5 + 4 + 3),
        ("mar", {"schedule": "constant:30", "num_iter": 1}, 29),  # clipped, the first two are one
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
    draw_images(model, torch.tensor([3]), settings, seed=0, batch=1, progress=False)
    assert len(seen) == settings.network_evaluations(model) == expected


@pytest.mark.parametrize(
    ("system", "schedule", "expected"),
    [
        ("mar", "constant:100", 2304),
        ("mar", "linear:50-5", 629),
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
    """What DiSA's authors draw with: MAR in 64 iterations, FlowAR-L and xAR-B."""
    mar, flowar, xar = (system.published for system in SYSTEMS.values())
    assert mar == MARSampling("linear:50-5", num_iter=64, cfg=3.0)
    assert (flowar.schedule, flowar.solver, flowar.cfg, flowar.guidance) == ("linear:25-15", "euler", 2.4, (0.0, 0.9))
    assert (xar.schedule, xar.solver, xar.cfg, xar.guidance) == ("linear:50-15", "euler_maruyama", 2.7, (0.0, 1.0))


# disa-fast generate ---------------------------------------------------------------------------------------------------


@every_system
def test_latents_of_a_checkpoint(tmp_path, system):
    checkpoint, out = saved(tmp_path, system), tmp_path / "out"
    arguments = ["--system", system, "--checkpoint", str(checkpoint), "--schedule", "linear:3-2", *QUICK[system]]
    assert main(["generate", "--quiet", *arguments, "--num-images", "3", "--seed", "5", "--out", str(out)]) == 0
    settings = dataclasses.replace(SYSTEMS[system].demo, schedule="linear:3-2", **{"num_iter": 2} if system == "mar" else {})
    expected, _ = draw_images(small(system), torch.arange(3), settings, seed=5, batch=3, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["00000_0.npy", "00001_1.npy", "00002_2.npy"]
    for i in range(3):
        assert np.array_equal(np.load(out / f"0000{i}_{i}.npy"), expected[i].numpy())


@every_system
def test_latents_of_a_published_checkpoint(tmp_path, monkeypatch, system):
    path, size, _ = published(tmp_path, system, monkeypatch)
    arguments = ["--system", system, "--checkpoint", str(path), "--size", size, "--schedule", "constant:2", *QUICK[system]]
    for name, more in (("a", []), ("b", []), ("c", ["--no-ema"])):
        out = str(tmp_path / name)
        assert main(["generate", "--quiet", *arguments, *more, "--num-images", "2", "--labels", "207,999", "--out", out]) == 0
    a, b, c = (np.load(tmp_path / name / "00001_999.npy") for name in "abc")
    assert (a.shape, a.dtype) == ((16, 16, 16), np.float32)
    assert np.isfinite(a).all()
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


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
    settings = dataclasses.replace(SYSTEMS[system].demo, schedule="constant:2", **{"num_iter": 2} if system == "mar" else {})
    arguments = ["--system", system, "--schedule", "constant:2", "--labels", "9", "--num-images", "1", "--seed", "5"]
    assert main(["generate", "--quiet", *arguments, *QUICK[system], "--out", str(tmp_path)]) == 0
    images, _ = draw_images(load_model(system=system), torch.tensor([9]), settings, seed=5, batch=1, progress=False)
    assert images.shape[2:] == ((28, 28) if system == "mar" else (32, 32))
    with Image.open(tmp_path / "00000_ankle-boot.png") as picture:
        assert np.array_equal(np.asarray(picture), to_pixels(cropped(images)[0]))
        assert picture.size == (28, 28)


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
