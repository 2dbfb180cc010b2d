"""FID and Inception Score of a folder of images, made as the published numbers are: with the Inception-v3 of 2015-12-05, converted
from TensorFlow for torch-fidelity, against the statistics that MAR's authors took from ADM's reference for ImageNet.

The network stands here, since torch-fidelity needs a torchvision of the same build as PyTorch: without one it cannot be imported,
nor, once it is installed, can torchmetrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import read_state_dict
from .checks import check_shapes

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
PUBLISHED_IMAGES = 50000
_NOT_SAMPLES = ("grid.png", "demo.png")
_SPLITS = 10
_SIDE = 299


def evaluate_folder(
    folder: Path,
    stats: Path | None,
    weights: Path | None,
    batch: int = 50,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, int | float | str | None]:
    """What torch_fidelity.calculate_metrics(folder, fid_statistics_file=stats, isc=True, fid=True) makes of the folder's images.

    Images are all *.png but grid.png, demo.png and hidden ones, in the order of their names, as 8-bit RGB: grey is repeated, a
    palette looked up, transparency dropped. `stats`: see `reference_statistics`. `weights`: see `load_inception`.

    Returns num_images; fid, None without `stats`; inception_score_mean and inception_score_std over ten splits, None for fewer than
    ten images; warning, a text where there are fewer images than published numbers are made of, else None.

    Raises ValueError for fewer than two images, for one that is damaged or of another size than the first, naming it, and for
    files that are not what they should be; FileNotFoundError for what is not there.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    paths = image_paths(folder)
    network = load_inception(weights).to(device)
    reference = None if stats is None else reference_statistics(stats, network.fc.in_features)
    features, logits = _features(network, paths, batch, device, progress)
    mean, deviation = inception_score(logits) if len(paths) >= _SPLITS else (None, None)
    few = f"{len(paths)} images: published numbers are of {PUBLISHED_IMAGES} and do not compare, FID is higher with fewer images"
    return {
        "num_images": len(paths),
        "fid": None if reference is None else frechet_distance(features, *reference),
        "inception_score_mean": mean,
        "inception_score_std": deviation,
        "warning": few if len(paths) < PUBLISHED_IMAGES else None,
    }


def image_paths(folder: Path) -> list[Path]:
    """The images to evaluate, see `evaluate_folder`. ValueError for fewer than two, FileNotFoundError for no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.glob("*.png") if path.name not in _NOT_SAMPLES and not path.name.startswith("."))
    if len(paths) < 2:
        raise ValueError(f"folder: expected at least 2 images (*.png) in {folder}, got {len(paths)}")
    return paths


def load_inception(weights: Path | None) -> Inception:
    """With the weights of a file that torch-fidelity publishes as weights-inception-2015-12-05-6726825d.pth; None: the copy that it
    has downloaded before, if there is one. Nothing is downloaded here. ValueError names keys and shapes that are not the network's.
    """
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"weights: {path}: no such file; expected {WEIGHTS_NAME}, which torch-fidelity publishes")
    network = Inception()
    own, given = (  # counters of training steps are in some files and not in others
        {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
        for state in (network.state_dict(), read_state_dict(path))
    )
    check_shapes(*({name: value.shape for name, value in state.items()} for state in (own, given)), f"weights: {path}")
    network.load_state_dict(given, strict=False)
    return network.eval().requires_grad_(False)


def reference_statistics(path: Path, size: int = 2048) -> tuple[Tensor, Tensor]:
    """(mean [size], covariance [size, size]) in float64 of an .npz with `mu` and `sigma`, such as MAR's adm_in256_stats.npz; other
    arrays in it, as in ADM's own file, are left alone. ValueError for what is missing, misshapen or not finite."""
    if not path.is_file():
        raise FileNotFoundError(f"stats: {path}: no such file")
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            found = {name: arrays[name].astype(np.float64) for name in ("mu", "sigma") if name in arrays}
    except Exception as error:  # zip, header and data each have their own ways to be damaged
        raise ValueError(f"stats: {path}: cannot be read as .npz: {type(error).__name__}: {error}") from error
    for name, shape in (("mu", (size,)), ("sigma", (size, size))):
        if name not in found:
            raise ValueError(f"stats: {path}: expected arrays mu and sigma, got none called {name}")
        if found[name].shape != shape:
            raise ValueError(f"stats: {path}: {name}: expected shape {list(shape)}, got {list(found[name].shape)}")
        if not np.isfinite(found[name]).all():
            raise ValueError(f"stats: {path}: {name}: expected finite values")
    return torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"])


