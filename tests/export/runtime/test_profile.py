"""Kernel families, the cases that a profile measures, and its output."""

import dataclasses
import subprocess
import sys

import pytest

from flashpte.export.common.errors import UsageError
from flashpte.export.runtime.floors import Ceilings, floors
from flashpte.export.runtime.kernel_families import family
from flashpte.export.runtime.language_model import Limits
from flashpte.export.runtime.profile import Case, ProfileReport, plan_cases, summarise
from flashpte.kernels.facts import registered


def own_kernels(folder: str) -> set[str]:
    """Names of the registered kernels below a module of flashpte."""
    return {facts.name for facts in registered() if f"{facts.kernel.fn.__module__}.".startswith(f"flashpte.{folder}.")}


NAMES = {
    "attention": [
        *(own_kernels("kernels") - own_kernels("kernels.linear") - own_kernels("kernels.dense")),
        "_split_k_kernel_0",
        "_sdpa_fwd_kernel_body",
        "_sdpa_decode_splitk_kernel",
        "triton_red_fused__safe_softmax_1",
        "triton_per_fused__softmax_eq_7",
        "triton_tem_fused_bmm_expand_12",
        "triton_poi_fused__to_copy_clone_expand_mul_transpose_unsqueeze_view_5",
        "triton_tem_fused__to_copy_bmm_transpose_3",
        "void pytorch_flash::flash_fwd_kernel<Traits>(Params)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(Params)",
    ],
    "matmul": [
        *(own_kernels("kernels.linear") - own_kernels("kernels.linear.embedding")),
        *own_kernels("kernels.dense"),
        "_dense_lanes_kernel",
        "triton_tem_fused_mm_t_view_2",
        "triton_tem_fused__unsafe_view_gelu_mm_mul_t_view_8",
        "triton_tem_fused_addmm_5",
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>(Params)",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32",
        "void gemv2T_kernel_val<int>(args)",
        "void cublasLt::splitKreduce_kernel<32>(args)",
    ],
    "rest": [
        *own_kernels("kernels.linear.embedding"),
        "triton_per_fused_add_embedding_mean_mul_pow_1",
        "triton_poi_fused_arange_le_unsqueeze_14",
        "triton_per_fused__unsafe_view_add_index_copy_mean_mul_pow_remainder_transpose_view_6",
        "Memcpy HtoD (Pageable -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4>(int)",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in sorted(names)])
def test_families(kind, name):
    assert family(name) == kind


