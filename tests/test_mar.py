import dataclasses
import math

import numpy as np
import pytest
import torch
from compare import assert_close
from recorded import BACKENDS_AND_DTYPES, golden, golden_cases
from upstream_like import PlainDiffusion, small_mar

import disa_fast
from disa_fast import Linear, models, solvers
from disa_fast.models.mar import SIZES
from disa_fast.solvers.diffusion import cosine, respace
from disa_fast.training import diffusion_loss

# The recorded cases ---------------------------------------------------------------------------------------------------


def float32_coefficients(steps: int) -> solvers.StepTable:
    """ddpm(steps) from coefficients rounded to float32 one by one, as the reference computes even in its float64 runs."""

    def rounded(values):
        return values.astype(np.float32).astype(np.float64)[::-1]

    table = solvers.ddpm(steps)
    betas = cosine().betas(respace(steps, 950))
    ab = np.cumprod(1 - betas)
    before = np.append(1.0, ab[:-1])
    from_x0, from_x = rounded(betas * np.sqrt(before) / (1 - ab)), rounded((1 - before) * np.sqrt(1 - betas) / (1 - ab))
    variance = betas * (1 - before) / (1 - ab)
    variance[0] = variance[1]
    low, high = rounded(np.log(variance)), rounded(np.log(betas))
    return dataclasses.replace(
        table,
        a=from_x0 * rounded(np.sqrt(1 / ab)) + from_x,
        b=-from_x0 * rounded(np.sqrt(1 / ab - 1)),
        l0=(high + low) / 2,
        l1=(high - low) / 2,
    )


@pytest.mark.parametrize(("which", "stem", "case"), golden_cases("mar_e2e"))
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_whole_images_as_recorded(which, stem, case, backend, dtype):
    recorded, name = golden(which, stem), f"case/{case['name']}"
    model = models.mar(**{k: v for k, v in recorded.meta["model"].items() if k not in ("norm_eps", "seq_len")})
    model.load_state_dict(recorded.state_dict())
    model = model.to(dtype).eval()

    def draws():
        for s in range(case["num_iter"]):
            yield recorded[f"{name}/s{s}/init_noise"]
            yield from recorded[f"{name}/s{s}/step_noise"]

    remaining = draws()

    def draw(shape, dtype):
        drawn = next(remaining)
        assert drawn.shape == shape
        return drawn.to(dtype)

    tokens = model.sample_tokens(
        recorded.get(f"{name}/labels"),
        schedule=Linear(case["upper"], case["lower"]),
        num_iter=case["num_iter"],
        cfg=case["cfg"],
        cfg_schedule=case["cfg_schedule"],
        temperature=case["temperature"],
        orders=recorded[f"{name}/orders"],
        draw=draw,
        backend=backend,
        solver=float32_coefficients if dtype == torch.float64 else "ddpm",
    )
    assert next(remaining, None) is None
    if dtype == torch.float64:
        assert_close(tokens, recorded[f"{name}/tokens_f64"], worst=1e-9)
    else:
        assert_close(tokens, recorded[f"{name}/tokens"], worst=max(1e-5, 10 * case["f32_vs_f64"]))


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return small_mar()


LABELS = torch.tensor([1, 7])


@pytest.mark.parametrize("num_iter", [1, 2, 16])
@pytest.mark.parametrize("schedule", ["linear:4-2", "cosine:4-2", "two-stage:4-2", "constant:1"])
def test_any_number_of_iterations_up_to_the_tokens(model, num_iter, schedule):
    tokens = model.sample_tokens(LABELS, schedule, num_iter=num_iter, cfg=2.0)
    assert tokens.shape == (2, 16, 4, 4)
    assert tokens.isfinite().all()
    assert (tokens != 0).all()


@pytest.mark.parametrize("solver", [*solvers.NAMES, solvers.ddim])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_every_solver_with_and_without_guidance(model, solver, cfg):
    run = {"schedule": "linear:6-2", "num_iter": 4, "cfg": cfg, "solver": solver}
    hoisted, reference = (
        model.sample_tokens(LABELS, backend=backend, generator=torch.Generator().manual_seed(3), **run)
        for backend in ("hoisted", "reference")
    )
    assert_close(hoisted, reference, worst=1e-4 * float(reference.abs().max()))


