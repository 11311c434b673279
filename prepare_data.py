"""Turn text into token shards, and open them again. No other file writes or reads the format.

    <data_dir>/<name>/train.bin, val.bin   tokens: raw uint16, little endian, no header
    <data_dir>/<name>/meta.json            {"format": 1, "source", "tokenizer", "vocab_size", "eot",
        "train" and "val": {"tokens", "bytes", "documents", "sha256"}}

Every document is encoded by itself and followed by one end-of-text token. "bytes" counts the UTF-8
bytes of the text: nats per token * tokens / bytes / ln 2 = bits per byte, whatever the tokenizer.

    python prepare_data.py                            # stdlib: the *.py files of this Python
    python prepare_data.py --dataset=shakespeare      # as nanoGPT: 301,967 and 36,060 tokens
    python prepare_data.py --dataset=fineweb --documents=1000000  # or openwebtext (needs datasets)
    python prepare_data.py --dataset=mine --input=notes/,b.jsonl.xz --val_input=c.txt

--input takes .txt files, documents separated by a line <|endoftext|>; .jsonl files, {"text": ...}
on every line; both also as .gz, .xz, .zst (needs zstandard); folders of them, sorted. What is held
out depends only on a document's text (stdlib: its path). Memory holds a few documents at a time.
"""

import hashlib
import importlib
import json
import lzma
import os
import re
import shutil
import sys
import sysconfig
import urllib.request
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
from tqdm import tqdm

from support.config import one_line_errors, parse, refuse_idle
from support.lock import lock

FORMAT = 1  # of meta.json and the shards; other versions are refused
EOT = "<|endoftext|>"
KINDS = re.compile(r"\.(txt|jsonl)(\.gz|\.xz|\.zst)?$")  # the files that --input understands
CHUNK = 1 << 16  # bytes read from a file at a time
VERIFY_LIMIT = 2 << 30  # bytes; the checksum of a larger file would take minutes at every start
BUILT_IN = {  # name: (where the text comes from, share of the documents that is held out for val)
    "stdlib": (f"standard library of Python {sys.version.split()[0]}", 0.05),
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", 0.1),
    "openwebtext": ("Skylion007/openwebtext", 0.0005),
    "fineweb": ("HuggingFaceFW/fineweb", 0.0005)}


@dataclass
class DataConfig:
    """Which token shards are read."""

    dataset: str = "stdlib"  # a folder: stdlib, shakespeare, openwebtext, fineweb, or your own
    data_dir: str = "data"  # where the datasets lie

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.+-]*", self.dataset):
            raise ValueError(f"--dataset={self.dataset} must be a folder name: letters, digits and . _ + -")


@dataclass
class PrepareConfig:
    """What the shards are made from."""

    input: str = ""  # own text: files and folders, separated by commas
    val_input: str = ""  # own text for val; without it a part of --input is held out
    val_fraction: float = 0.0  # 0: 0.01, but 0.05 of stdlib, 0.0005 of openwebtext and fineweb
    tokenizer: Literal["auto", "bytes", "gpt2"] = "auto"  # auto: bytes for stdlib, else gpt2
    documents: int = 0  # to read of openwebtext or fineweb; 0: all
    processes: int = 0  # cores that tokenize, each by a thread, up to 256; 0: all, but at most 16
    overwrite: bool = False  # replace a dataset of that name
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        name = self.data.dataset
        if not self.input and name not in BUILT_IN:
            raise ValueError(f"--dataset={name} needs --input=FILES, or is one of {', '.join(BUILT_IN)}")
        refuse_idle(self, input=(name not in BUILT_IN, "without a name of its own, --dataset=NAME"),
                    val_input=(self.input, "without --input"),
                    val_fraction=(not self.val_input and name != "shakespeare", "without a split to draw"),
                    documents=(name in ("openwebtext", "fineweb"), "without --dataset=openwebtext or fineweb"))
        if not (0 <= self.val_fraction < 1 and self.documents >= 0 and 0 <= self.processes <= 256):
            raise ValueError(f"--val_fraction={self.val_fraction} must be at least 0 and below 1, "
                             f"--documents={self.documents} at least 0, --processes={self.processes} 0 to 256")


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the tokenizer "gpt2" (50,257 tokens) or "bytes" (257: every byte, and end-of-text)."""
    if name == "bytes":  # nothing ever merges, so how the pattern cuts the text does not matter
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name != "gpt2":
        raise ValueError(f"unknown tokenizer {name!r}; use bytes or gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # what tiktoken raises without a network
        raise ValueError("GPT-2's vocabulary could not be downloaded; set TIKTOKEN_CACHE_DIR to a folder "
                         "where tiktoken stored it before, or use --tokenizer=bytes") from error


# -----------------------------------------------------------------------------
# text: every source becomes an iterator of (document, split)

def _split(key: str, fraction: float) -> str:
    """Choose "val" for about `fraction` of all keys: the same on every machine, in any order."""
    digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
    return "val" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"


def _stdlib(fraction: float) -> Iterator[tuple[str, str]]:
    """Yield the modules of the standard library, split by path: new versions hardly change it."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3",
            "__pycache__", "encodings", "pydoc_data"}  # the last two are tables, not programs
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    for name in sorted(name.as_posix() for name in names if not skip & set(name.parts)):
        with suppress(UnicodeDecodeError):
            yield (root / name).read_bytes().decode(), _split(name, fraction)


