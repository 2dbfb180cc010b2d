"""A capture that records a Python function, in the place of a CUDA graph's, for heads on the CPU."""

import pytest
import torch

from disa_fast import MLPHead
from disa_fast.backends import triton
from disa_fast.graphs import Graphs, Replay
from disa_fast.heads import flow

OWN_BYTES = 1000  # of a recorded graph


class Recorder:
    """Runs the loop once, as CUDA's must, to warm it up, and keeps it."""

    own_bytes = OWN_BYTES

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, loop: Replay) -> tuple[Replay, int]:
        loop()
        self.captured += 1
        return loop, self.own_bytes


def recorded_graphs(head: MLPHead, dtype: torch.dtype = torch.float32) -> Graphs:
    """The graphs of `head` on the Triton backend from now on."""
    weights = head.packed("triton", dtype, triton.Weights)
    weights.graphs = Graphs(torch.device("cpu"), Recorder())
    return weights.graphs


def record_flow_graphs(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What captures for every flow head that is packed from now on; attributes of it may be changed."""
    recorder = Recorder()
    monkeypatch.setattr(flow, "Graphs", lambda device: Graphs(device, lambda loop: recorder(loop)))
    return recorder
