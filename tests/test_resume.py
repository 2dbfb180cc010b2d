"""`disa-fast generate` stopped and run again, and shared out over processes: the same files, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from test_generate import SMALL, TOKENIZER, small
from upstream_like import small_mar

from disa_fast.checkpoint import save_checkpoint
from disa_fast.cli import main
from disa_fast.files import written_aside
from disa_fast.generate import Processes, check_run, generate

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ["--schedule", "linear:3-2", "--num-iter", "4"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(*arguments, module=()):
    return [sys.executable, *module, "-m", "disa_fast.cli", "generate", *SETTINGS, *arguments]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(["generate", "--quiet", *SETTINGS, "--num-images", "200", "--batch-size", "10", "--out", str(folder)]) == 0
    return contents(folder)


def test_killed_and_run_again(tmp_path, uninterrupted):
    arguments = ["--num-images", "200", "--batch-size", "10", "--out", str(tmp_path)]
    process = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=tmp_path)
    try:
        while len(list(tmp_path.glob("0*.png"))) < 23:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    assert 23 <= len(before) < 200
    assert all(uninterrupted[path.name] == path.read_bytes() for path in before)
    (tmp_path / ".00199_ankle-boot.0a1b2c3d.png").write_bytes(b"half of a pic")

    again = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"200 files in {tmp_path}, {200 - len(before)} drawn now" in again.stdout
    assert contents(tmp_path) == uninterrupted
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())


def test_shared_out_over_processes(tmp_path, uninterrupted):
    """On a CPU, where bits do not depend on the batch size either."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--num-images", "200", "--batch-size", "25", "--out", str(tmp_path)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    shared = subprocess.run(command(*arguments, module=torchrun), capture_output=True, text=True, env=one_thread, cwd=tmp_path)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("200 files in") == 1
    assert "200 drawn now" in shared.stdout
    assert contents(tmp_path) == uninterrupted


def test_every_process_has_work(tmp_path, monkeypatch):
    """Also where a batch would hold all."""
    seen = []
    monkeypatch.setattr("disa_fast.cli.processes", lambda: nullcontext(Alone(0, 4)))
    monkeypatch.setattr("disa_fast.cli.generate", lambda draw, paths, record, batch, *rest: seen.append(batch) or 0)
    monkeypatch.setattr("disa_fast.cli.read_png", lambda path: torch.zeros(1, 28, 28))
    for count, batch in ((10, 3), (4, 1), (1, 1), (1000, 100)):
        assert main(["generate", *SETTINGS, "--num-images", str(count), "--out", str(tmp_path)]) == 0
        assert seen.pop() == batch


class Alone(Processes):
    """One of several, which asks nothing of the others."""

    def first(self, action):
        action()

    def total(self, count):
        return count


def test_errors_of_the_first_process_are_everyones(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 5}')
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shared = subprocess.run(command("--out", str(tmp_path), module=torchrun), capture_output=True, text=True, cwd=tmp_path)
    assert shared.returncode != 0
    assert shared.stderr.count("holds the images of another run") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


# Within one process ---------------------------------------------------------------------------------------------------


def paths_in(folder, count):
    return [folder / f"{i:05d}_{i % 3}.npy" for i in range(count)]


def numbered(drawn):
    """Images that show their number; what was drawn together is left in `drawn`."""

    def draw(numbers):
        drawn.append(list(numbers))
        return torch.tensor(numbers, dtype=torch.float32)[:, None, None, None].expand(-1, 16, 2, 2)

    return draw


def test_only_what_is_missing_is_written(tmp_path):
    paths, drawn = paths_in(tmp_path, 11), []
    assert generate(numbered(drawn), paths, {}, 4, Processes(), progress=False) == 11
    assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    whole = contents(tmp_path)
    for i in (5, 6, 10):
        paths[i].unlink()
    paths[4].write_bytes(b"whatever is there is left alone")
    drawn.clear()
    assert generate(numbered(drawn), paths, {}, 4, Processes(), progress=False) == 3
    assert drawn == [[4, 5, 6, 7], [8, 9, 10]]
    assert contents(tmp_path) == whole | {paths[4].name: b"whatever is there is left alone"}
    assert generate(None, paths, {}, 4, Processes(), progress=False) == 0


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_are_disjoint_and_whole(tmp_path, world):
    paths, drawn = paths_in(tmp_path, 11), []
    written = [generate(numbered(drawn), paths, {}, 2, Processes(rank, world), progress=False) for rank in range(world)]
    assert sum(written) == 11
    assert max(written) - min(written) <= 2
    assert sorted(drawn) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert all(path.is_file() for path in paths)


def test_folders_of_other_runs(tmp_path):
    record, paths = {"seed": 0, "cfg": 3.0, "guidance": (0.0, 1.0), "subjects": [1, 2]}, paths_in(tmp_path, 3)
    check_run(tmp_path, record, paths)
    generate(numbered([]), paths, record, 2, Processes(), progress=False)
    check_run(tmp_path, record, paths)
    check_run(tmp_path, record, paths_in(tmp_path, 20))
    for other, message in (
        (record | {"seed": 1}, r"seed: 0 there, 1 now"),
        (record | {"subjects": [1], "cfg": 2.0}, r"cfg: 3.0 there, 2.0 now; subjects: \[1, 2\] there, \[1\] now"),
        ({"seed": 0, "cfg": 3.0, "subjects": [1, 2]}, r"guidance: \[0.0, 1.0\] there, None now"),
    ):
        with pytest.raises(
            ValueError, match=r"^out: .* holds the images of another run \(" + message + r"\); choose another folder"
        ):
            check_run(tmp_path, other, paths)
    for damaged in ("", "[1]", "3"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"run\.json: cannot be read as the record of a run"):
            check_run(tmp_path, record, paths)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds images, and no run\.json that says of what run"):
        check_run(tmp_path, record, paths)


