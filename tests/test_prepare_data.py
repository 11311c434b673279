"""Tests of prepare_data.py: what is written is what was said, whatever breaks; no network."""

import errno
import gzip
import hashlib
import http.client
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import prepare_data
from prepare_data import DataConfig, PrepareConfig, get_tokenizer, open_dataset, prepare
from support.config import one_line_errors

SCRIPT = Path(prepare_data.__file__)
SEPARATOR = "\n<|endoftext|>\n"
DOCUMENTS = ["first document\n\nwith lines", "zweites: \u00e4\u00f6\u00fc \u20ac \U0001f600", "x",
             "windows\r\nlines\r\n", "a separator\n<|endoftext|> is a whole line",
             *[f"document {i} " * (i % 7 + 1) for i in range(40)]]
BYTES = get_tokenizer("bytes")
TRUTHS = settings(deadline=None, max_examples=100, derandomize=True)


def prepare_as(tmp_path, name, **flags):
    data = DataConfig(name, str(tmp_path / "data"))
    return prepare(PrepareConfig(data=data, **{"processes": 1, **flags}))


def make(tmp_path, documents=DOCUMENTS, **flags):
    """Prepare "mine" from one text file with byte tokens; every third document is in val's."""
    (tmp_path / "train.txt").write_bytes(SEPARATOR.join(documents).encode())
    (tmp_path / "val.txt").write_bytes(SEPARATOR.join(documents[::3]).encode())
    files = {"input": str(tmp_path / "train.txt"), "val_input": str(tmp_path / "val.txt")}
    return prepare_as(tmp_path, "mine", **{**files, "tokenizer": "bytes", **flags})


def opened(tmp_path, name="mine"):
    train, val, meta = open_dataset(DataConfig(name, str(tmp_path / "data")))
    return train.tolist(), val.tolist(), meta


def byte_tokens(documents):
    """The oracle of the byte tokenizer: every byte, then 256."""
    return [token for text in documents for token in [*text.encode(), 256]]


def left_over(tmp_path):
    """What lies in the data folder, hidden or not."""
    return sorted(p.name for p in (tmp_path / "data").glob("*"))


def compress(data, ending):
    if ending == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending](data)


