"""The check of MAR- and Harmon-shaped objects: their own network and their own `sample` against ours, on the same numbers."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import backends
from ..errors import UnsupportedError
from ..heads import MLPHead
from ..heads.mlp import draw_noise, draws_of
from ..schedule import Schedule, steps_at
from ..solvers import StepTable, resolve
from ..solvers.diffusion import Diffusion
from .calls import signature_of
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
    structure_of,
)
from .diffusion import SERVED, Chain, rows_of, shortened, table_of

ROWS = 2
LONG = 6  # steps; of a longer trajectory some are run
K = 64  # of the AR loop that an object is told of
OTHER_K = 5
TIMES = (37, 901)
SMALL = 1e-3  # of weights whose layer norms see a variance of about their epsilon


@dataclass(frozen=True)
class Call:
    """A call of `sample` to compare: trajectories, arguments, and whether the highest timesteps are among
    the steps, whose large numbers would hide the others'."""

    trajectories: int
    cfg: float
    temperature: float
    with_highest: bool
    cfg_is_tensor: bool = False

    @property
    def name(self) -> str:
        return "guided" if self.cfg != 1.0 else "unguided"

    @property
    def rows(self) -> int:
        return self.trajectories * (2 if self.cfg != 1.0 else 1)

    def __str__(self) -> str:
        return f"{self.name}, {self.rows} rows, cfg = {self.cfg:g}, temperature = {self.temperature:g}"


CALLS = (
    Call(2, 1.0, 0.9, with_highest=True),
    Call(2, 3.0, 0.9, with_highest=False),
    Call(5, 1.0, 1.0, with_highest=False),
    Call(5, 0.5, 1.0, with_highest=True),
    Call(2, 7.0, 1.3, with_highest=True, cfg_is_tensor=True),
)

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

    def chain_at(self, k: int, K: int) -> int:
        """The place among the chains of the one that AR step k of K takes."""
        if self.schedule is None or len(self.chains) == 1:
            return 0
        return steps_at(self.schedule, k, K) - steps_at(self.schedule, K - 1, K)

    def is_same(self, other: Own) -> bool:
        """Whether another object does the same by itself."""
        facts = ((one.solver, repr(one.schedule), one.is_told, one.process, one.chains) for one in (self, other))
        return structure_of(next(facts)) == structure_of(next(facts))

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
    relative and over a few rows, "error", the largest of them, "bound", what it was allowed, "backend",
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
        if own.schedule is not None and len(own.chains) > 1:
            _check_annealing(diffloss, MLPHead.from_module(net), own, others or {})
        if is_degenerate(net):
            with parameters_made_by(net, lambda _, p: random_like(p)):
                solver = _check_sample(diffloss, net, own, others or {}, found)
        else:
            solver = _check_sample(diffloss, net, own, others or {}, found)
    worst = max(found.errors, key=found.errors.__getitem__)
    errors: dict[str, object] = {"error": found.errors[worst], "bound": found.bounds[worst], **found.errors}
    errors["backend"] = _backend_error(net, own, solver, backend, dtype)
    return errors | {"solver": solver}


# The network ------------------------------------------------------------------------------------------------------------


def _small(name: str, parameter: Tensor) -> Tensor:
    """Random weights under which the residual stream stays near SMALL, so that epsilons show."""
    into_stream = name.startswith("input_proj.") or (".mlp.2." in name and name.startswith("res_blocks."))
    return random_like(parameter, SMALL if into_stream else 1.0)


def _check_network(net: nn.Module, found: Found, weights: str) -> None:
    head = MLPHead.from_module(net)
    x, z = _numbers(head, ROWS)
    x[1], z[1] = 30 * x[1], 10 * z[1]  # what is clamped far out shows
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
    if not isinstance(theirs, Tensor):
        theirs = torch.full_like(ours, torch.nan)
    try:
        found.add("network", *compared(theirs, ours, lambda: head.network(torch.float64)(x.double(), t, z.double())))
    except DifferenceError as difference:
        raise refuse(
            f"its network computes something else than the parameters' names say ({ROWS} rows, {weights})",
            difference,
            f"{type(net).__name__}.forward, a hook, or what replaces a method of one of its modules, is not MAR's",
            "Served is MAR's head: SiLU, layer norms with epsilon 1e-6, frequencies with period 10000",
        ) from None


def _numbers(head: MLPHead, rows: int) -> tuple[Tensor, Tensor]:
    """(x, z) random, the same each time, in the parameters' dtype."""
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    options = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    x, z = (torch.randn(rows, size, **options) for size in (head.spec.in_channels, head.spec.z_channels))
    return x.to(head.device, head.dtype), z.to(head.device, head.dtype)


# A draw -----------------------------------------------------------------------------------------------------------------


