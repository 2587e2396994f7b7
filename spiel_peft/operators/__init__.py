"""Adapted layers as operators that torch.compile keeps whole: what they do inside is decided when they run.

A graph refers to a layer by number, so that it does not depend on the state of a cycle: regrowth changes indices in
place and compiles nothing anew. The number travels in a tensor, as a Python number would be a constant of the graph and
layers that are alike could not share one.
"""

from .embedding import embedding_operator
from .matrix import adapted_operator
from .registry import number_of

__all__ = ["adapted_operator", "embedding_operator", "number_of"]
