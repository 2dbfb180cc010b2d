"""`disa-fast profile`: the division of time on made-up traces, the two readers, the commands that are run, one real run, and what
docs/profiling.md says."""

import json
import os
import re
import shlex
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nsys_report import Report

import disa_fast
from disa_fast import cli, profile, profiling, solvers
from disa_fast.backends import cuda, triton
from disa_fast.models.masked_sampling import still_masked_after
from disa_fast.profile import Activity, Range, Totals, Trace, read_nsys, read_torch, report, summarise
from disa_fast.schedule import parse_schedule, steps_at

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "profiling.md").read_text()
T = "main thread"


def step(k: int, start: int, end: int, thread: object = T, another_loop: bool = False, T: int = 10, rows: int = 4) -> Range:
    text = profiling.AR_STEP_OF_ANOTHER_LOOP if another_loop else profiling.AR_STEP
    return Range(thread, start, end, text.format(k, 3, T, rows))


def denoise(start: int, end: int, thread: object = T) -> Range:
    return Range(thread, start, end, profiling.DENOISE.format(10, 4, "cpu"))


def op(start: int, end: int, name: str = "aten::linear", copies: bool = False, thread: object = T) -> Activity:
    return Activity(start, end, name, copies, thread, thread, start)


def kernel(start: int, end: int, launched: int, name: str = "some_kernel", copies: bool = False, device: int = 0) -> Activity:
    return Activity(start, end, name, copies, device, T, launched)


def added(device: str, ranges: list[Range], activities: list[Activity]) -> Totals:
    totals = Totals()
    totals.add(Trace(device, ranges, activities))
    return totals


def spent(compute: int = 0, copies: int = 0, gaps: int = 0) -> dict[str, int]:
    return {"compute": compute, "copies": copies, "gaps": gaps}


# How time is divided ---------------------------------------------------------------------------------------------------


def test_on_a_cpu_every_instant_counts_once():
    """Gaps end where ranges do; what lies between AR steps is neither's, and what comes before the first and after the last is
    not counted."""
    totals = added(
        "cpu",
        [step(0, 100, 200), denoise(140, 190), step(1, 220, 300), denoise(230, 300)],
        [
            op(0, 90), op(110, 130), op(130, 135, "aten::cat", copies=True), op(150, 180, "cpu core"), op(192, 198),
            op(202, 212), op(240, 290, "cpu core"), op(310, 400),
        ],
    )  # fmt: skip
    assert totals.parts == {
        "head": spent(compute=30 + 50, gaps=10 + 10 + 10 + 10),
        "backbone": spent(compute=20 + 6, copies=5, gaps=10 + 5 + 2 + 2 + 10),
        "captures": spent(),
        "outside": spent(compute=10, gaps=2 + 8),
    }
    assert sum(sum(part.values()) for part in totals.parts.values()) == 200
    assert [(call.k, times["head"], times["backbone"]) for call, times in totals.calls.items()] == [(0, 50, 50), (1, 70, 10)]
    assert totals.operators["head", "cpu core"] == [2, 80]
    assert totals.operators["outside", "aten::linear"] == [1, 10]


def test_the_backbone_of_another_loop_lies_before_its_head():
    """Of two images, the first step's is unknown, and the time between the images is nobody's."""
    ranges = [step(k, start, start + 30, another_loop=True) for k, start in enumerate((100, 150, 190))]
    ranges += [step(k, start, start + 30, another_loop=True) for k, start in enumerate((400, 450, 490))]
    heads = [denoise(each.start + 1, each.end) for each in ranges]
    totals = added("cpu", ranges + heads, [op(135, 145), op(221, 399)])
    backbones = {(number, call.k): times["backbone"] for number, (call, times) in enumerate(totals.calls.items())}
    assert backbones == {(0, 0): 1, (1, 1): 21, (2, 2): 11, (3, 0): 1, (4, 1): 21, (5, 2): 11}
    assert sorted(call.number for call in totals.without_backbone) == [0, 3]
    assert totals.parts["backbone"] == spent(compute=10, gaps=66 - 10)
    assert totals.parts["outside"] == spent(compute=178, gaps=2)
    steps = {each["k"]: each for each in summarise(totals)["ar_steps"]}
    assert (steps[0]["backbone_ms"], steps[1]["backbone_ms"]) == (None, 21e-6)
    assert "unknown" in report(summarise(totals) | {"tool": "any", "processes": [{}], "skipped": 0})


