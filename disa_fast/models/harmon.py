"""Harmon: text-conditioned masked autoregressive generation through a language model (arXiv 2503.21979), annealed by DiSA.

MAR's encoder sees the known tokens; a causal language model of the Qwen2 architecture sees the prompt and then what the encoder
made, buffer tokens last; MAR's decoder sees the sum of both, and its output conditions the diffusion head. Module and parameter
names are those of the published checkpoints, so they load unchanged; Harmon_DiSA/src/models of the DiSA repository at 283fa59 is
what this was written against. The language model is that of the library transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import is_dense, scalar, sized, whole
from ..heads.mlp import Draw, MLPHead
from ..philox import Philox
from ..schedule import Schedule
from ..solvers import DEFAULT_CLIP, Solver
from ..untraced import untraced
from ..vae import LATENT_SCALE
from .mar import MAR
from .mar import SIZES as MAR_SIZES
from .masked_sampling import sample_masked
from .prompts import GENERIC_PROMPT, check_texts, encode_prompts, image_prompt, instruction
from .sizes import preset

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings",
)  # fmt: skip
_QWEN = {"num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
SIZES: dict[str, dict[str, Any]] = {
    "0.5b": {
        **MAR_SIZES["base"],
        "llm": {**_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    },
    "1.5b": {
        **MAR_SIZES["huge"],
        "llm": {**_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    },
}


def harmon(size: str | None = None, **kwargs) -> Harmon:
    """A Harmon with freshly initialised weights.

    size: "0.5b" (Qwen2.5-0.5B and MAR-B) or "1.5b" (Qwen2.5-1.5B and MAR-H) as published; None: `llm` must be given. Keyword
    arguments are Harmon's and take precedence. ValueError for an unknown size, ModuleNotFoundError without transformers.
    """
    return Harmon(**(preset(SIZES, size) | kwargs))


class LanguageModel(nn.Module):
    """Where the published checkpoints keep it: llm.model.* Their output layer, llm.lm_head, plays no part in drawing images."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        try:
            from transformers import Qwen2Config, Qwen2Model
            from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"Harmon needs transformers: pip install 'disa-fast[harmon]' ({error})") from error
        check_config(config)
        try:
            config = Qwen2Config(**{**config, "use_cache": False})
            self.model = Qwen2Model(config)
        except Exception as error:  # whatever the library makes of values that it cannot use
            raise ValueError(f"llm: no Qwen2 can be made of {dict(config)}: {type(error).__name__}: {error}") from error
        if self.model.device.type == "meta":  # a constant that no checkpoint holds: real also where parameters are not yet
            with torch.device("cpu"):
                self.model.rotary_emb = Qwen2RotaryEmbedding(config)


