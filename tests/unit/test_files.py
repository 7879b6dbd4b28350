"""Folders that one process at a time works in."""

import os
import shutil
from pathlib import Path
from threading import Thread

import pytest

from fedcunet.errors import FolderInUse
from fedcunet.files import held


def test_who_is_refused_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with held(folder):
        for _ in range(2):
            with pytest.raises(FolderInUse, match="new: another process is at work"), held(folder):
                pass
        assert folder.is_dir()
    assert not folder.exists()


def test_a_folder_that_was_taken_away_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, opened = tmp_path / "new", os.open

    def late(path: Path, flags: int) -> int:
        monkeypatch.undo()
        handle = opened(path, flags)
        shutil.rmtree(path)  # as its last holder does
        return handle

    monkeypatch.setattr("os.open", late)
    with held(folder):
        assert folder.is_dir()
        with pytest.raises(FolderInUse), held(folder):
            pass


def test_who_waits_gets_the_folder_after_the_others(tmp_path: Path) -> None:
    order: list[str] = []

    def wait() -> None:
        with held(tmp_path, wait=True):
            order.append("second")

    with held(tmp_path):
        thread = Thread(target=wait)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


def test_a_drive_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: int, kind: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with held(tmp_path):
        assert "no lock to be had (Bad file descriptor)" in caplog.text
