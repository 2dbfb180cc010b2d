"""`disa-fast demo`: images of one seed with constant steps and with DiSA, side by side, timed and judged, for one of the systems.

Speed-ups are over constant steps in plain PyTorch (backend `reference`); all other rows run on the backend asked for.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import backends
from ..collect_env import cpu_name
from ..files import check_folder, written_aside
from ..generate import Kind, classes_of, in_turn, sample
from ..models import Harmon
from ..pictures import columns_of, panel, save_png, side_by_side
from ..systems import Model, Sampling, check_settings, image_part
from . import data
from .quality import Classifier, fid_class, measure, measure_accuracy, no_distance

FILES = ("demo.png", "demo.json")
PICTURE_ROWS = 5
WARM_UP = "constant:2"
BASELINE_STEPS = {"mar": 100, "flowar": 25, "xar": 50, "harmon": 100}  # constant ones, as published without DiSA


def draw_images(
    model: Model,
    subjects: Sequence[int] | Sequence[str],
    sampling: Sampling,
    seed: int,
    batch: int,
    progress: bool = True,
    name: str = "drawing",
) -> tuple[Tensor, float]:
    """([N, C, H, W] float32, seconds): `subjects` in batches, all noise and orders from one generator seeded with `seed`."""
    generator = torch.Generator(model.head.device).manual_seed(seed)
    parts, started = [], time.perf_counter()
    with tqdm(total=len(subjects), desc=name, unit="image", disable=not progress) as bar:
        for start in range(0, len(subjects), batch):
            parts.append(sample(model, subjects[start : start + batch], sampling, generator=generator))
            bar.update(len(parts[-1]))
    return torch.cat(parts).float().cpu(), time.perf_counter() - started


def check_demo(model: Model) -> None:
    """ValueError for a model that does not draw Fashion-MNIST's 28x28 grey images, or 32x32 with a margin. It may be on meta."""
    images_of = image_part(model)
    side, grey = images_of.seq_h * images_of.patch_size, images_of.vae_embed_dim == 1
    classes = len(data.CLASSES) if isinstance(model, Harmon) else len(classes_of(model))
    if not grey or side not in (data.SIDE, data.PADDED_SIDE) or classes != len(data.CLASSES):
        raise ValueError(
            "checkpoint: the demo needs a model of 28x28 grey images, or 32x32 with a margin, in 10 classes; try disa-fast generate"
        )


def runs_of(system: str, sampling: Sampling) -> dict[str, Sampling]:
    """What the demo draws with, by what it is called; first the published loop with constant steps."""
    constant = dataclasses.replace(sampling, schedule=f"constant:{BASELINE_STEPS[system]}")
    steps = f"{BASELINE_STEPS[system]} constant steps"
    runs = {f"{steps}, plain PyTorch": dataclasses.replace(constant, backend="reference")}
    if sampling.solver == "ddpm":
        runs[f"{steps}, no clip"] = dataclasses.replace(constant, clip=None)
    return runs | {steps: constant, f"DiSA {sampling.schedule}": sampling}


def not_measured(kinds: Sequence[Kind], num_images: int) -> dict[str, str]:
    """What of "accuracy" and "frechet" cannot be measured of so many images of these kinds, and why not."""
    unknown = [kind.name for kind in kinds if kind.label is None]
    if unknown:
        reason = f"{unknown[0]!r} names none of the ten classes"
        return {"accuracy": reason, "frechet": reason}
    reason = no_distance(in_turn([kind.label for kind in kinds], num_images))
    return {} if reason is None else {"frechet": f"that takes {reason}"}


def run_demo(
    system: str,
    model: Model,
    sampling: Sampling,
    kinds: Sequence[Kind],
    num_images: int,
    seed: int,
    batch: int,
    out: Path,
    progress: bool,
) -> str:
    """Draw, write demo.png and demo.json into `out`, and return as text the table, and a sentence on what was not measured.

    kinds: taken in turn. Raises ValueError for a model that `check_demo` refuses, for settings that do not fit, and for a folder
    that cannot be written to, all before anything is drawn.
    """
    check_demo(model)
    check_folder(out, FILES)
    missing = not_measured(kinds, num_images)
    if "accuracy" not in missing:
        classifier = Classifier.load()
        labels = torch.tensor(in_turn([kind.label for kind in kinds], num_images))
    if "frechet" not in missing:
        fid_class()  # missing, it is missed before the drawing and not after
    subjects = in_turn([kind.subject for kind in kinds], num_images)
    columns = columns_of([kind.name for kind in kinds])
    runs = runs_of(system, sampling)
    plain = next(iter(runs))
    for settings in runs.values():
        check_settings(settings, model, batch)
    evaluations = {name: settings.network_evaluations(model) for name, settings in runs.items()}
    draw_images(model, subjects[:10], dataclasses.replace(sampling, schedule=WARM_UP), seed, batch, progress=False)

    rows, panels = [], []
    for name, settings in runs.items():
        images, seconds = draw_images(model, subjects, settings, seed, batch, progress, name)
        images = data.cropped(images)
        rows.append({"name": name, "evaluations": evaluations[name], "seconds": seconds})
        if "frechet" not in missing:
            rows[-1] |= dataclasses.asdict(measure(images, labels, classifier))
        elif "accuracy" not in missing:
            accuracy, interval = measure_accuracy(images, labels, classifier)
            rows[-1] |= {"accuracy": accuracy, "accuracy_interval": interval}
        if name != plain:  # its pictures are those of the same steps on the other backend
            panels.append(panel(images[: PICTURE_ROWS * len(columns)], columns, name))
    for row in rows:
        row["speed_up"] = rows[0]["seconds"] / row["seconds"]

    head = model.head
    result = {
        "system": system,
        "subjects": [kind.subject for kind in kinds],
        "settings": {**vars(sampling), "schedule": str(sampling.schedule), "num_images": num_images, "seed": seed, "batch": batch},
        "backend": backends.choose(sampling.backend, head.spec, head.dtype, head.device, 2 * batch),
        "machine": {"device": _device_name(head.device), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "date": datetime.date.today().isoformat(),
        "not_measured": missing,
        "rows": rows,
    }
    save_png(side_by_side(panels), out / FILES[0])
    with written_aside(out / FILES[1]) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n")
    return "\n".join([table(rows), *_sentences(missing)])


def _sentences(missing: Mapping[str, str]) -> list[str]:
    """What was not measured, and why, behind an empty line."""
    if not missing:
        return []
    what = "Class accuracy and Frechet distance were" if "accuracy" in missing else "The Frechet distance was"
    return ["", f"{what} not measured: {missing['frechet']}."]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | network evaluations an image | seconds | speed-up | class accuracy | Frechet distance |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = frechet = "not measured"
        if "accuracy" in row:
            low, high = (100 * bound for bound in row["accuracy_interval"])
            accuracy = f"{100 * row['accuracy']:.1f} % ({low:.1f} to {high:.1f})"
        if "frechet" in row:
            frechet = f"{row['frechet']:.2f} ({row['frechet_interval'][0]:.2f} to {row['frechet_interval'][1]:.2f})"
        lines.append(
            f"| {row['name']} | {row['evaluations']} | {row['seconds']:.1f} | {row['speed_up']:.2f}x | {accuracy} | {frechet} |"
        )
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
