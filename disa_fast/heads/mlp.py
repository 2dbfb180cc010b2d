"""The MLP diffusion head of MAR and Harmon: parameters, reference forward, hoists, and `denoise`.

For a row with state x, condition z and time t (arXiv 2406.11838, section 3.2; MAR_DiSA/models/diffloss.py of the DiSA
repository at 283fa59):

    y = time_embed(t) + cond_embed(z);  h = input_proj(x)
    for each block:  shift, scale, gate = W_mod silu(y) + b_mod
                     h += gate * (W2 silu(W1 (LN(h)*(1+scale) + shift) + b1) + b2)
    eps, v = W_out (norm(h)*(1+scale) + shift) + b_out

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, graphs, ops, profiling
from ..checks import MOST, check_dtype, check_flag, check_generator, check_shapes, describe, is_dense, is_whole, scalar, whole
from ..errors import UnsupportedError
from ..onednn import packed_linear
from ..philox import Philox, check_rng
from ..schedule import Schedule, as_schedule, steps_at
from ..solvers import DEFAULT_CLIP, Solver, StepTable, resolve
from ..untraced import untraced
from .packing import Packing, holding, parameters_of, read_here, settle, state_of

FREQUENCIES = 256
LN_EPS = 1e-6
TIME_TABLES_KEPT = 256

Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class MLPSpec:
    """Sizes of a head; out_channels is 2 * in_channels (noise prediction, then variance channels)."""

    loop: ClassVar[str] = "denoise"  # the function of a backend that runs it

    in_channels: int
    width: int
    depth: int
    z_channels: int

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels

    @property
    def modulation_width(self) -> int:
        """Shift, scale and gate of every block, then shift and scale of the final layer."""
        return (3 * self.depth + 2) * self.width

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape, in the order of the published state dicts."""
        w = self.width
        linears: dict[str, tuple[int, ...]] = {
            "time_embed.mlp.0": (w, FREQUENCIES),
            "time_embed.mlp.2": (w, w),
            "cond_embed": (w, self.z_channels),
            "input_proj": (w, self.in_channels),
        }
        for i in range(self.depth):
            block = f"res_blocks.{i}."
            linears |= {block + "in_ln": (w,), block + "mlp.0": (w, w), block + "mlp.2": (w, w)}
            linears[block + "adaLN_modulation.1"] = (3 * w, w)
        linears |= {"final_layer.linear": (self.out_channels, w), "final_layer.adaLN_modulation.1": (2 * w, w)}
        return {
            f"{name}.{kind}": shape if kind == "weight" else shape[:1]
            for name, shape in linears.items()
            for kind in ("weight", "bias")
        }

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], where: str) -> MLPSpec:
        """The spec of parameters with these shapes. ValueError if they are not a head: what is missing, extra or odd."""
        anchors = ("input_proj.weight", "cond_embed.weight")
        missing = [name for name in anchors if len(shapes.get(name, ())) != 2]
        if missing:
            raise ValueError(
                f"{where}: expected the parameters of a MAR diffusion head (input_proj.weight, cond_embed.weight, "
                f"res_blocks.0.mlp.0.weight, ...); {', '.join(missing)} not among the {len(shapes)} given"
            )
        width, in_channels = shapes["input_proj.weight"]
        blocks = {name.split(".")[1] for name in shapes if name.startswith("res_blocks.")}
        spec = cls(in_channels, width, len(blocks), shapes["cond_embed.weight"][1])
        check_shapes(spec.shapes(), shapes, where)
        return spec


def _rates() -> Tensor:
    """exp(-log(10000) i/128), [128] float32: the exponent in float32, the result correctly rounded.

    float32 exp differs between CPUs and GPUs in its last bit, and 950 * rate makes that visible in float64. So the table is made
    once, in float64, the same everywhere; the exp of the recorded implementation is one unit high in three places.
    """
    half = FREQUENCIES // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
    rates = exponent.double().exp().float()
    one_high = [13, 44, 119]
    rates[one_high] = torch.nextafter(rates[one_high], torch.tensor(torch.inf))
    return rates


