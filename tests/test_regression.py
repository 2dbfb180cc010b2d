"""bench/regression.py: what it takes for slower, and what it does not. Numbers of real runs: bench/results/regression.json."""

import importlib.util
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
from contextlib import contextmanager

import pytest
import regression
import turns
from regression import BOUND, BUSY, Checked, Verdict

RESULTS = regression.ROOT / "bench" / "results"


@pytest.mark.parametrize(("n", "ranks"), [(5, (1, 5)), (6, (1, 6)), (10, (2, 9)), (41, (14, 28)), (100, (40, 61))])
def test_the_interval_of_a_median_is_that_of_the_tables(n, ranks):
    """Order statistics for 95 %, one-based, as in tables of the sign test; five samples cannot give more than their range."""
    samples = [float(x) for x in range(1, n + 1)]
    random.Random(0).shuffle(samples)
    assert turns.interval(samples) == (ranks[0], statistics.median(samples), ranks[1])


def test_interrupted_pairs_do_not_count(monkeypatch):
    switches = iter([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])  # before and after each turn: the second and the fourth are interrupted
    monkeypatch.setattr(turns.resource, "getrusage", lambda who: type("Usage", (), {"ru_nivcsw": next(switches)}))
    calls = []
    found, interrupted = turns.pairs(lambda: calls.append("base"), lambda: calls.append("other"), 3)
    assert calls == ["base", "other"] * 5
    assert (len(found), interrupted) == (3, 2)


def test_all_pairs_count_where_too_few_are_calm(monkeypatch):
    count = iter(range(100))
    monkeypatch.setattr(turns.resource, "getrusage", lambda who: type("Usage", (), {"ru_nivcsw": next(count)}))
    found, interrupted = turns.pairs(lambda: None, lambda: None, 3)
    assert len(found) == interrupted == 12


def test_a_planted_slowdown_is_as_long_as_it_says(monkeypatch):
    clock = [0.0]

    def perf_counter():
        clock[0] += 1e-6
        return clock[0]

    def work():
        clock[0] += 0.01

    monkeypatch.setattr(turns.time, "perf_counter", perf_counter)
    ((base, other),), _ = turns.pairs(work, work, 1, slowed=0.15)
    assert other / base == pytest.approx(1.15, rel=1e-3)


def made_up(baseline: dict[str, float], slowdowns: dict[str, float], seed: int, scatter: float = 0.03, others: float = 0.0):
    """Stands in for `measure`: each process sees the true ratio off by a few percent, as recorded runs are."""
    noise = random.Random(seed)

    def measure(cases=(), pairs=None, environment=None):
        names = cases or baseline
        over = {name: baseline[name] / (1 + slowdowns.get(name, 0.0)) * math.exp(noise.gauss(0, scatter)) for name in names}
        found = [{"params": {"name": name}, "extra_info": {"over_eager": over[name]}} for name in names]
        return {"benchmarks": found, "others": others}

    return measure


BASELINE = {"a": 9.0, "b": 5.0, "c": 2.0, "d": 1.5}


def test_unchanged_code_passes_and_a_slowdown_does_not(monkeypatch):
    for seed in range(50):
        monkeypatch.setattr(regression, "measure", made_up(BASELINE, {}, seed))
        assert regression.check(BASELINE).status == 0
    caught = 0
    for seed in range(50):
        monkeypatch.setattr(regression, "measure", made_up(BASELINE, {"b": 0.15}, seed))
        checked = regression.check(BASELINE)
        assert set(checked.failed) <= {"b"}
        caught += checked.status == 1
    assert caught >= 45


def test_a_commit_is_measured_in_turns_with_the_code(monkeypatch):
    """On a machine that is another one at each turn."""
    roots, speeds = [], iter([1.0, 1.0, 0.7, 0.7, 1.2, 1.2])

    @contextmanager
    def built_copy(change):
        yield "copy"

    def measure(cases=(), root=regression.ROOT):
        roots.append(root)
        speed = next(speeds)
        now = {"b": 0.15} if root == regression.ROOT else {}
        return made_up({name: over * speed for name, over in BASELINE.items()}, now, len(roots), 0.0)()

    monkeypatch.setattr(regression, "built_copy", built_copy)
    monkeypatch.setattr(regression, "measure", measure)
    checked = regression.check_against("main")
    assert roots == ["copy", regression.ROOT] * 3
    assert checked.failed == ["b"]
    assert {verdict.case: len(verdict.now) for verdict in checked.verdicts} == dict.fromkeys(BASELINE, 3)
    assert checked.verdicts[1].slowdown == pytest.approx(0.15)


