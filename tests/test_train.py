"""The training script, on made-up images: that it runs, and that what it writes loads."""

import json
from collections import Counter

import pytest
import torch
from compare import assert_close
from tokenizers import Tokenizer

from disa_fast import models
from disa_fast.checkpoint import load_checkpoint, read_config
from disa_fast.demo import captions, data, train
from disa_fast.demo.quality import Classifier
from disa_fast.systems import load_model


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


def test_harmon(tmp_path, monkeypatch):
    """It starts from the shipped MAR, and learns captions."""
    out = tmp_path / "harmon.safetensors"
    run(monkeypatch, "harmon", "--out", str(out), "--lr", "1e-5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["harmon.json", "harmon.safetensors", "harmon.tokenizer.json"]
    assert read_config(out) == ("harmon", train.HARMON_CONFIG)
    model = load_model(out, system="harmon", tokenizer=out.with_suffix(".tokenizer.json"))
    start = load_model()
    for name, p in start.named_parameters():
        assert_close(model.mar.get_parameter(name).detach(), p.detach(), worst=1e-3)
    images = model.sample_tokens(["a photo of a bag", "a coat"], "constant:2", num_iter=2)
    assert images.shape == (2, 1, 28, 28)


def test_captions_of_images(tmp_path):
    """Half of them say how light a picture is, and those say it right."""
    torch.manual_seed(0)
    labels = torch.arange(3000) % 10
    lightness = 0.2 + 0.8 * torch.rand(3000)
    images = (torch.rand(3000, 1, 28, 28) < 0.5) * 2 * lightness[:, None, None, None] - 1
    found = captions.shades(images, labels)
    for label in range(10):
        of_class = lightness[labels == label]
        dark, neither, light = (of_class[found[labels == label] == shade] for shade in (1, 0, 2))
        assert len(dark) == len(light) == 100
        assert dark.max() <= neither.min() <= neither.max() <= light.min()

    path = tmp_path / "tokenizer.json"
    conditions = train._captions(images, labels, path)
    tokenizer = Tokenizer.from_file(str(path))
    input_ids, mask = conditions(torch.arange(3000))
    texts = [tokenizer.decode(row[kept].tolist(), skip_special_tokens=True) for row, kept in zip(input_ids, mask, strict=True)]
    generic = [text for text in texts if text == "user\nGenerate an image.\nassistant\n"]
    assert 0.07 < len(generic) / 3000 < 0.13
    told = Counter()
    for text, label, shade in zip(texts, labels.tolist(), found.tolist(), strict=True):
        if text in generic:
            continue
        assert captions.label_of(text) == label
        said = next((i for i, word in enumerate(captions.SHADES) if i and word in text), 0)
        assert said in (0, shade)
        told[said != 0, shade != 0] += 1
    assert told[True, False] == 0
    assert 0.45 < told[True, True] / (told[True, True] + told[False, True]) < 0.55


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
