"""The systems: how each is made, its published sizes, its settings, and how a checkpoint of it is loaded."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import backends, solvers
from .checkpoint import build, read_config, read_state_dict
from .heads.flow import check_guidance
from .infer import NOTHING, Given, Inferred, NotToldError, infer, published_size
from .models import MAR, XAR, FlowAR, Harmon, flowar, harmon, mar, xar
from .models.flowar import SIZES as FLOWAR_SIZES
from .models.harmon import SIZES as HARMON_SIZES
from .models.mar import SIZES as MAR_SIZES
from .models.masked_sampling import still_masked_after
from .models.prompts import GENERIC_PROMPT
from .models.xar import SIZES as XAR_SIZES
from .schedule import Schedule, as_schedule, steps_at
from .solvers import DEFAULT_CLIP, Solver

CUSTOM = "custom"  # size of a checkpoint whose names and shapes tell how it is built
DEMO_WEIGHTS = Path(__file__).parent / "demo" / "weights"


class Sampling:
    """Everything but subjects and seed that decides what a model draws; its fields are arguments of sample_tokens."""

    def arguments(self, model: Model) -> dict[str, Any]:
        """Of sample_tokens, by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class MARSampling(Sampling):
    """Everything but labels and seed that decides what `MAR.sample_tokens` draws; see there."""

    schedule: Schedule | str = "linear:50-5"
    solver: str | Solver = "ddpm"
    clip: int | str | None = DEFAULT_CLIP
    num_iter: int = 64
    cfg: float = 3.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    backend: str = "auto"

    def network_evaluations(self, model: MAR | Harmon) -> int:
        """Evaluations of the head for one image: the sum over k of what T(k) leaves after clipping."""
        schedule, table_for = as_schedule(self.schedule), solvers.resolve(self.solver, self.clip)
        return sum(len(table_for(steps_at(schedule, k, self.num_iter))) for k in range(self.num_iter))


