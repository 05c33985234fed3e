"""What ExecuTorch's own runners ask of a file: ``export-model --runner``.

ExecuTorch has two kinds of runners. ``TextLLMRunner`` (``extension/llm/runner``) passes tokens and positions from host
memory. It samples from the logits of the last token, in the logits' dtype, so they are float32. The runner of Gemma 4
31B (``examples/models/gemma4_31b``) keeps tokens, positions and the temperature on the GPU, and reads one sampled token
back. ``docs/executorch.md`` cites their source line by line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flashpte.export.common.errors import Option, UsageError
from flashpte.export.common.options import RUNNER, RUNNER_GEMMA, RUNNER_TEXT
from flashpte.export.models.registry import TargetSpec
from flashpte.export.state.layer_state import LayerState


@dataclasses.dataclass(frozen=True)
class RunnerContract:
    """What one runner asks of a file.

    Attributes:
        name: value of ``--runner``.
        title: the runner's name in messages.
        whole_context: one prefill call takes any number of tokens from 1 to the context. ``TextLLMRunner`` cuts a
            prompt by ``get_max_seq_len`` alone; if that is less than ``get_max_context_len``, it assumes that every
            cache is a ring and stops counting positions.
        samples: methods take a temperature, float32 [1], and return a sampled token, int64 [1, 1], in place of logits.
        device_tensors: inputs and outputs of methods are in GPU memory.
    """

    name: str
    title: str
    whole_context: bool
    samples: bool
    device_tensors: bool

    def constants(self, layers: int) -> dict[str, Any]:
        """Values that the runner reads, in addition to those of every language model.

        Args:
            layers: number of decoder layers.
        """
        return {"enable_dynamic_shape": True, "use_sdpa_with_kv_cache": False, "get_n_layers": layers}


TEXT = RunnerContract(
    RUNNER_TEXT, "ExecuTorch's TextLLMRunner", whole_context=True, samples=False, device_tensors=False
)
GEMMA = RunnerContract(
    RUNNER_GEMMA, "ExecuTorch's Gemma 4 31B runner", whole_context=False, samples=True, device_tensors=True
)
_CONTRACTS = {contract.name: contract for contract in (TEXT, GEMMA)}


def find_runner(name: str | None, spec: TargetSpec) -> RunnerContract | None:
    """The contract for a value of ``--runner``; ``executorch`` stands for the runner that the target names."""
    if name is None:
        return None
    return _CONTRACTS[spec.executorch_runner if name == RUNNER else name]


def check_runner(
    contract: RunnerContract, spec: TargetSpec, states: Sequence[LayerState], max_seq_len: int, chunk: int
) -> None:
    """Checks that a runner can drive a model.

    Args:
        contract: what the runner asks.
        spec: the target.
        states: the state of each layer.
        max_seq_len: positions that the caches hold.
        chunk: most tokens of one forward.

    Raises:
        UsageError: a layer keeps fewer positions than the context, or the target limits the tokens of a call.
    """
    if spec.min_forward > 1:
        raise UsageError(f"{contract.title} feeds one token at a time, target {spec.name} takes {spec.min_forward}")
    if not contract.whole_context:
        return
    for layer, state in enumerate(states):
        slots = getattr(state, "slots", lambda length: length)(max_seq_len)
        if slots < max_seq_len:
            raise UsageError(
                f"layer {layer} keeps a window of {getattr(state, 'window', slots)} tokens in a ring of {slots} slots, "
                f"and {contract.title} may pass up to {max_seq_len} tokens in one call: give ",
                Option("runner", RUNNER_GEMMA),
                ", or ",
                Option("max_seq_len", slots),
                " or less",
            )
    if chunk < max_seq_len:
        raise UsageError(
            f"{contract.title} may pass {max_seq_len} tokens in one call, which takes at most {chunk}: give ",
            Option("max_seq_len", chunk),
            " or less",
        )