def read(data, kind, chunk):
    """Return the non-empty documents of a file with these bytes, read `chunk` bytes at a time."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(prepare_data, "CHUNK", chunk):
        path = Path(folder, f"f{kind}")
        path.write_bytes(data)
        return [text for text in prepare_data._documents(path, tqdm(disable=True)) if text]


@TRUTHS
@given(st.text(), st.lists(st.integers(0, 256)))
@example("<|endoftext|>", [256])
@example("\r\n \x00" * 100, [])
def test_bytes_tokenizer_is_utf8(text, tokens):
    assert BYTES.encode_ordinary(text) == [*text.encode()]
    assert BYTES.decode([*text.encode()]) == text
    expected = b"".join(b"<|endoftext|>" if t == 256 else bytes([t]) for t in tokens)
    assert BYTES.decode_bytes(tokens) == expected
    assert BYTES.decode(tokens) == expected.decode(errors="replace")


def test_tokenizer_names_and_sizes(monkeypatch):
    assert (BYTES.name, BYTES.n_vocab, BYTES.eot_token) == ("bytes", 257, 256)
    with pytest.raises(ValueError, match="'words'; use bytes or gpt2"):
        get_tokenizer("words")
    monkeypatch.setattr(tiktoken, "get_encoding", mock.Mock(side_effect=ConnectionError))
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")


def test_gpt2_shards(tmp_path):
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    names = [hashlib.sha1(f"{base}{name}".encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")]
    if not all(Path(os.environ.get("TIKTOKEN_CACHE_DIR", ""), name).is_file() for name in names):
        pytest.skip("TIKTOKEN_CACHE_DIR lacks GPT-2's vocabulary")  # never wait for a network
    tokenizer = get_tokenizer("gpt2")
    make(tmp_path, tokenizer="auto", processes=2)
    train, _, meta = opened(tmp_path)
    assert train == [t for text in DOCUMENTS for t in [*tokenizer.encode_ordinary(text), 50256]]
    assert tokenizer.encode_ordinary("hello world") == [31373, 995]
    literal = [27, 91, 437, 1659, 5239, 91, 29]  # <|endoftext|> inside a line is ordinary text
    assert any(train[i:i + 7] == literal for i in range(len(train)))
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("gpt2", 50257, 50256)
    assert meta["train"]["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)

    @TRUTHS
    @given(st.lists(st.sampled_from(["<|endoftext|>", "a", " the", "'s", "\n", "\u20ac", "  ", "17"])))
    def same_as_tiktoken(parts):
        text = "".join(parts) or "x"
        [(_, size, tokens)] = prepare_data._tokenize([(text, "train")], tokenizer, 1)
        assert tokens.tolist() == [*tokenizer.encode_ordinary(text), 50256]
        assert size == len(text.encode())
    same_as_tiktoken()


def test_shards_and_meta_against_oracle(tmp_path, capsys):
    folder = make(tmp_path)
    train, val, meta = open_dataset(DataConfig("mine", str(tmp_path / "data")))
    for split, tokens, texts in (("train", train, DOCUMENTS), ("val", val, DOCUMENTS[::3])):
        assert tokens.tolist() == byte_tokens(texts) and tokens.dtype == np.uint16
        assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
        raw = np.array(byte_tokens(texts), dtype="<u2").tobytes()
        assert (folder / f"{split}.bin").read_bytes() == raw
        assert meta[split] == {"tokens": len(raw) // 2, "bytes": len("".join(texts).encode()),
                               "documents": len(texts), "sha256": hashlib.sha256(raw).hexdigest()}
    assert meta["train"]["sha256"].startswith("a84541b4a61c3424")  # the same in all versions
    assert [meta[key] for key in ("format", "tokenizer", "vocab_size", "eot")] == [1, "bytes", 257, 256]
    assert "train.txt" in meta["source"] and "val.txt" in meta["source"]
    assert left_over(tmp_path) == ["mine"]
    assert f"{len(train):,} tokens, {len(DOCUMENTS)} documents" in capsys.readouterr().out


def split_oracle(text):
    """Split at whole lines; the lookahead leaves a line end to a second separator behind it."""
    parts = re.split(r"\n<\|endoftext\|>(?=\n|\Z)", "\n" + text)
    return [part.removeprefix("\n") for part in parts]


PIECES = ["<|endoftext|>", "\n", "\r\n", "a", "\u20ac", " ", "<|endof", "text|>", SEPARATOR]


@TRUTHS
@given(st.lists(st.sampled_from(PIECES)).map("".join), st.integers(1, 40))
@example("a" + SEPARATOR + "b" + SEPARATOR, 1)
@example("<|endoftext|>\na\n<|endoftext|>", 1)
@example("a\r\n<|endoftext|>\r\nb\r\n", 5)
@example("a\n<|endoftext|>\n<|endoftext|>\n\nb", 3)
@example("".join(f"{text}{SEPARATOR}" for text in DOCUMENTS), 7)
def test_separators_at_any_chunk_boundary(text, chunk):
    found = read(text.encode(), ".txt", chunk)
    if "\r" not in text:
        assert found == [part for part in split_oracle(text) if part]
    else:  # which line end stays in front of a separator is left open; nothing else may differ
        expected = "".join(split_oracle(text.replace("\r\n", "\n")))
        assert "".join(found).replace("\r", "").replace("\n", "") == expected.replace("\n", "")


@TRUTHS
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), st.integers(1, 40),
       st.sampled_from([".txt", ".jsonl"]), st.sampled_from(["", ".gz", ".xz"]))
@example(["\u2028\x0b\x85 a\r", "\ufeffb"], 1, ".jsonl", "")
def test_round_trip_of_any_documents(documents, chunk, kind, ending):
    """Two streams in a row, and line ends that only str.splitlines knows, change nothing."""
    if kind == ".txt":
        documents = [d for d in documents if d.removeprefix("\ufeff") and "<|endoftext|>" not in d]
        data = SEPARATOR.join(["first", *documents]).encode()
    else:
        lines = [json.dumps({"text": d}, ensure_ascii=False) for d in ["first", *documents]]
        data = "\n".join(lines).encode()
    data = compress(data[:len(data) // 2], ending) + compress(data[len(data) // 2:], ending)
    assert read(data, kind + ending, chunk) == ["first", *documents]


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_every_compression(tmp_path, monkeypatch, kind, ending):
    monkeypatch.setattr(prepare_data, "CHUNK", 37)  # so that streams and lines begin anywhere
    documents = DOCUMENTS * 20  # longer than what the decompressors keep back
    data = "".join(text + SEPARATOR for text in documents).encode()
    if kind == ".jsonl":
        lines = (json.dumps({"id": 1, "text": text}) + "\n" * (len(text) % 2) for text in documents)
        data = "\n".join(lines).encode()
    path = tmp_path / f"a.b{kind}{ending}"
    one, two = compress(data[:len(data) // 2], ending), compress(data[len(data) // 2:], ending)
    path.write_bytes(one + two)  # two streams in a row
    make(tmp_path, input=str(path))
    assert opened(tmp_path)[0] == byte_tokens(documents)
    damages = [(one[:-9], "truncated"), (one + two[:-9], "truncated"), (b"no archive" * 9, "damaged"),
               (one + b"\xff" + two[1:], "damaged")]
    for content, message in damages if ending else ():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name}: {message}: [^\n]+\Z"):
            make(tmp_path, input=str(path), overwrite=True)
    assert left_over(tmp_path) == ["mine"] and opened(tmp_path)[0] == byte_tokens(documents)


BAD_JSON = 'a.jsonl: line 3: not a JSON object with a string "text": '


@pytest.mark.parametrize("name, content, message", [
    *[("a.jsonl", b'{"text": "fine"}\n\n' + line + b"\n", BAD_JSON + error) for line, error in (
        (b'{"text": "a"', "JSONDecodeError"), (b'["text"]', "TypeError"), (b"5", "TypeError"),
        (b'{"body": "a"}', "KeyError"), (b'{"text": 5}', "AttributeError.*'int'"),
        (b'{"text": null}', "AttributeError"), (b"[" * 100_000, "RecursionError"))],
    ("a.jsonl", b'\n{"text": "\xff"}\n', "a.jsonl: line 2: not UTF-8: .* 0xff in position 10: invalid"),
    ("a.txt", b"one\ntwo\nth\xffree\n", "a.txt: line 3: not UTF-8: .* 0xff in position 2: invalid"),
    ("a.txt", b"\n<|endoftext|>\n", "no document is in train; "),
    ("a.txt", b"only one", "no document is in val; .*--val_input"),
])
def test_unusable_files_are_one_line_that_names_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path, input=str(tmp_path / name), val_input="")
    assert "\n" not in str(caught.value) and left_over(tmp_path) == []


@pytest.mark.parametrize("name, content, documents", [
    ("a.txt", b"\xef\xbb\xbfa\r\n\xef\xbb\xbfb\r\n<|endoftext|>\r\nc\x0b\n", ["a\r\n\ufeffb", "c\x0b\n"]),
    ("a.jsonl", b'\xef\xbb\xbf{"text": "a\\ud800b \\ud83d\\ude00"}', ["a\ufffdb \U0001f600"]),
])
def test_odd_characters(tmp_path, name, content, documents):
    (tmp_path / name).write_bytes(content)
    make(tmp_path, input=str(tmp_path / name))
    train, _, meta = opened(tmp_path)
    assert train == byte_tokens(documents) and meta["train"]["bytes"] == len(train) - len(documents)


def test_folders_in_sorted_order_and_lists(tmp_path):
    for name, text in (("in/b.txt", "b"), ("in/a/z.jsonl", '{"text": "az"}'), ("in/a.txt", "a"),
                       ("in/c.md", "no"), ("last.txt", "last")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    make(tmp_path, input=f"{tmp_path}/in,{tmp_path}/last.txt")
    assert opened(tmp_path)[0] == byte_tokens(["az", "a", "b", "last"])
    for wrong in ("nowhere", "nowhere.txt", "in/c.md"):
        with pytest.raises(FileNotFoundError, match=rf"no .txt or .jsonl .* at \S+{wrong}$"):
            make(tmp_path, input=f"{tmp_path}/in,{tmp_path}/{wrong}", overwrite=True)


def test_memory_does_not_grow_with_the_data(tmp_path):
    random = np.random.default_rng(0)
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        for _ in range(2000):
            file.write((random.bytes(2000).hex() + SEPARATOR).encode())  # 8 MB in all
    tracemalloc.start()
    texts = ((text, "train") for text in prepare_data._texts(str(tmp_path / "a.txt.gz")))
    total = sum(size for _, size, _ in prepare_data._tokenize(texts, BYTES, 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 8_000_000 and peak < 1_500_000


def test_the_split_is_the_same_on_every_machine():
    """Python's own hash() changes with every start; SHA-256 does not."""
    keys = [f"key {i}" for i in range(100)]
    held_out = [int(key[4:]) for key in keys if prepare_data._split(key, 0.1) == "val"]
    assert held_out == [2, 10, 20, 25, 27, 30, 44, 54, 57, 62, 69, 83, 84, 87, 89, 92, 93, 99]
    assert {prepare_data._split(key, 0.0) for key in keys} == {"train"}


