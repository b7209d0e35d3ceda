"""Importing has no side effects; every option is parsed, explained and means one thing."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_gpt
from helpers import ROOT


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    code = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import numpy, torch, torch._dynamo, torch.distributed as dist
def state():
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
        torch.initial_seed(), torch.get_rng_state().tolist(), torch.is_grad_enabled(),
        dist.is_initialized(), torch._dynamo.config.get_config_copy(),
        dict(os.environ), os.listdir("."), os.getcwd(), threading.active_count(),
    )
before, modules = state(), {name.split(".")[0] for name in sys.modules}
import train_gpt
assert state() == before, (state(), before)
new = {name.split(".")[0] for name in sys.modules} - modules - set(sys.stdlib_module_names)
assert new == {"train_gpt"}, new
"""
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    argv = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--track", "short", "--help"]])
def test_help_lists_every_track_and_field(capsys: pytest.CaptureFixture, argv: list[str]) -> None:
    train_gpt.main(argv)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert said.err == ""
    for f in dataclasses.fields(train_gpt.Run):
        assert any(
            line.strip().startswith(f"--{f.name} ") and f.metadata["meaning"] in line for line in lines
        ), f.name
    for name, track in train_gpt.TRACKS.items():
        (begin,) = [i for i, line in enumerate(lines) if line.startswith(f"Track {name} ")]
        ends = [i for i, line in enumerate(lines) if line.startswith("Track ") and i > begin]
        part = lines[begin + 1 : ends[0] if ends else None]
        for section in dataclasses.fields(track):
            settings = getattr(track, section.name)
            for f in dataclasses.fields(settings):
                (line,) = [x for x in part if x.strip().startswith(f"--{section.name}.{f.name} ")]
                assert f.metadata["meaning"] and line.endswith(f.metadata["meaning"])
                assert str(getattr(settings, f.name)).replace(" ", "") in line.replace(" ", "")


VALUES = [  # option, text, value
    ("seed", "3", 3),
    ("seed", "-1", -1),
    ("data.rows", "6", 6),
    ("matrix.lr", "0.5", 0.5),
    ("matrix.lr", "2", 2.0),
    ("evaluation.target", "-1e-3", -0.001),
    ("head.eps", "1e-10", 1e-10),
    ("matrix.cautious", "false", False),
    ("matrix.cautious", "True", True),
    ("matrix.nesterov", "FALSE", False),
    ("matrix.phase", "7", 7),
    ("matrix.phase", "none", None),
    ("matrix.equilibrate", "row", "row"),
    ("out", "1", "1"),
    ("out", "a b", "a b"),
    ("schedule.momentum", "(0.5, 0.75)", (0.5, 0.75)),
    ("schedule.momentum", "0.5,0.75", (0.5, 0.75)),
    ("model.skips", "[(0, 1)]", ((0, 1),)),
    ("model.skips", "()", ()),
    ("model.skips", "((1, 2), (3, 4))", ((1, 2), (3, 4))),
    ("schedule.stages", "((0, (3, 4)),)", ((0, (3, 4), 1, 4096, 1.0, ()),)),
    ("matrix.lr_mul", "(1.0, 2.0)", (1.0, 2.0)),
    ("matrix.lr_mul", "2.5", 2.5),
]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("option, text, value", VALUES)
def test_values_of_options(option: str, text: str, value: Any, joined: bool) -> None:
    argv = [f"--{option}={text}"] if joined else [f"--{option}", text]
    track, run = train_gpt.parse_command_line(["--track", "tiny", *argv])
    found = functools.reduce(getattr, option.split("."), track if "." in option else run)
    assert found == value and type(found) is type(value)
    others = train_gpt.parse_command_line(["--track", "tiny"])
    section, _, name = option.rpartition(".")
    if section:
        changed = dataclasses.replace(
            getattr(track, section), **{name: getattr(getattr(others[0], section), name)}
        )
        assert dataclasses.replace(track, **{section: changed}) == others[0] and run == others[1]
    else:
        assert dataclasses.replace(run, **{name: getattr(others[1], name)}) == others[1]
        assert track == others[0]


def test_the_order_of_options_does_not_matter_but_the_last_one_counts() -> None:
    def parse(*argv: str) -> tuple[train_gpt.Track, train_gpt.Run]:
        return train_gpt.parse_command_line(argv)

    assert parse("--data.rows", "6", "--track", "short") == parse("--track", "short", "--data.rows=6")
    assert parse("--track", "tiny", "--seed", "1", "--seed", "2") == parse("--track", "tiny", "--seed", "2")
    assert parse("--track", "tiny")[0] == train_gpt.TRACKS["tiny"]
    assert parse("--track", "tiny", "--resume")[1].resume == ""
    assert parse("--resume", "--track", "tiny")[1].resume == ""
    assert parse("--track", "tiny", "--resume", "a.pt")[1].resume == "a.pt"
    assert parse("--track", "tiny")[1].resume is None
    assert parse("--track", "tiny", "--checkpoint-every", "5")[1].checkpoint_every == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice depends on the devices")
def test_track_auto_is_tiny_without_a_large_gpu() -> None:
    assert (
        train_gpt.parse_command_line([])[1].track
        == "tiny"
        == train_gpt.parse_command_line(["--track", "auto"])[1].track
    )


@pytest.mark.parametrize("name", train_gpt.TRACKS)
def test_tracks_are_frozen_data(name: str) -> None:
    track = train_gpt.TRACKS[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        track.data.rows = 1
    assert json.loads(json.dumps(dataclasses.asdict(track)))["data"]["rows"] == track.data.rows
    assert track.data.vocab_size <= track.model.padded_vocab and track.model.width % track.model.heads == 0
    assert np.iinfo(np.uint16).max >= track.data.document_start
