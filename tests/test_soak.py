"""bench/soak.py: a sound run is found sound, and what is planted is found, with the call that shows it."""

import importlib
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from disa_fast import FlowTransformerHead, MLPHead, backends

ROOT = Path(__file__).parent.parent
QUICK = ("cpu",) if backends.cpu.is_built() else ("reference",)


@pytest.fixture
def soak(monkeypatch):
    """bench/soak.py, whose settings of PyTorch's caches and of threads stay with the test."""
    monkeypatch.syspath_prepend(str(ROOT))
    soak = importlib.import_module("bench.soak")
    for name, capacity in soak.CACHES.items():
        monkeypatch.setenv(name, capacity)
    threads = torch.get_num_threads()
    yield soak
    assert torch.get_num_threads() == threads


def quick(soak, calls=300, **how):
    return soak.Soak(calls, **{"names": QUICK, "dtypes": ("float32",), **how})


def named(soak, failure):
    """The call that a line of a failure ends with."""
    return eval(re.search(r"Call\(.*\)$", failure).group(), {"Call": soak.Call})


def on_call(monkeypatch, change):
    """Every result of `denoise` of either kind of head is change(number of the call, head, result)."""
    numbers, lock = iter(range(10**9)), threading.Lock()
    for kind in (MLPHead, FlowTransformerHead):

        def denoise(self, *arguments, right=kind.denoise, **how):
            result = right(self, *arguments, **how)
            with lock:
                return change(next(numbers), self, result)

        monkeypatch.setattr(kind, "denoise", denoise)


# A whole run ----------------------------------------------------------------------------------------------------------


def test_a_run_of_everything_is_sound(soak, tmp_path, capsys):
    assert soak.main(["--calls", "1500", "--device", "cpu", "--json", str(tmp_path / "soak.json")]) == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    assert soak.TOO_FEW not in printed
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["calls"] == sum(result["calls_by_backend"].values()) == 1500
    assert set(result["calls_by_backend"]) == {"hoisted", "reference", *(["cpu"] if backends.cpu.is_built() else [])}
    assert min(result["calls_by_backend"].values()) > 300
    assert result["repeats_compared"] > 500
    assert result["calls_beside_others"] > 200
    assert result["changes_of_parameters_or_heads"] > 5
    assert result["fixed_calls_whose_bits_depend_on_threads"].get("cpu", 0) == 0
    assert len(result["samples"]) > 80
    assert {sample["phase"] for sample in result["samples"]} == {"changing", "steady"}
    assert [sample["calls"] for sample in result["samples"]] == sorted({sample["calls"] for sample in result["samples"]})
    assert result["samples"][-1]["calls"] == 1500
    assert [verdict["holds"] for verdict in result["verdicts"]] == [True] * 4
    assert result["failures"] == []
    assert str(ROOT) not in json.dumps(result)


# What is planted ------------------------------------------------------------------------------------------------------


def test_a_kept_tensor_of_each_call_is_found(soak, monkeypatch):
    kept = []
    on_call(monkeypatch, lambda number, head, result: kept.append(result) or result)
    result = quick(soak).run()
    assert result["failures"] == []
    (line,) = soak.wrong(result)
    assert re.match(r"tensors left when all is forgotten: \+(1\d\d|2\d\d), allowed 0", line), line


def test_what_a_head_keeps_of_each_call_is_found(soak, monkeypatch):
    """Though it goes with everything else that was derived from the parameters."""
    monkeypatch.setattr(soak, "KEPT_TENSORS", 100)

    def keep(number, head, result):
        head.packed("kept", torch.float32, lambda parameters, spec: []).append(result)
        return result

    on_call(monkeypatch, keep)
    (line,) = soak.wrong(quick(soak, 600).run())
    assert line.startswith("tensors in the last quarter, last tenth over first: +1")


