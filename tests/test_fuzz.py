"""Malformed calls: whatever is passed, there is an answer as promised, or a ValueError that names the argument.

Every example starts from a valid call and breaks one to three of its arguments. About 500 examples, always the same ones; 10,000
new ones by `pytest tests/test_fuzz.py --hypothesis-profile=fuzz` (`make fuzz`). What was found once is an example ever after, in
`found`. tests/fuzz_checkpoint.py does the like to the bytes of checkpoints.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import io
import math
import re
import tempfile
from fractions import Fraction
from numbers import Real
from pathlib import Path

import numpy as np
import pytest
import torch
import upstream_like
from compare import assert_close
from flow_peers import UpstreamFlowAR, UpstreamXAR
from harmon_peers import harmon_small
from random_parameters import random_parameters
from torch import Tensor, nn

import disa_fast
from disa_fast import FlowTransformerHead, MLPHead, Philox, UnsupportedError, checkpoint, cli, models, solvers, vae
from disa_fast.backends import cpu
from disa_fast.demo.captions import VOCABULARY, every_prompt, make_tokenizer
from disa_fast.heads.flow_transformer import FlowTransformerSpec
from disa_fast.heads.mlp import MLPSpec
from disa_fast.identify import identify
from disa_fast.solvers import StepTable

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.usefixtures("one_thread")


def fuzz(share, calls):
    """A test of (which, broken): one of `calls`, and one to three of its arguments, by the strategies of what to pass for them.
    share: of a thousand examples."""

    def call(which):
        names = st.lists(st.sampled_from(sorted(calls[which])), min_size=1, max_size=3, unique=True)
        broken = names.flatmap(lambda some: st.fixed_dictionaries({name: calls[which][name] for name in some}))
        return st.tuples(st.just(which), broken)

    count = max(1, share * hypothesis.settings.default.max_examples // 1000)

    def decorate(test):
        return hypothesis.settings(max_examples=count)(hypothesis.given(st.sampled_from(sorted(calls)).flatmap(call))(test))

    return decorate


def found(*cases):
    """Calls that once were met by something else than an answer or a ValueError in words."""

    def decorate(test):
        return functools.reduce(lambda test, case: hypothesis.example(case)(test), cases, test)

    return decorate


def outcome(call, arguments, *others):
    """What call(**arguments) returns; None where it refuses, as promised, by a ValueError that names one of them or of `others`.
    Either way the tensors among them are as they were."""
    before = {name: value.detach().clone() for name, value in arguments.items() if is_readable(value)}
    result = None
    try:
        result = call(**arguments)
    except ValueError as error:
        hypothesis.event(type(error).__name__)
        assert type(error) in (ValueError, UnsupportedError), f"{type(error).__name__} by accident: {error}"
        names = {*inspect.signature(call).parameters, *arguments, *others}
        assert re.search(rf"\b({'|'.join(map(re.escape, names))})\b", str(error)), f"names no argument: {error}"
    else:
        hypothesis.event("valid")
    for name, value in before.items():
        assert as_bytes(value) == as_bytes(arguments[name]), f"{name} was written to"
    return result


def as_bytes(x):
    return bytes(x.detach().clone(memory_format=torch.contiguous_format).untyped_storage())


def is_readable(value):
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided


def assert_tokens(x, shape, dtype, *sources):
    """Of this shape and dtype, finite unless a source is not, or is absurdly large."""
    assert (tuple(x.shape), x.dtype, x.device.type) == (tuple(shape), dtype, "cpu")
    assert x.isfinite().all() or not all(is_tame(source) for source in sources)


def is_tame(source):
    if isinstance(source, Tensor | np.ndarray):
        return bool((torch.as_tensor(source).detach().to_dense().double().abs() < 1e3).all())
    return not isinstance(source, Real) or abs(source) < 1e3


# What to pass ---------------------------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


def conjugated(x):
    """x itself, with the bit set that says that what is in memory is to be negated."""
    return torch.view_as_complex(torch.stack([x, -x], dim=-1)).conj().imag if x.dtype in (torch.float32, torch.float64) else x


def in_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


def with_gradient(x):
    return x.clone().requires_grad_() if x.is_floating_point() or x.is_complex() else x


KINDS = {
    "plain": lambda x: x,
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "expanded": lambda x: x[:1].expand(x.shape) if x.ndim and len(x) else x,
    "conjugated": conjugated,
    "gradient": with_gradient,
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "subclass": lambda x: x.as_subclass(Subclass),
    "inference": in_inference_mode,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "nan": lambda x: x * math.nan if x.is_floating_point() else x,
}
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


def made(shape, dtype=torch.float32, kind="plain", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if dtype in (torch.int64, torch.int32, torch.uint8):
        x = x.abs().mul(4).floor()
    return KINDS["plain" if dtype == torch.float8_e4m3fn and kind in ("sparse", "nan") else kind](x.to(dtype))


def tensors(*shapes, dtypes=FLOATS):
    """Of these shapes or some like them, mostly of these dtypes."""
    likely = st.sampled_from(shapes)
    near = likely.flatmap(lambda s: st.permutations(s) | st.sampled_from([s[1:], (*s, 1), (0, *s[1:]), (*s[:-1], 0), (3, *s[1:])]))
    shape = st.one_of(likely, likely, near)
    dtype = st.one_of(st.sampled_from(dtypes), st.sampled_from(dtypes), st.sampled_from(DTYPES))
    return st.builds(made, shape.map(tuple), dtype, st.sampled_from(sorted(KINDS)), st.integers(0, 9))


class Odd:
    """Equal to nothing, not even a truth value."""

    def __repr__(self):
        return "Odd()"

    def __bool__(self):
        raise TypeError("neither true nor false")

    def __eq__(self, other):
        return self

    __hash__ = object.__hash__


ODD = [
    None, True, False, 0, 1, -1, 2**63, -(2**64), 10**400, 0.5, math.nan, math.inf, -math.inf, 1e300, 1j, "", "3", "auto", "nan",
    "\udcff", b"bytes", [], [1], (), (1, 2), {}, {"a": 1}, set(), range(3), object(), Odd(), torch.float16,
    torch.device("cpu"), np.float32(2), np.int8(100), np.uint8(3), np.array(2), np.array([2.0]), np.array(["x"]), np.zeros((4, 10)),
    Fraction(1, 3), torch.Generator(), Philox(3), Path("nowhere"), solvers.ddpm(2),
]  # fmt: skip


def anything():
    """But for what can be called, by which any exception may be raised."""
    return st.one_of(
        st.sampled_from(ODD),
        st.sampled_from(ODD),
        st.integers(-9, 99),
        st.floats(),
        st.text(max_size=6),
        tensors((4, 10), (1,), (), (2,), dtypes=DTYPES),
        st.lists(st.integers(-3, 70), max_size=3),
    )


def mostly(likely, other=None):
    """By the first strategy, and now and then by the other, or anything."""
    return st.integers(0, 2).flatmap(lambda which: likely if which else anything() if other is None else other)


def either(*values):
    """One of these, which a call may well take, or anything."""
    return mostly(st.sampled_from(values))


SCALARS = (1.0, 3, 0.0, -1.5, np.float32(2), torch.tensor(2.0), torch.tensor([3.0], dtype=torch.float64), torch.tensor([[2]]))
TABLES = (
    solvers.ddpm(4), solvers.ddpm(1), solvers.ddim(3), solvers.dpm_solver(2), solvers.flow_euler(4), solvers.flow_euler_maruyama(3),
)  # fmt: skip
BACKENDS = ("auto", "cpu", "hoisted", "reference", "cuda", "triton", "CPU")
GENERATORS = (None, torch.Generator().manual_seed(1))
SCHEDULES = ("constant:2", "linear:3-2", "cosine:3-1", "two-stage:2-1", "list:2,1", disa_fast.Constant(2), lambda k, K: 2.0)


# Heads ----------------------------------------------------------------------------------------------------------------

# Of a width that Triton's kernels refuse, so that they are a backend that cannot serve.
SPECS = {MLPHead: MLPSpec(16, 24, 1, 10), FlowTransformerHead: FlowTransformerSpec(16, 64, 1, 10, cross=True)}
HEADS = {
    f"{kind.__name__} in {dtype}": kind.from_state_dict({name: p.to(dtype) for name, p in random_parameters(spec, 0).items()})
    for kind, spec in SPECS.items()
    for dtype in FLOATS
}
CALLS = {
    MLPHead: {"z": made((4, 10)), "table": solvers.ddpm(4), "cfg": 3.0},
    FlowTransformerHead: {"z": made((2, 4, 10)), "table": solvers.flow_euler_maruyama(3), "cfg": 3.0},
}


def answer(head):
    """Of a valid call."""
    return head.denoise(**CALLS[type(head)], generator=torch.Generator().manual_seed(0))


RIGHT = {name: answer(head) for name, head in HEADS.items()}


def denoise(name, broken):
    """What is made of a call, which a valid one follows: its answer is still right, bit for bit."""
    head = HEADS[name]
    call = CALLS[type(head)] | broken
    out = outcome(head.denoise, call)
    assert torch.equal(answer(head), RIGHT[name])
    if out is not None:
        dtype = torch.promote_types(call.get("dtype") or head.dtype, torch.float32)
        numbers = [call.get(name) for name in ("z", "cfg", "temperature", "noise", "step_noise")]
        assert_tokens(out, (*call["z"].shape[:-1], 16), dtype, *numbers)


COMMON = {
    "table": either(*TABLES),
    "cfg": either(*SCALARS),
    "temperature": either(*SCALARS),
    "generator": either(*GENERATORS),
    "backend": either(*BACKENDS),
    "dtype": either(*FLOATS, torch.float8_e4m3fn, torch.int32),
}
ARGUMENTS = {
    MLPHead: COMMON
    | {
        "z": mostly(tensors((4, 10), (3, 10))),
        "noise": mostly(tensors((2, 16), (4, 16))),
        "step_noise": mostly(tensors((4, 2, 16), (4, 4, 16))),
        "batch_invariant": either(True, False),
        "rng": either("torch", "philox", Philox(1), Philox(1, torch.arange(2))),
    },
    FlowTransformerHead: COMMON
    | {
        "z": mostly(tensors((2, 4, 10), (3, 4, 10))),
        "guidance": either((0.0, 0.9), [0, 1], (0.9, 0.1), (0, 1, 2), ("0", "1"), (math.nan, 1), (None, 1), (torch.zeros(()), 1.0)),
        "noise": mostly(tensors((1, 4, 16), (2, 4, 16))),
        "step_noise": mostly(tensors((3, 1, 4, 16), (2, 2, 4, 16))),
    },
}


@found(
    ("MLPHead in torch.float32", {"generator": 3}),
    ("MLPHead in torch.float32", {"generator": torch.zeros(2)}),
    ("MLPHead in torch.float32", {"backend": ["cpu"]}),
    ("MLPHead in torch.float32", {"batch_invariant": torch.zeros(2)}),
    ("MLPHead in torch.float32", {"dtype": torch.float8_e4m3fn}),
    ("MLPHead in torch.float32", {"cfg": 10**400}),
    ("MLPHead in torch.float32", {"cfg": torch.tensor(3.0, requires_grad=True)}),
    ("MLPHead in torch.float32", {"cfg": torch.tensor(3.0, device="meta")}),
    ("MLPHead in torch.float32", {"cfg": np.array([3.0])}),
    ("MLPHead in torch.float32", {"z": made((4, 10), torch.float32, "sparse")}),
    ("MLPHead in torch.float32", {"noise": made((4, 16), torch.float32, "sparse")}),
    ("FlowTransformerHead in torch.float32", {"z": torch.zeros(2, 0, 10)}),
    ("FlowTransformerHead in torch.float32", {"z": made((2, 4, 10), torch.float32, "sparse")}),
    ("FlowTransformerHead in torch.float32", {"step_noise": made((3, 1, 4, 16), torch.float64, "sparse")}),
    ("FlowTransformerHead in torch.float32", {"generator": "seed"}),
    ("FlowTransformerHead in torch.float32", {"temperature": torch.tensor(1j)}),
)
@fuzz(210, {name: ARGUMENTS[type(head)] for name, head in HEADS.items()})
def test_denoise(case):
    denoise(*case)


@pytest.mark.parametrize("kind", ["strided", "transposed", "conjugated", "gradient", "parameter", "subclass", "inference"])
@pytest.mark.parametrize("backend", ["cpu", "hoisted", "reference"])
@pytest.mark.parametrize("name", ["MLPHead in torch.float32", "FlowTransformerHead in torch.float32"])
def test_how_a_tensor_lies_in_memory_is_of_no_account(name, backend, kind):
    head = HEADS[name]
    if backend == "cpu" and (isinstance(head, FlowTransformerHead) or not cpu.is_built()):
        pytest.skip("not served")
    call, change = CALLS[type(head)], KINDS[kind]
    rows, shape = len(call["z"]) // 2, (*call["z"].shape[1:-1], 16)
    given = {"z": call["z"], "noise": made((rows, *shape)), "step_noise": made((len(call["table"]), rows, *shape))}
    out = head.denoise(**call | given, backend=backend)
    changed = {name: change(tensor) for name, tensor in given.items()}
    assert all(torch.equal(changed[name], tensor) for name, tensor in given.items())
    again = head.denoise(**call | changed, backend=backend)
    assert_close(again, out, worst=1e-5 * float(out.abs().max()))  # a library picks its matrix products by layout
    assert torch.equal(again, out) or backend != "cpu"


def parameters(spec):
    """Changes of a state dict: None takes a parameter away."""
    shapes = spec.shapes() | {"res_blocks.1.in_ln.weight": (24,), "res_blocks.x": (3,), "more": (1,), 3: (2,)}
    change = st.sampled_from(list(shapes)).flatmap(lambda n: st.tuples(st.just(n), st.none() | mostly(tensors(shapes[n]))))
    return st.lists(change, min_size=1, max_size=2).map(dict)


@found(
    ("MLPHead", {"sd": None}),
    ("MLPHead", {"sd": {3: torch.zeros(2)}}),
    ("MLPHead", {"sd": {"input_proj.bias": torch.zeros(24, device="meta")}}),
    ("MLPHead", {"sd": {"input_proj.bias": torch.zeros(24, dtype=torch.float8_e4m3fn)}}),
    ("MLPHead", {"sd": {"input_proj.weight": made((24, 16), torch.float32, "sparse")}}),
    ("MLPHead", {"sd": {"input_proj.weight": made((24, 16), torch.float32, "inference")}}),
    ("FlowTransformerHead", {"prefix": 3}),
)
@fuzz(
    50,
    {
        kind.__name__: {"sd": mostly(parameters(spec)), "prefix": either("", "diffloss.net.", "input_")}
        for kind, spec in SPECS.items()
    },
)
def test_state_dicts(case):
    which, broken = case
    kind = getattr(disa_fast, which)
    sd, changed = random_parameters(SPECS[kind], 0), broken.get("sd")
    if isinstance(changed, dict):
        sd = {name: value for name, value in (sd | changed).items() if value is not None}
        broken = broken | {"sd": sd}
    head = outcome(kind.from_state_dict, {"sd": sd} | broken, "state dict")
    if head is not None:
        z = torch.zeros(1, head.spec.z_channels) if kind is MLPHead else torch.zeros(1, 4, head.spec.z_channels)
        outcome(head.denoise, {"z": z, "table": solvers.flow_euler(2)})


@found(
    ("MLPHead", {"net": None}),
    ("FlowTransformerHead", {"net": {}}),
)
@fuzz(10, {kind.__name__: {"net": anything()} for kind in SPECS})
def test_modules(case):
    which, broken = case
    outcome(getattr(disa_fast, which).from_module, broken)


WARMUP = {
    "schedule": either(*SCHEDULES),
    "K": either(1, 2, 0),
    "rows": either(1, 2, [2, 4], [], lambda k, K: 2, lambda k, K: "x"),
    "guided": either(True, False),
    "solver": either(*solvers.NAMES, solvers.flow_euler),
    "clip": either("default", None, 900, 10**30),
    "backend": either(*BACKENDS),
    "dtype": either(*FLOATS, torch.int32),
    "batch_invariant": either(True, False),
}


@found(
    ("warmup", {"K": "2"}),
    ("warmup", {"rows": 3.5}),
    ("warmup", {"rows": np.array(2)}),
    ("warmup", {"rows": 2**63}),
    ("warmup", {"rows": 3}),
    ("warmup", {"dtype": 0}),
)
@fuzz(30, {"warmup": WARMUP})
def test_warmup(case):
    head = HEADS["MLPHead in torch.float32"]
    outcome(head.warmup, {"schedule": "constant:2", "K": 2, "rows": 4} | case[1], "steps", "early", "late")


# Schedules, solvers, tables, noise ------------------------------------------------------------------------------------

ANNEALED = {"early": either(50, 10**30, np.uint8(250), np.int8(100)), "late": either(5, 60, np.uint8(2))}
MADE = {"Linear": ANNEALED | {"rounding": either("flowar", "xar")}, "Cosine": ANNEALED, "TwoStage": ANNEALED}
MADE["Constant"] = MADE["StepList"] = {"steps": either(3, 10**30, [3, 2, 2, 1], [np.uint8(3)] * 4, [True] * 4)}
MADE["parse_schedule"] = {
    "text": mostly(
        st.from_regex(r"(linear|cosine|two-stage|constant|list|x):\d{1,3}([-,]\d{1,3}){0,2}", fullmatch=True)
        | st.text(alphabet="linearcoskwtgds:-,0123456789 ", max_size=14)
        | st.sampled_from(["linear:" + "9" * 400 + "-5", "constant:" + "9" * 5000, "list:" + "1," * 50, "linear:\u0665-\u0664"])
    ),
    "rounding": either("mar", "flowar", "xar"),
}
POSITION = {"k": either(0, 1, 3, -1, 10**400, np.int8(3)), "K": either(1, 4, 10**400, np.uint8(4))}
VALID = {"Constant": {"steps": 9}, "StepList": {"steps": [9, 8, 8, 7]}, "parse_schedule": {"text": "linear:50-5"}}


@found(
    ("Linear", {"early": 10**400}),
    ("Linear", {"K": 10**400, "k": 10**399}),
    ("Linear", {"k": "1"}),
    ("Linear", {"k": 0.5}),
    ("Linear", {"rounding": ["mar"]}),
    ("Cosine", {"early": np.uint8(250), "late": np.uint8(2)}),
    ("StepList", {"steps": 3}),
    ("parse_schedule", {"text": "linear:" + "9" * 400 + "-5"}),
)
@fuzz(60, {name: arguments | POSITION for name, arguments in MADE.items()})
def test_schedules(case):
    which, broken = case
    position = {"k": 1, "K": 4} | {name: value for name, value in broken.items() if name in POSITION}
    call = VALID.get(which, {"early": 50, "late": 5}) | {name: value for name, value in broken.items() if name not in POSITION}
    schedule = outcome(getattr(disa_fast, which), call, "schedule", "steps", "early", "late")
    if schedule is not None:
        steps = outcome(schedule, position, "steps")
        assert steps is None or (type(steps) is int and steps >= 1)


STEPS = {"steps": either(1, 2, 50, 1000, 1001, np.int64(7), np.uint8(200))}
CLIP = {"clip": either(None, 950, 0, 999, 10**30, -1, np.int64(900), np.uint8(200))}


@found(
    ("ddpm", {"clip": 10**30}),
    ("ddim", {"steps": 1, "clip": 10**30}),
    ("dpm_solver", {"steps": np.uint8(255)}),
    ("dpm_solver", {"plus_plus": torch.zeros(2)}),
    ("flow_euler", {"grid": np.array(["x", "y"])}),
)
@fuzz(
    50,
    {
        "ddpm": STEPS | CLIP,
        "ddim": STEPS | CLIP,
        "dpm_solver": STEPS | {"plus_plus": either(True)},
        "flow_euler": STEPS | {"grid": either("flowar", "uniform")},
        "flow_euler_maruyama": STEPS,
    },
)
def test_solvers(case):
    which, broken = case
    call = {"steps": 4} | broken
    table = outcome(getattr(solvers, which), call)
    if table is not None:
        assert 1 <= len(table) <= call["steps"]
        assert all(np.isfinite(getattr(table, column)).all() for column in ("t", "a", "b", "c", "l1"))


SOLVER = {"solver": either(*solvers.NAMES, *solvers.FLOW_NAMES, solvers.ddpm)}


@found(
    ("resolve", {"solver": ["ddpm"]}),
    ("resolve", {"clip": np.zeros(2)}),
    ("resolve_flow", {"grid": ["uniform"]}),
)
@fuzz(
    20,
    {
        "resolve": SOLVER | {"clip": either("default", None, 950, 10**30)},
        "resolve_flow": SOLVER | {"grid": either("flowar", "uniform")},
    },
)
def test_solvers_by_name(case):
    which, broken = case
    valid = {"solver": "ddpm"} if which == "resolve" else {"solver": "euler", "grid": "uniform"}
    table_for = outcome(getattr(solvers, which), valid | broken)
    if table_for is not None and "solver" not in broken:
        outcome(table_for, {"steps": 3}, "clip", "grid")


NUMBERS = st.lists(st.floats() | st.floats(-2, 2), min_size=3, max_size=3).map(np.array)
SHAPES = [np.ones(3, np.float32), np.ones((3, 2))[:, 0], np.ones((3, 1)), np.array(0.5), np.ones(0), np.ones(3)[::-1]]
COLUMNS = {name: mostly(NUMBERS | st.sampled_from(SHAPES)) for name in ("t", "a", "b", "c", "l0", "l1")}
COLUMNS["l0"] = mostly(NUMBERS | st.just(np.full(3, -np.inf)))
COLUMNS["noisy"] = either(np.ones(3, bool), np.zeros(3, bool), np.array([True, False, True]), [True] * 3)


@found(
    ("StepTable", {"t": 3}),
    ("StepTable", {"t": np.array(0.5)}),
    ("StepTable", {"a": [0.5, 0.5, 0.5]}),
    ("StepTable", {"noisy": [True] * 3}),
    ("StepTable", {"b": np.array([0.5, math.nan, 0.5])}),
    ("StepTable", {"l0": np.array([0.5, math.inf, 0.5])}),
    ("StepTable", {"l0": np.array([1e5, 0.5, 0.5])}),
)
@fuzz(60, {"StepTable": COLUMNS | {"solver": either("any"), "draws": either(True, False)}})
def test_step_tables(case):
    half = np.full(3, 0.5)
    call = {
        "solver": "any",
        "t": half,
        "a": half,
        "b": half,
        "c": half,
        "l0": -half,
        "l1": half,
        "noisy": np.ones(3, bool),
        "draws": True,
    }
    table = outcome(StepTable, call | case[1])
    if table is not None:
        assert len(repr(table)) > 0
        for name in ("MLPHead in torch.float32", "FlowTransformerHead in torch.float32"):
            columns = [getattr(table, column) for column in ("t", "a", "b", "c", "l0", "l1")]
            tame = all(((column < 30) & (column > -30)).all() for column in columns)
            denoise(name, {"table": table} | ({} if tame else {"temperature": 1e4}))


PHILOX = {
    "seed": either(0, 2**64 - 1, 2**64, np.int64(5), np.uint8(200)),
    "streams": mostly(tensors((2,), dtypes=[torch.int64])),
    "steps": either(range(3), [0], [2**32 - 1], [2**32], [-1], [1.5], np.arange(2), [None]),
    "trajectories": either(2, 0, 3, -1),
    "channels": either(1, 16, 5, 0, -1),
    "dtype": either(*FLOATS, torch.int32, torch.float8_e4m3fn),
    "device": either("cpu", torch.device("cpu"), "meta", "cuda", "nonsense", "cpu:7"),
}


@found(
    ("drawn", {"generator": 71}),
    ("normal", {"steps": 3}),
    ("normal", {"trajectories": -1}),
    ("normal", {"channels": -1}),
    ("normal", {"dtype": torch.int32}),
    ("normal", {"device": "nonsense"}),
    ("normal", {"streams": torch.zeros(2, dtype=torch.int64, device="meta")}),
)
@fuzz(50, {"normal": PHILOX, "drawn": {"generator": either(*GENERATORS)}})
def test_philox(case):
    which, broken = case
    if which == "drawn":
        drawn = outcome(Philox.drawn, broken)
        assert drawn is None or 0 <= drawn.seed < 2**63
        return
    philox = outcome(Philox, {"seed": 3} | {name: value for name, value in broken.items() if name in ("seed", "streams")})
    if philox is not None:
        rest = {name: value for name, value in broken.items() if name not in ("seed", "streams")}
        call = {"steps": [0, 1], "trajectories": 2, "channels": 5} | rest
        noise = outcome(philox.normal, call, "streams")
        if noise is not None and noise.device.type == "cpu":
            assert_tokens(noise, (len(call["steps"]), call["trajectories"], call["channels"]), call.get("dtype", torch.float32))


# Models ---------------------------------------------------------------------------------------------------------------

FLOW_SIZES = {"img_size": 32, "class_num": 3}
FLOW_SIZES |= {
    f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("embed_dim", 16), ("depth", 1), ("num_heads", 2))
}
LLM = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LLM |= {"num_key_value_heads": 1}
MAR_SIZES = upstream_like.SMALL | {"img_size": 32, "class_num": 3, "diffloss_d": 1}
SIZES = {
    "mar": MAR_SIZES,
    "flowar": FLOW_SIZES | {"scale": (1, 2), "diffloss_w": 64, "diffloss_d": 1},
    "xar": FLOW_SIZES | {"clusters": 4},
    "harmon": MAR_SIZES | {"llm": LLM},
}


def numbers():
    """What a constructor may be given for a number; none asks for much memory but those from 2**31 on, which are to be refused."""
    odd = [odd for odd in ODD if type(odd) is not int or abs(odd) < 2**30] + [2**31, 10**18, 10**400]
    return mostly(st.integers(1, 4) | st.floats(0, 1) | st.sampled_from([16, 32, 64]), st.integers(-3, 40) | st.sampled_from(odd))


MODELS = {"mar": models.MAR, "flowar": models.FlowAR, "xar": models.XAR, "harmon": models.Harmon}


def sizes_of(system):
    """Strategies for the constructor's arguments."""
    kinds = [models.MAR, models.Harmon] if system == "harmon" else [MODELS[system]]
    names = {name for kind in kinds for name in inspect.signature(kind).parameters} - {"mar"}
    arguments = {name: numbers() for name in names} | {"size": either("small!", "1.5B")}
    if system == "flowar":
        arguments |= {"scale": mostly(st.lists(st.integers(0, 5), max_size=3).map(tuple)), "cross": either(True, False)}
    if system == "harmon":
        keys = st.sampled_from([*LLM, "head_dim", "attn_implementation", "_attn_implementation", "rope_theta", "layer_types", "x"])
        arguments["llm"] = mostly(st.dictionaries(keys, numbers(), min_size=1, max_size=2).map(lambda some: LLM | some))
    return arguments


