"""Published sizes, by name, and what sizes may be."""

from __future__ import annotations

from collections.abc import Mapping

from ..checks import MOST, check_choice


def preset(sizes: Mapping[str, Mapping[str, int]], size: str | None) -> dict[str, int]:
    """Constructor arguments of a published size, whose encoder and decoder are alike; none for None. ValueError if unknown."""
    if size is None:
        return {}
    check_choice("size", size, list(sizes))
    arguments = dict(sizes[size])
    for name in ("embed_dim", "depth", "num_heads"):
        arguments |= {f"{part}_{name}": arguments[name] for part in ("encoder", "decoder")}
        del arguments[name]
    return arguments


def check_backbone(img_size: int, vae_stride: int, patch_size: int, mlp_ratio: float, dims: tuple[int, ...]) -> None:
    """ValueError for images without a token, and where blocks of `dims` channels would have no hidden units."""
    if img_size < vae_stride * patch_size:
        raise ValueError(f"img_size: expected at least vae_stride * patch_size = {vae_stride * patch_size}, got {img_size}")
    if not 1.5 <= min(dims) * mlp_ratio or not max(dims) * mlp_ratio <= MOST:
        raise ValueError(f"mlp_ratio: expected one that leaves 1 to {MOST} hidden units of {dims} channels, got {mlp_ratio:g}")
