"""What a phase of bench.gpu_first measures, with the CPU in the place of a GPU (bench/dry_run.py)."""

import dataclasses
import importlib
import json
import time

import host_gpu
import host_probe
import pytest
import torch
from host_gpu import ROOT

from disa_fast.backends import cuda, cuda_check, hoisted, triton

MINUTE = 60_000_000_000  # nanoseconds


@pytest.fixture
def measure(monkeypatch):
    """bench/gpu_measure.py made to believe in a GPU, with small models, few images and few steps; without kernels/cuda."""
    monkeypatch.syspath_prepend(str(ROOT))
    dry_run, measure = (importlib.import_module(f"bench.{name}") for name in ("dry_run", "gpu_measure"))
    dry_run.install(monkeypatch.setattr)
    monkeypatch.setattr(triton, "TritonOps", TritonOps)
    return measure


class TritonOps(hoisted.HoistedOps):
    """In the place of Triton's, whose kernels have tests of their own."""

    captured = True


@pytest.fixture
def report(measure, tmp_path):
    """report(seconds): of a phase that has so long."""
    return lambda seconds=1000.0: measure.Report(tmp_path, "phase", time.monotonic() + seconds)


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


def entry(report, kind, **key):
    return next(e for e in report.results[kind] if all(e[name] == value for name, value in key.items()))


@pytest.mark.slow
@pytest.mark.interpreter
def test_every_contestant_is_timed_and_written(measure, persistent, report, tmp_path, capsys):
    """With the kernels of both GPU backends, interpreted and on the processor's threads."""
    long = report()
    long.long = True
    long.limits()
    long.shapes(("MAR-L", 8), ("MAR-B", 2))
    long.launches("MAR-L", 8)
    long.image("MAR-B", 1)
    long.flow_image("xAR-B", 1)
    long.flow_image("FlowAR-S", 64)
    long.soak()
    long.plot()
    long.write()
    assert long.failures == []
    result = json.loads((tmp_path / "report.json").read_text())
    peaks = {"HBM GB/s", "launch us", "graph node us", "barrier us", "exchange 8 x 1024 us", "barrier exchange 8 x 1024 us"}
    assert peaks <= set(result["peaks"])
    first = entry(long, "steps", size="MAR-L", rows=8)["results"]
    assert {
        "eager float32 TF32", "eager autocast float16", "eager autocast bfloat16", "eager bfloat16", "eager bfloat16, graph",
        "hoisted bfloat16", "hoisted bfloat16, graph", "triton bfloat16", "triton float16", "triton float32", "triton float32 TF32",
        "compile default bfloat16", "compile default bfloat16, graph", "compile max-autotune bfloat16",
        "compile max-autotune bfloat16, graph", "triton bfloat16, no graph", "triton bfloat16, loop alone",
        "cuda bfloat16", "cuda bfloat16, no graph", "cuda bfloat16, loop alone",
    } <= set(first)  # fmt: skip
    assert first["eager bfloat16"]["over_eager"] == 1
    assert max(r["over_compile"] for name, r in first.items() if name.startswith("compile")) == 1
    assert all(r["us_per_step"] > 0 and r["of_HBM"] > 0 and r["launches_per_step"] == 12 / 3 for r in first.values())
    assert set(result["images"][0]["results"]) >= {"eager bfloat16", "eager autocast float16", "cuda bfloat16", "triton bfloat16"}
    one, several = result["flow_images"]
    assert (one["model"], one["images"], several["model"], several["images"]) == ("xAR-B", 1, "FlowAR-S", 64)
    both = {"eager bfloat16", "eager float16", "hoisted bfloat16", "triton bfloat16", "triton float16", "triton bfloat16, no graph"}
    assert set(one["results"]) == both | {"compile default bfloat16", "eager bfloat16, graph"}
    assert set(several["results"]) == both
    assert one["results"]["compile default bfloat16"]["over_compile"] == several["results"]["eager bfloat16"]["over_eager"] == 1
    assert all(r["images_per_second"] == pytest.approx(64 / r["seconds"]) for r in several["results"].values())
    assert [len(e["shares"]) for e in (one, several)] == [4, 3]
    assert sum(one["shares"]) == pytest.approx(1)
    assert one["graphs"]["eager"] > 0
    measured = {target["what"] for target in result["targets"] if target["measured"]}
    assert "xAR-B, 1 image, triton bfloat16 over eager bfloat16" in measured
    assert "MAR-L, 8 rows, over the best compiled or captured" in measured
    assert "MAR-B, 2 rows, over eager bfloat16" in measured
    assert "MAR-B, 1 image, the head's part of all steps (on an H200)" in measured
    assert result["soak"]["calls"] == sum(result["soak"]["calls_by_backend"].values()) == 20
    assert set(result["soak"]["calls_by_backend"]) == {"cuda", "triton"}
    assert all(verdict["holds"] for verdict in result["soak"]["verdicts"])
    assert (tmp_path / "speeds.png").stat().st_size > 10000
    printed = capsys.readouterr().out
    assert "MAR-B, 2 rows guided" in printed
    assert "8 rows of 1024" in printed
    assert "xAR-B, 1 whole image, 4 to 3 steps, guidance 2.7" in printed
    assert printed.count("users report 4.5 s for upstream on an A100") == 1


