"""The manifest's description of a method's tensors."""

import torch
from torch.export import Dim

from flashpte.export.lowering.describe_methods import describe_method


class Scale(torch.nn.Module):
    def forward(self, x, factor):
        return x[:, :, None] * factor, x[:, -1:]


def test_a_declared_range_is_described_as_declared():
    """The range starts at 1, although tracing assumes that every dynamic size is at least 2."""
    for low, high in ((1, 9), (3, 9)):
        shapes = {"x": {1: Dim("rows", min=low, max=high)}, "factor": None}
        program = torch.export.export(Scale(), (torch.ones(1, 5), torch.ones(4)), dynamic_shapes=shapes)
        assert program.module()(torch.ones(1, low), torch.ones(4))[0].shape == (1, low, 4)
        described = describe_method(program)
        assert [tensor["shape"] for tensor in described["inputs"]] == [[1, [low, high]], [4]]
        assert [tensor["shape"] for tensor in described["outputs"]] == [[1, [low, high], 4], [1, 1]]
