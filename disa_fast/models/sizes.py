"""Published sizes, by name."""

from __future__ import annotations

from collections.abc import Mapping


def preset(sizes: Mapping[str, Mapping[str, int]], size: str | None) -> dict[str, int]:
    """Constructor arguments of a published size, whose encoder and decoder are alike; none for None. ValueError if unknown."""
    if size is None:
        return {}
    if size not in sizes:
        raise ValueError(f"size: expected one of {list(sizes)}, got {size!r}")
    arguments = dict(sizes[size])
    for name in ("embed_dim", "depth", "num_heads"):
        arguments |= {f"{part}_{name}": arguments[name] for part in ("encoder", "decoder")}
        del arguments[name]
    return arguments
