"""Turn text into token shards, and open them again. No other file writes or reads the format.

    <data_dir>/<name>/train.bin, val.bin   tokens: raw uint16, little endian, no header
    <data_dir>/<name>/meta.json            {"format": 1, "source", "tokenizer", "vocab_size", "eot",
        "train" and "val": {"tokens", "bytes", "documents", "sha256"}}

Every document is encoded by itself and followed by one end-of-text token. "bytes" counts the UTF-8
bytes of the text: nats per token * tokens / bytes / ln 2 = bits per byte, whatever the tokenizer.

    python prepare_data.py                                        # stdlib: seconds, no network
    python prepare_data.py --dataset=shakespeare                  # train 301,967 tokens, val 36,060
    python prepare_data.py --dataset=fineweb --documents=1000000  # or openwebtext; all of it: hours
    python prepare_data.py --dataset=mine --input=notes/,b.jsonl.xz --val_input=c.txt

stdlib       the *.py files of this Python, without tests and installed packages
shakespeare  nanoGPT's, and its split: 90 % of the characters are one document, the rest is val
openwebtext  and fineweb (its sample-10BT) are streamed by Hugging Face's `datasets`
--input      .txt files, documents separated by a line <|endoftext|>; .jsonl files, {"text": ...} on
             every line; both also as .gz, .xz, .zst; folders of such files, in sorted order. Line
             ends are kept, a byte order mark is dropped, empty documents are skipped.

Whether a document is held out depends only on its text (stdlib: its path). Memory holds a few
documents, never all. A killed run leaves at most <data_dir>/.<name>.tmp; the next one removes it.
"""

import errno
import hashlib
import http.client
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
from tqdm import tqdm

from support.config import one_line_errors, parse, refuse_idle

FORMAT = 1  # of meta.json and the shards; other versions are refused
EOT = "<|endoftext|>"
KINDS = re.compile(r"\.(txt|jsonl)(\.gz|\.xz|\.zst)?$")  # the files that --input understands
CHUNK = 1 << 16  # bytes read from a file at a time
VERIFY_LIMIT = 2 << 30  # bytes; the checksum of a larger file would take minutes at every start
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BUILT_IN = {  # name: (where the text comes from, share of the documents that is held out for val)
    "stdlib": (f"standard library of Python {sys.version.split()[0]}", 0.05),
    "shakespeare": (SHAKESPEARE, 0.1),
    "openwebtext": ("Skylion007/openwebtext", 0.0005),
    "fineweb": ("HuggingFaceFW/fineweb", 0.0005)}


@dataclass
class DataConfig:
    """Which token shards are read."""

    dataset: str = "stdlib"  # a folder: stdlib, shakespeare, openwebtext, fineweb, or your own
    data_dir: str = "data"  # where the datasets lie

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.+-]*", self.dataset):
            raise ValueError(f"--dataset={self.dataset} must be a plain folder name: letters, "
                             "digits and . _ + -")


