"""Reads the contents of a ``.pte`` and its ``.ptd``, without ExecuTorch's runtime and without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from flashpte.export.common.errors import ExportError
from flashpte.export.files.elf import Elf, ElfError
from flashpte.export.files.executorch_tables import DTYPES, NoExecutorchError, read_flat_tensor, read_program
from flashpte.export.files.names import COPY_OPERATORS, PTD_NAME

_WEIGHTS_MAGIC = b"ETCUDAFQN3"  # ExecuTorch 1.5's layout of the CUDA delegate's payload

Table = Mapping[str, Any]


class ContentsError(ExportError):
    """A file is missing, truncated, or not what it should be."""


@dataclasses.dataclass(frozen=True)
class Cubin:
    """A compiled GPU kernel.

    Attributes:
        symbol: its name in the shared library, from AOTInductor.
        arch: ``sm_80``, ``sm_90``, ...
        kernels: entry points, named after their Python functions.
        data: bytes of the ELF file.
    """

    symbol: str
    arch: str
    kernels: tuple[str, ...]
    data: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class SharedLibrary:
    """A method's host code.

    Attributes:
        data: bytes of the ELF file.
        needed: shared libraries that it is linked with.
        undefined: symbols that its loader must find elsewhere, without weak ones.
        cubins: the kernels inside.
    """

    data: bytes = dataclasses.field(repr=False)
    needed: tuple[str, ...]
    undefined: frozenset[str] = dataclasses.field(repr=False)
    cubins: tuple[Cubin, ...]


@dataclasses.dataclass(frozen=True)
class WeightEntry:
    """A method's view of a named tensor in the ``.ptd``; strides and offset are in elements."""

    fqn: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int
    storage_bytes: int


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of a ``.pte`` that runs code.

    Attributes:
        name: name of the method.
        delegates: the backends that it calls, in order.
        operators: ExecuTorch operators that it calls itself (copies between host and device).
        compile_specs: compile specs of the delegate.
        library: the delegate's code.
        weights: tensors bound by FQN when the method is loaded: constants and mutable buffers.
        argument_order: for each argument of the delegate, the index of the method's input (the order differs).
        result_order: for each output of the method, the index of the delegate's result.
    """

    name: str
    delegates: tuple[str, ...]
    operators: tuple[str, ...]
    compile_specs: Mapping[str, str]
    library: SharedLibrary
    weights: tuple[WeightEntry, ...]
    argument_order: tuple[int, ...]
    result_order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PteContents:
    """The result of :func:`inspect_pte`.

    Attributes:
        methods: methods that run code, by name.
        constant_methods: values of methods that return a constant.
        data: bytes of every named tensor of the ``.ptd``, by key (views of the mapped file).
    """

    methods: Mapping[str, Method]
    constant_methods: Mapping[str, Any]
    data: Mapping[str, memoryview] = dataclasses.field(repr=False)

    def weight(self, method: str, fqn: str) -> torch.Tensor:
        """A copy of a named tensor, with the shape and strides that ``method`` uses.

        Raises:
            KeyError: the method has no such tensor.
        """
        entry = next((w for w in self.methods[method].weights if w.fqn == fqn), None)
        if entry is None:
            raise KeyError(f"method {method} has no tensor {fqn}")
        flat = torch.frombuffer(bytearray(self.data[entry.key]), dtype=entry.dtype)
        return flat.as_strided(entry.shape, entry.strides, entry.storage_offset)


def inspect_pte(path: Path | str) -> PteContents:
    """Reads a ``.pte`` made by the CUDA backend, and the ``aoti_cuda_blob.ptd`` beside it if there is one.

    Raises:
        ContentsError: a file is missing, truncated or of another kind, or the ``.ptd`` lacks a tensor that a method
            uses.
    """
    path = Path(path)
    with _plain_errors(path, ".pte"):
        methods, constants = _read_pte(path.read_bytes())
    ptd = path.with_name(PTD_NAME)
    data = dict(read_ptd(ptd)) if ptd.exists() else {}
    for method in methods.values():
        for entry in method.weights:
            if entry.key not in data:
                lack = f"does not hold {entry.key}" if ptd.exists() else "does not exist"
                raise ContentsError(f"method {method.name} uses the tensor {entry.fqn}, but {ptd} {lack}")
    return PteContents(MappingProxyType(methods), MappingProxyType(constants), MappingProxyType(data))


@contextlib.contextmanager
def _plain_errors(path: Path, kind: str) -> Iterator[None]:
    """Turns any error of a parser on bytes of another kind into one line."""
    try:
        yield
    except ContentsError as error:
        raise ContentsError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise ContentsError(f"{path} does not exist") from error
    except OSError as error:
        raise ContentsError(f"cannot read {path}: {error.strerror or error}") from error
    except NoExecutorchError as error:
        raise ContentsError(f"cannot read {path}: {error}") from error
    except Exception as error:
        raise ContentsError(f"{path} is not a {kind} file, or is truncated: {' '.join(str(error).split())}") from error


def _read_pte(content: bytes) -> tuple[dict[str, Method], dict[str, Any]]:
    program, base = read_program(content)
    segments = []
    for segment in program.get("segments", []):
        start = base + segment["offset"]
        if start + segment["size"] > len(content):
            raise ValueError("a segment ends behind the file")
        segments.append(content[start : start + segment["size"]])

    def payload(delegate: Table) -> bytes:
        processed = delegate["processed"]
        if processed["location"] == "SEGMENT":
            return segments[processed["index"]]
        return bytes(program["backend_delegate_data"][processed["index"]].get("data", ()))

    blobs = {entry["key"]: segments[entry["segment_index"]] for entry in program.get("named_data", [])}
    methods, constants = {}, {}
    for plan in program["execution_plan"]:
        if not plan.get("delegates") and not plan.get("operators"):
            constants[plan["name"]] = _constant_value(plan)
        else:
            methods[plan["name"]] = _read_method(plan, list(map(payload, plan.get("delegates", []))), blobs)
    return methods, constants


def _constant_value(plan: Table) -> Any:
    """The value that a constant method returns: a scalar, a string, or a list of them."""
    found = []
    for index in plan["outputs"]:
        value = plan["values"][index]
        scalar = value["val_type"] in ("Int", "Bool", "Double", "String")
        found.append(next(iter(value["val"].values())) if scalar else value["val_type"])
    return found[0] if len(found) == 1 else found


def _read_method(plan: Table, payloads: list[bytes], blobs: Mapping[str, bytes]) -> Method:
    name, operators = plan["name"], [(op["name"], op.get("overload", "")) for op in plan.get("operators", [])]
    if len(payloads) != 1:
        raise ContentsError(f"method {name} has {len(payloads)} delegates; one was expected")
    key, weights = _read_payload(payloads[0])
    if key not in blobs:
        raise ContentsError(f"method {name} refers to a shared library that is not in the file")
    arguments, results = _call_order(plan, [operator for operator, _ in operators])
    (delegate,) = plan["delegates"]
    return Method(
        name=name,
        delegates=(delegate["id"],),
        operators=tuple(f"{operator}.{overload}" if overload else operator for operator, overload in operators),
        compile_specs={s["key"]: bytes(s.get("value", ())).decode() for s in delegate.get("compile_specs", [])},
        library=read_library(blobs[key]),
        weights=weights,
        argument_order=arguments,
        result_order=results,
    )


def _call_order(plan: Table, operators: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Follows the delegate's arguments and results through the copies between host and device.

    Returns:
        For each argument of the delegate, the index of the method's input; for each output of the method, the index of
        the delegate's result. A delegate's arguments are its inputs, then its results.
    """
    origin: dict[int, int] = {}  # copy -> the value that it was copied from
    called: list[int] | None = None
    for instruction in plan["chains"][0].get("instructions", []):
        kind, call = instruction["instr_args_type"], instruction["instr_args"]
        args = call.get("args", [])
        if kind == "KernelCall" and operators[call["op_index"]] in COPY_OPERATORS:
            origin[args[-1]] = origin[args[1]] = args[0]  # (input, out, out)
        elif kind == "DelegateCall" and called is None:
            called = list(args)
    if called is None:
        return (), ()
    given, returned = plan.get("inputs", []), plan.get("outputs", [])
    inputs = [value for value in called if origin.get(value, value) in given]
    results = [value for value in called if origin.get(value, value) not in given]
    return (
        tuple(given.index(origin.get(value, value)) for value in inputs),
        tuple(results.index(value) for value in (origin.get(v, v) for v in returned) if value in results),
    )


