"""Importing has no side effects; every option is parsed, explained and means one thing."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

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


@pytest.fixture
def say(capsys: pytest.CaptureFixture) -> Callable[..., list[str]]:
    """What the program prints for a command line, line by line."""

    def said(*argv: str) -> list[str]:
        train_gpt.main(argv)
        out, error = capsys.readouterr()
        assert error == "" and not [line for line in out.splitlines() if len(line) > 140]
        return out.splitlines()

    return said


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--track", "short", "--help"]])
def test_help_has_a_line_for_every_option_and_field(say: Callable[..., list[str]], argv: list[str]) -> None:
    lines = say(*argv)
    assert len(lines) <= 150
    for f in dataclasses.fields(train_gpt.Run):
        (line,) = [line for line in lines if line.startswith(f"  --{f.name} ")]
        assert line.endswith(f.metadata["meaning"])
    cells = [line.split() for line in lines]
    assert ["tiny", "short", "medium"] in cells  # the heads of the columns
    for section in ("data", "model", "matrix", "schedule", "evaluation"):
        begin = lines.index(f"--{section}.FIELD")
        part = itertools.takewhile(lambda line: line.startswith("  "), lines[begin + 1 :])
        rows = {line.split()[0]: line for line in part}
        for f in dataclasses.fields(getattr(train_gpt.Track(), section)):
            assert rows[f.name].endswith(f.metadata["meaning"])
            for found, track in zip(rows[f.name].split()[1:4], train_gpt.TRACKS.values()):
                value = getattr(getattr(track, section), f.name)
                assert found == "..." or read_back(section, f.name, found) == value, f.name


def read_back(section: str, name: str, text: str) -> Any:
    """What the command line makes of a text that the help prints."""
    track, _ = train_gpt.parse_command_line(["--track", "tiny", f"--{section}.{name}", text])
    return getattr(getattr(track, section), name)


@pytest.mark.parametrize("section", vars(train_gpt.Track()))
def test_help_of_a_section_prints_values_as_they_are_typed(
    say: Callable[..., list[str]], section: str
) -> None:
    """Of every track, however long; what is printed, typed again, is the value."""
    text = "\n".join(say("--help", section))
    for f in dataclasses.fields(getattr(train_gpt.Track(), section)):
        part = text.partition(f"--{section}.{f.name} VALUE\n")[2].partition("\n--")[0]
        assert f.metadata["meaning"] in part
        for name, track in train_gpt.TRACKS.items():
            lines = part.partition(f"\n    {name} ")[2].splitlines()
            more = itertools.takewhile(lambda line: line.startswith(" " * 13), lines[1:])
            value = " ".join(line.strip() for line in [lines[0], *more])
            assert read_back(section, f.name, value) == getattr(getattr(track, section), f.name), f.name


def test_help_offers_what_can_be_typed(say: Callable[..., list[str]], capsys: pytest.CaptureFixture) -> None:
    """The types were once made by replacing parts of words: "bfloat below 1e3016"."""
    (line,) = [line for line in say("--help") if line.startswith("  --dtype ")]
    assert line.split()[1:3] == ["auto", "auto|bfloat16|float32;"]
    with pytest.raises(SystemExit):
        train_gpt.main(["--dtype", "bf16"])
    assert "--dtype takes auto|bfloat16|float32, not 'bf16'" in capsys.readouterr().err
    for word in line.split()[2].rstrip(";").split("|"):
        assert train_gpt.parse_command_line(["--dtype", word])[1].dtype == word


def test_types_in_words() -> None:
    words = {name: kind for name, kind in get_type_hints(train_gpt.Model).items() if name[0] != "_"}
    said = {name: train_gpt.type_in_words(kind) for name, kind in words.items()}
    assert (said["width"], said["tied"]) == ("int", "float")
    assert said["xsa"] == "(int, ...)" and said["ngrams"] == "((int, int), ...)"
    assert said["softcap"] == "(float, float, float)" and said["low_precision"] == "(text, ...)"
    hints = get_type_hints(train_gpt.Matrix)
    assert train_gpt.type_in_words(hints["cautious"]) == "true|false"
    assert train_gpt.type_in_words(hints["phase"]) == "int or none"
    stages = get_type_hints(train_gpt.Schedule)["stages"]
    fields = "begin, windows, batch, document_cut, lr, ahead, candidates"
    assert train_gpt.type_in_words(stages) == f"(({fields}), ...)"


def test_help_of_an_unknown_section_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        train_gpt.main(["--help", "optimizer"])
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.out == "" and said.err.count("\n") == 1
    assert "no section 'optimizer'" in said.err and "matrix_adam" in said.err


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
    ("schedule.stages", "((0, (3, 4)),)", ((0, (3, 4), 1, 4096, 1.0, (), 0),)),
    ("matrix.mlp_lr_mul", "(1.0, 2.0)", (1.0, 2.0)),
    ("matrix.mlp_lr_mul", "2.5", 2.5),
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


@pytest.mark.parametrize("before, now", [
    ("value.lr", "tables.lr"), ("hidden.betas", "matrix_adam.betas"), ("matrix.steps", "matrix.iterations"),
    ("gate.steps", "gate.iterations"), ("model.frozen", "model.attention_source"),
    ("matrix.lr_mul", "matrix.mlp_lr_mul"),
])  # fmt: skip
def test_a_former_name_is_answered_with_the_present_one(before: str, now: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option --{before}, it is --{now} now"):
        train_gpt.parse_command_line([f"--{before}", "1"])


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
