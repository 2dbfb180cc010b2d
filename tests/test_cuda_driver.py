"""The launcher of CUDA kernels (csrc/cuda) with fake_libcuda.cpp in the driver's place, and the kernels that nvcc compiled."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disa_fast.backends import cpu, cuda, triton

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
CMAKE = shutil.which("cmake")
PACKAGE = Path(cpu.__file__).parent.parent
FATBIN = PACKAGE / "mlp_denoise.fatbin"
NO_FATBIN = PACKAGE / "no_fatbin.txt"
pytestmark = pytest.mark.native

PRELUDE = """
import ctypes, importlib.util, json, os, sys, threading

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
fake = ctypes.CDLL(os.environ["DISA_FAST_LIBCUDA"])
fake.fake_calls.restype = ctypes.c_char_p

def calls():
    return fake.fake_calls().decode().splitlines()

def fail(function, error):
    fake.fake_fail(function.encode(), error)

def setting(name, value):
    ctypes.c_int.in_dll(fake, "fake_" + name).value = value

def module(device=0):
    return _C.CudaModule(image=b"code", device=device)

def launch(m, **other):
    usual = dict(name="mlp_denoise_any", parameters=b"args", grid=128, threads=512, shared_bytes=210_000, stream=0xabc)
    m.launch(**usual | other)

def current():
    context = ctypes.c_void_p()
    fake.cuCtxGetCurrent(ctypes.byref(context))
    return context.value