def test_held_out_documents_depend_on_the_text_only(tmp_path):
    documents = [f"text number {i}" for i in range(2000)]
    held_out = []
    for order in (1, -1):
        make(tmp_path, documents[::order], val_input="", val_fraction=0.1, overwrite=True)
        train, val, meta = opened(tmp_path)
        assert 140 < meta["val"]["documents"] < 260  # 200 +- 4.5 sigma
        assert meta["train"]["documents"] + meta["val"]["documents"] == 2000
        assert sorted(train + val) == sorted(byte_tokens(documents))
        held_out.append(bytes(t if t < 256 else 0 for t in val).split(b"\0")[:-1][::order])
    assert held_out[0] == held_out[1]
    make(tmp_path, documents, overwrite=True, val_input="", val_fraction=0.5)
    assert 900 < opened(tmp_path)[2]["val"]["documents"] < 1100


def test_stdlib_from_a_made_up_library(tmp_path, monkeypatch):
    names = [f"m{i}.py" for i in range(60)] + ["pkg/__init__.py", "pkg/b.py"]
    skipped = ["test/a.py", "pkg/tests/b.py", "site-packages/c.py", "idlelib/idle_test/d.py",
               "lib2to3/e.py", "f.txt"]
    for name in names + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    documents = list(prepare_data._stdlib(0.2))
    assert [text for text, _ in documents] == [f"# {name}\n" for name in sorted(names)]
    assert 3 <= sum(split == "val" for _, split in documents) <= 25
    for name in [*names, "a_new_one.py"]:
        (tmp_path / name).write_text(f"# {name}\n# in a new version\n")
    moved = dict(prepare_data._stdlib(0.2))
    assert all(moved[f"{text}# in a new version\n"] == split for text, split in documents)


