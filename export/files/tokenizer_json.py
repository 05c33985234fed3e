"""Reads ``tokenizer.json`` with the tokenizers library alone.

transformers' ``AutoTokenizer`` imports 5 to 8 seconds of modules, most of the time that ``run-model`` takes to its
first token. It reads most files as they are, but may change what they say (a class that rebuilds its tokenizer,
``add_bos_token``, a clean-up of spaces). So an export tries both on some texts, and says in the manifest whether the
file alone is enough.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashpte.export.common.errors import ExportError

TOKENIZER_JSON = "tokenizer.json"

_TEXTS = (
    "The capital of France is",
    " leading, trailing and  double spaces   ",
    "def f(x):\n\tif x != 3.14:\n        return [x, {'a': 1}]  # don't\r\n\n\n",
    "1234567890 1,000.50 0x7F 12:30 50%",
    "Grüße, naïve café, Größe İstanbul ﬁ Å e\u0301",
    "日本語のテキスト 中文 한국어 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🇫🇷 ½ ™ \u200b\u00a0\u2028 \ufffd \x00 \x7f",
    "hello , world ! it 's fine . <s> </s> <bos> <|endoftext|> <pad> ▁ Ġ",
    "",
)


class JsonTokenizer:
    """The part of a transformers tokenizer that running a model needs.

    Args:
        path: a ``tokenizer.json``.
        eos_token_id: the id that ends a text; ``None`` for none.

    Raises:
        ExportError: the file is no tokenizer.
    """

    def __init__(self, path: Path, eos_token_id: int | None = None):
        from tokenizers import Tokenizer

        self.eos_token_id = eos_token_id
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ExportError(f"cannot read the tokenizer in {path}: {' '.join(str(error).split())}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Token ids of a text, under ``"input_ids"``."""
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    @property
    def special_tokens(self) -> list[str]:
        """The texts of all added tokens, such as ``<bos>``."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]


def describe_tokenizer_json(files: Sequence[Path]) -> dict[str, Any] | None:
    """What ``manifest.json`` says of a tokenizer whose ``tokenizer.json`` is enough.

    Args:
        files: the tokenizer's files, which an export copies.

    Returns:
        ``{"eos_token_id": id or None}``, or ``None`` if there is no such file, it cannot be read, or transformers reads
        the files in another way.
    """
    file = next((path for path in files if path.name == TOKENIZER_JSON), None)
    if file is None:
        return None
    try:
        alone = JsonTokenizer(file)
        with tempfile.TemporaryDirectory(prefix="flashpte-tokenizer-") as folder:
            for path in files:
                shutil.copyfile(path, Path(folder) / path.name)  # an export holds no config.json
            whole = _transformers_tokenizer(Path(folder))
        if not all(_read_alike(alone, whole, text) for text in (*_TEXTS, *_with_special_tokens(alone))):
            return None
    except Exception:  # a file that nobody can read is an error of run-model, not of the export
        return None
    eos = whole.eos_token_id
    return {"eos_token_id": eos if isinstance(eos, int) else None}


def json_tokenizer(folder: Path, manifest: Mapping[str, Any]) -> JsonTokenizer | None:
    """The tokenizer of an export whose manifest says that its ``tokenizer.json`` is enough; ``None`` for another."""
    described = manifest.get("tokenizer_json")
    if not isinstance(described, Mapping):
        return None
    return JsonTokenizer(folder / TOKENIZER_JSON, described.get("eos_token_id"))


def _transformers_tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _with_special_tokens(tokenizer: JsonTokenizer) -> list[str]:
    names = tokenizer.special_tokens
    return [f"a{name} b {name}" for name in names[:: max(1, len(names) // 64)]]


def _read_alike(alone: JsonTokenizer, whole: Any, text: str) -> bool:
    """Whether ids with and without special tokens are equal, and so are the texts of all of them and of parts."""
    ids = alone(text)["input_ids"]
    if ids != list(whole(text)["input_ids"]):
        return False
    if alone(text, add_special_tokens=False)["input_ids"] != list(whole(text, add_special_tokens=False)["input_ids"]):
        return False
    parts = [ids, *(ids[start:] for start in range(1, len(ids))), *(ids[:end] for end in range(1, len(ids)))]
    return all(
        alone.decode(part, skip_special_tokens=True) == whole.decode(part, skip_special_tokens=True) for part in parts
    )
