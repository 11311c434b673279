"""Turn text into token shards, and open them again. No other file writes or reads the format.

    <data_dir>/<name>/train.bin, val.bin   tokens: raw uint16, little endian, no header
    <data_dir>/<name>/meta.json            {"format": 1, "source", "tokenizer", "vocab_size", "eot",
                                            "train" and "val": {"tokens", "bytes", "documents", "sha256"}}

Every document is encoded by itself and followed by one end-of-text token (id "eot"). "bytes" counts the UTF-8 bytes
of the text without the end-of-text tokens: loss in nats per token * tokens / bytes / ln 2 = bits per byte, which
compares models whose tokenizers differ.

    python prepare_data.py                                        # stdlib: a few seconds, no network
    python prepare_data.py --dataset=shakespeare                  # 1 MB; train 301,967 tokens, val 36,060
    python prepare_data.py --dataset=openwebtext                  # 13 GB download, 9.04 billion tokens, hours
    python prepare_data.py --dataset=fineweb --shards=10          # ready-made GPT-2 tokens, 100 million a shard
    python prepare_data.py --dataset=mine --input=notes/,b.jsonl.xz --val_input=c.txt --tokenizer=gpt2

The first one ends with a line like (the numbers depend on the version of Python)
    data/stdlib: bytes tokenizer; train 9,343,634 tokens, 508 documents; val 315,222 tokens, 27 documents

stdlib       the *.py files of the Python that runs this, without tests and installed packages; byte-level tokens.
shakespeare  nanoGPT's tiny Shakespeare and split: the first 90 % of the characters train, the rest is val. Each part is
             one document, so there is one token more than nanoGPT's 301,966 and 36,059.
openwebtext  the archives and the cleaning nanoGPT gets through Hugging Face. nanoGPT draws 0.0005 of the documents for
             val at random; here the same share is chosen by a hash of the text: other documents, the same statistics.
fineweb      modded-nanogpt's shards, token for token: llm.c puts the end-of-text token *before* each document, and a
             shard may begin or end inside one. "documents" counts those tokens.
--input      .txt files, documents separated by a line <|endoftext|>; .jsonl files, one {"text": ...} a line; both also
             as .gz, .xz or .zst; a folder means all such files in it, in sorted order. Line ends are kept, a byte order
             mark is dropped, empty documents are skipped. Whether a document is held out depends only on its text.

Memory does not grow with the size of the data, only with the largest single document. The result does not depend on
--processes. An interrupted preparation leaves at most a folder data/.<name>.tmp, which the next one removes.
"""

import errno
import hashlib
import http.client
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
from tqdm import tqdm

from support.config import one_line_errors, parse

FORMAT = 1  # of meta.json and the shards; other versions are refused
SPLITS = ("train", "val")
BUILT_IN = ("stdlib", "shakespeare", "openwebtext", "fineweb")
EOT = "<|endoftext|>"
KINDS = re.compile(r"\.(txt|jsonl)(\.gz|\.xz|\.zst)?$")  # the files that --input understands
CHUNK = 1 << 16  # bytes read from a file at a time
BATCH = 1 << 20  # characters sent to a worker at a time: much more work than the sending
VERIFY_LIMIT = 2 << 30  # bytes; see open_dataset
ATTEMPTS = 3  # per download

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# The last revision that has the archives: later ones have parquet files, which need pyarrow.
OPENWEBTEXT_URL = ("https://huggingface.co/datasets/Skylion007/openwebtext/resolve/"
                   "f3808c30e817981b845ec549c43e82bb467d8144/subsets")
OPENWEBTEXT_SHARDS = 21
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
FINEWEB_SHARDS = 103


@dataclass
class DataConfig:
    """Which token shards are read."""

    dataset: str = "stdlib"  # folder under data_dir; prepare_data.py makes stdlib, shakespeare, openwebtext, fineweb
    data_dir: str = "data"  # where the datasets lie

    def __post_init__(self):
        if not re.fullmatch(r"\w[\w.+-]*", self.dataset):
            raise ValueError(f"--dataset={self.dataset} must be a plain folder name of letters, digits and . _ + -")