def frechet_distance(features: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """|m - mean|^2 + tr(C + covariance - 2 (C covariance)^(1/2)) in float64; m, C: mean and covariance of `features`, [N, D].

    With C = R^T R the root's trace is that of (R covariance R^T)^(1/2), which is symmetric: its eigenvalues are real and exact to
    rounding also where C is singular. (Heusel et al., arXiv 1706.08500, equation 6.)
    """
    features = features.double()
    m = features.mean(dim=0)
    r = torch.linalg.qr(features - m, mode="r").R / math.sqrt(len(features) - 1)
    eigenvalues = torch.linalg.eigvalsh(r @ covariance @ r.T).clamp(min=0)
    return float((m - mean).square().sum() + r.square().sum() + covariance.trace() - 2 * eigenvalues.sqrt().sum())


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, over ten splits, of exp(mean over x of KL(p(y|x) || p(y))), in float64.

    logits: [N, classes], N at least 10. Images go to splits in the order that torch-fidelity shuffles them into. (Salimans et al.,
    arXiv 1606.03498, section 4.)
    """
    order = np.random.RandomState(2020).permutation(len(logits))
    scores = []
    for start, stop in pairwise(i * len(logits) // _SPLITS for i in range(_SPLITS + 1)):
        log_p = logits[order[start:stop]].double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - math.log(stop - start)
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


class Inception(nn.Sequential):
    """Inception-v3 as it is in the graph file of 2015-12-05: [N, 3, H, W] uint8 -> ([N, 2048] features, [N, 1008] logits).

    Average pooling leaves out the padding, and the last block's pooling is max. Logits are without their bias, as the Inception
    Score takes them. (Szegedy et al., arXiv 1512.00567; names are the file's.)
    """

    fc: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        for name, layer in {
            "Conv2d_1a_3x3": _Convolution(3, 32, (3, 3), stride=2, padded=False),
            "Conv2d_2a_3x3": _Convolution(32, 32, (3, 3), padded=False),
            "Conv2d_2b_3x3": _Convolution(32, 64, (3, 3)),
            "MaxPool_1": nn.MaxPool2d(3, stride=2),
            "Conv2d_3b_1x1": _Convolution(64, 80, (1, 1)),
            "Conv2d_4a_3x3": _Convolution(80, 192, (3, 3), padded=False),
            "MaxPool_2": nn.MaxPool2d(3, stride=2),
            "Mixed_5b": _block_35(192, pooled=32),
            "Mixed_5c": _block_35(256, pooled=64),
            "Mixed_5d": _block_35(288, pooled=64),
            "Mixed_6a": _block_35_to_17(),
            "Mixed_6b": _block_17(width=128),
            "Mixed_6c": _block_17(width=160),
            "Mixed_6d": _block_17(width=160),
            "Mixed_6e": _block_17(width=192),
            "Mixed_7a": _block_17_to_8(),
            "Mixed_7b": _block_8(1280, _mean),
            "Mixed_7c": _block_8(2048, _max),
            "fc": nn.Linear(2048, 1008),
        }.items():
            self.add_module(name, layer)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (_resized(images.float()) - 128) / 128
        *layers, _ = self
        for layer in layers:
            x = layer(x)
        features = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return features, features @ self.fc.weight.T


def _resized(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 299, 299], bilinear as TensorFlow 1 has it: pixel i is taken at i * H / 299, pixels being points."""
    for _ in range(2):  # along the width, then along the height
        side = images.shape[-1]
        at = torch.arange(_SIDE, device=images.device) * torch.tensor(side / _SIDE)
        left = at.long()
        low, high = images[..., left], images[..., (left + 1).clamp(max=side - 1)]
        images = (low + (high - low) * (at - left)).mT
    return images


class _Convolution(nn.Module):
    """Convolution, batch norm, ReLU; `padded`: to the size that it gets."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...], stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        padding = tuple(side // 2 if padded else 0 for side in kernel)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Chains of convolutions side by side, and beside them the input pooled, where `pooled` channels are made of it, or all kept.

    A convolution is (name, channels, kernel height, kernel width); one that begins two chains is computed once. Under `halving` the
    last of each chain has stride 2, without padding.
    """

    def __init__(
        self,
        inputs: int,
        chains: list[list[tuple[str, int, int, int]]],
        pool: Callable[[Tensor], Tensor],
        pooled: int | None = None,
        halving: bool = False,
    ) -> None:
        super().__init__()
        self.chains, self.pool = [[name for name, *_ in chain] for chain in chains], pool
        for chain in chains:
            channels = inputs
            for name, outputs, *kernel in chain:
                halved = halving and name == chain[-1][0]
                self.add_module(name, _Convolution(channels, outputs, tuple(kernel), 2 if halved else 1, padded=not halved))
                channels = outputs
        self.branch_pool = nn.Identity() if pooled is None else _Convolution(inputs, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        made: dict[str, Tensor] = {}
        outputs = []
        for chain in self.chains:
            y = x
            for name in chain:
                if name not in made:
                    made[name] = self.get_submodule(name)(y)
                y = made[name]
            outputs.append(y)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


_mean = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halving_max = partial(F.max_pool2d, kernel_size=3, stride=2)
_DOUBLE_3X3 = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3)]


def _block_35(inputs: int, pooled: int) -> _Block:
    single = [("branch1x1", 64, 1, 1)]
    five = [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5)]
    return _Block(inputs, [single, five, _DOUBLE_3X3], _mean, pooled)


