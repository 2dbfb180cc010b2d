"""The tests that need a GPU, a process for each file, as a phase of gpu_first.py. What happens is told and written as it happens.

Counts come from what at_once.py notes test by test, so that they are there for a process that hangs or dies too. A pytest that does
not end in its time is interrupted, so that it can say what it knows, and counts as failed, with the test that it was in.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .gpu_results import FAILURES, headline, tests_in_words

if TYPE_CHECKING:
    from .gpu_measure import Report

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests"
ALONE = "test_cuda_gpu"  # whose launches take all multiprocessors; others share the GPU
GRACE = 10  # seconds for an interrupted pytest to end by itself
STACKS_AFTER = 40  # seconds in one test, after which the log has the stacks of all threads
CLOSING = 3  # seconds that a phase keeps for itself
TOLD = 6  # failures of each file, on the terminal
AGAIN = " again"
MOST_AGAIN = 12  # of a file's tests that failed
NO_TESTS = 5  # pytest's exit status


@dataclass
class Run:
    """One pytest. notes: what at_once.py writes."""

    name: str
    process: subprocess.Popen
    notes: Path
    began: float
    read: int = 0
    outcomes: dict[str, str] = field(default_factory=dict)  # by test; a failure of any part of it counts
    running: str | None = None
    ended_at: float | None = None
    interrupted: bool = False
    told: int = 0

    def look(self) -> list[str]:
        """What failed since the last look."""
        new = []
        with self.notes.open() as file:
            file.seek(self.read)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break  # half of one
                self.read += len(line.encode())
                note = json.loads(line)
                self.running = note.get("began") if "test" not in note else self.running
                if "test" in note:
                    if note["outcome"] == "failed":
                        new.append(note["test"])
                    if self.outcomes.get(note["test"]) != "failed":
                        self.outcomes[note["test"]] = note["outcome"]
        return new

    def result(self, code: int, limit: float) -> dict:
        counts = {what: list(self.outcomes.values()).count(what) for what in ("passed", "failed", "skipped")}
        if self.interrupted:
            end = f"NOT FINISHED in {limit:.0f} s"
        elif code < 0:
            end = f"DIED of {signal.Signals(-code).name}"
        elif code in (0, NO_TESTS):
            end = "passed" if counts["passed"] else "none ran"
        else:
            end = f"FAILED, pytest said {code}"
        failed = [test for test, outcome in self.outcomes.items() if outcome == "failed"]
        running = self.running if end not in ("passed", "none ran") else None
        seconds = (self.ended_at or time.monotonic()) - self.began
        return counts | {"seconds": seconds, "end": end, "running": running, "failures": failed, "code": code}


def files() -> list[str]:
    """Stems of those that have tests for a GPU, ALONE the first."""
    found = sorted(path.stem for path in FOLDER.glob("test_*.py") if "mark.gpu" in path.read_text())
    return sorted(found, key=lambda stem: stem != ALONE)


def run(report: Report, stems: Sequence[str], deadline: float) -> None:
    """stems: these files, or all but ALONE."""
    chosen = stems or [stem for stem in files() if stem != ALONE]
    wanted = {stem: [str(FOLDER / f"{stem}.py"), *(["--maxfail=3"] if stem == ALONE else [])] for stem in chosen}
    _run(report, wanted, deadline, {})


def run_again(report: Report, deadline: float) -> None:
    """One process for each file, one after the other. Every launch is waited for, so that a trace ends where it went wrong."""
    first = {stem: found for stem, found in report.results["tests"].items() if not stem.endswith(AGAIN)}
    report.results["tests"] = dict(first)
    for stem, found in first.items():
        tests = [test for test in [*found["failures"], found["running"]] if test][:MOST_AGAIN]
        if tests and not report.out_of_time(stem + AGAIN):
            arguments = [*(str(ROOT / test) for test in tests), "--tb=long", "--maxfail=5"]
            _run(report, {stem + AGAIN: arguments}, deadline, {"CUDA_LAUNCH_BLOCKING": "1"})


def _run(report: Report, wanted: dict[str, list[str]], deadline: float, environment: dict[str, str]) -> None:
    began, limit = time.monotonic(), deadline - time.monotonic() - GRACE - CLOSING
    with tempfile.TemporaryDirectory() as folder:
        runs = [_start(report.out, name, arguments, Path(folder), environment) for name, arguments in wanted.items()]
        try:
            while any(each.ended_at is None for each in runs):
                time.sleep(0.2)
                over = time.monotonic() > began + limit
                for each in runs:
                    _follow(each, over, began + limit + GRACE)
        finally:
            for each in runs:
                _signal(each, signal.SIGKILL)
        for each in runs:
            _tell(each)
            found = each.result(each.process.wait(), limit)
            report.results["tests"][each.name] = found
            if found["end"] not in ("passed", "none ran") or found["failed"]:
                report.fail(f"{each.name}: {tests_in_words(found)}; {' '.join(found['failures'][:TOLD])}")
            else:
                headline(f"{each.name}: {tests_in_words(found)}")
            report.write()


def _start(out: Path, name: str, arguments: list[str], folder: Path, environment: dict[str, str]) -> Run:
    options = ["-m", "gpu", "-q", "-p", "bench.at_once", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    options += [f"--confcutdir={FOLDER}"]
    options += ["-o", "filterwarnings=error"]  # without the filter that names a class of pytest-benchmark
    notes = folder / f"{name}.jsonl"
    notes.touch()
    variables = {"DISA_FAST_TEST_NOTES": str(notes), "DISA_FAST_TEST_FAILURES": str((out / FAILURES).resolve())}
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else is installed there
    options += ["-o", f"faulthandler_timeout={STACKS_AFTER}", "--tb=short"]  # arguments may say --tb again: the last one counts
    command = [sys.executable, "-m", "pytest", *options, *arguments]  # -m: the checkout comes first
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables | environment)
    return Run(name, process, notes, time.monotonic())


def _follow(run: Run, over: bool, end: float) -> None:
    _tell(run)
    if run.ended_at is None and run.process.poll() is not None:
        run.ended_at = time.monotonic()
    if run.ended_at is None and over:
        if not run.interrupted:
            run.interrupted = True
            _signal(run, signal.SIGINT)
        elif time.monotonic() > end:
            _signal(run, signal.SIGKILL)


def _tell(run: Run) -> None:
    for test in run.look():
        run.told += 1
        if run.told <= TOLD:
            headline(f"FAILED test after {time.monotonic() - run.began:.0f} s: {test}")


def _signal(run: Run, which: signal.Signals) -> None:
    if run.process.poll() is None:
        run.process.send_signal(which)
