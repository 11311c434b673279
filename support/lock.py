"""One process at a time in a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def lock(folder: Path, busy: str) -> Iterator[None]:
    """Make the folder and hold it until the block, or the process, ends; a killed one leaves no lock behind.

    Where there are no locks (Windows, some file systems), nothing is locked.
    Raises: ValueError(busy) if another process holds it; NotADirectoryError, FileExistsError if it cannot be a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = None
    try:
        with suppress(ImportError):
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(busy) from None
            except OSError:
                pass
        yield
    finally:
        if handle is not None:
            os.close(handle)
