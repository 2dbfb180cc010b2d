"""accelerate and restore on objects of the structure of the published Harmon (bench/harmon_peers.py), before and with DiSA."""

import copy
import functools
import inspect
import pickle
import threading

import numpy as np
import pytest
import torch
from compare import assert_as_good_as, assert_close
from harmon_peers import SMALL, OriginalHarmon, UpstreamHarmon, harmon_small
from torch import nn

import disa_fast
from disa_fast import Constant, Cosine, Linear, UnsupportedError, accelerate, backends, models, restore

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [7, 0, 0, 0, 0], [7, 0, 0, 0, 0]])
PROMPT_MASK = torch.arange(5) < torch.tensor([5, 3, 1, 1])[:, None]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "hoisted", pytest.param("cpu", marks=pytest.mark.native)])
GUIDANCE = pytest.mark.parametrize(("cfg", "cfg_schedule"), [(1.0, "constant"), (3.0, "constant"), (3.0, "linear")])


def annealed(**options):
    return harmon_small(**({"diff_upper_steps": 12, "diff_lower_steps": 3} | options))


def original():
    return harmon_small(OriginalHarmon, num_sampling_steps="8")


KINDS = pytest.mark.parametrize("make", [annealed, original])


def draw(model, cfg=3.0, seed=0, num_iter=5, images=2, **kwargs):
    """`images` of either prompt, under guidance away from the third."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    rows = [0, 1] * images + ([2, 3] * images if cfg != 1.0 else [])
    return model.sample(PROMPTS[rows], attention_mask=PROMPT_MASK[rows], num_iter=num_iter, cfg=cfg, **kwargs)


def assert_same(actual, expected):
    assert_close(actual, expected, worst=2e-5 * float(expected.abs().max()))


def untouched(model):
    return "sample" not in vars(model) and "sample" not in vars(model.mar.diffloss)


@pytest.fixture
def steps_run(monkeypatch):
    """(backend, denoising steps) of each call of a head."""
    run = []

    def counted(name, denoise, head, z, table, *rest):
        run.append((name, len(table)))
        return denoise(head, z, table, *rest)

    for name, module in backends.BACKENDS.items():
        monkeypatch.setattr(module, "denoise", functools.partial(counted, name, module.denoise))
    return run


# Same seed, same tokens -----------------------------------------------------------------------------------------------


@GUIDANCE
@BACKENDS
def test_same_seed_same_tokens_with_its_own_settings(cfg, cfg_schedule, backend, steps_run):
    model, options = annealed(), {"cfg": cfg, "cfg_schedule": cfg_schedule, "temperature": 0.9}
    before = draw(model, **options)
    with accelerate(model, backend=backend) as handle:
        steps_run.clear()  # those of the check
        assert_same(draw(model, **options), before)
        assert steps_run == [(backend, n) for n in (12, 9, 7, 5, 3)]
        report = handle.report()
        assert (report["schedule"], report["schedule_from"]) == (Linear(12, 3), "model")
        assert (report["solver"], report["clip"], report["backend"]) == ("ddpm", 950, backend)
        assert report["ar_steps"] == 5
        assert report["calls_by_evaluations"] == {12: 1, 9: 1, 7: 1, 5: 1, 3: 1}
        assert report["network_evaluations"] == 12 + 9 + 7 + 5 + 3
    assert untouched(model)
    assert torch.equal(draw(model, **options), before)


@GUIDANCE
def test_original_harmon_same_seed_same_tokens(cfg, cfg_schedule):
    model, options = original(), {"cfg": cfg, "cfg_schedule": cfg_schedule, "temperature": 0.9}
    before = draw(model, **options)
    with accelerate(model, schedule="constant:8", clip=None) as handle:
        assert_same(draw(model, **options), before)
        assert handle.report()["calls_by_evaluations"] == {8: 5}
    assert untouched(model)
    assert torch.equal(draw(model, **options), before)


@GUIDANCE
@BACKENDS
def test_bfloat16_is_as_good_as_before(cfg, cfg_schedule, backend):
    """Of the same rounded weights and the same draws, float32 as upstream's: the float32 model is the truth."""
    model, options = annealed().bfloat16(), {"cfg": cfg, "cfg_schedule": cfg_schedule, "images": 4}
    truth, eager = draw(copy.deepcopy(model).float(), **options), draw(model, **options)
    accelerate(model, backend=backend)
    accelerated = draw(model, **options)
    assert accelerated.dtype == torch.bfloat16
    assert_as_good_as(accelerated, eager, truth, torch.bfloat16)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_native_model_draws_the_same_images(cfg):
    """One torch seed, the same orders: upstream's loop with upstream's head, and ours with ours."""
    theirs, ours = annealed(), models.harmon(**SMALL).eval()
    weights = theirs.state_dict()
    del weights["llm.lm_head.weight"]
    ours.load_state_dict(weights)
    expected = draw(theirs, cfg, seed=4, images=1)
    np.random.seed(4)
    rows = 2 if cfg == 1.0 else 4
    orders = theirs.mar.sample_orders(rows)
    torch.manual_seed(4)
    arguments = {"input_ids": PROMPTS[:rows], "attention_mask": PROMPT_MASK[:rows], "orders": orders}
    assert_same(ours.sample(schedule=Linear(12, 3), num_iter=5, cfg=cfg, **arguments), expected)


