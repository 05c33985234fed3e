"""Methods of one program share tensors by name, so a name must mean one value."""

import dataclasses

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower

from flashpte.export.files.pte_contents import WeightEntry
from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.self_check import shared_name_problem


class Plus(torch.nn.Module):
    def __init__(self, *amounts):
        super().__init__()
        self.amounts = amounts

    def forward(self, x):
        for amount in self.amounts:
            x = torch.sin(x + amount)
        return x


def constants(*modules):
    """Names and values of the constants lifted from each module's graph."""
    programs = {str(i): torch.export.export(module, (torch.ones(3),)) for i, module in enumerate(modules)}
    edge = to_edge_transform_and_lower(programs)
    found = []
    for name in programs:
        program = edge.exported_program(name)
        names = program.graph_signature.inputs_to_buffers.values()
        found.append({fqn: float(program.state_dict[fqn]) for fqn in names})
    return found


def test_names_of_lifted_constants_tell_values_apart(tmp_path):
    modules = Plus(1.0, 2.0, 1.0), Plus(2.0, 2.0), Plus(1.0, 2.0, 3.0)
    stock = constants(*modules)
    assert any(stock[0][name] != stock[1][name] for name in stock[0].keys() & stock[1].keys())  # the clash
    with cross_compile(find_arch("sm_90"), tmp_path, "pte", True, lambda source: None):
        first, second, third = constants(*modules)
    assert sorted(first.values()) == [1.0, 1.0, 2.0]
    assert sorted(second.values()) == [2.0, 2.0]
    for a, b in ((first, second), (first, third), (second, third)):
        assert all(a[name] == b[name] for name in a.keys() & b.keys())
    assert len(first.keys() & third.keys()) == 2  # equal constants at equal places are shared


ENTRY = WeightEntry("a", "key", torch.float32, (2,), (1,), 0, 8)


@pytest.mark.parametrize("change", [{"key": "other"}, {"shape": (1,)}, {"dtype": torch.int32}])
def test_one_name_for_two_tensors_is_found(change):
    other = dataclasses.replace(ENTRY, **change)
    assert shared_name_problem({"prefill": [ENTRY], "decode": [ENTRY]}) is None
    assert shared_name_problem({"prefill": [ENTRY], "decode": [dataclasses.replace(other, fqn="b")]}) is None
    problem = shared_name_problem({"prefill": [ENTRY], "decode": [other]})
    assert problem.startswith("prefill and decode hold different tensors named a")
