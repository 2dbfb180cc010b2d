"""Checkpoints of one's own size: names and shapes tell how they are built, and what they do not tell is asked for."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from test_generate import LLM, SMALL, TOKENIZER, asked, published, random
from test_published import MILLIONS, on_meta
from test_published import published as published_shapes

from disa_fast.cli import main
from disa_fast.demo.captions import VOCABULARY
from disa_fast.generate import sample_numbered
from disa_fast.identify import identify, report
from disa_fast.infer import Given, NotToldError, infer, published_size
from disa_fast.systems import CUSTOM, SYSTEMS, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

every_system = pytest.mark.parametrize("system", SYSTEMS)
HEADS = {"mar": (2, 2), "harmon": (2, 2), "flowar": None, "xar": None}
CONSTANTS = {"rope_theta": 5e5, "rms_norm_eps": 1e-5}
CONFIG = LLM | CONSTANTS | {"_name_or_path": "some", "architectures": ["Qwen2ForCausalLM"]}

# Sizes that differ from each other wherever they can.
ODD = {
    "mar": {"img_size": 96, "encoder_embed_dim": 24, "encoder_depth": 2, "encoder_num_heads": 3, "decoder_embed_dim": 40,
            "decoder_depth": 3, "decoder_num_heads": 5, "mlp_ratio": 2.5, "class_num": 7, "buffer_size": 9, "diffloss_d": 1,
            "diffloss_w": 16},
    "flowar": {"img_size": 96, "encoder_embed_dim": 48, "encoder_depth": 2, "encoder_num_heads": 3, "decoder_embed_dim": 48,
               "decoder_depth": 3, "decoder_num_heads": 3, "mlp_ratio": 3.3, "class_num": 7, "scale": [1, 2, 6], "diffloss_d": 2,
               "diffloss_w": 128, "cross": False},
    "xar": {"img_size": 96, "encoder_embed_dim": 48, "encoder_depth": 2, "encoder_num_heads": 3, "decoder_embed_dim": 48,
            "decoder_depth": 1, "decoder_num_heads": 3, "mlp_ratio": 1.7, "class_num": 7, "clusters": 9},
}  # fmt: skip
ODD["harmon"] = ODD["mar"] | {"llm": LLM | {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4}}


def made(system, **sizes):
    return random(lambda: SYSTEMS[system].make(**sizes), seed=0)


def saved(folder, system, **sizes):
    """A bare state dict, with the tokenizer and the language model's description that lie beside a Harmon."""
    path, model = folder / f"{system}.pth", made(system, **sizes)
    torch.save(model.state_dict(), path)
    if system == "harmon":
        TOKENIZER.save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps(CONFIG | sizes["llm"]))
    return path, model


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(("system", "size"), MILLIONS)
def test_published_sizes_are_told(system, size):
    inferred = infer(system, on_meta(published_shapes(system, size)))
    assert published_size(system, inferred, SYSTEMS[system].sizes) == size
    assert not inferred.open


