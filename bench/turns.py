"""Taking turns on a CPU, so that whatever else the machine does meets all contestants alike."""

import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence

SIGNIFICANCE = 0.05


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def in_turns(fs: dict[str, Callable[[], object]], least: int = 3, budget: float = 5.0) -> dict[str, list[float]]:
    """Seconds of each, `least` times in turns at least, and as long as `budget` seconds are not over."""
    times: dict[str, list[float]] = {name: [] for name in fs}
    start = time.perf_counter()
    while time.perf_counter() - start < budget or len(times[next(iter(fs))]) < least:
        for name, f in fs.items():
            times[name].append(seconds(f))
    return times


def ratio(base: list[float], other: list[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile) of base / other, turn by turn; of a single turn, three times that."""
    each = [a / b for a, b in zip(base, other, strict=True)]
    return tuple(statistics.quantiles(each, n=4)) if len(each) > 1 else (each[0],) * 3


def pairs(
    base: Callable[[], object], other: Callable[[], object], count: int, slowed: float = 0.0
) -> tuple[list[tuple[float, float]], int]:
    """(seconds of base, seconds of other) of `count` turns that nothing interrupted, and how many were.

    Interrupted means that the scheduler gave a core of this process to another. Not more than four times `count` turns are taken;
    if then too few are left, all count. slowed: how much longer `other` is to take, as a share: a regression made on purpose.
    """
    found: list[tuple[float, float]] = []
    interrupted: list[tuple[float, float]] = []
    while len(found) < count and len(found) + len(interrupted) < 4 * count:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        pair = seconds(base), seconds(other if slowed == 0 else lambda: _spun(other, slowed))
        calm = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == before
        (found if calm else interrupted).append(pair)
    return (found if len(found) == count else found + interrupted), len(interrupted)


def _spun(f: Callable[[], object], share: float) -> None:
    until = seconds(f) * share + time.perf_counter()
    while time.perf_counter() < until:
        pass


def interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """(low, median, high): the median and its 95 % interval by order statistics, which assumes nothing of how samples scatter."""
    ordered, n = sorted(samples), len(samples)
    rank, outside = 0, 0.5**n  # of the binomial distribution of how many samples are below the true median
    while rank < n // 2 and outside + math.comb(n, rank + 1) * 0.5**n <= SIGNIFICANCE / 2:
        rank += 1
        outside += math.comb(n, rank) * 0.5**n
    return ordered[rank], statistics.median(ordered), ordered[n - 1 - rank]
