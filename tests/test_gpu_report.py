"""`make gpu-report` on a machine without a GPU, and its GPU half with the CPU in place of one."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def measure(monkeypatch):
    """bench/gpu_measure.py made to believe in a GPU, with small heads and few steps."""
    monkeypatch.syspath_prepend(str(ROOT))
    measure = importlib.import_module("bench.gpu_measure")
    monkeypatch.setattr(measure, "seconds", on_a_clock)
    for name, value in {
        "ON_GPU": True,
        "SIZES": {"MAR-B": (32, 1), "MAR-L": (48, 1), "MAR-H": (64, 1)},
        "Z_CHANNELS": 32,
        "ROWS": {1: 2},
        "MAIN_ROWS": (8,),
        "COMPILED": {8: ("default", "max-autotune")},
        "STEPS": 2,
        "TURNS": 1,
        "captured": lambda loop: loop,
        "forget": lambda: None,
        "launches": lambda call: 12,
        "measured_peaks": lambda: {"HBM GB/s": 50.0, "L2 GB/s": 100.0, "bfloat16 TFLOP/s": 0.5, "TF32 TFLOP/s": 0.5},
        "iterations": lambda: [(1, 2), (2, 1)],
    }.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1 (test)")
    return measure


def on_a_clock(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.interpreter
def test_every_contestant_is_timed_and_written(measure, tmp_path, capsys):
    report = measure.Report(time.monotonic() + 1000, tmp_path, "passed")
    report.run()
    assert report.failures == []
    result = json.loads((tmp_path / "nvidia_x1_test.json").read_text())
    assert {"gpu", "date", "commit", "versions", "tests", "peaks", "steps", "images", "skipped", "failures"} == set(result)
    assert [(entry["size"], entry["rows"]) for entry in result["steps"]][:3] == [("MAR-L", 8), ("MAR-B", 2), ("MAR-H", 2)]
    first = result["steps"][0]["results"]
    assert {
        "eager float32 TF32", "eager bfloat16", "eager bfloat16, graph", "hoisted bfloat16", "triton bfloat16", "triton float32",
        "compile default bfloat16", "compile default bfloat16, graph", "compile max-autotune bfloat16",
        "compile max-autotune bfloat16, graph", "triton bfloat16, no graph", "triton float32 TF32",
    } <= set(first)  # fmt: skip
    assert first["eager bfloat16"]["over_eager"] == 1
    assert max(r["over_compile"] for name, r in first.items() if name.startswith("compile")) == 1
    assert all(r["us_per_step"] > 0 and r["of_HBM"] > 0 and r["launches_per_step"] == 6 for r in first.values())
    assert [entry["images"] for entry in result["images"]] == [1]
    assert set(result["images"][0]["results"]) >= {"eager bfloat16", "triton bfloat16", "hoisted bfloat16"}
    assert (tmp_path / "nvidia_x1_test.png").stat().st_size > 10000
    assert "MAR-H, 2 rows guided" in capsys.readouterr().out


def test_stops_in_time_and_says_what_it_left_out(measure, tmp_path):
    report = measure.Report(time.monotonic(), tmp_path, "passed")
    report.run()
    result = json.loads((tmp_path / "nvidia_x1_test.json").read_text())
    assert result["steps"] == result["images"] == []
    assert "MAR-L, 8 rows: out of time" in result["skipped"]
    assert "MAR-L, 1 images: out of time" in result["skipped"]


def test_one_that_fails_or_is_wrong_is_named_and_the_others_go_on(measure, tmp_path, monkeypatch):
    def captured(loop):
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure.Report, "able", lambda self, head, rows: [("hoisted", torch.bfloat16)])
    right = measure.MLPHead.denoise
    monkeypatch.setattr(measure.MLPHead, "denoise", lambda *arguments, **how: 3 * right(*arguments, **how))
    report = measure.Report(time.monotonic() + 1000, tmp_path, "passed")
    report.shape("MAR-B", 2, compiled=())
    assert "MAR-B, 2 rows, eager bfloat16, graph: RuntimeError: no graphs today" in report.failures
    assert any("hoisted bfloat16: ArithmeticError: relative error 2" in failure for failure in report.failures)
    assert set(report.steps[0]["results"]) == {"eager float32 TF32", "eager bfloat16"}


def test_on_a_machine_without_a_gpu():
    """In its own process, as a user has it, but for the build."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_report", "--skip-build"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "no GPU: its tests are skipped, and so is every row of this report that is about one" in done.stdout
    assert "skipped: MAR-L, 2048 rows: no GPU" in done.stdout
    assert "MAR-B, 8 rows guided" in done.stdout