def test_what_has_no_time_is_named(measure, report):
    late = report(0)
    late.shape("MAR-L", 8)
    late.image("MAR-L", 4)
    late.flow_image("xAR-B", 1)
    late.write()
    assert late.skipped == ["MAR-L, 8 rows: out of time", "MAR-L, 4 images: out of time", "xAR-B, 1 image: out of time"]
    assert late.results["steps"] == late.results["images"] == late.results["flow_images"] == []
    assert len(late.results["targets"]) == 13 + 6 * 2
    assert not any(target["measured"] for target in late.results["targets"])


def test_one_that_fails_or_is_wrong_is_named_and_the_others_go_on(measure, report, monkeypatch):
    def captured(loop):
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure.Report, "able", lambda self, head, rows: [("hoisted", torch.bfloat16)])
    monkeypatch.setattr(measure.Report, "compile_modes", lambda self, size, rows: ())
    right = measure.MLPHead.denoise
    monkeypatch.setattr(measure.MLPHead, "denoise", lambda *arguments, **how: 3 * right(*arguments, **how))
    phase = report()
    phase.shape("MAR-B", 2)
    assert "MAR-B, 2 rows, eager bfloat16, graph: RuntimeError: no graphs today" in phase.failures
    assert any("hoisted bfloat16: ArithmeticError: relative L2 error 2" in failure for failure in phase.failures)
    eager = {"eager float32 TF32", "eager bfloat16", "eager autocast bfloat16", "eager autocast float16"}
    assert set(phase.results["steps"][0]["results"]) == eager


