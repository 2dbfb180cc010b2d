"""Ranges that say on a profiler's timeline what this package does: each AR step, the head's loop in it, captures and replays of
CUDA graphs.

Off by default, and then a test of two variables. Two listen: NVTX, in the domain "disa_fast", for Nsight (DISA_FAST_NVTX=1 in the
environment, or `enable()`), and torch.profiler, which DISA_FAST_PROFILE=FOLDER starts for the AR steps of a process, as
`disa-fast profile` does for its command.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from .files import written_aside

DOMAIN = "disa_fast"
AR_STEP = "AR step k={} K={} T={} rows={}"
AR_STEP_OF_ANOTHER_LOOP = AR_STEP + " head alone"  # in a model that somebody else wrote, whose backbone runs between these
DENOISE = "denoise T={} rows={} backend={}"  # the head's loop over the steps of one call
NOISE = "noise T={}"  # drawn for that loop before it
CPU_CORE = "cpu core"  # one call of the C++ core, which no profiler of PyTorch's operators sees
CAPTURE, REPLAY = "capture {}", "replay {}"
RANGES = AR_STEP, NOISE, DENOISE, CPU_CORE, CAPTURE, REPLAY

DEFAULT_SECONDS = 10.0
LONGEST = 10.0  # seconds, after which a trace is written in the middle of an image

_nvtx: Any = None
_recorder: Recorder | None = None
_OFF = nullcontext()


def enable() -> None:
    """Switch NVTX ranges on, in the whole process. ImportError where the package nvtx is not installed."""
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
    if _recorder is not None:
        return _recorder.range(text, *values)
    return _OFF if _nvtx is None else _nvtx.annotate(text.format(*values), domain=DOMAIN)


class Recorder:
    """torch.profiler around the AR steps of one thread, that which takes the first: FOLDER/trace-PID-NUMBER.json for each image, as
    chrome://tracing and Perfetto read it, and at the end FOLDER/process-PID.json.

    Recording begins with the first AR step of an image and ends with its last, since operators are many and all kept in memory.
    After `seconds` of it images are recorded only if none began alike (K, T, rows), and after as many of those none is.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder = folder
        self._left = [seconds, seconds]  # for every image, and for those of a new kind
        self._taken: int | None = None  # of which of them the image of now is recorded, if it is
        self._kinds: set[str] = set()
        self._thread: int | None = None
        self._profile: Any = None
        self._recorded = self._skipped = self._traces = 0

    def range(self, text: str, *values: object) -> AbstractContextManager:
        if text in (AR_STEP, AR_STEP_OF_ANOTHER_LOOP):
            return self._ar_step(text.format(*values), *values[:2])
        return _OFF if self._profile is None else torch.profiler.record_function(text.format(*values))

    @contextmanager
    def _ar_step(self, name: str, k: int, K: int) -> Iterator[None]:
        if not self._begin(name, k):
            self._skipped += 1
            yield
            return
        self._recorded += 1
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            if k == K - 1 or time.perf_counter() - self._started > LONGEST:
                self._end()

    def _begin(self, name: str, k: int) -> bool:
        """Whether AR step k is recorded; if so, recording is on."""
        self._thread = self._thread or threading.get_ident()
        if self._thread != threading.get_ident():
            return False
        if k == 0:
            self._end()  # of an image that came to no end
            allowed = self._left[:1] if name in self._kinds else self._left
            self._taken = next((i for i, left in enumerate(allowed) if left > 0), None)
            self._kinds.add(name)
        if self._taken is not None and self._profile is None:
            self._start()
        return self._taken is not None

    def _start(self) -> None:
        if torch.autograd._profiler_enabled():  # a second one crashes PyTorch
            warnings.warn(f"DISA_FAST_PROFILE={self._folder}: nothing is recorded beside another torch.profiler", stacklevel=5)
            self._taken, self._left = None, [0.0, 0.0]
            return
        kinds = torch.profiler.ProfilerActivity
        self._profile = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if torch.cuda.is_available() else [])])
        self._profile.start()
        self._started = time.perf_counter()

    def _end(self) -> None:
        if self._profile is None:
            return
        self._left[self._taken] -= time.perf_counter() - self._started
        self._profile.stop()
        with written_aside(self._folder / f"trace-{os.getpid()}-{self._traces}.json") as aside:
            self._profile.export_chrome_trace(str(aside))
        self._profile, self._traces = None, self._traces + 1

    def close(self) -> None:
        self._end()
        rank = os.environ.get("RANK")
        process = {"pid": os.getpid(), "rank": rank and int(rank), "recorded": self._recorded, "skipped": self._skipped}
        with written_aside(self._folder / f"process-{os.getpid()}.json") as aside:
            aside.write_text(json.dumps(process))


if os.environ.get("DISA_FAST_NVTX") == "1":
    try:
        enable()
    except ImportError as error:
        warnings.warn(f"DISA_FAST_NVTX=1: {error}; pip install nvtx", stacklevel=2)
if os.environ.get("DISA_FAST_PROFILE"):
    _seconds = os.environ.get("DISA_FAST_PROFILE_SECONDS") or str(DEFAULT_SECONDS)
    try:
        _recorder = Recorder(Path(os.environ["DISA_FAST_PROFILE"]).absolute(), float(_seconds))
    except ValueError:
        raise ValueError(f"DISA_FAST_PROFILE_SECONDS: expected a number of seconds, got {_seconds!r}") from None
    atexit.register(_recorder.close)
