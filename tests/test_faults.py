"""Nothing is lost: kills at any instant, signals, failing ranks, full disks.

`tests/faults.py` does it on a larger scale.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import faults
import train_gpt
from helpers import ROOT, Outcome, events, finish, no_traceback, options, start, train, train_with

KILLS, SEED = 12, 0

pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> faults.Bench:
    return faults.Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("number", range(KILLS))
def test_fault_is_survived_bit_for_bit(bench: faults.Bench, number: int) -> None:
    fault = bench.draw(KILLS, SEED)[number]
    result = bench.survive(fault, number)
    assert (result.flaws, result.bits) == ([], 0), fault


def test_faults_are_spread_over_a_run(bench: faults.Bench) -> None:
    drawn = bench.draw(200, 1)
    assert drawn == bench.draw(200, 1) and drawn != bench.draw(200, 2)
    assert {fault.kind for fault in drawn} == {"kill", "time", "write", "full", "SIGTERM", "SIGINT"}
    assert {(fault.world_size, fault.victim) for fault in drawn} == {(1, 0), (2, 0), (2, 1)}
    places = {fault.place for fault in drawn if fault.kind == "kill"}
    assert len(places) > 50


# --------------------------------------------------------------------------------------------------
# Signals


def signalled(argv: list[str], number: int, at: int, twice: bool) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    original = train_gpt.momentum_at

    def momentum_at(schedule: Any, step: int) -> float:
        if step == at:
            for _ in range(1 + twice):
                os.kill(os.getpid(), number)
        return original(schedule, step)

    train_gpt.momentum_at = momentum_at
    train(argv)


@pytest.mark.parametrize("number, twice", [(signal.SIGTERM, False), (signal.SIGINT, False),
                                           (signal.SIGHUP, False), (signal.SIGTERM, True)])  # fmt: skip
def test_a_signal_saves_before_the_run_ends(
    tmp_path: Path, bench: faults.Bench, number: int, twice: bool
) -> None:
    """Also without --checkpoint_every, and no step is done twice; a cluster may send SIGTERM to
    every process twice."""
    argv = options(out=tmp_path)
    assert finish(start(signalled, [(argv, number, 8, twice)])) == [128 + number]
    # head and embed wait for every second step
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["step_000010.pt"]
    outcome = train([*argv, "--resume"])
    steps = [line["step"] for line in outcome.lines if line["event"] == "step"]
    assert steps == list(range(1, 21))
    assert [line["step"] for line in outcome.lines if line["event"] == "resume"] == [10]
    assert outcome.losses == bench.reference[1].losses
    assert faults.differing_bits(outcome.params, bench.reference[1].params) == 0


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    assert finish(start(signalled, [(options(out=tmp_path), signal.SIGINT, 8, True)])) == [130]
    assert not list(tmp_path.rglob("*.pt")) and events(next(tmp_path.glob("*.jsonl")))[-1]["step"] == 8


def test_a_signal_at_the_last_step_ends_the_run_as_usual(tmp_path: Path) -> None:
    assert finish(start(signalled, [(options(out=tmp_path), signal.SIGTERM, 19, False)])) == [0]
    assert events(next(tmp_path.glob("*.jsonl")))[-1]["event"] == "final"


# --------------------------------------------------------------------------------------------------
# A rank that fails


def failing(rank: int, port: int, argv: list[str], folder: Path, how: str) -> None:
    if rank == 1:
        original = train_gpt.Trainer.forward_backward
        calls = []

        def forward_backward(self: train_gpt.Trainer, *args: Any) -> Any:
            calls.append(1)
            if len(calls) == 20:
                if how == "raises":
                    raise RuntimeError("the roof is on fire")
                if how == "refuses":
                    raise ValueError("this rank alone has no data")
                if how == "hangs":
                    time.sleep(1000)
                if how == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if how == "dies":
                    os._exit(7)
            result = original(self, *args)
            if how == "nan" and len(calls) == 20:
                self.model.lm_head.grad[3, 5] = torch.nan
            return result

        train_gpt.Trainer.forward_backward = forward_backward
    faults.child(rank, 2, port, argv, folder, None, False)


def fail(folder: Path, how: str, *more: str) -> tuple[list[int | None], list[str], float]:
    """Exit codes (None: did not end), what each rank said, seconds until rank 0 ended."""
    port = faults.free_port()
    folder.mkdir(exist_ok=True)
    argv = [*options(out=folder / "out", evaluation__log_every=4), *more]
    processes = start(failing, [(rank, port, argv, folder, how) for rank in range(2)])
    began = time.monotonic()
    processes[0].join(60)
    seconds = time.monotonic() - began
    processes[1].join(3 if how == "stops" else 20)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, [(folder / f"output_{rank}").read_text() for rank in range(2)], seconds


@pytest.mark.parametrize("how, words", [("raises", "rank 1: RuntimeError: the roof is on fire"),
                                        ("refuses", "rank 1: this rank alone has no data"),
                                        ("dies", "")])  # fmt: skip
def test_a_rank_that_fails_ends_all(tmp_path: Path, how: str, words: str) -> None:
    codes, said, _ = fail(tmp_path / how, how)
    assert all(codes) and None not in codes
    assert words in said[1]
    assert said[0].splitlines()[-1].startswith("train_gpt.py: rank 0: lost the connection to another rank (")
    assert how != "raises" or "Traceback" in said[1]  # a defect of the program itself
    no_traceback(said[0], *([] if how == "raises" else said[1:2]))


@pytest.mark.parametrize("how", ["hangs", "stops"])
def test_a_rank_that_hangs_ends_all(tmp_path: Path, how: str) -> None:
    codes, said, seconds = fail(tmp_path / how, how, "--timeout", "5")
    # a stopped process is the launcher's to kill
    assert codes[0] == 1
    assert codes[1] == (1 if how == "hangs" else None)
    blame = "no progress for 5 s (--timeout), held up by rank 1"
    assert blame in said[0] or blame in said[1] and "lost the connection" in said[0]
    assert seconds < 40
    no_traceback(*said)


def test_a_gradient_that_is_not_finite_is_located_on_any_rank(tmp_path: Path) -> None:
    codes, said, _ = fail(tmp_path / "nan", "nan")
    assert codes == [1, 1] and said[1].count("train_gpt.py:") == 0
    (sentence,) = [line for line in said[0].splitlines() if line.startswith("train_gpt.py:")]
    assert "gradients of lm_head since step" in sentence


# --------------------------------------------------------------------------------------------------
# Under torchrun

LONG = dict(data__epochs=40, schedule__steps=300, schedule__extension=0, evaluation__every=100)


def torchrun(out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=3", "--monitor-interval=0.1", str(ROOT / "train_gpt.py"),
               *options(out=out, **LONG), *more]  # fmt: skip
    return subprocess.Popen(
        command, stdout=open(f"{out}.txt", "wb"), stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def test_under_torchrun_ranks_may_be_killed_and_the_launcher_too(tmp_path: Path) -> None:
    """One run: a rank is killed (torchrun restarts all), the launcher is killed (nothing stays),
    Ctrl-C (it saves)."""
    out = tmp_path / "out"
    argv = ["--resume", "--checkpoint_every", "20"]
    job = torchrun(out, *argv)
    try:
        wait_for(lambda: faults.last_step(out) > 30)
        os.kill(faults.workers(job.pid)[1], signal.SIGKILL)
        wait_for(lambda: b'"resume"' in next(out.glob("*.jsonl")).read_bytes() and faults.last_step(out) > 60)
        ranks = faults.workers(job.pid)
        assert len(ranks) == 2
        job.kill()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 20)

        job = torchrun(out, *argv)
        before = faults.last_step(out)
        wait_for(lambda: len(faults.workers(job.pid)) == 2 and faults.last_step(out) > before + 10)
        ranks = faults.workers(job.pid)
        job.send_signal(signal.SIGINT)
        assert job.wait(60) != 0
        assert b"stopped and saved at step" in Path(f"{out}.txt").read_bytes()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 20)
    finally:
        job.kill()
    (log,) = out.glob("*.jsonl")
    lines = events(log)
    assert [line["event"] for line in lines].count("resume") == 2
    steps = [line["step"] for line in lines if line["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def two_nodes(out: Path, **overrides: Any) -> list[subprocess.Popen]:
    """Two agents of torchrun with a process each, as on two machines; they meet on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
        "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=two",
        "--local_addr=127.0.0.1", "--monitor-interval=0.1",
        str(ROOT / "train_gpt.py"), *options(out=out, **overrides),
    ]  # fmt: skip
    return [
        subprocess.Popen(command, stdout=open(f"{out}.{node}.txt", "wb"), stderr=subprocess.STDOUT)
        for node in range(2)
    ]


