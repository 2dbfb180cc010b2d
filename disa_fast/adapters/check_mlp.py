"""The check of MAR- and Harmon-shaped objects: their own network and their own `sample` against ours, on the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..errors import UnsupportedError
from ..heads import MLPHead
from ..heads.mlp import draw_noise, draws_of
from ..schedule import Schedule, steps_at
from ..solvers import StepTable, resolve
from ..solvers.diffusion import Diffusion
from .check import (
    HALF_BOUND,
    LEAST_BOUND,
    SEED,
    DifferenceError,
    compared,
    in_float32,
    is_degenerate,
    parameters_made_by,
    random_like,
    refuse,
)
from .diffusion import SERVED, Chain, rows_of, shortened, table_of

ROWS = 2
GUIDANCE = 3.0
TEMPERATURE = 0.9
LONG = 7  # steps; of a longer trajectory some are run
K = 64  # of the AR loop that an object is told of
TIMES = (37, 901)
SMALL = 1e-3  # of weights whose layer norms see a variance of about their epsilon

GUIDED_SERVED = "served is guidance u + s (c - u) of the prediction, rows in halves, conditional first"


@dataclass(frozen=True, eq=False)
class Own:
    """What an object does by itself, as far as it shows that.

    solver: "ddpm", "ddim", "dpm_solver" or "dpm_solver++". chains: one diffusion for each step count
    from the lowest to the highest, or one alone; of DPM-Solver the counts. process: of the chains.
    schedule: which of them AR step k of K takes, where the object is told the step; else None.
    """

    solver: str
    chains: list[Chain] | list[int]
    process: Diffusion | None
    schedule: Schedule | None
    is_told: bool

    def chain_at(self, k: int) -> int:
        """The place among the chains of the one that AR step k of K takes."""
        if self.schedule is None or len(self.chains) == 1:
            return 0
        return steps_at(self.schedule, k, K) - steps_at(self.schedule, K - 1, K)

    def table_at(self, place: int, solver: str) -> StepTable:
        chain = self.chains[place]
        if isinstance(chain, int):
            return resolve(self.solver)(chain)
        return table_of(chain, self.process, solver)


@dataclass
class Found:
    """Relative errors that were measured, with the bounds that they kept."""

    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, error: float, bound: float) -> None:
        if error >= self.errors.get(name, 0.0):
            self.errors[name], self.bounds[name] = error, bound


def prove(
    diffloss: Any,
    net: nn.Module,
    own: Own,
    backend: str,
    dtype: torch.dtype,
    others: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The errors of ours against the object's own, under "network", "unguided" and "guided", each
    relative and over ROWS rows, "error", the largest of them, "bound", what it was allowed, "backend",
    that of the backend against plain PyTorch, and "solver", what the object's own `sample` does.

    others: values of other arguments of the object's `sample`. Weights are those of the object, in
    float32, and for the network random ones too, since the object's may not tell one function from
    another. Raises UnsupportedError, with the errors, where they differ.
    """
    found = Found()
    with parameters_made_by(net, _small):
        _check_network(net, found, "random weights")
    with parameters_made_by(net, in_float32):
        _check_network(net, found, "its own weights")
        if is_degenerate(net):
            with parameters_made_by(net, lambda _, p: random_like(p)):
                solver = _check_sample(diffloss, net, own, others or {}, found)
        else:
            solver = _check_sample(diffloss, net, own, others or {}, found)
    worst = max(found.errors, key=found.errors.__getitem__)
    errors: dict[str, object] = {"error": found.errors[worst], "bound": found.bounds[worst], **found.errors}
    errors["backend"] = _backend_error(net, own, solver, backend, dtype)
    return errors | {"rows": ROWS, "solver": solver}


# The network ------------------------------------------------------------------------------------------------------------


def _small(name: str, parameter: Tensor) -> Tensor:
    """Random weights under which the residual stream stays near SMALL, so that epsilons show."""
    into_stream = name.startswith("input_proj.") or (".mlp.2." in name and name.startswith("res_blocks."))
    return random_like(parameter, SMALL if into_stream else 1.0)


