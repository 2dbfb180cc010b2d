"""Diffusion heads: weights in, tokens out."""

from .mlp import MLPHead

__all__ = ["MLPHead"]
