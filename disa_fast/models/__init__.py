"""Native models with the published checkpoints' layout."""

from .flowar import FlowAR, flowar
from .harmon import Harmon, harmon
from .mar import MAR, mar
from .xar import XAR, xar

__all__ = ["MAR", "XAR", "FlowAR", "Harmon", "flowar", "harmon", "mar", "xar"]