_RATES = _rates()


@functools.cache
def _rates_on(device: torch.device) -> Tensor:
    return _RATES.to(device)


def frequencies(t: Tensor) -> Tensor:
    """cos and sin features of time, [T] -> [T, 256] float32. Always float32, as the published heads compute them."""
    rates = _RATES.to(t.device) if torch.compiler.is_compiling() else _rates_on(t.device)
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embed_time(p: Mapping[str, Tensor], t: Tensor) -> Tensor:
    """time_embed: [T] -> [T, width] in the parameters' dtype."""
    features = frequencies(t).to(p["time_embed.mlp.0.weight"].dtype)
    hidden = F.silu(F.linear(features, p["time_embed.mlp.0.weight"], p["time_embed.mlp.0.bias"]))
    return F.linear(hidden, p["time_embed.mlp.2.weight"], p["time_embed.mlp.2.bias"])


def forward_ref(p: Mapping[str, Tensor], x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """The network, as the formula above reads. x: [rows, in_channels], t: [rows], z: [rows, z_channels]; all in one dtype
    but t. Returns [rows, 2 * in_channels]: eps, then v."""
    y = F.silu(embed_time(p, t) + F.linear(z, p["cond_embed.weight"], p["cond_embed.bias"]))
    h = F.linear(x, p["input_proj.weight"], p["input_proj.bias"])
    width = h.shape[-1]
    depth = sum(name.endswith("in_ln.weight") for name in p)
    for block in (f"res_blocks.{i}." for i in range(depth)):
        modulation = F.linear(y, p[block + "adaLN_modulation.1.weight"], p[block + "adaLN_modulation.1.bias"])
        shift, scale, gate = modulation.chunk(3, dim=-1)
        m = F.layer_norm(h, (width,), p[block + "in_ln.weight"], p[block + "in_ln.bias"], LN_EPS) * (1 + scale) + shift
        m = F.silu(F.linear(m, p[block + "mlp.0.weight"], p[block + "mlp.0.bias"]))
        h = h + gate * F.linear(m, p[block + "mlp.2.weight"], p[block + "mlp.2.bias"])
    modulation = F.linear(y, p["final_layer.adaLN_modulation.1.weight"], p["final_layer.adaLN_modulation.1.bias"])
    shift, scale = modulation.chunk(2, dim=-1)
    m = F.layer_norm(h, (width,), eps=LN_EPS) * (1 + scale) + shift
    return F.linear(m, p["final_layer.linear.weight"], p["final_layer.linear.bias"])


class MLPNet(nn.Module):
    """The head as a trainable module with the published parameter names and initialisation: everything that gates the
    residual stream starts at zero."""

    def __init__(self, spec: MLPSpec) -> None:
        super().__init__()
        w = spec.width
        self.spec = spec
        self.time_embed = nn.Module()
        self.time_embed.mlp = nn.Sequential(nn.Linear(FREQUENCIES, w), nn.SiLU(), nn.Linear(w, w))
        self.cond_embed = nn.Linear(spec.z_channels, w)
        self.input_proj = nn.Linear(spec.in_channels, w)
        self.res_blocks = nn.ModuleList(self._block(w) for _ in range(spec.depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(w, spec.out_channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(w, 2 * w))
        self.initialize()

    @staticmethod
    def _block(w: int) -> nn.Module:
        block = nn.Module()
        block.in_ln = nn.LayerNorm(w, eps=LN_EPS)
        block.mlp = nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w))
        block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(w, 3 * w))
        return block

    def initialize(self) -> None:
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name.startswith("time_embed"):
                nn.init.normal_(module.weight, std=0.02)
            elif "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return forward_ref(dict(self.named_parameters()), x, t, c)


