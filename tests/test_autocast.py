"""Products in bfloat16 and float16 over float32 parameters, which is what torch.autocast makes of the published code: as good as
eager PyTorch under it, on the same weights and noise. The bar is that of compare.assert_as_good_as, the truth float64."""

import copy
import gc
import pickle
import weakref

import flow_calls
import harmon_peers
import mar_peers
import numpy as np
import pytest
import torch
from compare import assert_as_good_as, assert_close
from flow_peers import UpstreamFlowAR, UpstreamXAR
from test_accelerate_flow import random_parameters
from torch import nn

from disa_fast import FlowTransformerHead, MLPHead, accelerate, models, solvers
from disa_fast.heads.packing import Packing

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
PLAIN = ["reference", "hoisted"]
INTERPRETED = pytest.param("triton", marks=pytest.mark.interpreter)

SIZES = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("embed_dim", 64), ("depth", 1), ("num_heads", 2))}
FLOW_HEAD = {"diffloss_w": 64, "diffloss_d": 2}
FLOW = {  # upstream's class, ours, arguments of both
    "FlowAR": (UpstreamFlowAR, models.FlowAR, {"img_size": 64, "scale": (1, 2, 4)} | FLOW_HEAD),
    "FlowAR, cross": (UpstreamFlowAR, models.FlowAR, {"img_size": 64, "scale": (1, 2, 4), "cross": True} | FLOW_HEAD),
    "xAR": (UpstreamXAR, models.XAR, {"img_size": 64}),
}
SYSTEMS = pytest.mark.parametrize("name", FLOW)
LABELS = torch.tensor([3, 997, 12, 500])
SEEDS = range(2)


def upstream(name):
    kind, _, arguments = FLOW[name]
    return random_parameters(kind(**arguments, **SIZES))


def native(name, state, dtype=torch.float32):
    """Ours, over these very tensors unless they are cast."""
    _, kind, arguments = FLOW[name]
    model = kind(**arguments, **SIZES).eval().requires_grad_(False)
    model.load_state_dict(state, assign=True)
    return model.to(dtype)


def eager(model, seed=0, labels=LABELS):
    torch.manual_seed(seed)
    named = {"label" if isinstance(model, UpstreamXAR) else "labels": labels}
    return model.sample_tokens(cfg=2.4, flow_upper_steps=6, flow_lower_steps=4, **named)


def ours(model, seed=0, labels=LABELS, **how):
    torch.manual_seed(seed)
    return model.sample_tokens(labels, "linear:6-4", cfg=2.4, **how)


# Whole images ---------------------------------------------------------------------------------------------------------


@HALVES
@SYSTEMS
def test_images_are_as_good_as_eagers(name, dtype):
    peer = upstream(name)
    model, exact = native(name, peer.state_dict()), native(name, peer.state_dict(), torch.float64)
    truth = torch.cat([ours(exact, seed, backend="reference") for seed in SEEDS])
    assert_close(torch.cat([eager(peer, seed) for seed in SEEDS]), truth, worst=1e-5 * float(truth.abs().max()))
    with torch.autocast("cpu", dtype):
        published = torch.cat([eager(peer, seed) for seed in SEEDS])
    for backend in PLAIN:
        drawn = torch.cat([ours(model, seed, dtype=dtype, backend=backend) for seed in SEEDS])
        assert drawn.dtype == torch.float32
        assert_as_good_as(drawn, published, truth, dtype)


def small_mar():
    sizes = {"img_size": 64, "buffer_size": 4, "class_num": 10, "diffloss_d": 2, "diffloss_w": 64} | SIZES
    return varied(mar_peers.mar_base(**sizes, diff_upper_steps=6, diff_lower_steps=3))


