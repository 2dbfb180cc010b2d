"""The loop as an operator: what torch.compile and torch.library ask of it."""

import copy
import functools

import pytest
import torch
from random_parameters import random_parameters

from disa_fast import MLPHead, solvers
from disa_fast.heads.mlp import MLPNet, MLPSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own


@pytest.fixture
def head():
    torch.compiler.reset()
    return MLPHead.from_state_dict(random_parameters(MLPSpec(16, 64, 2, 48), 0))


@pytest.fixture
def compiled():
    """As one graph, or not at all; what runs is eager, so that no compiler is needed."""
    return functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


def columns(table: solvers.StepTable) -> list[torch.Tensor]:
    return [torch.from_numpy(c.copy()) for c in (table.t, table.a, table.b, table.c, table.l0, table.l1, table.noisy)]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("noisy", [True, False])
def test_opcheck_of_the_loop(head, cfg, dtype, noisy):
    table, rows = solvers.ddpm(3) if noisy else solvers.dpm_solver(3), 6
    noise, step_noise = torch.randn(rows, 16), torch.randn(3, rows, 16) if noisy else None
    arguments = (list(head._net.parameters()), torch.randn(rows, 48), columns(table), torch.tensor(cfg), torch.tensor(1.0))
    torch.library.opcheck(
        torch.ops.disa_fast.mlp_denoise.default, (*arguments, noise, step_noise, head._number, "auto", dtype, False)
    )


def test_opcheck_of_the_draws():
    arguments = torch.empty(6, 16), torch.empty(3, 6, 16), torch.tensor(3.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth compares two random results
    torch.library.opcheck(torch.ops.disa_fast.draw_noise.default, arguments, test_utils=tests)


@pytest.mark.parametrize("solver", [solvers.ddpm, solvers.ddim, solvers.dpm_solver])
def test_one_graph_draws_what_eager_draws(head, compiled, solver):
    """For changing rows, step counts and scales, given as numbers and as tensors."""

    def f(z, table, cfg):
        return head.denoise(z + 1, table, cfg=cfg, temperature=0.9) - z.mean()

    g = compiled(f)
    for rows, steps, cfg in ((6, 4, 3.0), (6, 5, 1.0), (8, 6, 2.5), (8, 6, torch.tensor([2.5])), (4, 7, torch.tensor(1.0))):
        z, results = torch.randn(rows, 48), []
        for run in (f, g):
            torch.manual_seed(2)
            results.append((run(z, solver(steps), cfg), torch.rand(())))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1]), "another number of draws"


def test_given_noise_and_settings_reach_the_loop(head, compiled):
    settings = {"table": solvers.ddpm(3), "cfg": 3.0, "noise": torch.randn(3, 16), "step_noise": torch.randn(3, 6, 16)}
    settings |= {"dtype": torch.float64, "backend": "hoisted"}
    z = torch.randn(6, 48)
    out = compiled(lambda z: head.denoise(z, **settings))(z)
    assert out.dtype == torch.float64
    assert torch.equal(out, head.denoise(z, **settings))


def test_of_a_module_in_training(compiled):
    """Parameters and input that want gradients get none, compiled or not; the module's own type does not matter."""
    head = MLPHead.from_module(MLPNet(MLPSpec(16, 32, 1, 48)))
    table, z, noise = solvers.dpm_solver(3), torch.randn(4, 48, requires_grad=True), torch.randn(4, 16)
    out = compiled(lambda z: head.denoise(z * 2, table, noise=noise))(z)
    assert not out.requires_grad
    assert torch.equal(out, head.denoise(z * 2, table, noise=noise))


def test_two_draws_are_not_taken_for_one(head, compiled):
    table = solvers.ddpm(2)
    first, second = compiled(lambda z: (head.denoise(z, table), head.denoise(z, table)))(torch.zeros(2, 48))
    assert not torch.equal(first, second)


def test_parameters_changed_inside_a_graph_count(head, compiled):
    table, z, noise = solvers.dpm_solver(3), torch.randn(4, 48), torch.randn(4, 16)

    def f(z):
        with torch.no_grad():
            before = head.denoise(z, table, noise=noise)
            head._net.input_proj.bias.add_(1)
            return before, head.denoise(z, table, noise=noise)

    expected = [head.denoise(z, table, noise=noise)]
    twin = copy.deepcopy(head)
    with torch.no_grad():
        twin._net.input_proj.bias.add_(1)
    expected.append(twin.denoise(z, table, noise=noise))
    for one, two in zip(compiled(f)(z), expected, strict=True):
        assert torch.equal(one, two)


def test_with_a_generator_it_works_in_two_graphs(head):
    table, z = solvers.ddpm(3), torch.randn(4, 48)

    def f(z, generator):
        return head.denoise(z, table, generator=generator) * 2

    out = torch.compile(f, backend="aot_eager")(z, torch.Generator().manual_seed(1))
    assert torch.equal(out, f(z, torch.Generator().manual_seed(1)))


def test_errors_come_through(head, compiled):
    table = solvers.dpm_solver(2)
    with pytest.raises(ValueError, match="even number of rows"):
        compiled(lambda z: head.denoise(z, table, cfg=2.0, noise=torch.zeros(2, 16)))(torch.zeros(5, 48))


def test_a_forgotten_head_leaves_nothing_behind():
    from disa_fast import ops

    head = MLPHead.from_state_dict(random_parameters(MLPSpec(16, 64, 1, 48), 0))
    number = head._number
    assert ops._heads[number] is head
    assert copy.deepcopy(head)._number != number
    del head
    assert number not in ops._heads


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this PyTorch cannot be told")
@pytest.mark.parametrize("name", ["mlp_denoise", "draw_noise"])
def test_the_operators_are_no_part_of_somebody_elses_cuda_graph(name):
    """torch.compile(mode="reduce-overhead") cuts its graphs at what has this tag."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.disa_fast, name).default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.aten.mul.Tensor.tags
