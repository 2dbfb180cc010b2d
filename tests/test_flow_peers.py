"""The eager FlowAR and xAR that others are measured against do what the published ones did, and at their cost."""

import copy
import pickle
from collections import Counter
from functools import partial

import flow_peers
import pytest
import torch
from compare import assert_close
from recorded import GOLDEN, golden

FLOWAR = {"flow_upper_steps": 9, "flow_lower_steps": 4, "cfg": 2.0, "labels": torch.tensor([3, 1])}


def cases(*stems):
    """As recorded.golden_cases, of the sets that have such files."""
    return [
        pytest.param(which, stem, case, id=f"{which}-{stem}-{case['name']}")
        for which in GOLDEN
        for stem in stems
        if (GOLDEN[which] / f"{stem}.npz").is_file()
        for case in golden(which, stem).meta["cases"]
    ]


def bound(case):
    return max(1e-5, 10 * case.get("f32_vs_f64", 0.0))


def state_dict(recorded, folder):
    return {key.removeprefix(folder): value for key, value in recorded.arrays.items() if key.startswith(folder)}


def part(recorded, case, number, name):
    return recorded.get(f"case/{case['name']}/{number}/{name}")


def build(stem, recorded, case):
    """(model with the recorded weights, folder of the parts of an image in the file, their number)"""
    if stem == "flowar_e2e":
        size = next(model for model in recorded.meta["models"] if model["tag"] == case["model"])
        model = flow_peers.UpstreamFlowAR(
            img_size=16 * size["scale"][-1], scale=tuple(size["scale"]), cross=size["cross"],
            encoder_embed_dim=size["E"], encoder_depth=size["depth"], encoder_num_heads=size["heads"],
            decoder_embed_dim=size["D"], decoder_depth=size["depth"], decoder_num_heads=size["heads"],
            diffloss_w=size["w"], diffloss_d=size["d"],
        )  # fmt: skip
        weights, parts = state_dict(recorded, f"sd_{size['tag']}/"), [f"s{s}" for s in range(len(size["scale"]))]
    else:
        size = recorded.meta["model"]
        model = flow_peers.UpstreamXAR(
            img_size=size["img_size"], vae_stride=size["vae_stride"], clusters=size["clusters"],
            encoder_embed_dim=size["embed_dim"], encoder_depth=size["encoder_depth"], encoder_num_heads=size["heads"],
            decoder_embed_dim=size["embed_dim"], decoder_depth=size["decoder_depth"], decoder_num_heads=size["heads"],
        )  # fmt: skip
        interval = {name: case[name] for name in ("guidance_low", "guidance_high") if name in case}
        model.solver = partial(getattr(flow_peers, f"xar_{case['sampler']}"), **interval)
        weights, parts = state_dict(recorded, "sd/"), [f"c{q}" for q in range(size["clusters"])]
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, weights[name], rtol=0, atol=1e-6)
    model.load_state_dict(weights)
    return model.eval(), parts


class Replay:
    """torch.randn and torch.randn_like give the recorded draws, in the recorded order; anything else asked for is an error."""

    def __init__(self, monkeypatch, draws):
        self.left = list(draws)
        monkeypatch.setattr(torch, "randn", lambda shape: self.take("randn", shape, torch.float32))
        monkeypatch.setattr(torch, "randn_like", lambda x: self.take("randn_like", x.shape, x.dtype))

    def take(self, kind, shape, dtype):
        expected, draw = self.left.pop(0)
        assert (kind, list(shape), dtype) == (expected, list(draw.shape), draw.dtype)
        return draw.clone()


def recorded_draws(recorded, case, parts):
    for number in parts:
        yield "randn", part(recorded, case, number, "latents")
        for noise in part(recorded, case, number, "step_noise_f64") if case.get("sampler") == "euler_maruyama" else ():
            yield "randn_like", noise


