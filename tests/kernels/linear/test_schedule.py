"""How the kernel of many rows for Hopper shares out its steps, and that all of its warps count them alike."""

from __future__ import annotations

import collections
import itertools
import re
import types

import pytest
import torch
from compile_only import compiling_for
from linear_cases import Case, build

from flashpte.kernels.linear import many_rows_hopper, shares
from flashpte.kernels.linear.call import Destination
from flashpte.kernels.linear.tuning import HopperManyRowsConfig


@pytest.fixture
def schedule(monkeypatch):
    """The segments of one program, ``(block, begin, end, done)``: the kernel's own functions, run on numbers."""

    def run(program: int, programs: int, blocks: int, units: int) -> list[tuple[int, ...]]:
        numbers = types.SimpleNamespace(
            program_id=lambda axis: torch.tensor(program),
            num_programs=lambda axis: torch.tensor(programs),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            int32=torch.int64,
        )
        for module in (many_rows_hopper, shares):
            monkeypatch.setattr(module, "gl" if module is many_rows_hopper else "tl", numbers)
        monkeypatch.setattr(many_rows_hopper, "share_of", shares.share_of.fn)
        monkeypatch.setattr(many_rows_hopper, "full_waves", shares.full_waves.fn)
        sizes = torch.tensor(blocks), torch.tensor(units)
        segments = many_rows_hopper._segments.fn(*sizes)
        count = int(many_rows_hopper._number_of_segments.fn(segments, sizes[1]))
        return [tuple(map(int, many_rows_hopper._segment.fn(i, segments, *sizes))) for i in range(count)]

    return run


@pytest.mark.parametrize("blocks", [1, 3, 4, 7, 18, 36])
@pytest.mark.parametrize(("programs", "units"), [(1, 3), (2, 1), (3, 10), (7, 8), (13, 42)])
def test_every_step_has_one_program_and_its_number(schedule, blocks, programs, units):
    owners = collections.Counter()
    for program in range(programs):
        steps = 0
        for block, begin, end, done in schedule(program, programs, blocks, units):
            assert done == steps
            assert 0 <= begin < end <= units
            steps += end - begin
            owners.update((block, unit) for unit in range(begin, end))
    assert owners == dict.fromkeys(itertools.product(range(blocks), range(units)), 1)


@pytest.mark.parametrize("zeros", ["none", "whole", "offsets", "real"])
def test_no_warps_count_from_another_number(zeros):
    """Triton's constant propagation once made the copying warps count each segment's steps from 0: a deadlock."""
    case = Case(64, 1000, 1168, zeros=zeros, dtype=torch.bfloat16)
    call = build(case).call
    with compiling_for("sm_90", to_the_end=False) as kernels:
        config = HopperManyRowsConfig(64, 256, 4, 3)
        many_rows_hopper.launch_many_rows_hopper(call, config, Destination(call.empty_output(), 1))
    code = next(text for name, text in kernels if name == "_linear_many_rows_hopper_kernel")
    parts = re.split(r"^ *(?:default \{|partition\d+\()", code, flags=re.M)[1:]
    assert len(parts) == 3
    for part in parts:
        first_step = re.search(r"scf\.for %step\w* = (%\S+) to", part)[1]
        assert re.fullmatch(r"%\w+#\d+", first_step), f"steps start from {first_step}, not a result of _segment"
