"""Runs a method as a CUDA graph, which replays its kernels on inputs and outputs at fixed addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class CapturedCall:
    """Records ``call`` on construction and replays it when called.

    A first run loads the kernels, which is not allowed while recording. It uses a side stream, as PyTorch requires, and
    changes the buffers that the call writes to; the caller restores them.

    Args:
        call: runs a method on the current stream.
        static: input tensors on the device that the recorded kernels read; this object owns them.
        pool: memory pool that all graphs share.
    """

    def __init__(
        self,
        call: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]],
        static: Sequence[torch.Tensor],
        pool: Any,
    ):
        self._static = list(static)
        device = static[0].device if static else torch.device("cuda")
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            call(self._static)
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        # Relaxed: the library may query events or load a module, which is harmless and not part of the graph.
        with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="relaxed"):
            self._outputs = call(self._static)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Replays with new inputs (on any device); returns copies of the outputs, which later replays do not change."""
        for static, tensor in zip(self._static, inputs, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return [output.clone() for output in self._outputs]
