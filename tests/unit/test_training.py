"""Local training, schedules, evaluation, checkpoints and central training with resume."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedcunet.config import RunConfig, TrainingConfig
from fedcunet.data import FACE68, MPII16, LandmarkScheme, load
from fedcunet.data.crops import Crops
from fedcunet.errors import RunFailure, UserError
from fedcunet.files import held
from fedcunet.quant.layers import quantised_weights
from fedcunet.training.central import BEST, HISTORY, LAST, optimizer_path, train_network
from fedcunet.training.checkpoint import (
    float32_bytes,
    load_checkpoint,
    model_bytes,
    save_checkpoint,
    tensors_sha256,
)
from fedcunet.training.evaluation import evaluate_mean_shape, mean_shape, predict, score
from fedcunet.training.local import (
    augmentation_of,
    batches,
    make_optimizer,
    train_pass,
)
from fedcunet.training.losses import regression_loss
from fedcunet.training.network import (
    build_network,
    get_vector,
    network_layout,
    set_vector,
    state_tensors,
)
from fedcunet.training.packed import pack_network
from fedcunet.training.schedule import rate_factor
from fedcunet.variances import VARIANCE_SUFFIX, kept, to_variances

CONFIG = RunConfig().replace(
    model__unets=1,
    model__order=0,
    quant__bits="8,1,8",
    quant__alpha=True,
    training__batch_size=4,
    training__learning_rate=1e-3,
    training__epochs=2,
)


def test_paper_schedules_divide_at_the_papers_epochs() -> None:
    def factors(is_face: bool) -> list[float]:
        epochs = (0, 29, 30, 60, 90, 100)
        return [rate_factor("paper", epoch=e, num_epochs=200, is_face=is_face) for e in epochs]

    assert factors(True) == pytest.approx([1, 1, 1 / 5, 1 / 10, 1 / 20, 1 / 20])
    assert factors(False) == pytest.approx([1, 1, 1, 1, 1, 1 / 5])


def test_other_schedules() -> None:
    assert rate_factor("constant", epoch=50, num_epochs=100, is_face=True) == 1
    assert rate_factor("cosine", epoch=0, num_epochs=100, is_face=True) == 1
    assert rate_factor("cosine", epoch=100, num_epochs=100, is_face=True) == pytest.approx(0.01)
    assert rate_factor("2:0.5,4:0.1", epoch=4, num_epochs=9, is_face=True) == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", ["", "papr", "1:", "1:-1", "-1:2", "1:nan"])
def test_a_schedule_that_cannot_be_read_is_refused(schedule: str) -> None:
    with pytest.raises(UserError, match=r"training\.schedule"):
        rate_factor(schedule, epoch=0, num_epochs=1, is_face=True)


def test_no_batch_has_one_example() -> None:
    assert batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]
    assert batches([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]
    assert batches([7], 2) == [[7, 7]]


def test_loss_is_summed_over_heads_and_leaves_unlabelled_landmarks_out() -> None:
    target = torch.zeros(1, 2, 4, 4)
    heatmaps = [torch.full((1, 2, 4, 4), 0.5), torch.ones(1, 2, 4, 4)]
    heatmaps[0][0, 1] = 100
    labelled = torch.tensor([[True, False]])
    assert regression_loss(heatmaps, target, labelled).item() == pytest.approx(0.25 + 1)
    assert regression_loss(heatmaps, target, ~torch.ones_like(labelled)).item() == 0


@pytest.fixture
def faces(make_300w: Callable[..., Path]) -> Path:
    return make_300w(
        {
            "helen/trainset": [f"{n}_1.jpg" for n in range(6)],
            "helen/testset": [f"{n}_1.jpg" for n in range(10, 13)],
        }
    )


def crops_of(root: Path, subset: str) -> Crops:
    return Crops(load("300w", root, subset).annotations, FACE68, size=64)


def trained(root: Path, seed: tuple[int, ...]) -> tuple[str, float]:
    model = build_network(CONFIG, 68)
    result = train_pass(
        model,
        crops_of(root, "train"),
        make_optimizer(model, TrainingConfig(optimizer="rmsprop"), 1e-3),
        batch_size=4,
        num_epochs=1.5,
        sigma=1.0,
        augmentation=augmentation_of(CONFIG.data, FACE68),
        seed=seed,
    )
    assert (result.num_examples, result.num_steps) == (9, 2)
    return tensors_sha256(model), result.loss


def test_people_are_mirrored_and_faces_are_not_unless_told() -> None:
    def flips(name: str, scheme: LandmarkScheme) -> bool:
        return augmentation_of(CONFIG.replace(data__flip=name).data, scheme).flip

    assert [flips(name, MPII16) for name in ("paper", "always", "never")] == [True, True, False]
    assert [flips(name, FACE68) for name in ("paper", "always", "never")] == [False, True, False]


def test_training_follows_from_its_seed_alone(faces: Path) -> None:
    assert trained(faces, (0, 1)) == trained(faces, (0, 1))
    assert trained(faces, (0, 1)) != trained(faces, (0, 2))


def test_training_learns_a_few_pictures_by_heart(faces: Path) -> None:
    config = RunConfig().replace(model__unets=1, model__order=0)
    model, crops = build_network(config, 68), crops_of(faces, "train")
    optimizer = make_optimizer(model, TrainingConfig(optimizer="adam"), 5e-3)
    losses = [
        train_pass(
            model,
            crops,
            optimizer,
            batch_size=6,
            num_epochs=1,
            sigma=1.0,
            augmentation=None,
            seed=(0, step),
        ).loss
        for step in range(60)
    ]
    assert losses[-1] < 0.6 * losses[10]
    distance = np.linalg.norm(predict(model, crops) - crops.targets()[0], axis=2)
    assert np.median(distance) < 6  # one and a half heatmap pixels; a blind guess is off by 15


def test_latent_weights_stay_within_one_while_training(faces: Path) -> None:
    model = build_network(CONFIG, 68)
    train_pass(
        model,
        crops_of(faces, "train"),
        make_optimizer(model, TrainingConfig(optimizer="sgd"), 5000.0),
        batch_size=4,
        num_epochs=0.5,
        sigma=1.0,
        augmentation=None,
        seed=(0,),
    )
    assert max(float(weight.detach().abs().max()) for weight in quantised_weights(model)) == 1


def test_mean_shape_ignores_what_is_not_labelled() -> None:
    class TwoPoints:
        def targets(self) -> tuple[np.ndarray, np.ndarray]:
            points = np.array([[[2.0, 2.0], [9.0, 9.0]], [[4.0, 6.0], [1.0, 3.0]]])
            return points, np.array([[True, False], [True, True]])

    assert mean_shape(TwoPoints()).tolist() == [[3, 4], [1, 3]]


def test_mean_shape_of_one_face_is_exact_on_itself(faces: Path) -> None:
    one = load("300w", faces, "test")
    crops = Crops(one.annotations[:1], FACE68, size=64)
    assert evaluate_mean_shape(crops, one, crops).percent == pytest.approx(0, abs=1e-9)


def test_pck_counts_points_within_a_fifth_of_the_torso() -> None:
    target = np.zeros((1, 14, 2))
    target[0, 9] = (0, 100)  # left shoulder; the right hip is at 0: a torso of 100
    predicted = target.copy()
    predicted[0, :7, 0] += 19
    predicted[0, 7:, 0] += 21
    found = score(predicted, target, np.ones((1, 14), dtype=bool), "pck")
    assert found.percent == 50
    assert found.metric_name == "pck_percent"


def test_vector_and_network_are_the_same_state() -> None:
    model = build_network(CONFIG, 68)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # not all 1
        for name, tensor in state_tensors(model).items():
            if name.endswith(VARIANCE_SUFFIX):
                logarithms = 3 * torch.randn(tensor.shape, generator=generator).numpy()
                tensor.copy_(torch.from_numpy(to_variances(kept(logarithms))))
    vector = get_vector(model)
    layout = network_layout(model)
    assert vector.shape == (layout.num_parameters,)
    named = layout.split(vector)
    for name, tensor in state_tensors(model).items():
        found = named[name]
        if name.endswith(VARIANCE_SUFFIX):
            found = to_variances(found).astype(np.float32)
        assert np.array_equal(found, tensor.numpy()), name
    fresh = build_network(CONFIG.replace(seed=5), 68)
    assert tensors_sha256(fresh) != tensors_sha256(model)
    set_vector(fresh, vector)
    assert tensors_sha256(fresh) == tensors_sha256(model)


def test_only_hidden_convolutions_are_coded_coarsely() -> None:
    layout = network_layout(build_network(CONFIG, 68))
    coarse = [name for name, fine in zip(layout.names, layout.fine, strict=True) if not fine]
    assert len(coarse) == 9 * 3 + 4
    assert all(name.startswith("unets.") and name.endswith(".conv.weight") for name in coarse)
    assert not any("num_batches_tracked" in name for name in layout.names)


def test_model_bytes_are_the_length_of_the_exported_file(tmp_path: Path) -> None:
    model = build_network(CONFIG, 68)
    float32 = 4 * network_layout(model).num_parameters
    assert model_bytes(model, CONFIG, FACE68) == len(pack_network(model, CONFIG, FACE68).content)
    assert model_bytes(model, CONFIG, FACE68) < float32 / 10
    unquantised = CONFIG.replace(quant__bits="32,32,32", quant__alpha=False)
    plain = build_network(unquantised, 68)
    assert model_bytes(plain, unquantised, FACE68) == float32_bytes(plain) == float32


def test_checkpoint_gives_network_and_setting_back(tmp_path: Path) -> None:
    model = build_network(CONFIG, 68)
    path = tmp_path / "deep" / "model.safetensors"
    save_checkpoint(path, model, CONFIG, FACE68, {"round": "3"})
    loaded = load_checkpoint(path)
    assert tensors_sha256(loaded.model) == tensors_sha256(model)
    assert loaded.config == CONFIG
    assert loaded.scheme == FACE68
    assert loaded.facts == {"round": "3"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="not found"):
        load_checkpoint(path)
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"expected format fedcunet\.checkpoint\.v1"):
        load_checkpoint(path)


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


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("config", None, "config, found nothing"),
        ("config", "{", "config, found '{'"),
        ("facts", "[]", "facts, found '[]'"),
    ],
)
def test_a_checkpoint_with_odd_metadata_is_refused_in_a_line(
    tmp_path: Path, key: str, value: str | None, found: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_network(CONFIG, 68), CONFIG, FACE68)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata[key]
    save_file(tensors, path, metadata | ({} if value is None else {key: value}))
    with pytest.raises(
        UserError, match=re.escape(f"{path}: expected a JSON object as its {found}")
    ):
        load_checkpoint(path)
    with pytest.raises(UserError, match="expected a file, found a folder"):
        load_checkpoint(tmp_path)


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
