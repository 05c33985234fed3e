"""The small Gemma 4 lowers in 4 bits on a machine without a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from flashpte.export.common.options import ExportOptions
from flashpte.export.lowering import inspect_pte, lower
from flashpte.export.pipeline.plan import plan_export
from flashpte.export.pipeline.programs import export_programs, replace_attention

LAYERS = 1


@pytest.mark.lowering
@pytest.mark.parametrize(
    ("arch", "method", "kernels"),
    [
        ("sm_80", "prefill", {"_linear_few_rows_kernel", "_linear_many_rows_kernel"}),
        ("sm_90", "decode", {"_linear_few_rows_hopper_kernel"}),
    ],
)
def test_only_the_embedding_is_left_in_16_bits(tmp_path, arch, method, kernels):
    options = ExportOptions("gemma4-31b", small=True, random_seed=0, layers=LAYERS, qlinear="4w", method=method)
    plan = plan_export(options)
    programs, _ = replace_attention(export_programs(plan))
    lowered = lower(programs, output_dir=tmp_path / "out", arch=arch, manifest=plan.manifest())
    (found,) = inspect_pte(lowered.model).methods.values()
    names = {kernel for cubin in found.library.cubins for kernel in cubin.kernels}
    assert {name for name in names if name.startswith("_linear")} == kernels
    # No product is left to cuBLAS or to Inductor's templates but the head's.
    assert not any(re.search(r"mm_out|addmm", symbol) for symbol in found.library.undefined)
    assert sum("_mm_" in name for name in names) <= 1
    dense = {entry.fqn for entry in found.weights if entry.dtype == torch.bfloat16 and len(entry.shape) == 2}
    assert dense == {"model.model.embed_tokens.weight"}
    codes = [entry for entry in found.weights if entry.dtype == torch.int16]
    assert len(codes) == 7 * LAYERS
    shapes = [weight.shape for weight in plan.weights if weight.format == "int4-g32"]
    assert sum(2 * torch.Size(entry.shape).numel() for entry in codes) == sum(n * k // 2 for n, k in shapes)


@pytest.mark.lowering
def test_a_tied_head_and_embedding_share_their_codes(tmp_path):
    """With a recipe, only norms are left dense, and nothing but kernels for packed weights reads a matrix."""
    options = ExportOptions("gemma4-31b", small=True, random_seed=0, layers=1, qrecipe="default", method="decode")
    plan = plan_export(options)
    programs, _ = replace_attention(export_programs(plan))
    lowered = lower(programs, output_dir=tmp_path / "out", arch="sm_90", manifest=plan.manifest())
    (found,) = inspect_pte(lowered.model).methods.values()
    names = {kernel for cubin in found.library.cubins for kernel in cubin.kernels}
    assert {"_quantized_embedding_kernel", "_linear_few_rows_hopper_kernel"} <= names
    assert not any("_mm_" in name for name in names)
    assert not any(re.search(r"mm_out|addmm", symbol) for symbol in found.library.undefined)
    matrices = [entry for entry in found.weights if len(entry.shape) == 2]
    assert not [entry.fqn for entry in matrices if entry.dtype.is_floating_point]
    tables = [entry.fqn for entry in found.weights if entry.dtype == torch.int8]
    assert tables == ["model.model.embed_tokens.packed"]


@pytest.mark.sweep  # tests/kernels/linear/test_hopper_serves.py asks the same of every format, without an export
@pytest.mark.lowering
def test_zero_points_that_are_not_whole_get_the_kernels_for_hopper(tmp_path):
    sizes = dict(small=True, random_seed=0, layers=1, method="prefill")
    plan = plan_export(ExportOptions("gemma4-31b", qlinear="4w", qalgorithm="hqq", **sizes))
    programs, _ = replace_attention(export_programs(plan))
    lowered = lower(programs, output_dir=tmp_path / "out", arch="sm_90", manifest=plan.manifest())
    (found,) = inspect_pte(lowered.model).methods.values()
    names = {kernel for cubin in found.library.cubins for kernel in cubin.kernels if kernel.startswith("_linear")}
    assert {"_linear_few_rows_hopper_kernel", "_linear_many_rows_hopper_kernel"} <= names
    assert names.isdisjoint({"_linear_few_rows_kernel", "_linear_many_rows_kernel"})
