import copy
import functools
import math
import pickle

import numpy as np
import pytest
import torch
from compare import assert_as_good_as, assert_close
from flow_calls import replaying, seeded
from recorded import golden, golden_cases, golden_json

import disa_fast
from disa_fast import models, solvers
from disa_fast.backends import hoisted
from disa_fast.checkpoint import load_checkpoint, read_config, save_checkpoint
from disa_fast.heads.cell_transformer import CellTransformerHead
from disa_fast.heads.flow_transformer import time_index
from disa_fast.heads.mlp import embed_time
from disa_fast.models.xar import clusterify, unclusterify
from disa_fast.solvers import StepTable
from disa_fast.transformer import PLAIN, BackboneWeights, modulations, transform

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
    "clusters": 4,
}
LABELS = torch.tensor([1, 7])
IMAGES = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(4))


def small_xar(dtype=torch.float32, **options):
    """Every parameter random, so that each of them matters."""
    torch.manual_seed(0)
    model = models.XAR(**SMALL | options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval().to(dtype)


@pytest.fixture(scope="module")
def model():
    return small_xar()


@pytest.fixture(scope="module")
def exact():
    return small_xar(torch.float64)


def velocity_at(t):
    """One step whose result is the velocity."""
    zero, one = np.zeros(1), np.ones(1)
    return StepTable("any", np.array([float(t)]), a=zero, b=one, c=zero, l0=zero, l1=zero, noisy=np.zeros(1, bool), draws=False)


# The recorded cases ---------------------------------------------------------------------------------------------------


@functools.cache
def recorded_model(which, dtype):
    file = golden(which, "xar")
    m = file.meta["model"]
    both = {"embed_dim": m["embed_dim"], "num_heads": m["heads"]}
    model = models.XAR(
        img_size=m["img_size"],
        vae_stride=m["vae_stride"],
        encoder_depth=m["encoder_depth"],
        decoder_depth=m["decoder_depth"],
        clusters=m["clusters"],
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in both.items()},
    )
    model.load_state_dict(file.state_dict())
    return model.to(dtype).eval()


