import copy
import functools
import re
import threading

import numpy as np
import pytest
import test_gpu
import torch
from compare import assert_as_good_as, assert_close
from random_parameters import random_parameters
from recorded import BACKENDS_AND_DTYPES, golden, golden_cases

import disa_fast
from disa_fast import MLPHead, UnsupportedError, solvers
from disa_fast.backends import cpu, triton
from disa_fast.heads.mlp import MLPNet, MLPSpec, forward_ref

PLAIN = ["reference", "hoisted"]
CPU = pytest.param("cpu", marks=pytest.mark.native)
TRITON = pytest.param("triton", marks=pytest.mark.interpreter)
BACKENDS = [*PLAIN, CPU, TRITON]
ON_A_CPU = [
    "auto",
    *(["cpu"] if cpu.is_built() else []),
    "hoisted",
    "reference",
    *(["triton"] if triton.is_interpreted() else []),
]
TABLES = {
    "DiSA": solvers.ddpm,
    "default": functools.partial(solvers.ddpm, clip=None),
    "DDIM": solvers.ddim,
    "DPM_Solver": solvers.dpm_solver,
    "DPM_Solver++": functools.partial(solvers.dpm_solver, plus_plus=True),
}


def random_head(width=64, depth=3, z_channels=48, seed=0, dtype=torch.float32):
    sd = random_parameters(MLPSpec(16, width, depth, z_channels), seed)
    return MLPHead.from_state_dict({name: tensor.to(dtype) for name, tensor in sd.items()})


@pytest.fixture(scope="module")
def head():
    return random_head()


@pytest.fixture
def z():
    return torch.randn(6, 48, generator=torch.Generator().manual_seed(1))


# The recorded cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "stem", "evaluation"), golden_cases("mar_head", "mar_head_b", kind="evals"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_as_recorded(which, stem, evaluation, dtype):
    recorded, name = golden(which, stem), f"eval/{evaluation['name']}"
    x, t = recorded[f"{name}/x"].to(dtype), recorded[f"{name}/t"]
    z = recorded[f"z/r{evaluation['rows']}"].to(dtype)
    out = forward_ref(recorded.state_dict(dtype), x, t, z)
    if dtype == torch.float64:
        assert_close(out, recorded[f"{name}/out_f64"], worst=1e-12)
    else:
        assert_close(out, recorded[f"{name}/out_f32"], worst=1e-5)


def run_recorded(which, stem, case, dtype, backend, table=None):
    """(result, recorded truth) on the rows that matter."""
    recorded, name = golden(which, stem), f"case/{case['name']}"
    z = recorded[f"z/r{case['rows']}"].to(dtype)
    noise, step_noise = recorded[f"{name}/init_noise"].to(dtype), recorded.get(f"{name}/step_noise")
    cfg = torch.tensor([case["cfg"]], dtype=dtype) if case["cfg_is_tensor"] else case["cfg"]
    rows = case["rows"] // 2 if case["cfg"] != 1 else case["rows"]
    if case["sampler"].startswith("DPM") and case["cfg"] != 1:  # upstream ignores guidance here
        noise, cfg = torch.cat([noise, noise]), 1.0
    out = MLPHead.from_state_dict(recorded.state_dict(dtype)).denoise(
        z,
        TABLES[case["sampler"]](case["nominal"]) if table is None else table,
        cfg=cfg,
        temperature=case["temperature"],
        noise=noise,
        step_noise=None if step_noise is None else step_noise.to(dtype),
        backend=backend,
    )
    assert out.dtype == dtype
    suffix = "out_f64c" if dtype == torch.float64 else "out_f32"
    return out[:rows], recorded[f"{name}/{suffix}"][:rows]


@pytest.mark.parametrize(("which", "stem", "case"), golden_cases("mar_head", "mar_head_b"))
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_samples_as_recorded(which, stem, case, backend, dtype):
    out, truth = run_recorded(which, stem, case, dtype, backend)
    assert_close(out, truth, worst=1e-9 if dtype == torch.float64 else max(1e-5, 10 * case["f32_vs_f64"]))