@dataclass
class PrepareConfig:
    """What the shards are made from."""

    input: str = ""  # own text: files and folders, separated by commas
    val_input: str = ""  # own text for val; without it a part of --input is held out
    val_fraction: float = 0.0  # documents held out; 0 means 0.05 for stdlib, 0.0005 for openwebtext, 0.01 for --input
    tokenizer: Literal["auto", "bytes", "gpt2"] = "auto"  # auto means bytes for stdlib, gpt2 for everything else
    shards: int = 0  # training shards to download: openwebtext has 21, fineweb 103; 0 means all
    processes: int = 0  # processes that tokenize; 0 means one per core but at most 16, 1 no other than this one
    overwrite: bool = False  # replace a dataset of that name
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        name, downloads = self.data.dataset, {"openwebtext": OPENWEBTEXT_SHARDS, "fineweb": FINEWEB_SHARDS}
        for wrong, message in (
            (self.input and name in BUILT_IN, f"--input needs a name of its own: --dataset=NAME, not {name}"),
            (not self.input and name not in BUILT_IN,
             f"--dataset={name} needs --input=FILES, or must be one of {', '.join(BUILT_IN)}"),
            (self.val_input and not self.input, "--val_input needs --input"),
            (not 0 <= self.val_fraction < 1, f"--val_fraction={self.val_fraction} must be at least 0 and below 1"),
            (self.val_fraction and (self.val_input or name in ("shakespeare", "fineweb")),
             f"--val_fraction={self.val_fraction} has no effect with --val_input, shakespeare and fineweb"),
            (self.shards and not 0 < self.shards <= downloads.get(name, 0),
             f"--shards={self.shards} must be 1 to {OPENWEBTEXT_SHARDS} for openwebtext, 1 to {FINEWEB_SHARDS} for "
             f"fineweb, and left out for {name if name not in downloads else 'others'}"),
            (name == "fineweb" and self.tokenizer == "bytes", "--dataset=fineweb consists of GPT-2 tokens: "
             f"--tokenizer={self.tokenizer} must be gpt2"),
            (self.processes < 0, f"--processes={self.processes} must not be negative"),
        ):
            if wrong:
                raise ValueError(message)


# -----------------------------------------------------------------------------
# tokenizers

def get_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the tokenizer "gpt2" (50,257 tokens) or "bytes" (257: one per byte, and end-of-text).

    Raises: ValueError for another name, or if GPT-2's vocabulary is neither cached nor can be downloaded.
    """
    if name == "bytes":  # nothing ever merges, so how the pattern cuts the text does not matter
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={EOT: 256})
    if name != "gpt2":
        raise ValueError(f"unknown tokenizer {name!r}; use bytes or gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # what tiktoken raises without a network
        raise ValueError(f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}); set TIKTOKEN_CACHE_DIR "
                         "to a folder where tiktoken stored it before, or use --tokenizer=bytes") from error


def token_lengths(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Return the UTF-8 bytes each token stands for: int64 (vocab_size,); the end-of-text token stands for none."""
    return np.array([0 if token == tokenizer.eot_token else len(tokenizer.decode_single_token_bytes(token))
                     for token in range(tokenizer.n_vocab)])


# -----------------------------------------------------------------------------
# text: every source is an iterator of (document, split)

def _split(key: str, fraction: float) -> str:
    """Choose "val" for about `fraction` of all keys: the same ones on every machine and in any order."""
    digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
    return "val" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"


def _stdlib(fraction: float) -> Iterator[tuple[str, str]]:
    """Yield the modules of the standard library; the path decides the split, so it hardly moves between versions."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__",
            "encodings", "pydoc_data"}  # the last two are tables, not programs
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    for name in sorted(name.as_posix() for name in names if not skip & set(name.parts)):
        with suppress(UnicodeDecodeError):
            yield (root / name).read_bytes().decode(), _split(name, fraction)


def _shakespeare(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield two documents: the first 90 % of the characters and the rest, as nanoGPT splits them."""
    text = _download(SHAKESPEARE_URL, folder / "input.txt").read_bytes().decode()
    (folder / "input.txt").unlink()
    yield text[:int(len(text) * 0.9)], "train"
    yield text[int(len(text) * 0.9):], "val"


