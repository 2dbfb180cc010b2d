"""Whole images of all four systems, by small models: who draws them, and whose the time is (bench/images.py, bench_images.py)."""

import dataclasses
import functools
import itertools
import json

import bench_images
import harmon_peers
import images
import pytest
import torch
from bench_images import HALF, OURS, contestants, in_turns, measured
from compare import assert_close

from disa_fast import backends
from disa_fast.heads.cell_transformer import CellTransformerHead
from disa_fast.solvers import StepTable

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"embed_dim": 32, "depth": 1, "num_heads": 2}
SIZES = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in SIZES.items()} | {"img_size": 64}
HEAD = {"diffloss_w": 64, "diffloss_d": 1}
SMALL = {  # models of 4 x 4 tokens, of which Harmon is asked for 2 x 4
    "MAR-B": SIZES | HEAD | {"buffer_size": 4},
    "Harmon-0.5b": harmon_peers.SMALL,
    "FlowAR-S": SIZES | HEAD | {"scale": (1, 2, 4)},
    "xAR-B": SIZES,
}
STEPS = {  # what each AR step draws of an image, T of "linear:6-4", and how often the network is evaluated
    "MAR-B": ([2, 3, 5, 6], [6, 5, 4, 4], [6, 5, 4, 4]),
    "Harmon-0.5b": ([1, 2, 2, 3], [6, 5, 4, 4], [6, 5, 4, 4]),
    "FlowAR-S": ([1, 4, 16], [6, 5, 4], [6, 4, 4]),
    "xAR-B": ([4, 4, 4, 4], [6, 5, 4, 4], [6, 5, 4, 4]),
}
KINDS = ("matrix products", "attention", "other")
OPERATORS = {
    "MAR-B": ["head", *(f"backbone: {kind}" for kind in KINDS), "between"],
    "Harmon-0.5b": ["head", *(f"backbone: {kind}" for kind in KINDS), "between"],
    "FlowAR-S": [*(f"{part}: {kind}" for part in ("head", "backbone") for kind in KINDS), "between"],
    "xAR-B": [*(f"head: {kind}" for kind in KINDS), "between"],
}
EVERY = pytest.mark.parametrize("name", SMALL)


@pytest.fixture
def small(monkeypatch):
    """small(name, batch): Images of a small model of that kind, in few steps."""

    def make(name, batch=2):
        setting = images.SETTINGS[name]
        few = {"schedule": "linear:6-4"} | ({"num_iter": 4} if setting.num_iter else {})
        few |= {"image_size": (32, 64)} if setting.system == "harmon" else {}
        upstream = harmon_peers.harmon_small if setting.system == "harmon" else functools.partial(setting.upstream, **SMALL[name])
        changed = dataclasses.replace(
            setting,
            upstream=upstream,
            native=functools.partial(setting.native, **SMALL[name]),
            sampling=dataclasses.replace(setting.sampling, **few),
        )
        monkeypatch.setitem(images.SETTINGS, name, changed)
        return images.Images(name, torch.device("cpu"), batch)

    return make


@EVERY
def test_contestants_agree_and_their_time_is_shared_out(small, name):
    of = small(name)
    untouched = dict(vars(of.upstream))
    watches = in_turns(of, contestants(of), turns=2)
    assert vars(of.upstream) == untouched
    found = json.loads(json.dumps(measured(of, watches)))
    assert (found["images"], found["schedule"], found["turns"]) == (2, "linear:6-4", 2)
    assert found["image_size"] == ([32, 64] if name == "Harmon-0.5b" else [64, 64])
    assert found["num_iter"] == (4 if name in ("MAR-B", "Harmon-0.5b") else None)
    assert found["cfg"] == images.SETTINGS[name].sampling.cfg
    assert list(found["results"]) == ["eager", OURS, HALF]
    for who, result in found["results"].items():
        of_turns = sorted(watch.seconds() for watch in watches[who])
        assert sum(result["parts"].values()) == pytest.approx(result["seconds"]) == of_turns[1]
        assert all(seconds > 0 for part, seconds in result["parts"].items() if part != "backbone")
        assert (result["parts"]["backbone"] > 0) == (name != "xAR-B")
        low, high = result["quartiles"]
        assert low <= result["over_eager"] <= high

    tokens, counts, _ = STEPS[name]
    assert [step["k"] for step in found["ar_steps"]] == list(range(len(tokens)))
    assert [step["T"] for step in found["ar_steps"]] == counts
    assert [step["rows"] for step in found["ar_steps"]] == [2 * 2 * count for count in tokens]
    for who, part in itertools.product(("eager", OURS), ("head", "backbone")):
        of_steps = [step["seconds"][who][part] for step in found["ar_steps"]]
        assert sum(of_steps) == pytest.approx(found["results"][who]["parts"][part])

    assert list(found["operators"]) == OPERATORS[name]
    assert sum(found["operators"].values()) == pytest.approx(1)
    assert all(share > 0 for share in found["operators"].values())
    assert found["operators"][found["next"]] == max(found["operators"].values())
    bench_images.print_table(name, found)


@EVERY
def test_the_native_model_draws_the_same(small, name):
    of = small(name)
    expected = of.eager()
    for who in (of.ours(), of.accelerated()):
        assert_close(who(), expected, worst=1e-5 * float(expected.abs().max()))


@EVERY
def test_ar_steps_are_those_of_the_package(small, name, nvtx):
    """Whose ranges have the evaluations, the steps that the solver's grid merges or leaves out not among them."""
    of = small(name)
    of.ours()()
    _, _, evaluations = STEPS[name]
    steps = list(zip(of.ar_steps(), evaluations, strict=True))
    found = [text for text in nvtx.ranges if text.startswith("AR step")]
    assert found == [f"AR step k={step['k']} K={len(steps)} T={n} rows={step['rows']}" for step, n in steps]


