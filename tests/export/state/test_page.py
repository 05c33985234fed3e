"""docs/adding-a-layer-state.md quotes the code that test_recurrent.py runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import toy_recurrent

PAGE = Path(__file__).parents[3] / "docs" / "adding-a-layer-state.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_the_page_has_the_state_its_view_and_the_targets_function():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda code: re.search(r"(?:class|def) (\w+)", code)[1])
def test_the_page_quotes_the_toy_target(snippet):
    assert snippet in Path(toy_recurrent.__file__).read_text()


def test_the_page_gives_the_buffers_shapes():
    shapes = {name: list(shape) for name, (shape, _) in toy_recurrent.RecurrentState().buffers(48, None).items()}
    assert all(f"`{name}` {shape}" in PAGE.read_text() for name, shape in shapes.items())
