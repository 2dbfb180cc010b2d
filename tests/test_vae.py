"""The VAE against the published network written out anew, over checkpoints with the published names and shapes."""

import importlib
import math
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from compare import assert_close

import disa_fast.vae
from disa_fast.vae import load_vae

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = {"latent_channels": 16, "ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2}
NARROW = PUBLISHED | {"ch": 32}
SMALL = NARROW | {"ch_mult": (1, 2, 4)}


def published_shapes(latent_channels, ch, ch_mult, num_res_blocks):
    """Names and shapes of a checkpoint, as published."""
    shapes = {}

    def add(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def add_block(name, before, after):
        add(f"{name}.norm1", before)
        add(f"{name}.conv1", after, before, 3, 3)
        add(f"{name}.norm2", after)
        add(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            add(f"{name}.nin_shortcut", after, before, 1, 1)

    def add_attention(name, width):
        add(f"{name}.norm", width)
        for layer in ("q", "k", "v", "proj_out"):
            add(f"{name}.{layer}", width, width, 1, 1)

    def add_middle(name, width):
        add_block(f"{name}.block_1", width, width)
        add_attention(f"{name}.attn_1", width)
        add_block(f"{name}.block_2", width, width)

    widths = [ch * m for m in ch_mult]
    last, width = len(widths) - 1, ch
    add("encoder.conv_in", ch, 3, 3, 3)
    for level in range(last + 1):
        for block in range(num_res_blocks):
            add_block(f"encoder.down.{level}.block.{block}", width, widths[level])
            width = widths[level]
            if level == last:
                add_attention(f"encoder.down.{level}.attn.{block}", width)
        if level < last:
            add(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    add_middle("encoder.mid", width)
    add("encoder.norm_out", width)
    add("encoder.conv_out", 2 * latent_channels, width, 3, 3)
    add("quant_conv", 2 * latent_channels, 2 * latent_channels, 1, 1)
    add("post_quant_conv", latent_channels, latent_channels, 1, 1)
    add("decoder.conv_in", width, latent_channels, 3, 3)
    add_middle("decoder.mid", width)
    for level in range(last, -1, -1):
        for block in range(num_res_blocks + 1):
            add_block(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
        if level > 0:
            add(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    add("decoder.norm_out", ch)
    add("decoder.conv_out", 3, ch, 3, 3)
    return shapes


class Reference:
    """The published network over a checkpoint's tensors; what there is of levels, blocks and attention, their names tell."""

    def __init__(self, state):
        self.state = state

    def has(self, name):
        return f"{name}.weight" in self.state

    def conv(self, name, x, padding=0, stride=1):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding)

    def norm(self, name, x):
        groups = x.reshape(len(x), 32, -1)
        variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
        normed = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
        return normed * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if self.has(f"{name}.nin_shortcut") else x)

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{layer}", h).flatten(2) for layer in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5, dim=2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))

    def blocks(self, name, x):
        i = 0
        while self.has(f"{name}.block.{i}.conv1"):
            x = self.block(f"{name}.block.{i}", x)
            if self.has(f"{name}.attn.{i}.q"):
                x = self.attention(f"{name}.attn.{i}", x)
            i += 1
        return x

    def middle(self, name, x):
        return self.block(f"{name}.block_2", self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", x)))

    def decode(self, z):
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        for level in (4, 3, 2, 1, 0):
            x = self.blocks(f"decoder.up.{level}", x)
            if level > 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)

    def encode(self, images):
        x = self.conv("encoder.conv_in", images, padding=1)
        for level in range(5):
            x = self.blocks(f"encoder.down.{level}", x)
            if level < 4:
                x = F.pad(x, (0, 1, 0, 1))  # right and bottom alone
                x = self.conv(f"encoder.down.{level}.downsample.conv", x, stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder.mid", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))[:, :16]


def random_state(sizes):
    """A checkpoint in which every parameter matters, and attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in published_shapes(**sizes).items():
        tensor = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            tensor *= (3 if name.endswith((".q.weight", ".k.weight")) else 1) * math.prod(shape[1:]) ** -0.5
        else:
            tensor = 0.3 * tensor + name.endswith("weight")
        state[name] = tensor
    return state


@pytest.fixture(scope="module")
def state():
    return random_state(SMALL)


@pytest.fixture(scope="module")
def path(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "kl16.ckpt"
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="module")
def small(path):
    return load_vae(path, **SMALL)


def test_decodes_and_encodes_as_published(tmp_path):
    state = random_state(NARROW)
    torch.save({"model": state}, tmp_path / "kl16.ckpt")
    reference = Reference({name: tensor.double() for name, tensor in state.items()})
    latents, images = torch.randn(2, 16, 2, 3), torch.rand(2, 3, 48, 32) * 2 - 1
    for dtype, worst in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        vae = load_vae(tmp_path / "kl16.ckpt", dtype, **NARROW)
        for actual, truth in (
            (vae.decode(latents), reference.decode(latents.double())),
            (vae.encode(images), reference.encode(images.double())),
        ):
            assert actual.dtype == dtype
            assert_close(actual, truth, worst * float(truth.abs().max()))


def test_published_size(tmp_path):
    shapes = published_shapes(**PUBLISHED)
    torch.save({"model": {name: torch.tensor(0.01).expand(shape) for name, shape in shapes.items()}}, tmp_path / "kl16.ckpt")
    vae = load_vae(tmp_path / "kl16.ckpt")
    assert sum(p.numel() for p in vae.parameters()) == 66_456_019  # 266 MB, as the published file
    assert vae.decode(torch.zeros(1, 16, 2, 2)).shape == (1, 3, 32, 32)
    assert vae.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 2, 2)


def test_images_do_not_depend_on_their_batch(small):
    vae, latents, images = small, torch.randn(3, 16, 2, 2), torch.rand(3, 3, 8, 8)
    for together, alone in (
        (vae.decode(latents), [vae.decode(z[None]) for z in latents]),
        (vae.decode(latents.to(memory_format=torch.channels_last)), [vae.decode(z[None]) for z in latents]),
        (vae.encode(images), [vae.encode(x[None]) for x in images]),
    ):
        assert torch.equal(together, torch.cat(alone))


def harmon(state):
    return {"mar.mask_token": torch.zeros(3), "llm.model.norm.weight": torch.ones(2)} | {f"vae.{n}": t for n, t in state.items()}


def with_discriminator(state):
    return state | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bare.pth", lambda state: state),
        ("averaged.pth", lambda state: {"model": state, "model_ema": {n: 2 * t for n, t in state.items()}}),  # as upstream
        ("training.ckpt", lambda state: {"model": with_discriminator(state)}),
        ("harmon.pth", harmon),
        ("harmon_training.pth", lambda state: harmon(with_discriminator(state))),
        ("kl16.safetensors", lambda state: state),
    ],
)
def test_files(state, small, tmp_path, name, content):
    save = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
    save(content(state), tmp_path / name)
    assert_same(load_vae(tmp_path / name, **SMALL), small)


def test_file_with_the_names_of_diffusers(small, tmp_path):
    safetensors.torch.save_file(small.autoencoder.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    assert_same(load_vae(tmp_path / "diffusion_pytorch_model.safetensors", **SMALL), small)


def assert_same(vae, other):
    for (name, p), q in zip(vae.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_parameters_in_the_asked_dtype(path):
    vae = load_vae(path, torch.bfloat16, **SMALL)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.training
    assert vae.decode(torch.randn(1, 16, 1, 1)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype: expected a floating point torch.dtype of 16 bits or more, got torch.int64"):
        load_vae(path, torch.int64)


MISSHAPEN = r"encoder.down.2.attn.1.q.weight: expected shape \[128, 128, 1, 1\], got \[128, 128\]"


@pytest.mark.parametrize("wrapped", [lambda state: state, harmon])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("decoder.up.1.block.0.nin_shortcut.bias"),
            r"missing 1 \({}decoder.up.1.block.0.nin_shortcut.bias\)",
        ),
        (lambda state: state.pop("decoder.norm_out.weight"), r"missing 1 \({}decoder.norm_out.weight\)"),
        (
            lambda state: state.update({"decoder.up.2.attn.0.q.bias": torch.zeros(4)}),
            r"unexpected 1 \({}decoder.up.2.attn.0.q.bias\)",
        ),
        (lambda state: state.update({"lossless": torch.zeros(4)}), r"unexpected 1 \({}lossless\)"),
        (lambda state: state.update({(n := "encoder.down.2.attn.1.q.weight"): state[n].squeeze()}), "{}" + MISSHAPEN),
    ],
)
def test_files_that_do_not_fit(state, tmp_path, monkeypatch, wrapped, change, message):
    state = dict(state)
    change(state)
    torch.save(wrapped(state), tmp_path / "vae.pth")
    monkeypatch.delattr(torch.nn.Module, "to_empty")  # nothing may be allocated
    with pytest.raises(ValueError, match="vae.pth: .*" + message.format("vae." if wrapped is harmon else "")):
        load_vae(tmp_path / "vae.pth", **SMALL)


def test_file_without_a_vae(tmp_path):
    torch.save({"llm.model.norm.weight": torch.ones(2)}, tmp_path / "harmon.pth")
    with pytest.raises(ValueError, match=r"missing 312 \(encoder.conv_in.weight, .*unexpected 1 \(llm.model.norm.weight\)"):
        load_vae(tmp_path / "harmon.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        load_vae(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.decode(torch.zeros(16, 2, 2)), r"latents: expected \[B, 16, height, width\], got \[16, 2, 2\]"),
        (lambda vae: vae.decode(torch.zeros(1, 4, 2, 2)), r"latents: expected \[B, 16, height, width\], got \[1, 4, 2, 2\]"),
        (lambda vae: vae.decode(torch.zeros(0, 16, 2, 2)), r"latents: expected \[B, 16, height, width\], got \[0, 16, 2, 2\]"),
        (
            lambda vae: vae.decode(torch.zeros(1, 16, 2, 2, dtype=torch.int64)),
            r"latents: .* floating point numbers, got \[1, 16, 2, 2\] of torch.int64",
        ),
        (lambda vae: vae.decode([[1.0]]), r"latents: expected a tensor .*got \[\[1.0\]\]"),
        (lambda vae: vae.decode(torch.zeros(1, 16, 2, 2, device="meta")), "latents: expected it on cpu, .* got meta"),
        (lambda vae: vae.encode(torch.zeros(1, 1, 32, 32)), r"images: expected \[B, 3, height, width\], .*got \[1, 1, 32, 32\]"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 8, 10)), r"images: .* multiples of 4, got \[1, 3, 8, 10\]"),
    ],
)
def test_bad_input(small, call, message):
    with pytest.raises(ValueError, match=message):
        call(small)


def test_without_diffusers(path, monkeypatch):
    monkeypatch.setattr(disa_fast, "vae", disa_fast.vae)
    monkeypatch.delitem(sys.modules, "disa_fast.vae")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    anew = importlib.import_module("disa_fast.vae")
    for make in (anew.VAE, lambda: anew.load_vae(path)):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'disa-fast\[vae\]'"):
            make()
