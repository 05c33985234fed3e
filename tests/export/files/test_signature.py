"""Inputs are checked before they reach compiled code, and architectures before code is loaded."""

import pytest
import torch
from eager_program import signatures

from flashpte.export.runtime import InputError
from flashpte.export.runtime.machine import runs_on, same_torch

PREFILL = signatures({"prefill": (2, 64)})["prefill"]
DECODE = signatures({"decode": (1, 1)})["decode"]


def ids(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


def test_calls_that_fit():
    for length in (2, 5, 64):
        PREFILL.check([ids(1, length), ids(length)])
    DECODE.check([ids(1, 1), ids(1)])
    assert DECODE.is_static
    assert not PREFILL.is_static


@pytest.mark.parametrize(
    ("signature", "inputs", "said"),
    [
        (PREFILL, [ids(1, 5)], r"takes 2 tensors \(tokens: int64 \[1, 2..64\], input_pos: int64 \[2..64\]\), 1 were"),
        (PREFILL, [ids(1, 5), ids(6)], "input_pos has 6 in dimension 0, tokens has 5; they must be equal"),
        (PREFILL, [ids(1, 65), ids(65)], r"input tokens: int64 \[1, 2..64\] was given shape \[1, 65\]"),
        (PREFILL, [ids(1, 1), ids(1)], r"was given shape \[1, 1\]"),
        (PREFILL, [ids(5), ids(5)], r"was given shape \[5\]"),
        (PREFILL, [ids(1, 5, dtype=torch.int32), ids(5)], "input tokens: .* was given int32"),
        (DECODE, [ids(1, 1), 3], "input input_pos: .* was given a int, not a tensor"),
        (DECODE, [ids(1), ids(1, 1)], "input tokens"),
    ],
)
def test_calls_that_do_not(signature, inputs, said):
    with pytest.raises(InputError, match=said):
        signature.check(inputs)


@pytest.mark.parametrize(
    ("arch", "capability", "fits"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_90", (10, 0), False),
        ("sm_100", (10, 0), True),
        ("sm_100", (10, 3), False),
        ("sm_120", (12, 0), True),
    ],
)
def test_where_machine_code_runs(arch, capability, fits):
    assert runs_on(arch, capability) is fits


def test_releases_of_torch():
    assert same_torch("2.11.0+cu130", "2.11.0+cpu")
    assert not same_torch("2.11.0", "2.12.0")
    assert not same_torch("2.11.0", "2.11.1")
