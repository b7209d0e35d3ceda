"""What tools/compare.py promises: nothing is run twice or lost, the report follows from the results."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import compare
import train_gpt
from helpers import ROOT, make_corpus, options, train
from lib import claims, comparison, figures, in_turns, presets, runner, stats
from lib.logs import Point

# --------------------------------------------------------------------------------------------------
# Statistics


def test_paired_differences_agree_with_scipy():
    rng = np.random.default_rng(0)
    for n in (2, 3, 8):
        a, b = rng.normal(1.48, 0.003, n), rng.normal(1.49, 0.005, n)
        found, wanted = stats.paired(a, b), scipy.stats.ttest_rel(a, b)
        ends = wanted.confidence_interval(0.95)
        assert found["difference"] == pytest.approx(a.mean() - b.mean())
        assert found["p"] == pytest.approx(wanted.pvalue)
        assert (found["low"], found["high"]) == (pytest.approx(ends.low), pytest.approx(ends.high))
        assert stats.paired(b, a)["p"] == pytest.approx(wanted.pvalue)
    assert stats.paired([1.0], [1.5]) == {"difference": -0.5, "low": None, "high": None, "p": None}
    assert stats.paired([1.0, 2.0], [1.0, 2.0])["p"] == 1.0


def test_ratio_of_sums():
    rng = np.random.default_rng(0)
    a = rng.normal(2.0, 0.1, 9)
    wanted = scipy.stats.ttest_1samp(a / 0.5, 0).confidence_interval(0.95)  # below a constant it is a mean
    found = stats.ratio(a, [0.5] * 9)
    assert found["ratio"] == pytest.approx(a.mean() / 0.5)
    assert (found["low"], found["high"]) == (pytest.approx(wanted.low), pytest.approx(wanted.high))
    assert stats.ratio(3 * a, a) == {key: pytest.approx(3.0) for key in ("ratio", "low", "high")}
    inside = 0
    for _ in range(1000):  # noise that grows with the size, which both share
        size = rng.uniform(1, 4, 20)
        found = stats.ratio(1.1 * size * rng.normal(1, 0.05, 20), size * rng.normal(1, 0.05, 20))
        inside += found["low"] < 1.1 < found["high"]
    assert 920 < inside < 970


def test_holm_by_hand():
    # sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, none below the one before
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []


# --------------------------------------------------------------------------------------------------
# Comparisons of a script that only writes logs: its loss is 1.5, plus --shift, plus log2(--lr /
# 0.04)^2 / 100, plus noise

FAKE = """
import hashlib, json, math, os, random, sys, time
from pathlib import Path

def parse_command_line(argv):
    if "--wrong" in argv:
        raise ValueError("unknown option --wrong")
    return argv, None

def check_settings(track, run):
    pass

class Trainer:
    def __init__(self, argv):
        self.given = dict(zip(argv[::2], argv[1::2]))
        self.clock = self.track = self.schedule = self
        self.seconds, self.train_paths, self.data, self.checked = 0.0, [], None, {"documents": 1}
        self.key = {"dtype": "float32"}
        digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self.environment = dict(source_sha256=digest, torch="2.13.0", device="abacus",
                                world_size=1, threads=1)
    def warm_up(self):
        if (Path(__file__).parent / "fail").exists():
            sys.exit("fake: no tokens left")
    def enter(self, step): pass
    def start(self): pass
    def stop(self): pass
    def advance(self, step, batches):
        self.seconds += (10 + float(self.given.get("--shift", 0))) * (1 + step % 3)

def main(argv, work):
    return work(Trainer(argv))

def Packer(*_): pass
def training_steps(*_): pass
def total_steps(schedule): return 200

