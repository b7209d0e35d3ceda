"""Training times of two settings of one script, in turns in one process.

    python tools/lib/in_turns.py --out FOLDER SCRIPT ROUNDS A B

A and B are options of the script, as JSON lists. In turns, so that what the machine does meanwhile meets
both.

Prints a JSON object as its last line: the machine, and "seconds", those of A's rounds and of B's. Both
go through their whole schedules, a ROUNDS-th of the steps at a time, the order swapped from round to
round: all that is inside the clock of a run, but for the logs. compare.py starts it once for each pair
of variants.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType
from typing import Any


def load(path: str) -> ModuleType:
    """The script as a module of its own, whatever its name."""
    spec = importlib.util.spec_from_file_location("compared_train_gpt", path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look there
    spec.loader.exec_module(script)
    return script


def in_turns(script: ModuleType, trainers: list[Any], rounds: int) -> list[list[float]]:
    """Seconds of each round of each trainer."""
    batches, seconds = [], [[] for _ in trainers]
    for trainer in trainers:
        trainer.warm_up()
        set_stage = getattr(trainer, "set_stage", None) or trainer.enter  # its name in November 2026
        set_stage(0)
        packer = script.Packer(trainer.train_paths, trainer.track.data)
        batches.append(script.training_steps(packer, trainer.track, trainer.checked["documents"], 0, 1))
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 else (1, 0):
            trainer, before = trainers[side], trainers[side].clock.seconds
            first, last = (script.total_steps(trainer.track.schedule) * k // rounds for k in (turn, turn + 1))
            trainer.clock.start()
            for step in range(first, last):
                trainer.advance(step, batches[side])
            trainer.clock.stop()
            seconds[side].append(trainer.clock.seconds - before)
    return seconds


def main(argv: list[str]) -> None:
    out, (path, rounds, *sides) = argv[:2], argv[2:]
    script, (a, b) = load(path), [[*out, *json.loads(side)] for side in sides]

    def both(first: Any) -> dict[str, Any]:
        machine = {
            key: first.environment[key]
            for key in ("source_sha256", "torch", "device", "world_size", "threads")
        }
        seconds = script.main(b, lambda second: in_turns(script, [first, second], int(rounds)))
        return {**machine, "dtype": first.key["dtype"], "seconds": seconds}

    print(json.dumps(script.main(a, both)))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose stats.py and logs.py are not for the compared script to find
    main(sys.argv[1:])
