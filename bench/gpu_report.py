"""`make gpu-report`: one command that says what this package does on the GPU of this machine, and against what.

Builds the package as it lies here (no downloads, nothing installed outside build/), runs the tests that need a GPU, then measures
(gpu_measure.py). Writes bench/results/<gpu>.json, again after every shape, and a plot. Stops when its minutes are over and says
what it left out. Without a GPU it says what it skips, and times a few calls on the CPU.

Needs a python3 with torch, and for the build pip, setuptools, CMake, ninja, pybind11 and a compiler; without those, plain Python.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu_report"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--skip-build", action="store_true", help="measure the disa_fast that this python3 imports")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the results; by default bench/results, and none without a GPU")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    if not options.skip_build:
        build()
    from bench import gpu_measure  # only now, since it imports what was built

    out = options.out or (ROOT / "bench" / "results" if gpu_measure.ON_GPU else None)
    tests = "skipped"
    if not gpu_measure.ON_GPU:
        print("no GPU: its tests are skipped, and so is every row of this report that is about one")
    elif not options.skip_tests:
        tests = run_tests(0.4 * 60 * options.minutes)
    report = gpu_measure.Report(deadline, out, tests)
    report.run()
    sys.exit(bool(report.failures) or tests.startswith("failed"))


def build() -> None:
    """Into build/gpu_report, from which this process then imports. Where that fails, the sources as they lie here serve."""
    print("building ...", flush=True)
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--upgrade"]
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(SITE), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"the build failed; going on with the sources as they lie here, without the native core:\n{done.stderr[-2000:]}")
        return
    sys.path.insert(0, str(SITE))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))


def run_tests(seconds: float) -> str:
    """What became of them, in a word or two, after everything they printed."""
    print("tests that need a GPU ...", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    try:  # from a folder without sources, which Python would take for what was built
        code = subprocess.run([*command, ROOT / "tests"], cwd=SITE if SITE.exists() else ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return "passed" if code == 0 else f"failed (pytest said {code})"


if __name__ == "__main__":
    main()
