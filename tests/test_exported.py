"""The peers that run an exported network draw what the reference backend does; tests of one that is not installed are skipped."""

import sys

import exported
import pytest
import torch
from compare import assert_close
from random_parameters import random_parameters

from disa_fast import FlowTransformerHead, MLPHead, solvers
from disa_fast.heads.flow_transformer import FlowTransformerSpec
from disa_fast.heads.mlp import MLPSpec

pytestmark = pytest.mark.usefixtures("one_thread")
PEERS = ["onnxruntime", "openvino"]
HEADS = {
    "MLP": ((), MLPHead, MLPSpec(16, 64, 1, 32)),
    "flow": ((4,), FlowTransformerHead, FlowTransformerSpec(16, 64, 1, 32, cross=True)),
}


def calls_of(kind, rows):
    """(head, tokens of a row, arguments of a guided call of three steps)"""
    tokens, head, spec = HEADS[kind]
    table = solvers.flow_euler(3, "uniform") if tokens else solvers.ddpm(3)
    call = {"z": torch.randn(rows, *tokens, 32), "table": table, "cfg": 3.0, "noise": torch.randn(rows // 2, *tokens, 16)}
    if not tokens:
        call["step_noise"] = torch.randn(3, rows // 2, 16)
    return head.from_state_dict(random_parameters(spec, seed=0)), tokens, call


@pytest.fixture(scope="module", params=HEADS)
def exported_head(request, one_thread, tmp_path_factory):
    """(which head, its network by each peer)"""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    head, tokens, _ = calls_of(request.param, 2)
    made, absent = exported.peers(head, tmp_path_factory.mktemp("exported"), tokens)
    assert all(reason.startswith("ModuleNotFoundError") for reason in absent.values()), absent
    return request.param, made


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("rows", [2, 6])
def test_the_published_loop_with_a_peers_network(exported_head, peer, rows):
    pytest.importorskip(peer)
    kind, made = exported_head
    head, _, call = calls_of(kind, rows)
    expected = head.denoise(**call, backend="reference")
    found = exported.with_network(head, made[peer]).denoise(**call, backend="reference")
    assert_close(found, expected, worst=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_itself_keeps_its_network(kind):
    head, tokens, call = calls_of(kind, 2)
    other = exported.with_network(head, lambda x, t, z: torch.full((*x.shape[:-1], 16 if tokens else 32), torch.nan))
    assert other.denoise(**call, backend="reference").isnan().all()
    assert head.denoise(**call, backend="reference").isfinite().all()


def test_peers_that_are_not_installed_are_absent_with_the_reason(monkeypatch, tmp_path):
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)
    made, absent = exported.load(tmp_path / "network.onnx")
    assert made == {}
    assert {name: reason.split(":")[0] for name, reason in absent.items()} == dict.fromkeys(PEERS, "ModuleNotFoundError")


def test_so_they_are_where_the_network_cannot_be_exported(monkeypatch, tmp_path):
    def export(*how, **more):
        raise RuntimeError("not to be exported")

    monkeypatch.setattr(torch.onnx, "export", export)
    head, tokens, _ = calls_of("MLP", 2)
    made, absent = exported.peers(head, tmp_path, tokens)
    assert made == {}
    assert absent == dict.fromkeys(PEERS, "RuntimeError: not to be exported")
