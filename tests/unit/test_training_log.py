"""TensorBoard logs of a training: what they hold, and that a resume goes on in them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedcunet.config import RunConfig
from fedcunet.data import load
from fedcunet.errors import UserError
from fedcunet.training import training_log
from fedcunet.training.central import TENSORBOARD, train_network
from fedcunet.training.training_log import open_training_log

CONFIG = RunConfig().replace(
    model__unets=1, model__order=0, training__batch_size=4, training__schedule="1:0.5"
)
Faces = dict[str, list[str]]
FACES: Faces = {
    "helen/trainset": [f"{n}_1.jpg" for n in range(6)],
    "helen/testset": [f"{n}_1.jpg" for n in range(10, 12)],
}


def train(root: Path, out: Path, *, epochs: int, resume: bool = False) -> None:
    train_network(
        CONFIG.replace(training__epochs=epochs),
        load("300w", root, "train"),
        load("300w", root, "test"),
        out,
        resume=resume,
    )


def name_newest(folder: Path, number: int) -> None:
    """The reader goes by the names, which hold seconds: too coarse for a test."""
    (path,) = folder.glob("events.out.tfevents.1*")
    path.rename(folder / f"events.out.tfevents.0{number}")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def test_a_resumed_training_goes_on_in_the_same_log_without_doubled_steps(
    make_300w: Callable[..., Path], tmp_path: Path
) -> None:
    root, folder = make_300w(FACES), tmp_path / TENSORBOARD
    train(root, tmp_path, epochs=1)
    name_newest(folder, 1)
    first = scalars(folder)
    # A second epoch that broke off after one of its steps, and is trained again.
    with open_training_log(folder, steps_done=2) as log:
        log.add(3, {"train/step_loss": 99.0})
    name_newest(folder, 2)
    assert scalars(folder)["train/step_loss"][-1] == (3, 99.0)
    train(root, tmp_path, epochs=2, resume=True)
    name_newest(folder, 3)
    found = scalars(folder)
    assert [step for step, _ in found["train/step_loss"]] == [1, 2, 3, 4]
    assert found["train/step_loss"][:2] == first["train/step_loss"]
    assert found["train/step_loss"][2][1] < 99
    for tag in (
        "train/loss",
        "train/images_per_second",
        "evaluation/nme_percent",
        "epoch",
        "train/learning_rate",
    ):
        assert [step for step, _ in found[tag]] == [2, 4], tag
    assert [value for _, value in found["train/learning_rate"]] == pytest.approx([2.5e-4, 1.25e-4])
    assert [value for _, value in found["epoch"]] == [1, 2]
    mean = sum(value for _, value in first["train/step_loss"]) / 2
    assert first["train/loss"][0][1] == pytest.approx(mean)


def test_steps_of_a_first_epoch_that_broke_off_are_shown_no_more(tmp_path: Path) -> None:
    for number, loss in ((1, 99.0), (2, 1.0)):
        with open_training_log(tmp_path, steps_done=0) as log:
            log.add(1, {"train/step_loss": loss})
        name_newest(tmp_path, number)
    assert scalars(tmp_path) == {"train/step_loss": [(1, 1.0)]}


def test_training_needs_no_tensorboard(
    make_300w: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_log, "has_tensorboard", lambda: False)
    train(make_300w(FACES), tmp_path, epochs=1)
    assert not (tmp_path / TENSORBOARD).exists()
    assert (tmp_path / "history.jsonl").read_text().count("\n") == 1


def test_a_resume_may_change_its_length_and_caches_but_nothing_else(
    make_300w: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_300w(FACES)
    train(root, tmp_path, epochs=1)
    caches = {"data__cache_bytes": 0, "data__cache_dir": "elsewhere", "data__disk_cache_bytes": 0}
    monkeypatch.setattr(f"{__name__}.CONFIG", CONFIG.replace(**caches))
    train(root, tmp_path, epochs=2, resume=True)
    monkeypatch.setattr(f"{__name__}.CONFIG", CONFIG.replace(data__flip_test=True))
    with pytest.raises(UserError, match=r"trained with, data\.flip-test False, found True$"):
        train(root, tmp_path, epochs=3, resume=True)
