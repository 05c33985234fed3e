"""An embedding with a packed weight of 4 or 8 bits, which a tied output projection reads too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from flashpte.export.weights.packed import PackedModule, read_packed
from flashpte.kernels.linear.format import TILE_ROWS, PackedFormat, PackedWeight


class QuantizedEmbedding(PackedModule):
    """Rows of a packed table.

    Args:
        fmt: how the table is packed.
        embed_scale: a factor of every row, such as Gemma's; ``None`` for none.

    Attributes:
        dtype: dtype of the rows. It follows ``module.to(dtype)`` like that of a dense weight.
    """

    embed_scale: torch.Tensor | None

    def __init__(self, fmt: PackedFormat, embed_scale: torch.Tensor | None = None) -> None:
        super().__init__(fmt)
        self.num_embeddings, self.embedding_dim = fmt.out_features, fmt.in_features
        self.dtype = torch.get_default_dtype()
        # Computed by the model, and in no checkpoint.
        self.register_buffer("embed_scale", embed_scale, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids [...]`` to rows ``[..., K]``."""
        rows = self._rows(ids)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[..., K]`` to logits ``[..., N]``: the tied output projection, without the factor."""
        return self.product(hidden)

    @property
    def weight(self) -> torch.Tensor:
        """The table ``[N, K]`` in :attr:`dtype`, computed anew each time."""
        return self.dequantized().to(self.dtype)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return torch.ops.flashpte.quantized_embedding(ids, *self.packed_weight, self.dtype, *self.numbers)
        # Only the tiles with a wanted row.
        tiles, place = (ids.flatten() // TILE_ROWS).unique(return_inverse=True)
        picked = (None if tensor is None else tensor[tiles] for tensor in self.packed_weight)
        fmt = dataclasses.replace(self.fmt, out_features=TILE_ROWS * len(tiles))
        table = read_packed(PackedWeight(*picked), fmt)  # type: ignore[arg-type]
        rows = table[TILE_ROWS * place + ids.flatten() % TILE_ROWS]
        return rows.to(self.dtype).view(*ids.shape, self.fmt.in_features)
