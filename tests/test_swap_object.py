"""accelerate follows the object: its weights, its network, its calls; and says what it cannot follow."""

import copy
import functools
import types
import warnings

import numpy as np
import pytest
import torch
from compare import assert_close
from hosts import HostDiffLoss, Process, draw, host, linear, spaced
from torch import nn
from torch.nn.utils import parametrizations
from upstream_like import AnnealedDiffLoss, UpstreamLikeMAR, small_mar

import disa_fast
from disa_fast import UnsupportedError, accelerate, restore
from disa_fast.adapters import check_mlp

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = {"schedule": "constant:12", "clip": None}
ANNEALED = {"schedule": "linear:9-3"}
LABELS = torch.tensor([1, 7])


def assert_same(actual, expected):
    assert_close(actual, expected, worst=2e-5 * float(expected.abs().max()))


def steps_of(model):
    return model._disa_fast_handle.report()["calls_by_evaluations"]


# Weights ----------------------------------------------------------------------------------------------------------------


def all_by_data(net):
    for p in net.parameters():
        p.data.copy_(1.1 * p.data)


def one_number_by_data(net):
    net.res_blocks[0].mlp[0].weight.data[3, 5] += 1.0


def other_order_by_data(net):
    weight = net.res_blocks[0].mlp[0].weight
    weight.data.copy_(weight.data.flip(0).clone())


def time_embedding_by_data(net):
    net.time_embed.mlp[0].weight.data.mul_(1.3)


@pytest.mark.parametrize("write", [all_by_data, one_number_by_data, other_order_by_data, time_embedding_by_data])
def test_writes_through_data_are_noticed_within_an_image(write):
    model = host()
    accelerate(model, **OWN)
    draw(model)
    write(model.diffloss.net)
    changed = draw(model)
    restore(model)
    assert_same(changed, draw(model))


def test_our_own_models_notice_them_too():
    model = small_mar()
    run = functools.partial(model.sample_tokens, LABELS, schedule="linear:5-3", num_iter=3, generator=None)
    torch.manual_seed(1)
    run()
    model.diffloss.net.input_proj.weight.data.mul_(1.5)
    torch.manual_seed(1)
    changed = run()
    model.head.refresh()
    torch.manual_seed(1)
    assert torch.equal(changed, run())


def test_a_graph_or_a_packed_weight_is_not_thrown_away_for_nothing():
    model = host()
    handle = accelerate(model, **OWN)
    draw(model)
    held = list(handle.head._packed.values())
    draw(model)
    assert all(a is b for a, b in zip(held, handle.head._packed.values(), strict=True))


# The network ------------------------------------------------------------------------------------------------------------


def test_another_network_is_fetched_at_the_next_call():
    model, other = host(), host()
    with torch.no_grad():
        for p in other.diffloss.net.parameters():
            p.mul_(1.2)
    accelerate(model, **OWN)
    draw(model)
    model.diffloss.net = other.diffloss.net
    changed = draw(model)
    restore(model)
    assert_same(changed, draw(model))


def one_block_more(net):
    net.res_blocks.append(copy.deepcopy(net.res_blocks[0]))


def weight_norm(net):
    parametrizations.weight_norm(net.res_blocks[0].mlp[0])


def wrapped(net):
    net.res_blocks[0].mlp[0] = nn.Sequential(net.res_blocks[0].mlp[0])


def quantised(net):
    net.res_blocks[0].mlp[0] = torch.ao.nn.quantized.dynamic.Linear(32, 32)


def gelu(net):
    net.res_blocks[0].mlp[1] = nn.GELU()


def hook(net):
    net.res_blocks[0].register_forward_hook(lambda module, args, output: 1.01 * output)


STRUCTURES = [
    (one_block_more, r"expected MLPSpec\(.*depth=2.*got MLPSpec\(.*depth=3"),
    (weight_norm, "res_blocks.0.mlp.0"),
    (wrapped, "res_blocks.0.mlp.0.0.weight"),
    (gelu, "its network computes something else"),
    (hook, "its network computes something else"),
]


