"""Fingerprints of weights, and what is said of NaN and inf in them."""

import pytest
import torch
from upstream_like import SMALL, small_mar

from disa_fast import contents
from disa_fast.checkpoint import build, load_checkpoint, save_checkpoint
from disa_fast.cli import main
from disa_fast.contents import fingerprint, not_finite
from disa_fast.identify import identify
from disa_fast.models import MAR
from disa_fast.systems import SYSTEMS, load_model

LARGE = 3 * contents.WHOLE // 4 + 1  # float32 numbers, more bytes than what is hashed as it is


def weights():
    generator = torch.Generator().manual_seed(0)
    state = {"small": torch.randn(5, 3, generator=generator), "large": torch.randn(LARGE, generator=generator)}
    state |= {"scalar": torch.tensor(3), "half": torch.randn(7, generator=generator).half(), "none": torch.zeros(0)}
    return state | {"bfloat16": torch.randn(2 * LARGE, generator=generator).bfloat16()}


def test_equal_weights_have_equal_fingerprints():
    state = weights()
    assert fingerprint(state) == fingerprint(dict(reversed(weights().items())))
    assert fingerprint(state | {"small": state["small"].t().contiguous().t()}) == fingerprint(state)
    assert len(fingerprint(state)) == 64


def test_a_change_of_one_number_shows():
    """Wherever it is, and of one bit."""
    whole = fingerprint(weights())
    for name in ("small", "large", "half", "bfloat16", "scalar"):
        count = weights()[name].numel()
        for at in {0, count // 3, count // 2, count - 2, count - 1} if count > 1 else {0}:
            for bit in (0, weights()[name].element_size() * 8 - 1):
                state = weights()
                number = state[name].reshape(-1)[at : at + 1].view(torch.uint8)
                number[bit // 8] ^= 1 << bit % 8
                assert fingerprint(state) != whole, (name, at, bit)


def test_other_changes_show():
    state, whole = weights(), fingerprint(weights())
    large = state["large"].clone()
    large[[10, 4000]] = large[[4000, 10]]  # of one place for another
    changes = [
        {"large": large},
        {"large": state["large"].flip(0)},
        {"small": state["small"].reshape(3, 5)},
        {"small": state["small"].view(torch.int32)},
        {"none": torch.zeros(0, 2)},
        {"more": torch.zeros(1)},
    ]
    assert len({whole, *(fingerprint(state | change) for change in changes)}) == 1 + len(changes)
    swapped = state | {"small": torch.zeros(5, 3), "other": state["small"]}
    assert fingerprint(swapped) != fingerprint(state | {"other": torch.zeros(5, 3)})


# NaN and inf ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e5m2])
def test_nan_and_inf_are_counted(monkeypatch, dtype):
    monkeypatch.setattr(contents, "PIECE", 7)
    state = {"good": torch.ones(4, 5), "bad": torch.ones(10, 10), "whole": torch.tensor(3), "empty": torch.zeros(0)}
    state["bad"][3, 3], state["bad"][9, 9], state["bad"][0, 0] = torch.nan, torch.inf, -torch.inf
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    assert not_finite(state) == {"bad": (1, 2)}
    assert not_finite({"bad": state["bad"].t(), "part": state["bad"][2:5, 2:5], "row": state["bad"][3, ::2]}) == {
        "bad": (1, 2),
        "part": (1, 0),
    }


def test_memory_that_is_shared_counts_once():
    """A file of a few bytes may tell of tensors that no time is enough for."""
    assert not_finite({"a": torch.tensor(torch.nan).expand(2**25, 2**25)}) == {"a": (1, 0)}
    overlapping = torch.zeros(100).as_strided((50, 50), (1, 1))
    overlapping[49, 49] = torch.inf
    assert not_finite({"a": overlapping}) == {"a": (0, 1)}


@pytest.mark.parametrize("system", SYSTEMS)
def test_shipped_models_are_finite(system):
    """Nor is inf in FlowAR's and xAR's masks a fault: warnings are errors here."""
    assert not not_finite(load_model(system=system).state_dict())


def spoiled():
    state = small_mar().state_dict()
    state["z_proj.weight"][1, 2] = torch.nan
    state["decoder_norm.bias"][:3] = torch.inf
    return state


def test_inspect_tells_them(tmp_path, capsys):
    path = tmp_path / "bad.safetensors"
    save_checkpoint(path, spoiled(), "mar", SMALL)
    assert identify(path).not_finite == {"z_proj.weight": (1, 0), "decoder_norm.bias": (0, 3)}
    assert main(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert "NaN or inf: in 2 tensors: decoder_norm.bias (3 inf), z_proj.weight (1 NaN)\n" in out
    assert "missing: none\n" in out


@pytest.mark.parametrize("load", ["load_checkpoint", "build", "load_model", "generate"])
@pytest.mark.filterwarnings("ignore:the tokens of AR step:UserWarning")
def test_loading_warns_once(tmp_path, load):
    path = tmp_path / "bad.safetensors"
    save_checkpoint(path, spoiled(), "mar", SMALL)
    with pytest.warns(UserWarning, match=r"bad\.safetensors: 2 of 68 tensors hold NaN or inf in float32: ") as caught:
        if load == "load_checkpoint":
            load_checkpoint(MAR(**SMALL), path)
        elif load == "build":
            build(lambda: MAR(**SMALL), path)
        elif load == "load_model":
            load_model(path)
        else:
            few = ["--num-iter", "1", "--schedule", "constant:1", "--num-images", "1", "--quiet"]
            main(["generate", "--checkpoint", str(path), "--out", str(tmp_path / "out"), *few])
    ours = [warning for warning in caught if "tensors hold NaN or inf" in str(warning.message)]
    assert len(ours) == 1
    assert "z_proj.weight (1 NaN)" in str(ours[0].message) and "decoder_norm.bias (3 inf)" in str(ours[0].message)


def test_an_overflow_in_float16_is_told_as_such(tmp_path):
    path, state = tmp_path / "large.safetensors", small_mar().state_dict()
    state["z_proj.weight"][0, 0] = 1e6
    save_checkpoint(path, state, "mar", SMALL)
    load_model(path)
    with pytest.warns(UserWarning, match=r"1 of 68 tensors hold NaN or inf in float16: z_proj\.weight \(1 inf\)"):
        load_model(path, dtype=torch.float16)
