"""FID and Inception Score of a folder, against their definitions written out in NumPy. The pipeline runs on a network of a few
numbers; the real one has random weights."""

import math

import numpy as np
import pytest
import torch
from compare import assert_close
from PIL import Image
from torch import nn

from disa_fast import evaluate
from disa_fast.evaluate import Inception, evaluate_folder, frechet_distance, inception_score, load_inception, reference_statistics

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, CLASSES = 6, 9
NAMES = ("inception_score_mean", "inception_score_std")


class SmallNetwork(nn.Module):
    """[N, 3, H, W] uint8 -> ([N, 6], [N, 9]), as Inception; every pixel and its place matters."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(SIZE, CLASSES)
        self.mixing = torch.randn(3 * 8 * 8, SIZE) / 8

    def forward(self, images):
        assert images.dtype == torch.uint8
        features = (images.float().flatten(1) / 64) @ self.mixing
        return features, features @ self.fc.weight.detach().T


@pytest.fixture
def network(monkeypatch):
    small = SmallNetwork()
    monkeypatch.setattr(evaluate, "load_inception", lambda weights: small)
    return small


def pictures(count, channels=3):
    return np.random.RandomState(count).randint(0, 256, (count, 8, 8, channels), dtype=np.uint8)


def save(folder, images, first=0):
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{first + i:05d}.png")


def outputs(network, images):
    """(features, logits) of [N, H, W, 3] uint8, in float64."""
    return tuple(part.double().numpy() for part in network(torch.from_numpy(images).permute(0, 3, 1, 2)))


def statistics(path, size=SIZE, **others):
    """Written to `path`, beside `others`: a mean and a covariance that is not diagonal. Returns the two."""
    rng = np.random.RandomState(7)
    mixing = rng.standard_normal((size, size + 3))
    mean, covariance = rng.standard_normal(size).astype(np.float32), mixing @ mixing.T
    np.savez(path, mu=mean, sigma=covariance, **others)
    return mean.astype(np.float64), covariance


def expected_distance(features, mean, covariance):
    """The formula as it is mostly written, over the eigenvalues of the product of the covariances."""
    own_mean, own = features.mean(axis=0), np.cov(features, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(own @ covariance).astype(complex)).real.sum()
    return ((own_mean - mean) ** 2).sum() + np.trace(own) + np.trace(covariance) - 2 * root


def expected_score(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p = p[np.random.RandomState(2020).permutation(len(p))]
    scores = []
    for i in range(10):
        part = p[i * len(p) // 10 : (i + 1) * len(p) // 10]
        scores.append(math.exp(sum(q @ np.log(q / part.mean(axis=0)) for q in part) / len(part)))
    mean = sum(scores) / 10
    return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / 10)


# Definitions ----------------------------------------------------------------------------------------------------------


def test_distance_of_independent_features():
    """|m1 - m2|^2 + sum of (s1 - s2)^2 over the standard deviations."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64) * math.sqrt(3 / 4)  # covariance 1
    deviations, reference = torch.tensor([2.0, 0.5]).double(), torch.tensor([1.0, 3.0]).double()
    features = signs * deviations + torch.tensor([1.0, -2.0])
    distance = frechet_distance(features, torch.tensor([0.5, 1.0]).double(), reference.square().diag())
    assert distance == pytest.approx(0.5**2 + 3**2 + 1 + 2.5**2, rel=1e-12)


@pytest.mark.parametrize("count", [2, 4, SIZE, 50])
def test_distance_against_the_eigenvalues_of_the_product(tmp_path, count):
    mean, covariance = statistics(tmp_path / "stats.npz")
    features = np.random.RandomState(count).standard_normal((count, SIZE)) * np.arange(1, 7) + 1
    distance = frechet_distance(torch.from_numpy(features), torch.from_numpy(mean), torch.from_numpy(covariance))
    assert distance == pytest.approx(expected_distance(features, mean, covariance), rel=1e-6 if count <= SIZE else 1e-11)


def test_distance_of_a_sample_to_itself_is_nothing():
    features = torch.randn(40, SIZE)
    mean, covariance = features.double().mean(dim=0), torch.cov(features.double().T)
    assert abs(frechet_distance(features, mean, covariance)) < 1e-12