class Clock:
    """time.perf_counter that stands still but for what `passes` says."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(images.time, "perf_counter", lambda: self.now)

    def passes(self, seconds):
        self.now += seconds

    def at_calls_of(self, module, seconds):
        module.register_forward_pre_hook(lambda *call: self.passes(seconds))


BACKBONES = {"MAR-B": {"decoder_blocks.0": 10}, "Harmon-0.5b": {"llm.model": 100, "mar.decoder_blocks.0": 10}}
BACKBONES |= {"FlowAR-S": {"decoder_blocks.0": 10}, "xAR-B": {}}


@EVERY
def test_of_the_eager_ones_time_every_evaluation_is_the_heads(small, name, monkeypatch):
    of, clock = small(name), Clock(monkeypatch)
    clock.at_calls_of(of.setting.evaluated(of.upstream)[0], 1)
    for at, seconds in BACKBONES[name].items():
        clock.at_calls_of(of.upstream.get_submodule(at), seconds)
    run = of.upstreams(of.eager)
    _, watch = of.watched(run)
    _, _, evaluations = STEPS[name]
    backbone = [sum(BACKBONES[name].values())] * len(evaluations)
    if name == "Harmon-0.5b":
        backbone[0] += 100  # the prompts
    assert [step["head"] for step in watch.steps] == evaluations
    assert [step["backbone"] for step in watch.steps] == backbone
    assert watch.parts() == {"head": sum(evaluations), "backbone": sum(backbone), "other": 0}
    assert watch.shares()["head"] == pytest.approx(sum(evaluations) / watch.seconds())


@EVERY
@pytest.mark.parametrize("who", ["accelerated", "ours"])
def test_of_our_time_every_call_of_the_head_is_the_heads(small, name, who, monkeypatch):
    of, clock = small(name), Clock(monkeypatch)
    run = getattr(of, who)()

    def passing(loop, *call):
        clock.passes(
            next(len(x.table if hasattr(x, "table") else x) for x in call if isinstance(getattr(x, "table", x), StepTable))
        )
        return loop(*call)

    for backend in backends.BACKENDS.values():
        for loop in ("denoise", "integrate"):
            if hasattr(backend, loop):
                monkeypatch.setattr(backend, loop, functools.partial(passing, getattr(backend, loop)))
    finish = CellTransformerHead.finish
    monkeypatch.setattr(CellTransformerHead, "finish", lambda *call: (clock.passes(0.5), finish(*call)))
    _, watch = of.watched(run)
    assert "denoise" not in vars(run.head)
    _, _, evaluations = STEPS[name]
    expected = [n + 0.5 * (name == "xAR-B" and k > 0) for k, n in enumerate(evaluations)]
    assert [step["head"] for step in watch.steps] == expected
    assert watch.parts() == {"head": sum(expected), "backbone": 0, "other": 0}


def test_operators_are_told_apart():
    of_each = {
        "matrix products": ["aten::linear", "aten::matmul", "aten::bmm", "mkldnn::_linear_pointwise"],
        "attention": ["aten::scaled_dot_product_attention"],
        "other": ["aten::add", "aten::layer_norm", "aten::copy_", "linear_of_mine"],
    }
    for kind, names in of_each.items():
        assert {images.kind_of(name) for name in names} == {kind}


def test_profiled_operators_are_those_that_ran(small):
    """In seconds, and no second twice: what an operator calls is in its own time."""
    of = small("MAR-B")
    _, watch = of.watched(of.accelerated(), operators=True)
    assert set(watch.operators) == {f"backbone: {kind}" for kind in KINDS}
    assert 0 < sum(watch.operators.values()) < watch.parts()["backbone"]
    _, watch = of.watched(of.accelerated())
    assert not watch.operators
    assert list(watch.shares()) == ["head", "between"]


@pytest.mark.parametrize(("who", "factor"), [(OURS, 1.01), (HALF, 1.1)])
def test_wrong_images_are_noticed(small, who, factor):
    of = small("MAR-B")
    runs = contestants(of)
    right = runs[who]
    runs[who] = dataclasses.replace(right, draw=lambda: factor * right())
    with pytest.raises(AssertionError, match=f"wrong images: {who}, relative error"):
        in_turns(of, runs, 1)


def test_the_compiled_one_is_the_eager_one_in_its_turns_alone(small, monkeypatch):
    calls = []

    def compiled(call, **how):
        assert how == {"dynamic": False}
        return lambda *args: (calls.append(1), call(*args))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    of = small("FlowAR-S")
    runs = contestants(of, compiled=True)
    assert list(runs) == ["eager", "torch.compile", OURS, HALF]
    _, _, evaluations = STEPS["FlowAR-S"]
    assert len(calls) == sum(evaluations)  # compiled before its first turn
    in_turns(of, runs, 1)
    assert len(calls) == 2 * sum(evaluations)


def test_shares_of_the_ar_steps(small):
    of = small("xAR-B", batch=1)
    shares = of.shares(backend="hoisted")
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("name", images.SETTINGS)
def test_both_models_have_the_published_size_and_settings(name):
    setting = images.SETTINGS[name]
    with torch.device("meta"):
        theirs, ours = setting.build(), setting.native(setting.size)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    shapes.pop("llm.lm_head.weight", None)
    assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert setting.image_size(theirs) == ((512, 512) if "512" in name else (256, 256))
    assert sum(setting.tokens(theirs)) == (1024 if "512" in name else 341 if "FlowAR" in name else 256)
    late = 5 if name.startswith(("MAR", "Harmon")) else 15
    assert setting.steps == (25 if name in ("FlowAR-S", "FlowAR-L") else 50, late)
