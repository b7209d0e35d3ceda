"""Text and JSON lines to shards: every document once, on its side, whatever the processes; bad
lines by file and number."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards
import tokenize_text
import train_gpt
from helpers import ROOT, events

TEXTS = [f"document {i}: " + "lorem ipsum \u00e9\u4e2d " * (i % 7) for i in range(120)]


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def documents(folder: Path, split: str, start: int = 256) -> list[list[int]]:
    """The documents of a split, in order, from the bytes of its shards."""
    found = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        tokens = np.frombuffer(path.read_bytes()[1024:], "<u2").tolist()
        assert tokens[0] == start  # a document lies in one shard
        for token in tokens:
            found.append([]) if token == start else found[-1].append(token)
    return found


def expected(texts: list[str], share: float) -> dict[str, list[list[int]]]:
    sides = {"train": [], "val": []}
    for text in texts:
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
        sides["val" if digest / 2**64 < share else "train"].append(list(text.encode()))
    return sides


def run(*words: str | Path) -> str:
    """The sentence with which it ends, or nothing."""
    try:
        tokenize_text.main([str(word) for word in words])
    except SystemExit as stop:
        assert isinstance(stop.code, str) and stop.code.startswith("data/tokenize_text.py: ")
        assert "\n" not in stop.code
        return stop.code
    return ""


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "txt.gz", "ndjson"])
def test_every_document_once_and_on_its_side(tmp_path: Path, data_dir: Path, kind: str) -> None:
    texts = [text + "\n" for text in TEXTS]
    content = jsonl(texts) if "json" in kind else "<|endoftext|>\n".join(texts).encode()
    source = tmp_path / f"in.{kind}"
    source.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    assert (
        run(
            "mine",
            source,
            "--tokenizer",
            "bytes",
            "--val-share",
            "0.2",
            "--shard-tokens",
            "1000",
            "--processes",
            "2",
        )
        == ""
    )
    sides = expected(texts, 0.2)
    assert 10 < len(sides["val"]) < 40
    assert {split: documents(data_dir / "mine", split) for split in sides} == sides
    manifest = shards.read_manifest(data_dir / "mine")
    assert (manifest["corpus"], manifest["vocab_size"], manifest["document_start"]) == ("mine", 257, 256)
    names = sorted(path.name for path in (data_dir / "mine").iterdir())
    assert names == sorted(["manifest.json", *manifest["files"]]) and "train_000002.bin" in names
    assert "val_000000.bin" in names
    for name, entry in manifest["files"].items():
        shards.check_shard(data_dir / "mine" / name, entry, full=True)
        assert entry["tokens"] <= 1000
    assert [path.name for path in data_dir.iterdir()] == ["mine"]


def test_the_number_of_processes_and_the_other_files_do_not_matter(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_text, "BATCH_BYTES", 200)  # many tasks
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:60]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(TEXTS[60:]))
    for name, processes in (("one", 1), ("three", 3)):
        assert run(name, tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--tokenizer", "bytes", "--val-share",
                   ".1", "--processes", processes) == ""  # fmt: skip
    assert run("part", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--val-share", ".1") == ""
    contents = [
        {p.name: p.read_bytes() for p in (data_dir / name).glob("*.bin")} for name in ("one", "three")
    ]
    assert contents[0] == contents[1]
    whole, part = (documents(data_dir / name, "val") for name in ("one", "part"))
    assert part and part == whole[: len(part)]


def test_gpt2_tokens_come_from_tiktoken(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = SimpleNamespace(encode_ordinary=lambda text: [len(word) for word in text.split(" ")])
    monkeypatch.setattr(tokenize_text, "gpt2", lambda: stand_in)
    (tmp_path / "in.jsonl").write_bytes(jsonl(["a <|endoftext|> b", *TEXTS]))
    assert run("mine", tmp_path / "in.jsonl", "--val-share", "0.3") == ""
    manifest = shards.read_manifest(data_dir / "mine")
    assert (manifest["vocab_size"], manifest["document_start"]) == (50257, 50256)
    both = documents(data_dir / "mine", "train", 50256) + documents(data_dir / "mine", "val", 50256)
    assert sorted(both) == sorted(
        [[len(word) for word in text.split(" ")] for text in ["a <|endoftext|> b", *TEXTS]]
    )


GOOD = jsonl(["a", "b"])
BAD_LINES = {
    "not JSON": (b"{oops\n", "not JSON"),
    "a list": (b"[1]\n", "no JSON object with a text 'text'"),
    "no field": (b'{"txt": "x"}\n', "no JSON object with a text 'text'"),
    "a number": (b'{"text": 3}\n', "no JSON object with a text 'text'"),
    "not UTF-8": (b'{"text": "\xff"}\n', "not UTF-8"),
    "half a pair": (b'{"text": "\\ud800"}\n', "not Unicode"),
    "deep": (b'{"text": ' + b"[" * 200_000 + b"\n", "not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_reported_by_file_and_number(
    tmp_path: Path, data_dir: Path, capfd: pytest.CaptureFixture, name: str
) -> None:
    line, reason = BAD_LINES[name]
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + line + jsonl(TEXTS))
    sentence = run("mine", source, "--tokenizer", "bytes", "--val-share", "0.2")
    assert f"{source}:3: " in sentence and reason in sentence and "--skip-bad" in sentence
    assert not list(data_dir.rglob("*"))  # nothing is left, under no name
    capfd.readouterr()
    assert run("mine", source, "--tokenizer", "bytes", "--val-share", "0.2", "--skip-bad") == ""
    said = capfd.readouterr()
    assert f"left out: {source}:3: " in said.err and "1 bad lines" in said.out
    assert len(documents(data_dir / "mine", "train") + documents(data_dir / "mine", "val")) == len(TEXTS) + 2


def test_a_bad_line_of_a_text_file_is_named(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes(b"good\n<|endoftext|>\nstill good\n\xff\xfe\n")
    assert f"{source}:4: not UTF-8" in run("mine", source, "--tokenizer", "bytes")


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, data_dir: Path, cut: bool) -> None:
    content = bytearray(gzip.compress(jsonl(TEXTS)))
    if cut:
        content = content[:-20]
    else:
        content[200] ^= 255
    (tmp_path / "in.jsonl.gz").write_bytes(content)
    assert f"{tmp_path / 'in.jsonl.gz'}: cannot be read" in run(
        "mine", tmp_path / "in.jsonl.gz", "--tokenizer", "bytes"
    )
    assert not list(data_dir.rglob("*"))


def lines_of_json(texts: list[str]) -> dict[str, bytes]:
    """A file for each text, as `sed -n Np` makes them of JSON lines."""
    return {f"{i}.json": jsonl([text]) for i, text in enumerate(texts)}


TOGETHER = "<|endoftext|>".join(TEXTS).encode()
OTHER_CONTENT = {  # name: (files, words)
    "lines of JSON in .json": (lines_of_json(TEXTS), []),
    "JSON lines in .json": ({"d.json": jsonl(TEXTS)}, []),
    "a name in capitals": ({"d.JSONL": jsonl(TEXTS)}, []),
    "JSON lines in .json.gz": ({"d.json.gz": gzip.compress(jsonl(TEXTS))}, []),
    "gzip in .jsonl": ({"d.jsonl": gzip.compress(jsonl(TEXTS))}, []),
    "gzip in .txt": ({"d.txt": gzip.compress(TOGETHER)}, []),
    "a .gz that a browser has unpacked": ({"d.jsonl.gz": jsonl(TEXTS)}, []),
    "JSON lines in .txt": ({"d.txt": jsonl(TEXTS)}, ["--format", "jsonl"]),
    "text in .jsonl": ({"d.jsonl": TOGETHER}, ["--format", "text"]),
    "separators within a line": ({"d.txt": TOGETHER}, []),
    "separators with spaces": ({"d.txt": "\n <|endoftext|> \n".join(TEXTS).encode()}, []),
    "separators before a text": ({"d.txt": "\n<|endoftext|>".join(TEXTS).encode()}, []),
    "separators after a text": ({"d.txt": "<|endoftext|>\n".join(TEXTS).encode()}, []),
}


@pytest.mark.parametrize("name", OTHER_CONTENT)
def test_content_counts_where_the_name_says_something_else(
    tmp_path: Path, data_dir: Path, name: str
) -> None:
    files, words = OTHER_CONTENT[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    paths = [tmp_path / file for file in files]
    assert run("mine", *paths, "--tokenizer", "bytes", "--val-share", "0.2", *words) == ""
    found = documents(data_dir / "mine", "train") + documents(data_dir / "mine", "val")
    stripped = [bytes(document).decode().strip() for document in found]
    assert sorted(stripped) == sorted(text.strip() for text in TEXTS)


CONTRADICTIONS = {  # name: (file, content, part of the sentence)
    "JSON lines": ("d.txt", jsonl(TEXTS), ":1: a line of JSON in a file that its name makes text; --format"),
    "JSON lines with a BOM": ("d.txt", b"\xef\xbb\xbf" + jsonl(TEXTS), ":1: a line of JSON"),
    "JSON after empty lines": ("d", b"\n\n" + jsonl(TEXTS), ":3: a line of JSON"),
    "JSON lines in gzip": ("d.md.gz", gzip.compress(jsonl(TEXTS)), ":1: a line of JSON"),
    "an array": ("d.txt", json.dumps([{"text": text} for text in TEXTS]).encode(), ":1: a line of JSON"),
    "text": ("d.jsonl", TOGETHER, ":1: not JSON; JSON lines hold one object in a line; --format text"),
    "an object in lines": ("d.json", b'{\n"text": "x"\n}\n', ":1: not JSON; JSON lines hold one object"),
    "zstd": ("d.txt", b"\x28\xb5\x2f\xfd rest", " is zstd by its content"),
    "bzip2": ("d.jsonl.gz", b"BZh91AY&SY rest", " is bzip2 by its content"),
    "zip": ("d.txt", b"PK\x03\x04 rest", " is zip by its content"),
    "UTF-16": ("d.txt", "text".encode("utf-16"), " is UTF-16 by its content"),
    "UTF-16 without a mark": ("d.txt", "text".encode("utf-16-le"), ":1: a zero byte, so it is no text"),
    "a tar file": ("d.txt.gz", gzip.compress(b"name\0\0\0text of a file"), ":1: a zero byte"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_content_that_contradicts_the_name_is_refused(tmp_path: Path, data_dir: Path, name: str) -> None:
    file, content, says = CONTRADICTIONS[name]
    (tmp_path / file).write_bytes(content)
    assert f"{tmp_path / file}{says}" in run("mine", tmp_path / file, "--tokenizer", "bytes")
    assert not list(data_dir.rglob("*"))


def test_texts_that_only_begin_like_json_are_texts(tmp_path: Path, data_dir: Path) -> None:
    for i, begin in enumerate(["[1] a footnote", "{curly}", "[]", "[1]", "BZhang", '"a"', "{"]):
        (tmp_path / f"{i}.txt").write_text(begin + "\n" + '{"a": 1}\n' + "\n<|endoftext|>\n".join(TEXTS))
    assert run("mine", *tmp_path.glob("*.txt"), "--tokenizer", "bytes", "--val-share", "0.2") == ""


def test_what_cannot_be_tokenized_is_refused_in_one_sentence(tmp_path: Path, data_dir: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("one document only")
    assert "one document of 17 tokens is too little" in run("mine", source, "--tokenizer", "bytes")
    source.write_text("\n")
    assert "the files hold no text" in run("mine", source, "--tokenizer", "bytes")
    assert "nothing.txt is not a file" in run("mine", tmp_path / "nothing.txt", "--tokenizer", "bytes")
    assert "a corpus name has" in run("../mine", source, "--tokenizer", "bytes")
    (data_dir / "mine").mkdir(parents=True)
    assert "is there already" in run("mine", source, "--tokenizer", "bytes")
    assert not list((data_dir / "mine").iterdir())


def test_empty_documents_are_left_out(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["", " \n", *TEXTS]) + b"\n\n")
    assert run("mine", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--val-share", "0.2") == ""
    assert "2 empty documents" in capsys.readouterr().out
    assert len(documents(data_dir / "mine", "train") + documents(data_dir / "mine", "val")) == len(TEXTS)


# --------------------------------------------------------------------------------------------------
# Long documents and few documents


def reference_cut(text: str, limit: int) -> list[str]:
    """The same cut character by character, of a text of ASCII."""
    pieces = []
    while len(text) > limit:
        ends = {}
        for end in range(limit // 2 + 1, limit + 1):
            head = text[:end]
            lines = head.split("\n")
            if len(lines) > 2 and not lines[-1] and not lines[-2].strip():
                goodness = 3
            elif head.endswith("\n"):
                goodness = 2
            else:
                goodness = int(head[-1].isspace() or text[end].isspace())
            ends[goodness] = end
        pieces.append(text[: ends[max(ends)]])
        text = text[len(pieces[-1]) :]
    return [*pieces, text]


@given(st.text(alphabet="ab \t\n", max_size=120), st.integers(1, 30))
def test_long_documents_are_cut_at_empty_lines_lines_and_words(text: str, limit: int) -> None:
    tokens = np.frombuffer(text.encode(), np.uint8)
    ends = tokenize_text.cut(tokens, limit, "bytes")
    pieces = [text[begin:end] for begin, end in zip([0, *ends], ends)]
    assert "".join(pieces) == text and all(len(piece) <= limit for piece in pieces)
    assert pieces == reference_cut(text, limit)


def test_no_cut_within_a_character() -> None:
    encoded = ("\u4e2d" * 50).encode()
    ends = tokenize_text.cut(np.frombuffer(encoded, np.uint8), 20, "bytes")
    assert [encoded[begin:end].decode() for begin, end in zip([0, *ends], ends)] == ["\u4e2d" * 6] * 8 + [
        "\u4e2d" * 2
    ]


class Words:
    """A stand-in of tiktoken's GPT-2: a token for each word with the space before it, or for a line end."""

    texts = [b"\n", b"a", b" a", b" b.", b"  "]

    def encode_ordinary(self, text: str) -> list[int]:
        found = re.findall(r"\n| a| b\.|a|  ", text)
        assert "".join(found) == text
        return [self.texts.index(word.encode()) for word in found]

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self.texts[token] if token < len(self.texts) else b"x"


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Iterator[Words]:
    """The workers are forked, so they have it too."""
    stand_in = Words()
    monkeypatch.setattr(tokenize_text, "gpt2", lambda: stand_in)
    tokenize_text.kinds.cache_clear()
    yield stand_in
    tokenize_text.kinds.cache_clear()


