"""bench/gpu_first.py: phases that hang, die and fail end alone; what was found stays, and a later call goes on from there."""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from host_gpu import ROOT

MINUTE = 60


@pytest.fixture
def first(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.gpu_first")


@pytest.fixture
def results(first):
    return importlib.import_module("bench.gpu_results")


@pytest.fixture
def script(first, monkeypatch):
    """script(name=program, ...): phases of these names, each a short Python program, which finds the report in `report`."""

    def use(**programs):
        made = tuple(first.Phase(name, "", (), 2, 4, least=1) for name in programs)
        monkeypatch.setattr(first, "PHASES", made)
        before = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom bench import gpu_results\n"

        def command(phase, options, limit):
            out = f"out = Path({str(options.out)!r}); report = gpu_results.load(out)\nrun = report['runs'][{phase.name!r}]\n"
            return [sys.executable, "-c", before + out + programs[phase.name]]

        monkeypatch.setattr(first, "command", command)

    return use


def run(first, out, *arguments, minutes=1.0):
    return first.main(["--out", str(out), "--dry-run", "--minutes", str(minutes), *arguments])


ROW = "report['steps'].append({'size': 'MAR-B', 'rows': %d}); gpu_results.save(out, report)\n"


# Phases -----------------------------------------------------------------------------------------------------------------


def test_one_that_hangs_ends_with_its_group_and_the_others_go_on(first, script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(first, "GRACE", 1)
    monkeypatch.setattr(first, "DRY_SECONDS", 2)
    script(
        hangs=f"{ROW % 1}import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = os.fork()\nprint(f'! child {child}' if child else '', flush=True)\ntime.sleep(1000)",
        fine=ROW % 2,
    )
    start = time.monotonic()
    assert run(first, tmp_path) == 1
    assert time.monotonic() - start < 15
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["runs"]["hangs"]["state"] == "NOT FINISHED in 2 s"
    assert report["runs"]["fine"]["state"] == "done"
    assert [step["rows"] for step in report["steps"]] == [1, 2]
    printed = capsys.readouterr().out
    child = int(printed.split("child ")[1].split()[0])
    assert not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()
    assert "1 of 2 phases FAILED: hangs" in printed


@pytest.mark.parametrize(
    ("program", "state", "said"),
    [
        ("print('last word', flush=True); import os; os.kill(os.getpid(), 11)", "DIED of SIGSEGV", "last words: last word"),
        ("import os; os.kill(os.getpid(), 9)", "DIED of SIGKILL", "last words: none"),
        ("raise RuntimeError('planted')", "FAILED", "RuntimeError: planted"),
        ("run['failures'].append('a row'); gpu_results.save(out, report); sys.exit(1)", "FAILED", "a row"),
        ("import time; time.sleep(1000)", "NOT FINISHED in 2 s", "KeyboardInterrupt"),
    ],
)
def test_one_that_does_not_end_well_is_named(first, results, script, tmp_path, capsys, monkeypatch, program, state, said):
    monkeypatch.setattr(first, "DRY_SECONDS", 2)
    script(bad=ROW % 1 + program, fine=ROW % 2)
    assert run(first, tmp_path) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["runs"]["bad"]["state"], report["runs"]["fine"]["state"]) == (state, "done")
    assert said in report["runs"]["bad"]["failures"][0]
    assert len(report["steps"]) == 2
    printed = capsys.readouterr().out
    assert "1 of 2 phases FAILED: bad" in printed
    assert results.shortened(f"FAILED bad: {report['runs']['bad']['failures'][0]}") in printed


def test_phases_say_their_limit_and_those_without_time_are_left_out_and_done_later(first, script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(first, "CLOSING", 0)
    monkeypatch.setattr(first, "GRACE", 0)
    monkeypatch.setattr(first, "DRY_SECONDS", 5)
    once = tmp_path / "once"
    script(a=f"open({str(once)!r}, 'x')\n{ROW % 1}import time; time.sleep(2)", b=ROW % 2, c=ROW % 3)
    assert run(first, tmp_path / "one", minutes=2.5 / 60) == 0
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert [each["state"] for each in report["runs"].values()] == ["done", "left out", "left out"]
    printed = capsys.readouterr().out
    assert "-- a: 2 s of 2 s left" in printed
    assert "-- b: left out, " in printed
    assert "left out: b; c" in printed
    for path in (tmp_path / "one").iterdir():
        path.chmod(0o444)
    assert run(first, tmp_path / "two", "--resume", str(tmp_path / "one")) == 0
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "two").iterdir())
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert {name: each["state"] for name, each in report["runs"].items()} == dict.fromkeys("abc", "done")
    assert [step["rows"] for step in report["steps"]] == [1, 2, 3]
    assert "-- a" not in capsys.readouterr().out
    assert "-- a: " in (tmp_path / "two" / "log.txt").read_text()


