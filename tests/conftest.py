"""Puts the repository, its data scripts and its tools on the path; one thread for each process, before torch is imported."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "data")]

import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def no_graph_of_another_module_is_counted():
    from torch._dynamo.utils import counters

    counters.clear()
