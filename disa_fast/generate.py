"""Images into a folder: resumable, shared out over processes, each with a random stream of its own.

What is random about image i follows from the seed and i alone, so neither batch size nor number of processes plays a part. Files
are written aside and renamed: what is there is whole, and is not drawn again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .files import written_aside
from .models import MAR, Harmon
from .philox import Philox
from .pictures import save_png, to_pixels
from .systems import Model, Sampling, image_part

RECORD = "run.json"
_ORDER_STEP = 2**32 - 1  # of Philox: beyond all steps of a trajectory


@dataclass(frozen=True)
class Kind:
    """Of images: what the model is given, what to call it, and the class that they ought to show, if known."""

    subject: int | str
    name: str
    label: int | None


def classes_of(model: Model, wanted: Sequence[int] | None = None) -> Sequence[int]:
    """The classes that are wanted, or all that there are. ValueError for one that the model does not have."""
    # FlowAR and xAR have one more embedding, for no class.
    count = model.class_emb.num_embeddings if isinstance(model, MAR) else model.no_class
    if wanted is None:
        return range(count)
    if not all(0 <= c < count for c in wanted):
        raise ValueError(f"labels: expected classes 0..{count - 1}, got {list(wanted)}")
    return wanted


def in_turn(subjects: Sequence[Any], count: int) -> list[Any]:
    """`count` subjects: those over and over."""
    return [subjects[i % len(subjects)] for i in range(count)]


def sample(model: Model, subjects: Sequence[int] | Sequence[str], sampling: Sampling, **source: Any) -> Tensor:
    """[N, C, H, W] on the model's device: images of classes, or for a Harmon of prompts, with the noise of `source`, which are
    arguments of sample_tokens."""
    given = list(subjects) if isinstance(model, Harmon) else torch.tensor(subjects, device=model.head.device)
    return model.sample_tokens(given, **sampling.arguments(model), **source)


def sample_numbered(
    model: Model, subjects: Sequence[int] | Sequence[str], numbers: Sequence[int], sampling: Sampling, seed: int
) -> Tensor:
    """[N, C, H, W] on the model's device: of all the images that there are for `seed`, those with these numbers.

    ValueError for a seed that is not at least 0 and below 2**64.
    """
    philox, device = Philox(seed, torch.tensor(numbers)), model.head.device
    if isinstance(model, MAR | Harmon):
        images = image_part(model)
        tokens = math.prod(sampling.arguments(model).get("image_shape", (images.seq_h, images.seq_w)))
        orders = philox.normal([_ORDER_STEP], len(numbers), tokens)[0].argsort(dim=1, stable=True).to(device)
        return sample(model, subjects, sampling, orders=orders, rng=philox)
    return sample(model, subjects, sampling, draw=_Numbered(philox, device))


class _Numbered:
    """Noise for FlowAR and xAR, as their `draw`: image by image, from each one's stream of `philox`, a step a call."""

    def __init__(self, philox: Philox, device: torch.device) -> None:
        self.philox, self.device, self.calls = philox, device, 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        images = len(self.philox.streams)
        noise = self.philox.normal([self.calls], images, math.prod(shape[1:]), dtype, self.device)[0]
        self.calls += 1
        return noise.unflatten(1, shape[1:]).repeat(shape[0] // images, *[1] * (len(shape) - 1))  # both halves under guidance


class Processes:
    """The processes that share a run, this one being number `rank` of `world`; alone unless torchrun started it."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def first(self, action: Callable[[], None]) -> None:
        """Do it in the first process alone, while the others wait. Its ValueError or OSError is raised in all, as a ValueError."""
        errors: list[str | None] = [None]
        if self.rank == 0:
            try:
                action()
            except (ValueError, OSError) as error:
                errors = [str(error)]
        if self.world > 1:
            dist.broadcast_object_list(errors)
        if errors[0] is not None:
            raise ValueError(errors[0])

    def total(self, count: int) -> int:
        """The sum over all processes; they wait for each other."""
        counts = torch.tensor(count)
        if self.world > 1:
            dist.all_reduce(counts)
        return int(counts)


@contextmanager
def processes() -> Iterator[Processes]:
    """Those of torchrun, joined for as long as the block lasts, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # whoever is done first waits for the last
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def check_run(folder: Path, record: Mapping[str, object], paths: Sequence[Path]) -> None:
    """ValueError, naming what differs, if `folder` holds the images of another run than that which `record` describes, as JSON.

    Removes what a killed run left half written.
    """
    path, record = folder / RECORD, json.loads(json.dumps(record))
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read as the record of a run: {error}") from error
        differing = [
            f"{key}: {before.get(key)!r} there, {record.get(key)!r} now"
            for key in {**before, **record}
            if before.get(key) != record.get(key)
        ]
        if "sha256" in (record.get("checkpoint") or {}) and "sha256" not in (before.get("checkpoint") or {}):
            raise ValueError(
                f"out: {folder} holds the images of another run, or of an older version: its {RECORD} does not tell what the "
                "weights were, so it cannot be known whether they are the same; choose another folder"
            )
        if differing:
            raise ValueError(f"out: {folder} holds the images of another run ({'; '.join(differing)}); choose another folder")
    elif any(image.exists() for image in paths):
        raise ValueError(f"out: {folder} holds images, and no {RECORD} that says of what run; choose another folder")
    for aside in folder.glob(".[0-9]*"):
        aside.unlink()


def generate(
    draw: Callable[[Sequence[int]], Tensor],
    paths: Sequence[Path],
    record: Mapping[str, object],
    batch: int,
    shared: Processes,
    progress: bool = True,
) -> int:
    """Write image i to paths[i], all in one folder, where there is no file yet; returns how many this process wrote.

    draw(numbers) -> [N, C, H, W]: images by number. They are drawn in groups of `batch` with consecutive numbers, of which every
    process takes its share, and a group always whole: so an image was always drawn beside the same others. `record` is written
    along with the first.
    """
    record_path = paths[0].parent / RECORD
    groups = [range(start, min(start + batch, len(paths))) for start in range(0, len(paths), batch)][shared.rank :: shared.world]
    missing = [[i for i in group if not paths[i].exists()] for group in groups]
    mine, left = sum(map(len, groups)), sum(map(len, missing))
    name = "drawing" if shared.world == 1 else f"drawing a share of 1/{shared.world}"
    with tqdm(total=mine, initial=mine - left, desc=name, unit="image", disable=not progress or shared.rank > 0) as bar:
        for group, numbers in zip(groups, missing, strict=True):
            if not numbers:
                continue
            images = draw(group)
            if not record_path.exists():
                with written_aside(record_path) as aside:
                    aside.write_text(json.dumps(record, indent=1) + "\n")
            for i in numbers:
                save_image(images[i - group.start].float().cpu(), paths[i])
            bar.update(len(numbers))
    return left


def save_image(image: Tensor, path: Path) -> None:
    """[C, H, W] float32 as a PNG, of 1 or 3 channels in [-1, 1], or as .npy, whichever the path is."""
    if path.suffix == ".png":
        save_png(Image.fromarray(to_pixels(image)), path)
    else:
        with written_aside(path) as aside:
            np.save(aside, image.numpy())
