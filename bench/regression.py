"""Holds the line: is this package as much faster than the eager loop as it was, on a machine of this class?

    python -m bench.regression baseline          make bench-baseline   writes bench/baselines/<class of machine>.json
    python -m bench.regression check             make bench-check      exit status 1 where a case has lost more than the bound
    python -m bench.regression check --against main                    the same against a commit, measured here and now in turns
    python -m bench.regression prove             ten checks of the same code, then of code slowed down on purpose, to be on record

The quantity is a ratio: the eager loop's seconds over ours, of two calls that follow each other in one process; the median of many
such pairs (bench_regression.py). Times of one machine vary by more than any regression worth catching, the ratio much less. What
is left of it differs from process to process, by where memory came to lie. So a baseline is the median of several processes, and
a case that seems to have lost more than half of the bound is measured in two more: the median of the three decides.

Machines of one class still differ among themselves, by as much as 8 % where few rows are concerned. A commit that is built and
measured beside the code, process by process, has no such difference: that is what a change is best judged by.

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
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
# One process, and any machine of the class, of which one gave +42 % for unchanged code: this is to catch a path that is not taken.
QUICK_PAIRS, QUICK_BOUND = 15, 0.75
TURNS = 3  # processes of each side of a comparison with a commit
PACKAGE = ("disa_fast", "kernels", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml")  # what of a commit is measured
UNCHANGED = 10  # checks of unchanged code by `prove`
PLANTED = 0.15  # its slowdown of our calls
SOURCE = "csrc/cpu/kernels.cpp"  # and its slowdown of our code: these lines are taken out
PREFETCH = "    for (int line = 0; line < lines; ++line) __builtin_prefetch(ahead + 64 * line);\n    ahead += 64 * lines;\n"


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


def measure(
    cases: Sequence[str] = (), pairs: int | None = None, environment: Mapping[str, str] | None = None, root: Path = ROOT
) -> dict[str, Any]:
    """pytest-benchmark's record of the cases, by default all, from a process of its own. RuntimeError if that fails.

    root: of the repository, or a copy of it, whose code is measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={out}"]
        command += [f"bench/bench_regression.py::test_over_eager[{case}]" for case in cases] or ["bench/bench_regression.py"]
        more = dict(environment or {}) | ({} if pairs is None else {"DISA_FAST_PAIRS": str(pairs)})
        busy, own, started = busy_seconds(), os.times(), time.monotonic()
        done = subprocess.run(command, cwd=root, env=os.environ | more, capture_output=True, text=True)
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


def check(baseline: Mapping[str, float], bound: float = BOUND, **how: Any) -> Checked:
    """With a verdict for each case of the baseline. how: environment and root, as `measure` takes them."""
    records = [measure(**how)]
    now = {name: [over_eager] for name, over_eager in ratios(records[0]).items()}
    suspects = [name for name in baseline if name in now and baseline[name] / now[name][0] - 1 > bound / 2]
    for _ in range(2 if suspects else 0):
        records.append(measure(suspects, **how))
        for name, over_eager in ratios(records[-1]).items():
            now[name].append(over_eager)
    verdicts = [Verdict(name, baseline[name], tuple(now.get(name, ())), bound) for name in baseline]
    return Checked(verdicts, max(record["others"] for record in records))


def check_against(commit: str, bound: float = BOUND) -> Checked:
    """With a verdict for each case, of this code over that of a commit, both by this bench. ValueError if there is none such."""

    def replace(root: Path) -> None:
        command = ["git", "archive", f"--output={root / 'commit.tar'}", commit, *PACKAGE]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"commit: {commit!r}: {done.stderr.strip()}")
        for name in PACKAGE:
            (shutil.rmtree if (root / name).is_dir() else os.remove)(root / name)
        with tarfile.open(root / "commit.tar") as archive:
            archive.extractall(root, filter="data")

    with built_copy(replace) as root:
        pairs = [(measure(root=root), measure()) for _ in range(TURNS)]
    before, now = ([ratios(record) for record in records] for records in zip(*pairs, strict=True))
    verdicts = [
        Verdict(name, statistics.median(run[name] for run in before), tuple(run[name] for run in now), bound) for name in before[0]
    ]
    return Checked(verdicts, max(record["others"] for pair in pairs for record in pair))


def check_quickly(baseline: Mapping[str, float] | None) -> Checked:
    """A few cases, few pairs and a wide bound; without a baseline each has to be faster than eager."""
    record = measure(() if torch.cuda.is_available() else QUICK, QUICK_PAIRS)
    now = ratios(record)
    expected, bound = (dict.fromkeys(now, 1.0), 0.0) if baseline is None else (baseline, QUICK_BOUND)
    return Checked([Verdict(name, expected[name], (over_eager,), bound) for name, over_eager in now.items()], record["others"])


def prove(path: Path, baseline: Mapping[str, float]) -> dict[str, Any]:
    """Checks of the same code, none of which should fail, then of calls and of code that are slower on purpose; written to `path`
    after each."""
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

    def note_planted(what: str, checked: Checked, cases: Sequence[str]) -> None:
        """cases: that are concerned."""
        caught = sum(case in checked.failed for case in cases)
        planted = {"what": what, "caught": caught > 0, "cases_caught": caught, "cases": len(cases)}
        found["planted"].append(planted | note(checked))
        write()

    longer = check(baseline, environment={"DISA_FAST_PLANT": str(PLANTED)})
    note_planted(f"our calls take {PLANTED:.0%} longer", longer, list(baseline))
    on_the_core = [case for case in baseline if ", cpu" in case]
    if on_the_core:
        with built_copy(without_prefetch) as root:
            note_planted("the C++ core does not prefetch weights", check(baseline, root=root), on_the_core)
    return found


def without_prefetch(root: Path) -> None:
    source = root / SOURCE
    before, found, after = source.read_text().partition(PREFETCH)
    if not found:
        raise ValueError(f"{SOURCE}: expected to find, to take it out, {PREFETCH!r}")
    source.write_text(before + after)


@contextmanager
def built_copy(change: Callable[[Path], None]) -> Iterator[Path]:
    """A copy of what is measured, changed, with its C++ core built."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "copy")
        left_out = shutil.ignore_patterns(".*", "build", "dist", "docs", "tests", "results", "__pycache__", "_C*.so", "*.egg-info")
        shutil.copytree(ROOT, root, symlinks=True, ignore=left_out)
        change(root)
        environment = (
            os.environ | {"DISA_FAST_REQUIRE_NATIVE": "1"} | ({} if torch.cuda.is_available() else {"DISA_FAST_CUDA": "0"})
        )
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=root, env=environment, check=True)
        yield root


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("baseline", "check", "prove"))
    parser.add_argument("--quick", action="store_true", help="check: a few cases and a wide bound; needs no baseline")
    parser.add_argument("--against", metavar="COMMIT", help="check: this one, instead of a baseline")
    parser.add_argument("--bound", type=float, default=BOUND, help="check: slowdown that fails, as a share")
    options = parser.parse_args(argv)
    path = baseline_path()
    if options.command == "baseline":
        record_baseline(path)
        return 0
    if options.command == "check" and options.against is not None:
        try:
            checked = check_against(options.against, options.bound)
        except ValueError as error:
            parser.error(str(error))
        print(checked.report())
        return checked.status
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
