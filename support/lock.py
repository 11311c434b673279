"""One process at a time in a folder."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


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
