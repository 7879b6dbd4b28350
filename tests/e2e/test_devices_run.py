"""Whole runs on mixed devices: rungs of the ladder, availability, bits by device."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import clients.app
from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure
from fedcunet.measured import step_need
from fedcunet.quant.layers import QuantConv2d
from fedcunet.quant.storage import Stored
from reports.report import write_run_report
from server.app import NoDisplay, serve
from simulations.loopback import LoopbackGrid
from tests.e2e.test_simulation import FACES, run

# Several fresh processes are measured, and Ray starts.
pytestmark = pytest.mark.timeout(900)

LADDER = "storage=packed; storage=frugal bits=6,1,6 batch-size=half"


@dataclass
class Fleet:
    """A setting of four clients with a device for each rung, and one for none."""

    config: RunConfig
    needed_bytes: list[int]  # of each rung
    names: list[str]  # of the devices: rungs 0, 1, 2, none


@pytest.fixture
def fleet(make_300w: Callable[..., Path], tmp_path: Path, measured_dir: Path) -> Fleet:
    config = RunConfig().replace(
        model__unets=1,
        model__order=0,
        quant__bits="8,1,8",
        quant__alpha=True,
        data__name="300w",
        data__root=str(make_300w(FACES)),
        training__batch_size=4,
        training__optimizer="adam",
        federation__clients=4,
        federation__rounds=2,
        federation__partition="iid",
        federation__ladder=LADDER,
        federation__state_dir=str(tmp_path / "clients"),
        federation__measured_dir=str(measured_dir),
    )
    needed = [step_need(rung, 68).peak_bytes for rung in config.rungs()]
    # Half of a device's memory is for training: a whole number of MB above and below.
    megabytes = [-(-2 * need // 10**6) for need in needed]
    low = 2 * needed[2] // 10**6 - 1
    names = [
        "laptop",
        f"phone-mid@{megabytes[1]}MB",
        f"phone-low@{megabytes[2]}MB",
        f"phone-low@{low}MB",
    ]
    return Fleet(config.replace(federation__fleet=",".join(names)), needed, names)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]


def test_each_device_trains_on_the_first_rung_that_it_holds_or_stays_out(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int, int]] = []
    train_pass = clients.app.train_pass

    def watched(model: Any, *arguments: Any, **named: Any) -> Any:
        layer = next(one for one in model.modules() if isinstance(one, QuantConv2d))
        storage = "float32"
        if isinstance(model, Stored):
            storage = "frugal" if model.frugal else "packed"
        trained.append((storage, layer.spec.input_bits, named["batch_size"]))
        return train_pass(model, *arguments, **named)

    monkeypatch.setattr(clients.app, "train_pass", watched)
    summary = run(fleet.config, tmp_path / "run")
    rungs = [("float32", 8, 4), ("packed", 8, 4), ("frugal", 6, 2)]
    assert sorted(trained) == sorted(2 * rungs)
    assert summary["replies"] == {"accepted": 6}
    rows = {row["device"]: row for row in summary["fleet"]}
    assert [rows[name]["rung"] for name in fleet.names[:3]] == [0, 1, 2]
    assert [rows[name]["needed_bytes"] for name in fleet.names[:3]] == fleet.needed_bytes
    assert [rows[name]["clients"] for name in fleet.names[:3]] == [1, 1, 1]
    assert rows["laptop"]["needed_bytes"] == summary["training_peak_bytes"]
    (left_out,) = summary["left_out"]
    assert "on the thriftiest rung of federation.ladder" in left_out
    assert f"{fleet.names[3]} has " in left_out
    found = {line["device"]: line["rung"] for line in lines_of(tmp_path / "run")}
    assert found == {name: rung for rung, name in enumerate(fleet.names[:3])}
    report = write_run_report(tmp_path / "run").read_text()
    assert LADDER in report


def test_a_fleet_that_holds_no_rung_is_refused_before_anything_is_written(
    fleet: Fleet, tmp_path: Path
) -> None:
    with pytest.raises(RunFailure, match="no client can take part: training needs") as refusal:
        run(fleet.config.replace(federation__fleet=fleet.names[3]), tmp_path / "run")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_real_node_takes_the_rung_that_fits_into_its_own_memory(
    fleet: Fleet, tmp_path: Path
) -> None:
    config = fleet.config.replace(federation__rounds=1)
    whole, packed = (
        step_need(rung, 68).resident_bytes + config.data.cache_bytes for rung in config.rungs()[:2]
    )
    assert packed < whole
    local = {"data.name": "300w", "data.root": config.data.root, "num-partitions": 2}
    local |= {"federation.measured-dir": config.federation.measured_dir}
    nodes = [local | {"memory-bytes": allowed} for allowed in (whole, whole - 1)]
    grid = LoopbackGrid("clients.app:app", nodes, config.flat())
    summary = serve(grid, config, out=tmp_path / "run", name="run", display=NoDisplay())
    assert summary["replies"] == {"accepted": 2}
    assert [(row["rung"], row["needed_bytes"]) for row in summary["fleet"]] == [
        (0, whole),
        (1, packed),
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_mixed_devices_give_the_same_model_on_ray_as_on_loopback(
    fleet: Fleet, tmp_path: Path
) -> None:
    config = fleet.config.replace(
        federation__availability=True,
        federation__rounds=3,
        federation__quorum=0.0,
        update__codec="trellis",
        update__bits=2,
        update__bits_by_device="phone-low:1,phone-mid:1.5",
        update__prediction=True,
        downlink__codec="trellis",
        downlink__bits=1,
    )
    expected = run(config, tmp_path / "loopback")
    found = run(config, tmp_path / "ray", "ray", 2)
    assert found["checkpoint_sha256"] == expected["checkpoint_sha256"]
    assert found["replies"] == expected["replies"]
    assert expected["replies"].keys() == {"accepted", "unavailable"}
    assert expected["replies"]["accepted"] + expected["replies"]["unavailable"] == 9
    bits = {line["device"]: line["update_bits"] for line in lines_of(tmp_path / "ray")}
    assert bits == dict(zip(fleet.names[:3], (2.0, 1.5, 1.0), strict=True))
    keys = ("round", "client", "outcome", "rung", "update_bits", "bytes_up", "bytes_down", "loss")
    both = [
        [[line[key] for key in keys] for line in lines_of(tmp_path / name)]
        for name in ("loopback", "ray")
    ]
    assert both[0] == both[1]
    for line in lines_of(tmp_path / "loopback"):
        if line["outcome"] == "accepted":
            assert line["bits_per_parameter"] == pytest.approx(line["update_bits"], rel=0.01)
