"""What MAR and Harmon have in common: the autoregressive loop over masked tokens, whose backbone conditions the diffusion head."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from .. import profiling
from ..checks import check_choice, check_flag, check_generator, describe, is_dense, is_whole
from ..heads.mlp import Draw, MLPHead, checked, draw_noise
from ..philox import Philox, check_rng
from ..schedule import Schedule, as_schedule, steps_at
from ..solvers import Solver, StepTable, resolve
from ..untraced import untraced
from ..watch import TokenWatch, warn_of_temperature


def still_masked_after(k: int, num_iter: int, tokens: int, masked: int) -> int:
    """What iteration k leaves of `masked` tokens: the cosine schedule of MaskGIT. One fewer at least, and one until the last."""
    return max(1, min(masked - 1, math.floor(tokens * math.cos(math.pi / 2 * (k + 1) / num_iter))))


@untraced
def masked_by(orders: Tensor, count: int) -> Tensor:
    """[B, tokens] bool: the first `count` tokens of each order."""
    masked = torch.zeros(orders.shape, dtype=torch.bool, device=orders.device)
    return masked.scatter_(1, orders[:, :count], True)


@untraced
def random_orders(batch: int, tokens: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """[batch, tokens] int64: a random generation order for each image."""
    check_generator(generator)
    source = None if generator is None else generator.device
    return torch.rand(batch, tokens, generator=generator, device=source).argsort(dim=1).to(device)


@untraced
def check_orders(orders: object, batch: int, tokens: int, device: torch.device) -> None:
    """ValueError for what is not [batch, tokens] on `device`, each row a permutation."""
    if not is_dense(orders) or orders.dtype != torch.int64:
        raise ValueError(f"orders: expected a [{batch}, {tokens}] tensor of torch.int64 or None, got {describe(orders)}")
    if orders.device != device:
        raise ValueError(f"orders: expected it on {device}, where the model is, got {orders.device}")
    every = torch.arange(tokens, device=device).expand(batch, -1)
    if tuple(orders.shape) != (batch, tokens) or not torch.equal(orders.sort(dim=1).values, every):
        raise ValueError(f"orders: expected [{batch}, {tokens}], each row a permutation of the tokens")


@untraced(recursive=False)
def sample_masked(
    condition: Callable[[Tensor, Tensor], Tensor],
    head: MLPHead,
    batch: int,
    tokens: int,
    channels: int,
    schedule: Schedule | str,
    num_iter: int,
    cfg: float,
    cfg_schedule: str,
    temperature: float,
    generator: torch.Generator | None,
    orders: Tensor | None,
    draw: Draw | None,
    progress: bool,
    backend: str,
    solver: str | Solver,
    clip: int | str | None,
    rng: str | Philox,
) -> Tensor:
    """[batch, tokens, channels]: all tokens of `batch` images, iteration k's in T(k) denoising steps. Arguments as in
    MAR.sample_tokens.

    condition(known, masked) -> [rows, tokens, z_channels] is the backbone on [rows, tokens, channels], zero where masked, and
    [rows, tokens] bool; with guidance, rows are the images twice, conditional half first. It is all that torch.compile traces here.
    """
    schedule, table_for = as_schedule(schedule), resolve(solver, clip)
    check_choice("cfg_schedule", cfg_schedule, ("linear", "constant"))
    check_flag("progress", progress)
    if not is_whole(num_iter) or not 1 <= num_iter <= tokens:
        raise ValueError(f"num_iter: expected 1 to {tokens} iterations (one token each at least), got {num_iter!r}")
    check_rng(rng)
    if draw is not None:
        if rng != "torch":
            raise ValueError(f"draw: expected None beside rng = {rng!r}, got {draw!r}")
        draw = checked(draw)
    dtype, device = head.dtype, head.device
    if orders is None:
        orders = random_orders(batch, tokens, generator, device)
    else:
        check_orders(orders, batch, tokens, device)
    philox = Philox.drawn(generator) if rng == "philox" else rng if isinstance(rng, Philox) else None
    if philox is not None:
        streams = philox.streams_of(batch, device)[:, None] * tokens + torch.arange(tokens, device=device)

    warn_of_temperature(table_for(steps_at(schedule, 0, num_iter)), temperature)
    head.follow()
    watch, guided = TokenWatch(), cfg != 1.0
    known = torch.zeros(batch, tokens, channels, dtype=dtype, device=device)
    masked, count = masked_by(orders, tokens), tokens
    halves = 2 if guided else 1
    for k in tqdm(range(num_iter), desc="AR iterations", disable=not progress):
        left = still_masked_after(k, num_iter, tokens, count)
        last, table = k == num_iter - 1, table_for(steps_at(schedule, k, num_iter))
        rows = batch * halves * (count if last else count - left)
        with profiling.range(profiling.AR_STEP, k, num_iter, len(table), rows):
            z = condition(torch.cat([known] * halves), torch.cat([masked] * halves))
            still_masked = masked_by(orders, left)
            chosen = masked if last else masked & ~still_masked
            scale = 1 + (cfg - 1) * (tokens - left) / tokens if cfg_schedule == "linear" else cfg

            z = z[torch.cat([chosen] * halves)]
            source = {"generator": generator} if philox is None else {"rng": Philox(philox.seed, streams[chosen])}
            x = _denoise(head, z, table, guided, scale, temperature, draw, backend, source)
            watch.add(k, num_iter, x)
            known[chosen] = (x.chunk(2)[0] if guided else x).to(dtype)
            masked, count = still_masked, left
    watch.warn()
    return known


@untraced
def _denoise(
    head: MLPHead,
    z: Tensor,
    table: StepTable,
    guided: bool,
    cfg: float,
    temperature: float,
    draw: Draw | None,
    backend: str,
    source: dict[str, torch.Generator | None] | dict[str, Philox],
) -> Tensor:
    """MLPHead.denoise with the noise that `draw` makes, or else with that of `source`."""
    noise = step_noise = None
    if draw is not None:
        dtype = torch.promote_types(head.dtype, torch.float32)
        drawn = draw_noise(table, len(z), head.spec.in_channels, guided, draw, draw, dtype)
        noise, step_noise = (None if tensor is None else tensor.to(z.device) for tensor in drawn)
    return head.denoise(z, table, cfg, temperature, noise=noise, step_noise=step_noise, backend=backend, **source)
