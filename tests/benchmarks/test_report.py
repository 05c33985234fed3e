"""The tables, the plots and the commands, from result files."""

import json

import attention
import pytest
import torch
import tune
from harness import report
from harness.plots import draw, speeds
from harness.results import load, save


def test_table(document, row_of):
    row = row_of("decode llama-8b L=2048 M=1")
    row["times"]["flashpte"]["graph"], row["map"]["flashpte"] = 7.0, 32.0
    row["times"]["fa3"] = {"failed": "no library given (--fa3)"}
    document["left_out"] = ["verify somewhere"]
    text = "\n".join(report.lines(document))
    line = next(line for line in text.splitlines() if line.startswith("| llama-8b L=2048 M=1 | 1.91"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["llama-8b L=2048 M=1", "1.91", "7.00", "32.0 / 32"]
    assert cells[-1] == "flashinfer"
    assert "- fa3: no library given (--fa3) (1: llama-8b L=2048 M=1, ...)" in text
    assert "left out: verify somewhere" in text
    assert "| llama-8b L=3000 M=1 | 1.05 | 1.00 | 1.05 | 3 | SplitK block_n=64 |" in text


def numbers(row):
    """What a row holds, in the digits of a file."""
    return json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.6g}"))


def test_files_keep_the_rows(document, tmp_path):
    save(document, tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["chunk", "decode", "other", "prefill", "verify"]
    again = load(tmp_path)
    assert [numbers(row) for row in again["rows"]] == [numbers(row) for row in document["rows"]]
    assert again["ceilings"] == document["ceilings"]


def test_a_case_that_was_left_out_stays_so(document, tmp_path):
    document["rows"] = [row for row in document["rows"] if row["suite"] == "decode"]
    document["left_out"] = ["decode one", "verify another"]
    document["not_prepared"] = {"flex: decode one": "not prepared in time"}
    save(document, tmp_path)
    again = load(tmp_path)
    assert again["left_out"] == document["left_out"]
    assert again["not_prepared"] == document["not_prepared"]


def test_speeds_are_fractions_of_the_floor(row_of):
    found = speeds(row_of("decode llama-8b L=2048 M=1"))
    assert found["flashpte"] == pytest.approx(1.0)
    assert found["fa3"] == pytest.approx(1 / 1.5)


def test_plots(document, tmp_path):
    pytest.importorskip("matplotlib")
    paths = draw(document, tmp_path / "plots")
    assert [path.name for path in paths] == [
        f"{suite}.png" for suite in ("decode", "verify", "prefill", "chunk", "other")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def printed(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


def test_the_command_shows_an_earlier_result(document, tmp_path, monkeypatch, capsys):
    save(document, tmp_path)
    out = printed(attention, monkeypatch, capsys, "--from-json", tmp_path)
    assert "targets met" in out
    assert "MISSED" not in out
    short = printed(attention, monkeypatch, capsys, "--from-json", tmp_path, "--summary")
    assert "targets met" in short
    assert len(short) < len(out)
    one = tmp_path / "decode.json"
    assert "### verify" not in printed(attention, monkeypatch, capsys, "--from-json", one)
    against = printed(attention, monkeypatch, capsys, "--from-json", tmp_path, "--against", one)
    assert "differ by less than 5%" in against


def test_nothing_to_show_is_one_line(tmp_path, monkeypatch):
    for given in (tmp_path, tmp_path / "none.json"):
        monkeypatch.setattr("sys.argv", ["attention.py", "--from-json", str(given)])
        with pytest.raises(SystemExit, match=r"^error: "):
            attention.main()


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
