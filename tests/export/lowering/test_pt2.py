import json
import zipfile

import pytest
import torch
from host_code import compiled_host_code

from flashpte.export.files.pte_contents import read_library
from flashpte.export.lowering import lower
from flashpte.export.lowering.self_check import find_avx512, find_build_path
from flashpte.passes import replace_sdpa

pytestmark = [pytest.mark.lowering, pytest.mark.xdist_group("pt2")]


@pytest.fixture(scope="module")
def package(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pt2") / "out"
    program, _ = replace_sdpa(programs["decode"])
    with compiled_host_code():
        return lower({"decode": program}, output_dir=folder, arch="sm_80", format="pt2")


def test_it_holds_code_weights_and_metadata_once(package, programs):
    with zipfile.ZipFile(package.model) as archive:
        names = {name.rsplit("/", 1)[-1]: archive.read(name) for name in archive.namelist()}
    library = read_library(names["model.wrapper.so"])
    assert {cubin.arch for cubin in library.cubins} == {"sm_80"}
    assert any("split_k" in kernel for cubin in library.cubins for kernel in cubin.kernels)
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= set(library.needed)
    assert find_avx512(library.data) is None
    metadata = json.loads(names["model.wrapper_metadata.json"])
    assert metadata["AOTI_DEVICE_KEY"] == "cuda"
    assert "AOTI_CPU_ISA" not in metadata

    blob, everything = names["model.wrapper_weights.blob"], b"".join(names.values())
    for name in ("qkv.weight", "out.weight"):
        raw = programs["decode"].state_dict[name].detach().view(torch.uint8).numpy().tobytes()
        assert raw in blob
        assert everything.count(raw) == 1


def test_no_build_path_in_the_package(package):
    with zipfile.ZipFile(package.model) as archive:
        for name in archive.namelist():
            assert find_build_path(archive.read(name)) is None, name


class Weightless(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def weightless(folder, **options):
    """A package without weights, and its inputs."""
    inputs = [torch.randn(1, 2, length, 64, dtype=torch.bfloat16) for length in (1, 64, 64)]
    program, _ = replace_sdpa(torch.export.export(Weightless(), tuple(inputs)))
    return lower({"forward": program}, output_dir=folder, format="pt2", **options).model, inputs


def test_a_program_without_weights_needs_no_file_of_them(tmp_path):
    model, _ = weightless(tmp_path / "out", arch="sm_80")
    with zipfile.ZipFile(model) as archive:
        assert any(name.endswith("wrapper.so") for name in archive.namelist())
        assert not any(name.endswith(".blob") for name in archive.namelist())


@pytest.mark.gpu
def test_a_program_without_weights_runs(tmp_path):
    model, inputs = weightless(tmp_path / "out")
    loaded = torch._inductor.aoti_load_package(str(model))
    actual = loaded(*(tensor.cuda() for tensor in inputs))
    assert torch.allclose(actual.cpu(), Weightless()(*inputs), atol=0.02, rtol=0.02)


def test_what_is_reported(package):
    assert package.weights is None
    assert package.methods == ("decode",)
    assert package.manifest["format"] == "pt2"
    assert set(package.manifest["files"]) == {"model.pt2"}


@pytest.mark.gpu
def test_it_runs(programs, tmp_path):
    from torch.export.pt2_archive._package import load_pt2

    program, _ = replace_sdpa(programs["decode"])
    model = load_pt2(str(lower({"decode": program}, output_dir=tmp_path / "out", format="pt2").model)).aoti_runners[
        "model"
    ]
    torch.manual_seed(1)
    reference = programs["decode"].module()
    for position in (0, 1, 2):
        x, where = torch.randn(1, 1, 256, dtype=torch.bfloat16), torch.tensor([position])
        expected = reference(x, where)
        actual = model(x.cuda(), where.cuda())
        assert torch.allclose(actual.cpu(), expected, atol=0.05, rtol=0.05)