def folded_modulation(p: Mapping[str, Tensor], spec: MLPSpec) -> tuple[Tensor, Tensor]:
    """All adaLN projections as one linear of silu(y): weight [(3*depth+2)*width, width] and bias.

    Its parts are shift, scale, gate of every block, then shift, scale of the final layer. Block LN's affine (g, beta) and the 1 of
    (1 + scale) are folded into it: LN(h)*(1+scale) + shift = norm(h)*[g(1+scale)] + [beta(1+scale) + shift], and both brackets
    are affine in silu(y) (H4).
    """
    weights, biases = [], []
    for block in (f"res_blocks.{i}." for i in range(spec.depth)):
        g, beta = p[block + "in_ln.weight"], p[block + "in_ln.bias"]
        shift_w, scale_w, gate_w = p[block + "adaLN_modulation.1.weight"].chunk(3)
        shift_b, scale_b, gate_b = p[block + "adaLN_modulation.1.bias"].chunk(3)
        weights += [shift_w + beta[:, None] * scale_w, g[:, None] * scale_w, gate_w]
        biases += [shift_b + beta * (1 + scale_b), g * (1 + scale_b), gate_b]
    shift_b, scale_b = p["final_layer.adaLN_modulation.1.bias"].chunk(2)
    weights.append(p["final_layer.adaLN_modulation.1.weight"])
    biases += [shift_b, 1 + scale_b]
    return torch.cat(weights), torch.cat(biases)


class TimeTables:
    """time_embed of every step of a table, [T, width]: embed(t), t [T] float64 on `device`; kept for the grids used last (H1)."""

    def __init__(self, embed: Callable[[Tensor], Tensor], device: torch.device) -> None:
        def make(t: bytes) -> Tensor:  # no method, which would hold this object, and the weights, in a cycle
            made = embed(torch.tensor(np.frombuffer(t), device=device))
            settle(device)
            return made

        self._of_grid = functools.lru_cache(TIME_TABLES_KEPT)(make)
        self.cache_info = self._of_grid.cache_info

    def __call__(self, table: StepTable) -> Tensor:
        return read_here(self._of_grid(table.t.tobytes()))


class HoistedWeights:
    """A head's parameters laid out for the hoisted loop, in one dtype.

    All adaLN projections become one matrix, since none depends on x (H3); see folded_modulation.
    """

    eps = LN_EPS

    def __init__(self, p: Mapping[str, Tensor], spec: MLPSpec) -> None:
        self.spec = spec
        self.cond = p["cond_embed.weight"], p["cond_embed.bias"]
        self.input = p["input_proj.weight"], p["input_proj.bias"]
        self.output = p["final_layer.linear.weight"], p["final_layer.linear.bias"]
        self.blocks = [
            tuple(packed_linear(p[f"res_blocks.{i}.mlp.{layer}.weight"], p[f"res_blocks.{i}.mlp.{layer}.bias"]) for layer in (0, 2))
            for i in range(spec.depth)
        ]
        self.modulation = packed_linear(*folded_modulation(p, spec))
        self.time_table = TimeTables(functools.partial(embed_time, p), self.cond[0].device)


