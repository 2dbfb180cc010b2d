"""What every kind of accelerated object has in common: shadowing of methods, settings, the handle."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from ..schedule import Schedule
from ..solvers import Solver

HANDLE = "_disa_fast_handle"


class Accelerated(ABC):
    """What `accelerate` returns: `report()`, `restore()`, and `with`. Only the instance is touched: attributes of its own shadow
    some of its methods."""

    head: Any
    schedule: Schedule | str
    schedule_from: str
    solver: str | Solver
    clip: int | str | None
    backend: str

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shadowed: list[tuple[nn.Module, str, dict[str, object]]] = []
        self._steps: Counter[int] = Counter()

    @abstractmethod
    def configure(self, schedule: Schedule | str | None, solver: str | Solver | None, clip: int | str | None, backend: str) -> None:
        """Take on the settings of `accelerate`, all or none. ValueError or UnsupportedError for bad ones."""

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
        while self._shadowed:
            owner, name, before = self._shadowed.pop()
            owner.__dict__.pop(name, None)
            owner.__dict__.update(before)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def report(self) -> dict[str, object]:
        """What was run since `accelerate`: settings, autoregressive steps, network evaluations, calls per step count."""
        return {
            "schedule": self.schedule,
            "schedule_from": self.schedule_from,
            "solver": self.solver,
            "clip": self.clip,
            "backend": self.backend,
            "ar_steps": sum(self._steps.values()),
            "network_evaluations": sum(steps * calls for steps, calls in self._steps.items()),
            "calls_by_evaluations": dict(sorted(self._steps.items(), reverse=True)),
        }


def with_signature(method: Callable, signature: inspect.Signature) -> Callable:
    """`method` as a callable that says it has this signature, and like the method can be copied and pickled."""
    callable_: Any = functools.partial(method)
    callable_.__signature__ = signature
    return callable_
