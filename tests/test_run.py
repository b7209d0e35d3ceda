"""The promises of a run: one result at any world size, an honest log, nothing compiled inside the clock."""

import ast
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import train_gpt
from helpers import (
    ROOT,
    SMALL,
    STEPS,
    Outcome,
    check_close,
    check_equal,
    events,
    no_traceback,
    options,
    refusal,
    train,
    train_with,
)
from lib import in_turns

pytestmark = pytest.mark.usefixtures("data_dir")

# --------------------------------------------------------------------------------------------------
# One result at any world size and any micro_rows


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, list[Outcome]]:
    """Runs on 1 to 4 processes: what each rank returned, by name."""
    folder, results = tmp_path_factory.mktemp("worlds"), {}
    environment = {"DATA_DIR": str(data_dir)}

    def launch(world_size: int, jobs: dict[str, list[str]]) -> None:
        output = folder / f"output_{world_size}"
        output = output.with_name(f"{output.name}_resumed") if output.exists() else output
        found = train_with(world_size, list(jobs.values()), environment, output)
        results.update(zip(jobs, found))

    def ran(world_size: int) -> dict[str, list[str]]:
        return {str(world_size): options(out=folder / str(world_size), checkpoint_every=10)}

    launch(2, ran(2) | {
        "2 micro 2": options(out=folder / "m2", micro_rows=2),
        "2 micro 3": options(out=folder / "m3", micro_rows=3),
        "2 refused": options(out=folder / "refused", evaluation__tokens=10**6),
    })  # fmt: skip
    results["2 output"] = [(folder / f"output_2/output_{rank}").read_text() for rank in range(2)]
    for world_size in (1, 3, 4):
        launch(world_size, ran(world_size))
    for world_size in (1, 2, 3, 4):
        jobs = {}
        for other in {1, 2, 3, 4} - {world_size}:
            out = shutil.copytree(folder / str(other), folder / f"from {other} to {world_size}")
            jobs[out.name] = options(out=out, resume=min(out.rglob("*.pt")))
        launch(world_size, jobs)
    return results


@pytest.mark.parametrize("name", ["1", "2", "3", "4", "2 micro 2", "2 micro 3"])
def test_any_world_size_gives_the_same_run(worlds: dict, reference: Outcome, name: str) -> None:
    assert len(reference.losses) == STEPS + 4  # validations at 7, 14 and the end, and the final event
    check_close(worlds[name][0], reference)
    assert worlds[name][0].lines[0]["world_size"] == int(name[0])


@pytest.mark.parametrize("micro_rows", [2, 3, 12])
def test_micro_rows_are_only_a_memory_knob(tmp_path: Path, reference: Outcome, micro_rows: int) -> None:
    check_close(train(options(out=tmp_path, micro_rows=micro_rows)), reference)


@pytest.mark.parametrize("name", ["2", "3", "4", "from 2 to 3", "from 3 to 4"])
def test_all_ranks_end_with_the_same_parameters(worlds: dict, name: str) -> None:
    first, *others = worlds[name]
    assert len(others) == int(name[-1]) - 1
    for other in others:
        assert (
            other.final.items() >= {key: first.final[key] for key in ("step", "val_loss", "tokens")}.items()
        )
        assert all(torch.equal(p, other.params[name]) for name, p in first.params.items())


