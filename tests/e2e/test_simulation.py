"""Whole federated runs of the real apps: what they leave behind, and that they repeat exactly."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcunet.config import RunConfig
from fedcunet.data import FACE68, load
from fedcunet.data.partition import hold_back
from fedcunet.devices import profile_named
from fedcunet.errors import UserError
from fedcunet.partitioners import deal
from fedcunet.training.checkpoint import load_checkpoint, tensors_sha256
from fedcunet.training.packed import pack_network
from reports.report import write_comparison_report, write_run_report
from server.app import NoDisplay, serve
from simulations.engine import Engine
from simulations.loopback import LoopbackGrid

FACES = {
    "afw": [f"{n}_1.jpg" for n in range(5)],
    "helen/trainset": [f"{n}_{k}.jpg" for n in range(3) for k in (1, 2)],
    "helen/testset": [f"{n}_1.jpg" for n in range(10, 14)],
}


@pytest.fixture
def setting(make_300w: Callable[..., Path], tmp_path: Path, measured_dir: Path) -> RunConfig:
    """Three clients, two rounds, a quantised network of one U-Net, signs with error feedback."""
    return RunConfig().replace(
        model__unets=1,
        model__order=0,
        quant__bits="8,1,8",
        quant__alpha=True,
        data__name="300w",
        data__root=str(make_300w(FACES)),
        training__batch_size=4,
        training__optimizer="adam",
        update__codec="sign",
        update__bits=1,
        update__error_feedback="on",
        federation__clients=3,
        federation__rounds=2,
        federation__state_dir=str(tmp_path / "clients"),
        federation__measured_dir=str(measured_dir),
    )


def run(config: RunConfig, out: Path, engine: str = "loopback", workers: int = 1) -> dict[str, Any]:
    chosen = Engine(name=engine, num_workers=workers, num_gpus=0, ray_address=None)
    with ExitStack() as stack:
        grid = chosen.grid(config, stack)
        return serve(grid, config, out=out, name=out.name, display=NoDisplay())


def test_a_run_leaves_its_folder_as_promised(setting: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = run(setting, out)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["rounds_committed"] == 2
    assert summary["replies"] == {"accepted": 6}
    assert summary["metric_name"] == "nme_percent"
    assert summary["mean_shape_percent"] > 0
    # Eight bits without packed storage take more memory than float32, not less.
    assert 10e6 < summary["training_peak_bytes"] < 200e6
    assert 1 < summary["training_peak_ratio"] < 2
    parts = summary["seconds_of"]
    assert set(parts) == {"train", "code", "wait", "aggregate", "evaluate"}
    assert 0 < parts["code"] < parts["train"] < parts["wait"] < summary["seconds"]
    memory, size = summary["training_peak_ratio"], summary["model_ratio"]
    assert summary["balance_index"] == pytest.approx(summary["nme_percent"] ** 2 * memory * size)
    assert RunConfig.from_toml(out / "config.toml") == setting
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clients = [json.loads(line) for line in (out / "clients.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in rounds] == ["committed", "committed"]
    assert rounds[-1]["metric"] == summary["nme_percent"]
    assert [line["client"] for line in clients] == [0, 1, 2, 0, 1, 2]
    assert sum(line["bytes_up"] for line in clients) == sum(line["bytes_up"] for line in rounds)
    assert sum(line["num_examples"] for line in clients[:3]) == 11
    assert all(line["device_seconds"]["uplink"] > 0 for line in clients)
    checkpoint = load_checkpoint(out / "checkpoint" / "model.safetensors")
    assert tensors_sha256(checkpoint.model) == summary["checkpoint_sha256"]
    assert checkpoint.facts == {"round": "2"}
    packed = pack_network(checkpoint.model, setting, FACE68).content
    assert summary["model_bytes"] == len(packed)
    with np.load(out / "examples.npz") as examples:
        assert examples["images_NHWC"].shape == (4, 64, 64, 3)
        assert examples["predicted_NK2"].shape == (4, 68, 2)
    assert list((out / "tensorboard").iterdir())
    # The clients' residuals of a run that has ended are gone.
    assert not list((tmp_path / "clients").rglob("*.safetensors"))
    report = write_run_report(out).read_text()
    assert "NME" in report
    assert "of naive float32" in report
    assert "Balance index" in report
    (tmp_path / "both").mkdir()
    assert write_comparison_report(tmp_path / "both", [out]).stat().st_size < 3e6


def test_one_bit_updates_are_about_a_bit_with_everything_counted(
    setting: RunConfig, tmp_path: Path
) -> None:
    summary = run(setting.replace(federation__rounds=1), tmp_path / "run")
    # Signs, and 8 bits for BatchNorm, first and last convolutions: 3 % of the parameters.
    assert 1 < summary["bits_per_parameter_up"] < 1.4
    assert 32 < summary["bits_per_parameter_down"] < 32.01


def test_the_same_seed_gives_the_same_model_and_another_seed_another(
    setting: RunConfig, tmp_path: Path
) -> None:
    first = run(setting, tmp_path / "a")["checkpoint_sha256"]
    assert run(setting, tmp_path / "b")["checkpoint_sha256"] == first
    other = run(setting.replace(seed=1), tmp_path / "c")["checkpoint_sha256"]
    assert other != first


def test_attackers_attack_are_refused_or_outvoted_and_are_counted(
    setting: RunConfig, tmp_path: Path
) -> None:
    setting = setting.replace(federation__rounds=1)
    honest = run(setting, tmp_path / "honest")
    assert honest["attackers"] == {}
    hostile = setting.replace(federation__attackers=0.3, federation__attack="nan")
    refused = run(hostile, tmp_path / "refused")
    assert refused["attackers"] == {"nan": 1}
    assert refused["replies"] == {"accepted": 2, "not-finite": 1}
    digests = {honest["checkpoint_sha256"], refused["checkpoint_sha256"]}
    for attack in ("sign-flip", "label-shift"):
        found = run(hostile.replace(federation__attack=attack), tmp_path / attack)
        assert found["replies"] == {"accepted": 3}
        digests.add(found["checkpoint_sha256"])
    assert len(digests) == 4  # each attack makes another model


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_ray_with_one_and_two_workers_gives_the_model_of_the_loopback(
    setting: RunConfig, tmp_path: Path
) -> None:
    # EDEN's arithmetic must not depend on the threads that this process and the workers have.
    setting = setting.replace(
        update__codec="eden",
        update__bits=2,
        update__prediction=True,
        downlink__codec="trellis",
        downlink__bits=1,
        federation__validation_fraction=0.4,
    )
    expected = run(setting, tmp_path / "loopback")
    evaluations = (tmp_path / "loopback" / "client_evaluations.jsonl").read_text()
    for workers in (1, 2):
        found = run(setting, tmp_path / f"ray-{workers}", "ray", workers)
        assert found["checkpoint_sha256"] == expected["checkpoint_sha256"]
        assert found["replies"] == {"accepted": 6}
        own = tmp_path / f"ray-{workers}" / "client_evaluations.jsonl"
        assert own.read_text() == evaluations


class Forgetful(NoDisplay):
    """After the second round one client's model is gone and another's is damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def round_done(self, line: dict[str, Any]) -> None:
        if line["round"] == 2:
            models = sorted(self._folder.rglob("model-*.safetensors"))
            assert len(models) == 3
            models[0].unlink()
            models[1].write_bytes(models[1].read_bytes()[:1000])


