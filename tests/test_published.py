"""Published checkpoints of every system and size, as far as names and shapes go (tests/published/README.md), and real files of
models that are cut down from those."""

import argparse
import copy
import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch

from disa_fast.checkpoint import build, load_checkpoint
from disa_fast.identify import UNKNOWN, VAE, identify, recognize, report
from disa_fast.systems import DEMO_WEIGHTS, SYSTEMS

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parent / "published"
MILLIONS = {  # parameters, of the authors' modules
    ("mar", "base"): 207.92,
    ("mar", "large"): 478.33,
    ("mar", "huge"): 942.40,
    ("flowar", "small"): 171.72,
    ("flowar", "large"): 586.86,
    ("flowar", "huge"): 1913.32,
    ("xar", "base"): 172.64,
    ("xar", "large"): 608.40,
    ("xar", "huge"): 1186.02,
    ("harmon", "0.5b"): 704.94,
    ("harmon", "1.5b"): 2494.77,
}
LM_HEAD = "llm.lm_head.weight"

every_size = pytest.mark.parametrize(("system", "size"), MILLIONS)


@functools.cache
def published(file, size):
    """{name: shape}"""
    shapes = {}
    for name, shape in json.loads((FOLDER / f"{file}.json").read_text())[size].items():
        blocks = re.search(r"\{(\d+)\.\.(\d+)\}", name)
        for i in range(int(blocks[1]), int(blocks[2]) + 1) if blocks else [None]:
            shapes[name if i is None else name.replace(blocks[0], str(i))] = shape
    return shapes


def with_vae(shapes):
    """As Harmon's own state_dict has it, where training has not taken it out."""
    return {**shapes, **{f"vae.{name}": shape for name, shape in published("kl16", "kl16").items()}}


def on_meta(shapes, dtype=torch.float32):
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


@functools.cache
def made(system, size):
    with torch.device("meta"):
        return SYSTEMS[system].make(size=size)


@pytest.fixture
def made_once(monkeypatch):
    """Spares a second or so of each test that compares with all sizes of a system."""
    once = {name: dataclasses.replace(system, make=functools.partial(made, name)) for name, system in SYSTEMS.items()}
    monkeypatch.setattr("disa_fast.identify.SYSTEMS", once)


# Names and shapes -----------------------------------------------------------------------------------------------------


def test_every_system_and_size_is_here():
    assert {(system, size) for system in SYSTEMS for size in SYSTEMS[system].sizes} == set(MILLIONS)


@pytest.mark.usefixtures("made_once")
@every_size
def test_published_names_and_shapes(system, size):
    shapes = published(system, size)
    model = copy.deepcopy(made(system, size))
    model.load_state_dict(on_meta(shapes, torch.float16), assign=True, strict=True)
    loaded = model.state_dict()
    assert {name: list(tensor.shape) for name, tensor in loaded.items()} == {n: s for n, s in shapes.items() if n != LM_HEAD}
    assert all(tensor.dtype == torch.float16 for tensor in loaded.values())
    found = recognize(on_meta(shapes))
    assert (found.system, found.size, found.differences) == (system, size, 0)
    assert found.parameters / 1e6 == pytest.approx(MILLIONS[system, size], abs=0.005)
    assert found.dtypes == {torch.float32: len(loaded)}
    assert found.head == model.head.spec


@pytest.mark.usefixtures("made_once")
@every_size
def test_what_differs_is_named(tmp_path, system, size):
    """Before anything is allocated: Harmon-1.5B would be 10 GB."""
    path, shapes, model = tmp_path / "hollow.pth", dict(published(system, size)), made(system, size)
    right = next(name for name in shapes if name.endswith("_blocks.1.mlp.fc2.weight"))
    wrong = right.replace("weight", "w")
    shapes[wrong] = shapes.pop(right)
    classes = next(name for name in shapes if name.endswith("class_emb.weight"))
    count, width = shapes[classes]
    shapes[classes] = [10, width]
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}  # each stored as one number
    torch.save(state | {classes: state[classes].bfloat16()}, path)
    assert path.stat().st_size < 1e6

    found = identify(path)
    assert (found.system, found.size, found.missing, found.unexpected) == (system, size, [right], [wrong])
    assert found.misshapen == {classes: ([count, width], [10, width])}
    assert (found.dtypes[torch.bfloat16], found.has_ema, found.differences) == (1, False, 3)
    message = rf"^{re.escape(str(path))}: keys do not match: missing 1 \({right}\); unexpected 1 \({wrong}\)$"
    with pytest.raises(ValueError, match=message):
        build(lambda: model, path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, path)


