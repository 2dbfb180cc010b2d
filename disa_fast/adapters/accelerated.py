"""What every kind of accelerated object has in common: shadowing of methods, settings, the check, the handle."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checks import check_dtype, check_flag
from ..schedule import Schedule
from ..solvers import Solver
from ..watch import TokenWatch
from .check import LOCK, not_finite

HANDLE = "_disa_fast_handle"
SKIPPED = "skipped: check=False"
PARAMETERS = "the parameters' own"  # reason for a dtype


@dataclass(frozen=True)
class Settings:
    """Those of `accelerate`, resolved. schedule_from: "argument", "model" or "default"; is_own_solver:
    the solver is what the object itself samples with, and was not asked for."""

    schedule: Schedule | str
    schedule_from: str
    solver: str | Solver
    is_own_solver: bool
    clip: int | str | None
    backend: str
    dtype: torch.dtype | None


class Accelerated(ABC):
    """What `accelerate` returns: `report()`, `restore()`, and `with`. Only the instance is touched: attributes of its own shadow
    some of its methods."""

    head: Any

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shadowed: list[tuple[nn.Module, str, dict[str, object]]] = []
        self._steps: Counter[int] = Counter()
        self._settings: Settings | None = None
        self._settings_before: Settings | None = None
        self._entered: list[Settings | None] = []
        self._check: Mapping[str, object] | str = SKIPPED
        self._dtypes: dict[torch.dtype, str] = {}
        self._said: set[str] = set()
        self._tokens = TokenWatch()

    # Settings ----------------------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule | str:
        return self._settings.schedule

    @property
    def schedule_from(self) -> str:
        return self._settings.schedule_from

    @property
    def solver(self) -> str | Solver:
        return self._settings.solver

    @property
    def clip(self) -> int | str | None:
        return self._settings.clip

    @property
    def backend(self) -> str:
        return self._settings.backend

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the network's products, where `accelerate` was told it; else None."""
        return self._settings.dtype

    def is_of(self, model: object) -> bool:
        """Whether this is the handle of that very object, and not of one that it is a shallow copy of."""
        return self._model is model

    @property
    def is_installed(self) -> bool:
        return bool(self._shadowed)

    def configure(
        self,
        schedule: Schedule | str | None,
        solver: str | Solver | None,
        clip: int | str | None,
        backend: str,
        dtype: torch.dtype | None,
        check: bool,
    ) -> None:
        """Take on the settings of `accelerate`, all or none, and check the object if that is asked for.

        Raises ValueError or UnsupportedError for bad settings, UnsupportedError for an object that does
        something else than this package would.
        """
        check_flag("check", check)
        if dtype is not None:
            check_dtype(dtype)
        settings, found = self._resolved(schedule, solver, clip, backend, dtype, check)
        self._settings_before = self._settings if self.is_installed else None
        self._settings, self._check = settings, found
        self._adopt()

    @abstractmethod
    def _resolved(
        self,
        schedule: Schedule | str | None,
        solver: str | Solver | None,
        clip: int | str | None,
        backend: str,
        dtype: torch.dtype | None,
        check: bool,
    ) -> tuple[Settings, Mapping[str, object] | str]:
        """The settings, and what the check found or why there was none. The object is as it was before."""

    @abstractmethod
    def _adopt(self) -> None:
        """Make what follows from `_settings`."""

    def network_dtype(self) -> tuple[torch.dtype, str]:
        """(dtype, reason) of the network's products if a call came now: `dtype` of accelerate, else
        that of torch.autocast where that is on, which leaves float64 alone, else the parameters' own."""
        own, device = self.head.dtype, self.head.device
        if self.dtype is not None:
            return self.dtype, "dtype of accelerate"
        if own != torch.float64 and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type), "torch.autocast"
        return own, PARAMETERS

    def _product_dtype(self) -> torch.dtype:
        dtype, reason = self.network_dtype()
        self._dtypes[dtype] = reason
        return dtype

    # Shadows -----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _shadow_all(self) -> None:
        """`_shadow` whatever is to be replaced."""

    def install(self) -> None:
        if not self._shadowed:
            self._shadow(self._model, HANDLE, self)
            self._shadow_all()

    def _shadow(self, owner: nn.Module, name: str, value: object) -> None:
        before = {name: owner.__dict__[name]} if name in owner.__dict__ else {}
        self._shadowed.append((owner, name, before))
        owner.__dict__[name] = value

    def restore(self) -> None:
        """Put the object back as it was. Safe to call twice."""
        with LOCK:
            self._entered.clear()
            while self._shadowed:
                _unshadow(*self._shadowed.pop())

    def _as_original(self) -> _AsOriginal:
        return _AsOriginal(self._shadowed)

    def __enter__(self) -> Accelerated:
        self._entered.append(self._settings_before)
        self._settings_before = None
        return self

    def __exit__(self, *exception: object) -> None:
        """Undo the `accelerate` that this block began with: back to the settings of the block around
        it, or to the object as it was."""
        before = self._entered.pop() if self._entered else None
        if before is None or not self.is_installed:
            self.restore()
        else:
            self._settings = before
            self._adopt()

    # What is said ------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, object]:
        """What was run since `accelerate`: settings, autoregressive steps, network evaluations, calls per step count; the dtypes of
        the network's products and why; and "check", the relative errors that the check measured, or why there was none."""
        dtypes = self._dtypes or dict([self.network_dtype()])
        return {
            "schedule": self.schedule,
            "schedule_from": self.schedule_from,
            "solver": self.solver,
            "clip": self.clip,
            "backend": self.backend,
            "dtype": {str(dtype): reason for dtype, reason in dtypes.items()},
            "check": self._check if isinstance(self._check, str) else dict(self._check),
            "ar_steps": sum(self._steps.values()),
            "network_evaluations": sum(steps * calls for steps, calls in self._steps.items()),
            "calls_by_evaluations": dict(sorted(self._steps.items(), reverse=True)),
        }

    def _say_once(self, text: str | None, about: str | None = None) -> None:
        """Warn, once a handle, of `text`, or of whatever there is to say `about` a thing."""
        if text is not None and (about or text) not in self._said:
            self._said.add(about or text)
            warnings.warn(text, stacklevel=4)

    def _say_of_weights(self, module: nn.Module) -> None:
        names = not_finite(module)
        if names:
            self._say_once(f"model: not finite, NaN or inf, in {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")


def forget_copied_shadows(model: nn.Module) -> None:
    """Take from a shallow copy of an accelerated model what shadows the original's methods. Modules
    that both have stay accelerated as long as the original is."""
    handle = model.__dict__.get(HANDLE)
    if handle is not None:
        for owner, name, before in handle._shadowed:
            if owner is handle._model:
                _unshadow(model, name, before)


class _AsOriginal:
    """A block in which an accelerated object is as it was before."""

    def __init__(self, shadowed: list[tuple[nn.Module, str, dict[str, object]]]) -> None:
        self._shadowed = shadowed
        self._ours: list[object] = []

    def __enter__(self) -> None:
        self._ours = [owner.__dict__[name] for owner, name, _ in self._shadowed]
        for owner, name, before in reversed(self._shadowed):
            _unshadow(owner, name, before)

    def __exit__(self, *exception: object) -> None:
        for (owner, name, _), ours in zip(self._shadowed, self._ours, strict=True):
            owner.__dict__[name] = ours


def _unshadow(owner: nn.Module, name: str, before: dict[str, object]) -> None:
    owner.__dict__.pop(name, None)
    owner.__dict__.update(before)
