"""Counter-based noise: every number is a function of a seed, a stream, a step and a channel, and of nothing else.

Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), then Box-Muller. Anything that follows
the layout given at `Philox` draws the same numbers: a backend may do so inside its loop, instead of reading them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_dtype, check_generator, describe, is_dense, is_whole, usable_device, whole
from .untraced import untraced

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85  # of the golden ratio and of the square root of 3
LOW = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: the four output words of every counter under one key of two words.

    counter: four int64 tensors of values below 2**32, of shapes that broadcast. Returns four of the like, broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(MULTIPLIERS[0], c0), _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & LOW, (k1 + KEY_INCREMENTS[1]) & LOW
    return c0, c1, c2, c3


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words. By halves of the second, since int64 has no room for 64 bits unsigned."""
    low = multiplier * (word & 0xFFFF)
    middle = multiplier * (word >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def box_muller(words: Sequence[Tensor]) -> Tensor:
    """Standard normal numbers of four 32-bit words r0..r3, int64: [*shape of a word, 4] float64.

    u1 = ((r0 >> 8) + 1) * 2**-24 and u2 = (r1 >> 8) * 2**-24 give sqrt(-2 ln u1) * (cos(2 pi u2), sin(2 pi u2)), the first two; r2
    and r3 likewise the others. So none is beyond sqrt(48 ln 2) = 5.77.
    """
    radius, angle = torch.stack([words[0], words[2]], -1) >> 8, torch.stack([words[1], words[3]], -1) >> 8
    radius = ((radius + 1).double() * 2**-24).log().mul(-2).sqrt()
    angle = angle.double() * (2 * math.pi * 2**-24)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)


@dataclass(frozen=True, eq=False)
class Philox:
    """Noise for trajectories of which each has a stream of its own, whatever other trajectories share the call.

    seed: 0 <= seed < 2**64.
    streams: [trajectories] int64, the number of each trajectory's stream, such as its token's number in all images; None is
        0, 1, 2, ... Trajectories of one stream draw the same.

    The layout, in words of 32 bits: the counter is (step, channel // 4, stream's low word, stream's high word), the key (seed's low
    word, seed's high word). Step 0 is the starting state, step i + 1 the noise of row i of a table. The output words of a counter
    give channels 4 * (channel // 4) + 0, 1, 2, 3 by `box_muller`. ValueError for values that do not fit.
    """

    seed: int
    streams: Tensor | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.seed) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected a whole number of at least 0 and below 2**64, got {self.seed!r}")
        streams = self.streams
        if streams is not None and not (
            is_dense(streams) and streams.ndim == 1 and streams.dtype == torch.int64 and not streams.is_meta
        ):
            raise ValueError(f"streams: expected a [trajectories] tensor of torch.int64 or None, got {describe(streams)}")

    @classmethod
    @untraced
    def drawn(cls, generator: torch.Generator | None = None) -> Philox:
        """With a seed of 63 bits: one draw from `generator`, on its device, or from torch's global generator of the CPU."""
        check_generator(generator)
        device = torch.device("cpu") if generator is None else generator.device
        return cls(int(torch.randint(2**63 - 1, (), generator=generator, device=device)))

    @property
    def key(self) -> tuple[int, int]:
        """The seed's low and high word."""
        return int(self.seed) & LOW, int(self.seed) >> 32

    @untraced
    def streams_of(self, trajectories: int, device: torch.device | str) -> Tensor:
        """[trajectories] int64 on `device`: the stream of each. ValueError if as many were not given."""
        if self.streams is None:
            return torch.arange(trajectories, device=device)
        if len(self.streams) != trajectories:
            raise ValueError(f"streams: expected [{trajectories}], one for each trajectory, got {list(self.streams.shape)}")
        return self.streams.to(device)

    @untraced
    def normal(
        self,
        steps: Sequence[int],
        trajectories: int,
        channels: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal noise, [len(steps), trajectories, channels] in `dtype`.

        steps: a range or whole numbers, 0 <= step < 2**32. Computed in float64 and rounded once, so devices differ in a last bit
        at most. ValueError for other steps, or another number of streams.
        """
        try:
            odd = [step for step in steps if not is_whole(step) or not 0 <= step <= LOW]
        except TypeError:
            odd = [steps]
        if odd:
            raise ValueError(f"steps: expected whole numbers of at least 0 and below 2**32, got {odd[0]!r}")
        trajectories, channels = whole("trajectories", trajectories, least=0), whole("channels", channels, least=0)
        check_dtype(dtype)
        device = usable_device("device", device)
        step = torch.tensor([int(step) for step in steps], dtype=torch.int64, device=device)[:, None, None]
        stream = self.streams_of(trajectories, device)[:, None]
        quads = torch.arange((channels + 3) // 4, device=device)
        words = philox4x32((step, quads, stream & LOW, (stream >> 32) & LOW), self.key)
        return box_muller(words).flatten(-2)[..., :channels].to(dtype)


def check_rng(rng: str | Philox) -> None:
    """ValueError unless "torch", "philox" or a Philox."""
    if not isinstance(rng, Philox) and not (isinstance(rng, str) and rng in ("torch", "philox")):
        raise ValueError(f"rng: expected 'torch', 'philox' or a disa_fast.Philox, got {rng!r}")
