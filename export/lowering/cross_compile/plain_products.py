"""Writes products that Inductor would leave to libtorch with operators that it compiles itself."""

from __future__ import annotations

import collections
from collections.abc import Callable, MutableMapping
from typing import Any

import torch

_aten = torch.ops.aten


def int8_by_templates(lowerings: MutableMapping[Any, Callable[..., Any]]) -> MutableMapping[Any, Callable[..., Any]]:
    """The lowerings that Inductor's quantization patterns look up, with ``_weight_int8pack_mm`` as a plain product.

    The patterns turn ``(x @ w.to(x.dtype).T) * scales`` with int8 ``w`` into ``_weight_int8pack_mm``, for which
    ExecuTorch's runtime has no kernel.
    """

    def int8_product(x: Any, weight: Any, scales: Any) -> Any:
        """Multiplies ``x`` [M, K] by ``weight`` int8 [N, K], scaled by ``scales`` [N] or [1, N]; returns [M, N]."""
        converted = lowerings[torch.ops.prims.convert_element_type.default](weight, x.get_dtype())
        product = lowerings[_aten.mm.default](x, lowerings[_aten.permute.default](converted, [1, 0]))
        return lowerings[_aten.mul.Tensor](product, scales)

    return collections.ChainMap({_aten._weight_int8pack_mm.default: int8_product}, lowerings)
