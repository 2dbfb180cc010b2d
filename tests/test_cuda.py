"""The persistent CUDA kernel on the processor (host_gpu.py): its sources, its packing, its plan, and the choice of it."""

import ctypes
import functools
import json
import os
import re
import shutil
import types
from pathlib import Path

import host_gpu
import numpy as np
import pytest
import torch
from compare import assert_as_good_as, assert_close
from host_gpu import CPU, ROOT, HostGpu
from random_parameters import random_parameters
from recorded import golden

from disa_fast import MLPHead, Philox, UnsupportedError, backends, explain, graphs, jit, solvers
from disa_fast.backends import cuda, cuda_check, triton
from disa_fast.heads.mlp import MLPSpec

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        host_gpu.compiler() is None and os.environ.get("DISA_FAST_REQUIRE_NATIVE") != "1", reason="needs a C++20 compiler"
    ),
]


@pytest.fixture
def host(monkeypatch) -> HostGpu:
    gpu = HostGpu()
    host_gpu.use(monkeypatch, gpu)
    return gpu


def low_head(spec: MLPSpec, dtype: torch.dtype, **factors: float) -> MLPHead:
    """factors: of parameters, whose names have _ for a dot."""
    p = random_parameters(spec, 0)
    return MLPHead.from_state_dict({name: (t * factors.get(name.replace(".", "_"), 1)).to(dtype) for name, t in p.items()})


def bfloat16_head(spec: MLPSpec) -> MLPHead:
    return low_head(spec, torch.bfloat16)


def call(head: MLPHead, rows: int, table: solvers.StepTable, cfg: float = 3.0) -> dict:
    n = rows // 2 if cfg != 1 else rows
    channels = head.spec.in_channels
    step_noise = torch.randn(len(table), n, channels) if table.draws else None
    z = torch.randn(rows, head.spec.z_channels).to(head.dtype)
    return {"z": z, "table": table, "cfg": cfg, "noise": torch.randn(n, channels), "step_noise": step_noise}


def run(head: MLPHead, settings: dict, **how) -> torch.Tensor:
    return head.denoise(**settings, **{"backend": "cuda", **how})


def table_with_memory(steps: int) -> solvers.StepTable:
    """Of which every coefficient is something: c too, which none of the solvers needs."""
    t, half = np.linspace(900, 0, steps), np.full(steps, 0.5)
    return solvers.StepTable("memory", t, 1.5 * half, -half, 0.6 * half, -2 * half, half, np.arange(steps) % 2 == 0, True)


SMALL = MLPSpec(16, 64, 2, 32)

# Numbers ---------------------------------------------------------------------------------------------------------------


BFLOAT16, FLOAT16 = cuda.SUFFIXES


@pytest.mark.parametrize(
    ("rows", "cfg", "dtype"),
    [(12, 3.0, BFLOAT16), (12, 1.0, BFLOAT16), (50, 3.0, BFLOAT16), (64, 1.0, BFLOAT16), (12, 3.0, FLOAT16), (50, 1.0, FLOAT16)],
)
def test_is_as_good_as_eager(host, rows, cfg, dtype):
    recorded, table = golden("slim", "mar_head"), solvers.ddpm(4)
    sd = {name: tensor.to(dtype) for name, tensor in recorded.state_dict().items()}
    low, exact = MLPHead.from_state_dict(sd), MLPHead.from_state_dict({name: t.double() for name, t in sd.items()})
    z = recorded["z/r10"][torch.randint(0, 10, (rows,))].to(dtype)
    settings = {
        "table": table,
        "cfg": cfg,
        "noise": torch.randn(rows, 16),
        "step_noise": torch.randn(4, rows, 16),
        "temperature": 0.9,
    }
    ours, eager = (low.denoise(z, backend=name, **settings) for name in ("cuda", "reference"))
    truth = exact.denoise(z.double(), backend="reference", **settings)
    tame = truth.abs().amax(dim=1) < 8  # where a trajectory runs away its error is luck
    assert tame.sum() >= 0.6 * rows
    assert_as_good_as(ours[tame], eager[tame], truth[tame], dtype)


