"""What is said of a run while it goes on: tokens that are not finite, and settings without effect."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .checks import scalar
from .solvers import StepTable
from .untraced import untraced


class TokenWatch:
    """Remembers whether the tokens of each AR step are finite, and waits for a GPU only when asked."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int, Tensor]] = []

    @untraced
    def add(self, k: int, K: int, tokens: Tensor) -> None:
        """The tokens of AR step k of K."""
        self._seen.append((k, K, torch.isfinite(tokens).all()))

    @untraced
    def said(self) -> str | None:
        """What there is to say of the steps since the last time: the first whose tokens are not finite."""
        seen, self._seen = self._seen, []
        if not seen:
            return None
        finite = torch.stack([flag for *_, flag in seen]).tolist()
        for (k, K, _), good in zip(seen, finite, strict=True):
            if not good:
                return (
                    f"the tokens of AR step {k} of {K} are not finite: NaN or inf in the weights or in the condition, or an "
                    "overflow; disa-fast inspect finds it in a checkpoint's weights"
                )
        return None

    @untraced
    def warn(self) -> None:
        text = self.said()
        if text is not None:
            warnings.warn(text, stacklevel=3)


def of_temperature(table: StepTable, temperature: float | Tensor) -> str | None:
    """What there is to say of a temperature: that a solver without noise does not use it."""
    temperature = scalar("temperature", temperature)
    if table.noisy.any() or temperature == 1.0 or temperature < 0:  # which is refused later
        return None
    return f"temperature: {table.solver} adds no noise, so that temperature = {temperature:g} has no effect"


@untraced
def warn_of_temperature(table: StepTable, temperature: float | Tensor) -> None:
    text = of_temperature(table, temperature)
    if text is not None:
        warnings.warn(text, stacklevel=4)