@pytest.mark.parametrize(("change", "message"), STRUCTURES, ids=[change.__name__ for change, _ in STRUCTURES])
def test_a_network_that_changed_is_refused_by_name_and_restore_works(change, message):
    model = host()
    accelerate(model, **OWN)
    draw(model)
    change(model.diffloss.net)
    with pytest.raises(UnsupportedError, match=message):
        draw(model)
    restore(model)
    assert "sample" not in vars(model.diffloss)
    draw(model)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_network_that_became_int8_is_refused_by_name():
    model = host()
    accelerate(model, **OWN)
    quantised(model.diffloss.net)
    with pytest.raises(UnsupportedError, match=r"res_blocks\.0\.mlp\.0"):
        draw(model)


def test_another_diffusion_asks_for_another_accelerate():
    model = host()
    accelerate(model, **OWN)
    draw(model)
    model.diffloss.gen_diffusion = Process(linear(), spaced(9))
    with pytest.raises(UnsupportedError, match=r"what diffloss samples with changed since .* call accelerate again"):
        draw(model)
    accelerate(model, schedule="constant:9", clip=None)
    changed = draw(model)
    restore(model)
    assert_same(changed, draw(model))


class Int8(nn.Parameter):
    """As torchao's: what it computes is its own."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        return super().__torch_function__(function, kinds, args, kwargs or {})


def test_tensors_of_classes_of_their_own_are_refused():
    model = host()
    linear = model.diffloss.net.res_blocks[0].mlp[0]
    linear.weight = Int8(linear.weight.data, requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"res_blocks.0.mlp.0.weight: expected a plain tensor, got Int8.*dequantise"):
        accelerate(model, **OWN)


def test_a_parameter_of_a_harmless_class_is_taken():
    class Named(nn.Parameter):
        pass

    model = host()
    linear = model.diffloss.net.cond_embed
    linear.weight = Named(linear.weight.data, requires_grad=False)
    accelerate(model, **OWN)


def test_weights_without_data_are_refused():
    model = host()
    model.diffloss.net.to("meta")
    with pytest.raises(UnsupportedError, match=r"diffloss.net are on meta, without data; load or move them first"):
        accelerate(model, **OWN)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"DataParallel wraps the model; pass model\.module"),
        (functools.partial(torch.compile, backend="eager"), r"it is compiled; pass model\._orig_mod"),
    ],
    ids=["DataParallel", "compile"],
)
def test_wrapped_models_say_what_to_pass(wrap, message):
    with pytest.raises(UnsupportedError, match=message):
        accelerate(wrap(host()))


def test_a_compiled_network_says_what_to_set():
    model = host()
    model.diffloss.net = torch.compile(model.diffloss.net, backend="eager")
    with pytest.raises(UnsupportedError, match=r"diffloss.net is compiled; set diffloss.net = diffloss.net._orig_mod"):
        accelerate(model, **OWN)


# Handles ----------------------------------------------------------------------------------------------------------------


def test_two_models_with_one_head():
    """The second is refused in words as long as the first is accelerated, and nothing stays shadowed."""
    a, b = host(), host()
    b.diffloss = a.diffloss
    accelerate(a, **OWN)
    with pytest.raises(UnsupportedError, match="its diffloss is also that of another model, which is accelerated now"):
        accelerate(b, **ANNEALED)
    restore(b)
    assert "sample" in vars(a.diffloss)
    restore(a)
    assert "sample" not in vars(a.diffloss)
    accelerate(b, **ANNEALED)
    restore(b)
    assert "sample" not in vars(a.diffloss)


def test_two_models_with_one_network():
    a, b = host(), host()
    b.diffloss.net = a.diffloss.net
    accelerate(a, **OWN)
    accelerate(b, **ANNEALED)
    draw(a)
    draw(b)
    assert (steps_of(a), steps_of(b)) == ({12: 5}, {9: 1, 7: 1, 6: 1, 4: 1, 3: 1})


def test_a_shallow_copy_is_restored_on_its_own():
    model = host()
    handle = accelerate(model, **OWN)
    twin = copy.copy(model)
    restore(twin)
    assert "sample_tokens" not in vars(twin)
    assert "_disa_fast_handle" not in vars(twin)
    assert handle.is_installed
    assert "sample_tokens" in vars(model)


def test_nested_blocks_undo_one_after_the_other():
    model = host()
    with accelerate(model, **ANNEALED) as outer:
        with accelerate(model, schedule="linear:6-2", backend="reference") as inner:
            assert inner is outer
            assert inner.report()["backend"] == "reference"
            draw(model)
        assert outer.report()["schedule"] == disa_fast.Linear(9, 3)
        assert outer.report()["backend"] == "auto"
        assert "sample" in vars(model.diffloss)
        draw(model)
    assert "sample" not in vars(model.diffloss)


def test_a_block_inside_an_open_accelerate():
    model = host()
    handle = accelerate(model, **ANNEALED)
    with accelerate(model, schedule="linear:6-2"):
        pass
    assert handle.is_installed
    assert handle.schedule == disa_fast.Linear(9, 3)


@pytest.mark.parametrize("clip", ["x", -5, 5000, 2.5, True])
def test_a_clip_that_is_no_timestep(clip):
    with pytest.raises(ValueError, match="clip: expected a timestep"):
        accelerate(host(), clip=clip)


# Calls ------------------------------------------------------------------------------------------------------------------


class Crossed(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, cfg, temperature):
        return self.drawn(z, temperature, cfg)


def test_arguments_are_bound_by_name():
    model = host(Crossed)
    torch.manual_seed(0)
    z = torch.randn(4, 48)
    torch.manual_seed(1)
    before = model.diffloss.sample(z, 3.0, 0.5)
    accelerate(model, **OWN)
    torch.manual_seed(1)
    assert_same(model.diffloss.sample(z, 3.0, 0.5)[:2], before[:2])


class Lazy(HostDiffLoss):
    """LazyMAR's: arguments that make no difference."""

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0, device="cuda", current=None, **kwargs):
        return self.drawn(z, temperature, cfg)


