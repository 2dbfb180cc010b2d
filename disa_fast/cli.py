"""The command line: disa-fast demo, disa-fast generate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from . import solvers
from .backends import BACKENDS
from .demo.data import CLASSES
from .demo.run import run_demo
from .generate import Sampling, draw_images, labels_in_turn, load_model, save_images
from .models.mar import SIZES
from .pictures import columns_of, panel, save_png
from .schedule import parse_schedule

# Settings of the shipped model: 49 tokens in 24 iterations.
DEMO_NUM_ITER = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a request that cannot be served, with the reason on stderr)."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"disa-fast {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="disa-fast", description="Autoregressive image models with diffusion heads, made fast.")
    parser.add_argument("--version", action="version", version=version("disa-fast"))
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="draw with the shipped model, with constant steps and with DiSA, and compare",
        description="""Draws images of the same classes, on one seed, with 100 constant steps and with an annealed schedule,
        writes OUT/demo.png (side by side) and OUT/demo.json, and prints network evaluations, seconds, class accuracy and Frechet
        distance. Takes one or two minutes on two CPU cores.""",
        formatter_class=_Help,
    )
    demo.add_argument("--num-images", type=_positive, default=200, help="images of each kind, classes in turn")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write into")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser(
        "generate",
        help="draw images, or latents, with a checkpoint",
        description="""Draws images and writes OUT/00000_LABEL.png and so on, and OUT/grid.png. A published MAR checkpoint draws the
        latents of its autoencoder: they are written as .npy, [16, 16, 16] float32, to be divided by 0.2325 and decoded by the KL-16
        VAE.""",
        formatter_class=_Help,
    )
    generate.add_argument("--size", choices=SIZES, help="of a published MAR checkpoint")
    generate.add_argument("--no-ema", action="store_true", help="take 'model' rather than 'model_ema' from a training checkpoint")
    generate.add_argument("--num-images", type=_positive, default=10, help="how many")
    generate.add_argument("--out", type=Path, default=Path("generated"), help="folder to write into")
    generate.set_defaults(run=_generate)

    for command in (demo, generate):
        command.add_argument("--checkpoint", type=Path, help=".pth or .safetensors; the demo's if not given")
        command.add_argument("--labels", type=_labels, metavar="N,N,...", help="classes, taken in turn; all in turn if not given")
        command.add_argument("--seed", type=int, default=0, help="of orders and noise")
        command.add_argument(
            "--schedule", type=_schedule, default="linear:50-5",
            help="denoising steps of each iteration: linear:50-5, cosine:50-5, two-stage:50-5, constant:100 or list:50,48,...",
        )  # fmt: skip
        command.add_argument("--solver", choices=solvers.NAMES, default="ddpm", help="of the denoising steps")
        command.add_argument("--clip", type=_clip, default=solvers.DEFAULT_CLIP, metavar="T|none|default",
                             help="highest timestep of ddpm (by default 950) and ddim (980)")  # fmt: skip
        command.add_argument(
            "--num-iter", type=_positive, help=f"autoregressive iterations (default: {DEMO_NUM_ITER}; with --size, 64)"
        )
        command.add_argument("--cfg", type=float, default=3.0, help="guidance scale; 1 is none")
        command.add_argument("--cfg-schedule", choices=["linear", "constant"], default="linear", help="over the iterations")
        command.add_argument("--temperature", type=float, default=1.0, help="factor on the head's step noise")
        command.add_argument("--batch-size", type=_positive, default=100, help="images at a time")
        command.add_argument(
            "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device"
        )
        command.add_argument("--backend", default="auto", help=f"auto, {', '.join(BACKENDS)}")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _demo(args: argparse.Namespace) -> int:
    model = load_model(args.checkpoint).to(args.device)
    classes = args.labels or range(len(CLASSES))
    print(run_demo(model, _sampling(args), classes, args.num_images, args.seed, args.batch_size, args.out, not args.quiet))
    print(f"\nwritten: {args.out / 'demo.png'}, {args.out / 'demo.json'}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    model = load_model(args.checkpoint, args.size, ema=not args.no_ema).to(args.device)
    classes = args.labels or range(model.class_emb.num_embeddings)
    labels = labels_in_turn(classes, args.num_images)
    images, seconds = draw_images(model, labels, _sampling(args), args.seed, args.batch_size, progress=not args.quiet)
    name_of = (lambda label: CLASSES[label].replace(" ", "-")) if args.checkpoint is None else str
    paths = save_images(images, labels, args.out, name_of)
    if paths[0].suffix == ".png":
        save_png(panel(images, columns_of([name_of(c) for c in classes])), args.out / "grid.png")
    print(f"{len(paths)} files in {args.out}, {len(paths) / seconds:.2f} images/s, {args.schedule}")
    return 0


def _sampling(args: argparse.Namespace) -> Sampling:
    names = ("schedule", "solver", "clip", "cfg", "cfg_schedule", "temperature", "backend")
    num_iter = args.num_iter or (64 if getattr(args, "size", None) else DEMO_NUM_ITER)
    return Sampling(num_iter=num_iter, **{name: getattr(args, name) for name in names})


def _schedule(text: str) -> str:
    try:
        parse_schedule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}") from None


def _clip(text: str) -> int | str | None:
    if text in ("none", solvers.DEFAULT_CLIP):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a timestep, 'none' or 'default', got {text!r}") from None


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from None
    return device


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
