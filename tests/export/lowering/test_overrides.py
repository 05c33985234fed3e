"""The table of replaced names: every name exists, is replaced inside and restored outside, also after errors."""

import dataclasses
import importlib
import inspect
import os

import pytest
import torch

from flashpte.export.lowering.cross_compile import (
    CrossCompileError,
    cross_compile,
    find_arch,
    override_table,
    overrides,
)
from flashpte.export.lowering.cross_compile.override_table import Override

ALL = (*overrides.TABLE, *overrides.EXECUTORCH_TABLE, *overrides.PT2_TABLE)


def current(override):
    module, path = override.name.split(":", 1)
    owner = importlib.import_module(module)
    path, _, key = path.rstrip("]").partition("[")
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    if key:
        return getattr(owner, last).get(key)
    return inspect.getattr_static(owner, last, None)


@pytest.fixture(autouse=True)
def _registered_interfaces():
    torch._dynamo.device_interface.get_interface_for_device("cpu")


@pytest.mark.parametrize("package", ["pte", "pt2"])
def test_everything_is_replaced_inside_and_restored_outside(tmp_path, package):
    table = overrides.TABLE + (overrides.EXECUTORCH_TABLE if package == "pte" else overrides.PT2_TABLE)
    before = [current(override) for override in table]
    environment = dict(os.environ)
    settings = torch._inductor.config.get_config_copy()
    with pytest.raises(ZeroDivisionError), cross_compile(find_arch("sm_86"), tmp_path, package):  # noqa: PT012
        for override, original in zip(table, before, strict=True):
            assert current(override) is not original, override.name
        assert torch.cuda.get_device_capability() == (8, 6)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 84
        raise ZeroDivisionError
    for override, original in zip(table, before, strict=True):
        assert current(override) is original, override.name
    assert dict(os.environ) == environment
    assert torch._inductor.config.get_config_copy() == settings


def test_options_of_inductor_that_the_process_changed_do_not_count(tmp_path):
    config = torch._inductor.config
    with cross_compile(find_arch("sm_90"), tmp_path / "before"):
        expected = config.get_config_copy()
    changed = {"eager_numerics.division_rounding": True, "triton.unique_kernel_names": False, "max_fusion_size": 2}
    with config.patch(changed):
        with cross_compile(find_arch("sm_90"), tmp_path / "after"):
            assert config.get_config_copy() == expected
        assert changed.items() <= config.get_config_copy().items()


def test_availability_is_hidden_outside_code_generation(tmp_path, monkeypatch):
    """The result must be the same with and without a GPU in the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with cross_compile(find_arch("sm_90"), tmp_path):
        assert not torch.cuda.is_available()
    assert torch.cuda.is_available()


@pytest.mark.parametrize(
    "name",
    [
        "torch.cuda:no_such_function",
        "torch.no_such_module:function",
        "torch._inductor.graph:GraphLowering.no_such_method",
        "torch._inductor.graph:NoSuchClass.method",
        "triton.backends:backends[no_such_backend]",
    ],
)
def test_a_missing_name_is_loud_and_undoes_the_rest(name):
    first = overrides.TABLE[0]
    before = current(first)
    wrong = Override(name, "the reason", lambda target, original: None)
    with pytest.raises(CrossCompileError) as caught, override_table.apply([first, wrong], target()):
        pytest.fail("not reached")
    assert name in str(caught.value)
    assert "the reason" in str(caught.value)
    assert torch.__version__ in str(caught.value)
    assert current(first) is before


def target():
    return override_table.Target(find_arch("sm_90"), None, "", None)


def test_every_entry_says_why_and_what_was_checked():
    names = [override.name for override in ALL]
    assert len(names) == len(set(names))
    for override in ALL:
        assert len(override.why) > 10
        assert override.checked
        assert dataclasses.is_dataclass(override)


def test_one_lowering_at_a_time(tmp_path):
    arch = find_arch("sm_90")
    with cross_compile(arch, tmp_path / "a"):  # noqa: SIM117
        with pytest.raises(CrossCompileError, match="another lowering is running"), cross_compile(arch, tmp_path / "b"):
            pytest.fail("not reached")
    with cross_compile(arch, tmp_path / "c"):
        pass


def test_a_kernel_is_never_launched(tmp_path):
    import triton

    with cross_compile(find_arch("sm_90"), tmp_path):
        driver = triton.runtime.driver.active
        assert driver.get_current_target().arch == 90
        with pytest.raises(CrossCompileError, match="launched"):
            driver.launcher_cls(None, None)(1, 1, 1)
        with pytest.raises(CrossCompileError, match="benchmarked"):
            driver.get_benchmarker()(lambda: None)
