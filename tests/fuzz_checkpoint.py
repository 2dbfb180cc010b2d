"""Checkpoints of random bytes: whatever a file holds, it is read as promised, or refused by a ValueError in words, soon, and
without memory for what it only claims to hold.

    python tests/fuzz_checkpoint.py -atheris_runs=10000

Needs atheris (Linux). Small valid files of each format are the start; what libFuzzer makes of them is led by the coverage of the
loader and of PyTorch's. An input is a byte that picks the suffix, and the file. One that fails is left in the folder that is
printed.
"""

import argparse
import atexit
import collections
import contextlib
import io
import json
import random
import resource
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

LOADERS = [f"disa_fast.{name}" for name in ("checkpoint", "contents", "formats", "identify", "infer")]
LOADERS += ["torch.serialization", "torch._weights_only_unpickler", "zipfile"]
with atheris.instrument_imports(include=LOADERS, enable_loader_override=False):
    import torch

    from disa_fast import checkpoint, models
    from disa_fast.errors import UnsupportedError
    from disa_fast.identify import identify, report

SUFFIXES = (".pth", ".safetensors")
BACKBONE = {
    f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("embed_dim", 8), ("depth", 1), ("num_heads", 1))
}
BACKBONE |= {"img_size": 16, "class_num": 2}
LLM = {"vocab_size": 3, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
LLM |= {"num_key_value_heads": 1}
MAR = BACKBONE | {"buffer_size": 1, "diffloss_d": 1, "diffloss_w": 4}
SIZES = {
    "mar": MAR,
    "flowar": BACKBONE | {"scale": [1], "diffloss_d": 1, "diffloss_w": 64},
    "xar": BACKBONE | {"clusters": 1},
    "harmon": MAR | {"llm": LLM},
}
MOST_BYTES = 256 << 20  # that an input of a few kilobytes may make resident
MOST_SECONDS = 20

WORK = Path(tempfile.mkdtemp(prefix="fuzz_checkpoint_"))
SEEN: collections.Counter[str] = collections.Counter()
MODEL = models.mar(**MAR)


def main() -> None:
    corpus, failures = WORK / "corpus", WORK / "failures"
    corpus.mkdir()
    failures.mkdir()
    for i, content in enumerate(seeds()):
        (corpus / f"seed{i}").write_bytes(content)
    atexit.register(lambda: print(json.dumps({"inputs": SEEN.total(), "seen": SEEN, "folder": str(WORK)})))
    options = [f"-artifact_prefix={failures}/", f"-timeout={MOST_SECONDS}", "-rss_limit_mb=8192", "-max_len=100000", str(corpus)]
    atheris.Setup([*sys.argv, *options], one_input, custom_mutator=mutate)
    atheris.Fuzz()


def seeds() -> list[bytes]:
    """Inputs that are read."""
    few = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(3, dtype=torch.bfloat16), "n": torch.tensor(1)}
    training = {"model": few, "model_ema": dict(few), "epoch": 3, "args": argparse.Namespace(model="mar_base", cfg=2.4)}
    made = []
    for state in (few, training, MODEL.state_dict()):
        for new in (True, False):
            file = io.BytesIO()
            torch.save(state, file, _use_new_zipfile_serialization=new)
            made.append(b"\0" + file.getvalue())
    for system, sizes in SIZES.items():
        path = WORK / "seed.safetensors"
        checkpoint.save_checkpoint(path, getattr(models, system)(**sizes).state_dict(), system, sizes)
        made.append(b"\1" + path.read_bytes())
    return made


def one_input(data: bytes) -> None:
    path = WORK / f"input{SUFFIXES[data[0] % len(SUFFIXES) if data else 0]}"
    path.write_bytes(data[1:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (identified, loaded, built):
        try:
            read(path)
        except (ValueError, FileNotFoundError) as error:
            if type(error) not in (ValueError, UnsupportedError, FileNotFoundError) or str(path) not in str(error):
                raise AssertionError(f"{read.__name__}: refused by accident") from error
            SEEN[f"{read.__name__}: {type(error).__name__}"] += 1
        else:
            SEEN[f"{read.__name__}: read"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if SEEN.total() > 300 and grown > MOST_BYTES:
        raise AssertionError(f"an input of {len(data)} bytes made {grown >> 20} MiB resident")


def identified(path: Path) -> None:
    report(identify(path))


def loaded(path: Path) -> None:
    before = contents(MODEL)
    try:
        checkpoint.load_checkpoint(MODEL, path)
    except ValueError:
        if contents(MODEL) != before:
            raise AssertionError("refused, and yet loaded in part") from None
        raise


def contents(model: torch.nn.Module) -> dict[str, bytes]:
    """Not as numbers, of which one that is none is not equal to itself."""
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def built(path: Path) -> None:
    checkpoint.build(lambda: models.mar(**MAR), path)


# What lies within a file, changed so that the file as such stays whole ------------------------------------------------


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Every other time bytes wherever they lie; else those of a part of an archive, or of the header of a .safetensors."""
    rng = random.Random(seed)
    mutated = None
    if data and rng.random() < 0.5:
        with contextlib.suppress(Exception):  # not whole any more
            if data[1:3] == b"PK":
                mutated = data[:1] + mutated_archive(data[1:], max_size, rng)
            elif data[0] % len(SUFFIXES) == 1:
                mutated = data[:1] + mutated_header(data[1:], max_size, rng)
    return atheris.Mutate(data, max_size) if mutated is None or len(mutated) > max_size else mutated


def mutated_archive(content: bytes, max_size: int, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    name = rng.choice([*parts, *([part for part in parts if part.endswith("data.pkl")] * len(parts))])
    parts[name] = atheris.Mutate(parts[name], max(1, min(max_size, 2 * len(parts[name]))))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for part, bytes_of_it in parts.items():
            archive.writestr(part, bytes_of_it)
    return file.getvalue()


def mutated_header(content: bytes, max_size: int, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.5:
        header = with_another_number(header, rng)
    else:
        header = atheris.Mutate(header, max(1, min(max_size, 2 * len(header))))
    return struct.pack("<Q", len(header)) + header + rest


def with_another_number(header: bytes, rng: random.Random) -> bytes:
    """One of the numbers in a header, or in the constructor's arguments in it, replaced."""
    digits = [i for i in range(len(header)) if header[i : i + 1].isdigit() and not header[i - 1 : i].isdigit()]
    start = rng.choice(digits)
    end = start
    while header[end : end + 1].isdigit():
        end += 1
    number = rng.choice([b"0", b"-1", b"7", b"1e9", b"1e400", b"NaN", b"true", b"[]", b"{}", str(2 ** rng.randrange(70)).encode()])
    return header[:start] + number + header[end:]


if __name__ == "__main__":
    main()