def message(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except RuntimeError as error:
        return str(error)

def on_a_thread(function):
    out = []
    thread = threading.Thread(target=lambda: out.append(function()))
    thread.start()
    thread.join()
    return out[0]

def tell(*values):
    print(json.dumps(values))
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds fake_libcuda.cpp, once for the same definitions."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    folder, built = tmp_path_factory.mktemp("fake_libcuda"), {}

    def build(*definitions: str) -> Path:
        if definitions not in built:
            library = folder / f"libcuda{len(built)}.so"
            command = [COMPILER, "-std=c++17", "-shared", "-fPIC", "-pthread", "-w", *definitions]
            subprocess.run([*command, ROOT / "tests" / "fake_libcuda.cpp", "-o", library], check=True)
            built[definitions] = library
        return built[definitions]

    return build


def run(libcuda: Path, script: str) -> list:
    """What the script tells."""
    environment = os.environ | {"DISA_FAST_LIBCUDA": str(libcuda)}
    command = [sys.executable, "-c", PRELUDE + script, cpu._C.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_launched(build):
    first, second = run(build(), "m = module(1); launch(m); first = calls(); launch(m, grid=1, stream=0); tell(first, calls())")
    assert first == [
        "cuInit 0",
        "cuDevicePrimaryCtxRetain 1",
        "cuCtxSetCurrent 0x11",
        "cuModuleLoadData 'code' in 0x11",
        "cuCtxSetCurrent 0",
        "cuCtxSetCurrent 0x11",
        "cuModuleGetFunction mlp_denoise_any",
        "cuFuncSetAttribute mlp_denoise_any shared=210000",
        "cuLaunchCooperativeKernel mlp_denoise_any (128 1 1) x (512 1 1) shared=210000 stream=0xabc 'args'",
        "cuCtxSetCurrent 0",
    ]
    assert second == [
        "cuCtxSetCurrent 0x11",
        "cuLaunchCooperativeKernel mlp_denoise_any (1 1 1) x (512 1 1) shared=210000 stream=0 'args'",
        "cuCtxSetCurrent 0",
    ]


def test_more_shared_memory_is_allowed_when_needed(build):
    sizes = "m = module(); launch(m, shared_bytes=0); calls()\nfor n in (60_000, 50_000, 70_000, 70_000): launch(m, shared_bytes=n)"
    (made,) = run(build(), f"{sizes}\ntell(calls())")
    assert [call for call in made if "Attribute" in call] == [
        f"cuFuncSetAttribute mlp_denoise_any shared={size}" for size in (60_000, 70_000)
    ]
    assert sum("cuLaunch" in call for call in made) == 4


def test_threads_share_what_was_looked_up(build):
    script = """
m = module()
names = ["mlp_denoise_1024", "mlp_denoise_1280", "mlp_denoise_1536", "mlp_denoise_any"]
threads = [threading.Thread(target=lambda: [launch(m, name=name) for name in names * 50]) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
tell(calls())
"""
    (made,) = run(build(), script)
    for what, count in {"cuModuleGetFunction": 4, "cuFuncSetAttribute": 4, "cuLaunchCooperativeKernel": 8 * 4 * 50}.items():
        assert sum(call.startswith(what) for call in made) == count


def test_a_launch_leaves_python_to_others(build):
    """The fake holds the launch until another thread lets it go, which needs the GIL."""
    script = """
m = module()
setting("hold", 1)
thread = threading.Thread(target=lambda: launch(m))
thread.start()
while not ctypes.c_int.in_dll(fake, "fake_held").value: pass
setting("hold", 0)
thread.join()
tell(calls()[-2])
"""
    assert run(build(), script)[0].startswith("cuLaunchCooperativeKernel")


# Contexts --------------------------------------------------------------------------------------------------------------


def test_a_current_context_is_used(build):
    """One of the test's own on device 0: nothing is retained and, on this thread, nothing set."""
    script = "fake.cuCtxSetCurrent(0x20); calls(); m = module(); launch(m); here = calls()"
    here, there, after = run(build(), f"{script}; tell(here, *on_a_thread(lambda: (launch(m), [calls(), current()])[1]))")
    assert [call.split()[0] for call in here] == [
        "cuInit",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuLaunchCooperativeKernel",
    ]
    assert here[1] == "cuModuleLoadData 'code' in 0x20"
    assert [there[0], there[-1], after] == ["cuCtxSetCurrent 0x20", "cuCtxSetCurrent 0", None]


def test_a_context_of_another_device_is_put_back(build):
    script = "fake.cuCtxSetCurrent(0x20); m = module(1); launch(m); m.multiprocessors(); message(launch, m, name='no'); del m"
    made, after = run(build(), f"{script}; tell(calls(), current())")
    assert "cuModuleLoadData 'code' in 0x11" in made
    assert [call for call in made if "SetCurrent" in call][1:] == ["cuCtxSetCurrent 0x11", "cuCtxSetCurrent 0x20"] * 5
    assert made[-3:] == ["cuModuleUnload in its context", "cuCtxSetCurrent 0x20", "cuDevicePrimaryCtxRelease 1"]
    assert after == 0x20


def test_what_fails_to_load_leaves_nothing(build):
    told, made = run(build(), "fail('cuModuleLoadData', 1); tell(message(module), calls())")
    assert told == "cuModuleLoadData of code for sm_90: CUDA_ERROR_INVALID_VALUE: invalid argument"
    assert made[-2:] == ["cuCtxSetCurrent 0", "cuDevicePrimaryCtxRelease 0"]


def test_the_end_of_the_driver_is_silent(build):
    """As at the end of a process, where what is still held goes."""
    made, after = run(build(), "m = module(); calls(); fail('cuCtxGetCurrent', 4); del m; tell(calls(), message(module))")
    assert made == []
    assert after == "cuCtxGetCurrent: error 4"
    assert run(build(), "m = module(); fail('cuModuleUnload', 4); fail('cuCtxSetCurrent', 4); tell(1)") == [1]


# What there is ---------------------------------------------------------------------------------------------------------


def test_the_device(build):
    script = "m = module(1); tell(m.multiprocessors(), m.shared_bytes(), m.architecture())"
    assert run(build(), script) == [131, 227 << 10, 90]


@pytest.mark.parametrize(("affinity", "error", "count"), [(40, 0, 40), (200, 0, 132), (0, 0, 132), (40, 224, 132)])
def test_a_limit_on_multiprocessors(build, affinity, error, count):
    script = f"setting('affinity', {affinity}); fail('cuCtxGetExecAffinity', {error}); m = module()"
    fits = "m.fits(name='mlp_denoise_any', threads=512, shared_bytes=100_000)"
    assert run(build(), f"{script}; tell(m.multiprocessors(), {fits})") == [count, 2 * count]


def test_an_older_driver_serves(build):
    script = "m = module(); launch(m); tell(calls()[-2], m.multiprocessors())"
    launched, count = run(build("-DWITHOUT_NEW"), script)
    assert count == 132
    assert launched.startswith("cuLaunchCooperativeKernel")


def test_resources(build):
    script = "r = module().resources('mlp_denoise_1024'); tell(r.registers, r.local_bytes, r.shared_bytes, r.threads)"
    assert run(build(), script) == [128, 8, 64, 512]


FITS = """
m = module()
def fits(threads, shared_bytes):
    try:
        return m.fits(name="mlp_denoise_any", threads=threads, shared_bytes=shared_bytes)
    except RuntimeError as error:
        return str(error)
"""
NOT_ALLOWED = "cuFuncSetAttribute of mlp_denoise_any, {} bytes of shared memory: CUDA_ERROR_INVALID_VALUE: invalid argument"


def test_what_fits(build):
    """64 bytes are the kernel's own."""
    cases = [(512, 0), (512, 227 * 1024 - 64), (513, 0), (256, 50_000)]
    assert run(build(), f"{FITS}tell(*(fits(t, s) for t, s in {cases}))") == [4 * 132, 132, 0, 4 * 132]
    for much in (227 * 1024 - 63, 2**32 - 1):
        assert run(build(), f"{FITS}tell(fits(512, {much}))") == [NOT_ALLOWED.format(much)]


@pytest.mark.parametrize("told", [0, 1])
def test_what_the_system_keeps_is_no_hindrance(build, tmp_path, told):
    """Code for sm_90 and newer has 1024 bytes that are the system's, outside of what a block may have. A driver that counts them as
    the kernel's own allows a block less; plans are for what it does allow, under either rule."""
    (tmp_path / "fatbin").write_bytes(b"code")
    script = f"""{FITS}
import pathlib, torch
from disa_fast.backends import cuda
setting("tells_reserved", {told})
cuda.PREBUILT, cuda._C = pathlib.Path({str(tmp_path / "fatbin")!r}), _C
pinned, torch.zeros = torch.zeros, lambda *sizes, pin_memory=False, **how: pinned(*sizes, **how)
gpu = cuda.NvidiaGpu(torch.device("cuda", 0))
tell(gpu.shared_bytes, fits(512, gpu.shared_bytes), fits(512, m.shared_bytes() - 64))
"""
    planned, fitting, otherwise = run(build(), script)
    assert planned == 227 * 1024 - 64 - 1024 * told
    assert fitting == 132
    assert otherwise == (NOT_ALLOWED.format(227 * 1024 - 64) if told else 132)  # a plan for that would be refused


# Errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "message(launch, m, grid=133)",
            "cuLaunchCooperativeKernel of mlp_denoise_any, 133 blocks of 512 threads, 210000 bytes of shared memory: "
            "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: too many blocks in cooperative launch",
        ),
        (
            "message(launch, m, name='other')",
            "cuModuleGetFunction of other: CUDA_ERROR_NOT_FOUND: named symbol not found",
        ),
        (
            "message(launch, m, shared_bytes=300_000)",
            "cuFuncSetAttribute of mlp_denoise_any, 300000 bytes of shared memory: CUDA_ERROR_INVALID_VALUE: invalid argument",
        ),
        (
            "fail('cuOccupancyMaxActiveBlocksPerMultiprocessor', 1) or "
            "message(m.fits, name='mlp_denoise_any', threads=32, shared_bytes=16)",
            "cuOccupancyMaxActiveBlocksPerMultiprocessor of mlp_denoise_any, 32 threads, 16 bytes of shared memory: "
            "CUDA_ERROR_INVALID_VALUE: invalid argument",
        ),
        (
            "fail('cuFuncGetAttribute', 999) or message(m.resources, 'mlp_denoise_any')",
            "cuFuncGetAttribute of mlp_denoise_any: error 999",
        ),
        ("message(module, 2)", "cuDeviceGet of device 2: CUDA_ERROR_INVALID_VALUE: invalid argument"),
        (
            "fail('cuDevicePrimaryCtxRetain', 1) or message(module)",
            "cuDevicePrimaryCtxRetain of device 0: CUDA_ERROR_INVALID_VALUE: invalid argument",
        ),
        (
            "fail('cuDeviceGetAttribute', 1) or message(m.shared_bytes)",
            "cuDeviceGetAttribute of MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: CUDA_ERROR_INVALID_VALUE: invalid argument",
        ),
    ],
)
def test_errors(build, script, said):
    (told,) = run(build(), f"m = module(); tell({script})")
    assert told == said


