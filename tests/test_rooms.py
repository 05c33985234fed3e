"""The rooms of the package and their imports: no room imports one above its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import rooms


@pytest.fixture
def tree(tmp_path):
    """Makes a package of the given files, by path below ``export/``."""

    def make(**sources):
        for folder in ("kernels", "passes", "export"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "__init__.py").write_text("")
        for name, source in sources.items():
            path = tmp_path / "export" / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name("__init__.py").write_text("")
            path.write_text(source)
        return tmp_path

    return make


def test_no_arrow_goes_up():
    assert rooms.upward(rooms.arrows()) == []


def test_every_module_has_a_room():
    assert rooms.homeless() == []


def test_the_picture_in_the_docs_is_up_to_date():
    page = rooms.PAGE.read_text()
    drawn = rooms.page_with_picture(page, rooms.picture(rooms.arrows()))
    assert drawn == page, "run: python tests/support/rooms.py"


@pytest.mark.parametrize(
    "line",
    [
        "from flashpte.export.cli.flags import parse",
        "import flashpte.export.cli.flags",
        "from flashpte.export.cli import flags",
        "def late():\n    from flashpte.export.cli.flags import parse",
        "if TYPE_CHECKING:\n    from flashpte.export.cli.flags import parse",
    ],
)
def test_an_arrow_up_is_found(tree, line):
    root = tree(models__methods=line, cli__flags="from flashpte.export.models.methods import plan")
    (found,) = rooms.upward(rooms.arrows(root))
    assert found == "flashpte.export.models.methods imports flashpte.export.cli.flags"


def test_a_module_without_a_room_is_found(tree):
    root = tree(stray="import os", empty__nothing="import os")
    assert rooms.homeless(root) == ["flashpte.export.empty.nothing", "flashpte.export.stray"]


def test_a_subpackage_is_a_room_of_its_own(tree):
    root = tree(lowering__api="", lowering__cross_compile__overrides="from flashpte.export.lowering.api import lower")
    (found,) = rooms.upward(rooms.arrows(root))
    assert "cross_compile.overrides imports flashpte.export.lowering.api" in found


def test_every_room_of_the_table_exists():
    known = {rooms.room_of(name) for name in rooms.modules()}
    assert set(rooms.ROOMS) <= known
    assert Path(rooms.PAGE).is_file()