def test_on_a_gpu_kernels_belong_to_where_they_were_launched():
    """They run later. Of two at once the first has the time; a gap counts for what ends it."""
    capture = Range(T, 50, 60, profiling.CAPTURE.format("T=10"))
    totals = added(
        "gpu",
        [step(0, 10, 100), denoise(40, 90), capture, step(1, 110, 200), denoise(140, 190)],
        [
            kernel(0, 40, 5), kernel(100, 150, 20), kernel(160, 200, 55), kernel(210, 300, 70, "mlp_denoise_1024"),
            kernel(250, 320, 75, "Memcpy", True), kernel(321, 330, 105), kernel(340, 400, 120), kernel(400, 480, 150),
            kernel(500, 600, 250), kernel(1000, 1100, 150, device=1),
        ],
    )  # fmt: skip
    assert totals.parts == {
        "head": spent(compute=90 + 80 + 100, copies=20, gaps=10),
        "backbone": spent(compute=50 + 60, gaps=10),
        "captures": spent(compute=40, gaps=10),
        "outside": spent(compute=9, gaps=1),
    }
    first, second = totals.calls.values()
    assert (first["head"], first["backbone"], first["captures"]) == (120, 50, 50)
    assert (second["head"], second["backbone"]) == (180, 70)


@pytest.mark.parametrize("device", ["cpu", "gpu"], ids=["CPU", "GPU"])
def test_calls_of_the_head_alone_count_between_ar_steps_and_not_around_them(device):
    def ran(start: int, end: int) -> Activity:
        return op(start, end) if device == "cpu" else kernel(start, end, start)

    ranges = [denoise(0, 50), step(0, 100, 200), denoise(220, 250), step(1, 300, 400), denoise(500, 600)]
    totals = added(device, ranges, [ran(10, 40), ran(100, 200), ran(220, 250), ran(300, 400), ran(510, 590)])
    assert totals.parts["head"] == spent(compute=30, gaps=20 if device == "gpu" else 0)
    assert totals.parts["backbone"] == spent(compute=200, gaps=50 if device == "gpu" else 0)
    assert totals.parts["outside"] == spent(gaps=70 if device == "cpu" else 0)


def test_two_threads_and_two_processes_are_added():
    ranges = [step(0, 100, 200), step(0, 150, 260, thread="other")]
    totals = added("cpu", ranges, [op(100, 150), op(150, 250, thread="other")])
    totals.add(Trace("cpu", [step(0, 0, 60)], []))
    assert totals.parts["backbone"] == spent(compute=150, gaps=50 + 10 + 60)
    summary = summarise(totals)
    assert [(each["calls"], each["backbone_ms"]) for each in summary["ar_steps"]] == [(3, 100e-6)]
    assert summary["seconds"] == pytest.approx(270e-9, rel=1e-12)


