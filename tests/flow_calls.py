"""Small FlowAR and xAR models at random, and calls of their heads, for tests that need no trained or recorded ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from disa_fast import models, solvers

Model = models.FlowAR | models.XAR

KINDS = ["plain", "cross", "cell"]  # FlowAR's head without and with cross-attention, and xAR's
CPU = torch.device("cpu")


def small_model(
    kind: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU, width: int = 32, depth: int = 1, side: int = 2
) -> Model:
    """Every parameter random, so that each of them matters. width: of the backbone; depth: of each of its halves; side: of the last
    scale or of a cell, in tokens."""
    torch.manual_seed(0)
    both = {"embed_dim": width, "depth": depth, "num_heads": 2}
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in both.items()}
    if kind == "cell":
        model = models.XAR(img_size=32 * side, clusters=4, class_num=10, **sizes)
    else:
        sizes |= {"img_size": 16 * side, "scale": (1, side), "diffloss_w": max(64, width), "diffloss_d": depth}
        model = models.FlowAR(cross=kind == "cross", class_num=10, **sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval().to(device, dtype)


def call(
    model: Model,
    seed: int = 0,
    n: int = 1,
    steps: int = 3,
    solver: solvers.Solver = solvers.flow_euler_maruyama,
    side: int = 2,
    cell: int = 1,
    **changed: object,
) -> dict:
    """Arguments of the head's `denoise` for n guided trajectories: of side x side tokens in FlowAR, of a cell in xAR."""
    generator, head = torch.Generator().manual_seed(seed), model.head

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).to(head.device)

    if isinstance(model, models.XAR):
        tokens = head.tokens_of_a_cell
        empty = head.begin(torch.arange(2 * n, device=head.device) % 10)
        context = {name: randn(*t.shape).to(t.dtype) for name, t in empty.items()}
        seen = {"context": context, "at": cell * tokens, "guided_rows": True}
    else:
        tokens = side * side
        seen = {"z": randn(2 * n, tokens, head.spec.z_channels).to(head.dtype)}
    noise, step_noise = randn(n, tokens, 16), randn(steps, n, tokens, 16, dtype=torch.float64)
    settings = {"table": solver(steps), "cfg": 2.4, "guidance": (0.0, 0.9), "noise": noise, "step_noise": step_noise}
    return seen | settings | changed


def run(model: Model, settings: dict, backend: str = "triton", **changed: object) -> Tensor:
    """[n, tokens, channels]"""
    return model.head.denoise(**{**settings, "backend": backend, **changed})[: len(settings["noise"])]


def context_of(settings: dict) -> dict[str, Tensor]:
    """The tensors that the network sees beside state and time, by name."""
    return settings.get("context") or {"z": settings["z"]}


def with_context(settings: dict, change: Callable[[str, Tensor], Tensor]) -> dict:
    """`settings` with change(name, tensor) for each of those tensors."""
    changed = {name: change(name, tensor) for name, tensor in context_of(settings).items()}
    return {**settings, **({"context": changed} if "context" in settings else changed)}


def in_dtype(settings: dict, dtype: torch.dtype) -> dict:
    """`settings` with copies of those tensors: some backends write into xAR's."""
    return with_context(settings, lambda name, t: t.to(dtype, copy=True))


def counted(model: Model, *names: str) -> tuple[int, ...]:
    counters = model.head.graph_counters()
    return tuple(counters[name] for name in names)


def replaying(draws):
    """(draw, those left): a `draw` that hands out these and no others, each asked for with its shape and dtype."""
    remaining = iter(draws)

    def draw(shape, dtype):
        drawn = next(remaining)
        assert (tuple(shape), dtype) == (tuple(drawn.shape), drawn.dtype)
        return drawn

    return draw, remaining


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
