"""Any text as token shards: plain text or JSON lines, each also gzipped, to a corpus that train_gpt.py reads.

    python data/tokenize_text.py mine books/*.txt web.jsonl.gz         # GPT-2 tokens, for the track short
    python data/tokenize_text.py mine books/*.txt --tokenizer bytes    # bytes, for the track tiny
    ./run.sh tiny --data.corpus mine

Names ending in .jsonl, .ndjson or .json (before a .gz) hold one JSON object per line with the text in
--field; every other file is UTF-8 text, one document, or several with `<|endoftext|>` between them. A file
whose content contradicts its name is refused; --format says what it is. Gzip is known by its content.
A document goes to validation by a hash of its text, so copies of it never lie on both sides, whatever
else is in the files; where that leaves a side empty, what is done instead is said. A training row takes
the beginning of a document and drops what does not fit, so long documents are cut into several for
training, at empty lines, line ends or words; validation takes them whole. The same shards come out
whatever the number of processes. Writes
$DATA_DIR/NAME/{train_000001,...,val_000000,...}.bin and manifest.json, the folder all at once.
"""

import argparse
import collections
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from shards import (
    MANIFEST,
    DataError,
    Parser,
    data_dir,
    publish_folder,
    scratch_folder,
    write_manifest,
    write_shard,
)

SEPARATOR = b"<|endoftext|>"
VOCABULARY = {"gpt2": (50257, 50256), "bytes": (257, 256)}  # tokenizer: (vocabulary, document start)
# Tokens of a training document at most. A row of the track tiny has 1,024: the shorter the documents, the
# less is dropped at its end. The track short cuts documents at 2,048 tokens for most of its steps.
DOCUMENT_TOKENS = {"gpt2": 2048, "bytes": 256}
MOST_EPOCHS = 10  # of a run on little text, which has fewer steps instead
ROOT = Path(__file__).resolve().parents[1]
BATCH_BYTES = 1 << 20  # of text for one task of a worker
JSON_NAMES = (".jsonl", ".ndjson", ".json")  # Hugging Face's to_json writes JSON lines into .json
GZIP = b"\x1f\x8b"
FOREIGN = {  # how files begin whose text, if any, is in a form that is not read here
    "zstd": rb"\x28\xb5\x2f\xfd", "bzip2": rb"BZh[1-9]1AY", "xz": rb"\xfd7zXZ", "zip": rb"PK\x03\x04",
    "PDF": rb"%PDF-", "parquet": rb"PAR1\x15", "UTF-16": rb"\xff\xfe|\xfe\xff",
}  # fmt: skip


class Piece(NamedTuple):
    """A document as it was read: JSON, or text."""

    file: str
    line: int  # the first, from 1
    raw: bytes
    is_json: bool


class Document(NamedTuple):
    hash: int  # 64 bits of the sha256 of its text
    tokens: np.ndarray  # without the start, (n,) uint16
    ends: list[int]  # where the pieces end into which it is cut for training; the last one is n


class Tokenized(NamedTuple):
    documents: list[Document]
    bad: list[str]  # one sentence for each piece of a file that is not a document
    empty: int


class Split(NamedTuple):
    """Which documents validate: those with a small hash, or one that was chosen, or the end of that one."""

    below: int = 0  # documents whose hash is less
    chosen: int = -1  # the hash of one
    pieces: int | None = None  # how many of the last pieces of the chosen one; None: all of it

    def validating(self, document: Document) -> int:
        """How many of the last pieces of a document validate."""
        if document.hash == self.chosen and self.pieces is not None:
            return self.pieces
        return len(document.ends) * (document.hash == self.chosen or document.hash < self.below)