def _openwebtext(shards: int, fraction: float, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the documents of tar archives of .xz archives of .txt files, cleaned as Hugging Face's loader does."""
    for number in range(shards):
        name = f"urlsf_subset{number:02d}.tar"
        path = _download(f"{OPENWEBTEXT_URL}/{name}", folder / name)
        try:
            with tarfile.open(path) as outer:
                for part in tqdm(outer, desc=f"{number + 1}/{shards} {name}", unit="part", disable=None):
                    if not part.name.endswith(".xz"):
                        continue
                    with tarfile.open(fileobj=outer.extractfile(part), mode="r:xz") as inner:
                        for member in inner:
                            if member.name.endswith(".txt"):
                                text = inner.extractfile(member).read().decode()
                                text = re.sub("\n\n\n+", "\n\n", text).strip()
                                yield text, _split(text, fraction)
        except (tarfile.TarError, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: damaged archive: {error}") from error
        path.unlink()


def _files(paths: str) -> list[Path]:
    """Turn "a.txt,folder" into a list of files of the KINDS."""
    found = []
    for path in map(Path, paths.split(",")):
        if not path.exists():
            raise FileNotFoundError(f"input: there is no {path}")
        usable = [p for p in (sorted(path.rglob("*")) if path.is_dir() else [path]) if KINDS.search(p.name)]
        if not usable:
            raise ValueError(f"input: {path} is or holds no .txt or .jsonl file (also with .gz, .xz or .zst behind)")
        found += usable
    return found


def _chunks(path: Path, bar: tqdm) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in pieces; `bar` advances by the bytes read."""
    start, damage = None, (lzma.LZMAError, zlib.error)
    if path.suffix == ".gz":
        start = partial(zlib.decompressobj, 31)  # 31: with gzip's header
    elif path.suffix == ".xz":
        start = lzma.LZMADecompressor
    elif path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{path}: reading .zst needs one more package: pip install zstandard") from error
        start, damage = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
    unpack = None
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            bar.update(len(data))
            if not start:
                yield data
            while data and start:
                try:
                    unpack = unpack or start()
                    yield unpack.decompress(data)
                except damage as error:
                    raise ValueError(f"{path}: damaged: {error}") from error
                # A file may be several streams in a row.
                data, unpack = (unpack.unused_data, None) if unpack.eof else (b"", unpack)
    if unpack:
        raise ValueError(f"{path}: truncated: the compressed data stop in the middle")


def _lines(path: Path, chunks: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its line end); only "\\n" ends a line."""
    def complete():
        rest = []  # pieces of a line not yet ended: joined once, or one huge line would take quadratic time
        for chunk in chunks:
            *lines, last = chunk.split(b"\n")
            for line in lines:
                yield b"".join([*rest, line, b"\n"])
                rest = []
            rest.append(last)
        yield b"".join(rest)

    for number, line in enumerate(complete(), start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: line {number}: not UTF-8: {error.reason} at byte {error.start}") from error


def _txt(path: Path, chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the documents of a text file; the line end before a separator belongs to the separator."""
    lines = []
    for _, line in _lines(path, chunks):
        end = line[len(EOT):]
        if line.startswith(EOT) and end in ("", "\n", "\r\n"):
            yield "".join(lines).removesuffix(end or "\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _jsonl(path: Path, chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the field "text" of every line; blank lines are skipped."""
    for number, line in _lines(path, chunks):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}: line {number}: not a JSON object with a field "text": {error!r}') from error
        if not isinstance(text, str):
            raise ValueError(f'{path}: line {number}: "text" is {type(text).__name__}, not a string')
        # JSON can spell half a surrogate pair, which no UTF-8 text can hold: it becomes U+FFFD.
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _texts(paths: str) -> Iterator[str]:
    """Yield the documents of files and folders, in order."""
    files = _files(paths)
    with tqdm(total=sum(p.stat().st_size for p in files), unit="B", unit_scale=True, disable=None) as bar:
        for path in files:
            bar.set_description(path.name)
            read = _txt if KINDS.search(path.name)[1] == "txt" else _jsonl
            yield from read(path, _chunks(path, bar))


# -----------------------------------------------------------------------------
# downloads

def _download(url: str, path: Path) -> Path:
    """Fetch url into the file `path`. Raises: OSError naming the url when it fails or stays incomplete."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "nanoQPT"})
            with urllib.request.urlopen(request, timeout=60) as reply, open(path, "wb") as file:
                size = int(reply.headers.get("Content-Length", 0))
                with tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                    while chunk := reply.read(CHUNK):
                        file.write(chunk)
                        bar.update(len(chunk))
            # A broken connection reads like the end of the file.
            if path.stat().st_size < size:
                raise ConnectionError(f"got {path.stat().st_size:,} of {size:,} bytes")
            return path
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            if attempt == ATTEMPTS:
                raise OSError(f"download of {url} failed {ATTEMPTS} times: {error}") from error
            time.sleep(2 ** attempt)


def _fineweb(shards: int, folder: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Yield (tokens, split) from llm.c's shards: 256 int32 (magic, version, tokens, ...), then uint16 tokens."""
    for number in range(shards + 1):  # number 0 is the validation shard
        split = "train" if number else "val"
        path = _download(f"{FINEWEB_URL}/fineweb_{split}_{number:06d}.bin", folder / "shard.bin")
        header = np.fromfile(path, "<i4", count=256)
        tokens = np.fromfile(path, "<u2")[512:]  # 200 MB
        if header[:3].tolist() != [20240520, 1, len(tokens)] or tokens.max(initial=0) > 50256:
            raise ValueError(f"fineweb_{split}_{number:06d}.bin: header {header[:3].tolist()}, expected [20240520, 1, "
                             f"{len(tokens)}], and tokens up to 50256: has the format changed?")
        for start in range(0, len(tokens), BATCH):
            yield tokens[start:start + BATCH], split
        path.unlink()


# -----------------------------------------------------------------------------
# text -> tokens

def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: nobody tells a worker when its parent is killed."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def _encode(batch: list[tuple[str, str]], tokenizer: tiktoken.Encoding) -> list[tuple[np.ndarray, str]]:
    """Encode (document, split) pairs into at most one (uint16 tokens, split) per split."""
    tokens = {split: [] for split in SPLITS}
    for text, split in batch:
        tokens[split].append(np.array([*tokenizer.encode_ordinary(text), tokenizer.eot_token], dtype=np.uint16))
    return [(np.concatenate(parts), split) for split, parts in tokens.items() if parts]


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Group non-empty documents into lists of about BATCH characters."""
    batch, size = [], 0
    for text, split in documents:
        if text:
            batch.append((text, split))
            size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize(documents: Iterable[tuple[str, str]], tokenizer: tiktoken.Encoding,
              processes: int) -> Iterator[tuple[np.ndarray, str]]:
    """Yield (uint16 tokens, split) in the order of the documents, whatever the number of processes."""
    batches = _batches(documents)
    if processes == 1:
        for batch in batches:
            yield from _encode(batch, tokenizer)
        return
    with ProcessPoolExecutor(processes, initializer=_start_worker) as pool:
        waiting = deque()  # at most two batches per worker: pool.map would read all documents into memory at once
        for batch in batches:
            waiting.append(pool.submit(_encode, batch, tokenizer))
            if len(waiting) == 2 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


# -----------------------------------------------------------------------------
# tokens -> shards

class _Shard:
    """One split while it is written: the file, and what meta.json will say about it."""

    def __init__(self, path: Path, tokenizer: tiktoken.Encoding, lengths: np.ndarray):
        self.eot, self.lengths = tokenizer.eot_token, lengths
        self.file, self.hash = open(path, "wb"), hashlib.sha256()
        self.tokens = self.bytes = self.documents = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens and count them."""
        data = tokens.astype("<u2").tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.tokens += len(tokens)
        self.bytes += int(self.lengths[tokens].sum())
        self.documents += int(np.count_nonzero(tokens == self.eot))

    def close(self) -> dict:
        """Close the file and return its entry of meta.json."""
        self.file.close()
        return {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents,
                "sha256": self.hash.hexdigest()}


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one preparation at a time work in `folder`; without a lock where the file system has none."""
    handle = None
    with suppress(ImportError, OSError):
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another preparation in {folder} to end", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def _workspace(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder beside `folder` that takes its place when the block ends, and vanishes if it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    with _lock(folder.parent):
        if folder.exists() and not overwrite:
            raise FileExistsError(f"{folder} exists already; use --overwrite to replace it, or another --dataset=NAME")
        if folder.exists() and {p.name for p in folder.iterdir()} - {"train.bin", "val.bin", "meta.json"}:
            raise FileExistsError(f"{folder} holds other files than a dataset's; move them away before --overwrite")
        for leftover in (temporary, old):  # of a killed run: we hold the lock, so nobody works there
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)  # atomic: a folder of this name is always complete
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # the message of a failed write names no file
                raise OSError(error.errno, error.strerror, str(folder.parent)) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _source(config: PrepareConfig, folder: Path) -> tuple[str, Iterator[tuple[str, str]]]:
    """Return where the text comes from, in words, and its (document, split) pairs; downloads go to `folder`."""
    fraction = config.val_fraction or {"stdlib": 0.05, "openwebtext": 0.0005}.get(config.data.dataset, 0.01)
    if config.data.dataset == "stdlib":
        return f"standard library of Python {sys.version.split()[0]}", _stdlib(fraction)
    if config.data.dataset == "shakespeare":
        return SHAKESPEARE_URL, _shakespeare(folder)
    if config.data.dataset == "openwebtext":
        return OPENWEBTEXT_URL, _openwebtext(config.shards or OPENWEBTEXT_SHARDS, fraction, folder)
    if config.val_input:
        return f"{config.input}; val: {config.val_input}", itertools.chain(
            ((text, "train") for text in _texts(config.input)), ((text, "val") for text in _texts(config.val_input)))
    return config.input, ((text, _split(text, fraction)) for text in _texts(config.input))


def prepare(config: PrepareConfig) -> Path:
    """Make the dataset and return its folder.

    Raises: ValueError for input that cannot be used, FileExistsError if the dataset exists already, OSError for a
    file that cannot be read, a failed download or a full disk. Nothing is left behind in any of these cases.
    """
    name = config.data.dataset
    auto = "bytes" if name == "stdlib" else "gpt2"
    tokenizer = get_tokenizer(auto if config.tokenizer == "auto" else config.tokenizer)
    lengths, folder = token_lengths(tokenizer), Path(config.data.data_dir) / name
    with _workspace(folder, config.overwrite) as temporary:
        shards = {split: _Shard(temporary / f"{split}.bin", tokenizer, lengths) for split in SPLITS}
        if name == "fineweb":
            source, pieces = FINEWEB_URL, _fineweb(config.shards or FINEWEB_SHARDS, temporary)
        else:
            source, documents = _source(config, temporary)
            pieces = _tokenize(documents, tokenizer, config.processes or min(os.cpu_count() or 1, 16))
        for tokens, split in pieces:
            shards[split].write(tokens)
        meta = {"format": FORMAT, "source": source, "tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab,
                "eot": tokenizer.eot_token, **{split: shard.close() for split, shard in shards.items()}}
        for split in SPLITS:
            if not meta[split]["tokens"]:
                raise ValueError(f"no document is in {split}; give more documents (a line {EOT} separates them in .txt "
                                 "files), --val_input, or another --val_fraction")
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file, indent=2)
    print(f"{folder}: {tokenizer.name} tokenizer; " + "; ".join(
        f"{split} {meta[split]['tokens']:,} tokens, {meta[split]['documents']:,} documents" for split in SPLITS))
    return folder


# -----------------------------------------------------------------------------
# shards -> tokens

def open_dataset(config: DataConfig, verify: bool = False) -> tuple[np.memmap, np.memmap, dict]:
    """Open a prepared dataset.

    Checksums are compared on every open for files up to 2 GiB: that takes seconds, and a damaged file would show up
    only as a strange loss. Larger files take too long; `verify` compares them too.

    Returns: train tokens, val tokens (both uint16, one dimension, read-only, on disk), and meta.json as a dict.
    Raises: FileNotFoundError with the command that makes the data; ValueError for a damaged dataset.
    """
    folder = Path(config.data_dir) / config.dataset
    remedy = f"python prepare_data.py --dataset={config.dataset}"
    remedy += f" --data_dir={config.data_dir}" if config.data_dir != DataConfig.data_dir else ""
    remedy += "" if config.dataset in BUILT_IN else " --input=FILES"
    again = f"; make it again: {remedy} --overwrite"
    if not (folder / "meta.json").exists():
        raise FileNotFoundError(f"there is no prepared dataset in {folder}; make it with: {remedy}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this program reads format {FORMAT}")
        vocab_size = int(meta["vocab_size"])
        expected = {split: (2 * int(meta[split]["tokens"]), meta[split]["sha256"]) for split in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'} cannot be used: {type(error).__name__}: {error}{again}") from error
    shards = []
    for split, (size, sha256) in expected.items():
        path = folder / f"{split}.bin"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing{again}")
        if path.stat().st_size != size or not size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected {size}{again}")
        tokens = np.memmap(path, dtype="<u2", mode="r")
        if (size <= VERIFY_LIMIT or verify) and hashlib.sha256(tokens).hexdigest() != sha256:
            raise ValueError(f"{path}: the checksum differs from meta.json: the file was changed or damaged{again}")
        if (top := int(tokens[:1 << 20].max())) >= vocab_size:  # a glance: the rest is vouched for by the checksum
            raise ValueError(f"{path}: token {top} is outside the vocabulary of {vocab_size}{again}")
        shards.append(tokens)
    return shards[0], shards[1], meta


def main() -> None:
    """Run from the command line."""
    config = parse(PrepareConfig, doc=__doc__)
    with one_line_errors():
        prepare(config)


if __name__ == "__main__":
    main()