@dataclass(frozen=True)
class HarmonSampling(MARSampling):
    """Everything but prompts and seed that decides what `Harmon.sample_tokens` draws; see there.

    image_size: (height, width) in pixels, the model's own if None.
    """

    cfg_schedule: str = "constant"
    cfg_prompt: str = GENERIC_PROMPT
    image_size: tuple[int, int] | None = None

    def arguments(self, model: Harmon) -> dict[str, Any]:
        arguments = super().arguments(model)
        size, pixels = arguments.pop("image_size"), model.mar.vae_stride * model.mar.patch_size
        if size is not None:
            if any(side % pixels for side in size):
                raise ValueError(f"image_size: expected multiples of {pixels} pixels, of which a token is one, got {size}")
            arguments["image_shape"] = tuple(side // pixels for side in size)
        return arguments


@dataclass(frozen=True)
class FlowSampling(Sampling):
    """Everything but labels and seed that decides what `FlowAR.sample_tokens` or `XAR.sample_tokens` draws; see there."""

    schedule: Schedule | str
    solver: str | Solver
    cfg: float
    guidance: tuple[float, float]
    temperature: float = 1.0
    backend: str = "auto"

    def network_evaluations(self, model: FlowAR | XAR) -> int:
        """Evaluations of the velocity for one image: the sum over scales or cells of what the solver's grid makes of T(k)."""
        return sum(len(step.table) for step in model.plan(self.schedule, self.solver))


Model = MAR | FlowAR | XAR | Harmon


@dataclass(frozen=True)
class System:
    """One kind of model: its constructor, its published sizes, the names of its solvers, and its settings: those that DiSA's
    authors publish for each size, and those for the demo's model."""

    make: Callable[..., Model]
    sizes: Mapping[str, Mapping[str, Any]]
    solvers: Sequence[str]
    published: Mapping[str, Sampling]
    demo: Sampling
    dtype: torch.dtype = torch.float32  # of published weights in use


def _flowar(cfg: float, schedule: str = "linear:25-15", high: float = 0.9) -> FlowSampling:
    return FlowSampling(schedule, "euler", cfg, guidance=(0.0, high))


def _xar(cfg: float) -> FlowSampling:
    return FlowSampling("linear:50-15", "euler_maruyama", cfg, guidance=(0.0, 1.0))


# Settings of README.md and Harmon_DiSA of the DiSA repository at 283fa59.
SYSTEMS = {
    "mar": System(
        mar,
        MAR_SIZES,
        solvers.NAMES,
        published={size: MARSampling(cfg=cfg) for size, cfg in (("base", 2.9), ("large", 3.0), ("huge", 3.3))},
        demo=MARSampling(num_iter=24),  # 49 tokens
    ),
    "flowar": System(
        flowar,
        FLOWAR_SIZES,
        solvers.FLOW_NAMES,
        published={"small": _flowar(4.2), "large": _flowar(2.4), "huge": _flowar(2.4, "linear:50-15", high=0.7)},
        demo=_flowar(2.4),
    ),
    "xar": System(
        xar,
        XAR_SIZES,
        solvers.FLOW_NAMES,
        published={"base": _xar(2.7), "large": _xar(2.3), "huge": _xar(2.2)},
        demo=_xar(2.7),
    ),
    "harmon": System(
        harmon,
        HARMON_SIZES,
        solvers.NAMES,
        published=dict.fromkeys(HARMON_SIZES, HarmonSampling(image_size=(512, 512))),
        demo=HarmonSampling(num_iter=24),
        dtype=torch.bfloat16,
    ),
}


def check_settings(
    sampling: Sampling, model: Model, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """ValueError, which names the setting, where one cannot serve `model`, which may be on meta, in drawing `batch` images at once
    on `device` with weights in `dtype`, by default the model's. Nothing is drawn."""
    arguments, rows = sampling.arguments(model), batch  # the former for sizes that are no whole number of tokens
    if isinstance(sampling, MARSampling):
        images = image_part(model)
        tokens = math.prod(arguments.get("image_shape", (images.seq_h, images.seq_w)))
        if sampling.num_iter > tokens:
            raise ValueError(f"num_iter: expected 1 to {tokens} iterations (one token each at least), got {sampling.num_iter}")
        rows *= _most_at_once(tokens, sampling.num_iter)
    else:
        check_guidance(sampling.guidance)
    try:
        sampling.network_evaluations(model)
    except ValueError as error:
        if not str(error).startswith(("steps:", "schedule at")):
            raise
        raise ValueError(f"schedule: {sampling.schedule} does not fit: {error}") from error
    head = model.head
    rows *= 1 if sampling.cfg == 1 else 2
    backends.choose(sampling.backend, head.spec, dtype or head.dtype, device or head.device, rows)


def _most_at_once(tokens: int, num_iter: int) -> int:
    """Of an image's tokens, those that one iteration draws."""
    left = [tokens]
    for k in range(num_iter - 1):
        left.append(still_masked_after(k, num_iter, tokens, left[-1]))
    return max(before - after for before, after in pairwise([*left, 0]))


def image_part(model: Model) -> MAR | FlowAR | XAR:
    """What of a model has seq_h, seq_w, patch_size and vae_embed_dim."""
    return model.mar if isinstance(model, Harmon) else model


def load_model(
    checkpoint: Path | None = None,
    size: str | None = None,
    ema: bool = True,
    system: str = "mar",
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    num_heads: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    check: Callable[[Model, torch.dtype], None] | None = None,
) -> Model:
    """The demo's model of `system`, or the one of `checkpoint`: built from the file's own metadata, else as the published `size`,
    else, with None or CUSTOM, as names and shapes tell (see `infer`).

    system: a key of SYSTEMS. tokenizer: a tokenizer.json, which a Harmon needs to read prompts; by default the demo's, or the file
    of that name beside the checkpoint, if there is one. dtype: of the weights; by default as published, else float32. num_heads,
    patch_size: of a custom size, where shapes do not tell. check: called with the model on meta and the dtype that it will have,
    before anything is allocated.

    The model has the constructor's arguments in `arguments`, and in `taken_for_granted` what of a custom size no shape tells.
    Raises FileNotFoundError, or ValueError where system, size and the file do not fit, and for a file of a published size with
    None; nothing is allocated before that is known.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system: expected one of {list(SYSTEMS)}, got {system!r}")
    if tokenizer is not None and system != "harmon":
        raise ValueError(f"tokenizer: only Harmon takes one, got {tokenizer} for system {system!r}")
    if checkpoint is None:
        checkpoint = demo_checkpoint(system)
    make = SYSTEMS[system].make
    look = f"`disa-fast inspect {shlex.quote(str(checkpoint))}` says what it is"
    arguments, inferred = _arguments(checkpoint, size, ema, system, Given(num_heads, patch_size), look)
    own = "size" not in arguments and inferred is None
    dtype = dtype or (torch.float32 if own else SYSTEMS[system].dtype)
    read = _tokenizer(tokenizer, checkpoint) if system == "harmon" else None

    def check_with_tokenizer(model: Model) -> None:
        if isinstance(model, Harmon):
            model.tokenizer = read
        if check is not None:
            check(model, dtype)

    try:
        model = build(lambda: make(**arguments), checkpoint, ema, dtype, check_with_tokenizer)
    except ValueError as error:
        if not str(error).startswith(f"{checkpoint}: "):
            raise
        raise ValueError(f"{error}; {look}") from error
    vars(model).update(arguments=arguments, taken_for_granted=[] if inferred is None else list(inferred.assumed))
    return model.eval()


def demo_checkpoint(system: str) -> Path:
    """The file of the model that the demo draws with."""
    return DEMO_WEIGHTS / f"{system}_fashion_mnist.safetensors"


def _arguments(
    checkpoint: Path, size: str | None, ema: bool, system: str, given: Given, look: str
) -> tuple[dict[str, Any], Inferred | None]:
    """The constructor's, as `load_model` has it, and where they come from if names and shapes tell them; look: of where to learn
    more."""
    sizes, config = SYSTEMS[system].sizes, read_config(checkpoint)
    if config is not None:
        name, arguments = config
        if name != system:
            raise ValueError(f"system: {checkpoint} says that it holds {name!r}, got {system!r}")
        if size is not None:
            raise ValueError(f"size: {checkpoint} says itself how it is built, got {size!r}")
        if given != NOTHING:
            raise ValueError(
                f"num_heads, patch_size: {checkpoint} says itself how it is built, got {given.num_heads}, {given.patch_size}"
            )
        return arguments, None
    if size in sizes:
        if given != NOTHING:
            raise ValueError(f"num_heads, patch_size: size {size!r} has its own; expected them with size {CUSTOM!r} or none")
        return {"size": size}, None
    unsaid = f"size: {checkpoint} does not say how it is built; expected one of {', '.join(sizes)} for {system}, got {size!r}"
    if size not in (None, CUSTOM):
        raise ValueError(f"{unsaid}; or {CUSTOM}, for a size that names and shapes tell")
    given = dataclasses.replace(given, config=config_beside(checkpoint))
    try:
        inferred = infer(system, read_state_dict(checkpoint, ema), given)
    except NotToldError as error:
        raise ValueError(
            f"checkpoint: {checkpoint} does not say how it is built, and its names and shapes are of no {system}: {error}; {look}"
        ) from error
    published = published_size(system, inferred, sizes)
    if published is not None and size is None:
        raise ValueError(f"{unsaid}; by its names and shapes it is {published}")
    if inferred.open:
        raise ValueError(f"size: {checkpoint} is of a custom size ({inferred}); to be given as well: {'; '.join(inferred.open)}")
    return dict(inferred.arguments), inferred


def config_beside(checkpoint: str | Path) -> Path | None:
    """The config.json beside a checkpoint, if there is one."""
    path = Path(checkpoint).with_name("config.json")
    return path if path.is_file() else None


def _tokenizer(path: Path | None, checkpoint: Path) -> Any:
    """The tokenizers.Tokenizer of a file, see `tokenizer_file`; None if there is none."""
    from tokenizers import Tokenizer

    path = tokenizer_file(path, checkpoint)
    if path is None:
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: cannot be read as a tokenizer.json: {error}") from error


def tokenizer_file(path: Path | None, checkpoint: Path) -> Path | None:
    """`path` itself; if None the tokenizer.json that belongs to `checkpoint`, if there is one. FileNotFoundError for no file."""
    if path is None:
        of_demo = Path(checkpoint).parent == DEMO_WEIGHTS
        path = Path(checkpoint).with_suffix(".tokenizer.json") if of_demo else Path(checkpoint).with_name("tokenizer.json")
        return path if path.is_file() else None
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer")
    return path