def test_a_commit_that_is_not_there_is_said_so(capsys):
    with pytest.raises(SystemExit) as error:
        regression.main(["check", "--against", "nowhere"])
    assert error.value.code == 2
    assert "error: commit: 'nowhere': " in capsys.readouterr().err


def test_the_line_that_is_taken_out_is_there(tmp_path):
    copy = tmp_path / regression.SOURCE
    copy.parent.mkdir(parents=True)
    original = (regression.ROOT / regression.SOURCE).read_text()
    copy.write_text(original)
    regression.without_prefetch(tmp_path)
    assert copy.read_text() == original.replace(regression.PREFETCH, "") != original
    with pytest.raises(ValueError, match=r"csrc/cpu/kernels\.cpp: expected to find"):
        regression.without_prefetch(tmp_path)


@pytest.mark.slow
@pytest.mark.native
def test_a_copy_is_built_of_a_commit(monkeypatch):
    """And that is what is measured in it."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=regression.ROOT, capture_output=True).returncode:
        pytest.skip("needs the repository, with git")
    if not shutil.which("cmake") or not shutil.which("ninja") or not importlib.util.find_spec("pybind11"):
        pytest.skip("needs cmake, ninja and pybind11: pip install 'disa-fast[native]'")
    measured = []

    def measure(cases=(), root=regression.ROOT):
        if root != regression.ROOT:
            script = "import disa_fast; from disa_fast.backends import cpu; print(disa_fast.__file__, cpu.is_built())"
            done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
            measured.append(done.stdout.split() == [str(root / "disa_fast" / "__init__.py"), "True"])
        return made_up(BASELINE, {}, 0, 0.0)()

    monkeypatch.setattr(regression, "measure", measure)
    monkeypatch.setattr(regression, "TURNS", 1)
    assert regression.check_against("HEAD").status == 0
    assert measured == [True]


def test_one_bad_process_is_no_regression(monkeypatch):
    processes = iter([made_up(BASELINE, {"c": 0.4}, 0, 0.0), made_up(BASELINE, {}, 1, 0.0), made_up(BASELINE, {}, 2, 0.0)])
    monkeypatch.setattr(regression, "measure", lambda *how, **more: next(processes)(*how, **more))
    checked = regression.check(BASELINE)
    assert {verdict.case: len(verdict.now) for verdict in checked.verdicts} == {"a": 1, "b": 1, "c": 3, "d": 1}
    assert checked.status == 0


def test_what_fails_beside_other_programs_is_no_verdict(monkeypatch):
    monkeypatch.setattr(regression, "measure", made_up(BASELINE, {"c": 0.4}, 0, 0.0, others=0.9))
    checked = regression.check(BASELINE)
    assert checked.failed == ["c"]
    assert checked.status == 3
    assert "other programs that had 0.9 cores" in checked.report()
    monkeypatch.setattr(regression, "measure", made_up(BASELINE, {}, 0, 0.0, others=0.9))
    assert regression.check(BASELINE).status == 0


def test_a_case_that_is_gone_fails(monkeypatch):
    monkeypatch.setattr(regression, "measure", made_up({"a": 9.0}, {}, 0, 0.0))
    checked = regression.check({"a": 9.0, "b": 5.0})
    assert checked.failed == ["b"]
    assert "not measured" in checked.report()


def test_the_report_names_what_lost_how_much():
    verdicts = [Verdict("a", 9.0, (9.1,), BOUND), Verdict("b", 5.0, (4.0, 4.1, 4.9), BOUND), Verdict("c", 2.0, (2.6,), BOUND)]
    text = Checked(verdicts, 0.0).report()
    assert re.search(r"^b +5\.00x +4\.00x, 4\.10x, 4\.90x +\+22\.0% +SLOWER$", text, re.MULTILINE)
    assert re.search(r"^c .* faster$", text, re.MULTILINE)
    assert text.endswith("1 of 3 cases lost more than 10%")
    assert Checked(verdicts[:1], 0.0).report().endswith("no case lost more than 10%")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A machine without a baseline, in a repository of its own."""
    monkeypatch.setattr(regression, "ROOT", tmp_path)
    monkeypatch.setattr(regression, "BASELINES", tmp_path / "bench" / "baselines")