@pytest.mark.parametrize("table", [solvers.ddpm(1), solvers.ddpm(2), solvers.dpm_solver(2), table_with_memory(3)], ids=str)
@pytest.mark.parametrize(
    ("spec", "rows", "cfg", "dtype", "tolerance"),
    [
        (MLPSpec(5, 48, 1, 32), 6, 3.0, BFLOAT16, 5e-3),
        (MLPSpec(16, 128, 1, 32), 17, 1.0, BFLOAT16, 5e-3),
        (MLPSpec(5, 48, 1, 32), 6, 3.0, FLOAT16, 6e-4),
    ],
)
def test_every_phase(host, table, spec, rows, cfg, dtype, tolerance):
    """Steps without noise, few channels, a last tile that not every block has, several groups."""
    head = low_head(spec, dtype)
    assert cuda_check.first_wrong_phase(head, **call(head, rows, table, cfg), tolerance=tolerance) is None


def test_float16_holds_what_is_beyond_its_range(host, tmp_path, monkeypatch):
    """Hidden units of 1e5 and more are its largest number to the second product; without that they would end as NaN."""
    head = low_head(SMALL, FLOAT16, res_blocks_1_mlp_0_weight=1e5, res_blocks_1_mlp_2_weight=1e-3)
    settings = call(head, 4, solvers.ddpm(2))
    assert cuda_check.first_wrong_phase(head, **settings) is None
    held = run(head, settings)
    assert held.isfinite().all()
    host_gpu.use(monkeypatch, HostGpu(mutated(tmp_path, "return Number::held(", "return (")))
    assert run(head, settings).isnan().any()


@pytest.mark.parametrize("solver", [solvers.ddim, solvers.dpm_solver, functools.partial(solvers.ddpm, clip=None)])
def test_every_solver(host, solver):
    head = bfloat16_head(SMALL)
    settings = call(head, 10, solver(4), cfg=1.5)
    expected = head.denoise(**settings, backend="hoisted")
    assert_close(run(head, settings), expected, worst=5e-2 * float(expected.abs().max()))


def test_the_first_wrong_phase_is_named(host):
    head = bfloat16_head(SMALL)
    settings = call(head, 4, solvers.ddpm(2))
    w = head.packed("cuda", torch.bfloat16, cuda.Weights)
    second_of_block_1 = w.units[3 * 64 * 64 : 4 * 64 * 64]
    second_of_block_1 *= 1.5
    assert cuda_check.first_wrong_phase(head, **settings).startswith("step 0: h after block 1, relative error 0.")
    second_of_block_1 /= 1.5
    w.in_bias[3] += 1
    assert cuda_check.first_wrong_phase(head, **settings).startswith("step 0: h from the input layer")
    w.in_bias[3] -= 1
    w.out_bias[16] += 1
    assert cuda_check.first_wrong_phase(head, **settings, tolerance=5e-3).startswith("step 0: the tokens")


@pytest.mark.parametrize(("width", "dtype"), [*((width, BFLOAT16) for width in cuda.WIDTHS), (1024, FLOAT16)])
def test_published_widths(width, dtype, monkeypatch):
    """Their own entries, which keep rows in registers, by the check at first use."""
    monkeypatch.setattr(cuda, "SUFFIXES", {dtype: cuda.SUFFIXES[dtype]})
    monkeypatch.setattr(cuda_check, "CHECK_PATIENCE", 10 * cuda.PATIENCE)
    monkeypatch.setattr(cuda, "WIDTHS", (width,))
    monkeypatch.setattr(cuda_check, "OTHER_WIDTHS", ())
    gpu = HostGpu(multiprocessors=4, shared_bytes=227 << 10)
    assert cuda_check.is_wrong(gpu, CPU) is None
    assert gpu.entries == [f"mlp_denoise_{width}{cuda.SUFFIXES[dtype]}"]


