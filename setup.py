"""What pyproject.toml cannot say: the native core is built by CMake, and its absence is not an error.

Without a C++ compiler the package installs as pure Python, and `disa_fast.explain` tells the reason, which is left beside the
code in not_built.txt. DISA_FAST_REQUIRE_NATIVE=1 makes a failure to build an error. The CUDA kernels are compiled where there is
nvcc, unless DISA_FAST_CUDA=0, and otherwise no_fatbin.txt has the reason; that is never an error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def run(self) -> None:
        target = Path(self.get_ext_fullpath("disa_fast._C")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        why_not = target.parent / "not_built.txt"
        why_no_fatbin = target.parent / "no_fatbin.txt"
        for stale in (target, why_not, target.parent / "mlp_denoise.fatbin", why_no_fatbin):
            stale.unlink(missing_ok=True)
        try:
            self.cmake(target)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stdout", None) or str(error)
            if os.environ.get("DISA_FAST_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"disa_fast: the native core could not be built:\n{output}") from None
            self.warn(f"the native core could not be built; going on without it:\n{output}")
            why_not.write_text(output)
        if why_no_fatbin.exists():
            self.warn(f"the CUDA kernels were not compiled; going on without them:\n{why_no_fatbin.read_text()}")

    def cmake(self, target: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        shutil.rmtree(build, ignore_errors=True)  # another compiler, or another environment's pybind11, may have left it
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPYTHON_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}"]
        for command in (configure, ["cmake", "--build", build]):
            subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


setup(ext_modules=[Extension("disa_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
