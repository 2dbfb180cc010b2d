"""The eager Harmon that others are measured against does what the published one did, and at its cost."""

import copy
import pickle
from collections import Counter
from functools import partial

import harmon_peers
import mar_peers
import numpy as np
import pytest
import torch
from compare import assert_as_good_as, assert_close
from recorded import golden, golden_cases
from replay import Replay, draws_of

from disa_fast import models

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = "mar.diffloss.net."
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [7, 0, 0, 0, 0], [7, 0, 0, 0, 0]])
PROMPT_MASK = torch.arange(5) < torch.tensor([5, 3, 1, 1])[:, None]
FEW = {"diff_upper_steps": 6, "diff_lower_steps": 3}
KINDS = pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(harmon_peers.harmon_small, **FEW), id="disa"),
        pytest.param(partial(harmon_peers.harmon_small, harmon_peers.OriginalHarmon, num_sampling_steps="4"), id="original"),
    ],
)


def draw(model, seed=0, **kwargs):
    torch.manual_seed(seed)
    np.random.seed(seed)
    return model.sample(**{"input_ids": IDS, "attention_mask": PROMPT_MASK, "num_iter": 4, "cfg": 3.0, **kwargs})


# As recorded ----------------------------------------------------------------------------------------------------------


def recorded_model(recorded, case):
    """Of the case's dtype, with the recorded weights, which lack the language model's output layer."""
    meta = recorded.meta["model"]
    llm = {name: value for name, value in meta["llm"].items() if name != "architecture"}
    mar = {name: value for name, value in meta.items() if name not in ("llm", "vae_scale", "norm_eps")}
    annealing = {f"diff_{name}": case[key] for name, key in (("upper_steps", "upper"), ("lower_steps", "lower"))}
    annealing["diff_annealing_strategy"] = case["strategy"]
    model = harmon_peers.UpstreamHarmon(llm, mar | annealing | {"class_num": 2}, vae_scale=meta["vae_scale"])
    missing, unexpected = model.load_state_dict(recorded.state_dict(), strict=False)
    assert (missing, unexpected) == (["llm.lm_head.weight"], [])
    return model.to(getattr(torch, case["dtype"])).eval()


def replayed(monkeypatch, model, recorded, case):
    """(images, what the head was given and returned at each iteration) with the recorded orders and noise."""
    calls, sample, name = [], model.mar.diffloss.sample, f"case/{case['name']}"

    def remembering(z, temperature, cfg, **step):
        calls.append((z, cfg, sample(z, temperature, cfg, **step)))
        return calls[-1][2]

    orders, input_ids = recorded[f"{name}/orders"], recorded[f"{name}/input_ids"]
    with monkeypatch.context() as patched:
        patched.setattr(model.mar.diffloss, "sample", remembering)
        patched.setattr(model.mar, "sample_orders", lambda bsz, seq_len: orders.clone())
        replay = Replay(patched, [d for s in range(case["num_iter"]) for d in draws_of(recorded, f"{name}/s{s}")])
        images = model.sample(
            input_ids=input_ids,
            attention_mask=torch.arange(input_ids.shape[1]) < recorded[f"{name}/lens"][:, None],
            **{key: case[key] for key in ("num_iter", "cfg", "cfg_schedule", "temperature", "image_shape")},
        )
    assert not replay.left
    return images, calls


def float32_bound(expected):
    """Ten times the rounding of sums in another order, as it was measured: 1.3e-6 of the largest value."""
    return 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(("which", "stem", "case"), golden_cases("harmon_e2e"))
