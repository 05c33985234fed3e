"""The table, the plots and the command, from a JSON file."""

import json

import attention
import pytest
import torch
import tune
from harness import table
from harness.plots import draw, speeds
from harness.results import load, save


def test_table(document, row_of):
    row = row_of("decode llama-8b L=2048 M=1")
    row["times"]["flashpte"]["graph"], row["map"]["flashpte"] = 7.0, 32.0
    row["times"]["fa3"] = {"failed": "no library given (--fa3)"}
    document["left_out"] = ["verify somewhere"]
    text = "\n".join(table.lines(document))
    line = next(line for line in text.splitlines() if line.startswith("| llama-8b L=2048 M=1 | 1.91"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["llama-8b L=2048 M=1", "1.91", "7.00", "32.0 / 32"]
    assert cells[-1] == "flashinfer"
    assert "- fa3: no library given (--fa3) (1: llama-8b L=2048 M=1, ...)" in text
    assert "left out: verify somewhere" in text
    assert "| llama-8b L=3000 M=1 | 1.05 | 1.00 | 1.05 | 3 | block_n=64 |" in text


def test_saving_keeps_the_document(document, tmp_path):
    path = tmp_path / "results.json"
    save(document, path)
    assert load(path) == document
    assert list(tmp_path.iterdir()) == [path]


def test_speeds_are_fractions_of_the_floor(row_of):
    found = speeds(row_of("decode llama-8b L=2048 M=1"))
    assert found["flashpte"] == pytest.approx(1.0)
    assert found["fa3"] == pytest.approx(1 / 1.5)


def test_plots(document, tmp_path):
    pytest.importorskip("matplotlib")
    paths = draw(document, tmp_path / "plots")
    assert [path.name for path in paths] == [
        f"attention-{suite}.png" for suite in ("decode", "verify", "prefill", "chunk", "other")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_command_shows_an_earlier_result(document, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    monkeypatch.setattr("sys.argv", ["attention.py", "--from-json", str(path)])
    attention.main()
    assert "targets met" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["attention.py", "--from-json", str(path), "--against", str(path)])
    attention.main()
    assert "differ by less than 5%" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [attention, tune])
def test_without_a_gpu_one_line_says_so(module, monkeypatch):
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit, match=r"^error: .* needs a CUDA GPU"):
        module.main()


def test_random_shapes_are_the_same_for_a_seed_and_small_enough():
    first, again, other = (
        tune.grid(tune.parse(["--random", "30", "--seed", seed, *more]))
        for seed, more in (("1", []), ("1", ["--narrow"]), ("2", []))
    )
    assert [case.name for case in first] == [case.name for case in again] != [case.name for case in other]
    assert {case.suite for case in first} == {"tune"}
    assert {case.suite for case in again} == {"other"}  # the benchmark's choice of tiles
    assert all(case.input_bytes <= tune.MOST_BYTES and case.flop <= tune.MOST_FLOP for case in first)
    assert [case.rows == 1 for case in first[:3]] == [True, False, False]
    assert all(case.rows == case.length for case in first[2::3])


def test_grid_of_the_tuning_script():
    args = tune.parse(["--dims", "64", "--groups", "2", "--lengths", "4096", "--prefill-lengths", "2048"])
    assert [(case.rows, case.length, case.shape.group) for case in tune.grid(args)] == [
        (1, 4096, 2),
        (4, 4096, 2),
        (16, 4096, 2),
        (2048, 2048, 2),
    ]
