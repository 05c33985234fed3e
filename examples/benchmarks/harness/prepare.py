"""Compiles everything beforehand, in processes side by side, so that the timed process finds it in caches.

    python -m harness.prepare JOB

is one such process: it calls a runner once for each case and prints a line of JSON for each. Triton, Inductor and
FlashInfer keep what they compile on disk. What was not prepared in time is not compiled again where it is timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.cases import SHAPES, Case, Shape

ROOT = Path(__file__).resolve().parents[1]
SWEEP = "sweep"  # tiles of our own kernels, beside the runners
SWEEP_PARTS = 4


@dataclasses.dataclass(frozen=True)
class Job:
    """Cases that one process prepares for one runner, or its share of them."""

    runner: str
    cases: tuple[Case, ...]
    part: tuple[int, int] = (0, 1)

    def to_json(self) -> str:
        shapes = {case.shape_name: dataclasses.asdict(case.shape) for case in self.cases}
        return json.dumps({**dataclasses.asdict(self), "shapes": shapes})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job as written; its shapes are entered into the table of shapes."""
        given = json.loads(text)
        SHAPES.update({name: Shape(**fields) for name, fields in given["shapes"].items()})
        return cls(given["runner"], tuple(Case(**fields) for fields in given["cases"]), tuple(given["part"]))


@dataclasses.dataclass
class Outcome:
    """What became of the jobs: seconds of each, and reasons by ``runner, case`` of what is not prepared."""

    seconds: dict[str, float]
    failed: dict[tuple[str, str], str]


def plan(runners, cases: list[Case], sweeps: list[Case]) -> list[Job]:
    """Jobs for what the runners compile, those that take longest first."""
    jobs = []
    for runner in runners:
        for group in runner.groups(cases):
            jobs += [Job(runner.label, tuple(group), (i, runner.parts)) for i in range(runner.parts)]
    jobs += [Job(SWEEP, (case,), (i, SWEEP_PARTS)) for case in sweeps for i in range(SWEEP_PARTS)]
    # Compilers of C++ first: they are processes of many seconds that no cache shortens.
    order = {"flashinfer": 0, "flashpte aoti": 1, "executorch": 2, "executorch causal": 2}
    return sorted(jobs, key=lambda job: (order.get(job.runner, 3), -len(job.cases)))


def run_jobs(jobs: list[Job], limit: float, workers: int | None = None) -> Outcome:
    """Runs the jobs side by side; when ``limit`` seconds have passed, what still runs is ended."""
    outcome = Outcome({}, {})
    workers = workers or max(1, (os.cpu_count() or 2) - 1)
    waiting, running = list(jobs), {}
    start = time.monotonic()
    # Every process would start a pool of compilers of its own.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    while waiting or running:
        late = time.monotonic() - start > limit
        while waiting and not late and len(running) < workers:
            job = waiting.pop(0)
            out = tempfile.TemporaryFile("w+")  # noqa: SIM115
            command = [sys.executable, "-W", "ignore", "-m", "harness.prepare", job.to_json()]
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            running[process] = job, out, time.monotonic()
        for process, (job, out, began) in list(running.items()):
            if process.poll() is None and not late:
                continue
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its compilers too
                process.wait()
            del running[process]
            name = f"{job.runner}: {job.cases[0].key} {job.part[0] + 1}/{job.part[1]}"
            outcome.seconds[name] = round(time.monotonic() - began, 1)
            out.seek(0)
            _collect(job, out.read(), "not prepared in time" if late else "", outcome)
        if late:
            for job in waiting:
                _collect(job, "", "not prepared in time", outcome)
            waiting = []
        time.sleep(0.1)
    return outcome


def _collect(job: Job, printed: str, reason: str, outcome: Outcome) -> None:
    """Takes note of the cases of a job that did not succeed."""
    said: dict[str, str] = {}
    for line in printed.splitlines():
        if line.startswith('{"prepared"'):
            entry = json.loads(line)
            said[entry["prepared"]] = entry["error"]
    last = (printed.strip().splitlines() or ["nothing printed"])[-1]
    for case in job.cases:
        error = said.get(case.key, reason or f"preparing ended: {last}")
        if error:
            outcome.failed.setdefault((job.runner, case.key), error[:300])


def main() -> None:
    import torch

    from harness import sweep
    from harness.inputs import Inputs
    from harness.runners import RUNNERS

    job = Job.from_json(sys.argv[1])
    torch.manual_seed(0)
    for number, case in enumerate(job.cases):
        error = ""
        try:
            inputs = Inputs.make(case, 1)
            if job.runner == SWEEP:
                sweep.compile_part(inputs, *job.part)
            else:
                runner = RUNNERS[job.runner]
                if number == 0 and job.part[1] > 1:
                    runner.part(*job.part)
                for variant in runner.variants(inputs).values():
                    variant.result()
            torch.cuda.synchronize()
        except Exception as caught:
            error = describe(caught)
        print(json.dumps({"prepared": case.key, "error": error}), flush=True)


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    main()
