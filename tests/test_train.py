"""The training script, on made-up images: that it runs, and that what it writes loads."""

import json

import pytest
import torch

from disa_fast import models
from disa_fast.checkpoint import load_checkpoint, read_config
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


@pytest.mark.parametrize("what", ["flowar", "xar"])
def test_flow_models(tmp_path, monkeypatch, what):
    out = tmp_path / f"{what}.safetensors"
    run(monkeypatch, what, "--out", str(out))
    log = json.loads(out.with_suffix(".json").read_text())
    assert (log["what"], log["steps"], log["of"], log["seed"], len(log["curve"]["rows"])) == (what, 3, 3, 0, 1)
    assert 0 < log["curve"]["rows"][0][1] < 100
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{what}.json", f"{what}.safetensors"]
    name, config = read_config(out)
    assert (name, config) == (what, train.MODELS[what][1])
    model = getattr(models, name)(**config)
    before = model.class_emb.weight.clone()
    load_checkpoint(model, out)
    assert not torch.equal(before, model.class_emb.weight)
    images = model.eval().sample_tokens(torch.tensor([3, 9]), "constant:2")
    assert images.shape == (2, 1, 32, 32)
    assert images.isfinite().all()
    assert data.cropped(images).shape == (2, 1, 28, 28)


def test_padded_images_come_back():
    images = torch.rand(3, 1, 28, 28)
    padded = data.padded(images, 32)
    assert padded.shape == (3, 1, 32, 32)
    assert torch.equal(data.cropped(padded), images)
    margin = torch.ones(32, 32, dtype=torch.bool)
    margin[2:30, 2:30] = False
    assert (padded[:, :, margin] == -1).all()  # black
    assert torch.equal(data.padded(images, 28), images)
    assert torch.equal(data.cropped(images), images)


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
