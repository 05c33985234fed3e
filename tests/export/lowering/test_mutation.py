import torch

from flashpte.export.lowering.mutation import mutated_buffers


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
