import functools

import numpy as np
import pytest
from recorded import GOLDEN, golden, golden_json

from disa_fast.solvers import StepTable, ddim, ddpm, dpm_solver, resolve

BY_MODE = {"disa": ddpm, "default": functools.partial(ddpm, clip=None), "ddim": ddim}
SOLVERS = [ddpm, ddim, dpm_solver, functools.partial(dpm_solver, plus_plus=True)]


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


@pytest.mark.parametrize("solver", SOLVERS)
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
