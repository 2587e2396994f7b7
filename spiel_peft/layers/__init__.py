"""Layers that add sparse deltas to a base weight."""

from .base import SpIELLayer
from .conv import SpIELConv
from .embedding import SpIELEmbedding
from .linear import SpIELLinear
from .parameter import SpIELParameter, SpIELParameters

__all__ = ["SpIELConv", "SpIELEmbedding", "SpIELLayer", "SpIELLinear", "SpIELParameter", "SpIELParameters"]
