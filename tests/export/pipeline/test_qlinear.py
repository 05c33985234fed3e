"""``--qlinear``: which weights get 4 or 8 bits, and what a program then holds."""

from __future__ import annotations

import re

import pytest
import torch

from flashpte.export.common.errors import UsageError
from flashpte.export.common.options import ExportOptions, check_options
from flashpte.export.pipeline.plan import plan_export
from flashpte.export.pipeline.programs import export_programs


def plan(**options):
    return plan_export(ExportOptions("gemma4-31b", small=True, random_seed=0, layers=6, **options))


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ({"qlinear": "4w"}, "int4-g32"),
        ({"qlinear": "4w", "qlinear_group_size": 128}, "int4-g128"),
        ({"qlinear": "8w"}, "int8"),
        ({"qlinear": "8w", "qlinear_group_size": 64}, "int8-g64"),
    ],
)
def test_linear_layers_of_all_decoder_layers(options, format):
    planned = plan(**options)
    chosen = {weight.name: weight.format for weight in planned.weights}
    for name, found in chosen.items():
        linear = re.fullmatch(r"model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight", name)
        assert found == (format if linear else "bfloat16"), name
    # The sixth layer is a full one, which computes its values from its keys.
    assert sum(found == format for found in chosen.values()) == 41
    assert planned.manifest()["weight_formats"]["default"] == "bfloat16"


def test_without_the_option_nothing_changes():
    assert {weight.format for weight in plan().weights} == {"bfloat16"}


def test_programs_hold_codes_and_share_them():
    programs = export_programs(plan(qlinear="4w", method="decode"))
    (program,) = programs.values()
    calls = [node for node in program.graph.nodes if node.target is torch.ops.flashpte.quantized_linear.default]
    assert len(calls) == 41
    dense = {name for name, tensor in program.state_dict.items() if tensor.is_floating_point() and tensor.dim() == 2}
    assert dense == {"model.model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"qlinear": "5w"}, "qlinear=5w: must be 4w or 8w"),
        ({"qlinear": "4w", "qlinear_group_size": 48}, "qlinear_group_size=48: must be 32, 64 or 128"),
        ({"qlinear_group_size": 32}, "qlinear_group_size belongs to qlinear"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(UsageError) as error:
        check_options(ExportOptions("gemma4-31b", **options))
    assert said in str(error.value)
