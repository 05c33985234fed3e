"""The manifest and the files that it describes are checked before anything is run."""

import json

import pytest
import torch
from model_folder import write_model_folder

from flashpte.export.runtime import Program, ProgramError, open_folder

METHOD = {
    "inputs": [
        {"name": "tokens", "dtype": "int64", "shape": [1, [2, 64]], "dynamic": {"1": "s0"}},
        {"name": "input_pos", "dtype": "int64", "shape": [[2, 64]], "dynamic": {"0": "s0"}},
    ],
    "outputs": [{"name": "logits", "dtype": "bfloat16", "shape": [1, 1, 512]}],
    "mutable_buffers": ["kv_cache.k_0"],
    "buffers": {"kv_cache.k_0": {"dtype": "bfloat16", "shape": [1, 2, 64, 16]}},
}
FILES = {"model.pte": b"not really a program", "aoti_cuda_blob.ptd": bytes(range(200))}


@pytest.fixture
def folder(tmp_path):
    """A folder with files that fit their manifest."""
    return write_model_folder(tmp_path, {"prefill": METHOD}, {"get_max_seq_len": 64}, files=FILES)


def edit(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.update(changes)
    path.write_text(json.dumps(manifest))


def test_a_good_folder(folder):
    stages = []
    opened = open_folder(folder, progress=stages.append)
    assert opened.verified
    assert stages == ["verifying model.pte", "verifying aoti_cuda_blob.ptd"]
    assert (opened.arch, opened.format, opened.model_file.name) == ("sm_90", "pte", "model.pte")
    signature = opened.signatures["prefill"]
    assert signature.inputs[0].shape == (1, (2, 64))
    assert signature.inputs[0].expressions == {1: "s0"}
    assert signature.outputs[0].dtype == torch.bfloat16
    assert signature.mutable_buffers == ("kv_cache.k_0",)
    assert opened.buffers["kv_cache.k_0"]["shape"] == [1, 2, 64, 16]


def test_one_bit_of_a_file(folder):
    data = bytearray(FILES["aoti_cuda_blob.ptd"])
    data[100] ^= 1
    (folder / "aoti_cuda_blob.ptd").write_bytes(data)
    with pytest.raises(ProgramError, match=r"aoti_cuda_blob\.ptd is not the file that manifest\.json describes"):
        open_folder(folder)
    assert not open_folder(folder, unverified=True).verified


@pytest.mark.parametrize(("change", "said"), [(lambda d: d[:-1], "truncated"), (lambda d: d + b"x", "another file")])
def test_another_size(folder, change, said):
    (folder / "model.pte").write_bytes(change(FILES["model.pte"]))
    with pytest.raises(ProgramError, match=rf"model\.pte has \d+ bytes, manifest\.json says 20: {said}"):
        open_folder(folder)
    open_folder(folder, unverified=True)


@pytest.mark.parametrize("unverified", [False, True])
def test_a_missing_file(folder, unverified):
    (folder / "aoti_cuda_blob.ptd").unlink()
    with pytest.raises(ProgramError, match=r"aoti_cuda_blob\.ptd is missing"):
        open_folder(folder, unverified=unverified)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generator": "somebody"}, "was not written by export-model"),
        ({"version": 3}, "has version 3, this flashpte reads 1 and 2"),
        ({"format": "onnx"}, "has format 'onnx'"),
        ({"files": None}, "has no 'files'"),
        ({"files": {}}, "does not list model.pte"),
        ({"files": {"model.pte": {}, "../secret": {}}}, r"names \.\./secret, which is outside"),
        ({"versions": {}}, "does not say which torch"),
        ({"methods": {"prefill": {"inputs": []}}}, "cannot read its methods"),
        ({"methods": {"prefill": {**METHOD, "inputs": [{**METHOD["inputs"][0], "dtype": "float9"}]}}}, "float9"),
    ],
)
def test_a_manifest_that_is_none(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(ProgramError, match=said):
        open_folder(folder)


def test_no_manifest(folder, tmp_path):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ProgramError, match="not valid JSON"):
        open_folder(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ProgramError, match=r"has no manifest\.json: give a folder that export-model wrote"):
        open_folder(folder)
    with pytest.raises(ProgramError, match="does not exist"):
        open_folder(tmp_path / "nowhere")


def test_the_machine_is_asked_before_files_are_read(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stages = []
    with pytest.raises(ProgramError, match=r"no GPU: model\.pte runs on an sm_90 GPU"):
        Program.open(folder, progress=stages.append)
    assert not stages
    edit(folder, versions={"torch": "2.10.0+cu128"})
    with pytest.raises(ProgramError, match=r"compiled with torch 2\.10\.0\+cu128, this is torch"):
        Program.open(folder)


def test_another_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(
        ProgramError, match="compiled for sm_90, but NVIDIA A100 is sm_80: export again with arch=sm_80"
    ):
        Program.open(folder)
