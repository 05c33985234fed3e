"""Statistics of a run: times of its parts, rates and percentiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from flashpte.export.common.tables import table_lines


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed (nearest rank).

    Raises:
        ValueError: there are no values, or ``share`` is not in (0, 1].
    """
    if not values or not 0 < share <= 1:
        raise ValueError(f"no percentile {share} of {len(values)} values")
    return sorted(values)[math.ceil(share * len(values)) - 1]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of one generation; times are in seconds.

    Attributes:
        load_s: time to open the folder and load the program.
        prompt_tokens: number of tokens in the prompt.
        prefill_s: time until the prompt's last logits were ready.
        first_token_s: time until the first token was chosen, from the same start.
        decode_s: time of each later token, from token to token.
        peak_bytes: peak GPU memory that PyTorch allocated, in bytes; ``None`` without a GPU.
        captured: methods that ran as CUDA graphs.
    """

    load_s: float
    prompt_tokens: int
    prefill_s: float
    first_token_s: float
    decode_s: tuple[float, ...]
    peak_bytes: int | None = None
    captured: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The statistics as plain data, for JSON; rates in tokens per second, ``None`` for what was not measured."""
        total = sum(self.decode_s)
        return {
            "load_s": self.load_s,
            "time_to_first_token_s": self.first_token_s,
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens_per_s": self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else None,
            "decode_tokens": len(self.decode_s),
            "decode_tokens_per_s": len(self.decode_s) / total if total > 0 else None,
            "decode_median_s": percentile(self.decode_s, 0.5) if self.decode_s else None,
            "decode_p99_s": percentile(self.decode_s, 0.99) if self.decode_s else None,
            "peak_gpu_bytes": self.peak_bytes,
            "cuda_graphs": list(self.captured),
        }

    def lines(self) -> list[str]:
        """The statistics for people, one line for each part."""
        rows = [
            ("load", f"{self.load_s:.2f} s"),
            ("time to first token", f"{1e3 * self.first_token_s:.1f} ms"),
            ("prefill", f"{self.prompt_tokens} tokens, {_rate(self.prompt_tokens, self.prefill_s)}"),
        ]
        if self.decode_s:
            rows.append(("decode", f"{len(self.decode_s)} tokens, {_rate(len(self.decode_s), sum(self.decode_s))}"))
            median, late = (1e3 * percentile(self.decode_s, share) for share in (0.5, 0.99))
            rows.append(("decode per token", f"median {median:.3f} ms, p99 {late:.3f} ms"))
        if self.peak_bytes is not None:
            rows.append(("peak GPU memory", f"{self.peak_bytes / 2**20:.1f} MiB"))
        rows.append(("CUDA graphs", ", ".join(self.captured) or "none"))
        return table_lines(rows, ragged=True)


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.1f} tokens/s" if seconds > 0 else "no time measured"
