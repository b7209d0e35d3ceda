"""What tools/record.py promises: logs that prove nothing are refused, statistics are right, nothing
is lost."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import record
import train_gpt
from helpers import ROOT, make_corpus, no_traceback, options
from lib import claims, figures, logs, runner, stats

RULES = train_gpt.TRACKS["tiny"].evaluation
SOURCE = b"print('the source that was run')\n"
BASE = "2026-01-01_base"


def log_lines(
    seed: int, loss: float, seconds: float, source: bytes = SOURCE, second: int | None = None
) -> list[dict]:
    """The events of a run of 100 steps whose training loss falls by 0.01 a step.

    second: of the minute in which it began.
    """
    settings = {
        "data": {"corpus": "shakespeare", "rows": 2, "row_tokens": 2048},
        "model": {"layers": 4, "width": 192},
        "matrix": {"lr": 0.03, "equilibrate": "row", "normuon": True, "orthogonalize": "polar_express",
                   "steps": 5},
        "schedule": {"windows": [[64, 64]], "steps": 100},
        "evaluation": {"target": RULES.target, "tokens": RULES.tokens},
    }  # fmt: skip
    header = dict(
        run_id=f"20260101-{seed if second is None else second:06d}_tiny_{seed}_abcd", track="tiny",
        settings=settings, seed=seed, torch="2.13.0", world_size=1,
        source_sha256=hashlib.sha256(source).hexdigest(), dtype="bfloat16",
        compiled=True, compile="warm", device="abacus", cpus=2, threads=2, driver="",
        data=claims.SHAKESPEARE,
    )  # fmt: skip
    end = dict(step=100, val_loss=loss, val_tokens=RULES.tokens, train_time_s=seconds, tokens=409_600)
    steps = [
        dict(event="step", step=s, train_loss=2.5 - 0.01 * s, train_time_s=seconds * s / 100, tokens=4096 * s)
        for s in range(2, 101, 2)
    ]
    final = dict(
        target=RULES.target, reached=loss <= RULES.target, compiles_in_timed_region=0, peak_memory_bytes=1
    )
    return [
        {"event": "header", **header},
        *steps,
        {"event": "val", **end},
        {"event": "final", **end, **final},
    ]


def write_log(folder: Path, lines: list[dict]) -> Path:
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    path = folder / "runs" / f"{lines[0]['run_id']}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_record(
    folder: Path, losses: list[float], seconds: list[float], source: bytes = SOURCE, second: int = 0
) -> Path:
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes(source)
    (folder / "README.md").write_text(f"# The record {folder.name[11:]}\n\nWhat changed.\n")
    for i, (loss, s) in enumerate(zip(losses, seconds)):
        seed = claims.first_seed(folder.name, source) + i
        write_log(folder, log_lines(seed, loss, s, source, second + i))
    return folder


LOSSES = [1.490, 1.485, 1.488, 1.492, 1.486, 1.489]
SECONDS = [70.0, 71.0, 69.0, 72.0, 70.5, 70.2]
FASTER = [66.1, 66.0, 64.2, 67.9, 65.3, 66.6]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record that proves its claim."""
    made = write_record(tmp_path / "records" / "tiny" / BASE, LOSSES, SECONDS)
    claims.write_result(made)
    return made


