"""torch.compile of whole samplers: the tokens of the eager ones, and nothing left behind that a later call would see."""

import inspect
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import compiled
import numpy as np
import pytest
import torch
from compare import assert_close
from torch import nn
from upstream_like import AnnealedDiffLoss, UpstreamLikeMAR, small_mar

import disa_fast
from disa_fast import MLPHead, accelerate, solvers
from disa_fast.heads.mlp import MLPNet, MLPSpec
from disa_fast.training import diffusion_loss
from disa_fast.untraced import untraced

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join(map(str, (Path(disa_fast.__file__).parent.parent, ROOT / "tests", ROOT / "bench")))
# Each takes seconds, and shows nothing that those beside it do not.
LEFT_OUT = {"MarCounted-inductor", "MarPeerCompiledBefore-inductor", "HarmonPeer-eager", "HarmonPeerCounted-inductor"}
CALLS = [f"{name}-{backend}" for name in compiled.CASES for backend in ("eager", "inductor")]
CALLS = [
    pytest.param(call, marks=[pytest.mark.slow] if call.endswith("inductor") else []) for call in CALLS if call not in LEFT_OUT
]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """Of a call by its name, among those that are to be tested."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
    calls = [item.callspec.params["call"] for item in request.session.items if item.originalname == "test_a_fresh_process"]
    wanted = calls + sorted({call.split("-")[0] + "-none" for call in calls})
    command = [sys.executable, ROOT / "tests" / "compiled.py", folder, *wanted]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    def of(call):
        if not (folder / f"{call}.pt").exists():
            failure = folder / f"{call}.txt"
            pytest.fail(failure.read_text() if failure.exists() else done.stderr)
        return torch.load(folder / f"{call}.pt")

    return of


@pytest.mark.parametrize("call", CALLS)
def test_a_fresh_process(results, call):
    name, backend = call.split("-")
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler, as inductor does")
    found, never = results(call), results(f"{name}-none")

    for tokens in found["compiled"]:
        assert_close(tokens, found["uncompiled"], worst=1e-5 * float(found["uncompiled"].abs().max()))
    assert torch.equal(found["eager"], never["eager"])
    assert found["tables"].keys() == never["tables"].keys()
    for table, values in never["tables"].items():
        assert values.dtype in (torch.float64, torch.bool)
        assert found["tables"][table].dtype == values.dtype, table
        assert torch.equal(found["tables"][table], values), table

    operators = {operator for graph in found["graphs"] for operator in graph}
    if name.startswith(("FlowAR", "Xar")):
        assert not operators
    elif not compiled.CASES[name].compiled_before:
        assert any("linear" in operator for operator in operators), "the backbone is not compiled"
    assert not [operator for operator in operators if "rand" in operator or "denoise" in operator]
    assert found["counts"][:2] == found["counts"][2:] * 2
    assert bool(found["counts"][2]) == (compiled.CASES[name].accelerated is not None)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_compiled_module_draws_what_the_module_draws(accelerated):
    """Its forward is not what is called; accelerated before or after it was compiled."""
    model = UpstreamLikeMAR(AnnealedDiffLoss) if accelerated else small_mar()
    arguments = {"bsz": 2, "num_iter": 2, "cfg": 3.0, "labels": torch.tensor([1, 7])}
    before = torch.compile(model, backend="eager")
    if accelerated:
        accelerate(model)
    tokens = []
    for each in (model, before, torch.compile(model, backend="eager")):
        torch.manual_seed(3)
        np.random.seed(3)
        tokens.append(each.sample_tokens(**arguments))
    assert torch.equal(tokens[1], tokens[0])
    assert torch.equal(tokens[2], tokens[0])


def test_the_training_loss_is_one_graph_and_the_same():
    """Its tables are constants, in float64."""
    net, target, z = MLPNet(MLPSpec(16, 32, 1, 48)), torch.randn(6, 16), torch.randn(6, 48)
    losses = []
    for loss in (diffusion_loss, torch.compile(diffusion_loss, backend="eager", fullgraph=True)):
        torch.manual_seed(1)
        losses.append(loss(net, target, z).detach())
    assert torch.equal(*losses)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")  # PyTorch's, of a table in a guard
@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_a_head_whose_table_is_made_where_it_is_compiled(rng):
    head = MLPHead.from_module(MLPNet(MLPSpec(16, 32, 1, 48)))

    def draw(z, steps):
        return head.denoise(z * 2, solvers.resolve("ddim")(steps), cfg=2.0, rng=rng) + 1

    results = []
    for f in (draw, torch.compile(draw, backend="eager")):
        torch.manual_seed(1)
        results.append(f(torch.ones(4, 48), 5))
    assert torch.equal(*results)


# The decorator --------------------------------------------------------------------------------------------------------


@untraced
@cache
def kept(steps: int = 3) -> np.ndarray:
    """What it is for."""
    assert not torch.compiler.is_compiling()
    return np.arange(steps) / 7


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).requires_grad_(False)

    def network(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sin()

    def loop(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        assert not torch.compiler.is_compiling()
        for _ in range(steps):
            x = self.network(x) + torch.from_numpy(kept()).float()
        return x

    whole = untraced(loop)
    around = untraced(recursive=False)(loop)


@pytest.fixture
def graphs():
    torch.compiler.reset()
    return []


@pytest.fixture
def recorded(graphs):
    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    return partial(torch.compile, backend=backend)


def test_untraced_looks_like_what_it_decorates():
    assert (kept.__name__, kept.__doc__) == ("kept", "What it is for.")
    assert inspect.signature(kept) == inspect.signature(kept.__wrapped__.__wrapped__)
    assert inspect.signature(Model.whole) == inspect.signature(Model.loop)
    assert pickle.loads(pickle.dumps(solvers.ddpm)) is solvers.ddpm
    assert pickle.loads(pickle.dumps(partial(solvers.ddpm, clip=900)))(5).solver == "ddpm"


def test_what_is_called_around_it_is_traced_and_it_is_not(recorded, graphs):
    model, x = Model(), torch.ones(2, 3)

    def f(x):
        y = model.whole(x.cos(), 2)
        return y.exp() + kept(5).sum()

    kept.__wrapped__.cache_clear()
    assert torch.equal(recorded(f)(x), f(x))
    assert isinstance(kept(5), np.ndarray)
    assert kept(5).dtype == np.float64
    operators = [operator for graph in graphs for operator in graph]
    assert "cos" in operators
    assert "exp" in operators
    assert not any("linear" in operator or "sin" in operator.split(".") for operator in operators)


@pytest.mark.parametrize(("name", "traced"), [("whole", False), ("around", True)])
def test_compiled_itself(recorded, graphs, name, traced):
    model, x = Model(), torch.ones(2, 3)
    kept.__wrapped__.cache_clear()
    assert torch.equal(recorded(getattr(model, name))(x, 3), model.loop(x, 3))
    assert kept().dtype == np.float64
    assert bool(graphs) == traced
    assert all("linear" in graph[0] and "sin" in graph[1] for graph in graphs)


def test_many_functions_and_calls_reach_no_limit(recorded, caplog):
    """All wrappers share one code object, of which torch.compile would soon have too many programs."""
    each = [untraced(partial(lambda i, *given: np.arange(i + len(given)) / 3, i)) for i in range(20)]

    def f(x):
        for i, function in enumerate(each):
            with torch.no_grad():
                x = x + float(function(*range(i)).sum())
        return x

    assert torch.equal(recorded(f)(torch.zeros(3)), f(torch.zeros(3)))
    assert "recompile_limit" not in caplog.text


def test_errors_come_through(recorded):
    with pytest.raises(ValueError, match="1 to 1000 denoising steps, got 0"):
        recorded(lambda x: x + solvers.ddpm(0).t[0])(torch.zeros(1))


def test_importing_and_sampling_do_not_load_the_compiler():
    """Which takes as long as importing torch itself."""
    code = """
import sys, torch, disa_fast
from upstream_like import small_mar
model = small_mar()
model.sample_tokens(None, bsz=1, num_iter=2)
disa_fast.solvers.flow_euler(4)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": PATH})