def _check_network(net: nn.Module, found: Found, weights: str) -> None:
    head = MLPHead.from_module(net)
    x, z = _numbers(head, ROWS)
    t = torch.tensor(TIMES[:ROWS], device=head.device)
    try:
        theirs = net.forward(x, t, z)
    except Exception as error:
        raise UnsupportedError(
            f"model: its network cannot be called as net.forward(x, t, z) with [{ROWS}, {head.spec.in_channels}] and "
            f"[{ROWS}, {head.spec.z_channels}] tensors: {type(error).__name__}: {error}; nothing is proven then. Pass check=False "
            "to accelerate it all the same"
        ) from error
    ours = head.network(x.dtype)(x, t, z)
    truth = head.network(torch.float64)(x.double(), t, z.double())
    if not isinstance(theirs, Tensor):
        theirs = torch.full_like(ours, torch.nan)
    try:
        found.add("network", *compared(theirs, ours, truth))
    except DifferenceError as difference:
        raise refuse(
            f"its network computes something else than the parameters' names say ({ROWS} rows, {weights})",
            difference,
            f"{type(net).__name__}.forward, a hook, or what replaces a method of one of its modules, is not MAR's",
            "Served is MAR's head: SiLU, layer norms with epsilon 1e-6, frequencies with period 10000",
        ) from None


def _numbers(head: MLPHead, rows: int) -> tuple[Tensor, Tensor]:
    """(x, z) random, the same each time, in the parameters' dtype."""
    generator = torch.Generator().manual_seed(SEED)
    x, z = (torch.randn(rows, size, generator=generator) for size in (head.spec.in_channels, head.spec.z_channels))
    return x.to(head.device, head.dtype), z.to(head.device, head.dtype)


# A draw -----------------------------------------------------------------------------------------------------------------


def _check_sample(diffloss: Any, net: nn.Module, own: Own, others: Mapping[str, object], found: Found) -> str:
    """Compare draws of the object's own `sample` with ours, step counts shortened where the object's
    diffusion can be. Returns the solver that the object uses."""
    candidates = ["ddpm", "ddim"] if own.solver in ("ddpm", "ddim") else [own.solver]
    candidates.sort(key=lambda solver: solver != own.solver)
    refusals = []
    for short in (True, False):
        for solver in candidates:
            attempt = Found(dict(found.errors), dict(found.bounds))
            try:
                _check_draws(diffloss, net, own, solver, short, others, attempt)
                found.errors, found.bounds = attempt.errors, attempt.bounds
                return solver
            except UnsupportedError as refusal:
                refusals.append(refusal)
        if not _can_be_shortened(own):
            break
    raise refusals[-len(candidates)]


def _can_be_shortened(own: Own) -> bool:
    return any(not isinstance(chain, int) and len(chain) > LONG for chain in own.chains)


def _check_draws(
    diffloss: Any, net: nn.Module, own: Own, solver: str, short: bool, others: Mapping[str, object], found: Found
) -> None:
    head, fine = MLPHead.from_module(net), []
    _, z = _numbers(head, 2 * ROWS)
    steps = (0, K - 1) if own.is_told else (0,)
    for k, cfg in ((k, cfg) for cfg in (1.0, GUIDANCE) for k in steps):
        rows = z if cfg != 1.0 else z[:ROWS]
        place = own.chain_at(k)
        table = own.table_at(place, solver)
        name = "guided" if cfg != 1.0 else "unguided"
        with _few_steps(diffloss, own) if short else contextlib.nullcontext():
            theirs = _their_draw(diffloss, rows, cfg, {"step": k, "ar_num_iter": K} if own.is_told else {}, others)
        if short:
            table = rows_of(table, [len(table) - 1 - i for i in reversed(_kept_of(len(table)))]) if _is_chain(own, place) else table
        ours, truth = _our_draws(head, rows, table, _scale(own, cfg))
        try:
            found.add(name, *compared(theirs[: len(ours)], ours, truth))
        except DifferenceError as difference:
            raise refuse(
                f"its own diffloss.sample draws other tokens than ours ({name}, {len(table)} steps, cfg = {cfg:g}, "
                f"temperature = {TEMPERATURE}" + (f", step {k} of {K}" if own.is_told else "") + ")",
                difference,
                _why(name, fine, found),
                f"{SERVED[0].upper()}{SERVED[1:]}; {GUIDED_SERVED}",
            ) from None
        fine.append(name)


def _scale(own: Own, cfg: float) -> float:
    """The guidance of our draw: the published DPM-Solver has none."""
    return 1.0 if own.solver.startswith("dpm") else cfg


def _why(name: str, fine: list[str], found: Found) -> str:
    """What is left as the cause."""
    if name == "guided" and "unguided" in fine:
        return "without guidance they are the same, so its guidance is another"
    network = found.errors.get("network", 0.0)
    return (
        f"its network is the same (to {network:.2g}), so it is the sampling that is another: other clipping, scaling, coefficients "
        "or noise"
    )


