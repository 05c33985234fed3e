"""Pieces of the C++ toolchain."""

import subprocess

import pytest
import torch

from flashpte.export.lowering.api import LoweringError, _summary
from flashpte.export.lowering.cross_compile.toolchain import embed_cubin, find_compiler


def test_one_cubin_under_two_kernel_names_links(tmp_path):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(b"machine code")
    objects = [embed_cubin(str(cubin), name) for name in ("first", "second")]
    library = tmp_path / "both.so"
    subprocess.run([find_compiler(), "-shared", "-o", library, *objects], check=True)
    assert library.read_bytes().count(b"machine code") == 2


def test_a_compilers_error_is_summed_up_by_its_error_lines():
    message = (
        "C++ compile error\nCommand: g++ " + "x" * 1000 + "\nld: a.o: multiple definition of `k'\ncollect2: error: ld"
    )
    assert _summary(message) == "ld: a.o: multiple definition of `k' collect2: error: ld"
    assert _summary("something else\nhappened") == "something else happened"


def test_an_error_of_the_compiler_is_one_line(tmp_path, monkeypatch):
    from flashpte.export.lowering import api, lower

    def fail(*args):
        raise RuntimeError("first line\ng++: error: no such thing\nlast line")

    monkeypatch.setattr(api, "write_pte", fail)
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(1, 4),))
    with pytest.raises(LoweringError, match=r"^compiling failed: RuntimeError: g\+\+: error: no such thing$"):
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")
    assert list(tmp_path.iterdir()) == []
