"""FineWeb as GPT-2 tokens: a cached download of the public speedrun's shards, every file checked.

    python data/fineweb.py [N]        # the validation shard and N training shards (1..103, default 9)

A shard has 100M tokens in 200 MB. Writes manifest.json and
{fineweb_val_000000,fineweb_train_000001,...}.bin into $DATA_DIR/fineweb10B. A file gets its final name
only when its header, its length and its sha256 are what the hub publishes. Files that are there (from an
earlier run or from the public speedrun) are checked and kept: against the manifest by header and length
where it names them, else against the hub by sha256. huggingface_hub reads its usual variables
(HF_ENDPOINT, HF_TOKEN, ...).
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from shards import (
    HEADER_BYTES,
    DataError,
    Parser,
    check_shard,
    data_dir,
    exclusive,
    holds,
    publish,
    read_manifest,
    write_manifest,
)

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = 103
DOCUMENT_START, VOCAB_SIZE = 50256, 50257


def shard_names(train: int) -> list[str]:
    """The validation shard and the first `train` training shards, under their public names."""
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, train + 1))]


def ask_hub(what: str, call: Callable, *arguments: Any, **options: Any) -> Any:
    """Call huggingface_hub; whatever goes wrong there becomes one DataError."""
    try:
        return call(*arguments, repo_type="dataset", **options)
    except Exception as error:  # the library's, its HTTP client's or the system's, as versions differ
        reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        raise DataError(f"the hub did not give {what} of {REPOSITORY} ({reason})") from error


def published(names: list[str]) -> dict[str, dict[str, str | int]]:
    """What the hub publishes of each file: {name: {"sha256", "tokens"}}.

    Raises DataError when a file is not there.
    """
    infos = ask_hub("the list of files", HfApi().get_paths_info, REPOSITORY, names)
    stored = {info.path: info.lfs for info in infos if getattr(info, "lfs", None)}
    if missing := [name for name in names if name not in stored]:
        raise DataError(f"{REPOSITORY} publishes no hash of {', '.join(missing)}")
    return {
        name: {"sha256": stored[name].sha256, "tokens": (stored[name].size - HEADER_BYTES) // 2}
        for name in names
    }


def download(name: str, folder: Path, entry: dict[str, str | int]) -> None:
    """Fetch one shard into `folder`, where it appears under its name only if it is what `entry` says."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as scratch:
        path = Path(ask_hub(name, hf_hub_download, REPOSITORY, name, local_dir=scratch))
        try:
            check_shard(path, entry, full=True)
        except DataError as error:
            raise DataError(f"{error}; this download is thrown away") from None
        publish(path, folder / name)


def listed(folder: Path) -> dict[str, dict[str, str | int]]:
    """The manifest's entries whose files are there with the right header and length."""
    try:
        files = read_manifest(folder)["files"]
    except DataError:  # none yet, or damaged: every file is checked against the hub instead
        return {}
    return {name: entry for name, entry in files.items() if holds(folder / name, entry, full=False)}


def fetch(train: int, folder: Path) -> None:
    """Bring the validation shard and `train` training shards into `folder`.

    Raises DataError or OSError; whatever was complete by then stays, and is in the manifest.
    """
    files = listed(folder)
    unknown = [name for name in shard_names(train) if name not in files]
    if not unknown:
        print(f"{folder} is complete: nothing to do")
        return
    hub = published(unknown)
    kept = [name for name in unknown if holds(folder / name, hub[name], full=True)]
    wanted = [name for name in unknown if name not in kept]
    need = sum(HEADER_BYTES + 2 * hub[name]["tokens"] for name in wanted)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{folder} has {free:,} bytes free, but the {len(wanted)} missing shards take {need:,}"
        )
    if kept:
        print(f"{len(kept)} shards were there already, with the published sha256")
    for done, name in enumerate(kept + wanted, start=1):
        if name in wanted:
            print(f"shard {done} of {len(unknown)}: {name}", flush=True)
            download(name, folder, hub[name])
        files[name] = hub[name]
        # After every shard, so that an interrupted download need not be checked again.
        write_manifest(folder, "fineweb10B", VOCAB_SIZE, DOCUMENT_START, files)
    print(
        f"{folder} is complete: {sum(entry['tokens'] for entry in files.values()):,} tokens in "
        f"{len(files)} shards"
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse N and fetch; ends with status 1 and one sentence when that fails."""
    parser = Parser("data/fineweb.py", __doc__)
    parser.add_argument(
        "N", nargs="?", default="9", help=f"number of training shards, 1..{TRAIN_SHARDS} (default 9)"
    )
    given = parser.parse_args(arguments).N
    if not re.fullmatch("[0-9]{1,3}", given) or not 1 <= int(given) <= TRAIN_SHARDS:
        sys.exit(f"data/fineweb.py: N is the number of training shards, 1 to {TRAIN_SHARDS}, not {given!r}")
    try:
        folder = data_dir() / "fineweb10B"
        with exclusive(folder):
            fetch(int(given), folder)
    except KeyboardInterrupt:
        sys.exit("data/fineweb.py: interrupted; the same command goes on from here")
    except (DataError, OSError) as error:
        sys.exit(f"data/fineweb.py: {error}")


if __name__ == "__main__":
    main()
