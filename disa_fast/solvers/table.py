"""StepTable: one denoising trajectory as data."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ..checks import check_choice, check_flag
from ..untraced import untraced

OUTPUTS = ("noise", "velocity")


@dataclass(frozen=True, eq=False)
class StepTable:
    """What a backend runs: row i of the table is step i of the trajectory, in the order of sampling. Tables of the same contents
    are equal, so that what is derived from one and kept serves all of them.

    With x the state, (o, v) the network's output after guidance and o_prev the output of the step before:

        x <- a[i]*x + b[i]*o + c[i]*o_prev + exp((l0[i] + l1[i]*v)/2) * noise[i] * temperature   (no noise unless noisy[i])

    solver: the solver's name, for reports.
    t: [T] float64, the time that the network is given at each step.
    a, b, c, l0, l1: [T] float64, finite but for l0, which may be -inf.
    noisy: [T] bool.
    draws: whether the published sampler draws noise, used or not. A caller that wants its random stream draws as often: on a
        diffusion head at every step (DDIM multiplies it by zero; DPM-Solver draws nothing), on a flow head at noisy steps.
    output: what the network must predict, "noise" with times 0..999 (or what stands for noise in a
        diffusion, as the clean token), or "velocity" with times 0..1. A head of the other kind
        refuses the table. None: not said, taken by both.
    """

    solver: str
    t: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    l0: np.ndarray
    l1: np.ndarray
    noisy: np.ndarray
    draws: bool
    output: str | None = None

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, StepTable) and self._contents == other._contents)

    def __hash__(self) -> int:
        return hash(self._contents)

    @functools.cached_property
    def _contents(self) -> bytes:
        columns = (self.t, self.a, self.b, self.c, self.l0, self.l1, self.noisy)
        return f"{self.solver!r} {self.draws} {self.output}\n".encode() + b"".join(column.tobytes() for column in columns)

    @untraced
    def __post_init__(self) -> None:
        if not isinstance(self.solver, str):
            raise ValueError(f"solver: expected a name, got {self.solver!r}")
        check_flag("draws", self.draws)
        if self.output is not None:
            check_choice("output", self.output, OUTPUTS)
        steps = self.t.shape if isinstance(self.t, np.ndarray) and self.t.ndim == 1 else ("T",)
        for name in ("t", "a", "b", "c", "l0", "l1", "noisy"):
            value, expected = getattr(self, name), np.bool_ if name == "noisy" else np.float64
            if not isinstance(value, np.ndarray) or value.shape != steps or value.dtype != expected:
                got = f"{list(value.shape)} of {value.dtype}" if isinstance(value, np.ndarray) else repr(value)
                raise ValueError(f"{name}: expected a [{steps[0]}] array of {expected.__name__}, got {got}")
            value = np.array(value)  # contiguous, as native code reads it, and nobody else's
            if not (np.isfinite(value) | (name == "l0") & np.isneginf(value)).all():
                raise ValueError(f"{name}: expected finite numbers{' or -inf' if name == 'l0' else ''}, got {value}")
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        if len(self.t) == 0:
            raise ValueError("t: expected at least one step, got none")
        if self.noisy.any() and not self.draws:
            raise ValueError("draws: expected True, since some steps are noisy")

    def within(self, low: float, high: float) -> np.ndarray:
        """[T] bool: whether low <= t <= high, both ends included, compared in float64."""
        return (low <= self.t) & (self.t <= high)

    def __len__(self) -> int:
        return len(self.t)

    def __repr__(self) -> str:
        return f"StepTable({self.solver}, {len(self)} steps, t {self.t[0]:g} to {self.t[-1]:g})"
