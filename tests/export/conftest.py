"""Tiny Hugging Face models of every supported architecture, and exports to run, made here or on another machine."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
from host_code import checked_host_code, compiled_host_code
from kernel_cache import own_kernels, shared_kernels
from run_model_process import Ended, run_model_process
from sessions import reference_model

from flashpte.export.models.gemma4 import GEMMA4_SMALL

_SIZES = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "max_position_embeddings": 128}
TINY = {
    "llama": {
        **_SIZES,
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "qwen3": {
        **_SIZES,
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    # full attention first, then sliding
    "qwen3-sliding": {
        **_SIZES,
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "gemma4": {
        **_SIZES,
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 8,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
}

TARGETS = {"llama": "hf", "qwen3": "hf", "qwen3-sliding": "hf", "gemma4": "gemma4-31b"}


def _compiles_host_code(node):
    return node.get_closest_marker("gpu") or node.get_closest_marker("host_code")


@pytest.fixture(scope="module", autouse=True)
def _host_code_of_module(request):
    """Lowering checks its host code and links a stub, also in a module's fixtures; see :mod:`host_code`.

    It shares its kernels with the other lowerings; see :mod:`kernel_cache`.
    """
    if _compiles_host_code(request.node):
        yield
        return
    with checked_host_code(), shared_kernels():
        yield


@pytest.fixture(autouse=True)
def _host_code(request):
    """Tests marked ``gpu`` or ``host_code`` compile it, and their own kernels."""
    if not _compiles_host_code(request.node):
        yield
        return
    with compiled_host_code(), own_kernels():
        yield


@pytest.fixture(scope="session")
def tiny():
    """Fields of a tiny config, by name; the result is a copy that tests may change."""
    return lambda name: copy.deepcopy(TINY[name])


@pytest.fixture(scope="session")
def reference():
    """:func:`sessions.reference_model`."""
    return reference_model


@pytest.fixture(scope="session")
def target_of():
    return TARGETS.__getitem__


VERIFY = ("--verify-window", "5")
MODELS = {
    "gemma": ["--target", "gemma4-31b", "--small", *VERIFY],
    "llama": ["--target", "hf", "--max-prefill-chunk", "512", *VERIFY],
    "gemma-fp32": ["--target", "gemma4-31b", "--small", "--dtype", "float32", *VERIFY],
    "gemma-draft": ["--target", "gemma4-31b", "--chain", "4", "--with-decode"],
    "llama-pt2": ["--target", "hf", "--max-prefill-chunk", "512", "--method", "prefill", "--format", "pt2"],
}
COMMON = ["--random-weights", "--max-seq-len", "4096"]
# An untied head: with random weights, a head tied to the embedding repeats the last token forever.
UNTIED = {**GEMMA4_SMALL, "tie_word_embeddings": False}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CONFIGS = {"llama": LLAMA, "llama-pt2": LLAMA, "gemma-draft": UNTIED}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The folder of an export, by name; ``FLASHPTE_GPU_MODELS`` may hold exports made on a machine without a GPU."""
    made: dict[str, Path] = {}
    given = os.environ.get("FLASHPTE_GPU_MODELS")

    def find(name: str) -> Path:
        if given is not None and (Path(given) / name).is_dir():
            return Path(given) / name
        if name not in made:
            from flashpte.export.cli import main

            folder = tmp_path_factory.mktemp(name)
            config = []
            if name in CONFIGS:
                (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
                config = ["--config", str(folder / "config.json")]
            assert main([*MODELS[name], *config, *COMMON, "--output-dir", str(folder / "out"), "-q"]) == 0
            made[name] = folder / "out"
        return made[name]

    return find


@pytest.fixture(scope="session", name="run_model_process")
def _run_model_process():
    """:func:`run_model_process.run_model_process`."""
    return run_model_process


@pytest.fixture
def run_model(capsys):
    """Calls ``run-model`` in this process."""
    from flashpte.export.cli import run_main

    def call(*arguments):
        capsys.readouterr()
        code = run_main([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return call
