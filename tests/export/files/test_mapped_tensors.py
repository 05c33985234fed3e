"""Tensors that are mapped from files, and linked instead of read."""

import hashlib
import mmap

import pytest
import torch

from flashpte.export.files.mapped_tensors import MappedZeros, mapped_file, sha256_of, write_mapped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 0)])
def test_values_shape_and_digest(tmp_path, dtype, shape):
    tensor = (torch.randn(shape) * 50).abs().to(dtype)
    mapped = write_mapped(tensor, tmp_path / "tensor")
    assert mapped.dtype == dtype
    assert mapped.shape == tensor.shape
    assert torch.equal(mapped, tensor)
    if tensor.numel():
        path, digest = mapped_file(mapped.untyped_storage())
        assert path == tmp_path / "tensor"
        assert digest == hashlib.sha256(path.read_bytes()).digest()


def test_elements_are_written_in_order_whatever_their_layout(tmp_path):
    tensor = torch.arange(24).view(4, 6).t()[1:5]
    mapped = write_mapped(tensor, tmp_path / "tensor")
    assert torch.equal(mapped, tensor)
    assert mapped.is_contiguous()


def test_only_whole_files_of_ours_count(tmp_path):
    assert mapped_file(torch.ones(4).untyped_storage()) is None
    write_mapped(torch.arange(8), tmp_path / "tensor")
    part = torch.from_file(str(tmp_path / "tensor"), shared=True, size=4, dtype=torch.int64)
    assert mapped_file(part.untyped_storage()) is None
    (tmp_path / "other").write_bytes(bytes(64))
    other = torch.from_file(str(tmp_path / "other"), shared=True, size=8, dtype=torch.int64)
    assert mapped_file(other.untyped_storage()) is None


def test_no_file_is_overwritten(tmp_path):
    write_mapped(torch.arange(8), tmp_path / "tensor")
    with pytest.raises(FileExistsError):
        write_mapped(torch.arange(9), tmp_path / "tensor")


def test_digest_of_a_part_of_a_mapped_file(tmp_path):
    data = bytes(range(251)) * 100_000  # several chunks, and no multiple of a page
    (tmp_path / "data").write_bytes(data)
    with (tmp_path / "data").open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    assert sha256_of(mapped[5:-3]) == hashlib.sha256(data[5:-3]).digest()
    assert bytes(mapped) == data  # dropped pages are read again


def test_zeros(tmp_path):
    make = MappedZeros(tmp_path)
    for shape, dtype in (((3, 5_000_000), torch.int16), ((3, 5_000_000), torch.int16), ((2, 3), torch.float32)):
        zeros = make(shape, dtype)
        assert zeros.shape == shape
        assert zeros.dtype == dtype
        assert not zeros.any()
        path, digest = mapped_file(zeros.untyped_storage())
        assert digest == hashlib.sha256(path.read_bytes()).digest()
    assert len(list(tmp_path.glob("zeros-?"))) == 3  # no two share their memory
    assert make((0, 4), torch.float32).shape == (0, 4)