def _block_35_to_17() -> _Block:
    return _Block(288, [[("branch3x3", 384, 3, 3)], _DOUBLE_3X3], _halving_max, halving=True)


def _block_17(width: int) -> _Block:
    single = [("branch1x1", 192, 1, 1)]
    seven = [("branch7x7_1", width, 1, 1), ("branch7x7_2", width, 1, 7), ("branch7x7_3", 192, 7, 1)]
    double = [("branch7x7dbl_1", width, 1, 1), ("branch7x7dbl_2", width, 7, 1), ("branch7x7dbl_3", width, 1, 7)]
    double += [("branch7x7dbl_4", width, 7, 1), ("branch7x7dbl_5", 192, 1, 7)]
    return _Block(768, [single, seven, double], _mean, pooled=192)


def _block_17_to_8() -> _Block:
    three = [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3)]
    seven = [("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, 1, 7), ("branch7x7x3_3", 192, 7, 1), ("branch7x7x3_4", 192, 3, 3)]
    return _Block(768, [three, seven], _halving_max, halving=True)


def _block_8(inputs: int, pool: Callable[[Tensor], Tensor]) -> _Block:
    three, double = [("branch3x3_1", 384, 1, 1)], [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 3)]
    chains = [
        [("branch1x1", 320, 1, 1)],
        [*three, ("branch3x3_2a", 384, 1, 3)],
        [*three, ("branch3x3_2b", 384, 3, 1)],
        [*double, ("branch3x3dbl_3a", 384, 1, 3)],
        [*double, ("branch3x3dbl_3b", 384, 3, 1)],
    ]
    return _Block(inputs, chains, pool, pooled=192)


@torch.inference_mode()
def _features(
    network: nn.Module, paths: list[Path], batch: int, device: torch.device | str, progress: bool
) -> tuple[Tensor, Tensor]:
    """(features [N, D], logits [N, classes]) of the images, float32 on the CPU."""
    made: list[tuple[Tensor, Tensor]] = []
    shape = None
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), desc="evaluating", unit="image", disable=not progress) as bar:
        for start in range(0, len(paths), batch):
            part = paths[start : start + batch]
            images = list(pool.map(_read, part))
            shape = shape or images[0].shape
            for path, image in zip(part, images, strict=True):
                if image.shape != shape:
                    size, first = ("x".join(map(str, pixels[1::-1])) for pixels in (image.shape, shape))
                    raise ValueError(f"{path}: expected {first} pixels, as {paths[0].name} has, got {size}")
            features, logits = network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device))
            if not (features.isfinite().all() and logits.isfinite().all()):
                raise ValueError("weights: expected finite features and logits, got nan or inf")
            made.append((features.cpu(), logits.cpu()))
            bar.update(len(part))
    features, logits = (torch.cat(parts) for parts in zip(*made, strict=True))
    return features, logits


def _read(path: Path) -> np.ndarray:
    """[H, W, 3] uint8."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # as many kinds as a file has parts to be damaged
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
