"""bench/gpu_prepare.py: what is recorded, packed and put to use, and that these checks fail where it is spoiled."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import test_gpu
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # last, so that the installed package is the one that is tested
pytest.importorskip("triton")
gpu_launches, gpu_prepare = (importlib.import_module(f"bench.{name}") for name in ("gpu_launches", "gpu_prepare"))

SOABI = sysconfig.get_config_var("SOABI")

# A small head, and an image of either flow model; all that there is takes half a minute.
RECORD_SOME = """
import sys, torch
from pathlib import Path
from bench.gpu_launches import *
calls = list(measured())
heads = [call for call in calls if call.func is tokens and call.args[0] == SMALL[0]]
images = {c.args[0].system: c for c in calls if c.func is published_image and c.args[1:] == (1, torch.bfloat16)}
record(Path(sys.argv[1]), [*heads, *images.values()])
"""


def outside(*arguments: str | Path) -> subprocess.CompletedProcess:
    """In a process of its own, since this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> list[list]:
    path = tmp_path_factory.mktemp("record") / "launches.json"
    done = outside("-c", RECORD_SOME, path)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def test_every_kernel_is_recorded(launches):
    files = (ROOT / "kernels" / "triton").glob("*.py")
    functions = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    kernels = {node.name for node in functions if node.name.endswith("_kernel")}
    assert len(kernels) >= 10
    assert {name for _, name, _, _ in launches} == kernels


def test_every_dtype_and_option_is_recorded(launches):
    of_products = [(arguments, options) for _, name, arguments, options in launches if name == "gated_residual_kernel"]
    assert {arguments[0]["dtype"] for arguments, _ in of_products} == {"float32", "bfloat16", "float16"}
    assert {options["PRECISION"] for _, options in of_products} == {"ieee", "tf32"}
    assert {options["PDL"] for _, options in of_products} == {True, False}
    names = {name for _, name, _, _ in launches}
    assert {"adaln_linear_kernel", "adaln_kernel"} <= names  # fused and not


def test_parameters_of_a_test_are_its_cases():
    cases = list(gpu_launches.parameters(test_gpu.test_is_as_good_as_eager))
    marks = {str(mark.args[0]): len(mark.args[1]) for mark in test_gpu.test_is_as_good_as_eager.pytestmark}
    assert len(cases) == marks["dtype"] * marks["cfg"] * marks["('width', 'depth', 'rows')"]
    assert {"width": 1280, "depth": 2, "rows": 14, "cfg": 3.0, "dtype": torch.float16} in cases


def test_a_tensor_is_what_triton_sees_of_it():
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    for of, address in ((x, 0), (x[8:], 0), (x[3:], 6)):
        assert gpu_launches.plain(of) == {"dtype": "bfloat16", "address": address}
        stand_in = gpu_prepare._stand_in(gpu_launches.plain(of))
        assert (stand_in.dtype, stand_in.data_ptr()) == ("bfloat16", address)
    assert [gpu_prepare._stand_in(gpu_launches.plain(y)) for y in (3, 0.5, True, None, "ieee")] == [3, 0.5, True, None, "ieee"]
    with pytest.raises(TypeError, match=r"launched with torch.bfloat16, which cannot be recorded"):
        gpu_launches.plain(torch.bfloat16)


def test_nothing_is_recorded_in_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_launches.backend, "is_interpreted", lambda: True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        gpu_launches.record(tmp_path / "launches.json", [])


# Putting to use --------------------------------------------------------------------------------------------------------