class MLPHead(Packing):
    """A diffusion head ready to draw tokens. See Packing for how it follows its parameters. Safe to call from several threads."""

    spec: MLPSpec

    @classmethod
    def from_module(cls, net: nn.Module) -> MLPHead:
        """The head of any module with MAR's parameter names (its own forward is not used). ValueError if they differ."""
        shapes = {name: tuple(p.shape) for name, p in parameters_of(net).items()}
        return cls(net, MLPSpec.of(shapes, f"net ({type(net).__name__})"))

    @classmethod
    def from_state_dict(cls, sd: Mapping[str, Tensor], prefix: str = "") -> MLPHead:
        """The head of a state dict, or of the part of one whose keys start with `prefix` ("diffloss.net." in a whole MAR).

        The tensors are shared, not copied. ValueError names missing, unexpected and misshapen parameters.
        """
        sd = state_of(sd, prefix)
        spec = MLPSpec.of({name: tuple(t.shape) for name, t in sd.items()}, where="state dict")
        return cls(holding(sd, MLPNet, spec), spec)

    # Weights ---------------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        super()._reset()
        self._number = ops.register(self)

    def check_structure(self) -> None:
        """Raise UnsupportedError if the module is not of this head's sizes any more."""
        where = f"net ({type(self._net).__name__})"
        try:
            shapes = {name: tuple(p.shape) for name, p in parameters_of(self._net).items()}
            spec = MLPSpec.of(shapes, where)
        except ValueError as error:
            raise UnsupportedError(f"{error}; it was {self.spec} when the head was made of it") from error
        if spec != self.spec:
            raise UnsupportedError(f"{where}: expected {self.spec}, as when the head was made of it, got {spec}")

    def network(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The reference forward (x, t, z) -> [rows, 2 * in_channels] over the parameters in `dtype`."""
        return self.packed("network", dtype, lambda parameters, spec: functools.partial(forward_ref, parameters))

    def hoisted(self, dtype: torch.dtype) -> HoistedWeights:
        return self.packed("hoisted", dtype, HoistedWeights)

    # Sampling --------------------------------------------------------------------------------------------------------

    @untraced
    def warmup(
        self,
        schedule: Schedule | str,
        K: int,
        rows: int | Iterable[int] | Callable[[int, int], int],
        guided: bool = True,
        solver: str | Solver = "ddpm",
        clip: int | str | None = DEFAULT_CLIP,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        batch_invariant: bool = False,
    ) -> None:
        """Do ahead what the first calls of a generation would do: lay out weights, compile kernels, capture CUDA graphs.

        schedule: T(k), a callable (k, K) -> int or its text form, over K autoregressive steps.
        rows: of z in the calls to come, guidance included: one number, several (all taken with every T), or a callable
            (k, K) -> rows.
        guided: whether the calls will have cfg != 1. The rest as in `denoise`, solver and clip as in disa_fast.solvers.resolve.

        Captures the largest first, so that all graphs share one block of memory; `disa_fast.explain` prints what there is. Draws
        no random numbers. On backends without graphs one short call is all there is to do. Raises as `denoise` does.
        """
        schedule, table_for, K = as_schedule(schedule), resolve(solver, clip), whole("K", K)
        try:
            fixed = None if callable(rows) else [rows] if is_whole(rows) else list(rows)
        except TypeError:
            raise ValueError(f"rows: expected a whole number, several, or a callable (k, K) -> rows, got {rows!r}") from None
        wanted = [(k, number) for k in range(K) for number in ([rows(k, K)] if fixed is None else fixed)]
        check_flag("guided", guided)
        for _, number in wanted:
            if not is_whole(number) or not 1 <= number <= MOST:
                raise ValueError(f"rows: expected whole numbers of at least 1, got {number!r}")
            if guided and number % 2:
                raise ValueError(f"rows: guidance expects even numbers, conditional half first, got {number!r}")
        shapes = {(steps_at(schedule, k, K), graphs.row_bucket(number)) for k, number in wanted}
        largest_first = sorted(shapes, key=lambda shape: (shape[1], shape[0]), reverse=True)
        device, dtype = self.device, self.dtype if dtype is None else dtype
        check_dtype(dtype)
        chosen = {backends.choose(backend, self.spec, dtype, device, number, batch_invariant) for _, number in largest_first}
        if not any(backends.BACKENDS[name].captures() for name in chosen):
            largest_first = largest_first[-1:]
        for steps, number in largest_first:
            table, trajectories = table_for(steps), number // 2 if guided else number
            z = torch.zeros(number, self.spec.z_channels, dtype=dtype, device=device)
            noise = torch.zeros(trajectories, self.spec.in_channels, device=device)
            step_noise = noise.expand(len(table), -1, -1) if table.draws else None
            cfg = 2.0 if guided else 1.0
            self.denoise(
                z, table, cfg, noise=noise, step_noise=step_noise, backend=backend, dtype=dtype, batch_invariant=batch_invariant
            )

    @torch.no_grad()
    def denoise(
        self,
        z: Tensor,
        table: StepTable,
        cfg: float | Tensor = 1.0,
        temperature: float | Tensor = 1.0,
        noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        batch_invariant: bool = False,
        rng: str | Philox = "torch",
    ) -> Tensor:
        """Draw one token for each row of conditions: the whole denoising loop.

        z: [rows, z_channels], floating point. With cfg != 1 the first half is conditional, the second half unconditional,
            pairwise, and both walk one trajectory.
        table: a solver's StepTable, T steps.
        cfg: guidance scale, float or one-element tensor; 1 is no guidance. eps = eps_u + cfg * (eps_c - eps_u).
        temperature: factor on the step noise, float or one-element tensor.
        noise: [rows, in_channels] starting state; with guidance [rows/2, ...], or [rows, ...] of which the first half counts.
        step_noise: [T, rows or rows/2, in_channels], in the order of the steps, where the solver is noisy.
        generator: draws whatever of the two is not given, in the order and shapes of the published implementation, so that
            one seed gives one result; torch's global generator if None. `rng` may say otherwise.
        backend: "auto", or a backend's name (`disa_fast.explain` lists them).
        dtype: of the network's arithmetic; the parameters' own if None. torch.autocast is not consulted.
        batch_invariant: a row's result is bitwise the same whatever other rows share the call. `cpu` and `cuda` always are,
            `triton` up to 16 rows, and beyond by giving up the tiles and library products for many rows; the others cannot be.
        rng: where noise that is not given comes from. "torch": from `generator`, as above. A disa_fast.Philox: from its seed and
            streams, step 0 the start and step i + 1 the noise of row i; `generator` must then be None. "philox": from a Philox
            of streams 0, 1, 2, ... whose seed is one draw from `generator`, or from torch's global generator of the CPU. One seed
            does not give the published implementation's tokens then. In return a trajectory's noise depends neither on the
            rows beside it nor on the number of steps, and `cuda` makes the steps' inside its loop, without a tensor of it.

        Returns [rows, in_channels], float64 if dtype is, else float32 (the state is kept in it). With guidance the second half
        is a copy of the first. Raises ValueError for shapes, dtypes, devices or values that do not fit, UnsupportedError
        for a backend that cannot serve the call.
        """
        if torch.compiler.is_compiling() and generator is None and isinstance(rng, str) and rng == "torch":
            return self._denoise_compiled(z, table, cfg, temperature, noise, step_noise, backend, dtype, batch_invariant)
        return self._denoise(z, table, cfg, temperature, noise, step_noise, generator, backend, dtype, batch_invariant, rng)

    @untraced
    def _denoise(
        self,
        z: Tensor,
        table: StepTable,
        cfg: float | Tensor,
        temperature: float | Tensor,
        noise: Tensor | None,
        step_noise: Tensor | None,
        generator: torch.Generator | None,
        backend: str,
        dtype: torch.dtype | None,
        batch_invariant: bool,
        rng: str | Philox,
    ) -> Tensor:
        dtype = self.dtype if dtype is None else dtype
        cfg, temperature = scalar("cfg", cfg), scalar("temperature", temperature)
        self._check(z, table, cfg, temperature, dtype)
        check_rng(rng)
        if isinstance(rng, Philox) and generator is not None:
            raise ValueError(f"generator: expected None beside rng = {rng!r}, which has its seed, got {generator!r}")
        backend = backends.choose(backend, self.spec, dtype, z.device, len(z), batch_invariant)
        with profiling.range(profiling.DENOISE, len(table), len(z), backend):
            chosen = backends.BACKENDS[backend]
            state_dtype, channels = torch.promote_types(dtype, torch.float32), self.spec.in_channels
            guided = cfg != 1.0
            trajectories = len(z) // 2 if guided else len(z)

            philox = None
            if rng == "torch":
                draws = draws_of(generator, z.device)
                noise, step_noise = draw_noise(table, len(z), channels, guided, *draws, state_dtype, noise, step_noise)
            elif noise is None or (step_noise is None and table.draws):
                philox = rng if isinstance(rng, Philox) else Philox.drawn(generator)
                numbers = functools.partial(
                    philox.normal, trajectories=trajectories, channels=channels, dtype=state_dtype, device=z.device
                )
                noise = numbers(range(1))[0] if noise is None else noise
                if step_noise is None and table.draws and not chosen.draws():
                    step_noise = numbers(range(1, len(table) + 1))
            noise, step_noise = (
                _trajectory_rows(name, tensor, z, trajectories, lead, channels, state_dtype)
                for name, tensor, lead in (("noise", noise, ()), ("step_noise", step_noise, (len(table),)))
            )
            noise_of_steps = philox if step_noise is None and table.draws else step_noise
            with without_autocast(z.device.type):
                x = chosen.denoise(self, z.to(dtype), table, cfg, temperature, noise, noise_of_steps, batch_invariant)
            return torch.cat([x, x]) if guided else x

    def _denoise_compiled(
        self,
        z: Tensor,
        table: StepTable,
        cfg: float | Tensor,
        temperature: float | Tensor,
        noise: Tensor | None,
        step_noise: Tensor | None,
        backend: str,
        dtype: torch.dtype | None,
        batch_invariant: bool,
    ) -> Tensor:
        """What torch.compile traces: the operators of ops.py. Arguments are checked when they run."""
        parameters = list(parameters_of(self._net).values())
        columns = [torch.from_numpy(c) for c in (table.t, table.a, table.b, table.c, table.l0, table.l1, table.noisy)]
        cfg, temperature = (
            value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64) for value in (cfg, temperature)
        )
        state = torch.promote_types(parameters[0].dtype if dtype is None else dtype, torch.float32)
        rows, steps, channels = z.shape[0], len(columns[0]), self.spec.in_channels
        draw_start, draw_steps = noise is None, step_noise is None and table.draws
        new = functools.partial(torch.empty, dtype=state, device=z.device)
        if draw_start or draw_steps:
            drawn = new(rows if draw_start else 0, channels), new(steps if draw_steps else 0, rows, channels)
            ops.draw_noise(*drawn, cfg)
            noise, step_noise = drawn[0] if draw_start else noise, drawn[1] if draw_steps else step_noise
        return ops.mlp_denoise(
            parameters, z, columns, cfg, temperature, noise, step_noise, self._number, backend, dtype, batch_invariant
        )

    def _check(self, z: Tensor, table: StepTable, cfg: float, temperature: float, dtype: torch.dtype) -> None:
        if not is_dense(z) or z.ndim != 2 or z.shape[1] != self.spec.z_channels:
            raise ValueError(f"z: expected a [rows, {self.spec.z_channels}] tensor, got {describe(z)}")
        if not z.is_floating_point():
            raise ValueError(f"z: expected a floating point tensor, got {describe(z)}")
        if z.device != self.device:
            raise ValueError(f"z: expected it on {self.device}, where the head's parameters are, got {describe(z)}")
        if not isinstance(table, StepTable):
            raise ValueError(f"table: expected a StepTable such as disa_fast.solvers.ddpm(50), got {table!r}")
        if table.output == "velocity":
            raise ValueError(
                "table: expected one of a diffusion solver (solvers.ddpm, ddim, dpm_solver), whose network predicts noise, "
                f"got {table!r}"
            )
        check_dtype(dtype)
        if cfg != 1.0 and len(z) % 2:
            raise ValueError(f"z: guidance (cfg = {cfg:g}) expects an even number of rows, conditional half first, got {len(z)}")
        if temperature < 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature:g}")


def draws_of(generator: torch.Generator | None, device: torch.device) -> tuple[Draw, Draw]:
    """What draws the start and what draws the steps' noise for a model on `device`, as upstream does: the start with the CPU's
    generator, also for a model on a GPU, the rest where the model is; or all with the generator given."""

    check_generator(generator)
    return (TorchDraw(torch.device("cpu"), device, generator), TorchDraw(device, device, generator))


def without_autocast(device_type: str) -> AbstractContextManager:
    """torch.autocast off, for which nothing is done where it is or there is none."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


class TorchDraw:
    """torch.randn with `generator`, or with the global one of `source` if None, brought to `device`."""

    def __init__(self, source: torch.device, device: torch.device, generator: torch.Generator | None) -> None:
        self.source = source if generator is None else generator.device
        self.device, self.generator = device, generator

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.source, generator=self.generator).to(self.device)

    def several(self, shapes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """[number, *shape]: what as many calls would draw, one after the other, without a copy of each."""
        drawn = torch.empty(shapes, dtype=dtype, device=self.source)
        for each in drawn.unbind():
            each.normal_(generator=self.generator)
        return drawn.to(self.device)


def checked(draw: Draw) -> Draw:
    """`draw`, a user's; ValueError where it is no callable, and for what it makes that is not as asked for."""
    if not callable(draw):
        raise ValueError(f"draw: expected a callable (shape, dtype) -> Tensor, got {draw!r}")

    def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        noise = draw(shape, dtype)
        if not is_dense(noise) or tuple(noise.shape) != tuple(shape) or not noise.is_floating_point():
            raise ValueError(f"draw: expected it to make {list(shape)} of {dtype}, got {describe(noise)}")
        return noise

    return drawn


def draw_noise(
    table: StepTable,
    rows: int,
    channels: int,
    guided: bool,
    draw_start: Draw,
    draw_step: Draw,
    dtype: torch.dtype,
    noise: Tensor | None = None,
    step_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(noise, step_noise) for `MLPHead.denoise`, what is None drawn as the published samplers draw it.

    First the start, [rows, channels], or [rows/2, channels] under guidance; then [rows, channels] at every step, under guidance
    too, and at steps that add none of it. step_noise stays None for a table that does not draw. dtype is that of the state, which
    is the network's only from its first output on: start and first step are drawn in float32 in any case.
    """
    if noise is None:
        noise = draw_start((rows // 2 if guided else rows, channels), torch.float32)
    if step_noise is None and table.draws:
        if isinstance(draw_step, TorchDraw) and dtype == torch.float32:
            return noise, draw_step.several((len(table), rows, channels), dtype)
        dtypes = [torch.float32] + [dtype] * (len(table) - 1)
        step_noise = torch.stack([draw_step((rows, channels), each).to(dtype) for each in dtypes])
    return noise, step_noise


def _trajectory_rows(
    name: str, tensor: Tensor | None, z: Tensor, trajectories: int, lead: tuple[int, ...], channels: int, dtype: torch.dtype
) -> Tensor | None:
    """`tensor` checked against [*lead, rows or trajectories, channels] and cut to [*lead, trajectories, channels]."""
    if tensor is None:
        return None
    allowed = {(*lead, rows, channels) for rows in (trajectories, len(z))}
    shapes = " or ".join(str(list(shape)) for shape in sorted(allowed))
    if not is_dense(tensor) or tuple(tensor.shape) not in allowed or not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating point {shapes} tensor, got {describe(tensor)}")
    if tensor.device != z.device:
        raise ValueError(f"{name}: expected it on {z.device}, where z is, got {describe(tensor)}")
    return tensor.narrow(-2, 0, trajectories).to(dtype)
