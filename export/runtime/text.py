"""Converts text to tokens and back, with the tokenizer files that ``export-model`` copied into the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashpte.export.common.errors import ExportError, Option
from flashpte.export.files.model_folder import ModelFolder
from flashpte.export.files.tokenizer_json import json_tokenizer

_NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(folder: ModelFolder) -> bool:
    """Whether the export holds a tokenizer."""
    files = folder.manifest["files"]
    return any(name in files for name in _NAMES[:2]) or _NAMES[3] in files


def open_tokenizer(folder: ModelFolder, *, chat: bool = False) -> Any:
    """The tokenizer of an export, by the tokenizers library alone where that is enough.

    Args:
        folder: the export.
        chat: whether its chat template is needed, which transformers reads.

    Raises:
        ExportError: the files cannot be read as a tokenizer.
    """
    return (None if chat else json_tokenizer(folder.path, folder.manifest)) or load_tokenizer(folder.path)


def load_tokenizer(folder: Path) -> Any:
    """Loads the transformers tokenizer of a model folder.

    Raises:
        ExportError: the files cannot be read as a tokenizer.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:
        # Some folders have no config that names the class; the fast format needs none.
        if (folder / "tokenizer.json").is_file():
            try:
                return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            except Exception as second:
                error = second
        reason = " ".join(str(error).split())
        raise ExportError(f"cannot read the tokenizer in {folder}: {reason}") from error


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        ExportError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer adds.

    Args:
        tokenizer: from :func:`open_tokenizer`.
        prompt: the text.
        chat: put the prompt into the tokenizer's chat template, as a user's turn.

    Raises:
        ExportError: ``chat`` is set, but the tokenizer has no template or the template fails.
    """
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ExportError(
            Option("chat"), ": the tokenizer of this export has no chat template; leave ", Option("chat"), " out"
        )
    messages = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        raise ExportError(Option("chat"), f": the chat template failed: {' '.join(str(error).split())}") from error
    # The template adds the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class StreamingText:
    """Turns tokens into text piece by piece.

    Several tokens may share one character of several bytes, and the text of a token may depend on its neighbors. So
    each piece is the difference of two decoded texts over the same recent tokens. A piece waits while the text ends
    inside a character.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # first recent token
        self._shown = 0  # first token whose text was not returned yet

    def add(self, token: int) -> str:
        """Adds a token and returns the text that is now certain; it often lags by one token and may be ""."""
        self._tokens.append(token)
        before, text = self._read(self._start, self._shown), self._read(self._start, len(self._tokens))
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(before):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def finish(self) -> str:
        """Returns the remaining text, with a replacement character for bytes that form no character."""
        before, text = self._read(self._start, self._shown), self._read(self._start, len(self._tokens))
        self._start = self._shown = len(self._tokens)
        return text[len(before) :]

    def _read(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)) if end > start else ""


def stop_ids(constants_eos: Sequence[int], tokenizer: Any | None) -> frozenset[int]:
    """Ids that end a text: those that the export names (``get_eos_ids``) and the tokenizer's own."""
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset([*constants_eos, *([own] if isinstance(own, int) else [])])