@dataclass
class PrepareConfig:
    """What the shards are made from."""

    input: str = ""  # own text: files and folders, separated by commas
    val_input: str = ""  # own text for val; without it a part of --input is held out
    val_fraction: float = 0.0  # held out; 0: 0.01, but 0.05 of stdlib, 0.0005 of openwebtext, fineweb
    tokenizer: Literal["auto", "bytes", "gpt2"] = "auto"  # auto: bytes for stdlib, else gpt2
    documents: int = 0  # to read of openwebtext or fineweb; 0: all
    processes: int = 0  # cores that tokenize, each by a thread, up to 256; 0: all, but at most 16
    overwrite: bool = False  # replace a dataset of that name
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        name = self.data.dataset
        if not self.input and name not in BUILT_IN:
            raise ValueError(f"--dataset={name} needs --input=FILES, or is one of {', '.join(BUILT_IN)}")
        refuse_idle(
            self, input=(name not in BUILT_IN, "without a name of its own, --dataset=NAME"),
            val_input=(self.input, "without --input"),
            val_fraction=(not self.val_input and name != "shakespeare",
                          "without a split to draw (--val_input and shakespeare bring theirs)"),
            documents=(name in ("openwebtext", "fineweb"), "without --dataset=openwebtext or fineweb"))
        for flag, right, allowed in (
                ("val_fraction", 0 <= self.val_fraction < 1, "at least 0 and below 1"),
                ("documents", self.documents >= 0, "at least 0"),
                ("processes", 0 <= self.processes <= 256, "0 to 256")):
            if not right:
                raise ValueError(f"--{flag}={getattr(self, flag)} must be {allowed}")


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the tokenizer "gpt2" (50,257 tokens) or "bytes" (257: one per byte, and end-of-text).

    Raises: ValueError for another name, or if GPT-2's vocabulary is not there and not to be had.
    """
    if name == "bytes":  # nothing ever merges, so how the pattern cuts the text does not matter
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name != "gpt2":
        raise ValueError(f"unknown tokenizer {name!r}; use bytes or gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # what tiktoken raises without a network
        raise ValueError(
            f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}); set TIKTOKEN_CACHE_DIR "
            "to a folder where tiktoken stored it before, or use --tokenizer=bytes") from error


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


def _shakespeare() -> Iterator[tuple[str, str]]:
    """Yield two documents: the first 90 % of the characters, and the rest, as nanoGPT has them."""
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=60) as reply:
            text = reply.read().decode()
    except (OSError, http.client.HTTPException) as error:  # no network, or it broke off
        raise OSError(f"download of {SHAKESPEARE} failed: {error}") from error
    cut = int(len(text) * 0.9)
    yield from ((text[:cut], "train"), (text[cut:], "val"))


def _streamed(name: str, limit: int | None) -> Iterator[str]:
    """Yield the first documents of a Hugging Face dataset, which is never stored as a whole."""
    path, subset = BUILT_IN[name][0], "sample-10BT" if name == "fineweb" else None
    try:
        import datasets
        rows = datasets.load_dataset(path, subset, split="train", streaming=True)
        for row in tqdm(islice(rows, limit), name, limit, unit=" documents", disable=None):
            yield row["text"]
    except ImportError as error:
        raise ValueError(f"--dataset={name} needs one more package: pip install datasets") from error
    except Exception as error:  # of many libraries, for lack of a network or of the dataset
        raise OSError(f"reading {path} failed: {' '.join(str(error).split())}") from error


def _lines(path: Path, bar: tqdm) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed, with their line ends; only "\\n" ends a line.

    Not by lzma.open, which ignores a damaged second stream, nor by zstandard.open, which takes a
    truncated file for a whole one: a part of the text would be missing and nobody would know.
    """
    starts = {".gz": lambda: zlib.decompressobj(31), ".xz": lzma.LZMADecompressor}  # 31: gzip's header
    start, damage = starts.get(path.suffix), (zlib.error, lzma.LZMAError)
    stream, rest = None, bytearray()  # rest grows in place, so that a huge line takes linear time
    try:
        if path.suffix == ".zst":
            import zstandard
            start, damage = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        with open(path, "rb") as file:
            while data := file.read(CHUNK):
                bar.update(len(data))
                searched = len(rest)
                while start and data:  # a file may be several streams in a row
                    stream = stream or start()
                    rest += stream.decompress(data)
                    data, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
                rest += data
                if rest.find(b"\n", searched) >= 0:
                    *lines, rest = rest.split(b"\n")
                    yield from (line + b"\n" for line in lines)
    except ImportError as error:
        raise ValueError(f"{path} needs one more package: pip install zstandard") from error
    except damage as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if stream:
        raise ValueError(f"{path}: truncated: the compressed data stop in the middle")
    yield rest


