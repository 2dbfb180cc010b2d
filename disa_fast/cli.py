"""The command line: disa-fast demo, generate, evaluate, inspect, profile."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import profile, solvers
from .backends import BACKENDS
from .checkpoint import read_config
from .checks import usable_device
from .contents import fingerprint
from .demo.captions import caption, label_of
from .demo.data import CLASSES, cropped
from .demo.run import BASELINE_STEPS, check_demo, run_demo, runs_of
from .demo.run import FILES as DEMO_FILES
from .evaluate import WEIGHTS_NAME, evaluate_folder
from .files import check_folder
from .generate import RECORD, Kind, check_run, classes_of, generate, in_turn, processes, sample_numbered
from .heads.flow import check_guidance
from .identify import identify, report
from .infer import Given
from .models import Harmon
from .models.prompts import check_texts, encode_prompts, image_prompt, instruction
from .pictures import columns_of, panel, read_png, save_png
from .profiling import DEFAULT_SECONDS
from .schedule import parse_schedule
from .solvers.diffusion import BASE_STEPS
from .systems import (
    CUSTOM,
    SYSTEMS,
    MARSampling,
    Model,
    Sampling,
    System,
    check_settings,
    demo_checkpoint,
    image_part,
    load_model,
    tokenizer_file,
)
from .vae import LATENT_CHANNELS, LATENT_SCALE, VAE, load_vae

GRID = "grid.png"
GRID_IMAGES = 100  # at most, in it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a request that cannot be served, with the reason on stderr)."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"disa-fast {args.command}: error: {_by_flags(str(error), args.options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _by_flags(message: str, options: Collection[str]) -> str:
    """An error's message in which the arguments that it begins with are called as on the command line, where they are options."""
    names, colon, rest = message.partition(":")
    flags = [f"--{name.replace('_', '-')}" if name in options else name for name in names.split(", ")]
    return ", ".join(flags) + colon + rest


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
    generate.add_argument(
        "--size", help=f"of a published checkpoint: {_by_system(lambda s: s.sizes)}; or {CUSTOM}: as names and shapes tell"
    )
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
        description="""Prints which system and size a checkpoint is of, what of it is missing or extra, which tensors hold NaN or
        inf, and which backend its head would run on here. Reads the file from end to end, tensor by tensor. The exit status is 1
        for a file that cannot be loaded as it is, and for one with NaN or inf.""",
        formatter_class=_Help,
    )
    inspect.add_argument("checkpoint", type=Path, help=".pth or .safetensors")
    _add_size(inspect)
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
        _add_size(command)
        _add_sampling(command)
    for command in commands.choices.values():
        command.set_defaults(options={action.dest for action in command._actions if action.option_strings})
    return parser


