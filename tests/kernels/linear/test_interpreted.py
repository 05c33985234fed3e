"""The kernels' own code in Triton's interpreter: tests call launchers, never the operator (the reference on a CPU)."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from unittest import mock

import pytest
import torch
from linear_cases import Case, build, check
from mutants import mutant

from flashpte.kernels.linear import dispatch, plain
from flashpte.kernels.linear.call import Destination
from flashpte.kernels.linear.tuning import FewRowsConfig, ManyRowsConfig

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

# Every number of bits and kind of group and zero point, over ragged and full shapes.
WEIGHTS = [
    dict(out_features=48, in_features=128, group=32),
    dict(out_features=50, in_features=256, group=32, zeros="integer"),
    dict(out_features=33, in_features=320, group=32, zeros="real", bias=True),
    dict(out_features=48, in_features=320, group=64, zeros="real"),
    dict(out_features=50, in_features=256, group=64, bias=True, scale_dtype=torch.float16),
    dict(out_features=64, in_features=256, group=128, scale_dtype=torch.float32),
    dict(out_features=17, in_features=320, group=128, zeros="integer", bias=True, scale_dtype=torch.float16),
    dict(out_features=48, in_features=320, bits=8, group=32, zeros="real"),
    dict(out_features=50, in_features=256, bits=8, group=128),
    dict(out_features=48, in_features=256, bits=8, group=256, bias=True),
    dict(out_features=50, in_features=320, bits=8, group=320, zeros="integer"),
    dict(out_features=5, in_features=77, bits=8, group=77, zeros="real"),
    dict(out_features=33, in_features=320, group=32, zeros="offsets", bias=True),
    dict(out_features=48, in_features=320, group=64, zeros="offsets", scale_dtype=torch.float32),
    dict(out_features=50, in_features=256, bits=8, group=32, zeros="offsets", scale_dtype=torch.float16),
    dict(out_features=17, in_features=77, bits=8, group=77, zeros="offsets"),
]
FEW = [Case(rows, **weight) for rows, weight in zip((1, 3, 16, 1) * 4, WEIGHTS, strict=True)]
MANY = [Case(rows, **weight) for rows, weight in zip((17, 40, 1, 33) * 4, WEIGHTS, strict=True)]
FLOAT32 = [dataclasses.replace(case, dtype=torch.float32) for case in (*FEW[1:8:2], *FEW[12::2], *MANY[2::2])]
LAYOUTS = [Case(3, 48, 256, zeros="real", bias=True, layout=layout) for layout in ("sliced", "transposed", "batched")]


@pytest.mark.parametrize("case", [*FEW, *LAYOUTS], ids=str)
def test_few_rows_match_the_float64_answer(case):
    problem = build(case)
    check(problem, plain.launch_few_rows(problem.call))


@pytest.mark.parametrize("case", [*MANY, *LAYOUTS], ids=str)
def test_many_rows_match_the_float64_answer(case):
    problem = build(case)
    check(problem, plain.launch_many_rows(problem.call))


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_float32_is_as_exact_as_a_plain_product(case):
    problem = build(case)
    launch = plain.launch_few_rows if case.rows <= 16 else plain.launch_many_rows
    check(problem, launch(problem.call))


# The last has more splits than there are tiles of columns.
@pytest.mark.parametrize("config", [(16, 1, 1), (16, 4, 1), (64, 1, 2), (32, 2, 2), (64, 2, 5)], ids=str)
def test_few_rows_do_not_depend_on_tiles_and_splits(config):
    for case in (Case(3, 50, 320, zeros="real", bias=True), Case(16, 48, 320, bits=8, group=320)):
        problem = build(case)
        check(problem, plain.launch_few_rows(problem.call, FewRowsConfig(*config, num_warps=4, num_stages=2)))


@pytest.mark.parametrize("config", [(16, 16), (64, 32), (32, 64)], ids=str)
def test_many_rows_do_not_depend_on_tiles(config):
    for case in (Case(40, 50, 320, zeros="real", bias=True), Case(17, 48, 256, bits=8, group=64)):
        problem = build(case)
        check(problem, plain.launch_many_rows(problem.call, ManyRowsConfig(*config, num_warps=4, num_stages=2)))


def test_splits_give_the_same_bits_each_time():
    problem = build(Case(2, 48, 320))
    config = FewRowsConfig(32, 1, 3, num_warps=4, num_stages=2)
    first, second = (plain.launch_few_rows(problem.call, config) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("rows", [0, 1, 16, 17])
def test_dispatch_takes_one_kernel(monkeypatch, rows):
    problem = build(Case(max(rows, 1), 48, 128))
    call = dataclasses.replace(problem.call, x=problem.call.x[:rows])
    counted = {}
    for name in ("launch_few_rows", "launch_many_rows"):
        counted[name] = mock.Mock(wraps=getattr(plain, name))
        monkeypatch.setattr(dispatch, name, counted[name])
    out = dispatch.launch_linear(call)
    assert out.shape == (rows, 48)
    used = [name for name, launch in counted.items() if launch.called]
    assert used == ([] if rows == 0 else ["launch_few_rows"] if rows <= 16 else ["launch_many_rows"])
    if rows:
        check(problem, out)


def test_a_launch_that_is_not_enabled_writes_nothing():
    """As in a program of dynamic M, where each launcher gets the same result to write."""
    for rows, launch, other in (
        (3, plain.launch_few_rows, plain.launch_many_rows),
        (40, plain.launch_many_rows, plain.launch_few_rows),
    ):
        problem = build(Case(rows, 48, 256))
        out = problem.call.empty_output()
        few = other is plain.launch_few_rows
        # The few-rows launcher refuses more rows if it knows them; two tiles of columns make two splits.
        config = FewRowsConfig(32, 1, 2, 4, 2) if few else None
        small = dataclasses.replace(problem.call, x=problem.call.x[:3]) if few else problem.call
        other(small, config, Destination(out, 0))
        assert out.isnan().all()
        launch(problem.call, None, Destination(out, 1))
        check(problem, out)


MUTATIONS = {
    "few rows read x past its columns": (
        "plain.py",
        "(column < K)[:, None, :]",
        "(column >= 0)[:, None, :]",
        "few",
    ),
    "splits overlap": ("plain.py", "begin + tiles_per_split, column", "begin + 2 * tiles_per_split, column", "few"),
    "the last split is dropped": ("splits.py", "range(SPLITS)", "range(SPLITS - 1)", "few"),
    "zero points are not centered": ("plain.py", "to(tl.float32) - CENTER", "to(tl.float32)", "few"),
    "zero points are added": ("plain.py", "product -= zero", "product += zero", "few"),
    "offsets belong to centered codes": ("plain.py", "(offset + CENTER * scale)", "offset", "few"),
    "few rows without offsets": ("plain.py", "offset = tl.load(z_ptrs", "offset = 0 * tl.load(z_ptrs", "few"),
    "many rows with centered codes and offsets": ("plain.py", "weight += CENTER", "weight += 0 * CENTER", "many"),
    "many rows without offsets": ("plain.py", "weight += tl.load(z_ptr", "weight += 0 * tl.load(z_ptr", "many"),
    "no bias after splits": ("splits.py", "total += tl.load(bias_ptr", "total += 0 * tl.load(bias_ptr", "few"),
    "many rows read x past its columns": ("plain.py", "& (column < K)[None, :]", "& (column >= 0)[None, :]", "many"),
    "many rows without zero points": ("plain.py", "weight -= tl.load(z_ptr", "weight -= 0 * tl.load(z_ptr", "many"),
    "many rows with the scales of one group": ("plain.py", "plane * GROUPS // 4", "plane * GROUPS // 8", "many"),
    "halves of a tile exchanged": ("device.py", "row // 8 % 2)", "(row // 8 + 1) % 2)", "many"),
    "a plane too low": ("device.py", "4 * PLANE", "4 * (PLANE // 2)", "few"),
    "one row less": ("plain.py", "padded_n - 1", "padded_n - 2", "many"),
}


def is_wrong(module, kind: str) -> bool:
    """Whether any result of the launchers in a (mutant's) module is wrong; stops at the first."""
    package = module.__name__.rpartition(".")[0]
    call_class = sys.modules[f"{package}.call"].LinearCall
    tiles = sys.modules[f"{package}.tuning"]
    few = tiles.FewRowsConfig(32, 1, 2, 4, 2)
    case = Case(3, 64, 320, zeros="real", bias=True, layout="sliced")
    try:
        for changes in (
            dict(),
            dict(zeros="integer", group=64),
            dict(in_features=256, rows=2, zeros="none"),
            dict(zeros="offsets", group=64),
        ):
            problem = build(dataclasses.replace(case, **changes))
            call = problem.call
            own = call_class(**{field.name: getattr(call, field.name) for field in dataclasses.fields(call)})
            check(problem, module.launch_few_rows(own, few) if kind == "few" else module.launch_many_rows(own))
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("kind", ["few", "many"])
def test_what_is_mutated_is_right(kind):
    assert not is_wrong(plain, kind)


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_caught(name, tmp_path):
    file, old, new, kind = MUTATIONS[name]
    changed = mutant(tmp_path, f"linear/{file}", old, new, "linear.plain")
    assert is_wrong(importlib.import_module(changed.__name__), kind)
