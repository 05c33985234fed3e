"""One program to ``model.pt2``, a plain AOTInductor package that PyTorch loads without ExecuTorch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from flashpte.export.lowering.cross_compile.host_weights import deepcopy_sharing_tensors
from flashpte.passes.graph.vmap import without_vmap

PT2_NAME = "model.pt2"

# What PyTorch's loader looks for: it takes the metadata's name from the source's, and runs the library.
_LIBRARY, _SOURCE, _METADATA = "model.wrapper.so", "model.wrapper.cpp", "model.wrapper_metadata.json"
_WEIGHTS = "model.wrapper_weights.blob"


def write_pt2(program: ExportedProgram, folder: Path) -> Path:
    """Compiles ``program`` and writes ``model.pt2`` with its weights inside, once.

    Must run inside :func:`~flashpte.export.lowering.cross_compile.cross_compile` with ``package="pt2"``.
    """
    import torch._inductor
    from torch.export.passes import move_to_device_pass
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Metadata of nodes inside of a vmap cannot be copied.
    program = move_to_device_pass(deepcopy_sharing_tensors(without_vmap(program), {}), "cuda")
    path = folder / PT2_NAME
    options: dict[str, Any] = {
        "aot_inductor.embed_kernel_binary": True,  # else the package would refer to kernels by file name
        "aot_inductor.emit_multi_arch_kernel": False,
    }
    if program.state_dict or program.constants:
        # Inside the library, constants are limited to 2 GB when the program writes to a buffer. But a file of none is
        # one that the loader cannot map.
        options |= {
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.package_constants_on_disk_format": "binary_blob",
        }
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    return path


def tidy_package_files(files: Iterable[str]) -> list[str]:
    """Renames what AOTInductor generated and leaves out what names the build machine.

    File names are hashes of command lines, and the generated sources end with those command lines. A package
    needs the library, its weights and its metadata; the loader only asks that a source of the right name exists.

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
    metadata.pop("AOTI_CPU_ISA", None)  # the loader warns when it differs; the host code runs on any
    described = library.with_name(_METADATA)
    described.write_text(json.dumps(metadata, sort_keys=True))
    source = library.with_name(_SOURCE)
    source.write_text("// The library beside this file was compiled from generated code.\n")
    return [str(path) for path in (*tidy, described, source)]