class Checkout:
    """A checkout with one source, a prepared folder of it for the Python and Triton that are here, and a folder for the cache."""

    def __init__(self, module: ModuleType, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.module, self.root, self.folder, self.temporary = module, path / "checkout", path / "prepared", path / "tmp"
        for folder in (self.root / "disa_fast", self.root / "csrc", self.folder, self.temporary):
            folder.mkdir(parents=True)
        (self.root / "csrc" / "bindings.cpp").write_text("one")
        patch.setattr(module, "ROOT", self.root)
        patch.setattr(tempfile, "tempdir", str(self.temporary))
        (self.folder / f"_C.{SOABI}.so").write_bytes(b"core")
        (self.folder / "mlp_denoise.fatbin").write_bytes(b"kernels")
        kernel = path / "KERNEL"
        kernel.mkdir()
        for name in ("k.json", "k.cubin"):
            (kernel / name).write_text(name)
        with tarfile.open(self.folder / module.CACHE, "w:xz") as archive:
            archive.add(kernel, kernel.name)
        self.say()

    def say(self, **changed: str) -> None:
        said = {"python": SOABI, **self.module.triton_here(), "sources": self.module.sources()}
        (self.folder / self.module.MANIFEST).write_text(json.dumps(said | changed))

    def placed(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.root / "disa_fast").iterdir()}


