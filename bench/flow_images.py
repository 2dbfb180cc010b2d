"""Whole images by FlowAR and xAR at their published sizes, with random weights: upstream's structure in eager PyTorch
(flow_peers.py), the same compiled, and this package; over one set of weights, from one seed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from disa_fast.models import XAR, FlowAR, flowar, xar

if __package__:  # of gpu_report; pytest has this folder on its path, and here no package
    from .flow_peers import UpstreamFlowAR, UpstreamXAR, flowar_huge, flowar_large, flowar_small, xar_base, xar_huge, xar_large
else:
    from flow_peers import UpstreamFlowAR, UpstreamXAR, flowar_huge, flowar_large, flowar_small, xar_base, xar_huge, xar_large

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Setting:
    """Of the DiSA repository's README, but for the guidance interval, which is a constant in xAR's code."""

    upstream: Callable[[], UpstreamFlowAR | UpstreamXAR]
    native: Callable[[str], FlowAR | XAR]
    size: str
    steps: tuple[int, int]
    cfg: float
    guidance: tuple[float, float]


SETTINGS = {
    "FlowAR-S": Setting(flowar_small, flowar, "small", (25, 15), 4.2, (0.0, 0.9)),
    "FlowAR-L": Setting(flowar_large, flowar, "large", (25, 15), 2.4, (0.0, 0.9)),
    "FlowAR-H": Setting(flowar_huge, flowar, "huge", (50, 15), 2.4, (0.0, 0.7)),
    "xAR-B": Setting(xar_base, xar, "base", (50, 15), 2.7, (0.0, 1.0)),
    "xAR-L": Setting(xar_large, xar, "large", (50, 15), 2.3, (0.0, 1.0)),
    "xAR-H": Setting(xar_huge, xar, "huge", (50, 15), 2.2, (0.0, 1.0)),
}


class Images:
    """The two models of one published size over the same random weights, and what draws `batch` images with them."""

    def __init__(self, name: str, device: torch.device, batch: int, steps: tuple[int, int] | None = None) -> None:
        self.setting, self.device = SETTINGS[name], device
        self.steps = steps or self.setting.steps
        torch.manual_seed(0)
        with device:
            self.upstream = self.setting.upstream().eval().requires_grad_(False)
        for parameter in self.upstream.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
        with torch.device("meta"):
            self.native = self.setting.native(self.setting.size).eval().requires_grad_(False)
        self.native.load_state_dict(self.upstream.state_dict(), assign=True)
        self.labels = torch.arange(batch, device=device) * 97 % 1000

    def eager(self) -> Tensor:
        """Upstream's structure, whose parts may be compiled."""
        torch.manual_seed(1)
        early, late = self.steps
        told = {"flow_upper_steps": early, "flow_lower_steps": late, "cfg": self.setting.cfg}
        if isinstance(self.upstream, UpstreamFlowAR):
            return self.upstream.sample_tokens(**told, guidance=self.setting.guidance[1], labels=self.labels)
        return self.upstream.sample_tokens(**told, label=self.labels)

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """As upstream's scripts call it, but for the half precision's kind."""
        with torch.autocast(self.device.type, dtype):
            return self.eager()

    def compiled(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`call` with the network of every evaluation compiled: FlowAR's flow network, xAR's blocks."""
        upstream = self.upstream
        parts = [upstream.flownet] if isinstance(upstream, UpstreamFlowAR) else [*upstream.encoder_blocks, *upstream.decoder_blocks]
        for part in parts:
            part.compile(dynamic=False)
        made = [part._compiled_call_impl for part in parts]

        def run() -> Tensor:
            for part, implementation in zip(parts, made, strict=True):
                part._compiled_call_impl = implementation
            try:
                return call()
            finally:
                for part in parts:
                    part._compiled_call_impl = None

        for part in parts:
            part._compiled_call_impl = None
        return run

    def ours(self, backend: str = "auto", dtype: torch.dtype = torch.float32, draw: Draw | None = None) -> Callable[[], Tensor]:
        """This package's model. In float32 it shares upstream's weights."""
        model = self.native
        if dtype != torch.float32:
            with torch.device("meta"):
                model = self.setting.native(self.setting.size).eval().requires_grad_(False)
            model.load_state_dict({name: p.to(dtype) for name, p in self.native.state_dict().items()}, assign=True)

        def run() -> Tensor:
            torch.manual_seed(1)
            return model.sample_tokens(
                self.labels, "linear:{}-{}".format(*self.steps), self.setting.cfg, self.setting.guidance, draw=draw, backend=backend
            )

        run.head = model.head  # which knows its graphs
        return run

    def shares(self, **how: object) -> list[float]:
        """Of the time of an image: each scale's or cell's, from the draw of its noise to the next one's."""
        marks = []

        def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if dtype == torch.float32:  # a start, not a step's noise
                self._settle()
                marks.append(time.perf_counter())
            return torch.randn(shape, dtype=dtype)

        run = self.ours(**how, draw=draw)
        run()
        marks.clear()
        run()
        self._settle()
        marks.append(time.perf_counter())
        return [(b - a) / (marks[-1] - marks[0]) for a, b in itertools.pairwise(marks)]

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
