"""Comparison with two bounds: the worst element, and the relative L2 error. Either alone is blind to something."""

import torch
from torch import Tensor


def errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest absolute difference, relative L2 error), in float64. Fails where shapes or non-finite values do not coincide."""
    assert actual.shape == truth.shape, f"shape {list(actual.shape)}, expected {list(truth.shape)}"
    actual, truth = actual.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    same = torch.where(finite, actual.isfinite(), actual.eq(truth) | (actual.isnan() & truth.isnan()))
    assert same.all(), f"inf or nan in other places: {int((~same).sum())} elements differ"
    difference = torch.where(finite, actual - truth, 0.0)
    norm = torch.where(finite, truth, 0.0).norm()
    return float(difference.abs().max()), float(difference.norm() / norm)


def _ulp(truth: Tensor, dtype: torch.dtype) -> float:
    return float(truth.abs().max()) * torch.finfo(dtype).eps


def assert_close(actual: Tensor, truth: Tensor, worst: float) -> None:
    """The worst element within `worst`, and the whole within a quarter of what `worst` everywhere would be."""
    worst_error, l2_error = errors(actual, truth)
    l2 = 0.25 * worst * truth.numel() ** 0.5 / float(truth.double().norm()) + torch.finfo(actual.dtype).eps
    assert worst_error <= worst, _message("worst element", worst_error, worst, actual, truth)
    assert l2_error <= l2, _message("relative L2 error", l2_error, l2, actual, truth)


def assert_as_good_as(actual: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """`actual`, computed in `dtype`, against float64 `truth`: the bar is what plain eager PyTorch makes in the same dtype."""
    worst_error, l2_error = errors(actual, truth)
    eager_worst, eager_l2 = errors(eager, truth)
    worst, l2 = 2 * eager_worst + _ulp(truth, dtype), 1.5 * eager_l2 + torch.finfo(dtype).eps
    assert worst_error <= worst, _message("worst element", worst_error, worst, actual, truth)
    assert l2_error <= l2, _message("relative L2 error", l2_error, l2, actual, truth)


def _message(what: str, error: float, bound: float, actual: Tensor, truth: Tensor) -> str:
    difference = (actual.double() - truth.double()).abs().nan_to_num()
    at = int(difference.argmax())
    where = f"worst at flat index {at}: {actual.flatten()[at]:.8g}, expected {truth.flatten()[at]:.8g}"
    return f"{what} {error:.3g} over {bound:.3g}; {where}"
