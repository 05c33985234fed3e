"""`export-model` for real, on a machine without a GPU: a sharded checkpoint of the small Gemma 4 in, a .pte out.

Each export is a process of its own, as a user starts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from flashpte.export.lowering import inspect_pte
from flashpte.export.lowering.self_check import executorch_kernels, find_avx512, find_build_path
from flashpte.export.models.gemma4 import GEMMA4_SMALL

pytestmark = pytest.mark.lowering

METHODS = {"prefill": "_tiled_kernel", "decode": "_split_k_kernel", "target_verify": "_split_k_kernel"}
COPIES = {"et_copy::_h2d_copy.out", "et_copy::_d2h_copy.out"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder written by `save_pretrained`: bfloat16, several shards, generation config, tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.Gemma4TextConfig.from_dict(dict(GEMMA4_SMALL))
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1MB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def export(checkpoint: Path, out: Path, arch: str, hash_seed: str = "1") -> subprocess.CompletedProcess:
    arguments = ["--target", "gemma4-31b", "--checkpoint", checkpoint, "--max-seq-len", "256", "--verify-window", "4"]
    code = "import sys; from flashpte.export.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments, "--arch", arch, "--output-dir", out],
        capture_output=True,
        text=True,
        cwd=out.parent,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )


ARCHS = [pytest.param(arch, marks=pytest.mark.xdist_group(arch)) for arch in ("sm_80", "sm_90")]


@pytest.fixture(scope="module", params=ARCHS)
def exported(request, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "model"
    done = export(checkpoint, out, request.param)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, out, done


def test_the_table_names_a_kernel_for_every_attention_node(exported):
    _, out, done = exported
    routing = json.loads((out / "manifest.json").read_text())["routing"]
    assert {name: len(report["nodes"]) for name, report in routing.items()} == dict.fromkeys(METHODS, 6)
    for report in routing.values():
        for node in report["nodes"]:
            assert node["op"].startswith("flashpte::sdpa_")
            assert node["module_path"] in done.stdout
    assert list(out.parent.iterdir()) == [out]
    assert {"model.pte", "aoti_cuda_blob.ptd", "manifest.json", "tokenizer.json"} <= {f.name for f in out.iterdir()}


def test_each_method_is_one_library_of_our_kernels_for_the_arch(exported):
    arch, out, _ = exported
    contents = inspect_pte(out / "model.pte")
    assert set(contents.methods) == set(METHODS)
    foreign = executorch_kernels()
    assert foreign
    for name, method in contents.methods.items():
        assert method.delegates == ("CudaBackend",)
        assert set(method.operators) <= COPIES
        kernels = {kernel for cubin in method.library.cubins for kernel in cubin.kernels}
        hopper = name == "prefill" and arch == "sm_90"
        assert ("_tiled_hopper_kernel" if hopper else METHODS[name]) in kernels
        # Both masks are proven: their maps come from positions, and prefill, of dynamic length, holds verify as well.
        assert {"_classify_intervals_kernel", "_compact_kernel"} <= kernels
        assert "_classify_kernel" not in kernels
        assert "_split_k_kernel" in kernels
        assert not kernels & foreign
        assert {cubin.arch.rstrip("a") for cubin in method.library.cubins} == {arch}
        assert find_avx512(method.library.data) is None


def test_weights_are_the_checkpoints_bytes(exported, checkpoint):
    from safetensors import safe_open

    _, out, _ = exported
    contents = inspect_pte(out / "model.pte")
    seen = set()
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safe_open is not a mapping)
                expected = tensors.get_tensor(name)
                for method in contents.methods.values():
                    if any(entry.fqn == f"model.{name}" for entry in method.weights):
                        assert torch.equal(contents.weight(method.name, f"model.{name}"), expected), name
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
    assert len(caches["prefill"]) == 12
    assert caches["prefill"] == caches["decode"] == caches["target_verify"]
    mutable = json.loads(contents.constant_methods["get_mutable_buffer_metadata"])["mutable_buffers"]
    assert set(mutable) == {fqn for fqn, _ in caches["prefill"]}


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


@pytest.mark.parametrize("exported", ARCHS[1:], indirect=True)
def test_the_same_input_gives_the_same_bytes(exported, checkpoint, tmp_path):
    arch, out, _ = exported
    again = tmp_path / "elsewhere"
    assert export(checkpoint, again, arch, hash_seed="2").returncode == 0
    assert {f.name: f.read_bytes() for f in again.iterdir()} == {f.name: f.read_bytes() for f in out.iterdir()}
