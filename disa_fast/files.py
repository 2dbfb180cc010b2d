"""Output files: written aside and renamed, so that no reader ever meets half of one; and whether they can be written at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROBE_BYTES = 64 << 10


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it if the block succeeds, removed if it does not. An OSError names `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
        try:
            yield aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:  # of a full disk none of whose own names a file
        if error.errno is None:
            raise OSError(f"{path}: cannot be written: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_folder(folder: Path, names: Iterable[str] = ()) -> None:
    """ValueError, which names `out`, where no files can be written into a folder, there or not yet, or where one of those called
    `names` would meet a folder of its name. Writes a file to see, and leaves everything as it was."""
    made: list[Path] = []
    try:
        for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
            missing.mkdir()
            made.append(missing)
        probe = folder / f".probe.{secrets.token_hex(4)}"
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
        in_the_way = next((name for name in names if (folder / name).is_dir()), None)
    except (OSError, ValueError) as error:  # the latter of a name that no file can have
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        where = getattr(error, "filename", None)
        at = f" ({where})" if where is not None and str(where) != str(folder) and ".probe." not in str(where) else ""
        raise ValueError(f"out: cannot write into the folder {folder}: {reason}{at}; choose another") from error
    finally:
        for each in reversed(made):
            each.rmdir()
    if in_the_way is not None:
        raise ValueError(f"out: {folder / in_the_way} is a folder, where a file is to be written; choose another")