def _check_sample(diffloss: Any, net: nn.Module, own: Own, others: Mapping[str, object], found: Found) -> str:
    """Compare draws of the object's own `sample` with ours. Returns the solver that the object uses.

    Of long trajectories some steps are run, for which the object gets copies of its diffusions. Where
    such copies do not do what the diffusions do, since they compute a step's coefficients from its
    neighbours, whole trajectories are run, and the lowest steps alone.
    """
    candidates = ["ddpm", "ddim"] if own.solver in ("ddpm", "ddim") else [own.solver]
    candidates.sort(key=lambda solver: solver != own.solver)
    refusals = []
    for scattered in (True, False):
        for solver in candidates:
            attempt = Found(dict(found.errors), dict(found.bounds))
            try:
                _check_draws(diffloss, net, own, solver, scattered, others, attempt)
            except UnsupportedError as refusal:
                refusals.append(refusal)
                continue
            found.errors, found.bounds = attempt.errors, attempt.bounds
            return solver
    raise refusals[0]


def _check_draws(
    diffloss: Any, net: nn.Module, own: Own, solver: str, scattered: bool, others: Mapping[str, object], found: Found
) -> None:
    head, fine = MLPHead.from_module(net), []
    for i, call in enumerate(CALLS):
        k = (0, K - 1)[i % 2] if own.is_told else 0
        place = own.chain_at(k, K)
        table = own.table_at(place, solver)
        kept = _kept_of(len(table), i, scattered) if _is_chain(own, place) else range(len(table))
        told = {"step": k, "ar_num_iter": K} if own.is_told else {}
        table = rows_of(table, [len(table) - 1 - at for at in reversed(kept)])
        with _few_steps(diffloss, own, i, scattered):
            theirs, after = _their_draw(diffloss, head, call, told, others)
        draw, ours_after = _our_draw(head, call, table, unguided=own.solver.startswith("dpm"))
        ours = draw(head.dtype)
        where = f"({call}, {len(table)} steps" + (f", step {k} of {K}" if own.is_told else "") + ")"
        if theirs.shape != (call.rows, head.spec.in_channels) or theirs.dtype != ours.dtype:
            raise UnsupportedError(
                f"model: its own diffloss.sample gives {list(theirs.shape)} of {theirs.dtype} {where}, where ours gives "
                f"{[call.rows, head.spec.in_channels]} of {ours.dtype}, as MAR's does"
            )
        try:
            found.add(call.name, *compared(theirs[: len(ours)], ours, functools.partial(draw, torch.float64)))
        except DifferenceError as difference:
            raise refuse(
                f"its own diffloss.sample draws other tokens than ours {where}",
                difference,
                _why(call.name, fine, found),
                f"{SERVED[0].upper()}{SERVED[1:]}; {GUIDED_SERVED}",
            ) from None
        if after != ours_after:
            raise UnsupportedError(
                f"model: its own diffloss.sample draws other random numbers than ours {where}, also where the tokens are the same: "
                "what is generated after it would differ. Pass check=False to accelerate it all the same"
            )
        fine.append(call.name)


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


def _kept_of(count: int, call: int, scattered: bool) -> list[int]:
    """Which steps of a trajectory, ascending in time, are run in one of CALLS: other ones in each."""
    with_highest = CALLS[call].with_highest
    if count <= LONG or (with_highest and not scattered):
        return list(range(count))
    if not scattered:
        return list(range(LONG))
    highest = count - 1 if with_highest else 3 * count // 4
    between = (highest * (j + (call + 1) / (len(CALLS) + 1)) / 3 for j in range(3))
    return sorted({0, *map(int, between), highest})


@contextlib.contextmanager
def _instead(diffloss: Any, diffusions: Any) -> Iterator[None]:
    """`diffusions` as the object's gen_diffusion."""
    held, had = vars(diffloss), "gen_diffusion" in vars(diffloss)
    before = held.get("gen_diffusion")
    held["gen_diffusion"] = diffusions
    try:
        yield
    finally:
        if had:
            held["gen_diffusion"] = before
        else:
            del held["gen_diffusion"]


def _few_steps(diffloss: Any, own: Own, call: int, scattered: bool) -> contextlib.AbstractContextManager[None]:
    """The object with shortened diffusions. Where they cannot be copied, with its own."""
    diffusions = diffloss.gen_diffusion
    several = isinstance(diffusions, list | tuple)
    try:
        short = [
            one if isinstance(chain, int) else shortened(one, len(chain), _kept_of(len(chain), call, scattered))
            for one, chain in zip(diffusions if several else [diffusions], own.chains, strict=True)
        ]
    except Exception:  # whatever comes of copying somebody's object: the whole of it is run afterwards
        return contextlib.nullcontext()
    return _instead(diffloss, type(diffusions)(short) if several else short[0])