@every_system
@pytest.mark.parametrize("sizes", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.parametrize("patch", [1, 2])
def test_sizes_are_told(tmp_path, system, sizes, patch):
    """The very arguments, but for those that no shape depends on; and a model of just those names and shapes."""
    arguments = sizes[system] | {"patch_size": patch, "img_size": sizes[system]["img_size"] * patch}
    path, model = saved(tmp_path, system, **arguments)
    heads = (arguments["encoder_num_heads"], arguments["decoder_num_heads"])
    given = Given(heads if system in ("mar", "harmon") else None, patch, tmp_path / "config.json" if system == "harmon" else None)
    inferred = infer(system, model.state_dict(), given)
    assert not inferred.open
    for name, value in arguments.items():
        if name == "llm":
            assert {key: inferred.arguments[name][key] for key in value} == value
        elif name == "mlp_ratio":
            assert inferred.arguments[name] == pytest.approx(value, rel=0.1)
        elif name != "vae_stride":
            assert inferred.arguments[name] == value, name
    with torch.device("meta"):
        assert shapes(SYSTEMS[system].make(**inferred.arguments).state_dict()) == shapes(model.state_dict())
    assert published_size(system, inferred, SYSTEMS[system].sizes) is None
    found = identify(path, given=given)
    assert (found.system, found.size, found.differences) == (system, CUSTOM, 0)


@every_system
@pytest.mark.parametrize("size", [None, CUSTOM])
def test_custom_sizes_draw_what_the_model_draws(tmp_path, capsys, system, size):
    sizes = dict(ODD[system])
    if system == "harmon":
        sizes["llm"] = sizes["llm"] | CONSTANTS
    path, model = saved(tmp_path, system, **sizes)
    more = ["--size", CUSTOM] if size else []
    more += ["--num-heads", "3,5"] if HEADS[system] else []
    few = ["--num-iter", "2"] if HEADS[system] else []
    dtype = ["--dtype", "float32"] if system == "harmon" else []
    arguments = ["--system", system, "--checkpoint", str(path), "--schedule", "constant:2", "--num-images", "1", "--seed", "3"]
    arguments += [*asked(system, 4), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["generate", *arguments, *more, *few, *dtype]) == 0
    assert "taken for granted: patch_size=1, vae_embed_dim=16" in capsys.readouterr().err
    settings = dataclasses.replace(SYSTEMS[system].demo, schedule="constant:2", **({"num_iter": 2} if few else {}))
    subject = ["a photo of a coat"] if system == "harmon" else [4]
    expected = sample_numbered(model, subject, [0], settings, seed=3)[0]
    (file,) = (tmp_path / "out").glob("*.npy")
    assert np.array_equal(np.load(file), expected.numpy())


@pytest.mark.parametrize("system", ["mar", "harmon"])
def test_heads_that_no_published_width_tells_are_asked_for(tmp_path, capsys, system):
    path, _ = saved(tmp_path, system, **ODD[system])
    with pytest.raises(
        ValueError, match=r"size: .* is of a custom size .*encoder_num_heads=\?.*; to be given as well: --num-heads"
    ):
        load_model(path, system=system)
    assert main(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert "size: custom size: img_size=96, " in out and "encoder_num_heads=?, decoder_num_heads=?" in out
    assert "to be given:\n  --num-heads, since shapes do not tell it and no published model is 24 or 40 channels wide\n" in out
    assert main(["inspect", str(path), "--num-heads", "3,5"]) == 0
    assert "to be given" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"num_heads: expected divisors of the 24 and 40 channels, got \(5, 5\)"):
        load_model(path, system=system, num_heads=5)


def test_heads_of_a_published_width_are_said_to_be_taken():
    """Of the width alone, whatever the depth."""
    state = on_meta(published_shapes("mar", "large"))
    state = {name: tensor for name, tensor in state.items() if ".15." not in name}
    inferred = infer("mar", state)
    assert (inferred.arguments["encoder_num_heads"], inferred.arguments["encoder_depth"]) == (16, 15)
    assert any(text.startswith("encoder_num_heads=16, decoder_num_heads=16: as published for 1024") for text in inferred.assumed)
    assert infer("mar", state, Given(8)).arguments["encoder_num_heads"] == 8


@pytest.mark.parametrize("system", ["flowar", "xar"])
def test_heads_that_rotary_frequencies_tell(tmp_path, system):
    path, _ = saved(tmp_path, system, **ODD[system])
    assert load_model(path, system=system, num_heads=3).seq_h == 6
    with pytest.raises(ValueError, match="num_heads: expected 3, as the rotary frequencies have it, got"):
        load_model(path, system=system, num_heads=4)


@pytest.mark.parametrize("system", ["mar", "flowar", "xar"])
def test_patches_are_asked_for_where_no_published_model_has_such_tokens(tmp_path, system):
    path, _ = saved(tmp_path, system, **ODD[system] | {"patch_size": 2, "img_size": 192})
    heads = (3, 5) if system == "mar" else None
    with pytest.raises(
        ValueError, match=r"patch_size=\?, vae_embed_dim=\?.*--patch-size, since tokens of 64 numbers may be of any"
    ):
        load_model(path, system=system, num_heads=heads)
    loaded = load_model(path, system=system, num_heads=heads, patch_size=2)
    assert (loaded.patch_size, loaded.vae_embed_dim, loaded.seq_h) == (2, 16, 6)
    assert load_model(path, system=system, num_heads=heads, patch_size=4).vae_embed_dim == 4
    with pytest.raises(ValueError, match="patch_size: expected one whose square divides the 64 numbers of a token, got 3"):
        load_model(path, system=system, num_heads=heads, patch_size=3)


def test_a_language_model_is_asked_for(tmp_path):
    path, _ = saved(tmp_path, "harmon", **ODD["harmon"])
    config = tmp_path / "config.json"
    assert load_model(path, system="harmon", num_heads=(3, 5)).llm.model.config.num_attention_heads == 4
    for text, message in (
        (json.dumps({"hidden_size": 32}), "config.json: expected num_attention_heads, which shapes do not tell"),
        (
            json.dumps(CONFIG | {"num_hidden_layers": 9}),
            r"config.json: expected \{'num_hidden_layers': 2\}.* got \{'num_hidden_layers': 9\}",
        ),
        ("[1]", "cannot be read as the config.json"),
        ("{", "cannot be read as the config.json"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(path, system="harmon", num_heads=(3, 5))
    config.unlink()
    with pytest.raises(ValueError, match=r"num_attention_heads=\?.*a config\.json of the language model beside the checkpoint"):
        load_model(path, system="harmon", num_heads=(3, 5))


@every_system
def test_a_published_size_is_not_drawn_with_other_settings(tmp_path, monkeypatch, system):
    """Without a word: with no size, one that is published is asked for by name."""
    path, size, _ = published(tmp_path, system, monkeypatch)
    with pytest.raises(ValueError, match=f"got None; by its names and shapes it is {size}$"):
        load_model(path, system=system)
    assert load_model(path, CUSTOM, system=system).head.spec == load_model(path, size, system=system).head.spec


@every_system
def test_what_names_and_shapes_do_not_fit_is_no_custom_size(tmp_path, system):
    path, model = saved(tmp_path, system, **SMALL[system])
    state = model.state_dict()
    positions = "mar.diffusion_pos_embed_learned" if system == "harmon" else "encoder_pos_embed_learned"
    for change in (
        {"more": torch.zeros(1)},
        {positions: state[positions][:, :-1]},
        {next(name for name in state if name.endswith("mlp.fc2.weight")): torch.zeros(3, 4)},
    ):
        torch.save(state | change, path)
        with pytest.raises(ValueError, match=r"`disa-fast inspect .*\.pth` says what it is"):
            load_model(path, system=system, num_heads=HEADS[system])
        assert identify(path).size != CUSTOM
    with pytest.raises(NotToldError):
        infer(system, {})


def test_what_keeps_a_file_from_being_of_a_custom_size(tmp_path):
    path, model = saved(tmp_path, "mar", **SMALL["mar"])
    state = model.state_dict()
    state["mask"] = state.pop("mask_token")
    torch.save(state, path)
    text = report(identify(path))
    assert "size: base comes nearest\n" in text
    assert "custom size: it comes far nearer to img_size=64, " in text
    assert ", but for: missing 1 (mask_token); unexpected 1 (mask)" in text


@pytest.mark.parametrize("system", ["flowar", "xar"])
def test_parts_that_a_mask_does_not_tell(system):
    """What is no mask of scales or cells does not pass for one."""
    state = made(system, **ODD[system]).state_dict()
    assert infer(system, state).arguments.get("scale", 9) == ODD[system].get("scale", 9)
    state["mask"] = torch.zeros_like(state["mask"]).masked_fill(torch.rand_like(state["mask"]) < 0.5, -math.inf)
    if system == "flowar":
        with pytest.raises(NotToldError, match="expected 341 positions"):
            infer(system, state)
    else:
        assert infer(system, state).arguments["clusters"] == 4


def test_a_file_that_says_itself_how_it_is_built_takes_no_sizes(tmp_path):
    with pytest.raises(ValueError, match=r"num_heads, patch_size: .* says itself how it is built"):
        load_model(num_heads=2)
    for wrong in (0, "2", (1, 2, 3)):
        with pytest.raises(ValueError, match="num_heads: expected"):
            Given(wrong)


def test_a_few_bytes_do_not_pass_for_terabytes(tmp_path):
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in made("mar", **SMALL["mar"]).state_dict().items()}
    state["class_emb.weight"] = torch.zeros(()).expand(2**30, 32)
    torch.save(state, tmp_path / "hollow.pth")
    with pytest.raises(ValueError, match=r"hollow\.pth: holds tensors of 137\d* bytes, as it says, in a file of"):
        load_model(tmp_path / "hollow.pth", num_heads=2)


@pytest.mark.parametrize(("system", "size"), [("mar", "base"), ("xar", "base")])
def test_the_demo_of_a_published_checkpoint_asks_for_nothing_that_it_does_not_take(tmp_path, capsys, system, size):
    path = tmp_path / "published.pth"
    torch.save({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in published_shapes(system, size).items()}, path)
    assert main(["demo", "--system", system, "--checkpoint", str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "--checkpoint: the demo needs a model of 28x28 grey images" in told and "size" not in told.replace(str(path), "")


@every_system
def test_the_demo_of_a_foreign_checkpoint(tmp_path, capsys, system):
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.pth")
    assert main(["demo", "--system", system, "--checkpoint", str(tmp_path / "foreign.pth"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert (
        f"--checkpoint: {tmp_path / 'foreign.pth'} does not say how it is built, and its names and shapes are of no {system}"
        in told
    )
    assert "`disa-fast inspect" in told and "--size" not in told
