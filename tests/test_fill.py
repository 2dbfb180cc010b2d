"""What a call hands to its graph, and the noise it draws for it: bit for bit, whatever the tensors look like in memory."""

import pytest
import torch
from random_parameters import random_parameters

from disa_fast import MLPHead, graphs, solvers
from disa_fast.backends import triton
from disa_fast.heads import mlp
from disa_fast.heads.mlp import MLPSpec, TorchDraw, draw_noise, draws_of

CPU = torch.device("cpu")
INPUTS = ("z", "times", "steps", "scalars", "noise", "x")


def in_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT


def repeated(tensor: torch.Tensor) -> torch.Tensor:
    """The first of its last but one dimension over and over, in the memory of one."""
    return tensor.narrow(-2, 0, 1).expand_as(tensor)


def within_more(tensor: torch.Tensor) -> torch.Tensor:
    more = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
    more[..., 1:-2] = tensor
    return more[..., 1:-2]


def filled(head: MLPHead, dtype: torch.dtype, z, cfg, temperature, noise, step_noise, table) -> graphs.Buffers:
    """Buffers of a bucket, NaN before."""
    w = head.packed("triton", dtype, triton.Weights)
    rows = graphs.row_bucket(len(z))
    chosen = triton.tiles.choose(w.gpu, triton.DTYPES[dtype], w.spec.width, rows)
    shape = triton.Shape(len(table), rows, cfg != 1.0, step_noise is not None, chosen, "ieee")
    buffers = graphs.allocate(triton.layout(w, shape), CPU)
    for name in INPUTS:
        buffers[name].fill_(torch.nan)
    triton.inputs(w, z, table, cfg, temperature, noise, step_noise)(buffers)
    return buffers


@pytest.fixture(scope="module")
def head() -> MLPHead:
    return MLPHead.from_state_dict(random_parameters(MLPSpec(5, 32, 1, 48), 0))


@pytest.mark.interpreter
@pytest.mark.parametrize("looks", [torch.clone, in_columns, repeated, within_more])
@pytest.mark.parametrize(("rows", "cfg"), [(8, 3.0), (6, 2.3), (8, 1.0), (5, 1.0), (2, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_as_given_and_what_is_padded_stays_as_it_was(head, dtype, rows, cfg, looks):
    guided, table, temperature = cfg != 1.0, solvers.ddpm(4), 0.1
    n = rows // 2 if guided else rows
    z, noise, step_noise = (looks(torch.randn(shape)) for shape in ((rows, 48), (n, 5), (4, n, 5)))
    z = looks(z.to(dtype))
    b = filled(head, dtype, z, cfg, temperature, noise, step_noise, table)
    for half, into in zip(z.chunk(1 + guided), b["z"].chunk(1 + guided), strict=True):
        assert torch.equal(into[: len(half)], half)
        assert into[len(half) :].isnan().all()
    for name, given in (("x", noise), ("noise", step_noise)):
        assert torch.equal(b[name][..., :n, :], given)
        assert b[name][..., n:, :].isnan().all()
    w = head.packed("triton", dtype, triton.Weights)
    assert torch.equal(b["times"], w.time_table(table))
    assert torch.equal(b["steps"], w.step_table(table))
    assert b["scalars"].tolist() == torch.tensor([cfg, temperature]).tolist()


@pytest.mark.interpreter
def test_without_noise_of_the_steps(head):
    b = filled(head, torch.float32, torch.randn(4, 48), 1.0, 1.0, torch.randn(4, 5), None, solvers.dpm_solver(3))
    assert b["noise"].shape == (0, 4, 5)
    assert torch.equal(b["steps"], head.packed("triton", torch.float32, triton.Weights).step_table(solvers.dpm_solver(3)))


def test_a_span_ends_where_its_last_buffer_ends():
    layout = {"a": ((3,), torch.float32), "b": ((5, 2), torch.bfloat16), "c": ((1,), torch.float64), "d": ((2,), torch.int32)}
    buffers = graphs.allocate(layout, CPU)
    buffers.arena.zero_()
    span = buffers.span("b", "c")
    assert len(span) == graphs.ALIGNMENT + 8
    span.fill_(255)
    assert (buffers["a"] == 0).all()
    assert (buffers["d"] == 0).all()
    assert buffers["b"].isnan().all()
    assert buffers["c"].isnan().all()


def test_the_result_of_a_call_without_a_graph_keeps_no_working_memory(head, monkeypatch):
    monkeypatch.setenv("DISA_FAST_GRAPHS", "0")
    monkeypatch.setattr(triton, "loop", lambda w, shape, b: None)
    z, noise = torch.randn(4, 48), torch.randn(4, 5)
    out = triton.denoise(head, z, solvers.dpm_solver(2), 1.0, 1.0, noise, None, False)
    assert out.untyped_storage().nbytes() == out.nbytes


# Noise -----------------------------------------------------------------------------------------------------------------


def check_draws(shape: tuple[int, ...], seeded: bool) -> None:
    """Numbers and the generator's state afterwards, as of one torch.randn after the other."""
    results = []
    for together in (False, True):
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(4) if seeded else None
        draw = TorchDraw(CPU, CPU, generator)
        drawn = (
            draw.several(shape, torch.float32)
            if together
            else torch.stack([draw(shape[1:], torch.float32) for _ in range(shape[0])])
        )
        results.append((drawn, torch.rand(3), torch.rand(3, generator=generator)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


SHAPES = [(1, 1, 1), (3, 1, 5), (4, 3, 5), (5, 16, 16), (2, 7, 9), (50, 14, 16)]


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_of_the_steps_is_what_one_draw_after_the_other_gives(shape, seeded):
    check_draws(shape, seeded)


def test_other_numbers_would_be_seen(monkeypatch):
    monkeypatch.setattr(TorchDraw, "several", lambda self, shape, dtype: torch.randn(shape, dtype=dtype))
    with pytest.raises(AssertionError):
        check_draws((2, 7, 9), seeded=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("guided", [False, True])
def test_draws_are_those_of_the_published_sampler(dtype, guided):
    """The start, of trajectories; then every step, of all rows, the first in float32."""
    table, rows = solvers.ddpm(4), 6
    torch.manual_seed(5)
    start = torch.randn(rows // 2 if guided else rows, 16)
    steps = [torch.randn(rows, 16, dtype=torch.float32 if i == 0 else dtype).to(dtype) for i in range(4)]
    torch.manual_seed(5)
    noise, step_noise = draw_noise(table, rows, 16, guided, *draws_of(None, CPU), dtype)
    assert torch.equal(noise, start)
    assert torch.equal(step_noise, torch.stack(steps))


def test_a_time_table_of_the_bytes_of_times_is_that_of_the_times():
    table, seen = solvers.ddpm(7), []
    mlp.TimeTables(lambda t: seen.append(t) or t, CPU)(table)
    assert seen[0].dtype == torch.float64
    assert seen[0].tolist() == table.t.tolist()