def _documents(path: Path, bar: tqdm) -> Iterator[str]:
    """Yield the documents of a .txt or .jsonl file."""
    jsonl, lines = KINDS.search(path.name)[1] == "jsonl", []
    for number, raw in enumerate(_lines(path, bar), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            end = line[len(EOT):]
            if jsonl and line.strip():
                text = json.loads(line)["text"]
                # JSON can spell half a surrogate pair, which UTF-8 cannot hold: it becomes U+FFFD.
                yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            elif not jsonl and line.startswith(EOT) and end in ("", "\n", "\r\n"):
                yield "".join(lines).removesuffix(end or "\n")  # this line end is the separator's
                lines = []
            elif not jsonl:
                lines.append(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: line {number}: not UTF-8: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            message = f'{path}: line {number}: not a JSON object with a string "text"'
            raise ValueError(f"{message}: {error!r}") from error
    yield "".join(lines)


def _texts(paths: str) -> Iterator[str]:
    """Yield the documents of "a.txt,folder", in order."""
    files = []
    for path in map(Path, paths.split(",")):
        found = [file for file in sorted(path.rglob("*")) or [path] if KINDS.search(file.name)]
        if not found or not path.exists():
            raise FileNotFoundError(f"input: no .txt or .jsonl (.gz, .xz, .zst) file is at {path}")
        files += found
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        for file in files:
            bar.set_description(file.name)
            yield from _documents(file, bar)


def _source(config: PrepareConfig) -> tuple[str, Iterator[tuple[str, str]]]:
    """Return where the text comes from, in words, and its (document, split) pairs."""
    name = config.data.dataset
    source, fraction = BUILT_IN.get(name, (config.input, 0.01))
    fraction = config.val_fraction or fraction
    if name == "stdlib":
        return source, _stdlib(fraction)
    if name == "shakespeare":
        return source, _shakespeare()
    if config.val_input:
        train, val = _texts(config.input), _texts(config.val_input)
        pairs = chain(zip(train, repeat("train")), zip(val, repeat("val")))
        return f"{source}; val: {config.val_input}", pairs
    texts = _streamed(name, config.documents or None) if name in BUILT_IN else _texts(source)
    return source, ((text, _split(text, fraction)) for text in texts)


# -----------------------------------------------------------------------------
# text -> tokens -> shards

def _tokenize(documents, tokenizer: tiktoken.Encoding, threads: int) -> Iterator[tuple]:
    """Yield (split, bytes, uint16 tokens) of every non-empty document, in order.

    Threads do, and need no copies as processes would: tiktoken works outside of Python's lock.
    """
    def encode(text, split):
        try:
            tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:  # Rust's panics are no Exceptions; Ctrl-C reaches no thread
            raise ValueError(f"tiktoken fails on the document {text[:60]!r}: {error}") from error
        return split, len(text.encode()), np.append(tokens, tokenizer.eot_token).astype("<u2")

    with ThreadPoolExecutor(threads) as pool:
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # Windows and some file systems have no locks
            import fcntl
            lock = os.open(folder.parent, os.O_RDONLY)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with us, even when killed
            except BlockingIOError as error:
                raise ValueError(f"another preparation is at work in {folder.parent}; wait for it") from error
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if there and not overwrite:
            raise FileExistsError(f"{folder} exists already; use --overwrite, or another --dataset")
        if there - {"train.bin", "val.bin", "meta.json"}:
            raise FileExistsError(f"{folder} holds other files than a dataset's; move them away")
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed run: nobody else has the lock
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        try:
            (temporary / "new").mkdir(parents=True)
            yield temporary / "new"
            if folder.exists():
                folder.rename(temporary / "old")
            (temporary / "new").rename(folder)  # atomic: a folder of this name is always complete
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a failed write does not say where
                raise OSError(error.errno, error.strerror, str(folder.parent)) from error
            raise


def prepare(config: PrepareConfig) -> Path:
    """Make the dataset and return its folder.

    Raises: ValueError for input that cannot be used, FileExistsError if the dataset exists already,
    OSError for an unreadable file, a failed download or a full disk. Nothing is left behind then.
    """
    auto = "bytes" if config.data.dataset == "stdlib" else "gpt2"
    tokenizer = get_tokenizer(auto if config.tokenizer == "auto" else config.tokenizer)
    source, documents = _source(config)
    counts = {split: Counter(tokens=0, bytes=0, documents=0) for split in ("train", "val")}
    hashes = {split: hashlib.sha256() for split in counts}
    folder = Path(config.data.data_dir, config.data.dataset)
    with _workspace(folder, config.overwrite) as new:
        with open(new / "train.bin", "wb") as train, open(new / "val.bin", "wb") as val:
            cores = config.processes or min(os.cpu_count() or 1, 16)
            for split, size, tokens in _tokenize(documents, tokenizer, cores):
                (train if split == "train" else val).write(tokens)
                hashes[split].update(tokens)
                counts[split].update(tokens=len(tokens), bytes=size, documents=1)
        for split, count in counts.items():
            if not count["tokens"]:
                raise ValueError(f"no document is in {split}; give more documents (a line {EOT} divides"
                                 " .txt files), --val_input, or another --val_fraction")
            count["sha256"] = hashes[split].hexdigest()
        with open(new / "meta.json", "w") as file:
            meta = {"format": FORMAT, "source": source, "tokenizer": tokenizer.name,
                    "vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token, **counts}
            json.dump(meta, file, indent=2)
    print(f"{folder}: {tokenizer.name} tokenizer; " + "; ".join(
        f"{key} {n['tokens']:,} tokens, {n['documents']:,} documents" for key, n in counts.items()))
    return folder


# -----------------------------------------------------------------------------
# shards -> tokens

def open_dataset(config: DataConfig) -> tuple[np.memmap, np.memmap, dict]:
    """Open a prepared dataset, and notice damage, which would show up only as a strange loss.

    Returns: train and val tokens (uint16, one dimension, read-only, on disk), meta.json as a dict.
    Raises: FileNotFoundError with the command that makes the data, ValueError for damaged data.
    """
    folder = Path(config.data_dir, config.dataset)
    remedy = f"python prepare_data.py --dataset={config.dataset} --data_dir={config.data_dir}"
    remedy += "" if config.dataset in BUILT_IN else " --input=FILES"
    again = f"; make it again: {remedy} --overwrite"
    if not (folder / "meta.json").exists():
        raise FileNotFoundError(f"there is no prepared dataset in {folder}; say where it is with "
                                f"--data_dir, or make it: {remedy}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this program reads format {FORMAT}")
        vocab_size = int(meta["vocab_size"])
        expected = [(folder / f"{split}.bin", 2 * int(meta[split]["tokens"]), meta[split]["sha256"])
                    for split in ("train", "val")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'} cannot be used: {error!r}{again}") from error
    shards = []
    for path, size, sha256 in expected:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing{again}")
        if path.stat().st_size != size or not size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected {size}{again}")
        tokens = np.memmap(path, dtype="<u2", mode="r")
        if size <= VERIFY_LIMIT and hashlib.sha256(tokens).hexdigest() != sha256:
            raise ValueError(f"{path}: the checksum differs from meta.json{again}")
        if (top := tokens[:1 << 20].max()) >= vocab_size:  # the checksum vouches for the rest
            raise ValueError(f"{path}: token {top} is outside the vocabulary of {vocab_size}{again}")
        shards.append(tokens)
    return *shards, meta


def main() -> None:
    """Run from the command line."""
    config = parse(PrepareConfig, doc=__doc__)
    with one_line_errors():
        prepare(config)


if __name__ == "__main__":
    main()