def _their_draw(
    diffloss: Any, head: MLPHead, call: Call, told: Mapping[str, int], others: Mapping[str, object]
) -> tuple[Tensor, list[bytes]]:
    """(tokens, states of the random generators afterwards)."""
    _, z = _numbers(head, call.rows)
    given = z.clone()
    cfg = torch.tensor([call.cfg], device=head.device) if call.cfg_is_tensor else call.cfg
    if "device" in signature_of(diffloss.sample).parameters:
        others = {"device": head.device, **others}
    _seed()
    try:
        drawn = diffloss.sample(z=given, temperature=call.temperature, cfg=cfg, **told, **others)
    except _TakenError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"model: its own diffloss.sample fails ({call}): {type(error).__name__}: {error}; nothing is proven then. Pass "
            "check=False to accelerate it all the same"
        ) from error
    after = _states(head.device)
    if not torch.equal(given, z):
        raise UnsupportedError("model: its own diffloss.sample changes z in place, which ours does not")
    return (drawn if isinstance(drawn, Tensor) else torch.full((len(z), 1), torch.nan)), after


def _our_draw(head: MLPHead, call: Call, table: StepTable, unguided: bool) -> tuple[Callable[[torch.dtype], Tensor], list[bytes]]:
    """(ours by dtype, [trajectories, channels], on the same numbers; the states of the random generators
    afterwards). unguided: a guided call is one without guidance whose halves start alike."""
    _, z = _numbers(head, call.rows)
    guided, cfg = call.cfg != 1.0, call.cfg
    _seed()
    noise, step_noise = draw_noise(table, len(z), head.spec.in_channels, guided, *draws_of(None, z.device), torch.float32)
    after = _states(head.device)
    if unguided and guided:
        noise, cfg = torch.cat([noise, noise]), 1.0

    def draw(dtype: torch.dtype) -> Tensor:
        drawn = head.denoise(z.to(dtype), table, cfg, call.temperature, noise, step_noise, backend="reference", dtype=dtype)
        return drawn[: call.trajectories]

    return draw, after


def _seed() -> None:
    torch.manual_seed(SEED)
    np.random.seed(SEED % 2**32)
    random.seed(SEED)


def _states(device: torch.device) -> list[bytes]:
    """Of the generators that a `sample` may draw from, in comparable form."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [
        *(state.numpy().tobytes() for state in states),
        repr([np.random.get_state()[1].tobytes(), np.random.get_state()[2:]]).encode(),
        repr(random.getstate()).encode(),
    ]


# Annealing --------------------------------------------------------------------------------------------------------------


class _TakenError(Exception):
    """Which of the diffusions an object takes; raised instead of sampling with it."""


class _Taken(list):
    def __getitem__(self, at: Any) -> Any:
        raise _TakenError(range(len(self))[at])


def _check_annealing(diffloss: Any, head: MLPHead, own: Own, others: Mapping[str, object]) -> None:
    """Compare which of its diffusions the object takes at every AR step with the schedule that was read off it."""
    for count in (K, OTHER_K):
        for k in range(count):
            told, taken = {"step": k, "ar_num_iter": count}, None
            with _instead(diffloss, _Taken(diffloss.gen_diffusion)), contextlib.suppress(_TakenError, UnsupportedError):
                try:
                    _their_draw(diffloss, head, CALLS[0], told, others)
                except _TakenError as error:
                    taken = error.args[0]
                    raise
            expected = own.chain_at(k, count)
            if taken != expected:
                lowest = steps_at(own.schedule, count - 1, count)
                theirs = "no entry of gen_diffusion" if taken is None else f"the diffusion of {lowest + taken} steps"
                raise UnsupportedError(
                    f"model: at AR step {k} of {count} its own diffloss.sample takes {theirs}, where {own.schedule}, as which it "
                    f"is read, takes that of {lowest + expected}; pass schedule= and check=False"
                )


# The backend ------------------------------------------------------------------------------------------------------------


def _backend_error(net: nn.Module, own: Own, solver: str, backend: str, dtype: torch.dtype) -> float:
    """Relative error of the backend that will run, in the dtype that it will, against plain PyTorch in that dtype."""
    head = MLPHead.from_module(net)
    table = own.table_at(0, solver)
    table = rows_of(table, list(range(len(table)))[-2:])
    with parameters_made_by(net, lambda _, p: random_like(p).to(p.dtype)):
        _, z = _numbers(head, 2 * ROWS)
        chosen = backends.choose(backend, head.spec, dtype, head.device, rows=2 * ROWS)
        torch.manual_seed(SEED)
        noise, step_noise = draw_noise(table, len(z), head.spec.in_channels, True, *draws_of(None, z.device), torch.float32)
        ours, plain = (
            head.denoise(z, table, 3.0, 0.9, noise, step_noise, backend=name, dtype=dtype)[:ROWS] for name in (chosen, "reference")
        )
    try:
        return compared(ours, plain, least=HALF_BOUND.get(dtype, LEAST_BOUND))[0]
    except DifferenceError as difference:
        raise UnsupportedError(
            f"backend: {chosen!r} in {dtype} is off by {difference.error:.2g} on two rows of this head, where at most "
            f"{difference.bound:.2g} is allowed; take another backend, and please report this"
        ) from None