def replayed(monkeypatch, model, recorded, case, parts):
    """(tokens, what the solver returned for each part, as float32), with the recorded noise."""
    outputs, solver = [], model.solver

    def remembering(*args, **options):
        outputs.append(solver(*args, **options))
        return outputs[-1]

    model.solver = remembering
    steps = {"flow_upper_steps": case["upper"], "flow_lower_steps": case["lower"], "cfg": case["cfg"]}
    labels = recorded[f"case/{case['name']}/labels"]
    replay = Replay(monkeypatch, recorded_draws(recorded, case, parts))
    if isinstance(model, flow_peers.UpstreamFlowAR):
        tokens = model.sample_tokens(**steps, guidance=case["guidance"], labels=labels)
    else:
        tokens = model.sample_tokens(**steps, label=labels)
    assert not replay.left
    assert all(out.dtype == torch.float64 for out in outputs)
    return tokens, [out.float() for out in outputs]


@pytest.mark.parametrize(("which", "stem", "case"), cases("flowar_e2e", "xar"))
def test_recorded_images(which, stem, case, monkeypatch):
    recorded = golden(which, stem)
    model, parts = build(stem, recorded, case)
    times = []
    embedding = model.flownet.time_embed if stem == "flowar_e2e" else model.time_embed
    embedding.register_forward_pre_hook(lambda module, args: times.append(int(args[0][-1])))
    tokens, outputs = replayed(monkeypatch, model, recorded, case, parts)
    for number, out in zip(parts, outputs, strict=True):
        if (expected := part(recorded, case, number, "out")) is not None:  # the slim set has them of FlowAR only
            assert_close(out, expected, worst=bound(case))
    assert tokens.dtype == torch.float32
    assert_close(tokens, recorded[f"case/{case['name']}/tokens"], worst=bound(case))
    assert times == torch.cat([part(recorded, case, number, "t_index") for number in parts]).tolist()


@pytest.mark.parametrize(("which", "stem", "case"), [p for stem in ("flowar_e2e", "xar") for p in cases(stem)[:1]])
def test_one_per_cent_is_noticed(which, stem, case, monkeypatch):
    recorded = golden(which, stem)
    model, parts = build(stem, recorded, case)
    network_output = model.flownet.final_layer.linear if stem == "flowar_e2e" else model.pred
    network_output.register_forward_hook(lambda module, args, out: 1.01 * out)
    tokens, _ = replayed(monkeypatch, model, recorded, case, parts)
    with pytest.raises(AssertionError, match="worst element"):
        assert_close(tokens, recorded[f"case/{case['name']}/tokens"], worst=bound(case))


@pytest.mark.parametrize(("which", "stem", "case"), cases("flowar_head"))
def test_recorded_flow_head(which, stem, case, monkeypatch):
    """FlowAR's network and both of its solvers alone, over any guidance interval."""
    recorded = golden(which, stem)
    network = flow_peers.FlowNetwork(channels=16, dim=128, z_channels=96, depth=2, cross=case["net"] == "cross")
    network.load_state_dict(state_dict(recorded, f"sd_{case['net']}/"))
    latents, condition = (recorded[f"in/N{case['tokens']}/{name}"] for name in ("latents", "condition"))
    noise = recorded.get(f"case/{case['name']}/step_noise_f64")
    replay = Replay(monkeypatch, [] if noise is None else [("randn_like", draw) for draw in noise])
    solver = getattr(flow_peers, f"flowar_{case['sampler']}")
    options = {name: case[name] for name in ("num_steps", "cfg_scale", "guidance_low", "guidance_high")}
    out = solver(network.eval(), latents, condition, **options)
    assert not replay.left
    assert_close(out, recorded[f"case/{case['name']}/out"], worst=bound(case))


def small_flowar(**kw):
    sizes = {"encoder_embed_dim": 32, "encoder_depth": 1, "encoder_num_heads": 2, "decoder_embed_dim": 32, "decoder_depth": 1}
    sizes |= {"decoder_num_heads": 2, "diffloss_d": 2, "diffloss_w": 64, "img_size": 64, "scale": (1, 2, 4)}
    return flow_peers.flowar_large(**(sizes | kw)).eval()


def small_xar(**kw):
    sizes = {"encoder_embed_dim": 32, "encoder_depth": 1, "encoder_num_heads": 2, "decoder_embed_dim": 32, "decoder_depth": 1}
    return flow_peers.xar_base(**(sizes | {"decoder_num_heads": 2, "img_size": 128} | kw)).eval()


