import copy
import functools
import pickle
import re
import threading

import numpy as np
import pytest
import torch
from compare import assert_as_good_as, assert_close
from random_parameters import random_parameters
from recorded import GOLDEN, golden

from disa_fast import FlowTransformerHead, UnsupportedError, models, solvers
from disa_fast.backends import hoisted
from disa_fast.heads.flow import chunk_from
from disa_fast.heads.flow_transformer import FlowTransformerNet, FlowTransformerSpec
from disa_fast.solvers import StepTable
from disa_fast.transformer import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["reference", "hoisted"]
DTYPES = [torch.float32, torch.float64]
SOLVERS = {"euler": solvers.flow_euler, "euler_maruyama": solvers.flow_euler_maruyama}
Z_CHANNELS = 24


def random_head(cross=True, width=128, depth=2, seed=0, dtype=torch.float32):
    sd = random_parameters(FlowTransformerSpec(16, width, depth, Z_CHANNELS, cross), seed)
    sd |= {name: Rotary(64).freqs for name in sd if name.endswith("rope.freqs")}
    return FlowTransformerHead.from_state_dict({name: tensor.to(dtype) for name, tensor in sd.items()})


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "cross"])
def head(request):
    return random_head(request.param)


@pytest.fixture(scope="module")
def cross_head():
    return random_head()


