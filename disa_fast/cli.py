"""The command line: disa-fast demo, disa-fast generate."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from . import solvers
from .backends import BACKENDS
from .demo.data import CLASSES, cropped
from .demo.run import BASELINE_STEPS, run_demo
from .generate import SYSTEMS, Sampling, System, classes_of, draw_images, labels_in_turn, load_model, save_images
from .pictures import columns_of, panel, save_png
from .schedule import parse_schedule


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
        help="draw with a shipped model, with constant steps and with DiSA, and compare",
        description=f"""Draws images of the same classes, on one seed, with constant steps
        ({", ".join(f"{system} {steps}" for system, steps in BASELINE_STEPS.items())}) and with an annealed schedule,
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
        description="""Draws images and writes OUT/00000_LABEL.png and so on, and OUT/grid.png. A published checkpoint draws the
        latents of an autoencoder: they are written as .npy, [16, 16, 16] float32, to be divided by 0.2325 and decoded by MAR's
        KL-16 VAE.""",
        formatter_class=_Help,
    )
    generate.add_argument("--size", help=f"of a published checkpoint: {_by_system(lambda s: s.sizes)}")
    generate.add_argument("--no-ema", action="store_true", help="take 'model' rather than 'model_ema' from a training checkpoint")
    generate.add_argument("--num-images", type=_positive, default=10, help="how many")
    generate.add_argument("--out", type=Path, default=Path("generated"), help="folder to write into")
    generate.set_defaults(run=_generate)

    for command in (demo, generate):
        command.add_argument("--system", choices=SYSTEMS, default="mar", help="which model")
        command.add_argument("--checkpoint", type=Path, help=".pth or .safetensors; the demo's if not given")
        command.add_argument("--labels", type=_labels, metavar="N,N,...", help="classes, taken in turn; all in turn if not given")
        command.add_argument("--seed", type=int, default=0, help="of orders and noise")
        command.add_argument("--batch-size", type=_positive, default=100, help="images at a time")
        command.add_argument(
            "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device"
        )
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        _add_sampling(command)
    return parser


def _add_sampling(command: argparse.ArgumentParser) -> None:
    """The options that are fields of a Sampling; those not given are absent from what is parsed."""
    options = command.add_argument_group("sampling", "Options whose defaults name some systems alone are theirs alone.")

    def add(name: str, help: str, **kwargs) -> None:
        options.add_argument(name, default=argparse.SUPPRESS, help=f"{help} ({_defaults(name)})", **kwargs)

    forms = "linear:50-5, cosine:50-5, two-stage:50-5, constant:100 or list:50,48,..."
    add("--schedule", type=_schedule, help=f"denoising steps of each iteration, scale or cell: {forms}")
    add("--solver", metavar="NAME", help=f"of the denoising steps: {_by_system(lambda s: s.solvers)}")
    add("--clip", type=_clip, metavar="T|none|default", help="highest timestep of ddpm (by default 950) and ddim (980)")
    add("--num-iter", type=_positive, help="autoregressive iterations")
    add("--cfg", type=float, help="guidance scale; 1 is none")
    add("--cfg-schedule", choices=["linear", "constant"], help="over the iterations")
    add("--guidance", type=_guidance, metavar="LOW,HIGH", help="times between which there is guidance, 1 being noise")
    add("--temperature", type=float, help="factor on the step noise")
    add("--backend", help=f"auto, {', '.join(BACKENDS)}")


def _by_system(names_of: Callable[[System], Iterable[str]]) -> str:
    return "; ".join(f"{name} {', '.join(names_of(system))}" for name, system in SYSTEMS.items())


def _defaults(option: str) -> str:
    """'default: flowar 0,0.9; xar 0,1': of the systems that have it; 'default: auto' where all have the same."""
    field, shown = option.removeprefix("--").replace("-", "_"), {}
    for name, system in SYSTEMS.items():
        if field in vars(system.demo):
            demo, published = (_shown(vars(settings)[field]) for settings in (system.demo, system.published))
            shown[name] = demo if demo == published else f"{demo}, with --size {published}"
    alike = len(shown) == len(SYSTEMS) and len(set(shown.values())) == 1
    return "default: " + (shown["mar"] if alike else "; ".join(f"{name} {text}" for name, text in shown.items()))


def _shown(value: object) -> str:
    return ",".join(f"{bound:g}" for bound in value) if isinstance(value, tuple) else str(value)


def _demo(args: argparse.Namespace) -> int:
    sampling = _sampling(args)
    model = load_model(args.checkpoint, system=args.system).to(args.device)
    shown = not args.quiet
    print(run_demo(args.system, model, sampling, args.labels, args.num_images, args.seed, args.batch_size, args.out, shown))
    print(f"\nwritten: {args.out / 'demo.png'}, {args.out / 'demo.json'}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    sampling = _sampling(args)
    model = load_model(args.checkpoint, args.size, not args.no_ema, args.system).to(args.device)
    classes = classes_of(model, args.labels)
    labels = labels_in_turn(classes, args.num_images)
    images, seconds = draw_images(model, labels, sampling, args.seed, args.batch_size, progress=not args.quiet)
    name_of = str
    if args.checkpoint is None:
        images, name_of = cropped(images), lambda label: CLASSES[label].replace(" ", "-")
    paths = save_images(images, labels, args.out, name_of)
    if paths[0].suffix == ".png":
        save_png(panel(images, columns_of([name_of(c) for c in classes])), args.out / "grid.png")
    print(f"{len(paths)} files in {args.out}, {len(paths) / seconds:.2f} images/s, {sampling.schedule}")
    return 0


def _sampling(args: argparse.Namespace) -> Sampling:
    """The system's settings, with what was given put in. ValueError for an option or a solver that the system does not have."""
    system = SYSTEMS[args.system]
    settings = system.published if getattr(args, "size", None) else system.demo
    options = set().union(*(vars(other.demo) for other in SYSTEMS.values()))
    given = {name: value for name, value in vars(args).items() if name in options}
    for name in given:
        if name not in vars(settings):
            raise ValueError(f"--{name.replace('_', '-')}: system {args.system} has no such option")
    if given.get("solver", settings.solver) not in system.solvers:
        expected = ", ".join(system.solvers)
        raise ValueError(f"--solver: expected one of {expected} for system {args.system}, got {given['solver']!r}")
    return dataclasses.replace(settings, **given)


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


def _guidance(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two times, LOW,HIGH, got {text!r}") from None
    return low, high


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