@found(
    ("mar", {"img_size": 8}),
    ("mar", {"encoder_num_heads": 3}),
    ("mar", {"encoder_depth": -1}),
    ("mar", {"vae_stride": 0}),
    ("mar", {"buffer_size": 0}),
    ("mar", {"mlp_ratio": 1e-9}),
    ("mar", {"attn_dropout": math.nan}),
    ("mar", {"diffloss_w": np.uint8(200)}),
    ("mar", {"class_num": 2**31}),
    ("mar", {"size": ["large"]}),
    ("flowar", {"scale": (1, 0, 2)}),
    ("flowar", {"diffloss_w": 24}),
    ("xar", {"clusters": 4.0}),
    ("xar", {"patch_size": 64, "clusters": 1}),
    ("harmon", {"llm": {"attn_implementation": "kernels-community/flash-attn3"}}),
    ("harmon", {"llm": LLM | {"num_attention_heads": 0}}),
    ("harmon", {"llm": LLM | {"num_hidden_layers": 0, "head_dim": 2**31}}),
    ("harmon", {"llm": 3}),
)
@fuzz(100, {system: sizes_of(system) for system in SIZES})
def test_constructors(case):
    system, broken = case
    model = outcome(getattr(models, system), SIZES[system] | broken)
    if model is not None:
        images = sampled(model, num_iter=1) if system in ("mar", "harmon") else sampled(model)
        assert images.isfinite().all()


