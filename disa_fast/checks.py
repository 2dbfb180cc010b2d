"""Checks of values and parameter sets that more than one module makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral


def is_whole(value: object) -> bool:
    """An integer of Python's or numpy's, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_shapes(expected: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]], where: str) -> None:
    """ValueError naming the missing, the unexpected and the misshapen parameters, if any; `where` is what they came from."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        parts = [
            f"{kind} {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(f"{where}: keys do not match: {'; '.join(parts)}")
    for name, shape in expected.items():
        if tuple(given[name]) != tuple(shape):
            raise ValueError(f"{where}: {name}: expected shape {list(shape)}, got {list(given[name])}")
