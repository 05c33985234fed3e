"""`export-model` end to end on a machine without a GPU: from a sharded checkpoint of the small Gemma 4 to a .pte.

One process exports prefill for sm_80, then all methods for sm_90 with an EAGLE-3 draft. Its second export must hold
nothing of the first architecture. In ``make test-sweep`` another process repeats the second export in another folder.
The first export's host code is checked and not compiled (tests/support/host_code.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from drafts import draft_tensors, flat_config, write_draft

from flashpte.export.files.fused_weights import parts_of
from flashpte.export.lowering import inspect_pte
from flashpte.export.lowering.self_check import executorch_kernels, find_avx512, find_build_path
from flashpte.export.models.gemma4 import GEMMA4_SMALL

pytestmark = [pytest.mark.lowering, pytest.mark.xdist_group("end to end")]

# Layers of both kinds in every place that the small model's period of 6 has: first, middle and last.
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
LAYERS = len(KINDS)
TAPS = [1, 2, 3]

# arch -> method -> the kernel it must have and the number of its attention nodes
METHODS = {
    "sm_80": {"prefill": ("_tiled_kernel", LAYERS)},
    "sm_90": {
        "prefill": ("_hopper_kernel", LAYERS),
        "target_verify": ("_split_k_kernel", LAYERS),
        "draft_decode": ("_hopper_kernel", 1),
    },
}
COPIES = {"et_copy::_h2d_copy.out", "et_copy::_d2h_copy.out"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder written by `save_pretrained`: bfloat16, several shards, generation config, tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.Gemma4TextConfig.from_dict(
        {**GEMMA4_SMALL, "num_hidden_layers": LAYERS, "layer_types": KINDS}
    )
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1MB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="session")
def draft(tmp_path_factory) -> Path:
    """A draft head for that checkpoint, without its own embedding, in two shards."""
    config = flat_config(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        draft_vocab_size=200,
        eagle_aux_hidden_state_layer_ids=TAPS,
    )
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in draft_tensors(config, target_hidden=256).items()
    }
    return write_draft(tmp_path_factory.mktemp("draft"), config, tensors, shards=2)


# What the `export-model` process does, once for each list of arguments.
PROGRAM = """
import contextlib, json, sys
from flashpte.export.cli import main
sys.path.insert(0, sys.argv[2])
from host_code import checked_host_code
from kernel_cache import shared_kernels
for arguments in json.loads(sys.argv[1]):
    with contextlib.ExitStack() as stack:
        if "sm_80" in arguments:
            stack.enter_context(checked_host_code())
            stack.enter_context(shared_kernels())
        assert main(arguments) == 0
    print(chr(12), end="")
"""
SUPPORT = Path(__file__).parents[1] / "support"


def arguments(checkpoint: Path, draft: Path, out: Path, arch: str) -> list[str]:
    shared = ["--target", "gemma4-31b", "--checkpoint", str(checkpoint), "--max-seq-len", "256"]
    shared += ["--draft", str(draft), "--chain", "3"] if "draft_decode" in METHODS[arch] else ["--method", "prefill"]
    return [*shared, "--arch", arch, "--output-dir", str(out)]


def export(*exports: list[str], cwd: Path, hash_seed: str, **environment: str) -> list[str]:
    """Runs the exports one after another in a separate process; returns what each printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(exports), str(SUPPORT)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\f")[:-1]


@pytest.fixture(scope="session")
def fresh(checkpoint, draft, tmp_path_factory):
    """Exports for sm_90 in a new process; returns the folder and the printed text."""
    out = tmp_path_factory.mktemp("fresh") / "model"
    (printed,) = export(arguments(checkpoint, draft, out, "sm_90"), cwd=out.parent, hash_seed="1")
    return out, printed


@pytest.fixture(scope="session")
def one_after_another(checkpoint, draft, tmp_path_factory):
    """Exports for sm_80 and then sm_90 in one process; returns the folders and the printed text."""
    folders = {
        "sm_80": tmp_path_factory.mktemp("first") / "model",
        "sm_90": tmp_path_factory.mktemp("second") / "a" / "deeper",
    }
    folders["sm_90"].parent.mkdir()
    temporary = tmp_path_factory.mktemp("temporary")
    printed = export(
        *(arguments(checkpoint, draft, out, arch) for arch, out in folders.items()),
        cwd=temporary,
        hash_seed="2",
        TMPDIR=str(temporary),
    )
    return {arch: (out, text) for (arch, out), text in zip(folders.items(), printed, strict=True)}


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def exported(request, one_after_another):
    """An arch, the folder exported for it, and the printed text."""
    return request.param, *one_after_another[request.param]


