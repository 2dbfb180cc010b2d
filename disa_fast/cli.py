"""The command line: disa-fast demo, generate, evaluate, inspect, profile."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import profile, solvers
from .backends import BACKENDS
from .checks import usable_device
from .demo.captions import caption, label_of
from .demo.data import CLASSES, cropped
from .demo.run import BASELINE_STEPS, run_demo
from .evaluate import WEIGHTS_NAME, evaluate_folder
from .generate import Kind, check_run, classes_of, generate, in_turn, processes, sample_numbered
from .identify import identify, report
from .models import Harmon
from .pictures import columns_of, panel, read_png, save_png
from .profiling import DEFAULT_SECONDS
from .schedule import parse_schedule
from .systems import SYSTEMS, Model, Sampling, System, image_part, load_model
from .vae import LATENT_CHANNELS, LATENT_SCALE, load_vae

GRID_IMAGES = 100  # at most, in grid.png


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a request that cannot be served, with the reason on stderr)."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"disa-fast {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        help="draw images with a checkpoint",
        description="""Draws images into OUT/00000_NAME.png and so on, and OUT/grid.png of the first of them. Stopped, it goes on
        where it was when run again with the same settings. Each image has a random stream of its own, so that it does not depend on
        batch size and number of processes: torchrun --nproc-per-node N -m disa_fast.cli generate ... shares them out, one process
        a GPU. Without --vae the latents of a published checkpoint are written as .npy, [16, height, width] float32, to be divided
        by 0.2325 and decoded.""",
        formatter_class=_Help,
    )
    generate.add_argument("--size", help=f"of a published checkpoint: {_by_system(lambda s: s.sizes)}")
    generate.add_argument("--vae", type=Path, help="the KL-16 VAE that decodes latents: kl16.ckpt, or in diffusers' layout")
    generate.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: float32; harmon, with --size, bfloat16)")
    generate.add_argument("--num-images", type=_positive, help="how many (default: 10, or one for each prompt)")
    generate.add_argument("--out", type=Path, default=Path("generated"), help="folder to write into")
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser(
        "evaluate",
        help="FID and Inception Score of a folder of images",
        description="""Prints, as JSON, what the authors of MAR and of the others report of 50000 generated images: FID against the
        statistics of a reference, and the Inception Score. Nothing is downloaded.""",
        formatter_class=_Help,
    )
    evaluate.add_argument("folder", type=Path, help="with the images, *.png")
    evaluate.add_argument(
        "--stats", type=Path, help=".npz with mu and sigma, such as adm_in256_stats.npz; without it there is no FID"
    )
    evaluate.add_argument("--weights", type=Path, help=f"{WEIGHTS_NAME} of torch-fidelity (default: where that has put it)")
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint is",
        description="""Prints which system and size a checkpoint is of, what of it is missing or extra, and which backend its head
        would run on here. Reads names and shapes alone. The exit status is 1 for a file that cannot be loaded as it is.""",
        formatter_class=_Help,
    )
    inspect.add_argument("checkpoint", type=Path, help=".pth or .safetensors")
    inspect.set_defaults(run=_inspect)

    profiled = commands.add_parser(
        "profile",
        help="run a command and say where its time goes",
        description="""Runs a command that draws images with this package (disa-fast profile -- python draw.py, -- disa-fast demo,
        -- torchrun ...) under Nsight Systems or torch.profiler, and prints the shares of head, backbone, copies and gaps, the time
        of each AR step, and the longest operators or kernels. Leaves the tool's own files in OUT/raw and what is printed in
        OUT/summary.json. The exit status is the command's. See docs/profiling.md.""",
        formatter_class=_Help,
    )
    profiled.add_argument(
        "--tool", choices=profile.TOOLS, default="auto", help="auto is nsys where that and a GPU are there, else torch"
    )
    profiled.add_argument("--out", type=Path, default=Path("profile-out"), help="folder to write into")
    profiled.add_argument(
        "--seconds",
        type=_seconds,
        help=f"torch: of recording, after which only new kinds of images are, up to as many more (default: {DEFAULT_SECONDS:g})",
    )
    profiled.add_argument(
        "--graph-kernels", action="store_true", help="nsys: trace kernels within CUDA graphs, each of which then takes longer"
    )
    profiled.add_argument("argv", nargs="+", metavar="COMMAND", help="behind --, with its arguments")
    profiled.set_defaults(run=_profile)

    for command in (generate, inspect):
        command.add_argument(
            "--no-ema", action="store_true", help="take 'model' rather than 'model_ema' from a training checkpoint"
        )
    for command in (demo, generate, evaluate):
        command.add_argument("--batch-size", type=_positive, default=100, help="images at a time")
        command.add_argument(
            "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device"
        )
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    for command in (demo, generate):
        command.add_argument("--system", choices=SYSTEMS, default="mar", help="which model")
        command.add_argument("--checkpoint", type=Path, help=".pth or .safetensors; the demo's if not given")
        command.add_argument("--labels", type=_labels, metavar="N,N,...", help="classes, taken in turn; all in turn if not given")
        command.add_argument("--prompt", action="append", metavar="TEXT", help="harmon: what to draw; several are taken in turn")
        command.add_argument("--prompts", type=_prompts, metavar="FILE", help='one a line, or .json: [{"prompt": ...}, ...]')
        command.add_argument("--tokenizer", type=Path, help="harmon: tokenizer.json (default: that beside the checkpoint)")
        command.add_argument("--seed", type=int, default=0, help="of orders and noise")
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
    add("--cfg-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--image-size", type=_image_size, metavar="SIDE|HEIGHTxWIDTH", help="in pixels, None being the model's own")
    add("--backend", help=f"auto, {', '.join(BACKENDS)}")


