"""The eager MAR that others are measured against does what the published one did, and at its cost."""

import copy
import pickle
from functools import partial

import mar_peers
import numpy as np
import pytest
import torch
from compare import assert_close
from recorded import golden, golden_cases
from replay import Replay, draws_of

from disa_fast import Linear, accelerate, models

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = torch.tensor([1, 7])
SMALL = {
    "img_size": 64, "buffer_size": 4, "class_num": 10, "encoder_embed_dim": 32, "encoder_depth": 1, "encoder_num_heads": 2,
    "decoder_embed_dim": 48, "decoder_depth": 1, "decoder_num_heads": 2, "diffloss_d": 2, "diffloss_w": 32,
}  # fmt: skip


def small_mar(**options):
    """Every parameter random, so that each of them matters."""
    model = mar_peers.mar_base(**(SMALL | {"diff_upper_steps": 6, "diff_lower_steps": 3} | options))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p) if p.ndim == 1 else torch.randn_like(p) * p.shape[-1] ** -0.5)
    return model.eval()


def draw(model, seed=0, **options):
    torch.manual_seed(seed)
    np.random.seed(seed)
    return model.sample_tokens(2, **({"num_iter": 5, "cfg": 3.0, "labels": LABELS} | options))


def assert_same(actual, expected):
    """Up to the rounding of sums in another order."""
    assert_close(actual, expected, worst=2e-5 * float(expected.abs().max()))


# As recorded ----------------------------------------------------------------------------------------------------------


def recorded_model(recorded, case):
    sizes = {name: value for name, value in recorded.meta["model"].items() if name not in ("norm_eps", "seq_len")}
    annealing = {f"diff_{name}": case[key] for name, key in (("upper_steps", "upper"), ("lower_steps", "lower"))}
    annealing["diff_annealing_strategy"] = case["strategy"]
    model = mar_peers.UpstreamMAR(mar_peers.AnnealedDiffLoss, **sizes, **annealing)
    model.load_state_dict(recorded.state_dict())
    return model.eval()


def replayed(monkeypatch, model, recorded, case):
    """(tokens, the head's conditions and scale and result at each iteration) with the recorded orders and noise."""
    calls, sample, name = [], model.diffloss.sample, f"case/{case['name']}"

    def remembering(z, temperature, cfg, **step):
        calls.append((z, cfg, sample(z, temperature, cfg, **step)))
        return calls[-1][2]

    orders = recorded[f"{name}/orders"]
    labels = None if case["labels"] is None else torch.tensor(case["labels"])
    with monkeypatch.context() as patched:
        patched.setattr(model.diffloss, "sample", remembering)
        patched.setattr(model, "sample_orders", lambda bsz: orders.clone())
        replay = Replay(patched, [d for s in range(case["num_iter"]) for d in draws_of(recorded, f"{name}/s{s}")])
        settings = {key: case[key] for key in ("num_iter", "cfg", "cfg_schedule", "temperature")}
        tokens = model.sample_tokens(len(orders), labels=labels, **settings)
    assert not replay.left
    return tokens, calls


def bound(case):
    return max(1e-5, 10 * case["f32_vs_f64"])


@pytest.mark.parametrize(("which", "stem", "case"), golden_cases("mar_e2e"))
def test_recorded_images(which, stem, case, monkeypatch):
    recorded, name = golden(which, stem), f"case/{case['name']}"
    tokens, calls = replayed(monkeypatch, recorded_model(recorded, case), recorded, case)
    assert_close(tokens, recorded[f"{name}/tokens"], worst=bound(case))
    assert [len(z) for z, _, _ in calls] == case["rows"]
    assert [float(scale) for _, scale, _ in calls] == pytest.approx(case["cfg_iter"], rel=1e-6)
    assert all(isinstance(scale, torch.Tensor) == case["cfg_iter_is_tensor"] for _, scale, _ in calls)
    for s, (z, _, out) in enumerate(calls):
        if (expected := recorded.get(f"{name}/s{s}/out")) is not None:  # the slim set has none
            kept = len(out) // 2 if case["cfg"] != 1.0 else len(out)
            assert_close(z, recorded[f"{name}/s{s}/z"], worst=bound(case))
            assert_close(out[:kept], expected[:kept], worst=bound(case))


def test_one_per_cent_is_noticed(monkeypatch):
    recorded = golden("slim", "mar_e2e")
    case = recorded.meta["cases"][0]
    model = recorded_model(recorded, case)
    model.diffloss.net.final_layer.linear.register_forward_hook(lambda module, args, out: 1.01 * out)
    tokens, _ = replayed(monkeypatch, model, recorded, case)
    with pytest.raises(AssertionError, match="worst element"):
        assert_close(tokens, recorded[f"case/{case['name']}/tokens"], worst=bound(case))


