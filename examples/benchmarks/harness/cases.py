"""Shapes, cases and their floors. Nothing here needs a GPU.

A case is one attention call: ``rows`` queries of which the last sits at the end of a context of ``live`` keys, in a
buffer of ``length`` keys. Prefill is the case where ``rows`` equals ``length``; a chunk has fewer rows than keys.
"""

from __future__ import annotations

import dataclasses

ITEM_BYTES = 2  # bfloat16


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads and dims of a model's attention, and how many of its layers share one mask.

    With ``latent_values``, the values are that many first columns of the keys: multi-head latent attention, absorbed.
    """

    heads_q: int
    heads_kv: int
    head_dim: int
    layers: int
    latent_values: int | None = None

    @property
    def v_head_dim(self) -> int:
        return self.latent_values or self.head_dim

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv

    @property
    def scale(self) -> float:
        """Scores of about unit variance, as trained models have them (Gemma normalises queries and keys)."""
        return self.head_dim**-0.5


SHAPES = {
    "gemma-full": Shape(32, 4, 512, 10),
    "gemma-sliding": Shape(32, 16, 256, 50),
    "qwen3.5": Shape(16, 2, 256, 10),
    "llama-8b": Shape(32, 8, 128, 32),
    # Outside of what the tables were tuned for.
    "head-dim-96": Shape(32, 8, 96, 32),
    "group-3": Shape(24, 8, 128, 28),
    "latent-16": Shape(16, 1, 576, 27, latent_values=512),
    "latent-128": Shape(128, 1, 576, 61, latent_values=512),
}
TUNED = ("gemma-full", "gemma-sliding", "qwen3.5", "llama-8b")


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call; ``context`` is ``None`` where the whole buffer is live, ``window`` where none slides."""

    suite: str
    shape_name: str
    length: int
    rows: int
    context: int | None = None
    window: int | None = None
    batch: int = 1

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def live(self) -> int:
        return self.context or self.length

    @property
    def prefills(self) -> bool:
        """Whether it is for the prefill kernel."""
        return self.rows > 16

    @property
    def ours_alone(self) -> bool:
        """Whether only our own tiles are compared: shapes outside of the tables, but for those with latent values."""
        return self.suite == "other" and self.shape.latent_values is None

    @property
    def name(self) -> str:
        parts = [self.shape_name]
        if self.batch > 1:
            parts.append(f"B={self.batch}")
        parts.append(f"L={self.length}")
        if self.context:
            parts.append(f"context={self.context}")
        if self.rows != self.length:
            parts.append(f"M={self.rows}")
        if self.prefills:
            parts.append(f"window={self.window}" if self.window else "causal")
        return " ".join(parts)

    @property
    def key(self) -> str:
        """A name that is unique among all suites."""
        return f"{self.suite} {self.name}"

    @property
    def visible(self) -> int:
        """Scores per head that the mask lets through."""
        past = self.live - self.rows
        reach = self.window or self.live
        return sum(min(past + row + 1, reach) for row in range(self.rows))

    @property
    def flop(self) -> int:
        return 2 * self.batch * self.visible * self.shape.heads_q * (self.shape.head_dim + self.shape.v_head_dim)

    @property
    def kv_bytes(self) -> int:
        """Keys and values that have to be read once."""
        keys = self.live if self.window is None else min(self.live, self.window + self.rows - 1)
        columns = self.shape.head_dim + (0 if self.shape.latent_values else self.shape.v_head_dim)
        return self.batch * self.shape.heads_kv * keys * columns * ITEM_BYTES

    @property
    def input_bytes(self) -> int:
        """What a call reads: queries, keys and values."""
        return self.kv_bytes + self.batch * self.shape.heads_q * self.rows * self.shape.head_dim * ITEM_BYTES

    def floor(self, ceilings: dict[str, float]) -> float:
        """Microseconds of the arithmetic (prefill) or of the bytes (decode, verify) at the measured ceilings."""
        if self.prefills:
            return self.flop / ceilings["bf16_flop_per_us"]
        return self.kv_bytes / ceilings["read_bytes_per_us"]

    def describe(self) -> dict[str, object]:
        """What a row of results says about its case."""
        fields = dataclasses.asdict(self)
        return {"case": self.name, **fields, "live": self.live, "flop": self.flop, "kv_bytes": self.kv_bytes}


def _decode() -> list[Case]:
    cases = [Case("decode", name, length, 1) for name in TUNED for length in (2048, 4096)]
    cases += [Case("decode", name, 32768, 1) for name in ("gemma-full", "qwen3.5", "llama-8b")]
    cases += [Case("decode", "gemma-full", 131072, 1), Case("decode", "gemma-full", 131072, 1, context=4096)]
    return cases


def _verify() -> list[Case]:
    buffers = [(name, length) for name in ("gemma-full", "qwen3.5", "llama-8b") for length in (4096, 32768)]
    buffers += [("gemma-sliding", 2048), ("gemma-full", 131072)]
    return [Case("verify", name, length, rows) for name, length in buffers for rows in (2, 4, 8, 16)]


def _prefill() -> list[Case]:
    full = [(name, length, None) for name in ("gemma-full", "qwen3.5", "llama-8b") for length in (2048, 8192)]
    sliding = [("gemma-sliding", length, 1024) for length in (2048, 8192)]
    return [Case("prefill", name, length, length, window=window) for name, length, window in full + sliding]


def _chunk() -> list[Case]:
    return [Case("chunk", name, 16384, 512) for name in ("gemma-full", "qwen3.5", "llama-8b")]


def _other() -> list[Case]:
    shapes = [("llama-8b", 3000, 1), ("head-dim-96", 4096, 1), ("group-3", 4096, 1), ("llama-8b", 4096, 2)]
    few = [Case("other", name, length, rows, batch=b) for rows in (1, 6) for name, length, b in shapes]
    long = [("llama-8b", 3000, 1), ("head-dim-96", 2048, 1), ("group-3", 2048, 1), ("llama-8b", 2048, 2)]
    latent = [
        (name, length, rows) for name in ("latent-16", "latent-128") for length in (4096, 32768) for rows in (1, 4)
    ]
    few += [Case("other", name, length, rows) for name, length, rows in latent]
    long += [("latent-16", 2048, 1)]
    return few + [Case("other", name, length, length, batch=b) for name, length, b in long]


SUITES: dict[str, list[Case]] = {
    "decode": _decode(),
    "verify": _verify(),
    "prefill": _prefill(),
    "chunk": _chunk(),
    "other": _other(),
}


def choose(suites: list[str] | tuple[str, ...], substring: str = "") -> list[Case]:
    """The cases of some suites whose key contains ``substring``."""
    return [case for suite in suites for case in SUITES[suite] if substring in case.key]