@pytest.fixture
def challenger(folder: Path) -> Path:
    """A record that was timed against `folder` in six pairs and is faster."""
    lower = [x - 0.001 for x in LOSSES]
    made = write_record(folder.parent / "2026-01-02_faster", lower, FASTER, b"pass\n", second=100)
    pairs = [
        dict(baseline=folder.name, order="baseline first", planned=6, discarded=None,
             baseline_run=b.header["run_id"], candidate_run=c.header["run_id"])
        for b, c in zip(claims.read_runs(folder), claims.read_runs(made))
    ]  # fmt: skip
    (made / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    claims.write_result(made)
    return made


NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t by quadrature: with t = sqrt(df) tan(a) the density becomes c
    cos(a)^(df - 1)."""
    begin = math.atan(t / math.sqrt(df))
    a, half = begin + (math.pi / 2 - begin) * (NODES + 1) / 2, (math.pi / 2 - begin) / 2
    c = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return float(c * half * (WEIGHTS * np.cos(a) ** (df - 1)).sum())


# --------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("n", [3, 5, 6, 12, 40])
def test_p_values_agree_with_an_independent_implementation(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(1.49, 0.003, n), rng.normal(1.492, 0.005, n + 2)
    for target in (1.489, 1.492, 1.5):
        t = (target - a.mean()) / (math.sqrt(((a - a.mean()) ** 2).sum() / (n - 1)) / math.sqrt(n))
        assert stats.p_below(a, target) == pytest.approx(t_tail(t, n - 1), rel=1e-9, abs=1e-9)
    va, vb = (((x - x.mean()) ** 2).sum() / (len(x) - 1) / len(x) for x in (a, b))
    df = (va + vb) ** 2 / (va**2 / (n - 1) + vb**2 / (n + 1))
    found = stats.welch(a, b)
    assert found["p"] == pytest.approx(
        2 * t_tail(abs(a.mean() - b.mean()) / math.sqrt(va + vb), df), abs=1e-9
    )
    # the 95% interval ends where the two-sided p is 5%
    for end in (found["low"], found["high"]):
        assert t_tail(abs(found["difference"] - end) / math.sqrt(va + vb), df) == pytest.approx(
            0.025, abs=1e-9
        )
    low, high = stats.interval(a)
    assert t_tail((high - a.mean()) * math.sqrt(n) / a.std(ddof=1), n - 1) == pytest.approx(0.025, abs=1e-9)
    assert low + high == pytest.approx(2 * a.mean())


def test_samples_that_prove_nothing_have_p_one():
    assert stats.p_below([], 1.5) == stats.p_below([1.0], 1.5) == 1.0
    assert stats.p_below([1.5, 1.5], 1.5) == 1.0 and stats.p_below([1.4, 1.4], 1.5) == 1.0
    assert stats.p_below([1.4] * 3, 1.5) == stats.sequential([-0.1] * 9)["p_below"] == 1.0


def power_of(n: int, margin: float) -> float:
    """P(t > its 1% point) for n values of mean `margin` and sd 1: normal tail integrated over the
    density of the sample sd."""
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, n - 1) > 0.01 else (low, middle)
    df = n - 1
    s = 3.0 * (NODES + 1)  # sample sd, 0 to 6
    log_density = (
        math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2) + (df - 1) * np.log(s) - df * s**2 / 2
    )
    tail = [0.5 * math.erfc((high * x - math.sqrt(n) * margin) / math.sqrt(2)) for x in s]
    return float(3.0 * (WEIGHTS * np.exp(log_density) * tail).sum())


@pytest.mark.parametrize("power", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("margin", [0.25, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0])
def test_plan_gives_the_smallest_number_of_runs(margin, power):
    n = stats.runs_needed(0.003, 0.003 * margin, power)
    assert power_of(n, margin) >= power and (n == 2 or power_of(n - 1, margin) < power)


@pytest.mark.parametrize(
    "sd, margin, power", [(0, 1, 0.9), (1, 0, 0.9), (1, -1, 0.9), (1, 1, 1.0), (1, 1e-9, 0.9)]
)
def test_plan_refuses_what_no_number_of_runs_can_show(sd, margin, power, capsys):
    assert record.main(["plan", "--sd", str(sd), "--margin", str(margin), "--power", str(power)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_error_of_all_looks_together_is_at_most_alpha():
    assert stats.looks(28) == [5, 7, 10, 14, 20, 28]
    assert sum(1 / (k * (k + 1)) for k in range(1, 10_000)) < 1
    # the rule's p is the smallest weighted p of the looks, the values after the last look have no part in it
    x = list(np.random.default_rng(3).normal(-0.5, 1, 13))
    looks = [k * (k + 1) * stats.p_below(x[:n]) for k, n in enumerate((5, 7, 10), 1)]
    assert stats.sequential(x)["p_below"] == min(1, *looks) and stats.sequential(x)["n"] == 10
    assert stats.sequential(x[:4])["p_below"] == 1.0


def test_false_positives_of_the_sequential_rule_stay_below_its_level():
    """2,000 sessions of two equal scripts: 3% drift, 5% of the runs 20% slower, AR(1) noise of 0.5,
    order swapped."""
    rng, pairs, wrong = np.random.default_rng(0), 40, 0
    swap = np.where(np.arange(pairs) % 2 == 0, 1.0, -1.0)
    for session in range(2000):
        noise = np.empty(2 * pairs)
        noise[0] = rng.normal()
        for i in range(1, len(noise)):
            noise[i] = 0.5 * noise[i - 1] + math.sqrt(0.75) * rng.normal()
        noise *= (0.003, 0.01, 0.03)[session % 3]
        slowed = np.where(rng.random(2 * pairs) < 0.05, math.log(1.2), 0.0)
        log_time = noise + slowed + np.linspace(0, math.log(1.03), 2 * pairs)
        wrong += stats.sequential(swap * (log_time[1::2] - log_time[0::2]))["p_below"] < stats.ALPHA
    assert wrong / 2000 < stats.ALPHA


def test_the_sequential_rule_finds_a_real_difference():
    rng = np.random.default_rng(0)
    found = [stats.sequential(rng.normal(-0.05, 0.03, 20))["p_below"] < stats.ALPHA for _ in range(200)]
    assert np.mean(found) > 0.95


# --------------------------------------------------------------------------------------------------
# verify


def test_a_record_that_proves_its_claim_holds(folder, capsys):
    result = claims.verify(folder)
    x = np.array(LOSSES)
    assert result["holds"] and result["val_loss"]["n"] == 6
    assert result["margin"] == pytest.approx(1.5 - x.mean())
    t = (1.5 - x.mean()) / (x.std(ddof=1) / math.sqrt(6))
    assert result["p"] == pytest.approx(t_tail(t, 5), abs=1e-9)
    assert result["train_time_s"] == {"abacus": stats.describe(SECONDS)}
    root = str(folder.parents[1])
    assert record.main(["--root", root, "verify"]) == 0 and "holds" in capsys.readouterr().out
    assert record.main(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["holds"] is True


def change(section: str, name: str, value):
    """A mutation of one event of a log: `section` is header or final, a dotted name goes into the
    settings."""

    def apply(lines: list[dict]) -> None:
        event = lines[0] if section == "header" else lines[-1]
        *path, last = name.split(".")
        for key in path:
            event = event[key]
        event[last] = value

    return apply


def drop_final(lines: list[dict]) -> None:
    del lines[-1]


def resume(lines: list[dict]) -> None:
    lines.insert(5, {"event": "resume", "step": 8, "world_size": 1})


def stop_earlier(lines: list[dict]) -> None:
    lines[-2]["step"] = lines[-1]["step"] = 90


def better_final(lines: list[dict]) -> None:
    lines[-1]["val_loss"] = 1.40


FIRST_SEED = claims.first_seed(BASE, SOURCE)
OTHER_VAL = claims.SHAKESPEARE | {"val_000000.bin": "1" * 64}
REFUSALS = {
    "source_sha256": change("header", "source_sha256", "f" * 64),
    "track": change("header", "track", "short"),
    "settings.matrix.lr": change("header", "settings.matrix.lr", 0.02),
    "final.step": stop_earlier,
    "world_size": change("header", "world_size", 2),
    "torch": change("header", "torch", "2.12.0"),
    "dtype": change("header", "dtype", "float32"),
    "data differs": change("header", "data", OTHER_VAL),
    "data: val_000000.bin has sha256": change("header", "data", OTHER_VAL),
    "data: val_000001.bin is no file": change("header", "data", OTHER_VAL | {"val_000001.bin": "1" * 64}),
    "data: train_000001.bin of shakespeare was not read": change(
        "header", "data", {"val_000000.bin": claims.SHAKESPEARE["val_000000.bin"]}
    ),
    "data is missing": change("header", "data", None),
    "seed": change("header", "seed", 0),
    "run_id": change("header", "run_id", log_lines(FIRST_SEED, 1.49, 70.0, second=0)[0]["run_id"]),
    "resume": resume,
    "final": drop_final,
    "compiles_in_timed_region": change("final", "compiles_in_timed_region", 1),
    "val_tokens": change("final", "val_tokens", RULES.tokens - 1),
    "final.val_loss": better_final,
    "final.target": change("final", "target", 1.6),
    "settings.evaluation.target": change("header", "settings.evaluation.target", 1.6),
    "settings.evaluation.tokens": change("header", "settings.evaluation.tokens", 1000),
    "settings.data.corpus": change("header", "settings.data.corpus", "other"),
    "header.world_size": change("header", "world_size", "many"),
    "final.train_time_s": change("final", "train_time_s", None),
    "final.train_time_s is not that": change("final", "train_time_s", 60.0),
    "final.tokens": change("final", "tokens", 1),
    "final.reached": change("final", "reached", False),
}


@pytest.mark.parametrize("field", REFUSALS)
def test_verify_names_the_file_and_the_field(folder, field, capsys):
    path = sorted((folder / "runs").glob("*.jsonl"))[3]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    REFUSALS[field](lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert record.main(["verify", str(folder)]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if path.name in line]
    assert any(f"{path}: {field}" in line or f"{path}: final.{field}" in line for line in said), said


def edit_logs(folder: Path, *mutations) -> None:
    for path in (folder / "runs").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for mutate in mutations:
            mutate(lines)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_record_on_other_bytes_than_those_of_the_track_is_refused(folder, capsys):
    """Each run says the same digests, result.json follows from them, and still nothing holds."""
    zeros = dict.fromkeys(claims.SHAKESPEARE, "0" * 64)
    edit_logs(folder, change("header", "data", zeros))
    assert record.main(["verify", str(folder)]) == 1
    said = capsys.readouterr().out
    for name, digest in claims.SHAKESPEARE.items():
        assert said.count(f"data: {name} has sha256 {'0' * 64}, shakespeare has {digest}") == len(LOSSES)


def fineweb(last: int, **other: str) -> dict[str, str]:
    names = ["val_000000", *(f"train_{i:06d}" for i in range(1, last + 1))]
    return {f"fineweb_{name}.bin": other.get(name, "a" * 64) for name in names}


def test_the_names_of_fineweb_are_known_and_its_digests_are_those_of_the_baseline():
    assert claims.other_data("fineweb10B", fineweb(3)) == []
    (wrong,) = claims.other_data("fineweb10B", {"fineweb_val_000000.bin": "a" * 64})
    assert wrong == "data: fineweb_train_000001.bin of fineweb10B was not read"
    hole = fineweb(3)
    del hole["fineweb_train_000002.bin"]
    assert claims.other_data("fineweb10B", hole) == [
        "data: fineweb_train_000003.bin is no file of fineweb10B",
        "data: fineweb_train_000002.bin of fineweb10B was not read",
    ]
    # a shorter schedule reads fewer files
    assert claims.data_apart(fineweb(3), fineweb(5)) == claims.data_apart(fineweb(5), fineweb(3)) == []
    assert claims.data_apart(fineweb(3), fineweb(5, train_000002="b")) == ["fineweb_train_000002.bin"]
    assert claims.data_apart(fineweb(3), fineweb(3, val_000000="b")) == ["fineweb_val_000000.bin"]
    more = fineweb(3) | {"fineweb_val_000001.bin": "b"}
    assert claims.data_apart(fineweb(3), more) == ["fineweb_val_000001.bin"]
    assert claims.data_apart(fineweb(3), hole) == ["fineweb_train_000003.bin"]


def test_a_record_on_other_bytes_than_its_baseline_is_refused(challenger, monkeypatch):
    # a corpus of which only the names are known
    monkeypatch.setattr(claims, "other_data", lambda corpus, files: [])
    assert claims.summarize(challenger)["beats"]
    edit_logs(challenger, change("header", "data", OTHER_VAL))
    with pytest.raises(ValueError, match="pair 1: data: val_000000.bin differs between the two runs"):
        claims.summarize(challenger)


def test_settings_that_all_runs_share_do_not_excuse_an_easier_target(folder):
    edit_logs(
        folder, change("header", "settings.evaluation.target", 1.6), change("final", "target", 1.6)
    )
    with pytest.raises(ValueError, match="settings.evaluation.target is 1.6, track tiny says 1.5"):
        claims.summarize(folder)


@pytest.mark.parametrize(
    "text", ["", "not json\n", '["a list"]\n', '{"event": "val"}\n', '{"event": "header"}\n', "[" * 10_000]
)
def test_damaged_logs_are_named(folder, text):
    path = next((folder / "runs").glob("*.jsonl"))
    path.write_text(text)
    with pytest.raises(ValueError, match=path.name):
        claims.verify(folder)


def test_a_copy_of_a_run_under_another_seed_is_refused(folder):
    lines = log_lines(FIRST_SEED + len(LOSSES), LOSSES[2], 70.0)
    write_log(folder, lines)
    with pytest.raises(ValueError, match="final.val_loss 1.488 is also that of"):
        claims.summarize(folder)


def test_the_stored_source_must_be_the_one_that_was_run(folder):
    (folder / "train_gpt.py").write_bytes(SOURCE + b"# edited\n")
    other = "train_gpt.py: sha256 .* is not source_sha256 of the runs, [0-9a-f]*"
    with pytest.raises(ValueError, match=f"{other}$"):
        claims.verify(folder)
    (folder / "train_gpt.py").write_bytes(SOURCE.replace(b"\n", b"\r\n"))
    with pytest.raises(ValueError, match=f"{other}; only its line ends differ"):
        claims.verify(folder)
    (folder / "train_gpt.py").unlink()
    with pytest.raises(ValueError, match="train_gpt.py is missing"):
        claims.verify(folder)


def test_an_edited_result_is_refused(folder):
    path = folder / "result.json"
    stored = json.loads(path.read_text())
    for key, value in (
        ("p", stored["p"] / 2),
        ("steps", 99),
        ("beats", [{}]),
        ("margin", stored["margin"] * (1 + 1e-6)),
    ):
        path.write_text(json.dumps(stored | {key: value}))
        with pytest.raises(ValueError, match=rf"result.json: {key} is not what the logs give"):
            claims.verify(folder)
    for text in ("{", "[]", "null"):
        path.write_text(text)
        with pytest.raises(ValueError, match="result.json"):
            claims.verify(folder)
    path.unlink()
    with pytest.raises(ValueError, match="result.json is missing"):
        claims.verify(folder)


def test_a_claim_without_significance_does_not_hold(tmp_path, capsys):
    folder = write_record(tmp_path / "tiny" / BASE, [1.495, 1.501, 1.499, 1.502, 1.494], [70.0] * 5)
    assert claims.write_result(folder)["reaches_target"] is False
    assert record.main(["verify", str(folder)]) == 1 and "DOES NOT HOLD" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["verify", "/nowhere"], ["--root", "/nowhere", "verify"], ["import", "/nowhere"]]
)
def test_missing_folders_get_one_sentence(arguments, capsys):
    assert record.main(arguments) == 1
    captured = capsys.readouterr()
    no_traceback(captured.out, captured.err)
    assert "/nowhere" in captured.out + captured.err


# --------------------------------------------------------------------------------------------------
# A/B


def test_an_ab_is_recomputed_from_both_folders(challenger):
    result = claims.verify(challenger)
    (ab,) = result["beats"]
    d = np.log(np.array(FASTER) / np.array(SECONDS))
    assert ab["ratio"] == pytest.approx(math.exp(d.mean())) and ab["rule"] == "fixed" and ab["pairs"] == 6
    assert ab["p"] == pytest.approx(t_tail(-d.mean() / (d.std(ddof=1) / math.sqrt(6)), 5), abs=1e-9)
    assert t_tail((math.log(ab["high"]) - d.mean()) * math.sqrt(6) / d.std(ddof=1), 5) == pytest.approx(0.025)
    assert ab["faster"] and result["holds"]
    # the training loss falls by 0.01 a step: a final loss that is 0.001 lower is worth a tenth of a step
    assert ab["loss_per_step"] == pytest.approx(-0.01) and ab["steps_equivalent"] == pytest.approx(0.1)
    assert ab["loss"]["p"] == pytest.approx(stats.welch([x - 0.001 for x in LOSSES], LOSSES)["p"])


def edit_pairs(folder: Path, change) -> None:
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    change(pairs)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def test_pairs_whose_number_was_not_fixed_are_judged_by_the_sequential_rule(challenger):
    for planned in (None, 5):
        edit_pairs(challenger, lambda pairs, planned=planned: pairs[0].update(planned=planned))
        (ab,) = claims.summarize(challenger)["beats"]
        d = np.log(np.array(FASTER) / np.array(SECONDS))
        assert ab["rule"] == "sequential" and ab["p"] == 2 * stats.p_below(d[:5]) and ab["pairs_used"] == 5


def test_four_pairs_are_not_enough(challenger):
    edit_pairs(
        challenger,
        lambda pairs: [pair.update(planned=4) for pair in pairs] and pairs.__delitem__(slice(4, None)),
    )
    result = claims.summarize(challenger)
    assert result["beats"][0]["p"] < 0.01 and not result["beats"][0]["faster"]


@pytest.mark.parametrize(
    "mutate, message",
    [
        (lambda pairs: pairs[2].update(candidate_run="nothing"), "pair 3: candidate_run nothing"),
        (
            lambda pairs: pairs[2].update(baseline_run=pairs[1]["baseline_run"]),
            "baseline_run appears in two pairs",
        ),
        (lambda pairs: pairs[2].pop("order"), "pairs.jsonl is not a list of pairs"),
    ],
)
def test_pairs_that_do_not_fit_the_logs_are_refused(challenger, mutate, message):
    edit_pairs(challenger, mutate)
    with pytest.raises(ValueError, match=message):
        claims.verify(challenger)


def test_pairs_on_two_machines_are_refused(challenger):
    path = sorted((challenger / "runs").glob("*.jsonl"))[1]
    path.write_text(path.read_text().replace('"abacus"', '"slide rule"'))
    with pytest.raises(ValueError, match="pair 2: device differs"):
        claims.verify(challenger)


# --------------------------------------------------------------------------------------------------
# run and ab, on a script that only writes logs


FAKE = """
import hashlib, json, os, random, sys, time
from pathlib import Path
from typing import Any
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seed, out = int(given["--seed"]), Path(given["--out"])
NAME, SPEED, COMPILES, FAIL, WAIT = "", 1.0, "", "", 0.0
runs = len(list(Path(__file__).parent.glob("*/*.jsonl")))
random.seed(f"{NAME} {runs}")  # the same on every day and in every folder
source = Path(__file__).read_bytes()
Path(__file__).with_name("pid").write_text(str(os.getpid()))
if FAIL and Path(FAIL).exists():
    sys.exit("fake: no tokens left")
lines = json.loads(Path("TEMPLATE").read_text())
name = time.strftime("%Y%m%d-%H%M%S") + f"_tiny_{seed}_{random.getrandbits(16):04x}"
lines[0].update(run_id=name, seed=seed, source_sha256=hashlib.sha256(source).hexdigest())
if "--matrix.lr" in given:
    lines[0]["settings"]["matrix"]["lr"] = float(given["--matrix.lr"])
loss, seconds = random.gauss(1.48, 0.003), SPEED * random.gauss(10, 0.1)
for line in lines[-2:]:
    line.update(val_loss=loss, train_time_s=seconds)
if COMPILES and not Path(COMPILES).exists():
    Path(COMPILES).touch()
    lines[-1]["compiles_in_timed_region"] = 2
(out / "source.py").write_bytes(source)
with open(out / f"{name}.jsonl", "w") as log:
    for line in lines:
        log.write(json.dumps(line) + "\\n")
        log.flush()
        time.sleep(WAIT)
"""


@pytest.fixture
def scripts(tmp_path: Path):
    """Writes a stand-in for train_gpt.py, its noise drawn from its name; `SPEED=0.9` and the like
    set its constants."""
    (tmp_path / "template.json").write_text(json.dumps(log_lines(0, 1.49, 10.0)))

    def write(name: str, **constants) -> Path:
        text = FAKE.replace("TEMPLATE", str(tmp_path / "template.json"))
        for key, value in {"NAME": name, **constants}.items():
            text = text.replace("random.seed(", f"{key} = {value!r}\nrandom.seed(", 1)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return path

    (tmp_path / "records").mkdir(exist_ok=True)
    return write


def command(tmp_path: Path, *arguments: str) -> int:
    return record.main(["--root", str(tmp_path / "records"), *map(str, arguments)])


def only(tmp_path: Path, name: str) -> Path:
    (found,) = (tmp_path / "records" / "tiny").glob(f"*_{name}")
    return found


def test_run_makes_a_record_and_goes_on_where_it_stopped(tmp_path, scripts, capsys):
    fail = tmp_path / "fail"
    script = scripts("script", FAIL=str(fail))
    arguments = ("run", "--track", "tiny", "--name", "first", "--source", str(script))
    assert command(tmp_path, *arguments, "--runs", "2") == 0
    folder = only(tmp_path, "first")
    before = {path: path.read_bytes() for path in (folder / "runs").iterdir()}
    fail.touch()
    assert command(tmp_path, *arguments, "--runs", "5") == 1
    assert "it said: fake: no tokens left" in capsys.readouterr().err
    fail.unlink()
    assert command(tmp_path, *arguments, "--runs", "5") == 0
    runs = claims.read_runs(folder)
    assert len(runs) == 5 and all(path.read_bytes() == content for path, content in before.items())
    seeds = [run.header["seed"] for run in runs]
    assert sorted(seeds) == list(range(min(seeds), min(seeds) + 5))
    assert {path.name for path in folder.iterdir()} == {"train_gpt.py", "runs", "result.json", "pid"}
    assert all(path.suffix == ".jsonl" for path in (folder / "runs").iterdir())
    assert claims.verify(folder)["holds"]


def test_run_refuses_to_mix(tmp_path, scripts, capsys):
    arguments = ("run", "--name", "first", "--runs", "1", "--source")
    assert command(tmp_path, *arguments, scripts("script")) == 0
    assert command(tmp_path, *arguments, scripts("other", SPEED=0.5)) == 1
    assert "another train_gpt.py" in capsys.readouterr().err
    more = ("run", "--name", "first", "--runs", "2", "--source", scripts("script"))
    assert command(tmp_path, *more, "--", "--matrix.lr", "0.5") == 1
    assert "other settings (matrix.lr)" in capsys.readouterr().err
    assert len(claims.read_runs(only(tmp_path, "first"))) == 1
    for name in ("", "../x", "a b"):
        assert command(tmp_path, "run", "--name", name, "--runs", "1", "--source", scripts("script")) == 1
    assert command(tmp_path, "run", "--name", "x", "--runs", "1", "--source", "/nowhere.py") == 1


def test_overrides_of_a_record_are_those_of_its_logs(tmp_path, scripts):
    script = scripts("script")
    assert (
        command(tmp_path, "run", "--name", "x", "--runs", "1", "--source", script, "--", "--matrix.lr", "0.5")
        == 0
    )
    assert command(tmp_path, "run", "--name", "x", "--runs", "2", "--source", script) == 0
    assert {run.header["settings"]["matrix"]["lr"] for run in claims.read_runs(only(tmp_path, "x"))} == {0.5}


def test_ab_interleaves_and_its_runs_count(tmp_path, scripts, capsys):
    assert command(tmp_path, "run", "--name", "slow", "--runs", "2", "--source", scripts("slow")) == 0
    slow = only(tmp_path, "slow")
    ab = ("ab", "--baseline", slow, "--candidate", scripts("fast", SPEED=0.9), "--name", "fast", "--pairs")
    assert command(tmp_path, *ab, "6") == 0
    said = capsys.readouterr().out
    fast = only(tmp_path, "fast")
    assert "faster" in said and len(claims.read_runs(slow)) == 8 and len(claims.read_runs(fast)) == 6
    orders = [pair["order"] for pair in claims.read_pairs(fast)]
    assert orders == ["baseline first", "candidate first"] * 3
    assert claims.verify(fast)["holds"] and claims.verify(slow)["holds"]
    assert claims.verify(fast)["beats"][0]["rule"] == "fixed"
    # asking for more after having seen the first is another rule, and nothing is run twice
    assert command(tmp_path, *ab, "7") == 0
    assert claims.verify(fast)["beats"][0]["rule"] == "sequential" and len(claims.read_runs(fast)) == 7


def test_a_pair_with_a_compile_inside_the_clock_is_set_aside_and_counted(tmp_path, scripts):
    assert command(tmp_path, "run", "--name", "slow", "--runs", "1", "--source", scripts("slow")) == 0
    slow, mark = only(tmp_path, "slow"), tmp_path / "compiled"
    script = scripts("fast", SPEED=0.9, COMPILES=str(mark))
    candidate = runner.new_record(tmp_path / "records", "tiny", "fast", script)
    original = runner.Record.run
    try:
        runner.Record.run = lambda self, seed, bar, only_warm=False: (
            None if only_warm else original(self, seed, bar)
        )
        assert command(tmp_path, "ab", "--baseline", slow, "--candidate", candidate, "--pairs", "5") == 0
    finally:
        runner.Record.run = original
    result = claims.verify(candidate)
    assert result["beats"][0]["discarded"] == 1 and result["beats"][0]["pairs"] == 5 and result["holds"]
    assert len(list((candidate / "discarded").iterdir())) == len(list((slow / "discarded").iterdir())) == 1
    # what was set aside is still there and says why
    (log,) = (candidate / "discarded").iterdir()
    text = log.read_text()
    log.write_text(text.replace('"compiles_in_timed_region": 2', '"compiles_in_timed_region": 0'))
    with pytest.raises(ValueError, match="pair 1: it was set aside, but nothing was compiled"):
        claims.verify(candidate)
    log.unlink()
    with pytest.raises(ValueError, match="seed .* has no run"):
        claims.verify(candidate)


def test_until_decided_stops_when_time_and_loss_are_settled(tmp_path, scripts):
    arguments = ("--baseline", scripts("slow"), "--candidate", scripts("fast", SPEED=0.8), "--name", "fast")
    assert command(tmp_path, "ab", *arguments, "--until-decided", "--max-pairs", "30") == 0
    fast = only(tmp_path, "fast")
    # a fifth of the time and a margin of seven sd: the first look decides
    assert len(claims.read_pairs(fast)) == 5
    result, losses = claims.verify(fast), [run.final["val_loss"] for run in claims.read_runs(fast)]
    assert result["holds"] and result["rule"] == "sequential"
    assert result["p"] == 2 * stats.p_below(losses, 1.5)
    # equal scripts: within 1% at last, or the budget is spent
    arguments = ("--baseline", scripts("a"), "--candidate", scripts("b", WAIT=0.0), "--name", "b")
    assert command(tmp_path, "ab", *arguments, "--until-decided", "--max-pairs", "6") == 0
    assert len(claims.read_pairs(only(tmp_path, "b"))) == 6
    assert not claims.verify(only(tmp_path, "b"))["holds"]


def test_an_interrupt_keeps_what_is_finished_and_leaves_no_half_log(tmp_path, scripts):
    script = scripts("script", WAIT=0.02)
    line = [sys.executable, str(ROOT / "tools" / "record.py"), "--root", str(tmp_path / "records"), "run",
            "--name", "x", "--runs", "4", "--source", str(script)]  # fmt: skip
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("records/tiny/*/runs/*.jsonl")):
        time.sleep(0.05)
    # inside the second run
    while time.monotonic() < deadline and not list(tmp_path.glob("records/tiny/*/unfinished/*.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    no_traceback(said)
    assert process.returncode == 130 and "the same command goes on" in said
    folder = only(tmp_path, "x")
    finished = claims.read_runs(folder)
    assert 1 <= len(finished) < 4 and all(run.final for run in finished)
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(claims.read_runs(folder)) == 4
    assert not (folder / "unfinished").exists()


def test_two_at_once_are_refused(tmp_path, scripts, capsys):
    with runner.alone(tmp_path / "records"):
        assert command(tmp_path, "run", "--name", "x", "--runs", "1", "--source", scripts("script")) == 1
    assert "would slow each other" in capsys.readouterr().err


def test_a_real_run_can_be_repeated_from_its_log(tmp_path, monkeypatch):
    """The settings of a log, given back as options, are the settings of the next run; short
    evaluations are refused."""
    make_corpus(tmp_path / "data")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    small = options(track=None, **{"schedule.steps": 3, "schedule.extension": 0})
    (tmp_path / "records").mkdir()
    # 1,000 validation tokens
    assert command(tmp_path, "run", "--name", "real", "--runs", "1", "--", *small) == 1
    (run,) = claims.read_runs(only(tmp_path, "real"))
    track, _ = train_gpt.parse_command_line(["--track", "tiny", *runner.Record.options_of(run)])
    train_gpt.check_settings(track, train_gpt.Run(track="tiny"))
    assert json.loads(json.dumps(train_gpt.dataclasses.asdict(track))) == run.header["settings"]
    with pytest.raises(ValueError, match="settings.evaluation.tokens is 1000, track tiny says"):
        claims.summarize(only(tmp_path, "real"))


def test_a_track_that_nobody_knows_is_refused_before_anything_is_made(tmp_path, scripts, capsys):
    arguments = ("--name", "x", "--runs", "0", "--source", scripts("script"))
    assert command(tmp_path, "run", "--track", "nosuch", *arguments) == 1
    assert capsys.readouterr().err.startswith("record.py: unknown track 'nosuch', there are tiny, ")
    ab = ("ab", "--track", "nosuch", "--baseline", scripts("a"), "--candidate", scripts("b"), "--name", "b")
    assert command(tmp_path, *ab) == 1 and "unknown track 'nosuch'" in capsys.readouterr().err
    assert command(tmp_path, "run", *arguments) == 1
    assert "track tiny has no record x yet; with --runs 1 or more" in capsys.readouterr().err
    assert [path for path in (tmp_path / "records").rglob("*") if path.name != ".lock"] == []


def test_a_record_whose_first_run_failed_is_none_yet(tmp_path, folder, scripts, capsys):
    fail = tmp_path / "fail"
    fail.touch()
    script = scripts("script", FAIL=str(fail))
    assert command(tmp_path, "run", "--name", "x", "--runs", "1", "--source", script) == 1
    assert only(tmp_path, "x").is_dir()
    assert command(tmp_path, "verify") == 0
    # but one whose runs were taken away is one
    shutil.rmtree(folder / "runs")
    assert command(tmp_path, "verify") == 1 and "runs: there is no log" in capsys.readouterr().out


@pytest.mark.parametrize("track", ["nosuch", "short"])
def test_logs_of_a_track_whose_rules_are_not_those_of_the_folder_are_refused(folder, track):
    edit_logs(
        folder, change("header", "track", track), change("header", "settings.evaluation.target", 1.6),
        change("final", "target", 1.6),
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"track is {track}, its record lies in tiny/"):
        claims.verify(folder)
    moved = folder.parents[1] / "nosuch" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    with pytest.raises(ValueError, match="unknown track 'nosuch', there are tiny"):
        claims.verify(moved)


def test_a_byte_order_mark_changes_nothing(challenger, folder, capsys):
    """As PowerShell and Notepad write it."""
    root = folder.parents[1]
    readmes(folder)
    assert record.main(["--root", str(root), "table"]) == 0
    files = [next(challenger.glob("runs/*")), *challenger.glob("*.json*"), *folder.glob("*.json")]
    files.append(challenger / "README.md")
    assert len(files) == 5
    for path in files:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert record.main(["--root", str(root), "verify"]) == 0
    assert record.main(["--root", str(root), "table", "--check"]) == 0, capsys.readouterr().out
    assert record.results_of(folder.parent)


@pytest.mark.parametrize("seconds", [0, 0.0, -1.5, math.inf, math.nan])
@pytest.mark.parametrize("side", ["candidate", "baseline"])
def test_a_time_that_is_none_is_named(challenger, folder, side, seconds):
    path = claims.read_runs(challenger if side == "candidate" else folder)[2].path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[-2:]:
        line["train_time_s"] = seconds
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=f"^{path}: final.train_time_s is {seconds}, no time"):
        claims.summarize(challenger)


def test_a_baseline_that_is_not_there_is_named(challenger, folder):
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(ValueError, match=rf"pairs.jsonl: the folder \S*{BASE} of the baseline is missing"):
        claims.summarize(challenger)


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "nosuch"],
        ["import", "nosuch"],
        ["public", "nosuch"],
        ["run", "--track", "nosuch", "--name", "x", "--runs", "0"],
    ],
)
def test_refusals_as_they_are_typed(tmp_path, arguments):
    out = ["--out", "page.md"] if arguments[0] == "public" else []
    line = [sys.executable, str(ROOT / "tools" / "record.py"), "--root", ".", *arguments, *out]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "nosuch" in done.stdout + done.stderr
    no_traceback(done.stdout, done.stderr)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# Runs that were left out


def delete(folder: Path, place: int) -> str:
    """Take one log away and its line in pairs.jsonl, and let the other lines say that fewer were planned."""
    run = claims.read_runs(folder)[place]
    run.path.unlink()

    def drop(pairs: list[dict]) -> None:
        pairs[:] = [pair for pair in pairs if pair["candidate_run"] != run.header["run_id"]]
        for pair in pairs:
            pair["planned"] = len(pairs)

    if (folder / "pairs.jsonl").exists():
        edit_pairs(folder, drop)
    return str(run.header["seed"])


@pytest.mark.parametrize("place", range(5))
def test_a_hole_in_the_seeds_is_seen(challenger, folder, place, capsys):
    for record_folder in (challenger, folder):
        seed = delete(record_folder, place)
        command(folder.parents[2], "run", "--name", record_folder.name[11:], "--runs", "0",
                "--source", str(record_folder / "train_gpt.py"))  # fmt: skip
        assert f"{record_folder}: seed {seed} has no run" in capsys.readouterr().err
        assert record.main(["verify", str(record_folder)]) == 1
        assert f"seed {seed} has no run" in capsys.readouterr().out


@pytest.mark.parametrize("record_of_the_repository", ["two-blocks", "n-grams"])
def test_a_hole_in_a_real_record_is_seen(tmp_path, record_of_the_repository):
    track = tmp_path / "tiny"
    shutil.copytree(ROOT / "records" / "tiny", track)
    (place,) = track.glob(f"*_{record_of_the_repository}")
    claims.verify(place)
    runs = claims.read_runs(place)
    worst = max(range(len(runs) - 1), key=lambda i: runs[i].final["val_loss"])
    seed = delete(place, worst)
    with pytest.raises(ValueError, match=f"seed {seed} has no run"):
        claims.summarize(place)


def test_seeds_that_somebody_picked_are_refused(folder):
    log = claims.read_runs(folder)[5].path
    seed = FIRST_SEED + 5
    log.write_text(log.read_text().replace(f'"seed": {seed}', f'"seed": {seed + 1000}'))
    with pytest.raises(ValueError) as error:
        claims.verify(folder)
    first, second = str(error.value).splitlines()
    assert f"{log}: seed {seed + 1000} is none of this record" in first
    assert f"seed {seed} has no run: the folder's name and its source give {FIRST_SEED} to {seed}" in second


def test_another_name_for_the_same_runs_is_refused(folder):
    other = folder.with_name("2026-01-01_better-name")
    folder.rename(other)
    with pytest.raises(ValueError, match="is none of this record"):
        claims.verify(other)


def test_a_line_that_was_taken_out_of_the_pairs_is_missed(challenger):
    """The logs stay; the pair in which the candidate was slow is gone."""
    run = claims.read_runs(challenger)[2]
    edit_pairs(challenger, lambda pairs: pairs.pop(2))
    with pytest.raises(ValueError, match="pairs.jsonl: 6 pairs were planned, 5 are there"):
        claims.summarize(challenger)
    edit_pairs(challenger, lambda pairs: [pair.update(planned=5) for pair in pairs])
    with pytest.raises(ValueError, match="it was run for the A/B with .*_base and is in no pair") as error:
        claims.summarize(challenger)
    assert str(run.path) in str(error.value) and BASE in str(error.value)


@pytest.mark.parametrize("side", ["baseline_run", "candidate_run"])
def test_a_pair_that_was_set_aside_needs_its_logs_and_a_reason(challenger, side):
    edit_pairs(challenger, lambda pairs: pairs[3].update(discarded="it was slow"))
    with pytest.raises(ValueError, match="pair 4: it was set aside, but nothing was compiled"):
        claims.summarize(challenger)
    edit_pairs(challenger, lambda pairs: pairs[3].update({side: "gone"}))
    with pytest.raises(ValueError, match=f"pair 4: {side} gone was set aside, and is not a finished run"):
        claims.summarize(challenger)


def test_each_run_says_which_of_how_many_it_is(tmp_path, scripts, capsys):
    arguments = ("run", "--name", "slow", "--source", scripts("slow"), "--runs")
    assert command(tmp_path, *arguments, "3") == 0
    slow = only(tmp_path, "slow")
    plans = [run.plan for run in claims.read_runs(slow)]
    assert plans == [logs.plan_of(index, 3, None) for index in (1, 2, 3)]
    ab = ("ab", "--baseline", slow, "--candidate", scripts("fast", SPEED=0.9), "--name", "fast", "--pairs")
    assert command(tmp_path, *ab, "6") == 0
    fast = only(tmp_path, "fast")
    plans = [run.plan for run in claims.read_runs(fast)]
    assert plans == [logs.plan_of(index, 6, slow.name) for index in range(1, 7)]
    plans = [run.plan for run in claims.read_runs(slow)[3:]]
    assert plans == [logs.plan_of(index, None, fast.name) for index in range(4, 10)]
    assert claims.verify(slow)["val_loss"]["n"] == 9 and claims.verify(fast)["holds"]
    # the last run leaves no hole in the seeds, but the others say that it was planned
    delete(fast, 5)
    with pytest.raises(ValueError, match="6 runs were planned, 5 are there"):
        claims.summarize(fast)
    assert command(tmp_path, *ab, "5") == 1 and "6 runs were planned" in capsys.readouterr().err


def test_a_run_says_with_what_it_was_paired(tmp_path, scripts):
    ab = ("ab", "--baseline", scripts("slow"), "--candidate", scripts("fast"), "--name", "fast")
    assert command(tmp_path, *ab, "--until-decided", "--max-pairs", "6") == 0
    fast, slow = only(tmp_path, "fast"), only(tmp_path, "fast-baseline")
    assert [run.plan["planned"] for run in claims.read_runs(fast)] == [None] * 6
    # the first and the last one lie at no hole in the order of time
    edit_pairs(fast, lambda pairs: pairs.__delitem__(0))
    edit_pairs(fast, lambda pairs: pairs.__delitem__(-1))
    with pytest.raises(ValueError) as error:
        claims.summarize(fast)
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and all("is in no pair" in line for line in lines)
    assert sum(str(slow) in line for line in lines) == 2


def test_a_pair_that_was_interrupted_is_set_aside_and_said(tmp_path, scripts):
    fail = tmp_path / "fail"
    slow, fast = scripts("slow"), scripts("fast", SPEED=0.9, FAIL=str(fail))
    ab = ("ab", "--baseline", slow, "--candidate", fast, "--name", "fast", "--pairs")
    assert command(tmp_path, *ab, "2") == 0
    original = runner.Record.run

    def interrupted(self, seed, bar, only_warm=False):
        fail.unlink(missing_ok=True) if only_warm else fail.touch()
        return original(self, seed, bar, only_warm)

    runner.Record.run = interrupted
    try:
        assert command(tmp_path, *ab, "6") == 1
    finally:
        runner.Record.run = original
        fail.unlink()
    candidate, baseline = only(tmp_path, "fast"), only(tmp_path, "fast-baseline")
    assert len(claims.read_runs(baseline)) == 3 and len(claims.read_runs(candidate)) == 2
    with pytest.raises(ValueError, match="is in no pair"):
        claims.summarize(candidate)
    assert command(tmp_path, *ab, "6") == 0
    third = claims.read_pairs(candidate)[2]
    assert third["discarded"] == "interrupted after its first run" and third["candidate_run"] == ""
    (result,) = claims.verify(candidate)["beats"]
    assert result["pairs"] == 6 and result["discarded"] == 1
    # its loss counts
    assert claims.verify(baseline)["val_loss"]["n"] == 7


@pytest.mark.parametrize("plan", [{"index": "1"}, {"planned": 1.5}, {"beside": 3}, {"beside": ""}])
def test_a_plan_that_is_none_is_refused(folder, plan):
    path = claims.read_runs(folder)[0].path
    header, *rest = path.read_text().splitlines()

    def written(event: dict) -> None:
        path.write_text("\n".join([header, json.dumps(event), *rest]) + "\n")

    written(logs.plan_of(1, 6, None))
    assert claims.verify(folder)["holds"]
    written(logs.plan_of(1, 6, None) | plan)
    with pytest.raises(ValueError, match="the plan event lacks index, planned or beside"):
        claims.verify(folder)
    written(logs.plan_of(2, 6, None))
    with pytest.raises(ValueError, match="plan.index is 2, the seed is that of run 1"):
        claims.verify(folder)


# --------------------------------------------------------------------------------------------------
# Public logs


def public_log(
    path: Path, loss: float, seconds: float, unit: str = "ms", separator_first: bool = False, code: str = ""
) -> Path:
    line = "=" * 100
    time_text = (lambda s: f"{1000 * s:.0f}ms") if unit == "ms" else (lambda s: f"{s:.3f}s")
    example = "step:99/99 val_loss:0.0001 train_time:1ms step_avg:1.00ms"
    source = f'print0("=" * 100)\nexample = """\n{example}\n"""\n{code}\n'
    environment = "step:98/98 val_loss:0.0002 train_time:1ms step_avg:1.00ms\n"  # whatever a machine prints
    environment += "Running Python 3.12.3\nRunning PyTorch 2.10.0+cu128 compiled for CUDA 12.8\n" + "".join(
        f"|   {i}  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |\n"
        for i in range(8)
    )
    results = "step:1/1480 train_time:61ms step_avg:61.28ms\n" + "".join(
        f"step:{s}/1480 val_loss:{value} train_time:{time_text(seconds * s / 1480)} step_avg:58.10ms\n"
        for s, value in ((0, 10.8258), (740, 3.6), (1480, loss))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    first = line + "\n" if separator_first else ""
    path.write_text(f"{first}{source}\n{line}\n{environment}{line}\n{results}peak memory: 30 GiB\n")
    return path


@pytest.mark.parametrize("unit", ["ms", "s"])
@pytest.mark.parametrize("separator_first", [False, True])
def test_public_logs_are_read_past_their_source(tmp_path, unit, separator_first):
    (run,) = logs.read_public_log(public_log(tmp_path / "a.txt", 3.2784, 86.0, unit, separator_first))
    assert run.final == {"step": 1480, "val_loss": 3.2784, "train_time_s": pytest.approx(86.0)}
    assert [p.step for p in run.val] == [0, 740, 1480] and run.header["torch"] == "2.10.0+cu128"
    assert run.header["world_size"] == 8 and run.header["device"] == "NVIDIA H100 80GB HBM3"
    assert run.header["steps"] == 1480


def test_a_source_alone_is_no_result(tmp_path):
    path = public_log(tmp_path / "a.txt", 3.2784, 86.0)
    text = path.read_text()
    for cut in (text.split("=" * 100 + "\n")[0], text[: text.rindex("=" * 100)]):
        path.write_text(cut)
        with pytest.raises(ValueError, match="a.txt: no line"):
            logs.read_public_log(path)


def test_import_gives_the_statistics_of_a_folder(tmp_path, capsys):
    losses, seconds = [3.2784, 3.2776, 3.2790, 3.2781], [86.0, 86.2, 85.9, 86.1]
    for i, (loss, s) in enumerate(zip(losses, seconds)):
        public_log(tmp_path / "logs" / f"{i}.txt", loss, s)
    (tmp_path / "logs" / "notes.txt").write_text("val_loss: 1.0\n")
    assert record.main(["import", str(tmp_path), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    (group,) = read["groups"]
    x = np.array(losses)
    assert group["val_loss"]["mean"] == pytest.approx(x.mean())
    assert group["train_time_s"]["mean"] == pytest.approx(np.mean(seconds), abs=1e-3)
    assert group["p"] == pytest.approx(t_tail((3.28 - x.mean()) / (x.std(ddof=1) / 2), 3), abs=1e-9)
    assert len(read["refused"]) == 1 and "notes.txt" in read["refused"][0]
    assert record.main(["import", str(tmp_path), "--target", "3.27"]) == 0
    assert "p 1 against 3.27" in capsys.readouterr().out


def test_import_keeps_different_scripts_apart(tmp_path, capsys):
    for name, code, seconds in (("a", "", 86.0), ("b", "", 86.1), ("c", "import torch", 86.2)):
        public_log(tmp_path / f"{name}.txt", 3.278, seconds, code=code)
    assert record.main(["import", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "n 2, 1480 of 1480" in said and "n 1, 1480 of 1480" in said and "they are not one claim" in said
    # no statistic that cannot be
    assert "all losses are the same: no spread" in said and "one run shows no spread" in said
    assert " p " not in said


FIVE = [3.2781, 3.2790, 3.2775, 3.2799, 3.2768]


def imported(folder: Path, capsys) -> dict:
    assert record.main(["import", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_same_run_counts_once_whatever_it_is_called(tmp_path, capsys):
    """A copy, a copy with another end, the program's output beside the log, and a part of it."""
    for i, loss in enumerate(FIVE):
        public_log(tmp_path / f"{i}.txt", loss, 86.0 + i)
    (before,) = imported(tmp_path, capsys)["groups"]
    assert before["val_loss"]["n"] == 5 and before["p"] == pytest.approx(0.017, abs=5e-4)
    text = (tmp_path / "0.txt").read_text()
    (tmp_path / "0 copy.txt").write_text(text)
    (tmp_path / "windows.txt").write_text("\ufeff" + text.replace("\n", "\r\n") + "\n\n")
    (tmp_path / "another-source.txt").write_text("# edited\n" + text)
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "train.log").write_text(text.rpartition("=" * 100 + "\n")[2])
    results = text.rpartition("=" * 100 + "\n")[2].splitlines(keepends=True)
    (tmp_path / "seed" / "end.log").write_text("".join(results[2:]))
    read = imported(tmp_path, capsys)
    assert [group["val_loss"] for group in read["groups"]] == [before["val_loss"]]
    assert len(read["refused"]) == 5
    assert all("the same losses and times as in" in line for line in read["refused"])
    # another run with the same last loss is another run
    public_log(tmp_path / "6.txt", FIVE[0], 95.0)
    assert imported(tmp_path, capsys)["groups"][0]["val_loss"]["n"] == 6


