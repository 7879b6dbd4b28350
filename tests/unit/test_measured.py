"""Measured needs of a training step: kept in files, refused in one line where they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedcunet import measured
from fedcunet.config import RunConfig
from fedcunet.measured import NotMeasured, StepNeed, free_memory_bytes, run_child, step_need
from fedcunet.memory import TrainingStep, measure, naive

SMALL = RunConfig().replace(
    model__unets=1, model__order=0, data__size=64, training__batch_size=4, quant__bits="8,1,8"
)
NEED = StepNeed(peak_bytes=4, static_bytes=1, resident_bytes=9, growth_bytes=5)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The settings that were measured; each is said to need `NEED`."""
    asked: list[RunConfig] = []

    def measure_need(config: RunConfig, num_landmarks: int) -> StepNeed:
        asked.append(config)
        return NEED

    monkeypatch.setattr(measured, "measure_need", measure_need)
    return asked


def test_a_fresh_process_finds_what_this_one_finds() -> None:
    need = measured.measure_need(SMALL, 2)
    (cost,) = measure([TrainingStep(SMALL, 2)], repeats=1)
    assert need.peak_bytes == cost.peak_bytes
    assert need.static_bytes == cost.static_bytes
    assert need.peak_bytes < need.growth_bytes < need.resident_bytes


def test_a_setting_is_measured_once(tmp_path: Path, counted: list[RunConfig]) -> None:
    config = SMALL.replace(federation__measured_dir=str(tmp_path / "deep" / "measured"))
    assert step_need(config, 2) == NEED
    assert step_need(config.replace(seed=3, training__learning_rate=0.5), 2) == NEED
    assert counted == [config]
    for other in (
        config.replace(quant__bits="6,1,6"),
        config.replace(training__batch_size=5),
        config.replace(training__optimizer="adam"),
        config.replace(data__size=128),
        config.replace(model__unets=2),
    ):
        step_need(other, 2)
        assert counted.pop() == other
    step_need(config, 3)
    assert counted == [config, config]


def test_another_torch_or_other_code_is_measured_anew(
    tmp_path: Path, counted: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMALL.replace(federation__measured_dir=str(tmp_path))
    step_need(config, 2)
    monkeypatch.setattr(measured.torch, "__version__", "9.9")
    step_need(config, 2)
    monkeypatch.setattr(measured, "_code_hash", lambda: "other")
    step_need(config, 2)
    assert len(counted) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["need"].pop("peak_bytes"),
        lambda content: content["need"].update(peak_bytes=-1),
        lambda content: content["need"].update(peak_bytes="4"),
        lambda content: content["key"].update({"data.size": 128}),
        lambda content: content.clear(),
    ],
)
def test_a_file_that_is_not_whole_is_measured_anew(
    tmp_path: Path, counted: list[RunConfig], damage: Any
) -> None:
    config = SMALL.replace(federation__measured_dir=str(tmp_path))
    step_need(config, 2)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    assert step_need(config, 2) == NEED
    path.write_text("{")
    assert step_need(config, 2) == NEED
    assert len(counted) == 3
    assert json.loads(path.read_text())["need"]["peak_bytes"] == 4


def test_a_step_that_does_not_fit_ends_in_its_own_process() -> None:
    large = SMALL.replace(data__size=1024, training__batch_size=64)
    with pytest.raises(NotMeasured, match=r"needs more than the 0\.7 GB it may take") as refusal:
        run_child("need", large, 2, plain_malloc=False, limit_bytes=700 * 10**6)
    assert "\n" not in str(refusal.value)


def test_the_summary_says_why_there_is_no_ratio(
    tmp_path: Path, counted: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMALL.replace(federation__measured_dir=str(tmp_path))
    assert measured.summary_figures(config, 2) == {
        "training_peak_bytes": 4,
        "training_peak_ratio": 1.0,
    }
    assert counted == [config, naive(config)]

    def refuse(config: RunConfig, num_landmarks: int) -> StepNeed:
        raise NotMeasured("too large")

    monkeypatch.setattr(measured, "measure_need", refuse)
    other = config.replace(quant__bits="6,1,6")
    assert measured.summary_figures(other, 2) == {
        "training_peak_bytes": None,
        "training_peak_ratio": None,
        "training_peak_note": "too large",
    }
    (tmp_path / "only").mkdir()
    only = config.replace(federation__measured_dir=str(tmp_path / "only"))
    monkeypatch.setattr(measured, "measure_need", lambda c, n: NEED if c == only else refuse(c, n))
    assert measured.summary_figures(only, 2) == {
        "training_peak_bytes": 4,
        "training_peak_ratio": None,
        "training_peak_note": "naive float32: too large",
    }


@pytest.mark.parametrize(
    ("limit", "usage", "cached"),
    [
        ("memory.max", "memory.current", "memory.stat inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat total_inactive_file",
        ),
    ],
)
def test_a_containers_limit_counts_where_it_is_lower(
    tmp_path: Path, limit: str, usage: str, cached: str
) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / usage).write_text("400\n")
    assert free_memory_bytes(tmp_path) == 600
    stat, key = cached.split()
    (tmp_path / stat).write_text(f"anon 90\n{key} 300\n")
    assert free_memory_bytes(tmp_path) == 900


def test_a_container_without_a_limit_has_what_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert free_memory_bytes(tmp_path) > 600
