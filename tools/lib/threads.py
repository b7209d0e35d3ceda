"""How the threads of a run wait for each other: what train_gpt.py sets when it is the program.

A command that imports it sets the same, before anything loads torch, which reads it once.
"""

from __future__ import annotations

import os

SPINCOUNT = "3000"  # as in train_gpt.py, where the reason stands


def waiting() -> dict[str, str]:
    """The variables of the environment to be set; none where the user has said something of his own."""
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & {*os.environ}:
        return {}
    return {"GOMP_SPINCOUNT": SPINCOUNT}
