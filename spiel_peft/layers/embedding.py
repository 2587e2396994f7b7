"""Sparse deltas on embedding tables."""

from __future__ import annotations

from torch import Tensor, nn

from ..delta import SparseDelta
from ..functional import adapted_embedding
from ..operators import embedding_operator
from .base import SpIELLayer


class SpIELEmbedding(SpIELLayer):
    """An embedding with sparse deltas; a scaled one (`embed_scale`, as in Gemma) scales the deltas too."""

    known_forwards = (nn.Embedding.forward,)

    def _knows_forward(self, base: nn.Module) -> bool:
        return super()._knows_forward(base) or self._get_embed_scale() is not None

    def _adapted_forward(self, deltas: list[SparseDelta], x: Tensor) -> Tensor:
        base = self.get_base_layer()
        out = self._look_up(base, deltas, x)
        scale = self._get_embed_scale()
        if scale is None:
            return out
        # A number is not rounded to the dtype of the table, a tensor is: as in the models of either kind.
        own = base.embed_scale
        return out * (own if isinstance(own, (int, float)) else scale.to(out.dtype))

    def _look_up(self, base: nn.Embedding, deltas: list[SparseDelta], ids: Tensor) -> Tensor:
        settings = (base.padding_idx, base.scale_grad_by_freq)
        if self._fits_operator(base):
            return embedding_operator(self._number, base.weight, deltas, ids, *settings)
        return adapted_embedding(self.weight_source(), deltas, ids, *settings)

    def extra_repr(self) -> str:
        base = self.get_base_layer()
        return f"{base.num_embeddings}, {base.embedding_dim}"
