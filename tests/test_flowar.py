import copy
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_good_as, assert_close
from flow_calls import replaying, seeded
from recorded import golden, golden_cases, golden_json

import disa_fast
from disa_fast import FlowTransformerHead, models, solvers
from disa_fast.checkpoint import load_checkpoint, read_config, save_checkpoint
from disa_fast.models.flowar import enlarged
from disa_fast.transformer import PLAIN, BackboneWeights, grid_rotation, modulations, transform

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ["reference", "hoisted"]
DTYPES = [torch.float32, torch.float64]
SMALL = {
    "img_size": 64,
    "encoder_embed_dim": 32,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "class_num": 10,
    "scale": (1, 2, 4),
    "diffloss_d": 1,
    "diffloss_w": 64,
    "cross": True,
}
LABELS = torch.tensor([1, 7])


def small_flowar(dtype=torch.float32, **options):
    """Every parameter random, so that each of them matters."""
    torch.manual_seed(0)
    model = models.FlowAR(**SMALL | options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval().to(dtype)


@pytest.fixture(scope="module")
def model():
    return small_flowar()


@pytest.fixture(scope="module")
def exact():
    return small_flowar(torch.float64)


@pytest.fixture
def head_calls(monkeypatch):
    """(z, table, cfg, result) of every scale."""
    calls, denoise = [], FlowTransformerHead.denoise

    def noted(self, z, table, cfg, *rest, **named):
        out = denoise(self, z, table, cfg, *rest, **named)
        calls.append((z, table, cfg, out))
        return out

    monkeypatch.setattr(FlowTransformerHead, "denoise", noted)
    return calls


# The recorded cases ---------------------------------------------------------------------------------------------------


@functools.cache
def recorded_model(which, tag, dtype):
    file = golden(which, "flowar_e2e")
    sizes = next(m for m in file.meta["models"] if m["tag"] == tag)
    both = {"embed_dim": sizes["E"], "depth": sizes["depth"], "num_heads": sizes["heads"]}
    model = models.FlowAR(
        img_size=16 * sizes["scale"][-1],
        scale=sizes["scale"],
        diffloss_w=sizes["w"],
        diffloss_d=sizes["d"],
        cross=sizes["cross"],
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in both.items()},
    )
    model.load_state_dict({key.split("/", 1)[1]: t for key, t in file.arrays.items() if key.startswith(f"sd_{tag}/")})
    return model.to(dtype).eval()


