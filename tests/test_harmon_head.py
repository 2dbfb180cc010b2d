"""Harmon's diffusion head alone, as recorded: float32, and bfloat16 weights under draws, state and coefficients of float32."""

import pytest
import torch
from compare import assert_as_good_as, assert_close
from recorded import GOLDEN, golden

from disa_fast import Linear, MLPHead, solvers
from disa_fast.heads.mlp import forward_ref

HEAD = "mar.diffloss.net."
SETS = pytest.mark.parametrize("which", GOLDEN)
SAMPLES = pytest.mark.parametrize(
    ("which", "case"),
    [
        pytest.param(which, case, id=f"{which}-{case['name']}")
        for which in GOLDEN
        for case in golden(which, "harmon_e2e").meta["head"]["cases"]
    ],
)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "hoisted", pytest.param("cpu", marks=pytest.mark.native)])


def state_dict(which, dtype):
    """The recorded head rounded to `dtype`."""
    weights = golden(which, "harmon_e2e").state_dict(dtype)
    return {name.removeprefix(HEAD): tensor for name, tensor in weights.items() if name.startswith(HEAD)}


def in_float64(which):
    """The bfloat16 head without rounding of its own."""
    return {name: tensor.double() for name, tensor in state_dict(which, torch.bfloat16).items()}


def sample(weights, z, which, case, backend):
    """The rows that matter of what the head draws with the recorded noise."""
    recorded, name = golden(which, "harmon_e2e"), f"head/{case['name']}"
    guided = case["cfg"] != 1.0
    table = solvers.ddpm(Linear(case["upper"], case["lower"])(case["step"], case["ar_num_iter"]))
    assert len(table) == case["effective"]
    state = torch.promote_types(z.dtype, torch.float32)
    out = MLPHead.from_state_dict(weights).denoise(
        z,
        table,
        cfg=torch.tensor([case["cfg"]]) if case["cfg_is_tensor"] else case["cfg"],
        temperature=case["temperature"],
        noise=recorded[f"{name}/init_noise"].to(state),
        step_noise=recorded[f"{name}/step_noise"].to(state),
        backend=backend,
    )
    assert out.dtype == state
    return out[: len(z) // 2] if guided else out


@SETS
def test_network_as_recorded(which):
    recorded = golden(which, "harmon_e2e")
    x, t, z = (recorded[f"head/{name}"] for name in "xtz")
    assert_close(forward_ref(state_dict(which, torch.float32), x, t, z), recorded["head/eval_f32"], worst=1e-5)
    out = forward_ref(state_dict(which, torch.bfloat16), x.bfloat16(), t, z.bfloat16())
    truth = forward_ref(in_float64(which), x.bfloat16().double(), t, z.bfloat16().double())
    assert_as_good_as(out, recorded["head/eval_bf16"], truth, torch.bfloat16)


@SAMPLES
@BACKENDS
def test_float32_as_recorded(which, case, backend):
    recorded = golden(which, "harmon_e2e")
    out = sample(state_dict(which, torch.float32), recorded["head/z"], which, case, backend)
    expected = recorded[f"head/{case['name']}/out_f32"][: len(out)]
    assert_close(out, expected, worst=1e-5 * float(expected.abs().max()))


@SAMPLES
@BACKENDS
def test_bfloat16_is_as_good_as_recorded(which, case, backend):
    """Not the same: guided outputs are combined in float32 whatever the scale is, where upstream has bfloat16 for a float."""
    z = golden(which, "harmon_e2e")["head/z"].bfloat16()
    out = sample(state_dict(which, torch.bfloat16), z, which, case, backend)
    truth = sample(in_float64(which), z.double(), which, case, "reference")
    eager = golden(which, "harmon_e2e")[f"head/{case['name']}/out_bf16w"][: len(out)]
    assert_as_good_as(out, eager, truth, torch.bfloat16)
