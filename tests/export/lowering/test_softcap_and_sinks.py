"""Softcaps and sinks, lowered: a constant and an optional argument of the kernels that every arch has."""

import re

import pytest
import torch
from torch.export import Dim
from wrappers import wrapper_source

from flashpte.export.lowering import inspect_pte, lower
from flashpte.passes import replace_sdpa

pytestmark = pytest.mark.lowering
HEADS, HEADS_KV, HEAD_DIM, KEYS = 4, 2, 64, 2048


class Layers(torch.nn.Module):
    """Layers over caches, written as eager attention: one with a softcap, one with sinks, one with both."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(2, HEADS, generator=generator).bfloat16()
        self.sinks = torch.nn.ParameterList([torch.nn.Parameter(row.clone(), requires_grad=False) for row in numbers])
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, HEADS_KV, KEYS, HEAD_DIM, dtype=torch.bfloat16))

    def forward(self, x, input_pos):
        k, v = x[:, :HEADS_KV], x[:, HEADS_KV:]
        k = self.k_cache.index_copy_(2, input_pos, k).repeat_interleave(HEADS // HEADS_KV, 1)
        v = self.v_cache.index_copy_(2, input_pos, v).repeat_interleave(HEADS // HEADS_KV, 1)
        hidden = (torch.arange(KEYS) > input_pos[:, None])[None, None]
        for softcap, sinks in ((20.0, None), (None, self.sinks[0]), (30.0, self.sinks[1])):
            scores = (x @ k.transpose(2, 3)).float() * 0.125
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = scores.masked_fill(hidden, float("-inf"))
            if sinks is None:
                weights = torch.softmax(scores, -1)
            else:
                column = sinks.view(1, -1, 1, 1).expand(1, -1, x.shape[2], 1)
                weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
            x = weights.to(v.dtype) @ v
        return x


def export(rows, dynamic_shapes=None):
    args = (torch.randn(1, HEADS, rows, HEAD_DIM, dtype=torch.bfloat16), torch.arange(rows))
    return torch.export.export(Layers().eval(), args, dynamic_shapes=dynamic_shapes)


@pytest.fixture(scope="module")
def programs():
    rows = Dim("rows", min=1, max=128)
    exported = {"prefill": export(40, ({2: rows}, {0: rows})), "decode": export(1), "verify": export(4)}
    replaced = {}
    for name, program in exported.items():
        replaced[name], report = replace_sdpa(program)
        assert [(r.softcap, r.sinks) for r in report.replaced] == [(20.0, False), (0.0, True), (30.0, True)]
    return replaced


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_all_three_lower(programs, arch, tmp_path):
    lowered = lower(programs, output_dir=tmp_path / "out", arch=arch)  # includes its self check
    methods = inspect_pte(lowered.model).methods
    found = {
        name: [kernel for cubin in method.library.cubins for kernel in cubin.kernels]
        for name, method in methods.items()
    }
    # One split-K kernel for each softcap (20, none, 30), as the sinks join where splits are combined.
    for kernels in found.values():
        assert sum("_split_k_kernel" in kernel for kernel in kernels) == 3
        assert sum("_combine_kernel" in kernel for kernel in kernels) == 2
        # The Hopper kernel takes neither.
        assert not any("_hopper_kernel" in kernel for kernel in kernels)
    assert sum("_tiled_kernel" in kernel for kernel in found["prefill"]) == 3


def test_calls_pass_as_many_arguments_as_their_kernels_take(programs, tmp_path):
    # Absent sinks are no argument of a call, and no parameter of its kernel.
    source = wrapper_source(programs["decode"], tmp_path)
    passed, taken = {}, {}
    for name, body in re.findall(r"void call_(\w+?)\((.*?)\n\}", source, re.S):
        if "_split_k_kernel" in name or "_combine_kernel" in name:
            (arguments,) = re.findall(r"kernel_args_\[\] = \{([^}]+)\}", body)
            passed.setdefault(re.sub(r"_\d+$", "", name), []).append(arguments.count("&"))
    for file in (tmp_path / "triton").rglob("*.ptx"):
        if file.stem in ("_split_k_kernel", "_combine_kernel"):
            entry = file.read_text().partition(".entry")[2].partition(")\n")[0]
            taken.setdefault(file.stem, []).append(entry.count(".param"))
    assert len(passed["_split_k_kernel"]) == 3
    # Combining has one kernel without sinks and one, for two calls, with them.
    assert max(passed["_combine_kernel"]) == min(passed["_combine_kernel"]) + 1
    for name, counts in passed.items():
        assert set(counts) <= set(taken[name])
