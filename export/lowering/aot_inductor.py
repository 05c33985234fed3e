"""Lowers one program to ``model.pt2``, a plain AOTInductor package that PyTorch loads without ExecuTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from flashpte.export.files.names import PT2_NAME
from flashpte.export.lowering.cross_compile.host_weights import deepcopy_sharing_tensors
from flashpte.passes.graph.vmap import without_vmap


def write_pt2(program: ExportedProgram, folder: Path) -> Path:
    """Compiles ``program`` and writes ``model.pt2``, which holds the weights once.

    Must run inside :func:`~flashpte.export.lowering.cross_compile.cross_compile` with ``package="pt2"``.
    """
    import torch._inductor
    from torch.export.passes import move_to_device_pass
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Metadata of nodes inside a vmap cannot be copied.
    program = move_to_device_pass(deepcopy_sharing_tensors(without_vmap(program), {}), "cuda")
    path = folder / PT2_NAME
    options: dict[str, Any] = {
        "aot_inductor.embed_kernel_binary": True,  # otherwise the package names kernels by file
        "aot_inductor.emit_multi_arch_kernel": False,
    }
    if program.state_dict or program.constants:
        # Constants inside the library are limited to 2 GB when the program writes to a buffer. Without constants there
        # must be no file, because the loader cannot map an empty one.
        options |= {
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.package_constants_on_disk_format": "binary_blob",
        }
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    return path
