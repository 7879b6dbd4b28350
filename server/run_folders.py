"""Where run folders are made, and which of them is gone on with."""

import re
from collections.abc import Collection
from pathlib import Path

from fedcunet.errors import UserError

RUNS_DIR = Path(".fedcunet/runs")


def chosen_folder(out: Path | None, name: str, *, resume: bool) -> Path:
    """The folder of a run.

    Args:
        out: what was asked for, if anything: a new or empty folder, or the one to resume.
        name: otherwise `.fedcunet/runs/NAME`, or NAME-2, NAME-3 and so on, each after the last
            that is there; to resume, that one.
        resume: go on with what the folder holds.

    Raises:
        UserError: `out` holds something, and that is not to be resumed, or there is nothing to
            resume.
    """
    if out is None:
        numbered = re.compile(re.escape(name) + r"(?:-(\d+))?")
        found = [numbered.fullmatch(path.name) for path in RUNS_DIR.glob("*")]
        number = max((int(match[1] or 1) for match in found if match), default=0)
        number += not resume
        out = RUNS_DIR / (f"{name}-{number}" if number > 1 else name)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not resume:
        if not out.is_dir():
            raise UserError(f"folder {out}: expected an empty or new folder, found a file")
        has_run = any((out / name).exists() for name in ("config.toml", "table.json"))
        what = "a run (--resume goes on with it)" if has_run else "files"
        raise UserError(f"folder {out}: expected an empty or new folder, found {what}")
    if resume and not taken:
        raise UserError(f"folder {out}: expected a run to resume, found none")
    return out


def check_comparison(folder: Path, names: Collection[str]) -> None:
    """Raises UserError if a folder to resume holds anything but a comparison of settings.

    Args:
        folder: of the comparison.
        names: of the settings' run folders, which may be there already.
    """
    for path in folder.iterdir():
        is_run = path.is_dir() and (path.name in names or (path / "config.toml").exists())
        known = path.name in ("table.json", "report.html") or path.name.startswith(".")
        if not (is_run or known):
            raise UserError(f"folder {folder}: expected a comparison to resume, found {path.name}")
