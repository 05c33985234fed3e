"""The gated delta rule, lowered: a layer's decode and verify in one ``.pte``, no fallback kernel."""

import re

import pytest
import torch
from torch.export import Dim
from wrappers import keeping_wrappers

from flashpte.export.lowering import inspect_pte, lower
from flashpte.kernels import delta_recurrent

pytestmark = pytest.mark.lowering
HEADS_K, HEADS, DIM = 2, 4, 64
WIDTHS = [HEADS_K * DIM, HEADS_K * DIM, HEADS * DIM]


class Layer(torch.nn.Module):
    """The rule between a projection and a state, as a model has it."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator
        self.register_buffer("state", torch.zeros(1, HEADS, DIM, DIM))

    def forward(self, mixed, gates, input_pos):
        tensors = [part.unflatten(-1, (-1, DIM)) for part in mixed.split(WIDTHS, -1)]
        state = torch.where(input_pos[0] > 0, self.state, torch.zeros_like(self.state))
        g, beta = -torch.nn.functional.softplus(gates.float()), gates.sigmoid()
        out, state = self.operator(*tensors, g, beta, state, DIM**-0.5, True)
        self.state.copy_(state)
        return out.flatten(2)


def export(operator, tokens, shapes=None):
    mixed, gates = torch.randn(1, tokens, sum(WIDTHS)).bfloat16(), torch.randn(1, tokens, HEADS).bfloat16()
    return torch.export.export(Layer(operator), (mixed, gates, torch.arange(tokens)), dynamic_shapes=shapes)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_decode_and_verify_lower(arch, tmp_path):
    rows = Dim("rows", min=1, max=16)
    programs = {
        "up_to_16": export(delta_recurrent, 7, ({1: rows}, {1: rows}, {0: rows})),
        "decode": export(delta_recurrent, 1),
        "verify": export(delta_recurrent, 4),
    }
    with keeping_wrappers() as sources:
        lowered = lower(programs, output_dir=tmp_path / "out", arch=arch)  # includes its self check
    found = {
        name: {re.sub(r"_\d+$", "", kernel) for cubin in method.library.cubins for kernel in cubin.kernels}
        for name, method in inspect_pte(lowered.model).methods.items()
    }
    for name in programs:
        assert any("_delta_recurrent_kernel" in kernel for kernel in found[name])
    assert len(sources) == 3
    for source in sources:
        assert "aoti_torch_cuda_" not in source, "a fallback kernel"