def test_a_failed_phase_is_done_again_and_its_failures_forgotten(first, script, tmp_path):
    script(a="run['failures'].append('a row'); gpu_results.save(out, report); sys.exit(1)", b="")
    assert run(first, tmp_path) == 1
    script(a="", b="sys.exit(1)")
    assert run(first, tmp_path, "--resume", str(tmp_path)) == 0
    assert json.loads((tmp_path / "report.json").read_text())["runs"]["a"]["failures"] == []
    assert run(first, tmp_path, "--resume", str(tmp_path), "--only", "b") == 1


def test_what_had_not_begun_comes_before_what_failed(first, results, tmp_path):
    """A second call has less time, and what failed would mostly fail again."""
    report = results.load(tmp_path)
    left_out = [phase.name for phase in first.PHASES if phase.seconds][8:]
    for phase in first.PHASES[:8]:
        report["runs"][phase.name] = {"state": "FAILED" if phase.method == "correct" else "done", "failures": []}
    report["runs"]["limits"]["state"] = "underway"  # when all was killed
    report["runs"][left_out[0]] = {"state": "left out", "failures": []}
    results.save(tmp_path, report)
    options = argparse.Namespace(long=False, only=None, plant=[], out=tmp_path)
    again = ["correct triton", "correct cuda", "correct hoisted", "limits"]
    assert [phase.name for phase in first.phases(options)] == left_out + again


