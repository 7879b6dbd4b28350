"""Central training: resume, files of a training that was killed, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedcunet.data import load
from fedcunet.errors import RunFailure, UserError
from fedcunet.files import held
from fedcunet.training.central import BEST, HISTORY, LAST, optimizer_path, train_network
from fedcunet.training.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    tensors_sha256,
)
from tests.made_networks import SMALL as CONFIG


def central(root: Path, out: Path, *, epochs: int, resume: bool = False) -> str:
    model = train_network(
        CONFIG.replace(training__epochs=epochs),
        load("300w", root, "train"),
        load("300w", root, "test"),
        out,
        resume=resume,
    )
    return tensors_sha256(model)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam", "sgd"])
def test_a_resumed_training_ends_as_one_that_was_never_stopped(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(f"{__name__}.CONFIG", CONFIG.replace(training__optimizer=optimizer))
    whole = central(faces, tmp_path / "whole", epochs=2)
    central(faces, tmp_path / "parts", epochs=1)
    assert central(faces, tmp_path / "parts", epochs=2, resume=True) == whole
    assert load_checkpoint(tmp_path / "parts" / LAST).facts["epoch"] == "2"
    assert (tmp_path / "parts" / BEST).exists()


@pytest.mark.parametrize("step", ["_save_optimizer", "_record", "LAST", "_remove_states"])
def test_a_training_killed_between_its_files_goes_on_as_if_it_never_was(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(f"{__name__}.CONFIG", CONFIG.replace(training__optimizer="sgd"))
    whole = central(faces, tmp_path / "whole", epochs=2)
    central(faces, tmp_path / "parts", epochs=1)
    save = save_checkpoint

    def kill(*arguments: object) -> None:
        raise KeyboardInterrupt

    def save_all_but_last(path: Path, *arguments: Any) -> None:
        (kill if path.name == LAST else save)(path, *arguments)

    with monkeypatch.context() as patch:
        name, killer = ("save_checkpoint", save_all_but_last) if step == "LAST" else (step, kill)
        patch.setattr(f"fedcunet.training.central.{name}", killer)
        with pytest.raises(KeyboardInterrupt):
            central(faces, tmp_path / "parts", epochs=2, resume=True)
    # Killed before the last step the epoch is done already, so one epoch more is asked for.
    if step == "_remove_states":
        whole = central(faces, tmp_path / "whole", epochs=3, resume=True)
    epochs = 3 if step == "_remove_states" else 2
    assert central(faces, tmp_path / "parts", epochs=epochs, resume=True) == whole
    lines = (tmp_path / "parts" / HISTORY).read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, epochs + 1))
    left = [path.name for path in (tmp_path / "parts").glob("optimizer*")]
    assert left == [f"optimizer-{epochs}.safetensors"]


def test_what_a_killed_training_left_half_written_is_gone(faces: Path, tmp_path: Path) -> None:
    central(faces, tmp_path, epochs=1)
    half = tmp_path / ".optimizer-2.safetensors.abc"
    half.touch()
    central(faces, tmp_path, epochs=2, resume=True)
    assert not half.exists()


def test_a_last_step_that_ruins_the_weights_is_a_failure(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.CONFIG", CONFIG.replace(training__batch_size=64))
    monkeypatch.setattr(
        "fedcunet.training.local.clamp_latent_weights",
        lambda latent: next(iter(latent)).data.fill_(float("nan")),
    )
    with pytest.raises(RunFailure, match="step 1: weights are not finite; lower the rate"):
        central(faces, tmp_path, epochs=1)
    assert not (tmp_path / LAST).exists()


def test_a_damaged_optimizer_file_is_named(faces: Path, tmp_path: Path) -> None:
    central(faces, tmp_path, epochs=1)
    optimizer_path(tmp_path, 1).write_bytes(b"no")
    with pytest.raises(UserError, match=r"optimizer-1\.safetensors: cannot be read"):
        central(faces, tmp_path, epochs=2, resume=True)


def test_an_earlier_training_is_not_overwritten(faces: Path, tmp_path: Path) -> None:
    central(faces, tmp_path, epochs=1)
    with pytest.raises(UserError, match="holds a training already"):
        central(faces, tmp_path, epochs=1)
    with pytest.raises(UserError, match=r"trained with, quant\.bits 8,1,8, found 6,1,6"):
        train_network(
            CONFIG.replace(quant__bits="6,1,6"),
            load("300w", faces, "train"),
            load("300w", faces, "test"),
            tmp_path,
            resume=True,
        )
    (tmp_path / LAST).unlink()  # the best of somebody's training is left
    with pytest.raises(UserError, match="holds a training already"):
        central(faces, tmp_path, epochs=1)


def test_two_processes_do_not_train_in_one_folder(faces: Path, tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UserError, match="another process is at work there"):
        central(faces, tmp_path, epochs=1)
    assert not (tmp_path / LAST).exists()
    central(faces, tmp_path, epochs=1)
    with held(tmp_path), pytest.raises(UserError, match="another process is at work there"):
        central(faces, tmp_path, epochs=2, resume=True)
    with held(tmp_path):  # the training has left it
        pass
    with pytest.raises(UserError, match="not found"):
        central(faces, tmp_path / "new", epochs=1, resume=True)
    assert not (tmp_path / "new").exists()
