"""Train what the demo ships: `python -m disa_fast.demo.train mar`, and likewise flowar, xar, harmon and classifier.

All are small enough for two CPU cores. The models work on pixels, 4x4 patches of Fashion-MNIST images being tokens of 16 channels,
the token size of the published models: 49 of them for MAR and Harmon, 64 for FlowAR and xAR, whose images get a margin to be
32x32. Harmon learns from captions, and starts from the shipped MAR, as the published one started from MAR's weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..checkpoint import load_checkpoint, save_checkpoint
from ..files import written_aside
from ..models import MAR, Harmon, flowar, harmon, mar, xar
from ..models.prompts import encode_prompts
from ..systems import DEMO_WEIGHTS
from . import data
from .captions import NOUNS, SHADES, VOCABULARY, every_prompt, make_tokenizer, shades
from .quality import Classifier

MAR_CONFIG = {
    "img_size": 28,
    "vae_stride": 1,
    "patch_size": 4,
    "vae_embed_dim": 1,
    "class_num": 10,
    "encoder_embed_dim": 128,
    "encoder_depth": 3,
    "encoder_num_heads": 4,
    "decoder_embed_dim": 128,
    "decoder_depth": 3,
    "decoder_num_heads": 4,
    "buffer_size": 8,
    "diffloss_d": 3,
    "diffloss_w": 192,
    "diffusion_batch_mul": 2,
    "attn_dropout": 0.0,
    "proj_dropout": 0.0,
}
_PADDED = {"img_size": 32, "vae_stride": 1, "patch_size": 4, "vae_embed_dim": 1, "class_num": 10}
_SMALL = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in (("embed_dim", 128), ("num_heads", 4))}
FLOWAR_CONFIG = {
    **_PADDED,
    **_SMALL,
    "encoder_depth": 2,
    "decoder_depth": 2,
    "scale": [1, 2, 4, 8],
    "diffloss_d": 2,
    "diffloss_w": 128,
    "cross": True,
}
XAR_CONFIG = {**_PADDED, **_SMALL, "encoder_depth": 3, "decoder_depth": 3, "clusters": 4}
HARMON_CONFIG = {
    **MAR_CONFIG,
    "vae_scale": 1.0,
    "llm": {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
    },
}
MODELS = {"mar": (mar, MAR_CONFIG), "flowar": (flowar, FLOWAR_CONFIG), "xar": (xar, XAR_CONFIG), "harmon": (harmon, HARMON_CONFIG)}
STEPS = {"mar": 7000, "flowar": 3500, "xar": 4500, "harmon": 4500, "classifier": 3000}
PROMPT_DROP = 0.1  # captions replaced by the generic prompt, to learn what guidance leads away from
EMA = 0.999
LOG_EVERY = 50
SAVE_EVERY = 500


def train_model(args: argparse.Namespace) -> None:
    images, labels = data.fashion_mnist("train", args.data)
    make, config = MODELS[args.what]
    torch.manual_seed(args.seed)
    model = make(**config).to(args.device)
    if args.what == "harmon":
        load_checkpoint(model.mar, DEMO_WEIGHTS / "mar_fashion_mnist.safetensors")
        conditions = _captions(images, labels, args.out.with_suffix(".tokenizer.json"))
    else:
        conditions = lambda batch: (labels[batch],)  # noqa: E731
    images = data.padded(images, config["img_size"]).to(args.device)
    if args.resume:
        load_checkpoint(model, args.resume)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_then_cosine(step, args.steps))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    first = None
    if args.compile:
        _compile(model)

    device_type = torch.device(args.device).type
    # On a CPU the fused attention's backward is slower than the plain one at MAR's 57 tokens in bfloat16 (bench/NOTES.md).
    attention = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device_type == "cpu" and args.what in ("mar", "harmon"):
        attention = [SDPBackend.MATH]
    curve, losses, started = [], [], time.perf_counter()
    order, position = torch.randperm(len(images)), 0
    model.train()
    for step in tqdm(range(1, args.steps + 1), desc=f"training {args.what}", mininterval=5):
        if position + args.batch > len(order):
            order, position = torch.randperm(len(images)), 0
        batch = order[position : position + args.batch]
        inputs = [images[batch.to(args.device)], *(tensor.to(args.device) for tensor in conditions(batch))]
        position += args.batch
        with torch.autocast(device_type, torch.bfloat16, enabled=args.bf16), sdpa_kernel(attention):
            loss = model(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        ema.update_parameters(model)
        first = first or [p.detach().clone() for p in ema.module.parameters()]
        losses.append(float(loss.detach()))
        last = step == args.steps
        if step % LOG_EVERY == 0 or last:
            curve.append([step, round(sum(losses) / len(losses), 5), round(time.perf_counter() - started, 1)])
            losses.clear()
        if step % SAVE_EVERY == 0 or last:
            _save(args, model, _unbiased(ema, first), curve)


def _captions(images: Tensor, labels: Tensor, path: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What gives captions of pictures by their numbers, as (input_ids, attention_mask); their tokenizer is written to `path`."""
    texts = every_prompt()
    tokenizer = make_tokenizer(texts)
    with written_aside(path) as aside:
        tokenizer.save(str(aside))
    input_ids, mask = encode_prompts(tokenizer, texts)
    generic, frames = len(texts) - 1, len(texts) // (len(NOUNS) * len(SHADES))
    first = (labels * len(SHADES) + shades(images, labels)) * frames
    plain = labels * len(SHADES) * frames

    def conditions(batch: Tensor) -> tuple[Tensor, Tensor]:
        named = torch.where(torch.rand(len(batch)) < 0.5, first[batch], plain[batch])  # half of them say how light it is
        chosen = named + torch.randint(frames, (len(batch),))
        chosen[torch.rand(len(batch)) < PROMPT_DROP] = generic
        return input_ids[chosen], mask[chosen]

    return conditions


