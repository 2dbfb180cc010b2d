"""What another thread does in the middle of a capture."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

SECONDS = 20  # that either thread waits for the other, at most


@contextlib.contextmanager
def done_while_capturing(action: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """A part of a loop that, while it is captured, waits until another thread has done `action`."""
    capturing, done = threading.Event(), threading.Event()

    def act() -> None:
        capturing.wait(SECONDS)
        action()
        done.set()

    def within() -> None:
        if torch.cuda.is_current_stream_capturing():
            capturing.set()
            done.wait(SECONDS)

    other = threading.Thread(target=act)
    other.start()
    try:
        yield within
    finally:
        other.join()
