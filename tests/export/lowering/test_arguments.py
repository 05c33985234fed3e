"""Wrong arguments give one line of error before anything is compiled or written."""

from pathlib import Path

import pytest
import torch

from flashpte.export.common.errors import ExportError, UsageError
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
        ({"programs": {"class": None}}, "'class' is not an identifier"),
        ({"constant_methods": {"get_table": {"a": 1}}}, "constant method get_table has a value of type dict"),
        ({"constant_methods": {"get_ids": [1, torch.ones(1)]}}, "get_ids has a value of type Tensor"),
        ({"constant_methods": {"get_big": 2**63}}, "get_big has the value 9223372036854775808, which does not fit"),
        ({"constant_methods": {"not a name": 1}}, "constant method name 'not a name' is not an identifier"),
        ({"manifest": {"x": object()}}, "cannot be written as JSON"),
    ],
)
def test_usage_errors(program, tmp_path, change, message):
    arguments = {"programs": {"forward": program}, "arch": "sm_90", **change}
    with pytest.raises(UsageError, match=message) as caught:
        lower(arguments.pop("programs"), output_dir=tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_reserved_method_name(program, tmp_path):
    with pytest.raises(UsageError, match="get_mutable_buffer_metadata is both a method and a constant method"):
        lower({"get_mutable_buffer_metadata": program}, output_dir=tmp_path / "out", arch="sm_90")


class Module(torch.nn.Module):
    """Calls ``function(self, x)``; has a buffer ``total``."""

    def __init__(self, function, value=0.0):
        super().__init__()
        self.function = function
        self.register_buffer("total", torch.full((4, 4), value))

    def forward(self, x):
        return self.function(self, x)


def exported(function, **kwargs):
    return torch.export.export(Module(function, **kwargs), (torch.ones(4, 4),))


def returns_its_buffer(module, x):
    module.total.add_(x)
    return x * 2, module.total


def writes_its_input(module, x):
    x.add_(1)
    return x * 2


def multiplies_float64(module, x):
    return torch.nn.functional.linear(x.double(), x.double())


def returns_float64(module, x):
    return x.double() + 1


def returns_complex(module, x):
    return torch.complex(x, x)


def returns_float8(module, x):
    return x.to(torch.float8_e4m3fn)


def computes_in_float64(module, x):
    return (x.double() + 1).float()


def reads_its_buffer(module, x):
    return module.total + x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (returns_its_buffer, r"method forward writes to buffer total and returns it: return total\.clone\(\)"),
        (writes_its_input, "method forward writes to its input x"),
        (multiplies_float64, r"method forward multiplies float64 matrices \(linear, 1 in all\)"),
        (
            returns_float64,
            r"method forward: output \w+ is float64, which ExecuTorch's CUDA delegate does not have",
        ),
        (returns_complex, r"output \w+ is complex64, .*: convert it, or lower to \.pt2"),
        (returns_float8, r"output \w+ is float8_e4m3fn, "),
    ],
)
@pytest.mark.parametrize("functional", [False, True])
def test_what_a_pte_cannot_hold_is_refused_before_compiling(tmp_path, function, message, functional):
    program = exported(function)
    if functional:
        program = program.run_decompositions({})
    with pytest.raises(ExportError, match=message):
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.uint16, torch.float8_e4m3fn])
def test_weights_and_inputs_of_a_foreign_dtype(tmp_path, dtype):
    module = Module(lambda module, x: module.total.float() + x.float())
    module.total = module.total.to(dtype)
    with pytest.raises(ExportError, match=f"method forward: total is {str(dtype).removeprefix('torch.')}"):
        lower({"forward": torch.export.export(module, (torch.ones(4, 4),))}, output_dir=tmp_path / "out")
    module.total = torch.zeros(4, 4)
    with pytest.raises(ExportError, match="method forward: input x is "):
        lower({"forward": torch.export.export(module, (torch.ones(4, 4).to(dtype),))}, output_dir=tmp_path / "out")


def test_an_intermediate_result_may_have_any_dtype():
    from flashpte.export.lowering.preflight import check_programs

    check_programs({"forward": exported(computes_in_float64)}, "pte")


def test_methods_with_different_tensors_of_one_name(tmp_path):
    from flashpte.export.lowering.preflight import check_programs

    programs = {"a": exported(reads_its_buffer, value=1.0), "b": exported(reads_its_buffer, value=2.0)}
    with pytest.raises(UsageError, match="methods a and b hold different tensors named total"):
        lower(programs, output_dir=tmp_path / "out", arch="sm_90")
    equal = {name: exported(reads_its_buffer, value=torch.nan) for name in "ab"}
    check_programs(equal, "pte")


def test_a_view_of_a_written_buffer_and_a_clone_may_be_returned():
    from flashpte.export.lowering.preflight import check_programs

    def view(module, x):
        module.total.add_(x)
        return module.total.transpose(0, 1), module.total.clone(), x.clone().add_(1)

    for program in (exported(view), exported(view).run_decompositions({})):
        check_programs({"forward": program}, "pte")


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


def test_an_extra_file_that_cannot_be_read(program, tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ExportError, match=f"extra file {file} cannot be read: Permission denied"):
        lower({"forward": program}, output_dir=tmp_path / "out", extra_files=[file])


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
        if stage.startswith("compiling host code"):
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
