"""Whole images at the published sizes, with random weights: upstream's structure in eager PyTorch (mar_peers.py, harmon_peers.py,
flow_peers.py), the same compiled, and this package; over one set of weights, from one seed. And whose the time of an image is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import disa_fast
from disa_fast import MLPHead
from disa_fast.schedule import as_schedule, steps_at
from disa_fast.systems import SYSTEMS, Model

if __package__:  # of gpu_first; pytest has this folder on its path, and here no package
    from .flow_peers import flowar_huge, flowar_large, flowar_small, xar_base, xar_huge, xar_large
    from .mar_peers import mar_base, mar_huge, mar_large
    from .shapes import iterations
else:
    from flow_peers import flowar_huge, flowar_large, flowar_small, xar_base, xar_huge, xar_large
    from mar_peers import mar_base, mar_huge, mar_large
    from shapes import iterations

SEED = 1
PROMPT_TOKENS = 32, 16  # of a sentence in Harmon's template, and of what guidance leads away from


# What is drawn ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting(ABC):
    """upstream, native: make the two models of a published size. sampling: what decides how they draw, by
    disa_fast.systems.SYSTEMS[system].published."""

    upstream: Callable[..., Any]
    native: Callable[[str], Model]
    size: str
    sampling: Any

    system: ClassVar[str]  # key of SYSTEMS
    rounding: ClassVar[str] = "mar"  # of its schedule
    head_at: ClassVar[tuple[str, str]]  # of upstream's model: the module whose method draws an AR step's tokens, and that method
    native_method: ClassVar[str] = "sample_tokens"  # which returns what upstream does
    has_backbone: ClassVar[bool] = True
    transformer_head: ClassVar[bool] = False

    @property
    def schedule(self) -> disa_fast.Linear:
        return as_schedule(self.sampling.schedule, self.rounding)

    @property
    def steps(self) -> tuple[int, int]:
        return self.schedule.early, self.schedule.late

    @property
    def num_iter(self) -> int | None:
        """None where the model itself says how many AR steps there are."""
        return getattr(self.sampling, "num_iter", None)

    def build(self) -> Any:
        """Upstream's model."""
        return self.upstream()

    def image_size(self, upstream: Any) -> tuple[int, int]:
        """Height and width in pixels."""
        return upstream.img_size, upstream.img_size

    @abstractmethod
    def subjects(self, upstream: Any, batch: int, device: torch.device) -> dict[str, Tensor]:
        """What the images show, and the orders of their tokens: arguments of the native model."""

    @abstractmethod
    def draw(self, upstream: Any, subjects: dict[str, Tensor]) -> Tensor:
        """By upstream's model, which makes the same orders itself."""

    @abstractmethod
    def evaluated(self, upstream: Any) -> list[nn.Module]:
        """What a denoising step evaluates."""

    @abstractmethod
    def tokens(self, upstream: Any) -> list[int]:
        """Of an image, drawn by each AR step."""


class MARSetting(Setting):
    system, head_at = "mar", ("diffloss", "sample")

    def build(self) -> Any:
        early, late = self.steps
        return self.upstream(diff_upper_steps=early, diff_lower_steps=late)

    def subjects(self, upstream: Any, batch: int, device: torch.device) -> dict[str, Tensor]:
        return {"labels": some_labels(batch, upstream.class_emb.num_embeddings, device), "orders": upstream.sample_orders(batch)}

    def draw(self, upstream: Any, subjects: dict[str, Tensor]) -> Tensor:
        labels, s = subjects["labels"], self.sampling
        return upstream.sample_tokens(len(labels), s.num_iter, s.cfg, s.cfg_schedule, labels, s.temperature)

    def evaluated(self, upstream: Any) -> list[nn.Module]:
        return [upstream.diffloss.net]

    def tokens(self, upstream: Any) -> list[int]:
        return [drawn for drawn, _ in iterations(upstream.seq_len, self.sampling.num_iter)]


