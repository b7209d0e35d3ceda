"""Does this project work with a version of torch? `tiny` for 20 steps, compiled and not, and all tests.

    python tools/versions.py 2.11.0 2.13.0                  makes an environment for each version, then runs
    python tools/versions.py 2.11.0 --python python3.12     with another Python
    python tools/versions.py OTHER/bin/python               an interpreter that has torch, as it is
    python tools/versions.py OTHER/bin/python --part 2/3    a third of the test files; `tiny` is in the first
    python tools/versions.py --table                        only writes the table again

Environments lie in .cache/versions, results in tools/versions.json, the table in tools/README.md. A version
takes a quarter of an hour on one core.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "tools" / "versions.json", ROOT / "tools" / "README.md"
FOLDER = ROOT / ".cache" / "versions"  # of the environments
BEGIN, END = "<!-- begin versions -->\n", "<!-- end versions -->\n"
NEWS = 10.0  # seconds: the most without a word
TINY = ["--track", "tiny", "--schedule.steps", "20", "--show", "false", "--device", "cpu"]


@contextlib.contextmanager
def heard(what: str) -> Iterator[None]:
    """Every NEWS seconds it is said what is being done, and for how long by now."""
    ended, began = threading.Event(), time.monotonic()

    def keep_saying() -> None:
        print(what, flush=True)
        while not ended.wait(NEWS):
            print(f"{what}, {time.monotonic() - began:.0f} s", flush=True)

    threading.Thread(target=keep_saying, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


# ---- interpreters


def requirements() -> list[str]:
    """What training and tests need besides torch, pinned as everywhere."""
    lines = [*(ROOT / "requirements.txt").read_text().splitlines(),
             *(ROOT / "requirements-dev.txt").read_text().splitlines()]  # fmt: skip
    return [line for line in lines if line[:1].isalpha() and not line.startswith("torch")]


def interpreter(word: str, python: str) -> Path:
    """The Python of an environment with this version of torch, made where there is none; or a given one.

    ValueError where it cannot be had.
    """
    if not word[:1].isdigit():
        given = Path(word).absolute()  # not resolved: a link in an environment is that environment
        if not given.is_file():
            raise ValueError(f"{word} is neither a version of torch nor an interpreter")
        return given
    folder = FOLDER / f"torch-{word}-{Path(python).name}"
    if not (folder / "done").exists():
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        steps = [[python, "-m", "venv", str(folder)], [*pip, f"torch=={word}", *requirements()]]
        with heard(f"installing torch {word} into {folder}"):
            for step in steps:
                try:
                    done = subprocess.run(step, capture_output=True, text=True)
                except OSError as error:
                    raise ValueError(f"{python} cannot be run ({error.strerror})") from None
                if done.returncode:
                    why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
                    raise ValueError(f"no environment with torch {word}: {why}")
        (folder / "done").touch()
    return folder / "bin" / "python"


def versions_of(python: Path) -> dict[str, str]:
    """The versions of torch and Python of an interpreter; ValueError where it has no torch."""
    code = "import platform, torch; print(torch.__version__, platform.python_version())"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{python} cannot import torch ({(done.stderr.strip().splitlines() or ['?'])[-1]})")
    torch, version = done.stdout.split()
    return {"torch": torch, "python": version}


# ---- what is run


def tiny(python: Path, compiled: str) -> dict[str, Any]:
    """Loss and seconds of 20 steps of `tiny`, with an empty cache; or the last line that it said."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place, heard(f"tiny, --compile {compiled}"):
        words = [str(python), "train_gpt.py", *TINY, "--compile", compiled, "--out", f"{place}/logs"]
        places = os.environ | {"CACHE_DIR": f"{place}/cache"}
        done = subprocess.run(words, cwd=ROOT, env=places, capture_output=True, text=True)
        logs = [*Path(place, "logs").glob("*.jsonl")]
        last = json.loads(logs[0].read_text().splitlines()[-1]) if logs else {}
    if done.returncode or last.get("event") != "final":
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return {"loss": last["val_loss"], "seconds": round(time.monotonic() - began, 1)}


