"""A tiny Llama folder with a tokenizer, and ``export-model`` run in this process."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

import flashpte.export.lowering as lowering
from flashpte.export.cli import main


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self):
        """The only line on stderr, which must be the error."""
        (line,) = self.err.splitlines()
        assert line.startswith("export-model: error: ")
        return line


@pytest.fixture
def export_model(capsys):
    """Calls ``export-model`` with arguments; returns its exit code and output."""

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, **{f"w{index}": index for index in range(1, 40)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@dataclasses.dataclass(frozen=True)
class Lowered:
    folder: Path
    model: Path
    weights: Path
    arch: str


@pytest.fixture
def lowered(monkeypatch):
    """Replaces ``lower``: records its arguments and writes one file."""
    calls = []

    def lower(programs, *, output_dir, progress, **options):
        calls.append({"programs": programs, "output_dir": output_dir, **options})
        progress("lower")
        output_dir.mkdir()
        (output_dir / "model.pte").write_bytes(bytes(3000))
        return Lowered(output_dir, output_dir / "model.pte", output_dir / "aoti_cuda_blob.ptd", "sm_90")

    monkeypatch.setattr(lowering, "lower", lower)
    return calls
