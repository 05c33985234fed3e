"""Errors name options: the field in Python, the flag on a command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from flashpte.export.cli.flag_names import spell_flag
from flashpte.export.common.errors import Option, UsageError, wanted
from flashpte.export.common.options import ExportOptions, check_has_weights, check_options

EXPORT = Path(__file__).parents[3] / "export"


def of(**fields):
    return ExportOptions("gemma4-31b", **fields)


@pytest.mark.parametrize(
    ("options", "python", "flags"),
    [
        (of(max_seq_len=1), "max_seq_len=1: must be at least 2", "--max-seq-len 1: must be at least 2"),
        (of(verify_window=40), "verify_window=40: must be 2..16", "--verify-window 40: must be 2..16"),
        (
            of(verify_window=8, max_seq_len=4),
            "verify_window=8: must not exceed max_seq_len=4",
            "--verify-window 8: must not exceed --max-seq-len 4",
        ),
        (
            of(checkpoint=Path("x"), random_seed=0),
            "checkpoint and random_seed cannot be combined: both name weights",
            "--checkpoint and --random-weights cannot be combined: both name weights",
        ),
        (
            of(midm_sdpa=False),
            "midm_sdpa belongs to target_verify: add draft or verify_window",
            "--no-midm-sdpa belongs to target_verify: add --draft DIR or --verify-window M",
        ),
        (
            of(method="decode", max_prefill_chunk=4),
            "max_prefill_chunk belongs to the method prefill, which method=decode leaves out",
            "--max-prefill-chunk belongs to the method prefill, which --method decode leaves out",
        ),
        (
            of(chain=4, checkpoint=Path("x")),
            "chain needs draft; only random_seed makes a random draft",
            "--chain needs --draft DIR; only --random-weights makes a random draft",
        ),
    ],
)
def test_one_check_two_spellings(options, python, flags):
    with pytest.raises(UsageError) as caught:
        check_options(options)
    assert str(caught.value) == python
    assert caught.value.spelled(spell_flag) == flags


def test_weights_are_asked_for():
    with pytest.raises(UsageError) as caught:
        check_has_weights(of())
    assert str(caught.value) == "no weights: give checkpoint, gguf_file or random_seed"
    assert caught.value.spelled(spell_flag) == "no weights: give --checkpoint DIR, --gguf-file FILE or --random-weights"


def test_an_option_without_a_value_in_a_plain_line():
    assert (
        str(UsageError("a {brace} in ", Option("draft", "x/{y}"), wanted("config"))) == "a {brace} in draft=x/{y}config"
    )


def test_no_error_below_the_command_line_speaks_of_flags():
    spoken = []
    for path in EXPORT.rglob("*.py"):
        if path.is_relative_to(EXPORT / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                texts = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
                spoken += [f"{path.name}: {text}" for text in texts if re.search(r"(^|\W)--[a-z]", text)]
    assert spoken == []
