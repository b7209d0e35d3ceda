"""The machine as it is: folders that cannot be written, compilers that do not work, how threads wait."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

import launch
import on_gpu
import train_gpt
from helpers import ROOT, finish, no_traceback, options, refusal, start, train, train_with
from lib import runner, threads

pytestmark = pytest.mark.usefixtures("data_dir")
IN_THE_WAY = ["a file", "below a file", "/proc/train_gpt"]


def bad_folder(kind: str, tmp_path: Path) -> Path:
    """A folder that nobody can write to, root neither."""
    if kind.startswith("/"):
        if not Path(kind).parent.is_dir():
            pytest.skip("there is no /proc here")
        return Path(kind)
    (tmp_path / "file").write_text("x")
    return tmp_path / "file" / "folder" if kind == "below a file" else tmp_path / "file"


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_data", "compiler_problem"):
        monkeypatch.setattr(train_gpt, name, mock.Mock(side_effect=AssertionError(f"{name} came first")))


# --------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_an_output_folder_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture, nothing_is_read: None, kind: str
) -> None:
    folder = bad_folder(kind, tmp_path)
    sentence = refusal(options(out=folder, compile="auto"), capsys)
    assert sentence.startswith(f"--out {folder} cannot be written (")


@pytest.mark.parametrize("compile", ["whole", "parts"])
@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_a_compile_cache_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, nothing_is_read: None,
    kind: str, compile: str,
) -> None:  # fmt: skip
    folder = bad_folder(kind, tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("CACHE_DIR", str(folder))
    sentence = refusal(options(out=tmp_path / "out", compile=compile), capsys)
    nearest = folder if folder.exists() else folder.parent
    assert f"({nearest}: " in sentence and "CACHE_DIR" in sentence and "--compile none" in sentence
    assert not (tmp_path / "out").exists()


def test_auto_goes_on_without_a_cache_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = bad_folder("a file", tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("CACHE_DIR", str(folder))
    outcome = train(options(out=tmp_path / "out", compile="auto", schedule__steps=2, schedule__extension=0))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "compile" in line]
    assert line.startswith("not compiled: the compile cache cannot be written (")
    assert outcome.lines[0]["compiled"] == "none"


def test_a_run_that_compiles_nothing_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(bad_folder("a file", tmp_path)))
    train(options(out=tmp_path / "out", schedule__steps=2, schedule__extension=0))


def test_all_ranks_end_alike(tmp_path: Path) -> None:
    folder = bad_folder("below a file", tmp_path)
    (codes,) = train_with(2, [options(out=folder)], dict(os.environ), tmp_path / "ranks")
    said = [(tmp_path / "ranks" / f"output_{rank}").read_text() for rank in (0, 1)]
    assert codes == [1, 1]
    assert said[0].startswith(f"train_gpt.py: --out {folder} cannot be written") and said[0].count("\n") == 1
    assert said[1] == ""


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert train_gpt.cannot_write(tmp_path / "there") == ""
    assert train_gpt.cannot_write(tmp_path / "a" / "b") == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def as_nobody(function: Callable[[Path], str], folder: Path, expected: str) -> None:
    if os.getuid() == 0:  # who may write anywhere
        os.setuid(65534)
    assert function(folder) == expected, function(folder)


@pytest.mark.parametrize("closed", ["ab/kernel.so", "ab", ""])
def test_a_cache_of_somebody_else(tmp_path: Path, closed: str) -> None:
    """What inductor made for another user is found in the cache's folders, not only at its top."""
    cache = tmp_path / "cache"
    (cache / "ab").mkdir(parents=True)
    (cache / "ab" / "kernel.so").touch()
    for path in (*tmp_path.rglob("*"), tmp_path, *tmp_path.parents[:-1]):
        if path.owner() == tmp_path.owner() and path != Path("/tmp"):
            path.chmod(0o777)
    (cache / closed).chmod(0o444 if closed == "ab" else 0)
    denied = f"{cache / closed}: Permission denied"
    check = train_gpt.closed_inside if closed else train_gpt.cannot_write
    assert finish(start(as_nobody, [(check, cache, denied)])) == [0]
    (cache / closed).chmod(0o777)
    assert finish(start(as_nobody, [(check, cache, "")])) == [0]


