"""Over a training: rates of latent weights, the ramp to their bits, BatchNorm that is frozen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import clients.app
from fedcunet.config import RunConfig, TrainingConfig
from fedcunet.data import FACE68, load
from fedcunet.data.crops import Crops
from fedcunet.errors import UserError
from fedcunet.quant.layers import quantised_weights
from fedcunet.training import central
from fedcunet.training.central import HISTORY, train_network
from fedcunet.training.local import make_optimizer, set_learning_rate, train_pass
from fedcunet.training.network import build_network
from fedcunet.training.schedule import norm_is_frozen, weight_share
from tests.made_networks import SMALL as CONFIG


@pytest.fixture
def root(make_300w: Callable[..., Path]) -> Path:
    return make_300w({"helen/trainset": ["1_1.jpg", "2_1.jpg"], "helen/testset": ["3_1.jpg"]})


def test_weights_get_to_their_bits_over_the_ramp() -> None:
    def shares(ramp: float, total: int, bits: str = "8,1,8") -> list[float]:
        config = RunConfig().replace(quant__bits=bits, training__ramp=ramp)
        return [weight_share(config, done=done, total=total) for done in range(total)]

    assert shares(0.5, 8) == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert shares(0.0, 3) == shares(0.5, 3, "8,32,8") == [1, 1, 1]
    # The last epoch has all bits, whatever the ramp.
    assert shares(1.0, 5) == [0, 0.25, 0.5, 0.75, 1]
    assert shares(0.5, 1) == [1]
    assert shares(0.07, 100)[7] == 1  # 0.07 * 100 is a little over 7


def test_norms_are_frozen_over_the_last_share_but_never_first() -> None:
    def frozen(share: float, total: int) -> list[bool]:
        config = RunConfig().replace(training__freeze_norm=share)
        return [norm_is_frozen(config, done=done, total=total) for done in range(total)]

    assert frozen(0.0, 3) == [False] * 3
    assert frozen(0.34, 6) == [False] * 4 + [True] * 2
    assert frozen(0.07, 100).count(True) == 7  # 0.07 * 100 is a little over 7
    assert frozen(0.29, 100).count(True) == 29  # a little under
    assert frozen(1.0, 3) == [False, True, True]
    assert frozen(1.0, 1) == [False]


@pytest.mark.parametrize("storage", ["float32", "packed", "frugal"])
def test_a_pass_with_frozen_norms_keeps_their_statistics(root: Path, storage: str) -> None:
    config = CONFIG.replace(quant__storage=storage, quant__input_quantizer="source")
    model = build_network(config, 68)
    optimizer = make_optimizer(model, config.training, 1e-3)
    crops = Crops(load("300w", root, "train").annotations, FACE68, size=64)

    def moved(*, freeze_norm: bool) -> tuple[bool, bool]:
        """Whether statistics and parameters change in a pass."""
        buffers, parameters = (
            [one.detach().clone() for one in found]
            for found in (model.buffers(), model.parameters())
        )
        train_pass(
            model,
            crops,
            optimizer,
            batch_size=2,
            num_epochs=1,
            sigma=1.0,
            augmentation=None,
            seed=(0,),
            freeze_norm=freeze_norm,
        )
        return (
            not all(map(torch.equal, model.buffers(), buffers)),
            not all(map(torch.equal, model.parameters(), parameters)),
        )

    assert moved(freeze_norm=False) == (True, True)
    assert moved(freeze_norm=True) == (False, True)
    assert moved(freeze_norm=False) == (True, True)


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam"])
def test_latent_weights_have_a_rate_of_their_own(name: Literal["rmsprop", "sgd", "adam"]) -> None:
    config = RunConfig().replace(model__unets=1, model__order=0, quant__bits="32,1,32")
    model = build_network(config, 68)
    before = {key: one.detach().clone() for key, one in model.named_parameters()}
    optimizer = make_optimizer(model, TrainingConfig(optimizer=name, latent_rate=5.0), 1.0)
    set_learning_rate(optimizer, 1e-3)
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    optimizer.step()
    latent = set(quantised_weights(model))
    moved = {
        key: float((one.detach() - before[key]).abs().mean())
        for key, one in model.named_parameters()
    }
    ends = {f"{layer}.weight" for layer in model.end_layers()}  # type: ignore[operator]
    for key, one in model.named_parameters():
        factor = 5 if one in latent else 1
        assert moved[key] == pytest.approx(factor * moved["stem.conv.weight"], rel=1e-3)
        assert (one in latent) == (one.dim() == 4 and key not in ends)


def test_a_pass_has_its_weights_on_their_way(root: Path) -> None:
    model = build_network(CONFIG, 68)
    seen: list[float] = []
    train_pass(
        model,
        Crops(load("300w", root, "train").annotations, FACE68, size=64),
        make_optimizer(model, CONFIG.training, 1e-3),
        batch_size=4,
        num_epochs=0.5,
        sigma=1.0,
        augmentation=None,
        seed=(0,),
        weight_share=0.25,
        progress=lambda *_: seen.append(model.unets[0].neck.grow.conv.spec.weight_share),
    )
    assert set(seen) == {0.25}
    assert model.unets[0].neck.grow.conv.spec.weight_share == 1


def test_epochs_bring_weights_to_their_bits(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = load("300w", root, "train"), load("300w", root, "test")
    training = {"training__ramp": 1.0, "training__latent_rate": 5.0, "training__epochs": 3}
    config = CONFIG.replace(**training, training__schedule="constant", training__freeze_norm=0.34)
    seen: list[tuple[float, list[float], bool]] = []

    def watched(model: Any, crops: Any, optimizer: torch.optim.Optimizer, **named: Any) -> Any:
        rates = sorted({1e3 * float(group["lr"]) for group in optimizer.param_groups})
        seen.append((named["weight_share"], rates, named["freeze_norm"]))
        return train_pass(model, crops, optimizer, **named)

    monkeypatch.setattr(central, "train_pass", watched)
    told: list[float] = []
    out = tmp_path / "out"
    train_network(config, *sets, out, on_epoch=lambda epoch: told.append(epoch.weight_share))
    assert told == [0, 0.5, 1]
    assert seen == [(0, [1], False), (0.5, [1, 3], False), (1, [1, 5], True)]
    lines = [json.loads(line) for line in (out / HISTORY).read_text().splitlines()]
    assert [line["weight_share"] for line in lines] == told
    with pytest.raises(UserError, match=r"trained with, training\.epochs"):
        train_network(config.replace(training__epochs=6), *sets, out, resume=True)


def test_a_cosine_does_not_leap_up_again(root: Path, tmp_path: Path) -> None:
    sets = load("300w", root, "train"), load("300w", root, "test")
    config = CONFIG.replace(training__epochs=1, training__schedule="cosine")
    train_network(config, *sets, tmp_path / "out")
    with pytest.raises(UserError, match=r"trained with, training\.epochs 1, found 2"):
        train_network(config.replace(training__epochs=2), *sets, tmp_path / "out", resume=True)


def test_frozen_statistics_do_not_thaw(root: Path, tmp_path: Path) -> None:
    sets = load("300w", root, "train"), load("300w", root, "test")
    config = CONFIG.replace(training__epochs=2, training__freeze_norm=0.5)
    train_network(config, *sets, tmp_path / "out")
    with pytest.raises(UserError, match=r"trained with, training\.epochs"):
        train_network(config.replace(training__epochs=4), *sets, tmp_path / "out", resume=True)


def test_weights_get_their_bits_over_the_rounds_of_a_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig().replace(
        model__unets=1,
        model__order=0,
        quant__bits="32,1,32",
        data__name="300w",
        data__root=str(root),
        training__ramp=0.5,
        training__latent_rate=3.0,
        training__freeze_norm=0.5,
        federation__rounds=4,
    )
    seen: list[tuple[float, list[float], bool]] = []

    def watched(
        model: object, crops: object, optimizer: torch.optim.Optimizer, **named: Any
    ) -> None:
        rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
        seen.append((named["weight_share"], rates, named["freeze_norm"]))

    monkeypatch.setattr(clients.app, "train_pass", watched)
    model = build_network(config, 68)
    for number in range(1, 5):
        clients.app._train_locally(model, None, config, 0.25, 0, number)  # type: ignore[arg-type]
    assert seen == [
        (0, [0.25], False),
        (0.5, [0.25, 0.5], False),
        (1, [0.25, 0.75], True),
        (1, [0.25, 0.75], True),
    ]