def test_kept_bytes_and_an_open_file_of_each_call_are_found(soak, monkeypatch):
    monkeypatch.setattr(soak, "SETTLED", 200)
    monkeypatch.setattr(soak, "CALLERS", (1,))
    assert soak.wrong(quick(soak, 600).run()) == []
    kept = []

    def keep(number, head, result):
        kept.append(bytearray(b"x" * (400 << 10)))
        if number % 10 == 0:
            kept.append(open(__file__))  # noqa: SIM115
        return result

    on_call(monkeypatch, keep)
    lines = soak.wrong(quick(soak, 600).run())
    for thing in kept:
        getattr(thing, "close", int)()
    assert [line.split(",")[0] for line in lines] == ["open files", "resident bytes", "resident bytes"]
    assert [line.split(":")[0].split(", ")[1] for line in lines] == [
        "last tenth over first", "fitted over the run", "last tenth over first",
    ]  # fmt: skip


def test_a_flipped_bit_is_found_and_its_call_named(soak, monkeypatch):
    flipped = []

    def flip(number, head, result):
        if number > 100:
            word = result.view(torch.int32) if result.dtype == torch.float32 else result.view(torch.int64)
            word.flatten()[-1] ^= 1
            flipped.append(number)
        return result

    with monkeypatch.context() as planted:
        on_call(planted, flip)
        run = quick(soak, seed=3)
        result = run.run()
    assert flipped
    assert len(result["failures"]) == soak.MAX_FAILURES
    assert result["calls"] < 300
    for failure in result["failures"]:
        assert re.match(r"1 of \d+ bytes differ from the first run's; call \d\d\d, ", failure), failure
    first = result["failures"][0]
    call, state = named(soak, first), int(re.search(r"state (\d)", first).group(1))
    assert call in run.fixed
    bits = {bits for (of, in_state, _), bits in run.first.items() if (of, in_state) == (call, state)}
    assert bits == {soak.replay(call, state=state).numpy().tobytes()}
    assert bits != {soak.replay(call, state=1 - state).numpy().tobytes()}


def test_a_race_is_found(soak, monkeypatch):
    """Two calls at once that share a result."""
    calls, shared = threading.local(), []

    def share(number, head, result):
        calls.number = number
        shared.append(result)
        return shared[-2] if threading.current_thread() is not threading.main_thread() and number % 7 == 0 else result

    on_call(monkeypatch, share)
    monkeypatch.setattr(soak, "CALLERS", (4,))
    failures = quick(soak).run()["failures"]
    assert any("beside others" in failure for failure in failures)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (lambda result: result.fill_(torch.nan), r"\d+ of \d+ numbers are not finite; "),
        (lambda result: [][0], r"IndexError: list index out of range; "),
    ],
)
def test_what_fails_is_named(soak, monkeypatch, capsys, what, expected):
    on_call(monkeypatch, lambda number, head, result: what(result) if number in (100, 200) else result)
    result = quick(soak).run()
    assert result["calls"] == 300
    assert len(result["failures"]) == 2
    for failure in result["failures"]:
        assert re.match(expected, failure)
        assert named(soak, failure).backend == QUICK[0]
        assert f"FAILED {failure}" in capsys.readouterr().out or failure is not result["failures"][0]
    assert soak.wrong(result) == result["failures"]


def test_the_exit_status_is_1_for_what_is_wrong(soak, monkeypatch):
    assert soak.main(["--calls", "300", "--device", "cpu", "--backends", *QUICK]) == 0
    assert soak.main(["--calls", "12", "--device", "cpu", "--backends", *QUICK]) == 1  # no telling
    on_call(monkeypatch, lambda number, head, result: 1 / 0 if number == 100 else result)
    assert soak.main(["--calls", "300", "--device", "cpu", "--backends", *QUICK]) == 1


# What is called -------------------------------------------------------------------------------------------------------


def test_calls_are_of_every_kind(soak):
    run = soak.Soak(1000, device="cpu")
    calls = [run.new_call() for _ in range(4000)]
    for name, expected in {
        "head": set(soak.SPECS),
        "backend": {name for name in soak.BACKENDS["cpu"] if name != "cpu" or backends.cpu.is_built()},
        "dtype": set(soak.DTYPES),
        "rows": set(soak.ROWS),
        "tokens": set(soak.TOKENS),
        "solver": {*soak.solvers.NAMES, *soak.FLOW_SOLVERS},
        "steps": set(soak.STEPS),
        "noise": set(soak.MLP_NOISE),
    }.items():
        assert {getattr(call, name) for call in calls} == expected, name
    assert {call.head for call in calls if call.backend == "cpu"} <= {"MLP", "MLP in bfloat16"}
    assert any(call.batch_invariant for call in calls) == backends.cpu.is_built()
    assert len({call.cfg for call in calls}) > 100
    assert {call.temperature == 1 for call in calls} == {False, True}


