"""The solver's step of the flow heads' loop on the Triton backend, in Triton's interpreter, against heads/flow.py's `integrate`."""

import dataclasses

import numpy as np
import pytest
import torch
from mutants import mutant

from disa_fast import solvers
from disa_fast.backends import triton
from disa_fast.heads import flow

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("one_thread")]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
CFG, TEMPERATURE = 2.4, 0.7
GUARD, MARGIN = 7.0, 512


def table_of(noisy: tuple[bool, ...]) -> solvers.StepTable:
    """Where every coefficient counts: of solvers that are, c is 0."""
    table = solvers.flow_euler_maruyama(len(noisy))
    return dataclasses.replace(table, noisy=np.array(noisy), l0=table.l0 - 0.3, a=0.9 * table.a, c=table.a - 0.6)


def velocity_of(dtype: torch.dtype, guided: tuple[bool, ...], n: int):
    """Something of x and of the step, of which halves see different things; and what it was given."""
    seen = []

    def velocity(i: int, x: torch.Tensor) -> torch.Tensor:
        assert len(x) == (2 * n if guided[i] else n)
        seen.append(x.to(dtype, copy=True))
        half = torch.arange(len(x), device=x.device)[:, None, None] // max(n, 1)
        return (0.8 * x.to(dtype).float() + 0.3 * i - 0.5 * half).to(dtype)

    return velocity, seen


def both_ways(dtype, guided, noisy, n=2, tokens=3, channels=5, device="cpu"):
    """(x, what the network saw) of the kernel, and of `integrate`."""
    torch.manual_seed(0)
    x, noise = (torch.randn(*lead, n, tokens, channels).double().to(device) for lead in ((), (len(guided),)))
    steps, scalars = flow.coefficients(table_of(noisy), x.device), torch.tensor([CFG, TEMPERATURE]).double().to(device)
    shape = triton.FlowShape(len(guided), n, tokens, 0, guided, noisy, "highest")
    arena = torch.full((x.numel() + 2 * MARGIN,), GUARD, dtype=torch.float64, device=device)
    state = arena[MARGIN:-MARGIN].view(x.shape).copy_(x)

    velocity, seen = velocity_of(dtype, guided, n)
    triton.flow_steps(velocity, shape, {"x": state, "steps": steps, "scalars": scalars, "step_noise": noise}, dtype)
    assert (arena[:MARGIN] == GUARD).all() and (arena[-MARGIN:] == GUARD).all()

    velocity, expected = velocity_of(dtype, guided, n)
    last = flow.integrate(velocity, steps, guided, noisy, *scalars, x, noise)
    return (state, seen), (last, expected)


GUIDED = [(True, True, True), (False, False, False), (False, True, False), (True, False, True)]
NOISY = [(True, True, True), (False, False, False), (False, True, True), (True, False, False)]


@pytest.mark.parametrize("noisy", NOISY, ids=str)
@pytest.mark.parametrize("guided", GUIDED, ids=str)
@DTYPES
def test_is_bitwise_the_loop_in_pytorch(dtype, guided, noisy):
    """The state and, step by step, what the network sees: the order of operations is the same, and no two are fused."""
    (state, seen), (last, expected) = both_ways(dtype, guided, noisy)
    assert torch.equal(state, last)
    assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 16, 16), (3, 9, 16), (2, 7, 37), (0, 4, 16)], ids=str)
@pytest.mark.parametrize("guided", [GUIDED[2], GUIDED[1]], ids=str)
def test_sizes_that_programs_divide_and_others(guided, size):
    (state, seen), (last, expected) = both_ways(torch.bfloat16, guided, NOISY[3], *size)
    assert torch.equal(state, last)
    assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))


def keep_before(arguments: list) -> None:
    arguments[2] = arguments[2].clone()


def forget_before(arguments: list) -> None:
    arguments[2].zero_()


def coefficient(column: int, value: float):
    def change(arguments: list) -> None:
        arguments[4] = arguments[4].clone()
        arguments[4][column] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        {"GUIDED": False},
        {"NOISY": False},
        {"BOTH": False},
        {"change": keep_before},
        {"change": forget_before},
        {"change": coefficient(0, 1.0)},
        {"change": coefficient(1, 0.0)},
        {"change": coefficient(2, 0.0)},
        {"change": coefficient(3, 1.0)},
        {"change": lambda arguments: arguments.__setitem__(5, torch.tensor([1.0, TEMPERATURE]).double())},
        {"change": lambda arguments: arguments.__setitem__(5, torch.tensor([CFG, 1.0]).double())},
    ],
)
def test_a_kernel_with_a_term_left_out_is_caught(change, monkeypatch):
    monkeypatch.setattr(triton, "flow_step_kernel", mutant(triton.flow_step_kernel, **change))
    with pytest.raises(AssertionError):
        test_is_bitwise_the_loop_in_pytorch(torch.float32, GUIDED[0], NOISY[0])


def test_float16_beyond_its_range_is_held_at_its_largest():
    """What the network gave, and what it is given: nothing of it is infinite or not a number, as it would be in PyTorch."""
    guided, noisy = (True, True, True), (False, False, False)
    x = torch.full((1, 1, 8), 6e4).double()
    steps = flow.coefficients(solvers.flow_euler(3, "uniform"), x.device)
    b = {"x": x.clone(), "steps": steps, "scalars": torch.tensor([CFG, 1.0]).double()}
    seen = []

    def velocity(i, given):
        seen.append(given.clone())
        return torch.full_like(given, torch.inf if i % 2 else -torch.inf)

    triton.flow_steps(velocity, triton.FlowShape(3, 1, 1, 0, guided, noisy, "highest"), b | {"step_noise": None}, torch.float16)

    def held(i, given):
        return torch.full_like(given, 65504.0 if i % 2 else -65504.0)

    expected = flow.integrate(held, steps, guided, noisy, *b["scalars"], x, None)
    assert torch.equal(b["x"], expected)
    assert all(given.isfinite().all() for given in seen) and any((given.abs() == 65504).all() for given in seen)


@DTYPES
def test_what_is_not_a_number_stays_none(dtype):
    x = torch.zeros(1, 1, 8).double()
    b = {"x": x, "steps": flow.coefficients(table_of((False,)), x.device), "scalars": torch.tensor([CFG, 1.0]).double()}
    shape = triton.FlowShape(1, 1, 1, 0, (True,), (False,), "highest")
    triton.flow_steps(lambda i, given: torch.full_like(given, torch.nan), shape, b | {"step_noise": None}, dtype)
    assert b["x"].isnan().all()
