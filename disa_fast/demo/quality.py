"""How good generated Fashion-MNIST images are: class accuracy under a small classifier, and a Frechet distance in its features.

The distance is torchmetrics' FID with our classifier in place of Inception; its numbers compare with each other, not with FIDs on
other data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import load_checkpoint
from .data import CLASSES

CLASSIFIER_FILE = Path(__file__).parent / "weights" / "classifier_fashion_mnist.safetensors"
FEATURES = 16
_MOST_FOLDS = 20
_FEWEST_IMAGES = 40
_MOST_UNEVEN = 1.25  # times as many of one class as of another


class Classifier(nn.Module):
    """[N, 1, 28, 28] in [-1, 1] -> [N, 16] features; `logits` makes [N, 10] of them. Carries the feature statistics of the 10000
    real test images, as the sums that torchmetrics keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.features = nn.Linear(64 * 7 * 7, FEATURES)
        self.drop = nn.Dropout(0.4)
        self.logits = nn.Linear(FEATURES, 10)
        self.register_buffer("real_sum", torch.zeros(FEATURES, dtype=torch.float64))
        self.register_buffer("real_cov_sum", torch.zeros(FEATURES, FEATURES, dtype=torch.float64))
        self.register_buffer("real_count", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.features(self.drop(self.convolutions(images).flatten(1))))

    @classmethod
    def load(cls, path: Path = CLASSIFIER_FILE) -> Classifier:
        classifier = cls()
        load_checkpoint(classifier, path)
        return classifier.eval()


@dataclass(frozen=True)
class Quality:
    """accuracy: share of images that the classifier puts in the class asked for, with a 95 % Wilson interval.
    frechet: distance to the real test images, corrected for the number of images, with a 95 % interval; both from a jackknife
    over up to 20 groups of images. Near 0 for other real images."""

    accuracy: float
    accuracy_interval: tuple[float, float]
    frechet: float
    frechet_interval: tuple[float, float]


@torch.no_grad()
def measure(images: Tensor, labels: Tensor, classifier: Classifier) -> Quality:
    """images: [N, 1, 28, 28] in [-1, 1]; labels: [N], the classes asked for, of which a distance can be taken.

    Raises ValueError where `no_distance` has a reason.
    """
    reason = no_distance(labels.tolist())
    if reason is not None:
        raise ValueError(f"images: expected {reason}")
    folds = min(_MOST_FOLDS, len(labels) // len(CLASSES))
    features = torch.cat([classifier(part) for part in images.clamp(-1, 1).split(500)])
    correct = classifier.logits(features).argmax(dim=1) == labels
    accuracy = float(correct.double().mean())

    # The plain estimate grows as 1/N on fewer images; the jackknife takes that term off, and gives the spread.
    # Every group holds all classes alike: leaving out a whole class would not be a smaller sample but another one.
    group = torch.empty(len(features), dtype=torch.int64)
    group[labels.argsort(stable=True)] = torch.arange(len(features)) % folds
    without = torch.tensor([frechet_distance(features[group != g], classifier) for g in range(folds)])
    distance = folds * frechet_distance(features, classifier) - (folds - 1) * float(without.mean())
    half_width = 1.96 * math.sqrt((folds - 1) / folds * float((without - without.mean()).square().sum()))
    return Quality(accuracy, wilson(accuracy, len(images)), distance, (distance - half_width, distance + half_width))


def no_distance(labels: Sequence[int]) -> str | None:
    """Why images of these classes are not to be compared with the real ones, if so: what would have to be, and what is.

    The real ones are of all ten classes alike. Images of some, however good, are far from all of them.
    """
    counts = Counter(labels)
    if len(labels) < _FEWEST_IMAGES:
        return f"at least {_FEWEST_IMAGES} images, got {len(labels)}"
    if len(counts) < len(CLASSES):
        there = ", ".join(name for label, name in enumerate(CLASSES) if label in counts)
        return f"images of all {len(CLASSES)} classes, as the real ones are, got {len(counts)} ({there})"
    if max(counts.values()) > _MOST_UNEVEN * min(counts.values()):
        return f"as many images of each class, as the real ones are, got {min(counts.values())} to {max(counts.values())}"
    return None


@torch.no_grad()
def measure_accuracy(images: Tensor, labels: Tensor, classifier: Classifier) -> tuple[float, tuple[float, float]]:
    """The accuracy alone and its interval, as in `measure`, for any number of images of any classes."""
    features = torch.cat([classifier(part) for part in images.clamp(-1, 1).split(500)])
    accuracy = float((classifier.logits(features).argmax(dim=1) == labels).double().mean())
    return accuracy, wilson(accuracy, len(images))


def fid_class() -> type:
    """torchmetrics' FID; ModuleNotFoundError says how to get it."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo's Frechet distance needs torchmetrics: pip install 'disa-fast[demo]'") from error
    return FrechetInceptionDistance


def frechet_distance(features: Tensor, classifier: Classifier) -> float:
    """Frechet distance between normals fitted to `features`, [N, 16], and to the real test images' features."""
    extractor = nn.Identity()
    extractor.num_features = FEATURES
    metric = fid_class()(feature=extractor, input_img_size=(FEATURES,)).set_dtype(torch.float64)
    metric.real_features_sum = classifier.real_sum.clone()
    metric.real_features_cov_sum = classifier.real_cov_sum.clone()
    metric.real_features_num_samples = classifier.real_count.clone()
    metric.update(features.double(), real=False)
    return float(metric.compute())


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share of `count` trials."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale
