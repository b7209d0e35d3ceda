"""Token shards and their manifest: the one place that knows the format on disk.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then that many
little-endian uint16 tokens: the format of llm.c and of the public speedrun. A corpus is a folder of
shards beside a `manifest.json` (file names -> sha256 and tokens, vocabulary size, document-start token),
which is written last. Every writer here goes through a temporary name in the same folder, so a final
name always means a whole file.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
MANIFEST = "manifest.json"


class DataError(ValueError):
    """Data that is missing, damaged or foreign; the message is one sentence for the user."""


class Parser(argparse.ArgumentParser):
    """A command line whose refusals are one sentence, without the list of options before it."""

    def __init__(self, script: str, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.script = script

    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self.script}: {message}; --help lists the options")


def data_dir() -> Path:
    """The folder of all corpora: $DATA_DIR, or the folder of this file."""
    return Path(os.environ.get("DATA_DIR") or Path(__file__).resolve().parent)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its final name; both names lie in one file system.

    The bytes reach the disk first.
    """
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing; it appears (or is replaced) only when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(temporary: Path, folder: Path) -> None:
    """Give a folder of published files its final name. Raises DataError when that name is taken."""
    try:
        os.rename(temporary, folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror})") from None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make the folder and work in it alone: a second process waits.

    What killed ones left half-written is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process works in {folder}: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(".*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        os.close(lock)


def locked(folder: Path) -> int | None:
    """A lock on a folder, held until the returned file is closed; None where another process holds it.

    A process that is killed holds it no longer.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another; or this file system has no locks
        os.close(lock)
        return None
    return lock


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new hidden folder in `parent`, removed at the end; what killed processes left goes too."""
    parent.mkdir(parents=True, exist_ok=True)
    guard = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no locks in this file system: nothing is taken for left
            fcntl.flock(guard, fcntl.LOCK_EX)
        for left in parent.glob(".*.tmp"):
            if left.is_dir() and (lock := locked(left)) is not None:
                shutil.rmtree(left)
                os.close(lock)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{prefix}.", suffix=".tmp"))
        lock = locked(folder)
    finally:
        os.close(guard)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_shard(path: Path, tokens: np.ndarray) -> dict[str, str | int]:
    """Write tokens (n,), integers in 0..65535, n >= 1, and return the manifest entry {"sha256", "tokens"}.

    Raises DataError for another shape or type, or for a token that does not fit; OSError when the disk
    refuses.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"{path}: tokens must be a 1-D array of integers, not {tokens.ndim}-D {tokens.dtype}")
    if not 1 <= len(tokens) < 2**31:
        raise DataError(f"{path}: a shard holds between 1 and 2^31 - 1 tokens, not {len(tokens)}")
    if tokens.min() < 0 or tokens.max() > 65535:
        raise DataError(f"{path}: tokens must lie in 0..65535, but they span {tokens.min()}..{tokens.max()}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    head, body = header.tobytes(), tokens.astype("<u2").tobytes()
    with atomic_file(path) as file:
        file.write(head)
        file.write(body)
    return {"sha256": hashlib.sha256(head + body).hexdigest(), "tokens": len(tokens)}


def read_header(path: Path) -> int:
    """The number of tokens of a shard, after checking magic, version and the length of the file.

    Reads only the header. Raises DataError, also when there is no such file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(head) < HEADER_BYTES:
        raise DataError(
            f"{path}: {size} bytes are too few for a shard, whose header alone has {HEADER_BYTES}"
        )
    magic, version, count = (int(field) for field in np.frombuffer(head, dtype="<i4")[:3])
    if magic != MAGIC:
        raise DataError(f"{path}: not a shard of uint16 tokens (magic {magic} instead of {MAGIC})")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, but only version {VERSION} is known")
    if count < 1 or size != HEADER_BYTES + 2 * count:
        wanted = f"which makes {HEADER_BYTES + 2 * count} bytes" if count >= 1 else "which is none"
        raise DataError(
            f"{path}: its header promises {count} tokens, {wanted}, but the file has {size} bytes"
        )
    return count


def read_shard(path: Path) -> np.ndarray:
    """All tokens of a shard, (n,) uint16. Raises DataError as read_header does."""
    count = read_header(path)
    return np.fromfile(path, dtype="<u2", count=count, offset=HEADER_BYTES).astype(np.uint16, copy=False)


def write_manifest(
    folder: Path, corpus: str, vocab_size: int, document_start: int, files: dict[str, dict]
) -> None:
    """Write `folder/manifest.json`; `files` maps each shard's name to what write_shard returned.

    Call it last.
    """
    manifest = {"corpus": corpus, "vocab_size": vocab_size, "document_start": document_start, "files": files}
    with atomic_file(folder / MANIFEST) as file:
        file.write((json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode("ascii"))


def read_manifest(folder: Path) -> dict:
    """The manifest of a corpus. Raises DataError when there is none or it is not one."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise DataError(f"{path}: not a JSON file") from None
    if not isinstance(manifest, dict) or set(manifest) != {"corpus", "vocab_size", "document_start", "files"}:
        raise DataError(f"{path}: not a manifest with the keys corpus, vocab_size, document_start and files")
    files = manifest["files"]
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"sha256", "tokens"} <= set(e) for e in files.values()
    ):
        raise DataError(f"{path}: its files must map names to sha256 and tokens")
    return manifest


def check_shard(path: Path, entry: dict, full: bool) -> None:
    """Compare a shard with its manifest entry: header, length and token count; with `full` also the sha256.

    Raises DataError on the first difference.
    """
    count = read_header(path)
    if count != entry["tokens"]:
        raise DataError(f"{path}: {count} tokens, but {entry['tokens']} are expected")
    if full and (found := sha256_of(path)) != entry["sha256"]:
        raise DataError(f"{path}: its sha256 is {found}, but {entry['sha256']} is expected")


def holds(path: Path, entry: dict, full: bool) -> bool:
    """Whether check_shard finds nothing wrong."""
    try:
        check_shard(path, entry, full)
    except DataError:
        return False
    return True