# Bits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_row_does_not_depend_on_its_company(host, cfg, monkeypatch):
    """Nor on how the work is laid out: groups, blocks, and what of the weights stays in shared memory."""
    head, rows = bfloat16_head(SMALL), 36
    settings = call(head, rows, solvers.ddpm(2), cfg)
    n = len(settings["noise"])

    def part(some: list[int]) -> torch.Tensor:
        both = [*some, *(n + i for i in some)] if cfg != 1 else some
        few = {"z": settings["z"][both], "noise": settings["noise"][some], "step_noise": settings["step_noise"][:, some]}
        return run(head, settings | few)[: len(some)]

    together = part(list(range(n)))
    assert torch.equal(part(list(range(n))), together)
    for some in ([n - 1], [3, 0, n - 2, 1, 2]):
        assert torch.equal(part(some), together[some])
    for multiprocessors, shared_bytes in ((1, 40_000), (5, 25_000), (8, 200_000), (40, 24_000)):
        host_gpu.use(monkeypatch, HostGpu(multiprocessors=multiprocessors, shared_bytes=shared_bytes))
        assert torch.equal(part([3, 0, 5]), together[[3, 0, 5]])


def test_steps_in_several_launches_are_the_same(host, monkeypatch):
    head = bfloat16_head(MLPSpec(16, 32, 1, 32))
    settings = call(head, 6, solvers.dpm_solver(5)) | {"step_noise": None}
    noisy = call(head, 6, solvers.ddpm(5)) | {"step_noise": None}
    whole, drawn = run(head, settings), run(head, noisy, rng=Philox(3))
    assert len(host.entries) == 2
    monkeypatch.setattr(triton, "MODULATION_BYTES", 2 * 6 * head.spec.modulation_width * 2)
    assert torch.equal(run(head, settings), whole)
    assert torch.equal(run(head, noisy, rng=Philox(3)), drawn)
    assert len(host.entries) == 2 + 3 + 3


def test_replays_with_padding(host):
    """6 rows in a bucket of 8, captured as a Python function; the second call with other inputs."""
    head = bfloat16_head(SMALL)
    settings = [call(head, 6, solvers.ddpm(2)) for _ in range(2)]
    expected = [run(head, some) for some in settings]
    w = head.packed("cuda", torch.bfloat16, cuda.Weights)
    w.graphs = graphs.Graphs(CPU, capture=lambda loop: (loop, 0))
    for some, out in zip(settings, expected, strict=True):
        assert torch.equal(run(head, some), out)
    assert (w.graphs.captures, w.graphs.hits) == (1, 1)


# Philox ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [16, 5])
def test_draws_what_philox_draws(host, channels):
    head = bfloat16_head(MLPSpec(channels, 32, 1, 32))
    settings = call(head, 20, solvers.ddpm(3)) | {"step_noise": None}
    streams = torch.randint(-(2**63), 2**63 - 1, (10,))
    for philox in (Philox(2**64 - 5, streams), Philox(12345)):
        given = philox.normal(range(1, 4), 10, channels)
        ours = run(head, settings, rng=philox)
        assert_close(ours, run(head, settings | {"step_noise": given}), worst=1e-4 * float(ours.abs().max()))
        assert not torch.allclose(ours, run(head, settings | {"step_noise": given.flip(0)}), rtol=1e-2)
    alone = {"z": settings["z"][[4, 14]], "noise": settings["noise"][[4]]}
    ours = run(head, settings, rng=Philox(7, streams))
    assert torch.equal(run(head, settings | alone, rng=Philox(7, streams[[4]]))[0], ours[4])


