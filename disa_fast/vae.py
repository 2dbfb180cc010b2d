"""The KL-16 VAE that MAR, FlowAR, xAR and Harmon share: latents to images, and images to latents.

The network is AutoencoderKL of the library diffusers. The published file, kl16.ckpt, has the parameter names of latent diffusion's
code; MAR_DiSA/models/vae.py of the DiSA repository at 283fa59, of which the other three have copies, is what this was written
against. The last level of the encoder has attention, no level of the decoder has (https://github.com/LTH14/mar/issues/73).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import read_state_dict
from .checks import check_dtype, check_shapes, describe, is_dense, sized, whole
from .contents import warn_not_finite

LATENT_CHANNELS = 16
GROUPS = 32  # of channels, normalized together
LATENT_SCALE = 0.2325  # what the models draw is the VAE's latents times this

_HARMON_PREFIX = "vae."
_IGNORED_PREFIX = "loss."
_PUBLISHED = {  # diffusers' part of a name: the published one; in this order
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "down_blocks.": "down.",
    ".resnets.": ".block.",
    ".attentions.": ".attn.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".conv_norm_out.": ".norm_out.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
}


class _Pointwise(nn.Conv2d):
    """A 1x1 convolution as a matrix product: a CPU's convolution gives other last bits for another number of threads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight[:, :, 0, 0], self.bias).movedim(-1, 1).contiguous()


class VAE(nn.Module):
    """The network, freshly initialised, of the published size by default: levels of ch * ch_mult channels, from the image inwards,
    each half as wide and high as the one before.

    `autoencoder` is diffusers' AutoencoderKL. ModuleNotFoundError without diffusers.
    """

    @sized
    def __init__(
        self,
        latent_channels: int = LATENT_CHANNELS,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
    ) -> None:
        super().__init__()
        if not isinstance(ch_mult, Sequence) or not ch_mult:
            raise ValueError(f"ch_mult: expected a factor for each level, got {ch_mult!r}")
        widths = tuple(ch * whole("ch_mult", factor) for factor in ch_mult)
        if any(width % GROUPS for width in widths):
            raise ValueError(f"ch, ch_mult: expected levels of a multiple of {GROUPS} channels, got {list(widths)}")
        try:
            from diffusers import AutoencoderKL
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"the VAE needs diffusers: pip install 'disa-fast[vae]' ({error})") from error
        self.latent_channels, self.stride = latent_channels, 2 ** (len(ch_mult) - 1)
        self.autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * (len(ch_mult) - 1) + ("AttnDownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",) * len(ch_mult),
            block_out_channels=widths,
            norm_num_groups=GROUPS,
            layers_per_block=num_res_blocks,
            latent_channels=latent_channels,
        )
        for block in self.autoencoder.modules():
            shortcut = getattr(block, "conv_shortcut", None)
            if isinstance(shortcut, nn.Conv2d):
                block.conv_shortcut = _Pointwise(shortcut.in_channels, shortcut.out_channels, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, latent_channels, h, w] latents, already divided by LATENT_SCALE -> [B, 3, 16 h, 16 w] images, nominally in [-1, 1].

        Any floating dtype; the result has the VAE's. On a CPU an image's bits do not depend on the others of the batch, and are the
        same for 1, 2, 4 and 8 threads. Raises ValueError for another shape or device.
        """
        return _each(lambda z: self.autoencoder.decode(z).sample, self._checked("latents", latents, self.latent_channels, 1))

    def encode(self, images: Tensor) -> Tensor:
        """The inverse: [B, 3, 16 h, 16 w] images in [-1, 1] -> [B, latent_channels, h, w], the mean of the posterior, not yet times
        LATENT_SCALE. Everything else as in `decode`."""
        return _each(lambda x: self.autoencoder.encode(x).latent_dist.mode(), self._checked("images", images, 3, self.stride))

    def _checked(self, name: str, batch: Tensor, channels: int, multiple: int) -> Tensor:
        weight = self.autoencoder.post_quant_conv.weight
        if not is_dense(batch) or not batch.is_floating_point():
            raise ValueError(f"{name}: expected a tensor of floating point numbers, got {describe(batch)}")
        if batch.ndim != 4 or not batch.numel() or batch.shape[1] != channels or any(side % multiple for side in batch.shape[2:]):
            sides = "" if multiple == 1 else f", height and width multiples of {multiple}"
            raise ValueError(f"{name}: expected [B, {channels}, height, width]{sides}, got {list(batch.shape)}")
        if batch.device != weight.device:
            raise ValueError(f"{name}: expected it on {weight.device}, where the VAE is, got {batch.device}")
        return batch.to(weight.dtype).contiguous()


def _each(network: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """The network on a batch: image by image on a CPU, whose library picks convolutions and matrix products by batch size, else
    few enough at a time to fit: one of 256 x 256 pixels takes some 200 MB in float32."""
    return torch.cat([network(part) for part in batch.split(1 if batch.device.type == "cpu" else 16)])


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> VAE:
    """The VAE of a file, on the CPU, in eval mode, its parameters in `dtype` and without gradients.

    path: a .ckpt or .pth with {"model": ...} or a bare state dict, or a .safetensors. Either with the names of kl16.ckpt or with
        those of diffusers' AutoencoderKL; of a whole Harmon checkpoint the parameters named vae.* are taken.
    sizes: arguments of VAE, for a file of other sizes than the published ones.

    Ignored are parameters named loss.*, those of the discriminator, which training runs of latent diffusion's code keep beside the
    VAE; kl16.ckpt has none. Raises FileNotFoundError, ModuleNotFoundError without diffusers, and ValueError, which names what is
    missing, unexpected or misshapen as the file does; nothing is allocated before that is known. A UserWarning
    names tensors that hold NaN or inf.
    """
    check_dtype(dtype)
    with torch.device("meta"):
        vae = VAE(**sizes)
    state = read_state_dict(path, ema=False)
    prefix = _HARMON_PREFIX if any(name.startswith(_HARMON_PREFIX) for name in state) else ""
    state = {n: t for n, t in state.items() if n.startswith(prefix) and not n.startswith(prefix + _IGNORED_PREFIX)}
    own = vae.autoencoder.state_dict()
    levels, as_diffusers = len(vae.autoencoder.decoder.up_blocks), f"{prefix}decoder.conv_norm_out.weight" in state
    theirs = {n: (n, t.shape) if as_diffusers else _published(n, t.shape, levels) for n, t in own.items()}
    expected = {prefix + name: shape for name, shape in theirs.values()}
    check_shapes(expected, {name: tensor.shape for name, tensor in state.items()}, str(path))
    vae.to(dtype).to_empty(device="cpu")
    vae.autoencoder.load_state_dict({name: state[prefix + theirs[name][0]].reshape(tensor.shape) for name, tensor in own.items()})
    warn_not_finite(path, vae.state_dict())
    return vae.eval().requires_grad_(False)


def _published(name: str, shape: Sequence[int], levels: int) -> tuple[str, Sequence[int]]:
    """(name, shape) in kl16.ckpt of a parameter of diffusers': there the decoder's levels count from the image inwards, as the
    encoder's do, and attention's linear layers are 1x1 convolutions."""
    linear = ".attentions." in name and len(shape) == 2
    for own, published in _PUBLISHED.items():
        name = name.replace(own, published)
    name = re.sub(r"up_blocks\.(\d+)", lambda level: f"up.{levels - 1 - int(level[1])}", name)
    return name, (*shape, 1, 1) if linear else shape
