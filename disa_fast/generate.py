"""Images from a MAR: load a checkpoint, sample in batches, write PNGs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .checkpoint import load_checkpoint, read_config
from .files import written_aside
from .models import MAR, mar
from .models.mar import SIZES
from .pictures import save_png, to_pixels
from .schedule import Schedule, as_schedule, steps_at
from .solvers import DEFAULT_CLIP, Solver, resolve

DEMO_CHECKPOINT = Path(__file__).parent / "demo" / "weights" / "mar_fashion_mnist.safetensors"


@dataclass(frozen=True)
class Sampling:
    """Everything but labels and seed that decides what `MAR.sample_tokens` draws; see there."""

    schedule: Schedule | str = "linear:50-5"
    solver: str | Solver = "ddpm"
    clip: int | str | None = DEFAULT_CLIP
    num_iter: int = 64
    cfg: float = 3.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    backend: str = "auto"

    def network_evaluations(self) -> int:
        """Evaluations of the head for one image: the sum over k of what T(k) leaves after clipping."""
        schedule, table_for = as_schedule(self.schedule), resolve(self.solver, self.clip)
        return sum(len(table_for(steps_at(schedule, k, self.num_iter))) for k in range(self.num_iter))


def load_model(checkpoint: Path | None = None, size: str | None = None, ema: bool = True) -> MAR:
    """The demo's MAR, or the one of `checkpoint`: built from the file's own metadata, else as the published `size`.

    Raises FileNotFoundError, or ValueError where the file and the size do not fit.
    """
    checkpoint = DEMO_CHECKPOINT if checkpoint is None else checkpoint
    config = read_config(checkpoint)
    if config is None:
        if size is None:
            raise ValueError(f"size: {checkpoint} does not say how it is built; expected one of {', '.join(SIZES)}")
        model = mar(size=size)
    else:
        name, arguments = config
        if name != "mar":
            raise ValueError(f"{checkpoint}: expected a mar, it holds a {name}")
        if size is not None:
            raise ValueError(f"size: {checkpoint} says itself how it is built, got {size!r}")
        model = MAR(**arguments)
    load_checkpoint(model, checkpoint, ema)
    return model.eval()


def labels_in_turn(classes: Sequence[int], count: int) -> Tensor:
    """[count] int64: the classes over and over."""
    return torch.tensor(classes).repeat(-(-count // len(classes)))[:count]


def draw_images(
    model: MAR, labels: Tensor, sampling: Sampling, seed: int, batch: int, progress: bool = True, name: str = "drawing"
) -> tuple[Tensor, float]:
    """([N, C, H, W] float32, seconds): `labels` in batches, all noise and orders from one generator seeded with `seed`."""
    generator = torch.Generator(device=model.fake_latent.device).manual_seed(seed)
    parts, started = [], time.perf_counter()
    bar = tqdm(total=len(labels), desc=name, unit="image", disable=not progress)
    with bar:
        for part in labels.to(model.fake_latent.device).split(batch):
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
