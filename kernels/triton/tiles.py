"""How much of each product one program owns: what was tuned on a GPU (tuned.json, by bench/tune_triton.py), else a heuristic.

Nothing is tuned at a user's call. Up to FEW rows there is one choice for all numbers of rows, so that a row's bits do not
depend on the rows beside it.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

FEW = 16
ROW_CLASSES = (FEW, 64, 256, 1024, 1 << 30)  # each up to so many rows
TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Tile:
    """m rows, n columns, k of the sum at a time; warps a program, stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """first, second: the two products of a block. step: m rows and k of each part of final_layer, m trajectories and n columns
    of sampler_step. modulation: that product, and cond_embed; None: the library's. fused: adaln_linear instead of adaln and
    linear. pdl: programmatic dependent launch. prefetch: with it, a program's weights on their way to level 2 while it waits."""

    first: Tile
    second: Tile
    step: Tile
    modulation: Tile | None
    fused: bool
    pdl: bool = False
    prefetch: bool = False

    @classmethod
    def from_dict(cls, fields: dict) -> "Tiles":
        return cls(**{name: Tile(**value) if isinstance(value, dict) else value for name, value in fields.items()})

    as_dict = asdict


_HALF = {
    FEW: Tiles(Tile(16, 16, 256, 8, 3), Tile(16, 16, 256, 4, 4), Tile(16, 64, 128, 8, 1), Tile(64, 128, 64, 4, 3), fused=True),
    64: Tiles(Tile(32, 32, 64, 4, 4), Tile(32, 32, 128, 4, 4), Tile(16, 64, 128, 8, 1), None, fused=True),
    256: Tiles(Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(16, 64, 128, 8, 1), None, fused=False),
    1024: Tiles(Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 8, 4), Tile(16, 256, 128, 8, 1), None, fused=False),
    1 << 30: Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(16, 256, 128, 8, 1), None, fused=False),
}
_FLOAT32 = {
    FEW: Tiles(Tile(16, 16, 128, 8, 3), Tile(16, 16, 64, 8, 3), Tile(16, 64, 64, 8, 1), Tile(64, 64, 32, 4, 3), fused=True),
    64: Tiles(Tile(32, 32, 32, 4, 3), Tile(32, 32, 32, 4, 3), Tile(16, 64, 64, 8, 1), None, fused=True),
    256: Tiles(Tile(64, 32, 16, 4, 3), Tile(64, 32, 32, 4, 3), Tile(16, 64, 64, 8, 1), None, fused=False),
    1024: Tiles(Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(32, 128, 128, 8, 1), None, fused=False),
    1 << 30: Tiles(Tile(128, 64, 16, 8, 2), Tile(128, 64, 16, 8, 3), Tile(32, 128, 128, 8, 1), None, fused=False),
}
HEURISTIC = {"float32": _FLOAT32, "bfloat16": _HALF, "float16": _HALF}  # by dtype, by row class


@functools.cache
def tuned() -> dict:
    """By GPU, dtype, width and row class, as text."""
    return json.loads(TUNED.read_text())


def row_class(rows: int) -> int:
    return next(limit for limit in ROW_CLASSES if rows <= limit)


@functools.lru_cache(4096)
def choose(gpu: str, dtype: str, width: int, rows: int) -> Tiles:
    """For `rows` rows of a head of this width on this GPU; dtype "float32", "bfloat16" or "float16"."""
    found = tuned().get(gpu, {}).get(dtype, {}).get(str(width), {}).get(str(row_class(rows)))
    return Tiles.from_dict(found) if found else HEURISTIC[dtype][row_class(rows)]
