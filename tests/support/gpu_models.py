"""Helpers for tests of whole models on a GPU: following an eager model, and a folder with one wrong bit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from flashpte.export.check.compare import compare
from flashpte.export.check.eager_model import EagerModel


def follow(own: EagerModel, reference: EagerModel, tokens: Sequence[int], logits: torch.Tensor) -> None:
    """Asserts that logits [1, 1, V] match the last token's in the model's own dtype and in a wider one."""
    row = [len(tokens) - 1]
    expected, yardstick = (eager.evaluate(tokens, row).logits for eager in (reference, own))
    found = compare("logits", f"after {len(tokens)}", logits[0, -1:].cpu(), expected, yardstick, torch.bfloat16)
    # One row has fewer numbers than a whole check, so its largest error is a less reliable yardstick.
    assert found.max_error <= 2 * found.max_allowed, found
    assert found.relative_error <= 2 * found.relative_allowed, found


def tampered(good: Path, out: Path, file: str = "model.pte") -> Path:
    """A copy of a model folder with one flipped bit in ``file``."""
    shutil.copytree(good, out)
    data = bytearray((out / file).read_bytes())
    data[len(data) // 2] ^= 1
    (out / file).write_bytes(data)
    return out
