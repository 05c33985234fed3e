"""The wheel holds exactly the repository's modules and works from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.xdist_group("wheel")

ROOT = Path(__file__).parent.parent
ROOMS = ("passes", "kernels", "export")


def repository_files(*folders: str) -> list[str]:
    command = ["git", "ls-files", "-co", "--exclude-standard", *folders]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # From a copy: building leaves a build/ folder, and a stale one would put deleted modules into the wheel.
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source], check=True
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel]
    subprocess.run(command, check=True)
    return folder


def test_the_wheel_holds_what_git_knows(wheel):
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *ROOMS, "package"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {f"flashpte/{f}" if not f.startswith("package/") else f"flashpte/{f[8:]}" for f in listed.stdout.split()}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_wheel_works_from_another_folder(site, tmp_path):
    code = "import flashpte.passes, flashpte.export.cli as cli; print(flashpte.__file__); cli.main(['--list-targets'])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    assert "gemma4-31b" in done.stdout


def core_distributions() -> set[str]:
    """What ``pip install flashpte`` installs without an extra: the dependencies, and theirs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pending, found = [Requirement(line) for line in project["dependencies"]], set()
    while pending:
        requirement = pending.pop()
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            known = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # a build of PyTorch for CPUs has no CUDA packages
        found.add(requirement.name)
        pending += [Requirement(line) for line in known.requires or ()]
    return found


def test_passes_and_kernels_import_where_the_core_alone_is_installed(site, tmp_path):
    core = tmp_path / "site"
    shutil.copytree(site, core)
    for name in core_distributions():
        files = metadata.distribution(name).files or ()
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (core / top).exists():
                (core / top).symlink_to(metadata.distribution(name).locate_file(top))
    code = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
absent = ["executorch", "transformers", "safetensors", "rich"]
assert not [name for name in absent if importlib.util.find_spec(name)], "the environment is not empty"
import torch, flashpte.kernels, flashpte.passes
q, k, v = (torch.zeros(1, 4, 20, 16) for _ in range(3))
class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
program, report = flashpte.passes.replace_sdpa(torch.export.export(Attention(), (q, k, v)))
print([node.op for node in report.nodes])
from flashpte.export.cli import main
sys.exit(main(["--list-targets"]))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", code, core], capture_output=True, text=True
    )
    assert done.stdout == "['flashpte::sdpa_prefill']\n", done.stderr
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'flashpte[export]'"), done.stderr
