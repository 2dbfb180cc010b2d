"""Images from a model of one of the systems: load a checkpoint, sample in batches, write PNGs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import solvers
from .checkpoint import load_checkpoint, read_config
from .files import written_aside
from .models import MAR, XAR, FlowAR, flowar, mar, xar
from .models.flowar import SIZES as FLOWAR_SIZES
from .models.mar import SIZES as MAR_SIZES
from .models.xar import SIZES as XAR_SIZES
from .pictures import save_png, to_pixels
from .schedule import Schedule, as_schedule, steps_at
from .solvers import DEFAULT_CLIP, Solver

DEMO_WEIGHTS = Path(__file__).parent / "demo" / "weights"


@dataclass(frozen=True)
class MARSampling:
    """Everything but labels and seed that decides what `MAR.sample_tokens` draws; see there."""

    schedule: Schedule | str = "linear:50-5"
    solver: str | Solver = "ddpm"
    clip: int | str | None = DEFAULT_CLIP
    num_iter: int = 64
    cfg: float = 3.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    backend: str = "auto"

    def network_evaluations(self, model: MAR) -> int:
        """Evaluations of the head for one image: the sum over k of what T(k) leaves after clipping."""
        schedule, table_for = as_schedule(self.schedule), solvers.resolve(self.solver, self.clip)
        return sum(len(table_for(steps_at(schedule, k, self.num_iter))) for k in range(self.num_iter))


@dataclass(frozen=True)
class FlowSampling:
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


Model = MAR | FlowAR | XAR
Sampling = MARSampling | FlowSampling


@dataclass(frozen=True)
class System:
    """One kind of model: its constructor, its published sizes, the names of its solvers, and its default settings, those for a
    published checkpoint and those for the demo's."""

    make: Callable[..., Model]
    sizes: Mapping[str, Mapping[str, int | bool]]
    solvers: Sequence[str]
    published: Sampling
    demo: Sampling


SYSTEMS = {
    "mar": System(
        mar,
        MAR_SIZES,
        solvers.NAMES,
        published=MARSampling(),
        demo=MARSampling(num_iter=24),  # 49 tokens
    ),
    "flowar": System(
        flowar,
        FLOWAR_SIZES,
        solvers.FLOW_NAMES,
        published=FlowSampling("linear:25-15", "euler", cfg=2.4, guidance=(0.0, 0.9)),
        demo=FlowSampling("linear:25-15", "euler", cfg=2.4, guidance=(0.0, 0.9)),
    ),
    "xar": System(
        xar,
        XAR_SIZES,
        solvers.FLOW_NAMES,
        published=FlowSampling("linear:50-15", "euler_maruyama", cfg=2.7, guidance=(0.0, 1.0)),
        demo=FlowSampling("linear:50-15", "euler_maruyama", cfg=2.7, guidance=(0.0, 1.0)),
    ),
}


def load_model(checkpoint: Path | None = None, size: str | None = None, ema: bool = True, system: str = "mar") -> Model:
    """The demo's model of `system`, or the one of `checkpoint`: built from the file's own metadata, else as the published `size`.

    system: a key of SYSTEMS. Raises FileNotFoundError, or ValueError where system, size and the file do not fit.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system: expected one of {list(SYSTEMS)}, got {system!r}")
    make, sizes = SYSTEMS[system].make, SYSTEMS[system].sizes
    checkpoint = DEMO_WEIGHTS / f"{system}_fashion_mnist.safetensors" if checkpoint is None else checkpoint
    config = read_config(checkpoint)
    if config is None:
        if size not in sizes:
            raise ValueError(
                f"size: {checkpoint} does not say how it is built; expected one of {', '.join(sizes)} for {system}, got {size!r}"
            )
        model = make(size=size)
    else:
        name, arguments = config
        if name != system:
            raise ValueError(f"system: {checkpoint} says that it holds {name!r}, got {system!r}")
        if size is not None:
            raise ValueError(f"size: {checkpoint} says itself how it is built, got {size!r}")
        model = make(**arguments)
    load_checkpoint(model, checkpoint, ema)
    return model.eval()


def classes_of(model: Model, wanted: Sequence[int] | None = None) -> Sequence[int]:
    """The classes that are wanted, or all that there are. ValueError for one that the model does not have."""
    # FlowAR and xAR have one more embedding, for no class.
    count = model.class_emb.num_embeddings if isinstance(model, MAR) else model.no_class
    if wanted is None:
        return range(count)
    if not all(0 <= c < count for c in wanted):
        raise ValueError(f"labels: expected classes 0..{count - 1}, got {list(wanted)}")
    return wanted


def labels_in_turn(classes: Sequence[int], count: int) -> Tensor:
    """[count] int64: the classes over and over."""
    return torch.tensor(classes).repeat(-(-count // len(classes)))[:count]


def draw_images(
    model: Model, labels: Tensor, sampling: Sampling, seed: int, batch: int, progress: bool = True, name: str = "drawing"
) -> tuple[Tensor, float]:
    """([N, C, H, W] float32, seconds): `labels` in batches, all noise and MAR's orders from one generator seeded with `seed`."""
    device = model.class_emb.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    parts, started = [], time.perf_counter()
    bar = tqdm(total=len(labels), desc=name, unit="image", disable=not progress)
    with bar:
        for part in labels.to(device).split(batch):
            parts.append(model.sample_tokens(part, generator=generator, **vars(sampling)))
            bar.update(len(part))
    return torch.cat(parts).float().cpu(), time.perf_counter() - started


def save_images(images: Tensor, labels: Tensor, folder: Path, name_of: Callable[[int], str] = str) -> list[Path]:
    """One file an image: PNG for 1 or 3 channels, else the latents themselves as .npy, [C, H, W] float32."""
    paths = []
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / f"{i:05d}_{name_of(label)}"
        if len(image) in (1, 3):
            path = path.with_suffix(".png")
            save_png(Image.fromarray(to_pixels(image)), path)
        else:
            path = path.with_suffix(".npy")
            with written_aside(path) as aside:
                np.save(aside, image.numpy())
        paths.append(path)
    return paths