# What the weights were -----------------------------------------------------------------------------------------------


def test_a_folder_of_another_checkpoint_of_that_name_and_size(tmp_path, capsys):
    """Retrained, in however little."""
    path, out = tmp_path / "checkpoint-last.pth", tmp_path / "out"
    arguments = ["generate", "--quiet", *SETTINGS, "--checkpoint", str(path), "--num-heads", "2", "--out", str(out)]

    def write(averaged=None, trained=None):
        content = {"model": small_mar(1).state_dict(), "model_ema": small_mar(0).state_dict()}
        for key, name in (("model_ema", averaged), ("model", trained)):
            if name is not None:
                content[key][name].view(-1)[-1] += 1e-3
        torch.save(content, path)
        return path.stat().st_size

    size = write()
    assert main([*arguments, "--num-images", "2"]) == 0
    whole = contents(out)
    for name in ("mask_token", "diffloss.net.res_blocks.1.mlp.0.weight", "class_emb.weight"):
        assert write(averaged=name) == size
        assert main([*arguments, "--num-images", "4"]) == 2
        told = capsys.readouterr().err
        assert "--out: " in told and "holds the images of another run (checkpoint: " in told and "sha256" in told
        assert contents(out) == whole
    write(trained=name)  # where the average is drawn with
    assert main([*arguments, "--num-images", "4"]) == 0
    assert "2 drawn now" in capsys.readouterr().out
    assert main([*arguments, "--num-images", "4", "--num-heads", "4"]) == 2
    assert "num_heads: [2, 2] there, [4, 4] now" in capsys.readouterr().err


def test_a_folder_of_another_vae_or_tokenizer(tmp_path, capsys, monkeypatch):
    """The tokenizer also where it is the one beside the checkpoint."""
    save_checkpoint(tmp_path / "harmon.safetensors", small("harmon").state_dict(), "harmon", SMALL["harmon"])
    beside = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(beside))
    out = tmp_path / "out"
    arguments = ["generate", "--quiet", "--system", "harmon", "--checkpoint", str(tmp_path / "harmon.safetensors"), *SETTINGS]
    arguments += ["--prompt", "a bag", "--vae", str(tmp_path / "vae.pth"), "--out", str(out)]
    vae = Decoder()
    monkeypatch.setattr("disa_fast.cli.load_vae", lambda path: vae)
    assert main(arguments) == 0
    vae.weight.data[2] += 1e-3
    assert main(arguments) == 2
    assert "holds the images of another run (vae: " in capsys.readouterr().err
    vae.weight.data[2] = 0
    assert main(arguments) == 0
    beside.write_text(beside.read_text() + "\n")
    assert main(arguments) == 2
    assert "holds the images of another run (tokenizer: " in capsys.readouterr().err


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def decode(self, latents):
        return latents[:, :3] + self.weight[:, None, None]


def test_a_folder_that_does_not_tell_the_weights(tmp_path, capsys):
    """As older versions left it: they may have been others."""
    arguments = ["generate", "--quiet", *SETTINGS, "--num-images", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert len(record["checkpoint"]["sha256"]) == 64
    for older in (None, {"name": "checkpoint-last.pth", "bytes": 3}):
        (tmp_path / "run.json").write_text(json.dumps(record | {"checkpoint": older}))
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert "of an older version: its run.json does not tell what the weights were" in told
        assert "choose another folder" in told


def test_half_written_files_are_swept_away(tmp_path):
    paths = paths_in(tmp_path, 2)
    with written_aside(paths[0]) as aside:
        left = tmp_path / aside.name
        aside.touch()
    left.write_bytes(b"half")
    other = tmp_path / ".config"
    other.touch()
    (tmp_path / "run.json").write_text(json.dumps({}))
    check_run(tmp_path, {}, paths)
    assert not left.exists()
    assert other.exists()


def test_settings_of_a_run_are_kept(tmp_path, capsys):
    run = ["generate", "--quiet", *SETTINGS, "--num-images", "2", "--out", str(tmp_path)]
    assert main(run) == 0
    whole = contents(tmp_path)
    assert main([*run, "--batch-size", "1", "--backend", "reference"]) == 0
    assert "2 files in" in (told := capsys.readouterr().out)
    assert "0 drawn now" in told
    for more, message in (
        (["--seed", "3"], "seed: 0 there, 3 now"),
        (["--labels", "3"], "subjects:"),
        (["--cfg", "2"], "cfg: 3.0 there, 2.0 now"),
        (["--system", "harmon"], "system: 'mar' there, 'harmon' now"),
    ):
        assert main([*run, *more]) == 2
        assert message in capsys.readouterr().err
    assert contents(tmp_path) == whole
    assert main([*run[:-4], "--num-images", "4", *run[-2:]]) == 0
    assert {name: data for name, data in contents(tmp_path).items() if name in whole and name != "grid.png"} == {
        name: data for name, data in whole.items() if name != "grid.png"
    }
    assert "4 files in" in capsys.readouterr().out
