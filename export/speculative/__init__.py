"""Speculative decoding with the methods of one program, on any runtime.

:func:`generate` calls ``prefill``, ``target_verify`` and ``draft_decode`` through a function that runs a method: of an
ExecuTorch program on a GPU, of compiled libraries, or of exported programs on a CPU. Its greedy output equals that of
the target alone; its sampled output has the target's distribution. The draft affects only the speed.
"""

from flashpte.export.speculative.acceptance import Acceptance
from flashpte.export.speculative.choose import Choose, Sampler, greedy
from flashpte.export.speculative.generation import Generation, Stop
from flashpte.export.speculative.loop import Run, generate
from flashpte.export.speculative.sizes import SpeculativeProgram

__all__ = [
    "Acceptance",
    "Choose",
    "Generation",
    "Run",
    "Sampler",
    "SpeculativeProgram",
    "Stop",
    "generate",
    "greedy",
]
