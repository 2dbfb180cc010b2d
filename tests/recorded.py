"""The recorded cases of the published implementation; tests/golden/README.md says what they are."""

import itertools
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
FULL = Path(os.environ.get("DISA_FAST_GOLDEN", HERE.parent.parent / "shared" / "golden"))
# The slim set always; the full set where it is.
GOLDEN = {"slim": HERE / "golden"} | ({"full": FULL} if (FULL / "mar_head.npz").is_file() else {})

# On what the recorded cases are run.
BACKENDS_AND_DTYPES = [
    *itertools.product(["reference", "hoisted"], [torch.float32, torch.float64]),
    pytest.param("cpu", torch.float32, marks=pytest.mark.native),
]


class Golden:
    """One recorded .npz: `meta`, arrays as tensors by key, the state dict."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            self.meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
            self.arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.arrays[key]

    def get(self, key: str) -> torch.Tensor | None:
        return self.arrays.get(key)

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return {key[3:]: value.to(dtype) for key, value in self.arrays.items() if key.startswith("sd/")}


@cache
def golden(which: str, stem: str) -> Golden:
    return Golden(GOLDEN[which] / f"{stem}.npz")


@cache
def golden_json(which: str, stem: str) -> dict:
    return json.loads((GOLDEN[which] / f"{stem}.json").read_text())


def golden_cases(*stems: str, kind: str = "cases") -> list:
    """pytest parameters (which, stem, case) over every recorded case there is."""
    return [
        pytest.param(which, stem, case, id=f"{which}-{stem}-{case['name']}")
        for which in GOLDEN
        for stem in stems
        for case in golden(which, stem).meta.get(kind, [])
    ]
