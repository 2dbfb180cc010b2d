"""accelerate on FlowAR- and xAR-shaped objects: proven on one image in few steps, followed, else refused."""

import copy
import functools
import threading
import warnings

import flow_peers
import pytest
import torch
from compare import assert_close
from flow_peers import UpstreamFlowAR, UpstreamXAR, xar_euler
from torch import nn

import disa_fast
from disa_fast import UnsupportedError, accelerate, restore
from disa_fast.adapters import check_flow

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("embed_dim", 64), ("depth", 1), ("num_heads", 2))}
LABELS = torch.tensor([3, 997])


def random_parameters(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.4 * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return model.eval().requires_grad_(False)


def flowar(kind=UpstreamFlowAR):
    return random_parameters(kind(img_size=64, scale=(1, 2, 4), diffloss_w=64, diffloss_d=2, **SIZES))


def xar(kind=UpstreamXAR):
    return random_parameters(kind(img_size=128, clusters=4, **SIZES))


KINDS = pytest.mark.parametrize("make", [flowar, xar])


def draw(model, seed=0, cfg=2.4, **kwargs):
    torch.manual_seed(seed)
    name = "label" if isinstance(model, UpstreamXAR) else "labels"
    return model.sample_tokens(**{name: LABELS, "cfg": cfg, "flow_upper_steps": 6, "flow_lower_steps": 4, **kwargs})


def assert_same(actual, expected):
    assert_close(actual, expected, worst=2e-5 * float(expected.abs().max()))


# Proven -----------------------------------------------------------------------------------------------------------------


@KINDS
def test_the_errors_are_reported(make):
    report = accelerate(make()).report()
    assert report["check"]["solver"] == ("euler" if make is flowar else "euler_maruyama")
    assert 0 <= report["check"]["error"] < 2e-5
    assert {"guided", "unguided", "bound"} <= report["check"].keys()
    skipped = accelerate(make(), check=False).report()
    assert skipped["check"] == "skipped: check=False"


def test_the_objects_own_solver_is_found():
    model = xar()
    model.solver = xar_euler
    before = draw(model)
    handle = accelerate(model)
    assert handle.solver == "euler"
    assert_same(draw(model), before)


class OwnDraw(UpstreamFlowAR):
    def sample_tokens(self, flow_upper_steps=50, flow_lower_steps=15, guidance=0.9, cfg=1.0, labels=None, progress=False):
        return super().sample_tokens(flow_upper_steps, flow_lower_steps, guidance, cfg, labels, progress) * 1.01


class OwnEncoder(UpstreamFlowAR):
    def forward_mae_encoder(self, *args):
        return super().forward_mae_encoder(*args) + 0.05


class OwnDecoder(UpstreamFlowAR):
    def forward_mae_decoder(self, *args):
        return super().forward_mae_decoder(*args) * 1.02


class OwnGuidance(UpstreamXAR):
    def sample_tokens(self, cfg=1.0, label=None, flow_upper_steps=50, flow_lower_steps=10):
        return super().sample_tokens(cfg + (cfg > 1) * 0.2, label, flow_upper_steps, flow_lower_steps)


class CappedGuidance(UpstreamXAR):
    def sample_tokens(self, cfg=1.0, label=None, flow_upper_steps=50, flow_lower_steps=10):
        return super().sample_tokens(min(cfg, 2.5), label, flow_upper_steps, flow_lower_steps)


class OwnAnnealing(UpstreamFlowAR):
    def sample_tokens(self, flow_upper_steps=50, flow_lower_steps=15, guidance=0.9, cfg=1.0, labels=None, progress=False):
        return super().sample_tokens(flow_upper_steps, flow_upper_steps, guidance, cfg, labels, progress)


class OwnLabels(UpstreamFlowAR):
    def sample_tokens(self, flow_upper_steps=50, flow_lower_steps=15, guidance=0.9, cfg=1.0, labels=None, progress=False):
        return super().sample_tokens(flow_upper_steps, flow_lower_steps, guidance, cfg, (labels * 7) % 1000, progress)


class OwnInference(UpstreamXAR):
    def sample_inference(self, *args, **kwargs):
        return super().sample_inference(*args, **kwargs) * 1.01


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (flowar, OwnDraw),
        (flowar, OwnEncoder),
        (flowar, OwnDecoder),
        (flowar, OwnAnnealing),
        (flowar, OwnLabels),
        (xar, OwnGuidance),
        (xar, OwnInference),
        (xar, CappedGuidance),
    ],
)
def test_overridden_methods_are_refused(make, kind):
    model = make(kind)
    before = draw(model)
    with pytest.raises(UnsupportedError, match=r"its own sample_tokens generates another image.*relative difference 0\.\d"):
        accelerate(model)
    assert "sample_tokens" not in vars(model)
    assert torch.equal(draw(model), before)