@pytest.mark.parametrize("words", [["--out", "FILE"], ["--compile", "whole"]])
def test_the_launcher_refuses_before_it_makes_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, words: list[str]
) -> None:
    file = bad_folder("a file", tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("CACHE_DIR", str(file))
    monkeypatch.setattr(launch, "make_data", None)
    monkeypatch.setattr(launch, "start", None)
    words = [word.replace("FILE", str(file)) for word in words]
    assert launch.main(["--track", "tiny", *words]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("run.sh: ") and err.count("\n") == 1
    assert str(file) in err and ("--out" in err or "CACHE_DIR" in err)


# --------------------------------------------------------------------------------------------------
# Compilers

BROKEN = {  # what a compiler does with "$@", and a word of the sentence
    "no OpenMP": ("echo 'probe.cpp:3:10: fatal error: omp.h: No such file' >&2; exit 1", "(omp.h: No such"),
    "says nothing": ("exit 4", "(exit status 4)"),
    "makes nothing": ("exit 0", "probe.so"),
    "makes something else": ('for word; do :; done; echo text > "$word"', "probe.so"),
}


def compiler(folder: Path, does: str) -> str:
    path = folder / "a compiler"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty compile cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["none", *BROKEN])
def test_a_compiler_that_does_not_work_is_refused_before_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, cache: Path, name: str
) -> None:
    does, word = BROKEN.get(name, ("", "there is no compiler"))
    monkeypatch.setenv("CXX", compiler(tmp_path, does) if does else "/nothing/g++")
    monkeypatch.setattr(train_gpt, "check_data", mock.Mock(side_effect=AssertionError("read first")))
    for _ in range(2):  # that it failed is not remembered
        sentence = refusal(options(out=tmp_path / "out", compile="whole"), capsys)
        assert word in sentence and os.environ["CXX"] in sentence
        assert "`apt install g++ python3-dev`" in sentence and "--compile none" in sentence
    assert not (tmp_path / "out").exists() and not (cache.exists() and list(cache.iterdir()))


