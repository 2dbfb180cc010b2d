"""Files of weights are told by what they hold; what lies beside the weights of a training checkpoint is plain data, or refused."""

import argparse
import gzip
import io
import pathlib
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from upstream_like import SMALL, small_mar

from disa_fast import formats
from disa_fast.checkpoint import build, has_ema, load_checkpoint, read_config, read_state_dict, read_weights, save_checkpoint
from disa_fast.cli import main
from disa_fast.identify import identify, report

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], tensor) for name, tensor in other.items())


# By content -----------------------------------------------------------------------------------------------------------


def legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt", ""])
@pytest.mark.parametrize("write", [torch.save, legacy, safetensors.torch.save_file])
def test_the_name_does_not_matter(tmp_path, write, suffix):
    path = tmp_path / f"weights{suffix}"
    write(STATE, path)
    assert equal(read_state_dict(path), STATE)
    assert read_config(path) is None
    assert not has_ema(path)


def test_own_checkpoints_by_another_name(tmp_path):
    path = tmp_path / "own.pth"
    save_checkpoint(path, small_mar().state_dict(), "mar", SMALL)
    assert read_config(path) == ("mar", SMALL)
    assert "size: its own, as it says itself" in report(identify(path))


@pytest.mark.parametrize("lowest", [0x80, 0x50, 0x1F])
def test_a_header_as_long_as_another_file_begins(tmp_path, lowest):
    """A safetensors file begins with its header's length: 0x80 is what a pickle begins with."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    length = next(n for n in range(len(header), 1000) if n % 256 == lowest)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + np.float32(3).tobytes())
    assert equal(read_state_dict(path), {"a": torch.tensor([3.0])})


def foreign():
    """{what: (content, what is said of it)}"""
    saved, tensors = io.BytesIO(), safetensors.torch.save(STATE)
    torch.save(STATE, saved)
    saved = saved.getvalue()
    archive, tar, program = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("notes.txt", "hello")
    with tarfile.open(fileobj=tar, mode="w") as file:
        file.addfile(tarfile.TarInfo("weights"), io.BytesIO())
    with zipfile.ZipFile(program, "w") as file:
        file.writestr("weights/constants.pkl", b"")
        file.writestr("weights/data.pkl", b"")
    return {
        "empty": (b"", "it is empty"),
        "text": (b"hello\nthere", "it is text, which begins 'hello"),
        "text that is cut within a letter": ("h\u00e9llo".encode() * 200, "it is text"),
        "json": (b'{"a": 1}', "it is text, which begins '{\"a\": 1}'"),
        "a web page": (b"\n<!DOCTYPE html><html>", "it is a web page, which a download gave instead of the file"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "it is a pointer of Git LFS"),
        "truncated archive": (saved[:-50], "it is truncated: it begins as an archive of torch.save, and has no end after"),
        "truncated safetensors": (tensors[:-5], f"it is truncated: {len(tensors) - 5} of {len(tensors)} bytes are there"),
        "truncated header": (tensors[:20], "as safetensors it would begin with a header of .* bytes, and has 20 in all"),
        "truncated pickle": (legacy_bytes()[:-4], "it is truncated|unexpected EOF"),
        "a pickle": (pickle.dumps(3, protocol=2), "it is a pickle that torch.save has not written"),
        "an archive": (archive.getvalue(), "it is a zip archive that torch.save has not written; it holds notes.txt"),
        "TorchScript": (program.getvalue(), "it is a TorchScript program"),
        "gzip": (gzip.compress(saved), "it is compressed by gzip; unpack it first"),
        "tar": (tar.getvalue(), "it is a tar archive; unpack it first"),
        "an array": (b"\x93NUMPY\x01\x00", "it is an array of NumPy"),
        "zeros": (bytes(100), "it is neither safetensors nor of torch.save; it begins with the bytes 00 00 00 00"),
    }


def legacy_bytes():
    file = io.BytesIO()
    torch.save(STATE, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", foreign())
def test_what_a_wrong_file_is(tmp_path, capsys, kind, suffix):
    content, message = foreign()[kind]
    path = tmp_path / f"wrong{suffix}"
    path.write_bytes(content)
    readers = [read_state_dict, identify, has_ema]
    for read in readers if "pickle" in kind else [*readers, read_config]:
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: cannot be read as a checkpoint: ") as raised:
            read(path)
        assert re.search(message, str(raised.value)), raised.value
    assert main(["inspect", str(path)]) == 2
    assert "cannot be read as a checkpoint: " in capsys.readouterr().err


def test_a_folder_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a folder; expected a \.pth or \.safetensors file, such as model\.safetensors in it"):
        read_state_dict(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


# Beside the weights ---------------------------------------------------------------------------------------------------

PLAIN = {
    "epoch": np.int64(7),
    "loss": np.float32(0.25),
    "best": np.float64(-1.5),
    "done": np.bool_(True),
    "name": np.str_("run"),
    "big": np.array([3], ">f8")[0],
    "args": argparse.Namespace(out=pathlib.Path("some/folder"), rest=[pathlib.PurePosixPath("/a")], lr=1e-4),
}


@pytest.mark.parametrize("write", [torch.save, legacy])
def test_training_checkpoints_with_plain_data(tmp_path, write):
    path = tmp_path / "checkpoint-last.pth"
    write({"model": STATE, **PLAIN}, path)
    assert equal(read_state_dict(path), STATE)
    content = formats.read(path)
    for name in ("epoch", "loss", "best", "done", "name", "big"):
        assert content[name] == PLAIN[name]
        assert content[name].dtype.kind == PLAIN[name].dtype.kind
    assert content["args"].out == pathlib.PurePosixPath("some/folder")
    assert content["args"].lr == 1e-4


def renamed(content, old, new):
    """The pickle of an archive with a name replaced."""
    file = io.BytesIO()
    torch.save(content, file)
    changed = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(changed, "w") as target:
        for part in source.namelist():
            data = source.read(part)
            target.writestr(part, data.replace(old, new) if part.endswith("data.pkl") else data)
    return changed.getvalue()


@pytest.mark.parametrize(
    ("value", "old", "new", "expected"),
    [
        (np.float64(2.5), b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 2.5),
        (np.float64(2.5), b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n", 2.5),
        (pathlib.PosixPath("a/b"), b"cpathlib\nPosixPath\n", b"cpathlib\nWindowsPath\n", pathlib.PureWindowsPath("a/b")),
        (pathlib.PosixPath("a/b"), b"cpathlib\nPosixPath\n", b"cpathlib._local\nPosixPath\n", pathlib.PurePosixPath("a/b")),
    ],
)
def test_names_of_other_versions_and_systems(tmp_path, value, old, new, expected):
    path = tmp_path / "other.pth"
    path.write_bytes(renamed({"model": STATE, "value": value}, old, new))
    assert formats.read(path)["value"] == expected


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (print, "print"),
        (np.zeros(3), "numpy"),
        (np.array([{}], object), "numpy"),
        (io.StringIO(), "StringIO"),
        (re.compile("a"), "re._compile"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.datetime64("2020-01-01"), "expected a NumPy scalar that is a number or a text"),
    ],
)
def test_other_classes_are_refused_by_name(tmp_path, value, named):
    path = tmp_path / "more.pth"
    torch.save({"model": STATE, "more": value}, path)
    with pytest.raises(ValueError, match=rf"more\.pth: cannot be read as a checkpoint: .*{re.escape(named)}"):
        read_state_dict(path)


def test_a_scalar_of_objects_makes_nothing(tmp_path):
    """numpy's own function would take a pickle's word for what kind of number its bytes are."""
    for code in ("O8", "V8", "M8", "f99999999", "f8\n"):
        with pytest.raises(ValueError, match="expected a NumPy scalar"):
            formats._scalar(formats._Dtype(code), bytes(8))
    with pytest.raises(ValueError, match="buffer"):
        formats._scalar(formats._Dtype("f8"), bytes(3))


def test_what_the_user_allows_is_as_before():
    class Own:
        pass

    before = [Own, (np.dtype, "numpy.dtype")]
    torch.serialization.add_safe_globals(before)
    try:
        with formats._plain_data_allowed():
            inside = {formats._full_name(each): each for each in torch.serialization.get_safe_globals()}
        assert inside["numpy.dtype"] is not before[1] and Own in inside.values()
        assert set(before) <= set(torch.serialization.get_safe_globals())
        assert argparse.Namespace not in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()


# Prefixes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."])
@pytest.mark.parametrize("key", ["model", "model_ema", None])
def test_prefixes_are_taken_off(tmp_path, capsys, prefix, key):
    model, path = small_mar(1), tmp_path / "wrapped.pth"
    wrapped = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(wrapped if key is None else {key: wrapped}, path)
    weights = read_weights(path)
    assert weights.prefix == prefix
    target = small_mar(2)
    load_checkpoint(target, path)
    assert equal(target.state_dict(), model.state_dict())
    assert equal(build(small_mar, path).state_dict(), model.state_dict())
    main(["inspect", str(path), "--num-heads", "2"])
    assert f"prefix: {prefix}, taken off all names\n" in capsys.readouterr().out


def test_a_prefix_of_some_names_is_theirs(tmp_path):
    path = tmp_path / "some.pth"
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, path)
    assert read_state_dict(path).keys() == state.keys()
    assert read_weights(path).prefix == ""


def test_a_model_whose_own_names_begin_so(tmp_path):
    """Wrapped itself, or with one part of that name: either file is for it."""
    path, source = tmp_path / "weights.pth", nn.Linear(2, 3)
    for prefix in ("", "module."):
        torch.save({prefix + name: tensor for name, tensor in source.state_dict().items()}, path)
        wrapped = nn.DataParallel(nn.Linear(2, 3))
        load_checkpoint(wrapped, path)
        assert equal(wrapped.module.state_dict(), source.state_dict())
