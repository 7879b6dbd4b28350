"""Files that are there whole or not at all, and folders that one process at a time writes."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedcunet.errors import FolderInUse


@contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes that ask for `folder` out of it, until the block or the process ends.

    Args:
        folder: made if it is not there, and taken away again if nothing came into it.
        wait: until the others have left it.

    Raises:
        FolderInUse: it is held already, and not to be waited for.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise FolderInUse(f"{folder}: another process is at work there") from None
        except OSError:  # a network drive that knows no locks: it was asked for in vain
            pass
        yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()
        os.close(handle)  # and with it goes the lock


def write_atomically(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Puts a file in its place at once; after an error, what was there before is still there.

    Args:
        path: the file; its folder is made.
        content: bytes, text (UTF-8), or a function that writes to the path it is given, a
            temporary file in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        elif isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content(temporary)
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
