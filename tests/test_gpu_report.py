"""`make gpu-report` on a machine without a GPU, and its GPU half with the CPU in place of one."""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time

import host_gpu
import host_probe
import pytest
import torch
from host_gpu import ROOT

from disa_fast.backends import cuda, cuda_check, hoisted, triton
from disa_fast.heads.mlp import MLPSpec

MINUTE = 60_000_000_000  # nanoseconds


@pytest.fixture
def measure(monkeypatch):
    """bench/gpu_measure.py made to believe in a GPU, with small models, few images and few steps; without kernels/cuda."""
    monkeypatch.syspath_prepend(str(ROOT))
    measure = importlib.import_module("bench.gpu_measure")
    monkeypatch.setattr(measure, "seconds", on_a_clock)
    for name, value in {
        "ON_GPU": True,
        "SIZES": {"MAR-B": (32, 1), "MAR-L": (48, 1), "MAR-H": (64, 1)},
        "Z_CHANNELS": 32,
        "COMPILED": {8: ("default", "max-autotune")},
        "order": lambda: (
            [("shape", "MAR-L", 8), ("shape", "MAR-B", 2), ("image", "MAR-B", 1), ("flow_image", "xAR-B", 1)],
            [("image", "MAR-L", 1), ("shape", "MAR-H", 2), ("flow_image", "FlowAR-S", 64)],
        ),
        "sanitizer_tool": lambda: None,
        "STEPS": 2,
        "TURNS": 1,
        "captured": lambda loop: loop,
        "forget": lambda: None,
        "launches": lambda call: 12,
        "measured_peaks": lambda: {"HBM GB/s": 50.0, "L2 GB/s": 100.0, "bfloat16 TFLOP/s": 0.5, "TF32 TFLOP/s": 0.5},
        "iterations": lambda: [(1, 2), (2, 1)],
        "SOAK_CALLS": 20,
    }.items():
        monkeypatch.setattr(measure, name, value)
    tiny = {"MLP": (MLPSpec(16, 32, 1, 32), torch.bfloat16)}
    for name, value in {"SPECS": tiny, "STEPS": (1,), "ROWS": (2,), "CALLERS": (1,), "SAMPLES": 10, "MIN_SAMPLES": 2}.items():
        monkeypatch.setattr(measure.soak, name, value)
    images = measure.Images
    settings = importlib.import_module("bench.images").SETTINGS
    for name in measure.FLOW_SETTINGS:
        monkeypatch.setitem(settings, name, smaller(settings[name]))
    monkeypatch.setattr(measure, "Images", lambda name, device, batch: images(name, device, min(batch, 2)))
    monkeypatch.setattr(triton, "TritonOps", hoisted.HoistedOps)  # whose kernels have tests of their own
    monkeypatch.setattr(measure.probes, "why_not", lambda: "not today")
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1 (test)")
    return measure


def smaller(setting):
    """The same kind of model, with few blocks, tokens and steps."""
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()} | {"img_size": 64}
    if setting.system == "flowar":
        sizes |= {"scale": (1, 2, 4), "diffloss_w": 64, "diffloss_d": 1}
    upstream, native = (functools.partial(make, **sizes) for make in (setting.upstream, setting.native))
    sampling = dataclasses.replace(setting.sampling, schedule="linear:4-3")
    return dataclasses.replace(setting, upstream=upstream, native=native, sampling=sampling)


@pytest.fixture
def persistent(measure, monkeypatch):
    """The CUDA kernels of the package and of the probes, on the processor."""
    if host_gpu.compiler() is None:
        pytest.skip("needs a C++20 compiler")
    host_gpu.use(monkeypatch, host_gpu.HostGpu(shared_bytes=227 << 10))
    monkeypatch.setattr(cuda, "PATIENCE", 10 * MINUTE)
    for name, value in {
        "why_not": lambda: None,
        "NvidiaGpu": lambda device: host_probe.HostGpu(),
        "SHAPES": [(2, 1024), (8, 1024)],
        "LEVEL2_BYTES": (1 << 20,),
        "PATIENCE": MINUTE,
        "ROUNDS": 2,
        "TURNS": 1,
        "LAUNCHES": 1,
    }.items():
        monkeypatch.setattr(measure.probes, name, value)


