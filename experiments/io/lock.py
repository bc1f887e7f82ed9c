"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: as on a file system without locks
    fcntl = None

NAME = "lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder. The lock ends with the process; the file `lock` stays.

    Without effect where the system or the file system has no locks, as some network file systems.

    Raises:
      BlockingIOError: another process, or another part of this one, holds it; names the process id.
      OSError: `lock` is not a plain file.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> with locked(folder), locked(folder):  # doctest: +ELLIPSIS
      ...     pass
      Traceback (most recent call last):
      BlockingIOError: ...
    """
    if fcntl is None:
        yield
        return
    path = folder / NAME
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(f"{path} must be a plain file, for it is the lock of the run; move what is there away")
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = file.read(20).decode(errors="replace").strip() or "unknown"
                raise BlockingIOError(
                    f"{folder} is in use by another run (process {holder}); wait until it ends, or give another "
                    f"workdir. If its machine is gone, delete {path}"  # some file systems do not notice
                ) from None
        else:
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        yield