def test_a_figure_does_not_count_a_mirror_either(tmp_path):
    public_log(tmp_path / "a.txt", 3.278, 86.0)
    shutil.copy(tmp_path / "a.txt", tmp_path / "b.txt")
    assert len(logs.any_runs(tmp_path)) == 1


def test_one_file_that_is_no_log_does_not_hide_the_others(tmp_path, capsys):
    good = public_log(tmp_path / "good.txt", 3.278, 86.0)
    text = good.read_text()
    source, environment, results = text.split("=" * 100 + "\n")
    line = "=" * 100 + "\n"
    first = results.splitlines(keepends=True)[1]
    files = {
        "requirements.txt": ("numpy\ntorch==2.10\n", "no line of a validation"),
        "metadata.txt": ("seed=0\ntarget_val_loss=0\n", "no line of a validation"),
        "stderr.txt": ("W0506 torch/distributed/run.py:852] ****\n", "no line of a validation"),
        "final_val_loss.txt": (results.splitlines()[3] + "\n", "no line of a validation but one"),
        "source.txt": (source, "no line of 100 `=` between a source and its results"),
        "early.txt": (source + line + environment, "no line of a validation but one"),
        "broke-off.txt": (source + line + environment + line + first, "no validation after step 0"),
        "nothing.txt": (source + line + environment + line, "no line `step:i/N val_loss:x"),
        "nan.txt": (text.replace("val_loss:3.278 ", "val_loss:nan "), "the last validation loss is nan"),
        "empty.txt": ("", "no line of a validation"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "image.log").write_bytes(bytes(range(256)))
    read = imported(tmp_path, capsys)
    assert [group["files"] for group in read["groups"]] == [["good.txt"]]
    refused = dict(line.removeprefix(f"{tmp_path}/").split(": ", 1) for line in read["refused"])
    assert refused.keys() == {*files, "image.log"}
    for name, (_, reason) in files.items():
        assert refused[name].startswith(reason), name
    good.unlink()
    assert record.main(["import", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    no_traceback(said)
    assert all(name in said for name in files)


SHORT_LOG = """step:0/1480 val_loss:10.82584 train_time:0.000s step_avg:nanms
step:1/1480 train_time:90.041s step_avg:90041.48ms
step:740/1480 val_loss:3.61 val_avg_loss:3.62 val_ema_loss:3.63 train_time:43.000s step_avg:58.10ms
step:1480/1480 val_loss:3.27633 val_avg_loss:3.3 val_ema_loss:3.27489 train_time:86.5s step_avg:58.10ms
"""


@pytest.mark.parametrize("form", ["two lines", "one line", "output", "bom"])
def test_forms_with_further_fields_and_without_environment_or_source(tmp_path, form):
    line, source = "=" * 100 + "\n", "import torch\nprint0('step')\n"
    environment = "Running PyTorch 2.10.0\n"
    text = {
        "two lines": source + line + environment + line + SHORT_LOG,
        "one line": source + line + "logs/a.txt\nUsing seed=1\n" + SHORT_LOG,
        "output": "experiment=a\ntorch 2.11.0+cu130\nlogs/a.txt\n" + SHORT_LOG + "Mon May 18 UTC 2026\n",
        "bom": "\ufeff" + source + line + environment + line + SHORT_LOG,
    }[form]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (run,) = logs.read_public_log(tmp_path / "a.txt")
    assert run.final == {"step": 1480, "val_loss": 3.27633, "train_time_s": 86.5}
    assert [(p.step, p.loss) for p in run.val] == [(0, 10.82584), (740, 3.61), (1480, 3.27633)]
    digest = hashlib.sha256(source.strip().encode()).hexdigest()
    assert run.header["source_sha256"] == ("" if form == "output" else digest)
    assert run.header["torch"] == {"output": "2.11.0+cu130", "one line": ""}.get(form, "2.10.0")


def test_the_oldest_logs_have_no_times(tmp_path, capsys):
    (tmp_path / "main.log").write_text(
        "s:0 tel:11.0092\ns:0 trl:11.0091 lr:0.000001 norm:15.37\ns:1 trl:10.9598 lr:0.000002 norm:15.24\n"
        "s:250 tel:6.3097\ns:251 trl:3.3148\ns:500 tel:3.2722\n"
    )
    (run,) = logs.read_public_log(tmp_path / "main.log")
    assert [(p.step, p.loss) for p in run.val] == [(0, 11.0092), (250, 6.3097), (500, 3.2722)]
    assert run.final == {"step": 500, "val_loss": 3.2722, "train_time_s": None}
    assert record.main(["import", str(tmp_path)]) == 0
    assert "training time unknown" in capsys.readouterr().out
    (group,) = imported(tmp_path, capsys)["groups"]
    assert group["train_time_s"] is None and group["p"] is None


def test_a_log_may_hold_several_runs(tmp_path, capsys):
    path = public_log(tmp_path / "a.txt", 3.278, 86.0)
    more = [SHORT_LOG.replace("3.27633", loss).replace("86.5", s) for loss, s in (("3.2771", "86.1"),
            ("3.2782", "86.2"), ("3.2780", "86.3"))]  # fmt: skip
    broken = SHORT_LOG.splitlines(keepends=True)[0]
    path.write_text(path.read_text() + "".join(more) + broken)
    (group,) = imported(tmp_path, capsys)["groups"]
    assert group["val_loss"]["n"] == 4 and group["files"] == ["a.txt"]
    assert group["val_loss"]["mean"] == pytest.approx((3.278 + 3.2771 + 3.2782 + 3.2780) / 4)
    (tmp_path / "third.log").write_text(more[2])
    read = imported(tmp_path, capsys)
    assert len(read["refused"]) == 1 and "third.log" in read["refused"][0]


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def plain_groups(folder: Path) -> dict[tuple, list[str]]:
    """{(folder, source, steps): last losses} of standard logs, read without anything of the tools."""
    found: dict[tuple, list[str]] = {}
    for path in sorted(folder.rglob("*.txt")):
        lines = path.read_text().split("\n")
        marks = [i for i, line in enumerate(lines) if line == "=" * 100]
        val = [line for line in lines[marks[1] :] if line.startswith("step:") and " val_loss:" in line]
        steps = val[-1].split()[0].split("/")[1]
        source = "\n".join(lines[: marks[0]]).strip()
        key = (str(path.parent.relative_to(folder)), hashlib.sha256(source.encode()).hexdigest()[:8], steps)
        found.setdefault(key, []).append(val[-1].split()[1].removeprefix("val_loss:"))
    return found


def test_the_page_on_a_clone_agrees_with_a_plain_parser_and_is_the_same_twice(tmp_path, capsys):
    clone = tmp_path / "clone"
    short, medium = clone / "records" / "track_1_short", clone / "records" / "track_2_medium"
    third = clone / "records" / "track_3_optimization" / "results"
    for i, loss in enumerate(FIVE):
        public_log(short / "2025-01-01_A" / f"{i}.txt", loss - 0.001, 80.0 + i)
        public_log(short / "2025-01-01_A" / "baseline" / f"{i}.txt", loss, 90.0 + i, code="import torch")
        public_log(medium / "2025-01-02_B" / f"{i}.txt", loss, 100.0 + i)
    public_log(third / "one.txt", 3.277, 120.0)
    public_log(short / "2025-01-03_C" / "again.txt", FIVE[0] - 0.001, 80.0)  # of A
    plain = plain_groups(clone / "records")
    shutil.copy(short / "2025-01-01_A" / "0.txt", short / "2025-01-01_A" / "baseline" / "copy.txt")
    (short / "2025-01-01_A" / "notes.txt").write_text("a note\n")
    git(tmp_path, "init", "-q", str(clone))
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "logs")
    (short / "2025-01-01_A" / "0.txt").write_text("not committed\n")
    git(tmp_path, "clone", "-q", "--bare", str(clone), str(tmp_path / "bare"))
    pages = []
    for place in (clone, clone, tmp_path / "bare"):
        assert record.main(["public", str(place), "--out", str(tmp_path / "public.md")]) == 0
        pages.append((tmp_path / "public.md").read_bytes())
    assert pages[0] == pages[1] == pages[2]
    text = pages[0].decode()
    assert git(clone, "rev-parse", "HEAD").strip() in text
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in lines]
    rows = [row for row in cells if len(row) == 11 and row[5].isdigit()]
    assert [row[0] for row in rows] == [
        "2025-01-01_A", "2025-01-01_A/baseline", "2025-01-03_C", "2025-01-02_B", "results",
    ]  # fmt: skip
    folders = ["track_1_short/" + rows[i][0] for i in range(3)]
    folders += ["track_2_medium/2025-01-02_B", "track_3_optimization/results"]
    assert {(f, row[2], row[5]) for f, row in zip(folders, rows)} == plain.keys()
    for folder, row in zip(folders, rows):
        x = np.array([float(loss) for loss in plain[folder, row[2], row[5]]])
        assert row[6:8] == [str(len(x)), f"{x.mean():.5f}"] and row[3:5] == ["2.10.0+cu128", "8"]
        if len(x) == 1:
            assert row[8:] == ["-", "-", "-"]
            continue
        target = 2.92 if "medium" in folder else 3.28
        p = t_tail((target - x.mean()) / (x.std(ddof=1) / math.sqrt(len(x))), len(x) - 1)
        assert row[8:] == [f"{x.std(ddof=1):.5f}", f"{p:.2g}", "yes" if p < 0.01 else "no"]
    assert [row[10] for row in rows] == ["yes", "no", "-", "no", "-"]
    assert [row[1] for row in rows] == ["6", "6", "1", "5", "1"]
    numbers = {row[0]: row[1:] for row in cells if len(row) == 8}
    assert numbers["track_1_short"] == ["3.28", "3", "13", "3", "1", "1", "0"]
    assert numbers["track_2_medium"] == ["2.92", "1", "5", "1", "0", "0", "0"]
    assert "notes.txt: no line of a validation" in text
    mirror = "the same losses and times as in track_1_short/2025-01-01_A/0.txt: one run, counted once"
    assert f"2025-01-01_A/baseline/copy.txt: {mirror}" in text
    assert "2025-01-03_C/again.txt: the same losses and times as in" in text.partition("## In two records")[2]


@pytest.mark.parametrize("what", ["nothing", "no clone", "no records", "a folder of a clone"])
def test_what_is_no_clone_gets_one_sentence(tmp_path, what, capsys):
    clone = tmp_path / "clone"
    if what != "nothing":
        clone.mkdir()
    if what == "no records":
        git(tmp_path, "init", "-q", str(clone))
        git(clone, "commit", "-q", "--allow-empty", "-m", "nothing")
    if what == "a folder of a clone":  # the commit would be that of the repository around it
        git(tmp_path, "init", "-q")
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", "nothing")
    assert record.main(["public", str(clone), "--out", str(tmp_path / "public.md")]) == 1
    said = capsys.readouterr().err
    assert str(clone) in said and said.count("\n") == 1 and not (tmp_path / "public.md").exists()


# --------------------------------------------------------------------------------------------------
# Tables and figures


def readmes(folder: Path) -> list[Path]:
    """The page of the repository and that of the records, each with every kind of table but the
    tried runs'."""
    root = folder.parents[1]
    paths = [root.parent / "README.md", root / "README.md"]
    for path in paths:
        blocks = "".join(
            f"<!-- begin {name} -->\n<!-- end {name} -->\n\n" for name in ("summary", "records", "steps")
        )
        path.write_text(f"# Before\n\n{blocks}\n\nAfter.\n")
    return paths


def block(path: Path, name: str) -> str:
    return path.read_text().partition(f"<!-- begin {name} -->")[2].partition(f"<!-- end {name} -->")[0]


def rows_of(text: str) -> list[list[str]]:
    """The cells of the lines of a table that begin with a number."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in lines if cells[0].isdigit()]


def test_tables_are_reproducible_and_checked(folder, challenger, capsys):
    paths, root = readmes(folder), ["--root", str(folder.parents[1])]
    assert record.main([*root, "table", "--check"]) == 1
    assert record.main([*root, "table"]) == 0
    first = [path.read_bytes() for path in paths]
    assert record.main([*root, "table"]) == 0 and [path.read_bytes() for path in paths] == first
    assert record.main([*root, "table", "--check"]) == 0
    text = paths[0].read_text()
    assert text.startswith("# Before") and text.endswith("After.\n")
    rows = [line for line in block(paths[0], "records").splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert f"| 1 | [The record base](records/tiny/{BASE}) | 100 | 409,600 | 1.4883, 6," in rows[0]
    assert "70.3 s on 1 x abacus" in rows[0] and rows[0].endswith("| - |")
    assert "(records/tiny/2026-01-02_faster)" in rows[1] and "66.0 s on 1 x abacus" in rows[1]
    assert "| 0.937, " in rows[1]
    assert "](tiny/2026-01-02_faster)" in paths[1].read_text()
    # by steps: both need 100, the lower loss leads
    assert "| 1 | [The record faster]" in text and "MuonEq-row + NorMuon, polar_express 5" in text
    paths[0].write_text(text.replace("70.3 s", "60.3 s"))
    capsys.readouterr()
    assert record.main([*root, "table", "--check"]) == 1 and "stale: README.md" in capsys.readouterr().out


def test_the_summary_names_a_machine_once_and_says_how_much_faster(folder, challenger):
    (path, _), root = readmes(folder), ["--root", str(folder.parents[1])]
    assert record.main([*root, "table"]) == 0
    text = block(path, "summary")
    assert "target 1.5 nats per token, median training times on 1 x abacus:" in text
    assert rows_of(text) == [
        ["1", f"[The record base](records/tiny/{BASE})", "2026-01-01", "100", "1.4883", "70.3 s", "-"],
        [
            "2",
            "[The record faster](records/tiny/2026-01-02_faster)",
            "2026-01-01",
            "100",
            "1.4873",
            "66.0 s",
            "1.07 x",
        ],
    ]
    for log in (folder / "runs").glob("*.jsonl"):
        log.write_text(log.read_text().replace("abacus", "another machine"))
    claims.write_result(folder)
    assert record.main([*root, "table"]) == 0
    text = block(path, "summary")
    assert "nats per token:" in text and "| 70.3 s on 1 x another machine |" in text
    assert "| 66.0 s on 1 x abacus |" in text


def test_each_track_has_a_page_with_its_own_tables(folder, challenger, capsys):
    root, other = folder.parents[1], write_record(folder.parents[1] / "wide" / BASE, LOSSES, SECONDS)
    for log in (other / "runs").glob("*.jsonl"):
        log.write_text(log.read_text().replace('"track": "tiny"', '"track": "wide"'))
    claims.write_result(other)
    paths = [*readmes(folder), root / "tiny" / "README.md", root / "wide" / "README.md"]
    words = ["--root", str(root), "table"]
    assert record.main([*words, "--check"]) == 1 and not paths[2].exists()
    assert "records/tiny/README.md, records/wide/README.md" in capsys.readouterr().out
    assert record.main(words) == 0 and record.main([*words, "--check"]) == 0
    assert "Track `tiny`" in block(paths[1], "steps") and "Track `wide`" in block(paths[1], "steps")
    for path, mine, its in ((paths[2], "tiny", "wide"), (paths[3], "wide", "tiny")):
        text = path.read_text()
        assert text.startswith(f"# Track `{mine}`") and f"Track `{mine}`, model" in text and its not in text
        assert f"]({BASE})" in text
    (root / "wide" / "tried").mkdir()
    assert record.main([*words, "--check"]) == 1 and "records/wide/tried/README.md" in capsys.readouterr().out
    paths[1].unlink()
    assert record.main(words) == 1 and f"{paths[1]} is missing" in capsys.readouterr().err


def tried_run(folder: Path, name: str, seed: int, loss: float, **changed: Any) -> None:
    """A log in tried/; `changed`: settings as section__name."""
    lines = log_lines(seed, loss, 70.0)
    for key, value in changed.items():
        section, _, field = key.partition("__")
        lines[0]["settings"][section][field] = value
    lines[0]["run_id"] = lines[0]["run_id"].replace("20260101", "20260103")  # after both records
    (folder.parent / "tried").mkdir(exist_ok=True)
    (folder.parent / "tried" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def tried_rows(folder: Path) -> list[list[str]]:
    """name, nearest, its loss, what differs"""
    readmes(folder)
    assert record.main(["--root", str(folder.parents[1]), "table"]) == 0
    lines = (folder.parent / "tried" / "README.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| [")]
    return [[name.partition("]")[0][1:], *rest] for name, _, _, _, *rest in cells]


def test_what_was_tried_stands_beside_the_nearest_run_before_it(folder, challenger):
    tried_run(folder, "faster-rate", 1, 1.51, matrix__lr=0.05, matrix__normuon=False)
    tried_run(folder, "faster-still", 2, 1.52, matrix__lr=0.06, matrix__normuon=False)
    tried_run(folder, "again", 3, 1.53, matrix__lr=0.06, matrix__normuon=False)
    tried_run(folder, "the-same-seed", 3, 1.55, matrix__lr=0.06, matrix__normuon=False)
    tried_run(folder, "another-record", 4, 1.54, matrix__lr=0.031)
    # between equals: the same number of steps, then the same seed, then the earlier one
    assert tried_rows(folder) == [
        ["faster-rate", "record 1", "1.4883", "`matrix.lr 0.03 -> 0.05`, `matrix.normuon True -> False`"],
        ["faster-still", "faster-rate", "1.5100", "`seed 1 -> 2`, `matrix.lr 0.05 -> 0.06`"],
        ["again", "faster-still", "1.5200", "`seed 2 -> 3`"],
        ["the-same-seed", "again", "1.5300", "nothing"],
        ["another-record", "record 1", "1.4883", "`matrix.lr 0.03 -> 0.031`"],
    ]
    text = (folder.parent / "tried" / "README.md").read_text()
    assert "| [again](again.jsonl) | 100 | 409,600 | 1.5300 |" in text
    for log in (challenger / "runs").glob("*.jsonl"):  # the second record comes to have the rate
        log.write_text(log.read_text().replace('"lr": 0.03', '"lr": 0.031'))
    assert tried_rows(folder)[4] == ["another-record", "record 2", "1.4873", "nothing"]


def test_stages_of_tried_runs_are_compared_column_by_column(folder, challenger):
    stages = [[0, [64, 64], 1, 4096, 1.0, []], [0.5, [64, 64], 2, 4096, 1.5, []]]
    tried_run(folder, "growing", 0, 1.51, schedule__stages=stages, model__ahead=0, model__tied=0.5)
    tried_run(
        folder,
        "wider",
        1,
        1.52,
        schedule__stages=[[b, [64, 128], *rest] for b, _, *rest in stages],
        model__tied=0.5,
    )
    for log in (folder.parent / "tried").glob("*.jsonl"):
        log.write_text(log.read_text().replace('"windows": [[64, 64]], ', ""))
    for log in (folder / "runs").glob("*.jsonl"):  # from before there were stages
        log.write_text(log.read_text().replace('"rows": 2', '"rows": 2, "document_cut": 4096'))
    found = tried_rows(folder)
    assert found[0][0] == "growing" and found[0][1] == "record 1"
    # a setting that only one of the two knows counts unless it is off: tied does, ahead does not
    assert found[0][3] == ("`model.tied None -> 0.5`, `stages.batch 1 -> (1,2)`, "
                           "`stages.begin 0 -> (0,0.5)`, "
                           "`stages.lr 1 -> (1,1.5)`")  # fmt: skip
    assert found[1][1:] == ["growing", "1.5100", "`seed 0 -> 1`, `stages.windows (64,64) -> (64,128)`"]


def test_leading_steps_of_curves_with_a_known_ratio():
    steps = np.arange(10, 1001, 10)
    a = {"step": steps, "loss": 5.0 - 0.002 * steps}
    b = {"step": steps, "loss": 5.0 - 0.002 * steps / 1.25}  # needs a quarter more steps
    at, lead = figures.leading_steps(a, b)
    assert len(at) and np.allclose(lead, 0.25 * at) and at.max() == 800
    at, lead = figures.leading_steps(b, a)
    assert np.allclose(lead, -0.2 * at)


def test_leading_steps_ignore_losses_that_a_noisy_curve_has_seen_before():
    noisy = {"step": np.array([1, 2, 3, 4, 5]), "loss": np.array([4.0, 3.0, 3.5, 3.2, 2.0])}
    straight = {"step": np.array([1, 2, 3, 4]), "loss": np.array([4.0, 3.5, 3.0, 2.5])}
    at, lead = figures.leading_steps(noisy, straight)
    assert list(at) == [1, 2] and np.allclose(lead, [0, 1])


def test_smoothing_is_a_running_mean():
    x = np.array([4.0, 2.0, 6.0, 0.0])
    assert np.allclose(figures.smooth(x, 2), [4, 3, 4, 3]) and np.allclose(figures.smooth(x, 1), x)


def test_figures_name_records_by_their_titles(folder, challenger, tmp_path, monkeypatch):
    drawn: list = []
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.append(figure))
    root = ["--root", str(folder.parents[1])]
    for kind in ("curves", "leading"):
        words = [kind, str(challenger), str(folder / "runs"), "--loss", "train", "--out",
                 str(tmp_path / "x.png")]  # fmt: skip
        assert record.main([*root, "plot", *words]) == 0
    curves, leading = drawn
    names = [text.get_text() for text in curves.legends[0].texts]
    assert names == ["The record faster (n = 6)", "The record base (n = 6)"]
    assert [axis.get_xlabel() for axis in curves.axes] == ["training tokens", "steps", "training time (s)"]
    assert curves.axes[0].lines[0].get_xdata()[-1] == 409_600
    words_of_track = ["curves", "tiny", "--loss", "train", "--out", str(tmp_path / "x.png")]
    assert record.main([*root, "plot", *words_of_track]) == 0
    of_track = [text.get_text() for text in drawn[-1].legends[0].texts]
    assert of_track == names[::-1]  # the records of the track, oldest first
    for axis in leading.axes:
        assert axis.get_xlabel() == "steps of The record faster" and "The record base" in axis.get_ylabel()
    assert figures.name_of(next((folder / "runs").iterdir())).startswith("20260101-")
    for log in (challenger / "runs").glob("*.jsonl"):
        log.write_text(log.read_text().replace('"tokens": 409600', '"tokens": 1230000'))
    assert record.main([*root, "plot", "curves", *words[1:]]) == 0
    axis = drawn[-1].axes[0]
    assert axis.get_xlabel() == "training tokens (millions)"
    assert axis.lines[0].get_xdata()[-1] == pytest.approx(1.23)


def test_figures_are_written_whole(folder, challenger, tmp_path, capsys):
    public_log(tmp_path / "public" / "a.txt", 3.278, 86.0)
    root = ["--root", str(folder.parents[1])]
    for name, arguments in {
        "curves": ["curves", str(folder), str(challenger), "--loss", "train", "--span", "10"],
        "mixed": ["curves", str(folder), str(tmp_path / "public")],
        "leading": ["leading", str(folder), str(challenger), "--loss", "train", "--span", "10"],
        "history": ["history", "tiny"],
    }.items():
        out = tmp_path / "figures" / f"{name}.png"
        assert record.main([*root, "plot", *arguments, "--out", str(out)]) == 0, capsys.readouterr().err
        assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list((tmp_path / "figures").iterdir())) == 4
    for arguments in (
        ["history", "nothing"],
        ["leading", str(folder)],
        ["curves", str(tmp_path / "figures")],
    ):
        assert record.main([*root, "plot", *arguments, "--out", str(tmp_path / "x.png")]) == 1
    assert not (tmp_path / "x.png").exists()


# --------------------------------------------------------------------------------------------------
# The records of this repository


def test_every_record_of_the_repository_holds(capsys):
    folders = claims.record_folders(ROOT / "records")
    assert folders and record.main(["verify"]) == 0, capsys.readouterr().out
    for folder in folders:
        assert (folder / "README.md").is_file(), f"{folder.name} has no README.md"
    pages = {"README.md": "summary", "records/README.md": "records", "records/tiny/README.md": "steps",
             "records/tiny/tried/README.md": "tried"}  # fmt: skip
    for path, name in pages.items():
        assert block(ROOT / path, name).count("\n| ") > 2, f"{path} has no table {name}"
    assert record.main(["table", "--check"]) == 0, capsys.readouterr().out


def slugs(text: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_pages_lead_somewhere():
    """Links, and paths in backquotes that begin with ../, which is how records point to what lies
    beside them."""
    folders = [ROOT / name for name in ("records", "tools", "docs", "findings")]
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    checked = 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)|`(\.\./[^`\s]*)`", text):
            target, _, anchor = "".join(link).partition("#")
            if "://" in target:
                continue
            path = page.parent / target if target else page
            assert path.exists(), f"{page.relative_to(ROOT)}: {target}"
            assert not anchor or anchor in slugs(path.read_text(encoding="utf-8")), (
                f"{page.relative_to(ROOT)}: #{anchor}"
            )
            checked += 1
    assert checked > 100


def test_the_first_page_is_short_and_begins_with_a_picture():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert any(line.startswith("![") for line in lines[:30])
    assert any("not run on a GPU" in line for line in lines[:45])


def test_no_log_is_larger_than_promised():
    for path in (ROOT / "records").rglob("*.jsonl"):
        # of a comparison: many runs
        assert os.path.getsize(path) < 100_000 or path.name == "results.jsonl", path


def test_records_hold_evidence_and_no_program_but_the_sources_that_were_run():
    root = ROOT / "records"
    # a run under way writes there
    programs = {path for path in root.rglob("*.py") if "unfinished" not in path.parts}
    assert programs == set(root.glob("*/*/train_gpt.py")) != set()
