"""What `python -m disa_fast.collect_env` tells, also of machines that this one is not."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import disa_fast
from disa_fast import backends, collect_env
from disa_fast.collect_env import cgroup_limits, collect, main, openmp_libraries
from disa_fast.heads.flow_transformer import FlowTransformerSpec
from disa_fast.heads.mlp import MLPSpec

TOPICS = ["disa_fast", "Python", "packages", "torch", "CPU", "memory", "GPUs", "tools", "environment", "backends"]
CPU = torch.device("cpu")
SPECS = {"MAR-B": MLPSpec(16, 1024, 6, 768), "FlowAR-S": FlowTransformerSpec(16, 1024, 2, 768, cross=False)}


def test_as_a_command_of_its_own():
    """Imports nothing more than disa_fast does, and does not start CUDA."""
    code = """
import json, sys, torch, disa_fast
before = set(sys.modules)
from disa_fast.collect_env import main
assert main(["--json"]) == 0
more = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert more <= {"disa_fast"}, more
assert torch.cuda.is_available() or not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(disa_fast.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    assert list(facts) == TOPICS
    assert facts["disa_fast"]["imported from"] == str(Path(disa_fast.__file__).parent)
    assert facts["torch"]["version"] == torch.__version__
    assert '"failed: ' not in done.stdout or torch.cuda.is_available()


def test_the_text_has_every_fact(capsys):
    facts = collect()
    assert main([]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == TOPICS
    for name, value in facts["packages"].items():
        assert f"  {name}: {value}" in lines
    for about, answers in facts["backends"].items():
        at = lines.index(f"  {about}:")
        assert lines[at + 1 : at + 1 + len(answers)] == [f"    {name}: {answer}" for name, answer in answers.items()]


def test_versions_machine_and_tools():
    facts = collect()
    assert facts["Python"]["version"] == platform.python_version()
    assert facts["packages"]["numpy"] == __import__("numpy").__version__
    assert {"triton", "nvtx", "transformers", "diffusers", "safetensors", "pybind11", "cupy-cuda13x"} <= set(facts["packages"])
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert facts["CPU"]["cores that this process may use"] <= facts["CPU"]["cores"]
    assert facts["CPU"]["name"] == collect_env.cpu_name()
    assert {"nvcc", "nsys", "ncu", "g++"} <= set(facts["tools"])
    sizes = [float(facts["memory"][name].removesuffix(" GiB")) for name in ("total", "available")]
    assert sizes[0] == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, abs=0.1)
    assert sizes[0] >= sizes[1] > 0


def test_backends_are_asked(monkeypatch):
    """In both dtypes, for both kinds of head."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answers = collect()["backends"]
    assert len(answers) == 4
    for name, spec in SPECS.items():
        for dtype in (torch.float32, torch.bfloat16):
            why_not = backends.survey(spec, dtype, CPU, 8)
            expected = {
                backend: f"no: {reason}" if reason else f"yes: {backends.BACKENDS[backend].about(dtype)}"
                for backend, reason in why_not.items()
            }
            assert answers[f"head of {name}, {str(dtype).removeprefix('torch.')}, on cpu"] == expected
            assert list(expected) == list(why_not)


def test_the_environment_and_nothing_secret(monkeypatch):
    for name in collect()["environment"]:
        monkeypatch.delenv(name)
    assert collect()["environment"] == {}
    given = {"CUDA_VISIBLE_DEVICES": "1", "DISA_FAST_GRAPHS": "0", "MKL_NUM_THREADS": "2", "OMP_NUM_THREADS": "", "TRITON_X": "y"}
    for name, value in (given | {"HF_TOKEN": "secret", "NOT_OMP_X": "1"}).items():
        monkeypatch.setenv(name, value)
    assert collect()["environment"] == given


def broken(*arguments, **how):
    raise RuntimeError("broken\n  today")


@pytest.mark.parametrize(
    ("what", "names", "where"),
    [
        ("disa_fast.collect_env.cpu_name", ["CPU", "name"], "broken today"),
        ("torch.get_num_threads", ["torch", "threads"], "broken today"),
        ("torch.backends.openmp.is_available", ["torch", "OpenMP"], "broken today"),
        ("os.sched_getaffinity", ["CPU", "cores that this process may use"], "broken today"),
        ("disa_fast.collect_env.cgroup_limits", ["memory", "allowed"], "broken today"),
        ("disa_fast.backends.cpu.is_built", ["disa_fast", "C++ core"], "broken today"),
        ("disa_fast.backends.survey", ["backends", "head of MAR-B, float32, on cpu"], "broken today"),
        ("disa_fast.backends.hoisted.about", ["backends", "head of MAR-B, float32, on cpu", "hoisted"], "broken today"),
        ("disa_fast.collect_env.version", ["packages"], "broken today"),
        ("shutil.which", ["tools"], "broken today"),
        ("platform.platform", ["Python"], "broken today"),
        ("torch.cuda.is_available", ["GPUs"], "broken today"),
    ],
)
def test_what_is_broken_says_so_in_its_line(monkeypatch, capsys, what, names, where):
    monkeypatch.setattr(what, broken)
    monkeypatch.setattr(collect_env, "openmp_libraries", list)
    assert main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == TOPICS
    value = facts
    for name in names:
        value = value[name]
    assert value == f"failed: RuntimeError: {where}"
    assert str(facts).count(where) < 12
    assert facts["disa_fast"] == value or facts["disa_fast"]["imported from"]
    assert main([]) == 0
    assert f"{names[-1]}: failed: RuntimeError: {where}\n" in capsys.readouterr().out


@pytest.mark.native
def test_an_instruction_set_that_is_not_there(monkeypatch):
    assert collect()["CPU"]["instruction sets"].split(", ")[-1] == "portable"
    monkeypatch.setenv("DISA_FAST_CPU_ISA", "portable")
    facts = collect()
    assert facts["CPU"]["instruction set of backend cpu"] == "portable"
    assert "kernels for portable" in facts["backends"]["head of MAR-B, bfloat16, on cpu"]["cpu"]
    monkeypatch.setenv("DISA_FAST_CPU_ISA", "sse9")
    facts = collect()
    assert facts["CPU"]["instruction set of backend cpu"].startswith("failed: ValueError: DISA_FAST_CPU_ISA: expected one of")
    answers = facts["backends"]["head of MAR-B, float32, on cpu"]
    assert answers["cpu"].startswith("failed: ValueError: DISA_FAST_CPU_ISA")
    assert answers["hoisted"].startswith("yes: ")


def test_an_installation_without_compiled_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(backends.cpu, "_C", None)
    monkeypatch.setattr(backends.cpu, "_why_not_built", lambda: "no compiler")
    monkeypatch.setattr(backends.cuda, "PREBUILT", tmp_path / "mlp_denoise.fatbin")
    (tmp_path / "no_fatbin.txt").write_text("no nvcc\n")
    facts = collect()
    assert facts["disa_fast"]["C++ core"] == "not built: no compiler"
    assert facts["disa_fast"]["CUDA kernel"] == "not compiled with the package: no nvcc"
    assert facts["CPU"]["instruction set of backend cpu"] == "the C++ core is not built"
    assert facts["backends"]["head of MAR-B, float32, on cpu"]["cpu"].startswith("no: not part of this installation (no compiler)")
    backends.cuda.PREBUILT.write_bytes(b"")
    assert collect()["disa_fast"]["CUDA kernel"] == "compiled by nvcc"


def test_a_package_that_is_not_installed():
    assert collect_env.version_of("disa-fast-that-nobody-made") == "not installed"


def test_gpus(monkeypatch):
    """Two of them, where backends cannot be asked about them: this PyTorch may have no CUDA."""
    found = SimpleNamespace(name="NVIDIA X1", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    names = ["NVIDIA X1", "NVIDIA X1 MIG 1g.10gb"]
    for name, stub in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda index: found if index else broken(),
        "get_device_name": lambda index=0: names[index],
        "get_device_capability": broken,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(Path(__file__).parent))
    facts = collect()
    gpus = facts["GPUs"]
    assert gpus["0"] == "failed: RuntimeError: broken today"
    assert gpus["1"] == "NVIDIA X1, capability 9.0, 132 multiprocessors, 80.0 GiB"
    assert gpus["MIG"] == "in use"
    assert gpus["MPS"] == f"{Path(__file__).parent} is there"
    assert len(facts["backends"]) == 8
    monkeypatch.setattr(backends, "survey", lambda spec, dtype, device, rows: {"hoisted": None, "cuda": f"not on {device.type}"})
    answers = collect()["backends"]["head of MAR-B, bfloat16, on cuda"]
    assert answers == {"hoisted": f"yes: {backends.hoisted.about(torch.bfloat16)}", "cuda": "no: not on cuda"}
    names[1] = names[0]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert collect()["GPUs"]["MIG"] == "no sign of it"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2c5e")
    assert collect()["GPUs"]["MIG"] == "in use"


def test_a_driver_that_is_too_old_is_told(monkeypatch):
    def is_available():
        __import__("warnings").warn("the NVIDIA driver on your system is too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    facts = collect_env.tried(collect_env._gpus), list(collect_env._backends())
    assert facts[0] == "failed: UserWarning: the NVIDIA driver on your system is too old"
    assert not any("cuda" in name for name in facts[1])


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert collect()["GPUs"] == "none: this PyTorch is for CPUs alone"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert collect()["GPUs"] == "none that torch sees"
    assert collect()["torch"]["CUDA it was built for"] == "13.0"


# What the system says -------------------------------------------------------------------------------------------------


def write(folder: Path, **texts: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".", 1)).write_text(text + "\n")


def test_limits_of_control_groups(tmp_path):
    """Version 2: the tightest of all groups that it is in."""
    own = tmp_path / "own"
    mounted = tmp_path / "cgroup"
    assert cgroup_limits(mounted, own) == (None, None)
    own.write_text("0::/system/job\n")
    assert cgroup_limits(mounted, own) == (None, None)
    write(mounted / "system" / "job", cpu__max="max 100000", memory__max="max")
    assert cgroup_limits(mounted, own) == (None, None)
    write(mounted / "system", cpu__max="150000 100000", memory__max="8589934592")
    assert cgroup_limits(mounted, own) == (1.5, 8 << 30)
    write(mounted, cpu__max="50000 100000", memory__max="17179869184")
    assert cgroup_limits(mounted, own) == (0.5, 8 << 30)
    write(tmp_path, cpu__max="10000 100000")
    assert cgroup_limits(mounted, own) == (0.5, 8 << 30)


def test_limits_of_control_groups_of_version_1(tmp_path):
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n")
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712")
    assert cgroup_limits(tmp_path, own) == (None, None)
    write(tmp_path / "cpu", cpu__cfs_quota_us="250000")
    write(tmp_path / "memory", memory__limit_in_bytes="4294967296")
    assert cgroup_limits(tmp_path, own) == (2.5, 4 << 30)


def test_openmp_libraries(tmp_path):
    maps = tmp_path / "maps"
    assert openmp_libraries(maps) == []
    line = "7f00-7f01 r-xp 00000000 00:01 1 "
    libraries = "/lib/libgomp.so.1", "/torch/libgomp-a34b3233.so.1", "/intel/libiomp5.so", "/x/libcompute.so", "/x/libgomp.txt"
    maps.write_text("".join(f"{line}{name}\n" for name in (*libraries, libraries[0])))
    assert openmp_libraries(maps) == ["libgomp-a34b3233.so.1", "libgomp.so.1", "libiomp5.so"]
