"""Every output of a program is contiguous and starts its own memory, because ExecuTorch's delegate takes no other."""

import re

import pytest
import torch
from module_of import module_of
from wrappers import kernel_sources, wrapper_source

from flashpte.export.common.errors import ExportError
from flashpte.export.lowering import lower
from flashpte.export.lowering.cross_compile import overrides
from flashpte.export.lowering.prepare import prepare_pte


def twenty_forms(module, x):
    y = x * 2 + 1
    w = torch.cat([x, x], 1).relu()
    return {
        "last row": y[:, -1:],
        "first rows": y[:, :2],
        "one of a batch": y[1],
        "one row": x[:, 1],
        "columns with a step": w.view(-1)[::2],
        "transposed": y.transpose(0, 1),
        "permuted": w.permute(2, 0, 1),
        "matrix transposed": w.mT,
        "expanded": y.unsqueeze(0).expand(3, -1, -1, -1),
        "diagonal": torch.diagonal(y, 0, 1, 2),
        "chunk": w.chunk(2, 1)[1],
        "clone of a slice": (y + 1).clone()[:, 3],
        "slice, then clone": w[:, 3:5].clone(),
        "element": w[0, 0, 0],
        "flattened": y.flatten(),
        "input": x,
        "whole": y,
        "whole again": y,
        "weight": module.weight.t(),
        "buffer": module.buffer,
        "sum": y.sum(),
        "bool": (y > 0)[:, 1:],
        "int64": y.long()[..., 0],
        "no rows": y[:, :0],
        "no columns": y[..., :0],
        "no columns, from the end": w[..., 10:],
        "no columns, transposed": y[..., :0].transpose(0, 1),
        "no columns of an input": x[..., 3:3],
        "new and empty": x.new_zeros(4, 0),
    }


def forms_module():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 4))
    return module_of(twenty_forms, weight=weight, buffer=torch.randn(5)), (torch.randn(2, 6, 10),)


def test_a_returned_placeholder_becomes_a_clone():
    module, inputs = forms_module()
    program = torch.export.export(module, inputs)
    returned = [node.name for node in program.graph.output_node().args[0]]
    prepared = prepare_pte(program)
    assert [node.name for node in program.graph.output_node().args[0]] == returned
    results = prepared.graph.output_node().args[0]
    assert not [node for node in results if node.op == "placeholder"]
    assert [spec.arg.name for spec in prepared.graph_signature.output_specs] == [node.name for node in results]
    for got, expected in zip(prepared.module()(*inputs).values(), module(*inputs).values(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.lowering
def test_twenty_forms_of_outputs_lower(tmp_path):
    module, inputs = forms_module()
    lowered = lower({"forward": torch.export.export(module, inputs)}, output_dir=tmp_path / "out", arch="sm_90")
    shapes = [output["shape"] for output in lowered.manifest["methods"]["forward"]["outputs"]]
    assert shapes == [list(value.shape) for value in module(*inputs).values()]


@pytest.mark.lowering
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda module, x: x.exp()[1], "output 0 begins at element 60 of its memory"),
        (lambda module, x: x.exp()[:, :2], r"output 0 has strides \[60, 10, 1\] for sizes \[2, 2, 10\]"),
    ],
)
def test_what_the_runtime_would_refuse_is_refused(tmp_path, monkeypatch, function, said):
    monkeypatch.setattr(overrides, "whole_outputs", lambda original: original)
    monkeypatch.setattr("flashpte.export.lowering.cross_compile.restore_views._escaping", lambda module: set())
    program = torch.export.export(module_of(function), (torch.randn(2, 6, 10),))
    with pytest.raises(ExportError, match=said):
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")


def stored_tensors(module, x):
    module.cache.add_(x)
    stored = (module.weight, module.buffer, module.halfs, module.index, module.flags, module.octets)
    return *stored, module.cache.clone(), module.cache.t(), module.weight[1:]


@pytest.mark.lowering
@pytest.mark.parametrize("kind", ["forms", "stored"])
def test_no_output_is_copied_by_the_runtime(tmp_path, kind):
    """It copies on the default stream, which fails while a CUDA graph is recorded. A kernel copies instead."""
    module, inputs = forms_module()
    if kind == "stored":
        values = {"halfs": torch.randn(4).half(), "index": torch.arange(7), "octets": torch.arange(9).to(torch.uint8)}
        values |= {"flags": torch.tensor([True, False, True]), "buffer": torch.randn(5), "cache": torch.randn(2, 6)}
        module = module_of(stored_tensors, weight=torch.nn.Parameter(torch.randn(3, 4)), **values)
        inputs = (torch.randn(2, 6),)
    source = wrapper_source(torch.export.export(module, inputs), tmp_path)
    assert "output_handles[8]" in source
    assert "aoti_torch_clone(" not in source


def whole(module, x):
    before = module.buffer.clone()
    module.buffer.add_(x)
    return before


def part(module, x):
    before = module.buffer[1:].clone()
    module.buffer.add_(x)
    return before


def row_written(module, x):
    before = module.buffer.clone()
    module.buffer[0] = x[0]
    return before


def transposed(module, x):
    before = module.buffer.t().clone()
    module.buffer.add_(x)
    return before


@pytest.mark.lowering
@pytest.mark.parametrize("function", [whole, part, row_written, transposed])
def test_a_copy_before_a_write_holds_the_old_value(tmp_path, monkeypatch, function):
    """Inductor removed the copy, so that the new value was returned."""
    program = torch.export.export(module_of(function, buffer=torch.zeros(4, 6)), (torch.ones(4, 6),))
    first, *_ = re.findall(r"def triton_\w+\(.*?(?=\ndef |\Z)", kernel_sources(program, tmp_path, monkeypatch), re.S)
    assert re.match(r"def triton_\w*clone", first)
    stored = re.findall(r"tl\.store\(\w+ptr\w* \+ .*?, (tmp\d+), ", first)
    loaded = re.findall(r"(tmp\d+) = tl\.load\(", first)
    # The first kernel stores the buffer's value as it loads it, alone or beside what it writes to the buffer.
    assert set(stored) & set(loaded)
    assert len(set(stored)) == len(stored)
