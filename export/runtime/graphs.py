"""One call of a method as a CUDA graph: inputs and outputs at fixed addresses, the kernels between them replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class CapturedCall:
    """Records ``call`` on construction and replays it when called.

    A run before the recording loads the kernels, which a recording may not do. It happens on a stream beside the
    current one, as PyTorch asks for, and changes whatever the call writes to: the caller puts that back.

    Args:
        call: runs a method on the current stream.
        static: tensors on the device that the recorded kernels read; they belong to this object.
        pool: memory pool that graphs share.
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
        # Relaxed: the library may look at events or load a module, which are not part of the graph and harmless.
        with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="relaxed"):
            self._outputs = call(self._static)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Replays with new inputs (of any device); returns copies of the outputs, which the next replay keeps."""
        for static, tensor in zip(self._static, inputs, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return [output.clone() for output in self._outputs]