def is_put_to_use(checkout: Checkout, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from triton.runtime.cache import FileCacheManager

    (checkout.root / "disa_fast" / "mlp_denoise.fatbin").write_bytes(b"older")
    environment = checkout.module.use(checkout.folder)
    (cache,) = environment.values()
    patch.setenv("TRITON_CACHE_DIR", cache)
    found = FileCacheManager("KERNEL").get_group("k.json")
    assert {name: Path(path).read_text() for name, path in (found or {}).items()} == {"k.json": "k.json", "k.cubin": "k.cubin"}
    (Path(cache) / "ANOTHER").mkdir()  # of a kernel that Triton compiled meanwhile
    assert checkout.module.use(checkout.folder) == environment
    assert (Path(cache) / "ANOTHER").is_dir()
    assert checkout.placed() == {f"_C.{SOABI}.so": b"core", "mlp_denoise.fatbin": b"kernels"}
    assert [path.name for path in checkout.temporary.iterdir()] == [Path(cache).name]
    assert capsys.readouterr() == ("", "")


def is_refused_by_another_python(checkout: Checkout, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    checkout.say(python="cpython-399-x")
    with pytest.raises(RuntimeError, match=f"made for python cpython-399-x, but here is {SOABI}; bench.gpu_prepare makes another"):
        checkout.module.use(checkout.folder)
    assert not checkout.placed()


def is_refused_with_other_sources(checkout: Checkout, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (checkout.root / "csrc" / "bindings.cpp").write_text("two")
    with pytest.raises(RuntimeError, match=r"made for sources \w+, but here is \w+"):
        checkout.module.use(checkout.folder)
    assert not checkout.placed()


def is_used_with_other_kernels_of_tritons(checkout: Checkout, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Whose cache tells by itself: a mended kernel must not cost all that was prepared."""
    (checkout.root / "kernels" / "triton").mkdir(parents=True)
    (checkout.root / "kernels" / "triton" / "mlp_denoise.py").write_text("two")
    try:
        assert "TRITON_CACHE_DIR" in checkout.module.use(checkout.folder)
    except RuntimeError as error:
        pytest.fail(str(error))


def is_used_in_part_by_another_triton(checkout: Checkout, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Of the same version, but told otherwise: it looks for other names."""
    patch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert checkout.module.use(checkout.folder) == {}
    assert "cache is left out, which is of Triton" in capsys.readouterr().err
    assert set(checkout.placed()) == {f"_C.{SOABI}.so", "mlp_denoise.fatbin"}


def is_too_large(checkout: Checkout, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    size = checkout.module.check_size(checkout.folder)
    assert size == sum(path.stat().st_size for path in checkout.folder.iterdir())
    with (checkout.folder / "more").open("wb") as file:
        file.truncate(checkout.module.MOST_BYTES - size)
    assert checkout.module.check_size(checkout.folder) == 60 << 20
    (checkout.folder / "one").write_bytes(b"1")
    with pytest.raises(RuntimeError, match="takes 62914561 bytes, of 62914560 that can be carried"):
        checkout.module.check_size(checkout.folder)


def is_kept_where_it_is_somebody_elses(checkout: Checkout, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (checkout.folder / checkout.module.MANIFEST).unlink()
    patch.setattr(checkout.module, "_environment", lambda: pytest.fail("goes on"))
    with pytest.raises(RuntimeError, match="has files that are not of an earlier preparation"):
        checkout.module.prepare(checkout.folder)
    assert (checkout.folder / "mlp_denoise.fatbin").exists()


CHECKS = [
    is_put_to_use, is_refused_by_another_python, is_refused_with_other_sources, is_used_with_other_kernels_of_tritons,
    is_used_in_part_by_another_triton, is_too_large, is_kept_where_it_is_somebody_elses,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_prepared(check, tmp_path, monkeypatch, capsys):
    check(Checkout(gpu_prepare, tmp_path, monkeypatch), monkeypatch, capsys)


MUTANTS = [
    (is_put_to_use, 'metadata.with_name(f"__grp__{metadata.name}").write_text(json.dumps({"child_paths": paths}))', "pass"),
    (is_put_to_use, "if not cache.is_dir():", "shutil.rmtree(cache, ignore_errors=True)\n    if True:"),
    (is_put_to_use, "aside.replace(ROOT", "aside.exists() or aside.replace(ROOT"),
    (is_refused_by_another_python, 'sysconfig.get_config_var("SOABI")), (', 'made["python"]), ('),
    (is_refused_with_other_sources, ', ("sources", sources())', ","),
    (is_refused_with_other_sources, "path.read_bytes())", "path.name)"),
    (is_used_with_other_kernels_of_tritons, '("csrc/**/*.*",', '("csrc/**/*.*", "kernels/**/*.py",'),
    (is_used_in_part_by_another_triton, 'here["key"] != made["key"]', 'here["triton"] != made["triton"]'),
    (is_kept_where_it_is_somebody_elses, "and not (folder / MANIFEST).exists()", "and False"),
    (is_used_in_part_by_another_triton, "sorted(get_cache_invalidating_env_vars().items())", "0"),
    (is_too_large, "> MOST_BYTES", "> MOST_BYTES + 1"),
]


@pytest.mark.parametrize(("check", "old", "new"), MUTANTS)
def test_a_mutant_is_caught(check, old, new, tmp_path, monkeypatch, capsys):
    source, mutant = Path(gpu_prepare.__file__).read_text(), ModuleType("mutant")
    assert source.count(old) == 1
    mutant.__file__ = gpu_prepare.__file__
    exec(compile(source.replace(old, new), "mutant", "exec"), vars(mutant))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(Checkout(mutant, tmp_path, monkeypatch), monkeypatch, capsys)


# All of it -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(gpu_prepare.python_there() is None, reason=f"needs python{gpu_prepare.PYTHON}")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_whole(tmp_path):
    """Needs PyPI, or what an earlier preparation left in build/prepare. Its own check launches everything again, and finds it."""
    folder = tmp_path / "prepared"
    done = outside("-m", "bench.gpu_prepare", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"MiB with \d{3,} kernels and launchers of Triton's", done.stdout), done.stdout
    native = next(folder.glob("_C.*.so"))
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import _C; print(_C.isas())"
    loaded = subprocess.run([gpu_prepare.python_there(), "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert native.name == f"_C.{json.loads((folder / gpu_prepare.MANIFEST).read_text())['python']}.so"

    # The same launches but for one address: Triton finds all but what is launched so.
    launches = tmp_path / "launches.json"
    changed = json.loads((gpu_prepare.WORK / "launches.json").read_text())
    next(x for x in changed[0][2] if isinstance(x, dict))["address"] += 8
    launches.write_text(json.dumps(changed))
    cache = gpu_prepare.unpacked(folder / gpu_prepare.CACHE, tmp_path)
    written = gpu_prepare._compiled(gpu_prepare.WORK / "venv" / "bin" / "python", launches, cache)["written"]
    assert f"{changed[0][1]}.cubin" in written
    assert {name.split(".")[0].removeprefix("__grp__") for name in written} == {changed[0][1]}
