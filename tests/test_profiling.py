import functools
import subprocess
import sys

import pytest
import torch
from upstream_like import AnnealedDiffLoss, UpstreamLikeMAR, small_mar

import disa_fast
from disa_fast import profiling


def test_a_range_for_each_ar_step_of_a_model(nvtx):
    model = small_mar()
    model.sample_tokens(torch.tensor([1, 2]), "linear:6-3", num_iter=4, cfg=3.0)
    rows = [2 * 2 * tokens for tokens in (2, 3, 5, 6)]  # both halves of two images
    steps = [6, 5, 4, 3]
    assert sum(rows) == 2 * 2 * model.seq_len
    assert [text for text in nvtx.ranges if text.startswith("AR step")] == [
        f"AR step k={k} K=4 T={steps[k]} rows={rows[k]}" for k in range(4)
    ]


def test_a_range_for_each_ar_step_of_an_accelerated_object(nvtx):
    model = UpstreamLikeMAR(AnnealedDiffLoss)
    with disa_fast.accelerate(model, "linear:6-3"):
        model.sample_tokens(2, num_iter=3, labels=torch.tensor([1, 2]))
    assert [text.split(" rows")[0] for text in nvtx.ranges] == [f"AR step k={k} K=3 T={T}" for k, T in enumerate((6, 4, 3))]


def test_off_by_default_and_nothing_is_formatted():
    class Unprintable:
        def __format__(self, spec):
            raise AssertionError("formatted")

    assert not profiling.is_enabled()
    with profiling.range("a {}", Unprintable()):
        pass


def test_enable_and_disable():
    pytest.importorskip("nvtx")
    profiling.enable()
    try:
        assert profiling.is_enabled()
        with profiling.range("step {}", 1):
            pass
    finally:
        profiling.disable()
    assert not profiling.is_enabled()


def test_the_environment_switches_it_on():
    pytest.importorskip("nvtx")
    run = functools.partial(subprocess.run, [sys.executable, "-c", "import disa_fast; print(disa_fast.profiling.is_enabled())"])
    for value, expected in (("1", "True"), ("0", "False")):
        done = run(env={"DISA_FAST_NVTX": value, "PATH": ""}, capture_output=True, text=True, check=True, cwd="/")
        assert done.stdout.strip() == expected
