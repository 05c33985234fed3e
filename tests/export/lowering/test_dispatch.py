"""A choice at run time, lowered: a host ``if`` between two kernels that read the caches in place."""

from __future__ import annotations

import re

import pytest
import torch
from dynamic_attention import HEAD_DIM, HEADS, HEADS_KV, KEYS, LONGEST, dynamic_program
from wrappers import allocated, keeping_wrappers, wrapper_source

from flashpte.export.lowering import inspect_pte, lower
from flashpte.export.lowering.cross_compile import overrides
from flashpte.export.lowering.describe_methods import describe_method
from flashpte.passes import replace_sdpa

pytestmark = [pytest.mark.lowering, pytest.mark.xdist_group("dispatch")]
cond = torch.ops.higher_order.cond
LAYERS = 2


@pytest.fixture(scope="module")
def program():
    program, report = replace_sdpa(dynamic_program(layers=LAYERS))
    assert [len(n.branches) for n in report.nodes] == [2] * LAYERS
    assert {n.lq_range for n in report.nodes} == {(1, LONGEST)}
    return program


@pytest.fixture(scope="module")
def described(program):
    """The method's description, before anything compiles the program."""
    return describe_method(program)


@pytest.fixture(scope="module")
def lowered_and_source(program, described, tmp_path_factory):
    with keeping_wrappers() as sources:
        lowered = lower({"forward": program}, output_dir=tmp_path_factory.mktemp("dispatch") / "out", arch="sm_90")
    (source,) = sources
    return lowered, source


@pytest.fixture(scope="module")
def source(lowered_and_source):
    return lowered_and_source[1]


def test_one_method_holds_both_kernels_once(described, lowered_and_source):
    lowered, _ = lowered_and_source  # includes its self check
    assert lowered.manifest["methods"]["forward"] == described  # the declared range, whatever compiling made of it
    (method,) = inspect_pte(lowered.model).methods.values()
    kernels = [kernel for cubin in method.library.cubins for kernel in cubin.kernels]
    # Compiled once for each form of mask.
    for name in ("_split_k_kernel", "_hopper_kernel"):
        assert sum(name in kernel for kernel in kernels) == 2
    for name in ("_classify_kernel", "_classify_intervals_kernel"):
        assert sum(name in kernel for kernel in kernels) == 1


def test_the_host_decides_by_a_size(source):
    """Each kernel's grid is empty for the other kernel's L_q; nothing is read back from the device."""
    assert "aoti_torch_item" not in source
    calls = re.findall(r"^ *call_(_\w+_kernel)_\d+\(", source, re.MULTILINE)
    names = ("classify", "classify_intervals", "split_k", "combine", "hopper")
    assert [calls.count(f"_{name}_kernel") for name in names] == [
        1,
        1,
        LAYERS,
        2 * LAYERS,
        LAYERS,
    ]  # both kernels may split the keys
    for name in ("split_k", "combine", "hopper"):
        launches = re.findall(rf"^ *call__{name}_kernel_\d+\(.*\);", source, re.MULTILINE)
        assert len(launches) == (2 if name == "combine" else 1) * LAYERS
        for launch in launches:
            assert "div_floor_integer(static_cast<int64_t>(s" in launch
            assert "static_cast<int64_t>(17L)" in launch, f"{name} is launched for every length"


@pytest.mark.parametrize("length", [1, 16, 17, LONGEST])
def test_neither_caches_nor_masks_are_copied(source, length):
    buffers = allocated(source, length)
    # Both kernels write to the same result.
    wide = (length * HEADS * HEAD_DIM, "bfloat16")
    assert buffers.count(wide) <= 2 * LAYERS  # the rotated query and the result
    assert (KEYS * HEADS_KV * HEAD_DIM, "bfloat16") not in buffers
    assert (KEYS * HEADS * HEAD_DIM, "bfloat16") not in buffers
    assert (length * KEYS * HEADS, "bool") not in buffers
    # The mask that is not proven must exist, but not expanded.
    assert buffers.count((length * KEYS, "bool")) == 1


@pytest.mark.sweep  # what Inductor would do, in 20 s
def test_inductor_by_itself_writes_a_mask_for_every_kernel_that_reads_it(program, tmp_path, monkeypatch):
    once = [o for o in overrides.TABLE if o.name.endswith("constrain_to_fake_tensor")]
    assert len(once) == 1
    monkeypatch.setattr(overrides, "TABLE", tuple(o for o in overrides.TABLE if o not in once))
    assert allocated(wrapper_source(program, tmp_path), LONGEST).count((LONGEST * KEYS, "bool")) > 1


class InABranch(torch.nn.Module):
    """Attention in a branch of the model's own, with a query that Inductor would lay out differently."""

    def forward(self, q, k, v, flag):
        attend = torch.nn.functional.scaled_dot_product_attention
        q = q.transpose(1, 2)
        q = torch.cat([-q[..., 32:], q[..., :32]], -1) * 2 + q
        return torch.cond(flag, lambda q, k, v: attend(q, k, v), lambda q, k, v: q.clone(), (q, k, v))


@pytest.fixture(scope="module")
def branching():
    length = torch.export.Dim("length", min=1, max=LONGEST)
    q = torch.randn(1, 8, 4, 64, dtype=torch.bfloat16)
    k, v = (torch.randn(1, 4, 100, 64, dtype=torch.bfloat16) for _ in range(2))
    shapes = ({1: length}, None, None, None)
    program = torch.export.export(InABranch(), (q, k, v, torch.tensor(True)), dynamic_shapes=shapes)
    program, report = replace_sdpa(program)
    assert len(report.nodes[0].branches) == 2
    return program


def operand_strides(program, folder, monkeypatch):
    """For each operand of a branch, the strides that Inductor gave it and those that the branch was compiled for."""
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    given, expected, original = [], [], lowerings[cond]

    def lowering(pred, true_fn, false_fn, operands):
        expected.extend(node.meta["val"] for node in V.graph.current_node.args[-1])
        result = original(pred, true_fn, false_fn, operands)
        given.extend(result[0].data.data.inputs[0].operands)
        return result

    monkeypatch.setitem(lowerings, cond, lowering)
    wrapper_source(program, folder)

    def significant(sizes, strides):
        return [str(stride) for size, stride in zip(sizes, strides, strict=True) if str(size) != "1"]

    return [
        (significant(value.shape, operand.get_layout().stride), significant(value.shape, value.stride()))
        for operand, value in zip(given, expected, strict=True)
        if isinstance(value, torch.Tensor)
    ]


def test_a_branch_reads_its_operands_as_they_lie_in_memory(branching, tmp_path, monkeypatch):
    strides = operand_strides(branching, tmp_path, monkeypatch)
    assert len(strides) == 3
    for given, expected in strides:
        assert given == expected


def test_inductor_by_itself_lays_them_out_in_another_way(branching, tmp_path, monkeypatch):
    pinning = [o for o in overrides.TABLE if o.name.endswith("GraphLowering.call_function")]
    assert len(pinning) == 1
    monkeypatch.setattr(overrides, "TABLE", tuple(o for o in overrides.TABLE if o not in pinning))
    assert any(given != expected for given, expected in operand_strides(branching, tmp_path, monkeypatch))
