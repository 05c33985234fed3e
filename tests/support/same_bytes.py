"""Shows whether a change of the source leaves the exported files unchanged.

Before the change:  python tests/support/same_bytes.py record before.json
After it:           python tests/support/same_bytes.py compare before.json

``export-model`` exports each case in its own process. Files are compared by their SHA-256. Where they differ, the
machine code of their kernels is compared: the ``.text`` sections of each cubin, which hold neither the kernel's name
nor its source line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from flashpte.export.lowering import inspect_pte

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COMMON = ("--random-weights", "--arch", "sm_90")
GEMMA = ("--target", "gemma4-31b", "--small", *COMMON)
HF = ("--target", "hf", "--config", "CONFIG", *COMMON)
CASES = {
    "demo": (*GEMMA, "--verify-window", "4"),
    "llama": (*HF, "--verify-window", "4"),
    "draft": (*GEMMA, "--chain", "3", "--layers", "2"),
    "demo-pt2": (*GEMMA, "--format", "pt2", "--method", "decode"),
    "llama-pt2": (*HF, "--format", "pt2", "--method", "prefill"),
}
"""Arguments of ``export-model``, by case; CONFIG stands for a file that holds ``LLAMA``."""

Digests = dict[str, dict[str, str]]


def digests(arguments: tuple[str, ...]) -> Digests:
    """SHA-256 of one export's files, and of the machine code of its kernels by method and entry points."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, config = Path(scratch) / "out", Path(scratch) / "config.json"
        config.write_text(json.dumps(LLAMA))
        given = [str(config) if argument == "CONFIG" else argument for argument in arguments]
        program = "import sys; from flashpte.export.cli import main; sys.exit(main())"
        subprocess.run([sys.executable, "-c", program, *given, "--output-dir", str(folder), "--quiet"], check=True)
        files = {path.name: _sha256(path.read_bytes()) for path in sorted(folder.iterdir())}
        return {"files": files, "machine code": dict(_machine_code(folder))}


def _machine_code(folder: Path) -> Iterator[tuple[str, str]]:
    if (folder / "model.pte").exists():
        cubins = [
            (f"{name}: {' '.join(cubin.kernels)}", cubin.data)
            for name, method in inspect_pte(folder / "model.pte").methods.items()
            for cubin in method.library.cubins
        ]
    else:
        with zipfile.ZipFile(folder / "model.pt2") as package:
            names = [name for name in package.namelist() if name.endswith(".cubin")]
            cubins = [("cubin", package.read(name)) for name in names]
    code = sorted((name, _sha256(b"".join(_text_sections(data)))) for name, data in cubins)
    for place, (name, digest) in enumerate(code):
        yield f"{place} {name}", digest


def _text_sections(data: bytes) -> list[bytes]:
    from flashpte.export.files.elf import Elf

    elf = Elf(data)
    contents = [elf.section(section.name) for section in elf.sections if section.name.startswith(".text.")]
    return [content for content in contents if content is not None]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def differences(before: Digests, after: Digests) -> list[str]:
    """One line for each file that differs or, if a kernel differs or is missing, for that kernel."""
    found = []
    for kind in ("files", "machine code"):
        for name in sorted({*before[kind], *after[kind]}):
            if before[kind].get(name) != after[kind].get(name):
                found.append(f"{kind}: {name} differs")
    return found


def main() -> int:
    """Records or compares; returns 0 if all files are the same, or with ``--code-only`` if the machine code is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="digests; record adds to a file that exists")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="this case alone; may be repeated")
    parser.add_argument("--code-only", action="store_true", help="only the machine code has to be the same")
    options = parser.parse_args()
    known = json.loads(options.file.read_text()) if options.file.exists() else {}
    status = 0
    for name in options.case or CASES:
        made = digests(CASES[name])
        if options.action == "record":
            known[name] = made
            options.file.write_text(json.dumps(known, indent=1))
            print(f"{name}: {len(made['files'])} files, {len(made['machine code'])} kernels", flush=True)
            continue
        found = differences(known[name], made)
        counts = any(line.startswith("machine code") for line in found) if options.code_only else bool(found)
        status |= counts
        print(f"{name}: {'the same' if not found else '; '.join(found)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