def _by_system(names_of: Callable[[System], Iterable[str]]) -> str:
    return "; ".join(f"{name} {', '.join(names_of(system))}" for name, system in SYSTEMS.items())


def _defaults(option: str) -> str:
    """'default: flowar 0,0.9; xar 0,1': of the systems that have it; 'default: auto' where all have the same."""
    field, shown = option.removeprefix("--").replace("-", "_"), {}
    for name, system in SYSTEMS.items():
        if field in vars(system.demo):
            demo = _shown(vars(system.demo)[field])
            sizes = list(dict.fromkeys(_shown(vars(settings)[field]) for settings in system.published.values()))
            shown[name] = demo if sizes == [demo] else f"{demo}, with --size {' or '.join(sizes)}"
    alike = len(shown) == len(SYSTEMS) and len(set(shown.values())) == 1
    return "default: " + (shown["mar"] if alike else "; ".join(f"{name} {text}" for name, text in shown.items()))


def _shown(value: object) -> str:
    return ",".join(f"{bound:g}" for bound in value) if isinstance(value, tuple) else str(value)


def _demo(args: argparse.Namespace) -> int:
    sampling = _sampling(args)
    model = load_model(args.checkpoint, system=args.system, tokenizer=args.tokenizer).to(args.device)
    kinds, shown = _kinds(args, model, of_the_demo=True), not args.quiet
    print(run_demo(args.system, model, sampling, kinds, args.num_images, args.seed, args.batch_size, args.out, shown))
    print(f"\nwritten: {args.out / 'demo.png'}, {args.out / 'demo.json'}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    sampling = _sampling(args)
    with processes() as shared:
        device = args.device
        if device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        dtype = None if args.dtype is None else _DTYPES[args.dtype]
        model = load_model(args.checkpoint, args.size, not args.no_ema, args.system, args.tokenizer, dtype).to(device)
        kinds = _kinds(args, model, of_the_demo=args.checkpoint is None)
        prompted = args.prompt or args.prompts
        in_order = in_turn(kinds, args.num_images or (len(kinds) if prompted else 10))
        finish, channels = _finish(args, model)
        suffix = ".png" if channels in (1, 3) else ".npy"
        paths = [args.out / f"{i:05d}_{_slug(kind.name)}{suffix}" for i, kind in enumerate(in_order)]
        record = _record(args, sampling, kinds)
        shared.first(lambda: check_run(args.out, record, paths))

        def draw(numbers: Sequence[int]) -> Tensor:
            subjects = [in_order[i].subject for i in numbers]
            return finish(sample_numbered(model, subjects, numbers, sampling, args.seed))

        started = time.perf_counter()
        batch = min(args.batch_size, -(-len(paths) // shared.world))  # work for every process
        drawn = shared.total(generate(draw, paths, record, batch, shared, not args.quiet))
        seconds = time.perf_counter() - started
        if shared.rank == 0:
            if suffix == ".png":
                first = torch.stack([read_png(path) for path in paths[:GRID_IMAGES]])
                save_png(panel(first, columns_of([kind.name for kind in kinds])), args.out / "grid.png")
            rate = f"{drawn} drawn now, {drawn / seconds:.2f} images/s"
            print(f"{len(paths)} files in {args.out}, {rate}, {sampling.schedule}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    found = evaluate_folder(args.folder, args.stats, args.weights, args.batch_size, args.device, not args.quiet)
    print(json.dumps(found, indent=1))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    found = identify(args.checkpoint, not args.no_ema)
    print(report(found))
    return int(found.system is None or found.differences > 0)


def _profile(args: argparse.Namespace) -> int:
    status, summary = profile.profile(args.argv, args.out, args.tool, args.seconds, args.graph_kernels)
    if summary is not None:
        print(f"\n{profile.report(summary)}\n\nwritten: {args.out / 'summary.json'}, {args.out / 'raw'}")
    return status


def _kinds(args: argparse.Namespace, model: Model, of_the_demo: bool) -> list[Kind]:
    """What to draw in turn. ValueError for options that the model cannot serve."""
    prompts = [*(args.prompt or []), *(args.prompts or [])]
    if not isinstance(model, Harmon):
        if prompts:
            raise ValueError(f"--prompt: system {args.system} draws classes; see --labels")
        classes = classes_of(model, args.labels)
        return [Kind(c, CLASSES[c] if of_the_demo and c < len(CLASSES) else str(c), c) for c in classes]
    if prompts and args.labels is not None:
        raise ValueError("--labels: expected either classes or prompts, got both")
    if prompts:
        return [Kind(prompt, prompt, label_of(prompt)) for prompt in prompts]
    if not of_the_demo:
        raise ValueError("--prompt: expected what to draw, or --prompts FILE; got none")
    labels = range(len(CLASSES)) if args.labels is None else args.labels
    if not all(0 <= c < len(CLASSES) for c in labels):
        raise ValueError(f"--labels: expected classes 0..{len(CLASSES) - 1}, got {labels}")
    return [Kind(caption(c), CLASSES[c], c) for c in labels]


def _slug(text: str) -> str:
    """The beginning of a text, as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].rstrip("-") or "image"


def _finish(args: argparse.Namespace, model: Model) -> tuple[Callable[[Tensor], Tensor], int]:
    """What makes of latents what is written, and its number of channels."""
    channels = image_part(model).vae_embed_dim
    if args.vae is None:
        return (cropped if args.checkpoint is None else lambda latents: latents), channels
    if channels != LATENT_CHANNELS:
        raise ValueError(f"--vae: decodes latents of {LATENT_CHANNELS} channels, and this model draws {channels}")
    vae = load_vae(args.vae).to(model.head.device)
    scale = model.vae_scale if isinstance(model, Harmon) else LATENT_SCALE
    return (lambda latents: vae.decode(latents.float() / scale)), 3


def _record(args: argparse.Namespace, sampling: Sampling, kinds: Sequence[Kind]) -> dict[str, Any]:
    """What decides how the images of a run look, as JSON."""
    files = {
        name: None if path is None else {"name": path.name, "bytes": path.stat().st_size}
        for name, path in (("checkpoint", args.checkpoint), ("vae", args.vae), ("tokenizer", args.tokenizer))
    }
    options = {"system": args.system, "size": args.size, "ema": not args.no_ema, "dtype": args.dtype, "seed": args.seed}
    settings = {name: value for name, value in vars(sampling).items() if name != "backend"}
    return {"version": version("disa-fast"), **options, **files, **settings, "subjects": [kind.subject for kind in kinds]}


def _sampling(args: argparse.Namespace) -> Sampling:
    """The system's settings, with what was given put in. ValueError for an option or a solver that the system does not have."""
    system = SYSTEMS[args.system]
    size = getattr(args, "size", None)
    if size is not None and size not in system.published:
        raise ValueError(f"--size: expected one of {', '.join(system.published)} for system {args.system}, got {size!r}")
    settings = system.demo if size is None else system.published[size]
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


def _prompts(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        entries = json.loads(text) if path.endswith(".json") else text.splitlines()
        prompts = [entry["prompt"] if isinstance(entry, dict) else entry for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"cannot read prompts from {path!r}: {type(error).__name__}: {error}") from None
    prompts = [prompt.strip() if isinstance(prompt, str) else prompt for prompt in prompts]
    if not all(isinstance(prompt, str) for prompt in prompts) or not any(prompts):
        raise argparse.ArgumentTypeError(f"expected a file of prompts, got {path!r}")
    return [prompt for prompt in prompts if prompt]


def _image_size(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"expected SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(sides[1]), int(sides[2] or sides[1])


def _device(text: str) -> torch.device:
    try:
        device = usable_device("device", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if device.type == "meta":
        raise argparse.ArgumentTypeError(f"expected a device that computes, got {text!r}")
    return device


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


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