def valid_call(model):
    if isinstance(model, models.Harmon):
        return {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "schedule": "constant:2", "num_iter": 2}
    iterations = {"num_iter": 2} if isinstance(model, models.MAR) else {}
    return {"labels": torch.tensor([0]), "schedule": "constant:2"} | iterations


def sampled(model, **changed):
    return model.sample_tokens(**valid_call(model) | changed, generator=torch.Generator().manual_seed(0))


@functools.cache
def tiny(system):
    """A model, and its answer to a valid call."""
    torch.manual_seed(0)
    model = getattr(models, system)(**SIZES[system]).eval()
    if system == "harmon":
        model.tokenizer = make_tokenizer(every_prompt())
    return model, sampled(model)


SAMPLING = {
    "labels": mostly(
        tensors((1,), (2,), dtypes=[torch.int64, torch.int32]) | st.sampled_from([torch.tensor([2]), torch.tensor([3]), [1]])
    ),
    "schedule": either(*SCHEDULES),
    "num_iter": either(1, 4, 5),
    "cfg": either(*SCALARS),
    "cfg_schedule": either("linear", "constant"),
    "temperature": either(*SCALARS),
    "generator": either(*GENERATORS),
    "orders": either(
        torch.arange(4)[None], torch.arange(3, -1, -1)[None], torch.arange(4, dtype=torch.int32)[None], made((1, 4), torch.int64)
    ),
    "draw": either(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        lambda shape, dtype: torch.zeros(3),
        lambda shape, dtype: torch.ones(shape, dtype=torch.float64),
        lambda shape, dtype: np.zeros(shape),
    ),
    "backend": either(*BACKENDS),
    "solver": either(*solvers.NAMES, *solvers.FLOW_NAMES, solvers.ddpm, lambda steps: None),
    "clip": either("default", None, 900, 10**30),
    "progress": either(False),
    "bsz": either(1, 2),
    "rng": either("torch", "philox", Philox(1), Philox(1, torch.arange(1))),
    "guidance": either((0.0, 0.5), (1, 0)),
    "prompt": either("a dress", ["a dress"], [3]),
    "input_ids": mostly(tensors((2, 3), (1, 3), dtypes=[torch.int64, torch.int32])),
    "attention_mask": mostly(tensors((2, 3), dtypes=[torch.bool, torch.int64])),
    "cfg_prompt": either("none"),
    "image_shape": either((2, 2), (1, 3), [2, 1], (0, 2), (2,), ("2", 2)),
}