class WithText(HostDiffLoss):
    """UVA's: an argument that makes one."""

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0, text_latents=None, shift=0.0):
        z = z if text_latents is None else z + text_latents.mean()
        return self.drawn(z, temperature, cfg) + shift


class Required(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature, cfg, extra_keyword):
        return self.drawn(z, temperature, cfg)


def test_other_arguments_that_make_no_difference(monkeypatch):
    proofs, prove = [], check_mlp.prove
    monkeypatch.setattr(check_mlp, "prove", lambda *args: proofs.append(1) or prove(*args))
    model, z = host(Lazy), torch.randn(4, 48)
    torch.manual_seed(1)
    before = model.diffloss.sample(z, 1.0, 3.0, device="cpu", diffloss_d=3)
    accelerate(model, **OWN)
    for _ in range(3):
        torch.manual_seed(1)
        assert_same(model.diffloss.sample(z, 1.0, 3.0, device="cpu", diffloss_d=3)[:2], before[:2])
    assert len(proofs) == 2  # at accelerate, and with these arguments


def test_other_arguments_at_their_defaults():
    model, z = host(WithText), torch.randn(4, 48)
    torch.manual_seed(1)
    before = model.diffloss.sample(z, 1.0, 3.0)
    accelerate(model, **OWN)
    torch.manual_seed(1)
    assert_same(model.diffloss.sample(z, 1.0, 3.0, text_latents=None)[:2], before[:2])
    with pytest.raises(
        UnsupportedError, match=r"text_latents: diffloss.sample is served with this argument at its default, got Tensor"
    ):
        model.diffloss.sample(z, 1.0, 3.0, text_latents=torch.ones(3))
    with pytest.raises(UnsupportedError, match="draws other tokens than ours"):
        model.diffloss.sample(z, 1.0, 3.0, shift=1.0)


def test_other_arguments_that_are_required_are_refused_at_once():
    with pytest.raises(UnsupportedError, match=r"diffloss.sample requires extra_keyword, of which nothing is known here"):
        accelerate(host(Required), **OWN)