def test_one_seed_gives_one_run(soak):
    assert quick(soak, seed=5).fixed == quick(soak, seed=5).fixed != quick(soak, seed=6).fixed
    calls = [quick(soak, 4000).fixed[0] for _ in range(2)]
    assert torch.equal(*(soak.replay(call) for call in calls))


def test_tables_and_arguments_are_made_anew(soak):
    run = soak.Soak(100, device="cpu", names=("reference",))
    for call in run.fixed[:20] or run.fixed:
        head = run.subjects[call.head, 1].head
        one, two = (soak.arguments(call, head) for _ in range(2))
        assert one["table"] is not two["table"]
        assert torch.equal(one["z"], two["z"])
        assert one["z"].data_ptr() != two["z"].data_ptr()


def test_parameters_change_and_come_back(soak):
    for name in soak.SPECS:
        subject = soak.Subject(name, torch.device("cpu"))
        before = {key: p.clone() for key, p in subject.net.named_parameters()}
        addresses = [p.data_ptr() for p in subject.net.parameters()]
        subject.change(1)
        assert not any(torch.equal(p, before[key]) for key, p in subject.net.named_parameters())
        subject.change(0)
        assert all(torch.equal(p, before[key]) for key, p in subject.net.named_parameters())
        assert [p.data_ptr() for p in subject.net.parameters()] == addresses
        assert all(p.dtype == soak.SPECS[name][1] for p in subject.net.parameters())


def test_a_backend_that_cannot_serve_is_refused(soak):
    with pytest.raises(ValueError, match=r"backends: expected some that serve on cpu in one of \['float64'\], got 'cuda'"):
        soak.Soak(100, device="cpu", names=("reference", "cuda"), dtypes=("float64",))


def test_it_ends_in_time(soak):
    result = quick(soak, 10**5, seconds=1).run()
    assert 0 < result["calls"] < 10**5
    assert result["seconds"] < 5
    assert result["failures"] == []


# The persistent kernel ---------------------------------------------------------------------------------------------------


@pytest.fixture
def as_cuda(soak, monkeypatch, one_thread):
    """change(call, result): `hoisted` in the place of `cuda`, with results changed by the number of the call."""

    def use(change=lambda call, result: result):
        numbers = iter(range(10**9))

        def denoise(self, *arguments, right=MLPHead.denoise, **how):
            assert how.pop("backend") == "cuda"
            return change(next(numbers), right(self, *arguments, backend="hoisted", **how))

        monkeypatch.setattr(MLPHead, "denoise", denoise)
        return soak.Subject("MLP", torch.device("cpu")).head

    monkeypatch.setitem(soak.SPECS, "MLP", (soak.MLPSpec(16, 32, 1, 32), torch.float32))
    return use


def test_one_call_again_and_again(soak, as_cuda):
    assert soak.repeated(as_cuda(), 8, 4, deadline=time.monotonic() + 1000) == (4, [])
    assert soak.repeated(soak.Subject("MLP", torch.device("cpu")).head, 8, 4, deadline=0) == (0, [])


@pytest.mark.parametrize(
    ("value", "said"), [(1e-6, "1 of 128 numbers differ from the first call's"), (torch.nan, "1 of 128 numbers are not finite")]
)
def test_one_call_that_is_wrong_among_many_is_found(soak, as_cuda, value, said):
    def change(call, result):
        result[0, 0] += value if call == 2 else 0
        return result

    assert soak.repeated(as_cuda(change), 8, 4, deadline=time.monotonic() + 1000) == (4, [f"call 2: {said}"])


BEFORE, GIVES_UP, NEXT, NEXT_BUT_ONE = range(4)  # calls of soak.given_up
OTHER_BITS = [f"{what} after it gives another result" for what in ("a call", "the next call")]