def varied(model):
    """Every parameter random; of the variance the head says little, as a trained one does."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p) if p.ndim == 1 else torch.randn_like(p) * p.shape[-1] ** -0.5)
        for diffloss in (part for part in model.modules() if isinstance(part, mar_peers.DiffLoss)):
            diffloss.net.final_layer.linear.weight[diffloss.in_channels :] *= 0.2
    return model.eval().requires_grad_(False)


def draw_mar(model, seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    return model.sample_tokens(8, num_iter=5, cfg=3.0, labels=torch.arange(8))


def draw_harmon(model, seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    ids = torch.randint(40, (8, 6), generator=torch.Generator().manual_seed(seed))
    return model.sample(input_ids=ids, attention_mask=torch.ones_like(ids), num_iter=5, cfg=3.0)


OBJECTS = {
    **{name: (lambda name=name: upstream(name), eager) for name in FLOW},
    "MAR": (small_mar, draw_mar),
    "Harmon": (harmon_peers.harmon_small, draw_harmon),
}


@HALVES
@pytest.mark.parametrize("name", OBJECTS)
def test_accelerated_objects_under_autocast_are_as_good_as_eager(name, dtype):
    """The truth is eager's float32, whose own rounding is a thousandth of what is compared."""
    make, draw = OBJECTS[name]
    model = make()
    truth = torch.cat([draw(model, seed) for seed in SEEDS])
    with torch.autocast("cpu", dtype):
        published = torch.cat([draw(model, seed) for seed in SEEDS])
        with accelerate(model):
            drawn = torch.cat([draw(model, seed) for seed in SEEDS])
    assert_as_good_as(drawn, published, truth, dtype)


# Heads alone ----------------------------------------------------------------------------------------------------------