def test_auto_goes_on_without_a_compiler_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, cache: Path
) -> None:
    monkeypatch.setenv("CXX", "/nothing/g++")
    outcome = train(options(out=tmp_path / "out", compile="auto"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "compile" in line]
    assert len(lines) == 1 and lines[0].startswith("not compiled") and "/nothing/g++" in lines[0]
    assert "--compile none" not in lines[0]
    assert outcome.lines[0]["compiled"] == "none" and outcome.final["step"] == 20


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_that_works_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert train_gpt.compiler_problem(cache) == ""
    assert len(list(cache.iterdir())) == 1  # what was made for the test is gone
    with mock.patch.object(subprocess, "run", side_effect=AssertionError("tried again")):
        assert train_gpt.compiler_problem(cache) == ""
    # another compiler, and another cache, know nothing of it
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 1"))
    assert "does not work" in train_gpt.compiler_problem(cache)
    monkeypatch.setenv("CXX", compiler(tmp_path, 'exec g++ "$@"'))
    assert train_gpt.compiler_problem(tmp_path / "other") == ""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_disk_that_allows_no_programs_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    error = OSError("probe.so: failed to map segment from shared object")
    with mock.patch.object(ctypes, "CDLL", side_effect=error):
        assert "failed to map segment" in train_gpt.compiler_problem(cache)


def test_cuda_needs_a_compiler_of_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("CC", "/nothing/cc")
    sentence = train_gpt.compiler_problem(cache, "cuda")
    assert "/nothing/cc" in sentence and "apt install gcc" in sentence
    if shutil.which("gcc"):
        monkeypatch.delenv("CC")
        assert train_gpt.compiler_problem(cache, "cuda") == ""


# --------------------------------------------------------------------------------------------------
# Systems

WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(["fcntl", "resource"]))  # as on Windows: an import fails
sys.argv = sys.argv[1:]
sys.path[:0] = [{root!r}, {root!r} + "/tools"]
"""


@pytest.mark.parametrize("script, name", [("train_gpt.py", "train_gpt.py"), ("tools/launch.py", "run.sh")])
def test_a_system_without_fcntl_is_refused_in_words(tmp_path: Path, script: str, name: str) -> None:
    code = WITHOUT.format(root=str(ROOT)) + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT / script), "--track", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    no_traceback(done.stdout, done.stderr)
    assert done.returncode == 1 and done.stdout == ""
    *before, refused = done.stderr.splitlines()
    assert refused == f"{name}: this needs Linux or macOS; on Windows use WSL"
    assert before == [f"{name}: loading torch"]
    assert not list(tmp_path.iterdir())


def test_the_optimizer_can_be_imported_without_fcntl() -> None:
    code = WITHOUT.format(root=str(ROOT)) + "from train_gpt import MuonEq"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --------------------------------------------------------------------------------------------------
# How threads wait

TORCH = """
import os
print([name + "=" + os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ])
os._exit(0)
"""
PROGRAMS = {  # with a word that each of them takes
    "train_gpt.py": "--seed=1", "tools/launch.py": "--seed=1", "tools/monitor.py": "--seed=1",
    "tools/step_profile.py": "--seed=1", "tools/benchmark.py": "loader",
}  # fmt: skip


def torch_finds(command: list[str], folder: Path, **environment: str) -> str:
    """The waiting policy in the environment in which a command loads torch."""
    (folder / "torch.py").write_text(TORCH)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    kept |= {"PYTHONPATH": f"{folder}:{ROOT}"} | environment
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=kept).stdout.strip()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_says_how_threads_wait_before_torch_is_loaded(tmp_path: Path, program: str) -> None:
    command = [str(ROOT / program), PROGRAMS[program]]
    assert torch_finds(command, tmp_path) == f"['GOMP_SPINCOUNT={threads.SPINCOUNT}']"
    for own in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        ((name, value),) = own.items()
        assert torch_finds(command, tmp_path, **own) == f"['{name}={value}']"


@pytest.mark.parametrize("module", ["train_gpt", "monitor", "step_profile", "benchmark"])
def test_an_import_leaves_the_waiting_to_the_program(tmp_path: Path, module: str) -> None:
    command = ["-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import {module}"]
    assert torch_finds(command, tmp_path) == "[]"


def test_the_log_says_how_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in train_gpt.WAITING:
        monkeypatch.delenv(name, raising=False)
    assert train_gpt.waiting() == "default"
    monkeypatch.setenv("GOMP_SPINCOUNT", "12")
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert train_gpt.waiting() == "GOMP_SPINCOUNT=12 OMP_PROC_BIND=true"


# --------------------------------------------------------------------------------------------------
# Tools that start runs


@pytest.mark.parametrize("variable", ["CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
@pytest.mark.parametrize("compile", ["whole", "none"])
def test_a_tool_passes_on_why_a_run_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile: str, variable: str
) -> None:
    """In a process of its own, since torch makes a compile cache when its compiler is loaded."""
    file = bad_folder("a file", tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    words = options(compile=compile, schedule__steps=2, schedule__extension=0)
    status, said = runner.run_script(
        ROOT / "train_gpt.py", words, tmp_path / "scratch", lambda _: False, environment={variable: str(file)}
    )
    if compile == "none":
        assert status == 0 and "2 steps" in said
    else:
        assert status == 1 and str(file) in said and "CACHE_DIR" in said


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_on_gpu_refuses_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = bad_folder(kind, tmp_path)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", str(folder)])
    with pytest.raises(SystemExit, match=f"on_gpu.py: OUT {folder} cannot be written"):
        on_gpu.main()


RANKS = [(0, 0, True), (1, 1, False), (2, 0, True), (3, 1, False)]  # rank, local rank, whether it speaks


@pytest.mark.parametrize("rank, local_rank, speaks", RANKS)
def test_each_machine_says_once_what_is_wrong_with_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    rank: int, local_rank: int, speaks: bool,
) -> None:  # fmt: skip
    """On two machines with two ranks each, before these have met."""
    for name, value in dict(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as stop:
        train(options(out=bad_folder("a file", tmp_path)))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == speaks and ("--out" in error) == speaks
