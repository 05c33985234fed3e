"""If the range of a dynamic L_q spans several kernels, the choice is made at run time."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from programs import (
    Attention,
    CachedLayers,
    assert_same_attention,
    cached_program,
    calls,
    check_maps,
    exported,
    fresh_module,
    qkv,
)
from torch.export import Dim
from torch.fx import Graph, GraphModule

from flashpte.passes import format_table, replace_sdpa
from flashpte.passes.graph.aliasing import written_between

LENGTHS = (1, 5, 16, 17, 500)
VERIFY, PREFILL = BOTH = ("flashpte::sdpa_verify", "flashpte::sdpa_prefill")
DISPATCH = "flashpte::sdpa_dispatch"
# Rounding grows from layer to layer, because each layer doubles its values.
CACHED = dict(atol=1e-3, rtol=1e-3)


def hidden(length, start):
    """Inputs of :class:`CachedLayers`."""
    generator = torch.Generator().manual_seed(length)
    return torch.randn(1, length, 64, generator=generator), torch.arange(length) + start


def rows(bounds, *names):
    """Dynamic shapes that make dimension 2 of the named inputs of :class:`Attention` one size within ``bounds``."""
    length = Dim("length", min=bounds[0], max=bounds[1])
    return {name: {2: length} if name in ("q", *names) else None for name in ("q", "k", "v")}


def rewrite(module, args, shapes):
    program = exported(module, args, shapes)
    new, report = replace_sdpa(program)
    return program, new, report.nodes[0]


def same_results(new, module, cases, tolerance=None):
    for args in cases:
        out, expected = fresh_module(new)(*args), copy.deepcopy(module)(*args)
        assert_same_attention(out, expected, **(tolerance or {}))


@pytest.mark.parametrize("bounds", [(1, 512), (2, 17), (16, 40), (1, None)])
def test_ranges_that_span_kernels_choose_at_run_time(bounds):
    module = Attention()
    program, new, entry = rewrite(module, qkv(16), rows(bounds))
    assert (entry.op, entry.branches) == (DISPATCH, BOTH)
    assert entry.lq_range == bounds
    span = f"{bounds[0]}..{bounds[1] or ''}"
    assert entry.reason == f"L_q is {span}: at run time up to 16 rows take sdpa_verify, more sdpa_prefill"
    assert entry.op.removeprefix("flashpte::") in format_table({"forward": replace_sdpa(program)[1]})
    lengths = [n for n in LENGTHS if bounds[0] <= n <= (bounds[1] or n)]
    assert len(lengths) >= 2
    assert len(calls(new, "sdpa_dispatch")) == 1
    same_results(new, module, [qkv(n) for n in lengths])


@pytest.mark.parametrize(("bounds", "op"), [((1, 16), VERIFY), ((2, 9), VERIFY), ((17, 512), PREFILL)])
def test_ranges_within_one_kernel_need_no_choice(bounds, op):
    module = Attention()
    _, new, entry = rewrite(module, qkv(bounds[1] - 1), rows(bounds))
    assert (entry.op, entry.branches, entry.lq_range) == (op, (), bounds)
    assert not calls(new, "sdpa_dispatch")
    same_results(new, module, [qkv(n) for n in bounds])


def test_the_operator_stands_where_the_attention_stood():
    program, new, _ = rewrite(Attention(is_causal=True, scale=0.3), qkv(30, batch=2), rows((1, 512)))
    (node,) = calls(new, "flashpte")
    assert [n.name for n in node.args[:3]] == ["q", "k", "v"]
    assert node.args[3:8] == (None, None, None, True, 0.3)
    (replaced,) = calls(program, "scaled_dot_product_attention")
    assert node.name == replaced.name
    assert [str(s) for s in node.meta["val"].shape] == [str(s) for s in replaced.meta["val"].shape]
    assert [str(s) for s in node.meta["val"].stride()] == [str(s) for s in replaced.meta["val"].stride()]


def test_a_mask_that_differs_within_a_group_has_a_map_for_each_kernel():
    def args(n):
        return (*qkv(n, 600, heads_kv=2, seed=n), torch.rand(1, 4, n, 600) < 0.5)

    module, shapes = Attention(enable_gqa=True), rows((1, 512))
    shapes["mask"] = {2: shapes["q"][2]}
    new, _ = replace_sdpa(exported(module, args(30), shapes))
    assert sorted(n.args[3:] for n in calls(new, "tile_map")) == [(16, 64, 2, 1), (128, 128, 1, None)]
    for n in LENGTHS:
        same_results(new, module, [args(n)])
        assert check_maps(new, args(n)) == 2


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "broadcast", "grouped"])
@pytest.mark.parametrize("decompose", [False, True])
def test_results_are_those_of_the_original(kind, decompose):
    options = {"causal": dict(is_causal=True), "grouped": dict(enable_gqa=True)}.get(kind, {})
    module = Attention(**options)
    masks = {
        "bool": lambda n: torch.rand(1, 1, n, 600) < 0.5,
        "float": lambda n: torch.randn(1, 4, n, 600),
        "broadcast": lambda n: torch.arange(600)[None, None, None] < 77,
    }

    def args(n):
        tensors = qkv(n, 600, heads_kv=2 if kind == "grouped" else 4, seed=n)
        return (*tensors, masks[kind](n)) if kind in masks else tensors

    shapes = rows((1, 512))
    if kind in masks:
        shapes["mask"] = None if kind == "broadcast" else {2: shapes["q"][2]}
    program = exported(module, args(30), shapes)
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    assert report.nodes[0].branches == BOTH
    # Lowering first functionalizes, which refuses operands or results that share memory.
    again = new.run_decompositions({})
    for n in LENGTHS:
        same_results(new, module, [args(n)])
        # Tracing again adds a guard on the number of a map's tiles (PyTorch checks whether the map is contiguous). A
        # CPU checks the guard, and the example and 500 rows have different numbers of tiles.
        if n <= 128 or kind not in masks:
            same_results(again, module, [args(n)])
        assert check_maps(new, args(n)) == (1 if kind in masks else 0)


@pytest.mark.parametrize("decompose", [False, True])
def test_layers_that_share_a_mask_share_one_map(decompose):
    program, _ = cached_program(20, (1, 512), length=640)
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    assert [(n.branches, n.map_users) for n in report.nodes] == [(BOTH, 3)] * 3
    (made,) = calls(new, "interval_map")
    assert made.args[3:] == (128, 128, None)
    for node in calls(new, "sdpa_dispatch"):
        assert [n.args[0] for n in node.args[4:6]] == [made] * 2
        assert node.args[9] is made.args[0]
    for n in LENGTHS:
        args = hidden(n, 100)
        assert check_maps(new, args) == 3
        same_results(new, program.module(), [args], CACHED)


class MaskWritten(torch.nn.Module):
    """The mask changes between the two calls, so there are two masks, each with a map."""

    maps = 2

    def forward(self, q, k, v):
        mask = torch.arange(640).lt(9).expand(q.shape[2], 640).clone()
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mask[..., 300:] = True
        return first + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class CacheWritten(torch.nn.Module):
    """The cache changes, with a choice at run time in between; the maps are still those of the mask."""

    maps = 1

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.randn(1, 4, 640, 16, generator=torch.Generator().manual_seed(3)))

    def forward(self, q, k, v):
        mask = torch.arange(640).lt(77).expand(q.shape[2], 640)
        first = F.scaled_dot_product_attention(q, self.cache, v, attn_mask=mask)
        self.cache[:, :, 5:9] = k[:, :, :4]
        return first + F.scaled_dot_product_attention(q, self.cache, v, attn_mask=mask)


@pytest.mark.parametrize("module", [MaskWritten, CacheWritten])
@pytest.mark.parametrize("decompose", [False, True])
def test_what_is_written_between_two_choices(module, decompose):
    program = exported(module(), qkv(30, 640), rows((1, 512)))
    if decompose:
        program = program.run_decompositions({})
    new, _ = replace_sdpa(program)
    assert len(calls(new, "_map.")) == module.maps
    for n in LENGTHS:
        assert check_maps(new, qkv(n, 640)) == 2
        same_results(new, program.module(), [qkv(n, 640)])


@pytest.mark.parametrize("written", [None, "mask", "other"])
@pytest.mark.parametrize("through_a_view", [False, True])
def test_only_what_a_branch_writes_to_counts_as_written(written, through_a_view):
    def branch(name):
        graph = Graph()
        inputs = {n: graph.placeholder(n) for n in ("mask", "other")}
        if name:
            target = inputs[name]
            if through_a_view:
                target = graph.call_function(torch.ops.aten.select.int, (target, 0, 0))
            graph.call_function(torch.ops.aten.fill_.Scalar, (target, 1))
        graph.output((graph.call_function(torch.ops.aten.clone.default, (inputs["other"],)),))
        return GraphModule({}, graph)

    root, graph = torch.nn.Module(), Graph()
    root.reads, root.writes = branch(None), branch(written)
    mask, other, flag = (graph.placeholder(n) for n in ("mask", "other", "flag"))
    seen = graph.call_function(torch.ops.aten.select.int, (mask, 0, 0))
    start = graph.call_function(torch.ops.aten.clone.default, (mask,))
    graph.call_function(
        torch.ops.higher_order.cond, (flag, graph.get_attr("reads"), graph.get_attr("writes"), (mask, other))
    )
    end = graph.call_function(torch.ops.aten.clone.default, (mask,))
    graph.output((end,))
    module = GraphModule(root, graph)
    start, end, seen, other = ({n.name: n for n in module.graph.nodes}[n.name] for n in (start, end, seen, other))
    assert written_between(start, end, [seen]) == (written == "mask")
    assert written_between(start, end, [other]) == (written == "other")


def test_grouped_heads_are_recovered_in_front_of_the_choice():
    class Repeated(torch.nn.Module):
        def forward(self, q, k, v):
            k, v = (t[:, :, None].expand(-1, -1, 3, -1, -1).reshape(1, 6, 64, 16) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v)

    module = Repeated()
    _, new, entry = rewrite(module, qkv(30, heads=6, heads_kv=2), rows((1, 512)))
    (node,) = calls(new, "sdpa_dispatch")
    assert [n.name for n in node.args[:3]] == ["q", "k", "v"]
    assert entry.key == (1, 2, 64, 16)
    assert not calls(new, "expand")
    same_results(new, module, [qkv(n, heads=6, heads_kv=2) for n in LENGTHS])


class Fused(torch.nn.Module):
    def forward(self, x):
        q, k, v = x.view(1, -1, 3, 4, 16).unbind(2)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


class OneCache(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.randn(2, 1, 4, 64, 16))

    def forward(self, x):
        q = x.view(1, -1, 4, 48)[..., :16].transpose(1, 2)
        return F.scaled_dot_product_attention(q, self.cache[0], self.cache[1])


@pytest.mark.parametrize("module", [Fused, OneCache])
@pytest.mark.parametrize("decompose", [False, True])
def test_views_of_one_tensor(module, decompose):
    module = module().eval()
    program = exported(module, (torch.randn(1, 30, 192),), ({1: Dim("length", min=1, max=512)},))
    if decompose:
        program = program.run_decompositions({})
    new, report = replace_sdpa(program)
    (entry,) = report.nodes
    assert entry.op == DISPATCH
    new.run_decompositions({})
    same_results(new, module, [(torch.randn(1, n, 192),) for n in LENGTHS])


def test_attention_in_a_branch_of_the_models_own():
    class Branches(torch.nn.Module):
        def forward(self, q, k, v):
            attend = F.scaled_dot_product_attention
            return torch.cond(q.sum() > 0, lambda q, k, v: attend(q, k, v), lambda q, k, v: q + 0, (q, k, v))

    _, new, entry = rewrite(Branches(), qkv(30), rows((1, 512)))
    assert entry.branches == BOTH
    again = new.run_decompositions({})
    for n in LENGTHS:
        for sign in (1, -1):
            q, k, v = qkv(n)
            same_results(new, Branches(), [(q.abs() * sign, k, v)])
            same_results(again, Branches(), [(q.abs() * sign, k, v)])


def test_a_rewritten_program_can_be_rewritten_copied_saved_and_unflattened():
    class Projected(CachedLayers):
        """A model whose weights require a gradient, as in loaded modules."""

        def __init__(self):
            super().__init__(layers=2, length=640)
            self.project = torch.nn.Linear(64, 64)

        def forward(self, x, pos):
            return super().forward(self.project(x), pos)

    length = Dim("length", min=1, max=512)
    example = (torch.randn(1, 20, 64), torch.arange(20))
    program = torch.export.export(Projected().eval(), example, dynamic_shapes=({1: length}, {0: length}))
    new, _ = replace_sdpa(program)
    new.validate()
    again, report = replace_sdpa(new)
    assert not report.nodes
    assert str(again.graph) == str(new.graph)
    file = io.BytesIO()
    torch.export.save(new, file)
    file.seek(0)
    loaded = torch.export.load(file)
    copied = copy.deepcopy(new.graph_module)
    assert [n.name for n in copied.graph.nodes] == [n.name for n in new.graph.nodes]
    for n in LENGTHS:
        args = hidden(n, 50)
        expected = fresh_module(program)(*args)
        for module in (new.module(), again.module(), loaded.module()):
            torch.testing.assert_close(copy.deepcopy(module)(*args), expected, **CACHED)
    torch.testing.assert_close(torch.export.unflatten(new)(*args), expected, **CACHED)
