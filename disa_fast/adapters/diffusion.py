"""Read what an object of MAR's structure samples with: the `gen_diffusion` of its diffloss.

Written against SpacedDiffusion and GaussianDiffusion as MAR (LTH14/mar at fe470ac), Harmon and the DiSA repository (283fa59) have
them. What an object does not show, such as betas, is taken for MAR's; the check of
disa_fast/adapters/check_mlp.py then proves it or not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..solvers import StepTable
from ..solvers.ddim import deterministic
from ..solvers.ddpm import ancestral
from ..solvers.diffusion import BASE_STEPS, Diffusion, cosine

# Names of guided-diffusion's enumerations, and what forks of it call the others.
_PREDICTS = {
    "EPSILON": "epsilon",
    "START_X": "start_x",
    "PREVIOUS_X": "previous_x",
    "VELOCITY": "velocity",
    "V": "velocity",
}
_VARIANCES = {
    "LEARNED_RANGE": "learned_range",
    "LEARNED": "learned",
    "FIXED_SMALL": "fixed_small",
    "FIXED_LARGE": "fixed_large",
}
SERVED = (
    "served are ancestral and DDIM sampling, unclipped, over any betas and timesteps, of networks that predict noise, the clean "
    "token or a velocity"
)


@dataclass(frozen=True, eq=False)
class Chain:
    """The timesteps that one diffusion of an object visits, [T] ascending, and their alphas_cumprod
    [T] float64, None where the object does not show them; base_steps: of how many."""

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray | None
    base_steps: int
    predicts: str
    variance: str
    time_scale: float

    def __len__(self) -> int:
        return len(self.timesteps)


def read_chain(diffusion: object) -> Chain | None:
    """The chain of a diffusion, or None if it shows no timesteps.

    Raises UnsupportedError for a prediction or a variance that no table expresses.
    """
    betas = _floats(getattr(diffusion, "betas", None))
    if betas is not None and not ((betas > 0) & (betas <= 1)).all():
        raise UnsupportedError(f"model: gen_diffusion.betas: expected numbers above 0 and up to 1, got {betas}")
    timesteps = _whole_numbers(getattr(diffusion, "timestep_map", None))
    if timesteps is None:
        if betas is None:
            return None
        timesteps = np.arange(len(betas))
    order = np.argsort(timesteps, kind="stable")
    if not np.array_equal(order, np.arange(len(order))) or len(np.unique(timesteps)) < len(timesteps):
        return None
    base = getattr(diffusion, "original_num_steps", None)
    if not isinstance(base, int):
        base = BASE_STEPS if betas is None or len(betas) == len(timesteps) else len(betas)
        base = max(base, int(timesteps[-1]) + 1)
    alphas_cumprod = None
    if betas is not None:
        alphas_cumprod = np.cumprod(1 - betas)
        if len(betas) != len(timesteps):
            alphas_cumprod = alphas_cumprod[timesteps] if len(betas) == base else None
    rescaled = bool(getattr(diffusion, "rescale_timesteps", False))
    return Chain(
        timesteps,
        alphas_cumprod,
        base,
        _named(diffusion, "model_mean_type", _PREDICTS),
        _named(diffusion, "model_var_type", _VARIANCES),
        BASE_STEPS / base if rescaled else 1.0,
    )


def _named(diffusion: object, attribute: str, known: dict[str, str]) -> str:
    """What an enumeration's member of guided-diffusion stands for; MAR's if there is no such attribute."""
    member = getattr(diffusion, attribute, None)
    if member is None:
        return next(iter(known.values()))
    name = str(getattr(member, "name", member)).upper()
    if name not in known:
        raise UnsupportedError(f"model: gen_diffusion.{attribute} is {member!r}, which no table expresses; {SERVED}")
    return known[name]


def process_of(chain: Chain, trained_with: Chain | None) -> Diffusion:
    """The process that a chain is of.

    trained_with: the chain of the object's train_diffusion, if it shows one. The process knows all
    base timesteps if one of these agrees with the chain where that is: MAR's cosine schedule, the
    chain itself, train_diffusion, the cosine or the linear schedule of its number of base steps;
    else those of the chain alone.
    """
    base = chain.base_steps
    candidates = [cosine().alphas_cumprod] if base == BASE_STEPS else []
    candidates += [one.alphas_cumprod for one in (chain, trained_with) if one is not None and one.alphas_cumprod is not None]
    candidates += [_cosine(base), np.cumprod(1 - np.linspace(0.1 / base, 20 / base, base))]
    shown = chain.alphas_cumprod
    for candidate in candidates:
        if len(candidate) == base and (shown is None or _agree(candidate[chain.timesteps], shown)):
            break
    else:
        candidate = np.full(base, np.nan)
        candidate[chain.timesteps] = shown
    if (candidate is cosine().alphas_cumprod) and _is_mars(chain):
        return cosine()
    return Diffusion(candidate, chain.predicts, chain.variance, chain.time_scale)


def _is_mars(chain: Chain) -> bool:
    return (chain.predicts, chain.variance, chain.time_scale) == ("epsilon", "learned_range", 1.0)


def _cosine(base: int) -> np.ndarray:
    """alphas_cumprod of the cosine schedule of another number of base steps, betas capped at 0.999."""
    edges = np.arange(base + 1) / base
    alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


def _agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two alphas_cumprod are the same but for rounding, as signal and as noise."""
    as_signal = np.allclose(np.sqrt(ours), np.sqrt(theirs), rtol=1e-5, atol=0)
    return as_signal and np.allclose(1 - ours, 1 - theirs, rtol=1e-6, atol=1e-12)