def test_one_seed_one_result(model):
    run = {"schedule": "linear:6-2", "num_iter": 4, "cfg": 2.0}
    torch.manual_seed(5)
    first = model.sample_tokens(LABELS, **run)
    torch.manual_seed(5)
    assert torch.equal(first, model.sample_tokens(LABELS, **run))
    assert not torch.equal(first, model.sample_tokens(LABELS, **run))
    assert torch.equal(first, model.sample_tokens(LABELS, generator=torch.Generator().manual_seed(5), **run))


def test_guidance_and_labels_matter(model):
    def run(labels=LABELS, **options):
        return model.sample_tokens(labels, "constant:3", num_iter=4, generator=torch.Generator().manual_seed(0), **options)

    assert not torch.equal(run(cfg=2.0), run(cfg=3.0))
    assert not torch.equal(run(cfg=2.0), run(cfg=2.0, cfg_schedule="constant"))
    assert not torch.equal(run(cfg=1.0), run(cfg=1.0, labels=LABELS + 1))
    assert run(labels=None, bsz=3).shape == (3, 16, 4, 4)
    # Nothing to guide towards: without labels both halves are the unconditional one.
    assert_close(run(labels=None, bsz=2, cfg=1.0 + 1e-7), run(labels=None, bsz=2, cfg=4.0), worst=10.0)


def test_tokens_drawn_earlier_stay(model):
    """Each iteration fills its own tokens and no others."""
    orders = torch.arange(16).expand(2, -1)
    seen = []

    def draw(shape, dtype):
        seen.append(shape)
        return torch.zeros(shape, dtype=dtype)

    model.sample_tokens(LABELS, "constant:2", num_iter=8, cfg=2.0, orders=orders, draw=draw)
    rows = [shape[0] for shape in seen]
    assert rows[0::3] == [2, 2, 2, 4, 6, 4, 6, 6]  # starts: one half
    assert rows[1::3] == rows[2::3] == [2 * n for n in rows[0::3]]  # steps: both
    assert sum(rows[0::3]) == 2 * 16