def test_whole_images_that_fail_or_are_wrong_are_named_and_the_others_go_on(measure, report, monkeypatch):
    images = importlib.import_module("bench.images").Images

    def ours(self, backend="auto", dtype=torch.float32, right=images.ours):
        if backend == "triton":
            raise torch.OutOfMemoryError("no memory left")
        run = right(self, backend, dtype)
        return dataclasses.replace(run, draw=lambda: (3 if backend == "hoisted" else 1) * run())

    monkeypatch.setattr(images, "ours", ours)
    monkeypatch.setattr(images, "compiled", lambda self, call: lambda: 1 / 0)
    monkeypatch.setattr(triton, "refuses", lambda *call: None)
    phase = report()
    phase.long = True
    phase.flow_image("xAR-B", 1)
    assert set(phase.results["flow_images"][0]["results"]) == {"eager bfloat16", "eager float16", "eager bfloat16, graph"}
    assert phase.results["flow_images"][0]["graphs"] == {}
    for who in ("bfloat16", "bfloat16, no graph", "float16"):
        assert f"xAR-B, 1 image, triton {who}: OutOfMemoryError: no memory left" in phase.failures
    assert "xAR-B, 1 image, compile default bfloat16: ZeroDivisionError: division by zero" in phase.failures
    assert any("xAR-B, 1 image, hoisted bfloat16: ArithmeticError: relative L2 error 2" in failure for failure in phase.failures)
    target = next(t for t in phase.results["targets"] if t["what"].startswith("xAR-B, 1 image,"))
    assert target["measured"] is None
    monkeypatch.setattr(images, "eager", lambda self: 1 / 0)
    phase.flow_image("FlowAR-L", 1)
    assert len(phase.results["flow_images"]) == 1
    assert phase.failures[-1] == "FlowAR-L, 1 image: ZeroDivisionError: division by zero"
    monkeypatch.setattr(measure, "COMPILE_SECONDS", 10**6)
    phase.flow_image("xAR-B", 1)
    assert phase.skipped == ["xAR-B, 1 image, compiled: out of time"]


def test_a_limit_that_cannot_be_measured_stops_nothing(measure, persistent, report, monkeypatch):
    monkeypatch.setattr(measure, "measured_peaks", lambda: 1 / 0)
    monkeypatch.setattr(measure.probes, "barrier", lambda gpu, seconds: 1 / 0)
    phase = report()
    phase.limits()
    assert phase.failures == [
        f"{what}: ZeroDivisionError: division by zero" for what in ("limits of the machine", "probe of barrier")
    ]
    assert "exchange 2 x 1024 us" in phase.peaks


def test_targets_and_costs(measure, monkeypatch):
    monkeypatch.undo()
    results_module = importlib.import_module("bench.gpu_results")
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
    assert [results_module.is_met(target) for target in found if target["measured"]] == [True, False, True, False]
    assert [target["target"] for target in found[-4:]] == [3.0, 1.3, 3.0, 1.3]
    costs = measure.costs(steps, {"exchange 8 x 1024 us": 2.0})
    assert costs == [{"size": "MAR-B", "us_per_step": 50.0, "exchanges": 13, "exchange_us": 2.0}]
    assert results_module.costs_in_words(costs) == ["MAR-B, 8 rows: 50.0 us a step; 13 exchanges of 2.00 us are 26.0 us, 52% of it"]


# The right thing is measured ------------------------------------------------------------------------------------------


def test_a_call_of_every_shape_has_as_many_steps_as_its_table(measure, monkeypatch):
    """50 asked for are 48: times from 950 on are left out."""
    monkeypatch.undo()
    _, table, noise, step_noise = measure.inputs(8, 50)
    assert len(step_noise) == len(table) == 48
    assert noise.shape == (4, 16)
    assert measure.STEPS == 50


@pytest.mark.parametrize(("each", "expected"), [(1e-3, 5), (40e-6, 50), (1.0, 1), (0.0, 50)])
def test_a_sample_is_of_several_calls(measure, monkeypatch, each, expected):
    asked = []

    def seconds(call, calls=1):
        asked.append(calls)
        return each

    monkeypatch.setattr(measure, "seconds", seconds)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 5e-3)
    assert measure.in_turns({"a": lambda: None}, turns=3) == {"a": [each] * 3}
    assert asked == [1, expected, expected, expected]


def test_no_further_turn_begins_when_the_time_is_over(measure):
    late, early = (measure.in_turns({"a": lambda: None}, 4, time.monotonic() + left) for left in (-1, 1000))
    assert (len(late["a"]), len(early["a"])) == (1, 4)


def test_how_far_samples_are_apart_is_told(measure):
    times = {"eager bfloat16": [4.0, 5.0, 4.0], "compile default bfloat16": [2.0, 2.0, 2.0]}
    assert measure.ratios(times, "eager bfloat16") == {"over_eager": 1.0, "over_compile": 0.5, "spread": 0.25}