def test_nothing_goes_on_when_all_is_killed(tmp_path):
    """By one that kills this process and nothing else: no phase may take the GPU of what comes next."""
    command = [sys.executable, "-m", "bench.gpu_first", "--dry-run", "--out", str(tmp_path), "--plant", "hang", "--only", "limits"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        log, start = tmp_path / "log.txt", time.monotonic()
        while "process group" not in (log.read_text() if log.exists() else "") and time.monotonic() < start + MINUTE:
            time.sleep(0.1)
        phase = int(log.read_text().split("process group ")[1].split()[0])
        process.kill()
    try:
        while running(phase) and time.monotonic() < start + MINUTE:
            time.sleep(0.1)
        assert not running(phase)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(phase, signal.SIGKILL)  # what the planted phase had forked


def running(process):
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_new_run_forgets_an_old_one(first, script, tmp_path):
    script(a=ROW % 1)
    for _ in range(2):
        assert run(first, tmp_path) == 0
    assert len(json.loads((tmp_path / "report.json").read_text())["steps"]) == 1


# What a person sees -------------------------------------------------------------------------------------------------------


def test_the_terminal_keeps_its_budget_and_room_for_the_summary(first, script, tmp_path, capsys):
    many = "for i in range(2000): print('! ' + 'x' * 200, flush=True)\n"
    many += "run['failures'] += [f'failure {i} ' + 'y' * 5000 for i in range(500)]; gpu_results.save(out, report); sys.exit(1)"
    script(**{f"phase {i}": many for i in range(3)})
    assert run(first, tmp_path) == 1
    printed = capsys.readouterr()
    assert len(printed.out) + len(printed.err) <= first.TERMINAL
    assert len(printed.out) > first.TERMINAL / 2
    assert printed.out.count("... more in log.txt") <= 2
    assert "3 of 3 phases FAILED: phase 0, phase 1, phase 2" in printed.out
    assert "and 1488 more such, in report.json" in printed.out
    assert (tmp_path / "log.txt").read_text().count("x" * 200) == 6000


def test_nothing_is_cut_where_there_is_room(results, tmp_path):
    with (tmp_path / "log.txt").open("w") as log:
        terminal = results.Terminal(300, 100, log)
        for i in range(9):
            terminal.say(f"line {i} " + "x" * 30)
        terminal.summary([f"end {i}" for i in range(5)])
        assert terminal.left >= 0
    assert (tmp_path / "log.txt").read_text().count("line") == 9


def test_what_was_left_for_want_of_time_is_told_before_what_is_not_served(results):
    report = dict(results.EMPTY)
    skipped = [f"cuda float32, {rows} rows: has no float32" for rows in range(9)] + ["MAR-B, 2 rows, compiled: out of time"]
    report["runs"] = {"a": {"state": "done", "seconds": 1, "limit": 2, "failures": [], "skipped": skipped}}
    told = [line for line in results.summary(report) if line.startswith("skipped")]
    assert told[0] == "skipped: MAR-B, 2 rows, compiled: out of time"
    assert len(told) == 6


def test_a_log_has_an_end(first, script, tmp_path, monkeypatch):
    monkeypatch.setattr(first, "LOG_BYTES", 10_000)
    script(a="for i in range(5000): print('x' * 100)")
    assert run(first, tmp_path) == 0
    assert (tmp_path / "log.txt").stat().st_size < 12_000


# The tests that need a GPU ------------------------------------------------------------------------------------------------


class Told:
    """As much of gpu_measure.Report as gpu_tests.py uses."""

    def __init__(self, out):
        self.out, self.results, self.failures, self.skipped = out, {"tests": {}}, [], []
        self.fail = self.failures.append

    def write(self):
        pass

    def out_of_time(self, what):
        return False


@pytest.fixture
def run_tests(first, monkeypatch, tmp_path):
    """run_tests(stems, *planted) -> Told, of files of bench/planted, in a minute"""
    gpu_tests = importlib.import_module("bench.gpu_tests")
    monkeypatch.setattr(gpu_tests, "FOLDER", ROOT / "bench" / "planted")

    def run(stems, *planted):
        monkeypatch.setenv("DISA_FAST_PLANTED", " ".join(planted))
        told = Told(tmp_path)
        gpu_tests.run(told, stems, gpu_tests.time.monotonic() + MINUTE + gpu_tests.GRACE + gpu_tests.CLOSING)
        return told

    return run


class Clock:
    """That a minute has passed as soon as a test has failed."""

    sleep = time.sleep

    def __init__(self, failures):
        self.failures = failures

    def monotonic(self):
        return time.monotonic() + MINUTE * self.failures.exists()


def test_tests_that_do_not_end_in_time_are_a_failure_with_details(run_tests, tmp_path, capsys, monkeypatch):
    """What had failed before is there too: subprocess.run(timeout=) would have killed pytest before it said a word."""
    monkeypatch.setattr(importlib.import_module("bench.gpu_tests"), "time", Clock(tmp_path / "failures.txt"))
    told = run_tests(["test_gpu"], "failing-test", "hanging-test")
    assert len(told.failures) == 1
    assert told.failures[0].startswith("test_gpu: 1 passed, 1 failed, 0 skipped, ")
    assert "NOT FINISHED in 60 s, in bench/planted/test_gpu.py::test_hangs" in told.failures[0]
    assert "bench/planted/test_gpu.py::test_fails" in told.failures[0]
    assert "! FAILED test after " in capsys.readouterr().out
    assert "assert 1 == 2" in (tmp_path / "failures.txt").read_text()


def test_tests_that_die_are_a_failure_and_those_that_pass_are_counted(run_tests):
    told = run_tests(["test_cuda_gpu", "test_gpu"], "dying-test")
    assert len(told.failures) == 1
    assert told.failures[0].startswith("test_gpu: 3 passed, 0 failed, 0 skipped, ")
    assert "DIED of SIGSEGV, in bench/planted/test_gpu.py::test_dies" in told.failures[0]
    found = told.results["tests"]["test_cuda_gpu"]
    assert (found["passed"], found["failed"], found["skipped"], found["end"]) == (3, 0, 1, "passed")


def test_other_plugins_of_pytest_do_no_harm(run_tests, tmp_path, monkeypatch):
    """Such as are installed on a machine for many purposes."""
    site = tmp_path / "site"
    (site / "bad-1.dist-info").mkdir(parents=True)
    (site / "bad-1.dist-info" / "METADATA").write_text("Name: bad\nVersion: 1\n")
    (site / "bad-1.dist-info" / "entry_points.txt").write_text("[pytest11]\nbad = bad_plugin\n")
    (site / "bad_plugin.py").write_text("raise RuntimeError('planted')\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    told = run_tests(["test_gpu"])
    assert told.failures == []
    assert told.results["tests"]["test_gpu"]["passed"] == 4


def test_the_files_with_tests_for_a_gpu(first):
    found = importlib.import_module("bench.gpu_tests").files()
    assert found[0] == "test_cuda_gpu"
    assert {"test_gpu", "test_flow_gpu"} < set(found)


# What surrounds it --------------------------------------------------------------------------------------------------------


def test_without_git_the_commit_is_that_of_the_environment(results, monkeypatch, tmp_path):
    assert results.commit() not in ("", "unknown")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DISA_FAST_COMMIT", raising=False)
    assert results.commit() == "unknown"
    monkeypatch.setenv("DISA_FAST_COMMIT", "1234abc")
    assert results.commit() == "1234abc"


@pytest.mark.parametrize("builds", [True, False])
def test_what_is_built_goes_into_the_checkout(first, monkeypatch, tmp_path, builds):
    """Which comes first on sys.path of `python -m`, also where another disa_fast is installed, so that this one is measured."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    for folder in (checkout / "disa_fast", site / "disa_fast", tmp_path / "out"):
        folder.mkdir(parents=True)
    (checkout / "disa_fast" / "__init__.py").write_text("")
    (checkout / "disa_fast" / "_C.old.so").write_text("old")
    installed = tmp_path / "installed" / "disa_fast"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    (installed / "_C.py").write_text("")
    monkeypatch.setattr(first, "ROOT", checkout)
    monkeypatch.setattr(first, "SITE", site)

    def pip(command, **how):
        assert command[command.index("--target") + 1] == str(site)
        if builds:
            (site / "disa_fast").mkdir(parents=True)
            (site / "disa_fast" / "_C.new.so").write_text("new")
            (site / "disa_fast" / "mlp_denoise.fatbin").write_text("new")
        return subprocess.CompletedProcess(command, not builds, "", "no compiler")

    with monkeypatch.context() as faked, (tmp_path / "out" / "log.txt").open("w") as log:
        faked.setattr(first.subprocess, "run", pip)
        first.build(tmp_path / "out", first.Terminal(1000, 100, log))
    state = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]["build"]
    found = {path.name for path in (checkout / "disa_fast").iterdir()}
    if builds:
        assert state["state"] == "done"
        assert found == {"__init__.py", "_C.new.so", "mlp_denoise.fatbin"}
    else:
        assert (state["state"], state["failures"]) == ("FAILED", ["going on without a native core: no compiler"])
        assert found == {"__init__.py", "_C.old.so"}
    where = "import disa_fast; print(disa_fast.__file__)"
    (checkout / "shown.py").write_text(where)
    environment = os.environ | {"PYTHONPATH": str(installed.parent)}
    shown = subprocess.run([sys.executable, "-m", "shown"], cwd=checkout, env=environment, capture_output=True, text=True)
    assert Path(shown.stdout.strip()).parent == checkout / "disa_fast"


def test_without_a_gpu_it_refuses(first, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(first, "sees_gpu", lambda: False)
    assert first.main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_carried_is_used_by_every_phase(first, script, monkeypatch, tmp_path):
    prepare = type("Prepare", (), {"use": staticmethod(lambda folder: {"DISA_FAST_CARRIED": str(folder)})})
    monkeypatch.setitem(sys.modules, "bench.gpu_prepare", prepare)
    for name in ("DISA_FAST_CARRIED", "DISA_FAST_COMMIT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "commit.txt").write_text("1234abc\n")
    expected = [str(tmp_path), "1234abc"]
    script(a=f"import os; assert [os.environ['DISA_FAST_CARRIED'], os.environ['DISA_FAST_COMMIT']] == {expected}")
    assert run(first, tmp_path / "out", "--carried", str(tmp_path)) == 0


def test_what_is_carried_for_another_machine_is_refused(first, script, monkeypatch, tmp_path, capsys):
    def use(folder):
        raise RuntimeError("made for python 3.12, but here is 3.11")

    monkeypatch.setitem(sys.modules, "bench.gpu_prepare", type("Prepare", (), {"use": staticmethod(use)}))
    script(a="")
    assert run(first, tmp_path / "out", "--carried", str(tmp_path)) == 2
    assert capsys.readouterr().out == "--carried: made for python 3.12, but here is 3.11\n"


def test_the_files_are_few(results):
    assert len(results.FILES) <= 8


def test_every_phase_has_its_place(first, monkeypatch, tmp_path):
    measure = importlib.import_module("bench.gpu_measure")
    assert len({phase.name for phase in first.PHASES}) == len(first.PHASES)
    assert all(callable(getattr(measure.Report, phase.method)) for phase in first.PHASES)
    assert all(phase.least < phase.long_seconds for phase in first.PHASES)
    order = [phase.name for phase in first.PHASES if phase.seconds]
    assert order == [
        "correct triton", "correct cuda", "correct hoisted", "tests of cuda", "other tests", "limits", "shapes 8",
        "shapes 2", "shapes 14", "image", "xAR-B", "FlowAR-L", "many rows", "tiles", "crossover", "failed again", "sanitizer",
        "entries", "soak",
    ]  # fmt: skip
    rows = {rows for phase in first.PHASES if phase.method == "shapes" for _, rows in phase.arguments}
    assert rows == {*measure.TARGET_ROWS, *measure.ROWS.values()}
    assert {phase.arguments[0] for phase in first.PHASES if phase.method == "flow_image"} == set(measure.FLOW_SETTINGS)
    long = argparse.Namespace(long=True, only=None, plant=[], out=tmp_path)
    assert first.phases(long) == list(first.PHASES)


# All of it ---------------------------------------------------------------------------------------------------------------


def dry(out, *arguments):
    start = time.monotonic()
    command = [sys.executable, "-m", "bench.gpu_first", "--dry-run", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert len(done.stdout) <= 11_000
    files = [path for path in out.iterdir() if path.is_file()]
    assert len(files) <= 8
    assert len(files) == len(list(out.iterdir()))
    return done, json.loads((out / "report.json").read_text()), time.monotonic() - start


def test_a_reduced_dry_run(first, tmp_path):
    done, report, _ = dry(tmp_path, "--minutes", "2", "--only", "limits", "--plant", "die")
    assert done.returncode == 1, done.stdout
    assert {name: run["state"] for name, run in report["runs"].items()} == {"die": "DIED of SIGSEGV", "limits": "done"}
    assert report["peaks"]["HBM GB/s"] == 50
    assert "measured: HBM GB/s 50" in done.stdout
    assert report["gpu"] == "NVIDIA X1 (dry run)"


@pytest.mark.slow
def test_a_complete_dry_run_with_all_that_is_planted(first, tmp_path):
    """Then the rest, in a second call."""
    planted = ("hang", "die", "killed", "fails", "failing-test", "hanging-test", "dying-test")
    done, report, seconds = dry(tmp_path / "one", "--minutes", "5", "--plant", *planted)
    assert seconds < 5 * 60
    assert done.returncode == 1
    states = {name: run["state"] for name, run in report["runs"].items()}
    assert states["hang"].startswith("NOT FINISHED")
    assert (states["die"], states["killed"], states["fails"]) == ("DIED of SIGSEGV", "DIED of SIGKILL", "FAILED")
    assert states["other tests"] == "FAILED"
    assert "test_fails" in (tmp_path / "one" / "failures.txt").read_text()
    assert {"report.json", "log.txt", "failures.txt"} <= {path.name for path in (tmp_path / "one").iterdir()}
    shutil.copytree(tmp_path / "one", tmp_path / "earlier")
    done, report, _ = dry(tmp_path / "two", "--minutes", "12", "--resume", str(tmp_path / "earlier"))
    assert done.returncode == 1  # what was planted before is still there
    states = {name: run["state"] for name, run in report["runs"].items() if name not in planted}
    assert set(states.values()) == {"done"}, states
    assert set(os.listdir(tmp_path / "two")) >= {"report.json", "log.txt", "tuned.json", "crossover.json"}
    shapes = {(step["size"], step["rows"]) for step in report["steps"]}
    assert shapes >= {(size, rows) for size in ("MAR-B", "MAR-L") for rows in (8, 2, 14)} | {("MAR-L", 512), ("MAR-L", 2048)}
    assert {image["model"] for image in report["flow_images"]} == {"xAR-B", "FlowAR-L"}
