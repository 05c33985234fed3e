"""Deliberately wrong copies of a good export, with manifests that fit them, which ``run-model --check`` must find."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

from flashpte.export.files import pte_contents
from flashpte.export.files.pte_contents import read_ptd
from flashpte.export.lowering import inspect_pte

PTE, PTD = "model.pte", "aoti_cuda_blob.ptd"


def perturb_weight(good: Path, out: Path, name: str = "layers.1.self_attn.o_proj", share: float = 1 / 16) -> Path:
    """Flips the sign of the first elements of the first tensor with ``name`` in its name.

    ``share`` is the fraction of elements to flip; 0 flips one element.
    """
    _copy(good, out)
    path = out / PTD
    content, itemsize = next(
        (bytes(data), _itemsize(out, key)) for key, data in read_ptd(path) if name in key and key.endswith("weight")
    )
    data = bytearray(path.read_bytes())
    assert data.count(content) == 1
    at = data.find(content)
    for element in range(max(1, int(share * len(content) / itemsize))):
        data[at + (element + 1) * itemsize - 1] ^= 0x80  # the sign is the top bit of the last byte
    path.write_bytes(data)
    return _describe_again(out)


def _itemsize(folder: Path, key: str) -> int:
    methods = inspect_pte(folder / PTE).methods.values()
    return next(weight.dtype.itemsize for method in methods for weight in method.weights if weight.key == key)


def unshare_cache(good: Path, out: Path, method: str = "decode", fqn: str = "kv_cache.k_1") -> Path:
    """Gives one method's cache its own name, so that it does not see what other methods write."""
    other = fqn[:-1] + "x"  # the same length as before, because it is a string in compiled code
    _copy(good, out)

    def rename(file):
        plan = next(p for p in file.program.execution_plan if p.name == method)
        payload = file.program.backend_delegate_data[plan.delegates[0].processed.index]
        old = bytes(payload.data)
        # <length> name <length> key; the key, which locates the bytes, stays
        named = len(fqn).to_bytes(4, "little") + fqn.encode()
        assert old.count(named) == 1
        payload.data = old.replace(named, len(fqn).to_bytes(4, "little") + other.encode())
        entry = file.named_data.pte_data[pte_contents._read_payload(old)[0]]
        library = bytes(file.named_data.buffers[entry.buffer_index])
        assert library.count(fqn.encode() + b"\0") >= 1
        buffers = list(file.named_data.buffers)
        buffers[entry.buffer_index] = library.replace(fqn.encode() + b"\0", other.encode() + b"\0")
        file.named_data = dataclasses.replace(file.named_data, buffers=buffers)

    _edit_pte(out / PTE, rename)
    manifest = json.loads((out / "manifest.json").read_text())
    described = manifest["methods"][method]
    described["mutable_buffers"] = sorted(other if name == fqn else name for name in described["mutable_buffers"])
    if "buffers" in described:
        described["buffers"][other] = described["buffers"].pop(fqn)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return _describe_again(out)


def swap_inputs(good: Path, out: Path, method: str = "decode") -> Path:
    """Swaps the two inputs of a method's compiled code."""
    _copy(good, out)

    from executorch.exir.schema import DelegateCall

    def swap(file):
        plan = next(p for p in file.program.execution_plan if p.name == method)
        for instruction in plan.chains[0].instructions:
            if isinstance(instruction.instr_args, DelegateCall):
                args = instruction.instr_args.args
                args[0], args[1] = args[1], args[0]

    _edit_pte(out / PTE, swap)
    return _describe_again(out)


def _edit_pte(path: Path, edit) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    file = deserialize_pte_binary(path.read_bytes())
    edit(file)
    path.write_bytes(bytes(serialize_pte_binary(file, extract_delegate_segments=True)))


def _copy(good: Path, out: Path) -> None:
    shutil.copytree(good, out)
    for path in out.iterdir():
        path.chmod(0o644)


def _describe_again(folder: Path) -> Path:
    """Updates the sizes and hashes in the manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))
    return folder