def test_the_table_names_a_kernel_for_every_attention_node(exported):
    arch, out, printed = exported
    routing = json.loads((out / "manifest.json").read_text())["routing"]
    nodes = {name: len(report["nodes"]) for name, report in routing.items()}
    assert nodes == {name: count for name, (_, count) in METHODS[arch].items()}
    expected = {"prefill": "dispatch", "target_verify": "verify", "draft_decode": "dispatch"}
    ops = {name: {node["op"] for node in report["nodes"]} for name, report in routing.items()}
    assert ops == {name: {f"flashpte::sdpa_{expected[name]}"} for name in METHODS[arch]}
    for report in routing.values():
        for node in report["nodes"]:
            assert node["op"].startswith("flashpte::sdpa_")
            assert node["op"].removeprefix("flashpte::") in printed
    assert list(out.parent.iterdir()) == [out]
    assert {"model.pte", "aoti_cuda_blob.ptd", "manifest.json", "tokenizer.json"} <= {f.name for f in out.iterdir()}


def test_each_method_is_one_library_of_our_kernels_for_the_arch(exported):
    arch, out, _ = exported
    contents = inspect_pte(out / "model.pte")
    assert set(contents.methods) == set(METHODS[arch])
    foreign = executorch_kernels()
    assert foreign
    for name, method in contents.methods.items():
        assert method.delegates == ("CudaBackend",)
        assert set(method.operators) <= COPIES
        kernels = {kernel for cubin in method.library.cubins for kernel in cubin.kernels}
        assert METHODS[arch][name][0] in kernels
        # Both masks are proven, so their maps come from positions; prefill's dynamic length holds verify as well.
        assert {"_classify_intervals_kernel", "_compact_kernel"} <= kernels
        assert "_classify_kernel" not in kernels
        assert "_split_k_kernel" in kernels
        assert not kernels & foreign
        assert {cubin.arch.rstrip("a") for cubin in method.library.cubins} == {arch}
        # A product of many rows is one of Inductor's templates. One of few rows, such as the head's in every method,
        # has a kernel of ours.
        many = any("tem" in cubin.symbol for cubin in method.library.cubins)
        assert many == (name in ("prefill", "draft_decode"))
        assert any(kernel.startswith("_dense_") for kernel in kernels)
        if arch == "sm_90":  # compiled, and not only checked
            assert find_avx512(method.library.data) is None


def held_by(out: Path, contents: Any, method: str) -> dict[str, torch.Tensor]:
    """The tensors of a method by name, with the parts of fused ones."""
    fused = json.loads((out / "manifest.json").read_text())["fused_weights"]
    held = {entry.fqn: contents.weight(method, entry.fqn) for entry in contents.methods[method].weights}
    return parts_of(held, {name: sizes for name, sizes in fused.items() if name in held})


def test_weights_are_the_checkpoints_bytes(exported, checkpoint):
    from safetensors import safe_open

    _, out, _ = exported
    contents = inspect_pte(out / "model.pte")
    held = [held_by(out, contents, method) for method in contents.methods]
    seen = set()
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safe_open is not a mapping)
                expected = tensors.get_tensor(name)
                for weights in held:
                    if f"model.{name}" in weights:
                        assert torch.equal(weights[f"model.{name}"], expected), name
                        seen.add(name)
    everything = {n for shard in checkpoint.glob("*.safetensors") for n in safe_open(shard, "pt").keys()}  # noqa: SIM118
    assert seen == everything


def test_caches_are_shared_by_name(exported):
    _, out, _ = exported
    contents = inspect_pte(out / "model.pte")
    caches = {
        name: {(e.fqn, e.shape) for e in method.weights if e.fqn.startswith("kv_cache.")}
        for name, method in contents.methods.items()
    }
    assert len(caches["prefill"]) == 2 * LAYERS
    own = caches.pop("draft_decode", set())
    assert not own
    assert all(held == caches["prefill"] for held in caches.values())
    drafts = {
        name: {e.fqn for e in method.weights if e.fqn.startswith("draft_cache.")}
        for name, method in contents.methods.items()
    }
    assert {name: held for name, held in drafts.items() if held} == (
        {"draft_decode": {"draft_cache.k_0", "draft_cache.v_0"}} if "draft_decode" in drafts else {}
    )
    mutable = json.loads(contents.constant_methods["get_mutable_buffer_metadata"])["mutable_buffers"]
    assert set(mutable) == {fqn for fqn, _ in caches["prefill"]} | drafts.get("draft_decode", set())


