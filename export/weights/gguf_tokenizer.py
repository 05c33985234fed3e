"""Writes the tokenizer in a GGUF file as Hugging Face's files, which a runner reads."""

from __future__ import annotations

from pathlib import Path

from flashpte.export.common.errors import ExportError
from flashpte.export.weights.checkpoint_folder import tokenizer_files
from flashpte.export.weights.gguf_file import GgufFile


def write_tokenizer(file: GgufFile, folder: Path) -> tuple[Path, ...]:
    """Converts the tokenizer with transformers; returns the files written, none if the file has no tokenizer.

    Raises:
        ExportError: transformers cannot convert it.
    """
    if file.metadata("tokenizer.ggml.model") is None:
        return ()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, local_files_only=True
        )
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ExportError(f"cannot convert the tokenizer in {file.path} ({reason})") from error
    return tokenizer_files(folder)
