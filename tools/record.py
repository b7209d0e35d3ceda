"""Records that verify themselves: run a script several times, compare two, check a claim, draw tables
and figures.

    python tools/record.py run --track tiny --name NAME --runs 5 [--source FILE] [-- --matrix.lr 0.02 ...]
    python tools/record.py ab --baseline DIR_OR_FILE --candidate DIR_OR_FILE --pairs 5 [--until-decided]
    python tools/record.py verify [DIR ...]         does each folder prove its claim? none: every record
    python tools/record.py rules DIR                does its checkpoint keep the rule on memory?
    python tools/record.py plan --sd 0.003 --margin 0.004 --power 0.9
    python tools/record.py table [--check]          the tables of README.md and of the pages in records/
    python tools/record.py plot curves|leading|history ...
    python tools/record.py import DIR               statistics of logs of the public speedrun
    python tools/record.py public CLONE --out records/public.md

A record is a folder records/<track>/<date>_<name>/ with train_gpt.py as run, runs/*.jsonl, pairs.jsonl
when it was timed against another, a README.md that says what changed, and result.json, which this tool
computes from the logs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib import memory_rule, stats
from lib.claims import (
    ROOT,
    read_pairs,
    read_runs,
    record_folders,
    rules,
    unknown_track,
    verify,
    write,
    write_result,
)
from lib.logs import Run, public_runs
from lib.names import knows
from lib.public import groups_of, page, survey
from lib.runner import Record, alone, exit_status, new_record, positive, run_script
from lib.tables import chance, claim, fastest, history, number, page_text, pages, title, with_tables


def command_run(a: argparse.Namespace) -> int:
    folder = new_record(a.root, a.track, a.name, a.source, must_exist=a.runs == 0)
    record = Record(folder, a.overrides, a.processes)
    record.planned = a.runs
    done = min(a.runs, len(record.runs))
    with alone(a.root), tqdm(total=a.runs, initial=done, unit="run", dynamic_ncols=True) as bar:
        while len(record.runs) < a.runs:
            run = record.run(record.next_seed(), bar)
            bar.update()
            final = run.final
            bar.write(f"{run.path.name}: validation loss {final['val_loss']:.4f} "
                      f"after {final['step']} steps, {final['train_time_s']:.2f} s")  # fmt: skip
    print(claim(write_result(folder)))
    return 0


def side(a: argparse.Namespace, path: Path, name: str | None, overrides: list[str]) -> Record:
    """A record folder as it is, or a new one for a script."""
    if (path / "train_gpt.py").is_file():
        return Record(path.resolve(), overrides, a.processes)
    if path.is_dir():
        raise ValueError(f"{path} is no record folder: it holds no train_gpt.py")
    if not name:
        raise ValueError(f"{path} is a file: --name says what its record folder is called")
    return Record(new_record(a.root, a.track, name, path), overrides, a.processes)


def command_ab(a: argparse.Namespace) -> int:
    baseline = side(a, a.baseline, a.name and f"{a.name}-baseline", [])
    candidate = side(a, a.candidate, a.name, a.overrides)
    if baseline.folder == candidate.folder or baseline.folder.parent != candidate.folder.parent:
        raise ValueError("baseline and candidate are two record folders of the same track")
    path, planned = candidate.folder / "pairs.jsonl", None if a.until_decided else a.pairs

    def ours() -> list[dict[str, Any]]:
        return [pair for pair in read_pairs(candidate.folder) if pair["baseline"] == baseline.folder.name]

    def valid() -> int:
        return sum(not pair["discarded"] for pair in ours())

    most, began = a.max_pairs if a.until_decided else a.pairs, time.monotonic()
    baseline.beside, candidate.beside = candidate.folder.name, baseline.folder.name
    candidate.planned = planned and len(candidate.runs) + max(0, planned - valid())

    def add(runs: dict[Record, Run], order: str, discarded: str | None) -> None:
        ids = {record: run.header["run_id"] for record, run in runs.items()}
        line = {
            "baseline": baseline.folder.name, "order": order, "planned": planned,
            "baseline_run": ids.get(baseline, ""), "candidate_run": ids.get(candidate, ""),
            "discarded": discarded,
        }  # fmt: skip
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    with alone(a.root), tqdm(total=most, initial=min(most, valid()), unit="pair", dynamic_ncols=True) as bar:
        for record, run in halves(baseline, candidate, ours()):
            order = "baseline first" if record is baseline else "candidate first"
            add({record: run}, order, "interrupted after its first run")
        if valid() < most:
            for record in (baseline, candidate):
                bar.set_postfix_str(f"filling the compile cache of {record.folder.name}")
                record.run(0, bar, only_warm=True)
        while valid() < most and not (
            a.until_decided and (settled(baseline, candidate, ours()) or overdue(a, began))
        ):
            order = "baseline first" if len(ours()) % 2 == 0 else "candidate first"
            sides = (baseline, candidate) if order == "baseline first" else (candidate, baseline)
            runs = {record: record.run(record.next_seed(), bar) for record in sides}
            compiled = any(run.final["compiles_in_timed_region"] for run in runs.values())
            for record, run in runs.items() if compiled else ():
                record.discard(run)
            add(runs, order, "a compile inside the clock" if compiled else None)
            ratio = runs[candidate].final["train_time_s"] / runs[baseline].final["train_time_s"]
            bar.write(f"pair {len(ours())}: time ratio {ratio:.4f}" + (", discarded" if compiled else ""))
            bar.update(not compiled)
    write_result(baseline.folder)
    result = write_result(candidate.folder)
    print(claim(result))
    return 0


def halves(baseline: Record, candidate: Record, pairs: list[dict[str, Any]]) -> list[tuple[Record, Run]]:
    """The runs of this A/B whose pair was interrupted: they are in no line of pairs.jsonl yet."""
    found = []
    for record, name in ((baseline, "baseline_run"), (candidate, "candidate_run")):
        named = {pair[name] for pair in pairs}
        for run in (*record.runs, *read_runs(record.folder, "discarded")):
            begun = run.plan and run.plan["beside"] == record.beside
            if begun and run.header["run_id"] not in named:
                found.append((record, run))
    return found


def settled(baseline: Record, candidate: Record, pairs: list[dict[str, Any]]) -> bool:
    """Whether `stats.sequential` has decided both questions of a record.

    Time: the candidate is faster, or slower, or within 1% of the baseline. Loss: its mean is below the
    target or above.
    """
    runs = [{run.header["run_id"]: run for run in record.runs} for record in (baseline, candidate)]
    good = [pair for pair in pairs if not pair["discarded"]]
    couples = [(runs[0][pair["baseline_run"]].final, runs[1][pair["candidate_run"]].final) for pair in good]
    time_rule = stats.sequential([math.log(c["train_time_s"] / b["train_time_s"]) for b, c in couples])
    loss_rule = stats.sequential([run.final["val_loss"] - run.final["target"] for run in candidate.runs])
    equal = max(abs(time_rule["low"]), abs(time_rule["high"])) < 0.01
    return (equal or decided(time_rule)) and decided(loss_rule)


def decided(rule: dict[str, Any]) -> bool:
    return min(rule["p_below"], rule["p_above"]) < stats.ALPHA


def overdue(a: argparse.Namespace, began: float) -> bool:
    return a.minutes is not None and time.monotonic() - began > 60 * a.minutes


def command_verify(a: argparse.Namespace) -> int:
    folders = a.folders or record_folders(a.root)
    if not folders:
        raise ValueError(f"{a.root} holds no record")
    reports, bad = [], False
    for folder in tqdm(folders, unit="record", disable=len(folders) < 2 or None):
        try:
            result = verify(folder.resolve())
            text = claim(result) + f"\n  {'holds' if result['holds'] else 'DOES NOT HOLD'}"
            reports.append(result)
        except ValueError as error:
            text = f"{folder.name}: REFUSED\n" + "\n".join(f"  {line}" for line in str(error).splitlines())
            result = {}
            reports.append({"name": folder.name, "holds": False, "refused": str(error).splitlines()})
        bad |= not result.get("holds")
        if not a.json:
            print(text)
    if a.json:
        print(json.dumps(reports, indent=1))
        return int(bad)
    for line in fastest([report for report in reports if report["holds"]]):
        print(line)
    return int(bad)


def command_rules(a: argparse.Namespace) -> int:
    folder = a.folder.resolve()
    script, track = folder / "train_gpt.py", folder.parent.name
    if not rules(track):
        raise ValueError(f"{folder}: {unknown_track(track)}")
    if not knows(script, "evaluate"):
        raise ValueError(f"{script} is missing or has no option --evaluate, with which the rule is checked")
    corpus = Path(os.environ.get("DATA_DIR") or ROOT / "data") / rules(track)["data.corpus"]
    by_age = sorted(folder.glob("**/step_*.pt"), key=lambda path: path.stat().st_mtime_ns)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = a.checkpoint or (by_age or [None])[-1]
        if checkpoint is None:
            print(f"{folder} has no checkpoint: a run for one, which is thrown away", flush=True)
            checkpoint = checkpoint_of_a_run(Record(folder, [], a.processes), Path(scratch))
        flaws = memory_rule.broken(memory_rule.measure_apart(script, checkpoint, track, corpus))
    for flaw in flaws:
        print(f"{folder.name}: {flaw}")
    if not flaws:
        print(f"{folder.name}: {checkpoint.name} keeps what code can check of the rule on memory")
    return int(bool(flaws))


def checkpoint_of_a_run(record: Record, scratch: Path) -> Path:
    """The last checkpoint of a run with the settings of a record."""
    words = ["--track", record.track, "--seed", str(record.first_seed()), "--checkpoint_every", "1000000"]
    status, said = run_script(
        record.folder / "train_gpt.py", [*words, *record.options], scratch, lambda _: False, record.processes
    )
    found = sorted(scratch.glob("*/step_*.pt"))
    if status or not found:
        raise ValueError(f"a run of {record.folder} failed, it said: {said}")
    return found[-1]


def command_plan(a: argparse.Namespace) -> int:
    n = stats.runs_needed(a.sd, a.margin, a.power)
    print(
        f"{n} runs: with sd {a.sd} and a true margin of {a.margin}, p < {stats.ALPHA} has probability "
        f"{a.power} or more"
    )
    return 0


def command_import(a: argparse.Namespace) -> int:
    if not a.folder.is_dir():
        raise ValueError(f"{a.folder} is not a folder")
    runs, refused = public_runs(a.folder)
    if not runs:
        raise ValueError(
            f"{a.folder} holds no log of the public speedrun" + "".join(f"\n  {line}" for line in refused)
        )
    report = groups_of(runs, a.target)
    if a.json:
        print(json.dumps({"groups": report, "refused": refused}, indent=1))
        return 0
    for group in report:
        loss, seconds = group["val_loss"], group["train_time_s"]
        p = group["no_p"] or f"p {chance(group['p'])} against {a.target}"
        time = "training time unknown"
        if seconds:
            time = f"training time mean {seconds['mean']:.2f} s, sd {number(seconds['sd'], 2)}"
        machine = f"{group['world_size']} x {group['device']}" if group["device"] else "unknown machine"
        print(f"{group['folder']}: n {loss['n']}, {group['last_step']} of {group['steps']} steps, "
              "mean validation loss "
              f"{loss['mean']:.5f}, sd {number(loss['sd'], 5)}, {p}; {time}; "
              f"{machine}, torch {group['torch'] or 'unknown'}, "
              f"source {group['source_sha256'][:12] or 'unknown'}")  # fmt: skip
    if len(report) > 1:
        print(
            f"{len(report)} groups: sources, steps, torch versions or numbers of processes differ, "
            "so they are not one claim"
        )
    for line in refused:
        print(f"not read: {line}")
    return 0


def command_public(a: argparse.Namespace) -> int:
    found = survey(a.clone)
    if not found["folders"]:
        raise ValueError(f"{a.clone} has no logs below records/")
    write(a.out, page(found))
    groups = [group for folder in found["folders"].values() for group in folder["groups"]]
    logs = sum(folder["logs"] for folder in found["folders"].values())
    print(f"{a.out}: {logs} logs in {len(found['folders'])} folders, {len(groups)} groups, "
          f"{len(found['refused'])} files or runs not read or not counted again")  # fmt: skip
    return 0


def command_table(a: argparse.Namespace) -> int:
    stale = []
    for path in pages(a.root):
        fresh = with_tables(page_text(path, a.root), a.root, path.parent)
        if not path.is_file() or fresh != path.read_text(encoding="utf-8"):
            stale.append(str(path.relative_to(a.root.parent)))
            if not a.check:
                write(path, fresh)
    if stale:
        print(f"{'stale' if a.check else 'written'}: {', '.join(stale)}")
    return int(a.check and bool(stale))


def results_of(track: Path) -> list[dict[str, Any]]:
    paths = sorted(track.glob("*/result.json"))
    return [json.loads(path.read_text(encoding="utf-8-sig")) for path in paths]


def command_plot(a: argparse.Namespace) -> int:
    from lib import figures

    if a.kind == "history":
        if len(a.runs) != 1:
            raise ValueError("plot history takes one track")
        track = a.root / str(a.runs[0])
        results = results_of(track)
        if not results:
            raise ValueError(f"{track} holds no record with a result.json")
        figures.history(history(results), {r["name"]: title(track / r["name"]) for r in results}, a.out)
    elif a.kind == "curves":
        # a track stands for its records, oldest first
        of_track = {
            path: [a.root / path / r["name"] for r in history(results_of(a.root / path))] for path in a.runs
        }
        figures.curves([run for path in a.runs for run in of_track[path] or [path]], a.loss, a.span, a.out)
    elif len(a.runs) != 2:
        raise ValueError("plot leading takes two arguments: run A and run B")
    else:
        figures.leading(*a.runs, a.loss, a.span, a.out)
    print(a.out)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    argv, overrides = (
        (list(argv), []) if "--" not in argv else (argv[: argv.index("--")], argv[argv.index("--") + 1 :])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT / "records", help="folder of the tracks (default: records/)"
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, function: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    p = command("run", command_run, "N complete runs with independent seeds into "
                                    "records/<track>/<date>_<name>/; "
                "goes on where it was interrupted. Options after -- go to train_gpt.py.")  # fmt: skip
    p.add_argument("--track", default="tiny")
    p.add_argument("--name", required=True, help="of the record")
    p.add_argument(
        "--runs",
        type=whole,
        required=True,
        help="in all, those that are there included; 0 only writes result.json",
    )
    p.add_argument(
        "--source", type=Path, default=ROOT / "train_gpt.py", help="script to run (default: train_gpt.py)"
    )
    p.add_argument(
        "--processes", type=positive, default=1, help="processes of a run, one for each GPU (default: 1)"
    )

    p = command("ab", command_ab, "Interleaved A/B on this machine: ratio of the training times, "
                                  "difference of the losses. "
                "The order is swapped from pair to pair, caches are warm, a pair with a compile inside the "
                "clock does not "
                "count. Options after -- go to the candidate.")  # fmt: skip
    p.add_argument("--baseline", type=Path, required=True, help="record folder or script")
    p.add_argument("--candidate", type=Path, required=True, help="record folder or script")
    p.add_argument(
        "--pairs", type=positive, default=stats.MINIMUM_PAIRS, help="valid pairs in all (default: 5)"
    )
    p.add_argument(
        "--until-decided", action="store_true", help="go on until time and loss are settled (sequential test)"
    )
    p.add_argument("--max-pairs", type=positive, default=40, help="with --until-decided (default: 40)")
    p.add_argument("--minutes", type=float, help="with --until-decided: no new pair after this time")
    p.add_argument("--track", default="tiny", help="where a script's record folder is made")
    p.add_argument("--name", help="of the record that is made for a script")
    p.add_argument("--processes", type=positive, default=1, help="processes of a run (default: 1)")

    p = command(
        "verify", command_verify, "Recompute each claim from the logs alone; exit status 0 only if all hold."
    )
    p.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="record folders (default: all)")
    p.add_argument("--json", action="store_true", help="for machines")

    p = command("rules", command_rules, "Evaluate the last checkpoint of a record by its own script, with "
                "the training shards as they are, absent, and others in their place: the same bits? Do its "
                "probabilities sum to 1? Does a loss depend on later tokens or another "
                "document?")  # fmt: skip
    p.add_argument("folder", type=Path, metavar="DIR", help="a record; without checkpoint a run makes one")
    p.add_argument("--checkpoint", type=Path, help="of its script (default: the newest in the folder)")
    p.add_argument("--processes", type=positive, default=1, help="of the run for a checkpoint (default: 1)")

    p = command("plan", command_plan, f"How many runs show p < {stats.ALPHA} with the wanted probability.")
    p.add_argument("--sd", type=float, required=True, help="spread of the final loss from seed to seed")
    p.add_argument("--margin", type=float, required=True, help="how far the true mean lies below the target")
    p.add_argument("--power", type=float, default=0.9, help="wanted probability (default: 0.9)")

    p = command(
        "table",
        command_table,
        "Make the tables between the markers of README.md and of the pages in records/ anew.",
    )
    p.add_argument("--check", action="store_true", help="change nothing; exit status 1 when they are stale")

    p = command("plot", command_plot, "PNG figures. curves: loss against tokens, steps and time, "
                                      "mean and band over seeds. "
                "leading: how many more steps B needs for each loss of A. history: "
                "a track's records by date.")  # fmt: skip
    p.add_argument("kind", choices=("curves", "leading", "history"))
    p.add_argument("runs", nargs="+", type=Path, metavar="RUNS",
                   help="record folders, logs, folders of public logs; of history and curves: "
                        "a track")  # fmt: skip
    p.add_argument("--loss", choices=("val", "train"), default="val", help="which curve (default: val)")
    p.add_argument(
        "--span", type=positive, default=1, help="smoothing: steps of a running mean (default: 1, none)"
    )
    p.add_argument("--out", type=Path, required=True, help="the PNG to write")

    p = command("import", command_import, "Statistics of the logs of the public speedrun below a folder.")
    p.add_argument("folder", type=Path, metavar="DIR")
    p.add_argument("--target", type=float, default=3.28, help="validation loss (default: 3.28)")
    p.add_argument("--json", action="store_true", help="for machines")

    p = command("public", command_public, "A page on what the logs of the public speedrun show by "
                "themselves, from a clone of its repository: its newest commit.")  # fmt: skip
    p.add_argument("clone", type=Path, metavar="CLONE", help="a clone, which may be bare")
    p.add_argument("--out", type=Path, required=True, help="the page to write")
    a = parser.parse_args(argv)
    if overrides and a.command not in ("run", "ab"):
        parser.error("only run and ab take options after --")
    a.root, a.overrides = a.root.resolve(), overrides
    return a


def whole(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError("not below 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    a = parse(sys.argv[1:] if argv is None else list(argv))
    return exit_status("record.py", lambda: a.function(a))


if __name__ == "__main__":
    sys.exit(main())
