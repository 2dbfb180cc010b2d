import numpy as np
import pytest
from recorded import GOLDEN, golden_json

import disa_fast
from disa_fast import Constant, Cosine, Linear, StepList, TwoStage, parse_schedule
from disa_fast.schedule import steps_at

BY_STRATEGY = {
    "linear": Linear,
    "cosine": Cosine,
    "two-stage": TwoStage,
    "constant": lambda upper, lower: Constant(lower),
}


@pytest.mark.parametrize("which", GOLDEN)
@pytest.mark.parametrize("strategy", BY_STRATEGY)
def test_mar_schedules_as_recorded(which, strategy):
    for entry in golden_json(which, "schedules")["mar"][strategy]:
        schedule = BY_STRATEGY[strategy](entry["upper"], entry["lower"])
        K = entry["K"]
        assert [schedule(k, K) for k in range(K)] == entry["T"], entry
        effective = [len(disa_fast.solvers.ddpm(schedule(k, K))) for k in range(K)]
        assert effective == entry["effective"], entry


@pytest.mark.parametrize("which", GOLDEN)
@pytest.mark.parametrize("system", ["flowar", "xar"])
def test_flow_schedules_as_recorded(which, system):
    for entry in golden_json(which, "schedules")[system]:
        schedule = Linear(entry["upper"], entry["lower"], rounding=system)
        K = len(entry["T"])
        assert [schedule(k, K) for k in range(K)] == entry["T"], entry


def test_the_roundings_differ():
    assert Linear(80, 5)(4, 16) == 59
    assert Linear(80, 5, rounding="flowar")(4, 16) == 60


@pytest.mark.parametrize("make", [Linear, Cosine, TwoStage, *(lambda e, n, r=r: Linear(e, n, r) for r in ("flowar", "xar"))])
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64])
def test_counts_of_numpy_do_not_overflow(make, kind):
    plain, counted = make(100, 5), make(kind(100), kind(5))
    assert [counted(kind(k), kind(64)) for k in range(64)] == [plain(k, 64) for k in range(64)]


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("linear:50-5", Linear(50, 5)),
        ("cosine:100-5", Cosine(100, 5)),
        ("two-stage:50-5", TwoStage(50, 5)),
        ("constant:100", Constant(100)),
        ("list:50,20,5", StepList([50, 20, 5])),
    ],
)
def test_parse(text, schedule):
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize(
    "text",
    ["", "linear", "linear:50", "linear:a-b", "linear:50-5-1", "constant:", "constant:5,6", "list:", "steps:5", "50", None, 50],
)
def test_parse_names_the_forms(text):
    with pytest.raises(ValueError, match=r"schedule: expected .*linear:50-5"):
        parse_schedule(text)


@pytest.mark.parametrize("kind", [Linear, Cosine, TwoStage])
def test_annealing_goes_down(kind):
    with pytest.raises(ValueError, match="late: expected at most early = 5, got 50"):
        kind(5, 50)
    with pytest.raises(ValueError, match="late: expected at least 1 denoising step, got 0"):
        kind(5, 0)
    with pytest.raises(ValueError, match=r"early: expected a whole number of denoising steps, got 5\.5"):
        kind(5.5, 1)


def test_other_bad_values():
    with pytest.raises(ValueError, match="steps: expected at least 1 denoising step, got 0"):
        Constant(0)
    with pytest.raises(ValueError, match="steps: expected at least one entry"):
        StepList([])
    with pytest.raises(ValueError, match=r"steps\[1\]: expected at least 1"):
        StepList([5, -1])
    with pytest.raises(ValueError, match=r"rounding: expected one of .*'flowar', 'mar', 'xar'.*, got 'up'"):
        Linear(50, 5, rounding="up")
    with pytest.raises(ValueError, match="steps: expected one entry for each of the 3 autoregressive steps, got 2"):
        StepList([5, 4])(0, 3)


@pytest.mark.parametrize("schedule", [Linear(50, 5), Cosine(50, 5), TwoStage(50, 5), Constant(5), StepList([5] * 8)])
@pytest.mark.parametrize("k", [-1, 8])
def test_step_past_the_schedule(schedule, k):
    with pytest.raises(ValueError, match=rf"k: expected an autoregressive step in 0\.\.7, got {k}"):
        schedule(k, 8)


def test_numpy_counts_are_counts():
    steps = StepList(np.arange(3, 0, -1))
    assert [steps_at(steps, k, 3) for k in range(3)] == [3, 2, 1]
    assert Linear(np.int64(50), np.int64(5)) == Linear(50, 5)


def test_one_autoregressive_step_gets_the_early_count():
    assert Linear(50, 5)(0, 1) == 50
    assert Cosine(50, 5)(0, 1) == 50
