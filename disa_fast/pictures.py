"""Tensors as pictures: PNG files, and panels of many images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import written_aside

_TITLE_HEIGHT, _NAME_HEIGHT, _LINE_HEIGHT = 26, 18, 13


def to_pixels(image: Tensor) -> np.ndarray:
    """[1 or 3, H, W] in [-1, 1] -> [H, W] or [H, W, 3] uint8."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


def save_png(image: Image.Image, path: Path) -> None:
    with written_aside(path) as aside:
        image.save(aside, format="PNG")


def read_png(path: Path) -> Tensor:
    """[1 or 3, H, W] in [-1, 1]: the inverse of `to_pixels`, from a file."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image))
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)) / 127.5 - 1


def columns_of(names: Sequence[str], most: int = 10) -> list[str]:
    """Column names for images whose kinds come in turn: whole rounds of the kinds, or unnamed columns if there are too many."""
    return list(names) * (most // len(names)) if len(names) <= most else [""] * most


def panel(images: Tensor, columns: Sequence[str], title: str = "", scale: int = 2) -> Image.Image:
    """[N, 1 or 3, H, W] row by row, as many columns as names; the title and the names above, if there are any."""
    height, width = (side * scale + 2 for side in images.shape[-2:])
    rows = -(-len(images) // len(columns))
    font = ImageFont.load_default(11)
    names = [_wrapped(name, width - 2, font) for name in columns]
    lines = max(name.count("\n") for name in names) + 1
    names_at = _TITLE_HEIGHT if title else 0
    top = names_at + (_NAME_HEIGHT + _LINE_HEIGHT * (lines - 1) if any(columns) else 0)
    canvas = Image.new("L" if images.shape[1] == 1 else "RGB", (width * len(columns), top + height * rows), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((2, 2), title, fill="black", font=ImageFont.load_default(17))
    for column, name in enumerate(names):
        pen.text((column * width + 2, names_at + 1), name, fill="dimgray", font=font, spacing=_LINE_HEIGHT - 11)
    for i, image in enumerate(images):
        tile = Image.fromarray(to_pixels(image)).resize((width - 2, height - 2), Image.Resampling.NEAREST)
        canvas.paste(tile, (i % len(columns) * width, top + i // len(columns) * height))
    return canvas


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """`text` in lines of at most `width` pixels, where words allow."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def side_by_side(panels: Sequence[Image.Image], gap: int = 24) -> Image.Image:
    """Panels in a row, on white."""
    width = sum(p.width for p in panels) + gap * (len(panels) - 1)
    canvas = Image.new(panels[0].mode, (width, max(p.height for p in panels)), "white")
    x = 0
    for p in panels:
        canvas.paste(p, (x, 0))
        x += p.width + gap
    return canvas
