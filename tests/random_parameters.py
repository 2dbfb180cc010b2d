"""A head's parameters at random, for tests that need no trained ones."""

import torch

from disa_fast.heads.mlp import MLPSpec


def random_parameters(spec: MLPSpec, seed: int) -> dict[str, torch.Tensor]:
    """Every parameter random, nothing at its zero initialisation."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1)
        for name, shape in spec.shapes().items()
    }