@pytest.mark.parametrize("other", [1, 2, 3, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_checkpoint_loads_at_any_world_size(
    worlds: dict, reference: Outcome, world_size: int, other: int
) -> None:
    if world_size == other:
        pytest.skip("resumed bit for bit elsewhere")
    outcome = worlds[f"from {other} to {world_size}"][0]
    resume = [line for line in outcome.lines if line["event"] == "resume"]
    assert [(line["step"], line["world_size"]) for line in resume] == [(10, world_size)]
    check_close(outcome, reference)


def test_several_processes_refuse_with_one_sentence(worlds: dict) -> None:
    assert worlds["2 refused"] == [1, 1]
    errors = [
        [line for line in output.splitlines() if "train_gpt.py:" in line] for output in worlds["2 output"]
    ]
    assert len(errors[0]) == 1 and "1000000" in errors[0][0] and not errors[1]
    no_traceback(*worlds["2 output"])


def test_weights_at_the_end_are_blended_with_their_mean(tmp_path: Path, reference: Outcome) -> None:
    """Beside a run without means, its weights of every step in float64: the mean of every second of the last
    ten, of which the last two count alike, and for each matrix the norm of the last weights."""
    weights = []

    def advance(trainer: train_gpt.Trainer, step: int, batches: Any) -> Any:
        result = original(trainer, step, batches)
        weights.append({name: p.detach().double() for name, p in trainer.model.named_parameters()})
        weights[-1]["embed"] = weights[-1]["lm_head" if trainer.model.tied else "embed"]
        return result

    original = train_gpt.Trainer.advance
    with mock.patch.object(train_gpt.Trainer, "advance", advance):
        plain = train(options(out=tmp_path, average__blends="()"))
    blends = dict(ast.literal_eval(SMALL["average.blends"]))
    for name, last in plain.params.items():
        mean = weights[11][name]
        for step in (13, 15, 17, 19):
            mean = (mean + weights[step][name]) / 2
        last, blend = last.double(), blends.get(name, 0.0)
        blended = (1 - blend) * last + blend * mean
        if last.ndim > 1:
            blended *= last.norm(dim=(-2, -1), keepdim=True) / blended.norm(dim=(-2, -1), keepdim=True)
        if not blend:
            assert torch.equal(reference.params[name], plain.params[name]), name
        else:
            assert not torch.allclose(blended, last, rtol=1e-5), name
            torch.testing.assert_close(reference.params[name].double(), blended, rtol=1e-5, atol=1e-7)
    assert plain.losses[:-2] == reference.losses[:-2] and plain.losses[-1] != reference.losses[-1]


def test_the_model_learns(reference: Outcome) -> None:
    losses = [loss for event, _, loss in reference.losses if event == "step"]
    # logits are zero at the start, and the 48 classes of a row stand for all
    assert losses[0] == pytest.approx(math.log(264), abs=0.1)
    assert losses[-1] < losses[0] - 1.5
    assert reference.final["val_loss"] < 4.0 and reference.final["reached"] is True


def test_a_seed_gives_one_run(tmp_path: Path, reference: Outcome) -> None:
    short = dict(schedule__steps=4, schedule__extension=0)
    first, again, other = (
        train(options(out=tmp_path / str(i), seed=seed, **short)) for i, seed in enumerate((3, 3, 4))
    )
    check_equal(again, first)
    assert other.final["val_loss"] != first.final["val_loss"]


# --------------------------------------------------------------------------------------------------
# The log

HEADER = {
    "run_id": str, "track": str, "settings": dict, "seed": int, "dtype": str, "micro_rows": list,
    "source_sha256": str, "git_commit": (str, type(None)), "git_dirty": (bool, type(None)),
    "torch": str, "cuda": (str, type(None)),
    "driver": str, "python": str, "device": str, "cpus": int, "world_size": int, "threads": int, "data": dict,
    "waiting": str,
    "compiled": str, "compile": str, "startup_s": dict, "attention": str, "head": str,
    "memory": str,
}  # fmt: skip
TIMED = {"step": int, "train_time_s": float, "tokens": int}
FIELDS = {
    "header": HEADER,
    "step": TIMED | {"train_loss": float},
    "val": TIMED | {"val_loss": float, "val_tokens": int},
    "final": TIMED | {"val_loss": float, "val_tokens": int, "target": float, "reached": bool,
                      "compiles_in_timed_region": int, "peak_memory_bytes": int},
}  # fmt: skip


def test_log_has_every_event_and_field(reference: Outcome) -> None:
    lines = reference.lines
    assert [line["event"] for line in lines] == (
        ["header"] + ["step"] * 7 + ["val"] + ["step"] * 7 + ["val"] + ["step"] * 6 + ["val", "final"]
    )
    for line in lines:
        for name, kind in FIELDS[line["event"]].items():
            assert isinstance(line[name], kind), (line["event"], name)
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in steps] == [*itertools.accumulate([768] * 9 + [1536] * 9 + [768] * 2)]
    times = [line["train_time_s"] for line in lines if "train_time_s" in line]
    assert times == sorted(times) and times[0] > 0
    final = dict(lines[-1])
    assert final.pop("event") == "final" and final == reference.final
    assert final["val_tokens"] == 1000 and final["peak_memory_bytes"] > 2**20
    assert final["compiles_in_timed_region"] == 0


def test_header_says_what_was_run(reference: Outcome, data_dir: Path) -> None:
    header = reference.lines[0]
    track, run = train_gpt.parse_command_line(options())
    assert header["settings"] == json.loads(json.dumps(dataclasses.asdict(track)))
    # the overrides
    assert header["settings"]["head"]["every"] == 2
    assert header["settings"]["data"]["rows"] == 12
    assert (header["track"], header["seed"], header["dtype"], header["threads"]) == ("tiny", 0, "float32", 1)
    folder = data_dir / "shakespeare"
    assert header["data"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.bin")
    }
    assert header["torch"] == torch.__version__ and header["compile"] == "none"
    assert header["compiled"] == "none"
    parts = ["imports and processes", "data", "model and optimizer", "graphs", "optimizer"]
    assert list(header["startup_s"]) == parts and min(header["startup_s"].values()) >= 0
    assert (header["attention"], header["head"]) == ("blocked", "float32")


def test_commit_is_that_of_the_source_or_unknown(tmp_path: Path) -> None:
    """A repository that merely encloses the file says nothing of it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *words],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    def environment() -> dict[str, Any]:
        script = in_turns.load(str(inner / "train_gpt.py"))
        return script.environment(torch.device("cpu"), script.Comm())

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "outer")
    inner = tmp_path / "inner"
    inner.mkdir()
    shutil.copy(ROOT / "train_gpt.py", inner)
    found = environment()
    assert found["git_commit"] is None and found["git_dirty"] is None
    git("add", "inner")
    git("commit", "-q", "-m", "it is in the repository now")
    found = environment()
    assert found["git_commit"] == git("rev-parse", "HEAD") and found["git_dirty"] is False
    with open(inner / "train_gpt.py", "a") as file:
        file.write("# changed\n")
    assert environment()["git_dirty"] is True


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_age_of_a_process() -> None:
    began = time.time()
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); import train_gpt; "
    code += "print(time.time() - train_gpt.process_age())"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert abs(float(done.stdout) - began) < 0.5


def test_source_is_stored_once_beside_the_logs(tmp_path: Path) -> None:
    short, source = dict(schedule__steps=2, schedule__extension=0), (ROOT / "train_gpt.py").read_bytes()
    runs = [train(options(out=tmp_path, seed=seed, **short)) for seed in (0, 1)]
    assert [path.read_bytes() for path in tmp_path.glob("*.py")] == [source]
    assert {run.lines[0]["source_sha256"] for run in runs} == {hashlib.sha256(source).hexdigest()}
    assert len({run.log for run in runs}) == len(list(tmp_path.glob("*.jsonl"))) == 2
    (stored,) = tmp_path.glob("*.py")
    assert stored.stem == hashlib.sha256(source).hexdigest()


# --------------------------------------------------------------------------------------------------
# The last page


def test_a_run_ends_with_its_text_and_its_log(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    short = dict(schedule__steps=2, schedule__extension=0)
    quiet = train(options(out=tmp_path / "quiet", **short))
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("track tiny: validation loss")
    state = torch.get_rng_state()
    shown = train(options(out=tmp_path / "shown", show="true", **short))
    check_equal(shown, quiet)
    assert torch.equal(torch.get_rng_state(), state)
    said = capsys.readouterr().out
    before, _, after = said.partition("the model writes:\n")
    assert before.splitlines()[-1].startswith("track tiny: validation loss")
    *text, log = after.splitlines()
    assert log == f"log {shown.log}" and text[0] == "  HAMLET."
    assert all(line.startswith("  ") for line in text) and 100 < len("\n".join(text)) < 1000


def test_the_text_is_what_the_weights_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The same as that of a checkpoint, however the run was compiled; nothing is compiled for it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(train_gpt, "TEXT_BYTES", 20)
    page, graphs = train_gpt.Trainer.last_page, []

    def last_page(self: train_gpt.Trainer) -> None:
        graphs.append(train_gpt.compiled_so_far())
        torch.set_num_threads(2)
        page(self)
        assert torch.get_num_threads() == 2
        graphs.append(train_gpt.compiled_so_far())

    monkeypatch.setattr(train_gpt.Trainer, "last_page", last_page)
    torch._dynamo.reset()
    train(options(out=tmp_path, show="true", checkpoint_every=4, **COMPILED))
    assert len(graphs) == 2 and graphs[0] == graphs[1] and graphs[0][0] >= 2
    text = capsys.readouterr().out.partition("the model writes:\n")[2].rpartition("log ")[0]
    (path,) = tmp_path.glob("*/step_000004.pt")
    use = ["--track", "tiny", "--device", "cpu", "--threads", "1", "--resume", str(path)]
    sample = train_gpt.main(
        [*use, "--sample", train_gpt.PROMPT, "--sample_tokens", "20", "--temperature", "0.8"]
    )
    shown = "".join(x if x == "\n" or (x.isprintable() and x != "\ufffd") else "?" for x in sample)
    assert text == "".join(f"  {line}\n" for line in shown.splitlines())


def test_a_slow_model_writes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train_gpt, "TEXT_SECONDS", -1.0)
    train(options(out=tmp_path, show="true", schedule__steps=2, schedule__extension=0))
    assert "the model writes:\n  HAMLET.\nlog " in capsys.readouterr().out


@pytest.mark.parametrize("name", train_gpt.TRACKS)
def test_logs_of_the_tracks_stay_below_100_kb(reference: Outcome, name: str) -> None:
    longest = {}
    for line in reference.log.read_text().splitlines():
        event = json.loads(line)["event"]
        longest[event] = max(longest.get(event, 0), len(line) + 10)  # later steps have more digits
    schedule, evaluation = train_gpt.TRACKS[name].schedule, train_gpt.TRACKS[name].evaluation
    steps = train_gpt.total_steps(schedule)
    total = longest["header"] + 80 * 200 + longest["final"]  # up to 200 data digests
    total += longest["step"] * (steps // evaluation.log_every + 1) + longest["val"] * (
        steps // evaluation.every + 1
    )
    assert total < 100_000


# --------------------------------------------------------------------------------------------------
# Compiled runs


# no attention: it takes twice as long to compile
COMPILED = dict(compile="parts", data__rows=1, model__layers=1, model__attention_free="(0,)",
                model__long_blocks="()", model__xsa="()", model__key_offset="()", model__paired="()",
                model__attention_source=-1, model__qk_parts=1, model__skips="()", model__value_tables="()",
                model__backout=-1, schedule__stages="((0, (64, 64)),)", schedule__steps=4,
                schedule__extension=0, evaluation__windows="(64, 64)", evaluation__row_tokens=64,
                evaluation__tokens=200)  # fmt: skip


def test_compiled_run_is_cold_once_and_compiles_nothing_in_the_timed_region(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= dict(CACHE_DIR=str(tmp_path / "cache"), TORCHINDUCTOR_COMPILE_THREADS="2")
    headers = []
    for name in ("cold", "warm"):
        argv = [sys.executable, str(ROOT / "train_gpt.py"), *options(out=tmp_path / name, **COMPILED)]
        done = subprocess.run(
            argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        header, *_, final = events(next((tmp_path / name).glob("*.jsonl")))
        assert final["event"] == "final" and final["compiles_in_timed_region"] == 0
        assert header["compiled"] == "parts" and header["graphs"] >= 2
        headers.append(header)
    assert [header["compile"] for header in headers] == ["cold", "warm"]
    assert headers[1]["startup_s"]["graphs"] < headers[0]["startup_s"]["graphs"]
    assert any((tmp_path / "cache").iterdir())


def test_graphs_are_made_beside_parameters_of_low_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients are fp32, which a graph that is traced meanwhile would not take."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = dict(dtype="bfloat16", model__low_precision="('mlp', 'embed', 'ngram_embed', 'value_embed')",
                    schedule__stages="((0, (64, 64), 1, 4096, 1.0, (), 48), (0.5, (32, 32), 2))")  # fmt: skip
    outcome = train(options(out=tmp_path, **COMPILED | settings))
    assert outcome.lines[0]["graphs"] >= 3 and outcome.final["compiles_in_timed_region"] == 0


def test_compiling_in_the_timed_region_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    original = train_gpt.Trainer.warm_up

    def nothing_warmed_up(self: train_gpt.Trainer) -> float:
        with torch.compiler.set_stance("force_eager"):
            return original(self)

    monkeypatch.setattr(train_gpt.Trainer, "warm_up", nothing_warmed_up)
    torch._dynamo.reset()
    assert "timed region" in refusal(options(out=tmp_path, **COMPILED), capsys)
    assert [line["event"] for line in events(next(tmp_path.glob("*.jsonl")))] == ["header"]


# --------------------------------------------------------------------------------------------------
# What changes during a run


def test_stages_reach_the_model_and_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows (growing batch, taper), windows, loss weights, tied weights, rotary history, rates, decay."""
    forward = train_gpt.Trainer.forward_backward
    step = train_gpt.MuonEq.step
    rotary = train_gpt.GPT.set_rotary
    seen = []

    def forward_backward(self: train_gpt.Trainer, batch: Any, weights: Any) -> torch.Tensor:
        if self.clock.began:
            seen.append(
                [len(batch.inputs), self.stage.windows, [*weights], self.model.tied, self.model.history]
            )
        return forward(self, batch, weights)

    def optimizer_step(self: train_gpt.MuonEq, *, tokens: int) -> None:
        if seen:
            group = next(
                group for group in self.param_groups if group["kind"] == "matrix" and group["weight_decay"]
            )
            seen[-1] += [group["lr"] / 0.03, group["weight_decay"] / 0.1]
        step(self, tokens=tokens)

    def set_rotary(self: train_gpt.GPT, windows: list[int]) -> None:
        self.history = windows
        rotary(self, windows)

    monkeypatch.setattr(train_gpt.Trainer, "forward_backward", forward_backward)
    monkeypatch.setattr(train_gpt.MuonEq, "step", optimizer_step)
    monkeypatch.setattr(train_gpt.GPT, "set_rotary", set_rotary)
    train(options(out=tmp_path))
    schedule = train_gpt.parse_command_line(options())[0].schedule
    factors = [train_gpt.learning_rate_factor(schedule, at) for at in range(STEPS)]
    stages = [(12, (16, 24), [24])] * 9 + [(24, (24, 32), [24, 32])] * 9 + [(12, (24, 40), [24, 32, 40])] * 2
    weights = [[1.0, 0.5 * (1 - at / 9)] for at in range(9)] + [[1.0]] * 11
    assert len(seen) == STEPS
    for at, (rows, windows, found, tied, history, lr, decay) in enumerate(seen):
        assert (rows, windows, history) == stages[at] and found == pytest.approx(weights[at])
        # power 2
        assert tied == (at < 12) and lr == pytest.approx(factors[at])
        assert decay == pytest.approx(factors[at])


def test_tied_weights_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, parted = train_gpt.MuonEq.copy_state, []

    def copy_state(self: train_gpt.MuonEq, source: str, target: str) -> None:
        before = self.state_dict()["state"]  # of the embedding: never updated
        original(self, source, target)
        state, params = self.state_dict()["state"], {unit.names[0]: unit.params[0] for unit in self.units}
        assert not any(x.any() for x in before["embed"].values() if isinstance(x, torch.Tensor))
        assert before["embed"]["updates"] == 0 < before["lm_head"]["updates"]  # it did no work
        same = [torch.equal(state["embed"][key], state["lm_head"][key]) for key in ("exp_avg", "exp_avg_sq")]
        parted.append((self.step_count, torch.equal(params["embed"], params["lm_head"]), same))

    monkeypatch.setattr(train_gpt.MuonEq, "copy_state", copy_state)
    params = train(options(out=tmp_path)).params
    assert parted == [(12, True, [True, True])] and not torch.equal(params["embed"], params["lm_head"])
    train(options(out=tmp_path, model__tied=0))
    train(options(out=tmp_path, model__tied=1))
    assert len(parted) == 2 and parted[1][0] == 18  # the last one only in the extension


@pytest.mark.parametrize(
    "asked, world_size, rows", [(0, 1, [8, 8, 8]), (0, 2, [4, 8, 6]), (2, 4, [2, 2, 2]), (0, 8, [1, 2, 3])]
)
def test_rows_of_a_pass_follow_the_batch(asked: int, world_size: int, rows: list[int]) -> None:
    track, run = train_gpt.parse_command_line(
        ["--track", "tiny", "--data.rows", "8", "--micro_rows", str(asked)]
    )
    # 1,024 tokens each
    assert [train_gpt.rows_per_pass(track, run, world_size, batch) for batch in (1, 2, 3)] == rows
    most = train_gpt.ONE_GRAPH_TOKENS // 1024
    fewer = [train_gpt.rows_per_pass(track, run, world_size, batch, most * 1024) for batch in (1, 2, 3)]
    if not asked:
        # the largest divisor of the rows of a process
        local = [8 // world_size * batch for batch in (1, 2, 3)]
        assert fewer == [max(n for n in range(1, most + 1) if rows % n == 0) for rows in local]
    else:
        assert fewer == rows
