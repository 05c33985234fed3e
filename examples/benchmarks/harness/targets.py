"""What is wanted of the numbers, as data, and whether a document of results meets it.

A judgement is of one case: a ``value`` that has to stay at or below (or reach) a ``limit``. A case that lacks what its
target compares (a peer that does not run, a suite left out) is not judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from harness.results import OURS, Document, Row, best_peer, ours, ours_plain, time_of

FA3, FLASHINFER = "fa3", "flashinfer"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One target for one case. ``least`` says that ``value`` has to reach ``limit`` instead of staying below."""

    suite: str
    case: str
    wanted: str
    value: float
    limit: float
    least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def line(self) -> str:
        sign = ">=" if self.least else "<="
        mark = "met" if self.met else "MISSED"
        return f"| {self.suite} | {self.case} | {self.wanted} | {self.value:.3f} | {sign} {self.limit:.3g} | {mark} |"


Judge = Callable[[Row, Document], Iterator[Judgement]]


def _judgement(row: Row, wanted: str, value: float, limit: float, least: bool = False) -> Judgement:
    return Judgement(row["suite"], row["case"], wanted, value, limit, least)


def _row(document: Document, **wanted: object) -> Row | None:
    """The row whose fields are as wanted."""
    for row in document["rows"]:
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None


def _decode_of(row: Row, document: Document) -> float | None:
    """Our decode at a row's shape and length."""
    same = {name: row[name] for name in ("shape_name", "length", "context")}
    found = _row(document, suite="decode", **same)
    return None if found is None else ours(found)


def rate(row: Row) -> float | None:
    """Our FLOP per microsecond."""
    time = ours(row)
    return None if time is None else row["flop"] / time


def _full_rate(row: Row, document: Document) -> float | None:
    """Our rate in a full causal prefill of 8,192 at a row's shape."""
    found = _row(document, suite="prefill", shape_name=row["shape_name"], length=8192, window=None)
    return None if found is None else rate(found)


FLOORS = {
    ("gemma-full", 131072): 1.04,
    ("gemma-full", 32768): 1.15,
    ("llama-8b", 32768): 1.15,
    ("qwen3.5", 32768): 1.35,
}


def decode(row: Row, document: Document) -> Iterator[Judgement]:
    """Long contexts against the floor and every peer, short ones against the best peer."""
    time, peer = ours(row), best_peer(row)
    if time is None or row["suite"] != "decode":
        return
    if row["context"] is None and (row["shape_name"], row["length"]) in FLOORS:
        limit = FLOORS[row["shape_name"], row["length"]]
        yield _judgement(row, "of the floor", time / row["floor"], limit)
        if row["length"] == 32768 and peer is not None:
            yield _judgement(row, f"of the best peer ({peer[1]}): ahead", time / peer[0], 1.0)
    if row["length"] in (2048, 4096) and peer is not None:
        yield _judgement(row, f"of the best peer ({peer[1]})", time / peer[0], 0.75)


def verify(row: Row, document: Document) -> Iterator[Judgement]:
    """Few rows against our own decode, and against the better of FlashAttention 3 and FlashInfer."""
    time = ours(row)
    if time is None or row["suite"] != "verify":
        return
    one = _decode_of(row, document)
    if one is not None and row["rows"] in (4, 8):
        yield _judgement(row, "of our decode", time / one, 1.12)
    if one is not None and row["rows"] == 16:
        limit, wanted, full = 1.35 * one, "of our decode", _full_rate(row, document)
        if row["shape_name"] == "gemma-full" and full is not None and row["flop"] / (0.85 * full) > limit:
            limit, wanted = row["flop"] / (0.85 * full), "of our decode (limit: its FLOPs at 85% of our prefill rate)"
        yield _judgement(row, wanted, time / one, limit / one)
    peer = best_peer(row, only=(FA3, FLASHINFER))
    if peer is not None:
        yield _judgement(row, f"of the better of FA3 and FlashInfer ({peer[1]})", time / peer[0], 0.90)


def _speed(row: Row, label: str, limit: float) -> Iterator[Judgement]:
    """Our speed over a runner's."""
    time, theirs = ours(row), time_of(row, label)
    if time is not None and theirs is not None:
        yield _judgement(row, f"speed over {label}", theirs / time, limit, least=True)


def prefill(row: Row, document: Document) -> Iterator[Judgement]:
    """Long calls against the best peer, or the only one that runs."""
    if row["suite"] != "prefill":
        return
    if row["shape_name"] in ("llama-8b", "qwen3.5"):
        peer = best_peer(row)
        if peer is not None:
            yield from _speed(row, peer[1], 0.85)
    if row["shape_name"] == "gemma-sliding":
        yield from _speed(row, FLASHINFER, 0.85)
        yield from _speed(row, "flex", 1.8)
    if row["shape_name"] == "gemma-full" and row["length"] == 8192:
        yield from _speed(row, "executorch causal", 2.0)


def chunk(row: Row, document: Document) -> Iterator[Judgement]:
    """A chunk's rate against that of a full causal run."""
    if row["suite"] != "chunk":
        return
    full, own = _full_rate(row, document), rate(row)
    if full is not None and own is not None:
        yield _judgement(row, "TFLOP/s over the full causal run's", own / full, 0.85, least=True)


def plain(row: Row, document: Document) -> Iterator[Judgement]:
    """Launches without a CUDA graph against the best peer's."""
    own, peer = ours_plain(row), best_peer(row, "plain")
    if own is not None and peer is not None and row["suite"] in ("decode", "verify") and row["length"] == 4096:
        wanted = f"plain mode ({own[1]}) of the best peer's ({peer[1]})"
        yield _judgement(row, wanted, own[0] / peer[0], 1.0)


def other(row: Row, document: Document) -> Iterator[Judgement]:
    """The table's tile against the best one, for shapes that it was not tuned for."""
    ratio = row.get("sweep", {}).get("ratio")
    if row["suite"] == "other" and ratio is not None:
        yield _judgement(row, "of the best swept tile", ratio, 1.15)


JUDGES: tuple[Judge, ...] = (decode, verify, prefill, chunk, plain, other)


def judge(document: Document) -> list[Judgement]:
    """Every target for every case of a document."""
    return [found for each in JUDGES for row in document["rows"] for found in each(row, document)]


def count(document: Document) -> str:
    """How many targets are met."""
    found = judge(document)
    return f"{sum(j.met for j in found)} of {len(found)} targets met"


def lines(document: Document) -> list[str]:
    """A Markdown table of all judgements, and how many are met."""
    found = judge(document)
    table = ["| suite | case | wanted | value | target | |", "|---|---|---|---|---|---|", *(j.line() for j in found)]
    unmeasured = [row["case"] for row in document["rows"] if row["times"] and time_of(row, OURS) is None]
    table += [f"not measured: {case}" for case in unmeasured]
    return [*table, count(document)]