def test_two_nodes_train_as_one_with_two_processes(tmp_path: Path) -> None:
    """The same bits; where one of the two agents is killed, the other one ends."""
    (one,) = train_with(2, [options(out=tmp_path / "one")], dict(os.environ), tmp_path / "processes")
    for job in two_nodes(tmp_path / "two"):
        assert job.wait(60) == 0
    (log,) = (tmp_path / "two").glob("*.jsonl")
    assert Outcome(log=log).losses == one[0].losses

    first, second = two_nodes(tmp_path / "killed", **LONG)
    try:
        wait_for(lambda: faults.last_step(tmp_path / "killed") > 10)
        second.kill()
        assert first.wait(45) != 0
        wait_for(lambda: not faults.workers(first.pid), 10)
    finally:
        first.kill()
        second.kill()


def test_a_restart_after_the_end_of_the_run_does_not_train_again(tmp_path: Path) -> None:
    """torchrun restarts all ranks also when one dies after the last step; a new torchrun trains a new run."""
    argv = [sys.executable, str(ROOT / "train_gpt.py"), *options(out=tmp_path), "--resume",
            "--checkpoint_every", "4"]  # fmt: skip
    for starts, runs in ((2, 1), (1, 2)):
        # such as torchrun has
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for restart in range(starts):
            place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "none",
                     "TORCHELASTIC_RESTART_COUNT": str(restart),
                     "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
            done = subprocess.run(argv, env=os.environ | place, capture_output=True, text=True)
            assert done.returncode == 0 and len(list(tmp_path.glob("*.jsonl"))) == runs, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_a_rank_that_starts_dies_with_its_launcher(tmp_path: Path) -> None:
    """It has asked for the store of the ranks, which does not answer, when the process that started
    it is killed."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(store.getsockname()[1]), "TORCHELASTIC_RUN_ID": "a",
                 "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        argv = [sys.executable, str(ROOT / "train_gpt.py"), *options(out=tmp_path)]
        launcher = subprocess.Popen([sys.executable, "-c",
                                     "import subprocess, sys; subprocess.run(sys.argv[1:])", *argv],
                                    env=os.environ | place, stderr=subprocess.DEVNULL)  # fmt: skip
        store.settimeout(60)
        with store.accept()[0]:
            (rank,) = faults.workers(launcher.pid)
            launcher.kill()
            launcher.wait()
            wait_for(lambda: not Path(f"/proc/{rank}").exists(), 10)
