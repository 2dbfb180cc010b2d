"""FlowAR- and xAR-shaped objects: those with the parameter names of the published checkpoints and a `sample_tokens`.

Written against FlowAR_DiSA and xAR_DiSA (DiSA repository at 283fa59) and xAR (OliverRensu/xAR at 121e9c9). Shadowed is
`sample_tokens`: its calls go to a native model over the object's own parameters.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backends
from ..checks import check_shapes
from ..errors import UnsupportedError
from ..models.flowar import FlowAR
from ..models.xar import XAR
from ..schedule import Linear, Schedule, as_schedule
from ..solvers import Solver, is_default
from ..untraced import untraced
from .accelerated import Accelerated, with_signature

COUNTS = ("flow_upper_steps", "flow_lower_steps")  # arguments by which DiSA's objects are told how to anneal


class AcceleratedFlow(Accelerated):
    """Either of the two."""

    system: ClassVar[str]
    default_schedule: ClassVar[str]
    own_solver: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        original = getattr(model, "sample_tokens", None)
        if not callable(original):
            raise UnsupportedError(f"model: expected a sample_tokens on {type(model).__name__}, which has none")
        self._signature = inspect.signature(original)
        parameters = list(self._signature.parameters)
        if not set(self._arguments()) <= set(parameters):
            raise UnsupportedError(
                f"model: expected sample_tokens({', '.join(self._arguments())}, ...), got parameters {parameters}"
            )
        try:
            with torch.device("meta"):
                self._native = self._native_like(model)
            check_shapes(*({name: t.shape for name, t in _named(m).items()} for m in (self._native, model)), "model")
        except Exception as error:  # whatever comes of taking an object for what it is not
            raise UnsupportedError(f"model: {type(model).__name__} is not a {self.system}: {error}") from error
        self._share()

    @abstractmethod
    def _arguments(self) -> tuple[str, ...]:
        """Parameters that sample_tokens must have."""

    @abstractmethod
    def _native_like(self, model: Any) -> FlowAR | XAR:
        """A native model of the same sizes."""

    @abstractmethod
    def _call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What of sample_tokens' arguments goes to the native one, by its names; without schedule and solver."""

    @property
    def head(self) -> Any:
        return self._native.head

    def configure(self, schedule: Schedule | str | None, solver: str | Solver | None, clip: int | str | None, backend: str) -> None:
        if not is_default(clip):
            raise ValueError(f"clip: only MAR's and Harmon's solvers take one, got clip = {clip!r} for a {self.system}")
        told = set(COUNTS) <= self._signature.parameters.keys()
        schedule_from = "argument" if schedule is not None else "model" if told else "default"
        if schedule is None:
            schedule = f"linear of {' and '.join(COUNTS)}" if told else self.default_schedule
        if schedule_from != "model":
            schedule = as_schedule(schedule, self.system.lower())
        solver = self.own_solver if solver is None else solver
        self._native.plan("constant:2", solver)
        backends.choose(backend, self.head.spec, self.head.dtype, self.head.device, rows=2)
        self.schedule, self.schedule_from = schedule, schedule_from
        self.solver, self.clip, self.backend = solver, None, backend

    def _shadow_all(self) -> None:
        self._shadow(self._model, "sample_tokens", with_signature(self._sample, self._signature))

    def _share(self) -> None:
        """Give the native model the object's tensors of now."""
        for name, tensor in _named(self._model).items():
            owner, _, leaf = name.rpartition(".")
            module = self._native.get_submodule(owner)
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor
        self._native.train(self._model.training)

    @untraced
    def _sample(self, *args: object, **kwargs: object) -> Tensor:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self._share()
        schedule = self.schedule
        if self.schedule_from == "model":
            early, late = (bound.arguments[name] for name in COUNTS)
            schedule = Linear(early, late, self.system.lower())
        self._steps.update(len(step.table) for step in self._native.plan(schedule, self.solver))
        call = self._call(bound.arguments)
        return self._native.sample_tokens(**call, schedule=schedule, solver=self.solver, backend=self.backend)


class AcceleratedFlowAR(AcceleratedFlow):
    system, default_schedule, own_solver = "FlowAR", "linear:25-15", "euler"

    def _arguments(self) -> tuple[str, ...]:
        return ("guidance", "cfg", "labels")

    def _native_like(self, model: Any) -> FlowAR:
        width, _ = model.flownet.input_proj.weight.shape
        return FlowAR(
            **_sizes(model), scale=list(model.scale), diffloss_w=width, diffloss_d=len(model.flownet.res_blocks),
            cross=hasattr(model.flownet.res_blocks[0], "crossattn"),
        )  # fmt: skip

    def _call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            "labels": arguments["labels"],
            "cfg": arguments["cfg"],
            "guidance": (0.0, arguments["guidance"]),
            "progress": arguments.get("progress", False),
        }


class AcceleratedXAR(AcceleratedFlow):
    system, default_schedule, own_solver = "xAR", "linear:50-15", "euler_maruyama"

    def _arguments(self) -> tuple[str, ...]:
        return ("cfg", "label")

    def _native_like(self, model: Any) -> XAR:
        return XAR(**_sizes(model), clusters=model.clusters)

    def _call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"labels": arguments["label"], "cfg": arguments["cfg"]}


def _named(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _sizes(model: Any) -> dict[str, Any]:
    """The constructor's arguments that both have, read off an object of that structure."""
    block = model.encoder_blocks[0]
    dim, heads = len(model.encoder_norm.weight), len(model.encoder_norm.weight) // (4 * len(block.attn.rope.freqs))
    hidden = len(block.mlp.fc1_g.bias)
    both = {
        f"{part}_{name}": value
        for part, depth in (("encoder", len(model.encoder_blocks)), ("decoder", len(model.decoder_blocks)))
        for name, value in (("embed_dim", dim), ("num_heads", heads), ("depth", depth))
    }
    return both | {
        "img_size": model.seq_h * model.patch_size,
        "vae_stride": 1,
        "patch_size": model.patch_size,
        "vae_embed_dim": model.z_proj.in_features // model.patch_size**2,
        "class_num": model.class_emb.num_embeddings - 1,
        "mlp_ratio": (hidden + 0.5) * 1.5 / dim,
    }