def test_parameters_of_another_size_are_refused(build):
    script = "setting('parameter_bytes', 6); m = module(); launch(m, parameters=b'longer'); tell(calls()[-2], message(launch, m))"
    launched, told = run(build(), script)
    assert launched.endswith("'longer'")
    assert told == "mlp_denoise_any takes 6 bytes of parameters, got 4"


def test_a_driver_that_cannot_start_is_tried_again(build):
    told, made = run(build(), "fail('cuInit', 100); told = message(module); fail('cuInit', 0); m = module(); tell(told, calls())")
    assert told == "cuInit: error 100"
    assert made[:2] == ["cuInit 0", "cuInit 0"]


def test_no_driver(build, tmp_path):
    script = f"os.environ['DISA_FAST_LIBCUDA'] = '{tmp_path}/libcuda.so.1'; tell(message(module))"
    (told,) = run(build(), script)
    assert told.startswith(f"the CUDA driver cannot be opened: {tmp_path}/libcuda.so.1: ")


def test_no_driver_in_that_file(build):
    (told,) = run(build(), f"os.environ['DISA_FAST_LIBCUDA'] = {cpu._C.__file__!r}; tell(message(module))")
    assert told == f"{cpu._C.__file__} has no cuInit: too old a driver"


# What nvcc compiled ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fatbin() -> Path:
    assert FATBIN.exists() != NO_FATBIN.exists()
    if NO_FATBIN.exists():
        pytest.skip(f"the CUDA kernels were not compiled: {NO_FATBIN.read_text()}")
    return FATBIN