@pytest.mark.parametrize("exported", ["sm_90"], indirect=True)
def test_a_draft_shares_the_targets_embedding_and_keeps_its_own_weights(exported, draft):
    from safetensors import safe_open

    _, out, _ = exported
    contents = inspect_pte(out / "model.pte")
    held = {name: held_by(out, contents, name) for name in contents.methods}
    embedding = "model.model.embed_tokens.weight"
    target = {fqn for fqn in held["draft_decode"] if fqn.startswith(("model.", "kv_cache.", "feature_fusion."))}
    assert target == {embedding}
    assert all(embedding in names for names in held.values())
    seen = set()
    for shard in draft.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safe_open is not a mapping)
                ours = f"draft.{name.replace('midlayer.', 'layer.')}".replace("draft.fc.", "feature_fusion.fc.")
                for method in (method for method, names in held.items() if ours in names):
                    assert torch.equal(held[method][ours], tensors.get_tensor(name)), name
                    seen.add((method, name))
    fused = {(method, "fc.weight") for method in ("prefill", "target_verify")}
    unused = {"fc.weight", "t2d"}
    names = {n for shard in draft.glob("*.safetensors") for n in safe_open(shard, "pt").keys()}  # noqa: SIM118
    assert seen == fused | {("draft_decode", name) for name in names - unused}


@pytest.mark.parametrize("exported", ["sm_90"], indirect=True)
def test_a_runner_finds_what_it_must_know(exported):
    _, out, _ = exported
    constants = inspect_pte(out / "model.pte").constant_methods
    manifest = json.loads((out / "manifest.json").read_text())
    wanted = {
        "get_chain_len": 3,
        "get_verify_window": 4,
        "get_min_prefill_chunk": 2,
        "get_max_prefill_chunk": 64,
        "get_min_draft_tokens": 1,
        "get_max_draft_tokens": 64,
        "get_feature_size": 256,
        "get_draft_vocab_size": 200,
        "get_max_seq_len": 256,
        "get_vocab_size": 512,
        "get_prefill_logits": "last",
        "get_target_verify_logits": "all",
    }
    assert {name: constants[name] for name in wanted} == wanted
    assert manifest["constant_methods"]["get_taps"] == manifest["draft"]["taps"] == TAPS
    draft = manifest["methods"]["draft_decode"]
    assert [tensor["shape"] for tensor in draft["inputs"]] == [[1, [1, 64]], [1, [1, 64], 256], [[1, 64]]]
    assert [tensor["shape"] for tensor in draft["outputs"]] == [[1, 1], [1, 1, 256]]


def test_the_manifest_describes_the_files(exported):
    arch, out, _ = exported
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["arch"] == arch
    assert set(manifest["files"]) == {f.name for f in out.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        data = (out / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    for file in out.iterdir():
        assert find_build_path(file.read_bytes()) is None, file.name


@pytest.mark.sweep
def test_the_same_input_gives_the_same_bytes(fresh, one_after_another):
    """The bytes are equal in another folder, with another hash seed and after another arch in the same process."""
    (out, _), (again, _) = fresh, one_after_another["sm_90"]
    assert {f.name: f.read_bytes() for f in again.iterdir()} == {f.name: f.read_bytes() for f in out.iterdir()}


@pytest.mark.sweep
def test_entries_in_fresh_processes_give_the_same_bytes(checkpoint, draft, fresh, tmp_path):
    """Each method is compiled in a process of its own, in another folder, with another hash seed and no weights."""
    flags, plan = arguments(checkpoint, draft, tmp_path / "model", "sm_90"), tmp_path / "plan.json"
    export([*flags, "--plan", str(plan)], cwd=tmp_path, hash_seed="3")
    for number, entry in enumerate(json.loads(plan.read_text())["entries"]):
        export(entry["run"][1:], cwd=tmp_path, hash_seed=str(4 + number))
    out, _ = fresh
    assert {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()} == {
        f.name: f.read_bytes() for f in out.iterdir()
    }