def test_patches_there_and_back():
    model = models.MAR(**{**dict.fromkeys(("encoder_depth", "decoder_depth", "diffloss_d"), 1), "img_size": 28, "vae_stride": 1,
                          "patch_size": 4, "vae_embed_dim": 3, "diffloss_w": 16})  # fmt: skip
    images = torch.randn(2, 3, 28, 28)
    tokens = model.patchify(images)
    assert tokens.shape == (2, 49, 48)
    assert torch.equal(tokens[0, 8], images[0, :, 4:8, 4:8].reshape(-1))  # channel, then row, then column
    assert torch.equal(model.unpatchify(tokens), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_iter": 17}, r"num_iter: expected 1 to 16 iterations \(one token each at least\), got 17"),
        ({"num_iter": 0}, "num_iter: expected 1 to 16 iterations"),
        ({"cfg_schedule": "sine"}, r"cfg_schedule: expected one of \['linear', 'constant'\], got 'sine'"),
        ({"schedule": "linear:5-50"}, "late: expected at most early = 5, got 50"),
        ({"schedule": lambda k, K: 0}, "schedule at k = 0 of 4: expected at least 1 denoising step, got 0"),
        ({"schedule": disa_fast.StepList([5, 5])}, "steps: expected one entry for each of the 4"),
        ({"solver": "euler"}, "solver: expected one of"),
        ({"labels": torch.tensor([1, 10])}, r"labels: expected classes 0\.\.9, got \[1, 10\]"),
        ({"labels": torch.tensor([-1])}, r"labels: expected classes 0\.\.9, got \[-1\]"),
        ({"labels": torch.tensor([[1]])}, r"labels: expected a \[B\] tensor"),
        ({"labels": torch.tensor([1.0])}, r"labels: expected a \[B\] tensor of whole numbers"),
        ({"labels": LABELS.to("meta")}, "labels: expected it on cpu, where the model is, got meta"),
        ({"labels": None}, "labels, orders, bsz: expected one batch size, at least 1, got none of them"),
        ({"bsz": 3}, r"labels, orders, bsz: expected one batch size, at least 1, got {'labels': 2, 'bsz': 3}"),
        ({"orders": torch.zeros(2, 16, dtype=torch.int64)}, r"orders: expected \[2, 16\], each row a permutation"),
        ({"orders": torch.arange(15).expand(2, -1)}, r"orders: expected \[2, 16\], each row a permutation"),
        ({"cfg": math.nan}, "cfg: expected a finite number, got nan"),
        ({"temperature": math.inf}, "temperature: expected a finite number, got inf"),
        ({"backend": "tpu"}, "backend: 'tpu' is not one"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample_tokens(**{"labels": LABELS, "schedule": "constant:2", "num_iter": 4, **arguments})


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions"), [("base", 208), ("large", 479), ("huge", 943)])
def test_published_sizes(size, millions):
    """Parameter counts of the published table (LTH14/mar, README)."""
    with torch.device("meta"):
        model = models.mar(size)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.7)
    assert model.head.spec.width == SIZES[size]["diffloss_w"]


def test_keyword_arguments_win_over_the_size():
    with torch.device("meta"):
        assert models.mar("base", diffloss_d=2, class_num=10).head.spec.depth == 2
    with pytest.raises(ValueError, match=r"size: expected one of \['base', 'large', 'huge'\], got 'tiny'"):
        models.mar("tiny")


# Training -------------------------------------------------------------------------------------------------------------


def test_loss_equals_its_textbook_form():
    """Noise prediction error plus KL(q(x_{t-1} | x_t, x_0) || p) in bits, with the mean not trained by the latter."""
    torch.manual_seed(0)
    target, z = torch.randn(400, 16, dtype=torch.float64).clamp(-1, 1), torch.randn(400, 48)
    seen = {}

    def net(x, t, z):
        seen["x"], seen["t"] = x, t
        return torch.cat([0.9 * x, 0.3 * x.sin()], dim=1)

    loss = diffusion_loss(net, target, z)
    x, t = seen["x"], seen["t"]
    assert 0 <= int(t.min()) and int(t.max()) <= 950
    full = PlainDiffusion(list(range(1000)))
    ab, before = (torch.tensor(a)[t][:, None] for a in (full.alpha_bar, full.alpha_bar_before))
    beta = 1 - ab / before
    noise = (x - ab.sqrt() * target) / (1 - ab).sqrt()
    eps, v = (0.9 * x), 0.3 * x.sin()

    def posterior_mean(x0):
        return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - ab)

    predicted = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
    low, high = (beta * (1 - before) / (1 - ab)).log(), beta.log()
    ours = torch.distributions.Normal(posterior_mean(predicted), (0.5 * ((v + 1) / 2 * high + (1 - v) / 2 * low)).exp())
    keep = (t > 0).nonzero()[:, 0]
    truth = torch.distributions.Normal(posterior_mean(target)[keep], (0.5 * low[keep]).exp())
    kl = torch.distributions.kl_divergence(truth, torch.distributions.Normal(ours.loc[keep], ours.scale[keep])).mean(
        dim=1
    ) / math.log(2)
    assert len(keep) == len(t), "pick a seed that draws no t = 0"
    assert float(loss) == pytest.approx(float(((noise - eps) ** 2).mean() + kl.mean()), rel=1e-9)


def test_bound_does_not_train_the_mean():
    net = models.mar("base", img_size=32, encoder_depth=1, decoder_depth=1, diffloss_d=1, diffloss_w=16).diffloss.net
    target, z = torch.randn(64, 16), torch.randn(64, 768)
    torch.manual_seed(0)
    diffusion_loss(net, target, z).backward()
    torch.manual_seed(0)
    t, noise = torch.randint(0, 951, (64,)), torch.randn(64, 16)
    weight = net.final_layer.linear.weight
    ab = torch.tensor(PlainDiffusion(list(range(1000))).alpha_bar)[t][:, None].float()
    eps = net(ab.sqrt() * target + (1 - ab).sqrt() * noise, t, z)[:, :16]
    (gradient,) = torch.autograd.grad((noise - eps).square().mean(), weight)
    assert_close(weight.grad[:16], gradient[:16], worst=1e-6)
    assert float(weight.grad[16:].abs().max()) > 0 or float(net.final_layer.linear.bias.grad[16:].abs().max()) > 0


def test_training_lowers_the_loss():
    model = small_mar().train()
    images, labels = torch.randn(16, 16, 4, 4), torch.arange(16) % 10
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_mask_ratios():
    """Upstream: a normal around 1 with deviation 0.25, cut to [0.7, 1]."""
    model = small_mar()
    torch.manual_seed(0)
    ratios = torch.tensor([model._mask_ratio() for _ in range(4000)])
    assert 0.7 <= float(ratios.min()) and float(ratios.max()) <= 1.0
    u = torch.linspace(0.7, 1.0, 100001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((u - 1) / 0.25) ** 2)
    assert float(ratios.mean()) == pytest.approx(float((u * density).sum() / density.sum()), abs=0.005)
