"""Every shipped kernel compiled for GPUs that are not there, in processes of their own, since this one interprets."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from disa_fast.backends import cuda, triton
from disa_fast.kernels.triton import tiles

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not triton.is_installed(), reason="Triton is not installed")


def compiler(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_all_compile_and_none_spills(tmp_path):
    """For one width; .ci/run runs `make kernels`, which is all of them."""
    done = compiler("-m", "bench.compile_kernels", "--only", "triton", "--widths", "1280", "--json", str(tmp_path / "kernels.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    compiled = json.loads((tmp_path / "kernels.json").read_text())
    assert all(kernel["stack"] == 0 and kernel["reg"] <= 255 for kernel in compiled)
    for architecture in ("sm_80", "sm_90", "sm_100"):
        for dtype, by_class in tiles.HEURISTIC.items():
            for rows, chosen in by_class.items():
                names = [
                    kernel["kernel"]
                    for kernel in compiled
                    if (kernel["architecture"], kernel["dtype"], kernel.get("rows")) == (architecture, dtype, min(rows, 2048))
                ]
                first = ["adaln_linear_kernel"] if chosen.fused else ["adaln_kernel", "linear_kernel"]
                assert {
                    "input_projection_kernel",
                    *first,
                    "gated_residual_kernel",
                    "final_layer_kernel",
                    "sampler_step_kernel",
                } <= set(names)
            of_blocks = [k for k in compiled if (k["architecture"], k["dtype"], k.get("head_dim")) == (architecture, dtype, 80)]
            # The sum with a gate, modulated and by a weight, the sum without one, no sum, and that of the condition; q, k and v,
            # q, k and v; a number of hidden units that 16 divides, and another; steps guided, not, and not beside such as are,
            # noisy or not.
            assert Counter(k["kernel"] for k in of_blocks) == {
                "residual_norm_kernel": 5,
                "rotate_heads_kernel": 3,
                "gelu_gate_kernel": 2,
                "flow_step_kernel": 6,
            }


PROBE = """
import json
from bench.compile_kernels import *
large = tiles.Tile(128, 256, 64, 4, 3)
chosen = dataclasses.replace(tiles.HEURISTIC["bfloat16"][tiles.FEW], {change})
print(json.dumps(compile_case(Case("sm_90", "bfloat16", 1280, 16, chosen))))
"""


def test_a_spill_would_be_seen():
    done = compiler("-W", "ignore", "-c", PROBE.format(change="second=large"))
    kernels = {kernel["kernel"]: kernel for kernel in json.loads(done.stdout)}
    assert kernels["gated_residual_kernel"]["stack"] > 0
    assert kernels["adaln_linear_kernel"]["stack"] == 0


def test_dependent_launch_is_in_the_code():
    """Every kernel waits for the one before it, once, if told to, and otherwise never; before that it reads nothing, and those that
    have weights prefetch."""
    for pdl in (True, False):
        done = compiler("-W", "ignore", "-c", PROBE.format(change=f"pdl={pdl}, prefetch={pdl}"))
        kernels = json.loads(done.stdout)
        assert len(kernels) == 7
        assert all((kernel["waits"], kernel["early"]) == (int(pdl), 0) for kernel in kernels)
        assert all((kernel["prefetches"] > 0) is pdl for kernel in kernels)


CHAINED = """
from disa_fast.kernels.triton import common
common.add_product._unsafe_update_src(common.add_product.src.replace(
    "tl.fma(tl.dot(x, weight, input_precision=PRECISION), 1.0, sums)", "sums + tl.dot(x, weight, input_precision=PRECISION)"))
"""


@pytest.mark.parametrize("before", ["", pytest.param(CHAINED, marks=pytest.mark.slow)], ids=["as it is", "by +"])
def test_the_compiler_makes_no_chain_of_float32_products(before):
    """It turns `sums + dot` into a dot that begins with sums, which the interpreter does not do."""
    probe = PROBE.replace("chosen =", before + "chosen =").replace("bfloat16", "float32").format(change="")
    kernels = {kernel["kernel"]: kernel for kernel in json.loads(compiler("-W", "ignore", "-c", probe).stdout)}
    for name in ("adaln_linear_kernel", "gated_residual_kernel", "linear_kernel"):
        assert kernels[name]["chains"] == int(bool(before))


CUDA_PROBE = """
import json
from bench.compile_kernels import *
print(json.dumps(compile_cuda("nvcc", Path({source!r}), ("sm_90a",))))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernels_keep_to_their_budget_and_a_spill_would_be_seen(tmp_path):
    """On Hopper; `make kernels` takes all architectures, and NVRTC too."""
    shutil.copytree(ROOT / "kernels" / "cuda", tmp_path / "cuda")
    source = tmp_path / "cuda" / "mlp_denoise.cu"
    kernels = json.loads(compiler("-W", "ignore", "-c", CUDA_PROBE.format(source=str(source))).stdout)
    assert {kernel["kernel"] for kernel in kernels} >= set(cuda.ENTRIES)
    assert not any(kernel["over"] for kernel in kernels)
    source.write_text(source.read_text().replace("::kThreads, 1)", "::kThreads, 2)"))
    kernels = json.loads(compiler("-W", "ignore", "-c", CUDA_PROBE.format(source=str(source))).stdout)
    assert {"mlp_denoise_1536"} <= {kernel["kernel"] for kernel in kernels if "stack" in kernel["over"]}