def sampling_of(system):
    names = inspect.signature(MODELS[system].sample_tokens)
    return {name: strategy for name, strategy in SAMPLING.items() if name in names.parameters}


@found(
    ("mar", {"labels": torch.zeros(0, dtype=torch.int64)}),
    ("mar", {"orders": torch.tensor(3)}),
    ("mar", {"orders": torch.arange(4, dtype=torch.int32)[None]}),
    ("mar", {"orders": 5}),
    ("mar", {"labels": None, "bsz": -1}),
    ("mar", {"cfg": "three"}),
    ("mar", {"cfg": torch.ones(2)}),
    ("mar", {"cfg_schedule": np.array(["x", "y"])}),
    ("mar", {"draw": "noise"}),
    ("mar", {"draw": lambda shape, dtype: np.zeros(shape)}),
    ("mar", {"generator": 3}),
    ("mar", {"solver": lambda steps: None}),
    ("flowar", {"draw": lambda shape, dtype: torch.zeros(3)}),
    ("flowar", {"progress": torch.zeros(2)}),
    ("xar", {"labels": torch.zeros(0, dtype=torch.int64)}),
    ("xar", {"solver": lambda steps: 3}),
    ("harmon", {"prompt": 3}),
    ("harmon", {"prompt": [3]}),
    ("harmon", {"prompt": "\udcff"}),
    ("harmon", {"orders": torch.tensor(3)}),
    ("harmon", {"image_shape": (2**63, 1)}),
    ("harmon", {"attention_mask": made((2, 3), torch.int64, "sparse")}),
)
@fuzz(170, {system: sampling_of(system) for system in SIZES})
def test_sample_tokens(case):
    system, broken = case
    model, right = tiny(system)
    call = valid_call(model) | broken
    if "prompt" in broken:
        del call["input_ids"]
    out = outcome(model.sample_tokens, call, "noise", "step_noise", "z", "table", "streams", "early", "late", "steps")
    if out is not None:
        assert (out.dtype, out.ndim, out.shape[1]) == (torch.float32, 4, 16)
    assert torch.equal(sampled(model), right)


