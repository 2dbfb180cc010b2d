"""accelerate reads the diffusion of an object, serves what tables express, and proves it; the rest it refuses."""

import copy
import threading

import numpy as np
import pytest
import torch
from compare import assert_close
from hosts import HostDiffLoss, MeanType, Process, VarType, cosine, draw, host, linear, spaced
from torch import nn
from upstream_like import AnnealedDiffLoss, UpstreamLikeMAR

from disa_fast import UnsupportedError, accelerate, restore, solvers
from disa_fast.adapters import check, check_mlp

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = {"schedule": "constant:12", "clip": None}  # what the hosts do by themselves


def assert_same(actual, expected):
    assert_close(actual, expected, worst=2e-5 * float(expected.abs().max()))


# Exact ------------------------------------------------------------------------------------------------------------------

EXACT = {
    "MAR": {},
    "UniPic-1, betas capped at 0.2": {"betas": cosine(most=0.2)},
    "linear betas": {"betas": linear()},
    "500 base steps": {"betas": cosine(500)},
    "4000 base steps": {"betas": cosine(4000)},
    "linear, 4000, rescaled times": {"betas": linear(4000), "rescale": True},
    "500, rescaled times": {"betas": cosine(500), "rescale": True},
    "TIMAR, clean token": {"mean": MeanType.START_X},
    "clean token, linear": {"mean": MeanType.START_X, "betas": linear()},
    "previous state": {"mean": MeanType.PREVIOUS_X, "betas": linear()},
    "velocity": {"mean": MeanType.VELOCITY},
    "learned variance": {"variance": VarType.LEARNED},
    "fixed small variance": {"variance": VarType.FIXED_SMALL},
    "fixed large variance": {"variance": VarType.FIXED_LARGE},
    "ddim12's timesteps": {"timesteps": range(0, 1000, 84)},
    "8,4 timesteps": {"timesteps": [*np.linspace(0, 499, 8).round().astype(int).tolist(), *range(500, 1000, 166)][:12]},
    "betas known at its own timesteps alone": {"betas": cosine(most=0.3), "shows_training": False},
    "any betas": {"betas": np.sort(np.random.default_rng(0).uniform(1e-4, 0.03, 1000))},
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_what_tables_express_is_served_exactly(options, cfg):
    model = host(**options)
    before = draw(model, cfg, temperature=0.9)
    with accelerate(model, **OWN) as handle:
        assert_same(draw(model, cfg, temperature=0.9), before)
        assert handle.report()["calls_by_evaluations"] == {12: 5}
        assert handle.report()["check"]["error"] < 5e-5
    assert torch.equal(draw(model, cfg, temperature=0.9), before)


def test_ddim_is_recognised():
    model = host(ddim=True)
    before = draw(model)
    handle = accelerate(model, **OWN)
    assert handle.report()["solver"] == "ddim"
    assert_same(draw(model), before)


@pytest.mark.parametrize(("base", "clip"), [(500, 475), (1000, 950), (4000, 3800)])
def test_annealing_is_counted_in_the_objects_base_steps(base, clip):
    """As DiSA's for 1000: the clip is a share of them, and each count's grid lies over all."""
    model = host(betas=cosine(base))
    handle = accelerate(model, schedule="linear:9-3")
    tables = [handle._table_for(steps) for steps in (9, 3)]
    assert [table.t[0] for table in tables] == [clip, clip]
    assert [len(table) for table in tables] == [9, 3]
    draw(model)
    assert handle.report()["calls_by_evaluations"] == {9: 1, 7: 1, 6: 1, 4: 1, 3: 1}


def test_annealing_needs_all_betas():
    options = {"betas": np.sort(np.random.default_rng(0).uniform(1e-4, 0.03, 1000)), "shows_training": False}
    with pytest.raises(
        UnsupportedError, match=r"the 12 timesteps of its own sampling alone.* schedule='constant:12' with clip=None"
    ):
        accelerate(host(**options), schedule="constant:9")


def test_mars_own_tables_are_bitwise_those_of_the_solver():
    handle = accelerate(host(), **OWN)
    for steps in (12, 50):
        ours, theirs = handle._table_for(steps), solvers.ddpm(steps, None)
        assert all(np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ("t", "a", "b", "l0", "l1"))


# Refused ----------------------------------------------------------------------------------------------------------------


class OtherGuidance(HostDiffLoss):
    """HART's: c (1 + s) - s u."""

    def guided(self, conditional, unconditional, cfg):
        return conditional * (1 + cfg) - cfg * unconditional


class HART(OtherGuidance):
    def __init__(self, net):
        super().__init__(net, timesteps=spaced(8), clip=True, scale=0.6)


class Scaled(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return super().sample(z, temperature, cfg) * 1.02


class NoisyAtTheEnd(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        drawn = super().sample(z, temperature, cfg)
        return drawn + 1e-2 * drawn.std() * torch.randn_like(drawn)


class NoTemperature(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return super().sample(z, 1.0, cfg)


class WritesZ(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return self.drawn(z.mul_(1.5), temperature, cfg)


class DrawsMore(HostDiffLoss):
    """The same tokens, and another stream of random numbers afterwards."""

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        drawn = self.drawn(z, temperature, cfg)
        torch.rand(())
        return drawn


class DrawsFromNumPy(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        np.random.rand()
        return self.drawn(z, temperature, cfg)


class GuidedAboveOne(HostDiffLoss):
    def guided(self, conditional, unconditional, cfg):
        return super().guided(conditional, unconditional, cfg) if cfg > 1 else conditional


class CappedGuidance(HostDiffLoss):
    def guided(self, conditional, unconditional, cfg):
        return super().guided(conditional, unconditional, min(float(cfg), 5.0))


class TensorGuidance(HostDiffLoss):
    def guided(self, conditional, unconditional, cfg):
        return super().guided(conditional, unconditional, cfg * 1.1 if isinstance(cfg, torch.Tensor) else cfg)


class ColdAtOne(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return self.drawn(z, 0.0 if temperature == 1.0 else temperature, cfg)


class LouderNoise(HostDiffLoss):
    """By 5 %: hidden where the first step, at t = 999, makes numbers of a hundred thousand."""

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return self.drawn(z, 1.05 * temperature, cfg)


class FirstHalf(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        drawn = self.drawn(z, temperature, cfg)
        return drawn if cfg == 1.0 else drawn[: len(z) // 2]


class Float64(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return self.drawn(z, temperature, cfg).double()


class MicroBatches(HostDiffLoss):
    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return torch.cat([self.drawn(part, temperature, cfg) for part in z.split(4)])


class Unreadable(HostDiffLoss):
    def __init__(self, net):
        super().__init__(net)
        del self.gen_diffusion
        self.sampler_of_its_own = object()


class MiddleBetas(HostDiffLoss):
    """Shows MAR's betas, and samples with others in the middle."""

    def __init__(self, net):
        super().__init__(net)
        self.gen_diffusion.before = self.gen_diffusion.before * np.where(np.arange(12) == 6, 1.001, 1)


class OtherMean:
    name = "EDM"


REFUSED = {
    "HART": (HART, {}, "its own diffloss.sample draws other tokens"),
    "HART's guidance alone": (OtherGuidance, {}, "without guidance they are the same, so its guidance is another"),
    "clipped x0": (HostDiffLoss, {"clip": True}, "other clipping, scaling, coefficients"),
    "denoised_fn": (HostDiffLoss, {"denoised": lambda x0: 0.5 * x0}, "relative difference .*, where rounding explains"),
    "a sample that scales": (Scaled, {}, r"relative difference 0\.0"),
    "noise of its own": (NoisyAtTheEnd, {}, "relative difference"),
    "temperature without effect": (NoTemperature, {}, "relative difference"),
    "coefficients of its own": (MiddleBetas, {}, "relative difference"),
    "z written in place": (WritesZ, {}, "changes z in place"),
    "random numbers afterwards": (DrawsMore, {}, "draws other random numbers than ours"),
    "NumPy's random numbers": (DrawsFromNumPy, {}, "draws other random numbers than ours"),
    "guidance above 1 alone": (GuidedAboveOne, {}, "guided, .*cfg = 0.5"),
    "guidance capped at 5": (CappedGuidance, {}, "guided, .*cfg = 7"),
    "guidance by a tensor": (TensorGuidance, {}, "guided, .*cfg = 7"),
    "a temperature of exactly 1": (ColdAtOne, {}, "temperature = 1[^.]"),
    "noise 5 % louder": (LouderNoise, {}, "relative difference"),
    "the first half alone": (FirstHalf, {}, r"gives \[2, 16\] of torch.float32 .*, where ours gives \[4, 16\]"),
    "float64": (Float64, {}, r"gives \[2, 16\] of torch.float64 .*, where ours gives \[2, 16\] of torch.float32"),
    "batches of four rows": (MicroBatches, {}, "relative difference|draws other random numbers"),
    "no diffusion that shows": (Unreadable, {}, "expected a diffusion with timestep_map or betas"),
}


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_they_do_not_is_refused(kind, options, message):
    model = host(kind, **options)
    before = None if kind in (Unreadable, Float64) else draw(model)  # which do not draw, or not with this loop
    with pytest.raises(UnsupportedError, match=message):
        accelerate(model, **OWN)
    assert "sample" not in vars(model.diffloss)
    assert before is None or torch.equal(draw(model), before)


class OtherAnnealing(AnnealedDiffLoss):
    """Says linear, and is not."""

    def __init__(self, net, way):
        super().__init__(net)
        self.way = way

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0, step=0, ar_num_iter=64):
        diffusions, last = self.gen_diffusion, ar_num_iter - 1
        noise, network = self._start(z, cfg)
        index = {
            "quadratic": lambda: int(((last - step) / last) ** 2 * (len(diffusions) - 1)),
            "rounded": lambda: round((last - step) / last * (len(diffusions) - 1)),
            "by K": lambda: int((ar_num_iter - step) / ar_num_iter * (len(diffusions) - 1)),
            "always of 64": lambda: max(0, int((63 - step) / 63 * (len(diffusions) - 1))),
        }[self.way]()
        return diffusions[index].sample(network, noise, temperature)


@pytest.mark.parametrize("way", ["quadratic", "rounded", "by K", "always of 64"])
def test_annealing_is_proven_at_every_step(way):
    model = UpstreamLikeMAR(lambda net: OtherAnnealing(net, way))
    with pytest.raises(UnsupportedError, match=r"at AR step \d+ of \d+ its own diffloss.sample takes the diffusion of \d+ steps"):
        accelerate(model)


def test_an_unknown_prediction_is_named():
    model = host()
    model.diffloss.gen_diffusion.model_mean_type = OtherMean()
    with pytest.raises(UnsupportedError, match=r"gen_diffusion\.model_mean_type is .*; served are ancestral"):
        accelerate(model, **OWN)


def test_a_refusal_gives_both_figures_and_what_was_compared():
    with pytest.raises(UnsupportedError) as refusal:
        accelerate(host(Scaled), **OWN)
    for part in ("unguided, ", "cfg = 1, temperature = 0.9", "relative difference 0.02", "rounding explains 5e-05", "check=False"):
        assert part in str(refusal.value)


def test_check_false_takes_it_and_says_so():
    model = host(Scaled)
    handle = accelerate(model, **OWN, check=False)
    assert handle.report()["check"] == "skipped: check=False"
    restore(model)
    with pytest.raises(ValueError, match="check: expected True or False, got 'no'"):
        accelerate(host(), check="no")


# The network ------------------------------------------------------------------------------------------------------------


def scaling_hook(net):
    net.res_blocks[1].mlp.register_forward_hook(lambda module, args, output: 1.01 * output)


def input_hook(net):
    net.cond_embed.register_forward_pre_hook(lambda module, args: (args[0] + 0.01,))


def adapter_in_place(net):
    linear = net.res_blocks[0].mlp[0]
    down, up = 0.1 * torch.randn(2, linear.in_features), 0.1 * torch.randn(linear.out_features, 2)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias) + x @ down.T @ up.T


def fake_quantisation(net):
    linear = net.res_blocks[0].mlp[2]

    def forward(x):
        step = linear.weight.abs().max() / 127
        return nn.functional.linear(x, (linear.weight / step).round() * step, linear.bias)

    linear.forward = forward


def gelu(net):
    for block in net.res_blocks:
        block.mlp[1] = nn.GELU()


def norm_epsilon(net):
    net.res_blocks[0].in_ln.eps = 1e-5


def final_norm_epsilon(net):
    net.final_layer.norm_final.eps = 1e-5


def own_forward(net):
    class Another(type(net)):
        def forward(self, x, t, c):
            return super().forward(x, t, c) + 1e-2

    net.__class__ = Another


def time_period(net):
    original = net.time_embed.forward
    net.time_embed.forward = lambda t: original(t * 0.999)


def time_over_thousand(net):
    original = net.time_embed.forward
    net.time_embed.forward = lambda t: original(t / 1000)


NETWORKS = [
    scaling_hook, input_hook, adapter_in_place, fake_quantisation, gelu, norm_epsilon, final_norm_epsilon, own_forward, time_period,
    time_over_thousand,
]  # fmt: skip


def clamped_far_out(net):
    net.cond_embed.register_forward_pre_hook(lambda module, args: (args[0].clamp(-8, 8),))


NETWORKS.append(clamped_far_out)


@pytest.mark.parametrize("change", NETWORKS)
@pytest.mark.parametrize("zero", [False, True], ids=["trained", "as initialised"])
def test_same_names_another_function(change, zero):
    """Also where the output layer is still zero, so that its own weights tell nothing."""
    model = host()
    if zero:
        nn.init.zeros_(model.diffloss.net.final_layer.linear.weight)
        nn.init.zeros_(model.diffloss.net.final_layer.linear.bias)
    change(model.diffloss.net)
    with pytest.raises(UnsupportedError, match=r"its network computes something else.*relative difference"):
        accelerate(model, **OWN)


def test_hooks_that_look_on_are_told_of():
    model = host()
    model.diffloss.net.res_blocks[0].register_forward_hook(lambda module, args, output: None)
    with pytest.warns(UserWarning, match=r"hooks .* of diffloss.net \(res_blocks.0\) are not called while it is accelerated"):
        accelerate(model, **OWN)


def test_tied_blocks_are_two_blocks():
    model = host()
    net = model.diffloss.net
    net.res_blocks[1] = net.res_blocks[0]
    before = draw(model)
    accelerate(model, **OWN)
    assert_same(draw(model), before)
    assert model._disa_fast_handle.head.spec.depth == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_object_of_another_dtype_is_proven_in_float32(dtype):
    """A difference that 16 bits would hide shows."""
    model = host()
    model.diffloss.net.to(dtype)
    held = [p.data_ptr() for p in model.diffloss.net.parameters()]
    accelerate(model, **OWN)
    assert [p.data_ptr() for p in model.diffloss.net.parameters()] == held
    restore(model)
    model.diffloss.net.res_blocks[0].mlp.register_forward_hook(lambda module, args, output: 1.0005 * output)
    with pytest.raises(UnsupportedError, match="its network computes something else"):
        accelerate(model, **OWN)


# As it was --------------------------------------------------------------------------------------------------------------


class Counting(HostDiffLoss):
    def __init__(self, net):
        super().__init__(net)
        self.calls, self.seen = 0, []
        self.register_buffer("total", torch.zeros(()))

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        self.calls += 1
        self.seen.append(len(z))
        self.total += 1
        self.last = z
        return super().sample(z, temperature, cfg)


def test_the_object_is_as_before():
    model = host(Counting).train()
    draw(model)
    diffloss, seen = model.diffloss, model.diffloss.seen
    diffloss.net.requires_grad_(True)
    diffloss.net.cond_embed.weight.grad = torch.ones_like(diffloss.net.cond_embed.weight)
    attributes = {name: value for name, value in vars(diffloss).items() if name != "_modules"}
    held = copy.deepcopy([diffloss.calls, diffloss.seen, diffloss.total])
    versions = [p._version for p in diffloss.parameters()]
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    accelerate(model, **OWN)
    restore(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert [diffloss.calls, diffloss.seen, diffloss.total] == held
    assert diffloss.seen is seen
    assert vars(diffloss).keys() == attributes.keys() | {"_modules"}
    assert all(module.training for module in model.modules() if module is not model.backbone)
    assert [p._version for p in diffloss.parameters()] == versions
    assert all(p.requires_grad for p in diffloss.net.parameters())
    assert torch.equal(diffloss.net.cond_embed.weight.grad, torch.ones_like(diffloss.net.cond_embed.weight))


def test_a_failing_check_leaves_it_as_before():
    class Failing(Counting):
        @torch.no_grad()
        def sample(self, z, temperature=1.0, cfg=1.0):
            drawn = super().sample(z, temperature, cfg)
            if cfg != 1.0:
                raise RuntimeError("no guidance today")
            return drawn

    model = host(Failing)
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedError, match=r"its own diffloss.sample fails .*RuntimeError: no guidance today"):
        accelerate(model, **OWN)
    assert (model.diffloss.calls, model.diffloss.seen) == (0, [])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def proofs(monkeypatch):
    """How many proofs were made."""
    made, prove = [], check_mlp.prove

    def counted(*args):
        made.append(1)
        return prove(*args)

    monkeypatch.setattr(check_mlp, "prove", counted)
    return made


def test_it_is_not_repeated_for_an_object_that_has_not_changed(proofs):
    model = host()
    for seed in range(3):
        with accelerate(model, **OWN) as handle:
            draw(model, seed=seed)
            assert handle.report()["check"]["error"] < 5e-5
    with torch.no_grad():
        model.diffloss.net.cond_embed.weight.mul_(2)  # weights are not a function
    accelerate(model, schedule="linear:9-3")
    assert len(proofs) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda diffloss: setattr(diffloss.gen_diffusion, "betas", diffloss.gen_diffusion.betas * 0.9),
        lambda diffloss: setattr(diffloss.gen_diffusion, "betas", diffloss.gen_diffusion.betas * 1.1),
        lambda diffloss: scaling_hook(diffloss.net),
        lambda diffloss: gelu(diffloss.net),
        lambda diffloss: norm_epsilon(diffloss.net),
        lambda diffloss: setattr(diffloss, "scale", 0.6),
        lambda diffloss: diffloss.how.update(clip=True),
        lambda diffloss: setattr(diffloss, "__class__", Scaled),
    ],
    ids=["betas", "betas above 1", "hook", "activation", "epsilon", "attribute", "setting in a dict", "class"],
)
def test_it_is_repeated_for_one_that_has(change):
    model = host()
    with accelerate(model, **OWN):
        pass
    change(model.diffloss)
    with pytest.raises(UnsupportedError):
        accelerate(model, **OWN)


def patched(monkeypatch, owner, name, function):
    monkeypatch.setattr(owner, name, function)


def on_the_class(model, monkeypatch):
    forward = type(model.diffloss.net.res_blocks[0]).forward
    patched(monkeypatch, type(model.diffloss.net.res_blocks[0]), "forward", lambda self, x, y: 1.01 * forward(self, x, y))


def on_torchs_class(model, monkeypatch):
    patched(monkeypatch, nn.SiLU, "forward", lambda self, x: nn.functional.gelu(x))


def on_the_diffusions_class(model, monkeypatch):
    step = Process.step
    patched(monkeypatch, Process, "step", lambda self, *args: 1.01 * step(self, *args))


def a_helper_on_the_class(model, monkeypatch):
    guided = HostDiffLoss.guided
    patched(monkeypatch, HostDiffLoss, "guided", lambda self, c, u, cfg: guided(self, c, u, 1.1 * cfg))


def numbers_in_place(model, monkeypatch):
    model.diffloss.gen_diffusion.before[:] *= 0.99


def private_number(model, monkeypatch):
    model.diffloss._gain = 2.0


class WithGain(HostDiffLoss):
    def __init__(self, net):
        super().__init__(net)
        self._gain = 1.0

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return self._gain * self.drawn(z, temperature, cfg)


class WithOutput(HostDiffLoss):
    """A layer beside the network, the identity until it is loaded."""

    def __init__(self, net):
        super().__init__(net)
        self.output = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.output.weight.copy_(torch.eye(16))

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0):
        return self.output(self.drawn(z, temperature, cfg))


def parameters_beside_the_network(model, monkeypatch):
    model.diffloss.output.weight.data.mul_(1.1)


CHANGES = [
    (on_the_class, HostDiffLoss), (on_torchs_class, HostDiffLoss), (on_the_diffusions_class, HostDiffLoss),
    (a_helper_on_the_class, HostDiffLoss), (numbers_in_place, HostDiffLoss), (private_number, WithGain),
    (parameters_beside_the_network, WithOutput),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
@pytest.mark.parametrize("when", ["in between", "while accelerated"])
def test_what_changes_the_function_is_noticed(change, kind, when, monkeypatch):
    model = host(kind)
    accelerate(model, **OWN)
    draw(model)
    if when == "in between":
        restore(model)
    change(model, monkeypatch)
    with pytest.raises(UnsupportedError):
        accelerate(model, **OWN) if when == "in between" else draw(model)


def test_two_threads_may_accelerate_one_model():
    model = host()
    before, weights = draw(model), copy.deepcopy(model.diffloss.net.state_dict())
    errors = []

    def run():
        try:
            for _ in range(3):
                check.remember(model, b"", {})
                check._proven.pop(model, None)
                accelerate(model, **OWN)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    restore(model)
    assert not errors
    assert all(torch.equal(value, weights[name]) for name, value in model.diffloss.net.state_dict().items())
    assert torch.equal(draw(model), before)


def test_a_thread_that_draws_meanwhile_sees_nothing_of_the_proof():
    model, wrong, done = host(), [], threading.Event()
    x, t, z = torch.ones(2, 16), torch.tensor([5, 900]), torch.ones(2, 48)
    expected = model.diffloss.net(x, t, z)

    def run():
        while not done.is_set():
            wrong.append(not torch.equal(model.diffloss.net(x, t, z), expected))

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(3):
        check._proven.pop(model, None)
        with accelerate(model, **OWN):
            pass
    done.set()
    thread.join()
    assert wrong and not any(wrong)


def test_an_object_that_cannot_be_copied_is_proven_itself():
    class Single(HostDiffLoss):
        def __deepcopy__(self, memo):
            raise TypeError("there is one of me")

    model = host(Single)
    before = draw(model)
    accelerate(model, **OWN)
    assert_same(draw(model), before)


def test_a_copy_is_proven_on_its_own(proofs):
    model = host()
    accelerate(model, **OWN)
    restore(model)
    accelerate(copy.deepcopy(model), **OWN)
    assert len(proofs) == 2


# Mutants of the check itself ---------------------------------------------------------------------------------------------


def test_a_thousand_times_the_tolerance_would_be_noticed(monkeypatch):
    """Scaled differs by 2 %, a thousand times what is allowed by less than 5 %."""
    monkeypatch.setattr(check, "LEAST_BOUND", 1000 * check.LEAST_BOUND)
    monkeypatch.setattr(check.compared, "__defaults__", (None, check.LEAST_BOUND))
    accelerate(host(Scaled), **OWN)


def test_a_check_without_guidance_would_be_noticed(monkeypatch):
    monkeypatch.setattr(check_mlp, "CALLS", [call for call in check_mlp.CALLS if call.cfg == 1.0])
    accelerate(host(OtherGuidance), **OWN)


def test_random_states_that_are_not_put_back_would_be_noticed(monkeypatch):
    import contextlib

    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    state = torch.get_rng_state()
    accelerate(host(), **OWN)
    assert not torch.equal(torch.get_rng_state(), state)


def test_the_process_of_the_tests_shows_what_it_is():
    process = Process(linear(), spaced(12))
    assert (process.num_timesteps, process.original_num_steps) == (12, 1000)