def test_the_summary_adds_up():
    ranges = [step(0, 0, 100), denoise(50, 100), step(1, 100, 300, T=5), denoise(150, 300)]
    ranges += [step(1, 300, 400, T=5), denoise(300, 300)]
    totals = added("cpu", ranges, [op(10, 40), op(60, 90, "aten::copy_", copies=True), op(150, 300, "cpu core")])
    summary = summarise(totals)
    assert sum(summary["share"][part] for part in profile.PARTS) == pytest.approx(1)
    assert sum(summary["share"][kind] for kind in profile.KINDS) == pytest.approx(1)
    assert sum(each["share"] for each in summary["ar_steps"]) == pytest.approx(1)
    assert summary["ar_steps"][1] == {
        "k": 1, "K": 3, "T": 5, "rows": 4, "backend": "cpu", "calls": 2,
        "head_ms": 75e-6, "backbone_ms": 75e-6, "share": pytest.approx(0.75),
    }  # fmt: skip
    assert [(each["name"], each["part"], each["calls"]) for each in summary["operators"]] == [
        ("cpu core", "head", 1), ("aten::linear", "backbone", 1), ("aten::copy_", "head", 1),
    ]  # fmt: skip
    assert summary["operators"][0]["share"] == pytest.approx(150 / 400)
    text = report(summary | {"tool": "nsys", "processes": [{}, {}], "skipped": 7})
    assert "4e-07 s of AR steps in 2 processes, on the CPU, by nsys" in text
    assert "not recorded: 7 AR steps" in text
    assert re.search(r"^head +50\.0% +37\.5% +7\.5% +5\.0%$", text, re.MULTILINE)
    assert re.search(r"^all +100\.0% +45\.0% +7\.5% +47\.5%$", text, re.MULTILINE)
    assert re.search(r"^ +1 +3 +5 +4  cpu +2 +0\.000 +0\.000 +75\.0%$", text, re.MULTILINE)
    assert "graph captures" not in text


# What torch.profiler exports -------------------------------------------------------------------------------------------