class HarmonSetting(MARSetting):
    """On random prompts."""

    system, head_at, native_method = "harmon", ("mar.diffloss", "sample"), "sample"

    def image_size(self, upstream: Any) -> tuple[int, int]:
        return self.sampling.image_size or super().image_size(upstream.mar)

    def shape(self, upstream: Any) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        pixels = upstream.mar.vae_stride * upstream.mar.patch_size
        return tuple(side // pixels for side in self.image_size(upstream))

    def subjects(self, upstream: Any, batch: int, device: torch.device) -> dict[str, Tensor]:
        lengths = torch.tensor(PROMPT_TOKENS, device=device).repeat_interleave(batch)
        mask = torch.arange(max(PROMPT_TOKENS), device=device) < lengths[:, None]
        ids = torch.randint(upstream.llm.config.vocab_size, mask.shape, device=device)
        orders = upstream.mar.sample_orders(batch, math.prod(self.shape(upstream)))
        return {"input_ids": ids, "attention_mask": mask, "orders": orders}

    def draw(self, upstream: Any, subjects: dict[str, Tensor]) -> Tensor:
        names = ("num_iter", "cfg", "cfg_schedule", "temperature")
        how = {name: getattr(self.sampling, name) for name in names}
        prompts = {name: subjects[name] for name in ("input_ids", "attention_mask")}
        return upstream.sample(**prompts, **how, image_shape=self.shape(upstream))

    def evaluated(self, upstream: Any) -> list[nn.Module]:
        return [upstream.mar.diffloss.net]

    def tokens(self, upstream: Any) -> list[int]:
        return [drawn for drawn, _ in iterations(math.prod(self.shape(upstream)), self.sampling.num_iter)]


class FlowARSetting(Setting):
    system, rounding, head_at, transformer_head = "flowar", "flowar", ("", "solver"), True

    def subjects(self, upstream: Any, batch: int, device: torch.device) -> dict[str, Tensor]:
        return {"labels": some_labels(batch, upstream.num_classes, device)}

    def told(self) -> dict[str, Any]:
        early, late = self.steps
        return {"flow_upper_steps": early, "flow_lower_steps": late, "cfg": self.sampling.cfg}

    def draw(self, upstream: Any, subjects: dict[str, Tensor]) -> Tensor:
        return upstream.sample_tokens(**self.told(), guidance=self.sampling.guidance[1], **subjects)

    def evaluated(self, upstream: Any) -> list[nn.Module]:
        return [upstream.flownet]

    def tokens(self, upstream: Any) -> list[int]:
        return [side**2 for side in upstream.scale]


class XARSetting(FlowARSetting):
    """All of the transformer is the head."""

    system, rounding, has_backbone = "xar", "xar", False

    def draw(self, upstream: Any, subjects: dict[str, Tensor]) -> Tensor:
        return upstream.sample_tokens(**self.told(), label=subjects["labels"])

    def evaluated(self, upstream: Any) -> list[nn.Module]:
        return [*upstream.encoder_blocks, *upstream.decoder_blocks]

    def tokens(self, upstream: Any) -> list[int]:
        return [upstream.seq_len // upstream.clusters] * upstream.clusters


def reduced(setting: Setting, model: dict[str, Any], **sampling: Any) -> Setting:
    """`setting` with other arguments of the two models, and of their sampling."""
    return dataclasses.replace(
        setting,
        upstream=functools.partial(setting.upstream, **model),
        native=functools.partial(setting.native, **model),
        sampling=dataclasses.replace(setting.sampling, **sampling),
    )


def some_labels(batch: int, classes: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device) * 97 % classes


def harmon_of(size: str, **mar: Any) -> Any:
    """Upstream's. Needs transformers, which the others do not."""
    peers = importlib.import_module(f"{__package__}.harmon_peers" if __package__ else "harmon_peers")
    return {"0.5b": peers.harmon_0_5b, "1.5b": peers.harmon_1_5b}[size](**mar)


def _published(kind: type[Setting], size: str, upstream: Callable[..., Any], **changed: Any) -> Setting:
    of = SYSTEMS[kind.system]
    return kind(upstream, of.make, size, dataclasses.replace(of.published[size], **changed))


def _harmon(size: str, **changed: Any) -> Setting:
    return _published(HarmonSetting, size, functools.partial(harmon_of, size), **changed)


FLOW_SETTINGS = {
    "FlowAR-S": _published(FlowARSetting, "small", flowar_small),
    "FlowAR-L": _published(FlowARSetting, "large", flowar_large),
    "FlowAR-H": _published(FlowARSetting, "huge", flowar_huge),
    "xAR-B": _published(XARSetting, "base", xar_base),
    "xAR-L": _published(XARSetting, "large", xar_large),
    "xAR-H": _published(XARSetting, "huge", xar_huge),
}
SETTINGS = {
    "MAR-B": _published(MARSetting, "base", mar_base),
    "MAR-L": _published(MARSetting, "large", mar_large),
    "MAR-H": _published(MARSetting, "huge", mar_huge),
    "Harmon-0.5b": _harmon("0.5b", image_size=(256, 256)),  # published: 512 x 512, of four times the tokens
    "Harmon-0.5b 512": _harmon("0.5b"),
    "Harmon-1.5b 512": _harmon("1.5b"),
    **FLOW_SETTINGS,
}


# Who draws -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Draws the images when called. What `head`'s method draws is an AR step's tokens."""

    draw: Callable[[], Tensor]
    head: Any
    method: str = "denoise"

    def __call__(self) -> Tensor:
        return self.draw()


class Images:
    """The two models of one published size over the same random weights, and what draws `batch` images with them. setting: another
    than that of the name."""

    def __init__(self, name: str, device: torch.device, batch: int, setting: Setting | None = None) -> None:
        self.setting, self.device, self.batch = setting or SETTINGS[name], device, batch
        torch.manual_seed(0)
        with device:  # parameters ask for gradients, as published ones do: only of such does autocast keep what it casts
            self.upstream = self.setting.build().eval()
        for parameter in self.upstream.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
        self.native = self._native(self.upstream.state_dict())
        np.random.seed(SEED)
        self.subjects = self.setting.subjects(self.upstream, batch, device)

    def _native(self, state: dict[str, Tensor]) -> Any:
        with torch.device("meta"):
            model = self.setting.native(self.setting.size).eval().requires_grad_(False)
        model.load_state_dict(state, assign=True)
        return model

    @property
    def steps(self) -> tuple[int, int]:
        return self.setting.steps

    def eager(self) -> Tensor:
        """Upstream's structure, whose parts may be compiled, or accelerated."""
        self._seed()
        return self.setting.draw(self.upstream, self.subjects)

    @staticmethod
    def _seed() -> None:
        torch.manual_seed(SEED)
        np.random.seed(SEED)

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """As upstream's scripts call it, but for the half precision's kind."""
        with torch.autocast(self.device.type, dtype):
            return self.eager()

    def captured(self, capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]], dtype: torch.dtype) -> Callable[[], Tensor]:
        """`autocast` as the replay of one graph. capture: a call as such. What upstream makes on the host and moves to the GPU
        (times, angles, the noise that a scale or cell begins with) is moved once, before, and is an input from then on."""
        ahead = MovedAhead()

        def draw() -> Tensor:
            with torch.autocast(self.device.type, dtype), ahead:
                return self.setting.draw(self.upstream, self.subjects)

        self._seed()
        draw()
        replay = capture(draw)

        def run() -> Tensor:
            self._seed()
            return replay()

        return run

    def upstreams(self, draw: Callable[[], Tensor]) -> Run:
        """`draw`, by upstream's model."""
        at, method = self.setting.head_at
        return Run(draw, self.upstream.get_submodule(at), method)

    def compiled(self, draw: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`draw` with the network of every evaluation compiled, for a few shapes."""
        parts = self.setting.evaluated(self.upstream)
        for part in parts:
            part.compile(dynamic=False)
        made = [part._compiled_call_impl for part in parts]

        def run() -> Tensor:
            for part, implementation in zip(parts, made, strict=True):
                part._compiled_call_impl = implementation
            try:
                return draw()
            finally:
                for part in parts:
                    part._compiled_call_impl = None

        for part in parts:
            part._compiled_call_impl = None
        return run

    def accelerated(self) -> Run:
        """Upstream's own object, accelerated as long as it draws."""
        handle = disa_fast.accelerate(self.upstream)
        handle.restore()
        lay_out(handle.head)

        def run() -> Tensor:
            handle.install()
            try:
                return self.eager()
            finally:
                handle.restore()

        return Run(run, handle.head)

    def ours(self, backend: str = "auto", dtype: torch.dtype = torch.float32) -> Run:
        """This package's model. In float32 it shares upstream's weights."""
        model = self.native
        if dtype != torch.float32:
            model = self._native({name: tensor.to(dtype) for name, tensor in self.native.state_dict().items()})
        arguments = self.subjects | self.setting.sampling.arguments(model) | {"backend": backend}
        lay_out(model.head)

        def run() -> Tensor:
            torch.manual_seed(SEED)
            return getattr(model, self.setting.native_method)(**arguments)

        return Run(run, model.head)

    # Whose the time is -------------------------------------------------------------------------------------------------

    def ar_steps(self) -> list[dict[str, int]]:
        """k, T, as scheduled, and rows of each AR step: tokens that it draws, of both guidance halves."""
        tokens, halves = self.setting.tokens(self.upstream), 1 if self.setting.sampling.cfg == 1.0 else 2
        return [
            {"k": k, "T": steps_at(self.setting.schedule, k, len(tokens)), "rows": halves * self.batch * count}
            for k, count in enumerate(tokens)
        ]

    def watched(self, run: Run, operators: bool = False) -> tuple[Tensor, Stopwatch]:
        """(what `run` draws, where its time went). operators: also by kind of operator, of all but the heads that are MLPs."""
        looked_into = [
            name for name, is_one in (("backbone", True), ("head", self.setting.transformer_head)) if is_one and operators
        ]
        watch = Stopwatch(self.device, len(self.ar_steps()), "backbone" if self.setting.has_backbone else "other", looked_into)
        with watch.watching(run):
            drawn = run()
        return drawn, watch

    def shares(self, **how: Any) -> list[float]:
        """Of the time of our images, what leads up to them aside: each AR step's."""
        run = self.ours(**how)
        run()
        _, watch = self.watched(run)
        of_step = [sum(seconds.values()) for seconds in watch.steps]
        return [seconds / sum(of_step) for seconds in of_step]


class MovedAhead(TorchFunctionMode):
    """Within, what Tensor.to moves to a device it moves in the first run alone; later runs, which make the same moves in the same
    order, get what was moved then. A CUDA graph cannot hold a copy from ordinary memory of the host."""

    def __init__(self) -> None:
        super().__init__()
        self._moved: list[Tensor] = []
        self._filled, self._at = False, 0

    def __enter__(self) -> MovedAhead:
        self._at = 0
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._filled = True
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to = [*args[1:2], (kwargs or {}).get("device")]
        if func is not Tensor.to or args[0].device.type != "cpu" or not any(isinstance(where, torch.device) for where in to):
            return func(*args, **(kwargs or {}))
        if not self._filled:
            self._moved.append(func(*args, **(kwargs or {})))
        self._at += 1
        return self._moved[self._at - 1]


def lay_out(head: Any) -> None:
    """What the first call of a head would else do, where that takes its time."""
    if isinstance(head, MLPHead):
        head.warmup("constant:2", K=1, rows=2)


class Stopwatch:
    """Seconds of each AR step's head, which are its calls, and of what leads up to them from the step before: `steps`. The rest is
    in `other`, and so is all that is outside of the head where `outside` says so.

    looked_into: parts whose operators are profiled: `operators` has the seconds of each kind, "head: attention" and the like. The
    profiler is emptied at the end of every part, so that it holds no more than one AR step; the time of that is nobody's.
    """

    def __init__(self, device: torch.device, K: int, outside: str = "backbone", looked_into: Collection[str] = ()) -> None:
        self.device, self.outside, self.looked_into = device, outside, looked_into
        self.steps = [{"head": 0.0, "backbone": 0.0} for _ in range(K)]
        self.other = 0.0
        self.operators: Counter[str] = Counter()
        self._k, self._part, self._since = 0, outside, 0.0
        self._profiler: profile | None = None

    def seconds(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {name: sum(seconds[name] for seconds in self.steps) for name in ("head", "backbone")} | {"other": self.other}

    def shares(self) -> dict[str, float]:
        """Of all seconds: the head's and the backbone's, by kind of operator where that was looked into. "between" are those in
        which no operator of theirs ran."""
        parts = self.parts()
        kinds = {
            f"{part}: {kind}": self.operators[f"{part}: {kind}"]
            for part in ("head", "backbone")
            if part in self.looked_into and (part == "head" or self.outside == "backbone")
            for kind in KINDS
        }
        whole = {} if "head" in self.looked_into else {"head": parts["head"]}
        total = self.seconds()
        shares = {name: seconds / total for name, seconds in (whole | kinds).items()}
        return shares | {"between": 1 - sum(shares.values())}

    @contextlib.contextmanager
    def watching(self, run: Run) -> Iterator[None]:
        """`run`, the time of whose head is taken from entry to return of its calls. xAR's `finish` belongs to the step after it."""
        with contextlib.ExitStack() as stack:
            for name in (run.method, "finish"):
                if hasattr(run.head, name):
                    stack.enter_context(replaced(run.head, name, self._watched(getattr(run.head, name), name == run.method)))
            self._begin(self.outside)
            yield
            self._end()

    def _watched(self, method: Callable[..., Any], ends_step: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._end()
            self._begin("head")
            result = method(*args, **kwargs)
            self._end()
            self._k += ends_step
            self._begin(self.outside if self._k < len(self.steps) else "other")
            return result

        return call

    def _begin(self, part: str) -> None:
        self._part = part
        if part in self.looked_into:
            self._profiler = profile(activities=[ProfilerActivity.CPU])
            self._profiler.__enter__()
        self._since = self._now()

    def _end(self) -> None:
        seconds = self._now() - self._since
        if self._part == "other":
            self.other += seconds
        else:
            self.steps[self._k][self._part] += seconds
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            for event in self._profiler.events():
                if event.cpu_parent is None:
                    self.operators[f"{self._part}: {kind_of(event.name)}"] += event.cpu_time_total / 1e6
            self._profiler = None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


KINDS = ("matrix products", "attention", "other")
PRODUCTS = {"linear", "matmul", "addmm", "mm", "bmm", "baddbmm", "_linear_pointwise"}


def kind_of(operator: str) -> str:
    """Of KINDS; operator: an outermost one, in whose time is that of those it calls."""
    name = operator.rpartition("::")[2]
    return "matrix products" if name in PRODUCTS else "attention" if name == "scaled_dot_product_attention" else "other"


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """owner.name is `value`, on this object alone."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    vars(owner)[name] = value
    try:
        yield
    finally:
        del vars(owner)[name]
        vars(owner).update(before)
