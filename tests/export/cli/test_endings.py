"""``export-model`` ends cleanly after an interruption and when its output pipe is closed."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from flashpte.export.common.errors import ExportError

GEMMA = ("--target", "gemma4-31b", "--small", "--random-weights", "-q")


def entries(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def test_interrupt_in_this_process(export_model, stand_in, output):
    stand_in(inside=lambda: signal.raise_signal(signal.SIGINT))
    result = export_model(*GEMMA, "--output-dir", output)
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines() == ["export-model: interrupted; nothing written"]


@pytest.mark.parametrize("error", [RuntimeError, ExportError])
def test_an_interrupt_that_a_library_turns_into_an_error(export_model, stand_in, output, error):
    def inside():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error("something else") from None

    stand_in(inside=inside)
    result = export_model(*GEMMA, "--output-dir", output)
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines() == ["export-model: interrupted; nothing written"]


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "terminated"),
    ],
)
def test_a_signal_in_the_middle(tmp_path, number, code, said):
    """Signals a real process during an export; it prints one line after the progress, and the folder is as it was."""
    process = start(*GEMMA[:-1], "--output-dir", tmp_path / "out")
    for line in process.stderr:
        if "export prefill" in line:
            break
    time.sleep(0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.splitlines()[-1] == f"export-model: {said}; nothing written"
    assert "Traceback" not in err
    assert not out
    assert not entries(tmp_path)


def start(*arguments, **kwargs):
    command = [sys.executable, "-c", "import sys; from flashpte.export.cli import main; sys.exit(main())"]
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A process that nohup or a shell's background job started ignores signals, and its children inherit that.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        return subprocess.Popen([*command, *map(str, arguments)], text=True, env=environment, **kwargs)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces ``export_model``: stages and commits a folder, then calls the test's function."""
    import flashpte.export.pipeline as pipeline
    from flashpte.export.files.output_folder import atomic_folder

    def install(inside=lambda: None, after=lambda: None):
        def export_model(plan, output, **options):
            with atomic_folder(output) as (result, _):
                (result / "manifest.json").write_text('{"generator": "flashpte"}')
                inside()
            after()
            names = ["folder", "model", "weights", "arch"]
            lowered = dataclasses.make_dataclass("Lowered", names)(output, output / "model.pte", None, "sm_90")
            return pipeline.ExportResult(plan, (lowered,), {})

        monkeypatch.setattr(pipeline, "export_model", export_model)

    return install


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, "terminated"), (signal.SIGHUP, "terminated")])
def test_termination_cleans_up_and_handlers_are_put_back(export_model, stand_in, tmp_path, output, number, said):
    stand_in(inside=lambda: signal.raise_signal(number))
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    try:
        result = export_model(*GEMMA, "--output-dir", output)
        after = signal.getsignal(number)
    finally:
        signal.signal(number, before)
    assert result.code == 128 + number
    assert result.err.splitlines() == [f"export-model: {said}; nothing written"]
    assert not entries(tmp_path)
    assert after is signal.SIG_DFL


def test_an_ignored_hangup_stays_ignored(export_model, stand_in, output):
    stand_in(inside=lambda: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert export_model(*GEMMA, "--output-dir", output).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_after_the_output_is_there_says_so(export_model, stand_in, output):
    stand_in(after=lambda: signal.raise_signal(signal.SIGINT))
    result = export_model(*GEMMA, "--output-dir", output)
    assert result.code == 130
    assert result.err.splitlines() == [f"export-model: interrupted; {output} is complete"]


def test_a_report_that_fails_after_the_export(export_model, stand_in, tmp_path, output):
    folder = tmp_path / "reports"
    folder.mkdir()
    stand_in(after=folder.rmdir)
    result = export_model(*GEMMA, "--output-dir", output, "--report", folder / "report.json")
    assert result.code == 1
    assert f"report.json cannot be written: No such file or directory; {output} is complete" in result.error
    assert str(output) in result.out


def test_a_folder_that_appears_meanwhile_is_not_called_complete(export_model, stand_in, output):
    def appear():
        output.mkdir()
        (output / "thesis.tex").write_text("precious")

    stand_in(inside=appear)
    result = export_model(*GEMMA, "--output-dir", output)
    assert result.code == 1
    assert f"{output} is not empty" in result.error
    assert "complete" not in result.error


@pytest.mark.parametrize("stdout", ["/dev/full", "closed"])
def test_stdout_that_takes_nothing(stdout):
    if stdout == "closed":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(stdout, os.O_WRONLY)
    process = start("--list-targets", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=60)
    if stdout == "closed":
        assert (process.returncode, err) == (0, "")
    else:
        assert process.returncode == 1
        assert err == "export-model: error: cannot print the result: No space left on device\n"
