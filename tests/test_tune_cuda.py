"""Where the persistent kernel stops being the fastest, with made-up times in place of a GPU's."""

import importlib
import json

import host_gpu
import pytest
import torch
from host_gpu import ROOT

from disa_fast import backends
from disa_fast.backends import cuda
from disa_fast.heads.mlp import MLPSpec

FASTER = {2: 1.9, 4: 1.6, 8: 1.3, 16: 1.1, 32: 0.8, 48: 1.2, 64: 0.5}


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """Believes in a GPU, with small heads, and writes into a folder of the test's."""
    monkeypatch.syspath_prepend(str(ROOT))
    tune = importlib.import_module("bench.tune_cuda")
    path = tmp_path / "crossover.json"
    path.write_text('{"NVIDIA Y": {"1280": 4}}')
    for module in (tune, cuda):
        monkeypatch.setattr(module, "CROSSOVER", path)
    monkeypatch.setattr(tune, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(tune, "random_head", lambda size: size)
    monkeypatch.setattr(tune, "forget", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X")
    cuda._crossover.cache_clear()
    yield tune
    monkeypatch.undo()
    cuda._crossover.cache_clear()


@pytest.mark.parametrize(
    ("faster", "expected"),
    [
        (FASTER, 16),
        (dict.fromkeys(FASTER, 2.0), 64),
        (FASTER | {2: 0.99}, 0),
        (FASTER | {2: 1.0}, 0),
        (FASTER | {4: float("nan")}, 2),
        ({8: 1.5, 2: 1.5, 4: 0.5}, 2),
    ],
)
def test_the_largest_below_which_all_are_faster(tune, faster, expected):
    asked = []
    assert tune.fastest_up_to(faster, lambda rows: asked.append(rows) or faster[rows]) == expected
    assert asked == sorted(asked)
    assert len(asked) <= 1 + sum(rows <= expected for rows in faster)


def test_speed_is_the_median_of_turns(tune, monkeypatch):
    times = {"cuda": [1.0, 2.0, 9.0], "triton": [3.0, 3.0, 3.0]}
    monkeypatch.setattr(tune, "loop_alone", lambda head, name, dtype, *data: data)
    monkeypatch.setattr(tune, "inputs", lambda rows, steps: (None, range(steps)))
    monkeypatch.setattr(tune, "in_turns", lambda calls, turns: times)
    monkeypatch.setattr(cuda, "refuses", lambda spec, dtype, device, rows: "too many" if rows > 8 else None)
    head = type("Head", (), {"spec": None})
    assert tune.speed(head, 8) == 1.5
    assert tune.speed(head, 16) == 0


def test_nothing_is_written_where_cuda_cannot_run(tune, monkeypatch):
    """A native core that is missing says nothing about speed: 0 in the table would keep `auto` from `cuda` on that GPU for good."""
    monkeypatch.setattr(cuda, "refuses", lambda spec, dtype, device, rows: "the native core is not part of this installation")
    monkeypatch.setattr(tune, "random_head", lambda size: type("Head", (), {"spec": None}))
    before = tune.CROSSOVER.read_text()
    with pytest.raises(RuntimeError, match="cuda cannot be timed here: the native core is not part"):
        tune.main([])
    assert tune.CROSSOVER.read_text() == before


def test_it_is_written_after_each_size_to_where_it_is_asked_for(tune, monkeypatch, tmp_path):
    def speed(head, rows):
        if head == "MAR-L":
            raise RuntimeError("the GPU is gone")
        return FASTER[rows]

    monkeypatch.setattr(tune, "speed", speed)
    before, out = tune.CROSSOVER.read_text(), tmp_path / "out" / "crossover.json"
    with pytest.raises(RuntimeError, match="gone"):
        tune.main(["--out", str(out), "--sizes", "MAR-B", "MAR-L"])
    assert json.loads(out.read_text()) == {"NVIDIA X": {"1024": 16}, "NVIDIA Y": {"1280": 4}}
    assert tune.CROSSOVER.read_text() == before


def test_what_is_written_is_what_is_then_chosen(tune, monkeypatch, capsys):
    monkeypatch.setattr(tune, "speed", lambda head, rows: FASTER[rows] if head == "MAR-L" else 0.5)
    tune.main(["--out", str(tune.CROSSOVER), "--sizes", "MAR-L", "MAR-H"])
    assert json.loads(tune.CROSSOVER.read_text()) == {"NVIDIA X": {"1280": 16, "1536": 0}, "NVIDIA Y": {"1280": 4}}
    assert "MAR-L: cuda up to 16 rows" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = torch.device("cuda")
    assert [cuda.fastest_up_to(width, device) for width in (1280, 1536, 1024)] == [16, 0, cuda.FASTEST_UP_TO]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "fastest_up_to", lambda width, device: 16)
    first = [next(iter(backends.survey(MLPSpec(16, 1280, 1, 64), torch.bfloat16, device, rows))) for rows in (16, 18)]
    assert first == ["cuda", "triton"]


def test_a_dry_run_writes_nothing(tune, monkeypatch):
    monkeypatch.setattr(tune, "speed", lambda head, rows: 2.0)
    monkeypatch.setattr("sys.argv", ["tune_cuda", "--dry-run"])
    before = tune.CROSSOVER.read_text()
    tune.main()
    assert tune.CROSSOVER.read_text() == before


def test_needs_a_gpu(tune, monkeypatch, capsys):
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr("sys.argv", ["tune_cuda"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.interpreter
@pytest.mark.skipif(host_gpu.compiler() is None, reason="needs a C++20 compiler")
def test_both_loops_run(tune, monkeypatch):
    """Interpreted, and on the processor's threads."""
    gpu_measure = importlib.import_module("bench.gpu_measure")
    host_gpu.use(monkeypatch, host_gpu.HostGpu())
    monkeypatch.setitem(gpu_measure.SIZES, "MAR-B", (32, 1))
    monkeypatch.setattr(gpu_measure, "Z_CHANNELS", 32)
    for name, value in {"DEVICE": host_gpu.CPU, "STEPS": 1, "TURNS": 1}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(gpu_measure, "captured", lambda loop: loop)
    monkeypatch.setattr(gpu_measure, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(cuda, "PATIENCE", 100 * cuda.PATIENCE)
    assert tune.speed(gpu_measure.random_head("MAR-B"), 4) > 0
