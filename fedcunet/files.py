"""Files that are there whole or not at all, JSON, folders that one process at a time writes."""

import fcntl
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedcunet.errors import FolderInUse, UserError

logger = logging.getLogger(__name__)


@contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes that ask for `folder` out of it, until the block or the process ends.

    Args:
        folder: made if it is not there, and taken away again if nothing came into it.
        wait: until the others have left it.

    Raises:
        FolderInUse: it is held already, and not to be waited for.
        UserError: it is a file.
    """
    is_new = not folder.exists()
    handle = _locked(folder, wait)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()
        os.close(handle)  # and with it goes the lock


def _locked(folder: Path, wait: bool) -> int:
    """A handle of the folder, made if it is not there, with the lock."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"{folder}: expected a folder, found a file") from None
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process has just taken it away
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise FolderInUse(f"{folder}: another process is at work there") from None
        except OSError as error:  # a network drive
            text = "%s: no lock to be had (%s): see to it that no other process works there"
            logger.warning(text, folder, error.strerror)
            return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        os.close(handle)  # of a folder that another process has taken away meanwhile


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


def json_text(value: Any, *, indent: int | None = None) -> str:
    """The JSON of a result of lists, dicts and plain values; NaN and infinities become null."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
