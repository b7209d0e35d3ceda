"""Everything that needs a GPU, checked and measured in one go of at most nine minutes.

    python tools/on_gpu.py OUT                      track short on one GPU
    python tools/on_gpu.py OUT --attention fa3      any option of train_gpt.py may follow

Runs one after the other: the tests that need a GPU; a start with an empty compile cache and one with a
full one; the profile of a step, plain, with --memory low, compiled as a whole and on other attention
kernels where there are any. What was left out for want of time is named. Tokens come from DATA_DIR, or
are made up where it has none: times and memory do not depend on them. All output, logs and results.json
lie in OUT (as do a compile cache and made-up shards, which nobody needs later); the last thing printed
is a table.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
import train_gpt  # noqa: E402
from lib import made_up  # noqa: E402

SECONDS = 520
STEPS = 12
SHORT_RUN = {
    "schedule.steps": STEPS,
    "schedule.extension": 0,
    "evaluation.every": 1000,
    "evaluation.log_every": 1,
}


def file_name(name: str, ending: str) -> str:
    return name.replace(",", "").replace(" ", "_") + ending


class Measurements:
    """Commands one after the other until the time is up; their output goes to OUT."""

    def __init__(self, out: Path, seconds: float):
        self.out, self.end, self.results = out, time.monotonic() + seconds, {}

    def save(self) -> None:
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")

    def run(
        self, name: str, command: list[str], at_least: float, at_most: float = 240, **environment: str
    ) -> bool:
        """Whether the command ended well; it is left out when less than `at_least` seconds remain."""
        left, began = min(at_most, self.end - time.monotonic()), time.monotonic()
        if left < at_least:
            self.results[name] = {"status": "left out"}
            return False
        with open(self.out / file_name(name, ".txt"), "w") as file:
            try:
                done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=left,
                                      env=os.environ | environment)  # fmt: skip
                status = "good" if done.returncode == 0 else f"status {done.returncode}"
            except subprocess.TimeoutExpired:
                status = "out of time"
        self.results[name] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        print(f"{name}: {status}, {self.results[name]['seconds']} s", flush=True)
        self.save()
        return status == "good"


def measure(measurements: Measurements, options: list[str]) -> None:
    out, results = measurements.out, measurements.results
    python, cache = sys.executable, {"CACHE_DIR": str(out / "cache")}
    shutil.rmtree(out / "cache", ignore_errors=True)
    tests = ["tests/test_kernels_on_gpu.py", "tests/test_attention.py"]
    measurements.run("tests", [python, "-m", "pytest", "-q", *tests], 60, 150)
    short = [word for name, value in SHORT_RUN.items() for word in (f"--{name}", str(value))]

    quiet = ["--show", "false"]

    def start(name: str) -> None:
        folder = out / file_name(name, "")
        shutil.rmtree(folder, ignore_errors=True)
        if measurements.run(
            name, [python, "train_gpt.py", *options, *short, "--out", str(folder), *quiet], 30, **cache
        ):
            header, *lines = [
                json.loads(line) for line in next(folder.glob("*.jsonl")).read_text().splitlines()
            ]
            step_s = (lines[-1]["train_time_s"] - lines[1]["train_time_s"]) / (STEPS - 2)
            results[name] |= {"startup_s": header["startup_s"], "step_s": step_s, "head": header["head"],
                              "peak_memory_bytes": lines[-1]["peak_memory_bytes"]}  # fmt: skip

    def profile(name: str, *more: str) -> None:
        place = out / file_name(f"profile, {name}", ".json")
        command = [python, "tools/step_profile.py", *options, *short, *more, "--json", str(place)]
        if measurements.run(f"profile, {name}", command, 60, **cache):
            results[f"profile, {name}"] |= {"profile": json.loads(place.read_text())}

    start("empty cache")
    # what matters most comes first: the time is bounded
    profile("plain", "--trace", str(out / "trace.json.gz"))
    start("full cache")
    profile("low memory", "--memory", "low")
    for kind, module in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module) and train_gpt.supports(torch.device("cuda"), kind):
                profile(kind, "--attention", kind)
    profile("compiled as a whole", "--compile", "whole")


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| part | status | start, s | step, ms | MFU | peak memory, GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        profile = found.get("profile", {})
        start = f"{sum(found['startup_s'].values()):.1f}" if "startup_s" in found else ""
        step = profile.get("step_ms", 1e3 * found.get("step_s", 0))
        memory = profile.get("peak_memory_bytes", found.get("peak_memory_bytes", 0)) / 1e9
        mfu = f"{profile['mfu']:.1%}" if profile else ""
        lines.append(f"| {name} | {found['status']} | {start} | {f'{step:.1f}' if step else ''} | {mfu} | "
                     f"{f'{memory:.1f}' if memory else ''} |")  # fmt: skip
    for name in ("empty cache", "full cache"):
        if "startup_s" in results.get(name, {}):
            parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in results[name]["startup_s"].items())
            lines.append(f"\nstart with {name}: {parts}")
    return "\n".join(lines)


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if words[:1] in (["--help"], ["-h"]) else 2)
    out, options = Path(words[0]).absolute(), words[1:]
    if "--track" not in options:
        options += ["--track", "short"]
    if why := train_gpt.cannot_write(out):
        sys.exit(f"on_gpu.py: OUT {out} cannot be written ({why})")
    out.mkdir(parents=True, exist_ok=True)
    try:
        track, _ = train_gpt.parse_command_line(options)
    except ValueError as error:
        sys.exit(f"on_gpu.py: {error}")
    folder = Path(os.environ.get("DATA_DIR", ROOT / "data"))
    if not (folder / track.data.corpus / "manifest.json").exists():
        os.environ["DATA_DIR"] = str(out / "data")
        made_up.make_tokens(out / "data" / track.data.corpus, track, STEPS)
    measurements = Measurements(out, SECONDS)
    measure(measurements, options)
    measurements.save()
    print("\n" + "\n\n".join((out / file_name(name, ".txt")).read_text() for name in measurements.results
                             if "profile" in measurements.results[name]))  # fmt: skip
    print(table(measurements.results))
    sys.exit(int(any(found["status"].startswith("status") for found in measurements.results.values())))


if __name__ == "__main__":
    main()
