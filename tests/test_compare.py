"""Tests of the comparison itself: it must catch what a careless kernel gets wrong."""

import pytest
import torch
from compare import assert_as_good_as, assert_close, errors

TRUTH = torch.randn(512, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scaled(x):
    return 1.01 * x


def with_64_zeroes(x):
    x = x.clone()
    x[100, :64] = 0
    return x


@pytest.mark.parametrize("spoil", [scaled, with_64_zeroes])
def test_recorded_cases_would_catch(spoil):
    assert_close(TRUTH.float(), TRUTH, worst=1e-5)
    with pytest.raises(AssertionError, match=r"worst element .* over 1e-05; worst at flat index"):
        assert_close(spoil(TRUTH.float()), TRUTH, worst=1e-5)


@pytest.mark.parametrize("spoil", [scaled, with_64_zeroes])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bar_set_by_eager_would_catch(spoil, dtype):
    eager = TRUTH.to(dtype)
    assert_as_good_as(eager, eager, TRUTH, dtype)
    with pytest.raises(AssertionError, match=r"worst element|relative L2"):
        assert_as_good_as(spoil(TRUTH).to(dtype), eager, TRUTH, dtype)


def test_uniform_error_within_the_worst_bound_fails_the_other():
    with pytest.raises(AssertionError, match="relative L2"):
        assert_close(TRUTH + 0.9e-5, TRUTH, worst=1e-5)


def test_non_finite_values_must_coincide():
    broken = TRUTH.clone()
    broken[3, 3] = torch.nan
    with pytest.raises(AssertionError, match="inf or nan in other places: 1 elements"):
        errors(broken, TRUTH)
    assert errors(broken, broken) == (0.0, 0.0)
    infinite = TRUTH.clone()
    infinite[3, 3] = torch.inf
    with pytest.raises(AssertionError, match="inf or nan"):
        errors(-infinite, infinite)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        errors(TRUTH[:1], TRUTH)
