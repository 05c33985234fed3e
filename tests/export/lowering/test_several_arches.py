"""One call that lowers for several architectures: a folder for each, and the weights on the disk once."""

import json

import pytest
import torch

from flashpte.export.common import cpus
from flashpte.export.common.errors import ExportError, ProgramError
from flashpte.export.files.model_folder import open_folder
from flashpte.export.files.output_folder import OutputError, check_output_folder
from flashpte.export.lowering import LoweredModel, inspect_pte, lower
from flashpte.export.lowering.several_arches import lower_for_each

pytestmark = [pytest.mark.lowering, pytest.mark.xdist_group("several_arches")]


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64))

    def forward(self, x):
        return torch.relu(x @ self.weight) * 2


@pytest.fixture(scope="module")
def program():
    return torch.export.export(Layer(), (torch.ones(4, 64),))


def lowering(program):
    return lambda arch, folder, progress: lower({"forward": program}, output_dir=folder, arch=arch, progress=progress)


@pytest.fixture(scope="module")
def alone(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "out"
    return lower({"forward": program}, output_dir=folder, arch="sm_90")


@pytest.fixture(scope="module", params=["one after the other", "side by side"])
def exported(request, program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arches") / "out"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpus, "usable_cpus", lambda: 1 if request.param == "one after the other" else 4)
        models = lower_for_each(lowering(program), ("sm_80", "sm_90"), folder, lines.append)
    return folder, models, lines


def test_each_folder_is_an_export_of_its_own(exported, alone):
    folder, models, lines = exported
    assert sorted(path.name for path in folder.iterdir()) == ["sm_80", "sm_90"]
    for model in models:
        assert model.folder == folder / model.arch
        assert open_folder(model.folder).arch == model.arch
        (method,) = inspect_pte(model.model).methods.values()
        assert {cubin.arch for cubin in method.library.cubins} == {model.arch}
        assert any(line.startswith(f"{model.arch}: compiling") for line in lines)
    assert alone.manifest == models[1].manifest


def test_weights_are_on_the_disk_once(exported):
    folder, _, _ = exported
    first, second = (folder / arch / "aoti_cuda_blob.ptd" for arch in ("sm_80", "sm_90"))
    assert first.samefile(second)
    assert first.stat().st_nlink == 2
    assert not (folder / "sm_80/model.pte").samefile(folder / "sm_90/model.pte")


def test_the_folder_is_replaced_by_the_next_export_but_not_with_foreign_files(exported):
    folder, _, _ = exported
    check_output_folder(folder)
    for name, refused in (
        ("notes.txt", r"was not written by flashpte|holds notes.txt"),
        ("sm_80/notes.txt", r"holds sm_80/notes.txt"),
    ):
        (folder / name).write_text("mine")
        with pytest.raises(OutputError, match=refused):
            check_output_folder(folder)
        (folder / name).unlink()


def test_what_a_killed_process_leaves_is_not_in_the_result(tmp_path):
    def leaves_a_folder(arch, folder, progress):
        (folder.parent / ".flashpte-left").mkdir(exist_ok=True)
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
        return LoweredModel(folder, folder / "m", None, folder / "manifest.json", arch, (), {"files": {}})

    lower_for_each(leaves_a_folder, ("sm_80", "sm_90"), tmp_path / "out", methods=100)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sm_80", "sm_90"]


def test_running_the_whole_folder_names_its_parts(exported):
    folder, _, _ = exported
    with pytest.raises(ProgramError, match=rf"no manifest.json: give one of {folder}/sm_80, {folder}/sm_90"):
        open_folder(folder)


@pytest.mark.parametrize("cores", [1, 4])
def test_an_error_leaves_nothing(program, tmp_path, monkeypatch, cores):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: cores)

    def fail_for_sm_90(arch, folder, progress):
        if arch == "sm_90":
            raise ExportError("no luck")
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps({}))

    with pytest.raises(ExportError, match="no luck"):
        lower_for_each(fail_for_sm_90, ("sm_80", "sm_90"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