def test_baseline_then_check(monkeypatch, capsys, elsewhere):
    cases = dict.fromkeys(regression.QUICK, 3.0)
    record = made_up(cases, {}, 0)

    def measure(*how, **more):
        return record(*how, **more) | {"commit_info": {"id": "0123"}}

    monkeypatch.setattr(regression, "measure", measure)
    assert regression.main(["check"]) == 2
    assert "make bench-baseline" in capsys.readouterr().err
    assert regression.main(["check", "--quick"]) == 0  # faster than eager
    assert regression.main(["baseline"]) == 0
    assert regression.main(["check"]) == 0
    written = json.loads(regression.baseline_path().read_text())
    assert written["commit"] == "0123"
    for case in written["cases"].values():
        assert len(case["runs"]) == regression.PROCESSES
        assert case["over_eager"] == statistics.median(case["runs"])
    record = made_up(cases, {regression.QUICK[0]: 0.3}, 1)
    assert regression.main(["check"]) == 1
    assert regression.main(["check", "--bound", "0.5"]) == 0
    assert regression.main(["check", "--quick"]) == 0
    record = made_up(cases, {regression.QUICK[0]: 2.5}, 2)
    assert regression.main(["check", "--quick"]) == 1


def test_what_slower_than_eager_fails_also_without_a_baseline(monkeypatch, elsewhere):
    cases = dict.fromkeys(regression.QUICK, 3.0) | {regression.QUICK[1]: 0.9}
    monkeypatch.setattr(regression, "measure", made_up(cases, {}, 0, 0.0))
    assert regression.main(["check", "--quick"]) == 1


def test_machines_of_a_class_share_a_file():
    machine = {"cpu": "AMD EPYC", "threads": 2, "cpu_capability": "AVX512", "torch": "2.13.0+cpu"}
    assert regression.machine_class(machine) == "amd-epyc-avx512-2-threads"
    assert regression.machine_class(machine | {"gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


@pytest.mark.native
def test_a_case_measured_in_earnest():
    record = regression.measure(["MAR-B, 2 rows, cpu"], pairs=5)
    (run,) = record["benchmarks"]
    low, high = run["extra_info"]["interval"]
    assert low <= run["extra_info"]["over_eager"] <= high
    assert run["extra_info"]["pairs"] >= 5
    assert -0.1 < record["others"] < 64
    assert regression.ratios(record)["MAR-B, 2 rows, cpu"] > 1


def test_the_recorded_proof():
    """Ten checks of unchanged code, and slowdowns on purpose, on the machine whose baseline is committed."""
    proof = json.loads((RESULTS / "regression.json").read_text())
    baseline = json.loads((regression.BASELINES / f"{regression.machine_class(proof['machine'])}.json").read_text())
    assert proof["bound"] == BOUND
    assert set(proof["cases"]) == set(baseline["cases"])
    assert len(proof["unchanged"]) == proof["unchanged_runs"] == 10
    assert proof["unchanged_failures"] == 0
    for run in proof["unchanged"]:
        assert set(run["slowdowns"]) == set(baseline["cases"])
        assert max(run["slowdowns"].values()) <= BOUND
        assert run["others"] < BUSY
    calls, code = proof["planted"]
    assert calls["what"] == "our calls take 15% longer"
    assert set(calls["failed"]) == set(baseline["cases"])
    assert code["what"] == "the C++ core does not prefetch weights"
    for planted in (calls, code):
        assert {name for name, slowdown in planted["slowdowns"].items() if slowdown > BOUND} == set(planted["failed"])
        assert planted["cases"] >= planted["cases_caught"] == len(planted["failed"]) > 0
        assert planted["others"] < BUSY