@pytest.mark.parametrize(("which", "stem", "case"), golden_cases("xar"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_images_as_recorded(which, stem, case, backend, dtype):
    file, name = golden(which, stem), f"case/{case['name']}"

    def draws():
        for q in range(4):
            yield file[f"{name}/c{q}/latents"]
            if case["sampler"] == "euler_maruyama":
                yield from file[f"{name}/c{q}/step_noise_f64"]

    draw, remaining = replaying(draws())
    tokens = recorded_model(which, dtype).sample_tokens(
        file[f"{name}/labels"],
        f"linear:{case['upper']}-{case['lower']}",
        cfg=case["cfg"],
        guidance=(case.get("guidance_low", 0.0), case.get("guidance_high", 1.0)),
        solver=case["sampler"],
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
    if which == "full":
        for q, cell in enumerate(clusterify(tokens, 2).split(64, dim=1)):
            assert_close(cell, file[f"{name}/c{q}/out"], worst)


def traced():
    """The cases whose first evaluations of each cell are recorded, in the full set alone."""
    return [
        pytest.param(*param.values, q, i, id=f"{param.id}-c{q}-{i}")
        for param in golden_cases("xar")
        if param.values[0] == "full" and param.values[2]["eval_trace"]
        for q in range(4)
        for i in range(2)
    ]


@pytest.mark.parametrize(("which", "stem", "case", "q", "i"), traced())
def test_network_as_recorded(which, stem, case, q, i):
    """The first evaluation was recorded together with the cell before, at time 0 and under a mask; here that has passed already."""
    file, name = golden(which, stem), f"case/{case['name']}"
    labels, head = file[f"{name}/labels"], recorded_model(which, torch.float32).head
    context = head.begin(torch.cat([labels, torch.full_like(labels, 1000)]))
    for earlier in range(q):
        head.finish(context, 64 * earlier, torch.cat([file[f"{name}/c{earlier}/out"]] * 2), "reference")
    x, t, v = (file[f"{name}/c{q}/eval{i}/{key}"] for key in "xtv")
    if i == 0 and q > 0:
        assert torch.equal(x[:, :64], torch.cat([file[f"{name}/c{q - 1}/out"]] * 2))
        assert not t[:4].any()
        x, t = x[:, 64:], t[4:]
    worst = max(1e-5, 10 * case["f32_vs_f64"])
    assert_close(head.network(torch.float32)(x, t, 64 * q, **context), v, worst)
    assert_close(head.denoise(context, 64 * q, velocity_at(t[0]), noise=x, backend="hoisted").float(), v, worst)


@pytest.fixture
def asked(monkeypatch):
    """A solver, and what it and the head were asked for: (T, evaluations, cfg) of each cell. Nothing is integrated."""
    cells, made = [], {}

    def solver(steps):
        table = solvers.flow_euler_maruyama(steps)
        made[id(table)] = steps
        return table

    def denoise(self, context, at, table, cfg, *rest, **named):
        cells.append((made[id(table)], len(table), cfg))
        return torch.zeros(len(context["condition"]) // (2 if named["guided_rows"] else 1), self.tokens_of_a_cell, 16)

    monkeypatch.setattr(CellTransformerHead, "denoise", denoise)
    return solver, cells


@pytest.mark.parametrize("entry", golden_json("slim", "schedules")["xar"], ids=lambda e: f"{e['upper']}-{e['lower']}-{e['K']}")
def test_steps_and_guidance_scale_of_each_cell_as_recorded(entry, asked, model):
    solver, cells = asked
    assert entry["K"] == 4
    model.sample_tokens(LABELS, f"linear:{entry['upper']}-{entry['lower']}", cfg=entry["cfg"], solver=solver)
    steps, evaluations, cfg = (list(column) for column in zip(*cells, strict=True))
    assert (steps, evaluations) == (entry["T"], entry["network_evals"])
    assert cfg == pytest.approx(entry["cfg_per_step"], abs=1e-12)


def test_text_schedules_are_rounded_as_xar_rounds(asked):
    solver, cells = asked
    for schedule in ("linear:85-10", disa_fast.Linear(85, 10)):  # an instance rounds as it says, by default as MAR
        small_xar(clusters=16).sample_tokens(LABELS[:1], schedule, solver=solver)
    assert (cells[4][0], cells[16 + 4][0]) == (65, 64)


# Cells ----------------------------------------------------------------------------------------------------------------


def test_cells_there_and_back():
    grid = torch.arange(16).view(1, 1, 4, 4)
    tokens = clusterify(grid, 2)
    assert tokens.flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    for on_a_side, side in ((1, 4), (2, 4), (2, 6), (3, 6)):
        grid = torch.randn(2, 5, side, side)
        tokens = clusterify(grid, on_a_side)
        assert tokens.shape == (2, side * side, 5)
        assert torch.equal(unclusterify(tokens, on_a_side), grid)


def test_patches_there_and_back():
    model = small_xar(img_size=16, vae_stride=1, patch_size=4, vae_embed_dim=3)
    images = torch.randn(2, 3, 16, 16)
    tokens = model.patchify(images)
    assert tokens.shape == (2, 48, 4, 4)
    assert torch.equal(tokens[0, :, 1, 2], images[0, :, 4:8, 8:12].reshape(-1))  # channel, then row, then column
    assert torch.equal(model.unpatchify(tokens), images)
    assert model.sample_tokens(LABELS, "constant:2").shape == (2, 3, 16, 16)


def test_mask_lets_a_token_see_its_cell_and_those_before(model):
    expected = [[0.0 if other // 4 <= own // 4 else -math.inf for other in range(16)] for own in range(16)]
    assert model.mask.tolist() == [[expected]]


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_cell_after_cell_is_one_pass_under_the_mask(exact, backend):
    """begin, denoise, finish, denoise, ... against a pass over [finished cells at time 0, this one at time t]."""
    head, p = exact.head, exact.state_dict()
    w = BackboneWeights.of(p)
    tables = p["encoder_blocks.0.attn.rope.freqs_cos"], p["encoder_blocks.0.attn.rope.freqs_sin"]
    context, cells = head.begin(LABELS), torch.randn(2, 16, 16, dtype=torch.float64)
    for at, t in zip((0, 4, 8, 12), (1.0, 0.65, 0.3, 0.04), strict=True):
        noisy, end = torch.randn(2, 4, 16, dtype=torch.float64), at + 4
        times = torch.tensor([0.0] * at + [t] * 4).expand(2, -1)
        of_tokens = exact.class_emb.weight[LABELS][:, None] + embed_time(p, time_index(times).flatten()).unflatten(0, times.shape)
        x = exact.z_proj(torch.cat([cells[:, :at], noisy], dim=1))
        rotation, mask = [table[:end] for table in tables], exact.mask[..., :end, :end]
        h = transform(PLAIN, w, x, modulations(PLAIN, w, of_tokens), rotation, [None] * 3, mask=mask)
        expected = exact.pred(h)[:, at:]
        assert_close(head.denoise(context, at, velocity_at(t), noise=noisy, backend=backend), expected, worst=1e-10)
        assert_close(head.network(torch.float64)(noisy, torch.full((2,), t), at, **context), expected, worst=1e-10)
        head.finish(context, at, cells[:, at:end], backend)


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", ["linear:6-3", "cosine:6-3", "two-stage:6-3", "constant:1", "list:4,3,2,1", lambda k, K: K - k]
)
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_every_schedule(model, schedule, solver):
    """One step for a cell and two work, too."""
    tokens = model.sample_tokens(LABELS, schedule, solver=solver)
    assert tokens.shape == (2, 16, 4, 4)
    assert tokens.isfinite().all()


@pytest.mark.filterwarnings("ignore:temperature:UserWarning")
@pytest.mark.parametrize("clusters", [1, 4, 16])
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama", functools.partial(solvers.flow_euler, grid="flowar")])
def test_hoisted_draws_what_reference_does(solver, clusters):
    exact = small_xar(torch.float64, clusters=clusters)
    run = {"schedule": "linear:6-3", "cfg": 2.4, "solver": solver, "guidance": (0.1, 0.8), "temperature": 0.8}
    ours, reference = (exact.sample_tokens(LABELS, backend=b, generator=seeded(), **run) for b in ("hoisted", "reference"))
    assert_close(ours, reference, worst=1e-9)


def test_one_seed_one_result(model):
    run = {"schedule": "linear:6-3"}
    torch.manual_seed(5)
    first = model.sample_tokens(LABELS, **run)
    torch.manual_seed(5)
    assert torch.equal(first, model.sample_tokens(LABELS, **run))
    assert not torch.equal(first, model.sample_tokens(LABELS, **run))
    assert torch.equal(first, model.sample_tokens(LABELS, generator=seeded(5), **run))


@pytest.mark.parametrize("cfg", [1.0, 2.4])
@pytest.mark.parametrize("solver", ["euler", "euler_maruyama"])
def test_draws_come_in_upstreams_order(model, solver, cfg):
    """For each cell the start in float32, a float64 draw at each noisy step; always for the images alone."""
    asked = []

    def draw(shape, dtype):
        asked.append((tuple(shape), dtype))
        return torch.zeros(shape, dtype=dtype)

    model.sample_tokens(LABELS, "constant:3", cfg=cfg, solver=solver, draw=draw)
    per_cell = [torch.float32] if solver == "euler" else [torch.float32, torch.float64, torch.float64]
    assert asked == [((2, 4, 16), dtype) for _ in range(4) for dtype in per_cell]


def test_guidance_and_labels_matter(model):
    def run(labels=LABELS, **options):
        return model.sample_tokens(labels, "constant:4", generator=seeded(), **options)

    assert not torch.equal(run(cfg=2.0), run(cfg=3.0))
    assert not torch.equal(run(cfg=2.0), run(cfg=2.0, guidance=(0.0, 0.5)))
    assert not torch.equal(run(), run(labels=LABELS + 1))
    assert not torch.equal(run(), run(temperature=0.5))
    assert not torch.equal(run(), run(solver="euler"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [(0.0, 1.0), (0.0, 0.6), (0.3, 0.8)])
def test_images_are_independent(exact, backend, guidance):
    """A batch is its images one by one; so batch 1 works with an interval that leaves steps out, too, where upstream fails."""
    run = {"schedule": "linear:6-3", "cfg": 2.4, "guidance": guidance, "backend": backend}
    drawn = []

    def draw(shape, dtype):
        drawn.append(torch.randn(shape, dtype=dtype))
        return drawn[-1]

    both = exact.sample_tokens(LABELS, draw=draw, **run)
    alone = exact.sample_tokens(LABELS[1:], draw=replaying(part[1:] for part in drawn)[0], **run)
    assert_close(alone, both[1:], worst=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"cfg": 1.0}, {"cfg": 0.5}, {"cfg": 3.0, "guidance": (2.0, 3.0)}, {"cfg": 3.0, "guidance": (0.0, 0.0)}]
)
def test_nothing_unconditional_where_nothing_is_guided(exact, rows_seen, options, backend):
    """And the tokens are those without guidance."""
    for labels in (LABELS, LABELS[:1]):
        rows_seen.clear()
        tokens = exact.sample_tokens(labels, "linear:5-3", generator=seeded(), backend=backend, **options)
        if backend == "hoisted":
            assert set(rows_seen) == {len(labels)}
        assert_close(tokens, exact.sample_tokens(labels, "linear:5-3", cfg=1.0, generator=seeded()), worst=1e-9)


def test_unconditional_rows_at_guided_steps_alone(model, rows_seen):
    model.sample_tokens(LABELS, "constant:3", cfg=2.4, guidance=(0.0, 0.9))  # times 1, 0.52, 0.04
    finish, first, others = [4], [2, 2, 2], [2, 4, 4]  # the first cell's cfg is 1
    evaluations = first + 3 * (finish + others)
    assert rows_seen == [rows for rows in evaluations for _ in range(3)]  # blocks


def test_images_of_no_class(model):
    run = {"schedule": "constant:3", "cfg": 2.4}
    tokens = model.sample_tokens(None, bsz=2, generator=seeded(), **run)
    assert tokens.shape == (2, 16, 4, 4)
    assert torch.equal(tokens, model.sample_tokens(torch.tensor([10, 10]), bsz=2, generator=seeded(), **run))
    assert torch.equal(tokens, model.sample_tokens(torch.tensor([10, 10], dtype=torch.int32), generator=seeded(), **run))


def test_a_single_cell_has_the_whole_guidance(asked):
    solver, cells = asked
    small_xar(clusters=1).sample_tokens(LABELS, "constant:3", cfg=2.4, solver=solver)
    assert cells == [(3, 3, 2.4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(model, backend):
    assert model.sample_tokens(LABELS[:0], "constant:2", backend=backend).shape == (0, 16, 4, 4)


@pytest.mark.parametrize("budget", [1, 1 << 40])
def test_modulation_in_chunks_is_the_same(exact, monkeypatch, budget):
    run = functools.partial(exact.sample_tokens, LABELS, "constant:8", guidance=(0.2, 0.7), backend="hoisted")
    whole = run(generator=seeded())
    monkeypatch.setattr(hoisted, "MODULATION_BYTES", budget)
    assert_close(run(generator=seeded()), whole, worst=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_eager(dtype):
    low = small_xar(dtype)
    exact = copy.deepcopy(low).double()
    results = []
    for seed in range(3):
        run = {"labels": torch.arange(8), "schedule": "constant:4", "cfg": 1.5}
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
    model = small_xar()
    run = functools.partial(model.sample_tokens, LABELS, "constant:3")
    for parameter in (model.pred.weight, model.class_emb.weight, model.time_embed.mlp[0].bias, model.encoder_pos_embed_learned):
        before = run(generator=seeded())
        with torch.no_grad():
            parameter.add_(0.5)
        assert not torch.equal(before, run(generator=seeded()))
    assert run().dtype == torch.float32
    assert model.double().sample_tokens(LABELS, "constant:3").dtype == torch.float64


def test_copies_are_independent(model):
    before = model.sample_tokens(LABELS, "constant:3", generator=seeded())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(before, twin.sample_tokens(LABELS, "constant:3", generator=seeded()))
        with torch.no_grad():
            twin.pred.weight.zero_()
        assert not torch.equal(before, twin.sample_tokens(LABELS, "constant:3", generator=seeded()))
    assert torch.equal(before, model.sample_tokens(LABELS, "constant:3", generator=seeded()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "linear:5-50"}, "late: expected at most early = 5, got 50"),
        ({"schedule": lambda k, K: 0}, "schedule at k = 0 of 4: expected at least 1 denoising step, got 0"),
        ({"schedule": disa_fast.StepList([5, 5])}, "steps: expected one entry for each of the 4"),
        ({"schedule": 25}, "schedule: expected text such as 'linear:50-5'"),
        ({"solver": "ddpm"}, r"solver: expected one of \['euler', 'euler_maruyama'\]"),
        ({"solver": solvers.ddpm}, "table: expected one of a flow solver, whose network predicts no variance"),
        ({"labels": torch.tensor([1, 11])}, r"labels: expected classes 0\.\.10, got \[1, 11\]"),
        ({"labels": torch.tensor([-1])}, r"labels: expected classes 0\.\.10, got \[-1\]"),
        ({"labels": torch.tensor([[1]])}, r"labels: expected a \[B\] tensor"),
        ({"labels": torch.tensor([1.0])}, r"labels: expected a \[B\] tensor of whole numbers"),
        ({"labels": LABELS.to("meta")}, "labels: expected it on cpu, where the model is, got meta"),
        ({"labels": None}, r"labels, bsz: expected labels, or bsz .* got bsz = None"),
        ({"labels": None, "bsz": 0}, r"labels, bsz: expected labels, or bsz .* got bsz = 0"),
        ({"labels": None, "bsz": True}, r"labels, bsz: expected labels, or bsz .* got bsz = True"),
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
            r"draw: expected it to make \[2, 4, 16\] of torch.float32, got \[1, 1, 1\]",
        ),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample_tokens(**{"labels": LABELS, "schedule": "constant:3", **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 3}, "clusters: expected a square number whose root divides the 4 tokens on a side, got 3"),
        ({"clusters": 9}, "clusters: expected a square number whose root divides the 4 tokens on a side, got 9"),
        ({"clusters": 0}, "clusters: expected a whole number from 1 to .*, got 0"),
        ({"clusters": -4}, "clusters: expected a whole number from 1 to .*, got -4"),
        ({"decoder_num_heads": 4}, "decoder_embed_dim, decoder_num_heads: .* expected the encoder's 32 and 2, got 32 and 4"),
        ({"encoder_num_heads": 3, "decoder_num_heads": 3}, "encoder_num_heads: expected heads of a multiple of 4 channels, got 3"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        models.XAR(**SMALL | options)


# Sizes and checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions", "depth"), [("base", 172, 16), ("large", 608, 32), ("huge", 1186, 40)])
def test_published_sizes(size, millions, depth):
    """Parameter counts of the published table (xAR, arXiv 2502.20388), whose 1.1B is cut rather than rounded."""
    with torch.device("meta"):
        model = models.xar(size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    assert (model.head.spec.depth, model.head.spec.tokens, model.head.spec.cells) == (depth, 256, 4)


def test_keyword_arguments_win_over_the_size():
    with torch.device("meta"):
        model = models.xar("base", class_num=10, clusters=16, decoder_depth=1)
        assert (model.head.spec.depth, model.head.tokens_of_a_cell, model.no_class) == (9, 16, 10)
    with pytest.raises(ValueError, match=r"size: expected one of \['base', 'large', 'huge'\], got 'small'"):
        models.xar("small")


def test_state_dict_there_and_back(tmp_path, model):
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, model.state_dict(), "xar", SMALL)
    assert read_config(path) == ("xar", SMALL)
    other = models.xar(**read_config(path)[1])
    load_checkpoint(other, path)
    run = {"labels": LABELS, "schedule": "constant:3"}
    assert torch.equal(other.sample_tokens(generator=seeded(), **run), model.sample_tokens(generator=seeded(), **run))
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "published.pth")
    load_checkpoint(other, tmp_path / "published.pth")
    torch.save({name: t for name, t in model.state_dict().items() if name != "pred.bias"}, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=r"keys do not match: missing 1 \(pred.bias\)"):
        load_checkpoint(other, tmp_path / "damaged.pth")


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fixed_draws(monkeypatch):
    """In place of torch's draws, numbers that depend on the shape alone."""

    def numbers(function, *shape, dtype=None, **_):
        shape = shape[0] if isinstance(shape[0], torch.Size) else shape
        return function(torch.arange(math.prod(shape), dtype=dtype or torch.float32)).view(shape)

    def normal(x):
        return torch.sin(x**2)

    def normal_like(x):
        return numbers(normal, *x.shape, dtype=x.dtype)

    monkeypatch.setattr(torch, "rand", functools.partial(numbers, lambda x: (0.37 * x + 0.11).remainder(1)))
    monkeypatch.setattr(torch, "randn", functools.partial(numbers, normal))
    monkeypatch.setattr(torch, "randn_like", normal_like)
    return functools.partial(numbers, normal), normal_like


@torch.no_grad()
def test_loss_equals_its_textbook_form(exact, fixed_draws):
    """E |v(x_t) - (eps - x)|^2, every cell at its own time, t = logistic(normal), seeing those before it as noisy as they are."""
    normal, normal_like = fixed_draws
    target = clusterify(IMAGES.double(), 2)
    t, eps = torch.special.expit(normal(2, 4)), normal_like(target)
    assert len(t.unique()) == 8
    context, network, errors = exact.head.begin(LABELS), exact.head.network(torch.float64), []
    for q in range(4):
        clean, noise, time = target[:, 4 * q : 4 * q + 4], eps[:, 4 * q : 4 * q + 4], t[:, q]
        v = network((1 - time[:, None, None]) * clean + time[:, None, None] * noise, time, 4 * q, **context)  # leaves its keys
        errors.append((v - (noise - clean)) ** 2)
    assert float(exact(IMAGES.double(), LABELS)) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-9)


def test_gradients_reach_every_parameter():
    model = small_xar().train()
    loss = model(torch.randn(3, 16, 4, 4), torch.tensor([1, 2, 3]))
    assert loss.isfinite() and loss.shape == ()
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]


@torch.no_grad()
def test_labels_are_dropped_in_training_alone(fixed_draws):
    none = torch.tensor([10, 10])
    always, never = small_xar(label_drop_prob=1.0), small_xar(label_drop_prob=0.0)
    never.load_state_dict(always.state_dict())
    assert float(always.eval()(IMAGES, LABELS)) == float(never.eval()(IMAGES, LABELS)) == float(never.train()(IMAGES, LABELS))
    assert float(always.train()(IMAGES, LABELS)) == float(never(IMAGES, none)) != float(never(IMAGES, LABELS))
    always.label_drop_prob = 0.3  # the draws are 0.11 and 0.48
    assert float(always(IMAGES, LABELS)) == float(never(IMAGES, torch.tensor([10, 7])))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attn_dropout", "proj_dropout"])
def test_dropout_in_training_alone(fixed_draws, kind):
    plain, dropping = small_xar(label_drop_prob=0.0), small_xar(label_drop_prob=0.0, **{kind: 0.5})
    assert float(dropping.eval()(IMAGES, LABELS)) == float(plain.eval()(IMAGES, LABELS)) == float(plain.train()(IMAGES, LABELS))
    first, second = (float(dropping.train()(IMAGES, LABELS)) for _ in range(2))
    assert len({first, second, float(plain(IMAGES, LABELS))}) == 3
    draw = {"labels": LABELS, "schedule": "constant:3", "draw": lambda shape, dtype: torch.zeros(shape, dtype=dtype)}
    assert torch.equal(dropping.sample_tokens(**draw), plain.sample_tokens(**draw))


def test_training_lowers_the_loss():
    model = small_xar().train()
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
    assert model.eval().sample_tokens(labels, "constant:4").isfinite().all()