@pytest.mark.skipif(not triton.is_installed(), reason="needs Triton, which has cuobjdump")
def test_the_fatbin_serves_every_gpu(fatbin):
    from triton.backends import nvidia

    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"

    def dump(*options: str) -> str:
        return subprocess.run([cuobjdump, *options, fatbin], check=True, capture_output=True, text=True).stdout

    codes = re.findall(r"\.(sm_\w+)\.cubin", dump("--list-elf"))
    assert codes in (["sm_80", "sm_90a", "sm_100"], ["sm_80", "sm_90a"])
    nvcc = shutil.which("nvcc")
    if nvcc and "sm_100" in subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split():
        assert "sm_100" in codes
    assert re.findall(r"\.(sm_\w+)\.ptx", dump("--list-ptx")) == ["sm_80"]
    kernels = re.findall(r"Function (\w+):", dump("--dump-resource-usage"))
    assert sorted(kernels) == sorted(cuda.ENTRIES * len(codes))


def compile_fatbin(folder: Path, nvcc: str, **environment: str) -> str | None:
    """Runs csrc/cuda/fatbin.cmake with a shell script for nvcc. Returns what no_fatbin.txt says."""
    if CMAKE is None:
        pytest.skip("needs CMake")
    script = folder / "nvcc"
    script.write_text(f"#!/bin/sh\n{nvcc}\n")
    script.chmod(0o755)
    (folder / "no_fatbin.txt").write_text("of old")
    subprocess.run(
        [CMAKE, f"-DSOURCE={folder}/a.cu", f"-DOUTPUT={folder}/a.fatbin", "-P", ROOT / "csrc" / "cuda" / "fatbin.cmake"],
        env=os.environ | {"CUDACXX": str(script), "DISA_FAST_CUDA": ""} | environment,
        check=True,
        capture_output=True,
    )
    why_not = folder / "no_fatbin.txt"
    return why_not.read_text() if why_not.exists() else None


@pytest.mark.parametrize(("known", "codes"), [("sm_80 sm_90", ["80", "90a"]), ("sm_90 sm_100 sm_120", ["80", "90a", "100"])])
def test_an_older_nvcc_compiles_what_it_can(tmp_path, known, codes):
    nvcc = f'[ "$1" = --list-gpu-code ] && exec printf "%s\\n" {known}; echo "$@" > {tmp_path}/a.fatbin'
    assert compile_fatbin(tmp_path, nvcc) is None
    given = (tmp_path / "a.fatbin").read_text()
    assert re.findall(r"arch=compute_(\w+)", given) == codes
    assert given.endswith(f"-o {tmp_path}/a.fatbin {tmp_path}/a.cu\n")


def test_an_nvcc_that_fails_is_no_error(tmp_path):
    why_not = compile_fatbin(tmp_path, f"touch {tmp_path}/a.fatbin; echo some words; exit 3")
    assert "some words" in why_not
    assert not (tmp_path / "a.fatbin").exists()


def test_nvcc_is_not_run_if_told_not_to(tmp_path):
    (tmp_path / "a.fatbin").touch()
    assert compile_fatbin(tmp_path, f"touch {tmp_path}/was_run", DISA_FAST_CUDA="0") == "DISA_FAST_CUDA was 0\n"
    assert not (tmp_path / "was_run").exists()
    assert not (tmp_path / "a.fatbin").exists()
