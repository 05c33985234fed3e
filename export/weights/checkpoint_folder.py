"""Reads the files of a Hugging Face folder that are not weights: config, token ids and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashpte.export.common.errors import ExportError, Option

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
"""Files that a runner needs to tokenize text and to know when to stop; copied if the folder has them."""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: the file.
        what: name of the file's kind, for the error.

    Raises:
        ExportError: the file cannot be read, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{what} {path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ExportError(f"{what} {path} is nested too deeply") from error
    if not isinstance(value, dict):
        raise ExportError(f"{what} {path} is not a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint folder's ``config.json``.

    Raises:
        ExportError: the file is missing or is not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ExportError(f"{folder} has no {CONFIG_FILE}: give a Hugging Face model folder to ", Option("checkpoint"))
    return read_json(path, "model config")


def read_token_ids(folder: Path) -> dict[str, Any]:
    """Reads ``bos_token_id`` and ``eos_token_id``, which generation uses, from a folder's ``generation_config.json``.

    Raises:
        ExportError: the file cannot be read, or an id is not valid.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    fields = read_json(path, "generation config")
    check_token_ids(fields, path)
    return {name: fields[name] for name in ("bos_token_id", "eos_token_id") if fields.get(name) is not None}


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Paths of the tokenizer files in the folder."""
    return tuple(path for name in TOKENIZER_FILES if (path := folder / name).is_file())


def check_token_ids(fields: Mapping[str, Any], origin: Path) -> None:
    """Checks ``bos_token_id`` (an id) and ``eos_token_id`` (an id or a list), at the top and in ``text_config``.

    Raises:
        ExportError: a value is not a token id; the text names the file and the field.
    """
    text = fields.get("text_config")
    for part in (fields, text if isinstance(text, dict) else {}):
        bos, eos = part.get("bos_token_id"), part.get("eos_token_id")
        if bos is not None and not _is_id(bos):
            raise ExportError(f"{origin}: bos_token_id is {bos!r}, not a token id")
        if eos is not None and not _is_id(eos) and not (isinstance(eos, list) and all(map(_is_id, eos))):
            raise ExportError(f"{origin}: eos_token_id is {eos!r}, not a token id or a list of them")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
