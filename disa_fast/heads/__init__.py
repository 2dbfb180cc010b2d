"""Diffusion and flow heads: weights in, tokens out."""

from .flow_transformer import FlowTransformerHead
from .mlp import MLPHead

__all__ = ["FlowTransformerHead", "MLPHead"]
