"""Files in and out: what is read, what is refused, and that a refusal changes nothing."""

import argparse
import json
import struct
import threading
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn
from upstream_like import SMALL, small_mar

from disa_fast import backends, models
from disa_fast.checkpoint import build, has_ema, load_checkpoint, read_config, read_state_dict, save_checkpoint, shapes_of
from disa_fast.identify import OWN, identify, report
from disa_fast.systems import DEMO_WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")


def small():
    return models.MAR(**SMALL)


def equal(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], tensor) for name, tensor in state.items())


def build_small(path, **options):
    """As load_checkpoint, into a model of its own."""
    return build(small, path, **options)


def load_small(path, **options):
    model = small()
    load_checkpoint(model, path, **options)
    return model


either_way = pytest.mark.parametrize("load", [build_small, load_small])


# Files ----------------------------------------------------------------------------------------------------------------


def legacy(state, path):
    """As PyTorch wrote before 1.6."""
    torch.save(state, path, _use_new_zipfile_serialization=False)


def in_safetensors(state, path):
    safetensors.torch.save_file(state, path)


@either_way
@pytest.mark.parametrize("ema", [True, False])
def test_published_training_checkpoint(tmp_path, load, ema):
    """{"model", "model_ema", ..., "args": Namespace}, as upstream's training writes it."""
    source, averaged = small_mar(1).state_dict(), small_mar(2).state_dict()
    path = tmp_path / "checkpoint-last.pth"
    content = {"model": source, "model_ema": averaged, "epoch": 3, "args": argparse.Namespace(model="mar_base")}
    torch.save(content, path)
    assert equal(load(path, ema=ema), averaged if ema else source)
    assert has_ema(path)


@either_way
@pytest.mark.parametrize(("write", "suffix"), [(torch.save, ".pth"), (legacy, ".pth"), (in_safetensors, ".safetensors")])
def test_bare_state_dict(tmp_path, load, write, suffix):
    state, path = small_mar(1).state_dict(), tmp_path / f"weights{suffix}"
    write(state, path)
    assert equal(load(path), state)
    assert read_config(path) is None
    assert not has_ema(path)


@either_way
def test_training_checkpoint_without_an_average(tmp_path, load):
    state, path = small_mar(1).state_dict(), tmp_path / "checkpoint-last.pth"
    torch.save({"model": state, "epoch": 3}, path)
    assert equal(load(path), state)
    assert not has_ema(path)


@pytest.mark.parametrize(("write", "suffix"), [(torch.save, ".pth"), (legacy, ".pth"), (in_safetensors, ".safetensors")])
def test_shapes_of(tmp_path, write, suffix):
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(0, 4, dtype=torch.bfloat16), "c": torch.zeros((), dtype=torch.int64)}
    write(state, tmp_path / f"file{suffix}")
    shapes = shapes_of(tmp_path / f"file{suffix}")
    assert {name: (t.shape, t.dtype) for name, t in shapes.items()} == {name: (t.shape, t.dtype) for name, t in state.items()}
    assert all(t.is_meta for t in shapes.values())


def test_shapes_take_no_memory(tmp_path):
    torch.save({"a": torch.zeros(()).expand(2**25, 2**25)}, tmp_path / "petabytes.pth")
    assert shapes_of(tmp_path / "petabytes.pth")["a"].shape == (2**25, 2**25)


def test_own_checkpoints_say_how_they_are_built(tmp_path):
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, small_mar().state_dict(), "mar", {"img_size": 64})
    assert read_config(path) == ("mar", {"img_size": 64})
    assert [p.name for p in tmp_path.iterdir()] == ["own.safetensors"]


def test_no_such_file(tmp_path):
    for read in (read_state_dict, shapes_of, has_ema, read_config, identify, build_small, load_small):
        with pytest.raises(FileNotFoundError, match=r"none\.pth: no such checkpoint"):
            read(tmp_path / "none.pth")


# Damaged files --------------------------------------------------------------------------------------------------------


class Calls:
    """Pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def rewritten(source, path, compression=zipfile.ZIP_STORED, change=lambda pickled: pickled):
    """An archive part by part, its pickle changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for part in old.namelist():
            content = old.read(part)
            new.writestr(part, change(content) if part.endswith("data.pkl") else content)


