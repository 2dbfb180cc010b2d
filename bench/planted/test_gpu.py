"""For the dry run of gpu_first.py, in the place of the tests that need a GPU: with DISA_FAST_PLANTED some that do not end well."""

import os
import signal
import time

import pytest

pytestmark = pytest.mark.gpu
PLANTED = os.environ.get("DISA_FAST_PLANTED", "").split()


def test_passes():
    pass


def test_fails():
    left, right = 1, 1 + ("failing-test" in PLANTED)
    assert left == right, "planted"


def test_hangs():
    if "hanging-test" in PLANTED:
        time.sleep(1000)


def test_dies():
    if "dying-test" in PLANTED:
        os.kill(os.getpid(), signal.SIGSEGV)
