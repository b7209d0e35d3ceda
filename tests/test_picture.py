"""The picture of a run: it is drawn from logs alone, shows what they say, and never fails on a short one."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from helpers import ROOT
from lib import picture
from lib.logs import read_log

RECORDS = ROOT / "records"
LOG = sorted((RECORDS / "tiny" / "2026-11-22_n-grams" / "runs").glob("*.jsonl"))[0]
SVG = "{http://www.w3.org/2000/svg}"


def elements(drawn: str, kind: str, style: str) -> list[ElementTree.Element]:
    """The elements of a kind that have a class."""
    root = ElementTree.fromstring(drawn)
    return [found for found in root.iter(SVG + kind) if style in found.get("class", "").split()]


def texts(drawn: str) -> list[str]:
    return [found.text for found in ElementTree.fromstring(drawn).iter(SVG + "text")]


@pytest.mark.parametrize("low, high, most, expected", [
    (0, 10, 5, [0, 2, 4, 6, 8, 10]), (1.31, 2.22, 7, [1.4, 1.6, 1.8, 2.0, 2.2]),
    (0, 0.3, 3, [0, 0.1, 0.2, 0.3]), (0, 8.2, 6, [0, 2, 4, 6, 8]), (-1, 1, 2, [-1, 0, 1]),
])  # fmt: skip
def test_ticks_are_round_numbers(low: float, high: float, most: int, expected: list[float]) -> None:
    assert picture.ticks(low, high, most) == pytest.approx(expected)


@pytest.mark.parametrize("values, labels", [
    ([0, 200, 400], ["0", "200", "400"]), ([1.4, 1.6], ["1.4", "1.6"]), ([0, 0.05], ["0.00", "0.05"]),
    ([0, 5000], ["0", "5,000"]), ([3.0], ["3"]),
])  # fmt: skip
def test_labels_have_the_digits_that_they_need(values: list[float], labels: list[str]) -> None:
    assert [picture.label(value, values) for value in values] == labels


def test_the_newest_record_is_the_one_whose_first_run_is_newest(tmp_path: Path) -> None:
    assert picture.newest_record(RECORDS, "tiny").name == "2026-11-30_one-block"
    assert picture.newest_record(RECORDS, "short") is None
    runs = {"2026-01-02_a": ["20260105"], "2026-01-01_b": ["20260109", "20260108"],
            "2026-01-03_c": ["20260110", "20260101"]}  # fmt: skip
    for folder, names in runs.items():
        for name in names:
            path = tmp_path / "tiny" / folder / "runs" / f"{name}-000000_tiny.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (tmp_path / "tiny" / "2026-02-01_empty" / "runs").mkdir(parents=True)
    assert picture.newest_record(tmp_path, "tiny").name == "2026-01-01_b"


def test_a_picture_shows_both_runs_and_the_target() -> None:
    run, record = read_log(LOG), RECORDS / "tiny" / "2026-11-22_two-blocks"
    drawn = picture.svg(run, record)
    best = picture.median_run(record)
    words = " ".join(texts(drawn))
    for number in (f"{run.final['val_loss']:.4f}", f"{best.final['train_time_s']:.2f} s", "target 1.5"):
        assert number in words
    assert "Two blocks" in words and "training time (s)" in words and "training tokens (millions)" in words
    for style, shown in (("run", run), ("record", best)):
        lines = elements(drawn, "polyline", style)
        assert [len(line.get("points").split()) for line in lines] == [len(shown.train)] * 2
        assert len(elements(drawn, "circle", style)) == 1 + 2 * len(shown.val)  # one in the legend
    assert len(elements(drawn, "line", "target")) == 2
    assert "prefers-color-scheme: dark" in drawn


def test_a_point_lies_where_its_numbers_say() -> None:
    run = read_log(LOG)
    drawn = picture.svg(run)
    last, furthest = run.val[-1], max(p.seconds for p in run.train + run.val)
    *_, dot = elements(drawn, "circle", "run")
    (start, end) = picture.PANELS[1]
    place = float(dot.get("cx"))
    assert place == pytest.approx(start + (end - start) * last.seconds / furthest, abs=0.06)
    target = float(elements(drawn, "line", "target")[1].get("y1"))
    assert (float(dot.get("cy")) > target) == (last.loss < 1.5)  # further down is less


@pytest.mark.parametrize("changes", [
    {}, {"train": []}, {"val": []}, {"train": [], "val": []}, {"train": 1}, {"final": None},
])  # fmt: skip
def test_any_log_can_be_drawn(changes: dict[str, Any], tmp_path: Path) -> None:
    """A run of one step, one without losses, one that did not end; names that XML and ASCII do not take."""
    events = [json.loads(line) for line in LOG.read_text().splitlines()]
    kinds = {"step": "train", "val": "val", "final": "final"}
    events[0]["device"] = "<\u00e9> & Co"
    kept = []
    for event in events:
        kind = kinds.get(event["event"])
        limit = changes.get(kind, math.inf)
        limit = limit if isinstance(limit, (int, float)) else 0
        if sum(kinds.get(other["event"]) == kind for other in kept) < limit:
            kept.append(event)
    log = tmp_path / "run.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in kept))
    out = picture.draw(log, tmp_path)
    assert out == tmp_path / "run.svg" and sorted(tmp_path.iterdir()) == [log, out]
    drawn = out.read_bytes().decode("ascii")
    assert "nan" not in drawn and any("<\u00e9> & Co" in words for words in texts(drawn))


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    log.write_text("{}\n")
    with pytest.raises(ValueError, match="run.jsonl"):
        picture.draw(log, RECORDS)
