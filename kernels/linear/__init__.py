"""Linear layers with packed weights of 4 or 8 bits, registered as ``flashpte::quantized_linear``.

``y[..., N] = x[..., K] @ dequantized(weight)[N, K]^T + bias``. :mod:`flashpte.kernels.linear.format` describes the
packed weight, and :mod:`flashpte.kernels.linear.reference` defines the result. ``flashpte::quantized_embedding`` picks
rows of the same packed weight (:mod:`flashpte.kernels.linear.embedding`).
"""

from flashpte.kernels.linear.embedding import quantized_embedding
from flashpte.kernels.linear.format import Groupwise, PackedFormat, PackedWeight, pack, unpack
from flashpte.kernels.linear.ops import quantized_linear
from flashpte.kernels.linear.reference import dequantize, linear_reference

__all__ = [
    "Groupwise",
    "PackedFormat",
    "PackedWeight",
    "dequantize",
    "linear_reference",
    "pack",
    "quantized_embedding",
    "quantized_linear",
    "unpack",
]
