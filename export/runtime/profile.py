"""Measures the time of a program's methods by kernel family, at chosen contexts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from flashpte.export.common.errors import Option, ProgramError, UsageError
from flashpte.export.common.options import DECODE, DEFAULT_CONTEXTS, DEFAULT_PROFILE_PREFILL, PREFILL, TARGET_VERIFY
from flashpte.export.common.tables import table_lines
from flashpte.export.files.dtypes import read_dtype
from flashpte.export.runtime.floors import Ceilings, floors, has_floors, measure_ceilings
from flashpte.export.runtime.kernel_families import FAMILIES, family
from flashpte.export.runtime.language_model import Limits, RunsMethods, plan_chunks, read_limits
from flashpte.export.runtime.timing import median_us
from flashpte.kernels.facts import Family

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
        busy_us: time in which at least one kernel ran. Kernels that start before the previous one ends wait for it, and
            both count in ``families_us``.
        floors_us: the least time of a family (:mod:`flashpte.export.runtime.floors`), where that is known.
    """

    case: Case
    total_us: float
    families_us: dict[Family, float]
    kernels: int
    slowest: tuple[tuple[str, float], ...]
    busy_us: float
    floors_us: dict[Family, float] = dataclasses.field(default_factory=dict)

    @property
    def idle_us(self) -> float:
        """Time in microseconds in which no kernel ran: gaps between launches."""
        return max(0.0, self.total_us - self.busy_us)

    @property
    def of_floor(self) -> float | None:
        """The total over the floor of all families; ``None`` if no floor is known."""
        return self.total_us / sum(self.floors_us.values()) if self.floors_us else None


@dataclasses.dataclass(frozen=True)
class ProfileReport:
    """Rows in the order of the plan, and what they were measured on.

    Attributes:
        rows: one per case.
        gpu: the GPU's name.
        captured: methods that ran as CUDA graphs.
        layers: layers of the model, if known.
        ceilings: the rates behind the floors; ``None`` if no floor is known.
    """

    rows: tuple[Row, ...]
    gpu: str
    captured: tuple[str, ...] = ()
    layers: int | None = None
    ceilings: Ceilings | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        rows = [{**dataclasses.asdict(row), "idle_us": row.idle_us, "of_floor": row.of_floor} for row in self.rows]
        ceilings = None if self.ceilings is None else dataclasses.asdict(self.ceilings)
        graphs = list(self.captured)
        return {"gpu": self.gpu, "cuda_graphs": graphs, "layers": self.layers, "ceilings": ceilings, "rows": rows}

    def lines(self) -> list[str]:
        """The report for people: a table in microseconds. ``(x 1.2)`` is a time divided by its floor."""
        rows = [("method", "tokens", "context", "total us", *FAMILIES, "idle", "kernels", "a layer")]
        for row in self.rows:
            totals = _beside_floor(row.total_us, row.of_floor)
            times = [
                _beside_floor(time, time / row.floors_us[name] if row.floors_us.get(name) else None)
                for name in FAMILIES
                for time in [row.families_us.get(name, 0.0)]
            ]
            tokens, context, calls = "+".join(map(str, row.case.chunks)), str(row.case.context), len(row.case.chunks)
            each = "" if not self.layers else f"{row.kernels / calls / self.layers:.1f}"
            idle = f"{row.idle_us:.1f}"
            rows.append((row.case.name, tokens, context, totals, *times, idle, str(row.kernels), each))
        notes = f"{self.gpu}; CUDA graphs: {', '.join(self.captured) or 'none'}"
        if self.ceilings is not None:
            read, rate = 1e-6 * self.ceilings.read_bytes_per_us, 1e-6 * self.ceilings.flop_per_us
            notes += f"; floors: weights, keys and values read at {read:.2f} TB/s, products at {rate:.0f} TFLOP/s"
        return [*table_lines(rows), notes]


def _beside_floor(time: float, ratio: float | None) -> str:
    return f"{time:.1f}" if ratio is None else f"{time:.1f} (x {ratio:.2f})"


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
    program: RunsMethods, cases: Sequence[Case], *, progress: Callable[[str], None] | None = None
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
    manifest = getattr(program, "manifest", {})
    model = manifest.get("model", {})
    ceilings = None
    if any(has_floors(manifest, case.name) for case in cases):
        tell("measuring the GPU")
        ceilings = measure_ceilings(read_dtype(model.get("dtype", "bfloat16")))
    for case in cases:
        tell(f"measuring {case.name} of {sum(case.chunks)} at {case.context}")
        row = _measure(program, case)
        if ceilings is not None:
            least = floors(manifest, case.name, case.context, case.chunks, ceilings)
            row = dataclasses.replace(row, floors_us=least)
        rows.append(row)
    program.reset()
    captured = tuple(getattr(program, "captured", ()))
    return ProfileReport(tuple(rows), torch.cuda.get_device_name(), captured, model.get("layers"), ceilings)


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

    total = median_us(run, warmup=_WARMUP, timed=_TIMED)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_PROFILED):
            run()
        torch.cuda.synchronize()
    seen = [
        (str(event.name), float(event.time_range.start), float(event.time_range.end))
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not seen:
        raise ProgramError("the profiler saw no kernel: CUPTI is missing or another profiler is running")
    return summarise(case, total, seen, _PROFILED)


def summarise(case: Case, total_us: float, seen: Iterable[tuple[str, float, float]], runs: int) -> Row:
    """Makes a row from the kernels ``(name, start, end)`` of ``runs`` runs, in microseconds."""
    families: dict[Family, float] = dict.fromkeys(FAMILIES, 0.0)
    names: Counter[str] = Counter()
    count, busy, until = 0, 0.0, float("-inf")
    for name, start, end in sorted(seen, key=lambda kernel: kernel[1]):
        families[family(name)] += (end - start) / runs
        names[name] += (end - start) / runs  # type: ignore[assignment]
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
        count += 1
    return Row(case, total_us, families, round(count / runs), tuple(names.most_common(12)), busy / runs)
