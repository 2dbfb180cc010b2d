"""What a backend gives as its reason for not serving a call is the first thing that would have to change."""

import pytest
import torch

from disa_fast import backends
from disa_fast.heads.cell_transformer import CellTransformerSpec
from disa_fast.heads.flow_transformer import FlowTransformerSpec
from disa_fast.heads.mlp import MLPSpec

SPECS = [MLPSpec(16, 64, 1, 64), FlowTransformerSpec(16, 64, 1, 64, True), CellTransformerSpec(16, 64, 2, 16, 4)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "cuda", "mps", "xpu"]
HOME = {"cuda": ["cuda"], "triton": ["cuda"], "cpu": ["cpu"], "hoisted": DEVICES, "reference": DEVICES}


@pytest.fixture(params=[False, True], ids=["", "interpreted"])
def interpreted(request, monkeypatch):
    monkeypatch.setattr(backends.triton, "is_interpreted", lambda: request.param)
    return request.param


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_comes_first(monkeypatch, interpreted, installed, device, dtype):
    """Neither another dtype nor an installation helps where the device is another."""
    if not installed:
        monkeypatch.setattr(backends.cpu, "_C", None)
        monkeypatch.setattr(backends.cpu, "_IMPORT_ERROR", "none", raising=False)
        monkeypatch.setattr(backends.triton, "is_installed", lambda: False)
        monkeypatch.setattr(backends.triton, "_IMPORT_ERROR", "none", raising=False)
    for spec in SPECS:
        for name, reason in backends.survey(spec, dtype, torch.device(device), 8).items():
            served = HOME[name] + (["cpu"] if name == "triton" and interpreted else [])
            if not hasattr(backends.BACKENDS[name], spec.loop):
                assert reason == "serves MLP heads alone, not transformers"
            elif device not in served:
                kind = {"cuda": "NVIDIA GPUs", "triton": "GPUs", "cpu": "CPUs"}[name]
                assert reason.startswith(f"runs on {kind}, not on {device}")
                assert ("TRITON_INTERPRET=1" in reason) == (name == "triton" and device == "cpu")
            elif reason is not None:
                assert "not on" not in reason


def test_what_a_cpu_is_told(monkeypatch):
    monkeypatch.setattr(backends.triton, "is_interpreted", lambda: False)
    for dtype in DTYPES:
        why = backends.survey(SPECS[0], dtype, torch.device("cpu"), 8)
        assert why["cuda"] == "runs on NVIDIA GPUs, not on cpu"
        assert why["triton"] == "runs on GPUs, not on cpu (there only in Triton's interpreter: TRITON_INTERPRET=1)"
        assert why["hoisted"] is None and why["reference"] is None
        if backends.cpu.is_built():
            assert why["cpu"] == ("computes in float32, not in torch.float64" if dtype == torch.float64 else None)
