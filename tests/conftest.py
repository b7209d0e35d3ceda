"""Puts the repository on the path and gives each process one thread, before anything imports torch."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def no_graph_of_another_module_is_counted():
    from torch._dynamo.utils import counters

    counters.clear()
