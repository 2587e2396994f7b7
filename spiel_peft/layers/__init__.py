"""Layers that add sparse deltas to a base weight."""

from .base import SpIELLayer
from .kinds import SpIELConv, SpIELEmbedding, SpIELLinear
from .parameter import SpIELParameter, SpIELParameters

__all__ = ["SpIELConv", "SpIELEmbedding", "SpIELLayer", "SpIELLinear", "SpIELParameter", "SpIELParameters"]