def written(path: Path, events: list[dict]) -> Path:
    others = [{"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "ts": 0, "args": {"name": "python"}}, {"ph": "s", "id": 3}]
    path.write_text(json.dumps({"schemaVersion": 1, "deviceProperties": [{"id": 0}], "traceEvents": others + events}))
    return path


def event(cat: str, name: str, start: float, duration: float, tid: int = 9, pid: int = 7, **args: object) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": start, "dur": duration, "args": args}


def test_outermost_operators_of_a_trace(tmp_path):
    """Microseconds become whole nanoseconds. What is a copy for the most part is one, a copy within a copy counting once; an
    operator that holds ranges of ours is looked into; the C++ core is an operator; ranges of others are none of ours."""
    events = [
        event("user_annotation", "AR step k=0 K=3 T=10 rows=4", 4631238828260.001, 100),
        event("user_annotation", "denoise T=10 rows=4 backend=cpu", 4631238828310.001, 40),
        event("user_annotation", "cpu core", 4631238828320.001, 20),
        event("user_annotation", "somebody's", 4631238828200, 900),
        event("cpu_op", "aten::linear", 4631238828270.001, 10),
        event("cpu_op", "aten::addmm", 4631238828271.001, 8),
        event("cpu_op", "aten::clone", 4631238828272.001, 4),
        event("cpu_op", "aten::copy_", 4631238828272.501, 3),
        event("cpu_op", "aten::reshape", 4631238828285.001, 10),
        event("cpu_op", "aten::clone", 4631238828286.001, 6),
        event("cpu_op", "aten::copy_", 4631238828287.001, 4),
        event("cpu_op", "disa_fast::mlp_denoise", 4631238828305.001, 50),
        event("cpu_op", "aten::randn", 4631238828311.001, 5),
        event("cpu_op", "aten::cat", 4631238828300.001, 3, tid=10),
    ]
    trace = read_torch(written(tmp_path / "trace.json", events))
    assert trace.device == "cpu"
    assert sorted({each.text.split()[0] for each in trace.ranges}) == ["AR", "cpu", "denoise"]
    base = 4631238828000001
    found = [(a.start - base, a.end - base, a.name, a.copies, a.thread) for a in sorted(trace.activities)]
    assert found == [
        (270_000, 280_000, "aten::linear", False, (7, 9)),
        (285_000, 295_000, "aten::reshape", True, (7, 9)),
        (300_000, 303_000, "aten::cat", True, (7, 10)),
        (311_000, 316_000, "aten::randn", False, (7, 9)),
        (320_000, 340_000, "cpu core", False, (7, 9)),
    ]


def test_kernels_of_a_trace(tmp_path):
    """As CUPTI reports them: on a device and a stream, tied to launches by numbers; a graph's kernels to that of the graph."""
    events = [
        event("user_annotation", "AR step k=0 K=3 T=10 rows=4", 0, 100),
        event("user_annotation", "denoise T=10 rows=4 backend=triton", 40, 60),
        event("cpu_op", "aten::linear", 10, 10),
        event("cuda_runtime", "cudaLaunchKernel", 12, 2, correlation=1),
        event("cuda_runtime", "cudaMemcpyAsync", 42, 2, correlation=2),
        event("cuda_runtime", "cudaGraphLaunch", 50, 2, correlation=3),
        event("cuda_driver", "cuLaunchKernelEx", 30, 2, correlation=4),
        event("gpu_user_annotation", "denoise T=10 rows=4 backend=triton", 200, 60, pid=0, tid=7),
        event("kernel", "void at::native::layer_norm<float>(int, float*)", 200, 10, pid=0, tid=7, device=0, correlation=1),
        event("kernel", "adaln_linear_kernel", 210, 10, pid=0, tid=7, device=0, correlation=3),
        event("kernel", "adaln_linear_kernel", 221, 10, pid=0, tid=7, device=0, correlation=3),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 232, 8, pid=0, tid=7, device=0, correlation=2),
        event("kernel", "void at::native::f<direct_copy_kernel_cuda(int)>(int)", 240, 5, pid=0, tid=7, device=0, correlation=4),
        event("gpu_memset", "Memset (Device)", 245, 5, pid=0, tid=7, device=0, correlation=99),
        event("kernel", "adaln_linear_kernel", 260, 10, pid=0, tid=7, device=0, correlation=3),
    ]
    trace = read_torch(written(tmp_path / "trace.json", events))
    totals = added(*trace)
    assert trace.device == "gpu"
    assert totals.parts["head"] == spent(compute=30_000, copies=8_000, gaps=1_000 + 1_000 + 10_000)
    assert totals.parts["backbone"] == spent(compute=10_000, copies=5_000)
    assert totals.parts["outside"] == spent(copies=5_000)
    assert totals.operators["head", "adaln_linear_kernel"] == [3, 30_000]
    assert totals.operators["backbone", "at::native::layer_norm"] == [1, 10_000]


# What nsys exports -----------------------------------------------------------------------------------------------------

ONE, TWO = (1 << 48) + (1000 << 24), (1 << 48) + (2000 << 24)  # processes, of which threads are these and a number


def made_report() -> Report:
    """Two processes whose domains and correlations have the same numbers, domains in another order."""
    made = Report()
    for process, ours, others in ((ONE, 1, 2), (TWO, 2, 1)):
        made.domain(process, ours, "disa_fast")
        made.domain(process, others, "NCCL")
    for process, late, ours in ((ONE, 0, 1), (TWO, 1000, 2)):
        thread = process + 17
        made.range(thread, late + 10, late + 100, "AR step k=0 K=2 T=48 rows=2", ours)
        made.range(thread, late + 50, late + 90, "denoise T=48 rows=2 backend=cuda", ours, registered=False)
        made.range(thread, late + 10, late + 500, "AR step k=1 K=2 T=5 rows=2", 3 - ours)
        made.launch(thread, late + 20, 1)
        made.launch(thread, late + 60, 2)
        made.launch(thread, late + 70, 3)
        made.launch(thread, late + 95, 4)
        made.kernel(process, late + 200, late + 230, 1, "ampere_sgemm")
        made.ran("GRAPH_TRACE", process, late + 240, late + 300, 3, graphId=5, graphExecId=6)
        made.ran("MEMCPY", process, late + 232, late + 240, 2, bytes=64, copyKind=8)
        made.ran("MEMSET", process, late + 310, late + 314, 4, value=0, bytes=64)
    made.range(ONE + 17, 110, None, "AR step k=1 K=2 T=47 rows=2", 1)  # was still open when the process ended
    made.ran("GRAPH_TRACE", ONE, 0, 0, 3, graphId=5, graphExecId=6)  # "could not be collected"
    made.kernel(TWO, 1000, 1001, 77, "launched_before_recording_began")
    return made


def test_a_report_of_nsys(tmp_path):
    made_report().write(tmp_path / "report.sqlite")
    trace = read_nsys(tmp_path / "report.sqlite")
    totals = added(*trace)
    assert trace.device == "gpu"
    assert sorted({each.text for each in trace.ranges}) == ["AR step k=0 K=2 T=48 rows=2", "denoise T=48 rows=2 backend=cuda"]
    assert len(totals.calls) == 2
    assert totals.parts == {
        "head": spent(compute=2 * 60, copies=2 * 8, gaps=2 * 2),
        "backbone": spent(compute=2 * 30, copies=2 * 4, gaps=2 * 10),
        "captures": spent(),
        "outside": spent(),
    }
    assert {name: entry for (_, name), entry in totals.operators.items()} == {
        "ampere_sgemm": [2, 60], "CUDA graph": [2, 120], "memcpy Device-to-Device": [2, 16], "memset": [2, 8],
    }  # fmt: skip


def test_a_report_without_tables(tmp_path):
    Report().write(tmp_path / "report.sqlite")
    assert read_nsys(tmp_path / "report.sqlite") == Trace("gpu", [], [])


NSYS = """#!/bin/sh
echo "$DISA_FAST_NVTX $*" >> "$CALLS"
what=$1; shift
while case $1 in --output=*) output=${1#*=} ;; --*) ;; *) false ;; esac; do shift; done
case $what in
profile) "$@"; : > "$output.nsys-rep" ;;
export) cp "$REPORT" "$output" ;;
esac
"""


@pytest.fixture
def nsys(tmp_path, monkeypatch):
    """A stand-in on the path, which runs the command, gives 0 whatever that gave, and exports a made-up report."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nsys").write_text(NSYS)
    (tmp_path / "bin" / "nsys").chmod(0o755)
    made_report().write(tmp_path / "made.sqlite")
    for name, value in {"CALLS": "calls", "REPORT": "made.sqlite"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return lambda: (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_under_nsys(tmp_path, capfd, nsys, status):
    options = ["--out", str(tmp_path / "out"), "--tool", "nsys", *(["--graph-kernels"] if status else [])]
    assert cli.main(["profile", *options, "--", "sh", "-c", f"echo ran '  this'; exit {status}", "--flag"]) == status
    out = capfd.readouterr().out
    assert out.startswith("ran   this\n")
    assert "2.28e-07 s of AR steps in 2 processes, on the GPU, by nsys" in out
    profiled, exported = nsys()
    graphs = "node" if status else "graph"
    assert profiled.startswith(f"1 profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --cuda-graph-trace={graphs} --output=")
    assert profiled.endswith(f"sh -c echo ran '  this'; exit {status} --flag")
    assert exported.split()[0:2] == ["export", "--type=sqlite"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["raw", "summary.json"]
    assert sorted(path.name for path in (tmp_path / "out" / "raw").iterdir()) == ["profile.nsys-rep", "profile.sqlite"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["status"] == status
    assert summary["processes"] == [{"pid": 1000, "rank": None}, {"pid": 2000, "rank": None}]


def test_under_nsys_nothing_ran_on_a_gpu(tmp_path, capfd, nsys, monkeypatch):
    made = Report()
    made.domain(ONE, 1, "disa_fast")
    made.range(ONE + 17, 10, 100, "AR step k=0 K=2 T=48 rows=2", 1)
    made.write(tmp_path / "cpu.sqlite")
    monkeypatch.setenv("REPORT", str(tmp_path / "cpu.sqlite"))
    assert cli.main(["profile", "--out", str(tmp_path / "out"), "--tool", "nsys", "--", "true"]) == 2
    assert "nothing ran on a GPU in any AR step; for a command that runs on the CPU take --tool torch" in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setenv("REPORT", str(tmp_path / "no such report"))
    assert cli.main(["profile", "--out", str(tmp_path / "out"), "--tool", "nsys", "--", "true"]) == 2
    assert "no range of the domain disa_fast was recorded; is the package nvtx there" in capfd.readouterr().err


# The recording of a process --------------------------------------------------------------------------------------------


@pytest.fixture
def recorder(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(profiling, "_recorder", profiling.Recorder(tmp_path, seconds=1000))
    return profiling._recorder


def ar_steps(numbers: list[int], K: int = 2, rows: int = 4) -> None:
    for k in numbers:
        with profiling.range(profiling.AR_STEP, k, K, 5, rows), profiling.range(profiling.DENOISE, 5, 4, "cpu"):
            torch.ones(3) + 1


def recorded(folder: Path) -> list[list[str]]:
    """The AR steps of each trace."""
    traces = sorted(folder.glob("trace-*.json"))
    return [[r.text for r in sorted(read_torch(path).ranges) if r.text.startswith("AR")] for path in traces]


def test_each_image_is_a_trace(recorder, tmp_path):
    ar_steps([0, 1, 0, 1])
    assert not torch.autograd._profiler_enabled()  # between images
    with profiling.range(profiling.DENOISE, 5, 4, "cpu"):
        pass
    ar_steps([0, 0, 1])  # the first came to no end
    recorder.close()
    both = [f"AR step k={k} K=2 T=5 rows=4" for k in (0, 1)]
    assert recorded(tmp_path) == [both, both, both[:1], both]
    (process,) = tmp_path.glob("process-*.json")
    assert json.loads(process.read_text()) == {"pid": os.getpid(), "rank": None, "recorded": 7, "skipped": 0}


def test_after_the_seconds_only_what_is_new_is_recorded_and_then_nothing(recorder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    ar_steps([0, 1])
    recorder._left[0] = 1e-9
    ar_steps([0, 1])
    ar_steps([0, 1], rows=8)
    ar_steps([0, 1], rows=8)
    ar_steps([0, 1])
    recorder._left[1] = 1e-9
    ar_steps([0, 1], rows=12)
    ar_steps([0, 1], rows=16)
    recorder.close()
    assert [steps[0].split("rows=")[1] for steps in recorded(tmp_path)] == ["4", "4", "8", "12"]
    (process,) = tmp_path.glob("process-*.json")
    assert json.loads(process.read_text()) == {"pid": os.getpid(), "rank": 3, "recorded": 8, "skipped": 6}


def test_the_seconds_are_those_of_recording(recorder):
    for _ in range(2):
        ar_steps([0])
        time.sleep(0.05)
        ar_steps([1])
        time.sleep(0.3)
    assert 0.1 < 1000 - recorder._left[0] < 0.4
    assert recorder._left[1] == 1000


def test_a_long_image_is_more_than_one_trace(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "LONGEST", 0.0)
    recorder._left[0] = 1e-9
    ar_steps([0, 1, 2], K=3)
    assert [len(steps) for steps in recorded(tmp_path)] == [1, 1, 1]


def test_one_thread_is_recorded_and_an_exception_passes(recorder, tmp_path):
    ar_steps([0])
    other = threading.Thread(target=ar_steps, args=([0, 1],))
    other.start()
    other.join()
    with pytest.raises(ZeroDivisionError), profiling.range(profiling.AR_STEP, 1, 2, 5, 4):
        _ = 1 / 0
    recorder.close()
    assert [len(steps) for steps in recorded(tmp_path)] == [2]
    assert recorder._skipped == 2
    assert not torch.autograd._profiler_enabled()


def test_another_profiler_is_left_alone(recorder, tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
        with pytest.warns(UserWarning, match="nothing is recorded beside another torch.profiler"):
            ar_steps([0])
        ar_steps([1])
    assert any(each.key == "aten::ones" for each in own.key_averages())
    ar_steps([0, 1])
    assert recorded(tmp_path) == []
    assert recorder._skipped == 4


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
import torch._dynamo  # a profiler has it loaded, which takes as long as all that is timed here
import disa_fast
from upstream_like import AnnealedDiffLoss, UpstreamLikeMAR, small_mar

torch.set_num_threads(1)
model = small_mar()
decode = model.decode
model.decode = lambda *arguments: time.sleep(0.02) or decode(*arguments)
started = time.perf_counter()
for _ in range(2):
    model.sample_tokens(torch.tensor([1, 2]), "linear:6-3", num_iter=3, cfg=3.0, backend="reference")
    print(f"seconds={{time.perf_counter() - started}}")
other = UpstreamLikeMAR(AnnealedDiffLoss)
encode = other.backbone.encode
other.backbone.encode = lambda *arguments: time.sleep(0.02) or encode(*arguments)
with disa_fast.accelerate(other, "linear:6-3"):
    other.sample_tokens(2, num_iter=3, labels=torch.tensor([1, 2]))
sys.exit(5)
"""


def test_a_command_under_torch_profiler(tmp_path, capfd):
    """Sleep in the backbone is a gap there, and whole AR steps take what they take."""
    (tmp_path / "draw.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, str(tmp_path / "draw.py")]
    assert cli.main(["profile", "--out", str(tmp_path / "out"), "--tool", "torch", "--", *command]) == 5
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    out = capfd.readouterr().out
    assert "of AR steps in one process, on the CPU, by torch.profiler" in out
    assert (summary["status"], summary["skipped"], len(summary["processes"])) == (5, 0, 1)
    native = [each for each in summary["ar_steps"] if each["calls"] == 2]
    assert {each["backend"] for each in native} == {"reference"}
    assert [(each["k"], each["K"], each["T"], each["rows"]) for each in native] == [(0, 3, 6, 12), (1, 3, 4, 20), (2, 3, 3, 32)]
    assert all(each["backbone_ms"] > 20 for each in native)
    accelerated = [each for each in summary["ar_steps"] if each["calls"] == 1]
    assert [(each["k"], each["K"], each["T"]) for each in accelerated] == [(0, 3, 6), (1, 3, 4), (2, 3, 3)]
    assert accelerated[0]["backbone_ms"] is None
    assert all(each["backbone_ms"] > 20 for each in accelerated[1:])
    assert summary["parts"]["backbone"]["gaps"] > (2 * 3 + 2) * 0.02
    assert 0 < summary["parts"]["head"]["gaps"] < summary["parts"]["backbone"]["gaps"]
    took = float(out.split("seconds=")[2].split()[0])  # both images of the native model
    of_native = sum(each["share"] for each in native) * summary["seconds"]
    assert 0.5 * took < of_native < took
    operators = {(each["part"], each["name"]): each["calls"] for each in summary["operators"]}
    assert operators["head", "aten::linear"] >= 2 * (6 + 4 + 3) * 4
    assert operators["backbone", "aten::scaled_dot_product_attention"] == 2 * 3 * 2 + 2 * 2
    assert len(list((tmp_path / "out" / "raw").glob("trace-*.json"))) == 3


# The command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "no-such-command"], "command: 'no-such-command' is not on the path"),
        (["--tool", "nsys", "--", "true"], "--tool: nsys, of Nsight Systems, is not on the path"),
        (["--graph-kernels", "--", "true"], "--graph-kernels: torch.profiler does so anyway"),
        (["--", "true"], "no AR step was recorded: does the command draw images with this package?"),
    ],
)
def test_refusals(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert cli.main(["profile", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_refusals_under_nsys(tmp_path, capsys, nsys):
    assert cli.main(["profile", "--out", str(tmp_path / "out"), "--tool", "nsys", "--seconds", "3", "--", "true"]) == 2
    assert "--seconds: only torch.profiler stops recording" in capsys.readouterr().err


def test_auto_takes_nsys_where_there_is_a_gpu(tmp_path, capfd, nsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert profile.profile(["true"], tmp_path / "out")[1]["tool"] == "nsys"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no AR step was recorded"):
        profile.profile(["true"], tmp_path / "out")


def test_a_command_that_fails_before_it_draws(tmp_path, capfd):
    assert cli.main(["profile", "--out", str(tmp_path / "out"), "--", "sh", "-c", "kill -9 $$"]) == 128 + 9
    assert "disa-fast profile: no AR step was recorded" in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "ten"])
def test_malformed_seconds(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["profile", "--seconds", text, "--", "true"])
    assert f"expected a number of seconds above 0, got {text!r}" in capsys.readouterr().err


# docs/profiling.md -----------------------------------------------------------------------------------------------------


def shell_lines() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def test_commands_in_the_documentation_parse():
    parsed = []
    for words in shell_lines():
        starts = [i for i, word in enumerate(words) if word in ("disa-fast", "disa_fast.cli")]
        parsed += [cli._parser().parse_args(words[start + 1 :]).run.__name__ for start in starts]
    assert parsed.count("_profile") == 3
    assert parsed.count("_generate") == 6


def test_kernels_in_the_documentation_exist():
    sources = "".join(path.read_text() for path in (ROOT / "kernels" / "triton").glob("*.py"))
    named = set(re.findall(r"\b\w+_kernel\b", DOC))
    assert named == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    entries = re.findall(r"\bmlp_denoise_(?:\d+|any)\b", DOC)
    assert "each also with `_float16`" in DOC
    assert {name + suffix for name in entries for suffix in ("", "_float16")} == set(cuda.ENTRIES)
    in_source = re.findall(r"^DISA_FAST_ENTRY\((\w+),", (ROOT / "kernels" / "cuda" / "mlp_denoise.cu").read_text(), re.MULTILINE)
    assert set(cuda.ENTRIES) == set(in_source)


def test_paths_and_names_in_the_documentation_exist():
    paths = re.findall(r"\b(?:kernels|bench|disa_fast|docs)/[\w/.]*\w", DOC)
    assert len(paths) >= 4
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for module in re.findall(r"python -m ([\w.]+)", DOC):
        assert find_spec(module) is not None
    sources = "".join(path.read_text() for path in (ROOT / "disa_fast").rglob("*.py"))
    variables = set(re.findall(r"DISA_FAST_\w+", DOC))
    assert [name for name in variables if name not in sources] == []
    assert triton.MODULATION_BYTES > 0
    assert callable(disa_fast.explain)
    assert f"`--seconds` ({profiling.DEFAULT_SECONDS:g})" in DOC
    targets = re.findall(r"`make ([\w-]+)`", DOC)
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)


def test_ranges_in_the_documentation_are_those_of_mar_l():
    """k, T and rows of one image with DiSA's settings, in the names of today."""
    schedule, tables, masked, names = parse_schedule("linear:50-5"), solvers.resolve("ddpm", 950), 256, set()
    for k in range(64):
        left = still_masked_after(k, 64, 256, masked)
        counts = len(tables(steps_at(schedule, k, 64))), 2 * (masked - left)
        names |= {profiling.AR_STEP.format(k, 64, *counts)}
        names |= {profiling.DENOISE.format(*counts, backend) for backend in ("cuda", "triton")}
        shape = triton.Shape(*counts, guided=True, noisy=True, tiles=None, precision="ieee")
        names |= {profiling.CAPTURE.format(shape), profiling.REPLAY.format(shape)}
        masked = left
    named = set(re.findall(r"\b(?:AR step|denoise|capture|replay) [kT]=\d+[^`@/|]*", DOC))
    assert len(named) >= 6
    assert named <= names
    for text in re.findall(r'--nvtx-include "disa_fast@([^"]*)/"', DOC):
        assert not re.search(r"[/\[\]*+,@]", text)
    assert profiling.AR_STEP_OF_ANOTHER_LOOP.removeprefix(profiling.AR_STEP) == " head alone"
    assert all(f"`{name}`" in DOC for name in (" head alone", profiling.CPU_CORE, profiling.NOISE.format(50)))
