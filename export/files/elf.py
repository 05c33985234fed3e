"""Reads the parts of an ELF file that checks of a compiled model need."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

_MACHINE_X86_64, _MACHINE_AARCH64, _MACHINE_CUDA = 62, 183, 190
_PROGBITS, _SYMTAB, _DYNAMIC, _DYNSYM = 1, 2, 6, 11  # kinds of section
_DT_NEEDED = 1
_CUDA_ABI_8 = 0x41  # in EI_OSABI
_STT_FUNC, _STB_WEAK, _SHN_UNDEF = 2, 2, 0


class ElfError(ValueError):
    """The bytes are not an ELF file of the expected kind."""


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A symbol; ``value`` is its address, and ``is_defined`` says whether this file defines it."""

    name: str
    value: int
    size: int
    is_function: bool
    is_defined: bool
    is_weak: bool


@dataclasses.dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    address: int
    offset: int
    size: int
    link: int
    entry_size: int


class Elf:
    """A 64-bit little-endian ELF file.

    Args:
        data: the file's bytes.

    Raises:
        ElfError: the data is something else.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
            raise ElfError("not a 64-bit little-endian ELF file")
        self.data = data
        self.os_abi = data[7]
        (self.machine,) = struct.unpack_from("<H", data, 18)
        (self.flags,) = struct.unpack_from("<I", data, 48)
        self.sections = self._read_sections()

    @property
    def is_host_code(self) -> bool:
        """Whether the file holds code for a CPU."""
        return self.machine in (_MACHINE_X86_64, _MACHINE_AARCH64)

    @property
    def cuda_arch(self) -> str:
        """The architecture of a cubin: ``sm_80``, ``sm_90``, ...

        The "a" of an architecture-specific cubin (``sm_90a``) is omitted, because newer assemblers do not record it
        here.

        Raises:
            ElfError: the file is not a cubin.
        """
        if self.machine != _MACHINE_CUDA:
            raise ElfError("not a cubin")
        # e_flags has two layouts: one of ptxas up to 12.9 for GPUs up to Hopper, and one of a newer ABI.
        return f"sm_{self.flags >> 8 & 0xFF if self.os_abi == _CUDA_ABI_8 else self.flags & 0xFF}"

    def needed(self) -> tuple[str, ...]:
        """Names of the shared libraries that the file is linked with."""
        for section in self.sections:
            if section.kind == _DYNAMIC:
                strings = self._bytes(self.sections[section.link])
                entries = struct.iter_unpack("<qQ", self._bytes(section))
                return tuple(_string(strings, value) for tag, value in entries if tag == _DT_NEEDED)
        return ()

    def symbols(self) -> Iterator[Symbol]:
        """Yields the symbols of all symbol tables."""
        for section in self.sections:
            if section.kind in (_SYMTAB, _DYNSYM):
                strings = self._bytes(self.sections[section.link])
                for name, info, _, where, value, size in struct.iter_unpack("<IBBHQQ", self._bytes(section)):
                    if name:
                        binding, kind = info >> 4, info & 15
                        yield Symbol(
                            name=_string(strings, name),
                            value=value,
                            size=size,
                            is_function=kind == _STT_FUNC,
                            is_defined=where != _SHN_UNDEF,
                            is_weak=binding == _STB_WEAK,
                        )

    def at_address(self, start: int, end: int) -> bytes:
        """Bytes between two virtual addresses in one section.

        Raises:
            ElfError: no section holds both addresses.
        """
        for section in self.sections:
            if section.kind == _PROGBITS and section.address <= start <= end <= section.address + section.size:
                offset = section.offset - section.address
                return self.data[start + offset : end + offset]
        raise ElfError(f"no section holds addresses {start:#x} to {end:#x}")

    def section(self, name: str) -> bytes | None:
        """Contents of the section ``name``; ``None`` if there is none."""
        return next((self._bytes(section) for section in self.sections if section.name == name), None)

    def _read_sections(self) -> tuple[_Section, ...]:
        (offset,) = struct.unpack_from("<Q", self.data, 40)
        entry, count, names_index = struct.unpack_from("<HHH", self.data, 58)
        headers = [struct.unpack_from("<IIQQQQIIQQ", self.data, offset + i * entry) for i in range(count)]
        if not headers:
            return ()
        names = self.data[headers[names_index][4] : headers[names_index][4] + headers[names_index][5]]
        return tuple(_Section(_string(names, h[0]), h[1], h[3], h[4], h[5], h[6], h[9]) for h in headers)

    def _bytes(self, section: _Section) -> bytes:
        return self.data[section.offset : section.offset + section.size]


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()
