"""Counter-based noise: the numbers themselves, and what draws them."""

import math
import random
from statistics import NormalDist

import numpy as np
import pytest
import torch
from compare import assert_close
from random_parameters import random_parameters
from upstream_like import small_mar

from disa_fast import MLPHead, Philox, solvers
from disa_fast.heads.mlp import MLPSpec
from disa_fast.models.masked_sampling import random_orders, still_masked_after
from disa_fast.philox import box_muller, philox4x32

PLAIN = ["reference", "hoisted"]
BACKENDS = [*PLAIN, pytest.param("cpu", marks=pytest.mark.native)]
SOLVERS = [solvers.ddpm, solvers.ddim, solvers.dpm_solver]
LOW = 2**32 - 1

# The generator --------------------------------------------------------------------------------------------------------


def plain_philox(counter, key):
    """Philox4x32-10 in Python's whole numbers. Two pairs: r and l become high(m * r) ^ l ^ k and low(m * r), m * r of the other."""
    (r0, l0, r1, l1), (k0, k1) = counter, key
    for round_ in range(10):
        first, second = r0 * 0xD2511F53, r1 * 0xCD9E8D57
        new0 = (second >> 32) ^ l0 ^ ((k0 + round_ * 0x9E3779B9) % 2**32)
        new1 = (first >> 32) ^ l1 ^ ((k1 + round_ * 0xBB67AE85) % 2**32)
        r0, l0, r1, l1 = new0, second % 2**32, new1, first % 2**32
    return [r0, l0, r1, l1]


