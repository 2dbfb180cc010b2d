"""Fashion-MNIST from Debian's package dataset-fashion-mnist. Only training and the reference statistics read it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIDE, PADDED_SIDE = 28, 32  # of a picture; of what models draw whose image is a power of two, with a margin
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def fashion_mnist(split: str, folder: Path = DEFAULT_FOLDER) -> tuple[Tensor, Tensor]:
    """(images, labels): [N, 1, 28, 28] float32 in [-1, 1] and [N] int64; split "train" (60000) or "t10k" (10000).

    Raises FileNotFoundError with the command that installs the data.
    """
    paths = [folder / f"{split}-{part}.gz" for part in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there; on Debian: apt-get install dataset-fashion-mnist")
    images, labels = (gzip.decompress(path.read_bytes()) for path in paths)
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    classes = np.frombuffer(labels, np.uint8, offset=8)
    return torch.from_numpy(pixels / np.float32(127.5) - 1), torch.from_numpy(classes.astype(np.int64))


def padded(images: Tensor, side: int) -> Tensor:
    """[N, 1, 28, 28] -> [N, 1, side, side] with a black margin all round."""
    margin = (side - images.shape[-1]) // 2
    return F.pad(images, [margin] * 4, value=-1.0)


def cropped(images: Tensor, side: int = SIDE) -> Tensor:
    """The inverse of padded: of images that a model drew, the pictures, which alone are shown and judged."""
    margin = (images.shape[-1] - side) // 2
    return images[..., margin : margin + side, margin : margin + side]
