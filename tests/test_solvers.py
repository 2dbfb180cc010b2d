import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from recorded import GOLDEN, golden, golden_json

from disa_fast.heads.flow_transformer import time_index
from disa_fast.solvers import StepTable, ddim, ddpm, dpm_solver, flow_euler, flow_euler_maruyama, resolve, resolve_flow

BY_MODE = {"disa": ddpm, "default": functools.partial(ddpm, clip=None), "ddim": ddim}
SOLVERS = [ddpm, ddim, dpm_solver, functools.partial(dpm_solver, plus_plus=True)]
uniform_euler = functools.partial(flow_euler, grid="uniform")
FLOW_SOLVERS = [flow_euler, uniform_euler, flow_euler_maruyama]


@pytest.mark.parametrize("which", GOLDEN)
def test_timesteps_as_recorded(which):
    recorded = golden_json(which, "ddpm_timesteps")
    assert len(recorded["modes"]) == 39
    for entry in recorded["modes"]:
        table = BY_MODE[entry["mode"]](entry["nominal"])
        assert table.t[::-1].tolist() == entry["timesteps"], entry
        assert len(table) == entry["effective"]
        assert table.t[0] == entry["first_t"]


@pytest.mark.parametrize("which", GOLDEN)
@pytest.mark.parametrize("mode", BY_MODE)
def test_effective_steps_as_recorded(which, mode):
    survey = golden_json(which, "ddpm_timesteps")["survey"][mode]
    for nominal, effective in survey["effective_steps"].items():
        assert len(BY_MODE[mode](int(nominal))) == effective, nominal


@pytest.mark.parametrize("which", GOLDEN)
@pytest.mark.parametrize("steps", [5, 50])
def test_dpm_solver_times_as_recorded(which, steps):
    t_network = golden(which, "ddpm_timesteps")[f"dpm/{steps}/t_net"].numpy()
    np.testing.assert_allclose(dpm_solver(steps).t, t_network[:-1], rtol=3e-7)


@pytest.mark.skipif("full" not in GOLDEN, reason="the full set of recorded cases is not beside this checkout")
@pytest.mark.parametrize(("mode", "steps"), [("disa", 50), ("disa", 5), ("default", 100), ("default", 20)])
def test_ancestral_coefficients_as_recorded(mode, steps):
    recorded = golden("full", "ddpm_timesteps")
    of = {key: recorded[f"{mode}/{steps}/{key}"].numpy()[::-1] for key in (
        "posterior_mean_coef1", "posterior_mean_coef2", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
        "posterior_log_variance_clipped", "log_betas",
    )}  # fmt: skip
    table = BY_MODE[mode](steps)
    c1, c2 = of["posterior_mean_coef1"], of["posterior_mean_coef2"]
    np.testing.assert_allclose(table.a, c1 * of["sqrt_recip_alphas_cumprod"] + c2, rtol=1e-9)
    np.testing.assert_allclose(table.b, -c1 * of["sqrt_recipm1_alphas_cumprod"], rtol=1e-9)
    np.testing.assert_allclose(table.l0 + table.l1, of["log_betas"], rtol=1e-9)
    np.testing.assert_allclose(table.l0 - table.l1, of["posterior_log_variance_clipped"], rtol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 50, 1000])
def test_every_step_count_gives_a_finite_table(solver, steps):
    table = solver(steps)
    assert 1 <= len(table) <= steps
    assert np.isfinite(np.stack([table.t, table.a, table.b, table.c])).all()
    assert np.isfinite(table.l0[table.noisy]).all()
    assert (np.diff(table.t) < 0).all()
    assert not table.noisy[-1]


@pytest.mark.parametrize("solver", [ddpm, ddim])
def test_one_step_jumps_from_the_top(solver):
    """Upstream fails here. The one step is the predicted clean token: x/sqrt(ab) - sqrt(1/ab - 1) eps."""
    table = solver(1, clip=950)
    assert table.t.tolist() == [950.0]
    alpha_bar = 1 / (1 + (table.b[0]) ** 2)
    assert table.a[0] == pytest.approx(1 / alpha_bar**0.5, rel=1e-9)


def test_dpm_solver_pp_is_dpm_solver_at_first_order():
    plain, plus_plus = dpm_solver(20), dpm_solver(20, plus_plus=True)
    np.testing.assert_allclose(plain.a, plus_plus.a, rtol=1e-12)
    np.testing.assert_allclose(plain.b, plus_plus.b, rtol=1e-10)


@pytest.mark.parametrize("solver", [*SOLVERS, *FLOW_SOLVERS])
@pytest.mark.parametrize("steps", [0, -1, 1001, 5.0, "5", True, [5], None])
def test_bad_step_counts(solver, steps):
    with pytest.raises(ValueError, match="steps: expected "):
        solver(steps)