def test_recorded_images(which, stem, case, monkeypatch):
    recorded, name = golden(which, stem), f"case/{case['name']}"
    model = recorded_model(recorded, case)
    images, calls = replayed(monkeypatch, model, recorded, case)
    expected, exact = recorded[f"{name}/pred"], case["dtype"] == "float32"
    assert images.dtype == model.dtype
    assert [len(z) for z, _, _ in calls] == case["rows"]
    assert [float(scale) for _, scale, _ in calls] == recorded[f"{name}/cfg_iter"].tolist()
    for s, (z, scale, out) in enumerate(calls):
        kinds = [str(x.dtype) if isinstance(x, torch.Tensor) else "python float" for x in (z, scale, out)]
        assert kinds == [case[name] for name in ("z_dtype", "cfg_iter_dtype", "head_out_dtype")]
        if exact and (recorded_out := recorded.get(f"{name}/s{s}/out")) is not None:  # the slim set has none
            kept = len(out) // 2 if case["cfg"] != 1.0 else len(out)
            assert_close(z, recorded[f"{name}/s{s}/z"], worst=float32_bound(z))
            assert_close(out[:kept], recorded_out[:kept], worst=float32_bound(recorded_out[:kept]))
    if exact:
        assert_close(images, expected, worst=float32_bound(expected))
    else:  # one rounding to bfloat16 that goes the other way, and all that follows differs
        truth, _ = replayed(monkeypatch, copy.deepcopy(model).float(), recorded, case)
        assert_as_good_as(images, expected, truth, torch.bfloat16)


def test_one_per_cent_is_noticed(monkeypatch):
    recorded = golden("slim", "harmon_e2e")
    case = recorded.meta["cases"][0]
    model = recorded_model(recorded, case)
    model.mar.diffloss.net.final_layer.linear.register_forward_hook(lambda module, args, out: 1.01 * out)
    images, _ = replayed(monkeypatch, model, recorded, case)
    with pytest.raises(AssertionError, match="worst element"):
        assert_close(images, recorded[f"case/{case['name']}/pred"], worst=float32_bound(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [3.0, torch.tensor([3.0])], ids=["float", "tensor"])
def test_recorded_network(dtype, scale):
    """Guidance in bfloat16 keeps the dtype for a float, and is float32 for a tensor."""
    recorded = golden("slim", "harmon_e2e")
    network = mar_peers.HeadNetwork(channels=16, width=64, z_channels=48, depth=2)
    weights = {name.removeprefix(HEAD): value for name, value in recorded.state_dict().items() if name.startswith(HEAD)}
    network.load_state_dict(weights)
    x, t, z = (recorded[f"head/{name}"] for name in "xtz")
    with torch.no_grad():
        out, guided = network.to(dtype)(x, t, z), network.forward_with_cfg(x, t, z, scale)
    kind = "f32" if dtype == torch.float32 else "bf16_tensor" if isinstance(scale, torch.Tensor) else "bf16_float"
    assert guided.dtype == (torch.bfloat16 if kind == "bf16_float" else torch.float32)
    rounding = 1e-6 if dtype == torch.float32 else 0.004  # half a unit of bfloat16
    for actual, name in ((out, f"eval_{kind[:4].rstrip('_')}"), (guided, f"eval_cfg3_{kind}")):
        expected = recorded[f"head/{name}"]
        assert_close(actual.float(), expected, worst=4 * rounding * float(expected.abs().max()))


# At its cost, and with its arguments ----------------------------------------------------------------------------------


def counted(model, *names):
    """Counter of the rows that come into the modules called so, and of their calls."""
    counter = Counter()

    def count(name, module, args, kwargs):
        counter[name, "calls"] += 1
        counter[name, "rows"] += len(args[0] if args else kwargs["inputs_embeds"])

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(count, name), with_kwargs=True)
    return counter


@KINDS
def test_all_the_work_at_every_evaluation(make):
    model = make()
    net = "mar.diffloss.net.res_blocks.1.adaLN_modulation"
    counter = counted(model, net, "llm.model", "mar.decoder_blocks.0")
    draw(model)
    evaluations = [6, 5, 4, 3] if isinstance(model.mar.diffloss.gen_diffusion, list) else [4] * 4
    drawn = [2, 3, 5, 6]  # tokens an image, of 16
    assert counter[net, "calls"] == sum(evaluations)
    assert counter[net, "rows"] == sum(4 * tokens * n for tokens, n in zip(drawn, evaluations, strict=True))
    assert counter["llm.model", "calls"] == 1 + 4  # the prompts, then every iteration
    assert counter["mar.decoder_blocks.0", "rows"] == 4 * 4


@KINDS
def test_one_seed_one_image_also_of_copies(make):
    model = make()
    first = draw(model)
    assert first.shape == (2, 16, 4, 4)
    assert first.isfinite().all()
    assert torch.equal(draw(model), first)
    assert torch.equal(draw(copy.deepcopy(model)), first)
    assert torch.equal(draw(pickle.loads(pickle.dumps(model))), first)
    assert not torch.equal(draw(model, seed=1), first)


