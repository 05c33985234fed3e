"""Real models: their GGUF files, which ``make test-real`` downloads, and what transformers makes of them."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from real_models import MODELS
from real_reference import greedy, hugging_face_model

NEW_TOKENS = 8


class Real:
    """One real model.

    Attributes:
        name: its name in ``real_models.MODELS``.
        folder: the folder of GGUF files and, by name, of exports.
        gguf_file: its file.
        question: the text of the prompt.
    """

    question = "The capital of France is"

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.gguf_file = folder / next(model.file for model in MODELS if model.name == name)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The file's tokenizer, as transformers converts it."""
        place = {"gguf_file": self.gguf_file.name, "local_files_only": True}
        return transformers.AutoTokenizer.from_pretrained(str(self.gguf_file.parent), **place)

    @functools.cached_property
    def eager(self) -> Any:
        """The Hugging Face model, float32."""
        return hugging_face_model(self.gguf_file)

    @functools.cached_property
    def prompt(self) -> list[int]:
        """The tokens of the prompt."""
        return list(self.tokenizer(self.question)["input_ids"])

    @functools.cached_property
    def answer(self) -> list[int]:
        """The tokens that the Hugging Face model continues the prompt with."""
        return greedy(self.eager, self.prompt, NEW_TOKENS)


@pytest.fixture(scope="module", params=[model.name for model in MODELS])
def real(request) -> Real:
    """A real model; ``FLASHPTE_REAL_MODELS`` names the folder of its file."""
    given = os.environ.get("FLASHPTE_REAL_MODELS")
    if given is None:
        pytest.skip("needs real models: make test-real downloads them")
    found = Real(request.param, Path(given))
    assert found.gguf_file.is_file(), f"{found.gguf_file} is missing: make test-real downloads it"
    return found
