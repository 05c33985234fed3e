"""Prepares the files of a ``.pt2``: gives them fixed names and removes everything that names the build machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

# Names that PyTorch's loader looks for: it derives the metadata's name from the source's, and runs the library.
_LIBRARY, _SOURCE, _METADATA = "model.wrapper.so", "model.wrapper.cpp", "model.wrapper_metadata.json"
_WEIGHTS = "model.wrapper_weights.blob"


def tidy_package_files(files: Iterable[str]) -> list[str]:
    """Renames the files that AOTInductor generated and drops contents that name the build machine.

    File names are hashes of command lines, and the generated sources end with those command lines. A package needs the
    library, its weights and its metadata; the loader only requires that a source with the right name exists.

    Args:
        files: paths as AOTInductor returns them.

    Returns:
        Paths of the files to package, in a fixed order.
    """
    found = {".".join(Path(file).name.split(".")[1:]): Path(file) for file in files}
    library = found["wrapper.so"]
    tidy = [library.rename(library.with_name(_LIBRARY))]
    if "wrapper_weights.blob" in found:
        weights = found["wrapper_weights.blob"]
        tidy.append(weights.rename(weights.with_name(_WEIGHTS)))
    metadata = json.loads(found["wrapper_metadata.json"].read_text())
    metadata.pop("AOTI_CPU_ISA", None)  # the loader warns if it differs, but the host code runs on any
    described = library.with_name(_METADATA)
    described.write_text(json.dumps(metadata, sort_keys=True))
    source = library.with_name(_SOURCE)
    source.write_text("// The library beside this file was compiled from generated code.\n")
    return [str(path) for path in (*tidy, described, source)]