def _add_size(command: argparse.ArgumentParser) -> None:
    """The options that say what names and shapes do not tell of a custom size."""
    command.add_argument(
        "--num-heads", type=_heads, metavar="N|N,M", help="mar, harmon: of a custom size's attention, or encoder's and decoder's"
    )
    command.add_argument("--patch-size", type=_positive, metavar="N", help="of a custom size: side of a token in latents or pixels")


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
    add("--cfg", type=float, help="guidance scale, from 0; 1 is none")
    add("--cfg-schedule", choices=["linear", "constant"], help="over the iterations")
    add("--guidance", type=_guidance, metavar="LOW,HIGH", help="times between which there is guidance, from 0 to 1, which is noise")
    add("--temperature", type=float, help="factor on the step noise, from 0")
    add("--cfg-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--image-size", type=_image_size, metavar="SIDE|HEIGHTxWIDTH", help="in pixels, None being the model's own")
    add("--backend", metavar="NAME", help=f"auto, {', '.join(BACKENDS)}")


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
    check_folder(args.out, DEMO_FILES)

    def check(model: Model, dtype: torch.dtype) -> None:
        check_demo(model)
        _kinds(args, model, of_the_demo=True)
        for settings in runs_of(args.system, sampling).values():
            check_settings(settings, model, args.batch_size, args.device, dtype)

    # A published size is of no picture that the demo can judge, so its own is not asked for.
    size = CUSTOM if args.checkpoint is not None and read_config(args.checkpoint) is None else None
    model = load_model(args.checkpoint, size, True, args.system, args.tokenizer, None, args.num_heads, args.patch_size, check).to(
        args.device
    )
    kinds, shown = _kinds(args, model, of_the_demo=True), not args.quiet
    print(run_demo(args.system, model, sampling, kinds, args.num_images, args.seed, args.batch_size, args.out, shown))
    print(f"\nwritten: {args.out / DEMO_FILES[0]}, {args.out / DEMO_FILES[1]}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    sampling = _sampling(args)
    of_checkpoint = [name for name in ("size", "num_heads", "patch_size") if getattr(args, name) is not None]
    if args.checkpoint is None and of_checkpoint:
        raise ValueError(f"{', '.join(of_checkpoint)}: expected a --checkpoint beside it; without one the demo's model draws")
    with processes() as shared:
        shared.first(lambda: check_folder(args.out, (RECORD, GRID)))
        device = args.device
        if device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        dtype = None if args.dtype is None else _DTYPES[args.dtype]
        vae = functools.cache(lambda: load_vae(args.vae))

        def check(model: Model, dtype: torch.dtype) -> None:
            kinds = _kinds(args, model, args.checkpoint is None)
            count = args.num_images or (len(kinds) if args.prompt or args.prompts else 10)
            check_settings(sampling, model, min(args.batch_size, -(-count // shared.world)), device, dtype)
            _check_prompts(args, model, [kind.subject for kind in kinds], sampling)
            _finish(args, model, vae)

        model = load_model(
            args.checkpoint, args.size, not args.no_ema, args.system, args.tokenizer, dtype, args.num_heads, args.patch_size, check
        )
        if shared.rank == 0:
            for text in vars(model).get("taken_for_granted", ()):
                print(f"disa-fast generate: taken for granted: {text}", file=sys.stderr)
        model = model.to(device)
        kinds = _kinds(args, model, of_the_demo=args.checkpoint is None)
        prompted = args.prompt or args.prompts
        in_order = in_turn(kinds, args.num_images or (len(kinds) if prompted else 10))
        finish, channels = _finish(args, model, vae)
        suffix = ".png" if channels in (1, 3) else ".npy"
        paths = [args.out / f"{i:05d}_{_slug(kind.name)}{suffix}" for i, kind in enumerate(in_order)]
        record = _record(args, model, sampling, kinds, vae)
        shared.first(lambda: check_folder(args.out, (path.name for path in paths)))
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
                save_png(panel(first, columns_of([kind.name for kind in kinds])), args.out / GRID)
            rate = f"{drawn} drawn now, {drawn / seconds:.2f} images/s"
            print(f"{len(paths)} files in {args.out}, {rate}, {sampling.schedule}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    found = evaluate_folder(args.folder, args.stats, args.weights, args.batch_size, args.device, not args.quiet)
    print(json.dumps(found, indent=1))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    found = identify(args.checkpoint, not args.no_ema, Given(args.num_heads, args.patch_size))
    print(report(found))
    unsaid = found.inferred is not None and bool(found.inferred.open)
    return int(found.system is None or found.differences > 0 or unsaid or bool(found.not_finite))


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


def _check_prompts(args: argparse.Namespace, model: Model, prompts: Sequence[Any], sampling: Sampling) -> None:
    """ValueError for prompts that a Harmon, which may be on meta, cannot read."""
    if not isinstance(model, Harmon):
        return
    if model.tokenizer is None:
        raise ValueError(f"tokenizer: expected one to read prompts with; there is no tokenizer.json beside {args.checkpoint}")
    vocabulary = model.llm.model.embed_tokens.num_embeddings
    for name, texts in (("prompt", [image_prompt(prompt) for prompt in prompts]), ("cfg_prompt", [sampling.cfg_prompt])):
        check_texts(name, texts)
        ids, _ = encode_prompts(model.tokenizer, [instruction(text) for text in texts])
        if int(ids.max()) >= vocabulary:
            raise ValueError(
                f"tokenizer: expected one that makes tokens 0..{vocabulary - 1}, which the model knows, got {int(ids.max())}"
            )


def _finish(args: argparse.Namespace, model: Model, vae: Callable[[], VAE]) -> tuple[Callable[[Tensor], Tensor], int]:
    """What makes of latents what is written, and its number of channels."""
    channels = image_part(model).vae_embed_dim
    if args.vae is None:
        return (cropped if args.checkpoint is None else lambda latents: latents), channels
    if channels != LATENT_CHANNELS:
        raise ValueError(f"--vae: decodes latents of {LATENT_CHANNELS} channels, and this model draws {channels}")
    decoder = vae()
    if model.head.device.type != "meta":
        decoder = decoder.to(model.head.device)
    scale = model.vae_scale if isinstance(model, Harmon) else LATENT_SCALE
    return (lambda latents: decoder.decode(latents.float() / scale)), 3


def _record(
    args: argparse.Namespace, model: Model, sampling: Sampling, kinds: Sequence[Kind], vae: Callable[[], VAE]
) -> dict[str, Any]:
    """What decides how the images of a run look, as JSON: of the weights a fingerprint, see disa_fast.contents."""
    checkpoint = args.checkpoint or demo_checkpoint(args.system)
    files: dict[str, Any] = {
        "checkpoint": {
            "name": None if args.checkpoint is None else args.checkpoint.name,
            "sha256": fingerprint(model.state_dict()),
            "arguments": vars(model).get("arguments"),
        },
        "vae": None if args.vae is None else {"name": args.vae.name, "sha256": fingerprint(vae().state_dict())},
        "tokenizer": None,
    }
    tokenizer = tokenizer_file(args.tokenizer, checkpoint) if args.system == "harmon" else None
    if tokenizer is not None:
        files["tokenizer"] = {"name": tokenizer.name, "sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest()}
    options = {"system": args.system, "size": args.size, "num_heads": args.num_heads, "patch_size": args.patch_size}
    options |= {"ema": not args.no_ema, "dtype": args.dtype, "seed": args.seed}
    settings = {name: value for name, value in vars(sampling).items() if name != "backend"}
    return {"version": version("disa-fast"), **options, **files, **settings, "subjects": [kind.subject for kind in kinds]}


def _sampling(args: argparse.Namespace) -> Sampling:
    """The system's settings, with what was given put in. ValueError for an option or a solver that the system does not have."""
    system = SYSTEMS[args.system]
    size = getattr(args, "size", None)
    if size not in (None, CUSTOM, *system.published):
        raise ValueError(
            f"--size: expected one of {', '.join(system.published)} for system {args.system}, or {CUSTOM}, got {size!r}"
        )
    settings = system.demo if size in (None, CUSTOM) else system.published[size]
    options = set().union(*(vars(other.demo) for other in SYSTEMS.values()))
    given = {name: value for name, value in vars(args).items() if name in options}
    for name in given:
        if name not in vars(settings):
            raise ValueError(f"--{name.replace('_', '-')}: system {args.system} has no such option")
    if given.get("solver", settings.solver) not in system.solvers:
        expected = ", ".join(system.solvers)
        raise ValueError(f"--solver: expected one of {expected} for system {args.system}, got {given['solver']!r}")
    settings = dataclasses.replace(settings, **given)
    _check_ranges(args, settings)
    return settings


def _check_ranges(args: argparse.Namespace, sampling: Sampling) -> None:
    """ValueError for a setting that no model can be drawn with."""
    if not 0 <= args.seed < 2**64:
        raise ValueError(f"--seed: expected a whole number of at least 0 and below 2**64, got {args.seed}")
    for name in ("cfg", "temperature"):
        value = getattr(sampling, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"--{name}: expected a number of at least 0, got {value:g}")
    if isinstance(sampling, MARSampling):
        solvers.resolve(sampling.solver, sampling.clip)
        if isinstance(sampling.clip, int) and not 0 <= sampling.clip < BASE_STEPS:
            raise ValueError(f"--clip: expected a timestep from 0 to {BASE_STEPS - 1}, got {sampling.clip}")
    else:
        low, high = check_guidance(sampling.guidance)
        if not (0 <= low and high <= 1):
            raise ValueError(f"--guidance: expected times from 0 to 1, got {low:g},{high:g}")
    steps = parse_schedule(sampling.schedule)
    counts = [count for name, count in vars(steps).items() if name != "rounding"]
    most = max(max(count) if isinstance(count, tuple) else count for count in counts)
    if most > BASE_STEPS:
        raise ValueError(f"--schedule: expected up to {BASE_STEPS} denoising steps, got {sampling.schedule}")


def _heads(text: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"([1-9]\d{0,8})(?:,([1-9]\d{0,8}))?", text)
    if numbers is None:
        raise argparse.ArgumentTypeError(f"expected a number of heads, or the encoder's and the decoder's, N,M, got {text!r}")
    return int(numbers[1]), int(numbers[2] or numbers[1])


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
