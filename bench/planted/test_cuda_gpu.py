"""For the dry run of gpu_first.py, in the place of the tests that need a GPU."""

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("value", [1, 2, 3])
def test_passes(value):
    assert value


def test_is_skipped():
    pytest.skip("for a reason")