def test_seconds_are_those_of_one_call(measure):
    called = []
    taken = measure.seconds(lambda: called.append(time.sleep(0.01)), 4)
    assert len(called) == 4
    assert 0.01 <= taken < 0.03


def casts(network, where):
    """How often autocast casts a matrix while `network` runs."""

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].ndim == 2 and args[0].shape in where:
                Counting.seen += 1
            return func(*args, **(kwargs or {}))

    with Counting(), torch.autocast("cpu", torch.bfloat16):
        network()
    return Counting.seen


def test_autocast_casts_each_weight_once_a_loop(measure):
    """As it does for a published checkpoint, whose parameters ask for gradients."""
    head, (z, table, noise, step_noise) = measure.random_head("MAR-B"), measure.inputs(8, 50)
    matrices = {p.shape for p in head._net.parameters() if p.ndim == 2}
    count = sum(p.ndim == 2 for p in head._net.parameters())
    loop = measure.published_loop(measure.autocast_step(head, z, 3.0), table, noise, step_noise)
    assert casts(loop, matrices) == count
    frozen = measure.published_loop(measure.published_step(head, z, torch.float32, 3.0), table, noise, step_noise)
    assert casts(frozen, matrices) == count * len(table)


@pytest.mark.parametrize("name", ["xAR-B", "FlowAR-L"])
def test_autocast_casts_each_weight_once_an_image(measure, name):
    images = measure.Images(name, torch.device("cpu"), 1)
    matrices = {p.shape for p in images.upstream.parameters() if p.ndim == 2}
    used = sum(isinstance(module, torch.nn.Linear) for module in images.upstream.modules())
    assert casts(images.eager, matrices) <= used
    images.upstream.requires_grad_(False)
    assert casts(images.eager, matrices) > 3 * used


@pytest.mark.parametrize("name", ["xAR-B", "FlowAR-L"])
def test_a_captured_image_is_the_same_image(measure, name):
    images = measure.Images(name, torch.device("cpu"), 1)
    expected = images.autocast(torch.bfloat16)

    def capture(draw):
        torch.manual_seed(123)  # what is drawn on the host now goes nowhere, and what is drawn on the device is drawn at the replay
        draw()
        return draw

    run = images.captured(capture, torch.bfloat16)
    for _ in range(2):
        assert torch.equal(run(), expected)


def test_what_is_moved_ahead_is_moved_once(measure):
    ahead = importlib.import_module("bench.images").MovedAhead()

    def run():
        with ahead:
            one, two, three = (torch.randn(3) for _ in range(3))
            return one.to(torch.device("cpu")), two.to(device=torch.device("cpu")), three.to(torch.float64)

    first, second = run(), run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[2], second[2])
    assert second[2].dtype == torch.float64
    assert not torch.equal(first[0], first[1])
    assert len(ahead._moved) == 2


@pytest.mark.parametrize("name", ["xAR-B", "FlowAR-L"])
def test_a_captured_image_asks_nothing_of_the_device(measure, name):
    """Whose answer a capture could not wait for: on `meta` there is none."""
    images = measure.Images(name, torch.device("cpu"), 1)
    images.upstream.to("meta")
    images.device = torch.device("meta")
    images.subjects = {key: tensor.to("meta") for key, tensor in images.subjects.items()}
    assert images.setting.draw(images.upstream, images.subjects).device.type == "meta"


def test_the_bounds_are_near_what_is_expected(measure):
    """An error of 3.5 times what half precision costs is found, in the whole and in one element."""
    truth = torch.linspace(-1, 1, 1000)
    tolerance = measure.TOLERATED * measure.EXPECTED[torch.bfloat16]
    assert tolerance < 0.02
    for wrong in (truth * (1 + 1.2 * tolerance), truth.index_add(0, torch.tensor([0]), torch.tensor([1.2 * tolerance]))):
        assert max(measure.errors_of(wrong, truth).values()) > tolerance
    assert not measure.errors_of(truth / 0, truth)["worst element"] < tolerance


