"""Which tests can run in this process, and memory that punishes reading what nobody wrote."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    needs_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 in the environment (make test runs it so)")
    not_interpreted = pytest.mark.skip(reason="this process interprets Triton kernels, which breaks compiling")
    for item in items:
        if "interpreter" in item.keywords:
            if not INTERPRETING:
                item.add_marker(needs_interpreter)
        elif INTERPRETING:
            item.add_marker(not_interpreted)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory():
    """``torch.empty`` gives NaN (the largest integer for integer dtypes), in outputs and scratch alike."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
