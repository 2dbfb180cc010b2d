"""Recorded noise, handed to code that draws its own."""

import torch


class Replay:
    """torch.randn and torch.randn_like give the recorded draws in their order, float32 as all were; anything else is an error."""

    def __init__(self, monkeypatch, draws):
        self.left = list(draws)
        monkeypatch.setattr(torch, "randn", lambda *shape: self.take("randn", shape, torch.float32))
        monkeypatch.setattr(torch, "randn_like", lambda x: self.take("randn_like", x.shape, x.dtype))

    def take(self, kind, shape, dtype):
        expected, drawn = self.left.pop(0)
        assert (kind, tuple(shape), dtype) == (expected, tuple(drawn.shape), drawn.dtype)
        return drawn.clone()


def draws_of(recorded, name):
    """Of one trajectory of MAR's head, for Replay."""
    return [("randn", recorded[f"{name}/init_noise"]), *(("randn_like", noise) for noise in recorded[f"{name}/step_noise"])]
