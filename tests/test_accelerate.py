import copy
import pickle

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import nn
from upstream_like import AnnealedDiffLoss, UnannealedDiffLoss, UpstreamLikeMAR, small_mar

import disa_fast
from disa_fast import UnsupportedError, accelerate, restore
from disa_fast.schedule import Constant, Cosine, Linear, TwoStage


def draw(model, cfg=3.0, seed=0, num_iter=6, **kwargs):
    torch.manual_seed(seed)
    np.random.seed(seed)
    return model.sample_tokens(2, num_iter=num_iter, cfg=cfg, labels=torch.tensor([1, 7]), **kwargs)


def untouched(model):
    return "sample" not in vars(model.diffloss) and "sample_tokens" not in vars(model)


@pytest.fixture
def unannealed():
    return UpstreamLikeMAR(UnannealedDiffLoss)


@pytest.fixture
def annealed():
    return UpstreamLikeMAR(AnnealedDiffLoss)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("cfg_schedule", ["linear", "constant"])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_unannealed_object_same_seed_same_tokens(unannealed, cfg, cfg_schedule, temperature):
    options = {"cfg": cfg, "cfg_schedule": cfg_schedule, "temperature": temperature}
    before = draw(unannealed, **options)
    with accelerate(unannealed, schedule="constant:12", clip=None) as handle:
        assert_close(draw(unannealed, **options), before, worst=1e-5 * float(before.abs().max()))
        assert handle.report()["calls_by_evaluations"] == {12: 6}
    assert untouched(unannealed)
    assert torch.equal(draw(unannealed, **options), before)