def test_differences_go_down_and_a_lost_model_costs_a_snapshot(
    setting: RunConfig, tmp_path: Path
) -> None:
    setting = setting.replace(downlink__codec="trellis", downlink__bits=1, federation__rounds=3)
    grid = LoopbackGrid(
        "clients.app:app",
        [{"data.root": setting.data.root, "num-partitions": 3}] * 3,
        setting.flat(),
    )
    folder = Path(setting.federation.state_dir)
    out = tmp_path / "run"
    summary = serve(grid, setting, out=out, name="run", display=Forgetful(folder))
    assert summary["replies"] == {"accepted": 9}
    clients = _lines(out / "clients.jsonl")
    assert [line["bytes_down"] for line in clients[:3]] == [24] * 3  # it follows from the seed
    length = round(8 * clients[0]["bytes_up"] / clients[0]["bits_per_parameter"])
    bits = [8 * line["bytes_down"] / length for line in clients[6:]]
    # A difference of 1 bit to all; on top of it a snapshot of 8 bits to those who lost theirs.
    assert bits == pytest.approx([9, 9, 1], rel=0.02)
    for line in clients:  # the device takes its time for both
        rate = profile_named(line["device"]).downlink_bytes_per_second
        assert line["device_seconds"]["downlink"] == pytest.approx(line["bytes_down"] / rate)
    assert not list(folder.rglob("*.safetensors"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_clients_evaluate_on_images_that_they_keep_back(setting: RunConfig, tmp_path: Path) -> None:
    before = run(setting, tmp_path / "before")
    assert not [key for key in before if key.startswith(("client_", "evaluation_"))]
    out = tmp_path / "run"
    shares = {"federation__validation_fraction": 0.3, "federation__test_fraction": 0.3}
    summary = run(setting.replace(**shares), out)
    rounds, scores = _lines(out / "metrics.jsonl"), _lines(out / "client_evaluations.jsonl")
    clients = _lines(out / "clients.jsonl")
    assert [line["outcome"] for line in scores] == ["accepted"] * len(scores)
    assert {score["round"] for score in scores} == {1, 2}
    # Every face is trained on, or evaluated on, or tested on.
    held = sum(score["num_examples"] for score in scores if score["round"] == 1)
    tests = [score for score in scores if score["part"] == "test"]
    tested = sum(score["num_examples"] for score in tests)
    assert held > 0
    assert tested > 0
    assert sum(line["num_examples"] for line in clients if line["round"] == 1) == 11 - held - tested
    weights = [score["num_examples"] for score in tests]
    mean = np.average([score["percent"] for score in tests], weights=weights)
    assert {score["round"] for score in tests} == {2}
    assert summary["client_test_mean_percent"] == pytest.approx(mean)
    last = [score for score in scores if score["round"] == 2 and score["part"] == "validation"]
    weights = [score["num_examples"] for score in last]
    mean = np.average([score["percent"] for score in last], weights=weights)
    assert summary["client_mean_percent"] == rounds[-1]["client_mean_percent"]
    assert summary["client_mean_percent"] == pytest.approx(mean)
    assert summary["client_worst_percent"] == max(score["percent"] for score in last)
    assert summary["evaluation_bytes_down"] == sum(score["bytes_down"] for score in scores)
    assert summary["evaluation_bytes_up"] == sum(score["bytes_up"] for score in scores) > 0
    assert summary["bytes_down_per_client_round"] == before["bytes_down_per_client_round"]
    assert "Worst client" in write_run_report(out).read_text()


def test_a_client_that_cannot_evaluate_still_trains(setting: RunConfig, tmp_path: Path) -> None:
    setting = setting.replace(federation__validation_fraction=0.4, federation__rounds=1)
    faces = load("300w", setting.data.root, "train").annotations
    part = deal(faces, setting.federation, num_clients=3, seed=setting.seed)[0]
    held = hold_back(faces, part, 0.4, setting.seed)[1]
    faces[held[0]].image.write_bytes(b"no picture")
    summary = run(setting, tmp_path / "run")
    assert summary["replies"] == {"accepted": 3}
    assert summary["client_evaluations"]["error-reply"] == 1
    assert summary["client_evaluations"]["accepted"] >= 1
    scores = _lines(tmp_path / "run" / "client_evaluations.jsonl")
    assert scores[0]["percent"] is None
    assert faces[held[0]].image.name in scores[0]["detail"]


def test_error_feedback_changes_what_is_sent(setting: RunConfig, tmp_path: Path) -> None:
    with_feedback = run(setting, tmp_path / "with")["checkpoint_sha256"]
    without = setting.replace(update__error_feedback="off")
    assert run(without, tmp_path / "without")["checkpoint_sha256"] != with_feedback


def test_a_client_without_readable_images_costs_only_itself(
    setting: RunConfig, tmp_path: Path
) -> None:
    broken = Path(setting.data.root) / "afw" / "0_1.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    summary = run(setting, tmp_path / "run")
    assert summary["replies"] == {"accepted": 4, "error-reply": 2}
    lines = (tmp_path / "run" / "clients.jsonl").read_text().splitlines()
    details = {json.loads(line)["detail"] for line in lines}
    assert any("0_1.jpg" in detail for detail in details)


def test_clients_that_do_not_fit_are_left_out_with_the_reason_in_the_summary(
    setting: RunConfig, tmp_path: Path
) -> None:
    local = {"data.root": setting.data.root, "federation.state-dir": str(tmp_path / "clients")}
    local["federation.measured-dir"] = str(tmp_path / "measured")
    nodes = [local, local | {"memory-bytes": 10**6}, local | {"data.name": "mpii"}]
    grid = LoopbackGrid("clients.app:app", nodes, setting.flat())
    config = setting.replace(federation__rounds=1)
    summary = serve(grid, config, out=tmp_path / "run", name="run", display=NoDisplay())
    assert summary["replies"] == {"accepted": 1}
    assert len(summary["left_out"]) == 2
    assert "node 2: training needs " in summary["left_out"][0]
    assert "this client has 1 MB for it" in summary["left_out"][0]
    assert summary["left_out"][1] == "node 3: this client has data 'mpii', the run asks for '300w'"


class Stopped(NoDisplay):
    """Ends the process's work in the middle of a round, or when one has ended."""

    def __init__(self, after_round: int, after_clients: int) -> None:
        self._round, self._clients = after_round + 1, after_clients

    def client_done(self, round: int, done: int, total: int) -> None:
        if (round, done) == (self._round, self._clients):
            raise KeyboardInterrupt

    def round_done(self, line: dict[str, Any]) -> None:
        # The lines are written, the state to go on from is not.
        if self._clients == 0 and line["round"] == self._round - 1:
            raise KeyboardInterrupt


def without_times(path: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "device_seconds", "compute_seconds", "encode_seconds")
    return [{key: one for key, one in line.items() if key not in timed} for line in _lines(path)]


def test_a_run_that_was_stopped_goes_on_to_the_same_model(
    setting: RunConfig, tmp_path: Path
) -> None:
    setting = setting.replace(
        federation__rounds=3,
        federation__fraction=0.7,
        federation__server_momentum=0.5,
        update__prediction=True,
        downlink__codec="sign",
        downlink__bits=1,
        model__unets=1,
        training__local_epochs=0.5,
    )
    through = run(setting, tmp_path / "through")
    out = tmp_path / "stopped"

    def go_on(display: NoDisplay, config: RunConfig = setting) -> dict[str, Any]:
        grid = Engine(name="loopback", num_workers=1, num_gpus=0, ray_address=None).grid(
            setting, ExitStack()
        )
        return serve(grid, config, out=out, name="run", display=display, resume=True)

    # Before the first round ends, after its lines were written, and in the middle of the others.
    for after_round, after_clients in ((0, 1), (1, 0), (1, 1), (2, 2), (3, 0)):
        with pytest.raises(KeyboardInterrupt):
            go_on(Stopped(after_round, after_clients))
    with pytest.raises(UserError, match=r"expected seed = 0 as the run was begun with, found 1"):
        go_on(NoDisplay(), setting.replace(seed=1))
    summary = go_on(NoDisplay())
    timed = ("name", "seconds", "seconds_of", "device_seconds_per_round")
    for key in set(through) - set(timed):
        assert summary[key] == through[key], key
    for name in ("metrics.jsonl", "clients.jsonl"):
        assert without_times(out / name) == without_times(tmp_path / "through" / name)
    assert go_on(Stopped(0, 1)) == summary  # it is complete
    assert not list((tmp_path / "clients").rglob("*.safetensors"))


def test_a_checkpoint_that_cannot_be_written_costs_itself_only(
    setting: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, parts: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.recorder.write_saved", full)
    summary = run(setting.replace(federation__rounds=1), tmp_path / "run")
    assert summary["checkpoints_failed"] == 2  # at the start and after the round
    assert summary["rounds_committed"] == 1
