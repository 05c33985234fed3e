"""When ``tokenizer.json`` alone is enough, and what a run then need not import."""

import json
import subprocess
import sys
import types

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from flashpte.export.common.errors import ExportError
from flashpte.export.files.tokenizer_json import JsonTokenizer, describe_tokenizer_json, json_tokenizer
from flashpte.export.runtime.text import open_tokenizer

TEXT = "Hello, world! 3.14 Grüße"


def byte_level():
    """A byte-level BPE without merges: 256 bytes, ``<s>`` at the beginning and ``</s>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


def words():
    """Words and punctuation, decoded with a space between any two."""
    known = ["[UNK]", "hello", "world", ",", ".", "it", "'s", "fine", "!"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write(folder, tokenizer, **config):
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return [folder / "tokenizer.json", folder / "tokenizer_config.json"]


def test_the_file_alone_reads_as_transformers_does(tmp_path):
    files = write(tmp_path, byte_level(), eos_token="</s>", bos_token="<s>")
    described = describe_tokenizer_json(files)
    assert described == {"eos_token_id": 257}
    alone = json_tokenizer(tmp_path, {"tokenizer_json": described})
    whole = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert alone(TEXT)["input_ids"] == whole(TEXT)["input_ids"]
    assert alone(TEXT)["input_ids"][0] == 256
    assert alone.eos_token_id == whole.eos_token_id
    assert alone.decode(alone(TEXT)["input_ids"], skip_special_tokens=True) == TEXT


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100, pad_id=0, pad_token="!")
    write(tmp_path, tokenizer)
    assert len(JsonTokenizer(tmp_path / "tokenizer.json")("a" * 50)["input_ids"]) == 51


@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        (words, {"clean_up_tokenization_spaces": True}),
        (byte_level, {"tokenizer_class": "GemmaTokenizer"}),
    ],
)
def test_what_transformers_reads_in_another_way_is_left_to_it(tmp_path, tokenizer, config):
    files = write(tmp_path, tokenizer(), **config)
    assert describe_tokenizer_json(files) is None
    assert json_tokenizer(tmp_path, {"tokenizer_json": None}) is None


@pytest.mark.parametrize("content", ['{"version": "1.0"}', "no JSON", ""])
def test_a_file_that_nobody_can_read_does_not_fail_the_export(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    assert describe_tokenizer_json([path]) is None
    with pytest.raises(ExportError, match=r"cannot read the tokenizer in .*tokenizer\.json"):
        JsonTokenizer(path)


def test_no_file(tmp_path):
    assert describe_tokenizer_json([]) is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert describe_tokenizer_json([tmp_path / "tokenizer.model"]) is None


def test_a_run_takes_the_file_alone_unless_it_needs_the_chat_template(tmp_path):
    described = describe_tokenizer_json(write(tmp_path, byte_level(), eos_token="</s>"))
    folder = types.SimpleNamespace(path=tmp_path, manifest={"tokenizer_json": described})
    assert isinstance(open_tokenizer(folder), JsonTokenizer)
    assert isinstance(open_tokenizer(folder, chat=True), transformers.PreTrainedTokenizerFast)
    older = types.SimpleNamespace(path=tmp_path, manifest={})
    assert isinstance(open_tokenizer(older), transformers.PreTrainedTokenizerFast)


def test_a_run_imports_no_transformers(tmp_path):
    described = describe_tokenizer_json(write(tmp_path, byte_level()))
    code = f"""
import sys, types
from pathlib import Path
from flashpte.export.cli import run_model, run_model_text
from flashpte.export.runtime import generate, program, speculate
from flashpte.export.runtime.text import open_tokenizer
folder = types.SimpleNamespace(path=Path({str(tmp_path)!r}), manifest={{"tokenizer_json": {described!r}}})
print(len(open_tokenizer(folder)("abc")["input_ids"]))
print(sorted({{"transformers", "executorch", "torchao", "torch._inductor", "torch._dynamo"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["4", "[]"], done.stderr