def counted(model, *names):
    """Counter of the rows that come into the modules called so, and of their calls."""
    counter = Counter()

    def count(name, module, args):
        counter[name, "calls"] += 1
        counter[name, "rows"] += len(args[0])

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(count, name))
    return counter


def test_flowar_does_all_the_work_at_every_evaluation():
    """Every evaluation of both halves; 9 and 6 and 4 steps are 8 and 6 and 4 evaluations."""
    model = small_flowar()
    names = ["flownet", "flownet.res_blocks.1.ada_lin_mlp", "flownet.res_blocks.1.crossattn.kv", "flownet.cond_embed"]
    counter = counted(model, *names)
    model.sample_tokens(**FLOWAR)
    evaluations = 8 + 6 + 4
    assert {name: counter[name, "calls"] for name in names} == dict.fromkeys(names, evaluations)
    assert {name: counter[name, "rows"] for name in names} == dict.fromkeys(names, evaluations * 4)
    assert model.encoder_blocks[0].attn.k.shape == (4, 2, 1 + 4 + 16, 16)


@pytest.mark.parametrize("solver", [flow_peers.xar_euler, flow_peers.xar_euler_maruyama])
def test_xar_evaluates_both_halves_even_without_guidance(solver):
    model = small_xar()
    model.solver = solver
    names = ["decoder_blocks.0.ada_lin", "z_proj"]
    counter = counted(model, *names)
    tokens = model.sample_tokens(1.0, torch.tensor([4, 2]), 6, 3)
    assert tokens.shape == (2, 16, 8, 8)
    evaluations = 6 + 5 + 4 + 3
    assert counter["z_proj", "calls"] == evaluations
    assert counter["z_proj", "rows"] == 4 * evaluations
    assert counter["decoder_blocks.0.ada_lin", "rows"] == 4 * (
        evaluations + 3
    )  # two times, thus twice the rows, where two cells come in
    assert model.decoder_blocks[0].attn.k.shape == (4, 2, 3 * 16, 16)


def test_xar_beyond_its_interval_evaluates_one_half():
    model = small_xar()
    model.solver = partial(flow_peers.xar_euler_maruyama, guidance_high=0.5)
    counter = counted(model, "z_proj")
    model.sample_tokens(3.0, torch.tensor([4, 2]), 4, 4)  # t = 1, 0.68, 0.36, 0.04; the first one is always of both halves
    assert counter["z_proj", "rows"] == 4 * (4 + 2 + 4 + 4)


def test_xar_with_two_steps_takes_the_cell_before_in_twice():
    """And with that store, which then has a cell twice, upstream's next cell falls over its mask."""
    model = small_xar()
    tokens_in = []
    model.z_proj.register_forward_pre_hook(lambda module, args: tokens_in.append(args[0].shape[1]))
    model.sample_tokens(2.0, torch.tensor([4]), 8, 2)
    assert tokens_in == [16] * 8 + [32] + [16] * 5 + [32] + [16] * 3 + [32, 32]
    with pytest.raises(RuntimeError, match="must match the size"):
        model.sample_tokens(2.0, torch.tensor([4]), 2, 2)
    with pytest.raises(ValueError, match="num_steps: expected 2 or more, got 1"):
        model.sample_tokens(2.0, torch.tensor([4]), 1, 1)


@pytest.mark.parametrize("family", ["flowar", "xar"])
def test_one_seed_one_image_and_no_keys_left_over(family):
    model = small_flowar() if family == "flowar" else small_xar()

    def draw(model):
        torch.manual_seed(5)
        return model.sample_tokens(**FLOWAR) if family == "flowar" else model.sample_tokens(2.0, torch.tensor([4, 2]), 4, 3)

    first = draw(model)
    assert first.isfinite().all()
    assert torch.equal(draw(model), first)
    assert torch.equal(draw(copy.deepcopy(model)), first)
    assert torch.equal(draw(pickle.loads(pickle.dumps(model))), first)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("flowar_small", 172),
        ("flowar_large", 587),
        ("flowar_huge", 1913),
        ("xar_base", 173),
        ("xar_large", 608),
        ("xar_huge", 1186),
    ],
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = getattr(flow_peers, name)()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
