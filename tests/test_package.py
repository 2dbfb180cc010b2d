"""The package as installed, and the promises of README.md that can be checked."""

import json
import operator
import re
import subprocess
import sys
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest

import disa_fast
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
    assert set(weights) == {
        f"{what}_fashion_mnist.{suffix}" for what in ("mar", "classifier") for suffix in ("safetensors", "json")
    }
    assert sum(weights.values()) < 6e6
    assert metadata("disa-fast")["License-Expression"] == "MIT"
    assert any(script.name == "disa-fast" for script in entry_points(group="console_scripts"))


def test_public_names():
    assert all(hasattr(disa_fast, name) for name in disa_fast.__all__)


def test_numbers_in_the_readme_are_the_committed_results():
    results = ROOT / "bench" / "results"
    assert table(json.loads((results / "demo.json").read_text())["rows"]) in README
    ratios = [run["extra_info"] for run in json.loads((results / "mlp_head.json").read_text())["benchmarks"]]
    ratios = [info for info in ratios if "ratio" in info]
    assert len(ratios) == 4
    for info in ratios:
        low, high = info["quartiles"]
        assert f"| {info['rows']} | {info['ratio']:.2f}x | {low:.2f} to {high:.2f} |" in README


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:bench|docs|tests|disa_fast)/[\w./-]+\w", README))))
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
