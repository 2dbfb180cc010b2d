"""Constructor arguments of a model, from the names and shapes of its checkpoint: for sizes that nobody has published.

Shapes do not tell everything. What they leave open is taken from what is given, then, where the sizes that decide it are published
ones, from there, and else asked for in words.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .checks import whole
from .models import MAR, XAR, FlowAR
from .models.harmon import SIZES as HARMON_SIZES
from .models.mar import SIZES as MAR_SIZES
from .models.sizes import preset
from .transformer import gated_width

VAE_CHANNELS, VAE_STRIDE = 16, 16  # of KL-16, which all published models are for
FLOWAR_SCALES, XAR_CELLS = (1, 2, 4, 8, 16), 4  # published, where a checkpoint without its data does not tell

_TOLD_OF_LLM = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
# Of a config.json as the library transformers writes it, what decides what a Qwen2 computes.
_OF_LLM = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "rms_norm_eps", "hidden_act", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip


class NotToldError(ValueError):
    """The names and shapes are not those of a model of the system."""


@dataclass(frozen=True)
class Given:
    """What shapes leave open, as the user says it. num_heads: of encoder and decoder; patch_size: latents or pixels on a side of
    what is a token; config: a config.json of Harmon's language model."""

    num_heads: int | tuple[int, int] | None = None
    patch_size: int | None = None
    config: Path | None = None

    def __post_init__(self) -> None:
        heads = self.num_heads if isinstance(self.num_heads, tuple | list) else (self.num_heads,) * 2
        if len(heads) != 2:
            raise ValueError(f"num_heads: expected a number, or the encoder's and the decoder's, got {self.num_heads!r}")
        if self.num_heads is not None:
            object.__setattr__(self, "num_heads", tuple(whole("num_heads", number) for number in heads))
        if self.patch_size is not None:
            object.__setattr__(self, "patch_size", whole("patch_size", self.patch_size))


NOTHING = Given()


@dataclass(frozen=True)
class Inferred:
    """arguments: of the system's constructor. assumed: what of them shapes do not tell, and why it is so. open: what has to be
    given, in words; of the arguments that it decides, `unknown` by name, `arguments` then hold some of the right shapes."""

    arguments: Mapping[str, Any]
    assumed: Sequence[str] = ()
    open: Sequence[str] = ()
    unknown: Sequence[str] = ()

    def __str__(self) -> str:
        return ", ".join(f"{name}={self._shown(name, value)}" for name, value in self.arguments.items())

    def _shown(self, name: str, value: object) -> str:
        if isinstance(value, Mapping):
            return f"({', '.join(f'{key}={self._shown(key, one)}' for key, one in value.items())})"
        return "?" if name in self.unknown else str(value)


def infer(system: str, state: Mapping[str, Tensor], given: Given = NOTHING) -> Inferred:
    """Of a model of `system` whose names and shapes `state` has, if there is one; that there is, only its making can prove.

    FlowAR's scales and xAR's cells are read off the mask that checkpoints hold, and are the published ones where `state` is on
    meta. Raises NotToldError where names that tell a size are missing, or no size fits.
    """
    found = _Found(state, given)
    arguments = {"mar": _mar, "flowar": _flowar, "xar": _xar, "harmon": _harmon}[system](found)
    return Inferred(arguments, found.assumed, found.open, found.unknown)


