"""Two builds of train_gpt.py side by side: what they are, which names their settings have, and their runs.

same_results.py compares what the runs leave. A build is a copy of the script, known by its sha256. It
runs in processes of its own, on made-up data (`make_data`), and a run that is there already is not done
again (`Workplace.run`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))
import shards  # noqa: E402

from .names import words_for  # noqa: E402

Options = Mapping[str, Any]  # settings by name: {"matrix.lr": 0.02}


@dataclasses.dataclass(frozen=True)
class Build:
    """A train_gpt.py under test."""

    side: str  # OLD or NEW
    name: str  # a file's name, or a git revision with its commit
    script: Path  # a copy that nobody changes meanwhile
    digest: str  # its sha256
    again: bool = False  # NEW is OLD: its runs are done all the same, which shows that they repeat

    def words(self, options: Options) -> list[str]:
        """A command line in the names that this build knows."""
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return words_for(self.script, words)


def load_build(side: str, name: str, folder: Path) -> Build:
    """Copy a file, or what a git revision has as train_gpt.py, to a folder; ValueError when it is neither."""
    if Path(name).is_file():
        name, content = Path(name).name, Path(name).read_bytes()
    else:
        content = git("show", f"{name}:train_gpt.py")
        commit = git("rev-parse", "--short=12", f"{name}^{{commit}}").decode().strip()
        name = name if commit.startswith(name) else f"{name} ({commit})"
    digest = hashlib.sha256(content).hexdigest()
    script = folder / digest[:12] / "train_gpt.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_bytes(content)
    said = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    if said.returncode:
        raise ValueError(f"{side} {name} does not start: {last_line(said.stderr)}")
    return Build(side, name, script, digest)


def git(*words: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True)
    if done.returncode:
        revision = words[-1].partition(":")[0].partition("^")[0]
        raise ValueError(f"{revision} is neither a file nor a git revision with a train_gpt.py")
    return done.stdout


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def reason(text: str) -> str:
    """What a failed run says itself, not what torchrun adds."""
    own = [line for line in text.splitlines() if line.startswith("train_gpt.py:")]
    return own[-1] if own else last_line(text)


# --- data


def make_corpus(folder: Path, vocab_size: int, counts: Mapping[str, int]) -> None:
    """Shards with so many tokens each, of phrases that come again and again, the same in every call.

    The last token of the vocabulary starts a document.
    """
    random, start, files = np.random.default_rng(0), vocab_size - 1, {}
    phrases = [((start - 1) ** random.random(random.integers(2, 7))).astype(int) for _ in range(2000)]
    for name, count in counts.items():
        tokens: list[int] = []
        while len(tokens) < count:
            tokens.append(start)
            for i in random.integers(0, len(phrases), 1 + int(random.lognormal(3, 1))):
                tokens += phrases[i].tolist()
        files[name] = shards.write_shard(folder / name, np.array(tokens[:count]))
    shards.write_manifest(folder, folder.name, vocab_size, start, files)


def make_data(folder: Path) -> Path:
    """A DATA_DIR for all cases: made-up tokens, and the works of Shakespeare where they are here."""
    real, link = shards.data_dir() / "shakespeare", folder / "shakespeare"
    if (real / shards.MANIFEST).is_file() and not link.exists():
        folder.mkdir(parents=True, exist_ok=True)
        link.symlink_to(real.resolve())
    few = {"train_000001.bin": 10_000, "train_000002.bin": 150_000, "val_000000.bin": 8_000}
    for corpus, vocab_size, counts in (
        ("fineweb10B", 50257, few),
        ("few_tokens", 1025, few),
        ("few_bytes", 257, {"val_000000.bin": 20_000}),
        ("shakespeare", 257, {"train_000001.bin": 2_000_000, "val_000000.bin": 460_000}),
    ):
        if not (folder / corpus / shards.MANIFEST).is_file():
            make_corpus(folder / corpus, vocab_size, counts)
    return folder


# --- runs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left in its folder."""

    folder: Path

    def file(self, pattern: str) -> Path:
        """The one file of this pattern; ValueError when there is none or more than one."""
        found = [*self.folder.glob(pattern)]
        if len(found) != 1:
            raise ValueError(f"a run left {len(found)} files {pattern}")
        return found[0]

    def checkpoint(self, step: int) -> Path:
        return self.file(f"*/step_{step:06d}.pt")

    def losses(self, after: int = 0) -> list[tuple[str, int, float | None, int]]:
        """(event, step, loss, tokens) of all losses in the log after a step, in its order."""
        key = {"step": "train_loss", "val": "val_loss", "final": "val_loss"}
        lines = [json.loads(line) for line in self.file("*.jsonl").read_text().splitlines()]
        events = [line for line in lines if line["event"] in key and line["step"] > after]
        return [(line["event"], line["step"], line[key[line["event"]]], line["tokens"]) for line in events]


class Workplace:
    """The folder of a comparison, with its data, compile cache and runs, and how a build runs there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = make_data(folder / "data")
        self.environment = {"DATA_DIR": str(self.data), "CACHE_DIR": str(folder / "cache")}
        manifests = sorted(self.data.glob(f"*/{shards.MANIFEST}"))
        self.machine = [*machine(), *(hashlib.sha256(path.read_bytes()).hexdigest() for path in manifests)]

    def call(
        self, build: Build, options: Options, processes: int = 1, start: Sequence[str] = ()
    ) -> subprocess.CompletedProcess:
        """Run a build to its end and keep what it prints; `start`: words that stand for the script."""
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [*(start or [str(build.script)]), *build.words(options)]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder,
            env=os.environ | self.environment | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = child.communicate()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    def run(self, build: Build, options: Options, processes: int = 1, resumed: Path | None = None) -> Outcome:
        """A run to its end, or what an earlier call left of the same; ValueError when the build cannot do it.

        `resumed`: a checkpoint from which the run goes on as the same run, in a copy of its folder.
        """
        what = [build.words(options), processes, build.digest, self.machine, resumed and str(resumed)]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        folder = self.folder / "runs" / f"{build.digest[:12]}_{key}{'_again' * build.again}"
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if resumed:
                (folder / resumed.parent.name).mkdir()
                options = {**options, "resume": shutil.copy(resumed, folder / resumed.parent.name)}
                shutil.copy(resumed.parent.with_suffix(".jsonl"), folder)
            ended = self.call(build, {**options, "out": folder}, processes)
            if ended.returncode:
                raise ValueError(f"{build.side} failed: {reason(ended.stderr)}")
            (folder / "done").touch()
        return Outcome(folder)


def machine() -> list[str]:
    """Processor and versions: between those, results may differ."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    python, numpy = platform.python_version(), np.__version__
    return [f"{os.cpu_count()} x {cpu}", f"Python {python}", f"torch {torch.__version__}", f"numpy {numpy}"]
