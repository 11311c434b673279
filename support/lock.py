"""One process at a time in a folder, and one run."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def lock(folder: Path, busy: str) -> Iterator[None]:
    """Make the folder and hold it until the block, or the process, ends, or raise ValueError(busy) if another does.

    Where there are no locks (Windows, some file systems), nothing is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(ImportError):
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(busy) from None
            except OSError:
                pass
        yield


@contextmanager
def claim(config: Any, source: dict | None) -> Iterator[None]:
    """Hold a run's out_dir. Raises: ValueError where another run is in it, or has gone on since `source` was read."""
    out = Path(config.out_dir)
    with ExitStack() as stack:
        busy = f"another run trains in --out_dir={out}; choose another, or end that one"
        try:
            stack.enter_context(lock(out, busy))
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"--out_dir={out} is or lies in a file; choose another") from None
        if config.resume and (out / "ckpt.pt").stat().st_mtime_ns != source["written"]:
            raise ValueError(f"{out}/ckpt.pt has changed since it was read: another run went on; "
                             "start again")
        if not config.resume and (out / "ckpt.pt").exists():
            raise ValueError(f"--out_dir={out} holds another run; "
                             "add --resume to go on with it, or choose another --out_dir")
        yield