# Steps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("early", "late"), [(50, 5), (100, 5), (25, 5)])
def test_published_annealing_is_read_off_the_object(early, late):
    model = annealed(diff_upper_steps=early, diff_lower_steps=late)
    report = accelerate(model).report()
    assert (report["schedule"], report["schedule_from"], report["clip"]) == (Linear(early, late), "model", 950)


@pytest.mark.parametrize(("strategy", "schedule"), [("cosine", Cosine(12, 3)), ("constant", Constant(3))])
def test_its_other_strategies(strategy, schedule):
    model = annealed(diff_annealing_strategy=strategy)
    before = draw(model)
    handle = accelerate(model)
    assert handle.report()["schedule"] == schedule
    assert_same(draw(model), before)


def test_original_harmon_is_annealed_by_counting_its_loop():
    """As DiSA's with the same weights draws, which is told the step."""
    model, told = original(), annealed(diff_upper_steps=50, diff_lower_steps=5)
    told.load_state_dict(model.state_dict())
    handle = accelerate(model, schedule="linear:50-5")
    assert (handle.schedule, handle.schedule_from) == (Linear(50, 5), "argument")
    assert_same(draw(model), draw(told))
    assert handle.report()["calls_by_evaluations"] == {48: 1, 37: 1, 26: 1, 16: 1, 5: 1}
    assert handle.report()["network_evaluations"] == 48 + 37 + 26 + 16 + 5
    draw(model, seed=1)
    assert handle.report()["calls_by_evaluations"] == {48: 2, 37: 2, 26: 2, 16: 2, 5: 2}
    assert accelerate(original()).report()["schedule_from"] == "default"