def is_json_lines(path: Path, form: str) -> bool:
    """What --format and a file's name make of it."""
    named = path.name.lower().removesuffix(".gz").endswith(JSON_NAMES)
    return named if form == "auto" else form == "jsonl"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The lines of a file, decompressed if its content is gzip, and the file itself, for its position.

    Raises DataError for what is neither text nor gzip.
    """
    with open(path, "rb") as raw:
        head = raw.peek(16)[:16]
        for name, begin in FOREIGN.items():
            if re.match(begin, head):
                raise DataError(f"{path} is {name} by its content; UTF-8 text, JSON lines and gzip are read")
        with gzip.open(raw) if head.startswith(GZIP) else raw as lines:
            yield lines, raw


def refuse_json(path: Path, number: int, line: bytes) -> None:
    """DataError for a line of JSON at the beginning of a file that is read as text."""
    if not line.lstrip().startswith((b"{", b"[")):
        return
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict) or (value and isinstance(value[0], dict)):
        raise DataError(
            f"{path}:{number}: a line of JSON in a file that its name makes text; "
            "--format jsonl reads JSON lines, --format text takes it as text"
        )


def pieces(path: Path, bar: tqdm, form: str) -> Iterator[Piece]:
    """The documents of a file in order; `form` is that of --format.

    Raises DataError naming the file when it cannot be read to its end, or is not what its name says.
    """
    is_json = is_json_lines(path, form)
    before = bar.n
    try:
        with opened(path) as (lines, raw):
            text, first = [], 1
            begun = False
            for number, line in enumerate(lines, start=1):
                bar.update(before + raw.tell() - bar.n)
                if is_json:
                    if line.strip():
                        yield Piece(str(path), number, line, True)
                    continue
                if b"\0" in line:
                    raise DataError(f"{path}:{number}: a zero byte, so it is no text")
                if form == "auto" and not begun and line.strip():
                    refuse_json(path, number, line.removeprefix(b"\xef\xbb\xbf"))
                    begun = True
                *ended, rest = line.split(SEPARATOR)
                for last in ended:
                    text.append(last if last.strip() else b"")
                    yield Piece(str(path), first, b"".join(text), False)
                    text, first = [], number + (not rest.strip())
                if rest.strip() or not ended:
                    text.append(rest)
            if text:
                yield Piece(str(path), first, b"".join(text), False)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a gzip file is cut or damaged
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def batches(paths: Sequence[Path], bar: tqdm, form: str) -> Iterator[list[Piece]]:
    """The pieces of all files in order, in lists of about BATCH_BYTES."""
    batch, size = [], 0
    for piece in (piece for path in paths for piece in pieces(path, bar, form)):
        batch.append(piece)
        size += len(piece.raw)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.cache
def gpt2():
    """tiktoken's GPT-2 encoding. Raises DataError when its vocabulary is neither cached nor within reach."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # the HTTP client's or the system's own
        reason = " ".join(str(error).split())
        raise DataError(
            f"tiktoken could not load the GPT-2 vocabulary, which it downloads once ({reason})"
        ) from error


def text_of(piece: Piece, field: str) -> str:
    """The text of a piece. Raises ValueError with the reason when it has none."""
    try:
        if not piece.is_json:
            return piece.raw.decode("utf-8-sig" if piece.line == 1 else "utf-8")
        record = json.loads(piece.raw)
    except UnicodeDecodeError as error:
        line = piece.line + piece.raw[: error.start].count(b"\n")
        raise ValueError(f"{piece.file}:{line}: not UTF-8") from None
    except (ValueError, RecursionError):
        hint = "; JSON lines hold one object in a line; --format text reads it as text" * (piece.line == 1)
        raise ValueError(f"{piece.file}:{piece.line}: not JSON{hint}") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise ValueError(f"{piece.file}:{piece.line}: no JSON object with a text {field!r}")
    return record[field]


LINE, BLANK, SPACE, INSIDE = 1, 2, 4, 8  # flags of a token: see `kinds`


@functools.cache
def kinds(tokenizer: str) -> np.ndarray:
    """Flags of each token, (V,): ends a line, is whitespace, begins with it, begins inside a character."""
    texts = [bytes([i]) for i in range(256)]
    if tokenizer == "gpt2":
        texts = [gpt2().decode_single_token_bytes(i) for i in range(VOCABULARY["gpt2"][1])]
    return np.array([
        LINE * text.endswith(b"\n") | BLANK * text.isspace() | SPACE * text[:1].isspace()
        | INSIDE * (text[0] & 0xC0 == 0x80)
        for text in texts
    ], np.uint8)  # fmt: skip


