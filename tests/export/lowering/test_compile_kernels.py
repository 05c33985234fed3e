"""Kernels are compiled in processes of their own, of which none outlives the call and none is needed."""

import os
import signal
import time

import pytest

from flashpte.export.lowering.cross_compile import compile_kernels


class Kernel:
    """Stands for Inductor's: compiling one leaves a file that names the process."""

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
    """Which process compiled which kernel; each kernel once."""
    found = {int(file.name): file.read_text().split() for file in folder.iterdir()}
    assert all(len(ids) == 1 for ids in found.values())
    return {number: int(ids[0]) for number, ids in found.items()}


def rest():
    time.sleep(0.05)


def test_every_kernel_is_compiled_once_and_elsewhere(tmp_path):
    compile_kernels.fill_cache(kernels(tmp_path, 40, [(n, rest) for n in range(40)]), processes=3)
    found = processes(tmp_path)
    assert sorted(found) == list(range(40))
    assert len(set(found.values())) == 3
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


def test_an_interrupted_call_leaves_no_process(tmp_path):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            compile_kernels.fill_cache(kernels(tmp_path, 8, [(2, hang), (3, hang)]), processes=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert not any(map(is_running, processes(tmp_path).values()))


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
