"""Output folders appear complete or not at all."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from flashpte.export.files.output_folder import atomic_folder, check_free_space
from flashpte.export.lowering import OutputError, check_output_folder


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
    (output / "manifest.json").write_text(json.dumps({"generator": "flashpte", "files": {"old": {}}}))
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


def test_a_folder_that_appears_during_the_export_is_kept(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(OutputError, match=f"{output} is not empty"), atomic_folder(output):  # noqa: PT012
        output.mkdir()
        (output / "thesis.tex").write_text("precious")
    assert (output / "thesis.tex").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("foreign", ["notes.txt", "logs", "deep/er/notes.txt"])
def test_files_added_to_an_earlier_export_are_kept(tmp_path, foreign):
    output = ours(tmp_path)
    added = output / foreign
    added.parent.mkdir(parents=True, exist_ok=True)
    added.write_text("") if added.suffix else added.mkdir()
    with pytest.raises(OutputError, match=f"holds {foreign.split('/')[0]}, which is not part of the earlier export"):
        check_output_folder(output)
    with pytest.raises(OutputError, match="not part of"), atomic_folder(output):
        pass
    assert added.exists()


def test_a_link_gives_the_result_to_the_folder_it_points_to(tmp_path):
    (tmp_path / "elsewhere" / "target").mkdir(parents=True)
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "elsewhere" / "target")
    check_output_folder(link)
    with atomic_folder(link) as (result, _):
        (result / "new").write_text("")
    assert link.is_symlink()
    assert [p.name for p in (tmp_path / "elsewhere" / "target").iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match=f"is a link to {tmp_path / 'gone'}, which does not exist"):
        check_output_folder(tmp_path / "out")


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"\. is the current folder"):
        check_output_folder(Path("."))


def test_a_mount_point_is_refused():
    with pytest.raises(OutputError, match="is a mount point"):
        check_output_folder(Path("/proc"))


def test_long_names(tmp_path):
    with pytest.raises(OutputError, match=r"cannot use .*: File name too long"):
        check_output_folder(tmp_path / ("x" * 300))
    output = tmp_path / ("x" * 250)  # the name fits, but a longer name derived from it would not
    check_output_folder(output)
    with atomic_folder(output):
        pass
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("during", ["commit", "cleanup"])
def test_ctrl_c_waits_until_everything_is_in_place(tmp_path, monkeypatch, during):
    def interrupted(function):
        def call(*args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            return function(*args, **kwargs)

        return call

    if during == "commit":
        monkeypatch.setattr(Path, "rename", interrupted(Path.rename))
    else:
        monkeypatch.setattr(shutil, "rmtree", interrupted(shutil.rmtree))
    output = ours(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_folder(output) as (result, _):
        (result / "new").write_text("")
    assert [p.name for p in output.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [output]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
