"""The contents of a lowered ``.pte``, opened without a GPU and without ExecuTorch's runtime."""

import contextlib
import hashlib
import json
import shutil

import pytest
import torch

from flashpte.export.files.elf import Elf
from flashpte.export.lowering import ContentsError, inspect_pte, self_check
from flashpte.export.lowering.shims import missing_shims

pytestmark = [pytest.mark.lowering, pytest.mark.xdist_group("lowered")]


def test_each_method_has_one_delegate_and_copies(contents):
    assert set(contents.methods) == {"prefill", "decode"}
    for name, method in contents.methods.items():
        assert method.delegates == ("CudaBackend",)
        assert set(method.operators) <= {"et_copy::_h2d_copy.out", "et_copy::_d2h_copy.out"}
        assert method.compile_specs["method_name"] == name
        assert method.compile_specs["triton_kernel_mode"] == "OFF"


def test_each_method_has_its_own_shared_library(contents):
    libraries = [method.library for method in contents.methods.values()]
    assert len({library.data for library in libraries}) == 2
    for library in libraries:
        assert Elf(library.data).is_host_code
        assert "libcuda.so.1" in library.needed
        assert not any("torch" in name for name in library.needed)
        assert missing_shims(library.undefined) == ()


def test_kernels_are_ours_and_for_the_arch(contents):
    for method in contents.methods.values():
        kernels = {kernel for cubin in method.library.cubins for kernel in cubin.kernels}
        assert {cubin.arch for cubin in method.library.cubins} == {"sm_90"}
        assert not kernels & self_check.executorch_kernels()
    decode = {k for cubin in contents.methods["decode"].library.cubins for k in cubin.kernels}
    assert any("split_k" in name for name in decode), decode


def test_weights_are_byte_equal_and_shared_by_name(contents, programs):
    state = {**programs["decode"].state_dict, **programs["decode"].constants}
    for method in contents.methods:
        named = {entry.fqn for entry in contents.methods[method].weights}
        assert {"qkv.weight", "out.weight", "k_cache", "v_cache", "offsets"} <= named
        for fqn in named & set(state):
            assert torch.equal(contents.weight(method, fqn), state[fqn]), fqn
    keys = {m: {e.fqn: e.key for e in method.weights} for m, method in contents.methods.items()}
    for cache in ("k_cache", "v_cache"):
        assert keys["prefill"][cache] == keys["decode"][cache]
    assert keys["decode"]["k_cache"] != keys["decode"]["v_cache"]


def test_constant_methods(contents):
    assert contents.constant_methods["get_max_seq_len"] == 256
    assert contents.constant_methods["use_kv_cache"] is True
    metadata = json.loads(contents.constant_methods["get_mutable_buffer_metadata"])
    assert metadata == {"version": 1, "mutable_buffers": ["k_cache", "v_cache"]}