def damaged_files():
    state = small_mar().state_dict()

    def changed(**tensors):
        return lambda path: torch.save({**state, **tensors}, path)

    def missing(path):
        torch.save({name: t for name, t in state.items() if name != "mask_token"}, path)

    def truncated(path):
        (in_safetensors if path.suffix == ".safetensors" else torch.save)(state, path)
        path.write_bytes(path.read_bytes()[:5000])

    def legacy_truncated(path):
        legacy(state, path)
        path.write_bytes(path.read_bytes()[:-5000])

    def text(path):
        path.write_text("hello")

    def empty(path):
        path.write_bytes(b"")

    def a_list(path):
        torch.save([torch.zeros(1)], path)

    def numbered(path):
        torch.save({**state, 7: torch.zeros(1)}, path)

    def code(path):
        torch.save({"model": state, "hook": print}, path)

    def a_petabyte(path):
        torch.save({"model": state, "more": Calls(bytearray, (2**50,))}, path)

    def longer_than_its_part(path):
        torch.save({**state, "fake_latent": torch.zeros(1, 12345)}, path.with_name("whole.pth"))
        rewritten(path.with_name("whole.pth"), path, change=lambda p: p.replace(b"M90", b"J" + struct.pack("<i", 2**31 - 1)))

    def legacy_of_petabytes(path):
        legacy({"a": torch.zeros(12345)}, path)
        path.write_bytes(path.read_bytes().replace(b"M90", b"\x8a\x07" + (2**50).to_bytes(7, "little")))

    def header(length=None, **tensors):
        def write(path):
            text = json.dumps(tensors).encode()
            path.write_bytes(struct.pack("<Q", length or len(text)) + text + bytes(8))

        return write

    def without_data(path):
        torch.save({name: t.to("meta") for name, t in state.items()}, path)

    unreadable = "cannot be read as a checkpoint"
    strange = "expected a dense tensor with data, got another kind"
    return {
        "missing": (missing, ".pth", r"keys do not match: missing 1 \(mask_token\)"),
        "unexpected": (changed(more=torch.zeros(1)), ".pth", r"keys do not match: unexpected 1 \(more\)"),
        "misshapen": (changed(fake_latent=torch.zeros(1, 31)), ".pth", r"fake_latent: expected shape \[1, 32\], got \[1, 31\]"),
        "a terabyte": (
            changed(fake_latent=torch.zeros(()).expand(2**20, 2**18)),
            ".pth",
            r"fake_latent: expected shape \[1, 32\], got \[1048576, 262144\]",
        ),
        "int8": (changed(fake_latent=torch.ones(1, 32).char()), ".pth", r"fake_latent: expected torch.float.* got torch.int8"),
        "complex": (
            changed(fake_latent=torch.ones(1, 32) * 1j),
            ".pth",
            "fake_latent: expected torch.float.* got torch.complex64",
        ),
        "sparse": (changed(fake_latent=torch.ones(1, 32).to_sparse()), ".pth", f"fake_latent: {strange}"),
        "without data": (without_data, ".pth", f"class_emb.weight: {strange}|fake_latent: {strange}"),
        "numbered": (numbered, ".pth", "expected tensors by name, got one by 7"),
        "a list": (a_list, ".pth", "expected a state dict, or a checkpoint with 'model' or 'model_ema', got list"),
        "truncated": (truncated, ".pth", unreadable),
        "truncated, legacy": (legacy_truncated, ".pth", unreadable),
        "truncated, safetensors": (truncated, ".safetensors", unreadable),
        "text": (text, ".pth", unreadable),
        "text, safetensors": (text, ".safetensors", unreadable),
        "empty": (empty, ".pth", unreadable),
        "empty, safetensors": (empty, ".safetensors", unreadable),
        "code": (code, ".pth", "cannot be read as a checkpoint: Unsupported global: GLOBAL .*print was not an allowed global"),
        "a petabyte": (a_petabyte, ".pth", unreadable),
        "longer than its part": (longer_than_its_part, ".pth", unreadable),
        "petabytes, legacy": (legacy_of_petabytes, ".pth", unreadable),
        "long header": (header(length=2**60), ".safetensors", unreadable),
        "petabytes": (header(a={"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}), ".safetensors", unreadable),
        "overflow": (header(a={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}), ".safetensors", unreadable),
    }


@pytest.fixture(params=damaged_files())
def damaged(request, tmp_path):
    """(path, message)"""
    damage, suffix, message = damaged_files()[request.param]
    path = tmp_path / f"damaged{suffix}"
    damage(path)
    return path, message


def test_damaged_checkpoints_change_nothing(damaged):
    path, message = damaged
    target = small_mar(2)
    before = {name: t.clone() for name, t in target.state_dict().items()}
    for load in (lambda: load_checkpoint(target, path), lambda: build_small(path)):
        with pytest.raises(ValueError, match=message) as raised:
            load()
        assert str(raised.value).startswith(str(path))
    assert equal(target, before)


@either_way
def test_a_map_of_compressed_parts_would_be_garbage(tmp_path, load):
    """Where there are bytes enough in the file, PyTorch maps them without a word."""
    torch.save(small_mar().state_dict(), tmp_path / "whole.pth")
    path = tmp_path / "compressed.pth"
    rewritten(tmp_path / "whole.pth", path, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("whole/padding", bytes(path.stat().st_size))
    assert not equal(small_mar(), torch.load(path, weights_only=True, mmap=True))
    with pytest.raises(ValueError, match="is compressed, which"):
        load(path)


# Building -------------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A parameter that is not trained, and a buffer of whole numbers."""

    unused_keys = ("vae.", "llm.lm_head.")

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3, 5))
        self.b = nn.Parameter(torch.zeros(3, 5), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


PAIR = {"a": torch.arange(15.0).view(3, 5), "b": torch.full((3, 5), 1 / 3), "count": torch.tensor(2**40)}


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, stored, dtype):
    state = {name: t.to(stored) if t.is_floating_point() else t for name, t in PAIR.items()}
    state["b"] = torch.full((3, 5), 1 + 2**-8 + 2**-30, dtype=torch.float64).to(stored)  # to bfloat16, 1 by way of float32
    torch.save(state, tmp_path / "pair.pth")
    built = build(Pair, tmp_path / "pair.pth", dtype=dtype)
    loaded = Pair()
    load_checkpoint(loaded, tmp_path / "pair.pth")
    assert equal(built, loaded.to(dtype).state_dict())
    assert (built.a.dtype, built.b.dtype, built.count.dtype) == (dtype, dtype, torch.int64)
    assert (built.a.requires_grad, built.b.requires_grad) == (True, False)
    assert isinstance(built.a, nn.Parameter) and isinstance(built.b, nn.Parameter)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_built_model_needs_the_file_no_longer(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else in_safetensors)(PAIR, path)
    built, content = build(Pair, path), path.read_bytes()
    with torch.no_grad():
        built.a += 1
    assert path.read_bytes() == content
    with path.open("r+b") as file:
        file.write(bytes(len(content)))
    path.unlink()
    assert equal(built, PAIR | {"a": PAIR["a"] + 1})


def test_parameters_that_share_storage_in_the_file_do_not_in_the_model(tmp_path):
    """Nor are they laid out as they are there."""
    shared = torch.arange(15.0).view(5, 3)
    torch.save({"a": shared.t(), "b": shared.t(), "count": torch.tensor(0)}, tmp_path / "tied.pth")
    built = build(Pair, tmp_path / "tied.pth")
    assert torch.equal(built.a, shared.t()) and built.a.is_contiguous()
    with torch.no_grad():
        built.a.zero_()
    assert torch.equal(built.b, shared.t())


@either_way
def test_unused_keys_and_no_others(tmp_path, load):
    path, more = tmp_path / "more.pth", {"vae.encoder.weight": torch.zeros(9), "llm.lm_head.weight": torch.zeros(0)}

    def loaded(state):
        torch.save(state, path)
        if load is build_small:
            return build(Pair, path)
        load_checkpoint(model := Pair(), path)
        return model

    assert equal(loaded(PAIR | more), PAIR)
    for other in ("vae", "my.vae.weight", "llm.lm_heads.weight"):
        with pytest.raises(ValueError, match=rf"keys do not match: unexpected 1 \({other}\)"):
            loaded(PAIR | more | {other: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"keys do not match: missing 1 \(a\)"):
        loaded({name: t for name, t in (PAIR | more).items() if name != "a"})


def test_models_that_cannot_be_built(tmp_path):
    torch.save(PAIR, tmp_path / "pair.pth")

    def with_a_constant():
        model = Pair()
        model.register_buffer("table", torch.arange(3.0), persistent=False)
        return model

    with pytest.raises(ValueError, match="make: expected constants that no checkpoint holds to be real, got meta tensors table"):
        build(with_a_constant, tmp_path / "pair.pth")
    with pytest.raises(ValueError, match=r"dtype: expected a floating point torch\.dtype of 16 bits or more, got torch\.int8"):
        build(Pair, tmp_path / "pair.pth", dtype=torch.int8)
    with pytest.raises(ValueError, match=r"pair\.pth: its model cannot be made: TypeError: .*unexpected keyword argument 'size'"):
        build(lambda: models.MAR(size=3), tmp_path / "pair.pth")
    with pytest.raises(ValueError, match=r"size: expected one of \['base', 'large', 'huge'\], got 'tiny'"):
        build(lambda: models.mar("tiny"), tmp_path / "pair.pth")


# Files that say how they are built ------------------------------------------------------------------------------------


def save_own(path, model="mar", **changes):
    save_checkpoint(path, small_mar().state_dict(), model, SMALL | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_depth": 10**5},
        {"diffloss_d": 10**5},
        {"img_size": 10**9},
        {"class_num": 10**9},
        {"diffloss_w": 10**6},
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_a_file_that_describes_far_more_than_it_holds(tmp_path, changes):
    path = tmp_path / "own.safetensors"
    save_own(path, **changes)
    message = r"^.*own\.safetensors: describes a model of more than 10 times the 68 tensors that it holds"
    with pytest.raises(ValueError, match=message):
        build(lambda: models.mar(**read_config(path)[1]), path)
    with pytest.raises(ValueError, match=message):
        identify(path)
    nn.Linear(1000, 1000)  # nothing is watched any longer


def test_what_other_threads_make_meanwhile_does_not_count(tmp_path):
    path = tmp_path / "own.safetensors"
    save_own(path)

    def make():
        thread = threading.Thread(target=nn.Linear, args=(1000, 1000))
        thread.start()
        thread.join()
        return small()

    assert equal(build(make, path), small_mar().state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "its model cannot be made: TypeError: .*unexpected keyword argument 'heads'"),
        ({"encoder_embed_dim": -32}, "its model cannot be made: encoder_embed_dim: expected a whole number from 1 to .* got -32"),
        ({"patch_size": 0}, "its model cannot be made: patch_size: expected a whole number from 1 to .* got 0"),
        ({"diffloss_d": 10**5, "diffloss_w": 0}, "its model cannot be made: diffloss_w: expected a whole number from 1"),
        ({"class_num": 10**12}, "its model cannot be made: class_num: expected a whole number from 1 to .* got 1000000000000"),
    ],
)
def test_a_file_that_describes_no_model(tmp_path, changes, message):
    path = tmp_path / "own.safetensors"
    save_own(path, **changes)
    with pytest.raises(ValueError, match=rf"own\.safetensors: {message}"):
        identify(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "its constructor arguments cannot be read"),
        ("[" * 100_000, "its constructor arguments cannot be read"),
        ("[1]", r"expected constructor arguments by name, got \[1\]"),
    ],
)
def test_a_description_that_cannot_be_read(tmp_path, config, message):
    path = tmp_path / "own.safetensors"
    safetensors.torch.save_file(PAIR, path, {"model": "mar", "config": config})
    with pytest.raises(ValueError, match=rf"own\.safetensors: {message}"):
        read_config(path)


