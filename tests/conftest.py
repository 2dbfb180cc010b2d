"""Every test starts from one seed; tests marked `gpu` or `native` are skipped, with the reason, where there is no such thing."""

import pytest
import torch

from disa_fast import backends


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs an NVIDIA GPU; torch sees none"
    if not backends.cpu.is_built():
        missing["native"] = "needs the native core, which this installation lacks; disa_fast.explain tells why"
    for item in items:
        for marker, reason in missing.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