def part_of_the_tests(part: str) -> list[Path]:
    """The test files of part "i/n"; ValueError for another form."""
    first, _, count = part.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ValueError(f"--part is i/n, such as 2/3, not {part!r}")
    return sorted((ROOT / "tests").glob("test_*.py"))[int(first) - 1 :: int(count)]


def tests(python: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """By test file: how many tests passed, were skipped and failed, and which failed."""
    with tempfile.TemporaryDirectory() as place, heard(f"{len(files)} files of tests"):
        report = Path(place, "report.xml")
        words = [str(python), "-m", "pytest", "-q", "--continue-on-collection-errors"]
        words += [f"--junitxml={report}", *map(str, files)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not report.exists():
            raise ValueError(f"the tests did not run: {(done.stdout + done.stderr).strip()[-300:]}")
        return counted(ElementTree.parse(report).getroot(), [file.stem for file in files])


def counted(report: ElementTree.Element, files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The numbers of a report by pytest in JUnit's form, by file."""
    found = {name: {"passed": 0, "skipped": 0, "failed": 0, "failures": []} for name in files}
    for case in report.iter("testcase"):
        # of a file that cannot be imported there is only the name
        name = (case.get("classname") or case.get("name")).split(".")[-1]
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[name][result] += 1
        if result == "failed":
            found[name]["failures"].append(case.get("name"))
    return found


# ---- results and table


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each pair of versions, the oldest torch first, then what failed."""
    titles = ["torch", "Python", "source", "`tiny`, 20 steps", "compiled", "test files"]
    titles += ["passed", "skipped", "failed"]
    lines, failures = [titles, ["---"] * len(titles)], []
    for result in sorted(results, key=lambda x: [numbers(x["torch"]), numbers(x["python"])]):
        files = result["tests"].values()
        ran = f"{len(files)} of {result['files']}"
        sums = [sum(file[kind] for file in files) for kind in ("passed", "skipped", "failed")]
        runs = [result["tiny"].get(mode, {}) for mode in ("none", "whole")]
        runs = [f"loss {x['loss']:.4f}" if "loss" in x else "failed" if x else "not run" for x in runs]
        lines.append([result["torch"], result["python"], result["source"], *runs, *map(str, [ran, *sums])])
        for file, found in sorted(result["tests"].items()):
            failures += [f"- torch {result['torch']}, Python {result['python']}: `{file}.py::{name}`"
                         for name in found["failures"]]  # fmt: skip
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + ("\n\nFailed:\n\n" + "\n".join(failures) if failures else "")


def numbers(version: str) -> list[int]:
    return [int(x) for x in version.partition("+")[0].split(".")]


def write_table(results: Sequence[dict[str, Any]]) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n\n{END}{after}")


def examine(word: str, python: str, part: str, results: list[dict[str, Any]]) -> None:
    """Run what is to be run with an interpreter, and note it in the results, which are saved."""
    files = part_of_the_tests(part)
    chosen = interpreter(word, python)
    versions = versions_of(chosen)
    source = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()[:12]
    new = {**versions, "source": source, "tiny": {}, "files": 0, "tests": {}}
    same = [x for x in results if all(x[key] == new[key] for key in ("torch", "python"))]
    # parts of one source add up
    found = next((x for x in same if x["source"] == source), new)
    results[:] = [x for x in results if x not in same] + [found]
    print(f"torch {versions['torch']}, Python {versions['python']}")
    found["files"] = len(part_of_the_tests("1/1"))
    if part.startswith("1/"):
        found["tiny"] = {compiled: tiny(chosen, compiled) for compiled in ("none", "whole")}
    found["tests"] |= tests(chosen, files)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_table(results)
    print(table([found]))


def main(words: Sequence[str]) -> None:
    if not words or {"--help", "-h"} & {*words}:
        return print(__doc__.strip())
    options, words = {"--python": sys.executable, "--part": "1/1"}, list(words)
    for name in options:
        if name in words:
            at = words.index(name)
            options[name] = "".join(words[at + 1 : at + 2])
            del words[at : at + 2]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    try:
        if "--table" in words:
            return write_table(results)
        for word in words:
            examine(word, options["--python"], options["--part"], results)
    except ValueError as error:
        sys.exit(f"versions.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