def test_distance_keeps_what_float32_would_lose():
    features = torch.randn(64, SIZE).double() + 1e4
    mean = torch.full((SIZE,), 1e4, dtype=torch.float64)
    covariance = torch.eye(SIZE, dtype=torch.float64)
    centred = frechet_distance(features - 1e4, torch.zeros(SIZE).double(), covariance)
    assert frechet_distance(features, mean, covariance) == pytest.approx(centred, rel=1e-9)


def test_score_of_sure_and_of_unsure_networks():
    sure = torch.eye(5).repeat(20, 1) * 1e4  # a split holds 10 images: 1e4 leaves no probability to other classes
    order = torch.from_numpy(np.random.RandomState(2020).permutation(100))
    shuffled_back = torch.empty_like(sure)
    shuffled_back[order] = sure
    assert inception_score(shuffled_back) == pytest.approx((5, 0), abs=1e-12)
    assert inception_score(torch.ones(100, 5)) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("count", [10, 23, 100])
def test_score_against_its_definition(count):
    logits = np.random.RandomState(count).standard_normal((count, CLASSES)) * 3
    assert inception_score(torch.from_numpy(logits)) == pytest.approx(expected_score(logits), rel=1e-11)


# A folder -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_folder(tmp_path, network, batch):
    images = pictures(23)
    save(tmp_path, images)
    mean, covariance = statistics(tmp_path / "stats.npz", mu_s=np.zeros(3), arr_0=np.zeros(5, np.uint8))
    found = evaluate_folder(tmp_path, tmp_path / "stats.npz", None, batch, progress=False)
    features, logits = outputs(network, images)
    assert found.keys() == {"num_images", "fid", *NAMES, "warning"}
    assert found["num_images"] == 23
    assert found["fid"] == pytest.approx(expected_distance(features, mean, covariance), rel=1e-5)
    assert [found[name] for name in NAMES] == pytest.approx(expected_score(logits), rel=1e-5)
    assert "23 images" in found["warning"]


def test_without_statistics_and_with_few_images(tmp_path, network):
    save(tmp_path, pictures(9))
    found = evaluate_folder(tmp_path, None, None, progress=False)
    assert (found["num_images"], found["fid"]) == (9, None)
    assert [found[name] for name in NAMES] == [None, None]
    save(tmp_path, pictures(1), first=9)
    found = evaluate_folder(tmp_path, None, None, progress=False)
    assert [found[name] for name in NAMES] == pytest.approx([1, 0], abs=1e-12)  # an image a split


def test_no_warning_for_as_many_images_as_are_published(tmp_path, network, monkeypatch):
    save(tmp_path, pictures(3))
    monkeypatch.setattr(evaluate, "PUBLISHED_IMAGES", 3)
    assert evaluate_folder(tmp_path, None, None, progress=False)["warning"] is None


def test_files_that_are_not_samples_are_left_alone(tmp_path, network):
    save(tmp_path, pictures(12))
    before = evaluate_folder(tmp_path, None, None, progress=False)
    for name in ("grid.png", "demo.png", ".00003.ab.png"):
        Image.new("RGB", (50, 20)).save(tmp_path / name)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "deeper").mkdir()
    save(tmp_path / "deeper", pictures(3))
    assert evaluate_folder(tmp_path, None, None, progress=False) == before