# Correctness ----------------------------------------------------------------------------------------------------------


def test_a_right_backend_is_found_right(measure, report):
    phase = report()
    phase.correct("hoisted")
    assert phase.failures == phase.skipped == []
    assert [entry["dtype"] for entry in phase.results["correct"]] == ["bfloat16", "float16", "float32"]
    assert all(entry["same_bits"] and entry["us_per_step"] > 0 for entry in phase.results["correct"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, call: x * 1.03, "relative L2 error"),
        (lambda x, call: x.index_fill(0, torch.tensor([0]), 0), "worst element"),
        (lambda x, call: x * torch.nan, "relative L2 error nan"),
        (lambda x, call: x + 1e-7 * call, "the same call again gives other bits"),
    ],
)
def test_a_wrong_backend_is_found_wrong(measure, report, monkeypatch, change, said):
    right, calls = hoisted.denoise, []
    monkeypatch.setattr(hoisted, "denoise", lambda *call: change(right(*call), calls.append(1) or len(calls)))
    phase = report()
    phase.correct("hoisted")
    assert any(said in line for line in phase.failures), phase.failures


def test_a_backend_that_serves_nothing_is_a_failure(measure, report, monkeypatch):
    """Such as `cuda` where the native core was not built."""
    monkeypatch.setattr(cuda, "refuses", lambda *call: "the native core is not part of this installation")
    phase = report()
    phase.correct("cuda")
    assert phase.failures == ["cuda serves nothing here: the native core is not part of this installation"]


