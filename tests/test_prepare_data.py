"""Tests of prepare_data.py: what is written is what was said, whatever breaks; no network."""

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

import prepare_data
from prepare_data import DataConfig, PrepareConfig, get_tokenizer, open_dataset, prepare

SEPARATOR = "\n<|endoftext|>\n"
DOCUMENTS = ["first document\n\nwith lines", "zweites: \u00e4\u00f6\u00fc \u20ac \U0001f600", "x",
             "windows\r\nlines\r\n", "a separator\n<|endoftext|> is a whole line",
             *[f"document {i} " * (i % 7 + 1) for i in range(40)]]
BYTES = get_tokenizer("bytes")


def prepare_as(tmp_path, name, **flags):
    data = DataConfig(name, str(tmp_path / "data"))
    return prepare(PrepareConfig(data=data, **{"processes": 1, "tokenizer": "bytes", **flags}))


def make(tmp_path, documents=DOCUMENTS, **flags):
    """Prepare "mine" from one text file with byte tokens; every third document is in val's."""
    (tmp_path / "train.txt").write_bytes(SEPARATOR.join(documents).encode())
    (tmp_path / "val.txt").write_bytes(SEPARATOR.join(documents[::3]).encode())
    files = {"input": str(tmp_path / "train.txt"), "val_input": str(tmp_path / "val.txt")}
    return prepare_as(tmp_path, "mine", **{**files, **flags})


def opened(tmp_path, name="mine"):
    train, val, meta = open_dataset(DataConfig(name, str(tmp_path / "data")))
    return train.tolist(), val.tolist(), meta


def byte_tokens(documents):
    return [token for text in documents for token in [*text.encode(), 256]]  # the oracle


def left_over(tmp_path):
    return sorted(path.name for path in (tmp_path / "data").glob("*"))  # hidden or not