def test_start_and_steps_from_one_seed(host):
    head = bfloat16_head(MLPSpec(16, 32, 1, 32))
    settings = call(head, 8, solvers.ddpm(3)) | {"step_noise": None, "noise": None}
    drawn = [run(head, settings, rng="philox", generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    other = run(head, settings, rng="philox", generator=torch.Generator().manual_seed(5))
    assert torch.equal(*drawn)
    assert not torch.allclose(drawn[0], other, rtol=1e-2)
    expected = head.denoise(**settings, rng="philox", generator=torch.Generator().manual_seed(4), backend="reference")
    assert_close(drawn[0], expected, worst=5e-2 * float(expected.abs().max()))


# When something is wrong -----------------------------------------------------------------------------------------------


def mutated(folder: Path, old: str, new: str) -> Path:
    """The kernels with a change, in a folder of their own, for any width alone, which compiles in less time."""
    kernels = folder / "kernels"
    shutil.copytree(ROOT / "kernels" / "cuda", kernels)
    entries = kernels / "mlp_denoise.cu"
    entries.write_text(re.sub(r"DISA_FAST_ENTRY\(mlp_denoise_\d.*\n", "", entries.read_text()))
    source = kernels / "mlp_denoise.cuh"
    assert source.read_text().count(old) == 1
    source.write_text(source.read_text().replace(old, new))
    return kernels


def test_gives_up_with_nan_where_a_block_never_runs(monkeypatch):
    gpu = HostGpu(missing=1)
    host_gpu.use(monkeypatch, gpu)
    monkeypatch.setattr(cuda, "PATIENCE", 100_000_000)
    head = bfloat16_head(MLPSpec(16, 32, 1, 32))
    assert run(head, call(head, 4, solvers.ddpm(2))).isnan().all()
    monkeypatch.setattr(cuda, "WIDTHS", ())
    assert "width 256 in torch.bfloat16, relative error nan" in cuda_check.is_wrong(gpu, CPU)


def test_the_call_after_one_that_gave_up_says_so(monkeypatch):
    """Once, whether launches are a graph's replays or not; what comes then is right again."""
    gpu = HostGpu()
    host_gpu.use(monkeypatch, gpu)
    monkeypatch.setattr(cuda, "PATIENCE", 300_000_000)
    head = bfloat16_head(MLPSpec(16, 32, 1, 32))
    settings = call(head, 4, solvers.ddpm(2))
    expected = run(head, settings)
    for graphed in (False, True):
        if graphed:
            w = head.packed("cuda", torch.bfloat16, cuda.Weights)
            w.graphs = graphs.Graphs(CPU, capture=lambda loop: (loop, 0))
            run(head, settings)
        gpu.missing = 1
        assert run(head, settings).isnan().all()
        gpu.missing = 0
        with pytest.raises(RuntimeError, match=r"an earlier call on this GPU gave up after 0\.3 s and returned NaN"):
            run(head, settings)
        assert torch.equal(run(head, settings), expected)
    assert w.graphs.hits == 2


def test_a_kernel_that_does_not_tell_of_it_would_be_seen(tmp_path, monkeypatch):
    gpu = HostGpu(mutated(tmp_path, "    if (thread == 0 && raised(gave_up())) tell_host(p.gave_up);\n", ""), missing=1)
    host_gpu.use(monkeypatch, gpu)
    monkeypatch.setattr(cuda, "PATIENCE", 100_000_000)
    head = bfloat16_head(MLPSpec(16, 32, 1, 32))
    assert run(head, call(head, 4, solvers.ddpm(2))).isnan().all()
    assert gpu.gave_up.item() == 0


@pytest.mark.parametrize("signed", [True, False])
def test_a_clock_that_goes_back_ends_nothing(signed, tmp_path, monkeypatch):
    """As an unsigned difference it would be longer than any patience."""
    comparison = "i64(nanoseconds() - *shared<u64>(kClockAt)) > i64(p.patience)"
    kernels = None if signed else mutated(tmp_path, comparison, comparison.replace("i64", "u64"))
    host_gpu.use(monkeypatch, HostGpu(kernels, slow=1, clock_goes_back=True))
    head = bfloat16_head(MLPSpec(16, 32, 1, 32))
    settings = call(head, 2, solvers.ddpm(1))
    assert run(head, settings).isfinite().all() == signed


MUTATIONS = {
    "a word is taken before it is there": ("return other == 0;", "return true;"),
    "a copy is not waited for": ("    wait_for_copies<0>();\n    for (step", "    for (step"),
    "a slot of the ring is not waited for": ("    wait_for_copy(barrier(use), use & p.ring ? 1 : 0);\n", ""),
    "a slot of the ring is waited for once": ("use & p.ring ? 1 : 0", "0"),
    "a slot of the ring is filled while it is read": ("use & p.ring ? 1 : 0);", "use & p.ring ? 1 : 0), stream(index + p.ring);"),
    "a tile has the weights of the one before": ("weights(index + 1)", "units[0]"),
    "shift is not waited for": ("      wait_for_copies<0>();\n      const float inverse", "      const float inverse"),
    "h has one buffer": ("int(exchange % 2)", "0"),
    "the gate is 1 % too large": ("h += gate[j] * (sum + bias[j]);", "h += 1.01f * gate[j] * (sum + bias[j]);"),
    "half of the sums is left out": ("for (int w = 0; w < kWarps; ++w) sum", "for (int w = 0; w < kWarps / 2; ++w) sum"),
    "the previous output is forgotten": ("      last = o;\n", ""),
    "guidance is turned round": ("cfg * (o - unconditional)", "cfg * (unconditional - o)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name, tmp_path, monkeypatch):
    """So what is tested here can fail. Little shared memory, so that weights stream; more warps than rows; and a late block."""
    kernels = mutated(tmp_path, *MUTATIONS[name])
    head = bfloat16_head(MLPSpec(16, 128, 1, 32))
    settings = call(head, 2, table_with_memory(3))
    how = {"shared_bytes": 22_000, "slow": 1}
    host_gpu.use(monkeypatch, HostGpu(**how))
    right = run(head, settings)
    assert_close(right, head.denoise(**settings, backend="hoisted"), worst=3e-2 * float(right.abs().max()))
    monkeypatch.setattr(cuda, "PATIENCE", 1_000_000_000)
    host_gpu.use(monkeypatch, HostGpu(kernels, **how))
    runs = (run(head, settings) for _ in range(3))  # on a busy machine the late block may once be in time
    assert any(not torch.allclose(one, right, rtol=1e-3, atol=1e-3 * float(right.abs().max())) for one in runs)


# Layout ----------------------------------------------------------------------------------------------------------------


def test_the_structure_is_the_kernels():
    assert [getattr(cuda.Call, name).offset for name, _ in cuda.Call._fields_] + [ctypes.sizeof(cuda.Call)] == host_gpu.offsets()


def plan(width, depth, rows, multiprocessors=132, kilobytes=227, guided=True):
    n = rows // 2 if guided else rows
    return cuda._plan_for(width, depth, n, 1 + guided, multiprocessors, kilobytes << 10, 16)


def test_plans_for_an_h100():
    """As few groups as possible, no more blocks than make a step shorter, and the output layer stays if anything does."""
    found = plan(1024, 6, 8)
    assert (found.groups, found.blocks, found.out_resident, found.ring) == (1, 128, 1, 2)
    assert found.resident >= 5
    assert [plan(1280, 8, rows).groups for rows in (2, 16, 18, 32, 34, 64)] == [1, 1, 2, 2, 3, 4]
    assert [plan(1280, 8, rows, guided=False).groups for rows in (1, 16, 17, 64)] == [1, 1, 2, 4]
    assert plan(64, 1, 8).ring == 0
    for width, depth, by_rows in (
        (1024, 6, {8: (1, 128), 32: (2, 64), 48: (3, 43), 64: (4, 32)}),
        (1280, 8, {8: (1, 80), 32: (2, 54), 48: (3, 40), 64: (4, 32)}),
        (1536, 12, {8: (1, 96), 32: (2, 64), 48: (3, 39), 64: (4, 32)}),
    ):
        for rows, grid in by_rows.items():
            found = plan(width, depth, rows)
            assert (found.groups, found.blocks) == grid


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("multiprocessors", [1, 14, 108, 132, 148])
@pytest.mark.parametrize(("width", "depth"), [(1024, 6), (1280, 8), (1536, 12), (16, 1), (272, 3)])
def test_plans_fit(width, depth, multiprocessors, kilobytes):
    for rows in range(2, 66, 2):
        found = plan(width, depth, rows, multiprocessors, kilobytes)
        if found is None:  # two tiles in a pass need two units of weights, 48 KiB at this width
            assert multiprocessors < 100 or ((width, kilobytes) == (1536, 99) and rows > 40)
            continue
        assert found.grid <= multiprocessors
        assert found.shared_bytes <= kilobytes << 10
        assert -(-(rows // 2) // found.groups) * 2 <= cuda.GROUP_ROWS
        own_tiles = -(-(width // 8) // found.blocks)
        own = 2 * depth * own_tiles
        assert found.blocks == 1 or (found.blocks - 1) * own_tiles < width // 8  # none without work
        assert found.resident == own if found.ring == 0 else found.resident < own and found.ring <= cuda.MAX_RING
        assert all(at % 16 == 0 for at in (found.activations_at, found.own_at, found.units_at))


# Choice ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "dtype", "rows", "reason"),
    [
        (SMALL, torch.float32, 8, "computes in bfloat16 or float16, not in torch.float32"),
        (SMALL, torch.bfloat16, 66, "serves up to 64 rows, not 66"),
        (MLPSpec(17, 64, 2, 32), torch.bfloat16, 8, "tokens of up to 16 channels, not 17"),
        (MLPSpec(16, 72, 2, 32), torch.bfloat16, 8, "multiples of 16, not 72"),
        (MLPSpec(16, 16384, 2, 32), torch.bfloat16, 8, "width 16384 and 8 rows do not fit 4 multiprocessors with 58 KiB"),
        (SMALL, torch.bfloat16, 64, None),
        (SMALL, torch.float16, 64, None),
    ],
)
def test_refuses(host, spec, dtype, rows, reason):
    answer = cuda.refuses(spec, dtype, CPU, rows)
    assert answer is None if reason is None else reason in answer


def test_a_machine_without_a_gpu():
    if not torch.cuda.is_available():
        assert "torch sees none" in cuda.refuses(SMALL, torch.bfloat16, torch.device("cuda"), 8)
    assert cuda.refuses(SMALL, torch.bfloat16, CPU, 8) == "runs on NVIDIA GPUs, not on cpu"
    with pytest.raises(UnsupportedError, match="'cuda' cannot serve this call: runs on NVIDIA GPUs, not on cpu"):
        bfloat16_head(SMALL).denoise(torch.zeros(2, 32).bfloat16(), solvers.ddpm(2), backend="cuda")


def test_auto_switches_at_the_crossover(host, monkeypatch, tmp_path):
    def first(rows):
        return next(iter(backends.survey(SMALL, torch.bfloat16, torch.device("cuda"), rows)))

    assert first(cuda.FASTEST_UP_TO) == "cuda"
    assert first(cuda.FASTEST_UP_TO + 1) == "triton"
    (tmp_path / "crossover.json").write_text(json.dumps({"": {"64": 12}}))
    monkeypatch.setattr(cuda, "CROSSOVER", tmp_path / "crossover.json")
    cuda._crossover.cache_clear()
    try:
        assert [first(rows) for rows in (12, 13)] == ["cuda", "triton"]
    finally:
        cuda._crossover.cache_clear()
    assert next(iter(backends.survey(SMALL, torch.bfloat16, CPU, 8))) == "cpu"


def test_explain_names_it(host, capsys):
    facts = explain(bfloat16_head(SMALL))
    assert "one persistent CUDA kernel" in facts["why"]["cuda"]
    assert "cuda: one persistent CUDA kernel" in capsys.readouterr().out


def test_neither_compiled_before_nor_now(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "PREBUILT", tmp_path / "none.fatbin")
    monkeypatch.setattr(cuda, "_C", types.SimpleNamespace())
    monkeypatch.setattr(jit, "why_not", lambda: "CuPy cannot be imported")
    with pytest.raises(
        RuntimeError, match=r"not compiled with the package \(.*\), and NVRTC cannot compile it now: CuPy cannot be imported"
    ):
        cuda.NvidiaGpu(torch.device("cuda", 0))