@HALVES
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("backend", [*PLAIN, pytest.param("cpu", marks=pytest.mark.native), INTERPRETED])
def test_mlp_heads_are_as_good_as_eagers(backend, cfg, dtype):
    diffloss = small_mar().diffloss
    head, rows, steps = MLPHead.from_module(diffloss.net), 8 if backend == "triton" else 64, 4
    z = torch.randn(rows, 64)
    noise, step_noise = torch.randn(rows, 16), torch.randn(steps, rows, 16)
    given = {"z": z, "table": solvers.ddpm(steps), "cfg": cfg, "noise": noise, "step_noise": step_noise}

    def published():
        """Upstream's loop on that noise."""
        halves = 2 if cfg != 1.0 else 1
        draws = iter(step_noise)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape: noise[: rows // halves].clone())
            patch.setattr(torch, "randn_like", lambda x: next(draws).clone())
            return diffloss.sample(z, 1.0, cfg, 0, 64)[: rows // halves]

    diffloss.gen_diffusion = [mar_peers.Diffusion(steps, clip=950)]
    truth = head.denoise(**given, dtype=torch.float64, backend="reference")[: len(published())]
    assert_close(published(), truth, worst=1e-5 * float(truth.abs().max()))
    with torch.autocast("cpu", dtype):
        as_published = published()
    drawn = head.denoise(**given, dtype=dtype, backend=backend)[: len(truth)]
    assert drawn.dtype == torch.float32
    assert_as_good_as(drawn, as_published, truth, dtype)


def flow_call(peer, rows, side, steps):
    """(guided z and noise for the flow network of a FlowAR, what eager makes of them)"""
    tokens = side * side
    z, noise = torch.randn(rows, tokens, 64), torch.randn(rows, tokens, 16)

    def published():
        drawn = peer.solver(peer.flownet, noise, z, num_steps=steps, cfg_scale=2.4, guidance_high=0.9)
        return drawn[: rows // 2].float()

    given = {"z": z, "table": solvers.flow_euler(steps, grid="flowar"), "cfg": 2.4, "guidance": (0.0, 0.9), "noise": noise}
    return given, published


@HALVES
@pytest.mark.parametrize("name", ["FlowAR", "FlowAR, cross"])
@pytest.mark.parametrize("backend", [*PLAIN, INTERPRETED])
def test_flow_heads_are_as_good_as_eagers(backend, name, dtype):
    peer = upstream(name)
    head = FlowTransformerHead.from_module(peer.flownet)
    given, published = flow_call(peer, *((2, 2, 4) if backend == "triton" else (16, 4, 8)))
    half = len(given["z"]) // 2
    truth = head.denoise(**given, dtype=torch.float64, backend="reference")[:half]
    assert_close(published(), truth, worst=1e-5 * float(truth.abs().max()))
    with torch.autocast("cpu", dtype):
        as_published = published()
    assert_as_good_as(head.denoise(**given, dtype=dtype, backend=backend)[:half], as_published, truth, dtype)


@HALVES
@pytest.mark.parametrize("backend", [*PLAIN, INTERPRETED])
def test_cells_are_drawn_in_the_contexts_dtype(backend, dtype):
    """A finished cell, and one that sees it. In the place of eager stands `reference`, which is as good over whole images."""
    model = flow_calls.small_model("cell")
    exact = copy.deepcopy(model).double()
    cell, labels = torch.randn(2, 4, 16), torch.tensor([3, 10])
    noise = torch.randn(1, 4, 16)

    def drawn(of, dtype, backend):
        context = of.head.begin(labels, dtype)
        assert {t.dtype for name, t in context.items() if name != "condition"} == {dtype}
        of.head.finish(context, 0, cell, backend)
        settings = {
            "table": solvers.flow_euler(1, grid="uniform"),
            "cfg": 2.4,
            "noise": noise,
            "guided_rows": True,
            "backend": backend,
        }
        return of.head.denoise(context, 4, **settings)

    truth = drawn(exact, torch.float64, "reference")
    eager = drawn(model, dtype, "reference")
    assert_as_good_as(drawn(model, dtype, backend), eager, truth, dtype)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("backend", [*PLAIN, INTERPRETED])
def test_float16_does_not_overflow_in_the_residual_stream(backend, cross):
    """Each block adds up to 40,000, of which float16 holds one. Eager gives NaN: its flow network has the stream in float16."""
    peer = upstream("FlowAR, cross" if cross else "FlowAR")
    for block in peer.flownet.res_blocks:
        projection = block.ada_lin_mlp if cross else block.ada_lin
        projection.bias[0 if cross else slice(64, 128)] = 0
        (projection.bias[:64] if cross else projection.bias[64:128]).fill_(40.0)  # gate of the MLP
        block.mlp.fc2.bias.copy_(torch.linspace(-1000, 1000, 64))
    head = FlowTransformerHead.from_module(peer.flownet)
    given, published = flow_call(peer, 2, 2, 4)
    with torch.autocast("cpu", torch.float16):
        assert published().isnan().any()
    truth = head.denoise(**given, backend="reference", dtype=torch.float64)
    drawn = head.denoise(**given, backend=backend, dtype=torch.float16)
    assert_close(drawn, truth, worst=0.01 * float(truth.abs().max()))


# What is cast, and how long it is kept --------------------------------------------------------------------------------


def casts_of(model):
    """Those Packings of a model that hold anything, and what."""
    packings = [value for value in vars(model).values() if isinstance(value, Packing)]
    return {type(packing).__name__: list(packing._packed.values()) for packing in packings if packing._packed}


def storages(thing, found=None):
    """Addresses of all tensors within `thing`, as deep as they lie."""
    found = set() if found is None else found
    if isinstance(thing, torch.Tensor):
        found.add(thing.untyped_storage().data_ptr())
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            storages(part, found)
    elif hasattr(thing, "__dict__"):
        storages(vars(thing), found)
    return found


@SYSTEMS
@pytest.mark.parametrize("backend", PLAIN)
def test_nothing_is_copied_without_a_dtype_or_with_the_models_own(name, backend):
    model = native(name, upstream(name).state_dict())
    own = storages([*model.parameters(), *model.buffers()])
    for dtype in (None, torch.float32):
        ours(model, dtype=dtype, backend=backend)
        for held in casts_of(model).values():
            assert all(storages({k: v for k, v in vars(w).items() if k not in ("rotation", "time_table")}) <= own for w in held)
    assert "CastBackbone" not in casts_of(model)


@SYSTEMS
@pytest.mark.parametrize("backend", PLAIN)
def test_casts_are_made_once(name, backend, monkeypatch):
    model = native(name, upstream(name).state_dict())
    first = ours(model, dtype=torch.bfloat16, backend=backend)
    kept = casts_of(model)
    assert len(kept) == (1 if name == "xAR" else 2)
    assert torch.equal(ours(model, dtype=torch.bfloat16, backend=backend), first)
    again = casts_of(model)
    assert all(before is after for part in kept for before, after in zip(kept[part], again[part], strict=True))


@SYSTEMS
def test_products_alone_are_narrowed(name):
    """Weights [out, in] and biases in bfloat16; norms, positions and rotary tables as they were; classes not at all."""
    model = native(name, upstream(name).state_dict())
    ours(model, dtype=torch.bfloat16)
    backbone = model.head.weights(torch.bfloat16).backbone if name == "xAR" else model._cast.weights(torch.bfloat16)
    for layer in (backbone.input, backbone.decoder_embed, *backbone.ada_lin, backbone.blocks[0].qkv, backbone.blocks[0].mlp[2]):
        assert {t.dtype for t in layer} == {torch.bfloat16}
    assert backbone.encoder_norm.data_ptr() == model.encoder_norm.weight.data_ptr()
    assert backbone.encoder_position.data_ptr() == model.encoder_pos_embed_learned.data_ptr()
    assert backbone.freqs.dtype == torch.float32
    classes = tuple(model.class_emb.weight.shape)
    assert not any(classes == tuple(t.shape) for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.bfloat16)


@SYSTEMS
@pytest.mark.parametrize("backend", PLAIN)
def test_changed_parameters_are_cast_anew(name, backend):
    model = native(name, {k: v.clone() for k, v in upstream(name).state_dict().items()})

    def drawn():
        return ours(model, dtype=torch.bfloat16, backend=backend)

    def as_new():
        return ours(native(name, model.state_dict()), dtype=torch.bfloat16, backend=backend)

    before = drawn()
    other = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    changes = {
        "in place": lambda: model.encoder_blocks[0].attn.qkv.weight.mul_(1.5),
        "load_state_dict": lambda: model.load_state_dict(other),
        "assigned": lambda: setattr(model, "z_proj", nn.Linear(16, 64).requires_grad_(False)),
        "a position": lambda: model.decoder_pos_embed_learned.add_(0.5),
        "to and back": lambda: model.to(torch.float64).to(torch.float32),
    }
    for how, change in changes.items():
        with torch.no_grad():
            change()
        after = drawn()
        assert torch.equal(after, as_new()), how
        assert torch.equal(after, before) == (how == "to and back"), how
        before = after


@SYSTEMS
def test_copies_have_casts_of_their_own(name):
    model = native(name, upstream(name).state_dict())
    before = ours(model, dtype=torch.bfloat16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(ours(twin, dtype=torch.bfloat16), before)
        with torch.no_grad():
            twin.encoder_blocks[0].mlp.fc2.weight.zero_()
        assert not torch.equal(ours(twin, dtype=torch.bfloat16), before)
    assert torch.equal(ours(model, dtype=torch.bfloat16), before)


@SYSTEMS
def test_casts_are_freed_with_the_model(name):
    model = native(name, upstream(name).state_dict())
    ours(model, dtype=torch.bfloat16)
    held = [weakref.ref(w.backbone.input[0] if name == "xAR" else w.input[0]) for ws in casts_of(model).values() for w in ws]
    assert held
    gc.disable()
    try:
        del model
        if name == "xAR":  # whose head holds the model, which holds the head
            gc.collect()
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


@SYSTEMS
def test_a_wider_dtype_is_one_too(name):
    """Parameters of half precision, products in float32 or float64."""
    state = {k: v.to(torch.bfloat16) for k, v in upstream(name).state_dict().items()}
    model, exact = native(name, state), native(name, state, torch.float64)
    truth = ours(exact, backend="reference")
    for backend in PLAIN:
        drawn = ours(model, dtype=torch.float32, backend=backend)
        assert drawn.dtype == torch.float32
        assert_close(drawn, truth, worst=1e-4 * float(truth.abs().max()))
        drawn = ours(model, dtype=torch.float64, backend=backend)
        assert drawn.dtype == torch.float64
        assert_close(drawn, truth, worst=1e-4 * float(truth.abs().max()))


@SYSTEMS
@pytest.mark.parametrize("dtype", ["bfloat16", torch.int32, torch.float8_e4m3fn, 16])
def test_bad_dtypes(name, dtype):
    model = native(name, upstream(name).state_dict())
    with pytest.raises(ValueError, match=r"dtype: expected a floating point torch\.dtype of 16 bits or more, got "):
        ours(model, dtype=dtype)
