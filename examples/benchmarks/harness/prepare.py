"""Compiles everything beforehand, in processes side by side, so that the timed process finds it in caches.

    python -m harness.prepare

is one such process: it reads jobs as lines of JSON, calls their runner once for each case, and prints a line of JSON
for each. Triton, Inductor and FlashInfer keep what they compile on disk. What was not prepared in time is not compiled
again where it is timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from harness.cases import SHAPES, Case, Shape

ROOT = Path(__file__).resolve().parents[1]
SWEEP = "sweep"  # tiles of our own kernels, beside the runners
SWEEP_PARTS = 4
FINISHED = "finished\n"


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
    """What became of the jobs: reasons by ``runner, case`` of what is not prepared."""

    failed: dict[tuple[str, str], str]


def plan(runners, cases: list[Case], sweeps: list[Case]) -> list[Job]:
    """Jobs for what the runners compile: the slowest compilers first, then our own, then everybody else's."""
    jobs = []
    for runner in runners:
        for group in runner.groups(cases):
            jobs += [Job(runner.label, tuple(group), (i, runner.parts)) for i in range(runner.parts)]
    jobs += [Job(SWEEP, (case,), (i, SWEEP_PARTS)) for case in sweeps for i in range(SWEEP_PARTS)]
    order = {"flashinfer": 0, "flashpte aoti": 1, SWEEP: 4}
    ours = {runner.label for runner in runners if runner.ours}
    return sorted(jobs, key=lambda job: (order.get(job.runner, 2 if job.runner in ours else 3), -len(job.cases)))


def run_jobs(jobs: list[Job], limit: float, workers: int | None = None) -> Outcome:
    """Runs the jobs side by side; when ``limit`` seconds have passed, what still runs is ended."""
    outcome = Outcome({})
    waiting = queue.SimpleQueue[Job]()
    for job in jobs:
        waiting.put(job)
    pool = [Worker() for _ in range(min(len(jobs), workers or max(1, (os.cpu_count() or 2) - 1)))]
    threads = [threading.Thread(target=worker.work, args=(waiting, outcome), daemon=True) for worker in pool]
    deadline = time.monotonic() + limit
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for worker in pool:
        worker.stop()
    for thread in threads:
        thread.join()
    return outcome


class Worker:
    """A process that is given one job after the other, and started again if one ends it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.stopped = False
        self.lock = threading.Lock()

    def start(self) -> subprocess.Popen[str] | None:
        """The process, running, or ``None`` if there is no time for it."""
        with self.lock:
            if self.stopped:
                return None
            if self.process is None or self.process.poll() is not None:
                path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
                # Every process would start a pool of compilers of its own.
                single = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
                self.process = subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "harness.prepare"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=os.environ | single,
                    start_new_session=True,
                )
            return self.process

    def stop(self) -> None:
        """Ends the process and the compilers that it started."""
        with self.lock:
            self.stopped = True
            if self.process is not None and self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def work(self, waiting: queue.SimpleQueue[Job], outcome: Outcome) -> None:
        """Takes jobs until there are none; those that are left when time is up count as failed."""
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            printed, process = [], self.start()
            if process is not None and process.stdin is not None and process.stdout is not None:
                try:
                    process.stdin.write(job.to_json() + "\n")
                    process.stdin.flush()
                except OSError:
                    printed.append("its process ended")
                for line in process.stdout:
                    if line == FINISHED:
                        break
                    printed.append(line)
                else:
                    process.wait()
            _collect(job, printed, "not prepared in time" if self.stopped else "", outcome)
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()


def _collect(job: Job, printed: list[str], reason: str, outcome: Outcome) -> None:
    """Takes note of the cases of a job that did not succeed."""
    said: dict[str, str] = {}
    for line in printed:
        if line.startswith('{"prepared"'):
            entry = json.loads(line)
            said[entry["prepared"]] = entry["error"]
    last = (printed or ["nothing printed"])[-1].strip()
    for case in job.cases:
        error = said.get(case.key, reason or f"preparing ended: {last}")
        if error:
            outcome.failed.setdefault((job.runner, case.key), error[:300])


def do(job: Job) -> None:
    """Calls the job's runner once for each case and prints what came of it."""
    import torch

    from harness import sweep
    from harness.inputs import Inputs
    from harness.runners import RUNNERS

    for case in job.cases:
        error = ""
        try:
            inputs = Inputs.make(case, 1)
            if job.runner == SWEEP:
                sweep.compile_part(inputs, *job.part)
            else:
                runner = RUNNERS[job.runner]
                runner.part(*job.part)
                for variant in runner.variants(inputs).values():
                    variant.result()
            torch.cuda.synchronize()
        except Exception as caught:
            error = describe(caught)
        print(json.dumps({"prepared": case.key, "error": error}), flush=True)
    torch.cuda.synchronize()  # an error that stays ends this process, and another takes over
    torch.cuda.empty_cache()


def main() -> None:
    for line in sys.stdin:
        job = Job.from_json(line)
        do(job)
        print(FINISHED, end="", flush=True)


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    main()