def cut(tokens: np.ndarray, limit: int, tokenizer: str) -> list[int]:
    """Where the pieces of a document end, each of at most `limit` tokens; joined, they are the document.

    A piece ends after an empty line if there is one in its second half, else after a line, a word or a
    character, and as late as that allows.
    """
    ends, begin = [], 0
    while len(tokens) - begin > limit:
        flags = kinds(tokenizer)[tokens[begin : begin + limit + 1]]  # and of the token after the piece
        line, blank = flags & LINE > 0, flags & BLANK > 0
        lines = line.cumsum()  # that have ended
        # the same as of the last token that is not blank: two more are an empty line
        before = np.maximum.accumulate(np.where(blank, 0, lines))
        after_line = line + (line & (lines - before >= 2)).astype(np.int8)
        after_word = blank[:-1] | (flags[1:] & SPACE > 0)
        after_character = flags[1:] & INSIDE == 0
        # how good it is to end with each token of the second half
        good = (2 * after_line[:-1] + after_word + after_character)[limit // 2 :]
        begin += limit - int(good[::-1].argmax())
        ends.append(begin)
    return [*ends, len(tokens)]


def tokenize(batch: list[Piece], tokenizer: str, field: str, limit: int) -> Tokenized:
    """The documents of a batch, cut into pieces of `limit` tokens at most."""
    documents, bad, empty = [], [], 0
    for piece in batch:
        try:
            text = text_of(piece, field)
            encoded = text.encode()
        except UnicodeEncodeError:  # JSON can hold halves of surrogate pairs
            bad.append(f"{piece.file}:{piece.line}: its text is not Unicode")
            continue
        except ValueError as error:
            bad.append(str(error))
            continue
        if not text.strip():
            empty += 1
            continue
        tokens = np.frombuffer(encoded, np.uint8) if tokenizer == "bytes" else gpt2().encode_ordinary(text)
        tokens = np.asarray(tokens, np.uint16)
        number = int.from_bytes(hashlib.sha256(encoded).digest()[:8])
        documents.append(Document(number, tokens, cut(tokens, limit, tokenizer)))
    return Tokenized(documents, bad, empty)


class ShardWriter:
    """Collects the documents of one split and writes a shard whenever the next one would not fit."""

    def __init__(self, folder: Path, split: str, first: int, start: int, limit: int):
        self.folder, self.split, self.number, self.limit = folder, split, first, limit
        self.start = np.array([start], np.uint16)
        self.files: dict[str, dict] = {}
        self.parts: list[np.ndarray] = []
        self.size = self.total = self.count = 0

    def add(self, tokens: np.ndarray) -> None:
        """Take a document, without its start."""
        size = 1 + len(tokens)
        if self.size + size > self.limit:
            self.flush()
        self.parts += [self.start, tokens]
        self.size += size
        self.total += size
        self.count += 1

    def flush(self) -> None:
        if self.parts:
            name = f"{self.split}_{self.number:06d}.bin"
            self.files[name] = write_shard(self.folder / name, np.concatenate(self.parts))
            self.parts, self.size, self.number = [], 0, self.number + 1


class Corpus:
    """The shards of a corpus while they are written, and what the user is told of them."""

    def __init__(self, folder: Path, split: Split, tokenizer: str, shard_tokens: int):
        start = VOCABULARY[tokenizer][1]
        self.split = split
        self.train = ShardWriter(folder, "train", 1, start, shard_tokens)
        self.val = ShardWriter(folder, "val", 0, start, shard_tokens)
        self.bad = self.empty = 0
        self.cut = self.pieces = 0  # long training documents, and what became of them
        self.sizes: dict[int, list[int]] = {}  # by hash: tokens, pieces; kept while a side is empty

    def add(self, document: Document) -> None:
        hashed, tokens, ends = document
        if not self.complete():
            size = self.sizes.setdefault(hashed, [0, len(ends)])
            size[0] += len(tokens)
        trains = ends[: len(ends) - self.split.validating(document)]
        for begin, end in zip([0, *trains], trains):
            self.train.add(tokens[begin:end])
        if len(trains) < len(ends):
            self.val.add(tokens[trains[-1] if trains else 0 :])
        if len(trains) > 1:
            self.cut, self.pieces = self.cut + 1, self.pieces + len(trains)

    def complete(self) -> bool:
        return bool(self.train.count and self.val.count)

    def flush(self) -> dict[str, dict]:
        """Write what is left; the manifest's entries of all shards."""
        self.train.flush()
        self.val.flush()
        return self.train.files | self.val.files


def split_of_few(sizes: dict[int, list[int]], share: float) -> tuple[Split, str]:
    """A split for documents all of which the hash puts on one side, and the sentence that says it.

    A whole document validates, the one whose size is nearest to the share, unless that is far too much of
    the text; then the end of the longest one does. DataError if there is too little text for either.
    """
    if not sizes:
        raise DataError("the files hold no text")
    total = sum(tokens for tokens, _ in sizes.values())
    nearest = min(sizes, key=lambda one: (abs(sizes[one][0] - share * total), one))
    longest = max(sizes, key=lambda one: (sizes[one][1] > 1, sizes[one][0], one))
    few = f"too few documents to choose by their hash ({len(sizes)})"
    tokens, _ = sizes[nearest]
    long = sizes[longest][1] > 1
    if len(sizes) > 1 and (tokens <= max(0.1, 2 * share) * total or not long):
        return Split(chosen=nearest), f"{few}: one of them validates, {tokens / total:.1%} of the text"
    if not long:
        raise DataError(f"one document of {total:,} tokens is too little to train and to validate")
    tokens, pieces = sizes[longest]
    last = min(pieces - 1, max(1, round(share * total * pieces / tokens)))
    sentence = (
        f"{few}: the end of the longest validates, {last} of its {pieces} pieces, "
        "so both sides hold parts of the same text"
    )
    return Split(chosen=longest, pieces=last), sentence


def start_worker() -> None:
    """In each worker: Ctrl-C is the parent's, and a worker ends with its parent, even one that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def in_order(
    pool: concurrent.futures.Executor, tasks: Iterator[list[Piece]], ahead: int, **options
) -> Iterator[Tokenized]:
    """`tokenize` of every task in the order of the tasks, at most `ahead` of them under way or waiting."""
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    for task in tasks:
        waiting.append(pool.submit(tokenize, task, **options))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_corpus(folder: Path, paths: Sequence[Path], args: argparse.Namespace, split: Split) -> Corpus:
    """Tokenize the files into the shards of a folder.

    DataError for a file that cannot be read, and for a bad line unless those are left out.
    """
    corpus = Corpus(folder, split, args.tokenizer, args.shard_tokens)
    limit = (args.document_tokens or DOCUMENT_TOKENS[args.tokenizer]) - 1  # without the start
    options = dict(tokenizer=args.tokenizer, field=args.field, limit=limit)
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar, \
         concurrent.futures.ProcessPoolExecutor(args.processes,
                                                initializer=start_worker) as pool:  # fmt: skip
        tasks = batches(paths, bar, args.format)
        try:
            for result in in_order(pool, tasks, 4 * args.processes, **options):
                if result.bad and not args.skip_bad:
                    raise DataError(f"{result.bad[0]}; --skip-bad leaves such lines out and reports them")
                if split.chosen < 0:  # else the files are read a second time
                    for sentence in result.bad:
                        bar.write(f"data/tokenize_text.py: left out: {sentence}", file=sys.stderr)
                corpus.bad += len(result.bad)
                corpus.empty += result.empty
                for document in result.documents:
                    corpus.add(document)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return corpus


def build(name: str, paths: Sequence[Path], args: argparse.Namespace) -> None:
    """Tokenize the files into the corpus `name`, which appears complete or not at all.

    Raises DataError or OSError.
    """
    folder = data_dir() / name
    if folder.exists():
        raise DataError(f"{folder} is there already; remove it or choose another name")
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise DataError(f"{missing[0]} is not a file")
    if args.tokenizer == "gpt2":
        gpt2()  # once here, for all workers
    by_hash, how = Split(below=int(args.val_share * 2**64)), ""
    with scratch_folder(folder.parent, name) as scratch:
        corpus = write_corpus(scratch / name, paths, args, by_hash)
        if not corpus.complete():
            split, how = split_of_few(corpus.sizes, args.val_share)
            shutil.rmtree(scratch / name, ignore_errors=True)  # there only if a shard was full
            corpus = write_corpus(scratch / name, paths, args, split)
        write_manifest(scratch / name, name, *VOCABULARY[args.tokenizer], corpus.flush())
        publish_folder(scratch / name, folder)
    report(folder, corpus, how, args)


def report(folder: Path, corpus: Corpus, how: str, args: argparse.Namespace) -> None:
    """Say what was made, and the command that trains on it."""
    train, val = corpus.train, corpus.val
    print(f"{folder}: {train.total:,} tokens in {train.count:,} documents train, "
          f"{val.total:,} in {val.count:,} validate, "
          f"{corpus.bad} bad lines and {corpus.empty} empty documents left out")  # fmt: skip
    if corpus.cut:
        limit = args.document_tokens or DOCUMENT_TOKENS[args.tokenizer]
        print(f"cut: training documents of more than {limit:,} tokens, {corpus.cut:,} into {corpus.pieces:,}")
    if how:
        print(how)
    for line in how_to_train(folder, corpus, args.tokenizer):
        print(line)


def how_to_train(folder: Path, corpus: Corpus, tokenizer: str) -> list[str]:
    """What a run on the corpus reads, and its command, which takes no more than there is."""
    name = "tiny" if tokenizer == "bytes" else "short"
    words = ["--data.corpus", folder.name, "--evaluation.tokens", str(corpus.val.total - corpus.val.count)]
    command = ["./run.sh" if Path.cwd() == ROOT else str(ROOT / "run.sh"), name]
    if os.environ.get("DATA_DIR"):
        command = ["env", f"DATA_DIR={folder.parent.resolve()}", *command]
    sys.path.insert(0, str(ROOT))
    try:
        import train_gpt  # for the tracks and the packing of rows
    except (ImportError, OSError) as error:
        no_plan = f"train_gpt.py cannot be imported ({error}), so the run may need other --data.epochs:"
        return [no_plan, shlex.join([*command, *words])]
    track, _ = train_gpt.parse_command_line(["--track", name, *words])
    training = [folder / file for file in sorted(corpus.train.files)]
    packed = train_gpt.pack_schedule(track, training, MOST_EPOCHS)
    if packed.packed < packed.rows:  # fewer steps, though not so few that little of the track is left
        steps = track.schedule.steps
        steps = max(math.ceil(steps / 4), steps * packed.packed // packed.rows)
        words += ["--schedule.steps", str(steps)]
        track = dataclasses.replace(track, schedule=dataclasses.replace(track.schedule, steps=steps))
        packed = train_gpt.pack_schedule(track, training, sys.maxsize)
    if packed.epochs > 1:
        words += ["--data.epochs", str(packed.epochs)]
    epoch, shard, document = packed.position
    passed = epoch * corpus.train.total
    passed += sum(corpus.train.files[path.name]["tokens"] for path in training[:shard])
    passed += train_gpt.read_documents(training[shard], track.data.document_start)[1][document]
    taken = packed.rows * (track.data.row_tokens + 1)
    return [
        f"this run reads {passed / corpus.train.total:,.1f} times the training text and takes "
        f"{taken / passed:.0%} of it, the rest is dropped where a row ends:",
        shlex.join([*command, *words]),
    ]


def positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 2,147,483,647")
    return int(text)


def share(text: str) -> float:
    if not re.fullmatch(r"0?\.\d+", text) or not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return float(text)


def main(arguments: list[str] | None = None) -> None:
    """Parse and build; ends with a non-zero status and one sentence when that fails."""
    parser = Parser("data/tokenize_text.py", __doc__)
    parser.add_argument("name", help="folder of the corpus below DATA_DIR")
    parser.add_argument("files", nargs="+", type=Path, help="text or JSON lines, plain or .gz")
    parser.add_argument("--tokenizer", choices=sorted(VOCABULARY), default="gpt2", help="default gpt2")
    parser.add_argument(
        "--format", choices=("auto", "jsonl", "text"), default="auto",
        help="what the files hold; auto: by their names (default)",
    )  # fmt: skip
    parser.add_argument(
        "--field", default="text", help="field of a JSON line that holds the text (default text)"
    )
    parser.add_argument(
        "--val-share", type=share, default=0.01, help="share of the documents that validate (default 0.01)"
    )
    parser.add_argument("--shard-tokens", type=positive, default=100_000_000,
                        help="tokens of a shard at most, unless "
                        "one document is longer (default 100,000,000)")  # fmt: skip
    parser.add_argument("--document-tokens", type=positive, help="tokens of a training document at most, "
                        "longer ones are cut (default 2,048, for bytes 256)")  # fmt: skip
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave bad lines out instead of stopping at the first"
    )
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", args.name):
        sys.exit(f"data/tokenize_text.py: a corpus name has letters, digits, _ and -, not {args.name!r}")
    if args.document_tokens == 1:
        sys.exit("data/tokenize_text.py: --document-tokens is at least 2, its start and one more")
    try:
        build(args.name, args.files, args)
    except KeyboardInterrupt:
        made = (data_dir() / args.name / MANIFEST).exists()
        state = "the corpus is complete" if made else "nothing was written"
        sys.exit(f"data/tokenize_text.py: interrupted; {state}")
    except concurrent.futures.process.BrokenProcessPool:
        sys.exit(
            "data/tokenize_text.py: a worker process was killed (too little memory?); "
            "fewer --processes need less"
        )
    except MemoryError:
        sys.exit("data/tokenize_text.py: too little memory; split the largest file, or fewer --processes")
    except (DataError, OSError) as error:
        sys.exit(f"data/tokenize_text.py: {error}")


if __name__ == "__main__":
    main()
