"""The C++ core. That it computes what was recorded is in test_mlp_head.py and test_mar.py, which run every backend."""

import functools
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from compare import assert_as_good_as
from random_parameters import random_parameters
from recorded import golden

import disa_fast
from disa_fast import MLPHead, UnsupportedError, backends, solvers
from disa_fast.backends import cpu
from disa_fast.heads.mlp import MLPSpec

ISAS = ["avx512", "avx2", "portable"]
SOLVERS = {
    "ddpm": solvers.ddpm,
    "ddim": solvers.ddim,
    "dpm_solver": solvers.dpm_solver,
    "dpm_solver++": functools.partial(solvers.dpm_solver, plus_plus=True),
}
Z_CHANNELS = 39
native = pytest.mark.native


@functools.lru_cache(2)
def random_head(width: int, depth: int) -> MLPHead:
    """With outputs of the size that a trained head has."""
    sd = random_parameters(MLPSpec(16, width, depth, Z_CHANNELS), seed=width)
    sd["final_layer.linear.weight"] *= 0.3
    return MLPHead.from_state_dict(sd)


class Call:
    """A call of `steps` steps and all its inputs. `rows` of a guided call are both halves, conditional first."""

    def __init__(self, head: MLPHead, rows: int, steps: int, cfg: float, solver: str = "ddpm") -> None:
        self.head, self.table, self.cfg = head, SOLVERS[solver](steps), cfg
        self.trajectories = rows // 2 if cfg != 1 else rows
        self.z = torch.randn(rows, head.spec.z_channels)
        self.noise = torch.randn(self.trajectories, 16)
        self.step_noise = torch.randn(len(self.table), self.trajectories, 16)

    def __call__(self, backend: str = "cpu", dtype: torch.dtype = torch.float32, only: list[int] | None = None) -> torch.Tensor:
        """The trajectories of the call, or of a smaller one: those that `only` counts up."""
        only = list(range(self.trajectories)) if only is None else only
        rows = only if self.cfg == 1 else only + [self.trajectories + i for i in only]
        draws = {"noise": self.noise[only], "step_noise": self.step_noise[:, only]}
        z = self.z[rows].to(torch.promote_types(dtype, torch.float32))
        return self.head.denoise(z, self.table, self.cfg, backend=backend, dtype=dtype, **draws)[: len(only)]


def force(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    if isa not in cpu._C.isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("DISA_FAST_CPU_ISA", isa)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Precision and invariance ---------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(("width", "depth"), [(64, 3), (192, 2), (1000, 1), (1001, 1), (1024, 2), (1280, 1), (1536, 1)])
def test_ragged_sizes(width, depth, cfg, dtype):
    """As good as eager at the most rows; at every other number of rows the same bits as there."""
    call = Call(random_head(width, depth), 514 if cfg != 1 else 257, 3, cfg)
    whole = call(dtype=dtype)
    assert_as_good_as(whole, call("reference", dtype), call("reference", torch.float64), dtype)
    for count in (1, 2, 3, 7, 8, 9, 14, 15, 17, 63, 65):
        some = torch.randperm(call.trajectories)[:count].tolist()
        assert torch.equal(call(dtype=dtype, only=some), whole[some]), f"{count} trajectories"


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 3, 9, 50])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_and_number_of_steps(solver, steps, cfg, dtype):
    """On a fitted head, for trajectories that converge."""
    recorded = golden("slim", "mar_head")
    call = Call(MLPHead.from_state_dict(recorded.state_dict()), 400, steps, cfg, solver)
    call.z = recorded["z/r10"][torch.randint(0, 10, (400,))]
    assert_as_good_as(call(dtype=dtype), call("reference", dtype), call("reference", torch.float64), dtype)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, dtype, monkeypatch):
    call = Call(random_head(192, 2), 130, 5, 3.0)
    eager, exact = call("reference", dtype), call("reference", torch.float64)
    force(monkeypatch, isa)
    whole = call(dtype=dtype)
    assert_as_good_as(whole, eager, exact, dtype)
    for count in range(1, 16):
        assert torch.equal(call(dtype=dtype, only=list(range(count))), whole[:count]), f"{count} trajectories"


@native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(isa, dtype, monkeypatch, threads):
    force(monkeypatch, isa)
    call = Call(random_head(1000, 1), 66, 4, 2.0)

    def run(count: int) -> torch.Tensor:
        threads(count)
        call.head.refresh()  # the time table is made anew too
        return call(dtype=dtype)

    alone = run(1)
    for count in (2, 3, 5):
        assert torch.equal(run(count), alone), f"{count} threads"