def test_a_broken_context_ends_the_phase(measure, report, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "DEVICE", torch.device("cuda"))
    phase = report()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with phase.surviving("one"):
        raise RuntimeError("no graphs today")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(measure.BrokenContextError, match="two: CUDA error: an illegal"), phase.surviving("two"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert [line.split(":")[0] for line in phase.failures] == ["one", "two"]


def test_a_backend_whose_check_broke_off_takes_no_other_with_it(measure, report):
    phase = report()
    head = measure.random_head("MAR-B")
    names = {name for name, _ in phase.able(head, 8)}
    assert "hoisted" in names
    phase.results["runs"]["correct hoisted"] = {"state": "DIED of SIGSEGV", "failures": [], "skipped": []}
    assert {name for name, _ in phase.able(head, 8)} == names - {"hoisted"}
    assert phase.skipped == ["hoisted: left out, since its check of correctness broke off"]


@pytest.mark.parametrize("left", [20, 1000])
def test_what_needs_no_compiler_is_on_disk_before_one_is_asked(measure, report, tmp_path, monkeypatch, left):
    """Which is not asked at all where there is little time."""
    before = []

    def compiler(step, **how):
        before.append(json.loads((tmp_path / "report.json").read_text())["steps"][0]["results"])
        return step

    monkeypatch.setattr(measure.Report, "able", lambda self, head, rows: [("hoisted", torch.bfloat16)])
    monkeypatch.setattr(measure, "COMPILE_STEP_SECONDS", 25)
    monkeypatch.setattr(torch, "compile", compiler)
    phase = report(left)
    phase.shape("MAR-B", 2)
    results = phase.results["steps"][0]["results"]
    assert set(results) >= {"eager bfloat16", "hoisted bfloat16", "hoisted bfloat16, graph"}
    if left == 20:
        assert (before, phase.skipped) == ([], ["MAR-B, 2 rows, compiled: out of time"])
    else:
        assert set(before[0]) == set(results) - {"compile default bfloat16", "compile default bfloat16, graph"}
        assert len(before) == 1
        assert results["compile default bfloat16"]["over_compile"] > 0


def test_results_are_on_disk_after_every_row(measure, report, tmp_path, monkeypatch):
    monkeypatch.setattr(measure.Report, "able", lambda self, head, rows: [("hoisted", torch.bfloat16)])
    phase = report()
    phase.shape("MAR-B", 2)
    monkeypatch.setattr(measure, "in_turns", lambda calls, **how: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        phase.shapes(("MAR-B", 8))
    written = json.loads((tmp_path / "report.json").read_text())
    assert [(e["size"], e["rows"]) for e in written["steps"]] == [("MAR-B", 2)]


def test_the_crossover_is_with_the_tiles_that_were_found(measure, report, tmp_path, monkeypatch):
    tiles, seen = measure.tiles, []
    monkeypatch.setattr(tiles, "TUNED", tiles.TUNED)
    other = tiles.HEURISTIC["bfloat16"][tiles.ROW_CLASSES[-1]]
    found = {"X1": {"bfloat16": {"1280": {str(tiles.row_class(8)): other.as_dict()}}}}
    assert tiles.choose("X1", "bfloat16", 1280, 8) != other
    (tmp_path / "tuned.json").write_text(json.dumps(found))
    tuner = importlib.import_module("bench.tune_cuda")
    monkeypatch.setattr(tuner, "main", lambda arguments: seen.append(tiles.choose("X1", "bfloat16", 1280, 8)))
    try:
        report().crossover()
    finally:
        tiles.tuned.cache_clear()
        tiles.choose.cache_clear()
    assert seen == [other]


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


def test_the_sanitizer_is_run(measure, persistent, report, tmp_path, monkeypatch):
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
    phase = report()
    phase.sanitize()
    assert phase.results["sanitizer"] == {
        "memcheck": "0 errors",
        "racecheck": "1 hazard displayed (1 error, 0 warnings)",
        "synccheck": "stopped after 2 s",
    }
    assert len(phase.failures) == 1
    assert "Race reported" in phase.failures[0]
    first, *_ = (tmp_path / "compute-sanitizer.calls").read_text().splitlines()
    assert first.startswith("--tool memcheck --report-api-errors no --kernel-name kernel_substring=mlp_denoise")
    late = report(0)
    late.sanitize()
    assert late.skipped[-3:] == [f"compute-sanitizer {check}: out of time" for check in ("memcheck", "racecheck", "synccheck")]


# The soak --------------------------------------------------------------------------------------------------------------


def test_what_the_soak_finds_is_a_failure(measure, report, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SOAKED", ("hoisted",))
    right, kept = measure.MLPHead.denoise, []

    def denoise(*arguments, **how):
        kept.append(right(*arguments, **how))
        return kept[-1] + torch.nan if len(kept) == 5 else kept[-1]

    monkeypatch.setattr(measure.MLPHead, "denoise", denoise)
    phase = report()
    phase.soak()
    of_a_call, of_memory = phase.failures
    assert of_a_call.startswith("soak: 32 of 32 numbers are not finite; call 5, ")
    assert of_memory.startswith("soak: tensors left when all is forgotten: +")
    soaked = json.loads((tmp_path / "report.json").read_text())["soak"]
    assert soaked["calls"] == len(kept) == 20
    assert "samples" not in soaked


def test_a_soak_that_cannot_be_is_skipped(measure, report, monkeypatch):
    def said(soaked, seconds=1000.0):
        monkeypatch.setattr(measure, "SOAKED", soaked)
        phase = report(seconds)
        phase.soak()
        assert phase.failures == []
        return phase.skipped, phase.results["soak"].get("calls")

    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "refuses", lambda *call: "not today")
    assert said(("cuda", "triton")) == (["soak, cuda: not today", "soak, triton: not today"], None)
    assert said(("triton", "hoisted")) == (["soak, triton: not today"], 20)
    assert said(("hoisted",), 0)[0] == ["soak: out of time"]
    monkeypatch.setattr(measure.soak, "MIN_SAMPLES", 10**6)
    assert said(("hoisted",))[0] == ["soak: too few calls to tell whether memory is flat"]
