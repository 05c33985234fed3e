"""Lowers programs to ``model.pte`` and ``aoti_cuda_blob.ptd`` with ExecuTorch's CUDA backend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from flashpte.export.common.options import Attention
from flashpte.export.files.names import PTE_NAME
from flashpte.export.lowering.mutated_buffers import mutated_buffers
from flashpte.export.lowering.prepare import prepare_pte

MUTABLE_BUFFER_METADATA = "get_mutable_buffer_metadata"


def mutable_buffer_metadata(programs: Mapping[str, ExportedProgram]) -> str:
    """The JSON that ExecuTorch's runners read to share buffers between sessions."""
    return json.dumps(
        {"version": 1, "mutable_buffers": list(mutated_buffers(programs.values()))}, separators=(",", ":")
    )


def _backend_config(device_tensors: bool) -> Any:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.propagate_device_pass import PropagateDeviceConfig

    if not device_tensors:
        return ExecutorchBackendConfig(emit_mutable_buffer_names=True)
    return ExecutorchBackendConfig(
        emit_mutable_buffer_names=True,
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
        propagate_device_config=PropagateDeviceConfig(
            skip_h2d_for_method_inputs=True, skip_d2h_for_method_outputs=True
        ),
    )


def write_pte(
    programs: Mapping[str, ExportedProgram],
    folder: Path,
    attention: Attention,
    constant_methods: Mapping[str, Any],
    device_tensors: bool = False,
) -> list[Path]:
    """Lowers all methods in one call and writes the files; methods share weights and buffers by FQN.

    Must run inside :func:`~flashpte.export.lowering.cross_compile.cross_compile`.

    Args:
        programs: methods by name.
        folder: folder for ``model.pte`` and ``aoti_cuda_blob.ptd`` (no ``.ptd`` when there are no weights).
        attention: with ``executorch``, ExecuTorch's own Triton kernels replace SDPA nodes (and top-k).
        constant_methods: values of methods that return a constant.
        device_tensors: inputs and outputs of methods are in GPU memory. The program then neither copies them nor plans
            memory for inputs, so a caller's input can be an earlier call's output.

    Returns:
        Paths of the files, sorted.
    """
    from executorch.backends.cuda.cuda_backend import CudaBackend
    from executorch.backends.cuda.cuda_partitioner import CudaPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    specs = [
        # Pointwise and reduction kernels use the configuration from Inductor's heuristics instead of compiling every
        # candidate; matrix multiplies still choose among templates.
        CompileSpec("max_autotune", b"OFF"),
        CompileSpec("triton_kernel_mode", b"ON" if attention == "executorch" else b"OFF"),
    ]
    partitioner = {
        name: [CudaPartitioner([CudaBackend.generate_method_name_compile_spec(name), *specs])] for name in programs
    }
    edge = to_edge_transform_and_lower(
        {name: prepare_pte(program) for name, program in programs.items()},
        partitioner=partitioner,
        # The CUDA backend takes ATen operators and has no kernels for dim-order variants of copies.
        # The verifier is for backends with one kernel per operator, and refuses ``split``, ``sum`` and powers of a
        # length. AOTInductor compiles any operator, and ExecuTorch's own CUDA exports turn the verifier off too.
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=dict(constant_methods),
    )
    manager = edge.to_executorch(_backend_config(device_tensors))
    pte = folder / PTE_NAME
    with pte.open("wb") as file:
        manager.write_to_file(file)
    manager.write_tensor_data_to_file(str(folder))
    return sorted(path for path in folder.iterdir() if path.suffix in (".pte", ".ptd"))
