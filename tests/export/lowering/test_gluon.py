"""What Inductor learns about a Gluon kernel."""

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap

from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.kernels.facts import facts_of
from flashpte.kernels.hopper import _hopper_kernel

INTEGERS = ("tiles_ptr", "counts_ptr")
DTYPES = {"acc_ptr": torch.float16, "stats_ptr": torch.float32}
RESULTS = ("out_ptr", *DTYPES)


def written(single_split: bool) -> set[str]:
    table = triton_kernel_wrap.kernel_side_table
    tensors, constants = {}, {}
    for parameter in _hopper_kernel.params:
        name = parameter.name
        if name.endswith("_ptr"):
            dtype = torch.int32 if name in INTEGERS else DTYPES.get(name, torch.bfloat16)
            tensors[name] = torch.empty(16, dtype=dtype)
        else:
            constants[name] = 0.1 if name == "scale" else 16
    constants["SINGLE_SPLIT"] = single_split
    arguments = (table.add_kernel(_hopper_kernel), table.add_constant_args(constants), tensors, {})
    return set(triton_kernel_wrap.get_mutated_tensors(*arguments))


@pytest.mark.parametrize("single_split", [True, False])
def test_a_split_that_is_alone_writes_the_result(single_split, tmp_path):
    """If a mask leaves few keys, one of several splits writes the result, and the combine kernel does not."""
    with cross_compile(find_arch("sm_90"), tmp_path):
        assert written(single_split) == ({"out_ptr"} if single_split else set(RESULTS))


def test_the_twin_has_all_pointers_of_the_kernel():
    """A pointer that the twin lacks would count as neither read nor written."""
    twin = facts_of(_hopper_kernel).twin
    assert {name for name in _hopper_kernel.arg_names if name.endswith("_ptr")} < set(twin.arg_names)