def test_identify_ones_own(tmp_path):
    path = tmp_path / "own.safetensors"
    save_own(path)
    found, model = identify(path), small_mar()
    assert (found.system, found.size, found.differences, found.has_ema) == ("mar", OWN, 0, False)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.head == model.head.spec
    save_own(path, encoder_depth=2, class_num=11)
    found = identify(path)
    assert len(found.missing) == 12 and all(name.startswith("encoder_blocks.1.") for name in found.missing)
    assert (found.unexpected, found.misshapen) == ([], {"class_emb.weight": ([11, 32], [10, 32])})


# What is said of a file -----------------------------------------------------------------------------------------------


def test_report_of_a_file_that_fits(tmp_path):
    path = tmp_path / "own.safetensors"
    save_own(path)
    found = identify(path)
    lines = report(found, rows=4).splitlines()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    why = backends.survey(found.head, torch.float32, device, 4)
    chosen = backends.choose("auto", found.head, torch.float32, device, 4)
    assert lines == [
        "system: mar",
        "size: its own, as it says itself",
        f"parameters: {found.parameters:,}",
        "dtype: float32 (68 tensors)",
        "model_ema: no",
        "missing: none",
        "unexpected: none",
        "misshapen: none",
        "unused: none",
        f"head: {found.head}",
        f"backend: {chosen}, for 4 rows in float32 on {device}",
        *(f"  {name}: {reason or backends.BACKENDS[name].about(torch.float32)}" for name, reason in why.items()),
    ]
    assert why[chosen] is None and None not in [why[name] for name in list(why)[: list(why).index(chosen)]]


def test_report_of_a_file_that_does_not(tmp_path):
    path = tmp_path / "other.pth"
    state = small_mar().half().state_dict()
    torch.save({"model": {}, "model_ema": {("mask" if name == "mask_token" else name): t for name, t in state.items()}}, path)
    lines = dict(line.split(": ", 1) for line in report(identify(path)).splitlines())
    assert lines["size"] == "base comes nearest"
    assert lines["dtype"] == "float16 (68 tensors)"
    assert lines["model_ema"] == "yes"
    assert lines["unexpected"] == "1 (mask)"
    assert lines["missing"].startswith("297 (mask_token, encoder_blocks.1.norm1.weight, ")
    assert "fake_latent: [1, 32] where [1, 768] is expected" in lines["misshapen"]
    assert "backend" not in lines
    assert identify(path, ema=False).system is None


def test_report_of_something_else():
    lines = report(identify(DEMO_WEIGHTS / "classifier_fashion_mnist.safetensors")).splitlines()
    assert lines[0] == "system: none; it is what calls itself 'classifier'"
    assert lines[-1] == "model_ema: no"