# Models of others -----------------------------------------------------------------------------------------------------

PEERS = {
    "mar": lambda: upstream_like.UpstreamLikeMAR(upstream_like.AnnealedDiffLoss),
    "unannealed mar": lambda: upstream_like.UpstreamLikeMAR(upstream_like.UnannealedDiffLoss),
    "flowar": lambda: UpstreamFlowAR(**FLOW_SIZES | {"scale": (1, 2), "diffloss_w": 64, "diffloss_d": 1}),
    "xar": lambda: UpstreamXAR(**FLOW_SIZES | {"clusters": 4}),
    "harmon": harmon_small,
}
HEAD = ["input_proj", "input_proj.weight", "res_blocks", "res_blocks.0.in_ln.bias"]
MAR = ["diffloss", "sample_tokens"] + [f"diffloss.{name}" for name in ("net", "sample", "sampler", "diff_annealing_strategy")]
MAR += ["diffloss.gen_diffusion", *(f"diffloss.net.{name}" for name in HEAD)]
FLOW = ["patch_size", "seq_h", "encoder_blocks", "encoder_norm.weight", "z_proj.in_features", "class_emb", "sample_tokens", "mask"]
FLOW += ["encoder_blocks.0.attn.rope.freqs", "encoder_blocks.0.mlp.fc1_g.bias", "class_emb.num_embeddings"]
ATTRIBUTES = {"mar": MAR, "unannealed mar": MAR, "harmon": ["mar", "sample", *(f"mar.{name}" for name in MAR)]}
ATTRIBUTES |= {"xar": [*FLOW, "clusters"], "flowar": [*FLOW, "scale", "flownet", *(f"flownet.{name}" for name in HEAD[:3])]}


