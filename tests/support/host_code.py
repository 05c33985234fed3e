"""Checks the host code of lowered programs without compiling it, because g++ takes most of a small lowering's time.

AOTInductor writes one C++ file per method. g++ spends four fifths of its time on optimizing what PyTorch's headers
bring along, which is the same for every program. Inside :func:`checked_host_code` g++ still parses each file and
instantiates its templates, so wrong C++ still fails. The object file that gets linked is a stub: it has AOTInductor's
entry points and refers to the functions of libtorch that the file calls, so a function that ExecuTorch lacks is still
refused. Tests of the library itself (its instructions, equal bytes, running it) need the real thing:
``@pytest.mark.host_code``, or :func:`compiled_host_code` in a fixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from shared_folders import shared_folder

from flashpte.export.lowering.cross_compile.toolchain import ReproducibleFlags, find_compiler

HEADERS = "FLASHPTE_TEST_HEADERS"
"""Variable of the environment with the folder of precompiled headers, which all processes of a test run share."""

_COMPILE = ReproducibleFlags.rewrite
_ENTRY_POINTS = ("CreateWithDevice", "Delete", "GetNumInputs", "GetNumOutputs", "Run")


@contextlib.contextmanager
def checked_host_code() -> Iterator[None]:
    """Inside, lowering in this process checks each method's host code and links a stub in its place."""
    _folder()  # made here, because lowering compiles methods in processes of their own

    def check_only(self: ReproducibleFlags, command_line: str) -> str:
        return _check_only(_COMPILE(self, command_line))

    with mock.patch.object(ReproducibleFlags, "rewrite", check_only):
        yield


@contextlib.contextmanager
def compiled_host_code() -> Iterator[None]:
    """Inside, lowering compiles host code as users do, also inside of :func:`checked_host_code`."""
    with mock.patch.object(ReproducibleFlags, "rewrite", _COMPILE):
        yield


def _check_only(command_line: str) -> str:
    """The command to run instead of one that compiles a method's host code; any other command as it is."""
    words, compiler = shlex.split(command_line), find_compiler()
    arguments = words[len(compiler) :]
    source = next((word for word in arguments if word.endswith(".wrapper.cpp") and not word.startswith("-")), None)
    if source is None or "-c" not in arguments:
        return command_line
    output = arguments[arguments.index("-o") + 1]
    flags = [word for word in arguments if word not in (source, output, "-c", "-o")]
    headers = _precompiled(_includes(source), tuple(flags))
    check = shlex.join([*compiler, "-include", headers, *flags, "-fsyntax-only", source])
    stub = Path(source).with_suffix(".stub.c")
    stub.write_text(_stub(Path(source).read_text()))
    compile_stub = shlex.join([*compiler, "-c", "-fPIC", "-x", "c", str(stub), "-o", output])
    return shlex.join(["sh", "-c", f"{check} && {compile_stub}"])


def _includes(source: str) -> str:
    lines = Path(source).read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if line.startswith("#include"))


def _precompiled(text: str, flags: tuple[str, ...]) -> str:
    """A header that includes ``text``'s headers, precompiled once per set of flags; processes share it."""
    matter = [flag for flag in flags if not flag.startswith(("-I", "-L", "-ffile-prefix-map"))]
    key = hashlib.sha256("\0".join([text, *matter]).encode()).hexdigest()[:16]
    header = _folder() / f"headers-{key}.h"
    if not Path(f"{header}.gch").exists():
        header.write_text(text)
        with tempfile.TemporaryDirectory(dir=_folder()) as own:  # another process may compile the same
            command = [*find_compiler(), *flags, "-x", "c++-header", str(header), "-o", f"{own}/headers.gch"]
            subprocess.run(command, check=True, capture_output=True)
            os.replace(f"{own}/headers.gch", f"{header}.gch")
    return str(header)


def _stub(source: str) -> str:
    """C source of the stub for a method's host code."""
    called = sorted(set(re.findall(r"\baoti_torch_\w+(?=\()", source)))
    return "".join(
        (
            *(f"int AOTInductorModelContainer{name}(void) {{ return 0; }}\n" for name in _ENTRY_POINTS),
            *(f"void {name}(void);\n" for name in called),
            f"void (*const called[])(void) = {{{', '.join(called) or '0'}}};\n",
        )
    )


def _folder() -> Path:
    return shared_folder(HEADERS)