@pytest.mark.parametrize(
    ("strategy", "schedule"),
    [("linear", Linear(12, 3)), ("cosine", Cosine(12, 3)), ("two-stage", TwoStage(12, 3)), ("constant", Constant(3))],
)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_annealed_object_keeps_its_own_settings(strategy, schedule, cfg):
    model = UpstreamLikeMAR(AnnealedDiffLoss, strategy=strategy)
    before = draw(model, cfg)
    handle = accelerate(model)
    report = handle.report()
    assert (report["schedule"], report["schedule_from"], report["solver"], report["clip"]) == (schedule, "model", "ddpm", 950)
    assert_close(draw(model, cfg), before, worst=1e-5 * float(before.abs().max()))
    restore(model)
    assert torch.equal(draw(model, cfg), before)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_native_model_draws_the_same_tokens(annealed, cfg):
    """One torch seed, the same orders: upstream's loop with upstream's head, and ours with ours."""
    theirs = draw(annealed, cfg, seed=4)
    np.random.seed(4)
    orders = torch.from_numpy(np.stack([np.random.permutation(16) for _ in range(2)]))
    torch.manual_seed(4)
    ours = annealed.backbone.sample_tokens(torch.tensor([1, 7]), Linear(12, 3), num_iter=6, cfg=cfg, orders=orders)
    assert_close(ours, theirs, worst=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("clip", [900, 999])
def test_its_own_clip_is_read_off_its_timesteps(clip):
    model = UpstreamLikeMAR(AnnealedDiffLoss, upper=30, lower=25, clip=clip)
    report = accelerate(model).report()
    assert report["schedule"] == Linear(30, 25)
    assert report["clip"] == (None if clip == 999 else clip)


def test_default_schedule_of_an_unannealed_object(unannealed):
    handle = accelerate(unannealed)
    draw(unannealed, num_iter=4)
    report = handle.report()
    assert report["schedule_from"] == "default"
    assert report["schedule"] == Linear(50, 5)
    assert report["calls_by_evaluations"] == {48: 1, 34: 1, 20: 1, 5: 1}
    assert report["ar_steps"] == 4
    assert report["network_evaluations"] == 107


def test_iterations_are_counted_anew_for_each_image(unannealed):
    handle = accelerate(unannealed, schedule="linear:9-3")
    for _ in range(3):
        draw(unannealed, num_iter=4)
    assert handle.report()["calls_by_evaluations"] == {9: 3, 7: 3, 5: 3, 3: 3}


def test_a_failed_loop_leaves_no_count_behind(unannealed):
    handle = accelerate(unannealed, schedule="linear:9-3")
    with pytest.raises(IndexError):
        unannealed.sample_tokens(1, num_iter=4, labels=torch.tensor([99]))
    draw(unannealed, num_iter=4)
    assert handle.report()["calls_by_evaluations"] == {9: 1, 7: 1, 5: 1, 3: 1}


def test_sample_on_its_own_is_a_first_step(unannealed):
    handle = accelerate(unannealed, schedule="linear:9-3")
    unannealed.diffloss.sample(torch.randn(4, 48), 1.0, 2.0)
    assert handle.report()["calls_by_evaluations"] == {9: 1}


@pytest.mark.parametrize("kind", [UnannealedDiffLoss, AnnealedDiffLoss])
def test_twice_is_once(kind):
    model = UpstreamLikeMAR(kind)
    first = accelerate(model, schedule="linear:9-3")
    assert accelerate(model, schedule="constant:4", clip=None) is first
    draw(model, num_iter=3)
    assert first.report()["calls_by_evaluations"] == {4: 3}
    restore(model)
    assert untouched(model)
    restore(model)
    first.restore()
    assert untouched(model)


def test_a_call_that_is_refused_changes_nothing(annealed):
    handle = accelerate(annealed)
    with pytest.raises(ValueError, match="schedule: expected"):
        accelerate(annealed, schedule="lineal:9-3")
    with pytest.raises(UnsupportedError, match="backend: 'tpu'"):
        accelerate(annealed, schedule="linear:9-3", backend="tpu")
    assert handle.report()["schedule"] == Linear(12, 3)
    fresh = UpstreamLikeMAR(AnnealedDiffLoss)
    with pytest.raises(ValueError, match="solver: expected"):
        accelerate(fresh, solver="euler")
    assert untouched(fresh)


def test_a_patch_that_was_there_before_comes_back(annealed):
    original = annealed.diffloss.sample

    def theirs(z, temperature=1.0, cfg=1.0, step=0, ar_num_iter=64):
        return original(z, temperature, cfg, step, ar_num_iter)

    annealed.diffloss.sample = theirs
    with accelerate(annealed):
        assert annealed.diffloss.sample is not theirs
    assert annealed.diffloss.sample is theirs


def test_only_the_instance_is_touched(annealed):
    other = UpstreamLikeMAR(AnnealedDiffLoss)
    accelerate(annealed)
    assert untouched(other)
    assert annealed.state_dict().keys() == other.state_dict().keys()


def test_weights_are_shared_and_followed(annealed):
    accelerate(annealed, schedule="constant:4")
    before = draw(annealed)
    with torch.no_grad():
        annealed.diffloss.net.input_proj.weight.mul_(1.5)
    assert not torch.equal(draw(annealed), before)


@pytest.mark.parametrize("kind", [UnannealedDiffLoss, AnnealedDiffLoss])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_are_accelerated_on_their_own(kind, duplicate):
    model = UpstreamLikeMAR(kind)
    accelerate(model, schedule="linear:9-3")
    twin = duplicate(model)
    assert torch.equal(draw(twin), draw(model))
    with torch.no_grad():
        twin.diffloss.net.input_proj.weight.mul_(1.5)
    assert not torch.equal(draw(twin), draw(model))
    restore(twin)
    assert untouched(twin)
    assert not untouched(model)


def test_explain_of_an_accelerated_model(annealed, capsys):
    with pytest.raises(UnsupportedError, match="unaccelerated UpstreamLikeMAR"):
        disa_fast.explain(annealed)
    accelerate(annealed, backend="reference")
    assert disa_fast.explain(annealed)["backend"] == "reference"
    assert "Linear(early=12" in capsys.readouterr().out


def refusals():
    def no_diffloss(model):
        del model.diffloss

    def no_net(model):
        model.diffloss.net = None

    def other_net(model):
        model.diffloss.net = nn.Linear(3, 3)

    def other_signature(model):
        model.diffloss.sample = lambda z: z

    def no_loop_to_count(model):
        model.sample_tokens = lambda bsz: None

    return [
        (no_diffloss, "expected a MAR-shaped object"),
        (no_net, "expected a MAR-shaped object"),
        (other_net, "diffloss.net is not a MAR diffusion head: .*input_proj.weight"),
        (other_signature, r"expected diffloss.sample\(z, temperature, cfg"),
        (no_loop_to_count, r"there is no sample_tokens\(..., num_iter, ...\) on UpstreamLikeMAR"),
    ]


@pytest.mark.parametrize(("spoil", "message"), refusals(), ids=lambda x: getattr(x, "__name__", ""))
def test_unrecognised_structures_are_refused(unannealed, spoil, message):
    spoil(unannealed)
    with pytest.raises(UnsupportedError, match=message):
        accelerate(unannealed)


def test_unreadable_annealing_is_refused_not_guessed(annealed):
    annealed.diffloss.gen_diffusion = [object()]
    with pytest.raises(UnsupportedError, match=r"its step counts cannot be read from diffloss\.gen_diffusion; pass schedule="):
        accelerate(annealed)
    with pytest.raises(UnsupportedError, match=r"cannot be read .*check=False"):
        accelerate(annealed, schedule="linear:9-3")
    assert accelerate(annealed, schedule="linear:9-3", check=False).report()["schedule"] == Linear(9, 3)
    annealed.diffloss.gen_diffusion = list(range(3, 13))
    assert accelerate(annealed, check=False).report()["schedule"] == Linear(12, 3)
    annealed.diffloss.diff_annealing_strategy = "sinus"
    with pytest.raises(UnsupportedError, match="unknown annealing 'sinus'"):
        accelerate(annealed)


def test_anything_else_is_refused():
    with pytest.raises(UnsupportedError, match="expected a MAR-shaped object"):
        accelerate(5)


def test_our_own_model_needs_none():
    with pytest.raises(UnsupportedError, match="already fast: pass schedule="):
        accelerate(small_mar())
