"""The CPU in the place of a GPU, for gpu_first.py --dry-run and for tests: everything small, few and short, no number worth a look.

`hoisted` stands for `cuda` and `triton`, and tests of planted/ for those that need a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from disa_fast import backends
from disa_fast.heads.mlp import MLPSpec

from . import gpu_measure, gpu_tests, images, soak, tune_cuda, tune_triton
from .images import Setting, reduced

GPU = "NVIDIA X1 (dry run)"
SIZES = {"MAR-B": (32, 1), "MAR-L": (48, 1), "MAR-H": (64, 1)}
PEAKS = {"HBM GB/s": 50.0, "L2 GB/s": 100.0, "bfloat16 TFLOP/s": 0.5, "TF32 TFLOP/s": 0.5}
MEASURED = {
    "ON_GPU": True,
    "CORRECT": ((32, 1, 8),),
    "SIZES": SIZES,
    "Z_CHANNELS": 32,
    "STEPS": 3,
    "STEPS_OF_MANY": 2,
    "TURNS": 1,
    "SAMPLE_SECONDS": 0.0,
    "SLACK": 1,
    "ENTRIES": ((32, 2, 1),),
    "ENTRY_CALLS": 3,
    "SOAK_CALLS": 20,
    "COMPILE_STEP_SECONDS": 1,
    "COMPILE_SECONDS": 1,
    "captured": lambda loop: loop,
    "forget": lambda: None,
    "launches": lambda call: 12,
    "measured_peaks": lambda: dict(PEAKS),
    "iterations": lambda: [(1, 2), (2, 1)],
    "sanitizer_tool": lambda: None,
}
SOAKED = {
    "SPECS": {"MLP": (MLPSpec(16, 32, 1, 32), torch.bfloat16)},
    "STEPS": (1,),
    "ROWS": (2,),
    "CALLERS": (1,),
    "SAMPLES": 10,
    "MIN_SAMPLES": 2,
}

Set = Callable[[object, str, object], None]


def install(put: Set = setattr) -> None:
    """put: as setattr; a test's monkeypatch.setattr."""
    for name, value in MEASURED.items():
        put(gpu_measure, name, value)
    for name, value in SOAKED.items():
        put(soak, name, value)
    put(gpu_measure.probes, "why_not", lambda: "a dry run")
    put(gpu_measure, "Images", small_images)
    put(gpu_tests, "FOLDER", Path(__file__).parent / "planted")
    put(torch, "compile", lambda f, **how: f)
    put(torch.cuda, "get_device_name", lambda device=None: GPU)


def stand_in(put: Set = setattr) -> None:
    """`hoisted` for the backends of a GPU, and made-up times for the tuners."""
    put(backends, "BACKENDS", backends.BACKENDS | {"cuda": backends.hoisted, "triton": backends.hoisted})
    put(soak, "given_up", lambda head: [])
    put(tune_cuda, "DEVICE", torch.device("cuda"))
    put(tune_cuda, "random_head", lambda size: size)
    put(tune_cuda, "forget", lambda: None)
    put(tune_cuda, "speed", lambda head, rows: 2.0 - rows / 20)
    put(tune_triton, "main", lambda: time.sleep(0.01))


def small_images(name: str, device: torch.device, batch: int) -> images.Images:
    return images.Images(name, device, min(batch, 2), smaller(images.SETTINGS[name]))


def smaller(setting: Setting) -> Setting:
    """The same kind of model, with few blocks, tokens and steps."""
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()} | {"img_size": 64}
    if setting.system == "flowar":
        sizes |= {"scale": (1, 2, 4), "diffloss_w": 64, "diffloss_d": 1}
    return reduced(setting, sizes, schedule="linear:4-3")