class Looping(UpstreamLikeMAR):
    """Loops of other shapes around the same head."""

    @torch.no_grad()
    def sample_tokens(self, bsz, num_iter=64, cfg=1.0, labels=None, kind="twice"):
        return getattr(self, kind)(num_iter, cfg)

    def step(self, cfg):
        return self.diffloss.sample(torch.ones(4, 48), 1.0, cfg)

    def twice(self, num_iter, cfg):
        return torch.stack([self.step(cfg) for _ in range(2 * num_iter)])

    def recursive(self, num_iter, cfg):
        first = self.step(cfg)
        if num_iter > 1:
            self.sample_tokens(1, num_iter - 1, cfg, kind="recursive")
        return torch.stack([first] + [self.step(cfg) for _ in range(num_iter - 1)])

    def defaulted(self, num_iter, cfg):
        return torch.stack([self.step(cfg) for _ in range(num_iter or 5)])


def looping():
    return Looping(HostDiffLoss).eval()


def test_a_loop_that_draws_twice_a_step():
    model = looping()
    accelerate(model, **ANNEALED)
    with pytest.warns(UserWarning, match=r"diffloss.sample is called more often than the num_iter = 3 times of sample_tokens"):
        model.sample_tokens(1, 3, 3.0)
    assert steps_of(model) == {9: 1, 6: 1, 3: 4}
    accelerate(model, schedule="constant:12", clip=None)
    model.sample_tokens(1, 3, 3.0)


def test_a_loop_that_calls_itself():
    model = looping()
    accelerate(model, **ANNEALED)
    model.sample_tokens(1, 3, 3.0, kind="recursive")
    assert steps_of(model) == {9: 3, 6: 1, 3: 2}


def test_a_loop_that_is_not_told_how_many():
    model = looping()
    accelerate(model, **ANNEALED)
    with pytest.raises(UnsupportedError, match=r"num_iter: expected a number, since Linear.* got None; or .*constant:N"):
        model.sample_tokens(1, None, 3.0, kind="defaulted")
    accelerate(model, **OWN)
    model.sample_tokens(1, None, 3.0, kind="defaulted")
    assert steps_of(model) == {12: 5}


class Generating(UpstreamLikeMAR):
    def sample_tokens(self, bsz, num_iter=64, cfg=1.0):
        for _ in range(num_iter):
            yield self.diffloss.sample(torch.ones(4, 48), 1.0, cfg)


def test_a_loop_that_is_a_generator():
    model = Generating(HostDiffLoss).eval()
    accelerate(model, **ANNEALED)
    for _, _ in zip(model.sample_tokens(1, 3, 3.0), model.sample_tokens(1, 3, 3.0), strict=True):  # two at a time
        pass
    assert steps_of(model) == {9: 2, 6: 2, 3: 2}


@pytest.mark.parametrize("how", ["bound before", "through the class"])
def test_a_loop_that_cannot_be_counted(how):
    model = host()
    before = model.sample_tokens
    accelerate(model, **ANNEALED)
    loop = before if how == "bound before" else functools.partial(type(model).sample_tokens, model)
    with pytest.warns(
        UserWarning, match=r"called outside of sample_tokens.*first AR step, in T\(0\) = 9 steps, and nothing is annealed"
    ):
        loop(2, num_iter=4, cfg=3.0, labels=LABELS)
    assert steps_of(model) == {9: 4}
    accelerate(model, **OWN)
    loop(2, num_iter=4, cfg=3.0, labels=LABELS)  # constant steps lose nothing


def registered(model):
    """As FSDP2's register_fsdp_forward_method: a function that wraps a bound method, bound again."""
    original = model.sample_tokens

    @functools.wraps(original)
    def wrapped(self, *args, **kwargs):
        return original(*args, **kwargs)

    model.sample_tokens = types.MethodType(wrapped, model)


def decorated(model):
    original = model.sample_tokens

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return original(*args, **kwargs)

    model.sample_tokens = wrapped