def plain_normal(seed, stream, step, channel):
    """One number of the layout."""
    stream %= 2**64
    words = plain_philox((step, channel // 4, stream % 2**32, stream >> 32), (seed % 2**32, seed >> 32))
    r, other = words[channel % 4 // 2 * 2 :][:2]
    radius, angle = math.sqrt(-2 * math.log(((r >> 8) + 1) / 2**24)), 2 * math.pi * (other >> 8) / 2**24
    return radius * (math.sin(angle) if channel % 2 else math.cos(angle))


def philox_of(counter, key):
    return [int(word) for word in philox4x32([torch.tensor(word) for word in counter], key)]


@pytest.mark.parametrize("implementation", [philox_of, plain_philox])
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(implementation, counter, key, words):
    """tests/kat_vectors of Random123."""
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert implementation(tuple(counter), tuple(key)) == words


def test_as_an_independent_implementation():
    source = random.Random(0)
    edges = [0, 1, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, LOW]
    counters = [[source.choice([*edges, source.randrange(2**32)]) for _ in range(4)] for _ in range(300)]
    for key in [(source.randrange(2**32), source.randrange(2**32)) for _ in range(5)] + [(0, LOW), (LOW, 0)]:
        words = torch.stack(philox4x32(torch.tensor(counters).unbind(1), key), 1)
        assert words.tolist() == [plain_philox(counter, key) for counter in counters]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**64 - 1, np.uint64(2**63 + 5)])
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_layout(seed, channels):
    streams, steps = [0, 7, 2**32 - 1, 2**32, 2**63 - 1, -1], [0, 1, 1000, LOW]
    drawn = Philox(seed, torch.tensor(streams)).normal(steps, len(streams), channels, torch.float64)
    expected = [[[plain_normal(int(seed), s, i, c) for c in range(channels)] for s in streams] for i in steps]
    torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_ends_of_the_transform():
    largest = math.sqrt(48 * math.log(2))
    none, all_bits = torch.tensor(0), torch.tensor(LOW)
    assert box_muller([none] * 4).tolist() == pytest.approx([largest, 0, largest, 0])
    assert box_muller([all_bits] * 4).tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_is_computed_in_float64_and_rounded_once(dtype):
    philox = Philox(3)
    exact, default = philox.normal(range(4), 5, 6, torch.float64), philox.normal(range(4), 5, 6)
    assert default.dtype == torch.float32
    assert torch.equal(default, exact.float())
    assert torch.equal(philox.normal(range(4), 5, 6, dtype), exact.to(dtype))


# Independence of everything else --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [16, 7])
def test_a_draw_depends_on_seed_stream_and_step_alone(channels):
    drawn = Philox(11).normal(range(9), 40, channels)
    assert torch.equal(drawn, Philox(11, torch.arange(40)).normal(range(9), 40, channels))
    for n in (0, 1, 3, 39):
        assert torch.equal(Philox(11).normal(range(9), n, channels), drawn[:, :n])
    for streams in (torch.randperm(40), torch.tensor([33]), torch.tensor([2, 2, 17]), torch.arange(0, 40, 3)):
        assert torch.equal(Philox(11, streams).normal(range(9), len(streams), channels), drawn[:, streams])
    for steps in ([4], [8, 0, 3], range(2, 9, 5), [], np.arange(3)):
        assert torch.equal(Philox(11).normal(steps, 40, channels), drawn[list(steps)])
    assert torch.equal(Philox(11).normal(range(9), 40, 3), drawn[..., :3])


def test_no_two_draws_share_a_counter():
    """Over seeds, streams and steps that differ in single bits, the highest among them."""
    bits = [0, *(1 << bit for bit in range(32))]
    streams = torch.tensor([*bits, *(1 << bit for bit in range(32, 63)), -(2**63)])
    seeds = [0, *(1 << bit for bit in range(64))]
    by_step = Philox(0, streams).normal(bits, len(streams), 16, torch.float64)
    by_seed = torch.cat([Philox(seed).normal([0], 1, 16, torch.float64) for seed in seeds])
    for drawn, number in ((by_step, len(bits) * len(streams)), (by_seed, len(seeds))):
        quads = drawn.reshape(-1, 4)
        assert len(quads.unique(dim=0)) == len(quads) == 4 * number


# Statistics -----------------------------------------------------------------------------------------------------------

LEVEL = 1e-4  # of each statistic: how often it would wrongly reject normal numbers, over all seeds
BOUND = NormalDist().inv_cdf(1 - LEVEL / 2)
STEPS, STREAMS, CHANNELS = 16, 8192, 16


def rejected(x):
    """The statistics by which x, [steps, streams, channels] float32, is not independent standard normal."""
    x = x.double()
    n, deviations = x.numel(), {}  # of a standard normal each, up to terms of 1 / sqrt(n)
    deviations["mean"] = x.mean() * n**0.5
    deviations["variance"] = (x.square().mean() - 1) * (n / 2) ** 0.5
    deviations["skewness"] = (x**3).mean() * (n / 15) ** 0.5
    deviations["kurtosis"] = ((x**4).mean() - 3) * (n / 96) ** 0.5
    tail = n * 2 * NormalDist().cdf(-4)
    deviations["tails"] = ((x.abs() > 4).sum() - tail) / tail**0.5
    for name, (dim, lag) in {"steps": (0, 1), "streams": (1, 1), "channels": (2, 1), "quads": (2, 4)}.items():
        here, there = x.narrow(dim, lag, x.shape[dim] - lag), x.narrow(dim, 0, x.shape[dim] - lag)
        deviations[name] = (here * there).mean() * here.numel() ** 0.5
        deviations[f"squares over {name}"] = ((here**2 - 1) * (there**2 - 1)).mean() * here.numel() ** 0.5 / 2
    wrong = {name for name, deviation in deviations.items() if not abs(float(deviation)) < BOUND}

    below = torch.special.ndtr(x.flatten().sort().values)
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum(below - rank / n, (rank + 1) / n - below).max()
    if not distance < math.sqrt(math.log(2 / LEVEL) / (2 * n)):  # the limit of Kolmogorov's distribution, its first term
        wrong.add("Kolmogorov-Smirnov")
    return wrong


def sample(seed=1, first=0):
    return Philox(seed, torch.arange(first, first + STREAMS)).normal(range(STEPS), STREAMS, CHANNELS)


@pytest.mark.parametrize(("seed", "first"), [(0, 0), (1, 0), (2**64 - 1, 2**32 - STREAMS // 2)])
def test_numbers_are_normal_and_independent(seed, first):
    assert rejected(sample(seed, first)) == set()


def test_seeds_are_independent():
    """Neighbouring seeds in the place of neighbouring steps."""
    drawn = torch.cat([Philox(seed).normal([1], STREAMS, CHANNELS) for seed in range(STEPS)])
    assert rejected(drawn) == set()


def damages():
    def scaled(x):
        return 1.01 * x, {"variance", "Kolmogorov-Smirnov"}

    def shifted(x):
        return x + 0.004, {"mean", "Kolmogorov-Smirnov"}

    def skewed(x):
        return x + 0.005 * (x**2 - 1), {"skewness"}

    def cut(x):
        return x.clamp(-4, 4), {"tails"}

    def uniform(x):
        return (torch.special.ndtr(x) - 0.5) * 12**0.5, {"kurtosis", "tails", "Kolmogorov-Smirnov"}

    def two_channels_equal(x):
        return x.index_copy(2, torch.tensor([1]), x[..., :1]), {"channels"}

    def two_channels_of_one_size(x):
        return x.index_copy(2, torch.tensor([1]), x[..., :1].abs() * x[..., 1:2].sign()), {"squares over channels"}

    def two_quads_equal(x):
        return torch.cat([x[..., :4], x[..., :4], x[..., 8:]], 2), {"quads"}

    def two_steps_equal(x):
        return torch.cat([x[:1], x[:-1]]), {"steps"}

    def pairs_of_streams_equal(x):
        return x[:, torch.arange(STREAMS) // 2], {"streams"}

    return [scaled, shifted, skewed, cut, uniform, two_channels_equal, two_channels_of_one_size, two_quads_equal, two_steps_equal,
            pairs_of_streams_equal]  # fmt: skip


@pytest.mark.parametrize("damage", damages(), ids=lambda f: f.__name__)
def test_other_numbers_are_rejected(damage):
    damaged, expected = damage(sample())
    assert expected <= rejected(damaged)


# In the loop ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head():
    return MLPHead.from_state_dict(random_parameters(MLPSpec(16, 64, 2, 48), 0))


@pytest.fixture
def z():
    return torch.randn(6, 48, generator=torch.Generator().manual_seed(1))


def materialised(philox, table, trajectories, dtype=torch.float32):
    """The noise of a call, as arguments of it."""
    start, *steps = philox.normal(range(len(table) + 1), trajectories, 16, dtype)
    return {"noise": start, "step_noise": torch.stack(steps) if table.draws else None}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_denoise_draws_what_the_definition_says(head, z, backend, cfg, solver):
    table, n = solver(5), 3 if cfg != 1 else 6
    for philox in (Philox(5), Philox(5, torch.arange(n) * 2**33 - 4)):
        drawn = head.denoise(z, table, cfg, backend=backend, rng=philox)
        given = materialised(philox, table, n)
        assert torch.equal(drawn, head.denoise(z, table, cfg, backend=backend, **given))
        start_given = head.denoise(z, table, cfg, backend=backend, rng=philox, noise=given["noise"])
        steps_given = head.denoise(z, table, cfg, backend=backend, rng=philox, step_noise=given["step_noise"])
        assert torch.equal(drawn, start_given)
        assert torch.equal(drawn, steps_given)
        assert not torch.equal(drawn, head.denoise(z, table, cfg, backend=backend, rng=Philox(6, philox.streams)))


@pytest.mark.parametrize("backend", PLAIN)
def test_in_float64(head, z, backend):
    table = solvers.ddpm(4)
    how = {"backend": backend, "dtype": torch.float64}
    drawn = head.denoise(z, table, rng=Philox(5), **how)
    assert torch.equal(drawn, head.denoise(z, table, **how, **materialised(Philox(5), table, 6, torch.float64)))


def test_given_noise_counts_under_philox_too(head, z):
    table, given = solvers.ddpm(4), {"noise": torch.randn(6, 16), "step_noise": torch.randn(4, 6, 16)}
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert torch.equal(head.denoise(z, table, rng="philox", generator=generator, **given), head.denoise(z, table, **given))
    assert torch.equal(generator.get_state(), before), "drew what nobody needs"


def test_seed_is_one_draw(head, z):
    """From the generator if given, else from torch's global one; streams count up."""
    table = solvers.ddpm(4)
    generator = torch.Generator().manual_seed(7)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    assert Philox.drawn(torch.Generator().manual_seed(7)).seed == seed
    after = torch.rand((), generator=generator)
    expected = head.denoise(z, table, rng=Philox(seed))

    generator.manual_seed(7)
    assert torch.equal(head.denoise(z, table, rng="philox", generator=generator), expected)
    assert torch.equal(torch.rand((), generator=generator), after)
    torch.manual_seed(7)
    assert torch.equal(head.denoise(z, table, rng="philox"), expected)
    assert torch.equal(torch.rand(()), after)
    torch.manual_seed(7)
    with torch.device("meta"):
        assert Philox.drawn().seed == seed, "the default device has a say in it"
    assert not torch.equal(head.denoise(z, table, rng="philox"), head.denoise(z, table, rng="philox"))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_alone_get_what_they_got_in_the_batch(head, backend, cfg):
    table, n = solvers.ddpm(6), 37
    z = torch.randn(2 * n if cfg != 1 else n, 48)
    whole = head.denoise(z, table, cfg, backend=backend, rng=Philox(5))
    for rows in ([0], [36], [20, 3, 8], [5, 5]):
        both = rows + [n + row for row in rows] if cfg != 1 else rows
        alone = head.denoise(z[both], table, cfg, backend=backend, rng=Philox(5, torch.tensor(rows)))[: len(rows)]
        if backend == "cpu":
            assert torch.equal(alone, whole[rows])
        else:
            assert_close(alone, whole[rows], worst=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_no_rows(head, cfg):
    assert head.denoise(torch.zeros(0, 48), solvers.ddpm(5), cfg=cfg, rng="philox").shape == (0, 16)


def test_torch_is_the_default(head, z):
    results = []
    for how in ({}, {"rng": "torch"}):
        torch.manual_seed(2)
        results.append(head.denoise(z, solvers.ddpm(3), **how))
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.compile's own
@pytest.mark.parametrize("rng", ["philox", Philox(4, torch.arange(6) + 9)], ids=["philox", "Philox"])
def test_under_a_compiler_it_works_in_two_graphs(head, z, rng):
    torch.compiler.reset()
    table = solvers.ddpm(3)

    def f(z, rng):
        return head.denoise(z + 1, table, cfg=1.0, rng=rng) * 2

    results = []
    for run in (f, torch.compile(f, backend="aot_eager")):
        torch.manual_seed(2)
        results.append(run(z, rng))
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_on_a_gpu(dtype):
    philox = Philox(2**63 + 1, torch.arange(1000) * 2**31)
    on_cpu, on_gpu = (philox.normal(range(7), 1000, 16, dtype, device) for device in ("cpu", "cuda"))
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=4 * torch.finfo(dtype).eps, atol=1e-14)


@pytest.mark.gpu
def test_seed_of_a_gpus_generator(head, z):
    table, generator = solvers.ddpm(3), torch.Generator("cuda").manual_seed(7)
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cuda"))
    drawn = head.denoise(z, table, rng="philox", generator=generator.manual_seed(7))
    assert torch.equal(drawn, head.denoise(z, table, rng=Philox(seed)))


# Whole images ---------------------------------------------------------------------------------------------------------


def images(model, rng, labels=(1, 7, 3), orders=None, **options):
    labels = torch.tensor(labels)
    orders = torch.stack([torch.randperm(16) for _ in labels]) if orders is None else orders
    return model.sample_tokens(labels, "linear:4-2", num_iter=5, cfg=2.0, orders=orders, rng=rng, **options)


def test_every_token_has_its_stream(monkeypatch):
    model, seen = small_mar(), []
    denoise = model.head.denoise

    def spy(z, *arguments, rng, **options):
        seen.append(rng)
        return denoise(z, *arguments, rng=rng, **options)

    monkeypatch.setattr(model.head, "denoise", spy)
    orders = torch.stack([torch.randperm(16) for _ in range(3)])
    images(model, Philox(9), orders=orders)
    assert {philox.seed for philox in seen} == {9}
    assert torch.cat([philox.streams for philox in seen]).sort().values.tolist() == list(range(3 * 16))
    assert all(torch.equal(philox.streams, philox.streams.sort().values) for philox in seen), "not in the order of the rows"
    last = orders[:, : still_masked_after(3, 5, 16, 16)] + 16 * torch.arange(3)[:, None]
    assert set(seen[-1].streams.tolist()) == set(last.flatten().tolist())


def test_an_image_alone_is_the_image_of_the_batch():
    model = small_mar()
    orders = torch.stack([torch.randperm(16) for _ in range(3)])
    whole = images(model, Philox(9), orders=orders)
    alone = images(model, Philox(9, torch.tensor([2])), labels=[3], orders=orders[2:])
    assert_close(alone, whole[2:], worst=1e-4 * float(whole.abs().max()))
    other = images(model, Philox(9, torch.tensor([0])), labels=[3], orders=orders[2:])
    assert float((other - alone).abs().max()) > 0.01 * float(whole.abs().max())


def test_images_of_a_generator():
    """It gives the orders, then the seed; with a Philox the orders alone."""
    model, labels = small_mar(), torch.tensor([1, 7])
    run = {"schedule": "linear:4-2", "num_iter": 5, "cfg": 2.0}
    first = model.sample_tokens(labels, generator=torch.Generator().manual_seed(5), rng="philox", **run)
    generator = torch.Generator().manual_seed(5)
    orders = random_orders(2, 16, generator, torch.device("cpu"))
    philox = Philox.drawn(generator)
    assert torch.equal(first, model.sample_tokens(labels, orders=orders, rng=philox, **run))
    assert torch.equal(first, model.sample_tokens(labels, generator=torch.Generator().manual_seed(5), rng=philox, **run))
    torch.manual_seed(5)
    assert torch.equal(first, model.sample_tokens(labels, rng="philox", **run))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None, torch.tensor(1)])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=r"seed: expected a whole number of at least 0 and below 2\*\*64, got "):
        Philox(seed)


@pytest.mark.parametrize(
    ("streams", "got"),
    [
        (torch.zeros(2, 1, dtype=torch.int64), r"\[2, 1\] of torch.int64"),
        (torch.zeros(2), r"\[2\] of torch.float32"),
        (torch.zeros(2, dtype=torch.int32), r"\[2\] of torch.int32"),
        ([0, 1], r"\[0, 1\]"),
        (range(2), r"range\(0, 2\)"),
    ],
)
def test_bad_streams(streams, got):
    with pytest.raises(ValueError, match=rf"streams: expected a \[trajectories\] tensor of torch.int64 or None, got {got}"):
        Philox(0, streams)


@pytest.mark.parametrize("step", [-1, 2**32, 1.0, True])
def test_bad_steps(step):
    with pytest.raises(ValueError, match=rf"steps: expected whole numbers of at least 0 and below 2\*\*32, got {step}"):
        Philox(0).normal([0, step], 1, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"rng": rng}, f"rng: expected 'torch', 'philox' or a disa_fast.Philox, got {got}")
            for rng, got in (("Philox", "'Philox'"), (None, "None"), (5, "5"), (torch.zeros(2), "tensor"))
        ),
        (
            {"rng": Philox(5), "generator": torch.Generator()},
            r"generator: expected None beside rng = Philox\(seed=5, streams=None\), which has its seed, got <torch",
        ),
        ({"rng": Philox(5, torch.arange(5))}, r"streams: expected \[6\], one for each trajectory, got \[5\]"),
        ({"rng": Philox(5, torch.arange(6)), "cfg": 2.0}, r"streams: expected \[3\], one for each trajectory, got \[6\]"),
        ({"rng": "philox", "noise": torch.zeros(6, 15)}, r"noise: expected a floating point \[6, 16\] tensor, got \[6, 15\]"),
        ({"rng": "philox", "step_noise": torch.zeros(6, 16)}, r"step_noise: expected a floating point \[5, 6, 16\] tensor"),
    ],
)
def test_bad_arguments(head, z, arguments, message):
    with pytest.raises(ValueError, match=message):
        head.denoise(z, solvers.ddpm(5), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rng": "cuda"}, "rng: expected 'torch', 'philox' or a disa_fast.Philox, got 'cuda'"),
        ({"rng": "philox", "draw": torch.zeros}, "draw: expected None beside rng = 'philox', got <built-in"),
        ({"rng": Philox(5), "draw": torch.zeros}, r"draw: expected None beside rng = Philox\(seed=5, streams=None\)"),
        ({"rng": Philox(5, torch.arange(2))}, r"streams: expected \[3\], one for each trajectory, got \[2\]"),
    ],
)
def test_bad_arguments_of_a_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        images(small_mar(), **arguments)