def published_size(system: str, inferred: Inferred, sizes: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Which of the published sizes has these arguments, if any."""
    own = _complete(system, inferred.arguments)
    return next((size for size in sizes if _complete(system, preset(sizes, size)) == own), None)


def _complete(system: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the constructor's defaults, of a language model those that shapes tell."""
    model = {"mar": MAR, "flowar": FlowAR, "xar": XAR, "harmon": MAR}[system]
    defaults = {name: each.default for name, each in inspect.signature(model).parameters.items()}
    complete = defaults | {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    if "llm" in complete:
        complete["llm"] = {name: complete["llm"].get(name) for name in _TOLD_OF_LLM}
    return complete


class _Found:
    """A state dict, asked for sizes."""

    def __init__(self, state: Mapping[str, Tensor], given: Given) -> None:
        self.state, self.given = state, given
        self.assumed: list[str] = []
        self.open: list[str] = []
        self.unknown: list[str] = []

    def under(self, prefix: str) -> _Found:
        """Its part whose names begin so. What that finds is found here."""
        part = _Found({n.removeprefix(prefix): t for n, t in self.state.items() if n.startswith(prefix)}, self.given)
        part.assumed, part.open, part.unknown = self.assumed, self.open, self.unknown
        return part

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        if name not in self.state or self.state[name].ndim != dims or not self.state[name].numel():
            raise NotToldError(f"{name}: expected a tensor of {dims} dimensions")
        return tuple(self.state[name].shape)

    def blocks(self, prefix: str) -> int:
        """How many there are, of names PREFIX.0.*, PREFIX.1.*, ..."""
        numbers = {name.removeprefix(prefix + ".").partition(".")[0] for name in self.state if name.startswith(prefix + ".")}
        if not numbers or not all(str(i) in numbers for i in range(len(numbers))):
            raise NotToldError(f"{prefix}: expected blocks 0, 1, 2, ...")
        return len(numbers)


def _square(name: str, count: int) -> int:
    side = math.isqrt(max(0, count))
    if side < 1 or side * side != count:
        raise NotToldError(f"{name}: expected a square number of tokens, got {count}")
    return side


def _tokens(found: _Found, side: int, channels: int) -> dict[str, int]:
    """Arguments that say what a token of `channels` numbers is, for images of side x side tokens."""
    patch = found.given.patch_size
    if patch is None:
        patch = 1
        if channels == VAE_CHANNELS:
            found.assumed.append(
                f"patch_size=1, vae_embed_dim={VAE_CHANNELS}: what {channels} numbers a token are in published models; of larger "
                "patches, say --patch-size"
            )
        else:
            found.open.append(f"--patch-size, since tokens of {channels} numbers may be of any")
            found.unknown += ["patch_size", "vae_embed_dim", "img_size", "vae_stride"]
    elif channels % patch**2:
        raise NotToldError(f"patch_size: expected one whose square divides the {channels} numbers of a token, got {patch}")
    vae_embed_dim = channels // patch**2
    stride = VAE_STRIDE if vae_embed_dim == VAE_CHANNELS else 1
    sizes = {"img_size": side * patch * stride, "patch_size": patch, "vae_embed_dim": vae_embed_dim}
    return sizes if stride == VAE_STRIDE else sizes | {"vae_stride": stride}


def _ratio(hidden: Mapping[int, int], units: Callable[[int, float], int]) -> float:
    """mlp_ratio: one with which blocks of each width have so many hidden units, which are units(width, ratio)."""
    candidates = [4.0]
    for width, count in hidden.items():
        candidates += [part * count / width / 6 for part in (6, 9)]  # of a plain MLP, and of a gated one
        candidates += [part * (count + 0.5) / width / 6 for part in (6, 9)]  # in the midst of what truncation allows
    for ratio in candidates:
        if ratio > 0 and all(units(width, ratio) == count for width, count in hidden.items()):
            return ratio
    raise NotToldError(f"mlp_ratio: no factor gives {hidden}")


def _mar(found: _Found, sizes: Mapping[str, Mapping[str, Any]] = MAR_SIZES) -> dict[str, Any]:
    width, channels = found.shape("z_proj.weight", 2)
    decoder_width, _ = found.shape("decoder_embed.weight", 2)
    tokens = found.shape("diffusion_pos_embed_learned", 3)[1]
    head_width, _ = found.shape("diffloss.net.input_proj.weight", 2)
    hidden = {found.shape(f"{part}_blocks.0.mlp.fc1.weight", 2)[::-1] for part in ("encoder", "decoder")}
    depths = {f"{part}_depth": found.blocks(f"{part}_blocks") for part in ("encoder", "decoder")}
    return {
        **_tokens(found, _square("diffusion_pos_embed_learned", tokens), channels),
        "encoder_embed_dim": width,
        "decoder_embed_dim": decoder_width,
        **depths,
        **_mar_heads(found, sizes, width, decoder_width),
        "mlp_ratio": _ratio(dict(hidden), lambda dim, ratio: int(dim * ratio)),
        "class_num": found.shape("class_emb.weight", 2)[0],
        "buffer_size": found.shape("encoder_pos_embed_learned", 3)[1] - tokens,
        "diffloss_d": found.blocks("diffloss.net.res_blocks"),
        "diffloss_w": head_width,
    }


def _mar_heads(found: _Found, sizes: Mapping[str, Mapping[str, Any]], *widths: int) -> dict[str, int]:
    parts = ("encoder", "decoder")
    published = {size["embed_dim"]: size["num_heads"] for size in sizes.values()}
    names = [f"{part}_num_heads" for part in parts]
    if found.given.num_heads is not None:
        if any(width % heads for width, heads in zip(widths, found.given.num_heads, strict=True)):
            expected = " and ".join(map(str, widths))
            raise ValueError(f"num_heads: expected divisors of the {expected} channels, got {found.given.num_heads}")
        return dict(zip(names, found.given.num_heads, strict=True))
    unknown = sorted({width for width in widths if width not in published})
    if unknown:
        found.open.append(
            f"--num-heads, since shapes do not tell it and no published model is {' or '.join(map(str, unknown))} channels wide"
        )
        found.unknown += names
        return dict.fromkeys(names, 1)
    heads = {name: published[width] for name, width in zip(names, widths, strict=True)}
    told = ", ".join(f"{name}={count}" for name, count in heads.items())
    of = " and ".join(map(str, sorted(set(widths))))
    found.assumed.append(f"{told}: as published for {of} channels; if otherwise, say --num-heads")
    return heads


def _flow(found: _Found, side: int) -> dict[str, Any]:
    """What FlowAR and xAR have in common."""
    width, channels = found.shape("z_proj.weight", 2)
    (frequencies,) = found.shape("encoder_blocks.0.attn.rope.freqs", 1)
    hidden = found.shape("encoder_blocks.0.mlp.fc1_g.weight", 2)[0]
    if width % (4 * frequencies):
        raise NotToldError(f"encoder_blocks.0.attn.rope.freqs: {frequencies} frequencies are of no head of {width} channels")
    heads = width // (4 * frequencies)
    if found.given.num_heads not in (None, (heads, heads)):
        raise ValueError(f"num_heads: expected {heads}, as the rotary frequencies have it, got {found.given.num_heads}")
    sizes: dict[str, Any] = _tokens(found, side, channels)
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_embed_dim": width, f"{part}_depth": found.blocks(f"{part}_blocks"), f"{part}_num_heads": heads}
    sizes["mlp_ratio"] = _ratio({width: hidden}, gated_width)
    sizes["class_num"] = found.shape("class_emb.weight", 2)[0] - 1
    return sizes


def _parts(found: _Found) -> list[int] | None:
    """How many tokens each part of an image has that attends to itself and those before, by the mask; None without its data."""
    mask = found.state.get("mask")
    if mask is None or mask.is_meta or mask.ndim != 4 or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return None
    if not mask.numel() or mask.numel() > mask.untyped_storage().nbytes():  # of no data of its own
        return None
    seen = (mask[0, 0] == 0).sum(dim=1).tolist()
    ends = sorted(set(seen))
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    expected = [end for end, size in zip(ends, sizes, strict=True) for _ in range(size)]
    return sizes if seen == expected else None


def _flowar(found: _Found) -> dict[str, Any]:
    positions = found.shape("encoder_pos_embed_learned", 3)[1]
    parts = _parts(found) or [side * side for side in FLOWAR_SCALES]
    scale = [_square("mask", part) for part in parts]
    if sum(parts) != positions:
        raise NotToldError(f"encoder_pos_embed_learned: expected {sum(parts)} positions, of scales {scale}, got {positions}")
    width, _ = found.shape("flownet.input_proj.weight", 2)
    return {
        **_flow(found, scale[-1]),
        "scale": scale,
        "diffloss_d": found.blocks("flownet.res_blocks"),
        "diffloss_w": width,
        "cross": any(".crossattn." in name for name in found.state),
    }


def _xar(found: _Found) -> dict[str, Any]:
    positions = found.shape("encoder_pos_embed_learned", 3)[1]
    return {**_flow(found, _square("encoder_pos_embed_learned", positions)), "clusters": len(_parts(found) or range(XAR_CELLS))}


def _harmon(found: _Found) -> dict[str, Any]:
    return {**_mar(found.under("mar."), HARMON_SIZES), "llm": _llm(found.under("llm.model."))}


def _llm(found: _Found) -> dict[str, Any]:
    vocabulary, hidden = found.shape("embed_tokens.weight", 2)
    queries, keys = (found.shape(f"layers.0.self_attn.{name}_proj.weight", 2)[0] for name in ("q", "k"))
    told = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": found.shape("layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": found.blocks("layers"),
    }
    if found.given.config is not None:
        more = _described(found.given.config, told)
        found.assumed.append(f"llm: heads and constants as {found.given.config} says")
        return told | more
    for size in HARMON_SIZES.values():
        llm = size["llm"]
        if (llm["hidden_size"], llm["intermediate_size"]) == (hidden, told["intermediate_size"]):
            found.assumed.append(
                f"llm: heads and constants as published for {hidden} channels; if otherwise, put a config.json beside it"
            )
            return {**llm, **told}
    found.open.append(
        "a config.json of the language model beside the checkpoint, as transformers writes it: shapes do not tell its heads"
    )
    found.unknown += ["num_attention_heads", "num_key_value_heads", "head_dim"]
    shared = math.gcd(queries, keys)
    return told | {"num_attention_heads": queries // shared, "num_key_value_heads": keys // shared, "head_dim": shared}


def _described(path: Path, told: Mapping[str, int]) -> dict[str, Any]:
    """Of a config.json what shapes do not tell. ValueError where it is not one, or says otherwise than they do."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = next((config[key] for key in ("llm", "llm_config", "text_config") if key in config), config)
        described = {name: config[name] for name in _OF_LLM if config.get(name) is not None}
        differing = {name: config[name] for name in told if config.get(name, told[name]) != told[name]}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as the config.json of a language model: {error}") from error
    if "num_attention_heads" not in described:
        raise ValueError(f"{path}: expected num_attention_heads, which shapes do not tell, among {list(config)[:8]}")
    if differing:
        expected = {name: told[name] for name in differing}
        raise ValueError(f"{path}: expected {expected}, as the checkpoint has it, got {differing}")
    return described
