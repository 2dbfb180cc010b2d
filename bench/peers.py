"""The published loop on tensors alone, which is what others would compile, or capture in a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from disa_fast import MLPHead
from disa_fast.heads.mlp import forward_ref
from disa_fast.solvers import StepTable

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def published_step(head: MLPHead, z: Tensor, dtype: torch.dtype, cfg: float) -> Step:
    """(x, t, row of the table, noise) -> x: the network as the formulas read, guidance, and the update."""
    return _guided(head.network(dtype), z.to(dtype), dtype, cfg)


def autocast_step(head: MLPHead, z: Tensor, cfg: float) -> Step:
    """As published_step's, for torch.autocast around the loop: over float32 parameters of its own that ask for gradients, as a
    published checkpoint's do. Only then autocast keeps what it casts of them, and casts once a loop, not at every use."""
    parameters = {name: p.detach().float().requires_grad_() for name, p in head._net.named_parameters()}
    network = functools.partial(forward_ref, parameters)
    return _guided(network, z.float(), torch.float32, cfg)


def _guided(network: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, dtype: torch.dtype, cfg: float) -> Step:
    def step(x: Tensor, t: Tensor, row: Tensor, noise: Tensor) -> Tensor:
        out = network(torch.cat([x, x]).to(dtype), t.expand(len(z)), z).float()
        eps, v = out.chunk(2, dim=-1)
        (eps, eps_u), v = eps.chunk(2), v[: len(x)]
        eps = eps_u + cfg * (eps - eps_u)
        return row[0] * x + row[1] * eps + row[5] * torch.exp((row[3] + row[4] * v) / 2) * noise

    return step


def published_loop(step: Step, table: StepTable, noise: Tensor, step_noise: Tensor) -> Callable[[], Tensor]:
    """All steps from `noise`, [n, channels]; step_noise: [T, n, channels]. For tables that need no output of the step before."""
    times = torch.tensor(table.t, device=noise.device)
    columns = [torch.tensor(getattr(table, name), dtype=torch.float32) for name in ("a", "b", "c", "l0", "l1", "noisy")]
    rows = torch.stack(columns, dim=1).to(noise.device)

    @torch.no_grad()
    def loop() -> Tensor:
        x = noise
        for i in range(len(times)):
            x = step(x, times[i], rows[i], step_noise[i])
        return x

    return loop


def captured(loop: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`loop` as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            loop()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = loop()

    def replay() -> Tensor:
        graph.replay()
        return out

    replay.loop = loop  # whose tensors the graph reads
    return replay