def test_grey_and_transparent_images_are_read_as_colours(tmp_path, network):
    grey = pictures(12, channels=1).repeat(3, axis=3)
    for i, image in enumerate(grey):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i:02d}.png")
    colours, opacity = pictures(2, channels=4)[..., :3], pictures(2, channels=4)[..., 3:]
    for i in range(2):
        Image.fromarray(np.concatenate([colours[i], opacity[i]], axis=2)).save(tmp_path / f"x{i}.png")
    found = evaluate_folder(tmp_path, None, None, progress=False)
    logits = outputs(network, np.concatenate([grey, colours]))[1]
    assert [found[name] for name in NAMES] == pytest.approx(expected_score(logits), rel=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(tmp_path, network, count):
    save(tmp_path, pictures(count))
    with pytest.raises(ValueError, match=rf"folder: expected at least 2 images .* got {count}"):
        evaluate_folder(tmp_path, None, None)


def test_no_folder(tmp_path, network):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_folder(tmp_path / "nowhere", None, None)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text"])
def test_damaged_image_is_named(tmp_path, network, damage):
    save(tmp_path, pictures(5))
    path = tmp_path / "00003.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"00003\.png: cannot be read as an image"):
        evaluate_folder(tmp_path, None, None, progress=False)


def test_image_of_another_size_is_named(tmp_path, network):
    save(tmp_path, pictures(5))
    Image.new("RGB", (9, 7)).save(tmp_path / "00004.png")
    with pytest.raises(ValueError, match=r"00004\.png: expected 8x8 pixels, as 00000\.png has, got 9x7"):
        evaluate_folder(tmp_path, None, None, batch=2, progress=False)


def test_bad_batch(tmp_path, network):
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        evaluate_folder(tmp_path, None, None, batch=0)


@pytest.mark.parametrize("broken", [lambda network: network.mixing, lambda network: network.fc.weight.detach()])
def test_outputs_that_are_not_finite(tmp_path, network, broken):
    save(tmp_path, pictures(3))
    broken(network)[0, 0] = math.nan
    with pytest.raises(ValueError, match="weights: expected finite features and logits"):
        evaluate_folder(tmp_path, None, None, progress=False)


# Statistics -----------------------------------------------------------------------------------------------------------


def test_statistics(tmp_path):
    mean, covariance = statistics(tmp_path / "stats.npz")
    found = reference_statistics(tmp_path / "stats.npz", SIZE)
    assert [part.dtype for part in found] == [torch.float64] * 2
    assert np.array_equal(found[0].numpy(), mean) and np.array_equal(found[1].numpy(), covariance)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(SIZE)}, "expected arrays mu and sigma, got none called sigma"),
        ({"sigma": np.eye(SIZE)}, "expected arrays mu and sigma, got none called mu"),
        ({"mu": np.zeros(5), "sigma": np.eye(SIZE)}, r"mu: expected shape \[6\], got \[5\]"),
        ({"mu": np.zeros(SIZE), "sigma": np.ones(SIZE)}, r"sigma: expected shape \[6, 6\], got \[6\]"),
        ({"mu": np.full(SIZE, np.nan), "sigma": np.eye(SIZE)}, "mu: expected finite values"),
        ({"mu": np.zeros(SIZE), "sigma": np.full((SIZE, SIZE), np.inf)}, "sigma: expected finite values"),
        ({"mu": np.array([{}], object), "sigma": np.eye(SIZE)}, "cannot be read as .npz"),
    ],
)
def test_bad_statistics(tmp_path, arrays, message):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=f"stats: .*stats.npz: {message}"):
        reference_statistics(tmp_path / "stats.npz", SIZE)