def spoiled(*calls, raises=()):
    """Those calls give NaN; those of `raises` raise, as one does that tells of an earlier one."""

    def change(call, result):
        if call in raises:
            raise RuntimeError("an earlier call gave up")
        return result.fill_(torch.nan) if call in calls else result

    return change


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (spoiled(GIVES_UP), []),
        (spoiled(GIVES_UP, raises=[NEXT]), []),
        (spoiled(), ["a launch without one of its blocks left what looks like a result"]),
        (spoiled(GIVES_UP, NEXT), OTHER_BITS[:1]),
        (spoiled(GIVES_UP, NEXT, NEXT_BUT_ONE), OTHER_BITS),
        (spoiled(GIVES_UP, raises=[NEXT, NEXT_BUT_ONE]), ["the next call but one still fails: an earlier call gave up"]),
    ],
)
def test_a_launch_that_gives_up(soak, as_cuda, monkeypatch, change, wrong):
    monkeypatch.setenv("DISA_FAST_GRAPHS", "1")
    gpu, patience = soak.cuda.gpu, soak.cuda.PATIENCE
    assert soak.given_up(as_cuda(change)) == wrong
    assert (gpu, patience) == (soak.cuda.gpu, soak.cuda.PATIENCE)
    assert soak.os.environ["DISA_FAST_GRAPHS"] == "1"


# Verdicts -------------------------------------------------------------------------------------------------------------


def series(soak, calls=100_000, **by_call):
    """100 samples of a run, each quantity a function of the number of calls."""
    flat = {"rss": lambda n: 600 << 20, "tensors": lambda n: 3000, "threads": lambda n: 2, "files": lambda n: 6} | by_call
    samples = []
    for i in range(1, 101):
        n = i * calls // 100
        phase = "warm-up" if i <= 5 else "changing" if i <= 50 else "steady"
        samples.append({"calls": n, "phase": phase, **{name: f(n) for name, f in flat.items()}})
    return samples


def failing(soak, samples, before=None, after=None):
    left = {"tensors": 500, "allocated": 0}
    found = soak.verdicts(samples, left | (before or {}), left | (after or {}))
    assert found
    return [verdict["what"] for verdict in found if not verdict["holds"]]


def test_verdicts(soak):
    assert failing(soak, series(soak)) == []
    assert failing(soak, series(soak, rss=lambda n: (600 << 20) + min(n, soak.SETTLED) * 10**4)) == []  # while it warms up
    both = ["resident bytes, fitted over the run", "resident bytes, last tenth over first"]
    assert failing(soak, series(soak, rss=lambda n: (600 << 20) + 400 * n)) == both
    assert failing(soak, series(soak, rss=lambda n: (600 << 20) - 400 * n)) == []
    assert failing(soak, series(soak, rss=lambda n: (600 << 20) + (200 << 20) * (n // 1000 % 7 == 3))) == []  # now and then
    (kept,) = failing(soak, series(soak, tensors=lambda n: 3000 + n / 50))
    assert kept.startswith("tensors in the last quarter")
    assert failing(soak, series(soak, tensors=lambda n: 3000 + min(n, 70_000) / 50)) == []  # while caches fill
    assert failing(soak, series(soak), after={"tensors": 501}) == ["tensors left when all is forgotten"]
    assert failing(soak, series(soak, threads=lambda n: 2 + n // 90_000)) == ["threads, last tenth over first"]
    assert failing(soak, series(soak, files=lambda n: 6 + n // 90_000)) == ["open files, last tenth over first"]


def test_verdicts_on_a_gpu(soak):
    gpu = {"allocated": lambda n: 0, "reserved": lambda n: 1 << 30}
    left = {"reserved": 0}
    assert failing(soak, series(soak, **gpu), left, left) == []
    (reserved,) = failing(soak, series(soak, **gpu | {"reserved": lambda n: 4000 * n}), left, left)
    assert reserved.startswith("GPU bytes reserved in the last quarter")
    (allocated,) = failing(soak, series(soak, **gpu), left, left | {"allocated": 2 << 20})
    assert allocated == "GPU bytes allocated when all is forgotten"


def test_short_runs_are_told_apart(soak):
    """What a process takes for good in its first calls says nothing of how it goes on."""
    assert failing(soak, series(soak, calls=soak.SETTLED, rss=lambda n: 10**5 * n)) == []
    assert len(failing(soak, series(soak, calls=4 * soak.SETTLED, rss=lambda n: 10**5 * n))) == 2
    assert soak.verdicts(series(soak)[:55], {"tensors": 0}, {"tensors": 0}) == []