def _is_chain(own: Own, place: int) -> bool:
    return not isinstance(own.chains[place], int)


def _kept_of(count: int) -> list[int]:
    """Which steps of a trajectory, ascending in time, are run."""
    if count <= LONG:
        return list(range(count))
    return sorted({0, 1, count // 4, count // 2, 3 * count // 4, count - 1})


@contextlib.contextmanager
def _few_steps(diffloss: Any, own: Own) -> Iterator[None]:
    """The object with shortened diffusions. Where they cannot be copied, with its own."""
    diffusions = diffloss.gen_diffusion
    several = isinstance(diffusions, list | tuple)
    try:
        short = [
            one if isinstance(chain, int) else shortened(one, len(chain), _kept_of(len(chain)))
            for one, chain in zip(diffusions if several else [diffusions], own.chains, strict=True)
        ]
    except Exception:  # whatever comes of copying somebody's object: the whole of it is run afterwards
        short = list(diffusions) if several else [diffusions]
    held = vars(diffloss)
    before = {"gen_diffusion": held["gen_diffusion"]} if "gen_diffusion" in held else {}
    held["gen_diffusion"] = type(diffusions)(short) if several else short[0]
    try:
        yield
    finally:
        held.pop("gen_diffusion")
        held.update(before)


def _their_draw(diffloss: Any, z: Tensor, cfg: float, told: Mapping[str, int], others: Mapping[str, object]) -> Tensor:
    torch.manual_seed(SEED)
    try:
        drawn = diffloss.sample(z=z, temperature=TEMPERATURE, cfg=cfg, **told, **others)
    except Exception as error:
        raise UnsupportedError(
            f"model: its own diffloss.sample fails on two rows (z {list(z.shape)}, cfg = {cfg:g}): {type(error).__name__}: "
            f"{error}; nothing is proven then. Pass check=False to accelerate it all the same"
        ) from error
    return drawn if isinstance(drawn, Tensor) else torch.full((len(z), 1), torch.nan)


def _our_draws(head: MLPHead, z: Tensor, table: StepTable, cfg: float) -> tuple[Tensor, Tensor]:
    """(ours, ours in float64), [trajectories, channels], on the numbers of SEED."""
    guided, wide = cfg != 1.0, torch.promote_types(z.dtype, torch.float32)
    torch.manual_seed(SEED)
    noise, step_noise = draw_noise(table, len(z), head.spec.in_channels, guided, *draws_of(None, z.device), wide)
    if not guided and len(z) > ROWS:  # a guided call of an object that has no guidance: both halves start alike
        torch.manual_seed(SEED)
        half = draws_of(None, z.device)[0]((ROWS, head.spec.in_channels), wide)
        noise = torch.cat([half, half])
    drawn = [
        head.denoise(z.to(dtype), table, cfg, TEMPERATURE, noise, step_noise, backend="reference", dtype=dtype)
        for dtype in (z.dtype, torch.float64)
    ]
    return drawn[0][:ROWS], drawn[1][:ROWS]


# The backend ------------------------------------------------------------------------------------------------------------


def _backend_error(net: nn.Module, own: Own, solver: str, backend: str, dtype: torch.dtype) -> float:
    """Relative error of the backend that will run, in the dtype that it will, against plain PyTorch in float64."""
    head = MLPHead.from_module(net)
    table = own.table_at(0, solver)
    table = rows_of(table, list(range(len(table)))[-LONG:])
    with parameters_made_by(net, lambda _, p: random_like(p).to(p.dtype)):
        _, z = _numbers(head, 2 * ROWS)
        chosen = backends.choose(backend, head.spec, dtype, head.device, rows=2 * ROWS)
        torch.manual_seed(SEED)
        noise, step_noise = draw_noise(table, len(z), head.spec.in_channels, True, *draws_of(None, z.device), torch.float32)
        ours, plain, truth = (
            head.denoise(z, table, 3.0, TEMPERATURE, noise, step_noise, backend=name, dtype=each)[:ROWS]
            for name, each in ((chosen, dtype), ("reference", dtype), ("reference", torch.float64))
        )
    try:
        return compared(ours, plain, truth, HALF_BOUND.get(dtype, LEAST_BOUND))[0]
    except DifferenceError as difference:
        raise UnsupportedError(
            f"backend: {chosen!r} in {dtype} is off by {difference.error:.2g} on two rows of this head, where at most "
            f"{difference.bound:.2g} is allowed; take another backend, and please report this"
        ) from None