def compress(data, ending):
    """Return two streams, to be put in a row."""
    press = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}.get(ending)
    press = press or pytest.importorskip("zstandard").ZstdCompressor().compress
    return press(data[:len(data) // 2]), press(data[len(data) // 2:])


def read(data, kind, chunk=7):
    """Return the non-empty documents of a file with these bytes, read `chunk` bytes at a time."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(prepare_data, "CHUNK", chunk):
        path = Path(folder, f"a.b{kind}")
        path.write_bytes(data)
        return [text for text in prepare_data._documents(path) if text]


@given(st.text(), st.lists(st.integers(0, 256)))
@example("<|endoftext|>", [256])
def test_bytes_tokenizer_is_utf8(text, tokens):
    assert BYTES.encode_ordinary(text) == [*text.encode()] and BYTES.decode([*text.encode()]) == text
    expected = b"".join(b"<|endoftext|>" if t == 256 else bytes([t]) for t in tokens)
    assert BYTES.decode_bytes(tokens) == expected and BYTES.decode(tokens) == expected.decode(errors="replace")
    assert (BYTES.name, BYTES.n_vocab, BYTES.eot_token) == ("bytes", 257, 256)


def test_gpt2_shards(tmp_path):
    names = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    if not all(Path(os.environ.get("TIKTOKEN_CACHE_DIR", ""), name).is_file() for name in names):
        pytest.skip("TIKTOKEN_CACHE_DIR lacks GPT-2's vocabulary")  # never wait for a network
    tokenizer = get_tokenizer("gpt2")
    make(tmp_path, tokenizer="auto", processes=2)
    train, _, meta = opened(tmp_path)
    assert train == [t for text in DOCUMENTS for t in [*tokenizer.encode_ordinary(text), 50256]]
    literal = [27, 91, 437, 1659, 5239, 91, 29]  # <|endoftext|> inside a line is ordinary text
    assert any(train[i:i + 7] == literal for i in range(len(train)))
    assert [meta[key] for key in ("tokenizer", "vocab_size", "eot")] == ["gpt2", 50257, 50256]


def test_shards_and_meta_against_oracle(tmp_path, capsys):
    folder = make(tmp_path)
    train, val, meta = open_dataset(DataConfig("mine", str(tmp_path / "data")))
    for split, tokens, texts in (("train", train, DOCUMENTS), ("val", val, DOCUMENTS[::3])):
        raw = np.array(byte_tokens(texts), dtype="<u2").tobytes()
        assert tokens.tobytes() == raw == (folder / f"{split}.bin").read_bytes() and tokens.dtype == np.uint16
        assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
        assert meta[split] == {"tokens": len(raw) // 2, "bytes": len("".join(texts).encode()),
                               "documents": len(texts), "sha256": hashlib.sha256(raw).hexdigest()}
    assert meta["train"]["sha256"].startswith("a84541b4a61c3424")  # the same in all versions
    assert [meta[key] for key in ("format", "tokenizer", "vocab_size", "eot")] == [1, "bytes", 257, 256]
    assert re.fullmatch(r".*train.txt; val: .*val.txt", meta["source"]) and left_over(tmp_path) == ["mine"]
    assert f"{len(train):,} tokens, {len(DOCUMENTS)} documents" in capsys.readouterr().out


@given(st.lists(st.sampled_from(["<|endoftext|>", "\n", "\r\n", "a", "\u20ac", " ", "<|endof", "text|>", SEPARATOR]))
       .map("".join), st.integers(1, 40))
@example("a\r\n<|endoftext|>\r\nb\r\n", 5)
@example("a\n<|endoftext|>\n<|endoftext|>\n\nb", 3)
@example("".join(f"{text}{SEPARATOR}" for text in DOCUMENTS), 7)
def test_separators_at_any_chunk_boundary(text, chunk):
    """Against a split at whole lines; its lookahead leaves a line end to a second separator behind it."""
    found = read(text.encode(), ".txt", chunk)
    parts = re.split(r"\n<\|endoftext\|>(?=\n|\Z)", "\n" + text.replace("\r\n", "\n"))
    if "\r" not in text:
        assert found == [part.removeprefix("\n") for part in parts if part.removeprefix("\n")]
    else:  # which line end stays in front of a separator is left open; nothing else may differ
        assert re.sub(r"[\r\n]", "", "".join(found)) == "".join(parts).replace("\n", "")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), st.integers(1, 40))
@example(["\u2028\x0b\x85 a\r", "\ufeffb"], 1)
@example(DOCUMENTS[:4] * 200, 37)  # longer than what the decompressors keep back
def test_round_trip_of_any_documents(documents, chunk):
    """Two streams in a row, and line ends that only str.splitlines knows, change nothing."""
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in ["first", *documents]]
    plain = [text for text in documents if text.removeprefix("\ufeff") and "<|endoftext|>" not in text]
    for ending in ["", ".gz", ".xz", *[".zst"] * bool(importlib.util.find_spec("zstandard"))]:
        for kind, texts, data in ((".jsonl", documents, "\n\n".join(lines)),
                                  (".txt", plain, SEPARATOR.join(["first", *plain]))):
            assert read(b"".join(compress(data.encode(), ending)), kind + ending, chunk) == ["first", *texts]


@pytest.mark.parametrize("name, content, message", [
    *[(f"a.txt{ending}", content, f"a.txt{ending}: cannot read line [0-9]+ as UTF-8: {error}")
      for ending, damaged in ((".gz", "error: "), (".xz", "LZMAError: "), (".zst", "ZstdError: "))
      for content, error in (
          (lambda one, two: one[:-9], "EOFError: truncated"), (lambda one, two: one + two[:-9], "EOFError: truncated"),
          (lambda one, two: b"no file" * 9, damaged), (lambda one, two: one + b"\xff" + two[1:], damaged))],
    *[("a.jsonl", b'{"text": "fine"}\n\n' + line + b"\n",
       'a.jsonl: cannot read line 3 as a JSON object with a string "text": ' + error) for line, error in (
        (b'{"text": "a"', "JSONDecodeError"), (b'["text"]', "TypeError"), (b'{"body": "a"}', "KeyError"),
        (b'{"text": 5}', "AttributeError.*'int'"), (b'{"text": null}', "AttributeError"), (b"5", "TypeError"),
        (b"[" * 100_000, "RecursionError"), (b'{"text": "\xff"}', "UnicodeDecodeError: .* 0xff in position 10: inv"))],
    ("a.txt", b"one\ntwo\nth\xffree\n", "a.txt: cannot read line 3 as UTF-8: .* 0xff in position 2: invalid"),
    ("a.txt", b"\n<|endoftext|>\n", "no document is in train; "),
    ("a.txt", b"only one", "no document is in val; .*--val_input"),
])
def test_damaged_files_are_one_line_that_names_the_place(tmp_path, name, content, message):
    if callable(content):
        content = content(*compress(SEPARATOR.join(DOCUMENTS * 20).encode(), Path(name).suffix))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path, input=str(tmp_path / name), val_input="")
    assert "\n" not in str(caught.value) and left_over(tmp_path) == []


def test_odd_characters():
    assert read(b"\xef\xbb\xbfa\r\n\xef\xbb\xbfb\r\n<|endoftext|>\r\nc\x0b\n", ".txt") == ["a\r\n\ufeffb", "c\x0b\n"]
    assert read(b'\xef\xbb\xbf{"text": "a\\ud800b \\ud83d\\ude00"}', ".jsonl") == ["a\ufffdb \U0001f600"]


def test_folders_in_sorted_order_and_lists(tmp_path):
    """What is missing is noticed before anything is read: here a file that would be another error."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name, text in (("in/b.txt", "b"), ("in/a/z.jsonl", '{"text": "az"}'), ("in/a.txt", "a"), ("in/c.md", "no"),
                       ("last.txt", "last"), ("bad.jsonl", "no JSON")):
        (tmp_path / name).write_text(text)
    make(tmp_path, input=f"{tmp_path}/in,{tmp_path}/last.txt")
    assert opened(tmp_path)[0] == byte_tokens(["az", "a", "b", "last"])
    bad = f"{tmp_path}/bad.jsonl"
    for wrong in (f"{tmp_path}/nowhere", f"{tmp_path}/nowhere.txt", f"{tmp_path}/in/c.md"):
        for flags in ({"input": f"{bad},{wrong}"}, {"input": bad, "val_input": wrong}):
            with pytest.raises(FileNotFoundError, match=rf"no .txt or .jsonl .* at {wrong}$"):
                make(tmp_path, overwrite=True, **flags)


def test_memory_does_not_grow_with_the_data(tmp_path):
    random = np.random.default_rng(0)
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.writelines((random.bytes(2000).hex() + SEPARATOR).encode() for _ in range(2000))  # 8 MB in all
    tracemalloc.start()
    texts = prepare_data._own(str(tmp_path / "a.txt.gz"), "", 0.1)
    total = sum(size for _, size, _ in prepare_data._tokenize(texts, BYTES, 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 8_000_000 and peak < 1_500_000


def test_held_out_documents_depend_on_the_text_only(tmp_path):
    held_out = [i for i in range(100) if prepare_data._split(f"key {i}", 0.1) == "val"]
    assert held_out == [2, 10, 20, 25, 27, 30, 44, 54, 57, 62, 69, 83, 84, 87, 89, 92, 93, 99]
    documents = [f"text number {i}" for i in range(2000)]
    make(tmp_path, documents, val_input="", val_fraction=0.1)
    train, val, _ = opened(tmp_path)
    assert val == byte_tokens(text for text in documents if prepare_data._split(text, 0.1) == "val")
    assert 140 < val.count(256) < 260  # 200 +- 4.5 sigma
    assert sorted(train + val) == sorted(byte_tokens(documents))


def test_stdlib_from_a_made_up_library(tmp_path, monkeypatch):
    """A module keeps its split in a new version of Python; tests and what is no UTF-8 are left out."""
    names = [f"m{i}.py" for i in range(60)] + ["pkg/__init__.py", "pkg/b.py"]
    skipped = ["test/a.py", "pkg/tests/b.py", "site-packages/c.py", "idlelib/idle_test/d.py", "lib2to3/e.py", "f.txt"]
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    splits = []
    for version in ("", "new"):
        for name in names + skipped:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name + version)
        pairs = list(prepare_data._stdlib(0.2))
        assert [text for text, _ in pairs] == [name + version for name in sorted(names)]
        splits.append([split for _, split in pairs])
    assert splits[0] == splits[1] and 3 <= splits[0].count("val") <= 25


def test_stdlib_of_this_python(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"make it: .*--dataset=stdlib --data_dir={tmp_path / 'data'}$"):
        opened(tmp_path, "stdlib")
    subprocess.run([sys.executable, prepare_data.__file__, f"--data-dir={tmp_path / 'data'}"], check=True)
    train, val, meta = opened(tmp_path, "stdlib")
    prepare_as(tmp_path, "stdlib", overwrite=True, tokenizer="auto")
    assert opened(tmp_path, "stdlib")[2] == meta
    assert len(train) > 5 * len(val) > 1e5 and "import " in bytes(t for t in val if t < 256).decode()
    assert meta["train"]["tokens"] == meta["train"]["bytes"] + meta["train"]["documents"]


def test_an_odd_document_is_named():
    """A panic in Rust is no Exception; it must become one line all the same."""
    broken = mock.Mock(encode_to_numpy=mock.Mock(side_effect=BaseException("panic")))
    with pytest.raises(ValueError, match=r"^tiktoken fails on the document 'a\\nb': panic$"):
        list(prepare_data._tokenize([("a\nb", "train")], broken, 1))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_preparation_that_is_ended(tmp_path, end):
    """A second one is refused; Ctrl-C leaves nothing, SIGKILL a folder that the next one takes over."""
    (tmp_path / "long.txt").write_text(f"{'a line of text, ' * 60}{SEPARATOR}" * 40_000)
    command = [sys.executable, prepare_data.__file__, "--dataset=mine", f"--input={tmp_path / 'long.txt'}",
               "--tokenizer=bytes", f"--data_dir={tmp_path / 'data'}", "--processes=2"]
    # A shell starts background jobs, perhaps these tests, with Ctrl-C switched off: switch it on.
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    temporary = tmp_path / "data" / ".mine.tmp"
    while not any(path.stat().st_size for path in temporary.glob("new/train.bin")):
        assert run.poll() is None, "ended too early"
        time.sleep(0.01)
    with pytest.raises(ValueError, match=f"another preparation works in {temporary}; wait for it to end"):
        make(tmp_path)
    assert run.poll() is None
    run.send_signal(end)
    assert run.communicate(timeout=60)[1] == "" and run.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert left_over(tmp_path) == ([] if end == signal.SIGINT else [".mine.tmp"])
    with pytest.raises(FileNotFoundError, match="make it: python prepare_data.py --dataset=mine .* --input=FILES$"):
        opened(tmp_path)
    make(tmp_path)  # and cleans up
    assert left_over(tmp_path) == ["mine"] and opened(tmp_path)[0] == byte_tokens(DOCUMENTS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("full", ["train.bin", "val.bin", "meta.json"])
def test_a_full_disk(tmp_path, monkeypatch, full):
    def open_full(path, *rest, _open=open, **more):
        return _open("/dev/full" if Path(path).name == full else path, *rest, **more)
    for module in (prepare_data, io):  # io.open is what pathlib calls
        monkeypatch.setattr(module, "open", open_full, raising=False)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/data/mine'"):
        make(tmp_path)
    assert left_over(tmp_path) == []


def test_overwrite(tmp_path):
    make(tmp_path)
    with pytest.raises(FileExistsError, match="exists already; use --overwrite"):
        make(tmp_path, ["other"])
    assert opened(tmp_path)[0] == byte_tokens(DOCUMENTS)
    make(tmp_path, ["other"], overwrite=True)
    (tmp_path / "data" / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="other files"):
        make(tmp_path, overwrite=True)
    assert opened(tmp_path)[0] == byte_tokens(["other"]) and left_over(tmp_path) == ["mine"]


@pytest.mark.parametrize("file, damage, message", [
    ("train.bin", lambda raw: raw[:-2], r"\d+ bytes, expected \d+"), ("val.bin", lambda raw: b"", "0 bytes, expected"),
    ("train.bin", lambda raw: b"\0" + raw[1:], "checksum differs"), ("meta.json", lambda raw: raw[:-20], "JSONDecode"),
    ("val.bin", lambda raw: b"\0" + raw[1:], "checksum differs"), ("meta.json", lambda raw: b"\xff", "UnicodeDecode"),
    ("meta.json", lambda raw: b"[]", "TypeError"), ("meta.json", lambda raw: b"{}", "KeyError"),
    ("meta.json", lambda raw: raw.replace(b": 1979", b': "many"'), "train.bin: .*, expected"),
    ("meta.json", lambda raw: raw.replace(b"257", b"256"), "train.bin: .*token 256 is outside the vocabulary of 256"),
    ("meta.json", lambda raw: b'{"format": 99}', "format 99, this program reads"), ("val.bin", None, "No such file"),
])
def test_damaged_datasets(tmp_path, monkeypatch, file, damage, message):
    path = make(tmp_path) / file
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    command = f"python prepare_data.py --dataset=mine --data_dir={tmp_path / 'data'} --input=FILES"
    where = path.parent if "train.bin" in message else path
    with pytest.raises(ValueError, match=rf"\A{where}.*{message}.*; make it again: {command} --overwrite\Z"):
        opened(tmp_path)
    if "checksum" in message:  # which is left out for very large files
        monkeypatch.setattr(prepare_data, "VERIFY_LIMIT", 10)
        opened(tmp_path)


@pytest.mark.parametrize("flags, message", [
    ("--dataset=../x --input=a.txt", "must be a folder name"), ("--dataset=.x --input=a", "must be a folder name"),
    ("--input=a", "--input=a has no effect without a name of its own"), ("--dataset=mine", "=mine needs --input"),
    ("--val_input=a", "--val_input=a has no effect without --input"), ("--documents=1", "--documents=1 has no effect"),
    ("--val-fraction=1", "--val_fraction=1.0 must be"), ("--val-fraction=nan", "--val_fraction=nan must be"),
    ("--dataset=shakespeare --val-fraction=0.1", "--val_fraction=0.1 has no effect"),
    ("--dataset=mine --input=a --val_input=b --val-fraction=0.1", "has no effect without a split"),
    ("--dataset=fineweb --documents=-1", "--documents=-1 at least 0"), ("--processes=257", "--processes=257 0 to 256"),
    ("--tokenizer=gpt2", "TIKTOKEN_CACHE_DIR"),
    ("--dataset=mine --input=b.txt --tokenizer=bytes", "error: no .txt or .jsonl ")])
def test_flags_that_cannot_work(monkeypatch, call, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", mock.Mock(side_effect=ConnectionError))
    code, _, err = call(prepare_data.main, *flags.split())
    assert code == 2 and message in err.splitlines()[-1] and left_over(tmp_path) == []


def test_shakespeare(tmp_path, monkeypatch):
    text = "First Citizen:\nBefore we proceed any further, h\u00eare me speak.\r\n" * 30 + "tail"
    (tmp_path / "input.txt").write_bytes(text.encode())
    monkeypatch.setitem(prepare_data.BUILT_IN, "shakespeare", ((tmp_path / "input.txt").as_uri(), 0.1))
    prepare_as(tmp_path, "shakespeare")
    cut = int(0.9 * len(text))  # of the characters, not of the bytes
    assert opened(tmp_path, "shakespeare")[:2] == (byte_tokens([text[:cut]]), byte_tokens([text[cut:]]))
    (tmp_path / "input.txt").unlink()
    with pytest.raises(OSError, match="reading file:.*input.txt failed: .*No such file"):
        prepare_as(tmp_path, "shakespeare", overwrite=True)
    assert left_over(tmp_path) == ["shakespeare"]


@pytest.mark.parametrize("name, address, subset", [
    ("openwebtext", "Skylion007/openwebtext", None), ("fineweb", "HuggingFaceFW/fineweb", "sample-10BT")])
def test_streamed_datasets(tmp_path, monkeypatch, name, address, subset):
    documents, rows_read = [f"page {i}\n\nof the w\u00ebb" for i in range(60)], []

    def load_dataset(*args, **more):
        assert args == (address, subset) and more == {"split": "train", "streaming": True}
        for text in documents:
            rows_read.append(text)
            yield {"text": text, "id": "7"}
        raise RuntimeError("connection\nlost")
    monkeypatch.setitem(sys.modules, "datasets", mock.Mock(load_dataset=load_dataset))
    prepare_as(tmp_path, name, val_fraction=0.3, documents=50)
    held_out = [text for text in documents[:50] if prepare_data._split(text, 0.3) == "val"]
    train, val, meta = opened(tmp_path, name)
    assert 5 < len(held_out) < 30 and val == byte_tokens(held_out) and rows_read == documents[:50]
    assert train == byte_tokens(text for text in documents[:50] if text not in held_out) and meta["source"] == address
    for module, message in ((sys.modules["datasets"], "connection lost$"), (None, "datasets")):
        monkeypatch.setitem(sys.modules, "datasets", module)
        with pytest.raises(OSError, match=f"reading {address} failed: .*{message}"):
            prepare_as(tmp_path, name, overwrite=True)
    assert left_over(tmp_path) == [name]
