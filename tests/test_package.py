"""The package as installed, and the promises of README.md that can be checked."""

import json
import operator
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest
import report

import disa_fast
from disa_fast import backends
from disa_fast.demo.run import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_importing_does_not_start_cuda():
    code = "import disa_fast, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_installed_with_its_data():
    package = Path(disa_fast.__file__).parent
    assert (package / "py.typed").is_file()
    weights = {path.name: path.stat().st_size for path in (package / "demo" / "weights").iterdir()}
    models = ("mar", "flowar", "xar", "harmon", "classifier")
    files = {f"{what}_fashion_mnist.{suffix}" for what in models for suffix in ("safetensors", "json")}
    assert set(weights) == files | {"harmon_fashion_mnist.tokenizer.json"}
    assert sum(weights.values()) < 18e6
    assert metadata("disa-fast")["License-Expression"] == "MIT"
    assert any(script.name == "disa-fast" for script in entry_points(group="console_scripts"))


def test_the_native_core_is_where_it_should_be():
    """Built by the installation, unless that says why not; DISA_FAST_REQUIRE_NATIVE=1, which CI sets, makes a failure an error."""
    package = Path(disa_fast.__file__).parent
    assert backends.cpu.is_built() != (package / "not_built.txt").exists()
    if os.environ.get("DISA_FAST_REQUIRE_NATIVE") == "1":
        assert backends.cpu.is_built()


def test_kernels_are_part_of_the_package():
    """They lie outside disa_fast/ and are mapped in; the link there is for imports from a checkout."""
    package, suffixes = Path(disa_fast.__file__).parent / "kernels", (".py", ".json", ".cu", ".cuh", ".h")
    sources = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*") if path.suffix in suffixes}
    assert {path.relative_to(package) for path in package.rglob("*") if path.suffix in suffixes} == sources
    assert (ROOT / "disa_fast" / "kernels").resolve() == ROOT / "kernels"


def test_public_names():
    assert all(hasattr(disa_fast, name) for name in disa_fast.__all__)


def test_numbers_in_the_readme_are_the_committed_results():
    """Those of the demo, those of the performance section, and with them what lies in docs/benchmarks."""
    for name in ("demo", "demo_flowar", "demo_xar", "demo_harmon"):
        assert table(json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["rows"]) in README
    found = report.read(ROOT)
    assert found.one_of_each_system.keys() >= {"MAR-B", "FlowAR-S", "xAR-B"}
    assert len(found.one_of_each_system) == len(report.SYSTEMS)
    assert {2, 8, 14, 32, 512, 2048} <= {step["rows"] for step in found.steps[report.SHOWN]}
    assert report.disagreements(ROOT) == ""


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:bench|csrc|docs|kernels|tests|disa_fast)/[\w./-]+\w", README))))
def test_paths_in_the_readme_exist(path):
    assert (ROOT / path).exists()


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)\b", README))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_python_in_the_readme_compiles_and_its_names_exist():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        names = re.findall(r"\bdisa_fast\.([\w.]+)", block)
        assert names
        for name in names:
            operator.attrgetter(name)(disa_fast)
