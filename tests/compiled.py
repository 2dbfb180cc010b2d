"""What every system draws under torch.compile, each case in a process of its own, in which disa_fast has not done anything before.

    python compiled.py FOLDER CASE-BACKEND ...

imports once and forks for each case. Each writes FOLDER/CASE-BACKEND.pt, or to FOLDER/CASE-BACKEND.txt what went wrong. BACKEND is
torch.compile's, or "none" where nothing is compiled.
"""

import functools
import importlib
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flow_peers
import harmon_peers
import mar_peers
import numpy as np
import torch
import torch._inductor.config
from upstream_like import SMALL, UnannealedDiffLoss, UpstreamLikeMAR, small_mar

from disa_fast import accelerate, models, solvers
from disa_fast.heads.flow import coefficients
from disa_fast.solvers import diffusion

LABELS = torch.tensor([1, 7])
PROMPTS = {
    "input_ids": torch.tensor([[3, 1, 4, 1, 5], [7, 0, 0, 0, 0]]),
    "attention_mask": torch.arange(5) < torch.tensor([[5], [1]]),
}
LLM = harmon_peers.SMALL["llm"] | {"num_hidden_layers": 1}
SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2}
FLOW = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in SIZES.items()}
FLOWAR = FLOW | {"img_size": 64, "scale": (1, 2, 4), "diffloss_d": 1, "diffloss_w": 64}
XAR = FLOW | {"img_size": 128}
DIFF_STEPS, FLOW_STEPS = ({f"{kind}_upper_steps": 6, f"{kind}_lower_steps": 3} for kind in ("diff", "flow"))


@functools.cache
def own_schedule(k: int, K: int) -> int:
    """A user's, which remembers what NumPy made."""
    return int(np.linspace(6, 3, K)[k])


@functools.cache
def own_solver(steps: int) -> solvers.StepTable:
    t = np.linspace(900, 1, steps)
    a = 1 + np.cos(t) / 7
    zero = np.zeros(steps)
    return solvers.StepTable("own", t, a, b=a / -3, c=zero, l0=np.log(a / 9), l1=zero, noisy=t > 1, draws=True)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A model, accelerated with these settings unless None, and the method of it that draws, with these arguments.

    compiled_before: the method was compiled, and run, before the model was accelerated."""

    make: Callable[[], torch.nn.Module]
    arguments: dict[str, object]
    accelerated: dict[str, object] | None = None
    method: str = "sample_tokens"
    compiled_before: bool = False


NATIVE_MASKED = {"num_iter": 2, "schedule": "linear:6-3"}
MASKED = {"num_iter": 2, "cfg": 3.0}
CLASSES = MASKED | {"bsz": 2, "labels": LABELS}
NATIVE_FLOW = {"labels": LABELS, "schedule": "linear:6-3"}
OWN = {"schedule": own_schedule, "solver": own_solver}


def mar_peer() -> torch.nn.Module:
    return randomized(mar_peers.UpstreamMAR(mar_peers.AnnealedDiffLoss, **SMALL, **DIFF_STEPS))


CASES = {
    "Mar": Case(small_mar, NATIVE_MASKED | {"labels": LABELS}),
    "MarCounted": Case(lambda: UpstreamLikeMAR(UnannealedDiffLoss), CLASSES, OWN),
    "MarPeer": Case(mar_peer, CLASSES, {}),
    "MarPeerCompiledBefore": Case(mar_peer, CLASSES, {}, compiled_before=True),
    "Harmon": Case(lambda: randomized(models.Harmon(**harmon_peers.SMALL | {"llm": LLM})), NATIVE_MASKED | PROMPTS),
    "HarmonPeer": Case(lambda: harmon_peers.harmon_small(llm=LLM, **DIFF_STEPS), MASKED | PROMPTS, {}, "sample"),
    "HarmonPeerCounted": Case(
        lambda: harmon_peers.harmon_small(harmon_peers.OriginalHarmon, llm=LLM, num_sampling_steps="4"),
        MASKED | PROMPTS,
        {"schedule": "linear:6-3"},
        "sample",
    ),
    "FlowAR": Case(lambda: randomized(models.FlowAR(**FLOWAR)), NATIVE_FLOW),
    "FlowARPeer": Case(
        lambda: randomized(flow_peers.flowar_large(**FLOWAR)), {"labels": LABELS, "guidance": 0.9, "cfg": 2.0, **FLOW_STEPS}, {}
    ),
    "Xar": Case(lambda: randomized(models.XAR(**XAR)), NATIVE_FLOW),
    "XarPeer": Case(lambda: randomized(flow_peers.xar_base(**XAR)), {"label": LABELS, "cfg": 2.0, **FLOW_STEPS}, {}),
}


def tables() -> dict[str, torch.Tensor]:
    """What is kept for the process, as it is now."""
    made = {"betas": diffusion.cosine_betas(), "alphas_cumprod": diffusion.cosine_alphas_cumprod()}
    of_flows = {grid: solvers.resolve_flow("euler", grid)(6) for grid in ("flowar", "uniform")}
    of_flows["euler_maruyama"] = solvers.resolve_flow("euler_maruyama", "uniform")(6)
    every = of_flows | {name: solvers.resolve(name)(6) for name in solvers.NAMES} | {"own": own_solver(6)}
    for name, table in every.items():
        made |= {f"{name}.{column}": getattr(table, column) for column in ("t", "a", "b", "c", "l0", "l1", "noisy")}
    made |= {f"{name}.coefficients": coefficients(table, torch.device("cpu")) for name, table in of_flows.items()}
    return {name: torch.tensor(np.asarray(array)) for name, array in made.items()}


def run(name: str, backend: str) -> dict[str, object]:
    """compiled: one image, drawn twice, and uncompiled: the same; counts: the handle's, of each of the three; eager: a whole image,
    drawn last; graphs: the operators of each program that was compiled; tables."""
    case, graphs = CASES[name], []
    torch.manual_seed(0)
    model = case.make()
    arguments = dict(case.arguments)
    if backend == "inductor":
        arguments |= {"num_iter": 1} if "num_iter" in arguments else {}
        if name != "Mar":  # one is enough to see that kernels in C++ serve; they take their time to compile
            torch._inductor.config.fallback_by_default = True

    def recorded(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def draw(function, arguments) -> torch.Tensor:
        torch.manual_seed(5)
        np.random.seed(5)
        return function(**arguments)

    def compiled():
        return torch.compile(getattr(model, case.method), backend=recorded)

    def count() -> Counter[int]:
        return Counter(handle.report()["calls_by_evaluations"] if handle else {})

    found: dict[str, object] = {"compiled": [], "counts": [], "graphs": graphs}
    handle = function = None
    if case.compiled_before and backend != "none":
        function = compiled()
        draw(function, arguments)
        graphs.clear()
    if case.accelerated is not None:
        handle = accelerate(model, **case.accelerated)
    uncompiled = getattr(model, case.method)
    for each in (*[function or compiled()] * 2 * (backend != "none"), uncompiled):
        before = count()
        found["compiled"].append(draw(each, arguments))
        found["counts"].append(dict(count() - before))
    found["uncompiled"] = found["compiled"].pop()
    found["eager"] = draw(uncompiled, case.arguments)
    return found | {"tables": tables()}


def main(folder: Path, *wanted: str) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._inductor.compile_fx")  # here, and not in each process
    for one in wanted:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, of parts of itself
                torch.save(run(*one.split("-")), folder / f"{one}.pt")
        except BaseException:
            (folder / f"{one}.txt").write_text(traceback.format_exc())
        finally:
            os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