@pytest.mark.parametrize(
    ("which", "stem", "case"),
    [
        p
        for p in golden_cases("mar_head")
        if p.values[2]["sampler"] in ("DiSA", "default") and p.values[2]["strategy"] != "two-stage"
    ],
)
def test_recorded_trajectories(which, stem, case, monkeypatch):
    """`default` is what models had before DiSA."""
    recorded, name = golden(which, stem), f"case/{case['name']}"
    sizes, z = (16, 48, 3, 64), recorded[f"z/r{case['rows']}"]
    scale = torch.tensor([case["cfg"]]) if case["cfg_is_tensor"] else case["cfg"]
    if case["sampler"] == "default":
        diffloss = mar_peers.ConstantDiffLoss(*sizes, num_sampling_steps=str(case["upper"]))
        sample = partial(diffloss.sample, z, case["temperature"], scale)
    else:
        steps = {"diff_upper_steps": case["upper"], "diff_lower_steps": case["lower"]}
        diffloss = mar_peers.AnnealedDiffLoss(*sizes, **steps, diff_annealing_strategy=case["strategy"])
        sample = partial(diffloss.sample, z, case["temperature"], scale, step=case["step"], ar_num_iter=case["ar_num_iter"])
    diffloss.net.load_state_dict(recorded.state_dict())
    diffloss.requires_grad_(False)
    replay = Replay(monkeypatch, draws_of(recorded, name))
    out = sample()
    assert not replay.left
    kept = case["rows"] // 2 if case["cfg"] != 1.0 else case["rows"]
    assert_close(out[:kept], recorded[f"{name}/out_f32"][:kept], worst=max(1e-5, 10 * case["f32_vs_f64"]))


# At its cost, and with its arguments ----------------------------------------------------------------------------------


def test_all_the_work_at_every_evaluation():
    model = small_mar()
    rows = {}
    for name in ("diffloss.net.res_blocks.1.adaLN_modulation", "encoder_blocks.0", "decoder_blocks.0"):
        rows[name] = []
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: rows[name].append(len(args[0])))
    draw(model, num_iter=4)
    drawn, evaluations = [2, 3, 5, 6], [6, 5, 4, 3]  # of 16 tokens an image
    expected = [4 * tokens for tokens, n in zip(drawn, evaluations, strict=True) for _ in range(n)]
    assert rows.pop("diffloss.net.res_blocks.1.adaLN_modulation") == expected
    assert set(map(tuple, rows.values())) == {(4, 4, 4, 4)}


def test_orders_are_those_of_numpys_generator():
    model = small_mar()
    np.random.seed(7)
    expected = torch.from_numpy(np.stack([np.random.permutation(16) for _ in range(3)]))
    np.random.seed(7)
    assert torch.equal(model.sample_orders(3), expected)
    assert model.sample_orders(2, seq_len=6).sort(dim=1).values.tolist() == [[*range(6)]] * 2


def test_one_seed_one_image_also_of_copies():
    model = small_mar()
    first = draw(model)
    assert first.shape == (2, 16, 4, 4)
    assert first.isfinite().all()
    assert torch.equal(draw(model), first)
    assert torch.equal(draw(copy.deepcopy(model)), first)
    assert torch.equal(draw(pickle.loads(pickle.dumps(model))), first)
    assert not torch.equal(draw(model, seed=1), first)


def test_unknown_schedules():
    with pytest.raises(NotImplementedError, match="sinus"):
        draw(small_mar(), cfg_schedule="sinus")


# As the package sees it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_published_sizes_are_those_of_the_native_model(size):
    with torch.device("meta"):
        theirs, ours = getattr(mar_peers, f"mar_{size}")(), models.mar(size)
    expected = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name: tensor.shape for name, tensor in theirs.state_dict().items()} == expected
    heads = [[model.encoder_blocks[0].attn.num_heads, model.decoder_blocks[0].attn.num_heads] for model in (theirs, ours)]
    assert heads[0] == heads[1]


@pytest.mark.parametrize(
    "options",
    [
        {"cfg": 1.0},
        {"cfg": 3.0, "labels": None},
        {"cfg": 3.0, "cfg_schedule": "constant", "temperature": 0.9},
        {"cfg": 2.9, "num_iter": 16},
    ],
    ids=str,
)
def test_one_seed_gives_the_native_models_tokens_and_the_accelerated_ones(options):
    """From noise that both draw alike, in the orders of numpy's generator."""
    upstream = small_mar()
    native = models.MAR(**SMALL).eval()
    native.load_state_dict(upstream.state_dict())
    expected = draw(upstream, **options)
    with accelerate(upstream) as handle:
        assert_same(draw(upstream, **options), expected)
        assert (handle.schedule, handle.schedule_from, handle.clip) == (Linear(6, 3), "model", 950)
    assert "sample" not in vars(upstream.diffloss)

    torch.manual_seed(0)
    np.random.seed(0)
    orders = upstream.sample_orders(2)
    told = {"num_iter": 5, "cfg": 3.0, "labels": LABELS} | options
    assert_same(native.sample_tokens(schedule="linear:6-3", orders=orders, backend="reference", bsz=2, **told), expected)
