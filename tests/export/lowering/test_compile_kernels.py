"""Worker processes compile kernels; none of them outlives the call, and lowering works without them."""

import errno
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from flashpte.export.lowering.cross_compile import compile_kernels


class Kernel:
    """Stands for Inductor's kernel; compiling one leaves a file that names the process."""

    def __init__(self, folder, number, act=lambda: None):
        self.file, self.act = folder / str(number), act

    def precompile(self, warm_cache_only):
        assert warm_cache_only
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")
        self.act()


def kernels(folder, count, acts=()):
    acts = dict(acts)
    return [Kernel(folder, number, acts.get(number, lambda: None)) for number in range(count)]


def processes(folder):
    """The process that compiled each kernel; each kernel was compiled once."""
    found = {int(file.name): file.read_text().split() for file in folder.iterdir()}
    assert all(len(ids) == 1 for ids in found.values())
    return {number: int(ids[0]) for number, ids in found.items()}


def rest():
    time.sleep(0.05)


def test_every_kernel_is_compiled_once_and_elsewhere(tmp_path):
    compile_kernels.fill_cache(kernels(tmp_path, 40, [(n, rest) for n in range(40)]), processes=3)
    found = processes(tmp_path)
    assert sorted(found) == list(range(40))
    assert len(set(found.values())) > 1
    assert os.getpid() not in found.values()
    assert not any(map(is_running, found.values()))


@pytest.mark.parametrize(("count", "most"), [(0, 8), (1, 8), (3, 8), (40, 1)])
def test_processes_are_not_worth_it(count, most, tmp_path):
    compile_kernels.fill_cache(kernels(tmp_path, count), most)
    assert not processes(tmp_path)


def fail():
    raise ValueError("not a kernel")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("act", [fail, die])
def test_a_kernel_that_ends_its_process_or_fails_is_left_out_alone(act, tmp_path, capfd):
    compile_kernels.fill_cache(kernels(tmp_path, 20, [(7, act)]), processes=4)
    assert sorted(processes(tmp_path)) == list(range(20))
    assert capfd.readouterr() == ("", "")


def hang():
    time.sleep(600)


def test_a_process_that_hangs_is_not_waited_for(tmp_path):
    compile_kernels.fill_cache(kernels(tmp_path, 8, [(2, hang)]), processes=2, patience=1.0)
    assert not any(map(is_running, processes(tmp_path).values()))


def assemble():
    """Starts a child process, as Triton starts its assembler."""
    subprocess.run(["sleep", "600.125"])


def assembles(process):
    try:
        return (process / "cmdline").read_bytes() == b"sleep\x00600.125\x00"
    except OSError:  # the process has ended
        return False


def raise_timeout(number, frame):
    raise TimeoutError("a deadline of the caller's")


@pytest.mark.parametrize(
    ("handler", "raised"), [(signal.default_int_handler, KeyboardInterrupt), (raise_timeout, TimeoutError)]
)
def test_an_interrupted_call_leaves_no_process(handler, raised, tmp_path):
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(raised):
            compile_kernels.fill_cache(kernels(tmp_path, 8, [(2, hang), (3, assemble)]), processes=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert not any(map(is_running, processes(tmp_path).values()))
    assert not any(map(assembles, Path("/proc").glob("[0-9]*")))


def test_processes_end_when_their_parent_is_killed(tmp_path):
    slow = [(number, lambda: time.sleep(0.3)) for number in range(200)]
    parent = multiprocessing.get_context("fork").Process(
        target=compile_kernels.fill_cache, args=(kernels(tmp_path, 200, slow), 2)
    )
    parent.start()
    wait_for(lambda: len(list(tmp_path.iterdir())) >= 4)
    parent.kill()
    parent.join(10)
    workers = {int(file.read_text()) for file in tmp_path.iterdir() if file.read_text()}
    assert len(workers) == 2
    wait_for(lambda: not any(map(is_running, workers)))


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_daemon_which_may_have_no_processes_has_none(tmp_path):
    call = multiprocessing.get_context("fork").Process(
        target=compile_kernels.fill_cache, args=(kernels(tmp_path, 8), 2), daemon=True
    )
    call.start()
    call.join(60)
    assert call.exitcode == 0
    assert not processes(tmp_path)


@pytest.mark.parametrize("possible", [0, 1])
def test_where_there_is_no_memory_for_more_those_that_there_are_do_all(possible, tmp_path, monkeypatch):
    forks = [os.fork] * possible

    def fork():
        if not forks:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return forks.pop()()

    monkeypatch.setattr(os, "fork", fork)
    compile_kernels.fill_cache(kernels(tmp_path, 8), processes=3)
    assert len(processes(tmp_path)) == 8 * possible


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
