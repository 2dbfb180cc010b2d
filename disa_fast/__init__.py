"""disa_fast: autoregressive image models with diffusion heads, made fast. See README.md."""

from . import checkpoint, models, profiling, solvers, vae
from .accelerate import accelerate, restore
from .errors import UnsupportedError
from .explain import explain
from .heads import FlowTransformerHead, MLPHead
from .philox import Philox
from .schedule import Constant, Cosine, Linear, StepList, TwoStage, parse_schedule

__all__ = [
    "Constant",
    "Cosine",
    "FlowTransformerHead",
    "Linear",
    "MLPHead",
    "Philox",
    "StepList",
    "TwoStage",
    "UnsupportedError",
    "accelerate",
    "checkpoint",
    "explain",
    "models",
    "parse_schedule",
    "profiling",
    "restore",
    "solvers",
    "vae",
]
