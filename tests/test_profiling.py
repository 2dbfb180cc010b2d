import functools
import subprocess
import sys

import pytest
import torch
from flow_calls import small_model
from random_parameters import random_parameters
from upstream_like import AnnealedDiffLoss, UpstreamLikeMAR, small_mar

import disa_fast
from disa_fast import MLPHead, profiling
from disa_fast.heads.mlp import MLPSpec


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
    """Around the head alone, since the loop is the object's own."""
    model = UpstreamLikeMAR(AnnealedDiffLoss)
    with disa_fast.accelerate(model, "linear:6-3", backend="reference"):
        nvtx.ranges.clear()  # those of the check
        model.sample_tokens(2, num_iter=3, labels=torch.tensor([1, 2]))
    rows = [2 * tokens for tokens in (3, 5, 8)]
    steps = [6, 4, 3]
    assert nvtx.ranges == [
        text
        for k in range(3)
        for text in (
            f"AR step k={k} K=3 T={steps[k]} rows={rows[k]} head alone",
            f"denoise T={steps[k]} rows={rows[k]} backend=reference",
        )
    ]


def test_a_range_for_the_heads_loop_of_each_ar_step(nvtx):
    small_mar().sample_tokens(torch.tensor([1, 2]), "linear:6-3", num_iter=2, cfg=3.0, backend="hoisted")
    steps = [text for text in nvtx.ranges if text.startswith("AR step")]
    assert nvtx.ranges == [text for step in steps for text in (step, f"denoise {step.split('K=2 ')[1]} backend=hoisted")]


@pytest.mark.parametrize(("kind", "T", "rows", "of_head"), [("plain", 2, [4, 16], [2, 16]), ("cell", 3, [16] * 4, [16] * 4)])
def test_ranges_of_flows(nvtx, kind, T, rows, of_head):
    """Noise is drawn before the head's loop. Rows are tokens, both halves counted, though FlowAR's first scale is not guided. Three
    steps are two evaluations on FlowAR's grid."""
    small_model(kind).sample_tokens(torch.tensor([1, 2]), "constant:3", cfg=2.0, backend="hoisted")
    K = len(rows)
    told = [
        (f"AR step k={k} K={K} T={T} rows={rows[k]}", f"noise T={T}", f"denoise T={T} rows={of_head[k]} backend=hoisted")
        for k in range(K)
    ]
    assert nvtx.ranges == [text for three in told for text in three]


@pytest.mark.native
def test_calls_of_the_core_are_told(nvtx):
    head = MLPHead.from_state_dict(random_parameters(MLPSpec(16, 32, 1, 32), 0))
    for expected in (4, 2):  # two layers for the times and one for the conditions, then the loop; the times are kept
        nvtx.ranges.clear()
        head.denoise(torch.zeros(3, 32), disa_fast.solvers.ddpm(2), backend="cpu")
        assert nvtx.ranges == ["denoise T=2 rows=3 backend=cpu", *["cpu core"] * expected]


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
