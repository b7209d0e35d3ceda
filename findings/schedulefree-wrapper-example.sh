#!/usr/bin/env bash
# The example in the docstring of schedulefree's ScheduleFreeWrapper stops at its first step.
#
# Expected: `ScheduleFreeWrapper(torch.optim.RMSprop(...), momentum=0.9, weight_decay_at_y=0.1)` trains.
# Seen with schedulefree 1.4.1 and torch 2.13.0: KeyError, with AdamW too. The wrapper puts its z into the state of the
# wrapped optimizer before that one's first step, and torch's optimizers take a state that is not empty for their own.
# For us: MuonEq makes its state when it is constructed and works in the wrapper; torch's AdamW beside it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 schedulefree==1.4.1
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

import schedulefree
import torch

print("torch", torch.__version__, "schedulefree", importlib.metadata.version("schedulefree"))
seen = []
for make in (torch.optim.RMSprop, torch.optim.AdamW, torch.optim.SGD):
    model = torch.nn.Linear(3, 2)
    optimizer = schedulefree.ScheduleFreeWrapper(
        make(model.parameters(), lr=0.0025), momentum=0.9, weight_decay_at_y=0.1
    )
    optimizer.train()
    model(torch.ones(4, 3)).square().sum().backward()
    try:
        optimizer.step()
        seen.append("a step")
    except KeyError as error:
        seen.append(f"KeyError: {error}")
    print(f"{make.__name__}: expected a step, seen {seen[-1]}")
sys.exit(not (seen[0].startswith("KeyError") and seen[1].startswith("KeyError") and seen[2] == "a step"))
PYTHON
