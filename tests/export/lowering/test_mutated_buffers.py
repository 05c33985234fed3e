import pytest
import torch
from module_of import module_of

from flashpte.export.lowering.mutated_buffers import mutated_buffers, mutated_inputs, returned_buffers


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("direct", "through_views", "read", "by_slice"):
            self.register_buffer(name, torch.zeros(4, 6))

    def forward(self, x, position):
        self.direct.index_copy_(0, position, x)
        self.through_views.transpose(0, 1)[1:3].view(2, 4).add_(1)
        self.by_slice[:, 2:4] = 1.0
        self.read.clone().add_(1)
        return self.direct.sum() + self.read.transpose(0, 1).sum() + self.through_views.sum()


def test_buffers_written_in_place_are_found_before_and_after_functionalisation():
    program = torch.export.export(Model(), (torch.ones(1, 6), torch.tensor([2])))
    expected = ("by_slice", "direct", "through_views")
    assert mutated_buffers([program]) == expected
    assert mutated_buffers([program.run_decompositions({})]) == expected


def test_methods_are_merged():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("counter", torch.zeros(1))

        def forward(self, x):
            self.counter.add_(1)
            return x + self.counter

    programs = [
        torch.export.export(Other(), (torch.ones(1),)),
        torch.export.export(torch.nn.ReLU(), (torch.ones(1),)),
    ]
    assert mutated_buffers(programs) == ("counter",)


def writes_without_gradients(module, x):
    with torch.no_grad():
        module.cache[1:3] = x
    return module.cache * 2


def writes_under_autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        module.cache.add_(x)
    return module.cache * 2


def writes_in_both(module, x):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        module.cache.select(0, 1).copy_(x)
    return module.cache * 2


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("function", [writes_without_gradients, writes_under_autocast, writes_in_both])
def test_buffers_written_inside_a_region(function, grad_mode):
    with torch.set_grad_enabled(grad_mode):
        program = torch.export.export(module_of(function, cache=torch.zeros(4, 6)), (torch.ones(6),))
    assert mutated_buffers([program]) == ("cache",)
    assert mutated_buffers([program.run_decompositions({})]) == ("cache",)
    assert returned_buffers(program) == ()


def test_an_input_written_and_a_buffer_returned_by_a_region():
    def function(module, x):
        with torch.no_grad():
            x.add_(1)
            module.cache.add_(x)
        return module.cache

    with torch.enable_grad():
        program = torch.export.export(module_of(function, cache=torch.zeros(4, 6)), (torch.ones(6),))
    assert mutated_inputs(program) == tuple(program.graph_signature.user_inputs)
    assert mutated_buffers([program]) == returned_buffers(program) == ("cache",)


def test_a_buffer_that_a_region_only_reads():
    def function(module, x):
        with torch.no_grad():
            y = module.cache.clone().add_(x)
        return y + module.cache

    with torch.enable_grad():
        program = torch.export.export(module_of(function, cache=torch.zeros(4, 6)), (torch.ones(6),))
    assert mutated_buffers([program]) == ()


def test_one_of_several_views():
    def function(module, x):
        first, second = module.cache.split(2)
        first.add_(x)
        return second + 1

    program = torch.export.export(module_of(function, cache=torch.zeros(4, 6)), (torch.ones(6),))
    assert mutated_buffers([program]) == ("cache",)


def test_a_view_that_a_region_returns_is_written_behind_it():
    def function(module, x):
        with torch.no_grad():
            rows = module.cache[1:3]
        rows.add_(x)
        return x + 1

    with torch.enable_grad():
        program = torch.export.export(module_of(function, cache=torch.zeros(4, 6)), (torch.ones(6),))
    assert mutated_buffers([program]) == ("cache",)
    assert returned_buffers(program) == ()
