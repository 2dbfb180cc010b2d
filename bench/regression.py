"""Holds the line: is this package as much faster than the eager loop as it was, on a machine of this class?

    python -m bench.regression baseline          make bench-baseline   writes bench/baselines/<class of machine>.json
    python -m bench.regression check             make bench-check      exit status 1 where a case has lost more than the bound
    python -m bench.regression prove             ten checks of the same code, then of code slowed down on purpose, to be on record

The quantity is a ratio: the eager loop's seconds over ours, of two calls that follow each other in one process; the median of many
such pairs (bench_regression.py). Times of one machine vary by more than any regression worth catching, the ratio much less. What
is left of it differs from process to process, by where memory came to lie. So a baseline is the median of several processes, and
a case that seems to have lost more than half of the bound is measured in two more: the median of the three decides.

A program that keeps another core busy moves some ratios by more than the bound, since caches, and often the core itself, are
shared. So what fails beside one is no verdict: exit status 3.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from disa_fast.collect_env import cpu_name
from disa_fast.files import written_aside

ROOT = Path(__file__).resolve().parent.parent
BASELINES = ROOT / "bench" / "baselines"
BOUND = 0.10  # of a slowdown, as a share of the time
BUSY = 0.25  # cores that other programs may have meanwhile
PROCESSES = 5  # of a baseline
QUICK = ("MAR-B, 2 rows, cpu", "MAR-B, 8 rows, hoisted", "FlowAR-S, 16 tokens, hoisted")
QUICK_PAIRS, QUICK_BOUND = 15, 0.5  # one process, and any machine of the class: this is to catch a path that is no longer taken
PLANTED = 0.15  # slowdown of `prove`
UNCHANGED = 10  # its checks of unchanged code


@dataclass(frozen=True)
class Verdict:
    """Of one case. now: speed over eager in each process that measured it; slowdown: share by which ours takes longer than at the
    time of the baseline, relative to eager."""

    case: str
    baseline: float
    now: tuple[float, ...]
    bound: float

    @property
    def slowdown(self) -> float:
        return self.baseline / statistics.median(self.now) - 1 if self.now else math.inf

    @property
    def failed(self) -> bool:
        return self.slowdown > self.bound

    def __str__(self) -> str:
        word = "SLOWER" if self.failed else "faster" if self.slowdown < -self.bound else "ok"
        runs = ", ".join(f"{over_eager:.2f}x" for over_eager in self.now)
        return f"{self.case:36} {self.baseline:6.2f}x   {runs or 'not measured':24} {self.slowdown:+7.1%}   {word}"


def measure(cases: Sequence[str] = (), pairs: int | None = None, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """pytest-benchmark's record of the cases, by default all, from a process of its own. RuntimeError if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={out}"]
        command += [f"bench/bench_regression.py::test_over_eager[{case}]" for case in cases] or ["bench/bench_regression.py"]
        more = dict(environment or {}) | ({} if pairs is None else {"DISA_FAST_PAIRS": str(pairs)})
        busy, own, started = busy_seconds(), os.times(), time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
        mine = sum(os.times()[:4]) - sum(own[:4])
        return json.loads(out.read_text()) | {"others": (busy_seconds() - busy - mine) / (time.monotonic() - started)}


def busy_seconds() -> float:
    """Of all cores together, since the machine started; not a number where the system does not tell."""
    try:
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    except OSError:
        return math.nan
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def ratios(record: Mapping[str, Any]) -> dict[str, float]:
    return {run["params"]["name"]: run["extra_info"]["over_eager"] for run in record["benchmarks"]}


def machine_class(machine: Mapping[str, Any]) -> str:
    """Machines that one baseline serves: the name of its file."""
    name = machine.get("gpu") or f"{machine['cpu']} {machine['cpu_capability']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def this_machine() -> dict[str, Any]:
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine | {"torch": torch.__version__}


def baseline_path() -> Path:
    return BASELINES / f"{machine_class(this_machine())}.json"


def record_baseline(path: Path, processes: int = PROCESSES) -> None:
    """Measures all cases in so many processes, and writes each case's median with what it is the median of."""
    records = [measure() for _ in range(processes)]
    runs = [ratios(record) for record in records]
    cases = {
        name: {"over_eager": statistics.median(run[name] for run in runs), "runs": [run[name] for run in runs]} for name in runs[0]
    }
    text = json.dumps(stamp() | {"commit": records[0]["commit_info"]["id"], "cases": cases}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(text + "\n")
    print(f"written: {path.relative_to(ROOT)}")
    for name, case in cases.items():
        print(f"{name:36} {case['over_eager']:6.2f}x ({min(case['runs']):.2f} to {max(case['runs']):.2f})")


def stamp() -> dict[str, Any]:
    return {"machine": this_machine(), "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")}


