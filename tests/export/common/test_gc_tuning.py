import gc

import pytest

from flashpte.export.common.gc_tuning import fewer_collections


@pytest.fixture(autouse=True)
def _put_back():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(("before", "inside"), [(700, 100_000), (500_000, 500_000), (0, 0)])
def test_collections_are_fewer_inside_and_as_before_outside(before, inside):
    gc.set_threshold(before, 11, 12)
    with pytest.raises(ZeroDivisionError), fewer_collections():  # noqa: PT012
        assert gc.get_threshold() == (inside, 11, 12)
        raise ZeroDivisionError
    assert gc.get_threshold() == (before, 11, 12)
