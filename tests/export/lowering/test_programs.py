"""Programs as other people write them: views everywhere, operators outside core ATen, two formats of one program."""

import pytest
import torch
import torch.nn.functional as F
from module_of import module_of

from flashpte.export.lowering import lower
from flashpte.export.lowering.cross_compile.host_weights import deepcopy_sharing_tensors
from flashpte.export.lowering.describe_methods import describe_method
from flashpte.passes import replace_sdpa

HEADS, HEAD_DIM = 4, 16
HIDDEN = HEADS * HEAD_DIM


def fused_layer(module, x):
    """Fused q|k|v and gate|up projections, split in five ways before and after attention."""
    q, k, v = module.qkv(x).split([HIDDEN, HIDDEN, HIDDEN], -1)
    q, k, v = (t.view(1, -1, HEADS, HEAD_DIM).transpose(1, 2) for t in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    attended = attended.transpose(1, 2).reshape(1, -1, HIDDEN)
    gate, up = module.inner(attended).chunk(2, -1)
    left, right = (F.silu(gate) * up).tensor_split(2, -1)
    return left.unbind(1)[0], right.narrow(-1, 1, 4), torch.split(attended, 5, 1)[2]


def inner_layer(module, x):
    first, *_, last = module.linear(x).chunk(4, -1)
    return torch.cat([first + last.unbind(1)[0][:, None], last], -1)


def not_core(module, x):
    """Operators outside core ATen, which ExecuTorch's verifier refuses and AOTInductor compiles."""
    length = x.shape[1]
    quantised = torch._int_mm(x[0].to(torch.int8), module.weight)
    return x.sum(), x / length**0.5, quantised


def layer():
    inner = module_of(inner_layer, linear=torch.nn.Linear(HIDDEN, 4 * HIDDEN, dtype=torch.float16))
    return module_of(fused_layer, qkv=torch.nn.Linear(HIDDEN, 3 * HIDDEN, dtype=torch.float16), inner=inner)


@pytest.mark.lowering
def test_views_into_parts_lower(tmp_path):
    program, report = replace_sdpa(torch.export.export(layer(), (torch.randn(1, 16, HIDDEN, dtype=torch.float16),)))
    assert len(report.replaced) == 1
    lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")


@pytest.mark.lowering
def test_operators_outside_of_core_aten_lower(tmp_path):
    module = module_of(not_core, weight=torch.ones(64, 32, dtype=torch.int8))
    lower({"forward": torch.export.export(module, (torch.randn(1, 32, 64),))}, output_dir=tmp_path / "out")


@pytest.mark.lowering
def test_formats_and_archs_of_one_program_in_one_process(tmp_path):
    """A lowering does not change the caller's program, including non-persistent buffers among its constants."""

    def add_to_cache(module, x):
        module.cache.index_add_(0, module.row, x)
        return module.cache * 2

    cache, row = torch.zeros(4, 8), torch.tensor([1])
    program = torch.export.export(module_of(add_to_cache, persistent=False, cache=cache, row=row), (torch.ones(1, 8),))
    before = dict(program.constants)
    assert set(before) == {"cache", "row"}
    for number, (package, arch) in enumerate([("pte", "sm_90"), ("pt2", "sm_80"), ("pte", "sm_80")]):
        lowered = lower({"forward": program}, output_dir=tmp_path / str(number), arch=arch, format=package)
        assert lowered.manifest["methods"]["forward"]["mutable_buffers"] == ["cache"]
        assert {name: value.data_ptr() for name, value in program.constants.items()} == {
            name: value.data_ptr() for name, value in before.items()
        }
    assert torch.equal(program.module()(torch.ones(1, 8))[1], torch.full((8,), 2.0))


@pytest.mark.parametrize("dim", [torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC, torch.export.Dim("rows")])
def test_a_size_without_an_upper_bound_is_described(dim):
    program = torch.export.export(torch.nn.ReLU(), (torch.ones(3, 4),), dynamic_shapes=({0: dim},))
    (described,) = describe_method(program)["inputs"]
    (smallest, largest), columns = described["shape"]
    assert smallest in (0, 1, 2)
    assert largest is None
    assert columns == 4


def test_a_copied_program_has_the_names_that_its_signature_has():
    """A copied graph renames nodes with the name of a builtin; here the input is named ``input``."""
    program = torch.export.export(torch.nn.Sequential(torch.nn.ReLU()), (torch.ones(3),))
    assert program.graph_signature.user_inputs == ("input",)
    copied = deepcopy_sharing_tensors(program, {})
    copied.validate()
    assert [node.name for node in copied.graph.nodes] == [node.name for node in program.graph.nodes]
    assert torch.equal(copied.module()(-torch.ones(3)), torch.zeros(3))