def _unbiased(ema: AveragedModel, first: list[Tensor]) -> list[Tensor]:
    """The averages without what is left in them of the first weights, which are as good as random: a tenth after 2300 steps."""
    left = EMA ** (int(ema.n_averaged) - 1)
    if left == 1:
        return first
    return [(p.detach() - left * p0) / (1 - left) for p, p0 in zip(ema.module.parameters(), first, strict=True)]


def _save(args: argparse.Namespace, model: nn.Module, averages: list[Tensor], curve: list) -> None:
    names = [name for name, _ in model.named_parameters()]
    state = dict(zip(names, (p.half().cpu() for p in averages), strict=True))
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in state}
    save_checkpoint(args.out, state | buffers, args.what, MODELS[args.what][1])
    log = {
        "what": args.what,
        "seed": args.seed,
        "steps": curve[-1][0],
        "of": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "ema": EMA,
        "resumed": str(args.resume and args.resume.name),
        "seconds": curve[-1][2],
        "threads": torch.get_num_threads(),
        "device": args.device,
        "bf16": args.bf16,
        "compile": args.compile,
        "torch": torch.__version__,
        "curve": {"columns": ["step", "loss", "seconds"], "rows": curve},
    }
    with written_aside(args.out.with_suffix(".json")) as path:
        path.write_text(json.dumps(log, separators=(",", ":")) + "\n")


def train_classifier(args: argparse.Namespace) -> None:
    images, labels = data.fashion_mnist("train", args.data)
    torch.manual_seed(args.seed)
    model = Classifier().to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_then_cosine(step, args.steps))
    model.train()
    for _ in tqdm(range(args.steps), desc="training classifier", mininterval=5):
        batch = torch.randint(0, len(images), (args.batch,))
        x = images[batch].to(args.device)
        flipped = torch.where(torch.rand(len(x), 1, 1, 1, device=args.device) < 0.5, x.flip(-1), x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(model.logits(model(flipped)), labels[batch].to(args.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    model = model.eval().cpu()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())  # what is measured is what is shipped
    accuracy = _measure_real_images(model, args.data)
    weights = {name: p.detach().half() for name, p in model.named_parameters()}
    save_checkpoint(args.out, weights | dict(model.named_buffers()), "classifier", {})
    log = {"what": "classifier", "seed": args.seed, "steps": args.steps, "test_accuracy": accuracy, "torch": torch.__version__}
    with written_aside(args.out.with_suffix(".json")) as path:
        path.write_text(json.dumps(log) + "\n")
    print(f"accuracy on the 10000 test images: {accuracy:.4f}")


@torch.no_grad()
def _measure_real_images(model: Classifier, folder: Path) -> float:
    """Fill the classifier's feature statistics from the 10000 test images; returns its accuracy on them."""
    images, labels = data.fashion_mnist("t10k", folder)
    features = torch.cat([model(part) for part in images.split(500)])
    model.real_sum.copy_(features.double().sum(dim=0))
    model.real_cov_sum.copy_(features.double().T @ features.double())
    model.real_count.fill_(len(features))
    return float((model.logits(features).argmax(dim=1) == labels).double().mean())


def _warm_up_then_cosine(step: int, steps: int, warm_up: int = 200) -> float:
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _compile(model: nn.Module) -> None:
    """All of it; of a MAR, which changes shape with every batch's mask ratio, what repeats."""
    if isinstance(model, Harmon):
        model = model.mar
    if isinstance(model, MAR):
        for part in (*model.encoder_blocks, *model.decoder_blocks, model.diffloss.net):
            part.compile(dynamic=True)
    else:
        model.compile()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m disa_fast.demo.train", description=__doc__)
    parser.add_argument("what", choices=list(STEPS), nargs="?", default="mar")
    parser.add_argument("--data", type=Path, default=data.DEFAULT_FOLDER, help="folder with the four idx .gz files")
    parser.add_argument(
        "--out",
        type=Path,
        help="safetensors file to write (default: WHAT_fashion_mnist.safetensors here); the log goes beside it as .json",
    )
    parser.add_argument("--steps", type=int, help=f"optimizer steps {STEPS}")
    parser.add_argument("--resume", type=Path, help="safetensors file of such a run to go on from; the optimizer starts anew")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the blocks")
    args = parser.parse_args()
    args.out = args.out or Path(f"{args.what}_fashion_mnist.safetensors")
    args.steps = args.steps or STEPS[args.what]
    if args.what == "classifier":
        train_classifier(args)
    else:
        train_model(args)


if __name__ == "__main__":
    main()
