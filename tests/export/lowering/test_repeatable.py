"""The same program gives the same bytes in another folder, in another process and in another order of architectures."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from flashpte.export.lowering import inspect_pte, lower

SCRIPT = """
    import sys
    import torch
    sys.path.insert(0, {here!r})
    from test_repeatable import program
    from flashpte.export.lowering import lower
    lower({{"forward": program()}}, output_dir={output!r}, arch={arch!r})
"""


class Layer(torch.nn.Module):
    """A matrix multiply (the GPU's limits choose its template), a reduction and a mutated buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(512, 1024, dtype=torch.bfloat16)
        self.register_buffer("state", torch.zeros(16, 1024, dtype=torch.bfloat16))

    def forward(self, x, rows):
        self.state.index_copy_(0, rows, self.linear(x))
        return torch.softmax(self.state.float(), -1).sum(0)


def program():
    example = (torch.zeros(16, 512, dtype=torch.bfloat16), torch.arange(16))
    return torch.export.export(Layer().eval(), example)


def read(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.lowering
@pytest.mark.host_code
def test_second_arch_in_one_process_equals_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    with torch._inductor.config.patch({"eager_numerics.division_rounding": True}):  # as torchao's GPTQ leaves it
        hopper = lower({"forward": program()}, output_dir=tmp_path / "hopper", arch="sm_90")
        ampere = lower({"forward": program()}, output_dir=tmp_path / "a" / "deeper" / "ampere", arch="sm_80")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    script = SCRIPT.format(here=str(Path(__file__).parent), output=str(elsewhere / "out"), arch="sm_80")
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=elsewhere)

    assert read(ampere.folder) == read(elsewhere / "out")
    assert read(ampere.folder)["model.pte"] != read(hopper.folder)["model.pte"]
    for model, arch in ((hopper, "sm_90"), (ampere, "sm_80")):
        cubins = inspect_pte(model.model).methods["forward"].library.cubins
        assert {cubin.arch for cubin in cubins} == {arch}
        assert any("tem" in cubin.symbol for cubin in cubins)  # the matrix multiply is a Triton template
