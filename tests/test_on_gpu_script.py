"""The script that measures on a GPU: its made-up tokens train, it names what failed or did not fit
into its time."""

import json
import sys
import time

import pytest

import on_gpu
import train_gpt
from helpers import options
from lib import expected, made_up


def test_made_up_tokens_are_enough_for_what_is_run(tmp_path):
    short = {name.replace(".", "__"): value for name, value in on_gpu.SHORT_RUN.items()}
    track, _ = train_gpt.parse_command_line(options(**short))
    made_up.make_tokens(tmp_path, track, on_gpu.STEPS)
    checked = train_gpt.check_data(track, tmp_path)
    assert len(checked["digests"]) == 2 and checked["documents"] > 1
    tokens = train_gpt.read_shard(tmp_path / "train_000001.bin")
    assert tokens[0] == 256 and 2 < len(tokens) / (tokens == 256).sum() < 100
    assert len(set(tokens.tolist())) > 100


@pytest.mark.parametrize("code,seconds,status", [("print(7)", 30, "good"),
                                                 ("raise SystemExit(3)", 30, "status 3"),
                                                 ("import time; time.sleep(60)", 1,
                                                  "out of time")])  # fmt: skip
def test_a_command_is_reported_as_it_ended(tmp_path, code, seconds, status):
    measurements = on_gpu.Measurements(tmp_path, seconds)
    assert measurements.run("a b, c", [sys.executable, "-c", code], 0) == (status == "good")
    assert measurements.results["a b, c"]["status"] == status and status in on_gpu.table(measurements.results)
    assert (tmp_path / "a_b_c.txt").read_text() == ("7\n" if status == "good" else "")


def test_what_does_not_fit_is_left_out_and_named(tmp_path):
    measurements, began = on_gpu.Measurements(tmp_path, 5), time.monotonic()
    assert not measurements.run("long", [sys.executable, "-c", "import time; time.sleep(60)"], 10)
    assert time.monotonic() - began < 3 and "| long | left out |" in on_gpu.table(measurements.results)


def test_what_was_measured_stands_beside_what_the_dry_run_expects(tmp_path, monkeypatch):
    run = {"device": "NVIDIA H100 80GB HBM3", "source": "abc", "peak_memory_bytes": 21e9, "graphs": 26,
           "compiles": 0, "steps_s": {"stage 1, tied": 0.25}}  # fmt: skip
    low = {"profile": {"peak_memory_bytes": 30e9}}
    options = ["--track", "short"]
    monkeypatch.setattr(expected, "KEPT", tmp_path / "expected.json")
    (tmp_path / "expected.json").write_text("{}")
    assert "no run ended" in on_gpu.beside_expected({"tests": {"status": "good"}}, options, tmp_path)
    results = {"full cache": run, "profile, low memory": low}
    said = on_gpu.beside_expected(results, options, tmp_path)
    assert "nothing is expected of 1 x h100 --track short: tools/dry_run.py --gpu h100 --track short" in said
    kept = {"source": "abc", "torch": "2.13.0", "peak_bytes": 20e9, "graphs": 26,
            "floors_s": {"stage 1, tied": 0.2},
            "passes": {"stage 1, tied": {"passes": 8, "launches": 10, "bytes of kernels": 1e9,
                                         "launches of an update": 2}}}  # fmt: skip
    names = ["1 x h100 --track short", "1 x h100 --track short --memory low"]
    (tmp_path / "expected.json").write_text(json.dumps(dict.fromkeys(names, kept)))
    said = on_gpu.beside_expected(results, options, tmp_path)
    assert "of another source" not in said
    assert "| peak memory, GB | 20.0 | 21.0 | 1.05 as expected |" in said
    assert "(expected: its floor) | 200.0 | 250.0 | 1.25 |" in said
    assert "| peak memory with --memory low, GB | 20.0 | 30.0 | 1.50 DIFFERS |" in said
    run["source"] = "def"
    assert "of another source, abc for def" in on_gpu.beside_expected(results, options, tmp_path)
