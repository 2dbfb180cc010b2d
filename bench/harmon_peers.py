"""Harmon as it was published: the object that a user of it has, and the eager baseline to compare with.

Written from what Harmon_DiSA/src/models of the DiSA repository at 283fa59 and src/models of Harmon (wusize/Harmon at 4eb6087) do;
nothing of disa_fast is used. Names of parameters and the signatures are theirs, so checkpoints load, and so is everything that
costs time or decides a result: what mar_peers.py says of head and orders, and the language model's cache, which grows at every
autoregressive iteration and is cut back to the prompt.

Only sampling is here, without dropout: `training` is not consulted. The VAE is one that changes nothing unless there is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache, DynamicCache, Qwen2Config, Qwen2ForCausalLM

if __package__:  # of gpu_first; pytest has this folder on its path, and here no package
    from .mar_peers import BASE, HUGE, AnnealedDiffLoss, ConstantDiffLoss, DiffLoss, UpstreamMAR, guidance_scale, next_masks
else:
    from mar_peers import BASE, HUGE, AnnealedDiffLoss, ConstantDiffLoss, DiffLoss, UpstreamMAR, guidance_scale, next_masks


class UnchangingVAE(nn.Module):
    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim

    def decode(self, z: Tensor) -> Tensor:
        return z


class UpstreamHarmon(nn.Module):
    """DiSA's Harmon. llm: arguments of transformers' Qwen2Config; mar: of UpstreamMAR; vae: with embed_dim and decode."""

    kind_of_head: type[DiffLoss] = AnnealedDiffLoss

    def __init__(
        self, llm: Mapping[str, Any], mar: Mapping[str, Any], vae: nn.Module | None = None, vae_scale: float = 0.2325
    ) -> None:
        super().__init__()
        self.llm = Qwen2ForCausalLM(Qwen2Config(**({"tie_word_embeddings": True} | dict(llm))))
        self.mar = UpstreamMAR(self.kind_of_head, **mar)
        self.vae = UnchangingVAE(self.mar.vae_embed_dim) if vae is None else vae
        self.vae_scale = vae_scale
        dim, hidden = self.mar.encoder_embed_dim, self.llm.config.hidden_size
        self.proj_in = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.proj_out = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim))

    @property
    def device(self) -> torch.device:
        return self.llm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.dtype

    @property
    def token_embed_dim(self) -> int:
        return self.vae.embed_dim * self.mar.patch_size**2

    def decode(self, z: Tensor) -> Tensor:
        """[B, h, w, C * p * p], which is scaled in place -> images"""
        b, h, w, _ = z.shape
        p = self.mar.patch_size
        z /= self.vae_scale
        patches = z.reshape(b, h, w, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return self.vae.decode(patches.reshape(b, -1, h * p, w * p))

    def forward_mae_encoder(self, x: Tensor, mask: Tensor, past_key_values: Cache, attention_mask: Tensor) -> Tensor:
        """MAR's encoder, plus what the language model makes of it behind the prompt; its buffer tokens come last there.

        x: [B, h, w, C]; mask: [B, h * w]; attention_mask: [B, L] of the prompt -> [B, buffer_size + known tokens, E]
        """
        encoded = self.mar.forward_mae_encoder(
            x.flatten(1, 2), mask, self.mar.fake_latent.expand(len(x), -1), image_shape=tuple(x.shape[1:3])
        )
        buffer = self.mar.buffer_size
        z = self.proj_in(encoded)
        z = torch.cat([z[:, buffer:], z[:, :buffer]], dim=1)
        prompt = attention_mask.to(device=self.device, dtype=torch.bool)
        seen = torch.cat([prompt, prompt.new_ones(z.shape[:2])], dim=1)
        positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, -z.shape[1] :]
        z = self.llm.model(
            inputs_embeds=z, attention_mask=seen, position_ids=positions, past_key_values=past_key_values, return_dict=True
        ).last_hidden_state
        z = torch.cat([z[:, -buffer:], z[:, :-buffer]], dim=1)
        return encoded + self.proj_out(z)

    def draw(self, z: Tensor, temperature: float, cfg: float | Tensor, step: int, num_iter: int) -> Tensor:
        return self.mar.diffloss.sample(z, temperature, cfg, step=step, ar_num_iter=num_iter)

    @torch.no_grad()
    def sample(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "constant",
        temperature: float = 1.0,
        progress: bool = False,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        image_shape: tuple[int, int] | None = None,
        x_con: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """[B, L] prompts, or their embeddings, and attention_mask, true where there is one -> images of all of them, with
        guidance of the first half, whose unconditional prompts are in the second.

        mask: [B, h * w], 1 for tokens to draw, heeded by the first iteration alone; past_key_values: of the prompts, else made
        here; image_shape: (h, w) tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.llm.get_input_embeddings()(input_ids)
        b, guided = len(attention_mask), cfg != 1.0
        if guided and b % 2:
            raise ValueError(f"attention_mask: expected an even number of rows with guidance, got {b}")
        h, w = (self.mar.seq_h, self.mar.seq_w) if image_shape is None else image_shape
        count = h * w
        mask = torch.ones(b, count, device=self.device, dtype=self.dtype) if mask is None else mask.view(b, count)
        tokens = torch.zeros(b, count, self.token_embed_dim, device=self.device, dtype=self.dtype)
        orders = self.mar.sample_orders(b, seq_len=count)
        if guided:
            orders[b // 2 :] = orders[: b // 2]
        if past_key_values is None:
            prompted = self.llm.model(inputs_embeds=inputs_embeds, past_key_values=DynamicCache(), use_cache=True, return_dict=True)
            past_key_values = prompted.past_key_values

        for step in tqdm(range(num_iter), disable=not progress):
            drawn = tokens.clone()
            encoded = self.forward_mae_encoder(tokens.view(b, h, w, -1), mask.to(self.dtype), past_key_values, attention_mask)
            past_key_values.crop(inputs_embeds.shape[1] - past_key_values.get_seq_length())
            z = self.mar.forward_mae_decoder(encoded, mask.to(self.dtype), image_shape=(h, w), x_con=x_con)

            left, still_masked, chosen = next_masks(mask, orders, step, num_iter)
            mask, at = still_masked, chosen.nonzero(as_tuple=True)
            scale = guidance_scale(cfg, cfg_schedule, left, count)
            drawn[at] = self.draw(z[at], temperature, scale, step, num_iter).to(self.dtype)
            if guided:
                drawn[b // 2 :] = drawn[: b // 2]
            tokens = drawn.clone()

        images = self.decode(tokens.view(b, h, w, -1))
        return images[: b // 2] if guided else images


class OriginalHarmon(UpstreamHarmon):
    """Harmon before DiSA: a constant number of steps, UpstreamMAR's num_sampling_steps, and no clipped timesteps."""

    kind_of_head = ConstantDiffLoss

    def draw(self, z: Tensor, temperature: float, cfg: float | Tensor, step: int, num_iter: int) -> Tensor:
        return self.mar.diffloss.sample(z, temperature, cfg)


PUBLISHED_LLMS = {"num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 1e6}
SMALL: dict[str, Any] = {  # as keyword arguments, `llm` apart the MAR's
    "llm": {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 40,
    },
    "img_size": 64, "buffer_size": 4, "class_num": 2, "encoder_embed_dim": 48, "encoder_depth": 1, "encoder_num_heads": 2,
    "decoder_embed_dim": 48, "decoder_depth": 1, "decoder_num_heads": 2, "diffloss_d": 2, "diffloss_w": 32,
}  # fmt: skip


def harmon_0_5b(kind: type[UpstreamHarmon] = UpstreamHarmon, **mar: Any) -> UpstreamHarmon:
    """Harmon-0.5B: Qwen2.5-0.5B and MAR-B. Arguments of UpstreamMAR take precedence."""
    return _published(kind, (896, 4864, 24, 14), BASE | mar)


def harmon_1_5b(kind: type[UpstreamHarmon] = UpstreamHarmon, **mar: Any) -> UpstreamHarmon:
    """Harmon-1.5B: Qwen2.5-1.5B and MAR-H; see harmon_0_5b."""
    return _published(kind, (1536, 8960, 28, 12), HUGE | mar)


def harmon_small(kind: type[UpstreamHarmon] = UpstreamHarmon, **mar: Any) -> UpstreamHarmon:
    """Of the sizes SMALL, and every parameter random, so that each of them matters. Arguments as harmon_0_5b's."""
    sizes = SMALL | mar
    model = kind(sizes.pop("llm"), sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p) if p.ndim == 1 else torch.randn_like(p) * p.shape[-1] ** -0.5)
        output = model.mar.diffloss.net.final_layer.linear
        output.weight[output.out_features // 2 :] *= 0.2  # as a trained one's, the variance between its extremes
    return model.eval()


def _published(kind: type[UpstreamHarmon], llm: tuple[int, int, int, int], mar: Mapping[str, Any]) -> UpstreamHarmon:
    """llm: width, width of the MLPs, depth, heads."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return kind(dict(zip(names, llm, strict=True)) | PUBLISHED_LLMS, mar)