def peers(system):
    """(attribute, what to put there), "gone" for nothing at all."""
    return st.tuples(st.sampled_from(ATTRIBUTES[system]), mostly(st.just("gone")))


@functools.cache
def peer(system):
    torch.manual_seed(0)
    return PEERS[system]()


def changed(model, path, value):
    """A copy of `model` with another attribute."""
    model = copy.deepcopy(model)
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, model)
    for attributes in (owner.__dict__, owner._parameters, owner._buffers, owner._modules):
        attributes.pop(name, None)
    if isinstance(value, str) and value == "gone":
        if hasattr(type(owner), name):  # a method, which is taken away by nothing in its place
            owner.__dict__[name] = None
    else:
        owner.__dict__[name] = value
    return model


SETTINGS = {
    "schedule": either(*SCHEDULES),
    "solver": either(*solvers.NAMES, *solvers.FLOW_NAMES, solvers.ddim),
    "clip": either("default", None, 900, 10**30),
    "backend": either(*BACKENDS),
}


@found(
    ("mar", {"clip": np.zeros(2)}),
    ("mar", {"attribute": ("diffloss.diff_annealing_strategy", [])}),
    ("flowar", {"solver": torch.zeros(0)}),
    ("flowar", {"attribute": ("flownet.res_blocks", 73)}),
    ("xar", {"attribute": ("patch_size", ())}),
)
@fuzz(60, {system: SETTINGS | {"attribute": peers(system), "model": anything()} for system in PEERS})
def test_accelerate(case):
    """`attribute` of the model is changed."""
    system, broken = case
    settings = {name: value for name, value in broken.items() if name not in ("attribute", "model")}
    model = broken.get("model", peer(system))
    if "attribute" in broken and "model" not in broken:
        model = changed(model, *broken["attribute"])
    before = dict(getattr(model, "__dict__", {}))
    handle = outcome(disa_fast.accelerate, settings | {"model": model}, "early", "late", "steps")
    if handle is not None:
        assert handle.report()["ar_steps"] == 0
        with contextlib.redirect_stdout(io.StringIO()):
            outcome(disa_fast.explain, {"head_or_model": model})
    disa_fast.restore(model)
    assert dict(getattr(model, "__dict__", {})) == before