@KINDS
def test_an_interrupted_loop_leaves_no_count_behind(make):
    model = make()
    handle = accelerate(model, schedule="linear:9-3")
    decoded = []

    def interrupt(module, args):
        decoded.append(1)
        if len(decoded) == 3:
            raise KeyboardInterrupt

    hook = model.mar.decoder_blocks[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(model, num_iter=4)
    hook.remove()
    assert handle.report()["calls_by_evaluations"] == {9: 1, 7: 1}
    if make is original:  # on its own it is a first step
        model.mar.diffloss.sample(torch.randn(4, 48), 1.0, 2.0)
        assert handle.report()["calls_by_evaluations"] == {9: 2, 7: 1}
    before = handle.report()["network_evaluations"]
    draw(model, num_iter=4)
    assert handle.report()["network_evaluations"] == before + 9 + 7 + 5 + 3


def test_every_thread_counts_its_own_loop():
    """A whole image by a second thread in the midst of another of the first."""
    model = original()
    handle = accelerate(model, schedule="linear:9-3")
    decoded = []

    def another_image(module, args):
        decoded.append(1)
        if len(decoded) == 2:
            thread = threading.Thread(target=draw, args=(model,), kwargs={"num_iter": 3, "seed": 1})
            thread.start()
            thread.join()

    model.mar.decoder_blocks[0].register_forward_pre_hook(another_image)
    draw(model, num_iter=4)
    assert len(decoded) == 4 + 3
    assert handle.report()["calls_by_evaluations"] == {9: 2, 7: 1, 6: 1, 5: 1, 3: 2}


# The handle -----------------------------------------------------------------------------------------------------------


@KINDS
def test_twice_is_once(make):
    model = make()
    first = accelerate(model, schedule="linear:9-3")
    assert accelerate(model, schedule="constant:4", clip=None) is first
    draw(model, num_iter=3)
    assert first.report()["calls_by_evaluations"] == {4: 3}
    restore(model)
    assert untouched(model)
    restore(model)
    first.restore()
    assert untouched(model)


@KINDS
def test_only_the_instance_is_touched(make):
    model, other = make(), make()
    names = model.state_dict().keys()
    accelerate(model, schedule="linear:9-3")
    assert untouched(other)
    assert model.state_dict().keys() == names


@KINDS
def test_methods_keep_their_signatures(make):
    model = make()
    sample, of_diffloss = inspect.signature(model.sample), inspect.signature(model.mar.diffloss.sample)
    accelerate(model, schedule="linear:9-3")
    assert inspect.signature(model.sample) == sample
    assert list(inspect.signature(model.mar.diffloss.sample).parameters) == list(of_diffloss.parameters)


def test_a_call_that_is_refused_changes_nothing():
    model = annealed()
    with pytest.raises(ValueError, match="solver: expected"):
        accelerate(model, solver="euler")
    assert untouched(model)
    handle = accelerate(model)
    with pytest.raises(ValueError, match="schedule: expected"):
        accelerate(model, schedule="lineal:9-3")
    assert handle.report()["schedule"] == Linear(12, 3)


@KINDS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_are_accelerated_on_their_own(make, duplicate):
    model = make()
    accelerate(model, schedule="linear:9-3")
    twin = duplicate(model)
    assert torch.equal(draw(twin), draw(model))
    with torch.no_grad():
        twin.mar.diffloss.net.input_proj.weight.mul_(1.5)
    assert not torch.equal(draw(twin), draw(model))
    restore(twin)
    assert untouched(twin)
    assert not untouched(model)


def test_explain_of_an_accelerated_model(capsys):
    model = annealed()
    with pytest.raises(UnsupportedError, match="unaccelerated UpstreamHarmon"):
        disa_fast.explain(model)
    accelerate(model, backend="reference")
    facts = disa_fast.explain(model)
    assert (facts["backend"], facts["schedule"]) == ("reference", Linear(12, 3))
    assert "Linear(early=12" in capsys.readouterr().out


# What is refused ------------------------------------------------------------------------------------------------------


def refusals():
    def no_diffloss(model):
        del model.mar.diffloss

    def other_mar(model):
        model.mar = nn.Linear(2, 2)

    def other_net(model):
        model.mar.diffloss.net = nn.Linear(3, 3)

    def other_signature(model):
        model.mar.diffloss.sample = lambda z: z

    def no_loop_to_count(model):
        model.sample = lambda input_ids: None

    return [
        (
            no_diffloss,
            r"expected a Harmon-shaped object, with mar\.diffloss\.net and mar\.diffloss\.sample; OriginalHarmon has not",
        ),
        (other_mar, "expected a Harmon-shaped object"),
        (other_net, r"mar\.diffloss\.net is not a MAR diffusion head: .*input_proj.weight"),
        (other_signature, r"expected mar\.diffloss\.sample\(z, temperature, cfg"),
        (no_loop_to_count, r"mar\.diffloss\.sample is not told .* no sample\(..., num_iter, ...\) on OriginalHarmon"),
    ]


@pytest.mark.parametrize(("spoil", "message"), refusals(), ids=lambda x: getattr(x, "__name__", ""))
def test_unrecognised_structures_are_refused(spoil, message):
    model = original()
    spoil(model)
    with pytest.raises(UnsupportedError, match=message):
        accelerate(model)


def test_unreadable_annealing_is_refused_not_guessed():
    model = annealed()
    model.mar.diffloss.gen_diffusion = [object()]
    with pytest.raises(UnsupportedError, match=r"its step counts cannot be read from diffloss\.gen_diffusion; pass schedule="):
        accelerate(model)
    assert accelerate(model, schedule="linear:9-3", check=False).report()["schedule"] == Linear(9, 3)


def test_our_own_model_needs_none():
    with pytest.raises(UnsupportedError, match="already fast: pass schedule="):
        accelerate(models.harmon(**SMALL))


def test_a_class_of_another_name_will_do():
    """As the one that a Hugging Face repository brings along."""

    class HarmonModel(UpstreamHarmon):
        pass

    model = annealed()
    model.__class__ = HarmonModel
    assert accelerate(model).report()["schedule"] == Linear(12, 3)
