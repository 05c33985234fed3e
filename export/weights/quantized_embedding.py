"""An embedding with a packed weight of 4 or 8 bits, which a tied output projection reads too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import flashpte.kernels.linear  # noqa: F401  (registers the operators)
from flashpte.kernels.linear.format import TILE_ROWS, PackedFormat, PackedWeight, unpack
from flashpte.kernels.linear.reference import dequantize


class QuantizedEmbedding(nn.Module):
    """Rows of a packed table. ``torch.export`` sees the kernels' operators; eager calls dequantize.

    Args:
        fmt: how the table is packed.
        embed_scale: a factor of every row, such as Gemma's; ``None`` for none.

    Attributes:
        dtype: dtype of the rows. It follows ``module.to(dtype)`` like that of a dense weight.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    embed_scale: torch.Tensor | None

    def __init__(self, fmt: PackedFormat, embed_scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.fmt, self.num_embeddings, self.embedding_dim = fmt, fmt.out_features, fmt.in_features
        self.dtype = torch.get_default_dtype()
        self.register_buffer("packed", torch.empty(fmt.weight_shape, dtype=fmt.weight_dtype))
        self.register_buffer("scales", torch.empty(fmt.scales_shape, dtype=fmt.scale_dtype))
        self.register_buffer("zeros", torch.empty_like(self.scales) if fmt.has_zeros else None)
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
        if torch.compiler.is_exporting():
            ops = torch.ops.flashpte
            return ops.quantized_linear(hidden, self.packed, self.scales, self.zeros, None, *self._numbers)
        return F.linear(hidden, self.dequantized().to(hidden.dtype))

    @property
    def weight(self) -> torch.Tensor:
        """The table ``[N, K]`` in :attr:`dtype`, computed anew each time."""
        return self.dequantized().to(self.dtype)

    def dequantized(self) -> torch.Tensor:
        """The table that the codes stand for, float32 ``[N, K]``."""
        return self._dequantized(self.packed, self.scales, self.zeros, self.fmt)

    @property
    def _numbers(self) -> tuple[int, int, int, int]:
        fmt = self.fmt
        return fmt.bits, fmt.group, fmt.out_features, fmt.in_features

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            ops = torch.ops.flashpte
            return ops.quantized_embedding(ids, self.packed, self.scales, self.zeros, self.dtype, *self._numbers)
        # Only the tiles with a wanted row.
        tiles, place = (ids.flatten() // TILE_ROWS).unique(return_inverse=True)
        zeros = None if self.zeros is None else self.zeros[tiles]
        fmt = dataclasses.replace(self.fmt, out_features=TILE_ROWS * len(tiles))
        table = self._dequantized(self.packed[tiles], self.scales[tiles], zeros, fmt)
        rows = table[TILE_ROWS * place + ids.flatten() % TILE_ROWS]
        return rows.to(self.dtype).view(*ids.shape, fmt.in_features)

    @staticmethod
    def _dequantized(*parts: Any) -> torch.Tensor:
        packed, scales, zeros, fmt = parts
        fmt = dataclasses.replace(fmt, scale_dtype=torch.float32)
        wide = None if zeros is None else zeros.float()
        return dequantize(*unpack(PackedWeight(packed, scales.float(), wide), fmt), fmt.bits, fmt.group)
