"""Optimizers: SM3 for sparse deltas, and a wrapper that ties any optimizer to a model's cycle."""

from .sm3 import SM3
from .wrapper import SpIELOptimizer

__all__ = ["SM3", "SpIELOptimizer"]