def on_a_clock(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.interpreter
def test_every_contestant_is_timed_and_written(measure, persistent, tmp_path, capsys):
    report = measure.Report(time.monotonic() + 1000, tmp_path, "passed")
    report.run()
    assert report.failures == []
    result = json.loads((tmp_path / "nvidia_x1_test.json").read_text())
    assert set(result) == {
        "gpu", "date", "commit", "versions", "tests", "peaks", "steps", "images", "flow_images", "targets", "phases", "sanitizer",
        "soak", "skipped", "failures",
    }  # fmt: skip
    assert [(entry["size"], entry["rows"]) for entry in result["steps"]] == [("MAR-L", 8), ("MAR-B", 2), ("MAR-H", 2)]
    assert {"HBM GB/s", "launch us", "graph node us", "barrier us", "exchange 8 x 1024 us", "barrier exchange 8 x 1024 us"} <= set(
        result["peaks"]
    )
    first = result["steps"][0]["results"]
    assert {
        "eager float32 TF32", "eager bfloat16", "eager bfloat16, graph", "hoisted bfloat16", "triton bfloat16", "triton float32",
        "compile default bfloat16", "compile default bfloat16, graph", "compile max-autotune bfloat16",
        "compile max-autotune bfloat16, graph", "triton bfloat16, no graph", "triton float32 TF32",
        "cuda bfloat16", "cuda bfloat16, no graph",
    } <= set(first)  # fmt: skip
    assert first["eager bfloat16"]["over_eager"] == 1
    assert max(r["over_compile"] for name, r in first.items() if name.startswith("compile")) == 1
    assert all(r["us_per_step"] > 0 and r["of_HBM"] > 0 and r["launches_per_step"] == 6 for r in first.values())
    assert [(entry["size"], entry["images"]) for entry in result["images"]] == [("MAR-B", 1), ("MAR-L", 1)]
    assert set(result["images"][0]["results"]) >= {"eager bfloat16", "cuda bfloat16", "triton bfloat16", "hoisted bfloat16"}
    one, several = result["flow_images"]
    assert (one["model"], one["images"], several["model"], several["images"]) == ("xAR-B", 1, "FlowAR-S", 64)
    both = {"eager bfloat16", "hoisted bfloat16", "triton bfloat16", "triton bfloat16, no graph"}
    assert set(one["results"]) == both | {"compile default bfloat16"}
    assert set(several["results"]) == both
    assert one["results"]["compile default bfloat16"]["over_compile"] == several["results"]["eager bfloat16"]["over_eager"] == 1
    assert all(r["images_per_second"] == pytest.approx(64 / r["seconds"]) for r in several["results"].values())
    assert [len(entry["shares"]) for entry in (one, several)] == [4, 3]
    assert sum(one["shares"]) == pytest.approx(1)
    assert one["graphs"]["eager"] > 0
    measured = {target["what"] for target in result["targets"] if target["measured"]}
    assert "xAR-B, 1 image, triton bfloat16 over eager bfloat16" in measured
    assert "FlowAR-S, 64 images, triton bfloat16 over eager bfloat16" in measured
    assert "MAR-L, 8 rows, over the best compiled or captured" in measured
    assert "MAR-B, 2 rows, over eager bfloat16" in measured
    assert "MAR-B, 1 image, the head's part of all steps (on an H200)" in measured
    assert len(measured) == 7
    assert result["skipped"] == ["compute-sanitizer: is not on this machine"]
    assert result["soak"]["calls"] == sum(result["soak"]["calls_by_backend"].values()) == 20
    assert set(result["soak"]["calls_by_backend"]) == {"cuda", "triton"}
    assert all(verdict["holds"] for verdict in result["soak"]["verdicts"])
    assert (tmp_path / "nvidia_x1_test.png").stat().st_size > 10000
    printed = capsys.readouterr().out
    assert "MAR-H, 2 rows guided" in printed
    assert "8 rows of 1024" in printed
    assert "xAR-B, 1 whole image, 4 to 3 steps, guidance 2.7" in printed
    assert printed.count("users report 4.5 s for upstream on an A100") == 1
    assert printed.splitlines()[-1].startswith("xAR-H, 64 images, triton bfloat16 over eager bfloat16")


def test_stops_in_time_and_says_what_it_left_out(measure, tmp_path):
    report = measure.Report(time.monotonic(), tmp_path, "passed")
    report.run()
    result = json.loads((tmp_path / "nvidia_x1_test.json").read_text())
    assert result["steps"] == result["images"] == result["flow_images"] == []
    for what in ("MAR-L, 8 rows", "MAR-L, 1 images", "xAR-B, 1 images", "FlowAR-S, 64 images"):
        assert f"{what}: out of time" in result["skipped"]
    assert "probes: not today" in result["skipped"]
    assert len(result["targets"]) == 13 + 6 * 2
    assert not any(target["measured"] for target in result["targets"])


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


def test_whole_images_that_fail_or_are_wrong_are_named_and_the_others_go_on(measure, tmp_path, monkeypatch):
    images = importlib.import_module("bench.images").Images

    def ours(self, backend="auto", dtype=torch.float32, right=images.ours):
        if backend == "triton":
            raise torch.OutOfMemoryError("no memory left")
        run = right(self, backend, dtype)
        return dataclasses.replace(run, draw=lambda: (3 if backend == "hoisted" else 1) * run())

    monkeypatch.setattr(images, "ours", ours)
    monkeypatch.setattr(images, "compiled", lambda self, call: lambda: 1 / 0)
    monkeypatch.setattr(triton, "refuses", lambda *call: None)
    report = measure.Report(time.monotonic() + 1000, tmp_path, "passed")
    report.flow_image("xAR-B", 1)
    assert set(report.flow_images[0]["results"]) == {"eager bfloat16"}
    assert report.flow_images[0]["graphs"] == {}
    for who in ("", ", no graph"):
        assert f"xAR-B, 1 images, triton bfloat16{who}: OutOfMemoryError: no memory left" in report.failures
    assert "xAR-B, 1 images, compile default bfloat16: ZeroDivisionError: division by zero" in report.failures
    assert any("xAR-B, 1 images, hoisted bfloat16: ArithmeticError: relative error 2" in failure for failure in report.failures)
    target = next(t for t in measure.targets([], [], report.flow_images) if t["what"].startswith("xAR-B, 1 image,"))
    assert target["measured"] is None
    monkeypatch.setattr(images, "eager", lambda self: 1 / 0)
    report.flow_image("FlowAR-L", 1)
    assert len(report.flow_images) == 1
    assert report.failures[-1] == "FlowAR-L, 1 images: ZeroDivisionError: division by zero"
    report.deadline = time.monotonic() + measure.COMPILE_SECONDS
    report.flow_image("xAR-B", 1)
    assert report.skipped == ["xAR-B, 1 images, compiled: out of time"]


def test_a_limit_that_cannot_be_measured_stops_nothing(measure, persistent, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measured_peaks", lambda: 1 / 0)
    monkeypatch.setattr(measure.probes, "barrier", lambda gpu, seconds: 1 / 0)
    report = measure.Report(time.monotonic() + 1000, tmp_path, "passed")
    report.limits()
    assert report.failures == [
        f"{what}: ZeroDivisionError: division by zero" for what in ("limits of the machine", "probe of barrier")
    ]
    assert "exchange 2 x 1024 us" in report.peaks
    report.shape("MAR-B", 2, compiled=())
    assert report.steps[0]["results"]["cuda bfloat16"]["of_HBM"] is None


def test_the_order(measure, monkeypatch):
    monkeypatch.undo()
    first, then = measure.order()
    assert first[:3] == [("shape", "MAR-L", 8), ("shape", "MAR-B", 8), ("image", "MAR-B", 1)]
    shapes = {(size, rows) for kind, size, rows in first if kind == "shape"}
    assert shapes == {(size, rows) for size in ("MAR-B", "MAR-L") for rows in (2, 8, 14, 32)}
    assert first[3:7] == [("flow_image", name, batch) for batch in (1, 64) for name in ("xAR-B", "FlowAR-L")]
    assert [one[0] for one in then[-8:]] == ["flow_image"] * 8
    assert len(set(first + then)) == len(first + then) == 9 + 1 + 4 + 2 + 2 + 3 + 6 * 2
    assert measure.compile_modes("MAR-B", 14) == measure.compile_modes("MAR-L", 14) == ("default",)
    assert measure.compile_modes("MAR-H", 32) == ()


def test_targets_and_phases(measure, monkeypatch, capsys):
    monkeypatch.undo()
    us = {
        "eager bfloat16": 1000.0,
        "eager bfloat16, graph": 150.0,
        "compile default bfloat16": 130.0,
        "triton bfloat16": 20.0,
        "cuda bfloat16": 50.0,
    }
    results = {name: {"us_per_step": value} for name, value in us.items()}
    steps = [{"size": "MAR-B", "rows": 8, "results": results}, {"size": "MAR-L", "rows": 2, "results": {}}]
    images = [{"size": "MAR-B", "images": 1, "results": {"cuda bfloat16": {"seconds": 0.04}}}]
    whole = [{"model": "xAR-B", "images": 64, "results": {"triton bfloat16": {"over_eager": 1.2}}}]
    found = measure.targets(steps, images, whole)
    measured = {target["what"]: target["measured"] for target in found if target["measured"]}
    assert measured == {
        "MAR-B, 8 rows, over eager bfloat16": 20,
        "MAR-B, 8 rows, over the best compiled or captured": 2.6,
        "MAR-B, 1 image, the head's part of all steps (on an H200)": 40,
        "xAR-B, 64 images, triton bfloat16 over eager bfloat16": 1.2,
    }
    assert [measure.is_met(target) for target in found if target["measured"]] == [True, False, True, False]
    assert [target["target"] for target in found[-4:]] == [3.0, 1.3, 3.0, 1.3]
    costs = measure.phases(steps, {"exchange 8 x 1024 us": 2.0})
    assert costs == [{"size": "MAR-B", "us_per_step": 50.0, "exchanges": 13, "exchange_us": 2.0}]
    measure.print_targets("NVIDIA X1", found, costs)
    printed = capsys.readouterr().out
    assert "50.0 us a step of cuda bfloat16; 13 exchanges of 2.00 us are 26.0 us, 52% of it" in printed
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith("MAR-B, 8 rows, over")] == ["met", "missed"]


# compute-sanitizer ----------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_what_is_sanitized_is_right(measure, persistent, monkeypatch):
    monkeypatch.setattr(cuda_check, "is_wrong", None)  # which the program replaces
    exec(measure.SANITIZED, {})
    fine = measure.MLPHead.denoise
    monkeypatch.setattr(
        measure.MLPHead, "denoise", lambda *arguments, **how: (2 if how["backend"] == "cuda" else 1) * fine(*arguments, **how)
    )
    with pytest.raises(SystemExit, match="wrong: width 64, relative error 1"):
        exec(measure.SANITIZED, {})


HAZARD = """========= Error: Race reported
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""


@pytest.mark.parametrize(
    ("output", "code", "said", "found"),
    [
        ("= ERROR SUMMARY: 0 errors", 0, "0 errors", False),
        ("= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", 0, "2 hazards displayed (0 errors, 2 warnings)", False),
        (f"========= COMPUTE-SANITIZER\n{HAZARD}", 0, f"1 hazard displayed (1 error, 0 warnings)\n{HAZARD}", True),
        ("wrong: width 64, error nan\n= ERROR SUMMARY: 0 errors", 1, "wrong: width 64, error nan", True),
        ("= Error: Device not supported\n= ERROR SUMMARY: 0 errors", 0, "did not run: Error: Device not supported", False),
        ("RuntimeError: too large\n= ERROR SUMMARY: 0 errors", 1, "did not run: RuntimeError: too large", False),
        ("unrecognised option '--kernel-name'\n", 1, "did not run: unrecognised option '--kernel-name'", False),
        ("= Internal Sanitizer Error\n\n", 1, "did not run: Internal Sanitizer Error", False),
        ("", 1, "did not run: no word", False),
    ],
)
def test_what_the_sanitizer_says(measure, output, code, said, found):
    assert measure.outcome(output, code) == (said, found)


def test_the_sanitizer_is_run(measure, persistent, tmp_path, monkeypatch):
    """A shell script in its place: one tool finds nothing, one an error, and one takes too long, with its program."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        """#!/bin/sh
echo "$@" | head -1 >> "$0.calls"
case $2 in
  memcheck) echo "========= ERROR SUMMARY: 0 errors" ;;
  racecheck) echo "========= Error: Race reported"; echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)" ;;
  synccheck) sleep 100 & wait ;;
