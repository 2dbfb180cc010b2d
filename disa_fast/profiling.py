"""NVTX ranges in the domain "disa_fast", for Nsight: one for each AR step, each capture and each replay of a CUDA graph.

Off by default, and then a test of one variable. On by DISA_FAST_NVTX=1 in the environment, or by `enable()`.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

DOMAIN = "disa_fast"
AR_STEP = "AR step k={} K={} T={} rows={}"

_nvtx: Any = None
_OFF = nullcontext()


def enable() -> None:
    """Switch ranges on, in the whole process. ImportError where the package nvtx is not installed."""
    global _nvtx
    import nvtx

    _nvtx = nvtx


def disable() -> None:
    global _nvtx
    _nvtx = None


def is_enabled() -> bool:
    return _nvtx is not None


def range(text: str, *values: object) -> AbstractContextManager:
    """A range named text.format(*values); nothing, and nothing formatted, while ranges are off."""
    return _OFF if _nvtx is None else _nvtx.annotate(text.format(*values), domain=DOMAIN)


if os.environ.get("DISA_FAST_NVTX") == "1":
    try:
        enable()
    except ImportError as error:
        warnings.warn(f"DISA_FAST_NVTX=1: {error}; pip install nvtx", stacklevel=2)
