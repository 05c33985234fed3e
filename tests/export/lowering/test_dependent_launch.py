"""Which kernels of a lowered program are launched before the previous kernel ends."""

import re
import subprocess

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap
from wrappers import wrapper_source

from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.cross_compile.toolchain import find_triton_tool
from flashpte.kernels import split_k
from flashpte.passes import replace_sdpa

pytestmark = pytest.mark.lowering


class DecodeBetween(torch.nn.Module):
    """A decode and a verify that split keys, with one of Inductor's kernels before and after each."""

    def forward(self, one, few, k, v):
        def attend(q):
            keys = torch.arange(k.shape[2], device=q.device)
            mask = keys <= torch.arange(q.shape[2], device=q.device)[:, None] + 4000
            out = torch.nn.functional.scaled_dot_product_attention(q.sin(), k, v, attn_mask=mask, enable_gqa=True)
            return out.cos()

        return attend(one), attend(few)


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def wrapper(request, tmp_path_factory):
    """An arch and the C++ that Inductor writes for it."""

    def random(heads, length):
        return torch.randn(1, heads, length, 128, dtype=torch.bfloat16)

    example = (random(32, 1), random(32, 8), random(8, 4096), random(8, 4096))
    program, report = replace_sdpa(torch.export.export(DecodeBetween(), example))
    assert report.declined == ()
    folder = tmp_path_factory.mktemp("dependent")
    return request.param, wrapper_source(program, folder, name=request.param)


def launches(source: str) -> dict[str, bool]:
    """For each kernel that a function launches, by name: whether the launch is a dependent one."""
    found = re.findall(r"^\s*(launch\w*)\(kernels_\.(\w+),", source, re.M)
    return {kernel: helper == "launchDependentKernel" for helper, kernel in found}


@pytest.mark.xdist_group("dependent launch")
def test_attention_is_launched_dependent_where_the_arch_can_and_nothing_else_is(wrapper):
    arch, source = wrapper
    found = launches(source)
    ours = {name for name in found if re.match("_(split_k|hopper|combine)_kernel", name)}
    assert {re.match(r"_\w+?_kernel", name)[0] for name in ours} >= {"_split_k_kernel", "_combine_kernel"}
    assert any(name.startswith("_hopper") for name in ours) == (arch == "sm_90")
    assert len(found) > len(ours)
    assert {name for name, dependent in found.items() if dependent} == (ours if arch == "sm_90" else set())


def test_the_wait_does_not_make_arguments_written(tmp_path):
    """Inductor assumes that assembly writes everything, so it would copy the caches before every call."""
    table = triton_kernel_wrap.kernel_side_table
    kernel = split_k._split_k_kernel
    tensors, constants = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if name.endswith("_ptr"):
            dtype = torch.int32 if name in ("tiles_ptr", "counts_ptr") else torch.bfloat16
            dtype = torch.float32 if name in ("acc_ptr", "stats_ptr") else dtype
            tensors[name] = torch.empty(16, dtype=torch.int64 if "interval" in name or "mask" in name else dtype)
        else:
            constants[name] = 0.1 if name == "scale" else 16
    constants |= {"MASK": 3, "TERMS": 1, "INDEX_TERM": 1, "CAUSAL": False, "SINGLE_SPLIT": False, "EXACT": False}
    constants |= {"SEPARATE_FULL": True, "EXP2_SCALE": 1.0, "MAP_BLOCK_N": 64, "STAGES": 2, "DEPENDENT": True}
    with cross_compile(find_arch("sm_90"), tmp_path):
        arguments = (table.add_kernel(kernel), table.add_constant_args(constants), tensors, {})
        assert set(triton_kernel_wrap.get_mutated_tensors(*arguments)) == {"acc_ptr", "stats_ptr"}


def instructions(cubin: bytes, folder) -> list[str]:
    """Opcodes of a cubin, in the order of its code."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [find_triton_tool("nvdisasm"), "-c", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", text)


@pytest.mark.xdist_group("lowered")
@pytest.mark.parametrize("method", ["decode", "prefill"])
def test_what_is_embedded_waits_before_it_reads(contents, tmp_path, method):
    """A dependent launch of a kernel that does not wait would sometimes read data that is not written yet."""
    waiting = set()
    for cubin in contents.methods[method].library.cubins:
        code = instructions(bytes(cubin.data), tmp_path)
        ours = {kernel for kernel in cubin.kernels if re.match("_(split_k|hopper|combine)_kernel", kernel)}
        assert bool(ours) == ("ACQBULK" in code)
        waiting |= ours
        if ours and ours != {"_hopper_kernel"}:  # its warps have separate code, in any order
            assert code.index("ACQBULK") < min(code.index(read) for read in ("LDG", "STG"))
    assert waiting >= {"decode": {"_split_k_kernel", "_combine_kernel"}, "prefill": {"_hopper_kernel"}}[method]