@pytest.mark.parametrize("wrap", [registered, decorated])
def test_a_loop_wrapped_around_a_bound_method(wrap):
    model = host()
    before = draw(model)
    wrap(model)
    accelerate(model, **OWN)
    assert_same(draw(model), before)
    accelerate(model, **ANNEALED)
    draw(model)
    assert steps_of(model) == {12: 5, 9: 1, 7: 1, 6: 1, 4: 1, 3: 1}


# Said -------------------------------------------------------------------------------------------------------------------


def test_constant_steps_that_are_clipped_all_the_same():
    with pytest.warns(UserWarning, match=r"constant:12 is clipped at timestep 950 of 1000 .*starts at 999; pass clip=None"):
        accelerate(host(), schedule="constant:12")
    accelerate(UpstreamLikeMAR(AnnealedDiffLoss), schedule="constant:4")  # which is clipped by itself


def test_a_temperature_without_effect_is_said_once():
    model = host()
    accelerate(model, schedule="linear:9-3", solver="ddim")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        draw(model, temperature=0.9)
        draw(model, temperature=0.9)
    assert [str(one.message) for one in said] == ["temperature: ddim adds no noise, so that temperature = 0.9 has no effect"]
    with pytest.warns(UserWarning, match="temperature: ddim adds no noise"):
        small_mar().sample_tokens(LABELS, "linear:5-3", num_iter=3, solver="ddim", temperature=0.5)


@pytest.mark.parametrize("kind", [HostDiffLoss, AnnealedDiffLoss])
def test_tokens_that_are_not_finite_are_said_once_with_their_step(kind):
    model = UpstreamLikeMAR(kind).eval()
    accelerate(model, **ANNEALED)
    decoded, decode = [], model.backbone.decode

    def poisoned(*args):
        decoded.append(1)
        z = decode(*args)
        return z * torch.nan if len(decoded) % 5 == 3 else z

    model.backbone.decode = poisoned
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        draw(model)
        draw(model)
    assert [str(one.message).partition(":")[0] for one in said] == ["the tokens of AR step 2 of 5 are not finite"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value):
    model = host()
    with torch.no_grad():
        model.diffloss.net.res_blocks[1].mlp[0].weight[3, 4] = value
    with pytest.warns(UserWarning, match=r"model: not finite, NaN or inf, in res_blocks\.1\.mlp\.0\.weight"):
        handle = accelerate(model, **OWN)
    assert handle.report()["check"]["error"] < 5e-5  # proven by random weights


# The caller's dtype -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_of_products(dtype):
    model = host()
    handle = accelerate(model, **ANNEALED)
    with torch.autocast("cpu", dtype):
        tokens = draw(model)
        facts = disa_fast.explain(model)
    assert tokens.dtype == torch.float32
    assert handle.report()["dtype"] == {str(dtype): "torch.autocast"}
    assert (facts["dtype"], facts["dtype_from"]) == (str(dtype), "torch.autocast")
    assert disa_fast.explain(model)["dtype"] == "torch.float32"


def test_the_dtype_of_accelerate_overrides():
    model = host()
    handle = accelerate(model, **OWN, dtype=torch.float32)
    before = draw(model)
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.randn(4, 48)
        torch.manual_seed(0)
        under = model.diffloss.sample(z, 1.0, 3.0)
    torch.manual_seed(0)
    assert torch.equal(under, model.diffloss.sample(z, 1.0, 3.0))
    assert before.dtype == torch.float32
    assert handle.report()["dtype"] == {"torch.float32": "dtype of accelerate"}
    with pytest.raises(ValueError, match="dtype: expected a floating point"):
        accelerate(model, dtype="bfloat16")


def test_float64_is_left_alone_as_autocast_leaves_it():
    model = host()
    model.diffloss.net.double()
    handle = accelerate(model, **OWN)
    with torch.autocast("cpu", torch.bfloat16):
        assert handle.network_dtype() == (torch.float64, "the parameters' own")


def test_numpys_state_is_not_touched_by_a_proof_in_mid_image():
    model, z = host(Lazy), torch.randn(4, 48)
    accelerate(model, **OWN)
    state = np.random.get_state()[1].copy()
    model.diffloss.sample(z, 1.0, 3.0, device="cpu")
    assert np.array_equal(np.random.get_state()[1], state)
