"""The arguments of the linear layers' launchers."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from flashpte.kernels.launch import static_int, with_unit_stride
from flashpte.kernels.linear.format import TILE_ROWS, PackedFormat, PackedWeight
from flashpte.kernels.linear.tuning import LinearShape


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """One call of a linear layer: ``y[..., N] = x[..., K] @ weight[N, K]^T + bias``.

    Attributes:
        x: ``[..., K]``; bfloat16, float16 or float32.
        weight, scales, zeros, offsets: the packed weight (:class:`flashpte.kernels.linear.format.PackedWeight`).
        bias: ``[N]`` in the dtype of ``x``, or ``None``.
        fmt: how the weight is packed.
    """

    x: torch.Tensor
    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    fmt: PackedFormat
    offsets: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """M, the rows of ``x``: the product of its leading sizes. May be symbolic."""
        return math.prod(self.x.shape[:-1])

    @property
    def rows_of_x(self) -> torch.Tensor:
        """``x`` as ``[M, K]`` with contiguous rows."""
        return with_unit_stride(self.x.reshape(-1, self.fmt.in_features))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What kernels read of the layer: weight, scales, zeros or offsets, bias.

        The scales stand in for an absent tensor.
        """
        moved = self.offsets if self.zeros is None else self.zeros
        bias = self.scales if self.bias is None else self.bias
        return self.weight, self.scales, self.scales if moved is None else moved, bias

    @property
    def packed(self) -> PackedWeight:
        """The tensors of the packed weight."""
        return PackedWeight(self.weight, self.scales, self.zeros, self.offsets)

    @property
    def constants(self) -> dict[str, int | bool]:
        """Constants of every kernel that reads a packed weight."""
        per_tile = self.fmt.groups_per_tile
        return {
            "BITS": self.fmt.bits,
            "GROUPS": per_tile,
            "SCALE_STEP": 0 if self.fmt.per_channel else TILE_ROWS * per_tile,
            "ZEROS": self.zeros is not None,
            "OFFSETS": self.offsets is not None,
            "BIAS": self.bias is not None,
        }

    def shape(self) -> LinearShape:
        """The shape that tile choices depend on."""
        fmt = self.fmt
        rows = static_int(self.rows)
        return LinearShape(rows, fmt.out_features, fmt.in_features, fmt.bits, self.x.dtype, fmt.sums_x)

    def empty_output(self) -> torch.Tensor:
        """Uninitialized memory for the result ``[..., N]``."""
        return self.x.new_empty((*self.x.shape[:-1], self.fmt.out_features))


class Destination(NamedTuple):
    """Where a launcher writes its result.

    Attributes:
        out: ``[..., N]``, contiguous.
        enabled: 0 or 1, may be symbolic. With 0, no program is launched at run time.
    """

    out: torch.Tensor
    enabled: int | torch.SymInt
