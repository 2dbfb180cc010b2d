"""Native models with the published checkpoints' layout."""

from .mar import MAR, mar

__all__ = ["MAR", "mar"]