def test_an_overridden_method_that_computes_the_same_is_taken():
    class Renamed(UpstreamFlowAR):
        def forward_mae_decoder(self, *args):
            return super().forward_mae_decoder(*args)

    accelerate(flowar(Renamed))


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "as initialised"])
def test_replaced_samplers_are_refused(monkeypatch, zero):
    """The published FlowAR takes its sampler from a module."""
    model = flowar()
    model.solver = functools.partial(flow_peers.flowar_euler_maruyama, guidance_low=0.2)
    if zero:
        nn.init.zeros_(model.flownet.final_layer.linear.weight)
    with pytest.raises(UnsupportedError, match="names and shapes are the same, so a method, a sampler or a module's computation"):
        accelerate(model)


def gelu_to_silu(model):
    model.encoder_blocks[0].mlp.act = nn.SiLU()


def other_epsilon(model):
    model.encoder_blocks[0].norm1.eps = 1e-1


@KINDS
@pytest.mark.parametrize("change", [gelu_to_silu, other_epsilon])
def test_modules_that_compute_something_else_are_refused(make, change):
    model = make()
    change(model)
    with pytest.raises(UnsupportedError, match="generates another image than ours"):
        accelerate(model)


def hook(model):
    model.decoder_blocks[0].register_forward_hook(lambda module, args, output: None)


def adapter_in_place(model):
    linear = model.decoder_embed
    original = linear.forward
    linear.forward = lambda x: original(x)


def own_method(model):
    original = model.forward_mae_decoder
    model.forward_mae_decoder = lambda *args, **kwargs: original(*args, **kwargs)


@KINDS
@pytest.mark.parametrize(
    ("change", "name"), [(hook, r"decoder_blocks\.0"), (adapter_in_place, "decoder_embed"), (own_method, "Upstream")]
)
def test_hooks_and_replaced_methods_are_refused_by_name(make, change, name):
    """Also those that change nothing: they would not be called."""
    model = make()
    change(model)
    with pytest.raises(UnsupportedError, match=f"forward hooks, or methods that were replaced on the object, in {name}"):
        accelerate(model)
    accelerate(model, check=False)


@pytest.mark.parametrize("when", ["in between", "while accelerated"])
@pytest.mark.parametrize("what", ["module's function", "class' method"])
def test_what_changes_the_function_is_noticed(what, when, monkeypatch):
    """As the published sampler's module, which sample_tokens names."""
    model = flowar()
    accelerate(model)
    draw(model)
    if when == "in between":
        restore(model)
    if what == "module's function":
        enlarged = UpstreamFlowAR.enlarged
        monkeypatch.setattr(UpstreamFlowAR, "enlarged", lambda self, x, step: 1.1 * enlarged(self, x, step))
    else:
        forward = flow_peers.GatedMlp.forward
        monkeypatch.setattr(flow_peers.GatedMlp, "forward", lambda self, x: 1.1 * forward(self, x))
    with pytest.raises(UnsupportedError, match="generates another image than ours"):
        accelerate(model) if when == "in between" else draw(model)


