"""FlowAR- and xAR-shaped objects: those with the parameter names of the published checkpoints and a `sample_tokens`.

Written against FlowAR_DiSA and xAR_DiSA (DiSA repository at 283fa59) and xAR (OliverRensu/xAR at 121e9c9). Shadowed is
`sample_tokens`: its calls go to a native model over the object's own parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backends
from ..checks import check_shapes, is_plain
from ..errors import UnsupportedError
from ..heads.packing import named_tensors
from ..models.flowar import FlowAR
from ..models.xar import XAR
from ..schedule import Linear, Schedule, as_schedule
from ..solvers import FLOW_NAMES, Solver, is_default
from ..untraced import untraced
from . import check as check_
from . import check_flow
from .accelerated import SKIPPED, Accelerated, Settings
from .calls import arguments_of, is_default_of, required, signature_of, with_signature

COUNTS = ("flow_upper_steps", "flow_lower_steps")  # arguments by which DiSA's objects are told how to anneal
COUNT = "num_steps"  # by which the original xAR is told the steps of every cell


class AcceleratedFlow(Accelerated):
    """An accelerated FlowAR or xAR."""

    system: ClassVar[str]
    default_schedule: ClassVar[str]
    own_solver: ClassVar[str]
    few_steps: ClassVar[int]  # as few as the published sampler does right
    required: ClassVar[tuple[str, ...]]  # parameters that sample_tokens must have
    others: ClassVar[tuple[str, ...]]  # and those that it may have

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        original = getattr(model, "sample_tokens", None)
        if not callable(original):
            raise UnsupportedError(f"model: expected a sample_tokens on {type(model).__name__}, which has none")
        self._signature = signature_of(original)
        parameters = list(self._signature.parameters)
        if not set(self.required) <= set(parameters):
            raise UnsupportedError(f"model: expected sample_tokens({', '.join(self.required)}, ...), got parameters {parameters}")
        unknown = [name for name in required(self._signature) if name not in self._known]
        if unknown:
            raise UnsupportedError(
                f"model: sample_tokens requires {', '.join(unknown)}, of which nothing is known here; served are "
                f"{', '.join(self._known)}, and others at their defaults"
            )
        self._refuse_tensors(model)
        try:
            with torch.device("meta"):
                self._native = self._native_like(model)
            self._check_names()
        except Exception as error:  # whatever comes of taking an object for what it is not
            raise UnsupportedError(f"model: {type(model).__name__} is not a {self.system}: {error}") from error
        self._share()

    @property
    def _known(self) -> tuple[str, ...]:
        return (*self.required, *self.others, *COUNTS)

    @abstractmethod
    def _native_like(self, model: Any) -> FlowAR | XAR:
        """A native model of the same sizes."""

    @abstractmethod
    def _call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What of sample_tokens' arguments goes to the native one, by its names; without schedule and solver."""

    @property
    def head(self) -> Any:
        return self._native.head

    # Settings ----------------------------------------------------------------------------------------------------------

    def _resolved(
        self,
        schedule: Schedule | str | None,
        solver: str | Solver | None,
        clip: int | str | None,
        backend: str,
        dtype: torch.dtype | None,
        check: bool,
    ) -> tuple[Settings, Mapping[str, object] | str]:
        if not is_default(clip):
            raise ValueError(f"clip: only MAR's and Harmon's solvers take one, got clip = {clip!r} for a {self.system}")
        told = set(COUNTS) <= self._signature.parameters.keys()
        schedule_from = "argument" if schedule is not None else "model" if told else "default"
        if schedule is None:
            schedule = f"linear of {' and '.join(COUNTS)}" if told else self.default_schedule
        if schedule_from != "model":
            schedule = as_schedule(schedule, self.system.lower())
        self._native.plan("constant:2", self.own_solver if solver is None else solver)
        backends.choose(backend, self.head.spec, self.head.dtype if dtype is None else dtype, self.head.device, rows=2)
        found = self._checked(backend) if check else SKIPPED
        if not check:
            self._say_of_weights(self._model)
        is_own_solver = solver is None
        if is_own_solver:
            solver = found["solver"] if isinstance(found, Mapping) else self.own_solver
        self._function = check_.structure_of(self._model)
        return Settings(schedule, schedule_from, solver, is_own_solver, None, backend, dtype), found

    def _adopt(self) -> None:
        pass

    def _checked(self, backend: str) -> Mapping[str, object]:
        key = check_.structure_of(self._model, type(self._model).sample_tokens, backend)
        found = check_.proven(self._model, key)
        if found is None:
            check_flow.refuse_hooks(self._model)
            self._say_of_weights(self._model)
            candidates = [self.own_solver, *(name for name in FLOW_NAMES if name != self.own_solver)]
            try:
                with check_.as_it_was(self._model):
                    found = check_flow.prove(self._model, self._their_image, self._our_image, candidates, backend, guidance=2.4)
            finally:
                self._share()
            check_.remember(self._model, key, found)
        return found

    def _few(self) -> dict[str, int]:
        """The arguments by which sample_tokens is told few steps."""
        names = [name for name in (*COUNTS, COUNT) if name in self._signature.parameters]
        if not names:
            raise UnsupportedError(
                f"model: expected sample_tokens with {', '.join(COUNTS)} or {COUNT}, by which it can be checked in few steps, got "
                f"parameters {list(self._signature.parameters)}. Pass check=False to accelerate it all the same"
            )
        return dict.fromkeys(names, self.few_steps)

    def _of_one_image(self, cfg: float) -> dict[str, Any]:
        label = torch.zeros(1, dtype=torch.int64, device=self.head.device)
        labels = next(name for name in self.required if name.startswith("label"))
        return {labels: label, "cfg": cfg}

    def _their_image(self, cfg: float) -> Tensor:
        return self._model.sample_tokens(**self._few(), **self._of_one_image(cfg))

    def _our_image(self, backend: str, solver: str, cfg: float) -> Tensor:
        self._share()
        arguments = arguments_of(self._signature, (), {**self._few(), **self._of_one_image(cfg)})
        call = self._call(arguments)
        return self._native.sample_tokens(**call, schedule=f"constant:{self.few_steps}", solver=solver, backend=backend)

    # Following the object ----------------------------------------------------------------------------------------------

    def _refuse_tensors(self, model: nn.Module) -> None:
        """Raise UnsupportedError for parameters without data, of classes with operators of their own, or none."""
        for name, tensor in named_tensors(model).items():
            if not is_plain(tensor):
                raise UnsupportedError(
                    f"model: {name}: expected a plain tensor, got {type(tensor).__name__}, which has operators of its own; "
                    "accelerate the model before it is quantised or sharded, or dequantise it"
                )
            if tensor.is_meta:
                raise UnsupportedError(f"model: {name} is on meta, without data, as offloading leaves it; load or move it first")
        quantised = [name for name, module in model.named_modules() if callable(getattr(module, "weight", None))]
        if quantised:
            raise UnsupportedError(
                f"model: quantised modules are not served ({', '.join(quantised[:4])}); pass the model before that"
            )

    def _check_names(self) -> None:
        shapes = ({name: t.shape for name, t in named_tensors(m).items()} for m in (self._native, self._model))
        check_shapes(*shapes, "model")

    def _share(self) -> None:
        """Give the native model the object's tensors of now."""
        for name, tensor in named_tensors(self._model).items():
            owner, _, leaf = name.rpartition(".")
            module = self._native.get_submodule(owner)
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor
        self._native.train(self._model.training)

    def _follow(self) -> None:
        """At the start of an image: notice another structure, another function."""
        self._refuse_tensors(self._model)
        try:
            self._check_names()
        except ValueError as error:
            raise UnsupportedError(f"model: its structure changed since it was accelerated: {error}") from error
        self._share()
        if self._check == SKIPPED:
            return
        with self._as_original():
            function = check_.structure_of(self._model)
            if function != self._function:
                self._check = self._checked(self.backend)
                self._function = function

    # What shadows the model's own method -------------------------------------------------------------------------------

    def _shadow_all(self) -> None:
        self._shadow(self._model, "sample_tokens", with_signature(self._sample, self._signature))

    @untraced
    def _sample(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = arguments_of(self._signature, args, kwargs)
        self._refuse_others(arguments)
        self._follow()
        schedule = self.schedule
        if self.schedule_from == "model":
            early, late = (arguments[name] for name in COUNTS)
            schedule = Linear(early, late, self.system.lower())
        elif COUNT in arguments and COUNT not in self._ignored_before(schedule, arguments[COUNT]):
            self._say_once(
                f"{COUNT}: {arguments[COUNT]!r} of the call is not used while the model is accelerated; the steps are those of "
                f"schedule = {schedule}"
            )
        steps = self._native.plan(schedule, self.solver)
        self._steps.update(len(step.table) for step in steps)
        call = self._call(arguments)
        return self._native.sample_tokens(
            **call, schedule=schedule, solver=self.solver, backend=self.backend, dtype=self._product_dtype()
        )

    def _ignored_before(self, schedule: Schedule, count: object) -> tuple[str, ...]:
        """The arguments that a schedule replaces by the same: a constant one of as many steps."""
        return (COUNT,) if getattr(schedule, "steps", None) == count else ()

    def _refuse_others(self, arguments: Mapping[str, Any]) -> None:
        for name, value in arguments.items():
            parameter = self._signature.parameters.get(name)
            if name in self._known or (parameter is not None and is_default_of(parameter, value)):
                continue
            raise UnsupportedError(f"{name}: sample_tokens is served with this argument at its default, got {value!r}")


class AcceleratedFlowAR(AcceleratedFlow):
    system, default_schedule, own_solver, few_steps = "FlowAR", "linear:25-15", "euler", 2
    required, others = ("guidance", "cfg", "labels"), ("progress",)

    def _native_like(self, model: Any) -> FlowAR:
        width, _ = model.flownet.input_proj.weight.shape
        return FlowAR(
            **_sizes(model), scale=list(model.scale), diffloss_w=width, diffloss_d=len(model.flownet.res_blocks),
            cross=hasattr(model.flownet.res_blocks[0], "crossattn"),
        )  # fmt: skip

    def _call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        high = arguments["guidance"]
        return {
            "labels": arguments["labels"],
            "cfg": arguments["cfg"],
            "guidance": (min(0.0, high), high),  # below 0: no time is in it, as upstream has it
            "progress": arguments.get("progress", False),
        }


class AcceleratedXAR(AcceleratedFlow):
    system, default_schedule, own_solver, few_steps = "xAR", "linear:50-15", "euler_maruyama", 3
    required, others = ("cfg", "label"), (COUNT,)

    def _native_like(self, model: Any) -> XAR:
        return XAR(**_sizes(model), clusters=model.clusters)

    def _call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        label = arguments["label"]
        return {"labels": label.long() if isinstance(label, Tensor) else label, "cfg": arguments["cfg"]}


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
