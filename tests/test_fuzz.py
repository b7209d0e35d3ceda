"""Hostile input: whatever the bytes or the words, one sentence or a good result, no traceback, no
hang, nothing half done."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
from helpers import events, options, train
from lib import logs

QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module", autouse=True)
def run_folder(data_dir: Path) -> Path:
    """A run with its shards, its log and its checkpoints."""
    train(options(out=data_dir / "logs", checkpoint_every=2, schedule__steps=4, schedule__extension=0))
    return data_dir


def bytes_near(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with bytes changed, cut, doubled, put in or taken out, or anything at all."""
    place = st.integers(0, max(0, len(content) - 1))
    changes = st.one_of(
        st.tuples(st.just("set"), st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6)),
        st.tuples(st.just("cut"), place),
        st.tuples(st.just("insert"), st.tuples(place, st.binary(min_size=1, max_size=40))),
        st.tuples(st.just("remove"), st.tuples(place, st.integers(1, 100))),
        st.tuples(st.just("anything"), st.binary(max_size=300)),
    )

    def apply(change: tuple) -> bytes:
        what, how = change
        if what == "set":
            changed = bytearray(content)
            for at, value in how:
                changed[at] = value
            return bytes(changed)
        if what == "cut":
            return content[:how]
        if what == "insert":
            return content[: how[0]] + how[1] + content[how[0] :]
        return content[: how[0]] + content[how[0] + how[1] :] if what == "remove" else how

    return changes.map(apply)


def short_and_named(error: ValueError, name: str) -> None:
    assert name in str(error) and "\n" not in str(error) and len(str(error)) < 600, error


# --------------------------------------------------------------------------------------------------
# Shards and manifest


@QUICK
@given(
    data=st.data(),
    name=st.sampled_from(["train_000001.bin", "val_000000.bin", "manifest.json"]),
    sign=st.booleans(),
)
def test_changed_shards_are_refused_or_read_as_what_they_hold(
    run_folder: Path, tmp_path: Path, data: st.DataObject, name: str, sign: bool
) -> None:
    """Changed shards are refused, also when the manifest has been made to agree, or read as what
    they hold."""
    folder = tmp_path / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run_folder / "shakespeare", folder)
    path = folder / name
    head = path.read_bytes()[:3000]
    changed = data.draw(bytes_near(head)) + path.read_bytes()[3000:]
    path.write_bytes(changed)
    if sign and name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name]["sha256"] = hashlib.sha256(changed).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))
    track, _ = train_gpt.parse_command_line(options(schedule__steps=4, schedule__extension=0))
    try:
        checked = train_gpt.check_data(track, folder)
    except ValueError as error:
        short_and_named(error, str(folder) if "epochs" not in str(error) else "train")
        return
    assert checked["documents"] > 0
    if name != "manifest.json":
        assert checked["digests"][name] == hashlib.sha256(changed).hexdigest()
        tokens = train_gpt.read_shard(path)
        assert tokens.tobytes() == changed[1024:] and int(tokens.max()) < 257


# --------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoint(run_folder: Path) -> Path:
    return sorted((run_folder / "logs").rglob("*.pt"))[0]


@QUICK
@given(data=st.data(), part=st.sampled_from(["begin", "end", "anywhere"]), sign=st.booleans())
def test_a_changed_checkpoint_is_refused_by_name(
    run_folder: Path, tmp_path: Path, data: st.DataObject, part: str, sign: bool
) -> None:
    """A changed file is refused by name; one whose checksum was made to agree at least gives no traceback."""
    good = checkpoint(run_folder).read_bytes()
    content, digest = good[:-32], good[-32:]
    begin = {
        "begin": 0,
        "end": len(content) - 3000,
        "anywhere": data.draw(st.integers(0, len(content) - 3000)),
    }[part]
    changed = content[:begin] + data.draw(bytes_near(content[begin : begin + 3000])) + content[begin + 3000 :]
    path = tmp_path / "step_000002.pt"
    path.write_bytes(changed + (hashlib.sha256(changed).digest() if sign else digest))
    try:
        found = train_gpt.load_checkpoint(path, {})
    except ValueError as error:
        short_and_named(error, str(path))
        return
    assert sign or changed == content
    assert isinstance(found["step"], int)


