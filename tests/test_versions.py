"""tools/versions.py: what it counts of the tests, its table, what it refuses. Nothing is installed."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import versions
from helpers import ROOT

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="good"/>
<testcase classname="tests.test_a" name="bad[1]"><failure message="x"/></testcase>
<testcase classname="tests.test_a" name="left"><skipped/></testcase>
<testcase classname="" name="tests.test_b"><error/></testcase>
</testsuite></testsuites>"""


def result(torch: str, python: str, **tests: dict) -> dict:
    tiny = {"none": {"loss": 1.8931, "seconds": 9.0}, "whole": {"failed": "Unsupported"}}
    return {"torch": torch, "python": python, "source": "abc", "tiny": tiny, "files": 5, "tests": tests}


def test_tests_are_counted_by_file():
    found = versions.counted(ElementTree.fromstring(REPORT), ["test_a", "test_b", "test_c"])
    assert found["test_a"] == {"passed": 1, "skipped": 1, "failed": 1, "failures": ["bad[1]"]}
    assert found["test_b"] == {"passed": 0, "skipped": 0, "failed": 1, "failures": ["tests.test_b"]}
    assert found["test_c"]["passed"] == 0


def test_the_table_has_a_row_for_each_version_in_order_and_what_failed():
    files = versions.counted(ElementTree.fromstring(REPORT), ["test_a", "test_b"])
    old = result("2.9.1", "3.11.7", **files)
    text = versions.table([result("2.13.0+cpu", "3.13.0"), old, result("2.13.0+cpu", "3.11.7")])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line][2:]
    assert [" ".join(row[:2]) for row in rows] == ["2.9.1 3.11.7", "2.13.0+cpu 3.11.7", "2.13.0+cpu 3.13.0"]
    assert rows[0][2:] == ["abc", "loss 1.8931", "failed", "2 of 5", "1", "1", "2"]
    assert "- torch 2.9.1, Python 3.11.7: `test_a.py::bad[1]`" in text


def test_parts_are_all_files_once():
    parts = [versions.part_of_the_tests(f"{i}/3") for i in (1, 2, 3)]
    assert sorted(sum(parts, [])) == sorted((ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("words, sentence", [
    (["nothing/python"], "neither a version of torch nor an interpreter"),
    ([sys.executable, "--part", "4/3"], "--part is i/n"),
    (["2.11.0", "--python", "no-python"], "no-python cannot be run"),
])  # fmt: skip
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list, sentence: str) -> None:
    monkeypatch.setattr(versions, "RESULTS", tmp_path / "versions.json")
    if "2.11.0" in words:  # nothing is written into the repository
        monkeypatch.setattr(versions, "requirements", list)
        monkeypatch.setattr(versions, "part_of_the_tests", lambda part: [])
        monkeypatch.setattr(versions, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match=sentence):
        versions.main(words)


def test_what_is_installed_besides_torch_is_pinned() -> None:
    needed = versions.requirements()
    assert all("==" in line for line in needed) and not any(line.startswith("torch") for line in needed)
    assert {"numpy", "pytest"} <= {line.partition("==")[0] for line in needed}


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    page = versions.PAGE.read_text()
    if versions.RESULTS.exists():
        assert versions.table(json.loads(versions.RESULTS.read_text())) in page
