"""A 4-bit weight format in one file: packed values and one scale per row replace a linear layer's weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flashpte.export.common.errors import ExportError


class Int4Linear(nn.Module):
    """A linear layer with two values per byte, earlier column in the low half; v with scale s stands for (v - 8) s."""

    def __init__(self, in_features, out_features, dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("packed", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(out_features, 1, dtype=dtype))

    def forward(self, hidden):
        values = torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1)
        return F.linear(hidden, (values.to(hidden.dtype) - 8) * self.scale)


class ToyInt4:
    def __init__(self, dtype):
        self.dtype = dtype

    def adapt(self, module, name):
        path = name.removesuffix(".weight")
        linear = module.get_submodule(path)
        if not isinstance(linear, nn.Linear) or linear.bias is not None or linear.in_features % 2:
            raise ExportError(f"{name}: toy-int4 holds linear layers without a bias alone")
        with torch.device("meta"):
            module.set_submodule(path, Int4Linear(linear.in_features, linear.out_features, self.dtype))

    def stored(self, name, shape):
        path = name.removesuffix(".weight")
        rows, columns = shape
        return {
            f"{path}.packed": ((rows, columns // 2), torch.uint8),
            f"{path}.scale": ((rows, 1), self.dtype),
        }

    def encode(self, name, weight):
        path = name.removesuffix(".weight")
        scale = (weight.float().abs().amax(1, keepdim=True) / 7).to(self.dtype)
        values = (weight.float() / scale.float() + 8).round().clamp(0, 15).to(torch.uint8)
        return {f"{path}.packed": values[:, ::2] | values[:, 1::2] << 4, f"{path}.scale": scale}
