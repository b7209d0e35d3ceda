"""The start of a run: what --compile auto chooses, what a resumed run keeps, private names of torch."""

import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_gpt
from helpers import ROOT, events, make_corpus, options, train


@pytest.mark.parametrize(
    "history, mode",
    [
        ({}, "none"),
        ({"none": [2.0, 20.0]}, "none"),
        ({"whole": [0.0, 10.0]}, "whole"),  # it was cold; the next start is not
        ({"whole": [5.0, 10.0], "none": [2.0, 20.0]}, "whole"),
        ({"whole": [9.0, 15.0], "none": [2.0, 20.0]}, "none"),
    ],
)
def test_auto_chooses_what_ends_sooner(history: dict, mode: str) -> None:
    chosen, why = train_gpt.sooner(history)
    assert chosen == mode and why


def test_times_are_noted_and_damaged_ones_count_for_none(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    assert train_gpt.read_history(path) == {}
    train_gpt.note_times(path, "none", 2.0, 20.0)
    train_gpt.note_times(path, "whole", 0.0, 10.0)
    assert train_gpt.read_history(path) == {"none": [2.0, 20.0], "whole": [0.0, 10.0]}
    for damaged in ("", "[]", "{", '{"whole": 1}', '{"whole": ["x", 1]}'):
        path.write_text(damaged)
        assert train_gpt.read_history(path) == {}
    train_gpt.note_times(path / "times.json", "none", 2.0, 20.0)  # below a file: it cannot be written


def run(tmp_path: Path, *words: str) -> tuple[dict, str]:
    """A run in a process of its own; the header of its log and what it said."""
    command = [sys.executable, str(ROOT / "train_gpt.py"), *words, "--out", str(tmp_path / "logs")]
    places = {"DATA_DIR": str(tmp_path / "data"), "CACHE_DIR": str(tmp_path / "cache")}
    places |= {"PATH": "/usr/bin:/bin", "CXX": os.environ.get("CXX", "g++")}
    done = subprocess.run(command, env=places, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    newest = max((tmp_path / "logs").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return events(newest)[0], done.stdout


def test_auto_does_not_compile_and_says_so(tmp_path: Path) -> None:
    make_corpus(tmp_path / "data")
    header, said = run(tmp_path, *options(compile="auto"))
    assert header["compiled"] == "none" and header["compile_settings"]["chosen"]
    assert "not compiled: " in said and "--compile whole compiles once" in said
    (times,) = (tmp_path / "cache").glob("*/times-*.json")
    assert list(json.loads(times.read_text())) == ["none"]
    header, said = run(tmp_path, *options(compile="none"))
    assert "--compile whole" not in said  # it was asked for


def test_a_resumed_run_keeps_its_mode(tmp_path: Path) -> None:
    """An auto run goes on uncompiled although the cache says by now that a compiled one ends sooner."""
    make_corpus(tmp_path / "data")
    words = options(compile="auto", checkpoint_every=20, threads=None)
    run(tmp_path, *words, "--threads", "1")
    (times,) = (tmp_path / "cache").glob("*/times-*.json")
    times.write_text(json.dumps({"whole": [0.0, 0.0]}))
    (path,) = (tmp_path / "logs").glob("*/step_000020.pt")
    found = train_gpt.load_checkpoint(path, {})
    waiting = found["mode"].pop("waiting")
    assert found["mode"] == {"compiled": "none", "threads": 1, "world_size": 1} and "mode" not in found["key"]
    assert "3000" in waiting
    header, said = run(tmp_path, *words, "--resume", str(path))
    assert "threads wait as" not in said
    assert "compiled" not in said and header["compiled"] == "none"


def test_a_resumed_run_goes_on_uncompiled_where_the_compiler_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(tmp_path / "data")
    words = options(compile="auto", checkpoint_every=20)
    run(tmp_path, *words)
    (path,) = (tmp_path / "logs").glob("*/step_000020.pt")
    content = train_gpt.load_checkpoint(path, {})
    content["mode"]["compiled"] = "whole"
    earlier = tmp_path / "earlier.pt"
    content["mode"]["waiting"] = "OMP_WAIT_POLICY=active"
    train_gpt.save_checkpoint(earlier, {key: value for key, value in content.items() if key != "format"})
    monkeypatch.setenv("CXX", "/nothing/g++")
    _, said = run(tmp_path, *words, "--resume", str(earlier))
    assert "not compiled: there is no compiler /nothing/g++" in said
    assert "the run before as in OMP_WAIT_POLICY=active" in said


def test_an_uncompiled_run_does_without_the_compiler(tmp_path: Path) -> None:
    """torch._dynamo takes a second to import."""
    make_corpus(tmp_path / "data")
    words = [*options(compile="none"), "--out", str(tmp_path / "logs")]
    code = f"import sys, train_gpt; train_gpt.main({words!r}); assert 'torch._dynamo' not in sys.modules"
    places = {"DATA_DIR": str(tmp_path / "data"), "CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=places, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_compiled_run_has_one_graph_for_passes_of_any_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced only: what inductor makes of it does not matter here."""
    make_corpus(tmp_path / "data")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, **rest: compiler(part, backend="eager", **rest))
    torch._dynamo.reset()
    before = train_gpt.compiled_so_far()[0]
    stages = "((0,(8,16)),(0.3,(8,16),2),(0.6,(8,16),3))"
    words = options(out=tmp_path / "logs", compile="whole", schedule__stages=stages)
    done = train([*words, "--data.rows", "2", "--model.tied", "0"])
    assert done.final["compiles_in_timed_region"] == 0
    header = events(next((tmp_path / "logs").glob("*.jsonl")))[0]
    assert header["micro_rows"] == [2, 4, 6] and header["graphs"] - before == 1


def test_garbage_is_looked_for_in_training_not_before(tmp_path: Path) -> None:
    make_corpus(tmp_path / "data")
    words = [*options(compile="none"), "--out", str(tmp_path / "logs")]
    code = f"""
import gc, runpy, sys, train_gpt
sys.argv = ["train_gpt.py", *{words!r}]
seen, start = [], train_gpt.time.monotonic
def profile(frame, event, arg):
    if event == "call" and frame.f_code.co_name in ("warm_up", "advance"):
        seen.append((frame.f_code.co_name, gc.isenabled()))
sys.setprofile(profile)
runpy.run_path({str(ROOT / "train_gpt.py")!r}, run_name="__main__")
assert {{*seen}} == {{("warm_up", False), ("advance", True)}}, {{*seen}}
"""
    places = {"DATA_DIR": str(tmp_path / "data"), "CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=places, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_header_of_kernels_is_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread, for the flags and settings that kernels have, and not where it is already."""
    from torch._inductor import codecache
    from torch._inductor import config as inductor

    asked = []

    def load(types: list[str], source: str) -> None:
        asked.append((types, source, threading.current_thread(), inductor.cpp.vec_isa_ok))

    monkeypatch.setattr(codecache.CppPythonBindingsCodeCache, "load_pybinding", staticmethod(load))
    for header in ((), ("x.h.gch",)):
        for name in header:
            (tmp_path / name).touch()
        with inductor.patch({"cpp.vec_isa_ok": True}):  # as `prepare_compiler` sets it
            train_gpt.make_header(tmp_path)
        for thread in {*threading.enumerate()} - {threading.main_thread()}:
            thread.join(5) if thread.name.startswith("make_header") else None
    ((types, source, thread, not_tried_out),) = asked
    assert types == ["float*"] and "cpp_prefix.h" in source and thread is not threading.main_thread()
    assert not_tried_out


def test_tracing_does_not_parse_the_whole_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import funcname_cache

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(train_gpt, "make_header", lambda folder: None)
    monkeypatch.setattr(funcname_cache, "cache", {})
    parse = funcname_cache._add_file
    parsed = []
    monkeypatch.setattr(funcname_cache, "_add_file", lambda name: (parsed.append(name), parse(name)))
    train_gpt.prepare_compiler(torch.device("cpu"))
    torch._dynamo.reset()
    torch.compile(train_gpt.fold_bytes, backend="eager")(torch.arange(9))
    assert train_gpt.__file__ not in parsed


def test_private_names_of_torch_are_there() -> None:
    """A start is slower without them, not wrong: `prepare_compiler` leaves out what does not exist."""
    from torch._functorch import config as functorch
    from torch._inductor import codecache
    from torch._inductor import config as inductor
    from torch._inductor.codegen.cpp import CppKernel

    assert hasattr(functorch, "autograd_cache_allow_custom_autograd_functions")
    assert hasattr(inductor.cpp, "vec_isa_ok")
    assert inductor.cpp_cache_precompile_headers
    header = inspect.getsource(codecache._precompile_header)
    assert "_HEADER_DIR" in header and "_HEADER_LOCK_DIR" in header
    assert "4096" in inspect.getsource(CppKernel.need_use_acc_helper)  # ONE_GRAPH_TOKENS
    assert codecache.CppPythonBindingsCodeCache._get_uncompiled_header("cpu")  # that of the kernels
    add = torch.optim.Optimizer.add_param_group
    assert inspect.unwrap(add) is not add


# --------------------------------------------------------------------------------------------------
# Several GPUs: stand-ins for them, as graphs on GPUs cannot be made here

ALONE = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="8", LOCAL_WORLD_SIZE="8")


@pytest.mark.parametrize("count, environment, number", [
    (8, {"RANK": "3", "LOCAL_RANK": "3"}, 3),
    # torchrun --virtual-local-rank: each process sees one device, the first
    (1, {"RANK": "3", "CUDA_VISIBLE_DEVICES": "3"}, 0),
    (1, {"CUDA_VISIBLE_DEVICES": "0"}, 0),
    (1, {}, "more processes than the 1 devices"),
    (1, {"RANK": "1", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "0"}, "more processes than the 1 devices"),
    (4, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "more processes than the 4 devices"),
])  # fmt: skip
def test_device_of_a_process(
    monkeypatch: pytest.MonkeyPatch, count: int, environment: dict[str, str], number: int | str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {**ALONE, **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    run = train_gpt.Run(track="short")
    if isinstance(number, int):
        found = train_gpt.device_of(run, int(train_gpt.number_from("LOCAL_RANK", 0)))
        assert found == torch.device("cuda", number)
    else:
        with pytest.raises(ValueError, match=number):
            train_gpt.device_of(run, int(train_gpt.number_from("LOCAL_RANK", 0)))


@pytest.mark.parametrize("rank, device, compiled, waits", [
    (0, "cuda:0", "parts", False),
    (3, "cuda:0", "parts", True),
    (3, "cuda:3", "parts", False),  # its graphs have another number in them: nothing to wait for
    (3, "cuda:0", "none", False),
    (3, "cpu", "whole", False),
])  # fmt: skip
def test_the_first_process_of_a_machine_makes_its_graphs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, device: str, compiled: str, waits: bool
) -> None:
    """Others go on when it says that it is done, and give signs of life until then."""
    for name, value in {**ALONE, "RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train_gpt, "history_file", lambda _: tmp_path / "times-0.json")
    trainer = train_gpt.Trainer.__new__(train_gpt.Trainer)
    trainer.comm, trainer.device, trainer.compiled = train_gpt.Comm(), torch.device(device), compiled
    trainer.attention_kernel, slept = "fa2", []

    def sleep(_: float) -> None:
        slept.append(trainer.comm.calls)
        if len(slept) == 3:
            (tmp_path / "times-0.fa2.graphs").touch()

    monkeypatch.setattr(train_gpt.time, "sleep", sleep)
    assert trainer.wait_for_graphs() == tmp_path / "times-0.fa2.graphs"
    assert slept == ([1, 2, 3] if waits else []) and trainer.comm.calls == 0


def test_nothing_of_the_graphs_waits_for_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first process could not make them alone."""
    make_corpus(tmp_path / "data")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    run_graphs, alone, made = train_gpt.Trainer.run_graphs, [], []

    def without_others(trainer: train_gpt.Trainer) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt.Comm, "all_reduce", lambda *_: made.append("a collective"))
            alone.append(run_graphs(trainer))

    monkeypatch.setattr(train_gpt.Trainer, "run_graphs", without_others)
    monkeypatch.setattr(train_gpt.Trainer, "train", lambda trainer: trainer.warm_up())
    train_gpt.main(options(out=tmp_path / "logs"))
    assert alone == [None] and not made


def test_one_graph_of_the_loss_serves_all_stages() -> None:
    """Each pass has as many targets as the stage with the most; those that a stage has not weigh nothing."""
    track = train_gpt.TRACKS["short"]
    trainer = train_gpt.Trainer.__new__(train_gpt.Trainer)
    trainer.track, trainer.device, trainer.one_graph, trainer.longest = track, torch.device("cpu"), False, 8
    trainer.comm, trainer.rows_per_pass = SimpleNamespace(calls=0), {1: 1, 2: 1, 3: 1}
    losses = []

    def model(*given: Any) -> torch.Tensor:
        losses.append(torch.zeros(1 + given[-1], requires_grad=True))
        return losses[-1]

    trainer.model = model
    rows = torch.zeros(1, 8, dtype=torch.int32)
    for trainer.stage in track.schedule.stages[:3]:
        weights = [1.0, 0.25, 0.125][: 1 + len(trainer.stage.ahead)]
        trainer.forward_backward(train_gpt.Batch(rows, rows, rows), weights)
    assert [x.grad.tolist() for x in losses] == [[1.0, 0.25, 0.125], [1.0, 0.25, 0.0], [1.0, 0.0, 0.0]]
