"""Output folders are complete or not there."""

import json
import os
import shutil

import pytest

from flashpte.export.lowering import OutputError, check_output_folder
from flashpte.export.lowering.output import atomic_folder, check_free_space


def test_success_moves_the_result_into_place(tmp_path):
    output = tmp_path / "new" / "out"
    with atomic_folder(output) as (result, scratch):
        assert result.parent.parent == output.parent
        (result / "a").write_text("a")
        (scratch / "b").write_text("b")
        assert not output.exists()
    assert [p.name for p in output.iterdir()] == ["a"]
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path, error):
    output = tmp_path / "out"
    with pytest.raises(error), atomic_folder(output) as (result, _):  # noqa: PT012
        (result / "half").write_text("")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_earlier_export(tmp_path):
    output = ours(tmp_path)
    with pytest.raises(RuntimeError), atomic_folder(output):
        raise RuntimeError
    assert sorted(p.name for p in output.iterdir()) == ["manifest.json", "old"]


def test_success_replaces_the_earlier_export(tmp_path):
    output = ours(tmp_path)
    check_output_folder(output)
    with atomic_folder(output) as (result, _):
        (result / "new").write_text("")
    assert [p.name for p in output.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [output]


def ours(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "manifest.json").write_text(json.dumps({"generator": "flashpte"}))
    (output / "old").write_text("")
    return output


@pytest.mark.parametrize("manifest", [None, "not json", "{}", "[]", '{"generator": "somebody"}'])
def test_a_folder_of_somebody_else_is_refused(tmp_path, manifest):
    (tmp_path / "precious").write_text("")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(OutputError, match="was not written by flashpte"):
        check_output_folder(tmp_path)


def test_an_empty_folder_and_a_new_one_are_fine(tmp_path):
    check_output_folder(tmp_path)
    check_output_folder(tmp_path / "a" / "b")


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_output_folder(file)
    with pytest.raises(OutputError, match="cannot write into"):
        check_output_folder(file / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission"):
        check_output_folder(locked / "out")


def test_a_read_only_parent_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=f"cannot write into {tmp_path}"):
        check_output_folder(tmp_path / "out")


def test_disk_space(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    check_free_space(tmp_path / "not" / "there", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000_000))
    with pytest.raises(OutputError, match=r"not enough disk space at .*: about 122\.0 GB needed, 3\.0 GB free"):
        check_free_space(tmp_path, 122_000_000_000)
