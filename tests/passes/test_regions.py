"""Attention under ``torch.no_grad()`` or another autocast: masks computed outside the region are proven inside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import assert_same_attention, fresh_module, qkv
from torch.export import Dim, export
from torch.fx import GraphModule

from flashpte.passes import replace_sdpa

KEYS = 200
attend = F.scaled_dot_product_attention


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("tril", torch.ones(400, KEYS, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("positions", torch.arange(KEYS), persistent=False)


class NoGrad(Net):
    def forward(self, q, k, v, pos):
        mask = torch.arange(KEYS) <= pos[:, None]
        with torch.no_grad():
            return attend(q, k, v, attn_mask=mask[None, None])


class Autocast(Net):
    def forward(self, q, k, v, pos):
        mask = torch.arange(KEYS) <= pos[:, None]
        with torch.autocast("cpu", enabled=False):
            return attend(q, k, v, attn_mask=mask[None, None])


class Nested(Net):
    def forward(self, q, k, v, pos):
        mask = torch.arange(KEYS) <= pos[:, None]
        with torch.no_grad():
            q = q + 1
            with torch.autocast("cpu", enabled=False):
                return attend(q, k, v, attn_mask=mask[None, None])


class MinimumOutside(Net):
    def forward(self, q, k, v, pos):
        mask = (1.0 - (torch.arange(KEYS) <= pos[:, None]).float()) * torch.finfo(torch.float32).min
        with torch.no_grad():
            return attend(q, k, v, attn_mask=mask)


class Triangle(Net):
    def forward(self, q, k, v, pos):
        mask = self.tril[pos]
        with torch.no_grad():
            return attend(q, k, v, attn_mask=mask)


class LayersInRegions(Net):
    def forward(self, q, k, v, pos):
        mask = torch.arange(KEYS) <= pos[:, None]
        for _ in range(2):
            with torch.no_grad():
                q = attend(q, k, v, attn_mask=mask)
            q = q * 2
        return attend(q, k, v, attn_mask=mask)


class NotPositions(Net):
    def forward(self, q, k, v, pos):
        mask = (torch.arange(KEYS) + pos[:, None]) % 3 == 0
        with torch.no_grad():
            return attend(q, k, v, attn_mask=mask), mask.sum()


class WrittenOutside(Net):
    def forward(self, q, k, v, pos):
        rows = pos * 1
        mask = torch.arange(KEYS) <= rows[:, None]
        rows.add_(40)
        with torch.no_grad():
            return attend(q, k, v, attn_mask=mask) + rows.sum()


class MaskWrittenInside(Net):
    def forward(self, q, k, v, pos):
        mask = torch.arange(KEYS) <= pos[:, None]
        with torch.no_grad():
            mask[:, :9] = False
            return attend(q, k, v, attn_mask=mask) + mask.sum()


class PositionsWrittenInside(Net):
    def forward(self, q, k, v, pos):
        mask = self.positions <= pos[:, None]
        with torch.no_grad():
            self.positions.add_(20)
            return attend(q, k, v, attn_mask=mask) + self.positions.sum()


class WrittenThroughAnotherOperand(Net):
    def forward(self, q, k, v, pos):
        rows = pos * 1
        first = rows[:3]
        mask = torch.arange(KEYS) <= rows[:, None]
        with torch.no_grad():
            first.add_(50)
            return attend(q, k, v, attn_mask=mask) + first.sum()


class RandomOutside(Net):
    def forward(self, q, k, v, pos):
        mask = (torch.rand(KEYS) < 2.0) & ((torch.arange(KEYS) + pos[:, None]) % 3 == 0)
        with torch.no_grad():
            return attend(q, k, v, attn_mask=mask)


PROVEN = [NoGrad, Autocast, Nested, MinimumOutside, Triangle, LayersInRegions]
TENSOR = [
    NotPositions,
    WrittenOutside,
    MaskWrittenInside,
    PositionsWrittenInside,
    WrittenThroughAnotherOperand,
    RandomOutside,
]


def rewritten(module, dynamic: bool):
    rows = Dim("rows", min=17, max=300)
    args = (*qkv(20, KEYS), torch.arange(20) * 7)
    # Export in grad mode, so that torch.no_grad() becomes a region.
    program = export(module().eval(), args, dynamic_shapes=({2: rows}, None, None, {0: rows}) if dynamic else None)
    assert any("wrap_with" in str(n.target) for n in program.graph.nodes)
    new, report = replace_sdpa(program)
    new.validate()
    for positions in (torch.arange(20), torch.arange(20) * 7, torch.arange(20) - 9):
        given = (*args[:3], positions)
        out, expected = fresh_module(new)(*given), fresh_module(program)(*given)
        assert_same_attention(out, expected)
    return new, report


def masks_computed(program) -> list[torch.fx.Node]:
    modules = [m for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    values = [(n, n.meta.get("val")) for m in modules for n in m.graph.nodes]
    return [n for n, value in values if isinstance(value, torch.Tensor) and value.shape[-2:] == (20, KEYS)]


@pytest.mark.parametrize("module", PROVEN)
@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_from_outside_of_a_region_are_proven(module, dynamic):
    new, report = rewritten(module, dynamic)
    assert {entry.mask_form for entry in report.nodes} == {"positions"}
    assert not masks_computed(new), "the mask is still computed"


@pytest.mark.parametrize("module", TENSOR)
def test_other_masks_are_read_from_outside(module):
    new, report = rewritten(module, False)
    assert {entry.mask_form for entry in report.nodes} == {"tensor"}
    # Only once: the copies in the region are gone.
    computed = [n for n in masks_computed(new) if "bitwise" not in str(n.target) and n.op == "call_function"]
    assert len({n.name for n in computed}) == len(computed)
    assert len([n for n in computed if "remainder" in str(n.target)]) <= 1


def test_signatures_of_modules_around_a_region():
    """A mask is an argument of a module whose call is kept, although nothing reads it once it is proven."""

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, mask):
            with torch.no_grad():
                return attend(q, k, v, attn_mask=mask)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, q, k, v, pos):
            return self.layer(q, k, v, torch.arange(KEYS) <= pos[:, None]) + 1

    args = (*qkv(5, KEYS), torch.arange(5) + 60)
    with torch.enable_grad():
        program = export(Outer(), args, preserve_module_call_signature=("layer",))
    new, report = replace_sdpa(program)
    assert [entry.mask_form for entry in report.nodes] == ["positions"]
    names = {node.name for node in new.graph.nodes}
    signature = next(entry.signature for entry in new.module_call_graph if entry.fqn == "layer")
    assert {argument.name for argument in (*signature.inputs, *signature.outputs)} <= names
    assert_same_attention(new.module()(*args), Outer()(*args))


def test_a_mask_that_is_written_through_a_view_from_a_region():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, positions):
            with torch.no_grad():
                seen = positions[:1]
            mask = torch.arange(64)[None, :] <= positions[:, None]
            first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            seen.sub_(5)
            mask = torch.arange(64)[None, :] <= positions[:, None]
            return first + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k, v = qkv(4)
    positions = torch.tensor([10, 20, 30, 40])
    with torch.enable_grad():
        program = torch.export.export(Model(), (q, k, v, positions))
    new, report = replace_sdpa(program)
    assert len(report.replaced) == 2
    expected = Model()(q, k, v, positions.clone())
    torch.testing.assert_close(new.module()(q, k, v, positions.clone()), expected)
