"""Explains a compiler's error in one line: its cause, and what to write instead."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class _Known:
    """A known error.

    Attributes:
        pattern: matches the error's type and text.
        meaning: what the error means for a program; may use the pattern's named groups.
        pt2: whether a ``.pt2`` can hold such a program.
    """

    pattern: str
    meaning: str
    pt2: bool = False


_KNOWN = (
    _Known(
        "FunctionalTensor on its own",
        "a branch or a loop body (torch.cond, while_loop, map, scan) uses a Python number or a weight: give it to the "
        "branch as a tensor",
        pt2=True,
    ),
    _Known(
        r"Constant (?P<name>\S+) is mutated in the forward method",
        "the program writes to {name}, a tensor that is not a buffer: register it as a buffer, or export with "
        "strict=True",
    ),
    _Known(
        "expected compiled_fn to be GraphModule",
        "the program writes to a constant, or to one tensor under two names: register it as one buffer, or export with "
        "strict=True",
    ),
    _Known(
        r"missing fallback kernels \(\d+ total\):\s*(?P<kernels>(- \S+\s*)+)",
        "ExecuTorch's CUDA backend has no kernel for {kernels}: write it with other operators",
        pt2=True,
    ),
    _Known(
        "GuardOnDataDependentSymNode|PendingUnbackedSymbolNotFound|unbacked symbol",
        "a size depends on values of a tensor (.item(), nonzero, a boolean index): use the largest size and a mask",
    ),
)


def explain(errors: Iterable[BaseException], package: str) -> str | None:
    """The meaning of the first known error; ``None`` if no error is known.

    Args:
        errors: an error and its causes.
        package: ``pte`` or ``pt2``.
    """
    for error in errors:
        said = f"{type(error).__name__}: {error}"
        for known in _KNOWN:
            found = re.search(known.pattern, said)
            if found:
                words = {name: ", ".join(re.findall(r"[^\s,-]\S*", text)) for name, text in found.groupdict().items()}
                other = ", or lower to .pt2" if known.pt2 and package == "pte" else ""
                return known.meaning.format(**words) + other
    return None


def origin(error: BaseException) -> str:
    """Names the function and file that raised an error without a text."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no message"
    return f"no message, raised in {frames[-1].name} ({'/'.join(frames[-1].filename.split('/')[-3:])})"