def test_stdlib_of_this_python(tmp_path):
    """The default command, as a user runs it; one thread gives the same as one per core."""
    command = [sys.executable, SCRIPT, f"--data-dir={tmp_path / 'data'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "stdlib: bytes tokenizer; train " in done.stdout
    train, val, meta = open_dataset(DataConfig("stdlib", str(tmp_path / "data")))
    prepare_as(tmp_path, "stdlib", overwrite=True)
    assert opened(tmp_path, "stdlib")[2] == meta
    assert len(train) > 5 * len(val) > 1e5 and val[-1] == train[-1] == 256
    assert meta["train"]["tokens"] == meta["train"]["bytes"] + meta["train"]["documents"]
    text = bytes(val[val < 256].astype(np.uint8)).decode()
    assert "import " in text and "def " in text


@pytest.mark.parametrize("threads", [1, 2, 7, 256])
def test_order_and_look_ahead(threads):
    """Any number of threads gives the same; a reader that ran ahead would fill the memory."""
    texts, read = [text + str(i) for i, text in enumerate(DOCUMENTS * 8)], 0

    def documents():
        nonlocal read
        for read, text in enumerate(texts, start=1):  # noqa: B007
            yield from ((text, "train" if read % 3 else "val"), ("", "val"))

    pieces = prepare_data._tokenize(documents(), BYTES, threads)
    for done, (split, size, tokens) in enumerate(pieces, start=1):
        assert read <= done + 4 * threads
        assert split == ("train" if done % 3 else "val") and size == len(texts[done - 1].encode())
        assert tokens.tolist() == byte_tokens([texts[done - 1]]) and tokens.dtype == np.dtype("<u2")
    assert done == read == len(texts)


def test_threads_are_enough():
    """tiktoken lets other threads run; otherwise --processes would speed up nothing."""
    thread = threading.Thread(target=BYTES.encode_to_numpy, args=("some text " * 1_000_000,))
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 10


def test_an_odd_document_is_named(tmp_path, monkeypatch):
    """A panic in Rust is no Exception; it must become one line all the same."""
    broken = mock.Mock(encode_to_numpy=mock.Mock(side_effect=BaseException("panic")))
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: broken)
    with pytest.raises(ValueError, match=r"^tiktoken fails on the document 'first document\\n.*: panic$"):
        make(tmp_path)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_preparation_that_is_ended(tmp_path, end):
    """Ctrl-C leaves nothing; SIGKILL nothing that looks finished, and the next run cleans up."""
    (tmp_path / "long.txt").write_text(f"{'a line of text, ' * 60}{SEPARATOR}" * 40_000)
    command = [sys.executable, SCRIPT, "--dataset=mine", f"--input={tmp_path / 'long.txt'}",
               "--tokenizer=bytes", f"--data_dir={tmp_path / 'data'}", "--processes=2"]
    # A shell starts background jobs, perhaps these tests, with Ctrl-C switched off: switch it on.
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    shard = tmp_path / "data" / ".mine.tmp" / "new" / "train.bin"
    while not (shard.exists() and shard.stat().st_size):
        assert run.poll() is None, "ended too early"
        time.sleep(0.01)
    run.send_signal(end)
    _, errors = run.communicate(timeout=60)
    assert errors == "" and run.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert left_over(tmp_path) == ([] if end == signal.SIGINT else [".mine.tmp"])
    with pytest.raises(FileNotFoundError):
        opened(tmp_path)
    make(tmp_path)
    assert left_over(tmp_path) == ["mine"] and opened(tmp_path)[0] == byte_tokens(DOCUMENTS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("full", ["train.bin", "val.bin", "meta.json"])
def test_a_full_disk(tmp_path, monkeypatch, capsys, full):
    """/dev/full takes nothing: the error is the kernel's own."""
    def open_full(path, mode="r"):
        return open("/dev/full" if Path(path).name == full else path, mode)
    monkeypatch.setattr(prepare_data, "open", open_full, raising=False)
    with pytest.raises(SystemExit) as end, one_line_errors():
        make(tmp_path)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in error and str(tmp_path / "data") in error
    assert left_over(tmp_path) == []


def test_overwrite(tmp_path):
    make(tmp_path)
    with pytest.raises(FileExistsError, match="exists already; use --overwrite"):
        make(tmp_path, ["other"])
    assert opened(tmp_path)[0] == byte_tokens(DOCUMENTS)
    make(tmp_path, ["other"], overwrite=True)
    assert opened(tmp_path)[0] == byte_tokens(["other"]) and left_over(tmp_path) == ["mine"]
    (tmp_path / "data" / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="other files"):
        make(tmp_path, overwrite=True)
    assert opened(tmp_path)[0] == byte_tokens(["other"]) and left_over(tmp_path) == ["mine"]


def test_a_second_preparation_is_refused(tmp_path):
    with prepare_data._workspace(tmp_path / "data" / "mine", overwrite=False) as first:
        (first / "train.bin").write_text("kept")
        with pytest.raises(ValueError, match="another preparation is at work in .*data"):
            make(tmp_path)
        assert (first / "train.bin").read_text() == "kept" and left_over(tmp_path) == [".mine.tmp"]
    assert left_over(tmp_path) == ["mine"]
    make(tmp_path, overwrite=True)


@pytest.mark.parametrize("name, more", [("stdlib", ""), ("fineweb", ""), ("mine", " --input=FILES")])
def test_a_missing_or_moved_dataset_names_the_command(tmp_path, name, more):
    command = f"python prepare_data.py --dataset={name} --data_dir={tmp_path}{more}"
    message = f"in {tmp_path}/{name}; say where it is with --data_dir, or make it: {command}$"
    with pytest.raises(FileNotFoundError, match=message):
        open_dataset(DataConfig(name, str(tmp_path)))


@pytest.mark.parametrize("file, damage, message", [
    ("train.bin", lambda raw: raw[:-2], r"train.bin: \d+ bytes, expected \d+; make it again: "),
    ("val.bin", lambda raw: raw + b"aa", r"val.bin: \d+ bytes, expected \d+; make it again: "),
    ("val.bin", lambda raw: b"", r"val.bin: 0 bytes, expected \d+"),
    ("train.bin", lambda raw: b"\0" + raw[1:], "train.bin: the checksum differs"),
    ("val.bin", lambda raw: b"\0" + raw[1:], "val.bin: the checksum differs"),
    ("meta.json", lambda raw: raw[:-20], "meta.json cannot be used: JSONDecodeError"),
    ("meta.json", lambda raw: b"\xff", "meta.json cannot be used: UnicodeDecodeError"),
    ("meta.json", lambda raw: b"[]", "meta.json cannot be used: TypeError"),
    ("meta.json", lambda raw: b"{}", "meta.json cannot be used: KeyError"),
    ("meta.json", lambda raw: raw.replace(b": 1979", b': "many"'), "meta.json cannot be used: ValueError"),
    ("meta.json", lambda raw: b'{"format": 99}', "format 99, this program reads format 1"),
    ("meta.json", lambda raw: raw.replace(b"257", b"256"), "token 256 is outside the vocabulary of 256"),
    ("train.bin", None, "train.bin is missing"),
    ("val.bin", None, "val.bin is missing"),
])
def test_damaged_datasets(tmp_path, monkeypatch, file, damage, message):
    path = make(tmp_path) / file
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        opened(tmp_path)
    error = str(caught.value)
    assert "\n" not in error and "--dataset=mine" in error and str(tmp_path) in error
    if "checksum" in message:  # which is left out for very large files
        monkeypatch.setattr(prepare_data, "VERIFY_LIMIT", 10)
        opened(tmp_path)


@pytest.mark.parametrize("flags, message", [
    (["--dataset=../x", "--input=a.txt"], "must be a plain folder name"),
    (["--dataset=.x", "--input=a.txt"], "must be a plain folder name"),
    (["--input=a.txt"], "--input=a.txt has no effect without a name of its own"),
    (["--dataset=mine"], "--dataset=mine needs --input"),
    (["--val_input=a.txt"], "--val_input=a.txt has no effect without --input"),
    (["--val-fraction=1"], "--val_fraction=1.0 must be"),
    (["--val-fraction=-0.1"], "--val_fraction=-0.1 must be"),
    (["--val-fraction=nan"], "--val_fraction=nan must be"),
    (["--dataset=shakespeare", "--val-fraction=0.1"], "--val_fraction=0.1 has no effect"),
    (["--dataset=mine", "--input=a", "--val_input=b", "--val-fraction=0.1"], "has no effect without a split"),
    (["--documents=1"], "--documents=1 has no effect"),
    (["--dataset=fineweb", "--documents=-1"], "--documents=-1 must be at least 0"),
    (["--processes=-1"], "--processes=-1 must be 0 to 256"),
    (["--processes=99999"], "--processes=99999 must be 0 to 256"),
    (["--overwrit"], "unknown argument --overwrit"),
    (["--dataset=mine", "--input=b.txt", "--tokenizer=bytes"], "error: input: no .txt or .jsonl "),
])
def test_flags_that_cannot_work(monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *flags])
    with pytest.raises(SystemExit) as end:
        prepare_data.main()
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert left_over(tmp_path) == []


