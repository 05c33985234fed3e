"""Tables of ExecuTorch's files, read without ``executorch.exir``."""

import math
import subprocess
import sys

import pytest
import torch

from flashpte.export.files import executorch_tables
from flashpte.export.files.executorch_tables import DTYPES, NoExecutorchError, read_flat_tensor, read_program
from flashpte.export.files.pte_contents import ContentsError, inspect_pte

CONSTANTS = {
    "whole": 7,
    "yes": True,
    "half": 0.5,
    "most": math.inf,
    "least": -math.inf,
    "text": "a b",
    "none": math.nan,
}


@pytest.fixture(scope="module")
def program() -> bytes:
    """A program with one method and constant methods, as ExecuTorch writes it."""
    from executorch.exir import to_edge

    class Add(torch.nn.Module):
        def forward(self, x):
            return x + 1

    exported = torch.export.export(Add(), (torch.randn(2),))
    return bytes(to_edge(exported, constant_methods=CONSTANTS).to_executorch().buffer)


def test_constant_methods(program):
    table, _ = read_program(program)
    found = {}
    for plan in table["execution_plan"]:
        if plan["name"] in CONSTANTS:
            (value,) = plan["values"]
            (found[plan["name"]],) = value["val"].values()
    assert math.isnan(found.pop("none"))
    assert found == {name: value for name, value in CONSTANTS.items() if name != "none"}


@pytest.mark.parametrize("read", [read_program, read_flat_tensor])
def test_other_bytes(read, program):
    for content in (b"", b"x" * 200, bytes(200), program[:100], program[: len(program) // 2], program[8:]):
        with pytest.raises(ValueError, match=r"flatc cannot read|header does not fit|too short|no file identifier"):
            read(content)


def test_dtypes_have_executorchs_numbers():
    from executorch.exir.scalar_type import ScalarType
    from executorch.exir.tensor import get_scalar_type

    assert {number: get_scalar_type(ScalarType(number)) for number in DTYPES} == DTYPES


def test_without_executorch(program, monkeypatch, tmp_path):
    (tmp_path / "model.pte").write_bytes(program)
    executorch_tables._package.cache_clear()
    executorch_tables._flatc.cache_clear()
    monkeypatch.setattr(executorch_tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoExecutorchError, match="ExecuTorch is not installed"):
        read_program(program)
    with pytest.raises(
        ContentsError, match=r"model.pte: ExecuTorch is not installed: pip install 'flashpte\[export\]'"
    ):
        inspect_pte(tmp_path / "model.pte")


def test_reading_imports_no_compiler(program, tmp_path):
    """The imports of ``executorch.exir`` took most of the time until ``run-model`` had read a program."""
    (tmp_path / "model.pte").write_bytes(program)
    code = """
import sys
import flashpte.export.cli.run_model, flashpte.export.runtime.program, flashpte.export.runtime.language_model
from flashpte.export.files.executorch_tables import read_program
read_program(open(sys.argv[1], "rb").read())
slow = {"executorch.exir", "torch._dynamo", "torch._inductor.graph", "transformers"} & set(sys.modules)
assert not slow, slow
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pte")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
