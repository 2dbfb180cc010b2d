"""`disa-fast demo`: images of one seed with constant steps and with DiSA, side by side, timed and judged, for one of the systems.

Speed-ups are over constant steps in plain PyTorch (backend `reference`); all other rows run on the backend asked for.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import backends
from ..files import written_aside
from ..generate import Model, Sampling, classes_of, draw_images, labels_in_turn
from ..pictures import columns_of, panel, save_png, side_by_side
from . import data
from .quality import Classifier, fid_class, measure

PICTURE_ROWS = 5
BASELINE_STEPS = {"mar": 100, "flowar": 25, "xar": 50}  # constant ones, as published without DiSA


def run_demo(
    system: str,
    model: Model,
    sampling: Sampling,
    classes: Sequence[int] | None,
    num_images: int,
    seed: int,
    batch: int,
    out: Path,
    progress: bool,
) -> str:
    """Draw, write demo.png and demo.json into `out`, and return the table as text.

    classes: taken in turn; all if None. Raises ValueError for classes that are none, or a model that does not draw Fashion-MNIST's
    28x28 grey images, or 32x32 with a margin.
    """
    side, grey = model.seq_h * model.patch_size, model.vae_embed_dim == 1
    if not grey or side not in (data.SIDE, data.PADDED_SIDE) or len(classes_of(model)) != len(data.CLASSES):
        raise ValueError(
            "checkpoint: the demo needs a model of 28x28 grey images, or 32x32 with a margin, in 10 classes; try disa-fast generate"
        )
    classes = classes_of(model, classes)
    fid_class()  # missing, it is missed before the drawing and not after
    classifier = Classifier.load()
    labels = labels_in_turn(classes, num_images)
    columns = columns_of([data.CLASSES[c] for c in classes])
    constant = dataclasses.replace(sampling, schedule=f"constant:{BASELINE_STEPS[system]}")
    steps = f"{BASELINE_STEPS[system]} constant steps"
    plain = f"{steps}, plain PyTorch"
    runs = {plain: dataclasses.replace(constant, backend="reference")}
    if sampling.solver == "ddpm":
        runs[f"{steps}, no clip"] = dataclasses.replace(constant, clip=None)
    runs |= {steps: constant, f"DiSA {sampling.schedule}": sampling}
    evaluations = {name: settings.network_evaluations(model) for name, settings in runs.items()}  # a bad schedule shows here
    draw_images(model, labels[:10], dataclasses.replace(sampling, schedule="constant:2"), seed, batch, progress=False)  # warm up

    rows, panels = [], []
    for name, settings in runs.items():
        images, seconds = draw_images(model, labels, settings, seed, batch, progress, name)
        images = data.cropped(images)
        quality = measure(images, labels, classifier)
        rows.append({"name": name, "evaluations": evaluations[name], "seconds": seconds, **dataclasses.asdict(quality)})
        if name != plain:  # its pictures are those of the same steps on the other backend
            panels.append(panel(images[: PICTURE_ROWS * len(columns)], columns, name))
    for row in rows:
        row["speed_up"] = rows[0]["seconds"] / row["seconds"]

    head = model.head
    result = {
        "system": system,
        "settings": {**vars(sampling), "schedule": str(sampling.schedule), "num_images": num_images, "seed": seed, "batch": batch},
        "backend": backends.choose(sampling.backend, head.spec, head.dtype, head.device, 2 * batch),
        "machine": {"device": _device_name(head.device), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    save_png(side_by_side(panels), out / "demo.png")
    with written_aside(out / "demo.json") as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n")
    return table(rows)


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | network evaluations an image | seconds | speed-up | class accuracy | Frechet distance |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = (100 * bound for bound in row["accuracy_interval"])
        lines.append(
            f"| {row['name']} | {row['evaluations']} | {row['seconds']:.1f} | {row['speed_up']:.2f}x "
            f"| {100 * row['accuracy']:.1f} % ({low:.1f} to {high:.1f}) "
            f"| {row['frechet']:.2f} ({row['frechet_interval'][0]:.2f} to {row['frechet_interval'][1]:.2f}) |"
        )
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
