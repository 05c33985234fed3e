"""The result files in the tree, and what the docs take from them."""

import re
from pathlib import Path

import pytest
from harness import schema, tables
from harness.doc_tables import TABLES

FILES = sorted(schema.RESULTS.glob("*/*.json"))
PAGES = tables.documents()
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
ANCHOR = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")
GOOD = {"schema": 1, "suite": "reads", "gpu": "a GPU", "date": "2026-01-01", "rows": [{"kv_bytes": 8, "time_us": 1.5}]}


def name(path):
    return str(path.relative_to(tables.ROOT))


def test_there_are_results():
    assert {path.parent.name for path in FILES} == {"h100", "h200"}
    assert sum(bool(tables.names(page.read_text())) for page in PAGES) >= 3


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_file_is_of_the_schema(path):
    data = schema.read(path)
    assert path.stem == data["suite"]
    assert path.parent.name.upper() in data["gpu"]
    assert data["rows"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_what_the_results_give(page):
    text = page.read_text()
    assert text.count("<!-- table:") == text.count("<!-- end -->") == len(tables.names(text))
    assert tables.filled(text, TABLES) == text, "run: cd examples/benchmarks && python -m harness.tables"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_cites_exists(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def anchors(text):
    """The names that GitHub gives headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_section_that_a_page_cites_exists(page):
    cited = [(page.parent / link if link else page, anchor) for link, anchor in ANCHOR.findall(page.read_text())]
    missing = [(name(other), anchor) for other, anchor in cited if anchor not in anchors(other.read_text())]
    assert missing == []


def test_every_result_and_note_is_cited():
    cited = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(page.read_text())}
    pictures = [path for path in schema.RESULTS.glob("*/*") if path.suffix != ".json"]
    notes = sorted((tables.ROOT / "docs" / "notes").glob("*.md"))
    assert [name(path) for path in (*FILES, *pictures, *notes) if path not in cited] == []


def test_every_table_is_shown():
    shown = [shown for page in PAGES for shown in tables.names(page.read_text())]
    assert sorted(set(shown)) == sorted(TABLES)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": 2}, "schema 2, not 1"),
        ({"suite": "verifies"}, "the suite 'verifies' is not of this schema"),
        ({"date": "yesterday"}, "date is 'yesterday'"),
        ({"machine": "x"}, "the key 'machine' is not of this schema"),
        ({"rows": [{"kv_bytes": 8}]}, "row 0: time_us is missing"),
        ({"rows": [{"kv_bytes": 8, "time_us": "fast"}]}, "row 0: time_us is 'fast'"),
        ({"rows": [{"kv_bytes": 8.5, "time_us": 1.0}]}, "row 0: kv_bytes is 8.5"),
        ({"rows": [{"kv_bytes": 8, "time_us": 1.0, "us": 1.0}]}, "row 0: the key 'us' is not of this schema"),
    ],
)
def test_what_is_not_of_the_schema_is_named(change, problem, tmp_path):
    assert schema.problems(GOOD) == []
    assert schema.problems(GOOD | change) == [problem]
    with pytest.raises(ValueError, match=re.escape(problem)):
        schema.write(GOOD | change, tmp_path / "reads.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_header_key_is_named():
    assert schema.problems({key: value for key, value in GOOD.items() if key != "gpu"}) == ["gpu is missing"]


def test_a_written_file_is_read_back_with_a_row_a_line(tmp_path):
    path = tmp_path / "new" / "reads.json"
    schema.write(GOOD, path)
    assert schema.read(path) == GOOD
    assert '  {"kv_bytes": 8, "time_us": 1.5}' in path.read_text().splitlines()
    schema.write(GOOD | {"rows": []}, path)
    assert schema.read(path)["rows"] == []
    assert list(path.parent.iterdir()) == [path]


def test_only_marked_tables_are_rewritten():
    text = "before\n<!-- table: one -->\nold\n<!-- end -->\nafter\n"
    new = tables.filled(text, {"one": lambda: ["| a |"]})
    assert new == "before\n<!-- table: one -->\n\n| a |\n\n<!-- end -->\nafter\n"
    assert tables.filled(new, {"one": lambda: ["| a |"]}) == new
    with pytest.raises(KeyError):
        tables.filled(text, {})


@pytest.mark.parametrize("script", ["masks", "whole_model", "speculative", "tune"])
def test_every_benchmark_reads_the_tree(script, monkeypatch, capsys):
    module = __import__(script)
    gpu = "h100" if script == "tune" else "h200"
    texts = []
    for more in ([], ["--summary"]):
        monkeypatch.setattr("sys.argv", [script, "--from-json", str(schema.RESULTS / gpu), *more])
        module.main()
        texts.append(capsys.readouterr().out)
    assert len(texts[1]) > 0
    assert len(texts[0]) > len(texts[1])


def test_no_folder_of_results_is_left_in_docs():
    assert not list(Path(tables.ROOT / "docs").rglob("*.json"))
