"""What the runtime reads from a real ``.pte``, what it refuses, and how tests make wrong ones."""

import dataclasses
from types import MappingProxyType

import pytest
import torch
from wrong_programs import perturb_weight, swap_inputs, unshare_cache

from flashpte.export.lowering import inspect_pte
from flashpte.export.runtime import ProgramError, open_folder
from flashpte.export.runtime.libraries import check_cubins, check_methods, load_weights, open_pte

pytestmark = [pytest.mark.lowering, pytest.mark.xdist_group("lowered")]


def test_a_lowered_folder_can_be_opened(lowered):
    folder = open_folder(lowered.folder)
    contents = open_pte(folder)
    signature = folder.signatures["prefill"]
    assert [spec.name for spec in signature.inputs] == ["x", "input_pos"]
    assert signature.inputs[0].expressions[1] == signature.inputs[1].expressions[0]
    signature.check([torch.zeros(1, 7, 256, dtype=torch.bfloat16), torch.arange(7)])
    assert signature.mutable_buffers == ("k_cache", "v_cache")
    check_cubins(contents, (9, 0), "this GPU")
    with pytest.raises(ProgramError, match="compiled for sm_90, but that GPU is sm_80"):
        check_cubins(contents, (8, 0), "that GPU")


def test_equal_caches_have_memory_of_their_own(contents, programs):
    """Both caches are zeros and share one segment of the file; methods share only by name."""
    tensors = load_weights(contents, torch.device("cpu"))
    assert tensors["k_cache"].data_ptr() != tensors["v_cache"].data_ptr()
    state = {**programs["decode"].state_dict, **programs["decode"].constants}
    for entry in contents.methods["decode"].weights:
        if entry.fqn in state:
            assert torch.equal(tensors[entry.fqn], state[entry.fqn])
            assert tensors[entry.fqn].stride() == entry.strides


def changed(contents, **fields):
    method = dataclasses.replace(contents.methods["decode"], **fields)
    return dataclasses.replace(contents, methods=MappingProxyType({**contents.methods, "decode": method}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"delegates": ("XnnpackBackend",)}, "method decode calls XnnpackBackend; only one CudaBackend"),
        ({"operators": ("aten::add.out",)}, "method decode has operators outside of its compiled code: aten::add.out"),
        ({"argument_order": (0, 0)}, "does not take each of the 2 inputs once"),
    ],
)
def test_methods_that_are_more_than_compiled_code(lowered, contents, fields, said):
    folder = open_folder(lowered.folder)
    check_methods(folder, contents)
    with pytest.raises(ProgramError, match=said):
        check_methods(folder, changed(contents, **fields))


def test_methods_that_the_manifest_does_not_know(lowered, contents):
    folder = dataclasses.replace(open_folder(lowered.folder), signatures={})
    with pytest.raises(ProgramError, match=r"has methods \['decode', 'prefill'\], its manifest \[\]"):
        check_methods(folder, contents)


def test_wrong_programs_differ_in_one_thing_and_fit_their_manifest(lowered, tmp_path):
    good = inspect_pte(lowered.model)
    weight = perturb_weight(lowered.folder, tmp_path / "weight", "out.weight", share=0.0)
    cache = unshare_cache(lowered.folder, tmp_path / "cache", fqn="k_cache")
    inputs = swap_inputs(lowered.folder, tmp_path / "inputs")
    for folder in (weight, cache, inputs):
        assert open_folder(folder).verified
    wrong = {folder.name: open_pte(open_folder(folder)) for folder in (weight, cache, inputs)}

    before, after = (c.weight("decode", "out.weight") for c in (good, wrong["weight"]))
    assert (before != after).sum() == 1
    assert after.flatten()[0] == -before.flatten()[0]

    names = {m: {w.fqn for w in wrong["cache"].methods[m].weights} for m in ("prefill", "decode")}
    assert names["prefill"] ^ names["decode"] >= {"k_cache", "k_cachx"}
    assert b"k_cachx\0" in wrong["cache"].methods["decode"].library.data

    assert wrong["inputs"].methods["decode"].argument_order == good.methods["decode"].argument_order[::-1]
    assert wrong["inputs"].methods["prefill"] == good.methods["prefill"]