@pytest.mark.usefixtures("made_once")
def test_what_harmon_leaves_unused():
    shapes = published("harmon", "0.5b")
    found = recognize(on_meta(with_vae(shapes)))
    assert (found.system, found.size, found.differences) == ("harmon", "0.5b", 0)
    assert len(found.unused) == 1 + len(published("kl16", "kl16"))
    assert found.parameters / 1e6 == pytest.approx(MILLIONS["harmon", "0.5b"], abs=0.005)


def test_the_backend_is_told_for_what_is_loaded(tmp_path):
    """Published weights of Harmon are used in bfloat16, one's own in float32, as load_model has it."""
    path = tmp_path / "harmon_0.5b.pth"
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in published("harmon", "0.5b").items()}, path)
    assert "\nsize: 0.5b\n" in report(identify(path))
    assert " for 8 rows in bfloat16 on " in report(identify(path))
    assert " for 8 rows in float32 on " in report(identify(DEMO_WEIGHTS / "harmon_fashion_mnist.safetensors"))


def test_other_files(tmp_path):
    path = tmp_path / "kl16.ckpt"
    torch.save({"model": {name: torch.zeros(()).expand(shape) for name, shape in published("kl16", "kl16").items()}}, path)
    found = identify(path)
    assert (found.system, found.other, found.parameters) == (None, VAE, 66456019)
    assert recognize({"encoder.layer.0.weight": torch.zeros(2, 3)}).other == UNKNOWN
    assert recognize({}).other == UNKNOWN


# Real files -----------------------------------------------------------------------------------------------------------


TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "diffloss_d": 2, "diffloss_w": 64}
TINY["llm"] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY["llm"] |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(params=SYSTEMS)
def cut_down(request, monkeypatch):
    """(system, size): a published size of every system, in small."""
    sizes = SYSTEMS[request.param].sizes
    size = "large" if request.param == "flowar" else next(iter(sizes))  # with cross-attention
    image = {"img_size": 64} | ({"scale": [1, 2, 4]} if request.param == "flowar" else {})
    monkeypatch.setitem(sizes, size, {name: TINY.get(name, value) for name, value in sizes[size].items()} | image)
    return request.param, size


def random_state(system, size, seed):
    """A published file's tensors, Harmon's own VAE and output layer among them."""
    generator = torch.Generator().manual_seed(seed)
    model = SYSTEMS[system].make(size=size)
    state = model.state_dict()
    for name, _ in model.named_parameters():
        state[name] = 0.1 * torch.randn(state[name].shape, generator=generator)
    if system == "harmon":
        state |= {LM_HEAD: state["llm.model.embed_tokens.weight"], "vae.encoder.conv_in.bias": torch.zeros(128)}
    return state


def drawn(model, system):
    subjects = {"input_ids": torch.tensor([[3, 1, 4], [1, 5, 9]])} if system == "harmon" else {"labels": torch.tensor([207, 999])}
    few = {"num_iter": 2, "cfg": 3.0} if system in ("mar", "harmon") else {"cfg": 3.0}
    return model.sample_tokens(**subjects, schedule="constant:2", generator=torch.Generator().manual_seed(0), **few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_as_made_loaded_and_cast(tmp_path, cut_down, dtype):
    system, size = cut_down
    state, path = random_state(system, size, 0), tmp_path / "checkpoint-last.pth"
    torch.save({"model": random_state(system, size, 1), "model_ema": state, "args": argparse.Namespace(model=size)}, path)
    found = identify(path)
    assert (found.system, found.size, found.differences, found.has_ema) == (system, size, 0, True)
    assert identify(path, ema=False).differences == 0

    loaded = SYSTEMS[system].make(size=size)
    load_checkpoint(loaded, path)
    loaded = loaded.to(dtype).eval()
    built = build(lambda: SYSTEMS[system].make(size=size), path, dtype=dtype).eval()
    tensors = {name: (kind, t) for kind in ("parameters", "buffers") for name, t in getattr(loaded, f"named_{kind}")()}
    for kind in ("parameters", "buffers"):
        for name, tensor in getattr(built, f"named_{kind}")():
            expected_kind, expected = tensors.pop(name)
            assert kind == expected_kind
            assert type(tensor) is type(expected) and tensor.requires_grad == expected.requires_grad
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
            assert tensor.is_contiguous()
    assert not tensors
    assert torch.equal(drawn(built, system), drawn(loaded, system))