def _read_payload(payload: bytes) -> tuple[str, tuple[WeightEntry, ...]]:
    """Decodes the delegate's payload (``encode_cuda_weight_metadata`` of ExecuTorch's CUDA backend)."""
    if not payload.startswith(_WEIGHTS_MAGIC):
        raise ContentsError(
            f"the CUDA delegate's payload begins with {payload[:10]!r}, not with {_WEIGHTS_MAGIC.decode()}, which "
            "ExecuTorch 1.5.1 writes: install executorch>=1.5.1,<1.6 and export again"
        )
    reader = _Reader(payload, len(_WEIGHTS_MAGIC))
    library_key = reader.string()
    (count,) = reader.unpack("<I")
    entries = []
    for _ in range(count):
        fqn, key = reader.string(), reader.string()
        nbytes, dtype, _, offset, rank = reader.unpack("<QiiqI")
        shape, strides = reader.unpack(f"<{rank}q"), reader.unpack(f"<{rank}q")
        entries.append(WeightEntry(fqn, key, DTYPES[dtype], shape, strides, offset, nbytes))
    return library_key, tuple(entries)


class _Reader:
    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._position = data, position

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._position)
        self._position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("<I")
        text = self._data[self._position : self._position + length].decode()
        self._position += length
        return text


def read_library(data: bytes) -> SharedLibrary:
    """Reads a shared library made by AOTInductor, with embedded kernels.

    Raises:
        ContentsError: the data is not such a library.
    """
    try:
        elf = Elf(data)
        if not elf.is_host_code:
            raise ElfError("not host code")
        symbols = list(elf.symbols())
        return SharedLibrary(
            data=data,
            needed=elf.needed(),
            undefined=frozenset(s.name for s in symbols if not s.is_defined and not s.is_weak),
            cubins=tuple(_cubins(elf, {s.name: s.value for s in symbols if s.is_defined})),
        )
    except (ElfError, struct.error, ValueError) as error:
        raise ContentsError(f"unreadable shared library: {error}") from error


