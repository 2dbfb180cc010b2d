# make demo, make test: both make their own virtual environment in .venv and need only python3 (3.10 or newer, with venv).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
PEERS := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt onnx onnxruntime onnxscript openvino
NATIVE := CMakeLists.txt $(shell find csrc -type f)
SOURCES := pyproject.toml setup.py constraints.txt $(NATIVE) $(shell find disa_fast kernels -type f -not -path '*/__pycache__/*')
CXX_FILES := $(shell find bench csrc kernels tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-slow lint format sanitize kernels bench bench-baseline bench-check bench-quick bench-proof bench-report soak fuzz gpu-report wheel clean

demo: $(INSTALLED)
	$(BIN)/disa-fast demo

test: $(INSTALLED)
	$(BIN)/pytest

# What takes long and fails seldom, such as what inductor compiles: CI runs it, make test does not.
test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The CPU core, and the CUDA kernel on threads of this machine, under AddressSanitizer and UndefinedBehaviorSanitizer, and under
# ThreadSanitizer; then the CUDA kernel without each of its barriers, which must show.
sanitize: $(INSTALLED)
	for kind in address,undefined thread; do \
		cmake -S . -B build/$$kind -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDISA_FAST_PYTHON=OFF -DDISA_FAST_TESTS=ON \
			-DDISA_FAST_SANITIZE=$$kind && cmake --build build/$$kind || exit 1; \
		for test in mlp_denoise_test mlp_denoise_cuda_test_4 mlp_denoise_cuda_test_8; do build/$$kind/$$test || exit 1; done; \
	done
	sh tests/host_cuda/every_sync.sh build/thread/mlp_denoise_cuda_test_4

# Every kernel that ships, compiled for three GPU architectures, none of which need be there; CUDA's by nvcc, where it is, and NVRTC.
kernels: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt cupy-cuda13x nvidia-cuda-nvrtc
	$(BIN)/pytest tests/test_jit.py
	$(BIN)/python -m bench.compile_kernels

# For a machine with a GPU, whose own python3 has torch and Triton; downloads nothing. The long form of bench/gpu_first.py.
gpu-report:
	$(PYTHON) -m bench.gpu_first --long --build --minutes 120 --out bench/results/gpu

# Writes bench/results/heads.json and images.json in three quarters of an hour; look at the ratios, not at another machine's times.
# Both at the end, so that the commit that they name is not one with changes.
bench: $(INSTALLED)
	-$(PEERS)
	mkdir -p build
	$(BIN)/pytest bench/bench_heads.py --benchmark-only --benchmark-json=build/heads.json
	$(BIN)/pytest bench/bench_images.py --benchmark-only --benchmark-json=build/images.json
	mv build/heads.json build/images.json bench/results

# How much faster than the eager loop this package is on this class of machine, on record; and whether it still is. The last writes
# the record that this catches what it should and nothing else. See bench/regression.py.
bench-baseline: $(INSTALLED)
	$(BIN)/python -m bench.regression baseline
bench-check: $(INSTALLED)
	$(BIN)/python -m bench.regression check $(if $(AGAINST),--against $(AGAINST))
bench-quick: $(INSTALLED)
	-$(PEERS)
	$(BIN)/pytest tests/test_exported.py
	$(BIN)/python -m bench.regression check --quick
bench-proof: $(INSTALLED)
	$(BIN)/python -m bench.regression prove

# README's performance section, docs/benchmarks/index.html and the pictures, all from the committed results.
bench-report: $(INSTALLED)
	$(BIN)/python -m bench.report

# A hundred thousand calls, and ten thousand malformed ones; a small share of both is among the tests.
soak: $(INSTALLED)
	$(BIN)/python -m bench.soak --calls 100000 --json bench/results/soak.json
fuzz: $(INSTALLED)
	$(BIN)/pytest tests/test_fuzz.py --hypothesis-profile=fuzz
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	$(BIN)/python tests/fuzz_checkpoint.py -atheris_runs=10000

# A wheel for this Python and Linux x86-64, in dist/; it serves the systems whose C library is not older than this one's.
wheel: $(INSTALLED)
	rm -rf dist build
	DISA_FAST_REQUIRE_NATIVE=1 $(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	auditwheel repair --wheel-dir dist build/wheel/*.whl

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt '.[demo,test,lint,native,bench]'
	rm -f disa_fast/_C*.so  # what python -m runs from this folder has the C++ core too
	find $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('platlib'))")/disa_fast -name '_C*.so' -exec ln -s {} disa_fast \;
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info disa_fast/_C*.so
