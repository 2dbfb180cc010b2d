"""What a GPU will be asked to launch by its tests and measurements, recorded without one: python -m bench.gpu_launches FILE

The real launch code runs on tensors without storage, up to where Triton would compile and launch.
"""

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import triton

from disa_fast import MLPHead, graphs, solvers, watch
from disa_fast.backends import triton as backend
from disa_fast.heads.mlp import MLPSpec
from disa_fast.kernels.triton import tiles
from disa_fast.models import XAR, FlowAR

from .gpu_measure import FLOW_FIRST, FLOW_TARGETS, ROWS, TARGET_ROWS
from .images import FLOW_SETTINGS, Setting
from .shapes import SIZES, Z_CHANNELS

ROOT = Path(__file__).parent.parent
META = torch.device("meta")
SMALL = (256, 2, 128)  # width, depth and z_channels of the head of most tests

Calls = Iterator[functools.partial]


def record(path: Path, calls: Calls) -> None:
    """Writes there what `calls` launch: [module, kernel, arguments, options] each."""
    if backend.is_interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set, and then nothing is launched")
    found: dict[str, None] = {}

    def run(kernel, *arguments, grid, warmup, **options):
        where = kernel.__module__.removeprefix("disa_fast."), kernel.__name__
        what = [plain(x) for x in arguments], {name: plain(x) for name, x in options.items()}
        found[json.dumps([*where, *what], sort_keys=True)] = None

    def captures(self, device, capture=None, init=graphs.Graphs.__init__):
        init(self, device, lambda loop: (loop(), (lambda: None, 0))[1])

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (triton.JITFunction, "run", run),
            (graphs.Graphs, "__init__", captures),  # as on a GPU
            (backend, "refuses", lambda *_, **__: None),
            (watch.TokenWatch, "warn", lambda self: None),  # who reads numbers
            (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),  # which knows no such device
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        for call in calls:
            call()
    path.write_text("[" + ",\n".join(found) + "]\n")


def plain(x: object) -> object:
    """An argument of a launch as JSON: of a tensor, what Triton looks at."""
    if isinstance(x, torch.Tensor):
        return {"dtype": str(x.dtype).removeprefix("torch."), "address": x.data_ptr() % 16}
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise TypeError(f"a kernel is launched with {x!r}, which cannot be recorded")


def measured() -> Calls:
    """The heads and images of bench.gpu_measure, and SMALL; the heads also with each option of their tiles the other way."""
    heads = [(*size, Z_CHANNELS) for size in SIZES.values()] + [SMALL]
    for gpu, head, dtype, cfg in itertools.product(("", *tiles.tuned()), heads, backend.DTYPES, (3.0, 1.0)):
        call = functools.partial(tokens, *head, dtype, cfg=cfg, gpu=gpu)
        for rows in {*TARGET_ROWS, *ROWS.values(), tiles.ROW_CLASSES[2]}:
            yield functools.partial(call, rows)
            if dtype == torch.float32:
                yield functools.partial(call, rows, precision="high")
        chosen = vars(tiles.choose(gpu, backend.DTYPES[dtype], head[0], tiles.FEW))
        for option in (name for name, value in chosen.items() if isinstance(value, bool) and dtype != torch.float32):
            yield functools.partial(call, tiles.FEW, changed={option: not chosen[option]})
    for (name, setting), batch, dtype in itertools.product(FLOW_SETTINGS.items(), FLOW_TARGETS, backend.DTYPES):
        if name in FLOW_FIRST or dtype == torch.bfloat16:
            yield functools.partial(published_image, setting, batch, dtype)


def tested() -> Calls:
    """The calls of tests/test_gpu.py and tests/test_flow_gpu.py, whose parameters they are."""
    sys.path += [str(ROOT / folder) for folder in ("tests", "bench")]
    import flow_calls
    import test_flow_gpu
    import test_gpu

    test_flow_gpu.GPU = META
    for p in parameters(test_gpu.test_is_as_good_as_eager):
        yield functools.partial(tokens, p["width"], p["depth"], SMALL[2], p["dtype"], p["rows"], p["cfg"])
    for p in parameters(test_gpu.test_a_row_does_not_depend_on_its_neighbours):
        yield functools.partial(tokens, 1280, 1, SMALL[2], p["dtype"], p["rows"], 1.0, batch_invariant=p["batch_invariant"])
    for p in parameters(test_flow_gpu.test_is_as_good_as_eager):
        model = flow_calls.small_model(p["kind"], p["dtype"], META, **test_flow_gpu.LARGER)
        side = 1 if p["cell"] == 0 else test_flow_gpu.LARGER["side"]
        for where in ({"n": p["n"], "cell": p["cell"], "side": side}, {}):
            yield functools.partial(flow_calls.run, model, flow_calls.call(model, **where))
        yield functools.partial(image, model, 2)
    for p in parameters(test_flow_gpu.test_images_as_recorded):
        model = test_flow_gpu.recorded_model(p["which"], p["stem"], p["case"].get("model"))
        yield functools.partial(image, model, 2, cfg=2.0)


def parameters(test: object) -> Iterator[dict]:
    """Arguments of a parametrised test by name, for each of its cases."""
    marks = [mark.args for mark in test.pytestmark if mark.name == "parametrize"]
    for case in itertools.product(*(values for _, values in marks)):
        arguments = {}
        for (names, _), value in zip(marks, case, strict=True):
            value = getattr(value, "values", [value] if isinstance(names, str) else value)
            arguments |= zip([names] if isinstance(names, str) else names, value, strict=True)
        yield arguments


def tokens(
    width: int, depth: int, z: int, dtype: torch.dtype, rows: int, cfg: float,
    gpu: str = "", changed: dict[str, bool] | None = None, precision: str = "highest", **how: bool,
) -> None:  # fmt: skip
    """A call of an MLP head, by the tiles tuned for `gpu`, some fields of them changed."""

    def choose(_, *shape, choose=tiles.choose):
        return replace(choose(gpu, *shape), **changed or {})

    spec, n, steps = MLPSpec(16, width, depth, z), rows if cfg == 1 else rows // 2, 2
    torch.set_float32_matmul_precision(precision)
    with META, mock.patch.object(tiles, "choose", choose):
        head = MLPHead.from_state_dict({name: torch.empty(shape, dtype=dtype) for name, shape in spec.shapes().items()})
        noise = {"noise": torch.empty(n, 16), "step_noise": torch.empty(steps, n, 16)}
        head.denoise(torch.empty(rows, z, dtype=dtype), solvers.ddpm(steps), cfg, **noise, backend="triton", **how)


def published_image(setting: Setting, batch: int, dtype: torch.dtype) -> None:
    """With few of the blocks, which are all alike."""
    depths = dict.fromkeys(("encoder_depth", "decoder_depth", *(["diffloss_d"] if setting.has_backbone else [])), 2)
    with META:
        model = setting.native(setting.size, **depths).to(dtype).eval()
    image(model, batch, **setting.sampling.arguments(model))


def image(model: FlowAR | XAR, batch: int, **how: object) -> None:
    draw = functools.partial(torch.empty, device=META)
    how |= {"schedule": "constant:4", "backend": "triton"}
    model.sample_tokens(None, bsz=batch, draw=lambda shape, dtype: draw(shape, dtype=dtype), **how)


if __name__ == "__main__":
    record(Path(sys.argv[1]), itertools.chain(measured(), tested()))
