"""The run folder of a run that goes on: its lists hold each line once."""

import json
from pathlib import Path

import pytest
import tomli_w
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedcunet.client_evaluation import ClientEvaluation, ClientScore
from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure, UserError
from fedcunet.replies import RoundLine
from fedcunet.saved import Saved
from server.recorder import RunRecorder, finished


def line(number: int) -> RoundLine:
    return RoundLine(
        round=number,
        outcome="committed",
        reason="",
        replies={"accepted": 1},
        train_loss=1.0,
        bytes_up=5,
        bytes_down=7,
        clients_up=1,
        clients_down=1,
        device_seconds=2.0,
        seconds=1.0,
        aggregate_seconds=0.5,
        learning_rate=0.1,
        reproducible=True,
    )


def answers(number: int, part: str) -> ClientEvaluation:
    score = ClientScore(
        round=number,
        client=0,
        outcome="accepted",
        detail="",
        num_examples=2,
        percent=9.0,
        bytes_up=11,
        bytes_down=13,
    )
    return ClientEvaluation(part=part, scores=(score,))


def test_lines_after_the_last_save_are_cut_off_and_those_of_the_final_test(tmp_path: Path) -> None:
    config = RunConfig()
    recorder = RunRecorder(tmp_path, config)
    for number in (1, 2):
        recorder.round(line(number), [], None, None)
        recorder.client_evaluation(answers(number, "validation"), "nme_percent")
        recorder.save({"server": Saved(facts={"round": number})})
    totals, figures = dict(recorder.totals), dict(recorder.client_figures)
    # The run is stopped after its final test, before its summary.
    recorder.client_evaluation(answers(2, "test"), "nme_percent")
    recorder.close()
    resumed = RunRecorder(tmp_path, config, resume=True)
    assert (dict(resumed.totals), resumed.client_figures) == (totals, figures)
    resumed.client_evaluation(answers(2, "test"), "nme_percent")
    resumed.close()
    text = (tmp_path / "client_evaluations.jsonl").read_text()
    found = [(score["part"], score["round"]) for score in map(json.loads, text.splitlines())]
    assert found == [("validation", 1), ("validation", 2), ("test", 2)]
    assert resumed.client_figures["evaluation_bytes_down"] == 3 * 13


@pytest.mark.parametrize("text", ["garbage", "3", "{}"])
def test_a_damaged_line_of_a_run_that_goes_on_is_named(tmp_path: Path, text: str) -> None:
    recorder = RunRecorder(tmp_path, RunConfig())
    recorder.round(line(1), [], None, None)
    recorder.save({"server": Saved(facts={"round": 1})})
    recorder.close()
    path = tmp_path / "metrics.jsonl"
    content = path.read_text() + text + "\n"
    path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected a JSON object in each line"):
        RunRecorder(tmp_path, RunConfig(), resume=True)
    assert path.read_text() == content


def test_a_round_that_is_done_again_has_one_point_in_tensorboard_and_time_goes_on(
    tmp_path: Path,
) -> None:
    recorder = RunRecorder(tmp_path, RunConfig())
    recorder.seconds_before = 100.0
    recorder.round(line(1), [], None, None)
    recorder.save({"server": Saved(facts={"round": 1})})
    recorder.round(line(2), [], None, None)  # and stopped before it was saved
    recorder.close()
    resumed = RunRecorder(tmp_path, RunConfig(), resume=True)
    assert resumed.seconds_before >= 100
    resumed.round(line(2), [], None, None)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("bytes/up")] == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_replaced_workers_are_counted_across_a_stop(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, RunConfig())
    recorder.faults = lambda: {"died": 2}
    recorder.save({"server": Saved(facts={"round": 1})})
    recorder.close()
    resumed = RunRecorder(tmp_path, RunConfig(), resume=True)
    assert resumed.workers_replaced() == {"died": 2}
    resumed.faults = lambda: {"died": 1, "hung": 1}
    assert resumed.workers_replaced() == {"died": 3, "hung": 1}
    resumed.close()


def test_a_run_that_is_still_at_work_is_not_resumed(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, RunConfig())
    recorder.save({"server": Saved(facts={"round": 1})})
    with pytest.raises(UserError, match="another process is at work there"):
        RunRecorder(tmp_path, RunConfig(), resume=True)
    recorder.round(line(2), [], None, None)
    assert (tmp_path / "metrics.jsonl").exists()
    recorder.close()
    with pytest.raises(UserError, match="expected seed = 0 as the run was begun with, found 1"):
        RunRecorder(tmp_path, RunConfig(seed=1), resume=True)
    RunRecorder(tmp_path, RunConfig(), resume=True).close()  # the refused one has left it


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"rounds_committed": null}'])
def test_a_damaged_summary_is_named(tmp_path: Path, text: str) -> None:
    config = RunConfig()
    assert finished(tmp_path, config) is None
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config.nested()))
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json: expected the summary of a run, found"):
        finished(tmp_path, config)


def test_with_privacy_a_state_that_cannot_be_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    state = {"server": Saved(facts={"round": 1})}
    private = RunConfig().replace(privacy__clip_norm=1.0)
    for name, config in (("plain", RunConfig()), ("private", private)):
        recorder = RunRecorder(tmp_path / name, config)
        recorder.save(state)
        with monkeypatch.context() as patch:
            patch.setattr("server.recorder.write_saved", full)
            if config is private:
                with pytest.raises(RunFailure, match=r"not written: .*No space.*privacy.*--resume"):
                    recorder.save(state)
            else:
                recorder.save(state)
                assert recorder.checkpoints_failed == 1
        recorder.close()
        assert (tmp_path / name / "checkpoint" / "state.safetensors").exists()


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, RunConfig())
    recorder.summary({"auc": float("nan"), "rows": [{"percent": float("inf"), "images": 1}]})
    recorder.close()
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == {"auc": None, "rows": [{"percent": None, "images": 1}]}


def test_a_run_killed_before_its_first_round_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        (tmp_path / "tensorboard").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("server.recorder.SummaryWriter", killed)
        with pytest.raises(KeyboardInterrupt):
            RunRecorder(tmp_path, RunConfig())
    RunRecorder(tmp_path, RunConfig(), resume=True).close()