@pytest.mark.parametrize("clip", [-1, 9.5, "950", True])
@pytest.mark.parametrize("solver", [ddpm, ddim])
def test_bad_clip(solver, clip):
    with pytest.raises(ValueError, match="clip: expected a timestep"):
        solver(5, clip=clip)


def test_table_keeps_contiguous_arrays_of_its_own():
    fields = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in vars(ddpm(5)).items()}
    table = StepTable(**{**fields, "a": np.repeat(fields["a"], 2)[::2], "t": fields["t"][::-1][::-1], "b": fields["b"][::-1]})
    fields["c"][:] = 9
    assert np.array_equal(table.c, ddpm(5).c)
    assert np.array_equal(table.b, fields["b"][::-1])
    for one in (table, ddpm(1)):
        assert all(value.strides == (value.itemsize,) for value in vars(one).values() if isinstance(value, np.ndarray))


def test_table_checks_its_arrays():
    good = vars(ddpm(5))
    with pytest.raises(ValueError, match=r"b: expected a \[5\] array of float64, got \[4\]"):
        StepTable(**{**good, "b": good["b"][1:]})
    with pytest.raises(ValueError, match=r"noisy: expected .* bool"):
        StepTable(**{**good, "noisy": good["a"]})
    with pytest.raises(ValueError, match="draws: expected True, since some steps are noisy"):
        StepTable(**{**good, "draws": False})
    with pytest.raises(ValueError, match="read-only"):
        ddpm(5).a[0] = 0


def test_resolve():
    assert len(resolve("ddpm")(50)) == 48
    assert len(resolve("ddpm", clip=None)(50)) == 50
    assert resolve("dpm_solver++")(5).solver == "dpm_solver++"
    assert resolve(ddim)(5).solver == "ddim"
    same = resolve("ddpm")
    assert same(7) is same(7)
    with pytest.raises(ValueError, match=r"solver: expected one of \['ddpm', .*got 'euler'"):
        resolve("euler")
    with pytest.raises(ValueError, match="clip: only 'ddpm' and 'ddim' take one"):
        resolve("dpm_solver", clip=950)


# Flows ----------------------------------------------------------------------------------------------------------------

FLOW_GRIDS = {
    "flowar_euler": flow_euler,
    "flowar_euler_maruyama": flow_euler_maruyama,
    "xar_euler": uniform_euler,
    "xar_euler_maruyama": flow_euler_maruyama,
}