@pytest.fixture
def z():
    return torch.randn(4, 9, Z_CHANNELS, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise():
    return torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def rows_seen(monkeypatch):
    """How many rows a block of `hoisted` was given, an entry for each block and evaluation."""
    seen, qkv = [], hoisted.HoistedOps.qkv

    def counted(self, m, *rest):
        seen.append(len(m))
        return qkv(self, m, *rest)

    monkeypatch.setattr(hoisted.HoistedOps, "qkv", counted)
    return seen


def table_of(t, a, b, c=None, l0=None, noisy=None):
    """A flow's table of the columns given, the others being zero."""
    zero = np.zeros(len(t))
    c, l0 = (zero if column is None else column for column in (c, l0))
    noisy = np.zeros(len(t), bool) if noisy is None else noisy
    return StepTable("any", np.asarray(t, float), a, b, c, l0, zero, noisy, draws=bool(noisy.any()))


def velocity_at(t):
    """One step whose result is the velocity."""
    return table_of([t], a=np.zeros(1), b=np.ones(1))


def by_hand(head, z, table, cfg, guided, noise, step_noise=None, temperature=1.0):
    """The first half's trajectory in float64, step by step; `guided` says at which steps."""
    network, n = head.network(torch.float64), len(z) // 2
    z, x, before = z.double(), noise[:n].double(), 0.0
    for i in range(len(table)):
        t = torch.full((n,), float(table.t[i]), dtype=torch.float64)
        v = network(x, t, 0, z=z[:n])
        if guided[i]:
            v_u = network(x, t, 0, z=z[n:])
            v = v_u + cfg * (v - v_u)
        x = table.a[i] * x + table.b[i] * v + table.c[i] * before
        if table.noisy[i]:
            x = x + np.exp(table.l0[i] / 2) * temperature * step_noise[i][:n]
        before = v
    return x


# The recorded cases ---------------------------------------------------------------------------------------------------


@functools.cache
def recorded_head(which, stem, net):
    sd = {key.split("/", 1)[1]: t for key, t in golden(which, stem).arrays.items() if key.startswith(f"sd_{net}/")}
    return FlowTransformerHead.from_state_dict(sd, prefix="flownet." if stem == "flowar_e2e" else "")


def recorded(kind):
    """Of flowar_head, which the full set alone has: pytest parameters (which, case, dtype), in the dtypes recorded."""
    return [
        pytest.param(which, case, dtype, id=f"{case['name']}-{str(dtype)[6:]}")
        for which in GOLDEN
        if (GOLDEN[which] / "flowar_head.npz").is_file()
        for case in golden(which, "flowar_head").meta[kind]
        for dtype in DTYPES
        if dtype == torch.float32 or case["tokens"] < 256
    ]


def bound(dtype, floor):
    return 1e-9 if dtype == torch.float64 else max(1e-5, 10 * floor)


@pytest.mark.parametrize(("which", "evaluation", "dtype"), recorded("evals"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_network_as_recorded(which, evaluation, backend, dtype):
    file, name = golden(which, "flowar_head"), f"eval/{evaluation['name']}"
    head, tokens = recorded_head(which, "flowar_head", evaluation["net"]), evaluation["tokens"]
    x, z, times = file[f"in/N{tokens}/latents"], file[f"in/N{tokens}/condition"], file[f"{name}/t"]
    rows = zip(x.split(1), z.split(1), times.tolist(), strict=True)  # each has a time of its own
    out = torch.cat([head.denoise(z, velocity_at(t), noise=x, backend=backend, dtype=dtype) for x, z, t in rows])
    truth = file[f"{name}/out_f64" if dtype == torch.float64 else f"{name}/out_f32"]
    assert out.dtype == dtype
    assert_close(out, truth, bound(dtype, evaluation["f32_vs_f64"]))


def run_recorded(which, case, dtype, backend):
    """(result, recorded truth) on the rows that matter: all without guidance, else the first half."""
    file, name, tokens = golden(which, "flowar_head"), f"case/{case['name']}", case["tokens"]
    step_noise = file.get(f"{name}/step_noise_f64")
    assert (0 if step_noise is None else len(step_noise)) == case["n_step_draws"]
    out = recorded_head(which, "flowar_head", case["net"]).denoise(
        file[f"in/N{tokens}/condition"],
        SOLVERS[case["sampler"]](case["num_steps"]),
        cfg=case["cfg_scale"],
        guidance=(case["guidance_low"], case["guidance_high"]),
        noise=file[f"in/N{tokens}/latents"],
        step_noise=step_noise,
        backend=backend,
        dtype=dtype,
    )
    assert out.dtype == dtype
    truth = file[f"{name}/out_f64" if dtype == torch.float64 else f"{name}/out"]
    rows = len(truth) if case["cfg_scale"] <= 1 else len(truth) // 2
    return out[:rows], truth[:rows]


@pytest.mark.parametrize(("which", "case", "dtype"), recorded("cases"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_as_recorded(which, case, backend, dtype):
    out, truth = run_recorded(which, case, dtype, backend)
    assert_close(out, truth, bound(dtype, case["f32_vs_f64"]))


def recorded_scales():
    """Every scale of FlowAR's recorded images."""
    return [
        pytest.param(which, case, s, id=f"{which}-{case['name']}-s{s}")
        for which in GOLDEN
        for case in golden(which, "flowar_e2e").meta["cases"]
        for s in range(len(case["T"]))
    ]


def run_recorded_scale(which, case, s, backend):
    file, name = golden(which, "flowar_e2e"), f"case/{case['name']}/s{s}"
    table, cfg = solvers.flow_euler(case["T"][s]), case["cfg_per_scale"][s]
    assert len(table) == len(file[f"{name}/t_index"]) == case["network_evals"][s]
    out = recorded_head(which, "flowar_e2e", case["model"]).denoise(
        file[f"{name}/z"], table, cfg, (0.0, case["guidance"]), noise=file[f"{name}/latents"], backend=backend
    )
    truth = file[f"{name}/out"]
    rows = len(truth) if cfg <= 1 else len(truth) // 2
    return out[:rows], truth[:rows]


@pytest.mark.parametrize(("which", "case", "s"), recorded_scales())
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_as_recorded(which, case, s, backend):
    out, truth = run_recorded_scale(which, case, s, backend)
    assert_close(out, truth, bound(torch.float32, case["f32_vs_f64"]))


def test_one_percent_fails_the_comparison():
    case = golden("slim", "flowar_e2e").meta["cases"][0]
    out, truth = run_recorded_scale("slim", case, 2, "hoisted")
    with pytest.raises(AssertionError, match="worst element"):
        assert_close(1.01 * out, truth, bound(torch.float32, case["f32_vs_f64"]))


# The loop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [(2.0, 3.0), (0.0, 0.9)], ids=["unguided", "guided"])
def test_every_column_of_a_table_counts(head, z, noise, backend, guidance):
    """The update of StepTable's docstring on a table that uses all of it, the previous output too, guided at some steps."""
    steps = 4
    a, b, c, l0 = np.random.default_rng(0).normal(size=(4, steps)) * 0.5
    table = table_of(np.linspace(1, 0.1, steps), a, b, c, l0, np.array([True, False, True, True]))
    step_noise = torch.randn(steps, 4, 9, 16, dtype=torch.float64)
    draws = {"noise": noise, "step_noise": step_noise, "temperature": 0.7}
    out = head.denoise(z, table, 2.4, guidance, backend=backend, dtype=torch.float64, **draws)
    guided = [guidance[0] <= t <= guidance[1] for t in table.t]
    assert sum(guided) in (0, 3)
    assert_close(out[:2], by_hand(head, z, table, 2.4, guided, **draws), worst=1e-9)


TABLE = solvers.flow_euler(10)  # 1, 0.825, 0.65, 0.475, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05
T2 = float(TABLE.t[2])  # 0.65 less a bit
INTERVALS = [
    ((0.0, 1.0), range(10)),
    ((0.0, 0.9), range(1, 10)),
    ((0.0, 0.0), []),
    ((-1.0, 0.0), []),
    ((T2, T2), [2]),
    ((0.3, 1.0), range(5)),  # linspace ends on the very number
    ((np.nextafter(0.3, 1), 1.0), range(4)),
    ((0.0, float(np.float32(T2))), range(3, 10)),  # equal to the time in float32; less in float64
    ((0.65, 1.0), range(2)),  # likewise, and more
    ((0.31, 0.44), []),
    ((2.0, 3.0), []),
]


@pytest.mark.parametrize(("guidance", "guided"), INTERVALS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_within_its_interval_alone(head, z, noise, rows_seen, guidance, guided, backend):
    """Both ends included; and unguided steps run no unconditional row on `hoisted`, which depends on nothing unconditional (H8)."""
    guided = [i in guided for i in range(len(TABLE))]
    run = functools.partial(head.denoise, z, TABLE, 2.4, noise=noise, backend=backend, dtype=torch.float64)
    out = run(guidance)
    assert_close(out[:2], by_hand(head, z, TABLE, 2.4, guided, noise), worst=1e-9)
    assert torch.equal(out[:2], out[2:])
    if backend == "hoisted":
        assert rows_seen == [4 if g else 2 for g in guided for _ in range(head.spec.depth)]


@pytest.mark.parametrize(("guidance", "most"), [((2.0, 3.0), 2), ((T2, T2), 4)])
def test_nothing_is_made_ahead_of_a_half_that_no_step_reads(head, z, noise, monkeypatch, guidance, most):
    """Of all linear layers, those of the condition before the loop included."""
    seen, linear = [], hoisted.HoistedOps.linear

    def counted(self, x, layer):
        seen.append(x.shape[-3] if x.ndim > 2 else 0)  # [..., rows, tokens, channels]; of time alone: [steps, channels]
        return linear(self, x, layer)

    monkeypatch.setattr(hoisted.HoistedOps, "linear", counted)
    head.denoise(z, TABLE, 2.4, guidance, noise=noise, backend="hoisted")
    assert max(seen) == most


def test_each_guided_step_shows(head, z, noise):
    """So that the comparison above would notice a step too many or too few."""
    run = functools.partial(by_hand, head, z, TABLE, 2.4, noise=noise)
    none = run(guided=[False] * 10)
    for step in range(10):
        assert float((run(guided=[i == step for i in range(10)]) - none).abs().max()) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_unconditional_half_counts_under_guidance_alone(head, z, noise, backend, solver):
    table, step_noise = SOLVERS[solver](6), torch.randn(6, 4, 9, 16)
    other = torch.cat([z[:2], torch.full_like(z[2:], torch.nan)])
    run = functools.partial(head.denoise, table=table, noise=noise, step_noise=step_noise, backend=backend)
    unguided = run(z, cfg=3.0, guidance=(2.0, 3.0))
    assert torch.equal(unguided, run(other, cfg=3.0, guidance=(2.0, 3.0)))
    assert_close(unguided[:2], run(z, cfg=1.0)[:2], worst=1e-5 * float(unguided.abs().max()))
    assert run(other, cfg=3.0, guidance=(0.0, 0.1)).isnan().all()


@pytest.mark.parametrize("cfg", [1.0, 0.5, 0.0, -1.0, torch.tensor([1.0])])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_up_to_one_are_no_guidance(head, z, noise, rows_seen, cfg, backend):
    """As published: every row is a trajectory."""
    run = functools.partial(head.denoise, table=TABLE, noise=noise, backend=backend, dtype=torch.float64)
    out = run(z, cfg=cfg)
    assert_close(out, by_hand(head, torch.cat([z, z]), TABLE, 1.0, [False] * 10, noise), worst=1e-9)
    if backend == "hoisted":
        assert set(rows_seen) == {4}


@pytest.mark.parametrize("budget", [1, 2 * 9 * 4 * 3000, 1 << 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulation_in_chunks_is_the_same(head, z, noise, monkeypatch, budget, dtype):
    run = functools.partial(head.denoise, z, TABLE, 2.4, (0.12, 0.5), noise=noise, backend="hoisted", dtype=dtype)
    whole = run()
    monkeypatch.setattr(hoisted, "MODULATION_BYTES", budget)
    assert_close(run(), whole, worst=(1e-5 if dtype == torch.float32 else 1e-12) * float(whole.abs().max()))


def test_chunks_end_where_guidance_changes():
    guided = (False, False, True, True, True, False)
    assert [chunk_from(i, guided, 9) for i in (0, 2, 5)] == [range(2), range(2, 5), range(5, 6)]
    assert [chunk_from(i, guided, 2) for i in (0, 2, 4)] == [range(2), range(2, 4), range(4, 5)]
    assert chunk_from(2, guided, 0) == range(2, 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_hoisted_computes_what_reference_does(head, z, noise, solver):
    run = {"table": SOLVERS[solver](8), "cfg": 2.4, "guidance": (0.1, 0.8), "noise": noise, "step_noise": torch.randn(8, 4, 9, 16)}
    ours, reference = (head.denoise(z, backend=backend, **run) for backend in ("hoisted", "reference"))
    assert_close(ours, reference, worst=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_independent(head, z, noise, backend):
    run = functools.partial(head.denoise, table=TABLE, cfg=2.4, guidance=(0.0, 0.9), backend=backend, dtype=torch.float64)
    one = run(z[1::2], noise=noise[1::2])
    assert_close(one[0], run(z, noise=noise)[1], worst=1e-10)


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cross", [False, True], ids=["plain", "cross"])
def test_is_as_good_as_eager(cross, dtype):
    low = random_head(cross, dtype=dtype)
    exact = FlowTransformerHead.from_state_dict({name: t.double() for name, t in low._net.state_dict().items()})
    table, results = solvers.flow_euler(8), []
    for _ in range(2):
        z, noise = torch.randn(4, 16, Z_CHANNELS).to(dtype), torch.randn(4, 16, 16)
        run = {"table": table, "cfg": 2.0, "guidance": (0.0, 0.9), "noise": noise}
        ours, eager = (low.denoise(z, backend=backend, **run) for backend in ("hoisted", "reference"))
        assert ours.dtype == eager.dtype == torch.float32
        results.append((ours, eager, exact.denoise(z.double(), backend="reference", **run)))
    assert_as_good_as(*(torch.cat(parts) for parts in zip(*results, strict=True)), dtype)


def test_dtype_argument_casts_the_weights(head, z, noise):
    out = head.denoise(z, TABLE, noise=noise, dtype=torch.float64)
    assert out.dtype == torch.float64
    assert_close(head.denoise(z, TABLE, noise=noise), out, worst=1e-5 * float(out.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_head(head, z, noise, backend):
    run = functools.partial(head.denoise, z, TABLE, 2.4, noise=noise, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    assert torch.equal(inside, run())


# Randomness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 2.4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_draws_come_in_upstreams_order(cross_head, z, cfg, solver):
    """Start for all rows in float32, then float64 for all rows at each noisy step, which the last is not."""
    table = SOLVERS[solver](5)
    torch.manual_seed(7)
    noise = torch.randn(4, 9, 16)
    step_noise = torch.stack([torch.randn(4, 9, 16, dtype=torch.float64) for _ in range(4)]) if table.draws else None
    after = torch.rand(())
    torch.manual_seed(7)
    drawn = cross_head.denoise(z, table, cfg)
    assert torch.equal(torch.rand(()), after)
    assert torch.equal(drawn, cross_head.denoise(z, table, cfg, noise=noise, step_noise=step_noise))
    assert torch.equal(drawn, cross_head.denoise(z, table, cfg, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_of_all_rows_or_of_half(cross_head, z, noise, backend):
    table, step_noise = solvers.flow_euler_maruyama(5), torch.randn(5, 4, 9, 16)
    run = functools.partial(cross_head.denoise, z, table, 2.4, (0.0, 0.9), backend=backend)
    out = run(noise=noise, step_noise=step_noise)
    assert torch.equal(out, run(noise=noise[:2], step_noise=step_noise[:, :2]))
    assert torch.equal(out, run(noise=noise, step_noise=step_noise[:4, :2]))
    unread = step_noise.clone()
    unread[4], unread[:, 2:] = torch.nan, torch.nan
    assert torch.equal(out, run(noise=torch.cat([noise[:2], unread[0, 2:]]), step_noise=unread))
    assert not torch.equal(out, run(noise=noise, step_noise=step_noise.flip(0)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_noise_of_noisy_steps_goes_where_they_are(cross_head, z, noise, backend):
    table = table_of([0.9, 0.6, 0.3], *(np.full(3, v) for v in (1.0, -0.3, 0.0, -2.0)), noisy=np.array([False, True, True]))
    noisy = torch.randn(2, 4, 9, 16)
    run = functools.partial(cross_head.denoise, z, table, noise=noise, backend=backend)
    assert torch.equal(run(step_noise=noisy), run(step_noise=torch.cat([torch.zeros(1, 4, 9, 16), noisy])))


def test_temperature_scales_the_step_noise(cross_head, z, noise):
    table, step_noise = solvers.flow_euler_maruyama(5), torch.randn(5, 4, 9, 16)
    run = functools.partial(cross_head.denoise, z, table, 2.4, noise=noise)
    assert torch.equal(run(temperature=0.0, step_noise=step_noise), run(step_noise=torch.zeros(5, 4, 9, 16)))
    halved = run(step_noise=0.5 * step_noise)
    assert_close(run(temperature=torch.tensor([0.5]), step_noise=step_noise), halved, worst=1e-5 * float(halved.abs().max()))


def test_euler_ignores_temperature_and_step_noise(cross_head, z, noise):
    run = functools.partial(cross_head.denoise, z, TABLE, 2.4, noise=noise)
    assert torch.equal(run(), run(temperature=0.0, step_noise=torch.randn(10, 4, 9, 16)))


@pytest.mark.parametrize("cfg", [1.0, 2.4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(cross_head, cfg, backend):
    out = cross_head.denoise(torch.zeros(0, 9, Z_CHANNELS), solvers.flow_euler(3), cfg, backend=backend)
    assert out.shape == (0, 9, 16)


# Living with its module -----------------------------------------------------------------------------------------------


def changes():
    def in_place(net):
        with torch.no_grad():
            net.res_blocks[1].mlp.fc1_x.weight.mul_(1.5)

    def load(net):
        net.load_state_dict({name: 1.1 * tensor for name, tensor in net.state_dict().items()})

    def replace(net):
        net.input_proj.bias = torch.nn.Parameter(net.input_proj.bias.detach() + 1)

    def of_time(net):  # what the kept time tables are made of
        with torch.no_grad():
            net.time_embed.mlp[2].bias.add_(1)

    def frequencies(net):
        net.res_blocks[0].attn.rope.freqs.mul_(0.5)

    def optimise(net):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.SGD(net.parameters(), lr=0.01).step()

    return [in_place, load, replace, of_time, frequencies, optimise]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_changed_parameters_are_noticed(change, backend, dtype, z, noise):
    net = copy.deepcopy(random_head()._net).requires_grad_()
    run = {"z": z, "table": solvers.flow_euler(4), "cfg": 2.4, "noise": noise, "backend": backend, "dtype": dtype}
    head = FlowTransformerHead.from_module(net)
    before = head.denoise(**run)
    change(net)
    after = head.denoise(**run)
    assert not torch.equal(before, after)
    assert torch.equal(after, FlowTransformerHead.from_module(net).denoise(**run))


def test_a_cast_module_is_noticed(z, noise):
    net = copy.deepcopy(random_head()._net)
    head = FlowTransformerHead.from_module(net)
    assert head.denoise(z, TABLE, noise=noise).dtype == torch.float32
    net.to(torch.float64)
    assert head.denoise(z, TABLE, noise=noise).dtype == head.dtype == torch.float64


def test_refresh_after_a_write_through_data(z, noise):
    head = random_head()
    run = functools.partial(head.denoise, z, TABLE, noise=noise, dtype=torch.float64)
    before = run()
    head._net.input_proj.bias.data.add_(1)
    head.refresh()
    assert not torch.equal(before, run())


def test_does_not_grow_with_calls(cross_head, z):
    for backend in BACKENDS:
        cross_head.denoise(z, TABLE, backend=backend)
    packed = len(cross_head._packed)
    for steps in range(2, 300):
        cross_head.weights(torch.float32).time_table(solvers.flow_euler_maruyama(steps))
    cross_head.denoise(z, TABLE)
    assert cross_head.weights(torch.float32).time_table.cache_info().currsize == 256
    assert len(cross_head._packed) == packed


def test_many_threads(z, noise):
    head = random_head()
    expected = {steps: head.denoise(z, solvers.flow_euler(steps), 2.4, noise=noise) for steps in range(2, 10)}
    head.refresh()
    wrong = []

    def work(steps):
        for _ in range(3):
            if not torch.equal(head.denoise(z, solvers.flow_euler(steps), 2.4, noise=noise), expected[steps]):
                wrong.append(steps)

    threads = [threading.Thread(target=work, args=(steps,)) for steps in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_after_it(z, noise):
    head = random_head()
    run = functools.partial(FlowTransformerHead.denoise, z=z, table=TABLE, cfg=2.4, noise=noise)
    with torch.inference_mode():
        inside, born_inside = run(head), random_head()
    assert torch.equal(inside, run(head))
    assert torch.equal(inside, run(born_inside))


def test_no_graph_is_recorded(z):
    head = FlowTransformerHead.from_module(FlowTransformerNet(FlowTransformerSpec(16, 64, 1, Z_CHANNELS, cross=True)))
    assert not head.denoise(z.requires_grad_(), TABLE).requires_grad


def test_copies_are_independent(head, z, noise):
    run = {"z": z, "table": TABLE, "cfg": 2.4, "noise": noise}
    before = head.denoise(**run)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(before, twin.denoise(**run))
        with torch.no_grad():
            twin._net.input_proj.bias.add_(1)
        assert not torch.equal(before, twin.denoise(**run))
    assert torch.equal(before, head.denoise(**run))


# Where its weights come from ------------------------------------------------------------------------------------------


def test_weights_are_shared_not_copied(head):
    sd = dict(head._net.state_dict())
    made = FlowTransformerHead.from_state_dict(sd)
    assert made.spec == head.spec
    assert all(made._net.state_dict()[name].data_ptr() == tensor.data_ptr() for name, tensor in sd.items())


@pytest.mark.parametrize("cross", [False, True])
def test_state_dict_of_a_whole_model_by_prefix(cross):
    model = models.flowar(
        img_size=16, scale=[1], encoder_embed_dim=32, encoder_depth=1, encoder_num_heads=2,
        decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, diffloss_d=3, diffloss_w=64, cross=cross,
    )  # fmt: skip
    expected = FlowTransformerSpec(16, 64, 3, 32, cross)
    assert FlowTransformerHead.from_state_dict(model.state_dict(), prefix="flownet.").spec == expected
    assert FlowTransformerHead.from_module(model.flownet).spec == model.head.spec == expected


def test_module_and_state_dict_give_the_same(head, z, noise):
    net = FlowTransformerNet(head.spec)
    net.load_state_dict(head._net.state_dict())
    made = FlowTransformerHead.from_module(net)
    assert torch.equal(made.denoise(z, TABLE, 2.4, noise=noise), head.denoise(z, TABLE, 2.4, noise=noise))
    t = torch.full((4,), 0.3)
    assert_close(net(noise, t, z), made.network(torch.float32)(noise, t, 0, z=z), worst=0)


def test_state_dict_with_missing_extra_or_misshapen_keys(head):
    sd = dict(head._net.state_dict())
    with pytest.raises(ValueError, match=r"state dict: keys do not match: missing 1 \(res_blocks.1.mlp.fc2.bias\)"):
        FlowTransformerHead.from_state_dict({name: t for name, t in sd.items() if name != "res_blocks.1.mlp.fc2.bias"})
    with pytest.raises(ValueError, match=r"unexpected 1 \(extra\)"):
        FlowTransformerHead.from_state_dict({**sd, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"final_layer.linear.weight: expected shape \[16, 128\], got \[32, 128\]"):
        FlowTransformerHead.from_state_dict({**sd, "final_layer.linear.weight": torch.zeros(32, 128)})
    with pytest.raises(ValueError, match=r"input_proj.bias: expected a floating point tensor, got \[128\] of torch.int8"):
        FlowTransformerHead.from_state_dict({**sd, "input_proj.bias": torch.zeros(128, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"expected the parameters of a FlowAR flow head .* not among the 0 given"):
        FlowTransformerHead.from_state_dict({})
    with pytest.raises(ValueError, match=r"expected the parameters of a FlowAR flow head .* not among the 0 given"):
        FlowTransformerHead.from_state_dict(sd, prefix="flownet.")
    with pytest.raises(ValueError, match=r"input_proj.weight: expected a width that is a multiple of 64, got 96"):
        FlowTransformerHead.from_state_dict({**sd, "input_proj.weight": torch.zeros(96, 16)})
    with pytest.raises(ValueError, match=r"net \(Linear\): expected the parameters of a FlowAR flow head"):
        FlowTransformerHead.from_module(torch.nn.Linear(3, 3))


def test_state_dict_without_blocks(cross_head):
    sd = {name: t for name, t in cross_head._net.state_dict().items() if not name.startswith("res_blocks.")}
    with pytest.raises(ValueError, match="state dict: "):
        FlowTransformerHead.from_state_dict(sd)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z": torch.zeros(4, 9, 23)}, r"z: expected a \[rows, tokens, 24\] tensor, got \[4, 9, 23\] of torch.float32 on cpu"),
        ({"z": torch.zeros(4, 24)}, r"z: expected a \[rows, tokens, 24\] tensor, got \[4, 24\]"),
        ({"z": [[[0.0] * 24]]}, r"z: expected a \[rows, tokens, 24\] tensor"),
        ({"z": torch.zeros(4, 9, 24, dtype=torch.int64)}, "z: expected a floating point tensor, got .*int64"),
        ({"z": torch.zeros(4, 9, 24, device="meta")}, "z: expected it on cpu, where the head's parameters are, got .*meta"),
        ({"z": torch.zeros(3, 9, 24)}, r"z: guidance \(cfg = 2\.4\) expects an even number of rows, .* got 3"),
        ({"z": torch.zeros(4, 8, 24)}, r"z: expected the tokens of a square grid \(1, 4, 9, 16, \.\.\.\), got 8"),
        ({"table": 25}, r"table: expected a StepTable such as disa_fast.solvers.flow_euler\(25\), got 25"),
        ({"table": solvers.ddpm(5)}, r"table: expected one of a flow solver, .* got StepTable\(ddpm, 5 steps"),
        ({"cfg": float("nan")}, "cfg: expected a finite number, got nan"),
        ({"cfg": float("inf")}, "cfg: expected a finite number, got inf"),
        ({"cfg": torch.ones(2)}, r"cfg: expected a number or a one-element tensor, got \[2\]"),
        ({"cfg": "three"}, "cfg: expected a number or a one-element tensor, got 'three'"),
        ({"temperature": float("nan")}, "temperature: expected a finite number, got nan"),
        ({"temperature": -0.5}, r"temperature: expected at least 0, got -0\.5"),
        ({"guidance": 0.9}, r"guidance: expected \(low, high\), .* got 0\.9"),
        ({"guidance": None}, r"guidance: expected \(low, high\), .* got None"),
        ({"guidance": (0.9, 0.1)}, r"guidance: expected low <= high, got \(0\.9, 0\.1\)"),
        ({"guidance": (0.0, float("nan"))}, "guidance: expected a finite number, got nan"),
        ({"guidance": ("low", 1.0)}, "guidance: expected a number or a one-element tensor, got 'low'"),
        ({"guidance": (0.0, 0.5, 0.9)}, r"guidance: expected \(low, high\), .* got \(0\.0, 0\.5, 0\.9\)"),
        ({"guidance": (0.5,)}, r"guidance: expected \(low, high\), .* got \(0\.5,\)"),
        (
            {"noise": torch.zeros(3, 9, 16)},
            r"noise: expected a floating point \[2, 9, 16\] or \[4, 9, 16\] tensor, got \[3, 9, 16\]",
        ),
        ({"noise": torch.zeros(2, 9, 16), "cfg": 1.0}, r"noise: expected a floating point \[4, 9, 16\] tensor, got \[2, 9, 16\]"),
        ({"noise": torch.zeros(4, 9, 16, dtype=torch.int64)}, "noise: expected a floating point .* got .*int64"),
        ({"noise": torch.zeros(4, 9, 16, device="meta")}, "noise: expected it on cpu, .* got .*meta"),
        ({"noise": [0.0]}, "noise: expected a floating point "),
        (
            {"step_noise": torch.zeros(3, 4, 9, 16)},
            r"step_noise: expected a floating point \[5, 2, 9, 16\] or \[5, 4, 9, 16\] tensor, got \[3, 4, 9, 16\]",
        ),
        ({"step_noise": torch.zeros(4, 3, 9, 16)}, r"step_noise: expected a floating point \[5, 2, 9, 16\] or .*, got \[5, 3,"),
        ({"step_noise": torch.zeros(9, 16)}, r"step_noise: expected a floating point .* got \[9, 16\]"),
        ({"dtype": torch.int32}, "dtype: expected a floating point torch.dtype of 16 bits or more, got torch.int32"),
        ({"backend": "tpu"}, "backend: 'tpu' is not one that this version has; can serve this call: .*'hoisted', 'reference'"),
    ],
)  # fmt: skip
def test_bad_arguments(cross_head, z, arguments, message):
    with pytest.raises(ValueError, match=message):
        cross_head.denoise(**{"z": z, "table": solvers.flow_euler_maruyama(5), "cfg": 2.4, **arguments})


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_backends_for_other_heads_say_what_would_serve(cross_head, z, backend):
    message = f"backend: '{backend}' cannot serve this call: serves MLP heads alone, not transformers; can: ['auto', 'hoisted', "
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        cross_head.denoise(z, TABLE, backend=backend)
