"""What is measured: the published heads, and how many tokens an image draws at a time."""

from collections.abc import Iterator

from disa_fast import Linear
from disa_fast.models.masked_sampling import still_masked_after

SIZES = {"MAR-B": (1024, 6), "MAR-L": (1280, 8), "MAR-H": (1536, 12)}  # width, depth
Z_CHANNELS = 1024


def iterations(tokens: int = 256, count: int = 64) -> Iterator[tuple[int, int]]:
    """(tokens drawn, steps) of every AR iteration of one image in DiSA's setting, 50 steps down to 5."""
    schedule, masked = Linear(50, 5), tokens
    for k in range(count):
        left = still_masked_after(k, count, tokens, masked) if k < count - 1 else 0
        yield masked - left, schedule(k, count)
        masked = left
