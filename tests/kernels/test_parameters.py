"""Limits the number of parameters of device functions and launchers, and checks that shared lists agree."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

import flashpte.kernels
from flashpte.kernels import mask
from flashpte.kernels.call import AttentionCall
from flashpte.kernels.facts import facts_named, registered

MOST_OF_A_DEVICE_FUNCTION = 12
MOST_OF_A_LAUNCHER = 6
FOLDER = Path(flashpte.kernels.__file__).parent


def _functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (path.relative_to(FOLDER).as_posix(), node)
        for path in sorted(FOLDER.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def _parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    return len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)


def _is_jit(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).split("(")[0].endswith(".jit") for decorator in function.decorator_list)


def test_no_device_function_takes_many_parameters():
    """Kernels may take more: their parameters must be single integers and tensors (see ``mask.strides``)."""
    # A twin has its kernel's parameters.
    entries = {facts.name for facts in registered()} | {"_reads_and_writes"}
    functions = [(path, f) for path, f in _functions() if _is_jit(f) and f.name not in entries]
    assert len(functions) > 25
    long = {f"{path}: {f.name}": _parameters(f) for path, f in functions if _parameters(f) > MOST_OF_A_DEVICE_FUNCTION}
    assert long == {}


def test_no_launcher_takes_many_parameters():
    launchers = [(path, f) for path, f in _functions() if f.name.startswith("launch_")]
    assert {f.name for _, f in launchers} >= {
        *("launch_split_k", "launch_tiled", "launch_hopper", "launch_dispatch"),
        *("launch_combine", "launch_tile_map", "launch_interval_map", "launch_compact"),
    }
    long = {f"{path}: {f.name}": _parameters(f) for path, f in launchers if _parameters(f) > MOST_OF_A_LAUNCHER}
    assert long == {}


@pytest.mark.parametrize("name", ["_split_k_kernel", "_tiled_kernel", "_hopper_kernel"])
def test_kernels_begin_with_what_launchers_begin_with(name):
    """``mask.pointers`` and ``mask.strides`` pass by position the parameters that each kernel names."""
    query, key, value = (torch.empty(2, heads, 3, 16) for heads in (4, 2, 2))
    call = AttentionCall(query, key, value, 1.0)
    given = mask.kernel_mask(call, mask.GivenMap(None, None, None), mask.MapTiling(16, 64))
    names = list(inspect.signature(facts_named(name).kernel.fn).parameters)
    pointers, strides = mask.pointers(call, given, query), mask.strides(call, given, query)
    split = [] if name == "_tiled_kernel" else ["acc_ptr", "stats_ptr"]
    tensors = ["q", "k", "v", "mask", "interval_values", "tiles", "counts", "out"]
    steps = ["qb", "qh", "qm", "kb", "kh", "kn", "vb", "vh", "vn", "mb", "mh", "mm", "mn", "ob", "oh", "om", "od"]
    expected = [f"{tensor}_ptr" for tensor in tensors] + split + [f"stride_{step}" for step in steps]
    expected += ["stride_tb", "stride_th", "n_key_tiles", "stride_bs", "stride_ib", "stride_it"]
    assert names[: len(expected)] == expected
    assert len(pointers) + len(split) + len(strides) == len(expected)
