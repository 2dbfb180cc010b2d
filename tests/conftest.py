"""Every test starts from one seed; tests marked `gpu`, `native` or `interpreter` are skipped, with the reason, where there is no
such thing. Where there is no GPU, Triton kernels run in Triton's interpreter, which has to be known before they are imported."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from disa_fast import backends, profiling

if backends.triton.is_interpreted():
    import interpreted

    interpreted.repair()

try:
    import hypothesis
except ModuleNotFoundError:  # then test_fuzz.py is skipped
    pass
else:
    hypothesis.configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "hypothesis"))
    same = hypothesis.settings(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    hypothesis.settings.register_profile("quick", same, max_examples=500, derandomize=True)
    hypothesis.settings.register_profile("fuzz", same, max_examples=10_000, print_blob=True)  # examples of all tests together
    hypothesis.settings.load_profile("quick")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class FakeNvtx:
    """Remembers the ranges it was asked for."""

    def __init__(self) -> None:
        self.ranges: list[str] = []

    def annotate(self, message: str, domain: str) -> AbstractContextManager:
        assert domain == "disa_fast"
        self.ranges.append(message)
        return nullcontext()


@pytest.fixture
def nvtx(monkeypatch) -> FakeNvtx:
    fake = FakeNvtx()
    monkeypatch.setattr(profiling, "_nvtx", fake)
    return fake


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Products of small models gain nothing by a second thread, and lose much where another program has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rows_seen(monkeypatch) -> list[int]:
    """How many rows a transformer block of `hoisted` was given, an entry for each block and evaluation."""
    seen, qkv = [], backends.hoisted.HoistedOps.qkv

    def counted(self, m, *rest):
        seen.append(len(m))
        return qkv(self, m, *rest)

    monkeypatch.setattr(backends.hoisted.HoistedOps, "qkv", counted)
    return seen


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs an NVIDIA GPU; torch sees none"
    if not backends.cpu.is_built():
        missing["native"] = "needs the native core, which this installation lacks; disa_fast.explain tells why"
    if not backends.triton.is_interpreted():
        missing["interpreter"] = "needs Triton, in its interpreter: TRITON_INTERPRET=1, as is set here where there is no GPU"
    for item in items:
        if "interpreter" in item.keywords:  # NumPy says so where a GPU goes on silently
            item.add_marker(pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"))
        for marker, reason in missing.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
