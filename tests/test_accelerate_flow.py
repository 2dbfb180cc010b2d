"""accelerate and restore on objects of the structure of the published FlowAR and xAR (bench/flow_peers.py)."""

import copy
import inspect
import pickle

import pytest
import torch
from compare import assert_close
from flow_peers import UpstreamFlowAR, UpstreamXAR, xar_euler
from torch import nn

import disa_fast
from disa_fast import Constant, Linear, UnsupportedError, accelerate, restore, solvers

SIZES = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("embed_dim", 64), ("depth", 1), ("num_heads", 2))}
LABELS = torch.tensor([3, 997])


def random_parameters(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.4 * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return model.eval().requires_grad_(False)


def flowar(cross=False):
    return random_parameters(UpstreamFlowAR(img_size=64, scale=(1, 2, 4), diffloss_w=64, diffloss_d=2, cross=cross, **SIZES))


def xar():
    return random_parameters(UpstreamXAR(img_size=128, clusters=4, **SIZES))


MAKERS = {"flowar": flowar, "flowar, cross": lambda: flowar(cross=True), "xar": xar}
KINDS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def draw(model, seed=0, cfg=2.4, **kwargs):
    torch.manual_seed(seed)
    name = "label" if isinstance(model, UpstreamXAR) else "labels"
    return model.sample_tokens(**{name: LABELS, "cfg": cfg, "flow_upper_steps": 8, "flow_lower_steps": 4, **kwargs})


def assert_same(actual, expected):
    assert_close(actual, expected, worst=2e-5 * float(expected.abs().max()))


@KINDS
@pytest.mark.parametrize("cfg", [1.0, 0.5, 2.4])
@pytest.mark.parametrize("backend", ["reference", "hoisted"])
def test_same_seed_same_tokens_with_its_own_settings(make, cfg, backend):
    model = make()
    before = draw(model, cfg=cfg)
    with accelerate(model, backend=backend) as handle:
        assert_same(draw(model, cfg=cfg), before)
        report = handle.report()
        assert report["schedule_from"] == "model"
        assert report["backend"] == backend
        assert report["ar_steps"] == (4 if isinstance(model, UpstreamXAR) else 3)
        evaluations = [8, 6, 5, 4] if isinstance(model, UpstreamXAR) else [8, 6, 4]
        assert report["network_evaluations"] == sum(evaluations)
    assert "sample_tokens" not in vars(model)
    assert torch.equal(draw(model, cfg=cfg), before)


@pytest.mark.parametrize("guidance", [1.0, 0.7, 0.0])
def test_guidance_of_a_flowar_is_the_calls(guidance):
    model = flowar()
    before = draw(model, guidance=guidance)
    accelerate(model)
    assert_same(draw(model, guidance=guidance), before)


@pytest.mark.parametrize("make", [flowar, xar])
def test_a_schedule_given_wins_over_the_calls_counts(make):
    model = make()
    before = draw(model, flow_upper_steps=6, flow_lower_steps=6)
    handle = accelerate(model, schedule="constant:6")
    assert_same(draw(model), before)
    assert handle.report()["schedule"] == Constant(6)
    assert handle.report()["calls_by_evaluations"] == {6: handle.report()["ar_steps"]}
    accelerate(model, schedule="linear:8-4")
    assert handle.report()["schedule"] == Linear(8, 4, "xar" if make is xar else "flowar")


def test_another_solver():
    model = xar()
    model.solver = xar_euler
    before = draw(model)
    accelerate(model, solver="euler")
    assert_same(draw(model), before)
    accelerate(model, solver=solvers.flow_euler_maruyama)
    assert not torch.allclose(draw(model), before)


def test_an_object_that_is_told_one_number_of_steps_gets_disas_schedule():
    """As the original xAR, before DiSA."""

    class Original(UpstreamXAR):
        def sample_tokens(self, num_steps, cfg=1.0, label=None):
            return super().sample_tokens(cfg, label, num_steps, num_steps)

    model = random_parameters(Original(img_size=128, clusters=4, **SIZES))
    handle = accelerate(model)
    assert (handle.schedule, handle.schedule_from) == (Linear(50, 15, "xar"), "default")
    accelerate(model, schedule="constant:5")
    torch.manual_seed(1)
    accelerated = model.sample_tokens(5, cfg=2.0, label=LABELS)
    restore(model)
    torch.manual_seed(1)
    assert_same(accelerated, model.sample_tokens(5, cfg=2.0, label=LABELS))


@KINDS
def test_nothing_is_copied_and_changes_are_noticed(make):
    model = make()
    handle = accelerate(model)
    native = handle._native
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        assert getattr(native.get_submodule(owner), leaf) is p
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.z_proj.weight.mul_(1.5)
    changed = draw(model)
    restore(model)
    assert_same(changed, draw(model))
    accelerate(model)
    model.double()
    assert draw(model).dtype == torch.float64
    packed = handle.head._packed.values()
    assert sum(getattr(w, "nbytes", 0) for w in packed) == 0


@KINDS
def test_keeps_its_signature_and_survives_copies(make):
    model = make()
    signature = inspect.signature(model.sample_tokens)
    before = draw(model)
    accelerate(model)
    assert inspect.signature(model.sample_tokens) == signature
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(draw(other), before)
        with torch.no_grad():
            other.z_proj.weight.mul_(1.5)
        assert not torch.allclose(draw(other), before)
        assert_same(draw(model), before)
        restore(other)
        assert "sample_tokens" not in vars(other)


def test_explain_and_a_second_call(capsys):
    model = flowar()
    handle = accelerate(model)
    facts = disa_fast.explain(model)
    assert facts["backend"] == "hoisted"
    assert "transformers" in facts["why"]["cpu"]
    assert "transformers" in facts["why"]["cuda"]
    assert accelerate(model, schedule="linear:6-3") is handle
    capsys.readouterr()


def test_what_is_not_recognised():
    class Almost(nn.Module):
        flownet = None

    with pytest.raises(UnsupportedError, match="sample_tokens"):
        accelerate(Almost())
    with pytest.raises(UnsupportedError, match="FlowAR-shaped"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="own, already fast"):
        accelerate(disa_fast.models.xar(img_size=64, **SIZES))
    model = flowar()
    del model.decoder_norm.weight
    with pytest.raises(UnsupportedError, match=r"decoder_norm\.weight"):
        accelerate(model)
    assert "sample_tokens" not in vars(model)
    model = xar()
    with pytest.raises(ValueError, match="clip"):
        accelerate(model, clip=950)
    with pytest.raises(ValueError, match="solver"):
        accelerate(model, solver="ddpm")
    with pytest.raises(UnsupportedError, match="transformers"):
        accelerate(model, backend="cpu")
    assert "sample_tokens" not in vars(model)