def test_manifest(lowered):
    manifest = json.loads(lowered.manifest_path.read_text())
    assert manifest == lowered.manifest
    assert (manifest["arch"], manifest["format"], manifest["target"]) == ("sm_90", "pte", "test")
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {"model.pte", "aoti_cuda_blob.ptd", "tokenizer.json"}
    for name, entry in manifest["files"].items():
        data = (lowered.folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    x, position = manifest["methods"]["prefill"]["inputs"]
    rows = position["dynamic"]["0"]
    assert x == {"name": "x", "dtype": "bfloat16", "shape": [1, [2, 64], 256], "dynamic": {"1": rows}}
    assert position["shape"] == [[2, 64]]
    decode = manifest["methods"]["decode"]
    assert decode["mutable_buffers"] == ["k_cache", "v_cache"]
    assert decode["buffers"]["v_cache"] == {"dtype": "bfloat16", "shape": [1, 256, 4, 64]}
    assert "dynamic" not in decode["inputs"][0]


def test_order_of_arguments_and_results(contents):
    for method in contents.methods.values():
        assert sorted(method.argument_order) == [0, 1]
        assert method.result_order == (0,)


def test_host_code_is_portable_and_anonymous(lowered, contents):
    for method in contents.methods.values():
        assert self_check.find_avx512(method.library.data) is None
    for path in lowered.folder.iterdir():
        assert self_check.find_build_path(path.read_bytes()) is None, path.name
        assert str(lowered.folder).encode() not in path.read_bytes()


def test_self_check_finds_what_is_wrong(contents, programs):
    """Each check must be able to fail; the same file is compared with a wrong expectation."""
    from flashpte.export.lowering import find_arch

    method = contents.methods["decode"]
    some_kernel = method.library.cubins[0].kernels[0]
    assert any("sm_80" in p for p in self_check._method_problems(method, find_arch("sm_80"), frozenset()))
    assert any(some_kernel in p for p in self_check._method_problems(method, find_arch("sm_90"), {some_kernel}))
    assert not list(self_check._weight_problems(contents, "decode", programs["decode"], set()))
    weight = programs["decode"].state_dict["out.weight"]
    before = weight[3, 5].item()  # adding and subtracting would round
    with torch.no_grad():
        weight[3, 5] += 1
        try:
            problems = list(self_check._weight_problems(contents, "decode", programs["decode"], set()))
            assert any("out.weight" in problem for problem in problems)
        finally:
            weight[3, 5] = before


@pytest.fixture
def copied(lowered, tmp_path):
    """A copy of the files, which tests may damage."""
    for path in (lowered.model, lowered.weights):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def test_a_missing_or_damaged_file_is_a_contents_error(copied, capfd):
    pte, ptd = copied / "model.pte", copied / "aoti_cuda_blob.ptd"
    whole = ptd.read_bytes()
    ptd.unlink()
    with pytest.raises(ContentsError, match=r"uses the tensor .*, but .*aoti_cuda_blob.ptd does not exist"):
        inspect_pte(pte)
    ptd.write_bytes(b"")
    with pytest.raises(ContentsError, match=r"is not a \.ptd file"):
        inspect_pte(pte)
    ptd.write_bytes(whole[:300] + bytes(range(256)) * 20 + whole[300 + 256 * 20 :])
    with pytest.raises(ContentsError, match="ptd"):
        inspect_pte(pte)
    ptd.write_bytes(whole)
    content = bytearray(pte.read_bytes())
    for start in range(0, 4000, 200):  # tables of the flatbuffer
        broken = bytes(content[:start]) + b"\xff" * 64 + bytes(content[start + 64 :])
        pte.write_bytes(broken)
        with contextlib.suppress(ContentsError):  # no other error may be raised
            inspect_pte(pte)
    with pytest.raises(ContentsError, match=r"cannot read .*: Is a directory"):
        inspect_pte(copied)
    assert capfd.readouterr().err == ""


def test_unknown_shim_is_found():
    assert missing_shims(
        frozenset({"aoti_torch_cuda_addmm_out", "malloc", "aoti_torch_get_sizes", "cuLaunchKernel"})
    ) == ("aoti_torch_cuda_addmm_out",)


def test_build_path_is_found():
    import tempfile

    assert self_check.find_build_path(b"\0" + tempfile.gettempdir().encode() + b"/x/model.cpp\0") is not None


def test_avx512_is_found(tmp_path):
    import subprocess

    from flashpte.export.lowering.cross_compile.toolchain import find_compiler

    source = tmp_path / "wide.cpp"
    source.write_text("typedef float f16 __attribute__((vector_size(64))); void add(f16 *a, f16 *b) { *a += *b; }")
    library = tmp_path / "wide.so"
    subprocess.run([*find_compiler(), "-O2", "-mavx512f", "-shared", "-fPIC", source, "-o", library], check=True)
    assert "zmm" in self_check.find_avx512(library.read_bytes())
