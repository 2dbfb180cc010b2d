"""On a GPU: what test_captures.py checks by a stand-in, and draws into one tensor."""

import pytest
import torch
from meanwhile import done_while_capturing

from disa_fast import MLPHead
from disa_fast.graphs import Graphs
from disa_fast.heads.mlp import MLPNet, MLPSpec, TorchDraw

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

GPU = torch.device("cuda")
SIZE = 512


class Doubling:
    """x -> 2 W x by cuBLAS, as graphs of one head."""

    def __init__(self) -> None:
        self.graphs, self.w = Graphs(GPU), torch.randn(SIZE, SIZE, device=GPU).bfloat16()

    def __call__(self, key: str, x: torch.Tensor, within: object = lambda: None) -> torch.Tensor | None:
        def loop(b):
            torch.mm(b["x"], self.w, out=b["y"])
            within()
            b["y"].mul_(2)

        layout = dict.fromkeys("xy", ((8, SIZE), torch.bfloat16))
        return self.graphs.run(key, 8, lambda: layout, lambda b: b["x"].copy_(x), loop, lambda b: b["y"].clone())

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w) * 2


def close(out: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return out is not None and torch.allclose(out.float(), expected.float(), rtol=2e-2, atol=2e-1)


def wait_for_the_device() -> None:
    """An error within a capture, which it ends."""
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()


def test_a_spoiled_capture_costs_nothing_but_itself():
    """Twice: replays go on, later calls capture, memory can be given back, and the default generator draws."""
    run, x = Doubling(), torch.randn(8, SIZE, device=GPU).bfloat16()
    assert close(run("a", x), run.expected(x))
    for failures in (1, 2):
        assert run("b", x, wait_for_the_device) is None
        assert run.graphs.counters()["failures"] == failures
        for key in ("a", f"b{failures}", f"c{failures}"):
            assert close(run(key, x), run.expected(x))
        torch.cuda.empty_cache()
        torch.randn(4, device=GPU)
    del run
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def test_graphs_outlive_cleared_workspaces():
    run, x = Doubling(), torch.randn(8, SIZE, device=GPU).bfloat16()
    for key in "abcd":
        run(key, x)
    entries = run.graphs._cache._entries
    for key in "ab":
        del entries[key]
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    rest = [torch.full((1 << 22,), torch.nan, device=GPU) for _ in range(16)]
    for key in "cd":
        assert close(run(key, x), run.expected(x))
    torch.cuda.synchronize()
    assert len(rest) == 16
    assert run.graphs.counters()["captures"] == 4


def test_weights_are_forgotten_while_another_thread_captures():
    head = MLPHead.from_module(MLPNet(MLPSpec(16, 64, 2, 64)).to(GPU))
    head.hoisted(torch.float32)
    run, x = Doubling(), torch.randn(8, SIZE, device=GPU).bfloat16()

    def forget():
        with torch.cuda.stream(torch.cuda.Stream()):
            head.refresh()
            head.hoisted(torch.float32)
            head.follow()

    with done_while_capturing(forget) as within:
        assert close(run("a", x, within), run.expected(x))
    assert run.graphs.counters() | {"captures": 1, "failures": 0} == run.graphs.counters()


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("shape", [(3, 1, 5), (10, 8, 16), (5, 600, 16)])
def test_noise_of_the_steps_is_what_one_draw_after_the_other_gives(shape, seeded):
    results = []
    for together in (False, True):
        torch.manual_seed(3)
        generator = torch.Generator(GPU).manual_seed(4) if seeded else None
        draw = TorchDraw(GPU, GPU, generator)
        one_by_one = [] if together else [draw(shape[1:], torch.float32) for _ in range(shape[0])]
        drawn = draw.several(shape, torch.float32) if together else torch.stack(one_by_one)
        results.append((drawn, torch.rand(3, device=GPU, generator=generator)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
