"""Where run folders are made, and which of them is gone on with."""

from pathlib import Path

from fedcunet.errors import UserError

RUNS_DIR = Path(".fedcunet/runs")


def chosen_folder(out: Path | None, name: str, *, resume: bool) -> Path:
    """The folder of a run.

    Args:
        out: what was asked for, if anything: a new or empty folder, or the one to resume.
        name: otherwise `.fedcunet/runs/NAME`, with a number behind it where that is taken; to
            resume, the latest of these.
        resume: go on with what the folder holds.

    Raises:
        UserError: `out` holds something, and that is not to be resumed.
    """
    if out is not None:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if taken and not resume:
            raise UserError(f"folder {out}: expected an empty or new folder, found files")
        return out
    found, number = RUNS_DIR / name, 1
    latest = found
    while found.exists():
        latest, number = found, number + 1
        found = RUNS_DIR / f"{name}-{number}"
    return latest if resume else found