def check_config(config: object) -> None:
    """ValueError for what does not describe a Qwen2's architecture."""
    if not isinstance(config, Mapping):
        raise ValueError(f"llm: expected arguments of Qwen2Config by name, got {config!r}")
    foreign = [name for name in config if not isinstance(name, str) or "implementation" in name]
    if foreign:  # transformers would fetch and run what a file names there
        raise ValueError(f"llm: expected what describes a Qwen2's architecture, got {', '.join(map(repr, foreign))}")
    counts = {name: whole(f"llm: {name}", config[name]) for name in _COUNTS if config.get(name) is not None}
    for name, of in (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads")):
        if name in counts and of in counts and counts[of] % counts[name]:
            raise ValueError(f"llm: {name}: expected a divisor of {of} = {counts[of]}, got {counts[name]}")


def _drop_unused(module: Harmon, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    for name in [name for name in state if name.removeprefix(prefix).startswith(module.unused_keys)]:
        del state[name]


class Harmon(nn.Module):
    """The model. llm: arguments of transformers' Qwen2Config; vae_scale: latents are the VAE's times this; all others are MAR's, as
    which images and tokens are. `tokenizer`, for prompts as text, is a tokenizers.Tokenizer that the user sets.

    A state dict may hold what some published ones do and images do not need: `unused_keys` are dropped from it.
    """

    unused_keys = ("llm.lm_head.", "vae.")

    @sized
    def __init__(self, llm: Mapping[str, object], vae_scale: float = LATENT_SCALE, **mar: Any) -> None:
        super().__init__()
        self.vae_scale = vae_scale
        self.llm = LanguageModel(llm)
        self.mar = MAR(**mar)
        dim, hidden = self.mar.z_proj.out_features, self.llm.model.config.hidden_size
        self.proj_in = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.proj_out = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim))
        self.tokenizer: Any = None
        self.register_load_state_dict_pre_hook(_drop_unused)

    @property
    def head(self) -> MLPHead:
        return self.mar.head

    # Backbone --------------------------------------------------------------------------------------------------------

    def condition(
        self, tokens: Tensor, masked: Tensor, grid: tuple[int, int] | None, through_llm: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Known tokens and, by `through_llm`, the prompt -> the head's condition for every token, [B, tokens, decoder_embed_dim].

        tokens: [B, tokens, token_embed_dim]; masked: [B, tokens] bool, equally many in each row; through_llm: [B, n, hidden]
        behind the prompt -> same.
        """
        mar, buffer = self.mar, self.mar.buffer_size
        x = mar.encode(tokens, masked, mar.fake_latent.expand(len(tokens), -1), grid)
        z = through_llm(self.proj_in(x).roll(-buffer, dims=1)).roll(buffer, dims=1)
        return mar.decode(x + self.proj_out(z), masked, grid)

    def _behind(self, prompt_mask: Tensor, count: int) -> dict[str, Tensor]:
        """The language model's mask and positions, of the prompts and of `count` more behind each."""
        mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt_mask), count)], dim=1)
        return {"attention_mask": mask, "position_ids": mask.cumsum(dim=1).sub(1).clamp(min=0)}

    # Training --------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Training loss of text to image, a scalar: the head's diffusion loss on the masked tokens.

        images: [B, vae_embed_dim, H, W]; input_ids: [B, L] int64 prompts, padded on the right; attention_mask: [B, L], true where
        there is a prompt. Masks are drawn as MAR's.
        """
        tokens = self.mar.patchify(images)
        masked, prompts = self.mar.random_mask(len(tokens)), self.llm.model.embed_tokens(input_ids)

        def through_llm(z: Tensor) -> Tensor:
            inputs = torch.cat([prompts, z.to(prompts.dtype)], dim=1)
            out = self.llm.model(inputs_embeds=inputs, **self._behind(attention_mask.bool(), z.shape[1]))
            return out.last_hidden_state[:, prompts.shape[1] :]

        return self.mar.loss(tokens, self.condition(tokens, masked, None, through_llm), masked)

    # Sampling --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_tokens(
        self,
        prompt: str | Sequence[str] | None = None,
        schedule: Schedule | str = "linear:50-5",
        num_iter: int = 64,
        cfg: float = 3.0,
        cfg_schedule: str = "constant",
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        orders: Tensor | None = None,
        draw: Draw | None = None,
        progress: bool = False,
        backend: str = "auto",
        solver: str | Solver = "ddpm",
        clip: int | str | None = DEFAULT_CLIP,
        rng: str | Philox = "torch",
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cfg_prompt: str = GENERIC_PROMPT,
        image_shape: tuple[int, int] | None = None,
    ) -> Tensor:
        """Generate images: `num_iter` autoregressive iterations, iteration k's tokens in T(k) denoising steps.

        prompt: what the images show, one text or B of them; needs `self.tokenizer`. cfg_prompt: what guidance leads away from.
        input_ids, attention_mask: instead of a prompt, [rows, L] int64 tokens padded on the right and [rows, L], true where there
            are any (None: everywhere). As upstream has it, cfg != 1 wants the B prompts and then their B unconditional ones.
        schedule: T(k), a callable (k, K) -> int or its text form ("linear:50-5": DiSA's setting for Harmon).
        orders: [B, m * n] int64, each row a permutation; drawn if None. As upstream's, it may have 2 B rows under guidance.
        image_shape: (m, n) tokens high and wide, the model's own square if None; published: 32 x 32 for 512 x 512 pixels.
        Everything else as in MAR.sample_tokens.

        Returns [B, vae_embed_dim, H, W] latents in the model's dtype. The state of the head's trajectories is float32 in any
        case, as upstream's. Raises ValueError for arguments that do not fit.
        """
        cfg, mar = scalar("cfg", cfg), self.mar
        guided = cfg != 1.0
        input_ids, prompt_mask = self._prompts(prompt, cfg_prompt if guided else None, input_ids, attention_mask)
        grid = self._grid(image_shape)
        batch = len(input_ids) // 2 if guided else len(input_ids)
        if guided and is_dense(orders) and orders.ndim == 2 and len(orders) == 2 * batch:
            orders = orders[:batch]

        cache = self.llm.model(input_ids, use_cache=True).past_key_values

        def through_llm(z: Tensor) -> Tensor:
            count = z.shape[1]
            behind = self._behind(prompt_mask, count)
            behind["position_ids"] = behind["position_ids"][:, -count:]
            out = self.llm.model(inputs_embeds=z, past_key_values=cache, use_cache=True, **behind)
            cache.crop(-count)  # what is left is the prompt
            return out.last_hidden_state

        tokens = sample_masked(
            lambda known, masked: self.condition(known, masked, grid, through_llm),
            mar.head, batch, grid[0] * grid[1], mar.token_embed_dim,
            schedule, num_iter, cfg, cfg_schedule, temperature, generator, orders, draw, progress, backend, solver, clip, rng,
        )  # fmt: skip
        return mar.unpatchify(tokens, grid)

    def sample(self, *args: Any, vae: Any = None, **kwargs: Any) -> Tensor:
        """Images, by a VAE such as disa_fast.vae.load_vae gives: vae.decode(latents / vae_scale) of what `sample_tokens` draws with
        the arguments; without one latents / vae_scale themselves, for another decoder."""
        latents = self.sample_tokens(*args, **kwargs) / self.vae_scale
        return latents if vae is None else vae.decode(latents)

    def _grid(self, image_shape: object) -> tuple[int, int]:
        if image_shape is None:
            return self.mar.seq_h, self.mar.seq_w
        if not isinstance(image_shape, Sequence) or len(image_shape) != 2:
            raise ValueError(f"image_shape: expected (tokens high, tokens wide) or None, got {image_shape!r}")
        return tuple(whole("image_shape", n) for n in image_shape)

    @untraced
    def _prompts(
        self, prompt: object, cfg_prompt: str | None, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(input_ids, prompt_mask) of all rows on the model's device. cfg_prompt None: no guidance."""
        device, vocabulary = self.mar.fake_latent.device, self.llm.model.embed_tokens.num_embeddings
        if (prompt is None) == (input_ids is None):
            raise ValueError("prompt, input_ids: expected one of them, got " + ("none" if prompt is None else "both"))
        if prompt is not None:
            if self.tokenizer is None:
                raise ValueError("prompt: there is no tokenizer to read it with; set model.tokenizer, or pass input_ids")
            texts = [prompt] if isinstance(prompt, str) else prompt
            check_texts("prompt", texts)
            check_texts("cfg_prompt", [] if cfg_prompt is None else [cfg_prompt])
            rows = [image_prompt(text) for text in texts] + ([] if cfg_prompt is None else [cfg_prompt] * len(texts))
            input_ids, attention_mask = encode_prompts(self.tokenizer, [instruction(row) for row in rows])
            input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
        if not is_dense(input_ids) or input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids: expected a [rows, L] tensor of whole numbers, got {input_ids!r}")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not is_dense(attention_mask) or attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask: expected {list(input_ids.shape)}, as input_ids, got {attention_mask!r}")
        for name, tensor in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if tensor.device != device:
                raise ValueError(f"{name}: expected it on {device}, where the model is, got {tensor.device}")
        if cfg_prompt is not None and len(input_ids) % 2:
            raise ValueError(f"input_ids: guidance expects an even number of rows, conditional half first, got {len(input_ids)}")
        if not input_ids.numel() or not 0 <= int(input_ids.min()) or int(input_ids.max()) >= vocabulary:
            raise ValueError(f"input_ids: expected tokens 0..{vocabulary - 1}, got {input_ids.tolist()}")
        mask = attention_mask.bool()
        if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("attention_mask: expected rows that begin with their prompt and are padded on the right")
        return input_ids, mask
