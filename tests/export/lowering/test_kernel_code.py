"""Work that PyTorch does at every launch is done once for equal launches, and again for different ones."""

from unittest import mock

import pytest
import sympy
import torch
import triton
from dynamic_attention import dynamic_program
from torch._inductor.fx_passes import post_grad
from torch._subclasses import FakeTensorMode
from triton.runtime.autotuner import Autotuner
from wrappers import wrapper_source

from flashpte.export.lowering.cross_compile import kernel_code, overrides
from flashpte.passes import replace_sdpa

FUNCTIONAL = torch.ops.higher_order.triton_kernel_wrapper_functional


@triton.jit
def _first(x_ptr, n, SIZE):
    pass


@triton.jit
def _second(x_ptr, n, SIZE):
    pass


def tensor(dtype, *sizes):
    with FakeTensorMode():
        return torch.empty(sizes, dtype=dtype)


def asked(*launches):
    """Number of calls of the original for launches ``(kernel, arguments)``; each caller must get its own list."""
    calls = []

    def generate_ttir(kernel, kwargs, metadata):
        calls.append((kernel, kwargs))
        return (getattr(kernel, "fn", kernel), tuple(kwargs.items())), list(kwargs)

    remembering = kernel_code.remember(generate_ttir)
    for kernel, kwargs in launches:
        module, names = remembering(kernel, dict(kwargs), {})
        assert module[0] is getattr(kernel, "fn", kernel)
        assert names == list(kwargs)
        names.clear()  # the caller owns the list
    return len(calls)


def launch(kernel=_first, **changes):
    return kernel, {"x_ptr": tensor(torch.float16, 4), "n": 4, "SIZE": 16, **changes}


def test_launches_that_are_alike_ask_once():
    assert asked(launch(), launch(), launch(x_ptr=tensor(torch.float16, 8, 8))) == 1
    symbolic = [launch(n=sympy.Symbol(name)) for name in "ab"]
    assert asked(*symbolic, launch()) == 2


def test_whatever_the_code_depends_on_asks_again():
    others = [
        launch(_second),
        launch(x_ptr=tensor(torch.float32, 4)),
        launch(x_ptr=None),
        launch(n=8),
        launch(n=4.0),
        launch(SIZE=1),
        launch(SIZE=True),
        launch(SIZE=torch.float16),
        launch(SIZE=0.0),
        launch(SIZE=-0.0),
    ]
    assert asked(launch(), *others, *others) == 1 + len(others)


def configured(size, warps):
    """A launch that sets its number of warps, as PyTorch passes it on."""
    kernel = Autotuner(_first, _first.arg_names, [triton.Config({"SIZE": size}, num_warps=warps)], [], None, None)
    return kernel, {"x_ptr": tensor(torch.float16, 4), "n": 4}


def test_a_launch_with_one_configuration_is_known_by_it():
    assert asked(configured(16, 4), configured(16, 8)) == 1
    assert asked(configured(16, 4), configured(32, 4)) == 2


def test_what_is_not_understood_is_never_remembered():
    real = launch(x_ptr=torch.empty(4, dtype=torch.float16))  # the real tensor's address may matter
    assert asked(real, real) == 2
    odd = launch(SIZE=object())
    assert asked(odd, odd) == 2


def test_codes_are_read_once():
    asked = []

    def ttir_to_functions(module):
        asked.append(module)
        return {"functions": len(asked)}

    remembering = kernel_code.remember_functions(ttir_to_functions)
    first, second = object(), object()
    assert [remembering(module)["functions"] for module in (first, first, second, first)] == [1, 1, 2, 1]
    assert asked == [first, second]


SAVING = ("ttir_to_functions", "decompose_triton_kernel_wrapper_functional")


@pytest.mark.lowering
def test_what_is_saved_changes_no_line_of_the_host_code(tmp_path):
    """A layer that chooses between two kernels, in branches, and a tile map whose counts start as zeros."""
    program, _ = replace_sdpa(dynamic_program(layers=1))
    traced = []

    def traces(graph):
        traced.extend(graph.find_nodes(op="call_function", target=FUNCTIONAL))
        return decompose(graph)

    def source(name):
        (tmp_path / name).mkdir()
        return wrapper_source(program, tmp_path / name)

    decompose = post_grad.decompose_triton_kernel_wrapper_functional
    with mock.patch.object(post_grad, decompose.__name__, traces):
        saving = source("saving")
    assert not traced  # every launch was known to write in place
    rest = tuple(entry for entry in overrides.TABLE if not entry.name.endswith(SAVING))
    assert len(rest) == len(overrides.TABLE) - len(SAVING)
    with mock.patch.object(overrides, "TABLE", rest):
        assert source("rest") == saving