@dataclass(frozen=True)
class Checked:
    """others: cores that other programs had meanwhile, at most, of the processes that measured."""

    verdicts: list[Verdict]
    others: float

    @property
    def failed(self) -> list[str]:
        return [verdict.case for verdict in self.verdicts if verdict.failed]

    @property
    def status(self) -> int:
        """0: passed, 1: failed, 3: it cannot be said."""
        return 0 if not self.failed else 3 if self.others > BUSY else 1

    def report(self) -> str:
        """A table, and what it comes to."""
        lines = [f"{'over eager':36} baseline   {'now':24}    time", *map(str, self.verdicts)]
        bound = f"{self.verdicts[0].bound:.0%}"
        lines.append(f"{len(self.failed)} of {len(self.verdicts)} cases" if self.failed else "no case")
        lines[-1] += f" lost more than {bound}"
        if self.status == 3:
            lines[-1] += f", beside other programs that had {self.others:.1f} cores: try again on a quiet machine"
        return "\n".join(lines)


def check(baseline: Mapping[str, float], bound: float = BOUND, environment: Mapping[str, str] | None = None) -> Checked:
    """With a verdict for each case of the baseline."""
    records = [measure(environment=environment)]
    now = {name: [over_eager] for name, over_eager in ratios(records[0]).items()}
    suspects = [name for name in baseline if name in now and baseline[name] / now[name][0] - 1 > bound / 2]
    for _ in range(2 if suspects else 0):
        records.append(measure(suspects, environment=environment))
        for name, over_eager in ratios(records[-1]).items():
            now[name].append(over_eager)
    verdicts = [Verdict(name, baseline[name], tuple(now.get(name, ())), bound) for name in baseline]
    return Checked(verdicts, max(record["others"] for record in records))


def check_quickly(baseline: Mapping[str, float] | None) -> Checked:
    """A few cases, few pairs and a wide bound; without a baseline each has to be faster than eager."""
    record = measure(() if torch.cuda.is_available() else QUICK, QUICK_PAIRS)
    now = ratios(record)
    expected, bound = (dict.fromkeys(now, 1.0), 0.0) if baseline is None else (baseline, QUICK_BOUND)
    return Checked([Verdict(name, expected[name], (over_eager,), bound) for name, over_eager in now.items()], record["others"])


def prove(path: Path, baseline: Mapping[str, float]) -> dict[str, Any]:
    """Checks of the same code, none of which should fail, and of code that is slower on purpose; written to `path` after each."""
    found: dict[str, Any] = stamp() | {"bound": BOUND, "cases": list(baseline), "unchanged": [], "planted": []}

    def note(checked: Checked) -> dict[str, Any]:
        print(checked.report(), flush=True)
        slowdowns = {verdict.case: verdict.slowdown for verdict in checked.verdicts}
        return {"slowdowns": slowdowns, "failed": checked.failed, "others": checked.others}

    def write() -> None:
        runs = found["unchanged"]
        totals = {"unchanged_runs": len(runs), "unchanged_failures": sum(bool(run["failed"]) for run in runs)}
        with written_aside(path) as aside:
            aside.write_text(json.dumps(found | totals, indent=1) + "\n")

    for _ in range(UNCHANGED):
        found["unchanged"].append(note(check(baseline)))
        write()
    run = note(check(baseline, environment={"DISA_FAST_PLANT": str(PLANTED)}))
    caught = len(run["failed"])
    planted = {"what": f"ours take {PLANTED:.0%} longer", "slowdown": PLANTED, "caught": caught > 0, "cases_caught": caught}
    found["planted"].append(planted | {"cases": len(baseline)} | run)
    write()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("baseline", "check", "prove"))
    parser.add_argument("--quick", action="store_true", help="check: a few cases and a wide bound; needs no baseline")
    parser.add_argument("--bound", type=float, default=BOUND, help="check: slowdown that fails, as a share")
    options = parser.parse_args(argv)
    path = baseline_path()
    if options.command == "baseline":
        record_baseline(path)
        return 0
    recorded = json.loads(path.read_text()) if path.exists() else None
    if recorded is None and not options.quick:
        print(f"there is no {path.relative_to(ROOT)}, a baseline for machines of this class: make bench-baseline", file=sys.stderr)
        return 2
    if recorded is not None:
        torches = {recorded["machine"]["torch"], this_machine()["torch"]}
        print(f"{path.relative_to(ROOT)} of {recorded['date']}, torch {' and now '.join(sorted(torches))}")
    baseline = recorded and {name: case["over_eager"] for name, case in recorded["cases"].items()}
    if options.command == "prove":
        found = prove(ROOT / "bench" / "results" / "regression.json", baseline)
        return int(any(run["failed"] for run in found["unchanged"]) or not all(run["caught"] for run in found["planted"]))
    checked = check_quickly(baseline) if options.quick else check(baseline, options.bound)
    print(checked.report())
    return int(checked.status == 1) if options.quick else checked.status


if __name__ == "__main__":
    sys.exit(main())