def test_gpt2_tokens_are_cut_at_the_same_places(words: Words) -> None:
    def cut(text: str, limit: int) -> list[str]:
        tokens = np.array(words.encode_ordinary(text), np.uint16)
        ends = tokenize_text.cut(tokens, limit, "gpt2")
        return [b"".join(words.texts[t] for t in tokens[a:b]).decode() for a, b in zip([0, *ends], ends)]

    assert cut("a a\n\na a\na a a", 7) == ["a a\n\n", "a a\na a a"]
    assert cut("a a a\n  \na a\na a a", 8) == ["a a a\n  \n", "a a\na a a"]
    assert cut("a a a\na a a", 5) == ["a a a\n", "a a a"]
    assert cut("a b. b. b. b. b.", 4) == ["a b. b. b.", " b. b."]


def book(number: int, paragraphs: int) -> str:
    """Paragraphs of two lines, none of which is in another book."""
    lines = [f"book {number}, line {i}: " + "word " * (i % 9) for i in range(2 * paragraphs)]
    return "\n\n".join("\n".join(pair) for pair in zip(lines[::2], lines[1::2])) + "\n"


def test_all_text_of_long_documents_is_there(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    """In the order of the text; validation has whole documents."""
    books = [book(i, 20 + i) for i in range(40)]
    (tmp_path / "in.jsonl").write_bytes(jsonl(books))
    options = ["--tokenizer", "bytes", "--val-share", "0.2", "--document-tokens", "101"]
    assert run("mine", tmp_path / "in.jsonl", *options) == ""
    sides = expected(books, 0.2)
    train, val = documents(data_dir / "mine", "train"), documents(data_dir / "mine", "val")
    assert val == sides["val"] and sum(train, []) == sum(sides["train"], [])
    assert max(map(len, train)) <= 100  # the start is the other one
    assert all(bytes(document).endswith(b"\n") for document in train)
    said = capsys.readouterr().out
    assert f"documents of more than 101 tokens, {len(sides['train'])} into {len(train):,}" in said


def split_of(folder: Path, books: list[str]) -> dict[int, list[str]]:
    """For each side the books of which it has text: {number of the book: sides}."""
    found = {i: [] for i in range(len(books))}
    for split in ("train", "val"):
        text = b"".join(bytes(document) for document in documents(folder, split)).decode()
        for i in {int(number) for number in re.findall(r"book (\d+),", text)}:
            found[i].append(split)
    return found


def test_of_few_long_documents_a_whole_one_validates(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    """Sixty books of which the hash takes none: one of the size of the share, and copies of it, validate."""
    books = [book(i, 12 + i % 7) for i in range(60)]
    assert not expected(books, 0.0001)["val"]
    for i, text in enumerate([*books, *books[:30]]):
        (tmp_path / f"{i}.txt").write_text(text)
    paths = sorted(tmp_path.glob("*.txt"))
    assert run("mine", *paths, "--tokenizer", "bytes", "--val-share", ".0001", "--processes", "2") == ""
    said = capsys.readouterr().out
    assert "too few documents to choose by their hash (60): one of them validates" in said
    sides = split_of(data_dir / "mine", books)
    assert [len(found) for found in sides.values()] == [1] * 60
    assert sum(found == ["val"] for found in sides.values()) == 1
    both = documents(data_dir / "mine", "train") + documents(data_dir / "mine", "val")
    assert sum(map(len, both)) == sum(path.stat().st_size for path in paths)
    assert [path.name for path in data_dir.iterdir()] == ["mine"]
    # neither the order of the files nor the number of processes matters
    val = documents(data_dir / "mine", "val")
    options = ["--tokenizer", "bytes", "--val-share", ".0001", "--processes", "1"]
    assert run("again", *paths[::-1], *options) == ""
    assert documents(data_dir / "again", "val") == val


@pytest.mark.parametrize("count", [1, 3])
def test_of_one_long_document_the_end_validates(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture, count: int
) -> None:
    books = [book(i, 200 + i) for i in range(count)]
    for i, text in enumerate(books):
        (tmp_path / f"{i}.txt").write_text(text)
    assert run("mine", *tmp_path.glob("*.txt"), "--tokenizer", "bytes") == ""
    said = capsys.readouterr().out
    assert f"their hash ({count}): the end of the longest validates" in said
    assert "both sides hold parts of the same text" in said
    (val,) = documents(data_dir / "mine", "val")
    assert books[-1].encode().endswith(bytes(val))
    assert 0.002 < len(val) / sum(map(len, books)) < 0.04
    train = documents(data_dir / "mine", "train")
    assert sorted(sum(train, []) + val) == sorted("".join(books).encode())


def test_of_few_short_documents_one_validates_and_one_trains(tmp_path: Path, data_dir: Path) -> None:
    for i, share in enumerate([".0001", ".9999"]):
        (tmp_path / "in.jsonl").write_bytes(jsonl(TEXTS[:3]))
        assert run(f"mine{i}", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--val-share", share) == ""
        counts = [len(documents(data_dir / f"mine{i}", split)) for split in ("train", "val")]
        assert sum(counts) == 3 and all(counts)


# --------------------------------------------------------------------------------------------------
# In a process of its own


def alive(session: int) -> list[str]:
    """The processes of a session that have not ended."""
    said = subprocess.run(["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True).stdout
    return [state for state in said.split() if not state.startswith("Z")]


def wait_for(what: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.skipif(not shutil.which("ps"), reason="this machine has no ps")
def test_a_killed_run_leaves_no_workers_and_the_next_one_clears_up(tmp_path: Path, data_dir: Path) -> None:
    """Another run that is under way keeps what it has written."""
    (tmp_path / "big.jsonl").write_bytes(jsonl(TEXTS) * 800)
    (tmp_path / "small.jsonl").write_bytes(jsonl(TEXTS))
    environment = {**os.environ, "DATA_DIR": str(data_dir)}

    def begin(name: str, source: str) -> subprocess.Popen:
        words = [name, str(tmp_path / source), "--tokenizer", "bytes", "--processes", "2"]
        script = str(ROOT / "data" / "tokenize_text.py")
        return subprocess.Popen(
            [sys.executable, script, *words, "--val-share", "0.2", "--shard-tokens", "10000"],
            start_new_session=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    killed, stopped = begin("one", "big.jsonl"), begin("two", "big.jsonl")
    try:
        for name in ("one", "two"):
            wait_for(lambda name=name: list(data_dir.glob(f".{name}.*/*/train_000001.bin")))
        os.killpg(stopped.pid, signal.SIGSTOP)
        assert len(alive(killed.pid)) == 3
        killed.kill()
        killed.wait()
        wait_for(lambda: not alive(killed.pid))
        assert list(data_dir.glob(".one.*"))
        assert begin("three", "small.jsonl").wait(60) == 0
        left = sorted(path.name.split(".")[1] for path in data_dir.glob(".*"))
        assert left == ["two"] and (data_dir / "three" / "manifest.json").is_file()
        os.killpg(stopped.pid, signal.SIGCONT)
        assert stopped.wait(60) == 0
        assert sorted(path.name for path in data_dir.iterdir()) == ["three", "two"]
    finally:
        for process in (killed, stopped):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def printed(said: str, data_dir: Path) -> tuple[train_gpt.Track, list[str]]:
    """The track of the command in the last line that was printed, and its words from the track on."""
    words = shlex.split(said.splitlines()[-1])
    assert words[:2] == ["env", f"DATA_DIR={data_dir}"]
    assert words[2] == ("./run.sh" if Path.cwd() == ROOT else str(ROOT / "run.sh"))
    track, _ = train_gpt.parse_command_line(["--track", *words[3:]])
    return track, words[3:]


@pytest.mark.parametrize("texts, epochs", [
    ([book(i, 30) for i in range(500)], 1),
    (["abcdefgh " * 44] * 3 + [f"story {i} " + "abcdefgh " * 44 for i in range(90)], 9),
    ([book(1, 240)], 10),
    (TEXTS[:60], 0),
], ids=["much", "a collection of stories", "one file of 24 KB", "nearly nothing"])  # fmt: skip
def test_the_printed_command_fits_the_data(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture, texts: list[str], epochs: int
) -> None:
    """For bytes; with the track's own steps up to ten epochs, then with fewer, but not below a quarter."""
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts))
    assert run("mine", tmp_path / "in.jsonl", "--tokenizer", "bytes") == ""
    track, _ = printed(capsys.readouterr().out, data_dir)
    assert train_gpt.check_data(track, data_dir / "mine")["documents"] > 0
    _, val, _ = train_gpt.shards_of(data_dir / "mine", track.data)
    evaluation = track.evaluation
    assert train_gpt.validation_rows(val, track.data, evaluation.row_tokens, evaluation.tokens)
    steps = train_gpt.TRACKS["tiny"].schedule.steps
    whole = track.schedule.steps == steps
    if epochs == 0:
        assert track.schedule.steps == math.ceil(steps / 4) and track.data.epochs > 10
    else:
        assert whole == (epochs < 10) and abs(track.data.epochs - epochs) <= (epochs > 1)
    if track.data.epochs > 1:  # no more than are needed
        fewer = dataclasses.replace(track, data=dataclasses.replace(track.data, epochs=track.data.epochs - 1))
        with pytest.raises(ValueError, match=f"--data.epochs {track.data.epochs}"):
            train_gpt.check_data(fewer, data_dir / "mine")


def test_the_printed_command_of_gpt2_tokens_fits_the_data(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture, words: Words
) -> None:
    (tmp_path / "in.txt").write_text((" a b." * 9 + "\n") * 30_000)
    assert run("mine", tmp_path / "in.txt") == ""
    said = capsys.readouterr().out
    track, words = printed(said, data_dir)
    assert words[0] == "short" and track.schedule.steps == math.ceil(1450 / 4)
    assert train_gpt.check_data(track, data_dir / "mine")["documents"] < 30
    assert max(map(len, documents(data_dir / "mine", "train", 50256))) <= 2047


def test_without_torch_the_corpus_is_made_all_the_same(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "train_gpt", None)
    (tmp_path / "in.jsonl").write_bytes(jsonl(TEXTS))
    assert run("mine", tmp_path / "in.jsonl", "--tokenizer", "bytes", "--val-share", "0.2") == ""
    said = capsys.readouterr().out
    assert "cannot be imported" in said and "--data.corpus mine" in said.splitlines()[-1]
    assert (data_dir / "mine" / "manifest.json").is_file()


def test_as_a_user_types_it(tmp_path: Path, data_dir: Path) -> None:
    """Each in a process of its own: the corpus is made, and the printed command trains on it."""
    (tmp_path / "in.jsonl").write_bytes(jsonl([book(i, 30) for i in range(20)]))
    script = str(ROOT / "data" / "tokenize_text.py")
    command = [sys.executable, script, "mine", "in.jsonl", "--tokenizer", "bytes", "--val-share", "0.2"]
    environment = {**os.environ, "DATA_DIR": str(data_dir)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f" {ROOT / 'run.sh'} " in done.stdout  # it was typed elsewhere
    track, words = printed(done.stdout.replace(str(ROOT / "run.sh"), "./run.sh"), data_dir)
    validated = sum(map(len, documents(data_dir / "mine", "val")))
    assert track.evaluation.tokens == validated and track.data.epochs > 1
    # as it is printed, but for what makes the run short
    short = ["--schedule.steps", "4", "--compile", "none", "--out", str(tmp_path / "logs")]
    command = [str(ROOT / "run.sh"), "--system", *words, *short]
    environment |= {"PYTHON": sys.executable, "CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    final = events(log)[-1]
    assert (final["event"], final["step"], final["val_tokens"]) == ("final", 4, validated)
