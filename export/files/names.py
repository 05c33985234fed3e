"""Names of the files of an export."""

from __future__ import annotations

PTE_NAME = "model.pte"
PT2_NAME = "model.pt2"
PTD_NAME = "aoti_cuda_blob.ptd"
"""The name that ExecuTorch gives the CUDA backend's external data."""
MANIFEST_NAME = "manifest.json"

MODEL_NAMES = {"pte": PTE_NAME, "pt2": PT2_NAME}
"""The model's file by format."""

OUTPUT_NAMES = (PTE_NAME, PT2_NAME, PTD_NAME, MANIFEST_NAME)

GENERATOR = "flashpte"
"""The manifest's ``generator``, which marks a folder as written by flashpte."""

COPY_OPERATORS = ("et_copy::_h2d_copy", "et_copy::_d2h_copy")
"""ExecuTorch operators that a method of a ``.pte`` may call around its delegate: copies between host and device."""
