"""Tests of prepare_data.py: what is written is what was said, whatever breaks on the way; no network, no GPU."""

import errno
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

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


def gpt2_or_skip():
    """Return GPT-2's tokenizer if its files are cached: never wait for a network."""
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    names = [hashlib.sha1((base + name).encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")]
    if not all((Path(os.environ.get("TIKTOKEN_CACHE_DIR", "")) / name).is_file() for name in names):
        pytest.skip("TIKTOKEN_CACHE_DIR does not hold GPT-2's vocabulary")
    return get_tokenizer("gpt2")


def make(tmp_path, documents=DOCUMENTS, **flags):
    """Prepare the dataset "mine" from one text file with byte tokens; every third document is the val file's."""
    (tmp_path / "train.txt").write_bytes(SEPARATOR.join(documents).encode())
    (tmp_path / "val.txt").write_bytes(SEPARATOR.join(documents[::3]).encode())
    flags = {"input": str(tmp_path / "train.txt"), "val_input": str(tmp_path / "val.txt"), "tokenizer": "bytes",
             "processes": 1, **flags}
    return prepare(PrepareConfig(data=DataConfig("mine", str(tmp_path / "data")), **flags))


def byte_tokens(documents):
    """The oracle of the byte tokenizer: every byte, then 256."""
    return [token for text in documents for token in [*text.encode(), 256]]


def opened(tmp_path, name="mine"):
    train, val, meta = open_dataset(DataConfig(name, str(tmp_path / "data")))
    return train.tolist(), val.tolist(), meta


def left_over(tmp_path):
    """What lies in the data folder, hidden or not."""
    return sorted(p.name for p in (tmp_path / "data").iterdir()) if (tmp_path / "data").exists() else []


# -----------------------------------------------------------------------------
# tokenizers

@TRUTHS
@given(st.text())
@example("<|endoftext|>")
@example("\r\n \x00" * 100)
def test_bytes_tokenizer_is_utf8(text):
    tokens = BYTES.encode_ordinary(text)
    assert tokens == list(text.encode())
    assert BYTES.decode(tokens) == text


@TRUTHS
@given(st.lists(st.integers(0, 256)))
def test_bytes_tokenizer_decodes_anything(tokens):
    expected = b"".join(b"<|endoftext|>" if t == 256 else bytes([t]) for t in tokens)
    assert BYTES.decode_bytes(tokens) == expected
    assert BYTES.decode(tokens) == expected.decode(errors="replace")
    assert prepare_data.token_lengths(BYTES)[tokens].sum() == sum(t != 256 for t in tokens)


def test_tokenizer_names_and_sizes(monkeypatch):
    assert (BYTES.name, BYTES.n_vocab, BYTES.eot_token) == ("bytes", 257, 256)
    with pytest.raises(ValueError, match="'words'; use bytes or gpt2"):
        get_tokenizer("words")

    def no_network(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")


def test_gpt2_shards(tmp_path):
    tokenizer = gpt2_or_skip()
    make(tmp_path, tokenizer="gpt2", processes=2)
    train, val, meta = opened(tmp_path)
    assert train == [t for text in DOCUMENTS for t in [*tokenizer.encode_ordinary(text), 50256]]
    assert tokenizer.encode_ordinary("hello world") == [31373, 995]
    literal = [27, 91, 437, 1659, 5239, 91, 29]  # <|endoftext|> inside a line is ordinary text
    assert any(train[i:i + 7] == literal for i in range(len(train)))
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("gpt2", 50257, 50256)
    assert meta["train"]["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)


# -----------------------------------------------------------------------------
# reading text

def test_shards_and_meta_against_oracle(tmp_path, capsys):
    folder = make(tmp_path)
    train, val, meta = opened(tmp_path)
    assert train == byte_tokens(DOCUMENTS) and val == byte_tokens(DOCUMENTS[::3])
    for split, documents in (("train", DOCUMENTS), ("val", DOCUMENTS[::3])):
        raw = np.array(byte_tokens(documents), dtype="<u2").tobytes()
        assert (folder / f"{split}.bin").read_bytes() == raw
        assert meta[split] == {"tokens": len(raw) // 2, "bytes": sum(len(text.encode()) for text in documents),
                               "documents": len(documents), "sha256": hashlib.sha256(raw).hexdigest()}
    assert (meta["format"], meta["tokenizer"], meta["vocab_size"], meta["eot"]) == (1, "bytes", 257, 256)
    assert "train.txt" in meta["source"] and "val.txt" in meta["source"]
    assert left_over(tmp_path) == ["mine"]
    assert f"{len(train):,} tokens, {len(DOCUMENTS)} documents" in capsys.readouterr().out


PIECES = st.lists(st.sampled_from(["<|endoftext|>", "\n", "\r\n", "a", "\u20ac", " ", "<|endof", "text|>", SEPARATOR]))


@TRUTHS
@given(PIECES.map("".join), st.integers(1, 40))
@example("a" + SEPARATOR + "b" + SEPARATOR, 1)
@example("<|endoftext|>\na\n<|endoftext|>", 1)
@example("a\r\n<|endoftext|>\r\nb\r\n", 5)
@example("a\n<|endoftext|>\n<|endoftext|>\n\nb", 3)
def test_separators_at_any_chunk_boundary(text, size):
    raw = text.encode()
    chunks = [raw[i:i + size] for i in range(0, len(raw), size)]
    found = [text for text in prepare_data._txt(Path("f.txt"), chunks) if text]
    if "\r" not in text:
        assert found == [part for part in split_oracle(text) if part]
    else:  # which line end stays in front of a separator is left open; nothing else may differ
        expected = "".join(split_oracle(text.replace("\r\n", "\n")))
        assert "".join(found).replace("\r", "").replace("\n", "") == expected.replace("\n", "")


def split_oracle(text):
    """Split at whole lines; the lookahead leaves the line end behind a separator to a second one that follows."""
    return [part.removeprefix("\n") for part in re.split(r"\n<\|endoftext\|>(?=\n|\Z)", "\n" + text)]


def test_documents_as_the_wiki_files_have_them():
    text = "".join(f"{text}{SEPARATOR}" for text in DOCUMENTS)
    for size in (1, 7, 1000, 10**6):
        chunks = [text.encode()[i:i + size] for i in range(0, len(text.encode()), size)]
        assert list(prepare_data._txt(Path("f.txt"), chunks)) == text.split(SEPARATOR) == [*DOCUMENTS, ""]


def test_byte_order_mark_and_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n<|endoftext|>\r\nthree\x0bfour\n")
    make(tmp_path, input=str(tmp_path / "a.txt"))
    assert opened(tmp_path)[0] == byte_tokens(["one\r\ntwo", "three\x0bfour\n"])


def compress(data, ending):
    if ending == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending](data)


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_every_compression(tmp_path, monkeypatch, kind, ending):
    monkeypatch.setattr(prepare_data, "CHUNK", 37)  # so that streams and lines begin anywhere in a chunk
    documents = DOCUMENTS * 20  # longer than what the decompressors keep back
    if kind == ".txt":
        data = "".join(text + SEPARATOR for text in documents).encode()
    else:
        data = "\n".join(json.dumps({"id": 1, "text": text}) + "\n" * (len(text) % 2) for text in documents).encode()
    path = tmp_path / f"a.b{kind}{ending}"
    half = len(data) // 2
    path.write_bytes(compress(data[:half], ending) + compress(data[half:], ending))  # two streams in a row
    make(tmp_path, input=str(path))
    assert opened(tmp_path)[0] == byte_tokens(documents)
    if ending:
        path.write_bytes(compress(data, ending)[:-9])
        with pytest.raises(ValueError, match=f"{path.name}: truncated"):
            make(tmp_path, input=str(path), overwrite=True)
        path.write_bytes(b"this is no archive at all" * 9)
        with pytest.raises(ValueError, match=f"{path.name}: damaged"):
            make(tmp_path, input=str(path), overwrite=True)
        assert left_over(tmp_path) == ["mine"] and opened(tmp_path)[0] == byte_tokens(documents)


@pytest.mark.parametrize("line, message", [
    ('{"text": "a"', "line 3: not a JSON object"), ('["text"]', "line 3: not a JSON object"),
    ('{"body": "a"}', "line 3: not a JSON object.*KeyError"), ('{"text": 5}', 'line 3: "text" is int, not a string'),
    (b"\xff", "line 3: not UTF-8"),
])
def test_bad_jsonl_lines(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: " + message):
        make(tmp_path, input=str(tmp_path / "a.jsonl"))
    assert left_over(tmp_path) == []


def test_bad_text_is_named_by_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nth\xffree\n")
    with pytest.raises(ValueError, match=r"a\.txt: line 3: not UTF-8: invalid start byte at byte 2"):
        make(tmp_path, input=str(tmp_path / "a.txt"))


def test_surrogates_from_json_become_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b \ud83d\ude00"}')
    make(tmp_path, input=str(tmp_path / "a.jsonl"))
    train, _, meta = opened(tmp_path)
    assert train == byte_tokens(["a\ufffdb \U0001f600"]) and meta["train"]["bytes"] == len(train) - 1


def test_folders_in_sorted_order_and_lists(tmp_path):
    for name, text in (("in/b.txt", "b"), ("in/a/z.jsonl", '{"text": "az"}'), ("in/a.txt", "a"), ("in/c.md", "no")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "last.txt").write_text("last")
    make(tmp_path, input=f"{tmp_path}/in,{tmp_path}/last.txt")
    assert opened(tmp_path)[0] == byte_tokens(["az", "a", "b", "last"])
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
        make(tmp_path, input=f"{tmp_path}/nowhere", overwrite=True)
    with pytest.raises(ValueError, match=r"c\.md is or holds no \.txt"):
        make(tmp_path, input=f"{tmp_path}/in/c.md", overwrite=True)


def test_reading_takes_little_memory(tmp_path):
    random = np.random.default_rng(0)
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        for _ in range(2000):
            file.write(random.bytes(2000).hex().encode() + SEPARATOR.encode())  # 8 MB of text in documents of 4 kB
    tracemalloc.start()
    total = sum(map(len, prepare_data._texts(str(tmp_path / "a.txt.gz"))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 8_000_000 and peak < 1_000_000


# -----------------------------------------------------------------------------
# splits

def test_the_split_is_the_same_on_every_machine():
    """Python's own hash() changes with every start; SHA-256 does not."""
    keys = [f"key {i}" for i in range(100)]
    held_out = [int(key[4:]) for key in keys if prepare_data._split(key, 0.1) == "val"]
    assert held_out == [2, 10, 20, 25, 27, 30, 44, 54, 57, 62, 69, 83, 84, 87, 89, 92, 93, 99]
    assert {prepare_data._split(key, 0.0) for key in keys} == {"train"}


def test_held_out_documents_depend_on_the_text_only(tmp_path, monkeypatch):
    documents = [f"text number {i}" for i in range(2000)]
    common = {"val_input": "", "val_fraction": 0.1}
    make(tmp_path, documents, **common)
    train, val, meta = opened(tmp_path)
    assert 140 < meta["val"]["documents"] < 260  # 200 +- 4.5 sigma
    assert meta["train"]["documents"] + meta["val"]["documents"] == 2000
    assert sorted(train + val) == sorted(byte_tokens(documents))
    monkeypatch.setattr(prepare_data, "BATCH", 100)
    make(tmp_path, documents[::-1], overwrite=True, **common)
    again = opened(tmp_path)[1]
    texts = bytes(t if t < 256 else 0 for t in val).split(b"\0")[:-1]
    assert bytes(t if t < 256 else 0 for t in again).split(b"\0")[:-1] == texts[::-1]
    make(tmp_path, documents, overwrite=True, val_input="", val_fraction=0.5)
    assert 900 < opened(tmp_path)[2]["val"]["documents"] < 1100


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no document is in val; .*--val_input"):
        make(tmp_path, ["only one"], val_input="")
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>\n")
    with pytest.raises(ValueError, match="no document is in train"):
        make(tmp_path, input=str(tmp_path / "empty.txt"))
    assert left_over(tmp_path) == []


def test_stdlib_from_a_made_up_library(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    names = [f"m{i}.py" for i in range(60)] + ["pkg/__init__.py", "pkg/b.py"]
    skipped = ["test/a.py", "pkg/tests/b.py", "site-packages/c.py", "idlelib/idle_test/d.py", "lib2to3/e.py", "f.txt"]
    for name in names + skipped:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "latin.py").write_bytes(b"\xe9")
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", {"stdlib": str(root)}.get)
    documents = list(prepare_data._stdlib(0.2))
    assert [text for text, _ in documents] == [f"# {name}\n" for name in sorted(names)]
    assert 3 <= sum(split == "val" for _, split in documents) <= 25
    for name in [*names, "a_new_one.py"]:
        (root / name).write_text(f"# {name}\n# in a new version\n")
    moved = dict(prepare_data._stdlib(0.2))
    assert all(moved[f"{text}# in a new version\n"] == split for text, split in documents)


def test_stdlib_of_this_python_twice(tmp_path):
    """The default command, as a user runs it; one process and one per core give the same."""
    metas = []
    for processes in (1, 0):
        command = [sys.executable, SCRIPT, f"--data-dir={tmp_path / str(processes)}", f"--processes={processes}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "stdlib: bytes tokenizer; train " in done.stdout
        train, val, meta = open_dataset(DataConfig("stdlib", str(tmp_path / str(processes))))
        metas.append(meta)
    assert metas[0] == metas[1]
    assert len(train) > 10 * len(val) * 0.5 > 1e5 and train.dtype == np.uint16 and val[-1] == train[-1] == 256
    assert meta["train"]["tokens"] == meta["train"]["bytes"] + meta["train"]["documents"]
    text = bytes(val[val < 256].astype(np.uint8)).decode()
    assert "import " in text and "def " in text


# -----------------------------------------------------------------------------
# processes

def test_any_number_of_processes_gives_the_same(tmp_path, monkeypatch):
    documents = [text + str(i) for i, text in enumerate(DOCUMENTS * 5)]
    results = []
    for processes, batch in ((1, 1 << 20), (1, 1), (2, 50), (3, 1 << 20)):
        monkeypatch.setattr(prepare_data, "BATCH", batch)
        make(tmp_path, documents, processes=processes, overwrite=True)
        results.append(opened(tmp_path))
    assert results[0][0] == byte_tokens(documents)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("processes", [1, 2])
def test_reading_does_not_run_ahead(monkeypatch, processes):
    """A reader that ran ahead of the tokenizer would bring the whole dataset into memory."""
    monkeypatch.setattr(prepare_data, "BATCH", 10)
    read = 0

    def documents():
        nonlocal read
        for i in range(100):
            read += 1
            yield f"document {i}", "train"

    pieces = prepare_data._tokenize(documents(), BYTES, processes)
    for done, _ in enumerate(pieces, start=1):
        time.sleep(0.002)
        assert read <= done + 2 * processes
    assert done == read == 100


# -----------------------------------------------------------------------------
# broken off

def start_long_run(tmp_path):
    """Start a preparation of 40 MB with two processes and return it when the first tokens are written."""
    (tmp_path / "long.txt").write_text(f"{'a line of text, ' * 60}{SEPARATOR}" * 40_000)
    command = [sys.executable, SCRIPT, "--dataset=mine", f"--input={tmp_path / 'long.txt'}", "--tokenizer=bytes",
               f"--data_dir={tmp_path / 'data'}", "--processes=2"]
    # A shell starts its background jobs, perhaps these tests among them, with Ctrl-C switched off: switch it on.
    run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    shard = tmp_path / "data" / ".mine.tmp" / "train.bin"
    while not (shard.exists() and shard.stat().st_size):
        assert run.poll() is None, "ended too early"
        time.sleep(0.01)
    return run


def members(session):
    """Return the live processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_preparation_leaves_nothing_finished(tmp_path):
    run = start_long_run(tmp_path)
    assert len(members(run.pid)) == 3
    for worker in set(members(run.pid)) - {str(run.pid)}:  # Ctrl-C reaches them too, and they leave it to the parent
        ignored = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{worker}/status").read_text(), re.MULTILINE)[1]
        assert int(ignored, 16) >> (signal.SIGINT - 1) & 1
    run.kill()
    run.wait()
    assert left_over(tmp_path) == [".mine.tmp"]
    with pytest.raises(FileNotFoundError):
        opened(tmp_path)
    end = time.time() + 10
    while members(run.pid) and time.time() < end:
        time.sleep(0.05)
    assert members(run.pid) == []  # the workers end with their parent
    make(tmp_path)
    assert left_over(tmp_path) == ["mine"] and opened(tmp_path)[0] == byte_tokens(DOCUMENTS)


def test_an_interrupted_preparation_cleans_up(tmp_path):
    run = start_long_run(tmp_path)
    os.killpg(run.pid, signal.SIGINT)  # as Ctrl-C does: the workers get it too
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and errors == ""
    assert left_over(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("full", ["train.bin", "val.bin", "meta.json"])
def test_a_full_disk(tmp_path, monkeypatch, capsys, full):
    """/dev/full takes nothing: the error is the kernel's own."""
    def open_full(path, mode="r", *args, **more):
        return open("/dev/full" if Path(path).name == full else path, mode, *args, **more)
    monkeypatch.setattr(prepare_data, "open", open_full, raising=False)
    (tmp_path / "a.txt").write_bytes(SEPARATOR.join(DOCUMENTS).encode())
    config = PrepareConfig(input=str(tmp_path / "a.txt"), val_input=str(tmp_path / "a.txt"), tokenizer="bytes",
                           processes=1, data=DataConfig("mine", str(tmp_path / "data")))
    with pytest.raises(SystemExit) as end, one_line_errors():
        prepare(config)
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
    assert opened(tmp_path)[0] == byte_tokens(["other"])
    (tmp_path / "data" / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="other files"):
        make(tmp_path, overwrite=True)
    assert opened(tmp_path)[0] == byte_tokens(["other"]) and left_over(tmp_path) == ["mine"]


def test_two_preparations_take_turns(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    with prepare_data._lock(tmp_path / "data"):
        second = threading.Thread(target=make, args=(tmp_path,))
        second.start()
        second.join(0.5)
        assert second.is_alive() and left_over(tmp_path) == []
    second.join(30)
    assert opened(tmp_path)[0] == byte_tokens(DOCUMENTS)
    assert "waiting for another preparation" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# opening

def test_opened_arrays(tmp_path):
    make(tmp_path)
    train, val, _ = open_dataset(DataConfig("mine", str(tmp_path / "data")))
    for tokens in (train, val):
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.ndim == 1
        assert not tokens.flags.writeable


def test_missing_datasets_name_the_command(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"python prepare_data.py --dataset=stdlib --data_dir=\S+empty$"):
        open_dataset(DataConfig("stdlib", str(tmp_path / "empty")))
    with pytest.raises(FileNotFoundError, match=r"prepare_data.py --dataset=mine --data_dir=\S+ --input=FILES$"):
        opened(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"in data/fineweb; .*: python prepare_data.py --dataset=fineweb$"):
        open_dataset(DataConfig("fineweb"))


def flip(path, place=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if place is None else place] ^= 1
    path.write_bytes(raw)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("file, damage, message", [
    ("train.bin", lambda p: p.write_bytes(p.read_bytes()[:-2]), r"train.bin: \d+ bytes, expected \d+; make it again: "),
    ("val.bin", lambda p: p.write_bytes(p.read_bytes() + b"aa"), r"val.bin: \d+ bytes, expected \d+; make it again: "),
    ("val.bin", lambda p: p.write_bytes(b""), r"val.bin: 0 bytes, expected \d+"),
    ("train.bin", flip, "train.bin: the checksum differs"),
    ("val.bin", flip, "val.bin: the checksum differs"),
    ("meta.json", lambda p: p.write_text(p.read_text()[:-20]), "meta.json cannot be used: JSONDecodeError"),
    ("meta.json", lambda p: p.write_bytes(b"\xff"), "meta.json cannot be used"),
    ("meta.json", lambda p: p.write_text("[]"), "meta.json cannot be used"),
    ("meta.json", lambda p: p.write_text("{}"), "meta.json cannot be used"),
    ("meta.json", lambda p: edit(p, train={"tokens": "many"}), "meta.json cannot be used"),
    ("meta.json", lambda p: p.write_text('{"format": 99}'), "ValueError: format 99, this program reads format 1"),
    ("meta.json", lambda p: edit(p, vocab_size=256), "train.bin: token 256 is outside the vocabulary of 256"),
    ("train.bin", Path.unlink, "train.bin is missing"),
    ("val.bin", Path.unlink, "val.bin is missing"),
])
def test_damaged_datasets(tmp_path, file, damage, message):
    damage(make(tmp_path) / file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        opened(tmp_path)
    error = str(caught.value)
    assert "\n" not in error and "--dataset=mine" in error and str(tmp_path) in error


def test_large_files_are_verified_on_demand(tmp_path, monkeypatch):
    flip(make(tmp_path) / "train.bin", place=0)
    monkeypatch.setattr(prepare_data, "VERIFY_LIMIT", 10)
    opened(tmp_path)
    with pytest.raises(ValueError, match="checksum"):
        open_dataset(DataConfig("mine", str(tmp_path / "data")), verify=True)


# -----------------------------------------------------------------------------
# command line

@pytest.mark.parametrize("flags, message", [
    (["--dataset=../x", "--input=a.txt"], "--dataset=../x must be a plain folder name"),
    (["--dataset=.x", "--input=a.txt"], "--dataset=.x must be a plain folder name"),
    (["--input=a.txt"], "--input needs a name of its own"),
    (["--dataset=mine"], "--dataset=mine needs --input"),
    (["--val_input=a.txt"], "--val_input needs --input"),
    (["--val-fraction=1"], "--val_fraction=1.0 must be"),
    (["--val-fraction=-0.1"], "--val_fraction=-0.1 must be"),
    (["--dataset=shakespeare", "--val-fraction=0.1"], "--val_fraction=0.1 has no effect"),
    (["--dataset=mine", "--input=a.txt", "--val_input=a.txt", "--val-fraction=0.1"], "has no effect"),
    (["--shards=1"], "--shards=1 must be"),
    (["--dataset=fineweb", "--shards=104"], "--shards=104 must be"),
    (["--dataset=fineweb", "--tokenizer=bytes"], "--tokenizer=bytes must be gpt2"),
    (["--processes=-1"], "--processes=-1 must not be negative"),
    (["--overwrit"], "unknown argument --overwrit"),
])
def test_flags_that_cannot_work(monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *flags])
    with pytest.raises(SystemExit) as end:
        prepare_data.main()
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line_without_traceback(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    command = [sys.executable, SCRIPT, "--dataset=mine", "--input=a.jsonl", "--tokenizer=bytes", "--processes=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: a\.jsonl: line 2: .*\n", done.stderr)
    assert left_over(tmp_path) == []


# -----------------------------------------------------------------------------
# downloads, from a server of our own

@pytest.fixture
def server(monkeypatch):
    """Serve a dict {path: bytes} on 127.0.0.1; a path in `broken` loses its last byte on the first so many requests."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            data = server.files.get(self.path)
            self.send_response(200 if data is not None else 404)
            self.send_header("Content-Length", len(data or b""))
            self.end_headers()
            server.broken[self.path] = server.broken.get(self.path, 0) - 1
            self.wfile.write((data or b"")[:-1] if server.broken[self.path] >= 0 else data or b"")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.broken, server.requests = {}, {}, []
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", f"{url}/input.txt")
    monkeypatch.setattr(prepare_data, "OPENWEBTEXT_URL", f"{url}/subsets")
    monkeypatch.setattr(prepare_data, "FINEWEB_URL", f"{url}/main")
    monkeypatch.setattr(prepare_data.time, "sleep", lambda seconds: None)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(tmp_path, name, **flags):
    return prepare(PrepareConfig(data=DataConfig(name, str(tmp_path / "data")), **{"processes": 1, **flags}))


def test_shakespeare(tmp_path, server):
    text = "First Citizen:\nBefore we proceed any further, h\u00eare me speak.\r\n" * 30 + "tail"
    server.files["/input.txt"] = text.encode()
    fetch(tmp_path, "shakespeare", tokenizer="bytes")
    train, val, meta = opened(tmp_path, "shakespeare")
    cut = int(0.9 * len(text))  # of the characters, not of the bytes
    assert (train, val) == (byte_tokens([text[:cut]]), byte_tokens([text[cut:]]))
    assert meta["source"].endswith("/input.txt")
    assert len(list((tmp_path / "data" / "shakespeare").iterdir())) == 3  # the download is gone


def test_downloads_that_break_off(tmp_path, server):
    server.files["/input.txt"] = b"some text " * 100
    server.broken["/input.txt"] = 2
    fetch(tmp_path, "shakespeare", tokenizer="bytes")  # the third attempt works
    assert len(server.requests) == 3
    server.broken["/input.txt"] = 99
    with pytest.raises(OSError, match="download of .*/input.txt failed 3 times: .*999"):
        fetch(tmp_path, "shakespeare", tokenizer="bytes", overwrite=True)
    del server.files["/input.txt"]
    with pytest.raises(OSError, match="download of .*/input.txt failed 3 times: .*404"):
        fetch(tmp_path, "shakespeare", tokenizer="bytes", overwrite=True)
    assert left_over(tmp_path) == ["shakespeare"]


def archive(members, mode="w"):
    """Return the bytes of a tar archive of {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def test_openwebtext(tmp_path, server, monkeypatch):
    monkeypatch.setattr(prepare_data, "OPENWEBTEXT_SHARDS", 2)
    documents = [f"  page {i}\n\n\n\nof the\n\nw\u00ebb {i}\n" for i in range(60)]
    for number in range(2):
        parts = {"openwebtext/README": b"not an archive"}
        for part in range(3):
            texts = documents[30 * number + 10 * part:][:10]
            parts[f"openwebtext/urlsf_subset{number:02d}-{part}_data.xz"] = archive(
                {f"{i:07d}-0a1b.txt": text.encode() for i, text in enumerate(texts)} | {"x.log": b"no"}, mode="w:xz")
        server.files[f"/subsets/urlsf_subset{number:02d}.tar"] = archive(parts)
    cleaned = [f"page {i}\n\nof the\n\nw\u00ebb {i}" for i in range(60)]
    held_out = [text for text in cleaned if prepare_data._split(text, 0.3) == "val"]
    assert 5 < len(held_out) < 35
    fetch(tmp_path, "openwebtext", tokenizer="bytes", val_fraction=0.3)
    train, val, meta = opened(tmp_path, "openwebtext")
    assert train == byte_tokens([text for text in cleaned if text not in held_out])
    assert val == byte_tokens(held_out)
    assert len(list((tmp_path / "data" / "openwebtext").iterdir())) == 3
    fetch(tmp_path, "openwebtext", tokenizer="bytes", val_fraction=0.3, shards=1, processes=2, overwrite=True)
    train, val, meta = opened(tmp_path, "openwebtext")
    assert train == byte_tokens([text for text in cleaned[:30] if text not in held_out])
    server.files["/subsets/urlsf_subset00.tar"] = b"no archive"
    with pytest.raises(ValueError, match="urlsf_subset00.tar: damaged"):
        fetch(tmp_path, "openwebtext", tokenizer="bytes", overwrite=True)
    assert left_over(tmp_path) == ["openwebtext"]


def test_fineweb(tmp_path, server, monkeypatch):
    monkeypatch.setattr(prepare_data, "BATCH", 2)
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"%06d" % i: i for i in range(256, 50256)}  # six bytes each: as large as GPT-2's vocabulary
    big = tiktoken.Encoding("gpt2", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: big)
    shards = {"val_000000": [50256, 65, 300, 50256, 7], "train_000001": [66, 50255, 50256], "train_000002": [50256, 9]}

    def serve(name, tokens, header):
        server.files[f"/main/fineweb_{name}.bin"] = (np.array([*header, *[0] * (256 - len(header))], "<i4").tobytes()
                                                     + np.array(tokens, "<u2").tobytes())
    for name, tokens in shards.items():
        serve(name, tokens, [20240520, 1, len(tokens)])
    fetch(tmp_path, "fineweb", shards=2)
    train, val, meta = opened(tmp_path, "fineweb")
    assert val == shards["val_000000"] and train == shards["train_000001"] + shards["train_000002"]
    assert (meta["val"]["bytes"], meta["val"]["documents"]) == (1 + 6 + 1, 2)
    assert (meta["train"]["bytes"], meta["train"]["documents"]) == (1 + 6 + 1, 2)
    for tokens, header in (([1, 2, 3], [20240520, 1, 4]), ([1], [20240520, 2, 1]), ([1], [7, 1, 1]), ([], [20240520]),
                           ([50257], [20240520, 1, 1])):
        serve("train_000002", tokens, header)
        with pytest.raises(ValueError, match="fineweb_train_000002.bin: header"):
            fetch(tmp_path, "fineweb", shards=2, overwrite=True)
    server.files["/main/fineweb_train_000002.bin"] = b"<html>"
    with pytest.raises(ValueError, match="fineweb_train_000002.bin: header"):
        fetch(tmp_path, "fineweb", shards=2, overwrite=True)
    fetch(tmp_path, "fineweb", shards=1, overwrite=True)
    assert opened(tmp_path, "fineweb")[0] == shards["train_000001"]