@found(
    ("explain", {"rows": "8"}),
    ("explain", {"rows": -1}),
)
@fuzz(10, {"explain": {"head_or_model": anything(), "rows": either(1, 64)}})
def test_explain(case):
    head = HEADS["MLPHead in torch.float32"]
    with contextlib.redirect_stdout(io.StringIO()):
        facts = outcome(disa_fast.explain, {"head_or_model": head} | case[1])
    assert facts is None or facts["backend"] in ("cpu", "hoisted")
    disa_fast.restore(case[1].get("head_or_model"))


# Files ----------------------------------------------------------------------------------------------------------------


@functools.cache
def files():
    """What is in a small checkpoint of each format, by suffix."""
    state, made = tiny("mar")[0].state_dict(), {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, write in (
            (".pth", lambda path: torch.save({"model": state, "model_ema": state, "args": argparse.Namespace(a=1)}, path)),
            (".old.pth", lambda path: torch.save(state, path, _use_new_zipfile_serialization=False)),
            (".safetensors", lambda path: checkpoint.save_checkpoint(path, state, "mar", SIZES["mar"])),
        ):
            path = Path(folder, f"weights{suffix}")
            write(path)
            made[suffix] = path.read_bytes()
    return made


def edits():
    """Where, of the whole or of the beginning, and what to put there, or how much to leave out."""
    put = st.binary(min_size=1, max_size=8) | st.sampled_from(
        [b"\xff" * 8, b"\x00" * 8, b"\x80\x02", b"9999999999", b"PK\x05\x06", b'{"']
    )
    return st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from([1, 100, 10_000]), put | st.integers(1, 10_000)), min_size=1, max_size=4
    )


def edited(content, changes):
    content = bytearray(content)
    for where, unit, what in changes:
        at = int(where * (len(content) if unit == 1 else min(unit, len(content))))
        if isinstance(what, int):
            del content[at : at + what]
        else:
            content[at : at + len(what)] = what
    return bytes(content)


READERS = {
    "load_checkpoint": lambda path, ema, model: checkpoint.load_checkpoint(model, path, ema),
    "build": lambda path, ema, dtype: checkpoint.build(lambda: models.mar(**SIZES["mar"]), path, ema, dtype),
    "identify": lambda path, ema: identify(path, ema),
    "load_vae": lambda path, dtype: vae.load_vae(path, dtype),
}


@found(
    ("identify", {"path": "a" * 5000}),
    ("load_checkpoint", {"path": True}),
    ("load_checkpoint", {"model": None}),
    ("load_checkpoint", {"ema": torch.zeros(2)}),
    ("build", {"dtype": 3.0}),
    ("build", {"dtype": torch.float8_e4m3fn}),
)
@fuzz(
    50,
    {
        name: {"path": mostly(edits(), either("nowhere", ".", "\0", "a" * 5000))}
        | {"suffix": st.sampled_from([".pth", ".old.pth", ".safetensors", ".txt"])}
        | {
            argument: {"dtype": either(*FLOATS, torch.int32), "ema": either(True, False), "model": anything()}[argument]
            for argument in inspect.signature(reader).parameters
            if argument != "path"
        }
        for name, reader in READERS.items()
    },
)
def test_checkpoints(case):
    which, broken = case
    model, _ = copy.deepcopy(tiny("mar"))
    call = {"model": model, "dtype": torch.float32, "ema": True} | broken
    suffix = call.pop("suffix", ".safetensors")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"weights{suffix}")
        content = files().get(suffix, b"text")
        changes = broken.get("path", [])
        is_edit = isinstance(changes, list) and all(isinstance(change, tuple) for change in changes)
        path.write_bytes(edited(content, changes) if is_edit else content)
        call["path"] = path if is_edit else broken["path"]
        call = {name: call[name] for name in inspect.signature(READERS[which]).parameters}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        refused = True
        try:
            READERS[which](**call)
            refused = False
            hypothesis.event("valid")
        except FileNotFoundError as error:
            hypothesis.event("FileNotFoundError")
            assert str(call["path"]) in str(error)
        except ValueError as error:
            hypothesis.event(type(error).__name__)
            assert type(error) in (ValueError, UnsupportedError)
            assert re.search(r"path|dtype|ema|model|weights\.|size", str(error))
        if refused:
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@functools.cache
def small_vae():
    torch.manual_seed(0)
    return vae.VAE(ch=32, ch_mult=(1, 1), num_res_blocks=1).eval().requires_grad_(False)


