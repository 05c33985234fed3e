"""Runs a program on a GPU: ``Program.open(folder)``, then ``program.run("decode", tokens, input_pos)``."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flashpte.export.common.errors import ProgramError
from flashpte.export.files.model_folder import ModelFolder, read_folder, verify_files
from flashpte.export.files.signature import InputError, MethodSignature
from flashpte.export.runtime.graphs import CapturedCall
from flashpte.export.runtime.libraries import (
    Call,
    check_cubins,
    load_method,
    load_package,
    load_weights,
    make_torch_symbols_global,
    open_pte,
)
from flashpte.export.runtime.machine import check_gpu, check_torch
from flashpte.export.state.layer_state import read_states


class Program:
    """The methods of an export, loaded on one GPU with one set of weights and buffers.

    Methods share tensors of the same name: weights, and every buffer that they write to, such as KV caches. Calls run
    on the current stream of the device. Use :meth:`open` to make a program.

    Attributes:
        signatures: inputs and outputs of each method, by name.
        constants: values of the constant methods, such as ``get_max_seq_len``.
        manifest: contents of ``manifest.json``.
        buffers: the tensors that methods write to, by FQN; methods see changes made to them.
        weights: every named tensor, by FQN; ``None`` for a ``.pt2``, which keeps them in its compiled code.
        states: rules for the state of each layer; empty for a program that is not a language model.
        device: the device that holds inputs and results.
    """

    def __init__(
        self,
        calls: Mapping[str, Call],
        signatures: Mapping[str, MethodSignature],
        buffers: Mapping[str, torch.Tensor],
        *,
        manifest: Mapping[str, Any],
        device: torch.device,
        weights: Mapping[str, torch.Tensor] | None = None,
    ):
        self.signatures = dict(signatures)
        self.buffers = dict(buffers)
        self.manifest = manifest
        self.states = read_states(manifest)
        self.constants: Mapping[str, Any] = manifest["constant_methods"]
        self.device = device
        self.weights = None if weights is None else dict(weights)
        self._calls = dict(calls)
        self._captured: dict[str, CapturedCall] = {}
        self._pool: Any = None
        # Caches start as zeros and need no copy; the initial values of other buffers are kept on the host.
        self._initial = {fqn: value.cpu() for fqn, value in self.buffers.items() if bool(value.any())}

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        unverified: bool = False,
        cuda_graphs: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> Program:
        """Verifies a folder that ``export-model`` wrote and loads its program on the current GPU.

        No code of a library runs before every file has been compared with the manifest.

        Args:
            folder: folder with ``manifest.json`` and either ``model.pte`` and ``aoti_cuda_blob.ptd``, or ``model.pt2``.
            unverified: run files whose sizes or hashes differ from the manifest's.
            cuda_graphs: capture every method of static shape, see :meth:`capture`.
            progress: called with a short line at each stage.

        Raises:
            ProgramError: a file is missing, truncated or another file; the GPU or PyTorch does not fit; or a method
                does more than call compiled code.
        """
        tell = progress or (lambda stage: None)
        opened = read_folder(folder, unverified=unverified)
        check_torch(opened)
        check_gpu(opened)  # before minutes of reading
        read_states(opened.manifest)
        if not unverified:
            opened = verify_files(opened, tell)
        return load(opened, cuda_graphs=cuda_graphs, progress=tell)

    def run(self, method: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Runs a method.

        Args:
            method: name of the method.
            *inputs: its tensors in calling order, see :attr:`signatures`; tensors on the host are moved to the device.

        Returns:
            The method's outputs, on the device.

        Raises:
            InputError: there is no such method, or a tensor does not fit its signature.
            ProgramError: the compiled code failed.
        """
        signature = self._signature(method)
        signature.check(inputs)
        with self._plain_errors(method), torch.no_grad():
            captured = self._captured.get(method)
            if captured is not None:
                return captured(inputs)
            moved = [tensor.to(self.device, non_blocking=True).contiguous() for tensor in inputs]
            return self._calls[method](moved)

    def capture(self, method: str, *example: torch.Tensor) -> None:
        """Records a method as a CUDA graph; :meth:`run` replays it from then on, with the same results.

        The method first runs with ``example`` or zeros, to load its kernels. Its buffers are restored afterwards.

        Args:
            method: name of the method; all its shapes must be static.
            *example: inputs that the method accepts, if it does not accept zeros.

        Raises:
            InputError: there is no such method, it has dynamic shapes, or ``example`` does not fit.
            ProgramError: the compiled code failed.
        """
        signature = self._signature(method)
        if not signature.is_static:
            inputs = ", ".join(map(str, signature.inputs))
            raise InputError(f"{method} has dynamic shapes ({inputs}); a CUDA graph holds one shape")
        if example:
            signature.check(example)
        static = [
            torch.zeros(tuple(spec.shape), dtype=spec.dtype, device=self.device)  # type: ignore[arg-type]
            for spec in signature.inputs
        ]
        for tensor, value in zip(static, example, strict=False):
            tensor.copy_(value)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with self._plain_errors(method), torch.no_grad(), self._unchanged_buffers(signature.mutable_buffers):
            self._captured[method] = CapturedCall(self._calls[method], static, self._pool)

    def release(self, method: str) -> None:
        """Drops a method's CUDA graph; :meth:`run` calls the library again."""
        self._captured.pop(method, None)

    @property
    def captured(self) -> tuple[str, ...]:
        """Names of the methods that run as a CUDA graph."""
        return tuple(self._captured)

    def reset(self) -> None:
        """Restores every buffer that a method writes to, to its value when the program was opened."""
        for fqn, tensor in self.buffers.items():
            if fqn in self._initial:
                tensor.copy_(self._initial[fqn])
            else:
                tensor.zero_()

    def synchronize(self) -> None:
        """Waits until the device has finished all work.

        Raises:
            ProgramError: an earlier call failed on the device.
        """
        if self.device.type == "cuda":
            with self._plain_errors("the program"):
                torch.cuda.synchronize(self.device)

    def _signature(self, method: str) -> MethodSignature:
        if method not in self.signatures:
            raise InputError(f"no method {method!r}; the program has {', '.join(self.signatures)}")
        return self.signatures[method]

    @contextlib.contextmanager
    def _plain_errors(self, method: str) -> Iterator[None]:
        """Turns errors of CUDA and of compiled code into one line."""
        try:
            yield
        except RuntimeError as error:
            if "CUDA error" in str(error):
                # This process can no longer use the device, and freeing objects on it would abort the process.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._calls))
            line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise ProgramError(f"{method} failed: {line}") from error

    @contextlib.contextmanager
    def _unchanged_buffers(self, names: Sequence[str]) -> Iterator[None]:
        kept = {name: self.buffers[name].clone() for name in names if name in self.buffers}
        try:
            yield
        finally:
            for name, value in kept.items():
                self.buffers[name].copy_(value)


