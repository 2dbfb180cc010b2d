"""T(k): how many denoising steps autoregressive step k of K gets.

Diffusion Step Annealing (DiSA, arXiv 2505.20297) lets later tokens take fewer steps. A schedule is any callable
``(k, K) -> int``; the classes here are the ones of the paper, with the rounding of the published implementation, which
computes in double precision and truncates. Its four systems write the linear case differently, and truncation makes that
visible: ``Linear(80, 5)`` gives 59 at k = 4 of 16 with MAR's expression and 60 with FlowAR's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .checks import MOST, check_choice, is_whole, whole
from .untraced import untraced

Schedule = Callable[[int, int], int]

_LINEAR_ROUNDINGS: dict[str, Callable[[int, int, int, int], int]] = {
    "mar": lambda left, last, span, late: late + int(left / last * span),
    "flowar": lambda left, last, span, late: int(span * left / last + late),
    "xar": lambda left, last, span, late: int(left / last * span + late),
}


def _check_steps(name: str, value: object) -> int:
    if not is_whole(value):
        raise ValueError(f"{name}: expected a whole number of denoising steps, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1 denoising step, got {value}")
    if value > MOST:
        raise ValueError(f"{name}: expected at most {MOST} denoising steps, got {value}")
    return int(value)


def _position(k: object, K: object) -> tuple[int, int]:
    K = whole("K", K)
    if not is_whole(k) or not 0 <= k < K:
        raise ValueError(f"k: expected an autoregressive step in 0..{K - 1}, got {k!r}")
    return int(k), K


@dataclass(frozen=True)
class _Annealed:
    """From `early` denoising steps at k = 0 down to `late` at k = K - 1."""

    early: int
    late: int

    def __post_init__(self) -> None:
        for name in ("early", "late"):  # as Python's numbers, which do not overflow
            object.__setattr__(self, name, _check_steps(name, getattr(self, name)))
        if self.late > self.early:
            raise ValueError(f"late: expected at most early = {self.early}, got {self.late}")


@dataclass(frozen=True)
class Linear(_Annealed):
    """Linear annealing, ``late + floor((K-1-k)/(K-1) * (early-late))``; K = 1 gets `early`.

    rounding: whose double-precision expression is truncated: "mar" (also Harmon), "flowar" or "xar".
    """

    rounding: str = "mar"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rounding", self.rounding, sorted(_LINEAR_ROUNDINGS))

    def __call__(self, k: int, K: int) -> int:
        k, K = _position(k, K)
        if K == 1:
            return self.early
        return _LINEAR_ROUNDINGS[self.rounding](K - 1 - k, K - 1, self.early - self.late, self.late)


@dataclass(frozen=True)
class Cosine(_Annealed):
    """Half a cosine period, ``late + floor((cos(pi k/(K-1)) + 1)/2 * (early-late))``; K = 1 gets `early`."""

    def __call__(self, k: int, K: int) -> int:
        k, K = _position(k, K)
        if K == 1:
            return self.early
        return self.late + int((math.cos(math.pi * k / (K - 1)) + 1) / 2 * (self.early - self.late))


@dataclass(frozen=True)
class TwoStage(_Annealed):
    """`early` while k < (K-1)/2, then `late`."""

    def __call__(self, k: int, K: int) -> int:
        k, K = _position(k, K)
        return self.early if k < (K - 1) / 2 else self.late


@dataclass(frozen=True)
class Constant:
    """The same number of denoising steps at every autoregressive step: no annealing."""

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _check_steps("steps", self.steps))

    def __call__(self, k: int, K: int) -> int:
        _position(k, K)
        return self.steps


@dataclass(frozen=True, init=False)
class StepList:
    """T(k) given one by one; serves exactly K = len(steps) autoregressive steps."""

    steps: tuple[int, ...]

    def __init__(self, steps: Iterable[int]) -> None:
        try:
            steps = tuple(steps)
        except TypeError:
            raise ValueError(f"steps: expected a list of numbers of denoising steps, got {steps!r}") from None
        steps = tuple(_check_steps(f"steps[{k}]", value) for k, value in enumerate(steps))
        if not steps:
            raise ValueError("steps: expected at least one entry, got an empty list")
        object.__setattr__(self, "steps", steps)

    def __call__(self, k: int, K: int) -> int:
        k, K = _position(k, K)
        if len(self.steps) != K:
            raise ValueError(f"steps: expected one entry for each of the {K} autoregressive steps, got {len(self.steps)}")
        return self.steps[k]


_FORMS = "'linear:50-5', 'cosine:50-5', 'two-stage:50-5', 'constant:100' or 'list:50,48,5'"
_ANNEALED = {"linear": Linear, "cosine": Cosine, "two-stage": TwoStage}


def parse_schedule(text: str, rounding: str = "mar") -> Schedule:
    """A schedule from its text form: linear:EARLY-LATE, cosine:EARLY-LATE, two-stage:EARLY-LATE, constant:N, list:N,N,...

    rounding: of the linear one, see Linear. Raises ValueError for any other text, and for counts that the schedule itself refuses.
    """
    if not isinstance(text, str):
        raise ValueError(f"schedule: expected text such as {_FORMS}, got {text!r}")
    kind, _, numbers = text.strip().partition(":")
    try:
        if kind in _ANNEALED:
            early, late = (int(n) for n in numbers.split("-"))
        else:
            counts = [int(n) for n in numbers.split(",")]
    except ValueError:
        raise ValueError(f"schedule: expected {_FORMS}, got {text!r}") from None
    if kind == "linear":
        return Linear(early, late, rounding)
    if kind in _ANNEALED:
        return _ANNEALED[kind](early, late)
    if kind == "constant" and len(counts) == 1:
        return Constant(counts[0])
    if kind == "list":
        return StepList(counts)
    raise ValueError(f"schedule: expected {_FORMS}, got {text!r}")


def as_schedule(schedule: Schedule | str, rounding: str = "mar") -> Schedule:
    """`schedule` itself if it is callable, else the parsed text, linear ones with the rounding of one of the four systems."""
    return schedule if callable(schedule) else parse_schedule(schedule, rounding)


@untraced
def steps_at(schedule: Schedule, k: int, K: int) -> int:
    """T(k), checked: a schedule may be any user's callable."""
    return _check_steps(f"schedule at k = {k} of {K}", schedule(k, K))
