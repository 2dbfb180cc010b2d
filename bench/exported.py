"""ONNX Runtime and OpenVINO running a head's network as exported by torch.onnx: what a CPU user would pick instead of this package.

The denoising loop around the network stays the published one, in PyTorch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from disa_fast import FlowTransformerHead, MLPHead

Head = MLPHead | FlowTransformerHead
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def network_of(head: Head) -> Network:
    """The head's published network in float32, (x, t, z) -> output, for heads of both kinds; t: [rows]."""
    network = head.network(torch.float32)
    return network if isinstance(head, MLPHead) else lambda x, t, z: network(x, t, 0, z)


def with_network(head: Head, network: Network) -> Head:
    """A head over the same parameters whose network, which backend "reference" calls at every step, is `network`."""
    other = copy.copy(head)
    called = network if isinstance(head, MLPHead) else lambda x, t, at, z: network(x, t, z)
    other.network = lambda dtype: called
    return other


def peers(head: Head, folder: Path, tokens: tuple[int, ...] = ()) -> tuple[dict[str, Network], dict[str, str]]:
    """({peer: the head's network by it}, {peer: why it is not among them}), on as many threads as PyTorch has.

    folder: where the exported network is to lie, and to stay while they are in use. tokens: as in `export`.
    """
    path = folder / "network.onnx"
    try:
        export(head, path, tokens)
    except Exception as error:
        return {}, dict.fromkeys(PEERS, _reason(error))
    return load(path)


def load(path: Path) -> tuple[dict[str, Network], dict[str, str]]:
    """What `peers` returns, of a network that was exported to `path`."""
    made: dict[str, Network] = {}
    absent: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            made[name] = make(path, torch.get_num_threads())
        except Exception as error:  # each has its own kinds
            absent[name] = _reason(error)
    return made, absent


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class _Module(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return self.network(x, t, z)


def export(head: Head, path: Path, tokens: tuple[int, ...] = ()) -> None:
    """Write network_of(head) as ONNX, its weights in a file beside it. An error of torch.onnx's if it cannot, or has no onnxscript.

    tokens: of a row, () for an MLP head and (count,) for FlowAR's. Any number of rows from 2 on: with a fixed one OpenVINO is up to
    5 % faster, but 2026.4.1 then computes something else for FlowAR-S's 2 rows of 16 tokens.
    """
    x, z = (torch.zeros(2, *tokens, channels) for channels in (head.spec.in_channels, head.spec.z_channels))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program = torch.onnx.export(
            _Module(network_of(head)).eval(),
            (x, torch.zeros(2), z),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("rows", min=2)},) * 3,
            input_names=["x", "t", "z"],
            verbose=False,
        )
    program.save(path, external_data=True)


def onnxruntime_network(path: Path, threads: int) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls, when others have the cores
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def network(x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        (out,) = session.run(None, dict(zip("xtz", _arrays(x, t, z), strict=True)))
        return torch.from_numpy(out)

    return network


def openvino_network(path: Path, threads: int) -> Network:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it, for the time t too: useless (NOTES.md)
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def network(x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return torch.from_numpy(request.infer(_arrays(x, t, z), share_inputs=True)[0])

    return network


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.float().contiguous().numpy() for tensor in tensors]


PEERS = {"onnxruntime": onnxruntime_network, "openvino": openvino_network}