def _downloaded(source: str, limit: int | None, fraction: float) -> Iterator[tuple[str, str]]:
    """Yield shakespeare, or the first documents of a dataset that is never stored as a whole."""
    try:
        if "://" in source:  # shakespeare: two documents, as nanoGPT splits it
            with urllib.request.urlopen(source, timeout=60) as reply:
                text = reply.read().decode()
            cut = int(len(text) * 0.9)
            yield from ((text[:cut], "train"), (text[cut:], "val"))
        else:
            datasets = _optional("datasets")
            subset = "sample-10BT" if "fineweb" in source else None
            rows = datasets.load_dataset(source, subset, split="train", streaming=True)
            yield from ((row["text"], _split(row["text"], fraction)) for row in islice(rows, limit))
    except Exception as error:  # of many libraries, for lack of a network or of the dataset
        raise OSError(f"reading {source} failed: {' '.join(str(error).split())}") from error


def _optional(name: str):
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"one more package is needed: pip install {name}") from None


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed, with their line ends; only "\\n" ends a line.

    Not by lzma.open, which ignores a damaged second stream, nor by zstandard.open, which takes a
    truncated file for a whole one: a part of the text would be missing and nobody would know.
    """
    start = {".gz": lambda: zlib.decompressobj(31), ".xz": lzma.LZMADecompressor}.get(path.suffix)
    if path.suffix == ".zst":
        start = _optional("zstandard").ZstdDecompressor().decompressobj
    stream, rest = None, bytearray()  # rest grows in place, so that a huge line takes linear time
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            searched = len(rest)
            while start and data:  # a file may be several streams in a row
                stream = stream or start()
                rest += stream.decompress(data)
                data, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
            rest += data
            if rest.find(b"\n", searched) >= 0:
                *lines, rest = rest.split(b"\n")
                yield from (line + b"\n" for line in lines)
    if stream:
        raise EOFError("truncated, the compressed data stop in the middle")
    yield rest


def _documents(path: Path) -> Iterator[str]:
    """Yield the documents of a .txt or .jsonl file."""
    jsonl, lines, number = KINDS.search(path.name)[1] == "jsonl", [], 1
    try:
        for raw in _lines(path):
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")  # drops a byte order mark
            if jsonl and line.strip():
                text = json.loads(line)["text"]  # half a surrogate pair in it becomes U+FFFD
                yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            elif not jsonl and line in (EOT, EOT + "\n", EOT + "\r\n"):
                yield "".join(lines).removesuffix(line[len(EOT):] or "\n")
                lines = []
            elif not jsonl:
                lines.append(line)
            number += 1
        yield "".join(lines)
    except Exception as error:  # of the file, a decompressor, UTF-8, JSON, or JSON without a text
        kind = 'a JSON object with a string "text"' if jsonl else "UTF-8"
        raise ValueError(f"{path}: cannot read line {number} as {kind}: {type(error).__name__}: {error}") from error


def _own(paths: str, val_paths: str, fraction: float) -> Iterator[tuple[str, str]]:
    """Yield the documents of "a.txt,folder", in order; without val_paths, a fraction is val."""
    files = []  # all are found before the first is read
    for part, split in ((paths, "train" if val_paths else ""), (val_paths, "val")):
        for path in map(Path, part.split(",") if part else ()):
            found = [file for file in sorted(path.rglob("*")) or [path] if KINDS.search(file.name)]
            if not found or not path.exists():
                raise FileNotFoundError(f"no .txt or .jsonl (.gz, .xz, .zst) file is at {path}")
            files += [(file, split) for file in found]
    for file, split in files:
        yield from ((text, split or _split(text, fraction)) for text in _documents(file))


def _source(config: PrepareConfig) -> tuple[str, Iterator[tuple[str, str]]]:
    """Return where the text comes from, in words, and its (document, split) pairs."""
    name = config.data.dataset
    source, fraction = BUILT_IN.get(name, (config.input, 0.01))
    fraction = config.val_fraction or fraction
    if name == "stdlib":
        return source, _stdlib(fraction)
    if name in BUILT_IN:
        return source, _downloaded(source, config.documents or None, fraction)
    source += f"; val: {config.val_input}" if config.val_input else ""
    return source, _own(config.input, config.val_input, fraction)


# -----------------------------------------------------------------------------
# text -> tokens -> shards, and back

def _tokenize(documents, tokenizer: tiktoken.Encoding, threads: int) -> Iterator[tuple]:
    """Yield (split, bytes, uint16 tokens) of every non-empty document, in order."""
    def encode(text, split):
        try:
            tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:  # Rust's panics are no Exceptions; Ctrl-C reaches no thread
            raise ValueError(f"tiktoken fails on the document {text[:60]!r}: {error}") from error
        return split, len(text.encode()), np.append(tokens, tokenizer.eot_token).astype("<u2")

    with ThreadPoolExecutor(threads) as pool:  # threads do: tiktoken works outside of Python's lock
        waiting = deque()  # bounded: pool.map would read all documents into memory at once
        for text, split in documents:
            if text:
                waiting.append(pool.submit(encode, text, split))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _workspace(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` as the block ends, or vanishes if it fails."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    new, old = temporary / "new", temporary / "old"
    with lock(temporary, f"another preparation works in {temporary}; wait for it to end"):
        try:
            there = {path.name for path in folder.glob("*")}
            if there and not overwrite:
                raise FileExistsError(f"{folder} exists already; use --overwrite, or another --dataset")
            if there - {"train.bin", "val.bin", "meta.json"}:
                raise FileExistsError(f"{folder} holds other files than a dataset's; move them away")
            for left in (new, old):  # by a killed preparation
                shutil.rmtree(left, ignore_errors=True)
            new.mkdir()
            yield new
            if folder.exists():
                folder.rename(old)
            new.rename(folder)  # atomic: a folder of this name is always complete
        except OSError as error:
            if error.errno and not error.filename:  # a full disk does not say where it is
                error.filename = str(folder)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def prepare(config: PrepareConfig) -> Path:
    """Make the dataset and return its folder; leave nothing if it fails (ValueError, OSError)."""
    auto = "bytes" if config.data.dataset == "stdlib" else "gpt2"
    tokenizer = get_tokenizer(auto if config.tokenizer == "auto" else config.tokenizer)
    source, documents = _source(config)
    folder = Path(config.data.data_dir, config.data.dataset)
    counts = {split: Counter(tokens=0, bytes=0, documents=0) for split in ("train", "val")}
    hashes = {split: hashlib.sha256() for split in counts}
    with _workspace(folder, config.overwrite) as new:
        with open(new / "train.bin", "wb") as train, open(new / "val.bin", "wb") as val:
            pieces = _tokenize(documents, tokenizer, config.processes or min(os.cpu_count() or 1, 16))
            for split, size, tokens in tqdm(pieces, total=config.documents, unit=" documents", disable=None):
                (train if split == "train" else val).write(tokens)
                hashes[split].update(tokens)
                counts[split].update(tokens=len(tokens), bytes=size, documents=1)
        for split, count in counts.items():
            if not count["tokens"]:
                raise ValueError(f"no document is in {split}; give more (a line {EOT} divides a .txt) or --val_input")
            count["sha256"] = hashes[split].hexdigest()
        meta = {"format": FORMAT, "source": source, "tokenizer": tokenizer.name,
                "vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token, **counts}
        (new / "meta.json").write_text(json.dumps(meta, indent=2))
    print(f"{folder}: {tokenizer.name} tokenizer; " + "; ".join(
        f"{key} {n['tokens']:,} tokens, {n['documents']:,} documents" for key, n in counts.items()))
    return folder


def make_missing(config: DataConfig) -> None:
    """Prepare the default data set, which needs no download, where it is missing."""
    folder = Path(config.data_dir, config.dataset)
    if config.dataset == DataConfig.dataset and not folder.exists():
        print(f"{folder} is missing: preparing it from Python's standard library", flush=True)
        prepare(PrepareConfig(data=config, processes=1))


def open_dataset(config: DataConfig) -> tuple[np.memmap, np.memmap, dict]:
    """Return train and val tokens (uint16, read-only, on disk) and meta.json; refuse damage."""
    folder = Path(config.data_dir, config.dataset)
    remedy = f"python prepare_data.py --dataset={config.dataset} --data_dir={config.data_dir}"
    remedy += "" if config.dataset in BUILT_IN else " --input=FILES"
    if not (folder / "meta.json").exists():
        raise FileNotFoundError(f"there is no prepared dataset in {folder}; use --data_dir, or make it: {remedy}")
    path, shards = folder / "meta.json", []
    try:
        meta = json.loads(path.read_text())
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this program reads format {FORMAT}")
        for split in ("train", "val"):
            path, size = folder / f"{split}.bin", 2 * meta[split]["tokens"]
            if path.stat().st_size != size:
                raise ValueError(f"{path.stat().st_size} bytes, expected {size}")
            tokens = np.memmap(path, dtype="<u2", mode="r")
            if size <= VERIFY_LIMIT and hashlib.sha256(tokens).hexdigest() != meta[split]["sha256"]:
                raise ValueError("the checksum differs from meta.json")
            if (top := tokens[:1 << 20].max()) >= meta["vocab_size"]:  # or the GPU fails
                raise ValueError(f"token {top} is outside the vocabulary of {meta['vocab_size']}")
            shards.append(tokens)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}; make it again: {remedy} --overwrite") from error
    return *shards, meta


def main() -> None:
    """Run from the command line."""
    with one_line_errors():
        prepare(parse(PrepareConfig, doc=__doc__))


if __name__ == "__main__":
    main()