def test_shakespeare(tmp_path, monkeypatch):
    text = "First Citizen:\nBefore we proceed any further, h\u00eare me speak.\r\n" * 30 + "tail"
    (tmp_path / "input.txt").write_bytes(text.encode())
    monkeypatch.setattr(prepare_data, "SHAKESPEARE", (tmp_path / "input.txt").as_uri())
    prepare_as(tmp_path, "shakespeare", tokenizer="bytes")
    train, val, meta = opened(tmp_path, "shakespeare")
    cut = int(0.9 * len(text))  # of the characters, not of the bytes
    assert (train, val) == (byte_tokens([text[:cut]]), byte_tokens([text[cut:]]))
    assert meta["source"].endswith("tinyshakespeare/input.txt")
    (tmp_path / "input.txt").unlink()
    broken_off = mock.Mock(side_effect=http.client.IncompleteRead(b"", 9))
    for function, message in ((urllib.request.urlopen, "No such file"), (broken_off, "IncompleteRead")):
        monkeypatch.setattr(urllib.request, "urlopen", function)
        with pytest.raises(OSError, match=f"download of file:.*input.txt failed: .*{message}"):
            prepare_as(tmp_path, "shakespeare", tokenizer="bytes", overwrite=True)
    assert left_over(tmp_path) == ["shakespeare"]