def load(folder: ModelFolder, *, cuda_graphs: bool = False, progress: Callable[[str], None] | None = None) -> Program:
    """Loads the program from a folder that was already read and verified; see :meth:`Program.open`."""
    tell = progress or (lambda stage: None)
    device = check_gpu(folder)
    try:
        if folder.format == "pte":
            program = _load_pte(folder, device, tell)
        else:
            tell(f"loading {folder.model_file.name}")
            name = next(iter(folder.signatures))
            call, buffers = load_package(folder, device)
            program = Program({name: call}, folder.signatures, buffers, manifest=folder.manifest, device=device)
    except torch.cuda.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(device).total_memory
        raise ProgramError(f"{folder.path} does not fit into the GPU's memory ({total / 1e9:.0f} GB)") from error
    if cuda_graphs:
        for method, signature in program.signatures.items():
            if signature.is_static:
                tell(f"capturing {method}")
                program.capture(method)
    return program


def _load_pte(folder: ModelFolder, device: torch.device, tell: Callable[[str], None]) -> Program:
    tell(f"reading {folder.model_file.name}")
    contents = open_pte(folder)
    check_cubins(contents, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    tell("loading weights")
    weights = load_weights(contents, device)
    make_torch_symbols_global()
    calls = {}
    for name, method in contents.methods.items():
        tell(f"loading {name}")
        calls[name] = load_method(method, weights, device)
    mutable = {fqn for signature in folder.signatures.values() for fqn in signature.mutable_buffers}
    buffers = {fqn: tensor for fqn, tensor in weights.items() if fqn in mutable}
    return Program(calls, folder.signatures, buffers, manifest=folder.manifest, device=device, weights=weights)
