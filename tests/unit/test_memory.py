"""Measured memory: the allocator's figures by hand, a step's figures in their places."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedcunet.__main__ as library
from fedcunet.config import RunConfig
from fedcunet.measured import StepNeed, resident_growth
from fedcunet.memory import (
    FORWARD_DONE,
    STEP_DONE,
    TrainingStep,
    allocator_bytes,
    compare_with_naive,
    step_bytes,
    storage_bytes,
)
from fedcunet.models import DUNet
from fedcunet.sweep import settings

MIB = 2**20
COST_KEYS = {"peak_bytes", "saved_bytes", "static_bytes", "step_seconds"}
KEYS = COST_KEYS | {"naive_float32", "peak_ratio", "step_ratio"}
SMALL = RunConfig().replace(
    model__unets=1, model__order=0, data__size=64, training__batch_size=2, quant__bits="8,1,8"
)
PACKED = SMALL.replace(quant__storage="packed", quant__input_quantizer="source")


def test_allocator_bytes_are_those_that_were_asked_for() -> None:
    before = torch.empty(MIB, dtype=torch.uint8)

    def run(mark: object) -> None:
        nonlocal before
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        second = torch.empty(5 * MIB, dtype=torch.uint8)
        del first
        mark(FORWARD_DONE)
        del second
        del before

    found = allocator_bytes(run)
    assert found["peak"] == 8 * MIB
    assert found[FORWARD_DONE] == 5 * MIB


def test_storages_are_counted_once() -> None:
    tensor = torch.zeros(6, 5)
    assert storage_bytes([tensor, tensor.t(), tensor[2:4], torch.zeros(1)]) == 4 * 31


def test_static_bytes_are_parameters_buffers_optimiser_and_batch() -> None:
    step = TrainingStep(SMALL, num_landmarks=2)
    model = DUNet(1, 0, 2)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    batch = 4 * (2 * 3 * 64 * 64 + 2 * 2 * 16 * 16) + 2 * 2
    assert step.static_bytes() == parameters + buffers + batch
    step()
    # RMSprop keeps one value for each weight, and a step count for each tensor.
    counts = 4 * len(list(model.parameters()))
    assert step.static_bytes() == 2 * parameters + counts + buffers + batch


@pytest.mark.parametrize("storage", ["float32", "packed", "frugal"])
def test_static_bytes_are_what_a_step_leaves(storage: str) -> None:
    made: list[TrainingStep] = []

    def run(mark: Callable[[str], object]) -> None:
        made.append(TrainingStep(PACKED.replace(quant__storage=storage), 2))
        made[0]()
        mark(STEP_DONE)

    assert allocator_bytes(run)[STEP_DONE] == made[0].static_bytes()


@pytest.mark.parametrize("storage", ["float32", "packed", "frugal"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_a_step_leaves_as_many_bytes_as_it_found(storage: str, optimizer: str) -> None:
    config = SMALL.replace(quant__storage=storage, training__optimizer=optimizer)
    step = TrainingStep(config, num_landmarks=2)
    step()
    # An optimiser that replaces its state leaves no more; gradients that it did not take are there.
    taken = storage == "frugal"
    gradients = 0 if taken else sum(parameter.nbytes for parameter in step.model.parameters())
    loss = 4
    assert step_bytes(step)[STEP_DONE] == gradients + loss


def test_the_trained_steps_are_steps() -> None:
    step = TrainingStep(PACKED, num_landmarks=2)
    losses = [step() for _ in range(4)]
    assert losses[-1] < losses[0]


def test_packed_storage_saves_and_fake_quantisation_does_not() -> None:
    packed = compare_with_naive(PACKED, 2, repeats=1)
    fake = TrainingStep(SMALL, 2)
    fake_peak = allocator_bytes(fake)["peak"] + fake.static_bytes()
    naive = packed["naive_float32"]
    assert packed.keys() == KEYS
    assert naive.keys() == COST_KEYS
    # Of so small a step the work space, which does not grow with the batch, is the most.
    assert packed["saved_bytes"] < 0.3 * naive["saved_bytes"]
    # Beside what both have: the random bits and numbers of packed storage.
    assert packed["static_bytes"] - naive["static_bytes"] == 4 * (2**15 + 2**17)
    assert packed["peak_ratio"] == packed["peak_bytes"] / naive["peak_bytes"] < 0.95
    assert fake_peak > naive["peak_bytes"]


def test_the_high_water_mark_of_a_fresh_process_grows_by_the_step() -> None:
    found = resident_growth(PACKED, 2)
    growth = found["growth_bytes"]
    assert found["static_before_bytes"] == TrainingStep(PACKED, 2).static_bytes()
    # At least the optimiser's state and the gradients, which every step has.
    gradients = sum(parameter.nbytes for parameter in DUNet(1, 0, 2).parameters())
    assert 2 * gradients < growth < 2 * gradients + 100 * MIB


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--storage", "packed", "--alpha", "--json"], 0),
        (["--storage", "frugal", "--alpha", "--json"], 0),
        (["--bits", "8,1"], 2),
        (["--storage", "frigal"], 2),
        (["--sweep", "--depths", "3,2"], 2),
        (["--sweep", "--depths", "3"], 2),
        (["--sweep", "--bits", "4,1,4"], 2),
        (["--sweep", "--alpha"], 2),
        (["--sweep", "--input-quantizer", "source"], 2),
        (["--sweep", "--storage", "frugal"], 2),
        (["--sweep", "--no-resident"], 2),
        (["--sweep", "--depths", "0,1"], 2),
        (["--sweep", "--depths", "2,65"], 2),
        (["--sweep", "--figure-batch", "0"], 2),
        (["--out", "somewhere"], 2),
        (["--depths", "2,3"], 2),
        (["--budget", "8"], 2),
    ],
)
def test_command_prints_one_json_value_or_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    sizes = ["--unets", "1", "--order", "0", "--size", "64", "--batch", "2", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["fedcunet", "memory", *sizes, *arguments])
    with pytest.raises(SystemExit) as ended:
        library.main()
    out, err = capsys.readouterr()
    assert ended.value.code == code
    if code == 0:
        result = json.loads(out)
        growth = {"resident_growth_bytes", "allocator_growth_bytes"}
        assert result.keys() == KEYS | growth
        assert result["naive_float32"].keys() == COST_KEYS | growth
        assert 0 < result["allocator_growth_bytes"] < result["peak_bytes"]
    else:
        assert out == ""
        assert len(err.strip().splitlines()) == 1


def test_a_sweep_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def need(config: RunConfig, num_landmarks: int, device: str) -> StepNeed:
        peak = config.model.unets * config.training.batch_size
        return StepNeed(peak_bytes=peak, static_bytes=1, resident_bytes=1, growth_bytes=1)

    monkeypatch.setattr("fedcunet.sweep.measure_need", need)
    sizes = ["--unets", "1", "--order", "0", "--size", "64", "--batch", "2", "--repeats", "1"]
    figure = ["--depths", "1,2,3", "--figure-batch", "5", "--budget", "0.01"]
    out = ["--out", str(tmp_path / "deep"), "--json"]
    monkeypatch.setattr("sys.argv", ["fedcunet", "memory", "--sweep", *sizes, *figure, *out])
    with pytest.raises(SystemExit) as ended:
        library.main()
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "deep" / "sweep.json").read_text())
    rows = {row["setting"]: row for row in result["settings"]["rows"]}
    assert rows.keys() == settings().keys()
    assert rows["float32"]["peak_ratio"] == 1
    assert rows["8-1-8 packed"]["peak_ratio"] < 1 < rows["8-1-8 float32"]["peak_ratio"]
    line = result["figure_5"]["lines"][0]
    assert line["measured"] == {"1": 5, "2": 10, "3": 15}
    assert (line["deepest"], line["deepest_is"]) == (2_000_000, "extrapolated")
    assert (tmp_path / "deep" / "fig5.png").is_file()


def test_measuring_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    allocator_bytes(lambda mark: torch.ones(3) + 1)
    assert capfd.readouterr() == ("", "")
