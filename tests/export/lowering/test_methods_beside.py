"""Methods are compiled in processes of their own: the same bytes, and the same errors."""

import os
import signal
from unittest import mock

import pytest
import torch

from flashpte.export.common import cpus
from flashpte.export.lowering import LoweringError, lower
from flashpte.export.lowering.cross_compile import methods

pytestmark = [pytest.mark.lowering, pytest.mark.xdist_group("methods beside")]


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
        self.register_buffer("state", torch.zeros(4, 64, dtype=torch.bfloat16))
        # A view with an offset and gaps: lowering makes a dense copy, which the parent process does not have.
        self.register_buffer("gaps", torch.arange(129.0)[1::2])

    def forward(self, x, rows):
        self.state.index_copy_(0, rows, self.linear(x))
        return torch.softmax(self.state.float() + self.gaps, -1)


class Unsupported(torch.nn.Module):
    def forward(self, x, rows):
        return torch.linalg.qr(x.float())[1]


def programs(second=None):
    """Methods ``one`` and ``two`` of one :class:`Layer`, for one and for two rows."""
    layer = Layer().eval()

    def export(module, rows):
        example = (torch.ones(rows, 64, dtype=torch.bfloat16), torch.arange(rows))
        return torch.export.export(module, example)

    return {"one": export(layer, 1), "two": export(second or layer, 2)}


def lowered(folder, processes, second=None):
    """The files of :func:`programs`, and how many programs other processes compiled."""
    compiled = []
    compile_all = methods._compile_all

    def record(*args):
        compiled.append(compile_all(*args))
        return compiled[-1]

    with (
        mock.patch.object(cpus, "usable_cpus", return_value=processes),
        mock.patch.object(methods, "_compile_all", record),
    ):
        done = lower(programs(second), output_dir=folder, arch="sm_90")
    return {path.name: path.read_bytes() for path in done.folder.iterdir()}, sum(map(len, compiled))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    files, elsewhere = lowered(tmp_path_factory.mktemp("alone") / "out", processes=1)
    assert elsewhere == 0
    return files


def test_the_bytes_are_those_of_one_process(alone, tmp_path, caplog):
    caplog.set_level("INFO", "flashpte.lowering")
    files, elsewhere = lowered(tmp_path / "out", processes=2)
    assert elsewhere == 2, caplog.text
    assert files == alone


def test_a_process_that_dies_is_made_up_for(alone, tmp_path, monkeypatch):
    work = methods._work

    def die_of_the_second(target, job, library, *rest):
        if library.stem == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        work(target, job, library, *rest)

    monkeypatch.setattr(methods, "_work", die_of_the_second)
    files, elsewhere = lowered(tmp_path / "out", processes=2)
    assert elsewhere == 1
    assert files == alone


def test_no_memory_for_a_process(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(methods.forked, "start", lambda *args, **kwargs: False)
    files, elsewhere = lowered(tmp_path / "out", processes=2)
    assert elsewhere == 0
    assert files == alone


@pytest.mark.parametrize("processes", [1, 2])
def test_a_method_that_fails_says_the_same(processes, tmp_path):
    with pytest.raises(LoweringError, match="no kernel for aten::linalg_qr"):
        lowered(tmp_path / "out", processes, Unsupported())
    assert not (tmp_path / "out").exists()
