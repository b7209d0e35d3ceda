"""The script that measures on a GPU: its made-up tokens train, it names what failed or did not fit
into its time."""

import sys
import time

import pytest

import on_gpu
import train_gpt
from helpers import options
from lib import made_up


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
