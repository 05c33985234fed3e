"""The functions that a library inside a ``.pte`` may import from ExecuTorch's runtime.

AOTInductor's libraries call into libtorch through a C interface. ExecuTorch has no libtorch; its CUDA backend
defines the part of that interface listed here (``backends/aoti/common_shims_slim.h`` and
``backends/cuda/runtime/shims`` of ExecuTorch 1.5). A library that needs more would fail to load on the user's machine,
so lowering refuses it.
"""

from __future__ import annotations

import torch

from flashpte.export.files.dtypes import dtype_name

_SHIMS = frozenset(
    """
    aoti_torch__reinterpret_tensor aoti_torch_assign_tensors_out aoti_torch_check aoti_torch_clone
    aoti_torch_clone_preserve_strides aoti_torch_copy_ aoti_torch_create_cuda_guard
    aoti_torch_create_cuda_stream_guard aoti_torch_create_tensor_from_blob
    aoti_torch_create_tensor_from_blob_v2 aoti_torch_cuda__weight_int4pack_mm aoti_torch_cuda_guard_set_index
    aoti_torch_cuda_int4_plain_mm aoti_torch_cuda_int5_plain_mm aoti_torch_cuda_int6_plain_mm
    aoti_torch_cuda_int8_plain_mm aoti_torch_cuda_rand aoti_torch_cuda_randint_low_out
    aoti_torch_cuda_sort_stable aoti_torch_delete_cuda_guard aoti_torch_delete_cuda_stream_guard
    aoti_torch_delete_tensor_object aoti_torch_device_type_cpu aoti_torch_device_type_cuda
    aoti_torch_dtype_bfloat16 aoti_torch_dtype_bool aoti_torch_dtype_float16
    aoti_torch_dtype_float32 aoti_torch_dtype_int16 aoti_torch_dtype_int32 aoti_torch_dtype_int64
    aoti_torch_dtype_int8 aoti_torch_dtype_uint8 aoti_torch_empty_strided aoti_torch_get_current_cuda_stream
    aoti_torch_get_data_ptr aoti_torch_get_device_index aoti_torch_get_device_type aoti_torch_get_dim
    aoti_torch_get_dtype aoti_torch_get_numel aoti_torch_get_sizes aoti_torch_get_storage_offset
    aoti_torch_get_storage_size aoti_torch_get_strides aoti_torch_grad_mode_is_enabled
    aoti_torch_grad_mode_set_enabled aoti_torch_item_bool aoti_torch_layout_strided
    aoti_torch_new_tensor_handle aoti_torch_warn
    """.split()  # noqa: SIM905 (a page of names reads better without quotes)
)

# PyTorch's headers refer to these in functions that ExecuTorch's runtime never calls. Libraries are linked and loaded
# with lazy binding.
_NEVER_CALLED = frozenset({"aoti_torch_empty_strided_pinned"})  # 2.15: staging of weights from host memory


def missing_shims(undefined: frozenset[str]) -> tuple[str, ...]:
    """Undefined symbols of libtorch that ExecuTorch's runtime does not define and libraries may call; sorted."""
    return tuple(sorted(name for name in undefined if _is_torch(name) and name not in _SHIMS | _NEVER_CALLED))


def has_dtype(dtype: torch.dtype) -> bool:
    """Whether ExecuTorch's CUDA delegate supports ``dtype`` (``slim/c10/core/ScalarType.h`` lists the same dtypes)."""
    return f"aoti_torch_dtype_{dtype_name(dtype)}" in _SHIMS


def _is_torch(name: str) -> bool:
    # C++ names of libtorch are mangled with their namespaces: c10, at, torch.
    return name.startswith(("aoti_", "torch_", "AOTI")) or any(part in name for part in ("3c10", "2at", "5torch"))