def test_a_table_without_the_clip_fails_the_comparison():
    case = next(c for c in golden("slim", "mar_head").meta["cases"] if c["name"] == "disa_s31_r6_cfg1.0_t0.9")
    recorded = golden("slim", "mar_head")[f"case/{case['name']}/step_noise"]
    unclipped = solvers.ddpm(case["nominal"] - 1, clip=None)
    assert len(unclipped) == len(recorded)
    out, truth = run_recorded("slim", "mar_head", case, torch.float32, "hoisted", table=unclipped)
    with pytest.raises(AssertionError, match="worst element"):
        assert_close(out, truth, worst=max(1e-5, 10 * case["f32_vs_f64"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_every_column_of_a_table_counts(backend, cfg):
    """The update of StepTable's docstring, written out, on a table that uses all of it, the previous output too."""
    head, steps = random_head(dtype=torch.float64), 4
    dtype, worst = (torch.float64, 1e-11) if backend in PLAIN else (torch.float32, 1e-5)
    columns = np.random.default_rng(0).normal(size=(5, steps)) * 0.5
    table = solvers.StepTable("any", np.linspace(900, 3, steps), *columns, noisy=np.array([True, False, True, True]), draws=True)
    z = torch.randn(6, 48, dtype=torch.float64)
    noise, step_noise = torch.randn(6, 16, dtype=torch.float64), torch.randn(steps, 6, 16, dtype=torch.float64)
    out = head.denoise(z, table, cfg=cfg, temperature=0.7, noise=noise, step_noise=step_noise, backend=backend, dtype=dtype)

    n = 3 if cfg != 1 else 6
    x, before = noise[:n], torch.zeros(n, 16)
    for i in range(steps):
        network = head.network(torch.float64)
        eps, v = network(torch.cat([x, x])[:6], torch.full((6,), float(table.t[i])), z).chunk(2, dim=1)
        if cfg != 1:
            eps, v = eps[3:] + cfg * (eps[:3] - eps[3:]), v[:3]
        x = table.a[i] * x + table.b[i] * eps + table.c[i] * before
        if table.noisy[i]:
            x = x + torch.exp((table.l0[i] + table.l1[i] * v) / 2) * step_noise[i][:n] * 0.7
        before = eps
    assert_close(out[:n], x, worst=worst * float(x.abs().max()))


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(("rows", "calls"), [(2, 48), (60, 3)])
@pytest.mark.parametrize("backend", ["hoisted", CPU])
def test_is_as_good_as_eager(dtype, cfg, rows, calls, backend):
    """On a fitted head, and over enough draws that the two bounds compare precision rather than luck."""
    recorded, table = golden("slim", "mar_head"), solvers.ddpm(10)
    sd = {name: tensor.to(dtype) for name, tensor in recorded.state_dict().items()}
    low, exact = MLPHead.from_state_dict(sd), MLPHead.from_state_dict({name: t.double() for name, t in sd.items()})
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(calls):
        z = recorded["z/r10"][torch.randint(0, 10, (rows,), generator=generator)].to(dtype)
        noise, step_noise = (torch.randn(*lead, rows, 16, generator=generator) for lead in ((), (10,)))
        draws = {"cfg": cfg, "noise": noise, "step_noise": step_noise}
        ours, eager = (low.denoise(z, table, backend=name, **draws) for name in (backend, "reference"))
        results.append((ours, eager, exact.denoise(z.double(), table, backend="reference", **draws)))
    assert_as_good_as(*(torch.cat(parts) for parts in zip(*results, strict=True)), dtype)


def test_dtype_argument_casts_the_weights(head, z):
    table, noise = solvers.ddim(5), torch.zeros(6, 16)
    out = head.denoise(z, table, noise=noise, dtype=torch.float64)
    assert out.dtype == torch.float64
    assert_close(head.denoise(z, table, noise=noise), out, worst=1e-5 * float(out.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_head(head, z, backend):
    table, noise = solvers.ddim(5), torch.zeros(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head.denoise(z, table, noise=noise, backend=backend)
    assert torch.equal(inside, head.denoise(z, table, noise=noise, backend=backend))


def test_modulation_in_chunks_is_the_same(head, z, monkeypatch):
    table, noise, step_noise = solvers.ddpm(12), torch.randn(6, 16), torch.randn(12, 6, 16)
    whole = head.denoise(z, table, noise=noise, step_noise=step_noise, backend="hoisted")
    monkeypatch.setattr("disa_fast.backends.hoisted.MODULATION_BYTES", 5 * 6 * 11 * 64 * 4)
    chunked = head.denoise(z, table, noise=noise, step_noise=step_noise, backend="hoisted")
    assert_close(chunked, whole, worst=1e-5 * float(whole.abs().max()))


# Randomness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("solver", [solvers.ddpm, solvers.ddim, solvers.dpm_solver])
def test_draws_come_in_upstreams_order(head, z, cfg, solver):
    """Start for the trajectories, then all rows at each step; DPM-Solver draws no step noise."""
    table = solver(5)
    torch.manual_seed(7)
    noise = torch.randn(3 if cfg != 1 else 6, 16)
    step_noise = torch.stack([torch.randn(6, 16) for _ in range(5)]) if table.draws else None
    after = torch.rand(())
    torch.manual_seed(7)
    drawn = head.denoise(z, table, cfg=cfg)
    assert torch.equal(torch.rand(()), after)
    assert torch.equal(drawn, head.denoise(z, table, cfg=cfg, noise=noise, step_noise=step_noise))
    assert torch.equal(drawn, head.denoise(z, table, cfg=cfg, generator=torch.Generator().manual_seed(7)))


def test_guided_result_repeats_the_first_half(head, z):
    out = head.denoise(z, solvers.ddpm(5), cfg=torch.tensor([2.5]))
    assert out.shape == (6, 16)
    assert torch.equal(out[:3], out[3:])


def test_temperature_scales_the_step_noise(head, z):
    draws = {"noise": torch.randn(6, 16), "step_noise": torch.randn(5, 6, 16)}
    cold = head.denoise(z, solvers.ddpm(5), temperature=0.0, **draws)
    silent = head.denoise(z, solvers.ddpm(5), noise=draws["noise"], step_noise=torch.zeros(5, 6, 16))
    assert torch.equal(cold, silent)
    halved = head.denoise(z, solvers.ddpm(5), noise=draws["noise"], step_noise=0.5 * draws["step_noise"])
    assert_close(head.denoise(z, solvers.ddpm(5), temperature=0.5, **draws), halved, worst=1e-5 * float(halved.abs().max()))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_no_rows(head, cfg):
    assert head.denoise(torch.zeros(0, 48), solvers.ddpm(5), cfg=cfg).shape == (0, 16)


# Living with its module -----------------------------------------------------------------------------------------------


def changes():
    def in_place(net):
        with torch.no_grad():
            net.res_blocks[0].mlp[0].weight.mul_(1.5)

    def load(net):
        net.load_state_dict({name: 1.1 * tensor for name, tensor in net.state_dict().items()})

    def replace(net):
        net.input_proj.bias = torch.nn.Parameter(net.input_proj.bias.detach() + 1)

    def optimise(net):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.SGD(net.parameters(), lr=0.01).step()

    def cast(net):
        net.to(torch.bfloat16)

    return [in_place, load, replace, optimise, cast]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_changed_parameters_are_noticed(change, backend, z):
    net = copy.deepcopy(random_head()._net).requires_grad_()
    head = MLPHead.from_module(net)
    run = functools.partial(head.denoise, z, solvers.ddim(4), noise=torch.ones(6, 16), backend=backend)
    before = run()
    change(net)
    after = run()
    assert not torch.equal(before, after)
    fresh = MLPHead.from_module(net).denoise(z, solvers.ddim(4), noise=torch.ones(6, 16), backend=backend)
    assert torch.equal(after, fresh)


def test_refresh_after_a_write_through_data(z):
    head = random_head()
    run = functools.partial(head.denoise, z, solvers.ddim(4), noise=torch.ones(6, 16))
    before = run()
    head._net.input_proj.bias.data.add_(1)
    head.refresh()
    assert not torch.equal(before, run())


def test_weights_are_shared_not_copied():
    sd = dict(random_head()._net.state_dict())
    head = MLPHead.from_state_dict(sd)
    assert head._net.input_proj.weight.data_ptr() == sd["input_proj.weight"].data_ptr()


def test_does_not_grow_with_calls(head, z):
    for backend in PLAIN:
        head.denoise(z, solvers.ddpm(2), backend=backend)
    packed, hoisted = len(head._packed), head.hoisted(torch.float32)
    for steps in range(1, 301):
        hoisted.time_table(solvers.dpm_solver(steps))
    head.denoise(z, solvers.ddpm(2), backend="hoisted")
    assert hoisted.time_table.cache_info().currsize == 256
    assert len(head._packed) == packed


def test_many_threads(z):
    head = random_head()
    noise = torch.ones(6, 16)
    expected = {steps: head.denoise(z, solvers.ddim(steps), noise=noise) for steps in range(2, 10)}
    head.refresh()
    wrong = []

    def work(steps):
        for _ in range(5):
            if not torch.equal(head.denoise(z, solvers.ddim(steps), noise=noise), expected[steps]):
                wrong.append(steps)

    threads = [threading.Thread(target=work, args=(steps,)) for steps in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_after_it(z):
    head = random_head()
    run = functools.partial(head.denoise, z, solvers.ddim(4), noise=torch.ones(6, 16))
    with torch.inference_mode():
        inside = run()
    assert torch.equal(inside, run())
    with torch.inference_mode():
        born_inside = random_head()
    assert torch.equal(born_inside.denoise(z, solvers.ddim(4), noise=torch.ones(6, 16)), inside)


@pytest.mark.parametrize(("rows", "steps", "cfg"), [(8, 50, 3.0), (5, 3, 1.0)])
def test_what_the_tests_on_a_gpu_call_is_served(monkeypatch, rows, steps, cfg):
    """50 steps of ddpm are a table of 48."""
    monkeypatch.setattr(test_gpu, "GPU", torch.device("cpu"))
    head = test_gpu.fitted_head(64, 1, torch.float32)
    out = head.denoise(**test_gpu.call(rows, steps, cfg, torch.float32), backend="hoisted")
    assert out.shape == (rows, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_on_a_gpu_as_on_the_cpu(head, z, backend, cfg):
    table, noise, step_noise = solvers.ddpm(5), torch.randn(6, 16), torch.randn(5, 6, 16)
    truth = head.denoise(z, table, cfg, noise=noise, step_noise=step_noise, backend="reference", dtype=torch.float64)
    moved = MLPHead.from_module(copy.deepcopy(head._net).cuda())
    out = moved.denoise(z.cuda(), table, cfg, noise=noise.cuda(), step_noise=step_noise.cuda(), backend=backend)
    assert out.is_cuda
    assert_close(out.cpu(), truth, worst=1e-5 * float(truth.abs().max()))


def test_no_graph_is_recorded(z):
    head = MLPHead.from_module(MLPNet(MLPSpec(16, 32, 1, 48)))
    assert not head.denoise(z.requires_grad_(), solvers.ddpm(3)).requires_grad


def test_copies_are_independent(z):
    head = random_head()
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin._net.input_proj.bias.add_(1)
    run = {"table": solvers.ddim(4), "noise": torch.ones(6, 16)}
    assert not torch.equal(head.denoise(z, **run), twin.denoise(z, **run))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z": torch.zeros(6, 47)}, r"z: expected a \[rows, 48\] tensor, got \[6, 47\] of torch.float32 on cpu"),
        ({"z": torch.zeros(48)}, r"z: expected a \[rows, 48\] tensor, got \[48\]"),
        ({"z": [[0.0] * 48]}, r"z: expected a \[rows, 48\] tensor"),
        ({"z": torch.zeros(6, 48, dtype=torch.int64)}, "z: expected a floating point tensor, got .*int64"),
        ({"z": torch.zeros(6, 48, device="meta")}, "z: expected it on cpu, where the head's parameters are, got .*meta"),
        ({"z": torch.zeros(5, 48), "cfg": 3.0}, r"z: guidance \(cfg = 3\) expects an even number of rows, .* got 5"),
        ({"table": 50}, r"table: expected a StepTable such as disa_fast.solvers.ddpm\(50\), got 50"),
        ({"cfg": float("nan")}, "cfg: expected a finite number, got nan"),
        ({"cfg": torch.ones(2)}, r"cfg: expected a number or a one-element tensor, got \[2\]"),
        ({"cfg": "3"}, None),
        ({"cfg": "three"}, "cfg: expected a number or a one-element tensor, got 'three'"),
        ({"temperature": float("inf")}, "temperature: expected a finite number, got inf"),
        ({"temperature": -0.5}, r"temperature: expected at least 0, got -0\.5"),
        ({"noise": torch.zeros(6, 15)}, r"noise: expected a floating point \[6, 16\] tensor, got \[6, 15\]"),
        (
            {"noise": torch.zeros(4, 16), "cfg": 2.0},
            r"noise: expected a floating point \[3, 16\] or \[6, 16\] tensor, got \[4, 16\]",
        ),
        ({"step_noise": torch.zeros(4, 6, 16)}, r"step_noise: expected a floating point \[5, 6, 16\] tensor, got \[4, 6, 16\]"),
        ({"noise": torch.zeros(6, 16, device="meta")}, "noise: expected it on cpu, where z is, got .*meta"),
        ({"dtype": torch.int32}, "dtype: expected a floating point torch.dtype of 16 bits or more, got torch.int32"),
        (
            {"backend": "tpu"},
            re.escape(f"backend: 'tpu' is not one that this version has; can serve this call: {ON_A_CPU}"),
        ),
    ],
)
def test_bad_arguments(head, z, arguments, message):
    call = {"z": z, "table": solvers.ddpm(5), **arguments}
    if message is None:  # a number as text is a number to float(), and harmless
        head.denoise(**call)
        return
    with pytest.raises(ValueError, match=message):
        head.denoise(**call)


def test_unknown_backend_is_unsupported(head, z):
    with pytest.raises(UnsupportedError):
        head.denoise(z, solvers.ddpm(5), backend="cuda")


def test_state_dict_with_missing_extra_or_misshapen_keys():
    sd = dict(random_head()._net.state_dict())
    with pytest.raises(ValueError, match=r"state dict: keys do not match: missing 1 \(res_blocks.1.mlp.0.bias\)"):
        MLPHead.from_state_dict({name: t for name, t in sd.items() if name != "res_blocks.1.mlp.0.bias"})
    with pytest.raises(ValueError, match=r"unexpected 1 \(extra\)"):
        MLPHead.from_state_dict({**sd, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"final_layer.linear.weight: expected shape \[32, 64\], got \[16, 64\]"):
        MLPHead.from_state_dict({**sd, "final_layer.linear.weight": torch.zeros(16, 64)})
    with pytest.raises(ValueError, match="expected the parameters of a MAR diffusion head"):
        MLPHead.from_state_dict({})
    with pytest.raises(ValueError, match=r"input_proj.bias: expected a floating point tensor, got \[64\] of torch.int8"):
        MLPHead.from_state_dict({**sd, "input_proj.bias": torch.zeros(64, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"net \(Linear\): expected the parameters of a MAR diffusion head"):
        MLPHead.from_module(torch.nn.Linear(3, 3))


def test_state_dict_of_a_whole_model_by_prefix():
    model = disa_fast.models.mar(
        img_size=64, encoder_embed_dim=32, encoder_depth=1, encoder_num_heads=2,
        decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=2, diffloss_d=2, diffloss_w=32,
    )  # fmt: skip
    assert MLPHead.from_state_dict(model.state_dict(), prefix="diffloss.net.").spec == MLPSpec(16, 32, 2, 48)


def test_explain(head, capsys):
    facts = disa_fast.explain(head)
    assert facts["backend"] == ("cpu" if cpu.is_built() else "hoisted")
    assert "width=64" in capsys.readouterr().out
    with pytest.raises(UnsupportedError, match="expected a head"):
        disa_fast.explain(3)
