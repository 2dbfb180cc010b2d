"""`python -m bench.gpu_first --out DIR --minutes 9`: all that is to be known of this package on the GPU of this machine, the most
valuable first.

Each phase is a process group of its own, so that a hang, a death or a broken CUDA context ends that phase alone; every result is in
DIR as soon as there is one, in at most 8 files; the terminal gets at most 11,000 characters. A phase for which there is no time is
left out and named. `--out NEW --resume DIR` goes on where an earlier run left off: first what had not begun, then what had not
ended well. `make gpu-report` is the long form.

    python -m bench.gpu_first --prepare FOLDER                  on a machine that can build: what is to be carried along
    python -m bench.gpu_first --carried FOLDER --out DIR        on the machine with the GPU: with that instead of a build

The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import gpu_results
from .gpu_results import DONE, LEFT_OUT, LOG, Terminal

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu_first"
TERMINAL, SUMMARY = 11_000, 5_000  # characters in all, and of those for the end
LOG_BYTES = 12 << 20
GRACE = 10  # seconds for an interrupted phase to end by itself
CLOSING = 5  # seconds for the summary
DRY_SECONDS = 60  # of a phase in a dry run
COMMIT = "commit.txt"  # in what is carried along
PLANTED = ("hang", "die", "killed", "fails", "failing-test", "hanging-test", "dying-test")


@dataclass(frozen=True)
class Phase:
    """method: of gpu_measure.Report, with these arguments. seconds: that it may take; 0 where it belongs to the long form alone, in
    which it may take long_seconds. least: that must be left for it to begin."""

    name: str
    method: str
    arguments: tuple
    seconds: float
    long_seconds: float
    least: float = 20


PHASES = (
    Phase("correct triton", "correct", ("triton",), 60, 300),
    Phase("correct cuda", "correct", ("cuda",), 60, 300),
    Phase("correct hoisted", "correct", ("hoisted",), 30, 120),
    Phase("tests of cuda", "tests", ("test_cuda_gpu",), 90, 900, least=40),
    Phase("other tests", "tests", (), 150, 900, least=60),
    Phase("limits", "limits", (), 40, 120),
    Phase("shapes 8", "shapes", (("MAR-L", 8), ("MAR-B", 8)), 90, 600, least=40),
    Phase("shapes 2", "shapes", (("MAR-L", 2), ("MAR-B", 2)), 80, 300, least=40),
    Phase("shapes 14", "shapes", (("MAR-L", 14), ("MAR-B", 14)), 80, 300, least=40),
    Phase("image", "image", ("MAR-B", 1), 50, 200, least=30),
    Phase("xAR-B", "flow_image", ("xAR-B", 1), 70, 400, least=40),
    Phase("FlowAR-L", "flow_image", ("FlowAR-L", 1), 70, 400, least=40),
    Phase("many rows", "shapes", (("MAR-L", 512), ("MAR-L", 2048)), 90, 600, least=40),
    Phase("tiles", "tiles", (), 70, 900, least=40),
    Phase("crossover", "crossover", (), 50, 300, least=30),
    Phase("failed again", "tests_again", (), 60, 300, least=30),
    Phase("sanitizer", "sanitize", (), 120, 300, least=40),
    Phase("entries", "entries", (), 60, 120, least=30),
    Phase("soak", "soak", (), 60, 120, least=40),
    Phase("shapes 32", "shapes", (("MAR-L", 32), ("MAR-B", 32)), 0, 300),
    Phase("more rows", "shapes", (("MAR-B", 512), ("MAR-B", 2048)), 0, 400),
    Phase("shapes of MAR-H", "shapes", tuple(("MAR-H", rows) for rows in (8, 32, 512, 2048)), 0, 400),
    *(Phase(f"MAR-L, {batch} images", "image", ("MAR-L", batch), 0, 400) for batch in (1, 4, 64, 256)),
    *(Phase(f"{name}, 1 image", "flow_image", (name, 1), 0, 400) for name in ("xAR-L", "xAR-H", "FlowAR-S", "FlowAR-H")),
    *(
        Phase(f"{name}, 64 images", "flow_image", (name, 64), 0, 600)
        for name in ("xAR-B", "FlowAR-L", "xAR-L", "xAR-H", "FlowAR-S", "FlowAR-H")
    ),
    Phase("launches", "launches", ("MAR-L", 8, 2048), 0, 300),
    Phase("plot", "plot", (), 0, 60),
)
PLANTED_PHASES = {name: Phase(name, name, (), 0, 0, least=0) for name in PLANTED if not name.endswith("test")}


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    if options.prepare is not None:
        importlib.import_module("bench.gpu_prepare").prepare(options.prepare)
        (options.prepare / COMMIT).write_text(gpu_results.commit() + "\n")
        return 0
    if options.carried is not None:
        try:
            os.environ.update(importlib.import_module("bench.gpu_prepare").use(options.carried))
        except (OSError, RuntimeError) as error:
            print(f"--carried: {error}")
            return 2
        carried_commit = options.carried / COMMIT
        if carried_commit.exists():
            os.environ.setdefault("DISA_FAST_COMMIT", carried_commit.read_text().strip())
    if options.phase is not None:
        return work(options)
    return run_all(options)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_first", description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default: %(default)s)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on from the results in this folder (default of --out)")
    parser.add_argument("--only", nargs="+", metavar="PHASE", help="these phases, also if they were done before")
    parser.add_argument("--long", action="store_true", help="all phases, with more time for each")
    parser.add_argument("--build", action="store_true", help="build the native core into this checkout first; downloads nothing")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="make what --carried takes, and end")
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="use what --prepare made")
    parser.add_argument("--dry-run", action="store_true", help="everything short, with the CPU in the place of a GPU")
    parser.add_argument("--plant", nargs="+", default=[], choices=PLANTED, help="with --dry-run: what is to go wrong")
    parser.add_argument("--phase", help=argparse.SUPPRESS)  # this process is that one
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.out is None and options.resume is not None:
        options.out = options.resume
    if options.prepare is None and options.out is None:
        parser.error("expected --out, a folder for the results")
    if options.plant and not options.dry_run:
        parser.error("--plant is for --dry-run")
    unknown = set(options.only or ()) - {phase.name for phase in PHASES}
    if unknown:
        parser.error(f"--only: expected some of {[phase.name for phase in PHASES]}, got {sorted(unknown)}")
    return options


# All phases ----------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * options.minutes
    if not options.dry_run and not sees_gpu():
        print("no GPU: torch.cuda.is_available() is False, or torch cannot be imported; --dry-run takes the CPU in its place")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume is None:
        for name in gpu_results.FILES:
            (options.out / name).unlink(missing_ok=True)
    elif options.resume.resolve() != options.out.resolve():
        for name in gpu_results.FILES:
            if (options.resume / name).exists():
                shutil.copyfile(options.resume / name, options.out / name)  # not its mode: it may be one to read alone
    with (options.out / LOG).open("a") as log:
        terminal = Terminal(TERMINAL, SUMMARY, log)
        if options.build:
            build(options.out, terminal)
        for phase in phases(options):
            one(phase, options, deadline - CLOSING, terminal)
        results = gpu_results.load(options.out)
        terminal.summary(gpu_results.summary(results))
    return int(any(run["state"] not in (DONE, LEFT_OUT) for run in results["runs"].values()))


def sees_gpu() -> bool:
    """Asked in another process: this one never touches CUDA."""
    command = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True).returncode == 0


def phases(options: argparse.Namespace) -> list[Phase]:
    if options.only:
        chosen = [phase for phase in PHASES if phase.name in options.only]
    else:
        runs = gpu_results.load(options.out)["runs"]
        chosen = [phase for phase in PHASES if options.long or phase.seconds]
        chosen = [phase for phase in chosen if runs.get(phase.name, {}).get("state") != DONE]
        chosen.sort(key=lambda phase: runs.get(phase.name, {"state": LEFT_OUT})["state"] != LEFT_OUT)
    return [PLANTED_PHASES[name] for name in options.plant if name in PLANTED_PHASES] + chosen


def one(phase: Phase, options: argparse.Namespace, deadline: float, terminal: Terminal) -> None:
    """A phase, with its limit; or a word that it is left out. What became of it goes into the report."""
    seconds = phase.long_seconds if options.long or not phase.seconds else phase.seconds
    seconds = seconds if not options.dry_run else 3 if phase.name in PLANTED_PHASES else DRY_SECONDS
    left = deadline - time.monotonic()
    limit = min(seconds, left - GRACE)
    results = gpu_results.load(options.out)
    if limit < (phase.least if not options.dry_run else min(phase.least, 1)):
        results["runs"][phase.name] = {"state": LEFT_OUT, "seconds": 0.0, "limit": seconds, "failures": [], "skipped": []}
        gpu_results.save(options.out, results)
        terminal.say(f"-- {phase.name}: left out, {left:.0f} s left")
        return
    results["runs"][phase.name] = {"state": "underway", "seconds": 0.0, "limit": limit, "failures": [], "skipped": []}
    gpu_results.save(options.out, results)
    terminal.say(f"-- {phase.name}: {limit:.0f} s of {left:.0f} s left")
    began = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "DISA_FAST_PLANTED": " ".join(options.plant)}
    code, timed_out, last = watched(command(phase, options, limit), environment, limit, terminal)
    results = gpu_results.load(options.out)
    run = results["runs"][phase.name]
    if timed_out:
        run["state"] = f"NOT FINISHED in {limit:.0f} s"
    elif code < 0:
        run["state"] = f"DIED of {signal.Signals(-code).name}"
    else:
        run["state"] = "FAILED" if code else DONE
    if run["state"] != DONE and (timed_out or not run["failures"]):
        run["failures"].append(f"{run['state']}; last words: {' | '.join(last) or 'none'}")
        terminal.say(f"FAILED {gpu_results.shortened(run['failures'][-1])}")
    run["seconds"] = time.monotonic() - began
    gpu_results.save(options.out, results)


def command(phase: Phase, options: argparse.Namespace, limit: float) -> list[str]:
    """What runs it, in its own process."""
    made = [sys.executable, "-X", "faulthandler", "-m", "bench.gpu_first", "--phase", phase.name]
    made += ["--out", str(options.out.resolve()), "--seconds", str(limit)]
    return made + ["--long"] * options.long + ["--dry-run"] * options.dry_run


def watched(command: list[str], environment: dict[str, str], limit: float, terminal: Terminal) -> tuple[int, bool, list[str]]:
    """(exit status, whether it took too long, its last lines). Everything that is left of its group is killed in the end."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    last: list[str] = []
    reader = threading.Thread(target=_read, args=(process, terminal, last), daemon=True)
    reader.start()
    timed_out = False
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
        _signal_group(process, signal.SIGINT)
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            code = -signal.SIGKILL
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds is left behind
                process.wait(GRACE)
    finally:
        _signal_group(process, signal.SIGKILL)
    reader.join(2)  # who has left the group may still hold the pipe
    return code, timed_out, last


