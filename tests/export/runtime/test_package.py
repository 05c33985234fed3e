"""Loads a ``.pt2`` on a CPU: AOTInductor's CPU code, packaged like a CUDA export."""

import pytest
import torch
from model_folder import write_model_folder

from flashpte.export.lowering.describe_methods import describe_method
from flashpte.export.runtime import Program, ProgramError, open_folder
from flashpte.export.runtime.libraries import load_package

pytestmark = pytest.mark.xdist_group("package")

SLOTS, WIDTH = 16, 8


class Cached(torch.nn.Module):
    """``forward(x [1, T, WIDTH], input_pos [T])`` writes its rows to a cache and sums the cache's contents."""

    def __init__(self, start=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.register_buffer("cache", torch.full((1, SLOTS, WIDTH), start))

    def forward(self, x, input_pos):
        self.cache.index_copy_(1, input_pos, self.linear(x))
        return self.cache.sum(1)


def exported(module):
    rows = torch.export.Dim("rows", min=2, max=SLOTS)
    example = (torch.randn(1, 4, WIDTH), torch.arange(4))
    return torch.export.export(module.eval(), example, dynamic_shapes=({1: rows}, {0: rows}))


def folder_of(path, method, package):
    written = write_model_folder(
        path, {"forward": method}, {}, {"attention": "flashpte"}, {"model.pt2": package}, "pt2"
    )
    return open_folder(written)


@pytest.fixture(scope="module")
def module():
    return Cached()


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    """The weights are in a file of their own, as in exported packages."""
    path = tmp_path_factory.mktemp("package")
    program = exported(module)
    described = describe_method(program)
    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "binary_blob",
        # Compiling takes half the time without optimizing, and without asking what the processor can do.
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "cpp.simdlen": 1,
    }
    package = str(path / "made.pt2")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)
    return folder_of(path, described, (path / "made.pt2").read_bytes())


@pytest.fixture
def program(folder):
    call, buffers = load_package(folder, torch.device("cpu"))
    parts = {"manifest": folder.manifest, "device": torch.device("cpu")}
    return Program({"forward": call}, folder.signatures, buffers, **parts)


@pytest.mark.lowering
def test_weights_are_the_packages_and_buffers_are_ours(program, module):
    assert list(program.buffers) == ["cache"]
    cache, sums = program.buffers["cache"], torch.zeros(1, WIDTH)
    for start, count in ((0, 3), (3, 2), (5, 11)):
        x = torch.randn(1, count, WIDTH)
        (found,) = program.run("forward", x, torch.arange(start, start + count))
        rows = module.linear(x)
        torch.testing.assert_close(cache[:, start : start + count], rows)
        assert not cache[:, start + count :].any()
        sums = sums + rows.sum(1)
        torch.testing.assert_close(found, sums)


@pytest.mark.lowering
def test_a_reset_is_seen(program, folder, module):
    x, positions = torch.randn(1, 2, WIDTH), torch.arange(2)
    (first,) = program.run("forward", x, positions)
    program.run("forward", torch.randn(1, 9, WIDTH), torch.arange(2, 11))
    program.reset()
    assert not program.buffers["cache"].any()
    assert torch.equal(program.run("forward", x, positions)[0], first)
    other, buffers = load_package(folder, torch.device("cpu"))
    other([x, positions + 7])
    assert not program.buffers["cache"][:, 2:].any()
    assert not buffers["cache"][:, :7].any()


def test_a_buffer_that_starts_as_something_else_is_refused(tmp_path):
    """The package holds the initial value but does not give it out; zeros would make another program."""
    described = describe_method(exported(Cached(start=1.0)))
    assert described["buffers"] == {"cache": {"dtype": "float32", "shape": [1, SLOTS, WIDTH], "starts_as_zeros": False}}
    assert "starts_as_zeros" not in describe_method(exported(Cached()))["buffers"]["cache"]
    with pytest.raises(ProgramError, match="writes to cache, which does not start as zeros"):
        load_package(folder_of(tmp_path, described, b"not read"), torch.device("cpu"))


def test_a_file_that_is_no_package(tmp_path, module):
    folder = folder_of(tmp_path, describe_method(exported(module)), b"no package")
    with pytest.raises(ProgramError, match=r"cannot load .*model\.pt2: "):
        load_package(folder, torch.device("cpu"))