def test_every_kernel_of_ours_is_known():
    """In a process that has imported no more than ``run-model`` does."""
    program = """
import importlib, pkgutil
import flashpte.export.runtime.kernel_families, flashpte.kernels as kernels
from flashpte.kernels.facts import registered
from triton.runtime import JITFunction
known, found = {facts.name for facts in registered()}, set()
for module in pkgutil.walk_packages(kernels.__path__, "flashpte.kernels."):
    for value in vars(importlib.import_module(module.name)).values():
        if isinstance(value, JITFunction) and value.__name__.endswith("_kernel"):
            found.add(value.__name__)
assert found == known, found ^ known
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cases():
    limits = Limits(32768, (2, 1024), True, 5)
    assert plan_cases(limits, [4096], 2048) == (
        Case("prefill", 4096, (1024, 1024)),
        Case("target_verify", 4096, (5,)),
        Case("decode", 4096, (1,)),
    )
    assert {case.context for case in plan_cases(limits, None, None)} == {1024, 4096, 16384}
    assert {case.context for case in plan_cases(Limits(256, (2, 64), True, 5), None, None)} == {125}
    assert [case.name for case in plan_cases(Limits(256, None, True, None), [100], None)] == ["decode"]
    with pytest.raises(UsageError, match="contexts=32764: the cache holds 32768"):
        plan_cases(limits, [32764], None)
    with pytest.raises(UsageError, match="prefill=2048 at a context of 31000"):
        plan_cases(limits, [31000], 2048)
    with pytest.raises(UsageError, match="prefill=1: must be at least 2"):
        plan_cases(limits, [100], 1)


@pytest.fixture
def report():
    seen = [
        (name, run + start, run + end)
        for run in (1000.0, 2000.0)
        # The product starts before attention ends, and waits for it.
        for name, start, end in (("_tiled_kernel", 0.0, 30.0), ("triton_tem_fused_mm_1", 20.0, 70.0))
    ]
    row = summarise(Case("prefill", 4096, (1024, 1024)), 75.0, [*seen, ("_compact_kernel", 1072.0, 1084.0)], 2)
    row = dataclasses.replace(row, floors_us={"attention": 20.0, "matmul": 40.0})
    return ProfileReport((row,), "NVIDIA H200", ("decode",), 1, Ceilings(4.5e6, 7.8e8))


def test_times_are_for_one_run(report):
    (row,) = report.rows
    assert row.families_us == {"attention": 36.0, "matmul": 50.0, "rest": 0.0}
    assert row.kernels == 2
    assert row.busy_us == 76.0  # 10 us in which two kernels ran count once
    assert row.idle_us == 0.0
    assert row.of_floor == 1.25
    assert row.slowest[0] == ("triton_tem_fused_mm_1", 50.0)
    slower = summarise(row.case, 100.0, [("_tiled_kernel", 5.0, 35.0)], 1)
    assert slower.idle_us == 70.0
    assert slower.of_floor is None


def test_tables(report):
    table = report.lines()
    heads = ["method", "tokens", "context", "total us", "attention", "matmul", "rest", "idle", "kernels", "a layer"]
    assert table[0].split() == " ".join(heads).split()
    times = "75.0 (x 1.25) 36.0 (x 1.80) 50.0 (x 1.25) 0.0 0.0"
    assert table[1].split() == f"prefill 1024+1024 4096 {times} 2 1.0".split()
    assert table[2].endswith("floors: weights, keys and values read at 4.50 TB/s, products at 780 TFLOP/s")
    document = report.to_dict()
    assert document["rows"][0]["case"] == {"name": "prefill", "context": 4096, "chunks": (1024, 1024)}
    assert document["cuda_graphs"] == ["decode"]


def attention_node(mask, keys):
    sizes = {"query": [1, 8, "s1", 64], "key": [1, 2, keys, 64], "value": [1, 2, keys, 32]}
    return {"op": "flashpte::sdpa_dispatch", **sizes, "dtype": "bfloat16", "mask": mask}


def test_floors():
    """One full layer and one with a window of 100; the numbers are counted by hand."""
    manifest = {
        "model": {"sliding_window": 100},
        "work": {"decode": {"weight_bytes": 7000, "flop_per_call": 9000, "flop_per_token": 10}},
        "routing": {"decode": {"nodes": [attention_node("causal", 4096), attention_node("causal+window", 228)]}},
    }
    slow_reads = Ceilings(1.0, 1e9)
    token = 2 * (64 + 32) * 2  # bytes of a key and a value of two heads
    found = floors(manifest, "decode", 999, [1], slow_reads)
    assert found == {"attention": token * (1000 + 100), "matmul": 7000}
    # Two calls; the second reads what the first has written.
    found = floors(manifest, "decode", 999, [3, 2], slow_reads)
    assert found == {"attention": token * (1002 + 102 + 1004 + 101), "matmul": 14000}
    slow_arithmetic = Ceilings(1e9, 1.0)
    score = 2 * 8 * (64 + 32)
    found = floors(manifest, "decode", 10, [3], slow_arithmetic)
    assert found == {"attention": score * 2 * (11 + 12 + 13), "matmul": 9030}
    found = floors(manifest, "decode", 1000, [2], slow_arithmetic)
    assert found == {"attention": score * (1001 + 1002 + 200), "matmul": 9020}
    assert floors({}, "decode", 10, [1], slow_reads) == {}
    # Attention that was left alone, whose sizes are not known.
    left = {"op": None, "query": [], "key": [], "value": [], "dtype": "float32", "mask": "none"}
    manifest["routing"]["decode"]["nodes"].append(left)
    assert floors(manifest, "decode", 10, [1], slow_reads) == {"matmul": 7000}
    manifest["work"]["decode"] = {"weight_bytes": 0, "flop_per_call": 0, "flop_per_token": 0}
    assert floors(manifest, "decode", 10, [1], slow_reads) == {}


def test_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    from flashpte.export.runtime.plot import draw_beside

    draw_beside({"flashpte": report, "math": report}, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