if __name__ == "__main__":
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    here, seed, out = Path(__file__).parent, int(given["--seed"]), Path(given["--out"])
    with open(here / "started", "a") as file:
        file.write(f"{os.getpid()} {seed} {given.get('--shift')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
    shift, lr = float(given.get("--shift", 0)), float(given.get("--lr", 0.04))
    noise = random.Random(f"{seed} {shift}").gauss(0, 0.001) + random.Random(seed).gauss(0, 0.01)
    end = 1.5 + shift + math.log2(lr / 0.04) ** 2 / 100 + noise
    threads = len(os.sched_getaffinity(0))
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    header = dict(event="header", run_id=f"{seed}_{lr}_{shift}", track=given["--track"], seed=seed,
                  settings={"evaluation": {"target": 1.5}}, device="abacus", world_size=1, threads=threads,
                  source_sha256=digest, torch="2.13.0", dtype="float32")
    seconds = 10 + shift
    with open(out / "run.jsonl", "w") as log:
        def write(**event):
            log.write(json.dumps(event) + "\\n")
            log.flush()
        write(**header)
        if (here / "fail").exists():
            sys.exit("fake: no tokens left")
        for step in range(2, 201, 2):
            bad = lr > 1 and step == 100
            loss = None if bad else end + (200 - step) / 100
            so_far = dict(step=step, train_time_s=seconds * step / 200, tokens=4096 * step)
            write(event="step", train_loss=loss, **so_far)
            if bad:
                sys.exit("train_gpt.py: not finite at step 100, training loss nan: no gradient before it")
            if step % 50 == 0 and step < 200:
                write(event="val", val_loss=end + (200 - step) / 100, **so_far)
            time.sleep(float(given.get("--wait", 0)))
        last = dict(step=200, val_loss=end, val_tokens=1000, train_time_s=seconds, tokens=819200)
        write(event="val", **last)
        write(event="final", **last, target=1.5, reached=end <= 1.5, compiles_in_timed_region=0)
"""
TABLE = {
    "title": "Parts", "track": "tiny", "seeds": 3,
    "variants": {
        "full": {"why": "all | parts"},
        "worse": {"options": ["--shift", "0.5"], "against": "full", "why": "without a part",
                  "finalist_seeds": 2},
        "rate": {"options": ["--shift", "-0.1"], "against": "worse", "grid": {"--lr": [0.02, 0.04, 0.08]},
                 "finalist_seeds": 2},
    },
}  # fmt: skip


def change(table: dict, **variants: dict) -> dict:
    return table | {"variants": table["variants"] | variants}


def repository(root: Path) -> Path:
    """The folder of a comparison in a repository whose train_gpt.py is the stand-in."""
    (root / "records" / "parts").mkdir(parents=True)
    (root / "train_gpt.py").write_text(FAKE)
    return root / "records" / "parts"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    return repository(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "ROOT", root)
        assert run(repository(root), TABLE) == 0
    return root / "records" / "parts"


@pytest.fixture
def finished(folder: Path, whole: Path) -> Path:
    """A comparison whose runs are all there."""
    return shutil.copytree(whole, folder, dirs_exist_ok=True)


def run(folder: Path, table: dict | str | None = None, *arguments: str) -> int:
    if table is not None:
        (folder / "table.json").write_text(table if isinstance(table, str) else json.dumps(table))
    return compare.main(["run", str(folder), *arguments])


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def keys(folder: Path) -> list[tuple]:
    return [(line["variant"], line["value"], line["seed"]) for line in results(folder)]


def started(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "started").read_text().splitlines()]


def test_seeds_come_in_turn_and_finalists_last(finished):
    folder = finished
    screen = [(*v, seed) for seed in range(3)
              for v in (("full", None), ("worse", None), ("rate", 0.02), ("rate", 0.04),
                        ("rate", 0.08))]  # fmt: skip
    assert keys(folder) == [
        *screen,
        *((*v, seed) for seed in (3, 4) for v in (("worse", None), ("rate", 0.04))),
    ]
    line = results(folder)[3]
    assert line["options"] == ["--track", "tiny", "--shift", "-0.1", "--lr", "0.04"] and line["alone"] is True
    assert line["final"].keys() == {"step", "val_loss", "train_time_s", "tokens", "target", "reached"}
    assert len(line["train"]) == 50 and line["train"][-1][0] == 200
    assert [step for step, *_ in line["val"]] == [50, 100, 150, 200]
    assert len(started(folder)) == 19 and not (folder / "unfinished").exists()
    # a grid that grows, one more variant and one more seed are run, nothing else
    grown = change(
        TABLE,
        rate=TABLE["variants"]["rate"] | {"grid": {"--lr": [0.02, 0.04, 0.08, 0.16]}},
        more={"seeds": 1},
    )
    assert run(folder, grown, "--only", "more") == 0 and len(keys(folder)) == 20
    assert run(folder) == 0
    assert keys(folder)[19:] == [("more", None, 0), *(("rate", 0.16, seed) for seed in range(3))]


def test_first_seed_moves_all(folder):
    assert run(folder, TABLE | {"first_seed": 7, "seeds": 1}, "--only", "full", "rate") == 0
    assert {seed for *_, seed in keys(folder)} == {7, 8, 9} and keys(folder)[0] == ("full", None, 7)


def test_thinned_curves_are_means_and_keep_the_last_step():
    points = [Point(step, float(step), 0.0, 0) for step in range(1, 131)]
    thin = compare.thinned(points)
    assert len(thin) == 44 and thin[-1] == [130, 129.0] and thin[0] == [1, 1.0] and thin[1] == [4, 3.0]
    assert compare.thinned(points[:60]) == [[p.step, p.loss] for p in points[:60]]
    assert compare.thinned([]) == []


def test_a_failure_stops_and_the_same_command_goes_on(folder, capsys):
    table = {**TABLE, "variants": {name: TABLE["variants"][name] for name in ("full", "worse")}}
    assert run(folder, table, "--only", "full") == 0
    (folder / "fail").touch()
    assert run(folder) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "compare.py: worse, seed 0 failed, it said: fake: no tokens left"
    (folder / "fail").unlink()
    assert run(folder) == 0 and len(set(keys(folder))) == len(keys(folder)) == 8


def test_a_torn_last_line_is_dropped_and_run_again(folder):
    assert run(folder, TABLE, "--only", "full") == 0
    path = folder / "results.jsonl"
    whole = path.read_bytes()
    for torn in (whole[:-1], whole[:-200], whole + b'{"variant": "full", "va', whole + b"\xff"):
        path.write_bytes(torn)
        assert len(comparison.read_results(folder, comparison.read_table(folder)[1])) == torn.count(b"\n")
        assert run(folder, None, "--only", "full") == 0 and path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"final"', b'"fin"', 1))
    assert run(folder) == 1  # not at the end: nothing that a kill leaves


def test_kill_9_loses_only_the_runs_under_way(folder):
    (folder / "table.json").write_text(json.dumps(TABLE | {"options": ["--wait", "0.005"]}))
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); "
    code += "import compare; from pathlib import Path; "
    code += f"compare.ROOT = Path({str(compare.ROOT)!r}); sys.exit(compare.main(['run', {str(folder)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        (folder / "started").exists() and len(started(folder)) == 2 and keys(folder)
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before, child = (folder / "results.jsonl").read_bytes(), int(started(folder)[1][0])
    assert before.count(b"\n") == 1
    while (
        time.monotonic() < deadline and Path(f"/proc/{child}").exists() and "(zombie)" not in status_of(child)
    ):
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists() or "(zombie)" in status_of(child)
    # it did not outlive its parent
    assert '"final"' not in (folder / "unfinished" / "0" / "run.jsonl").read_text()
    assert run(folder, TABLE, "--only", "full") == 1  # other options than before
    assert run(folder, change(TABLE, rate={}) | {"options": ["--wait", "0.005"], "seeds": 1}) == 0
    assert (folder / "results.jsonl").read_bytes().startswith(before)
    # was under way
    assert [seed_and_shift[1:3] for seed_and_shift in started(folder)][1:3] == [["0", "0.5"]] * 2
    assert keys(folder) == [(name, None, 0) for name in ("full", "worse", "rate")] + [
        ("worse", None, seed) for seed in (1, 2)
    ]


def status_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "(zombie)"


@pytest.mark.parametrize(
    "table, message",
    [
        (TABLE | {"sedes": 3}, "unknown key 'sedes'"),
        (change(TABLE, full={"optoins": []}), "variant 'full': unknown key 'optoins'"),
        (change(TABLE, full={"against": "nobody"}), "against 'nobody' is not another variant"),
        (change(TABLE, full={"against": "full"}), "against 'full' is not another variant"),
        (change(TABLE, full={"grid": {"--lr": [0.04, 0.02]}}), "each above the one before"),
        (change(TABLE, full={"grid": {"--lr": [0.04]}}), "two or more"),
        (change(TABLE, full={"grid": {"--lr": [1, 2], "--shift": [1, 2]}}), "a grid is one option"),
        (change(TABLE, full={"grid": {}}), "a grid is one option"),
        (change(TABLE, full={"grid": {"--lr": ["a", "b"]}}), "positive numbers"),
        (change(TABLE, full={"options": [5]}), "options are strings"),
        (change(TABLE, full={"preset": "moun"}), "unknown preset 'moun'; known: adamw, muon, "),
        (change(TABLE, full={"options": "--shift 5"}), "options is not of type list"),
        (change(TABLE, full={"options": ["--wrong", "5"]}), "variant 'full': unknown option --wrong"),
        (change(TABLE, full={"options": ["--seed=5"]}), "--seed=5 is not for a variant to set"),
        (change(TABLE, worse={"against": "full"}), "'rate' is judged by other seeds than 'worse'"),
        (change(TABLE, full=[]), "variant 'full' is not an object"),
        (TABLE | {"seeds": 0}, "seeds cannot be 0"),
        (TABLE | {"seeds": True}, "seeds is not of type int"),
        (TABLE | {"pairs": 1}, "pairs is not of type bool"),
        (TABLE | {"curves": "yes"}, "curves is not of type bool"),
        (TABLE | {"finalist_seeds": -1}, "finalist_seeds cannot be -1"),
        (TABLE | {"variants": {}}, "variants is missing"),
        ({"title": "x"}, "track is missing"),
        ('{"title": "x", "title": "y"}', "title, title is there twice"),
        ("{", "table.json: Expecting"),
    ],
)
def test_a_wrong_table_gets_one_sentence_before_anything_is_run(folder, table, message, capsys):
    assert run(folder, table) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (folder / "started").exists()


def test_a_folder_goes_on_only_with_what_it_began_with(folder, capsys):
    assert compare.main(["run", str(folder)]) == 1 and "table.json" in capsys.readouterr().err
    assert compare.main(["run", str(folder / "nothing")]) == 1
    assert run(folder, TABLE, "--only", "nobody") == 1
    assert "'nobody' is not a variant" in capsys.readouterr().err
    assert run(folder, TABLE, "--workers", "4096") == 1 and "more than the" in capsys.readouterr().err
    assert compare.main(["report", str(folder)]) == 1 and "no result yet" in capsys.readouterr().err
    with runner.alone(compare.ROOT / "records"):
        assert run(folder) == 1 and "would slow each other" in capsys.readouterr().err
    assert run(folder, TABLE, "--only", "full") == 0 and len(keys(folder)) == 3
    (compare.ROOT / "train_gpt.py").write_text(FAKE + "# newer\n")  # the copy in the folder is what counts
    assert run(folder, None, "--only", "worse") == 0 and len(keys(folder)) == 8
    capsys.readouterr()
    assert run(folder, change(TABLE, full={"options": ["--shift", "1"]})) == 1
    assert "line 1: 'full' was run with other options" in capsys.readouterr().err
    path = folder / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[0] + "\n")
    assert run(folder, TABLE) == 1 and "line 9: a second run of" in capsys.readouterr().err
    path.write_text(whole.replace('"float32"', '"bfloat16"', 1))
    assert run(folder, TABLE) == 1
    assert "line 2: dtype float32 does not mix with bfloat16" in capsys.readouterr().err
    path.write_text(whole)
    (folder / "train_gpt.py").write_text(FAKE + "# edited\n")
    assert run(folder) == 1 and "a folder goes on only with the same source" in capsys.readouterr().err
    assert path.read_text() == whole


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_workers_share_the_cores_and_give_no_times(folder, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run(folder, TABLE, "--workers", "2", "--only", "full", "worse") == 0
    assert len(set(keys(folder))) == 8
    lines = results(folder)
    assert {line["alone"] for line in lines} == {False} and {gpu for *_, gpu in started(folder)} == {"0", "1"}
    assert {line["header"]["threads"] for line in lines} == {len(os.sched_getaffinity(0)) // 2}
    assert compare.main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "no times" in text and "median" not in text and "ratio" not in text


# --------------------------------------------------------------------------------------------------
# report


def row_of(text: str, name: str) -> list[str]:
    (row,) = [line for line in text.partition("## Grids")[0].splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def mean_and_interval(losses: np.ndarray) -> str:
    low, high = scipy.stats.t.interval(0.95, len(losses) - 1, losses.mean(), scipy.stats.sem(losses))
    return f"{losses.mean():.4f}, {low:.4f} to {high:.4f}"


def test_the_report_has_the_numbers_of_the_results(finished):
    folder = finished
    assert compare.main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    loss = {key: line["final"]["val_loss"] for key, line in zip(keys(folder), results(folder))}
    full, worse = (np.array([loss[name, None, seed] for seed in range(3)]) for name in ("full", "worse"))
    assert row_of(text, "full") == ["full", "3", mean_and_interval(full), f"{full.std(ddof=1):.4f}", *"----",
                                    "- (0 of 3)", "- (0 of 3)", "10.00 s", "-", "-",
                                    "all / parts"]  # fmt: skip
    rate, beside = (
        np.array([loss[name, value, seed] for seed in (3, 4)])
        for name, value in (("rate", 0.04), ("worse", None))
    )
    tests = [scipy.stats.ttest_rel(worse, full), scipy.stats.ttest_rel(rate, beside)]
    assert tests[0].pvalue < tests[1].pvalue and "corrected for 2 tests" in text
    low, high = tests[0].confidence_interval(0.95)
    cells = row_of(text, "worse")
    # on the three seeds that both have, of five
    assert cells[1] == "5" and cells[4:7] == [
        f"{(worse - full).mean():+.4f}, {low:+.4f} to {high:+.4f}", "3",
        f"{2 * tests[0].pvalue:.2g}"]  # fmt: skip
    # a training loss that is 0.5 higher and falls by 0.01 a step; without the part a step takes 5% longer
    assert cells[7:10] == ["+50", "- (0 of 5)", "- (0 of 5)"]
    assert cells[10:] == ["10.50 s", "1.050", "`--shift 0.5`", "without a part"]
    # by the seeds that had no part in the choice
    cells = row_of(text, "rate")
    assert cells[1:4] == ["2", mean_and_interval(rate), f"{rate.std(ddof=1):.4f}"] and cells[5] == "2"
    assert cells[6] == f"{max(2 * tests[0].pvalue, tests[1].pvalue):.2g}"
    assert cells[12:] == ["`--shift -0.1 --lr 0.04`", "-"]
    assert "| best |" in text and "must grow" not in text
    # the loss falls by 0.01 a step to its end below the target of 1.5, also between validations; a
    # step takes 9.9 / 200 s
    step = 200 - 100 * (1.5 - rate).mean()
    assert cells[8:10] == [f"{step:.0f} (2 of 2)", f"{9.9 / 200 * step:.2f} s (2 of 2)"]


def test_the_target_is_reached_where_the_validation_curve_first_crosses_it():
    def line(*val: tuple[float, float, float]) -> dict:
        return {"final": {"target": 2.0}, "val": [*map(list, val)]}

    # a quarter of the way from 2.25 down to 1.25; that the loss rises again afterwards does not matter
    between = line((10, 3.0, 1.0), (20, 2.25, 5.0), (60, 1.25, 9.0), (80, 2.5, 11.0))
    assert comparison.reached(between) == (30, 6.0)
    assert comparison.reached(line((10, 1.9, 1.0), (20, 1.0, 2.0))) == (10, 1.0)
    assert comparison.reached(line((10, 2.0, 1.0))) == (10, 1.0)
    assert comparison.reached(line((10, 3.0, 1.0), (20, 2.0, 2.0), (30, 2.0, 3.0))) == (20, 2.0)
    assert comparison.reached(line((10, 3.0, 1.0), (20, 2.01, 2.0))) == (np.inf, np.inf)
    assert comparison.reached(line()) == (np.inf, np.inf)


def test_steps_and_seconds_to_the_target_are_medians_over_all_runs(finished, monkeypatch):
    folder = finished
    # nothing here looks at them
    monkeypatch.setattr(figures, "save", lambda figure, out: figures.plt.close(figure))
    path, lines = folder / "results.jsonl", results(finished)

    def reported(lines: list[dict]) -> str:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert compare.main(["report", str(folder)]) == 0
        return (folder / "report.md").read_text()

    crossings = {
        "full": iter((83, 120, None)),
        "worse": iter((None, 70, None, 90, None)),
        "rate": iter((80, 71)),
    }
    for line in lines:
        if line["variant"] != "rate" or line["seed"] > 2:
            step = next(crossings[line["variant"]])
            line["val"] = [[50, 2.0, 25.0]] + ([[step, 1.5, step / 2]] if step else [])
    text = reported(lines)
    assert [row_of(text, name)[8:10] for name in ("full", "worse", "rate")] == [
        ["120 (2 of 3)", "60.00 s (2 of 3)"], ["- (2 of 5)", "- (2 of 5)"],
        ["76 (2 of 2)", "37.75 s (2 of 2)"]]  # fmt: skip
    assert "| steps to 1.5 | seconds to 1.5 |" in text
    lines[2]["final"]["target"] = 1.6  # of a run that chose a value: not judged by
    assert reported(lines) == text
    text = reported([line | {"alone": False} for line in lines])
    assert "| steps to 1.5 | options |" in text and "seconds to" not in text
    assert row_of(text, "full")[8] == "120 (2 of 3)"
    lines[0]["final"]["target"] = 1.6
    assert "steps to 1." not in (text := reported(lines)) and "To the target" not in text
    lines[0]["final"]["target"] = 1.5
    for line in lines:
        line["val"] = [[200, 2.0, 10.0]]
    assert "steps to 1." not in (text := reported(lines)) and "To the target" not in text
    reported(lines[2:3])  # of a grid whose first seed is not there yet: no run to judge by


def test_curves_and_leading_steps_are_those_of_the_runs(finished, monkeypatch):
    folder, drawn = finished, {}
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.update({out.name: figure}))
    lines = results(folder)
    lines += [lines[0] | {"variant": "bad", "seed": seed, "options": ["--track", "tiny"]} for seed in (0, 1)]
    lines[-1] = lines[-1] | {
        "train": lines[0]["train"][:3],
        "final": lines[0]["final"] | {"step": 12, "val_loss": None},
    }
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "table.json").write_text(json.dumps(change(TABLE, bad={"against": "full"}) | {"curves": True}))
    assert compare.main(["report", str(folder)]) == 0
    assert "](curves.png)" in (folder / "report.md").read_text()
    left, right = drawn["curves.png"].axes
    curves = {line.get_label(): line.get_xydata() for line in left.lines}
    assert (
        [*curves]
        == [text.get_text() for text in drawn["curves.png"].legends[0].texts]
        == ["rate", "full", "worse"]
    )
    loss = {key: line["final"]["val_loss"] for key, line in zip(keys(folder), lines)}
    ends = {"full": {seed: loss["full", None, seed] for seed in range(3)},
            "worse": {seed: loss["worse", None, seed] for seed in range(5)},
            "rate": {seed: loss["rate", 0.04, seed] for seed in (3, 4)}}  # fmt: skip
    for name, curve in curves.items():
        # the loss falls by 0.01 a step; each point is the mean of the last 20 steps, logged every second one
        wanted = np.mean([*ends[name].values()]) + (200 - np.arange(20, 201, 4) + 9) / 100
        assert curve[4:] == pytest.approx(np.stack([np.arange(20, 201, 4), wanted], 1), abs=2e-5)
    assert left.get_ylim()[0] < curves["rate"][:, 1].min() and left.get_ylim()[1] < curves["full"][0, 1]
    assert curves["worse"][25, 1] < left.get_ylim()[1]  # the second half of the highest curve
    leads = dict(
        zip(("rate", "worse"), [line.get_xydata() for line in right.lines if len(line.get_xydata()) > 2])
    )
    assert [line.get_color() for line in left.lines[::2]] == [line.get_color() for line in right.lines[:2]]
    for name, other in (("rate", "worse"), ("worse", "full")):
        ahead = -100 * np.mean(
            [ends[name][seed] - ends[other][seed] for seed in ends[name].keys() & ends[other].keys()]
        )
        smoothed = leads[name][(leads[name][:, 0] >= 20) & (leads[name][:, 0] + ahead >= 20)]
        # losses have five decimals there
        assert len(smoothed) > 20
        assert smoothed[:, 1] == pytest.approx(ahead, abs=2e-3)


def dots(axis) -> dict[str, tuple[float, float, float, bool]]:
    """label: (low, middle, high, filled) of a figure of differences."""
    labels = [text.get_text() for text in axis.get_yticklabels()]
    return {labels[place]: (*bars.lines[2][0].get_segments()[0][:, 0][[0]], *bars.lines[0].get_xdata(),
                            *bars.lines[2][0].get_segments()[0][:, 0][[1]],
                            bars.lines[0].get_markerfacecolor() != "white")
            for place, bars in enumerate(axis.containers)}  # fmt: skip


def test_a_dot_of_a_difference_has_its_interval_and_is_filled_where_p_is_small(folder, finished, monkeypatch):
    drawn, names = {}, ("ref", "lower", "noisy")
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.update({out.name: figure}))
    shifts = {"ref": [0.0] * 6, "lower": [-0.02, -0.021, -0.019, -0.02, -0.022, -0.018],
              "noisy": [-0.03, 0.05, 0.01, -0.02, 0.04, -0.01]}  # fmt: skip
    variants = {
        name: {"options": ["--x", name], **({"against": "ref"} if name != "ref" else {})} for name in names
    }
    table = {"title": "Dots", "track": "tiny", "seeds": 6, "variants": variants, "pairs": True}
    (folder / "table.json").write_text(json.dumps(table))
    losses = {
        name: dict(enumerate(1.5 + 0.01 * seed + d for seed, d in enumerate(shifts[name]))) for name in names
    }
    (folder / "results.jsonl").write_text(rows_like(results(finished)[0], losses))
    assert compare.main(["report", str(folder)]) == 0
    (axis,), (best,) = drawn["differences.png"].axes, drawn["best.png"].axes
    found = dots(axis)
    assert [*found] == ["noisy (n = 6)", "lower (n = 6)"]  # the lowest on top
    for name, filled in (("lower", True), ("noisy", False)):
        ab = stats.paired(list(losses[name].values()), list(losses["ref"].values()))
        assert found[f"{name} (n = 6)"] == pytest.approx((ab["low"], ab["difference"], ab["high"], filled))
    assert "minus that of ref" in drawn["differences.png"].get_suptitle() and axis.get_xscale() == "linear"
    assert "minus that of lower" in drawn["best.png"].get_suptitle()
    above = dots(best)
    assert above["ref (n = 6)"][1] == pytest.approx(0.02) and above["ref (n = 6)"][3]
    assert not above["noisy (n = 6)"][3]
    # one large effect beside small ones: not linear; two references: each named
    losses |= {"huge": {seed: 3.0 + 0.01 * seed + 0.001 * (seed % 2) for seed in range(6)}}
    variants |= {"huge": {"options": ["--x", "huge"], "against": "lower"}}
    (folder / "table.json").write_text(json.dumps(table))
    (folder / "results.jsonl").write_text(rows_like(results(finished)[0], losses))
    assert compare.main(["report", str(folder)]) == 0
    (axis,) = drawn["differences.png"].axes
    assert axis.get_xscale() == "symlog" and "the reference's" in drawn["differences.png"].get_suptitle()
    assert [*dots(axis)] == [
        "huge against lower (n = 6)",
        "noisy against ref (n = 6)",
        "lower against ref (n = 6)",
    ]


def rows_like(line: dict, losses: dict[str, dict[int, float | None]]) -> str:
    """results.jsonl with these final losses of variants whose options are `--x NAME`."""
    lines = [line | {"variant": name, "value": None, "seed": seed,
                     "options": ["--track", "tiny", "--x", name], "final": line["final"] | {"val_loss": loss}}
             for name, side in losses.items() for seed, loss in side.items()]  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_every_pair_is_tested_once_and_corrected_for_all(finished):
    folder, rng = finished, np.random.default_rng(1)
    seeds = rng.normal(0, 0.01, 5)  # what a seed does to all variants
    losses = {name: 1.5 + shift + seeds + rng.normal(0, 0.002, 5)
              for name, shift in (("a", 0.02), ("b", 0.0), ("c", 0.021), ("d", 0.1))}  # fmt: skip
    given = {name: dict(enumerate(side.tolist())) for name, side in losses.items()}
    given |= {"bad": {0: 1.5, 1: None}, "first": {0: 1.65}, "last": {4: 1.7}, "none": {}}
    against = {"a": "b", "b": "a", "c": "a", "bad": "a", "first": "a"}  # a and b against each other: one test
    (folder / "results.jsonl").write_text(rows_like(results(folder)[0], given))
    variants = {
        name: {"options": ["--x", name]} | ({"against": against[name]} if name in against else {})
        for name in given
    }
    table = {"title": "Pairs", "track": "tiny", "seeds": 5, "variants": variants}

    def reported(**more) -> str:
        (folder / "table.json").write_text(json.dumps(table | more))
        assert compare.main(["report", str(folder)]) == 0
        return (folder / "report.md").read_text()

    text = reported()
    p = {x + y: scipy.stats.ttest_rel(losses[x], losses[y]).pvalue for x in "abcd" for y in "abcd" if x < y}
    assert "corrected for 2 tests (Holm), the" in text and "Every pair" not in text
    assert reported(pairs=False) == text
    assert p["ab"] < p["ac"] and row_of(text, "a")[6] == row_of(text, "b")[6] == f"{2 * p['ab']:.2g}"
    table_of, _, triangle = (text := reported(pairs=True)).partition("## Every pair")
    assert "corrected for 6 tests (Holm), those of every pair, the" in text
    holm, least = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        holm[name] = least = max(least, min(1.0, (6 - rank) * p[name]))
    assert holm["ac"] > 0.05 > holm["ab"] and row_of(table_of, "c")[6] == f"{holm['ac']:.2g}"
    # without the one that diverged and the one that is not there yet
    order = ["b", "a", "c", "d", "first", "last"]
    assert row_of(triangle, "b")[1:] == [
        *(f"**{(losses['b'] - losses[x]).mean():+.4f}, p "
          f"{holm[''.join(sorted('b' + x))]:.2g}**" for x in "acd"),
        f"{losses['b'][0] - 1.65:+.4f}", f"{losses['b'][4] - 1.7:+.4f}"]  # fmt: skip
    assert row_of(triangle, "a")[1:3] == [
        "",
        f"{(losses['a'] - losses['c']).mean():+.4f}, p {holm['ac']:.2g}",
    ]
    assert row_of(triangle, "first")[1:] == ["", "", "", "", "-"]  # no seed in common
    rows = [line for line in triangle.splitlines() if line.startswith("| ")]
    assert rows[0] == f"|  | {' | '.join(order[1:])} |"
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == order[:-1]


def test_a_run_that_diverges_is_a_result(folder):
    table = change(
        TABLE | {"seeds": 2}, worse={"options": ["--lr", "2"], "against": "full"}, none={"against": "worse"}
    )
    table["variants"]["rate"] = {"grid": {"--lr": [0.04, 0.08, 2]}, "against": "full", "seeds": 1}
    assert run(folder, table) == 0 and compare.main(["report", str(folder)]) == 0
    final = results(folder)[1]["final"]
    assert final["val_loss"] is None and final["step"] == 98 and final["target"] == 1.5
    assert final["reached"] is False
    text = (folder / "report.md").read_text()
    assert row_of(text, "worse")[1:5] == ["2", "2 diverged", "-", "-"] and row_of(text, "none")[4] == "-"
    assert "| `--lr 2` | 1 | 1 diverged | - |" in text
    assert "| best, at an end: the grid must grow; judged by the runs that chose it |" in text


def test_a_report_is_the_same_bit_for_bit_and_checked(finished, capsys):
    folder = finished
    (folder / "table.json").write_text(json.dumps(TABLE | {"pairs": True, "curves": True}))
    assert compare.main(["report", str(folder)]) == 0
    made = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".md", ".png")}
    assert made.keys() == {"report.md", "differences.png", "best.png", "curves.png", "grids.png"}
    assert b"matplotlib" not in made["grids.png"].lower()
    for name in made:
        (folder / name).unlink()
    capsys.readouterr()
    assert compare.main(["report", str(folder), "--check"]) == 1
    assert "stale" in capsys.readouterr().out and not (folder / "report.md").exists()
    (folder / "train_gpt.py").unlink()  # table and results are enough
    assert compare.main(["report", str(folder)]) == 0
    assert {name: (folder / name).read_bytes() for name in made} == made
    assert compare.main(["report", str(folder), "--check"]) == 0
    (folder / "report.md").write_text("edited\n")
    assert compare.main(["report", str(folder), "--check"]) == 1
    assert (folder / "report.md").read_text() == "edited\n"


def test_a_comparison_that_was_stopped_has_a_report(finished):
    folder = finished
    path = folder / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:8]))  # the second seed has reached the grid
    assert compare.main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "8 runs of 15" in text and row_of(text, "rate")[1] == "1" and row_of(text, "worse")[1] == "2"
    first = results(folder)[3]["final"]["val_loss"]
    assert row_of(text, "rate")[2] == f"{first:.4f}"  # one run: no interval
    path.write_text(path.read_text().splitlines(True)[0])
    assert compare.main(["report", str(folder)]) == 0
    assert row_of((folder / "report.md").read_text(), "worse")[1:5] == ["0", "-", "-", "-"]


def test_a_variant_that_learns_faster_needs_fewer_steps():
    def line(slope: float) -> dict:
        curve = [[step, 5 - slope * step] for step in range(4, 201, 4)]
        return {"header": {}, "final": {"step": 200}, "train": curve}

    # smoothing shifts both curves alike but for their slopes: half the mean's width
    assert comparison.steps_apart([line(0.02)], [line(0.01)]) == pytest.approx(-(200 - 104), abs=2.5)
    assert comparison.steps_apart([line(0.01)], [line(0.02)]) == pytest.approx(200 - 104, abs=2.5)
    assert comparison.steps_apart([line(0.01)] * 2, [line(0.01)]) == pytest.approx(0)


# --------------------------------------------------------------------------------------------------
# The real script, and the comparisons of this repository


def test_the_real_script(tmp_path, monkeypatch, capsys):
    make_corpus(tmp_path / "data")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    folder = tmp_path / "records" / "real"
    folder.mkdir(parents=True)
    source, guide = (ROOT / "train_gpt.py").read_text(), (ROOT / "tools" / "OPTIMIZERS.md").read_text()
    # what the guide says that an optimizer of one's own takes
    own = guide.split("```python\n")[1].split("```")[0]
    assert own.count("\n") < 40 and source.count("\nclass Unit:") == 1
    (tmp_path / "train_gpt.py").write_text(source.replace("\nclass Unit:", f"\n{own}\n\nclass Unit:"))
    small = options(track=None, **{"schedule.steps": 4, "schedule.extension": 0})
    table = {"title": "Real", "track": "tiny", "seeds": 1, "options": small, "variants": {
        "small": {}, "diverges": {"options": ["--scalar.lr", "1e29"], "against": "small"},
        "own": {"preset": "moonlight", "options": ["--matrix.orthogonalize", "sinkhorn"],
                "against": "small"}}}  # fmt: skip
    bad = change(table, small={"options": ["--matrix.lrr", "1"]})
    assert run(folder, bad) == 1 and "the nearest is --matrix.lr" in capsys.readouterr().err
    assert run(folder, change(table, small={"options": ["--model.layers", "0"]})) == 1
    assert "variant 'small': --model.layers is at least 1" in capsys.readouterr().err
    assert run(folder, table, "--workers", str(min(2, len(os.sched_getaffinity(0))))) == 0, (
        capsys.readouterr().err
    )
    first, third, second = sorted(results(folder), key=lambda line: line["variant"], reverse=True)
    assert third["variant"] == "own" and 0 < third["final"]["val_loss"] < 6
    assert third["final"]["val_loss"] != first["final"]["val_loss"]
    assert first["final"]["step"] == 4 and 0 < first["final"]["val_loss"] < 6 and len(first["train"]) == 4
    assert first["header"]["source_sha256"] == claims.sha256(folder / "train_gpt.py")
    assert first["header"]["dtype"] == "float32"
    assert second["final"]["val_loss"] is None and second["final"]["step"] < 4
    assert compare.main(["report", str(folder)]) == 0 and "1 diverged" in (folder / "report.md").read_text()


# --------------------------------------------------------------------------------------------------
# Times in turns


def pairs_of(folder: Path) -> list[tuple[str, str]]:
    return [
        (line["variant"], line["against"])
        for line in map(json.loads, (folder / "times.jsonl").read_text().splitlines())
    ]


def test_variants_are_timed_against_their_references_and_these_against_themselves(finished, capsys):
    folder, every = finished, [("full", "full"), ("worse", "worse"), ("worse", "full"), ("rate", "worse")]
    arguments = ["time", str(folder), "--rounds", "7"]
    assert compare.main([*arguments[:-1], "1"]) == 1 and "at least 2" in capsys.readouterr().err
    assert compare.main([*arguments, "--only", "worse"]) == 0
    assert pairs_of(folder) == [("full", "full"), ("worse", "full")]
    with open(folder / "times.jsonl", "a") as file:
        file.write('{"variant": "torn')
    assert compare.main(arguments) == 0 and sorted(pairs_of(folder)) == sorted(every)
    before = (folder / "times.jsonl").read_bytes()
    (folder / "fail").touch()  # nothing is left to do
    assert compare.main(arguments) == 0 and (folder / "times.jsonl").read_bytes() == before
    last = json.loads(before.splitlines()[-1])
    assert last["options"][0][-4:] == ["--shift", "-0.1", "--lr", "0.04"] and len(last["seconds"][0]) == 7
    assert [sum(side) for side in last["seconds"]] == [
        pytest.approx((9.9 if side else 10.5) * 399) for side in (1, 0)
    ]
    assert compare.main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "| rate | worse | 7 | 0.943, 0.943 to 0.943 | `--shift -0.1 --lr 0.04` |" in text
    assert text.index("## Grids") < text.index("## Time in turns")
    assert "| full | itself | 7 | 1.000, 1.000 to 1.000 | - |" in text and "on 1 x abacus" in text
    (folder / "results.jsonl").unlink()
    assert compare.main(["report", str(folder)]) == 0
    alone = (folder / "report.md").read_text()
    assert "validation loss" not in alone and alone.startswith("# Parts\n\n## Time in turns\n")
    (folder / "times.jsonl").unlink()
    capsys.readouterr()
    assert compare.main(arguments) == 1 and "failed, it said: fake: no tokens left" in capsys.readouterr().err
    (folder / "fail").unlink()
    assert compare.main(arguments) == 1
    assert "the grid of 'rate' has no best value yet" in capsys.readouterr().err


def test_times_that_do_not_fit_are_refused(finished, capsys):
    folder = finished
    assert compare.main(["time", str(folder), "--rounds", "2", "--only", "worse"]) == 0
    path = folder / "times.jsonl"
    good, second = path.read_text(), json.loads(path.read_text().splitlines()[1])
    for bad in (second, {**second, "variant": "rate", "against": "worse", "device": "another"},
                {"variant": "rate"}, 3, {**second, "variant": "rate", "against": "worse",
                                         "seconds": [[1.0], [1.0, 2.0]]}):  # fmt: skip
        path.write_text(good + json.dumps(bad) + "\n")
        assert (
            compare.main(["report", str(folder)]) == 1
            and f"{path}, line 3: no times" in capsys.readouterr().err
        ), bad
    path.write_text(good)
    changed = change(TABLE, full={"options": ["--shift", "0.2"]})
    (folder / "table.json").write_text(json.dumps(changed))
    (folder / "results.jsonl").unlink()
    assert compare.main(["report", str(folder)]) == 1
    assert "with other options than the table's" in capsys.readouterr().err
    (folder / "table.json").write_text(json.dumps(TABLE))
    (folder / "train_gpt.py").write_text(FAKE + "#")
    assert compare.main(["time", str(folder)]) == 1 and "only with the same source" in capsys.readouterr().err


def test_runs_in_turns_are_the_runs(tmp_path, monkeypatch):
    """Each of the two does what it does alone, one step after the other, a part at a time."""
    make_corpus(tmp_path / "data")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(in_turns, "load", lambda _: train_gpt)
    sides, done, original = [dict(), dict(schedule__steps=10, seed=1)], [], train_gpt.Trainer.advance

    def advance(self, step, batches):
        loss, read = original(self, step, batches)
        done.append((self.run.seed, step, float(loss) / read.targets))
        return loss, read

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.Trainer, "advance", advance)
        words = [json.dumps(options(**side)) for side in sides]
        handlers = {
            number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        }
        in_turns.main(["--out", str(tmp_path / "none"), "train_gpt.py", "4", *words])
        for number, handler in handlers.items():
            signal.signal(number, handler)
    # 20 and 12 steps in four rounds of 5 and 3, the second one first in every other round
    assert [seed for seed, *_ in done] == 2 * [*[1] * 3, *[0] * 10, *[1] * 3]
    for seed, side in enumerate(sides):
        outcome = train(options(out=tmp_path / str(seed), **side))
        wanted = [(line["step"] - 1, line["train_loss"]) for line in outcome.lines if line["event"] == "step"]
        assert [(step, loss) for number, step, loss in done if number == seed] == wanted
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_differ_in_the_optimizer_alone(preset):
    rates = ["--tables.lr", "1", "--head.lr", "0.008"]  # of the track when the comparisons were made
    (track, run), plain = (
        train_gpt.parse_command_line(["--track", "tiny", *rates, *words])
        for words in (presets.PRESETS[preset], [])
    )
    train_gpt.check_settings(track, run)
    for section in ("data", "model", "schedule", "evaluation"):
        assert getattr(track, section) == getattr(plain[0], section)
    assert run == plain[1] and (track.matrix.kind == "adam") == (preset == "adamw")
    if preset != "adamw":  # one rate of decay for all parameters at lr 0.01, or none
        parts = (track.embed, track.tables, track.head, track.scalar)
        rates = [part.lr * part.weight_decay for part in parts]
        assert rates == pytest.approx([0.01 * track.matrix.weight_decay] * 4, rel=0.03)
        assert track.matrix.equilibrate == (preset.split("-")[1] if "-" in preset else "none")


def test_options_of_a_variant_follow_its_preset(folder):
    table = TABLE | {
        "options": ["--a", "1"],
        "variants": {"x": {"preset": "normuon", "options": ["--matrix.beta2", "0.9"]}},
    }
    (folder / "table.json").write_text(json.dumps(table))
    ((variant,), words) = comparison.read_table(folder)[1], presets.PRESETS["normuon"]
    assert variant.options == ("--a", "1", *words, "--matrix.beta2", "0.9") and words
    assert variant.own == "preset normuon --matrix.beta2 0.9"


def test_findings_are_those_of_the_results():
    """Each row of records/comparisons/README.md of the form | ..

    | `a` - `b` | difference | interval | p | .. or `a` / `b`.
    """
    folder, known, checked = ROOT / "records" / "comparisons", {}, 0

    def computed(name: str) -> dict[tuple[str, str, str], list[str]]:
        table, variants = comparison.read_table(folder / name)
        results = comparison.read_results(folder / name, variants)
        times = comparison.read_times(folder / name, variants)
        runs = {v.name: comparison.judged(v, results) for v in variants}
        found, every, _ = comparison.tested(table, variants, runs)
        pairs = [*(((v.name, v.against), found[v.name]) for v in variants if found[v.name]), *every.items()]
        comparison.correct(pairs)
        cells = {}
        for (a, b), ab in pairs:
            for sign, names in ((1, (a, b)), (-1, (b, a))):
                low, high = sorted((sign * ab["low"], sign * ab["high"]))
                words = f"{sign * ab['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{ab['holm']:.2g}"
                cells[(names[0], "-", names[1])] = list(words)
        for (a, b), line in times.items():
            r = stats.ratio(*line["seconds"])
            cells[(a, "/", b)] = [f"{r['ratio']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}"]
        return cells

    text, name = (folder / "README.md").read_text(), ""
    for line in text.splitlines():
        name = (re.findall(r"\]\(([\w-]+)/report\.md\)", line) or [name])[-1]
        cells = line.strip("| ").split(" | ")
        if len(cells) > 3 and (names := re.fullmatch(r"`(.+)` ([-/]) `(.+)`", cells[1])):
            if name not in known:
                known[name] = computed(name)
            wanted = known[name][names.groups()]
            assert cells[2 : 2 + len(wanted)] == wanted, f"{name}: {line}"
            checked += 1
    assert checked > 50
    # the number of runs of each comparison
    rows = re.findall(r"^\| \[([\w-]+)\]\(.* \| (\d+)[^|]* \| [^|]* \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == {path.parent.name for path in folder.glob("*/table.json")}
    for name, count in rows:
        _, variants = comparison.read_table(folder / name)
        done = (
            comparison.read_results(folder / name, variants),
            comparison.read_times(folder / name, variants),
        )
        assert int(count) == sum(map(len, done)), name


def test_a_comparison_that_has_not_been_run_can_be():
    """Its options are those of today's script; one that was run has the script beside it."""
    for path in sorted((ROOT / "records" / "comparisons").glob("*/table.json")):
        if not (path.parent / "train_gpt.py").exists():
            compare.check_options(ROOT / "train_gpt.py", comparison.read_table(path.parent)[1])


def test_reports_of_the_repository_are_fresh(folder, tmp_path, capsys):
    for folder in sorted(
        {path.parent for name in ("results", "times") for path in (ROOT / "records").rglob(f"{name}.jsonl")}
    ):
        assert compare.main(["report", str(folder), "--check"]) == 0, capsys.readouterr().out
    # a comparison two folders below records/ is not taken for a record
    parts = tmp_path / "records" / "comparisons" / "parts"
    parts.mkdir(parents=True)
    for name in ("train_gpt.py", "table.json"):
        (parts / name).write_text("{}")
    assert claims.record_folders(tmp_path / "records") == []
