"""Taking turns on a CPU, so that whatever else the machine does meets all contestants alike."""

import statistics
import time
from collections.abc import Callable


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
