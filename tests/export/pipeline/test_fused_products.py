"""Fused weights of an export: stored once, streamed, and compared part by part."""

from __future__ import annotations

import pytest
import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.common.options import ExportOptions
from flashpte.export.files.fused_weights import parts_of
from flashpte.export.files.mapped_tensors import mapped_file, write_mapped
from flashpte.export.pipeline import export_programs, plan_export
from flashpte.export.pipeline.fused_products import JoinedWeights, rewrite_products


@pytest.mark.parametrize("in_files", [False, True])
def test_the_same_parts_are_joined_once(tmp_path, in_files):
    folder = tmp_path if in_files else None
    parts = [torch.arange(8, dtype=torch.int16).view(4, 2), torch.ones(3, 2, dtype=torch.int16)]
    if in_files:
        parts = [write_mapped(part, tmp_path / f"part-{i}") for i, part in enumerate(parts)]
    join = JoinedWeights(folder)
    whole = join(parts)
    assert torch.equal(whole, torch.cat(parts))
    assert join(list(parts)) is whole
    assert join(parts[::-1]) is not whole
    assert (mapped_file(whole.untyped_storage()) is not None) == in_files


def test_a_mapped_part_with_gaps(tmp_path):
    mapped = write_mapped(torch.arange(4096 * 4, dtype=torch.int32).view(4096, 4), tmp_path / "part")
    parts = [mapped[:, :3], mapped[::2, 1:]]
    expected = torch.cat(parts)
    assert torch.equal(JoinedWeights(tmp_path)(parts), expected)
    assert torch.equal(torch.cat(parts), expected)


def test_parts_of_a_program():
    weights = {"ab": torch.arange(10).view(5, 2), "c": torch.ones(2)}
    parts = parts_of(weights, {"ab": {"a": 2, "b": 3}})
    assert {name: tensor.tolist() for name, tensor in parts.items()} == {
        "a": [[0, 1], [2, 3]],
        "b": [[4, 5], [6, 7], [8, 9]],
        "c": [1, 1],
    }
    assert parts_of(weights, None) == weights


@pytest.mark.parametrize(
    "entry", [{"x": {"a": 1}}, {"ab": {"a": 2, "b": 4}}, {"ab": [1, 2]}, ["ab"], {"ab": {"a": "2"}}]
)
def test_an_entry_that_does_not_fit_is_one_line(entry):
    with pytest.raises(ExportError, match="the manifest's fused_weights do not fit the program"):
        parts_of({"ab": torch.zeros(5, 2)}, entry)


@pytest.mark.parametrize("options", [{}, {"qlinear": "4w"}], ids=["bfloat16", "4 bits"])
def test_methods_share_the_fused_weights(tmp_path, options):
    plan = plan_export(ExportOptions(target="gemma4-31b", small=True, random_seed=0, verify_window=4, **options))
    programs = export_programs(plan, weights_folder=tmp_path)
    found, reports, fused = rewrite_products(programs, tmp_path)
    held = [
        {name: t.data_ptr() for name, t in program.state_dict.items() if name in fused} for program in found.values()
    ]
    assert len(held) == 3
    assert held[0] == held[1] == held[2]
    assert set(held[0]) == set(fused)
    model = {f"model.{name}": tensor for name, tensor in plan.model.state_dict().items()}
    parts = parts_of(found["decode"].state_dict, fused)
    for sizes in fused.values():
        for name in sizes:
            assert torch.equal(parts[name], model[name]), name
            assert not any(name in program.state_dict for program in found.values())
    assert set(reports) == {"prefill", "decode", "target_verify"}
    assert all(o.applied for report in reports.values() for o in report["linear-fusion"].outcomes)