@pytest.mark.parametrize(("which", "stem", "case"), golden_cases("flowar_e2e"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_images_as_recorded(which, stem, case, backend, dtype, head_calls):
    file, name = golden(which, stem), f"case/{case['name']}"
    draw, remaining = replaying(file[f"{name}/s{s}/latents"] for s in range(len(case["T"])))
    tokens = recorded_model(which, case["model"], dtype).sample_tokens(
        file[f"{name}/labels"],
        f"linear:{case['upper']}-{case['lower']}",
        cfg=case["cfg"],
        guidance=(0.0, case["guidance"]),
        draw=draw,
        backend=backend,
    )
    assert next(remaining, None) is None
    assert tokens.dtype == dtype
    if dtype == torch.float64:
        assert_close(tokens, file[f"{name}/tokens_f64"], worst=1e-9)
        return
    worst = max(1e-5, 10 * case["f32_vs_f64"])
    assert_close(tokens, file[f"{name}/tokens"], worst)
    for s, (z, table, _, out) in enumerate(head_calls):
        assert len(table) == case["network_evals"][s]
        assert_close(z, file[f"{name}/s{s}/z"][: len(z)], worst)
        assert_close(out[: len(tokens)], file[f"{name}/s{s}/out"][: len(tokens)], worst)


@pytest.mark.parametrize("entry", golden_json("slim", "schedules")["flowar"], ids=lambda e: f"{e['upper']}-{e['lower']}-{e['K']}")
def test_steps_and_guidance_scale_of_each_scale_as_recorded(entry, monkeypatch):
    steps_and_cfg, asked = [], {}

    def solver(steps):
        table = solvers.flow_euler(steps)
        asked[id(table)] = steps
        return table

    def denoise(self, z, table, cfg, *rest, **named):
        steps_and_cfg.append((asked[id(table)], len(table), cfg))
        return torch.zeros(*z.shape[:2], 16)

    monkeypatch.setattr(FlowTransformerHead, "denoise", denoise)
    side = 2 ** (entry["K"] - 1)
    model = small_flowar(scale=[2**k for k in range(entry["K"])], img_size=16 * side)
    model.sample_tokens(LABELS, f"linear:{entry['upper']}-{entry['lower']}", cfg=entry["cfg"], guidance=(0.0, 1.0), solver=solver)
    assert [list(column) for column in zip(*steps_and_cfg, strict=True)][:2] == [entry["T"], entry["network_evals"]]
    assert [cfg for _, _, cfg in steps_and_cfg] == pytest.approx(entry["cfg_per_step"], abs=1e-12)


def test_text_schedules_are_rounded_as_flowar_rounds(monkeypatch):
    seen = []

    def denoise(self, z, table, *rest, **named):
        seen.append(len(table))
        return torch.zeros(*z.shape[:2], 16)

    monkeypatch.setattr(FlowTransformerHead, "denoise", denoise)
    scales = small_flowar(scale=range(1, 13), img_size=16 * 12)
    for schedule in ("linear:57-2", disa_fast.Linear(57, 2)):  # an instance rounds as it says, by default as MAR
        scales.sample_tokens(LABELS[:1], schedule, solver=functools.partial(solvers.flow_euler, grid="uniform"))
    assert (seen[8], seen[12 + 8]) == (17, 16)


# The backbone ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cfg", [1.0, 2.4])
def test_scale_after_scale_is_one_pass_under_the_mask(exact, head_calls, backend, cfg):
    """The cache of keys and values, against all scales at once as training has them."""
    exact.sample_tokens(LABELS, "constant:2", cfg=cfg, guidance=(0.0, 1.0), backend=backend)
    rows = torch.cat([LABELS, torch.full_like(LABELS, 10)]) if cfg > 1 else LABELS
    grids = [out[:2].transpose(1, 2).unflatten(2, (s, s)) for s, (*_, out) in zip(exact.scale, head_calls, strict=True)]
    inputs = [enlarged(grid, s).flatten(2).transpose(1, 2) for grid, s in zip(grids, exact.scale[1:], strict=False)]
    condition = exact.class_emb.weight[rows][:, None]
    x = torch.cat([condition, torch.cat([exact.z_proj(part) for part in inputs], dim=1).repeat(len(rows) // 2, 1, 1)], dim=1)
    w = BackboneWeights.of(exact.state_dict())
    rotation = [torch.cat(part) for part in zip(*(grid_rotation(w.freqs, s) for s in exact.scale), strict=True)]
    z = transform(PLAIN, w, x, modulations(PLAIN, w, condition), rotation, [None] * 3, mask=exact.mask)
    z = (z + exact.diffusion_pos_embed_learned).split([1, 4, 16], dim=1)
    for (seen, *_), expected in zip(head_calls, z, strict=True):
        assert_close(seen, expected[: len(seen)], worst=1e-10)


def test_mask_lets_a_token_see_its_scale_and_those_before():
    mask = models.FlowAR(**SMALL).mask
    scale_of = [0] + 4 * [1] + 16 * [2]
    expected = [[0.0 if other <= own else -math.inf for other in scale_of] for own in scale_of]
    assert mask.tolist() == [[expected]]


def test_patches_there_and_back():
    model = small_flowar(img_size=16, vae_stride=1, patch_size=4, vae_embed_dim=3)
    images = torch.randn(2, 3, 16, 16)
    tokens = model.patchify(images)
    assert tokens.shape == (2, 48, 4, 4)
    assert torch.equal(tokens[0, :, 1, 2], images[0, :, 4:8, 8:12].reshape(-1))  # channel, then row, then column
    assert torch.equal(model.unpatchify(tokens), images)
    assert model.sample_tokens(LABELS, "constant:2").shape == (2, 3, 16, 16)


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", ["linear:6-3", "cosine:6-3", "two-stage:6-3", "constant:2", "list:4,3,2", lambda k, K: K - k + 1]
)
def test_every_schedule(model, schedule):
    tokens = model.sample_tokens(LABELS, schedule)
    assert tokens.shape == (2, 16, 4, 4)
    assert tokens.isfinite().all()


@pytest.mark.filterwarnings("ignore:temperature:UserWarning")
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama", functools.partial(solvers.flow_euler, grid="uniform")])
@pytest.mark.parametrize("cfg", [0.5, 1.0, 2.4])
def test_hoisted_draws_what_reference_does(exact, solver, cfg):
    run = {"schedule": "linear:6-3", "cfg": cfg, "solver": solver, "guidance": (0.1, 0.8), "temperature": 0.8}
    ours, reference = (exact.sample_tokens(LABELS, backend=b, generator=seeded(), **run) for b in ("hoisted", "reference"))
    assert_close(ours, reference, worst=1e-9)


def test_one_seed_one_result(model):
    run = {"schedule": "linear:6-3", "solver": "euler_maruyama"}
    torch.manual_seed(5)
    first = model.sample_tokens(LABELS, **run)
    torch.manual_seed(5)
    assert torch.equal(first, model.sample_tokens(LABELS, **run))
    assert not torch.equal(first, model.sample_tokens(LABELS, **run))
    assert torch.equal(first, model.sample_tokens(LABELS, generator=seeded(5), **run))


@pytest.mark.parametrize(("cfg", "rows"), [(1.0, 2), (2.4, 4), (0.5, 4)])
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_draws_come_in_upstreams_order(model, solver, cfg, rows):
    """For each scale the start in float32, a float64 draw at each noisy step; for both halves if cfg is not 1, guided or not."""
    asked = []

    def draw(shape, dtype):
        asked.append((tuple(shape), dtype))
        return torch.zeros(shape, dtype=dtype)

    model.sample_tokens(LABELS, "constant:3", cfg=cfg, solver=solver, draw=draw)
    per_scale = [torch.float32] if solver == "euler" else [torch.float32, torch.float64, torch.float64]
    assert asked == [((rows, tokens, 16), dtype) for tokens in (1, 4, 16) for dtype in per_scale]


def test_guidance_and_labels_matter(model):
    def run(labels=LABELS, **options):
        return model.sample_tokens(labels, "constant:6", generator=seeded(), **options)

    assert not torch.equal(run(cfg=2.0), run(cfg=3.0))
    assert not torch.equal(run(cfg=2.0), run(cfg=2.0, guidance=(0.0, 0.5)))
    assert not torch.equal(run(), run(labels=LABELS + 1))
    assert not torch.equal(run(solver="euler_maruyama"), run(solver="euler_maruyama", temperature=0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_are_independent(exact, backend):
    """A batch is its images one by one, guided and annealed; so batch 1 works with an interval that leaves steps out."""
    run = {"schedule": "linear:6-3", "cfg": 2.4, "guidance": (0.0, 0.6), "solver": "euler_maruyama", "backend": backend}
    drawn = []

    def draw(shape, dtype):
        drawn.append(torch.randn(shape, dtype=dtype))
        return drawn[-1]

    both = exact.sample_tokens(LABELS, draw=draw, **run)
    alone = exact.sample_tokens(LABELS[1:], draw=replaying(part[[1, 3]] for part in drawn)[0], **run)
    assert_close(alone, both[1:], worst=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"cfg": 1.0}, {"cfg": 0.5}, {"cfg": 3.0, "guidance": (2.0, 3.0)}, {"cfg": 3.0, "guidance": (0.0, 0.0)}]
)
def test_nothing_unconditional_where_nothing_is_guided(exact, rows_seen, options, backend):
    """And the tokens are those of the conditional half alone."""
    for labels in (LABELS, LABELS[:1]):
        drawn = []

        def draw(shape, dtype, drawn=drawn):
            drawn.append(torch.randn(shape, dtype=dtype))
            return drawn[-1]

        rows_seen.clear()
        tokens = exact.sample_tokens(labels, "linear:5-3", draw=draw, backend=backend, **options)
        if backend == "hoisted":
            assert set(rows_seen) == {len(labels)}
        first_half = replaying(part[: len(labels)] for part in drawn)[0]
        assert_close(tokens, exact.sample_tokens(labels, "linear:5-3", cfg=1.0, draw=first_half), worst=1e-9)


def test_unconditional_rows_at_guided_steps_alone(model, rows_seen):
    model.sample_tokens(LABELS, "constant:4", cfg=2.4, guidance=(0.0, 0.9))  # times 1, 0.3, 0.25, 0.125
    first, others = [4] * 3 + [2] * 4, [4] * 3 + [2, 4, 4, 4]  # backbone, then head; the first scale's cfg is 1
    assert rows_seen == first + 2 * others


def test_images_of_no_class(model):
    run = {"schedule": "constant:3", "cfg": 2.4}
    tokens = model.sample_tokens(None, bsz=2, generator=seeded(), **run)
    assert tokens.shape == (2, 16, 4, 4)
    assert torch.equal(tokens, model.sample_tokens(torch.tensor([10, 10]), bsz=2, generator=seeded(), **run))
    assert torch.equal(tokens, model.sample_tokens(torch.tensor([10, 10], dtype=torch.int32), generator=seeded(), **run))


def test_a_single_scale_has_the_whole_guidance(head_calls):
    small_flowar(scale=[1], img_size=16).sample_tokens(LABELS, "constant:3", cfg=2.4)
    assert [cfg for _, _, cfg, _ in head_calls] == [2.4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(model, backend):
    assert model.sample_tokens(LABELS[:0], "constant:2", backend=backend).shape == (0, 16, 4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cross", [False, True])
def test_half_precision_is_as_good_as_eager(dtype, cross):
    low = small_flowar(dtype, cross=cross)
    exact = copy.deepcopy(low).double()
    labels, results = torch.arange(8), []
    for seed in range(2):
        run = {"labels": labels, "schedule": "constant:4", "cfg": 1.5}
        results.append(
            [
                m.sample_tokens(backend=backend, generator=seeded(seed), **run)
                for m, backend in ((low, "hoisted"), (low, "reference"), (exact, "reference"))
            ]
        )
    ours, eager, truth = (torch.cat(parts) for parts in zip(*results, strict=True))
    assert ours.dtype == eager.dtype == torch.float32
    assert_as_good_as(ours, eager, truth, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_inference_mode_change_nothing(model, backend):
    run = functools.partial(model.sample_tokens, LABELS, "constant:3", backend=backend)
    expected = run(generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(expected, run(generator=seeded()))
    with torch.inference_mode():
        assert torch.equal(expected, run(generator=seeded()))
    assert torch.equal(expected, run(generator=seeded()))


def test_changed_parameters_are_noticed():
    model = small_flowar()
    run = functools.partial(model.sample_tokens, LABELS, "constant:3")
    for part in (model.flownet.input_proj, model.encoder_blocks[0].attn.qkv):
        before = run(generator=seeded())
        with torch.no_grad():
            part.weight.mul_(1.5)
        assert not torch.equal(before, run(generator=seeded()))
    assert run().dtype == torch.float32
    assert model.double().sample_tokens(LABELS, "constant:3").dtype == torch.float64


def test_copies_are_independent(model):
    before = model.sample_tokens(LABELS, "constant:3", generator=seeded())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(before, twin.sample_tokens(LABELS, "constant:3", generator=seeded()))
        with torch.no_grad():
            twin.flownet.final_layer.linear.weight.zero_()
        assert not torch.equal(before, twin.sample_tokens(LABELS, "constant:3", generator=seeded()))
    assert torch.equal(before, model.sample_tokens(LABELS, "constant:3", generator=seeded()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "linear:5-50"}, "late: expected at most early = 5, got 50"),
        ({"schedule": "constant:1"}, "steps: FlowAR's grid needs at least 2 denoising steps, got 1"),
        ({"schedule": lambda k, K: 0}, "schedule at k = 0 of 3: expected at least 1 denoising step, got 0"),
        ({"schedule": disa_fast.StepList([5, 5])}, "steps: expected one entry for each of the 3"),
        ({"schedule": 25}, "schedule: expected text such as 'linear:50-5'"),
        ({"solver": "ddpm"}, r"solver: expected one of \['euler', 'euler_maruyama'\]"),
        ({"solver": solvers.ddpm}, "table: expected one of a flow solver, whose network predicts no variance"),
        ({"labels": torch.tensor([1, 11])}, r"labels: expected classes 0\.\.10, got \[1, 11\]"),
        ({"labels": torch.tensor([-1])}, r"labels: expected classes 0\.\.10, got \[-1\]"),
        ({"labels": torch.tensor([[1]])}, r"labels: expected a \[B\] tensor"),
        ({"labels": torch.tensor([1.0])}, r"labels: expected a \[B\] tensor of whole numbers"),
        ({"labels": LABELS.to("meta")}, "labels: expected it on cpu, where the model is, got meta"),
        ({"labels": None}, "labels, bsz: expected labels, or bsz .* got bsz = None"),
        ({"labels": None, "bsz": 0}, "labels, bsz: expected labels, or bsz .* got bsz = 0"),
        ({"labels": None, "bsz": 1.5}, r"labels, bsz: expected labels, or bsz .* got bsz = 1\.5"),
        ({"bsz": 3}, "bsz: expected 2 or None beside as many labels, got 3"),
        ({"cfg": math.nan}, "cfg: expected a finite number, got nan"),
        ({"cfg": torch.ones(2)}, "cfg: expected a number or a one-element tensor"),
        ({"temperature": math.inf}, "temperature: expected a finite number, got inf"),
        ({"temperature": -1.0}, "temperature: expected at least 0, got -1"),
        ({"guidance": 0.9}, r"guidance: expected \(low, high\), .* got 0\.9"),
        ({"guidance": (0.9, 0.1)}, r"guidance: expected low <= high, got \(0\.9, 0\.1\)"),
        ({"guidance": (0.0, 0.5, 0.9)}, r"guidance: expected \(low, high\), .* got \(0\.0, 0\.5, 0\.9\)"),
        ({"guidance": (0.9, 0.1), "cfg": 1.0}, "guidance: expected low <= high"),
        ({"backend": "tpu"}, "backend: 'tpu' is not one"),
        ({"backend": "cpu"}, "backend: 'cpu' cannot serve this call: serves MLP heads alone, not transformers; can: "),
        (
            {"draw": lambda shape, dtype: torch.zeros(1, 1, 1)},
            r"draw: expected it to make \[4, 1, 16\] of torch.float32, got \[1, 1, 1\]",
        ),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample_tokens(**{"labels": LABELS, "schedule": "constant:3", **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_size": 64}, "buffer_size: expected 0, .* got 64"),
        ({"scale": (1, 2)}, r"scale: expected sides from 1 to the image's 4 tokens, got \[1, 2\]"),
        ({"scale": ()}, r"scale: expected sides from 1 to the image's 4 tokens, got \[\]"),
        ({"scale": (2, 4)}, "scale: expected"),  # the first is of the class alone
        ({"decoder_embed_dim": 64}, "decoder_embed_dim, decoder_num_heads: .* expected the encoder's 32 and 2, got 64 and 2"),
        ({"encoder_num_heads": 3, "decoder_num_heads": 3}, "encoder_num_heads: expected heads of a multiple of 4 channels, got 3"),
    ],
)  # fmt: skip
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        models.FlowAR(**SMALL | options)


# Sizes and checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions"), [("small", 170), ("large", 589), ("huge", 1900)])
def test_published_sizes(size, millions):
    """Parameter counts of the published table (FlowAR, arXiv 2412.15205)."""
    with torch.device("meta"):
        model = models.flowar(size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.015)
    assert model.scale == [1, 2, 4, 8, 16]
    assert model.head.spec.cross == (size != "small")
    assert (model.head.spec.width, model.head.spec.depth) == {"small": (1024, 2), "large": (1024, 12), "huge": (1536, 12)}[size]


def test_keyword_arguments_win_over_the_size():
    with torch.device("meta"):
        model = models.flowar("small", diffloss_d=3, class_num=10, cross=True, encoder_depth=1)
        assert (model.head.spec.depth, model.head.spec.cross, model.no_class, len(model.encoder_blocks)) == (3, True, 10, 1)
    with pytest.raises(ValueError, match=r"size: expected one of \['small', 'large', 'huge'\], got 'base'"):
        models.flowar("base")


def test_state_dict_there_and_back(tmp_path, model):
    config = {**SMALL, "scale": list(SMALL["scale"])}
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, model.state_dict(), "flowar", config)
    name, read = read_config(path)
    assert (name, read) == ("flowar", config)
    other = models.flowar(**read)
    load_checkpoint(other, path)
    run = {"labels": LABELS, "schedule": "constant:3"}
    assert torch.equal(other.sample_tokens(generator=seeded(), **run), model.sample_tokens(generator=seeded(), **run))
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "published.pth")
    load_checkpoint(other, tmp_path / "published.pth")
    damaged = {name: t for name, t in model.state_dict().items() if name != "flownet.cond_embed.bias"}
    torch.save(damaged, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=r"keys do not match: missing 1 \(flownet.cond_embed.bias\)"):
        load_checkpoint(other, tmp_path / "damaged.pth")


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fixed_draws(monkeypatch):
    """In place of torch's draws, numbers that depend on the shape alone."""

    def uniform(*shape, **_):
        shape = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        return (torch.arange(math.prod(shape)).float() * 0.37 + 0.11).remainder(1).view(shape)

    def normal_like(x):
        return torch.sin(torch.arange(x.numel(), dtype=x.dtype) ** 2).view(x.shape)

    monkeypatch.setattr(torch, "rand", uniform)
    monkeypatch.setattr(torch, "randn_like", normal_like)
    return uniform, normal_like


@torch.no_grad()
def test_loss_equals_its_textbook_form(exact, fixed_draws):
    """Sum over scales of (s/S)^2 E |v(x_t) - (eps - x)|^2, conditions as sampling makes them: scale by scale through the cache."""
    uniform, normal_like = fixed_draws
    images = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    w = BackboneWeights.of(exact.state_dict())
    condition = exact.class_emb.weight[LABELS][:, None]
    caches, start, x, expected = w.caches(2), 0, condition, 0.0
    network = exact.head.network(torch.float64)
    for s, following in zip([1, 2, 4], [2, 4, None], strict=True):
        z = transform(PLAIN, w, x, modulations(PLAIN, w, condition), grid_rotation(w.freqs, s), caches, start)
        z = z + exact.diffusion_pos_embed_learned[:, start : start + s * s]
        start += s * s
        pooled = F.avg_pool2d(images, 4 // s)
        target = pooled.flatten(2).mT
        t, eps = uniform(2, 1, 1), normal_like(target)
        v = network((1 - t) * target + t * eps, t.flatten(), 0, z=z)
        expected = expected + ((v - (eps - target)) ** 2).mean() * (s / 4) ** 2
        if following:
            x = exact.z_proj(enlarged(pooled, following).flatten(2).mT)
    assert float(exact(images, LABELS)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("cross", [False, True])
def test_gradients_reach_every_parameter(cross):
    model = small_flowar(cross=cross).train()
    loss = model(torch.randn(3, 16, 4, 4), torch.tensor([1, 2, 3]))
    assert loss.isfinite() and loss.shape == ()
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]


@torch.no_grad()
def test_labels_are_dropped_in_training_alone(fixed_draws):
    images, none = torch.randn(2, 16, 4, 4), torch.tensor([10, 10])
    always, never = small_flowar(label_drop_prob=1.0), small_flowar(label_drop_prob=0.0)
    assert float(always.eval()(images, LABELS)) == float(never.eval()(images, LABELS)) == float(never.train()(images, LABELS))
    assert float(always.train()(images, LABELS)) == float(never(images, none)) != float(never(images, LABELS))
    half = small_flowar(label_drop_prob=0.3).train()  # the draws are 0.11 and 0.48
    assert float(half(images, LABELS)) == float(never(images, torch.tensor([10, 7])))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attn_dropout", "proj_dropout"])
def test_dropout_in_training_alone(fixed_draws, kind):
    images = torch.randn(2, 16, 4, 4)
    options = {"label_drop_prob": 0.0}
    plain, dropping = small_flowar(**options), small_flowar(**options, **{kind: 0.5})
    assert float(dropping.eval()(images, LABELS)) == float(plain.eval()(images, LABELS)) == float(plain.train()(images, LABELS))
    first, second = (float(dropping.train()(images, LABELS)) for _ in range(2))
    assert len({first, second, float(plain(images, LABELS))}) == 3
    run = {"labels": LABELS, "schedule": "constant:3"}
    expected = plain.sample_tokens(generator=seeded(), **run)
    assert torch.equal(dropping.sample_tokens(generator=seeded(), **run), expected)


def test_training_lowers_the_loss():
    model = small_flowar(cross=False).train()
    images, labels = torch.randn(8, 16, 4, 4), torch.arange(8)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    tokens = model.eval().sample_tokens(labels, "constant:4")
    assert tokens.isfinite().all()