@native
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_bits_do_not_depend_on_chunks(cfg):
    """So many rows that not all walk through the steps together, nor have several steps' modulation made at once."""
    call = Call(random_head(1024, 6), 900, 2, cfg)
    whole = call()
    some = [0, 149, 150, call.trajectories // 2, call.trajectories - 1]
    assert torch.equal(call(only=some), whole[some])


@native
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_same_call_twice(cfg):
    call = Call(random_head(192, 2), 18, 5, cfg)
    assert torch.equal(call(), call())


@native
def test_inputs_of_any_stride():
    call = Call(random_head(192, 2), 6, 4, 3.0)
    expected = call()
    call.z = call.z.repeat_interleave(2, dim=1)[:, ::2]
    call.noise = call.noise.T.contiguous().T
    call.step_noise = call.step_noise.flip(0).flip(0).transpose(0, 2).contiguous().transpose(0, 2)
    out = call.head.denoise(call.z, call.table, 3.0, noise=call.noise, step_noise=call.step_noise, backend="cpu")
    assert torch.equal(out[:3], expected)


@native
def test_parameters_of_any_stride():
    call = Call(random_head(192, 2), 6, 4, 3.0)
    expected = call()
    sd = {name: p.detach().mT.contiguous().mT if p.ndim == 2 else p.detach() for name, p in call.head._net.named_parameters()}
    call.head = MLPHead.from_state_dict(sd)
    assert torch.equal(call(), expected)


@native
def test_packed_weights_go_with_the_last_reference():
    """At once, and not when the garbage collector comes by: they may be hundreds of megabytes."""
    call = Call(random_head(64, 3), 2, 2, 1.0)
    call()
    packed = [weakref.ref(w) for w in call.head._packed.values() if isinstance(w, cpu.Weights)]
    assert packed
    gc.disable()
    try:
        call.head.refresh()
        assert not any(ref() for ref in packed)
    finally:
        gc.enable()


@native
def test_does_not_grow_with_calls():
    call = Call(random_head(64, 1), 2, 2, 1.0)
    call.head.refresh()
    for steps in range(1, 301):
        call.head.denoise(call.z, solvers.dpm_solver(steps), noise=call.noise, backend="cpu")
    (packed,) = call.head._packed.values()
    assert packed.time_table.cache_info().currsize == 256


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(bad):
    call = Call(random_head(192, 2), 18, 4, 3.0)
    expected = call()
    call.z[2, 5] = bad
    out, reference = call(), call("reference")
    assert torch.equal(out.isfinite(), reference.isfinite())
    assert not out[2].isfinite().any()
    others = [i for i in range(9) if i != 2]
    assert torch.equal(out[others], expected[others])


@native
def test_inputs_are_not_written_to():
    call = Call(random_head(192, 2), 6, 4, 3.0)
    z, noise, step_noise = call.z.clone(), call.noise.clone(), call.step_noise.clone()
    call()
    assert torch.equal(call.z, z)
    assert torch.equal(call.noise, noise)
    assert torch.equal(call.step_noise, step_noise)


@native
@pytest.mark.parametrize("shape", [(16, 1, 1), (1, 33, 2), (20, 64, 1), (7, 31, 1), (16, 64, 0)])
def test_odd_heads(shape):
    """State channels that do not fill a panel, or fill more than one; widths below a panel."""
    channels, width, depth = shape
    torch.manual_seed(1)
    shapes = MLPSpec(channels, width, depth, 5).shapes()
    sd = {name: torch.randn(shape) * 0.3 * shape[-1] ** -0.5 for name, shape in shapes.items()}
    head = MLPHead.from_state_dict(sd)
    z, table = torch.randn(80, 5), solvers.ddpm(3)
    draws = {"noise": torch.randn(40, channels), "step_noise": torch.randn(3, 40, channels)}
    ours, eager = (head.denoise(z, table, 1.5, backend=backend, **draws) for backend in ("cpu", "reference"))
    exact = head.denoise(z, table, 1.5, backend="reference", dtype=torch.float64, **draws)
    assert_as_good_as(ours, eager, exact, torch.float32)


# Threads and processes ------------------------------------------------------------------------------------------------


@native
def test_several_threads_call_at_once(threads):
    threads(2)
    calls = [Call(random_head(192, 2), 2 * n, 5, 3.0) for n in (1, 4, 9, 30)]
    expected = [call() for call in calls]
    wrong = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(calls[i](), expected[i]))

    workers = [threading.Thread(target=work, args=(i % len(calls),)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.fixture
def run_script(tmp_path):
    """Runs Python in a process of its own, from a folder where only the installed package is found."""
    return lambda script: subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=tmp_path)


SETUP = """
import os, torch
from disa_fast import MLPHead, solvers, _C
from disa_fast.heads.mlp import MLPNet, MLPSpec
torch.set_num_threads(2)
head = MLPHead.from_module(MLPNet(MLPSpec(16, 256, 2, 8)))
run = lambda: head.denoise(z, solvers.ddim(5), noise=noise, backend="cpu")
z, noise = torch.ones(20, 8), torch.ones(20, 16)
expected = run()
"""


@native
def test_after_fork(run_script):
    """A child has none of its parent's threads, and makes its own; the parent goes on with his."""
    run_script(
        SETUP
        + """
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), expected) and len(os.listdir("/proc/self/task")) > 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(run(), expected)
"""
    )


@native
def test_threads_do_not_pile_up(run_script):
    run_script(
        SETUP
        + """
for count in [2, 3, 4] * 100 + list(range(2, 13)):
    torch.set_num_threads(count)
    assert torch.equal(run(), expected)
threads = len(os.listdir("/proc/self/task"))
assert threads < 120, threads
"""
    )


@native
def test_other_threads_go_on_during_a_call():
    """The GIL is released."""
    call, seen = Call(random_head(1024, 6), 64, 20, 1.0), []
    call()
    worker = threading.Thread(target=call)
    worker.start()
    while worker.is_alive():
        seen.append(None)
        worker.join(0.001)
    assert len(seen) > 3


# Choice and refusal ---------------------------------------------------------------------------------------------------


@native
def test_auto_takes_it_on_a_cpu(capsys):
    facts = disa_fast.explain(random_head(64, 1))
    assert facts["backend"] == "cpu"
    assert facts["why"]["cpu"].startswith(f"C++ kernels for {cpu.instruction_set()}, ")
    assert "weights stored in torch.float32" in capsys.readouterr().out


@pytest.mark.parametrize("own_bfloat16", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("width", "few"), [(64, 512), (255, 512), (256, 38), (511, 38), (512, 10), (768, 7), (1024, 4), (1280, 4), (1536, 4)]
)
def test_auto_leaves_many_rows_of_bfloat16_to_a_processor_that_multiplies_it(monkeypatch, own_bfloat16, dtype, width, few):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: own_bfloat16)
    monkeypatch.setattr(cpu, "is_built", lambda: True)
    spec = MLPSpec(16, width, 3, 64)

    def chosen(rows, **how):
        return backends.choose("auto", spec, dtype, torch.device("cpu"), rows, **how)

    many = "hoisted" if own_bfloat16 and dtype == torch.bfloat16 and width >= 256 else "cpu"
    assert [chosen(rows) for rows in (0, 1, few, few + 1, 512)] == ["cpu", "cpu", "cpu", many, many]
    assert list(backends.survey(spec, dtype, torch.device("cpu"), 512)) == [
        *(("hoisted", "cpu") if many == "hoisted" else ("cpu", "hoisted")), "reference", "triton", "cuda",
    ]  # fmt: skip
    assert chosen(512, batch_invariant=True) == "cpu"
    monkeypatch.setattr(cpu, "is_built", lambda: False)
    monkeypatch.setattr(cpu, "_why_not_built", lambda: "no compiler")
    assert [chosen(rows) for rows in (1, 512)] == ["hoisted", "hoisted"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"_is_avx512_bf16_supported": True, "_is_amx_tile_supported": False}, True),
        ({"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": True}, True),
        ({"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": False}, False),
        ({"_is_amx_tile_supported": True}, True),
        ({}, False),
    ],
)
def test_what_the_processor_multiplies_is_asked_of_pytorch(monkeypatch, answers, expected):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert cpu.multiplies_bfloat16() == (expected and torch.backends.mkldnn.is_available())


@native
def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("DISA_FAST_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"DISA_FAST_CPU_ISA: expected one of \[.*'portable'\] on this processor, got 'sse9'"):
        Call(random_head(64, 1), 2, 2, 1.0)()


@native
def test_float64_is_refused_by_name_and_served_by_another():
    call = Call(random_head(64, 1), 4, 2, 1.0)
    with pytest.raises(UnsupportedError, match=r"'cpu' cannot serve this call: computes in float32, not in torch\.float64"):
        call(dtype=torch.float64)
    assert call("auto", torch.float64).dtype == torch.float64


@native
def test_another_device_is_refused():
    assert cpu.refuses(random_head(64, 1).spec, torch.float32, torch.device("cuda"), 2) == "runs on CPUs, not on cuda"


def test_an_installation_without_it(monkeypatch):
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_IMPORT_ERROR", "no such module", raising=False)
    call = Call(random_head(64, 1), 4, 2, 1.0)
    with pytest.raises(UnsupportedError, match=r"not part of this installation \(.+\); install a C\+\+ compiler"):
        call()
    assert call("auto").shape == (4, 16)
    assert disa_fast.explain(call.head)["backend"] == "hoisted"
