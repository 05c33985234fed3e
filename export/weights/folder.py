"""The files of a Hugging Face folder that are not weights: config, token ids, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashpte.export.errors import ExportError

CONFIG_FILE = "config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What a runner needs to turn text into tokens and to know when to stop; copied if the folder has it."""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: the file.
        what: what the file is, for the error.

    Raises:
        ExportError: the file cannot be read, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{what} {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{what} {path} is not a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint folder's ``config.json``.

    Raises:
        ExportError: there is none, or it is not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ExportError(f"{folder} has no {CONFIG_FILE}: give a Hugging Face model folder to --checkpoint")
    return read_json(path, "model config")


def read_token_ids(folder: Path) -> dict[str, Any]:
    """``bos_token_id`` and ``eos_token_id`` of a folder's ``generation_config.json``: the ids that generation uses."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    fields = read_json(path, "generation config")
    return {name: fields[name] for name in ("bos_token_id", "eos_token_id") if fields.get(name) is not None}


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's files that the folder has."""
    return tuple(path for name in TOKENIZER_FILES if (path := folder / name).is_file())
