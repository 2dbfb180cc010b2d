"""The training script, on made-up images: that it runs, and that what it writes loads."""

import json

import pytest
import torch

from disa_fast.demo import data, train
from disa_fast.demo.quality import Classifier
from disa_fast.generate import load_model


@pytest.fixture(autouse=True)
def made_up_images(monkeypatch):
    def fashion_mnist(split, folder):
        return torch.rand(64, 1, 28, 28) * 2 - 1, torch.arange(64) % 10

    monkeypatch.setattr(data, "fashion_mnist", fashion_mnist)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["train", *arguments, "--steps", "3", "--batch", "8", "--no-compile", "--device", "cpu"])
    train.main()


def test_mar(tmp_path, monkeypatch):
    out = tmp_path / "mar.safetensors"
    run(monkeypatch, "mar", "--out", str(out))
    log = json.loads(out.with_suffix(".json").read_text())
    assert (log["steps"], log["seed"], len(log["curve"]["rows"])) == (3, 0, 1)
    images = load_model(out).sample_tokens(torch.tensor([3]), "constant:2", num_iter=2)
    assert images.shape == (1, 1, 28, 28)


def test_classifier(tmp_path, monkeypatch):
    out = tmp_path / "classifier.safetensors"
    run(monkeypatch, "classifier", "--out", str(out))
    classifier = Classifier.load(out)
    assert int(classifier.real_count) == 64
    assert classifier.real_cov_sum.isfinite().all()


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        data.fashion_mnist("train", tmp_path)
