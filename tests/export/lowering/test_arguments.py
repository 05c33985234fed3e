"""Wrong arguments end in one line before anything is compiled or written."""

import pytest
import torch

from flashpte.export.errors import ExportError, UsageError
from flashpte.export.lowering import UnknownArchError, lower


@pytest.fixture(scope="module")
def program():
    return torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"programs": {}}, "no programs"),
        ({"programs": {"not a name": None}}, "'not a name' is not an identifier"),
        ({"programs": {"forward": torch.nn.ReLU()}}, "method forward is a ReLU"),
        ({"format": "onnx"}, "unknown format 'onnx'"),
        ({"attention": "flash"}, "unknown attention 'flash'"),
        ({"format": "pt2", "attention": "executorch"}, "needs format 'pte'"),
        ({"constant_methods": {"forward": 1}}, "both a method and a constant method"),
        ({"manifest": {"x": object()}}, "cannot be written as JSON"),
    ],
)
def test_usage_errors(program, tmp_path, change, message):
    arguments = {"programs": {"forward": program}, "arch": "sm_90", **change}
    with pytest.raises(UsageError, match=message) as caught:
        lower(arguments.pop("programs"), output_dir=tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unknown_arch(program, tmp_path):
    with pytest.raises(UnknownArchError, match="did you mean sm_90"):
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_9")


def test_a_pt2_holds_one_method(program, tmp_path):
    with pytest.raises(UsageError, match=r"a \.pt2 holds one method, 2 were given \(prefill, decode\)"):
        lower({"prefill": program, "decode": program}, output_dir=tmp_path / "out", format="pt2")


def test_extra_files(program, tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        lower({"forward": program}, output_dir=tmp_path / "out", extra_files=[tmp_path / "tokenizer.json"])
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="would replace another file"):
        lower({"forward": program}, output_dir=tmp_path / "out", extra_files=[tmp_path / "manifest.json"])


def test_interpreted_kernels_cannot_be_compiled(program, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ExportError, match="TRITON_INTERPRET=1 is set"):
        lower({"forward": program}, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_named(program, tmp_path, monkeypatch):
    from flashpte.export.lowering.cross_compile import toolchain

    toolchain.find_compiler.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    try:
        with pytest.raises(ExportError, match="no-such-compiler is not on PATH"):
            lower({"forward": program}, output_dir=tmp_path / "out")
    finally:
        toolchain.find_compiler.cache_clear()


@pytest.mark.lowering
def test_ctrl_c_in_the_middle_leaves_nothing(program, tmp_path):
    def interrupt(stage):
        if stage == "compiling host code":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.lowering
def test_an_operator_without_a_kernel_is_named(tmp_path):
    class Inverse(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    program = torch.export.export(Inverse(), (torch.eye(4),))
    with pytest.raises(ExportError, match="inv") as caught:
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []
