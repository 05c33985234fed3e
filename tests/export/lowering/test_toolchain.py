"""The parts of the C++ toolchain."""

import errno
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from flashpte.export.lowering.cross_compile import toolchain
from flashpte.export.lowering.cross_compile.toolchain import (
    CrossCompileError,
    ReproducibleFlags,
    embed_cubin,
    find_cccl_include,
    find_compiler,
)
from flashpte.export.lowering.plain_errors import LoweringError, _summary


def test_one_cubin_under_two_kernel_names_links(tmp_path):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(b"machine code")
    objects = [embed_cubin(str(cubin), name) for name in ("first", "second")]
    library = tmp_path / "both.so"
    subprocess.run([*find_compiler(), "-shared", "-o", library, *objects], check=True)
    assert library.read_bytes().count(b"machine code") == 2


def test_a_compilers_error_is_summed_up_by_its_error_lines():
    message = (
        "C++ compile error\nCommand: g++ " + "x" * 1000 + "\nld: a.o: multiple definition of `k'\ncollect2: error: ld"
    )
    assert _summary(message) == "ld: a.o: multiple definition of `k' collect2: error: ld"
    assert _summary("something else\nhappened") == "something else happened"


def test_an_error_that_the_caller_handles_is_no_cause(tmp_path, monkeypatch):
    from flashpte.export.common.errors import UsageError
    from flashpte.export.lowering import api, lower

    def fail(*args):
        raise ValueError("of the compiler")

    monkeypatch.setattr(api, "write_pte", fail)
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(1, 4),))
    try:
        raise UsageError("of the caller, with No space left on device")
    except UsageError:
        with pytest.raises(LoweringError, match=r"^compiling failed: ValueError: of the compiler$"):
            lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")


@pytest.fixture
def no_cccl(tmp_path, monkeypatch):
    """Hides the CUDA headers of all wheels and toolkits; returns an empty folder."""

    def missing(name):
        raise toolchain.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(toolchain.importlib.metadata, "files", missing)
    monkeypatch.setattr(toolchain, "_triton_folder", lambda: tmp_path / "triton")
    monkeypatch.setattr(toolchain, "_TOOLKIT", str(tmp_path / "none"))
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("folder", ["include", "include/cccl"])
@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", None])
def test_a_toolkit_that_has_the_header_is_asked(no_cccl, monkeypatch, folder, variable):
    header = no_cccl / "toolkit" / folder / "nv" / "target"
    header.parent.mkdir(parents=True)
    header.touch()
    if variable:
        monkeypatch.setenv(variable, str(no_cccl / "toolkit"))
    else:
        nvcc = no_cccl / "toolkit" / "bin" / "nvcc"
        monkeypatch.setattr(toolchain.shutil, "which", lambda name: str(nvcc) if name == "nvcc" else None)
    assert find_cccl_include() == no_cccl / "toolkit" / folder


def test_a_missing_header_is_told_before_anything_is_compiled(no_cccl, monkeypatch):
    from flashpte.export.lowering import lower

    monkeypatch.setattr("flashpte.export.lowering.preflight.find_compiler", lambda: ("g++",))
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    with pytest.raises(CrossCompileError, match="nv/target is missing: pip install nvidia-cuda-cccl, or set CUDA_HOME"):
        lower({"forward": program}, output_dir=no_cccl / "out", arch="sm_90")


def test_an_error_of_the_compiler_is_one_line(tmp_path, monkeypatch):
    from flashpte.export.lowering import api, lower

    def fail(*args):
        raise RuntimeError("first line\ng++: error: no such thing\nlast line")

    monkeypatch.setattr(api, "write_pte", fail)
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(1, 4),))
    with pytest.raises(LoweringError, match=r"^compiling failed: RuntimeError: g\+\+: error: no such thing$"):
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error_in", ["write_pte", "check_pte", "write_manifest"])
def test_a_full_disk_is_named(tmp_path, monkeypatch, wrapped, error_in):
    from flashpte.export.lowering import OutputError, api, lower

    def fail(*args):
        if not wrapped:
            raise OSError(errno.ENOSPC, "No space left on device")
        try:
            raise RuntimeError("ld: final link failed: No space left on device")
        except RuntimeError:
            raise ValueError("something else")  # noqa: B904

    for name in ("write_pte", "check_pte", "write_manifest"):
        monkeypatch.setattr(api, name, fail if name == error_in else lambda *args: [Path("model.pte")])
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(1, 4),))
    with pytest.raises(OutputError, match=f"^disk full at {tmp_path}$"):
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_disk_are_one_line(tmp_path, monkeypatch):
    from flashpte.export.lowering import api, lower

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(api, "write_pte", lambda *args: [])
    monkeypatch.setattr(api, "check_pte", lambda *args: None)
    monkeypatch.setattr(api, "write_manifest", fail)
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.randn(1, 4),))
    with pytest.raises(LoweringError, match=r"^writing the output failed: OSError: .*Input/output error"):
        lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")


def test_cxx_of_two_words(cxx, tmp_path):
    assert find_compiler() == (str(cxx), "g++")
    assert ReproducibleFlags({}).rewrite("g++ -c a.cpp").split()[:3] == [str(cxx), "g++", "-c"]
    embed = tmp_path / "kernel.cubin"
    embed.write_bytes(b"")
    embed_cubin(str(embed), "k")
    assert (tmp_path / "calls").read_text() == "g++\n"  # for a whole program, see test_declined.py


def test_without_a_cache_folder_the_guard_is_built_and_leaves_nothing(tmp_path, monkeypatch):
    from flashpte.export.lowering.cross_compile import device_guard

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with device_guard._cache_folder() as folder:
        assert folder.parent == tmp_path
        (folder / "guard.so").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