VAE_SIZES = {"latent_channels": numbers(), "ch": numbers(), "num_res_blocks": numbers()}
VAE_SIZES |= {"ch_mult": mostly(st.lists(st.integers(-1, 3), max_size=3), st.sampled_from(ODD))}


@found(
    ("VAE", {"ch": 0}),
    ("VAE", {"ch": 16}),
    ("VAE", {"ch_mult": ()}),
    ("VAE", {"num_res_blocks": 10**400}),
    ("VAE", {"latent_channels": -1}),
    ("encode", {"images": made((1, 3, 2, 4), torch.float32, "sparse")}),
)
@fuzz(
    30,
    {
        "decode": {"latents": mostly(tensors((1, 16, 2, 2), (2, 16, 1, 2)))},
        "encode": {"images": mostly(tensors((1, 3, 2, 4), (1, 3, 3, 4)))},
        "VAE": VAE_SIZES,
    },
)
def test_vae(case):
    which, broken = case
    if which == "VAE":
        outcome(vae.VAE, {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1} | broken)
        return
    out = outcome(getattr(small_vae(), which), broken)
    if out is not None:
        assert_tokens(out, (len(*broken.values()), 3 if which == "decode" else 16, *out.shape[2:]), torch.float32, *broken.values())


# The command line -----------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=8) | st.sampled_from(
    [
        "",
        "0",
        "1",
        "-1",
        "nan",
        "1e400",
        "9" * 30,
        "9" * 5000,
        "a" * 5000,
        "\0",
        "\udcff",
        "none",
        "default",
        "x:y",
        "1,2",
        "a dress",
    ]
)
PLACES = ["absent", "folder", "file", "file/under", "garbage", "a" * 300, "\0", "\udcff", "", "run"]
LIKELY = {
    "--size": ["base", "large", "small", "custom"], "--dtype": ["float32", "float16", "float64"], "--num-images": ["2", "3"],
    "--batch-size": ["2", "100"], "--device": ["cpu", "meta", "cuda", "cpu:3", "mkldnn"], "--system": ["mar", "harmon", "xar"],
    "--labels": ["0", "2,1", "3", "-1"], "--prompt": ["a dress"], "--seed": ["5", "-5", "99999999999999999999999"],
    "--schedule": ["constant:3", "linear:3-2", "list:2", "constant:2000"], "--solver": ["ddim", "dpm_solver", "euler"],
    "--clip": ["none", "900", "99999"], "--num-iter": ["1", "4", "5"], "--cfg": ["1", "3.5", "-2", "inf"],
    "--cfg-schedule": ["constant", "linear"], "--guidance": ["0,1", "1,0"], "--temperature": ["0", "0.9", "-1"],
    "--num-heads": ["2", "2,1", "0"], "--patch-size": ["1", "4", "0"],
    "--cfg-prompt": ["nothing"], "--image-size": ["32", "16x48", "17"], "--backend": ["cpu", "hoisted", "reference", "cuda"],
}  # fmt: skip
CONTENT = st.binary(max_size=20) | st.sampled_from([b'{"a": 1}', b"[" * 100_000, b'[{"prompt": 3}]', b"a dress\n", b"[[[],1]]"])
COMMANDS = {
    "generate": {name: mostly(st.sampled_from(likely), TEXTS) for name, likely in LIKELY.items()}
    | {name: st.sampled_from(PLACES) for name in ("--out", "--checkpoint", "--vae", "--tokenizer", "--prompts")}
    | {"content": CONTENT},
    "inspect": {"checkpoint": st.sampled_from(PLACES), "more": TEXTS},
    "evaluate": {"folder": st.sampled_from(PLACES), "--batch-size": TEXTS, "--device": TEXTS}
    | {name: st.sampled_from(PLACES) for name in ("--stats", "--weights")},
}


GIVEN = {"--checkpoint": "tiny.safetensors", "--out": "out", "--num-images": "1", "--schedule": "constant:2", "--num-iter": "2"}
GIVEN = {"generate": GIVEN, "inspect": {"checkpoint": "tiny.safetensors"}, "evaluate": {"folder": "folder"}}


@found(
    ("generate", {"--out": "file"}),
    ("generate", {"--out": "file/under"}),
    ("generate", {"--device": "meta"}),
    ("generate", {"--out": "run", "content": b"[" * 100_000}),
    ("generate", {"--prompts": "file", "content": b"[" * 100_000}),
    ("inspect", {"checkpoint": "a" * 300}),
    ("evaluate", {"folder": "a" * 300}),
    ("evaluate", {"--device": "mkldnn"}),
)
@fuzz(50, COMMANDS)
def test_command_line(tmp_path, monkeypatch, case):
    """It says why not, with status 2, or does it; nothing half written stays. `content`: of a file of prompts, and of run.json."""
    which, broken = case
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    monkeypatch.chdir(folder)
    for place in ("folder", "run", "out"):
        (folder / place).mkdir()
    for name, content in (
        ("file", broken.get("content", b"")),
        ("run/run.json", broken.get("content", b"{}")),
        ("garbage", b"\x80garbage"),
        ("tiny.safetensors", files()[".safetensors"]),
    ):
        (folder / name).write_bytes(content)
    argv = [which]
    for option, text in (GIVEN[which] | broken).items():
        if option != "content":
            argv += [option, text] if option.startswith("--") else [text]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = cli.main(argv)
        except SystemExit as exit:
            status = exit.code
    hypothesis.event(f"status {status}")
    assert status in (0, 1, 2)
    assert (status == 2) == ("error: " in said.getvalue())
    assert not list(folder.rglob(".*"))