def test_the_two_kinds_differ_in_their_steps_alone():
    annealed, original = harmon_peers.harmon_small(), harmon_peers.harmon_small(harmon_peers.OriginalHarmon, num_sampling_steps="5")
    original.load_state_dict(annealed.state_dict())
    before = draw(original)
    assert not torch.equal(draw(annealed), before)
    assert [
        diffusion.timestep_map[-1] for diffusion in (annealed.mar.diffloss.gen_diffusion[0], original.mar.diffloss.gen_diffusion)
    ] == [950, 999]
    annealed.mar.diffloss.gen_diffusion = [original.mar.diffloss.gen_diffusion]
    assert torch.equal(draw(annealed), before)


def test_other_ways_to_say_the_same():
    model = harmon_peers.harmon_small(**FEW)
    expected = draw(model)
    embedded = model.llm.get_input_embeddings()(IDS).detach()
    assert torch.equal(draw(model, input_ids=None, inputs_embeds=embedded), expected)
    assert torch.equal(draw(model, mask=torch.ones(4, 4, 4), image_shape=(4, 4)), expected)
    with torch.no_grad():
        cache = model.llm.model(inputs_embeds=embedded, use_cache=True).past_key_values
    assert torch.equal(draw(model, past_key_values=cache), expected)
    assert cache.get_seq_length() == IDS.shape[1]
    model.mar.decoder_embed.bias.data.copy_(model.mar.mask_token[0, 0])  # nothing in place of mask tokens is one of them then
    assert torch.equal(draw(model, x_con=torch.zeros(4, 4 + 16, 48)), draw(model))
    assert not torch.equal(draw(model, x_con=torch.ones(4, 4 + 16, 48)), draw(model))


@pytest.mark.parametrize(("order", "kept"), [([*range(16)], True), ([*range(16)][::-1], False)])
def test_a_mask_is_of_the_first_iteration_alone(order, kept):
    """Orders know nothing of it: a token that it says is known is drawn all the same, unless it comes last in its order."""
    model = harmon_peers.harmon_small(**FEW)
    model.mar.sample_orders = lambda bsz, seq_len: torch.tensor([order] * bsz)
    mask = torch.ones(4, 16)
    mask[:, 15] = 0
    tokens = draw(model, mask=mask).flatten(2)
    assert (tokens[..., 15] == 0).all() == kept
    assert (tokens[..., :15] != 0).all()


def test_patches_and_a_vae():
    """Of each token's values, 4 to a channel, the decoder makes 2 x 2 pixels."""

    class VAE(harmon_peers.UnchangingVAE):
        def decode(self, z):
            return z - 1

    model = harmon_peers.harmon_small(vae_embed_dim=4, patch_size=2, img_size=128)
    model.vae = VAE(4)
    tokens = torch.arange(2 * 2 * 3 * 16.0).reshape(2, 2, 3, 16)
    images = model.decode(tokens.clone())
    assert images.shape == (2, 4, 4, 6)
    expected = tokens[1, 0, 2].reshape(4, 2, 2) / 0.2325 - 1
    assert torch.allclose(images[1, :, 0:2, 4:6], expected)


def test_odd_rows_and_unknown_schedules():
    model = harmon_peers.harmon_small(**FEW)
    with pytest.raises(ValueError, match="even number of rows with guidance, got 3"):
        draw(model, input_ids=IDS[:3], attention_mask=PROMPT_MASK[:3])
    with pytest.raises(NotImplementedError, match="sinus"):
        draw(model, cfg_schedule="sinus")
    model.mar.diffloss.diff_annealing_strategy = "two-stage"
    with pytest.raises(ValueError, match="'two-stage'"):
        draw(model)


@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_published_sizes_are_those_of_the_native_model(size):
    with torch.device("meta"):
        theirs = {"0.5b": harmon_peers.harmon_0_5b, "1.5b": harmon_peers.harmon_1_5b}[size]()
        ours = models.harmon(size)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert shapes.pop("llm.lm_head.weight") == shapes["llm.model.embed_tokens.weight"]
    assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}
