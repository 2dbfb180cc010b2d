"""FlowAR's flow head: a small adaLN transformer over all tokens of a scale that predicts their velocity.

For tokens x at time t, [rows, tokens, channels], under the backbone's condition z (arXiv 2412.15205, section 3.3;
FlowAR_DiSA/models/flowmodel.py of the DiSA repository at 283fa59):

    e = time_embed(trunc(1000 t)),  c = cond_embed(z),  h = input_proj(x)
    h = block(h)    for each block (disa_fast/transformer.py), modulated by W silu(e + c) + b; with cross-attention to z, the
                    attention's modulation comes from e alone
    v = W_out (rms(h) * (1 + scale) + shift) + b_out,    shift, scale = W silu(e + c) + b

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_dtype, check_shapes, describe, is_dense, scalar
from ..solvers import StepTable
from ..transformer import (
    GATED_MLP,
    PLAIN,
    Attention,
    BlockWeights,
    CrossAttention,
    GatedMlp,
    Layer,
    Modulation,
    Plain,
    RMSNorm,
    Rotary,
    Rotation,
    block,
    cross_keys_values,
    gated_width,
    grid_rotation,
    in_dtype,
    initialize_linears,
    plain,
)
from ..untraced import untraced
from .flow import Context, FlowHead, FlowWeights, Velocity, check_table, chunk_from, draw_flow_noise
from .mlp import FREQUENCIES, TimeTables, draws_of, embed_time
from .packing import holding, parameters_of, read_here, settle, state_of

HEAD_DIM = 64


@dataclass(frozen=True)
class FlowTransformerSpec:
    """Sizes of a head. cross: whether its blocks attend to the condition (FlowAR-L and -H)."""

    loop: ClassVar[str] = "integrate"  # the function of a backend that runs it

    in_channels: int
    width: int
    depth: int
    z_channels: int
    cross: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's and buffer's name and shape, as in the published state dicts."""
        w, z, hidden = self.width, self.z_channels, gated_width(self.width)
        biased: dict[str, tuple[int, ...]] = {
            "time_embed.mlp.0": (w, FREQUENCIES),
            "time_embed.mlp.2": (w, w),
            "cond_embed": (w, z),
            "input_proj": (w, self.in_channels),
        }
        others: dict[str, tuple[int, ...]] = {}
        for i in range(self.depth):
            block = f"res_blocks.{i}."
            others |= {block + "attn.qkv.weight": (3 * w, w), block + "attn.rope.freqs": (HEAD_DIM // 4,)}
            biased[block + "attn.proj"] = (w, w)
            biased |= {block + "mlp.fc1_g": (hidden, w), block + "mlp.fc1_x": (hidden, w), block + "mlp.fc2": (w, hidden)}
            if self.cross:
                others |= {block + "crossattn.q.weight": (w, w), block + "crossattn.kv.weight": (2 * w, z)}
                others |= {block + "crossattn.rope.freqs": (HEAD_DIM // 4,)}
                others |= {block + "norm2_1.weight": (w,), block + "norm2_2.weight": (z,)}
                biased[block + "crossattn.proj"] = (w, w)
                biased |= {block + "ada_lin_attn": (3 * w, w), block + "ada_lin_mlp": (3 * w, w)}
            else:
                biased[block + "ada_lin"] = (6 * w, w)
        biased |= {"final_layer.linear": (self.in_channels, w), "final_layer.adaLN_modulation.1": (2 * w, w)}
        for name, shape in biased.items():
            others |= {name + ".weight": shape, name + ".bias": shape[:1]}
        return others

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], where: str) -> FlowTransformerSpec:
        """The spec of parameters with these shapes. ValueError if they are not a head: what is missing, extra or odd."""
        anchors = ("input_proj.weight", "cond_embed.weight", "res_blocks.0.attn.qkv.weight")
        missing = [name for name in anchors if len(shapes.get(name, ())) != 2]
        if missing:
            raise ValueError(
                f"{where}: expected the parameters of a FlowAR flow head (input_proj.weight, cond_embed.weight, "
                f"res_blocks.0.attn.qkv.weight, ...); {', '.join(missing)} not among the {len(shapes)} given"
            )
        width, in_channels = shapes["input_proj.weight"]
        if width % HEAD_DIM:
            raise ValueError(f"{where}: input_proj.weight: expected a width that is a multiple of {HEAD_DIM}, got {width}")
        blocks = {name.split(".")[1] for name in shapes if name.startswith("res_blocks.")}
        cross = any(".crossattn." in name for name in shapes)
        spec = cls(in_channels, width, len(blocks), shapes["cond_embed.weight"][1], cross)
        check_shapes(spec.shapes(), shapes, where)
        return spec


def time_index(t: Tensor) -> Tensor:
    """What the networks of FlowAR and xAR are given for time t in [0, 1]: trunc(1000 t), the product in float32."""
    return (t.float() * 1000).long()


def embed_flow_time(p: Mapping[str, Tensor], t: Tensor) -> Tensor:
    return embed_time(p, time_index(t))


def forward_ref(p: Mapping[str, Tensor], x: Tensor, t: Tensor, z: Tensor, ops: Plain = PLAIN) -> Tensor:
    """The network, as the formula above reads. x: [rows, tokens, in_channels], t: [rows], z: [rows, tokens, z_channels]; all in
    one dtype but t. Returns the velocity, [rows, tokens, in_channels]."""
    e = embed_time(p, time_index(t))[:, None]
    c = ops.linear(z, (p["cond_embed.weight"], p["cond_embed.bias"]))
    stream = ops.residual(ops.linear(x, (p["input_proj.weight"], p["input_proj.bias"]))), None, None
    depth = sum(name.endswith("attn.qkv.weight") for name in p)
    rotation = grid_rotation(p["res_blocks.0.attn.rope.freqs"], side_of(x.shape[1]))
    for prefix in (f"res_blocks.{i}." for i in range(depth)):
        w = BlockWeights.of(p, prefix)
        cross = None if w.cross is None else cross_keys_values(ops, w, z, rotation)
        stream = block(ops, w, stream, modulation_of(p, prefix, e, c), rotation, cross=cross)
    shift, scale = adaln(p, "final_layer.adaLN_modulation.1", c + e).chunk(2, dim=-1)
    _, m = ops.residual_norm(stream, (scale, shift))
    return ops.linear(m, (p["final_layer.linear.weight"], p["final_layer.linear.bias"]))


def modulation_of(p: Mapping[str, Tensor], prefix: str, e: Tensor, c: Tensor) -> Modulation:
    """A block's modulation from the embeddings of time, [rows, 1, width], and condition, [rows, tokens, width]."""
    if prefix + "ada_lin.weight" in p:
        return Modulation.split(adaln(p, prefix + "ada_lin", e + c))
    gate1, scale1, shift1 = adaln(p, prefix + "ada_lin_attn", e).chunk(3, dim=-1)
    gate2, scale2, shift2 = adaln(p, prefix + "ada_lin_mlp", c + e).chunk(3, dim=-1)
    return Modulation(gate1, gate2, scale1, scale2, shift1, shift2)


def adaln(p: Mapping[str, Tensor], name: str, y: Tensor) -> Tensor:
    return F.linear(F.silu(y), p[name + ".weight"], p[name + ".bias"])


def side_of(tokens: int) -> int:
    """Of the square grid that so many tokens are. ValueError if they are none."""
    side = round(tokens**0.5)
    if not tokens or side * side != tokens:
        raise ValueError(f"z: expected the tokens of a square grid (1, 4, 9, 16, ...), got {tokens}")
    return side


class FlowTransformerNet(nn.Module):
    """The head as a trainable module with the published parameter names and initialisation: the output layer starts at zero."""

    def __init__(self, spec: FlowTransformerSpec) -> None:
        super().__init__()
        w = spec.width
        self.spec = spec
        self.time_embed = nn.Module()
        self.time_embed.mlp = nn.Sequential(nn.Linear(FREQUENCIES, w), nn.SiLU(), nn.Linear(w, w))
        self.cond_embed = nn.Linear(spec.z_channels, w)
        self.input_proj = nn.Linear(spec.in_channels, w)
        self.res_blocks = nn.ModuleList(self._block(spec) for _ in range(spec.depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(w, spec.in_channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(w, 2 * w))
        initialize_linears(self)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)

    @staticmethod
    def _block(spec: FlowTransformerSpec) -> nn.Module:
        w, block = spec.width, nn.Module()
        block.attn = Attention(w, Rotary(HEAD_DIM), qkv_bias=False)
        block.mlp = GatedMlp(w, gated_width(w))
        if spec.cross:
            block.crossattn = CrossAttention(w, spec.z_channels, Rotary(HEAD_DIM))
            block.norm2_1, block.norm2_2 = RMSNorm(w), RMSNorm(spec.z_channels)
            block.ada_lin_attn, block.ada_lin_mlp = nn.Linear(w, 3 * w), nn.Linear(w, 3 * w)
        else:
            block.ada_lin = nn.Linear(w, 6 * w)
        return block

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return forward_ref(dict(self.named_parameters()) | dict(self.named_buffers()), x, t, condition)


class FlowTransformerWeights(FlowWeights):
    def __init__(self, p: Mapping[str, Tensor], spec: FlowTransformerSpec, dtype: torch.dtype, ops: Plain) -> None:
        p = in_dtype(p, dtype)
        super().__init__(ops, p["input_proj.weight"].device)  # first: what goes first waits for replays that read the rest

        def layer(name: str) -> Layer:
            return p[name + ".weight"], p[name + ".bias"]

        prefixes = [f"res_blocks.{i}." for i in range(spec.depth)]
        self.spec = spec
        self.cond, self.input, self.output = (layer(name) for name in ("cond_embed", "input_proj", "final_layer.linear"))
        self.blocks = [BlockWeights.of(p, prefix, ops) for prefix in prefixes]
        self.of_time = [layer(prefix + "ada_lin_attn") for prefix in prefixes] if spec.cross else []
        self.of_condition = [layer(prefix + ("ada_lin_mlp" if spec.cross else "ada_lin")) for prefix in prefixes]
        self.of_condition.append(layer("final_layer.adaLN_modulation.1"))
        self.modulation_width = sum(len(bias) for _, bias in self.of_condition)
        self.rotation = functools.cache(functools.partial(kept_rotation, p["res_blocks.0.attn.rope.freqs"]))
        # All by name, for the reference. A cast of what was laid out anew is not kept beside it.
        self.parameters = {name: tensor for name, tensor in p.items() if GATED_MLP not in name or ops.layout == PLAIN.layout}
        self.time_table = TimeTables(functools.partial(embed_flow_time, self.parameters), self.cond[0].device)


def kept_rotation(freqs: Tensor, side: int) -> Rotation:
    """grid_rotation, ready for every stream."""
    rotation = grid_rotation(freqs, side)
    settle(freqs.device)
    return rotation


class FlowTransformerHead(FlowHead):
    """FlowAR's head, ready to draw the tokens of a scale. See Packing for how it follows its parameters. Safe to call from several
    threads."""

    spec: FlowTransformerSpec
    weights_type = FlowTransformerWeights

    @classmethod
    def from_module(cls, net: nn.Module) -> FlowTransformerHead:
        """The head of any module with FlowAR's parameter names (its own forward is not used). ValueError if they differ."""
        shapes = {name: tuple(p.shape) for name, p in parameters_of(net, buffers=True).items()}
        return cls(net, FlowTransformerSpec.of(shapes, f"net ({type(net).__name__})"))

    @classmethod
    def from_state_dict(cls, sd: Mapping[str, Tensor], prefix: str = "") -> FlowTransformerHead:
        """The head of a state dict, or of the part of one whose keys start with `prefix` ("flownet." in a whole FlowAR).

        The tensors are shared, not copied. ValueError names missing, unexpected and misshapen parameters.
        """
        sd = state_of(sd, prefix)
        spec = FlowTransformerSpec.of({name: tuple(t.shape) for name, t in sd.items()}, where="state dict")
        return cls(holding(sd, FlowTransformerNet, spec), spec)

    @torch.no_grad()
    @untraced
    def denoise(
        self,
        z: Tensor,
        table: StepTable,
        cfg: float | Tensor = 1.0,
        guidance: tuple[float, float] = (0.0, 1.0),
        temperature: float | Tensor = 1.0,
        noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw all tokens of a scale: the whole loop over the flow.

        z: [rows, tokens, z_channels], floating point, tokens a square number. With cfg > 1 the first half is conditional, the
            second half unconditional, pairwise, and both walk one trajectory. With cfg <= 1 there is no guidance, as published,
            and every row is a trajectory.
        table: of a flow solver, T steps: disa_fast.solvers.flow_euler or flow_euler_maruyama.
        cfg: guidance scale, float or one-element tensor. v = v_u + cfg * (v_c - v_u).
        guidance: (low, high); guidance is applied at low <= t <= high, and elsewhere the conditional half is on its own.
        temperature: factor on the step noise, float or one-element tensor.
        noise: [rows, tokens, in_channels] starting state, of which the first half counts under guidance; or that half alone.
        step_noise: [T, rows or rows/2, tokens, in_channels], where the solver is noisy; or one entry for each noisy step.
        generator: draws whatever of the two is not given, in the order, shapes and dtypes of the published implementation, so
            that one seed gives one result; torch's global generator if None.
        backend: "auto", or a backend's name (`disa_fast.explain` lists them).
        dtype: of the network's products; the parameters' own if None. Where it is another, norms, rotary tables and the residual
            stream are float32 or wider, and the weights are cast once. torch.autocast is not consulted.

        Returns [rows, tokens, in_channels], float64 if dtype is, else float32; the state is float64 on the way. With cfg > 1 the
        second half is a copy of the first. Raises ValueError for shapes, dtypes, devices or values that do not fit,
        UnsupportedError for a backend that cannot serve the call.
        """
        dtype, cfg = self.dtype if dtype is None else dtype, scalar("cfg", cfg)
        self._check(z, cfg, dtype)
        check_table(table)
        halves, size = 2 if cfg > 1 else 1, (z.shape[1], self.spec.in_channels)
        noise, step_noise = draw_flow_noise(table, (len(z), *size), *draws_of(generator, z.device), noise, step_noise)
        x = self._denoise({"z": z.to(dtype)}, 0, size, table, cfg, guidance, temperature, noise, step_noise, backend, dtype, halves)
        return torch.cat([x] * halves).to(torch.promote_types(dtype, torch.float32))

    def _check(self, z: Tensor, cfg: float, dtype: torch.dtype) -> None:
        if not is_dense(z) or z.ndim != 3 or z.shape[2] != self.spec.z_channels:
            raise ValueError(f"z: expected a [rows, tokens, {self.spec.z_channels}] tensor, got {describe(z)}")
        if not z.is_floating_point():
            raise ValueError(f"z: expected a floating point tensor, got {describe(z)}")
        if z.device != self.device:
            raise ValueError(f"z: expected it on {self.device}, where the head's parameters are, got {describe(z)}")
        check_dtype(dtype)
        if cfg > 1 and len(z) % 2:
            raise ValueError(f"z: guidance (cfg = {cfg:g}) expects an even number of rows, conditional half first, got {len(z)}")
        side_of(z.shape[1])

    # What backends build on --------------------------------------------------------------------------------------------

    def network(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        p, ops = self.weights(dtype).parameters, plain(dtype, self.dtype)
        return lambda x, t, at, z: forward_ref(p, x, t, z, ops)

    def hoisted(
        self, ops: Plain, w: FlowTransformerWeights, times: Tensor, guided: tuple[bool, ...], context: Context, at: int, budget: int
    ) -> Velocity:
        """H1, cond_embed once (H2), cross-attention's keys and values and the modulation by time alone once (H7), the other
        modulation for several steps at a time where there is room (H3)."""
        z = context["z"]
        rotation = tuple(map(read_here, w.rotation(side_of(z.shape[1]))))
        condition = ops.linear(z, w.cond)
        cross = [cross_keys_values(ops, b, z, rotation) if w.spec.cross else None for b in w.blocks]
        by_time = [ops.linear(F.silu(times), layer) for layer in w.of_time]
        steps, y, ready = range(0), condition, []

        def velocity(i: int, x: Tensor) -> Tensor:
            nonlocal steps, y, ready
            if i not in steps:
                each = x[..., 0].numel() * w.modulation_width * z.element_size()
                steps = chunk_from(i, guided, budget // max(1, each))
                y = F.silu(times[steps.start : steps.stop, None, None] + condition[: len(x)])
                ready = [ops.linear(y, layer) for layer in w.of_condition] if len(steps) > 1 else []

            def by_condition(block: int) -> Tensor:  # of one step alone when it is needed, so that two blocks' at most are held
                return ready[block][i - steps.start] if ready else ops.linear(y[0], w.of_condition[block])

            stream = ops.residual(ops.linear(x.to(z.dtype), w.input)), None, None
            for k, b in enumerate(w.blocks):
                if w.spec.cross:
                    gate1, scale1, shift1 = by_time[k][i].chunk(3)
                    gate2, scale2, shift2 = by_condition(k).chunk(3, dim=-1)
                    modulation = Modulation(gate1, gate2, scale1, scale2, shift1, shift2)
                else:
                    modulation = Modulation.split(by_condition(k))
                keys_values = tuple(part[: len(x)] for part in cross[k]) if w.spec.cross else None
                stream = block(ops, b, stream, modulation, rotation, cross=keys_values)
            shift, scale = by_condition(len(w.blocks)).chunk(2, dim=-1)
            return ops.linear(ops.residual_norm(stream, (scale, shift))[1], w.output)

        return velocity