def table_of(chain: Chain, process: Diffusion, solver: str) -> StepTable:
    """What the object itself does with this chain, by "ddpm" or "ddim"."""
    return {"ddpm": ancestral, "ddim": deterministic}[solver](chain.timesteps, process)


def rows_of(table: StepTable, steps: Sequence[int]) -> StepTable:
    """Some rows of a table, which need not be a trajectory any more."""
    at = list(steps)
    columns = {name: getattr(table, name)[at] for name in ("t", "a", "b", "c", "l0", "l1", "noisy")}
    return StepTable(table.solver, draws=table.draws, output=table.output, **columns)


def shortened(diffusion: Any, count: int, keep: Sequence[int]) -> Any:
    """A copy of a diffusion of `count` steps that takes the steps `keep` alone, ascending, with the
    coefficients that they have among all.

    Works on what has an entry for each step: arrays, tensors, lists, buffers, and num_timesteps. Of
    an object that is made otherwise it may be no working copy: then the whole must be run.
    """
    short = copy.copy(diffusion)
    held = vars(short)
    if isinstance(short, nn.Module):
        held["_buffers"] = {name: _kept(value, count, keep) for name, value in short._buffers.items()}
    for name, value in list(held.items()):
        held[name] = _kept(value, count, keep)
    if "num_timesteps" in held:
        held["num_timesteps"] = len(keep)
    return short


def _kept(value: Any, count: int, keep: Sequence[int]) -> Any:
    if isinstance(value, np.ndarray | Tensor):
        return value[list(keep)] if value.ndim and value.shape[0] == count else value
    if isinstance(value, list | tuple) and len(value) == count:
        return type(value)(value[i] for i in keep)
    return value


def _floats(value: object) -> np.ndarray | None:
    """[N] float64 of an array or a tensor; None for anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    if not isinstance(value, np.ndarray) or value.ndim != 1 or not len(value) or value.dtype.kind != "f":
        return None
    return value.astype(np.float64)


def _whole_numbers(value: object) -> np.ndarray | None:
    """[N] int64 of a list, an array or a tensor of whole numbers; None for anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    value = np.asarray(value)
    if value.ndim != 1 or not len(value) or value.dtype.kind not in "iu":
        return None
    return value.astype(np.int64)