def _read(process: subprocess.Popen, terminal: Terminal, last: list[str]) -> None:
    with process.stdout:
        for line in process.stdout:
            line = line.rstrip("\n")
            if line.startswith(gpu_results.MARK):
                terminal.say(line.removeprefix(gpu_results.MARK))
            elif terminal.log.tell() < LOG_BYTES:
                print(line, file=terminal.log, flush=True)
            if line.strip():
                last[:] = [*last[-2:], line[:300]]


def _signal_group(process: subprocess.Popen, which: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, which)


# One phase, in its own process -----------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.seconds
    gpu_results.end_with_parent()
    if options.phase in PLANTED_PHASES:
        getattr(importlib.import_module("bench.planted.phases"), options.phase)()
    gpu_measure = importlib.import_module("bench.gpu_measure")
    if options.dry_run:
        dry_run = importlib.import_module("bench.dry_run")
        dry_run.install()
        dry_run.stand_in()
    report = gpu_measure.Report(options.out, options.phase, deadline, options.long)
    phase = next(phase for phase in PHASES if phase.name == options.phase)
    try:
        getattr(report, phase.method)(*phase.arguments)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        report.fail(f"{type(error).__name__}: {str(error).strip()}")
    report.write()
    return int(bool(report.failures))


# The native core of this checkout ---------------------------------------------------------------------------------------


def build(out: Path, terminal: Terminal) -> None:
    """Into the package of this checkout, which is what `python -m` imports from here, whatever else is installed."""
    began = time.monotonic()
    terminal.say("-- building the native core")
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--upgrade"]
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(SITE), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    failures: list[str] = []
    if done.returncode:
        print(done.stderr, file=terminal.log, flush=True)
        failures.append(f"going on without a native core: {gpu_results.shortened(done.stderr[-1000:], 1000)}")
        terminal.say(f"FAILED build: {gpu_results.shortened(failures[0])}")
    for pattern in ("_C*.so", "*.fatbin", "no_fatbin.txt") * (not failures):
        for old in (ROOT / "disa_fast").glob(pattern):
            old.unlink()
        for new in (SITE / "disa_fast").glob(pattern):
            shutil.copy(new, ROOT / "disa_fast")
    results = gpu_results.load(out)
    state = "FAILED" if failures else DONE
    results["runs"]["build"] = {
        "state": state, "seconds": time.monotonic() - began, "limit": 0.0, "failures": failures, "skipped": []
    }  # fmt: skip
    gpu_results.save(out, results)


if __name__ == "__main__":
    sys.exit(main())
