"""Marks and skips tests that cannot run in this process, and fills uninitialized memory with NaN."""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import tempfile

import hypothesis
import pytest
import torch
from grids import SLOW, is_swept

# How long a case takes says how busy the machine is, and nothing about the code.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

# As in tests/support/host_code.py and kernel_cache.py, whose imports take seconds.
SHARED_FOLDERS = ("FLASHPTE_TEST_HEADERS", "FLASHPTE_TEST_KERNELS")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config):
    """Gives all processes of the run one folder for precompiled headers, and one for compiled kernels."""
    for name in SHARED_FOLDERS:
        if not hasattr(config, "workerinput") and name not in os.environ:
            os.environ[name] = tempfile.mkdtemp(prefix="flashpte-tests-")
            config.add_cleanup(lambda name=name: shutil.rmtree(os.environ.pop(name), ignore_errors=True))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if getattr(config.option, "loadgroup", False):
        _put_groups_into_ids(items)
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    needs_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 in the environment (make test runs it so)")
    not_interpreted = pytest.mark.skip(reason="this process interprets Triton kernels, which breaks compiling")
    for item in items:
        _refuse_sets_in_names(item)
        if is_swept(*item.nodeid.partition("[")[::2]):
            item.add_marker(pytest.mark.sweep)
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if "interpreter" in item.keywords:
            if not INTERPRETING:
                item.add_marker(needs_interpreter)
        elif INTERPRETING:
            item.add_marker(not_interpreted)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


def _refuse_sets_in_names(item):
    """Refuses a set in a test's name: the order of its members varies, so workers would collect different tests."""
    for name, value in getattr(getattr(item, "callspec", None), "params", {}).items():
        if isinstance(value, set | frozenset) and str(value) in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: the parameter {name} is a set; use a tuple")


def _put_groups_into_ids(items):
    """What ``--dist loadgroup`` fails to do with pytest 9.2, where it sets a field that is gone (xdist issue 1386)."""
    if not items or not hasattr(items[0], "id"):
        return  # an older pytest, for which xdist does it
    for item in items:
        groups = sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")})
        suffix = f"@{'_'.join(groups)}"
        if groups and not item.nodeid.endswith(suffix):
            item._id = type(item.id).parse(item.nodeid + suffix)


@pytest.fixture(autouse=True)
def _hanging_kernels_end(request):
    """Ends the process of a GPU test that takes far too long, so that the run names it.

    A kernel that waits for ever cannot be interrupted. Its worker would be silent until the whole run is ended.
    """
    if "gpu" not in request.keywords:
        yield
        return
    seconds = 180 if "kernels" in request.path.parts else 900  # exports take minutes
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Or as many as OMP_NUM_THREADS says."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


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