def _cubins(elf: Elf, addresses: Mapping[str, int]) -> Iterator[Cubin]:
    """Yields the embedded kernels, which lie between the symbols ``__<kernel>_start`` and ``__<kernel>_end``."""
    for name, start in sorted(addresses.items()):
        end = addresses.get(name.removesuffix("_start") + "_end")
        if name.startswith("__") and name.endswith("_start") and end is not None:
            data = elf.at_address(start, end)
            cubin = Elf(data)
            kernels = tuple(sorted(s.name for s in cubin.symbols() if s.is_function and s.is_defined))
            yield Cubin(name[2:].removesuffix("_start"), cubin.cuda_arch, kernels, data)


def read_ptd(path: Path | str) -> Iterator[tuple[str, memoryview]]:
    """Yields keys and bytes of the entries of a ``.ptd``; the file is mapped, so it may be larger than memory.

    Raises:
        ContentsError: the file is missing, truncated or of another kind.
    """
    path = Path(path)
    with _plain_errors(path, ".ptd"):
        entries = _read_entries(path)
    yield from entries


def _read_entries(path: Path) -> list[tuple[str, memoryview]]:
    with path.open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    table, base = read_flat_tensor(mapped)
    entries = []
    for entry in table.get("named_data", []):
        segment = table["segments"][entry["segment_index"]]
        start = base + segment["offset"]
        if start + segment["size"] > len(mapped):
            raise ValueError(f"{entry['key']} ends behind the file")
        entries.append((entry["key"], mapped[start : start + segment["size"]]))
    return entries
