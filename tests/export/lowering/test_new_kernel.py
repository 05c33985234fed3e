"""A Gluon kernel that lowering does not know: the facts in the kernel's own file are all that lowering needs."""

import ast
import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch._higher_order_ops import triton_kernel_wrap
from torch.library import triton_op, wrap_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as ttgl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction
from wrappers import wrapper_source

import flashpte.export
from flashpte.export.lowering.cross_compile import cross_compile, find_arch
from flashpte.export.lowering.cross_compile.gluon import ast_source, source_code
from flashpte.export.runtime.kernel_families import family
from flashpte.kernels.facts import KernelFacts, facts_named, facts_of, register, registered
from flashpte.kernels.launch import dependent_launch
from flashpte.kernels.primitives import wait_for_earlier_kernels

STEP = ttgl.constexpr(1.5)


@gluon.jit
def _step(x):
    return x + STEP


@gluon.jit
def _toy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    LAYOUT: ttgl.constexpr = ttgl.BlockedLayout([1], [32], [4], [0])
    at = ttgl.program_id(0) * BLOCK + ttgl.arange(0, BLOCK, layout=LAYOUT)
    wait_for_earlier_kernels(DEPENDENT)
    ttgl.store(out_ptr + at, _step(ttgl.load(x_ptr + at, mask=at < n, other=0.0)), mask=at < n)


@triton.jit
def _toy_reads_and_writes(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr))


@gluon.jit
def _unknown_kernel(x_ptr, n, BLOCK: tl.constexpr):
    ttgl.store(x_ptr, n)


register(_toy_kernel, "rest", early_start="DEPENDENT", twin=_toy_reads_and_writes)


@triton_op("flashpte_test::toy", mutates_args=())
def toy(x: torch.Tensor) -> torch.Tensor:
    out, n = torch.empty_like(x), x.numel()
    wrap_triton(_toy_kernel)[((n + 255) // 256,)](x, out, n, BLOCK=256, num_warps=4, **dependent_launch(x))
    return out


@toy.register_fake
def _toy_fake(x):
    return torch.empty_like(x)


def test_facts_are_found_by_kernel_and_by_the_names_of_a_program():
    facts = facts_of(_toy_kernel)
    assert facts == KernelFacts(_toy_kernel, "rest", "DEPENDENT", facts.twin)
    assert facts.twin.fn is _toy_reads_and_writes.fn
    assert facts_named("_toy_kernel") is facts_named("_toy_kernel_3") is facts
    assert facts_named("_toy_kernels") is None
    assert family("_toy_kernel_0") == "rest"
    assert facts_of(_unknown_kernel) is None


def test_facts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="_unknown_kernel is written in Gluon and has no twin"):
        register(_unknown_kernel, "rest")
    with pytest.raises(ValueError, match=r"the twin of _unknown_kernel has other parameters: \['out_ptr'\]"):
        register(_unknown_kernel, "rest", twin=_toy_reads_and_writes)
    with pytest.raises(ValueError, match="_toy_reads_and_writes has no parameter DEPENDENT"):
        register(_toy_reads_and_writes, "rest", early_start="DEPENDENT")


def test_its_source_is_written_out_with_all_that_it_uses():
    code = source_code(lambda kernel: "what Inductor writes")(_toy_kernel)
    assert code.startswith("def _toy_kernel(")
    for part in (
        "from triton.experimental import gluon\n",
        "import triton.experimental.gluon.language as ttgl\n",
        "STEP = tl.constexpr(1.5)",
        "@gluon.jit\ndef _step(",
        "@triton.jit\ndef wait_for_earlier_kernels(",
    ):
        assert part in code
    assert source_code(lambda kernel: "what Inductor writes")(_toy_reads_and_writes) == "what Inductor writes"
    with pytest.raises(ValueError, match=r"_unknown_kernel is written in Gluon: .*register"):
        source_code(lambda kernel: "")(_unknown_kernel)


def test_it_is_compiled_as_gluon():
    # Inductor decorates the source that it wrote with Triton's decorator.
    made = ast_source(lambda fn, *args, **kwargs: "Triton's")(JITFunction(_toy_kernel.fn), {"x_ptr": "*fp32"})
    assert isinstance(made, GluonASTSource)
    assert isinstance(made.fn, GluonJITFunction)


def test_inductor_learns_what_it_writes(tmp_path):
    table, tensors = triton_kernel_wrap.kernel_side_table, {name: torch.empty(16) for name in ("x_ptr", "out_ptr")}
    with cross_compile(find_arch("sm_90"), tmp_path):
        for dependent in (False, True):
            constants = table.add_constant_args({"n": 16, "BLOCK": 16, "DEPENDENT": dependent})
            written = triton_kernel_wrap.get_mutated_tensors(table.add_kernel(_toy_kernel), constants, tensors, {})
            assert set(written) == {"out_ptr"}


@pytest.mark.lowering
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_program_with_it_lowers(arch, tmp_path):
    class Toy(torch.nn.Module):
        def forward(self, x):
            return toy(x).cos()

    source = wrapper_source(torch.export.export(Toy(), (torch.randn(1000),)), tmp_path, name=arch)
    (helper,) = re.findall(r"^\s*(launch\w*)\(kernels_\._toy_kernel_0,", source, re.M)
    assert helper == ("launchDependentKernel" if arch == "sm_90" else "launchKernel")
    # Memory for the kernel's result and for its cosine, but not for a copy of its inputs.
    assert len(re.findall(r"aoti_torch_empty_strided\(", source)) == 2


def test_export_names_no_kernel():
    """Neither as a name in code nor in a string."""
    names = {facts.name for facts in registered() if not facts.kernel.fn.__module__.startswith("test_")}
    assert {"_split_k_kernel", "_tiled_kernel", "_hopper_kernel", "_combine_kernel"} < names
    found = []
    for path in sorted(Path(flashpte.export.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = getattr(node, "id", getattr(node, "attr", getattr(node, "value", getattr(node, "name", None))))
            if isinstance(text, str) and any(re.search(rf"\b{name}\b", text) for name in names):
                found.append(f"{path.name}:{getattr(node, 'lineno', 0)}: {text}")
    assert not found
