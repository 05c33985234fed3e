"""Measures the time of a program's methods by kernel family, at chosen contexts."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from flashpte.export.common.errors import Option, ProgramError, UsageError
from flashpte.export.common.options import DECODE, DEFAULT_CONTEXTS, DEFAULT_PROFILE_PREFILL, PREFILL, TARGET_VERIFY
from flashpte.export.common.tables import table_lines
from flashpte.export.runtime.kernel_families import FAMILIES, family
from flashpte.export.runtime.language_model import Limits, RunsMethods, plan_chunks, read_limits

_WARMUP, _TIMED, _PROFILED = 3, 20, 5


@dataclasses.dataclass(frozen=True)
class Case:
    """The calls that one row measures: consecutive calls from one position.

    Attributes:
        name: ``prefill``, ``decode`` or ``target_verify``.
        context: tokens in the cache before the first call.
        chunks: tokens of each call.
    """

    name: str
    context: int
    chunks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured case; times are in microseconds for all of its calls.

    Attributes:
        case: the case.
        total_us: median time between two CUDA events around the calls, without a profiler.
        families_us: time in kernels of each family.
        kernels: number of kernels launched.
        slowest: names of the 12 kernels that took the most time, with that time.
    """

    case: Case
    total_us: float
    families_us: dict[str, float]
    kernels: int
    slowest: tuple[tuple[str, float], ...]

    @property
    def idle_us(self) -> float:
        """Time in microseconds in which no kernel ran: gaps between launches."""
        return max(0.0, self.total_us - sum(self.families_us.values()))


@dataclasses.dataclass(frozen=True)
class ProfileReport:
    """Rows in the order of the plan, the GPU's name, and the methods that ran as CUDA graphs (``captured``)."""

    rows: tuple[Row, ...]
    gpu: str
    captured: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        rows = [{**dataclasses.asdict(row), "idle_us": row.idle_us} for row in self.rows]
        return {"gpu": self.gpu, "cuda_graphs": list(self.captured), "rows": rows}

    def lines(self) -> list[str]:
        """The report for people: a table in microseconds."""
        rows = [("method", "tokens", "context", "total us", *FAMILIES, "idle", "kernels")]
        for row in self.rows:
            times = (row.total_us, *(row.families_us.get(name, 0.0) for name in FAMILIES), row.idle_us)
            tokens = "+".join(map(str, row.case.chunks))
            rows.append((row.case.name, tokens, str(row.case.context), *(f"{t:.1f}" for t in times), str(row.kernels)))
        graphs = ", ".join(self.captured) or "none"
        return [*table_lines(rows), f"{self.gpu}; CUDA graphs: {graphs}"]


def plan_profile(program: RunsMethods, contexts: Sequence[int] | None, prefill: int | None) -> tuple[Case, ...]:
    """Plans what to measure: every method of the target at each context.

    Args:
        program: a language model.
        contexts: tokens in the cache before the calls; ``None`` for those of 1,024, 4,096 and 16,384 that fit, or half
            of the cache if none fits.
        prefill: tokens of the prefill, run in chunks; ``None`` for 2,048, or fewer if fewer fit.

    Raises:
        UsageError: a context, or the prefill after it, does not fit in the cache, or the prefill is too short.
    """
    return plan_cases(read_limits(program.signatures, program.constants), contexts, prefill)


def plan_cases(limits: Limits, contexts: Sequence[int] | None, prefill: int | None) -> tuple[Case, ...]:
    """Does the same as :func:`plan_profile`, from the lengths that the methods take."""
    longest = max((limits.verify or 0), int(limits.decode), limits.prefill[0] if limits.prefill else 0)
    if contexts is None:
        contexts = [c for c in DEFAULT_CONTEXTS if c + longest <= limits.max_seq_len]
        contexts = contexts or [max(1, (limits.max_seq_len - longest) // 2)]
    cases = []
    for context in contexts:
        if context + longest > limits.max_seq_len:
            raise UsageError(Option("contexts", context), f": the cache holds {limits.max_seq_len} positions")
        room = limits.max_seq_len - context
        if limits.prefill is not None and room >= limits.prefill[0]:
            if prefill is not None and prefill > room:
                raise UsageError(
                    Option("prefill", prefill),
                    f" at a context of {context}: the cache holds {limits.max_seq_len} positions",
                )
            if prefill is not None and prefill < limits.prefill[0]:
                raise UsageError(Option("prefill", prefill), f": must be at least {limits.prefill[0]}")
            chunks = plan_chunks(prefill or min(DEFAULT_PROFILE_PREFILL, room), limits)
            cases.append(Case(PREFILL, context, tuple(size for _, size in chunks)))
        if limits.verify is not None:
            cases.append(Case(TARGET_VERIFY, context, (limits.verify,)))
        if limits.decode:
            cases.append(Case(DECODE, context, (1,)))
    return tuple(cases)


def profile_program(
    program: RunsMethods, cases: Iterable[Case], *, progress: Callable[[str], None] | None = None
) -> ProfileReport:
    """Measures a program's methods; fills its buffers with random values and resets them afterwards.

    The values do not matter: every method does the same work for any keys.

    Raises:
        ProgramError: there is no GPU, or the program failed.
    """
    if not torch.cuda.is_available():
        raise ProgramError("no GPU: a profile needs one")
    tell = progress or (lambda stage: None)
    generator = torch.Generator(device="cuda").manual_seed(0)
    for buffer in program.buffers.values():
        if buffer.is_floating_point():
            buffer.normal_(generator=generator)
    rows = []
    for case in cases:
        tell(f"measuring {case.name} of {sum(case.chunks)} at {case.context}")
        rows.append(_measure(program, case))
    program.reset()
    return ProfileReport(tuple(rows), torch.cuda.get_device_name(), tuple(getattr(program, "captured", ())))


def _measure(program: RunsMethods, case: Case) -> Row:
    vocabulary = int(program.constants["get_vocab_size"])
    generator = torch.Generator().manual_seed(0)
    calls, position = [], case.context
    for size in case.chunks:
        tokens = torch.randint(0, vocabulary, (1, size), generator=generator).cuda()
        calls.append((tokens, torch.arange(position, position + size).cuda()))
        position += size

    def run() -> None:
        for inputs in calls:
            program.run(case.name, *inputs)

    for _ in range(_WARMUP):
        run()
    program.synchronize()
    times = []
    for _ in range(_TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_PROFILED):
            run()
        torch.cuda.synchronize()
    seen = [
        (str(event.name), float(event.time_range.elapsed_us()))
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not seen:
        raise ProgramError("the profiler saw no kernel: CUPTI is missing or another profiler is running")
    return summarise(case, statistics.median(times), seen, _PROFILED)


def summarise(case: Case, total_us: float, seen: Iterable[tuple[str, float]], runs: int) -> Row:
    """Makes a row from the kernels ``(name, microseconds)`` of ``runs`` runs."""
    families: dict[str, float] = dict.fromkeys(FAMILIES, 0.0)
    names: Counter[str] = Counter()
    count = 0
    for name, duration in seen:
        families[family(name)] += duration / runs
        names[name] += duration / runs  # type: ignore[assignment]
        count += 1
    return Row(case, total_us, families, round(count / runs), tuple(names.most_common(12)))
