"""Puts the repository, its data scripts and its tools on the path; one thread for each process,
before torch is imported."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "data")]

import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers")
from helpers import Outcome, make_corpus, options, train  # noqa: E402

# what torchrun sets
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True, scope="module")
def no_graph_of_another_module_is_counted() -> None:
    from torch._dynamo.utils import counters

    counters.clear()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the small corpus, which is the DATA_DIR of the runs of a module; no torchrun
    has started them."""
    folder = tmp_path_factory.mktemp("data")
    make_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in LAUNCHED:
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Outcome:
    """The undisturbed small run: one process, no checkpoints."""
    return train(options(out=tmp_path_factory.mktemp("reference")))
