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

import disa_fast
from disa_fast import backends
from disa_fast.demo.run import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTESTANTS = ["torch.compile", "hoisted", "float32", "bfloat16"]  # of bench/bench_cpu.py, in the order of the README's table
FLOW_CONTESTANTS = ["torch.compile", "reference", "hoisted", "hoisted, bfloat16"]  # of bench/bench_flow.py, likewise


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
    results = ROOT / "bench" / "results"
    assert table(json.loads((results / "demo.json").read_text())["rows"]) in README
    infos = [run["extra_info"] for run in json.loads((results / "cpu.json").read_text())["benchmarks"]]
    steps = [info for info in infos if info["size"] == "MAR-L" and "steps" in info]
    assert [info["rows"] for info in steps] == [2, 8, 14, 32, 128, 512, 2048]
    for info in steps:
        over_eager = " | ".join(f"{info['results'][name]['over_eager']:.2f}x" for name in CONTESTANTS)
        floor = " and ".join(f"{info['results'][name]['of_floor']:.0%}".replace("%", " %") for name in CONTESTANTS[2:])
        assert f"| {info['rows']} | {over_eager} | {floor} |" in README
    image = next(info["results"] for info in infos if "seconds" in info.get("results", {}).get("eager", {}))
    assert " | ".join(f"{image[name]['over_eager']:.2f}x" for name in CONTESTANTS[1:]) in README
    for system in ("flowar", "xar", "harmon"):
        assert table(json.loads((results / f"demo_{system}.json").read_text())["rows"]) in README
    flows = [run["extra_info"] for run in json.loads((results / "flow.json").read_text())["benchmarks"]]
    assert {"FlowAR-L", "xAR-B"} <= {info["model"] for info in flows}
    for info in flows:
        shares = ", ".join(f"{100 * share:.0f} %" for share in info["shares"])
        over_eager = (info["results"].get(name, {}).get("over_eager") for name in FLOW_CONTESTANTS)
        cells = [info["model"], *("" if ratio is None else f"{ratio:.2f}x" for ratio in over_eager), shares]
        assert re.sub(" +", " ", f"| {' | '.join(cells)} |") in README


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
