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
from ..models.flow_sampling import FlowStep
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
    few_steps: ClassVar[tuple[int, int]]  # early and late, as few as the published sampler does right
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
            self._native = self._made_like(model)
            self._check_names()
        except Exception as error:  # whatever comes of taking an object for what it is not
            raise UnsupportedError(f"model: {type(model).__name__} is not served as a {self.system}: {error}") from error
        self._share()

    def _made_like(self, model: nn.Module) -> FlowAR | XAR:
        """A native model of the same sizes, without data."""
        with torch.device("meta"):
            return self._native_like(model)

    @property
    def _known(self) -> tuple[str, ...]:
        return (*self.required, *self.others, *COUNTS)

    @abstractmethod
    def _native_like(self, model: Any) -> FlowAR | XAR:
        """A native model of the same sizes."""

    def _blocks_of(self, model: Any) -> list[tuple[nn.Module, str]]:
        """Where a model has lists of blocks."""
        return [(model, "encoder_blocks"), (model, "decoder_blocks")]

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
        schedule_from = "argument" if schedule is not None else "model" if self._is_told else "default"
        if schedule is None:
            schedule = f"linear of {' and '.join(COUNTS)}" if self._is_told else self.default_schedule
        if schedule_from != "model":
            schedule = as_schedule(schedule, self.system.lower())
        self._native.plan("constant:2", self.own_solver if solver is None else solver)
        backends.choose(backend, self.head.spec, self.head.dtype if dtype is None else dtype, self.head.device, rows=2)
        structure = self._structure_now()
        found = self._checked(structure, backend) if check else SKIPPED
        if not check:
            self._say_of_weights(self._model)
        is_own_solver = solver is None
        if is_own_solver:
            solver = found["solver"] if isinstance(found, Mapping) else self.own_solver
        self._structure = structure
        return Settings(schedule, schedule_from, solver, is_own_solver, None, backend, dtype), found

    def _adopt(self) -> None:
        pass

    def _checked(self, structure: bytes, backend: str) -> Mapping[str, object]:
        key = check_.structure_of(structure, backend)
        with check_.LOCK:
            found = check_.proven(self._model, key)
            if found is None:
                check_flow.refuse_hooks(self._model, self._shadowed)
                self._say_of_weights(self._model)
                found = self._proven(backend)
                check_.remember(self._model, key, found)
        return found

    def _proven(self, backend: str) -> Mapping[str, object]:
        """The check, on a stand-in of the model, which other threads do not see, with one block of each kind; on the model itself
        where it cannot be copied, or its copy does not do what it does."""
        try:
            model = check_.stand_in(self._model, self._shadowed)
            for owner, name in self._blocks_of(model):
                setattr(owner, name, check_flow.one_of_a_kind(getattr(owner, name)))
            with check_.as_it_was(model):
                return self._prove(model, backend)
        except Exception:  # copying somebody's object may fail in any way
            with self._as_original(), check_.as_it_was(self._model):
                return self._prove(self._model, backend)

    def _prove(self, model: nn.Module, backend: str) -> Mapping[str, object]:
        native = self._made_like(model)

        def theirs(image: check_flow.Image) -> Tensor:
            return model.sample_tokens(**self._few_steps(), **self._of_one_image(image))

        def ours(image: check_flow.Image, backend: str, solver: str) -> Tensor:
            share(native, model)
            arguments = arguments_of(self._signature, (), {**self._few_steps(), **self._of_one_image(image)})
            schedule = Linear(*self.few_steps, self.system.lower()) if self._is_told else f"constant:{self.few_steps[1]}"
            return native.sample_tokens(**self._call(arguments), schedule=schedule, solver=solver, backend=backend)

        candidates = [self.own_solver, *(name for name in FLOW_NAMES if name != self.own_solver)]
        return check_flow.prove(model, theirs, ours, candidates, backend)

    @property
    def _is_told(self) -> bool:
        """Whether the object is told at each call between which step counts to anneal."""
        return set(COUNTS) <= self._signature.parameters.keys()

    def _few_steps(self) -> dict[str, int]:
        """The arguments by which sample_tokens is told few steps."""
        if self._is_told:
            return dict(zip(COUNTS, self.few_steps, strict=True))
        if COUNT in self._signature.parameters:
            return {COUNT: self.few_steps[1]}
        raise UnsupportedError(
            f"model: expected sample_tokens with {', '.join(COUNTS)} or {COUNT}, by which it can be checked in few steps, got "
            f"parameters {list(self._signature.parameters)}. Pass check=False to accelerate it all the same"
        )

    def _of_one_image(self, image: check_flow.Image) -> dict[str, Any]:
        labels = next(name for name in self.required if name.startswith("label"))
        classes = self._native.class_emb.num_embeddings - 1
        return {labels: torch.tensor([image.label % classes], device=self.head.device), "cfg": image.cfg}

    def _structure_now(self) -> bytes:
        """What decides the model's function, but for the values of its parameters."""
        return check_.structure_of(self._model, apart_from=self._model, shadowed=self._shadowed)

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
        share(self._native, self._model)

    def _follow(self) -> None:
        """At the start of an image: notice another structure, another function."""
        self._refuse_tensors(self._model)
        try:
            self._check_names()
        except ValueError as error:
            raise UnsupportedError(f"model: its structure changed since it was accelerated: {error}") from error
        self._share()
        dropping = [name for name, module in self._model.named_modules() if check_.drops(module)]
        if dropping:
            raise UnsupportedError(
                f"model: it is in training mode, where {', '.join(dropping[:4])} drop values, which the native model does not; "
                "call model.eval()"
            )
        if self._check == SKIPPED:
            return
        structure = self._structure_now()
        if structure != self._structure:
            self._check = self._checked(structure, self.backend)
            self._structure = structure

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
        elif COUNT in arguments and getattr(schedule, "steps", None) != arguments[COUNT]:  # not constant and the same
            self._say_once(
                f"{COUNT}: {arguments[COUNT]!r} of the call is not used while the model is accelerated; the steps are those of "
                f"schedule = {schedule}"
            )
        steps = self._native.plan(schedule, self.solver)
        self._say_of_steps(steps)
        self._steps.update(len(step.table) for step in steps)
        call = self._call(arguments)
        return self._native.sample_tokens(
            **call, schedule=schedule, solver=self.solver, backend=self.backend, dtype=self._product_dtype()
        )

    def _say_of_steps(self, steps: list[FlowStep]) -> None:
        """Say where the published sampler does something else with so few steps."""

    def _refuse_others(self, arguments: Mapping[str, Any]) -> None:
        for name, value in arguments.items():
            parameter = self._signature.parameters.get(name)
            if name in self._known or (parameter is not None and is_default_of(parameter, value)):
                continue
            raise UnsupportedError(f"{name}: sample_tokens is served with this argument at its default, got {value!r}")