def test_dropout_in_training_mode_is_refused():
    model = random_parameters(UpstreamFlowAR(img_size=64, scale=(1, 2, 4), diffloss_w=64, diffloss_d=1, proj_dropout=0.1, **SIZES))
    accelerate(model.train())
    with pytest.raises(UnsupportedError, match=r"in training mode, where .* drop values.* call model\.eval\(\)"):
        draw(model)
    draw(model.eval())


def test_two_steps_of_an_xar_are_told():
    model = xar()
    accelerate(model)
    with pytest.warns(UserWarning, match="a cell but the first has 2 steps"):
        draw(model, flow_upper_steps=5, flow_lower_steps=2)


@KINDS
def test_two_threads_may_accelerate_one_model(make):
    model = make()
    before, errors = draw(model), []

    def run():
        try:
            accelerate(model)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    restore(model)
    assert not errors
    assert "sample_tokens" not in vars(model)
    assert torch.equal(draw(model), before)


@KINDS
def test_the_object_is_as_before(make):
    model = make().train()
    attributes = [dict(vars(module)) for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    accelerate(model)
    restore(model)
    assert torch.equal(torch.get_rng_state(), state)
    for before, module in zip(attributes, model.modules(), strict=True):
        assert before.keys() == vars(module).keys()
        assert all(before[name] is value for name, value in vars(module).items())


@KINDS
def test_it_is_not_repeated_for_an_object_that_has_not_changed(make, monkeypatch):
    proofs, prove = [], check_flow.prove
    monkeypatch.setattr(check_flow, "prove", lambda *args, **kwargs: proofs.append(1) or prove(*args, **kwargs))
    model = make()
    for seed in range(2):
        with accelerate(model):
            draw(model, seed=seed)
    assert len(proofs) == 1
    with accelerate(model):
        hook(model)
        with pytest.raises(UnsupportedError, match="forward hooks"):
            draw(model)


# Followed ---------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_writes_through_data_are_noticed_within_an_image(make, dtype):
    model = make()
    accelerate(model, dtype=dtype)
    draw(model)
    for p in model.parameters():
        p.data.mul_(1.1)
    changed = draw(model)
    restore(model)
    accelerate(copy.deepcopy(model), dtype=dtype)
    other = make()
    other.load_state_dict(model.state_dict())
    accelerate(other, dtype=dtype)
    assert torch.equal(changed, draw(other))


@KINDS
def test_another_structure_is_refused_by_name(make):
    model = make()
    accelerate(model)
    model.encoder_blocks.append(copy.deepcopy(model.encoder_blocks[0]))
    with pytest.raises(UnsupportedError, match=r"its structure changed since it was accelerated: .*encoder_blocks\.1"):
        draw(model)
    restore(model)
    assert "sample_tokens" not in vars(model)


@KINDS
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_modules_are_refused(make):
    model = make()
    model.decoder_embed = torch.ao.nn.quantized.dynamic.Linear(64, 64)
    with pytest.raises(UnsupportedError, match=r"quantised modules are not served \(decoder_embed\)"):
        accelerate(model)


@KINDS
def test_weights_without_data_are_refused(make):
    with pytest.raises(UnsupportedError, match="is on meta, without data, as offloading leaves it"):
        accelerate(make().to("meta"))


# Calls ------------------------------------------------------------------------------------------------------------------


def test_guidance_below_zero_is_none_as_upstream_has_it():
    model = flowar()
    before = draw(model, guidance=-1)
    accelerate(model)
    assert_same(draw(model, guidance=-1), before)


def test_labels_of_an_xar_may_be_floats():
    model = xar()
    before = draw(model, label=LABELS.float())
    accelerate(model)
    assert_same(draw(model, label=LABELS.float()), before)


@KINDS
def test_other_arguments(make):
    base = UpstreamFlowAR if make is flowar else UpstreamXAR

    class Extended(base):
        def sample_tokens(self, *args, style=None, **kwargs):
            return super().sample_tokens(*args, **kwargs)

    class Declared(base):
        def sample_tokens(self, cfg=1.0, labels=None, label=None, guidance=0.9, flow_upper_steps=6, flow_lower_steps=4, style=None):
            given = {"labels": labels, "guidance": guidance} if base is UpstreamFlowAR else {"label": label}
            return super().sample_tokens(cfg=cfg, flow_upper_steps=flow_upper_steps, flow_lower_steps=flow_lower_steps, **given)

    class Required(base):
        def sample_tokens(self, style, cfg=1.0, labels=None, label=None, guidance=0.9):
            return None

    with pytest.raises(UnsupportedError, match="expected sample_tokens"):
        accelerate(make(Extended))
    model = make(Declared)
    before = draw(model)
    accelerate(model)
    assert_same(draw(model, style=None), before)
    with pytest.raises(UnsupportedError, match="style: sample_tokens is served with this argument at its default, got 'bold'"):
        draw(model, style="bold")
    with pytest.raises(UnsupportedError, match="sample_tokens requires style, of which nothing is known here"):
        accelerate(make(Required))


class Original(UpstreamXAR):
    """As the original xAR, before DiSA."""

    def sample_tokens(self, num_steps, cfg=1.0, label=None):
        return super().sample_tokens(cfg, label, num_steps, num_steps)


def test_a_call_whose_own_steps_are_not_used_is_told_once():
    model = xar(Original)
    accelerate(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model.sample_tokens(5, cfg=2.0, label=LABELS)
    assert [str(one.message).partition(" while")[0] for one in said] == ["num_steps: 5 of the call is not used"]
    accelerate(model, schedule="constant:5")
    model.sample_tokens(5, cfg=2.0, label=LABELS)  # the same number: nothing to say


@KINDS
def test_tokens_that_are_not_finite_are_told(make):
    model = make()
    accelerate(model)
    with torch.no_grad():
        model.z_proj.weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"the tokens of AR step [01] of [34] are not finite"):
        draw(model)
    with pytest.warns(UserWarning, match="model: not finite, NaN or inf, in z_proj.weight"):
        accelerate(_with_nan(make))


def _with_nan(make):
    model = make()
    with torch.no_grad():
        model.z_proj.weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@KINDS
def test_autocast_decides_the_dtype_of_products(make, dtype):
    model = make()
    handle = accelerate(model)
    with torch.autocast("cpu", dtype):
        draw(model)
        assert disa_fast.explain(model)["dtype"] == str(dtype)
    assert handle.report()["dtype"] == {str(dtype): "torch.autocast"}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_any_block_that_computes_something_else_is_refused(at):
    """Of equal ones a single one is run."""
    deep = {name: 3 if name.endswith("depth") else n for name, n in SIZES.items()}
    model = random_parameters(UpstreamFlowAR(img_size=64, scale=(1, 2, 4), diffloss_w=64, diffloss_d=3, **deep))
    accelerate(copy.deepcopy(model))
    other = copy.deepcopy(model)
    other.decoder_blocks[at].mlp.act = nn.SiLU()
    with pytest.raises(UnsupportedError, match="generates another image"):
        accelerate(other)
    other = copy.deepcopy(model)
    other.flownet.res_blocks[at].mlp.act = nn.SiLU()
    with pytest.raises(UnsupportedError, match="generates another image"):
        accelerate(other)


@KINDS
def test_what_a_call_leaves_in_caches_is_no_change(make, monkeypatch):
    proofs, prove = [], check_flow.prove
    monkeypatch.setattr(check_flow, "prove", lambda model, *args: proofs.append(len(model.encoder_blocks)) or prove(model, *args))
    model = make()
    model.encoder_blocks.append(copy.deepcopy(model.encoder_blocks[0]))
    for _ in range(2):
        draw(model)
        with accelerate(model):
            draw(model)
    assert proofs == [1]