def test_statistics_of_another_kind_or_missing(tmp_path):
    path = tmp_path / "stats.npz"
    for content in (b"", b"PK\x03\x04 and no more", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as"):
            reference_statistics(path)
    np.save(tmp_path / "stats.npy", np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read as"):
        reference_statistics(tmp_path / "stats.npy")
    with pytest.raises(FileNotFoundError, match=r"stats: .*nowhere"):
        reference_statistics(tmp_path / "nowhere.npz")


# The network ----------------------------------------------------------------------------------------------------------


def test_resizing_takes_pixels_as_points():
    """Pixel (i, j) at (i * H / 299, j * W / 299), between four neighbours, the last repeated beyond the edge."""
    image = np.random.RandomState(0).standard_normal((3, 5, 7))
    padded = np.pad(image, ((0, 0), (0, 1), (0, 1)), mode="edge")
    (y, dy), (x, dx) = (np.divmod(np.arange(299) * side / 299, 1) for side in (5, 7))
    y, x, dy = y.astype(int)[:, None], x.astype(int), dy[:, None]
    expected = (padded[:, y, x] * (1 - dx) + padded[:, y, x + 1] * dx) * (1 - dy)
    expected += (padded[:, y + 1, x] * (1 - dx) + padded[:, y + 1, x + 1] * dx) * dy
    assert_close(evaluate._resized(torch.from_numpy(image)[None])[0], torch.from_numpy(expected), worst=1e-5)
    exact = torch.rand(1, 3, 299, 299)
    assert torch.equal(evaluate._resized(exact), exact)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file like the published one, of numbers that are the same wherever they are made: each matters, and activations neither
    vanish nor grow."""
    numbers = np.random.RandomState(5).standard_normal(99991).astype(np.float32)
    state = Inception().state_dict()
    for name, value in state.items():
        if value.ndim:
            spread = math.sqrt(2 / value[0].numel()) if value.ndim == 4 else 0.1
            centre = 1 if name.endswith(("bn.weight", "running_var")) else 0
            state[name] = torch.from_numpy(np.resize(np.roll(numbers, -7 * len(name)), value.shape)) * spread + centre
    path = tmp_path_factory.mktemp("inception") / evaluate.WEIGHTS_NAME
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def inception(random_weights):
    return load_inception(random_weights)


def test_inception_as_recorded(inception):
    """What torch-fidelity 0.4.0 makes of the same weights and images."""
    features, logits = inception(torch.from_numpy(pictures(2)).permute(0, 3, 1, 2))
    some = torch.tensor(
        [
            [0.1410603, 0.6958303, 0.002543537, 0, 1.501899, 5.607289, 0.008923792, 1.838059],
            [0.1357781, 0.7721227, 0.003395257, 0, 1.639182, 5.512931, 0.002469513, 1.845286],
        ]
    )
    assert_close(features[:, 128::256], some, worst=1e-3)
    some = torch.tensor(
        [
            [-14.98566, 8.561503, -4.428015, -7.347475, 7.103853, 0.3213253, 9.993549, -12.04301],
            [-14.42377, 7.848545, -3.817356, -7.394899, 7.446958, 0.6072063, 9.336602, -13.10064],
        ]
    )
    assert_close(logits[:, 63::126], some, worst=1e-3)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)


def test_inception_on_a_folder(tmp_path, random_weights, inception):
    """Of two images the covariance is d d^T / 2, with their difference d: one eigenvalue."""
    images = pictures(2)
    save(tmp_path, images)
    rng = np.random.RandomState(1)
    mean, variances = rng.standard_normal(2048), rng.random(2048)
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=np.diag(variances))
    found = evaluate_folder(tmp_path, tmp_path / "stats.npz", random_weights, progress=False)

    assert not inception.training and not any(p.requires_grad for p in inception.parameters())
    first, second = inception(torch.from_numpy(images).permute(0, 3, 1, 2))[0].double().numpy()
    d = first - second
    distance = (((first + second) / 2 - mean) ** 2).sum() + d @ d / 2 + variances.sum() - 2 * math.sqrt(d @ (variances * d) / 2)
    assert found["fid"] == pytest.approx(distance, rel=1e-5)


def test_weights_without_counters_load(tmp_path, random_weights):
    """Files of before batch norm counted its training steps have no such entries."""
    state = {name: value for name, value in torch.load(random_weights).items() if "num_batches_tracked" not in name}
    assert len(state) == 94 * 5 + 2
    torch.save(state, tmp_path / "weights.pth")
    assert torch.equal(load_inception(tmp_path / "weights.pth").fc.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("Mixed_5b.branch1x1.conv.weight"), r"missing 1 \(Mixed_5b\.branch1x1\.conv\.weight\)"),
        (lambda state: state.update({"AuxLogits": torch.zeros(1)}), r"unexpected 1 \(AuxLogits\)"),
        (lambda state: state.update({"fc.bias": torch.zeros(1000)}), r"fc\.bias: expected shape \[1008\], got \[1000\]"),
    ],
)
def test_wrong_weights(tmp_path, random_weights, change, message):
    state = torch.load(random_weights)
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights: .*weights\.pth: .*{message}"):
        load_inception(tmp_path / "weights.pth")


class Planted:
    def __reduce__(self):
        return print, ("this ran",)


def test_weights_that_are_none(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"weights\.pth: cannot be read"):
        load_inception(path)
    torch.save({"fc.weight": Planted()}, path)
    with pytest.raises(ValueError, match=r"weights\.pth: cannot be read"):
        load_inception(path)
    assert "this ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"weights: .*nowhere"):
        load_inception(tmp_path / "nowhere.pth")


def test_no_weights_given_means_those_downloaded_before(tmp_path, random_weights, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=evaluate.WEIGHTS_NAME):
        load_inception(None)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / evaluate.WEIGHTS_NAME).symlink_to(random_weights)
    assert torch.equal(load_inception(None).fc.weight, torch.load(random_weights)["fc.weight"])