esac
"""
    )
    tool.chmod(0o755)
    monkeypatch.setattr(measure, "sanitizer_tool", lambda: str(tool))
    monkeypatch.setattr(measure, "SANITIZER_SECONDS", 2)
    report = measure.Report(time.monotonic() + 1000, tmp_path, "passed")
    report.sanitize()
    assert report.sanitizer == {
        "memcheck": "0 errors",
        "racecheck": "1 hazard displayed (1 error, 0 warnings)",
        "synccheck": "stopped after 2 s",
    }
    assert len(report.failures) == 1
    assert "Race reported" in report.failures[0]
    first, *_ = (tmp_path / "compute-sanitizer.calls").read_text().splitlines()
    assert first.startswith("--tool memcheck --report-api-errors no --kernel-name kernel_substring=mlp_denoise")
    report = measure.Report(time.monotonic(), tmp_path, "passed")
    report.sanitize()
    assert report.skipped == [f"compute-sanitizer {check}: out of time" for check in ("memcheck", "racecheck", "synccheck")]


# The soak --------------------------------------------------------------------------------------------------------------


def test_what_the_soak_finds_is_a_failure(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SOAKED", ("hoisted",))
    right, kept = measure.MLPHead.denoise, []

    def denoise(*arguments, **how):
        kept.append(right(*arguments, **how))
        return kept[-1] + torch.nan if len(kept) == 5 else kept[-1]

    monkeypatch.setattr(measure.MLPHead, "denoise", denoise)
    report = measure.Report(time.monotonic() + 1000, tmp_path, "passed")
    report.soak()
    of_a_call, of_memory = report.failures
    assert of_a_call.startswith("soak: 32 of 32 numbers are not finite; call 5, ")
    assert of_memory.startswith("soak: tensors left when all is forgotten: +")
    assert json.loads((tmp_path / "nvidia_x1_test.json").read_text())["soak"] == report.soaked
    assert report.soaked["calls"] == len(kept) == 20
    assert "samples" not in report.soaked


def test_a_soak_that_cannot_be_is_skipped(measure, tmp_path, monkeypatch):
    def said(soaked):
        monkeypatch.setattr(measure, "SOAKED", soaked)
        report = measure.Report(time.monotonic() + 1000, tmp_path, "passed")
        report.soak()
        assert report.failures == []
        return report.skipped, report.soaked.get("calls")

    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "refuses", lambda *call: "not today")
    assert said(("cuda", "triton")) == (["soak, cuda: not today", "soak, triton: not today"], None)
    assert said(("triton", "hoisted")) == (["soak, triton: not today"], 20)
    monkeypatch.setattr(measure, "SOAK_SECONDS", 1e-9)
    skipped, calls = said(("hoisted",))
    assert skipped == ["soak: too few calls to tell whether memory is flat"]
    assert calls == 0
    report = measure.Report(time.monotonic(), tmp_path, "passed")
    report.soak()
    assert report.skipped == ["soak: out of time"]


@pytest.mark.slow
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
    assert "skipped: xAR-B, 64 images: no GPU" in done.stdout
    assert "MAR-B, 8 rows guided" in done.stdout