def share(native: nn.Module, model: nn.Module) -> None:
    """Give a native model the tensors that another model has now, and its mode."""
    for name, tensor in named_tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        module = native.get_submodule(owner)
        (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor
    native.train(model.training)


class AcceleratedFlowAR(AcceleratedFlow):
    system, default_schedule, own_solver, few_steps = "FlowAR", "linear:25-15", "euler", (6, 3)
    required, others = ("guidance", "cfg", "labels"), ("progress",)

    def _native_like(self, model: Any) -> FlowAR:
        width, _ = model.flownet.input_proj.weight.shape
        return FlowAR(
            **_sizes(model), scale=list(model.scale), diffloss_w=width, diffloss_d=len(model.flownet.res_blocks),
            cross=hasattr(model.flownet.res_blocks[0], "crossattn"),
        )  # fmt: skip

    def _blocks_of(self, model: Any) -> list[tuple[nn.Module, str]]:
        return [*super()._blocks_of(model), (model.flownet, "res_blocks")]

    def _call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        high = arguments["guidance"]
        return {
            "labels": arguments["labels"],
            "cfg": arguments["cfg"],
            "guidance": (min(0.0, high), high),  # below 0: no time is in it, as upstream has it
            "progress": arguments.get("progress", False),
        }


class AcceleratedXAR(AcceleratedFlow):
    system, default_schedule, own_solver, few_steps = "xAR", "linear:50-15", "euler_maruyama", (5, 3)
    required, others = ("cfg", "label"), (COUNT,)

    def _native_like(self, model: Any) -> XAR:
        return XAR(**_sizes(model), clusters=model.clusters)

    def _call(self, arguments: dict[str, Any]) -> dict[str, Any]:
        label = arguments["label"]
        return {"labels": label.long() if isinstance(label, Tensor) else label, "cfg": arguments["cfg"]}

    def _say_of_steps(self, steps: list[FlowStep]) -> None:
        if any(len(step.table) == 2 for step in steps[1:]) and self.schedule_from == "model":
            self._say_once(
                "flow_lower_steps: a cell but the first has 2 steps, of which the published xAR gives the second the input of the "
                "first again; here it gets its own, so the tokens are others"
            )


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
