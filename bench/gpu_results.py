"""What a run on a GPU leaves: report.json, which every phase of gpu_first.py adds to, and how it is told on a terminal.

Without PyTorch, so that the process that starts the phases can do without it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

REPORT, LOG, FAILURES = "report.json", "log.txt", "failures.txt"
TUNED, CROSSOVER, PLOT = "tuned.json", "crossover.json", "speeds.png"
FILES = (REPORT, LOG, FAILURES, TUNED, CROSSOVER, PLOT)
IN_SHORT = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "compile default": "compile",
    ", loop alone": " alone",
    ", graph": "+graph",
}
MARK = "! "  # begins a line of a phase that is for the terminal too
DONE, LEFT_OUT = "done", "left out"
OUT_OF_TIME = ": out of time"
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
EMPTY: dict = {
    "gpu": None,
    "date": None,
    "commit": None,
    "versions": {},
    "runs": {},  # by phase: state, seconds, limit, failures, skipped
    "correct": [],
    "tests": {},
    "peaks": {},
    "steps": [],
    "images": [],
    "flow_images": [],
    "targets": [],
    "costs": [],
    "sanitizer": {},
    "soak": {},
}


def load(out: Path) -> dict:
    path = out / REPORT
    return json.loads(json.dumps(EMPTY)) | (json.loads(path.read_text()) if path.exists() else {})


def save(out: Path, results: dict) -> None:
    """Whole or not at all, whenever the process ends."""
    aside = out / f".{REPORT}.{os.getpid()}"
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(out / REPORT)


def commit() -> str:
    """Of the sources. DISA_FAST_COMMIT where there is no git, or no repository."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        said = done.stdout.strip()
    except OSError:
        said = ""
    return said or os.environ.get("DISA_FAST_COMMIT") or "unknown"


def end_with_parent() -> None:
    """This process, which may be of another group, is killed as soon as the one that started it ends in whatever way (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def headline(text: str) -> None:
    print(f"{MARK}{text}", flush=True)


class Terminal:
    """What a person reads: at most `budget` characters in all, `kept` of which the summary has for itself."""

    def __init__(self, budget: int, kept: int, log) -> None:
        self.left, self.kept, self.log = budget, kept, log

    def say(self, line: str, keep: bool = True) -> None:
        """A line, or one that says that there are more in the log, or nothing."""
        print(line, file=self.log, flush=True)
        kept, more = self.kept * keep, f"... more in {LOG}"
        if self.left - len(line) - 1 >= kept + len(more) + 1:
            self._print(line)
        elif self.left > kept:
            self._print(more)
            self.left = min(self.left, kept)

    def _print(self, line: str) -> None:
        print(line, flush=True)
        self.left -= len(line) + 1

    def summary(self, lines: list[str]) -> None:
        for line in lines:
            self.say(line, keep=False)


def broke(run: dict | None) -> bool:
    """Whether a phase ended so that what it ran may take others with it."""
    if run is None:
        return False
    return run["state"].startswith(("DIED", "NOT FINISHED")) or any("BrokenContextError" in line for line in run["failures"])


def failures(results: dict) -> list[str]:
    return [f"{phase}: {line}" for phase, run in results["runs"].items() for line in run["failures"]]


def summary(results: dict) -> list[str]:
    """All that a person must know, the most important first."""
    runs, failed = results["runs"], failures(results)
    bad = [name for name, run in runs.items() if run["state"] not in (DONE, LEFT_OUT)]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [f"== {results['gpu']}, {versions}, commit {results['commit']}"]
    lines.append(f"{len(bad)} of {len(runs)} phases FAILED: {', '.join(bad)}" if bad else f"{len(runs)} phases, none failed")
    by_state: dict[str, list[str]] = {}
    for name, run in runs.items():
        took = f" {run['seconds']:.0f}/{run['limit']:.0f} s" if run["state"] != LEFT_OUT else ""
        by_state.setdefault(run["state"], []).append(f"{name}{took}")
    lines += [f"{state}: {'; '.join(names)}" for state, names in by_state.items()]
    lines += [f"{name}: {tests_in_words(found)}" for name, found in results["tests"].items()]
    lines += first_of([f"FAILED {line}" for line in failed], 12)
    for target in results["targets"]:
        if target["measured"] is not None:
            word = "met" if is_met(target) else "missed"
            lines.append(f"{target['what']}: {target['measured']:.2f}{target['unit']}, target {target['target']}, {word}")
    lines += costs_in_words(results["costs"])
    skipped = list(dict.fromkeys(line for run in runs.values() for line in run["skipped"]))
    skipped.sort(key=lambda line: not line.endswith(OUT_OF_TIME))  # the others are mostly what a backend does not serve
    return lines + first_of([f"skipped: {line}" for line in skipped], 6)


def first_of(lines: list[str], most: int) -> list[str]:
    more = [f"... and {len(lines) - most} more such, in {REPORT}"] if len(lines) > most else []
    return [shortened(line) for line in lines[:most]] + more


def shortened(line: str, most: int = 160) -> str:
    line = " ".join(line.split())
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def in_short(text: str) -> str:
    for long, short in IN_SHORT.items():
        text = text.replace(long, short)
    return text


def tests_in_words(found: dict) -> str:
    counts = ", ".join(f"{found[what]} {what}" for what in ("passed", "failed", "skipped"))
    running = f", in {found['running']}" if found["running"] else ""
    return f"{counts}, {found['seconds']:.0f} s; {found['end']}{running}"


def is_met(target: dict) -> bool | None:
    if target["measured"] is None:
        return None
    return target["measured"] >= target["target"] if target["unit"] == "x" else target["measured"] <= target["target"]


def costs_in_words(costs: list[dict]) -> list[str]:
    lines = []
    for cost in costs:
        together = cost["exchanges"] * cost["exchange_us"]
        lines.append(
            f"{cost['size']}, 8 rows: {cost['us_per_step']:.1f} us a step; {cost['exchanges']} exchanges of "
            f"{cost['exchange_us']:.2f} us are {together:.1f} us, {together / cost['us_per_step']:.0%} of it"
        )
    return lines
