"""What modules with a packed weight of 4 or 8 bits share: their tensors, the dequantized weight, and the product."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

import flashpte.kernels.linear  # noqa: F401  (registers the operators)
from flashpte.kernels.linear.format import PackedFormat, PackedWeight, unpack
from flashpte.kernels.linear.reference import dequantize

TENSORS = ("packed", "scales", "zeros", "offsets")
"""Names of a module's tensors, in the order of :class:`flashpte.kernels.linear.format.PackedWeight`."""


def tensors_of(fmt: PackedFormat) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors that a format has, by their names in the module."""
    held = {"packed": (fmt.weight_shape, fmt.weight_dtype), "scales": (fmt.scales_shape, fmt.scale_dtype)}
    if fmt.has_zeros:
        held["zeros"] = (fmt.scales_shape, fmt.zeros_dtype)
    if fmt.has_offsets:
        held["offsets"] = (fmt.scales_shape, fmt.scale_dtype)
    return held


def read_packed(packed: PackedWeight, fmt: PackedFormat) -> torch.Tensor:
    """The weight that codes stand for, float32 ``[N, K]``; scales may have another dtype than the format's."""
    weight, *groups = packed
    wide = (tensor if tensor is None or tensor.dtype == torch.int16 else tensor.to(torch.float32) for tensor in groups)
    natural = unpack(PackedWeight(weight, *wide), dataclasses.replace(fmt, scale_dtype=torch.float32))  # type: ignore[arg-type]
    return dequantize(*natural, fmt.bits, fmt.group)


class PackedModule(nn.Module):
    """A module with a packed weight. ``torch.export`` sees the kernels' operators; eager calls dequantize.

    Args:
        fmt: how the weight is packed.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    offsets: torch.Tensor | None

    def __init__(self, fmt: PackedFormat) -> None:
        super().__init__()
        self.fmt = fmt
        # Plain attributes, because torch.export counts buffers that are None as inputs.
        self.zeros = self.offsets = None
        for name, (shape, dtype) in tensors_of(fmt).items():
            self.__dict__.pop(name, None)
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    @property
    def packed_weight(self) -> PackedWeight:
        """The tensors, in the order in which the operators take them."""
        return PackedWeight(self.packed, self.scales, self.zeros, self.offsets)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """The last arguments of the operators."""
        fmt = self.fmt
        return fmt.bits, fmt.group, fmt.out_features, fmt.in_features

    def dequantized(self) -> torch.Tensor:
        """The weight that the codes stand for, float32 ``[N, K]``."""
        return read_packed(self.packed_weight, self.fmt)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., K]`` times the weight, plus the bias: ``[..., N]``."""
        if torch.compiler.is_exporting():
            return torch.ops.flashpte.quantized_linear(x, *self.packed_weight, bias, *self.numbers)
        return F.linear(x, self.dequantized().to(x.dtype), bias)