@pytest.mark.parametrize("name, address", [("openwebtext", ("Skylion007/openwebtext", None)),
                                           ("fineweb", ("HuggingFaceFW/fineweb", "sample-10BT"))])
def test_streamed_datasets(tmp_path, monkeypatch, name, address):
    documents = [f"page {i}\n\nof the w\u00ebb" for i in range(60)]
    rows_read = []

    def load_dataset(*args, **more):
        assert args == address and more == {"split": "train", "streaming": True}
        for text in documents:
            rows_read.append(text)
            yield {"text": text, "id": "7"}
        raise RuntimeError("connection\nlost")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    prepare_as(tmp_path, name, tokenizer="bytes", val_fraction=0.3, documents=50)
    held_out = [text for text in documents[:50] if prepare_data._split(text, 0.3) == "val"]
    train, val, meta = opened(tmp_path, name)
    assert 5 < len(held_out) < 30 and val == byte_tokens(held_out) and rows_read == documents[:50]
    assert train == byte_tokens([text for text in documents[:50] if text not in held_out])
    assert meta["source"] == address[0]
    with pytest.raises(OSError, match=f"reading {address[0]} failed: connection lost$"):
        prepare_as(tmp_path, name, tokenizer="bytes", overwrite=True)
    assert left_over(tmp_path) == [name]


@pytest.mark.parametrize("package, name, flags", [("datasets", "fineweb", {}),
                                                  ("zstandard", "mine", {"input": "a.txt.zst"})])
def test_missing_packages_are_named(tmp_path, monkeypatch, package, name, flags):
    monkeypatch.chdir(tmp_path)
    Path("a.txt.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs one more package: pip install {package}$"):
        prepare_as(tmp_path, name, tokenizer="bytes", **flags)
    assert left_over(tmp_path) == []
