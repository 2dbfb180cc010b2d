"""bench/probe.cu on the processor (host_probe.py), and compiled for GPUs that need not be there."""

import ctypes
import importlib
import time

import host_gpu
import pytest
from host_gpu import CPU, ROOT
from host_probe import SOURCE, HostGpu, offsets

from disa_fast import jit

SECOND = 1_000_000_000
needs_compiler = pytest.mark.skipif(host_gpu.compiler() is None, reason="needs a C++20 compiler")


@pytest.fixture
def probes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    probes = importlib.import_module("bench.probes")
    settings = {"ROUNDS": 6, "TURNS": 1, "LAUNCHES": 2, "PATIENCE": 60 * SECOND, "SHAPES": [(2, 1024), (5, 1280), (16, 1536)]}
    for name, value in (settings | {"LEVEL2_BYTES": (1 << 20,)}).items():
        monkeypatch.setattr(probes, name, value)
    return probes


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@needs_compiler
def test_everything_is_measured(probes, capsys):
    """With values checked as on a GPU: 4 blocks, more rows than warps, a last part that is smaller."""
    peaks = {}
    for _, measure in probes.measurements(HostGpu(multiprocessors=3), seconds, lambda call: call):
        peaks |= measure()
    shapes = [f"{name} {shape} us" for shape in ("2 x 1024", "5 x 1280", "16 x 1536") for name in probes.EXCHANGES]
    assert list(peaks) == ["launch us", "graph node us", "barrier us", *shapes, "level 2, 1 MiB, GB/s"]
    assert all(value > 0 for value in peaks.values())
    probes.print_table(peaks)
    printed = capsys.readouterr().out
    told = ["launch us", "graph node us", "barrier us", "level 2, 1 MiB, GB/s"]
    assert probes.told(peaks) == told
    assert probes.told({"exchange 8 x 1280 us": 1.0}) == ["exchange 8 x 1280 us"]
    assert "16 rows of 1536" in printed


@needs_compiler
@pytest.mark.parametrize("slow", [0, 2])
def test_one_slow_block_changes_nothing(probes, slow):
    gpu = HostGpu(slow=slow)
    assert probes.barrier(gpu, seconds)["barrier us"] > 0
    assert probes.exchange(gpu, seconds, 2, 1024)


@needs_compiler
@pytest.mark.parametrize("measure", ["barrier", "exchange"])
def test_gives_up_where_a_block_never_runs(probes, monkeypatch, measure):
    monkeypatch.setattr(probes, "PATIENCE", SECOND // 10)
    shape = (2, 1024) if measure == "exchange" else ()
    with pytest.raises(RuntimeError, match=rf"probe_{measure}.*, 3 blocks: gave up after 0\.1 s"):
        getattr(probes, measure)(HostGpu(missing=1), seconds, *shape)


MUTATIONS = {
    "no barrier between telling and reading": ("if constexpr (kBarrier) wait_for_blocks(p, round, patience);", "", "exchange"),
    "a barrier does not wait": ("int(seen - expected) < 0 &&", "false &&", "barrier"),
    "a barrier tells nobody": ("add_release(p.counter, 1);", "", "barrier"),
    "a barrier waits for all but one": ("= round * gridDim.x;", "= round * (gridDim.x - 1);", "barrier"),
    "words are taken before they are there": ("there &= all_of(found[i], round);", "", "exchange"),
    "one buffer": ("round % 2 * kRows", "0 * kRows", "exchange"),
    "a row is left out": ("row < p.rows; row += kWarps", "row < p.rows - 1; row += kWarps", "exchange"),
    "a tile is left out": ("tile = blockIdx.x;", "tile = blockIdx.x + 1;", "exchange"),
    "words are of another round": ("told(round, place));", "told(round + 4, place));", "exchange"),
}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(probes, monkeypatch, tmp_path, name):
    old, new, measure = MUTATIONS[name]
    source = tmp_path / "probe.cu"
    text = SOURCE.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))
    monkeypatch.setattr(probes, "PATIENCE", SECOND // 2)
    with pytest.raises((RuntimeError, ArithmeticError), match=r"gave up|is not what was told"):
        getattr(probes, measure)(HostGpu(source, slow=1), seconds, *((2, 1024) if measure == "exchange" else ()))


def test_the_sums_by_hand(probes):
    """Of what `told` says in C++: two rounds, three rows, two warps."""
    sums = probes.exchanged_sums(3, 128, 2, 2, CPU)
    expected = [0] * 64
    for count in (1, 2):
        for row in range(3):
            for column in range(128):
                word = (count * 0x9E3779B9 ^ (row * 128 + column) * 0x85EBCA6B) & 0xFFFFFFFC | count & 3
                expected[row % 2 * 32 + column // 4] += word
    assert sums.tolist() == [value % (1 << 32) for value in expected]


@needs_compiler
def test_the_structure_is_the_kernels(probes):
    assert [getattr(probes.Probe, name).offset for name, _ in probes.Probe._fields_] + [ctypes.sizeof(probes.Probe)] == offsets()


# Compiling -----------------------------------------------------------------------------------------------------------

ENTRIES = [b"probe_nothing", b"probe_barrier_exchange_1536", b"probe_exchange_1024", b"probe_level2"]


@pytest.mark.skipif(jit.why_not() is not None, reason="needs NVRTC")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_nvrtc_compiles_it(probes, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("DISA_FAST_CACHE", str(tmp_path))
    cubin = probes.image(architecture)
    assert all(entry in cubin for entry in ENTRIES)
    assert probes.image(architecture) == cubin
    assert len(list(tmp_path.iterdir())) == 1


def test_nvcc_compiles_it(probes, monkeypatch):
    monkeypatch.setattr(jit, "why_not", lambda: "there is no NVRTC")
    if probes.nvcc.tool() is None:
        pytest.skip("needs nvcc")
    assert all(entry in probes.image("sm_90a") for entry in ENTRIES)
    with pytest.raises(RuntimeError, match=r"nvcc does not compile probe\.cu: .*sm_12"):
        probes.image("sm_12")


def test_says_why_not(probes, monkeypatch):
    monkeypatch.setattr(probes.cuda, "_C", object())
    monkeypatch.setattr(jit, "why_not", lambda: "there is no NVRTC")
    monkeypatch.setattr(probes.nvcc, "tool", lambda: None)
    assert probes.why_not() == "probe.cu cannot be compiled: no nvcc, and there is no NVRTC"
    monkeypatch.setattr(probes.nvcc, "tool", lambda: "nvcc")
    assert probes.why_not() is None
    monkeypatch.setattr(probes.cuda, "_C", None)
    assert probes.why_not().startswith("the native core")