@pytest.mark.parametrize("which", GOLDEN)
@pytest.mark.parametrize("name", FLOW_GRIDS)
def test_flow_times_as_recorded(which, name):
    """To the last bit: whether a time lies in a guidance interval, and its index, may hang on it."""
    recorded = golden(which, "flow_time_grids")
    counts = [int(key.split("/")[1]) for key in recorded.arrays if key.startswith(f"{name}/") and key.endswith("/t")]
    assert len(counts) == {"slim": 5, "full": 61}[which]
    for steps in counts:
        table = FLOW_GRIDS[name](steps)
        assert table.t.tolist() == recorded[f"{name}/{steps}/t"].tolist(), steps
        if (name, steps) == ("xar_euler_maruyama", 2):
            continue  # xAR's second of two evaluations is made as a first one is, with a float64 product: 39, not 40
        assert time_index(torch.tensor(table.t)).tolist() == recorded[f"{name}/{steps}/t_index"].tolist(), steps


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 49, 50, 51, 1000])
def test_flow_tables_go_from_noise_to_image(solver, steps):
    if (solver, steps) == (flow_euler, 1):
        return  # that grid has none
    table = solver(steps)
    assert len(table) == (2 * (steps // 2) if solver is flow_euler else steps)
    assert table.t[0] == 1
    assert (np.diff(table.t) < 0).all()
    assert np.isfinite(np.stack([table.a, table.b, table.c])).all()
    assert np.isfinite(table.l0[table.noisy]).all()
    assert not table.l1.any()
    noisy = solver is flow_euler_maruyama and steps > 1
    assert table.draws == noisy
    assert table.noisy.tolist() == [noisy] * (len(table) - 1) + [False]


@pytest.mark.parametrize("solver", [flow_euler, uniform_euler])
@pytest.mark.parametrize("steps", [2, 7, 25, 50])
def test_euler_steps_reach_the_next_time(solver, steps):
    table = solver(steps)
    assert (table.a == 1).all() and not table.c.any()
    np.testing.assert_allclose(table.t + table.b, np.append(table.t[1:], 0), atol=1e-15)


def test_flowars_grid_is_in_two_pieces_but_for_50_steps():
    np.testing.assert_allclose(flow_euler(7).t, [1, 0.65, 0.3, 0.25, 0.25 * 2 / 3, 0.25 / 3], rtol=1e-15)
    assert np.array_equal(flow_euler(50).t, uniform_euler(50).t)
    assert not np.array_equal(flow_euler(48).t, uniform_euler(48).t)


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("cfg", [None, 2.4])
def test_euler_maruyama_is_its_textbook_step(steps, cfg):
    """dx = (v - w/2 score) dt + sqrt(w) dW backwards in time, w = 2t, on the path x = (1-t) x0 + t eps with v = eps - x0.

    Guidance combines the two halves' drifts, as published; the table's row has one velocity, combined beforehand.
    """
    generator = np.random.default_rng(0)
    times = np.append(np.linspace(1, 0.04, steps), 0.0)
    table = flow_euler_maruyama(steps)

    def drift(x, v, t):
        x0, eps = x - t * v, x + (1 - t) * v
        np.testing.assert_allclose((1 - t) * x0 + t * eps, x, atol=1e-12)
        score = -eps / t  # of the normal around (1-t) x0 with deviation t
        return v - t * score

    for i, (t, after) in enumerate(itertools.pairwise(times)):
        x, v, v_u, noise = generator.normal(size=(4, 5))
        d = drift(x, v, t)
        if cfg is not None:
            d = drift(x, v_u, t) + cfg * (d - drift(x, v_u, t))
            v = v_u + cfg * (v - v_u)
        expected = x + (after - t) * d
        actual = table.a[i] * x + table.b[i] * v + table.c[i] * v_u
        if i < steps - 1:
            expected = expected + np.sqrt(2 * t * (t - after)) * noise
            actual = actual + np.exp(table.l0[i] / 2) * noise
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


def test_guidance_interval_has_both_ends_and_is_compared_in_float64():
    table = flow_euler(10)
    t = table.t[2]  # 0.65 less a bit, above the float32 nearest to it
    assert np.float32(t) == np.float32(0.65) and float(np.float32(t)) < t < 0.65
    assert table.within(t, t).tolist() == [False, False, True] + 7 * [False]
    assert not table.within(0.65, 0.65).any()
    assert not table.within(t, float(np.float32(t))).any()
    assert table.within(0, 1).all()
    assert not table.within(0, 0).any()


def test_flow_errors():
    with pytest.raises(ValueError, match="steps: FlowAR's grid needs at least 2 denoising steps, got 1; grid='uniform' can do 1"):
        flow_euler(1)
    with pytest.raises(ValueError, match=r"grid: expected one of \['flowar', 'uniform'\], got 'cosine'"):
        flow_euler(5, grid="cosine")


def test_resolve_flow():
    assert len(resolve_flow("euler", "flowar")(25)) == 24
    assert len(resolve_flow("euler", "uniform")(25)) == 25
    for grid in ("flowar", "uniform"):
        assert resolve_flow("euler_maruyama", grid)(5).solver == "flow_euler_maruyama"
    assert resolve_flow(uniform_euler, "flowar")(1).t.tolist() == [1.0]
    same = resolve_flow("euler", "flowar")
    assert same(7) is same(7)
    for name in ("ddpm", None, 5):
        with pytest.raises(
            ValueError, match=rf"solver: expected one of \['euler', 'euler_maruyama'\] or a callable .*got {name!r}"
        ):
            resolve_flow(name, "flowar")


def test_tables_are_equal_by_contents():
    """Of everything that is told apart, so that what one is kept for serves no other."""
    table = ddpm(5)
    assert table == ddpm(5)
    assert hash(table) == hash(ddpm(5))
    others = [dataclasses.replace(table, **{name: getattr(table, name) + 0.5}) for name in ("t", "a", "b", "c", "l0", "l1")]
    others += [dataclasses.replace(table, noisy=~table.noisy), dataclasses.replace(table, solver="another")]
    others += [dataclasses.replace(table, noisy=table.noisy & False, draws=draws) for draws in (True, False)]
    others += [dataclasses.replace(table, output=None), ddpm(6), "ddpm"]
    assert len({table, *others}) == 1 + len(others)
    assert all(table != other for other in others)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver", "dpm_solver++"])
def test_one_call_after_the_other_shares_tables(name):
    assert resolve(name)(7) is resolve(name)(7)
    own = functools.partial(ddpm, clip=900)
    assert resolve(own)(7) is not resolve(own)(7)
    assert resolve(own)(7) == resolve(own)(7)


def test_other_settings_are_other_tables():
    tables = [resolve("ddpm")(7), resolve("ddpm", None)(7), resolve("ddpm", 900)(7), resolve("ddim")(7), resolve("dpm_solver")(7)]
    tables.append(resolve("dpm_solver++")(7))
    assert len(set(tables)) == len(tables)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver", "euler", "euler_maruyama"])
def test_what_equals_one_step_is_still_refused(name):
    """After a table of one step was kept."""
    table_for = resolve_flow(name, "uniform") if name.startswith("euler") else resolve(name)
    table_for(1)
    for odd in (True, 1.0):
        with pytest.raises(ValueError, match="steps: expected"):
            table_for(odd)
