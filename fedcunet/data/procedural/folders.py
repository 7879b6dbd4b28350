"""A procedural set's folder: made whole or not at all, and left alone where it is already."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2

from ...errors import UserError


def make_once(
    root: Path, *, kind: str, manifest: str, wanted: dict[str, Any], write: Callable[[Path], None]
) -> None:
    """Let `write` fill the folder `root`, unless it holds the wanted set already.

    The set is made in a temporary folder beside `root` and renamed when it is complete.

    Args:
        root: Folder to make; absent, empty, or holding a set made with the same arguments.
        kind: What the set is called in messages.
        manifest: Name of the file in the folder that tells with which arguments it was made.
        wanted: Those arguments, and whatever else the manifest should hold under "counts".
        write: Fills the folder that it is given.

    Raises:
        UserError: `root` holds anything else.
    """
    if _is_made(root, kind, manifest, wanted):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)  # on pictures this small, handing parts to threads costs more
        write(work)
        (work / manifest).write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        work.chmod(0o777 & ~_umask())  # mkdtemp made it private
        os.replace(work, root)  # an empty folder there is replaced
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        cv2.setNumThreads(threads)


def _is_made(root: Path, kind: str, manifest: str, wanted: dict[str, Any]) -> bool:
    """Whether `root` already holds the wanted set; refuses what is there otherwise."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder for the {kind}, found a file")
    if not any(root.iterdir()):
        return False
    asked = {key: value for key, value in wanted.items() if key != "counts"}
    try:
        found = json.loads((root / manifest).read_text(encoding="utf-8"))
        described = {key: found[key] for key in asked}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{root}: expected an absent or empty folder or a {kind}, found other files; "
            "nothing was changed"
        ) from None
    if described != asked:
        raise UserError(
            f"{root}: expected a {kind} with {_words(asked)}, found one with {_words(described)}"
        )
    return True


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
