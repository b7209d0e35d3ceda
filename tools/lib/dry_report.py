"""What a dry run says: tables of memory, communication, passes and floors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lib import cards, floors, watched
from lib.watched import Found


def how(found: Found) -> str:
    return "uncompiled" if found.compiled == "none" else f"compiled in {found.compiled}"


def table(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Lines of a table; numbers have two decimals, whole numbers none."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        lines.append([f"{x:,.2f}" if isinstance(x, float) else str(x) for x in row])
    return [f"| {' | '.join(line)} |" for line in lines]


def verdict(found: Found, card: cards.Card) -> str:
    needed = found.needed()
    word = "fits" if needed <= card.memory else "DOES NOT FIT"
    return f"{how(found)}: {word}, {needed / 1e9:.1f} of {card.memory / 1e9:.1f} GB"


def memory_table(runs: list[Found]) -> list[str]:
    """The most live bytes of each phase, a column for each run."""
    rows = [[phase, *(run.peaks()[phase] / 1e9 for run in runs)] for phase in runs[0].peaks()]
    counted_in = f"needed: the peak, {watched.FRAGMENTED:.0%} of it and {watched.ALLOWANCE / 1e9} GB"
    rows.append([counted_in, *(run.needed() / 1e9 for run in runs)])
    return table(["memory of a GPU, GB", *map(how, runs)], rows)


def communication_table(found: Found) -> list[str]:
    """The collectives of a step in which some, and in which all groups are updated."""
    rows = []
    for all_groups in (False, True):
        steps = [step for step in found.steps if step.all_groups == all_groups]
        if not steps:
            continue
        step = max(steps, key=lambda step: step.sent)
        which = f"{'all' if all_groups else 'some'} groups updated"
        calls = Counter((name, dtype) for name, dtype, *_ in step.collectives)
        for kind, count in calls.items():
            same = [entry for entry in step.collectives if entry[:2] == kind]
            whole, sent = (sum(entry[place] for entry in same) / 1e9 for place in (2, 3))
            rows.append([f"{which}: {' of '.join(kind)}", count, whole, sent])
        rows.append([f"{which}: all", len(step.collectives), "", step.sent / 1e9])
    return table(["collectives of a step", "calls", "whole, GB", "sent by a rank, GB"], rows)


def pass_table(found: Found, card: cards.Card) -> list[str]:
    """A pass over a micro-batch by part: operations and bytes, and their time at the rates of the card."""
    rows = []
    for kind in found.kinds():
        counts = found.last_pass(kind)
        parts = sorted({part for part, _ in counts})
        for part in [*parts, None] if len(parts) > 1 else [None]:
            of_part = Counter({key: amount for key, amount in counts.items() if part in (None, key[0])})
            work, floor = floors.sums(of_part), floors.of_pass(card, of_part)
            operations = sum(work[name] for name in ("products", "products in FP8", "attention"))
            moved = (floor.bytes + floor.between) * card.bytes_per_s
            calls = work["launches"] + work["operations"]
            seconds = 1e3 * floor.arithmetic, 1e3 * (floor.bytes + floor.between)
            rows.append([f"{kind}: {part or 'all'}", calls, operations / 1e12, moved / 1e9, *seconds])
    titles = ["a micro-batch, forward and backward", "calls", "Tflop", "GB", "arithmetic, ms", "bytes, ms"]
    return table(titles, rows)


def update_table(runs: list[Found]) -> list[str]:
    """Bytes that a step of the optimizer moves."""
    rows = []
    for all_groups in (False, True):
        row = [f"{'all' if all_groups else 'some'} groups updated"]
        for run in runs:
            counts = [step.update_counts for step in run.steps if step.all_groups == all_groups]
            moved = [floors.moved_by_update(x) for x in counts] or [0]
            row += [min(moved) / 1e9, max(moved) / 1e9]
        rows.append(row)
    titles = [f"{how(run)}, {end}" for run in runs for end in ("least", "most")]
    return table(["bytes of an optimizer step, GB", *titles], rows)


def floor_table(found: Found, card: cards.Card, track: Any) -> list[str]:
    """The least time of a step of each kind, the mean over a period of updates, and of the whole run."""

    def row(name: str, count: int, floor: floors.Floor, unit: float) -> list[Any]:
        hidden = floor.sum - floor.communication
        columns = [floor.arithmetic, floor.bytes, floor.optimizer, floor.communication, floor.sum]
        return [name, count, *(unit * x for x in (*columns, hidden, floor.between))]

    rows, run = [], floors.Floor()
    kinds = watched.kinds_of_steps(track)
    for kind, count in kinds.items():
        floor = found.floor(kind, card)
        run = run.plus(floor, count)
        rows.append(row(f"{kind}, ms a step", count, floor, 1e3))
    rows.append(row("the whole run, s", sum(kinds.values()), run, 1.0))
    columns = ["arithmetic", "bytes", "optimizer", "communication", "sum", "sum with communication hidden"]
    return table(["floor", "steps", *columns, "between graphs, not in the sum"], rows)
