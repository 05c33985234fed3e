import pytest
import torch

from flashpte.export.common.errors import UsageError
from flashpte.export.lowering import ARCHES, UnknownArchError, find_arch


def test_every_supported_arch_is_there():
    assert list(ARCHES) == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    for name, arch in ARCHES.items():
        assert arch.name == name == f"sm_{arch.number}"
        assert 48 * 1024 < arch.shared_memory_per_block < arch.shared_memory_per_sm
    assert ARCHES["sm_90"].shared_memory_per_block == 232448
    assert ARCHES["sm_100"].capability == (10, 0)


@pytest.mark.parametrize(("wrong", "meant"), [("sm90", "sm_90"), ("sm_91", "sm_90"), ("SM_80", "sm_80")])
def test_unknown_arch_is_one_line_with_a_suggestion(wrong, meant):
    with pytest.raises(UnknownArchError) as caught:
        find_arch(wrong)
    message = str(caught.value)
    assert wrong in message
    assert f"did you mean {meant}?" in message
    assert "\n" not in message
    assert isinstance(caught.value, UsageError)
    assert isinstance(caught.value, ValueError)


def test_nothing_like_it_lists_what_is_known():
    with pytest.raises(UnknownArchError, match="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"):
        find_arch("gfx942")


def test_default_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_arch(None).name == "sm_90"


def test_default_is_the_local_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert find_arch(None).name == "sm_89"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UnknownArchError, match="local GPU is sm_75"):
        find_arch(None)
