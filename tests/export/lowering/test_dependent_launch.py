"""Which kernels of a lowered program are launched before the previous kernel ends."""

import re
import subprocess

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap
from wrappers import wrapper_source

from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.cross_compile.dependent_launch import waiting
from flashpte.export.lowering.cross_compile.toolchain import find_triton_tool
from flashpte.kernels import split_k
from flashpte.kernels.facts import facts_named
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
def test_every_kernel_is_launched_dependent_where_the_arch_can(wrapper):
    arch, source = wrapper
    found = launches(source)
    ours = {name for name in found if re.match("_(split_k|hopper|combine)_kernel", name)}
    assert {re.match(r"_\w+?_kernel", name)[0] for name in ours} >= {"_split_k_kernel", "_combine_kernel"}
    assert any(name.startswith("_hopper") for name in ours) == (arch == "sm_90")
    assert len(found) > len(ours)
    dependent = {name for name, dependent in found.items() if dependent}
    never = {name for name in found if (facts := facts_named(name)) is not None and facts.early_start is None}
    assert dependent == (set(found) - never if arch == "sm_90" else set())


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


def instructions(cubin: bytes, folder) -> dict[str, list[str]]:
    """Opcodes of each kernel of a cubin, in the order of its code."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [find_triton_tool("nvdisasm"), "-c", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    _, *parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", text, flags=re.M)
    opcode = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)"
    return {name: re.findall(opcode, code) for name, code in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.xdist_group("lowered")
@pytest.mark.parametrize("method", ["decode", "prefill"])
def test_what_is_embedded_waits_before_it_reads(contents, tmp_path, method):
    """A dependent launch of a kernel that does not wait would sometimes read data that is not written yet."""
    kernels = {}
    for cubin in contents.methods[method].library.cubins:
        kernels |= instructions(bytes(cubin.data), tmp_path)
        assert set(kernels) >= {name for name in cubin.kernels if not name.startswith("$")}
    for kernel, code in kernels.items():
        facts = facts_named(kernel)
        assert ("ACQBULK" in code) == (facts is None or facts.early_start is not None), kernel
        if "ACQBULK" in code and kernel != "_hopper_kernel":  # its warps have separate code, in any order
            reads = [code.index(read) for read in ("LDG", "LDGSTS", "STG") if read in code]
            assert code.index("ACQBULK") < min(reads), kernel
    ours = {"decode": {"_split_k_kernel", "_combine_kernel"}, "prefill": {"_hopper_kernel"}}[method]
    assert set(kernels) >= ours
    assert {kernel[:11] for kernel in set(kernels) - ours} >= {"triton_poi_", "triton_tem_"}


@pytest.mark.parametrize("described", ["'launch_pdl': False, 'device': 0", "'device': 0"])
def test_a_kernel_of_inductors_waits_first_and_says_so(described):
    helper = "@triton.jit\ndef add(a, b):\n    return a + b\n\n"
    head = f"@triton_heuristics.pointwise(\n    triton_meta={{{described}}},\n)\n@triton.jit\n"
    source = waiting(helper + head + "def Placeholder.KERNEL_NAME(in_ptr0, XBLOCK : tl.constexpr):\n    xnumel = 8\n")
    assert source.startswith(helper)
    assert "triton_meta={'launch_pdl': True, 'device': 0}" in source
    assert source.endswith(
        "(in_ptr0, XBLOCK : tl.constexpr):\n    tl.extra.cuda.gdc_wait()\n"
        "    tl.extra.cuda.gdc_launch_dependents()\n    xnumel = 8\n"
    )


@pytest.mark.parametrize("source", ["", "@triton.jit\nclass A:\n", "@triton.jit\ndef f(a):\n    pass\n"])
def test_another_form_of_kernels_is_an_error(source):
    with pytest.raises(ValueError, match="Inductor writes kernels in another form"):
        waiting(source)
