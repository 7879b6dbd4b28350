"""Runs of a server: submitted, followed to their end, shown again, and where their folders go."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tomli_w

from clients.app import _checked_token
from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure, UserError
from server import deployment, running
from server.app import NoDisplay, _token, serve
from server.app import main as app_main
from server.folder import Address, Request, ServerFolder
from server.journal import JournalDisplay, JournalReader
from server.run_folders import chosen_folder


def test_what_is_this_machines_own_business_is_not_given_to_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[dict[str, Any]] = []

    def flwr(_folder: ServerFolder, _words: list[str], options: list[str]) -> dict[str, Any]:
        submitted.append(tomllib.loads(Path(options[1]).read_text()))
        return {"run-id": "7"}

    monkeypatch.setattr(running, "flwr", flwr)
    folder = ServerFolder(tmp_path / "server")
    config = RunConfig().replace(data__root="mine", data__cache_bytes=10**7, seed=3)
    asked = Request(out=tmp_path / "run", name="x", wait_seconds=0)
    assert running.submit(folder, config, asked) == 7
    sent = submitted[0]["data"] | submitted[0]["federation"]
    assert not any(key.startswith("cache") or key.endswith("-dir") for key in sent)
    assert "root" not in sent
    assert submitted[0]["seed"] == 3

    request = folder.request(7)
    assert request is not None
    folders = {key: one for key, one in request.local.items() if key.endswith(("-dir", ".root"))}
    assert len(folders) == 5
    assert [key for key, path in folders.items() if not Path(str(path)).is_absolute()] == []
    assert Path(str(folders["data.root"])) == Path("mine").resolve()
    assert request.local["data.cache-bytes"] == 10**7


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"federation.attack": "nan", "federation.attackers": 0.2}, "federation.attack: expected"),
        ({"federation.availability": True}, "federation.availability: expected false outside of"),
    ],
)
def test_the_flower_app_refuses_what_is_played_in_our_simulations_only(
    setting: dict[str, Any], said: str
) -> None:
    context = SimpleNamespace(run_config=RunConfig().flat() | setting, run_id=7)
    with pytest.raises(UserError, match=said):
        app_main(cast(Any, None), cast(Any, context))


def test_a_run_whose_process_was_killed_fails_with_flowers_word_and_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_ended", lambda folder, run_id: "finished:failed, no heartbeat")
    monkeypatch.setattr(running, "STATUS_SECONDS", 0)
    follower = running.Follower(folder=ServerFolder(tmp_path), run_id=7, display=NoDisplay())
    with pytest.raises(RunFailure, match=r"finished:failed, no heartbeat; --resume goes on"):
        follower.follow()


def test_a_server_that_has_gone_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "STATUS_SECONDS", 0)
    monkeypatch.setattr(running, "SILENT_SECONDS", 0.3)
    follower = running.Follower(folder=ServerFolder(tmp_path), run_id=7, display=NoDisplay())
    with pytest.raises(RunFailure, match=r"nobody answers in the server's place .* --resume"):
        follower.follow()


def test_any_name_of_a_run_makes_a_token_that_clients_take() -> None:
    for name in ("données", "a b/c", "x" * 200, ""):
        assert _checked_token(_token(name)) != _token(name)


def test_each_submission_has_a_setting_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ServerFolder(tmp_path / "server")
    given: list[tuple[Path, int]] = []

    def flwr(folder: ServerFolder, words: Sequence[str], more: Sequence[str]) -> dict[str, int]:
        if not given:  # while Flower starts, before it reads the file
            given.append((tmp_path, 0))
            running.submit(folder, RunConfig(seed=2), request)
        given.append((Path(more[-1]), RunConfig.from_toml(Path(more[-1])).seed))
        return {"run-id": len(given)}

    monkeypatch.setattr(running, "flwr", flwr)
    request = Request(out=tmp_path / "run", name="x", wait_seconds=0)
    folder.make()
    running.submit(folder, RunConfig(seed=1), request)
    assert [seed for _, seed in given[1:]] == [2, 1]
    assert not any(path.exists() for path, _ in given[1:])


def test_the_latest_run_of_a_name_is_resumed_and_nothing_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = Path(".fedcunet/runs")
    assert chosen_folder(None, "net", resume=False) == runs / "net"
    for name in ("net", "net-3", "net-10", "net-wide", "network-20"):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.toml").touch()
    assert chosen_folder(None, "net", resume=True) == runs / "net-10"
    assert chosen_folder(None, "net", resume=False) == runs / "net-11"
    assert chosen_folder(runs / "net-3", "net", resume=True) == runs / "net-3"
    (tmp_path / "empty").mkdir()
    for out in (None, tmp_path / "misspelt", tmp_path / "empty"):
        with pytest.raises(UserError, match="expected a run to resume, found none"):
            chosen_folder(out, "other", resume=True)


class NobodyThere:
    def get_node_ids(self) -> list[int]:
        raise AssertionError("nobody is waited for")


def test_a_run_that_has_ended_is_shown_again_without_waiting_for_nodes(tmp_path: Path) -> None:
    folder, out, config = ServerFolder(tmp_path / "server"), tmp_path / "run", RunConfig()
    folder.make()
    folder.write_address(Address(fleet="a:1", control="a:2", health="a:3", authority=None, pid=1))
    folder.write_request(7, Request(out=out, name="x", wait_seconds=60, resume=True))
    out.mkdir()
    (out / "config.toml").write_text(tomli_w.dumps(config.nested()))
    for committed in (3, 0):
        summary = {"name": "x", "rounds_committed": committed}
        (out / "summary.json").write_text(json.dumps(summary))
        words = JournalReader(folder.progress(7))
        words.news()
        if committed:
            deployment.run(serve, NobodyThere(), config, folder, 7)
            assert words.news() == [["end", summary]]
        else:
            with pytest.raises(RunFailure, match="no round was committed"):
                deployment.run(serve, NobodyThere(), config, folder, 7)
            assert [what for what, *_ in words.news()] == ["end", "fail"]


def test_a_journal_is_read_line_by_line_while_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "1.jsonl"
    reader = JournalReader(path)
    assert reader.news() == []
    journal = JournalDisplay(path)
    journal.begin("name", 3, "nme_percent", 20.5)
    journal.round_done({"round": 1})
    assert reader.news() == [
        ["begin", "name", 3, "nme_percent", 20.5],
        ["round_done", {"round": 1}],
    ]
    with path.open("a") as file:
        file.write('["say", ')
        file.flush()
        assert reader.news() == []
        file.write(json.dumps("words") + "]\n")
    assert reader.news() == [["say", "words"]]