CONTENT = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.just(torch.ones(2, 3)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@QUICK
@given(value=CONTENT)
def test_a_checkpoint_of_another_format_is_refused_by_name(
    run_folder: Path, tmp_path: Path, value: object
) -> None:
    """Well-formed files that say they are something else."""
    content = torch.load(checkpoint(run_folder), weights_only=True)
    path = tmp_path / "step_000002.pt"
    train_gpt.save_checkpoint(path, {**content, "format": value})
    with pytest.raises(ValueError) as error:
        train_gpt.load_checkpoint(path, {})
    short_and_named(error.value, str(path))


# --------------------------------------------------------------------------------------------------
# Logs


@QUICK
@given(data=st.data())
def test_a_changed_log_is_refused_by_name_or_goes_on_in_whole_lines(
    run_folder: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Opened to go on from step 2, a changed log is refused by name or holds whole lines up to that step."""
    (original,) = (run_folder / "logs").glob("*.jsonl")
    path = tmp_path / "run.jsonl"
    path.write_bytes(data.draw(bytes_near(original.read_bytes())))
    log = train_gpt.Log(path)
    try:
        log.open(2)
    except ValueError as error:
        short_and_named(error, str(path))
        return
    finally:
        if log.file:
            log.file.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") and json.loads(line).get("step", 0) <= 2 for line in lines)


@QUICK
@given(data=st.data())
def test_the_records_read_a_changed_log_or_refuse_it_by_name(
    run_folder: Path, tmp_path: Path, data: st.DataObject
) -> None:
    (original,) = (run_folder / "logs").glob("*.jsonl")
    path = tmp_path / "run.jsonl"
    path.write_bytes(data.draw(bytes_near(original.read_bytes())))
    try:
        run = logs.read_log(path)
    except ValueError as error:
        short_and_named(error, str(path))
        return
    assert run.header["event"] == "header"


# --------------------------------------------------------------------------------------------------
# The command line

NAMES = [f"--{f.name}" for f in dataclasses.fields(train_gpt.Run)] + [
    f"--{section}.{f.name}"
    for section, part in vars(train_gpt.TRACKS["tiny"]).items()
    for f in dataclasses.fields(part)
]
ODD = ["--track", "tiny", "short", "true", "none", "row", "adam", "()", "((0, 1),)", "(0.9,)",
       "((1,2),(3,4))", "-1", "0", "1", "2", "3", "64", "1e400", "nan", "inf", "-inf", "1e-3",
       "999999999999999999999", "--", "=", "--=3", "", "[[0,1],[2]]", "(1,)" * 9, "{}", "{1: 2}", "{[]: 1}",
       "b'x'", "1j", "(1j, 2)", "('a', 'b')", "((True, False),)"]  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(ODD),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)


@settings(QUICK, max_examples=400)
@given(words=st.lists(st.one_of(WORDS, st.tuples(st.sampled_from(NAMES), WORDS).map("=".join)), max_size=8))
def test_any_words_are_parsed_or_refused_in_one_sentence(words: list[str]) -> None:
    try:
        track, run = train_gpt.parse_command_line(words)
        train_gpt.check_settings(track, run)
        train_gpt.rows_per_pass(track, run, 1)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    train_gpt.total_steps(track.schedule)
    json.dumps(dataclasses.asdict(track), allow_nan=False)


CHOICES = ["()", "(0,)", "(1,)", "((0, 1),)", "((1, 0),)", "((0, 5),)", "((0, 0), (1, 0))", "((2, 9),)",
           "(0.5, 0.9)", "(0, 1)", "((4, 8),)", "true", "false", "none", "row", "rowcol", "adam", "spc",
           "newton_schulz", "auto", "bfloat16"]  # fmt: skip
SMALL_VALUES = st.one_of(
    st.integers(-2, 70).map(str), st.floats(-2, 2, allow_nan=False).map(str), st.sampled_from(CHOICES)
)
TRIED = [
    name
    for name in NAMES
    if "." in name and name not in ("--data.corpus", "--data.vocab_size", "--data.document_start")
]


@settings(QUICK, max_examples=120)
@given(changes=st.lists(st.tuples(st.sampled_from(TRIED), SMALL_VALUES), min_size=1, max_size=2))
def test_any_settings_train_to_the_end_or_are_refused_in_one_sentence(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changes: list[tuple[str, str]]
) -> None:
    """One setting or two changed at random: the run ends well, or with one sentence and without a
    `final` line."""
    out = tmp_path / "logs"
    shutil.rmtree(out, ignore_errors=True)
    argv = options(out=out, schedule__steps=2, schedule__extension=1, evaluation__tokens=500)
    capsys.readouterr()
    try:
        outcome = train([*argv, *(word for change in changes for word in (change[0], change[1]))])
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 1 and error.startswith("train_gpt.py: ") and error.count("\n") == 1, error
        assert not any(line["event"] == "final" for path in out.glob("*.jsonl") for line in events(path))
        return
    assert outcome.lines[-1]["event"] == "final" and np.isfinite(outcome.final["val_loss"])
